// Products in fp32, for inputs of either kind, and dense rows.
#include "lookup_avx512.h"

namespace laconic {

namespace {

// a plane of x: columns of the words with even numbers, then of those with odd ones
struct Wide {
    static constexpr int64_t BYTES = 128;

    static void set(uint8_t* plane, int word, const Looked& p, int64_t at, bool there) {
        const float value = !there ? 0.0f : p.bf16 ? from_bf16(static_cast<const uint16_t*>(p.x)[at]) : static_cast<const float*>(p.x)[at];
        reinterpret_cast<float*>(plane)[word / 2 + word % 2 * 16] = value;
    }

    template <int ROWS>
    static void add(__m512 (&sum)[ROWS], __m512i words, const uint8_t* x, int64_t row) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            sum[i] = _mm512_fmadd_ps(even, _mm512_load_ps(x + i * row), sum[i]);
            sum[i] = _mm512_fmadd_ps(odd, _mm512_load_ps(x + i * row + 64), sum[i]);
        }
    }
};

// table[code] * scale, in that order: the same numbers as the reference to the last bit
template <int BITS, Kind KIND>
void dense(const Leveled& w, float* out, int threads) {
    const Block<BITS, KIND> block(w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < w.n; i++) {
        const uint8_t* at = w.codes + i * w.stride;
        int64_t left = int64_t(w.stride), group = -1, until = 0;
        __m512 scale = _mm512_setzero_ps();
        for (int64_t j = 0; j < w.m; j += 64, at += 8 * BITS, left -= 8 * BITS) {
            const __m512i codes = block.bytes.load(at, left);
            for (int half = 0; half < 2 && j + 32 * half < w.m; half++) {
                const __m256i some = half ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
                const __m512i words = block.values.of(_mm512_cvtepu8_epi16(some));
                for (int64_t k = j + 32 * half, part = 0; part < 2 && k < w.m; k += 16, part++) {
                    if (k >= until) {
                        until += w.group;
                        scale = _mm512_set1_ps(scale_at(w, i, ++group));
                    }
                    const __m512 value = widen(part ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words));
                    _mm512_mask_storeu_ps(out + i * w.m + k, __mmask16(first(w.m - k)), _mm512_mul_ps(value, scale));
                }
            }
        }
    }
}

} // namespace

void lookup_wide_avx512(const Looked& p) { product<Wide>(p); }

void lookup_dense_avx512(const Leveled& w, float* out, int threads) {
    by_kind(w, [&](auto bits, auto kind) { dense<decltype(bits)::value, decltype(kind)::value>(w, out, threads); });
}

} // namespace laconic
