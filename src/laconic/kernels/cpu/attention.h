// Attention of a few new tokens over a cache that is read as it is held. A half (keys or values) is parts that follow one another, a part lies in pages,
// (rows, heads, entries, ...) each. An entry is a token, or, where a scale is shared by tokens of one channel, a group of `unit` tokens with a row of
// codes for every channel. x = code * scale + zero, layout of codes as in kernels/bits.py.
#pragma once
#include <vector>

#include "linear.h"

namespace laconic {

struct Page {
    const uint8_t* data;
    const uint16_t *scales, *zeros; // null where numbers are held as they are
    int64_t width;                  // entries
};

struct Part {
    Type type;           // of numbers held as they are, else of scales and zeros
    int bits;            // 0: numbers as they are
    int64_t group, unit; // numbers that share a scale; tokens of an entry
    int64_t d, heads;
    int64_t most;                 // entries of a page that is full
    std::vector<int64_t> lengths; // entries of each row of the batch
    std::vector<Page> pages;

    int64_t codes() const { return ((unit > 1 ? unit : d) * bits + 7) / 8; } // bytes of a row of codes
    int64_t scales() const { return unit > 1 ? d : (d + group - 1) / group; } // of an entry
    int64_t bytes() const { return bits ? (unit > 1 ? d * codes() : codes()) : d * size_of(type); }
};

// entries that lie side by side
struct Stretch {
    const uint8_t* data;
    const uint16_t *scales, *zeros;
    int64_t count;
};

inline Stretch stretch(const Part& part, int64_t row, int64_t head, int64_t entry, int64_t most) {
    const Page& page = part.pages[size_t(entry / part.most)];
    const int64_t in = entry % part.most, at = (row * part.heads + head) * page.width + in, s = page.scales ? at * part.scales() : 0;
    return {page.data + at * part.bytes(), page.scales ? page.scales + s : nullptr, page.scales ? page.zeros + s : nullptr,
            most < page.width - in ? most : page.width - in};
}

// a run of tiles of one row and head of the batch, and who computes it
struct Run {
    int64_t worker, pair, first, last;
};

struct Held {
    const float* query; // (b, h, t, d)
    bool fine;          // whether queries have more than 16 bits
    int64_t b, h, k, t, d, e;
    std::vector<Part> keys, values;
    std::vector<int64_t> lengths; // tokens of each row
    const uint8_t* mask;          // (b, t, longest), or null
    float scale;
    int64_t tile;
    std::vector<Run> runs; // those of a pair in order of their tiles
    float* out;            // (b, h, t, e)
    int workers;
};

// What a worker has of one pair: the `rows` queries of one head of keys, and what was seen so far. Scores are to the base 2.
struct Work {
    int64_t rows, d, e;
    int64_t wide, high, far, ld; // d, e, e in planes and a tile, with room for whole vectors
    bool fine;
    float *q, *split;          // (rows, wide) times the scale; split: with the odd ones of 32 behind the even ones
    float *scores;             // (rows, ld)
    float *top, *sum, *o;      // (rows), (rows), (rows, high)
    float *planes, *shift;     // (rows, far), (rows, 16): what vector kernels have gathered of o in an order of their own
    float* room;               // a token in fp32, and behind it LITTLE more
    uint8_t* words;            // integers made of queries or weights
};
constexpr int64_t LITTLE = 32;

// what differs between processors; scores and values act on tokens at..at+n of a tile
struct Ops {
    void (*scores)(const Work&, Type, const void* keys, int64_t n, int64_t at);
    void (*values)(const Work&, Type, const void* values, int64_t n, int64_t at);
    // scores of n tokens become weights
    void (*weigh)(const Work&, int64_t n);
    // one group of keys by channels; how many of n grouped values were taken in. 0: not known to this processor
    bool (*channels)(const Work&, const Part&, const Stretch&, int64_t at);
    int64_t (*grouped)(const Work&, const Part&, const Stretch&, int64_t at);
    // what lies in planes and shift, added to o
    void (*gather)(const Work&, const Part&);
};

extern const Ops plain_ops;
#if defined(LACONIC_X86)
extern const Ops avx512_ops;
#endif

void attend(const Held& held, const Ops& ops);

} // namespace laconic
