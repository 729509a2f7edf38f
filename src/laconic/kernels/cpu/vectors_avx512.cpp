// Few rows of x in fp32.
#include "vectors_avx512.h"

namespace laconic {

namespace {

struct Single {
    using X = float;
    template <int W>
    using Sum = typename Lanes<W>::Sum;
    struct Both {
        __m256 low, high;
    };

    template <int W>
    static inline Sum<W> zero() {
        return Sum<W>{};
    }
    static inline __m256 widened(__m128i entry) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(entry), 16)); }
    template <int W>
    static inline Both both(__m128i low, __m128i high) {
        return {widened(low), widened(high)};
    }
    template <int W>
    static inline void add(Sum<W>& sum, const Both& both, const float* x) {
        if constexpr (W == 8) sum = _mm256_fmadd_ps(both.high, _mm256_set1_ps(x[1]), _mm256_fmadd_ps(both.low, _mm256_set1_ps(x[0]), sum));
        else
            sum = _mm_fmadd_ps(_mm256_castps256_ps128(both.high), _mm_set1_ps(x[1]),
                               _mm_fmadd_ps(_mm256_castps256_ps128(both.low), _mm_set1_ps(x[0]), sum));
    }
    template <int W>
    static inline void store(float* to, Sum<W> sum) {
        if constexpr (W == 8) _mm256_store_ps(to, sum);
        else _mm_store_ps(to, sum);
    }
};

} // namespace

void vectors_few_avx512(const VectorProduct& p) { vectors_few<Single>(p); }

} // namespace laconic
