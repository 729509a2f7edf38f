// In fp32.
#include "blocks_avx512.h"

namespace laconic {

namespace {

struct Single : Alone {
    using Number = float;
    // of 16 channels, tokens `stride` bytes apart, the word that begins with `token`
    static inline __m512i words(const uint8_t* at, int64_t stride, int64_t token, int64_t, __mmask16 there) {
        return _mm512_maskz_loadu_epi32(there, at + token * stride);
    }
    static inline void put(float* to, __m512 value, __mmask16 there = 0xFFFF) { _mm512_mask_storeu_ps(to, there, value); }
};

} // namespace

void blocks_avx512(const Blocks& p) { attend_blocks<Single>(p); }

} // namespace laconic
