// Products of pairs of bf16, with AVX-512's instruction for them; numbers below 2^-126 count as zero there.
#include "lookup_avx512.h"

namespace laconic {

namespace {

struct Narrow {
    static constexpr int64_t BYTES = 64;

    static void set(uint8_t* plane, int word, const Looked& p, int64_t at, bool there) {
        reinterpret_cast<uint16_t*>(plane)[word] = there ? static_cast<const uint16_t*>(p.x)[at] : uint16_t(0);
    }

    template <int ROWS>
    static void add(__m512 (&sum)[ROWS], __m512i words, const uint8_t* x, int64_t row) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)words, (__m512bh)_mm512_load_si512(x + i * row));
    }
};

} // namespace

void lookup_narrow_avx512(const Looked& p) { product<Narrow>(p); }

} // namespace laconic
