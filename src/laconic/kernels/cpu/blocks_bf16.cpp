// In bf16, with products of pairs: scores and sums in fp32, weights rounded to bf16.
#include "blocks_avx512.h"

namespace laconic {

namespace {

struct Double : Paired {
    using Number = uint16_t;
    // of 16 channels, tokens `stride` bytes apart, the word that begins with `token`; a token behind the last is zero
    static inline __m512i words(const uint8_t* at, int64_t stride, int64_t token, int64_t tokens, __mmask16 there) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at + token * stride));
        if (token + 1 == tokens) return low;
        return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at + (token + 1) * stride)), 16));
    }
    static inline void put(uint16_t* to, __m512 value, __mmask16 there = 0xFFFF) { _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(value)); }
};

} // namespace

void blocks_bf16(const Blocks& p) { attend_blocks<Double>(p); }

} // namespace laconic
