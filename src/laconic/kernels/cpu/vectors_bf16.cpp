// AVX-512 with BF16: rows of x in bf16. Few of them are multiplied with the entries as they are read; for many, vectors of 4 or 8 are laid into panels, where
// rows of the weight are lanes as they are in an entry.
#include "panels_avx512.h"
#include "vectors_avx512.h"

namespace laconic {

namespace {

struct Entries : Paired {
    using X = uint16_t;
    template <int W>
    using Sum = typename Lanes<W>::Sum;

    template <int W>
    static inline Sum<W> zero() {
        return Sum<W>{};
    }
    // number by number, that of one column beside that of the other
    template <int W>
    static inline __m256i both(__m128i low, __m128i high) {
        const __m256i first = _mm256_castsi128_si256(_mm_unpacklo_epi16(low, high));
        if constexpr (W == 8) return _mm256_inserti128_si256(first, _mm_unpackhi_epi16(low, high), 1);
        else return first;
    }
    template <int W>
    static inline void add(Sum<W>& sum, __m256i both, const uint16_t* x) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        if constexpr (W == 8) sum = _mm256_dpbf16_ps(sum, (__m256bh)both, (__m256bh)_mm256_set1_epi32(pair));
        else sum = _mm_dpbf16_ps(sum, (__m128bh)_mm256_castsi256_si128(both), (__m128bh)_mm_set1_epi32(pair));
    }
    template <int W>
    static inline void store(float* to, Sum<W> sum) {
        if constexpr (W == 8) _mm256_store_ps(to, sum);
        else _mm_store_ps(to, sum);
    }
};

// entries of two columns beside each other, as 2 W numbers
template <int W>
inline __m512 beside(const Book& book, const int32_t* offset) {
    const uint8_t* table = reinterpret_cast<const uint8_t*>(book.table);
    const __m128i low = entry_at<W>(table, offset[0]), high = entry_at<W>(table, offset[1]);
    if constexpr (W == 8) return widen(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    else return widen(_mm256_castsi128_si256(_mm_unpacklo_epi64(low, high)));
}

// for vectors of W
template <int W>
void product(const VectorProduct& p) {
    constexpr int64_t RUNS = WIDE / W;
    const Vectored& w = p.w;
    const Many many{static_cast<const uint8_t*>(p.x), 2 * w.m, 2 * w.m, p.rows, w.n, nullptr, static_cast<uint16_t*>(p.out), p.threads};
    alignas(32) uint16_t at[16];
    for (int i = 0; i < 16; i++) at[i] = uint16_t(i / 2 % W + i % 2 * W);
    const __m256i turned = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
    const bool plain = w.count == 1 && !w.scales;
    const uint8_t* table = reinterpret_cast<const uint8_t*>(w.books[0].table);
    over_panels<Paired>(many, LONG, LANES, [&](const Part& part, int32_t* panel) {
        const int64_t columns = 2 * part.words, wide = columns + 16, runs = (part.number + W - 1) / W;
        int32_t* offset = reinterpret_cast<int32_t*>(offsets_room.of(size_t(2 * RUNS * wide) * 4));
        const Offsets books[2] = {Offsets(w.books[0], W), Offsets(w.books[w.count - 1], W)};
        __m512 scale[RUNS];
        for (int64_t i = 0; i < RUNS; i++) {
            const int64_t run = part.row / W + i;
            scale[i] = _mm512_set1_ps(1.0f);
            for (int b = 0; b < w.count; b++) {
                int32_t* to = offset + (b * RUNS + i) * wide;
                // of runs that are not there any entry will do
                if (i < runs) books[b].of(run, 2 * part.from, columns, to);
                else std::fill_n(to, wide, 0);
            }
            if (w.scales && i < runs) {
                const __mmask8 there = __mmask8(first(std::min<int64_t>(W, w.n - run * W)));
                const __m128i some = _mm_maskz_loadu_epi16(there, w.scales + run * W);
                scale[i] = W == 8 ? widen(_mm256_inserti128_si256(_mm256_castsi128_si256(some), some, 1))
                                  : widen(_mm256_castsi128_si256(_mm_unpacklo_epi64(some, some)));
            }
        }
        for (int64_t k = 0; k < part.words; k++)
#pragma GCC unroll 8
            for (int64_t i = 0; i < RUNS; i++) {
                const int32_t* one = offset + i * wide + 2 * k;
                __m256i words;
                if (plain) words = Entries::both<W>(entry_at<W>(table, one[0]), entry_at<W>(table, one[1]));
                else {
                    __m512 value = beside<W>(w.books[0], one);
                    if (w.count == 2) value = _mm512_add_ps(value, beside<W>(w.books[1], one + RUNS * wide));
                    words = _mm256_permutexvar_epi16(turned, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(value, scale[i])));
                }
                int32_t* to = panel + k * WIDE + i * W;
                if constexpr (W == 8) _mm256_store_si256(reinterpret_cast<__m256i*>(to), words);
                else _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
            }
    });
}

} // namespace

void vectors_few_bf16(const VectorProduct& p) { vectors_few<Entries>(p); }

void vectors_panels_bf16(const VectorProduct& p) {
    if (p.w.width == 4) product<4>(p);
    else product<8>(p);
}

} // namespace laconic
