// AVX-512 with VBMI2: products in fp32, of weights in bf16 spread as they are stored, and of any others decoded a row at a time first.
#include <type_traits>

#include "sparse_avx512.h"

namespace laconic {

namespace {

// weights in bf16: those of even columns of a block, then those of odd ones, as two shifts give them; x lies in that order too
struct Dealt {
    using Value = uint16_t;
    using X = float;
    static constexpr int PARTS = 2;
    static constexpr bool BUFFERED = false, DEALT = true;

    static Cursor<Value> begin(const Sparse& w, int64_t row, float*) {
        const uint16_t* values = static_cast<const uint16_t*>(w.values);
        return {values + w.starts[row], values + w.total()};
    }
    template <bool CAREFUL>
    static inline void expand(Cursor<Value>& from, uint32_t bits, __m512i (&out)[PARTS]) {
        const __m512i both = spread(words<CAREFUL>(from.at, from.end), bits);
        from.at += _mm_popcnt_u32(bits);
        out[0] = _mm512_slli_epi32(both, 16);
        out[1] = _mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000)));
    }
};

// weights in fp32, in the order of their columns
struct Plain {
    using Value = float;
    using X = float;
    static constexpr int PARTS = 2;
    static constexpr bool BUFFERED = true, DEALT = false;

    static Cursor<Value> begin(const Sparse& w, int64_t row, float* room) { return {numbers_of(w, row, room), nullptr}; }
    template <bool>
    static inline void expand(Cursor<Value>& from, uint32_t bits, __m512i (&out)[PARTS]) {
        const int low = _mm_popcnt_u32(bits & 0xFFFF);
        out[0] = spread_wide(_mm512_loadu_si512(from.at), bits);
        out[1] = spread_wide(_mm512_loadu_si512(from.at + low), bits >> 16);
        from.at += _mm_popcnt_u32(bits);
    }
};

// what both share
template <class Read>
struct Single : Read, Alone {
    using X = float;

    // rows of x in fp32, `wide` apart, filled up with zeros
    static const X* ready(const SparseProduct& p, int64_t wide) {
        const int64_t m = p.w.m;
        if (!Read::DEALT && !p.bf16 && wide == m) return static_cast<const X*>(p.x);
        alignas(64) int32_t at[16];
        for (int i = 0; i < 16; i++) at[i] = 2 * i;
        const __m512i even = _mm512_load_si512(at), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        X* out = reinterpret_cast<X*>(whole.of(size_t(p.rows * wide) * sizeof(X)));
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows > 16)
        for (int64_t r = 0; r < p.rows; r++)
            for (int64_t j = 0; j < m; j += BLOCK) {
                __m512 part[2];
                for (int k = 0; k < 2; k++) {
                    const int64_t from = r * m + j + 16 * k;
                    const __mmask16 there = __mmask16(first(std::max<int64_t>(0, m - j - 16 * k)));
                    part[k] = p.bf16 ? widen(_mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(p.x) + from))
                                     : _mm512_maskz_loadu_ps(there, static_cast<const float*>(p.x) + from);
                }
                if (Read::DEALT) {
                    const __m512 low = _mm512_permutex2var_ps(part[0], even, part[1]);
                    part[1] = _mm512_permutex2var_ps(part[0], odd, part[1]), part[0] = low;
                }
                for (int k = 0; k < 2; k++) _mm512_store_ps(out + r * wide + j + 16 * k, part[k]);
            }
        return out;
    }
};

// fn(bits) of each block of a row of the mask
template <class Fn>
inline void blocks(const Sparse& w, const uint8_t* mask, const Fn& fn) {
    const int64_t full = w.m / BLOCK;
    for (int64_t b = 0; b < full; b++) fn(b, bits_at(mask, b));
    if (w.m % BLOCK) fn(full, last_bits(mask, full, w.m % BLOCK));
}

} // namespace

void sparse_avx512(const SparseProduct& p) {
    if (p.w.values && p.w.type == Type::bf16) sparse_product<Single<Dealt>>(p);
    else sparse_product<Single<Plain>>(p);
}

void sparse_rows_avx512(const SparseRows& p) {
#pragma omp parallel num_threads(p.threads)
    {
        float* room = reinterpret_cast<float*>(near.of(size_t(p.w.m + BEHIND) * 4));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.count; i++) {
            const int64_t row = p.row(i);
            float* out = p.out + i * p.w.m;
            Cursor<float> from = Plain::begin(p.w, row, room);
            blocks(p.w, p.w.mask + row * p.w.stride, [&](int64_t b, uint32_t bits) {
                __m512i part[Plain::PARTS];
                Plain::expand<false>(from, bits, part);
                for (int k = 0; k < Plain::PARTS; k++)
                    _mm512_mask_storeu_epi32(out + b * BLOCK + 16 * k, __mmask16(first(std::max<int64_t>(0, p.w.m - b * BLOCK - 16 * k))), part[k]);
            });
        }
        near.shrink();
    }
}

} // namespace laconic
