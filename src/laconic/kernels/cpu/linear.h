// Products with matrices of grouped integer codes, read as they are stored. The layout is that of kernels/grids.py and kernels/bits.py:
// row i of `codes` begins at i * stride, code j fills bits j*bits .. (j+1)*bits of it, w = (code - zero) * scale, one scale (and zero) a group.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define LACONIC_X86
#endif
#if defined(LACONIC_X86) && !defined(__clang__) && defined(__gnu_linux__)
// compiled for several processors, chosen when the library is loaded
#define LACONIC_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define LACONIC_CLONES
#endif

namespace laconic {

struct Weight {
    const uint8_t* codes;
    size_t stride;          // bytes of a row of codes
    const uint16_t* scales; // bf16, groups of a row one after the other
    const uint8_t* zeros;   // packed as codes are; null where all are 2^(bits-1)
    size_t zero_stride;
    int64_t n, m;           // rows, columns
    int64_t group, groups;  // weights of a group, groups of a row
    int bits;
};

// x (rows, m), one row after the other, fp32 or bf16; out (rows, n) fp32
struct Product {
    Weight w;
    const void* x;
    bool bf16;
    int64_t rows;
    float* out;
    int threads;
};

inline float from_bf16(uint16_t value) {
    uint32_t wide = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
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
    return w.zeros ? float(code_at(w.zeros + row * w.zero_stride, group, w.bits)) : float(1 << (w.bits - 1));
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

void product_plain(const Product& p);
void dense_plain(const Weight& w, float* out, int threads);
#if defined(LACONIC_X86)
// whether AVX2 knows these groups
inline bool regular_avx2(const Weight& w) { return w.group >= w.m || w.group % 16 == 0; }
// false where x holds NaN or an infinity
bool product_avx2(const Product& p);
void dense_avx2(const Weight& w, float* out, int threads);
// false where a row holds NaN or an infinity
bool prepare_avx512(const Product& p, const Prepared& q);
void product_avx512(const Product& p, const Prepared& q);
void dense_avx512(const Weight& w, float* out, int threads);
#endif

} // namespace laconic
