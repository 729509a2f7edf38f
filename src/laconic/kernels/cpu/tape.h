// A decoder as a list of steps over buffers of fp32, run in one call: what stands between its products costs no more than its arithmetic. A buffer holds
// `rows` runs of numbers, a run for each new token: those of the first text, then those of the second.
#pragma once
#include <vector>

#include "attention.h"

namespace laconic {

struct Step {
    // skip: what is below its threshold counts as zero, and what would be multiplied with it is not read; outside: whoever runs the tape does this one
    enum class Kind { norm, linear, dense, rope, append, attend, gate, skip, add, outside };
    Kind kind;
    int64_t from = 0, to = 0;            // buffers
    int64_t width = 0, heads = 1;        // numbers of a head, or of a row; heads of a row
    int64_t layer = 0, groups = 0;       // whose cache; heads of keys
    const float* values = nullptr;       // what a norm multiplies with, the bias of a product
    float eps = 0.0f, scale = 0.0f;
    Weight w{};
    bool int8 = false;
    const void* matrix = nullptr;        // a matrix as it is, (heads, width) here, of 16 bits where `narrow`
    bool narrow = false;
    int64_t by = -1, inner = 0;          // of a skip that gates: the buffer of its other input, and how wide that is
    const void* second = nullptr;        // what that input is multiplied with, (width, inner), as wide as `matrix`
    int64_t most = 0;                    // rows that this product, or new tokens that this attention, is quickest for
};

// keys and values of one layer in pages of PAGE tokens, (rows, heads, PAGE, d) each
constexpr int64_t PAGE = 256;

class Tape {
    std::vector<Step> steps;
    std::vector<float*> buffers;
    std::vector<std::vector<Page>> keys, values;
    const float *cosines = nullptr, *sines = nullptr; // (positions, d)
    Level level;
    bool bf16; // whether inputs of products, keys and values have 16 bits
    std::vector<float> query, found, coarse;
    std::vector<uint16_t> narrow;

    bool linear(const Step& s, int64_t rows, int threads);
    void dense(const Step& s, int64_t rows, int threads);
    void skip(const Step& s, int64_t rows, int threads);
    void append(const Step& s, int64_t b, int64_t t, int64_t past);
    void attend(const Step& s, int64_t b, int64_t t, int64_t past, int threads);

  public:
    Tape(Level level, bool bf16, int64_t layers) : keys(size_t(layers)), values(size_t(layers)), level(level), bf16(bf16) {}
    int64_t add(const Step& step) {
        steps.push_back(step);
        return int64_t(steps.size()) - 1;
    }
    void hold(const std::vector<uintptr_t>& places);
    void turn(uintptr_t cosines, uintptr_t sines);
    void page(int64_t layer, const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values);
    // steps first to last - 1 for t new tokens of each of b texts that have `past` tokens behind them; where it stopped: at `last`, or at a step that is to
    // be done outside, because it is one of these, has more rows than it is for, or numbers that are not finite
    int64_t run(int64_t first, int64_t last, int64_t b, int64_t t, int64_t past, int threads);
};

} // namespace laconic
