// Products with matrices most of whose weights are zero, read as they are stored: a bit says of each weight whether it is there, bit j of a row in byte
// j / 8 from the lowest up; those that are there follow one another as numbers or as grouped codes, those of row i from starts[i] on.
#pragma once
#include "linear.h"

namespace laconic {

struct Sparse {
    const uint8_t* mask;
    size_t stride;         // bytes of a row of the mask
    const int64_t* starts; // n + 1
    int64_t n, m;
    Type type;
    const void* values; // null where they are codes
    Weight codes;       // n rows, or one for all
    int64_t count(int64_t row) const { return starts[row + 1] - starts[row]; }
    int64_t total() const { return starts[n]; }
};

// x (rows, m), one row after the other, fp32 or bf16; out (rows, n), in bf16 in `narrow` or in fp32 in `out`
struct SparseProduct {
    Sparse w;
    const void* x;
    bool bf16;
    int64_t rows;
    float* out;
    uint16_t* narrow;
    int threads;
};

// rows of the matrix as they are: row index[i], or first + i where there is no index
struct SparseRows {
    Sparse w;
    const int64_t* index;
    int64_t first, count;
    float* out; // (count, m)
    int threads;
    int64_t row(int64_t i) const { return index ? index[i] : first + i; }
};

// the product with every pixel of images that lie channel by channel: x (images, m, pixels) -> out (images, n, pixels)
struct SparsePixels {
    Sparse w;
    const float* x;
    int64_t images, pixels;
    float* out;
    int threads;
};

// 32 columns of a row of the mask, the last 1 to 31 where `left` says so
inline uint32_t bits_at(const uint8_t* mask, int64_t block) {
    uint32_t bits;
    std::memcpy(&bits, mask + 4 * block, 4);
    return bits;
}

inline uint32_t last_bits(const uint8_t* mask, int64_t block, int64_t left) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < (left + 7) / 8; i++) bits |= uint32_t(mask[4 * block + i]) << (8 * i);
    return bits & ((uint32_t(1) << left) - 1);
}

// how many weights each row has: starts (n + 1), the first 0
void starts_plain(const uint8_t* mask, size_t stride, int64_t n, int64_t m, int64_t* starts);
void sparse_plain(const SparseProduct& p);
void sparse_rows_plain(const SparseRows& p);
void sparse_pixels(const SparsePixels& p);
#if defined(LACONIC_X86)
// with VBMI2; the second, where x is in bf16, with products of pairs of bf16
void sparse_avx512(const SparseProduct& p);
void sparse_bf16(const SparseProduct& p);
void sparse_rows_avx512(const SparseRows& p);
#endif

} // namespace laconic
