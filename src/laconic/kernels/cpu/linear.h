// Products with matrices of grouped integer codes, read as they are stored. The layout is that of kernels/grids.py and kernels/bits.py:
// row i of `codes` begins at i * stride, code j fills bits j*bits .. (j+1)*bits of it, w = (code - zero) * scale, one scale (and zero) a group.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define LACONIC_X86
#endif
#if defined(LACONIC_X86) && !defined(__clang__) && defined(__gnu_linux__)
// compiled for several processors, chosen by what they can when the library is loaded (a processor's name, as in arch=haswell, is none of another maker)
#if __GNUC__ >= 12
#define LACONIC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LACONIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define LACONIC_CLONES
#endif

namespace laconic {

struct Weight {
    const uint8_t* codes;
    size_t stride;          // bytes of a row of codes
    const uint16_t* scales; // bf16, groups of a row one after the other
    const uint8_t* zeros;   // packed as codes are; null where all are 2^(bits-1), of halves 2^(bits-1) - 1/2
    size_t zero_stride;
    int64_t n, m;           // rows, columns
    int64_t group, groups;  // weights of a group, groups of a row
    int bits;
    bool half;              // zeros are counted in halves and have a bit more; for codes of up to 7 bits
    int zero_bits() const { return bits + half; }
    int middle() const { return half ? (1 << bits) - 1 : 1 << (bits - 1); }
    float unit() const { return half ? 0.5f : 1.0f; }
};

// x (rows, m), one row after the other, fp32 or bf16; out (rows, n) fp32
struct Product {
    Weight w;
    const void* x;
    bool bf16;
    int64_t rows;
    float* out;
    int threads;
    uint16_t* narrow = nullptr; // out in bf16, in place of `out`
};

// memory that begins at a cache line and is kept between calls of a thread
class Room {
    void* at = nullptr;
    size_t size = 0;
    void drop() {
        if (at) ::operator delete(at, std::align_val_t(64));
        at = nullptr, size = 0;
    }

  public:
    uint8_t* of(size_t wanted) {
        if (wanted > size) {
            drop();
            at = ::operator new(wanted, std::align_val_t(64));
            size = wanted;
        }
        return static_cast<uint8_t*>(at);
    }
    // a product over many rows does not hold its room for ever
    void shrink() {
        if (size > (size_t(1) << 22)) drop();
    }
    ~Room() { drop(); }
};

// to the nearest, ties to even
inline uint16_t to_bf16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return uint16_t(wide >> 16 | 0x40);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
    uint32_t wide = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

// numbers that are held as they are
enum class Type { fp32, bf16, fp16 };

inline int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

inline float from_fp16(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000) << 16, exponent = (value >> 10) & 31, fraction = value & 1023;
    uint32_t wide;
    if (exponent == 0) {
        const float small = float(fraction) * 5.9604644775390625e-8f;
        return sign ? -small : small;
    }
    wide = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

inline float from_16(uint16_t value, Type type) { return type == Type::bf16 ? from_bf16(value) : from_fp16(value); }

// one number of a result, in bf16 where that is asked for
template <class P>
inline void put(const P& p, int64_t at, float value) {
    if (p.narrow) p.narrow[at] = to_bf16(value);
    else p.out[at] = value;
}

// one code of a packed row; never reads behind the byte that the code ends in
inline int code_at(const uint8_t* row, int64_t index, int bits) {
    int64_t first = index * bits;
    int shift = int(first & 7);
    int word = row[first >> 3];
    if (shift + bits > 8) word |= row[(first >> 3) + 1] << 8;
    return (word >> shift) & ((1 << bits) - 1);
}

// the zero of a group of a row
inline float zero_at(const Weight& w, int64_t row, int64_t group) {
    return float(w.zeros ? code_at(w.zeros + row * w.zero_stride, group, w.zero_bits()) : w.middle()) * w.unit();
}

// Codes become words of 16 bits by shifts alone: plane p of word j is code planes * j + p of a block. A block is what one load of codes stands for,
// 64 bytes where a width divides 8, else 8 * bits bytes.
inline int planes(int bits) { return bits == 4 ? 4 : bits == 2 ? 8 : 2; }

// Rows of x that share one unpacking of codes.
constexpr int TOGETHER = 4;

// x as integers of 16 bits, block by block. Entries of bf16 take one, in steps of a 32767th of the block's greatest; entries of fp32 take a second one
// for what the first leaves, in steps 2^15 times as fine, so that nothing of them is lost that a sum in fp32 would keep.
// Rows stand in bunches of 4, then of 2 and 1, each bunch as [block][row][term][plane][32]; scales as [block][row].
struct Prepared {
    int64_t blocks, groups, padded; // padded: groups, up to a multiple of 16
    int planes, terms;
    int16_t* x;
    float* scale;
    float* sums; // [row][padded]: of x over each group of w's columns
};
constexpr float TOP = 32767.0f, FINER = 32768.0f;

// rows of the bunch that begins at row r
inline int64_t bunch(int64_t rows, int64_t r) {
    const int64_t rest = rows - r;
    return rest >= TOGETHER ? TOGETHER : rest >= 2 ? 2 : 1;
}

// whether the vector kernels know these groups
inline bool regular(const Weight& w) {
    const int64_t lane = 2 * planes(w.bits), block = 32 * planes(w.bits);
    return w.group >= w.m || w.group % block == 0 || (block % w.group == 0 && w.group % lane == 0);
}

// Inputs of 8 bits: x becomes whole numbers of -127 to 127 as it comes, with one scale for each run of columns, which is a group of the weight, or RUN
// columns of a group that is longer. Products with codes less their zero are whole numbers, exact in 32 bits, and become fp32 once a run.
constexpr int64_t RUN = 128;
constexpr float MOST = 127.0f;

struct Runs {
    int64_t m, group, each, count; // each: runs of a group

    explicit Runs(const Weight& w) : m(w.m), group(w.group), each((group + RUN - 1) / RUN), count(m / group * each + (m % group + RUN - 1) / RUN) {}
    int64_t group_of(int64_t run) const { return run / each; }
    int64_t begin(int64_t run) const { return run / each * group + run % each * RUN; }
    int64_t end(int64_t run) const {
        const int64_t whole = (run / each + 1) * group, next = begin(run) + RUN, last = next < whole ? next : whole;
        return last < m ? last : m;
    }
};

// A run's scale and its inverse, from its greatest: the same fp32 operations as in the reference. Below 1e-33 the inverse would be infinite: zeros.
inline float step_of(float peak, float& inverse) {
    const bool none = peak < 1e-33f;
    inverse = none ? 0.0f : MOST / peak;
    return none ? 0.0f : peak / MOST;
}

// x rounded: whole numbers [row][wide], each run filled up with zeros to a multiple of 32; scale and sum of them [row][run]
struct Rounded {
    Runs runs;
    int64_t wide;
    std::vector<int64_t> at; // where a run begins, and the last ends
    std::vector<int8_t> x;
    std::vector<float> scale;
    std::vector<int32_t> sum;

    explicit Rounded(const Product& p);
    // false where x holds NaN or an infinity
    bool fill(const Product& p);
};

// where a matrix lies, by addresses as Python has them
struct Stored {
    uintptr_t codes;
    size_t stride;
    uintptr_t scales, zeros;
    size_t zero_stride;
    int64_t n, m;
    int bits;
    int64_t group; // 0: the whole row
    bool half;
};

enum class Level { plain, avx2, avx512 };

Level level_of(const std::string& name);
Weight weight_of(const Stored& stored);
// the product by the best kernel of a level that knows its groups; false: x holds numbers that are not finite, and nothing was computed
bool multiply(const Product& p, Level level);
// the same with x rounded to 8 bits on the fly
bool multiply_int8(const Product& p, Level level);
void dense(const Weight& w, float* out, int threads, Level level);

void product_plain(const Product& p);
// columns from..to of a row as numbers; `from` is a multiple of 8
void span_plain(const Weight& w, int64_t row, int64_t from, int64_t to, float* out);
// false where x holds NaN or an infinity
bool int8_plain(const Product& p);
void dense_plain(const Weight& w, float* out, int threads);
#if defined(LACONIC_X86)
// whether AVX2 knows these groups
inline bool regular_avx2(const Weight& w) { return w.group >= w.m || w.group % 16 == 0; }
// false where x holds NaN or an infinity
bool product_avx2(const Product& p);
void dense_avx2(const Weight& w, float* out, int threads);
bool int8_avx2(const Product& p);
// false where a row holds NaN or an infinity
bool prepare_avx512(const Product& p, const Prepared& q);
void product_avx512(const Product& p, const Prepared& q);
void dense_avx512(const Weight& w, float* out, int threads);
// as span_plain, for groups that are a row or a multiple of 16 columns; `from` is a multiple of 64
void span_avx512(const Weight& w, int64_t row, int64_t from, int64_t to, float* out);
bool int8_avx512(const Product& p);
// whether this processor multiplies pairs of bf16, and whether it does so without tiles of AMX, by which torch is quicker
bool pairs();
bool only_pairs();
// more rows of bf16 than this are quicker by panels than by codes as they are read
constexpr int64_t SOME = 12;
// many rows of bf16, with weights rounded to bf16, for groups that are a row or a multiple of 16 columns; what is not finite in x goes through the sums
void panels_bf16(const Product& p);
#endif

} // namespace laconic
