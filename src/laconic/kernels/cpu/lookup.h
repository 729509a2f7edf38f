// Products with matrices of codes that name values of a table, read as they are stored. The layout is that of kernels/levels.py and
// kernels/bits.py: row i of `codes` begins at i * stride, code j fills bits j*bits .. (j+1)*bits of it, w = table[code] * scale.
#pragma once
#include "linear.h"

namespace laconic {

enum class Scaling { bf16, e8m0, e4m3 };
// what is known of a table: nothing; the highest bit of a code is its sign, so that the second half is the first one's negative; a float format
// of 8 bits, of which codes that are no numbers do not occur
enum class Kind { any, signs, e4m3, e5m2 };

struct Leveled {
    const uint8_t* codes;
    size_t stride;         // bytes of a row of codes
    const uint8_t* scales; // groups of a row one after the other, of two bytes or one
    Scaling scaling;
    float whole;           // what scales in e4m3 are multiplied with
    const uint16_t* table; // bf16, one value for each code
    Kind values;
    int64_t n, m;          // rows, columns
    int64_t group, groups; // weights of a group, groups of a row
    int bits;
    int64_t wide() const { return scaling == Scaling::bf16 ? 2 : 1; }
};

// x (rows, m), one row after the other, fp32 or bf16; out (rows, n) in x's type
struct Looked {
    Leveled w;
    const void* x;
    bool bf16;
    int64_t rows;
    void* out;
    int threads;
};

inline void put(const Looked& p, int64_t at, float value) {
    if (p.bf16) static_cast<uint16_t*>(p.out)[at] = to_bf16(value);
    else static_cast<float*>(p.out)[at] = value;
}

inline float scale_at(const Leveled& w, int64_t row, int64_t group) {
    const int64_t at = row * w.groups + group;
    if (w.scaling == Scaling::bf16) return from_bf16(reinterpret_cast<const uint16_t*>(w.scales)[at]);
    const uint32_t byte = w.scales[at];
    if (w.scaling == Scaling::e8m0) {
        const uint32_t bits = byte ? byte << 23 : 1u << 22;
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    }
    const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
    const uint32_t bits = (exponent + 120) << 23 | mantissa << 20;
    float out;
    std::memcpy(&out, &bits, 4);
    return (exponent ? out : float(mantissa) / 512.0f) * w.whole;
}

// whether the vector kernels know these groups
inline bool regular(const Leveled& w) {
    const int64_t lane = 2 * planes(w.bits), block = 32 * planes(w.bits);
    return w.group >= w.m || w.group % block == 0 || (block % w.group == 0 && w.group % lane == 0);
}

void lookup_plain(const Looked& p);
void lookup_dense_plain(const Leveled& w, float* out, int threads);
#if defined(LACONIC_X86)
// x in fp32, or in bf16 made fp32
void lookup_wide_avx512(const Looked& p);
// x in bf16, where the processor multiplies pairs of such numbers
void lookup_narrow_avx512(const Looked& p);
// many rows of such, with values and scales rounded to bf16 together, for groups that are a row or a multiple of 16 columns
void lookup_panels_bf16(const Looked& p);
void lookup_dense_avx512(const Leveled& w, float* out, int threads);
#endif

} // namespace laconic
