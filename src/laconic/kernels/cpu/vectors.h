// Products with matrices of vectors that indices name, read as they are stored. The layout is that of kernels/vectors.py and kernels/bits.py: run r is
// rows r * width to (r + 1) * width; the indices of its columns, `bits` wide, follow one another from codes + r * stride on; entry e of a table
// is its numbers e * width to (e + 1) * width. With a second book its entries are added; rows may have a factor of their own.
#pragma once
#include "linear.h"

namespace laconic {

struct Book {
    const uint8_t* codes;
    size_t stride; // bytes of the indices of a run
    int bits;      // 1 to 16
    const uint16_t* table; // bf16
};

struct Vectored {
    Book books[2];
    int count;
    const uint16_t* scales; // bf16, of each row; null: none
    int64_t n, m, width;
    int64_t runs() const { return (n + width - 1) / width; }
};

// x (rows, m), one row after the other, fp32 or bf16; out (rows, n) in x's type
struct VectorProduct {
    Vectored w;
    const void* x;
    bool bf16;
    int64_t rows;
    void* out;
    int threads;
};

// What `some` rows of x from r on, times a run, come to: sums, `width` of each, with the factors of their rows.
inline void put_run(const VectorProduct& p, int64_t run, int64_t r, int64_t some, const float* sums) {
    const Vectored& w = p.w;
    const int64_t begin = run * w.width, number = w.n - begin < w.width ? w.n - begin : w.width;
    for (int64_t i = 0; i < some; i++)
        for (int64_t k = 0; k < number; k++) {
            const float value = sums[i * w.width + k] * (w.scales ? from_bf16(w.scales[begin + k]) : 1.0f);
            const int64_t to = (r + i) * w.n + begin + k;
            if (p.bf16) static_cast<uint16_t*>(p.out)[to] = to_bf16(value);
            else static_cast<float*>(p.out)[to] = value;
        }
}

// the indices of all columns of a run
void indices_of(const Book& book, int64_t run, int64_t m, int32_t* out);

void vectors_plain(const VectorProduct& p);
void vectors_dense_plain(const Vectored& w, float* out, int threads);
#if defined(LACONIC_X86)
// whether the vector kernels know this width
inline bool regular(const Vectored& w) { return w.width == 4 || w.width % 8 == 0; }
// few rows of fp32, and of bf16 where the processor multiplies pairs of such numbers
void vectors_few_avx512(const VectorProduct& p);
void vectors_few_bf16(const VectorProduct& p);
// many rows of bf16, with weights rounded to bf16, of vectors of 4 or 8
void vectors_panels_bf16(const VectorProduct& p);
#endif

} // namespace laconic
