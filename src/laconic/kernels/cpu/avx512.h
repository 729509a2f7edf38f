// What the kernels for AVX-512 share. Included by files that are compiled with its instructions only; nothing here is seen by the linker.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "linear.h"

namespace laconic {

namespace {

// rows of the weight that stay in the nearest caches while bunches of x pass by
constexpr int64_t NEAR = 16;
// Bytes that are asked for ahead of their use: from memory into the second cache, so far ahead that arithmetic and memory do not wait for each other, and
// from there into the first. Asked for in one step, what is on its way from memory holds the first cache's few places for it.
constexpr size_t FAR = 16384, SOON = 512;
inline void ask(const void* at) {
    _mm_prefetch(static_cast<const char*>(at) + FAR, _MM_HINT_T1);
    _mm_prefetch(static_cast<const char*>(at) + SOON, _MM_HINT_T0);
}
// rows of the weight that are read side by side, so that one does not wait for another
constexpr int SIDE = 4;

// the lowest `count` bits, which may be over 64
inline __mmask64 first(int64_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

inline __mmask64 low_bits(int bytes) { return bytes == 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1; }

// 64 codes in their order, a byte each, whatever the width
template <int BITS>
struct Bytes {
    static constexpr int BYTES = 8 * BITS;
    __m512i spread, shifts;

    Bytes() {
        // eight codes are BITS bytes: into a word of 64 bits each, then a window of 8 bits at every BITS-th bit
        alignas(64) uint8_t from[64], by[64];
        for (int i = 0; i < 64; i++) {
            from[i] = uint8_t(std::min(i / 8 * BITS + std::min(i % 8, BITS - 1), 63));
            by[i] = uint8_t(i % 8 * BITS);
        }
        spread = _mm512_load_si512(from);
        shifts = _mm512_load_si512(by);
    }

    __m512i of(__m512i v) const {
        if constexpr (BITS == 8) return v;
        else return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, v)), _mm512_set1_epi8((1 << BITS) - 1));
    }

    // available: bytes of the row from here on
    __m512i load(const uint8_t* at, int64_t available) const {
        return of(_mm512_maskz_loadu_epi8(first(std::min<int64_t>(available, BYTES)), at));
    }
};

inline __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

inline __m256i narrowed(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(near, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40)));
}

// Scales of a row, block by block: one for all of a block, or, where a block holds several groups, a lane for each run of 2 * planes columns.
struct Scales {
    int64_t share;  // groups of a block; 0: a group is a block or more
    int64_t blocks; // blocks of a group
    __m512i lanes;

    Scales(const Weight& w, int64_t width) : Scales(w.group, w.m, width) {}
    Scales(int64_t group, int64_t m, int64_t width) {
        share = group < m && group < width ? width / group : 0;
        blocks = share ? 1 : group >= m ? m / width + 1 : group / width;
        alignas(64) int32_t at[16];
        for (int i = 0; i < 16; i++) at[i] = int32_t(i * share / 16);
        lanes = _mm512_load_si512(at);
    }
};

template <bool SHARED, int N>
struct Running {
    const Scales& scales;
    const uint16_t* row;
    const int64_t stride; // groups of a row
    int64_t groups, left = 0;

    // of the next block of N rows
    void next(__m512 (&out)[N]) {
        if constexpr (SHARED) {
            const __mmask16 there = __mmask16(first(std::min(scales.share, groups)));
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                out[n] = _mm512_permutexvar_ps(scales.lanes, widen(_mm256_maskz_loadu_epi16(there, row + n * stride)));
            row += scales.share, groups -= scales.share;
        } else if (left-- == 0) {
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) out[n] = _mm512_set1_ps(from_bf16(row[n * stride]));
            row++;
            left = scales.blocks - 1;
        }
    }
};

// zeros of 64 groups from a row of packed ones, as bytes, in the weight's units
template <int BITS>
inline __m512i zeros_of(const Weight& w, const Bytes<BITS>& bytes, int64_t row, int64_t group) {
    if constexpr (BITS < 8)
        if (w.half) {
            static const Bytes<BITS + 1> finer;
            const int64_t at = group / 8 * (BITS + 1);
            return finer.load(w.zeros + row * w.zero_stride + at, int64_t(w.zero_stride) - at);
        }
    const int64_t at = group / 8 * BITS;
    return bytes.load(w.zeros + row * w.zero_stride + at, int64_t(w.zero_stride) - at);
}

// scale * zero of each group of a row
template <int BITS>
void offsets(const Weight& w, const Bytes<BITS>& bytes, int64_t row, int64_t padded, float* out) {
    const uint16_t* scales = w.scales + row * w.groups;
    alignas(64) uint8_t zeros[64];
    std::fill(zeros, zeros + 64, uint8_t(w.middle()));
    const __m512 unit = _mm512_set1_ps(w.unit());
    for (int64_t g = 0; g < padded; g += 16) {
        if (w.zeros && g % 64 == 0) _mm512_store_si512(zeros, zeros_of<BITS>(w, bytes, row, g));
        const __mmask16 there = __mmask16(first(std::max<int64_t>(0, w.groups - g)));
        const __m512 scale = widen(_mm256_maskz_loadu_epi16(there, scales + g));
        const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(zeros + g % 64));
        _mm512_storeu_ps(out + g, _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part)), unit)));
    }
}

// sums of four vectors
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// P vectors of words in their order -> planes of every P-th word
class Deal {
    __m512i even, odd;

  public:
    Deal() {
        alignas(64) uint16_t at[32];
        for (int i = 0; i < 32; i++) at[i] = uint16_t(2 * i);
        even = _mm512_load_si512(at), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    }
    template <int P>
    void planes(__m512i* words) const {
        if constexpr (P > 1) {
            __m512i half[P];
            for (int i = 0; i < P; i += 2) {
                half[i / 2] = _mm512_permutex2var_epi16(words[i], even, words[i + 1]);
                half[P / 2 + i / 2] = _mm512_permutex2var_epi16(words[i], odd, words[i + 1]);
            }
            planes<P / 2>(half);
            planes<P / 2>(half + P / 2);
            for (int i = 0; i < P / 2; i++) words[2 * i] = half[i], words[2 * i + 1] = half[P / 2 + i];
        }
    }
};

// four results beside each other
template <class P>
inline void put_four(const P& p, int64_t to, __m128 four) {
    if (p.narrow) _mm_storel_epi64(reinterpret_cast<__m128i*>(p.narrow + to), _mm256_castsi256_si128(narrowed(_mm512_castps128_ps512(four))));
    else _mm_storeu_ps(p.out + to, four);
}

// 16 rows of 16 words of 32 bits, columns to rows
inline void transpose(__m512i (&v)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // v[4 a + c] holds column c of each quarter of rows 4a..4a+3
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), t[4 + c] = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xDD);
        t[8 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88), t[12 + c] = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xDD);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        v[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88), v[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xDD);
        v[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88), v[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xDD);
    }
}

} // namespace

} // namespace laconic
