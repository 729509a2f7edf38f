// Vectors of 4 or of a multiple of 8 numbers for AVX-512: indices become byte offsets of entries, 16 at a time, and the entries of two columns are
// multiplied together. What differs between dtypes of x is a K; see vectors_avx512.cpp and vectors_bf16.cpp.
#pragma once
#include "avx512.h"
#include "vectors.h"

namespace laconic {

namespace {

thread_local Room offsets_room;

// Indices of any width as offsets: each becomes a word of 32 bits by one byte shuffle and a shift.
class Offsets {
    const Book& book;
    __m512i spread, shifts, mask, each; // each: bytes of an entry

  public:
    Offsets(const Book& book, int64_t width) : book(book) {
        alignas(64) uint8_t from[64];
        alignas(64) int32_t by[16];
        for (int i = 0; i < 16; i++) {
            const int bit = i * book.bits;
            for (int k = 0; k < 4; k++) from[4 * i + k] = uint8_t(bit / 8 + k);
            by[i] = bit % 8;
        }
        spread = _mm512_load_si512(from), shifts = _mm512_load_si512(by);
        mask = _mm512_set1_epi32((1 << book.bits) - 1);
        each = _mm512_set1_epi32(int(2 * width));
    }
    // of `count` columns of a run from `first` on, a multiple of 8; up to 16 more are written, which are of some entry
    void of(int64_t run, int64_t first_column, int64_t count, int32_t* out) const {
        const uint8_t *line = book.codes + run * book.stride, *at = line + first_column / 8 * book.bits, *end = line + book.stride;
        for (int64_t j = 0; j < count; j += 16, at += 2 * book.bits) {
            // 16 indices and what the last shuffle takes besides
            const __m512i v = _mm512_maskz_loadu_epi8(first(std::min<int64_t>(std::max<int64_t>(0, end - at), 2 * book.bits)), at);
            const __m512i index = _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi8(spread, v), shifts), mask);
            _mm512_storeu_si512(out + j, _mm512_mullo_epi32(index, each));
        }
    }
};

template <int W>
struct Lanes {
    using Sum = __m256;
};
template <>
struct Lanes<4> {
    using Sum = __m128;
};

template <int W>
inline __m128i entry_at(const uint8_t* table, int32_t offset) {
    if constexpr (W == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + offset));
    else return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + offset));
}

// W sums of each of ROWS rows of x, m numbers apart, into `out`, `wide` apart
template <class K, int W, int ROWS>
void sums_of_run(const Vectored& w, int64_t begin, const int32_t* const (&offset)[2], const typename K::X* x, float* out, int64_t wide) {
    constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    typename K::template Sum<W> total[CHAINS][ROWS];
    for (auto& chain : total)
        for (auto& one : chain) one = K::template zero<W>();
    const uint8_t* table[2] = {reinterpret_cast<const uint8_t*>(w.books[0].table + begin), reinterpret_cast<const uint8_t*>(w.books[1].table + begin)};
    const auto step = [&](int b, int64_t j, int chain) __attribute__((always_inline)) {
        const auto both = K::template both<W>(entry_at<W>(table[b], offset[b][j]), entry_at<W>(table[b], offset[b][j + 1]));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) K::template add<W>(total[chain][r], both, x + r * w.m + j);
    };
    for (int b = 0; b < w.count; b++) {
        int64_t j = 0;
        for (; j + 2 * CHAINS <= w.m; j += 2 * CHAINS)
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; chain++) step(b, j + 2 * chain, chain);
        for (; j + 2 <= w.m; j += 2) step(b, j, 0);
        if (j < w.m) {
            // a column that stands alone, beside one of zeros
            const auto both = K::template both<W>(entry_at<W>(table[b], offset[b][j]), _mm_setzero_si128());
            for (int r = 0; r < ROWS; r++) {
                const typename K::X last[2] = {x[r * w.m + j], 0};
                K::template add<W>(total[0][r], both, last);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        alignas(32) float sum[8] = {};
        for (int chain = 0; chain < CHAINS; chain++) {
            alignas(32) float part[8];
            K::template store<W>(part, total[chain][r]);
            for (int i = 0; i < W; i++) sum[i] += part[i];
        }
        std::copy_n(sum, W, out + r * wide);
    }
}

template <class K, int W>
void sums_of_run(int64_t rows, const Vectored& w, int64_t begin, const int32_t* const (&offset)[2], const typename K::X* x, float* out, int64_t wide) {
    if (rows == TOGETHER) sums_of_run<K, W, TOGETHER>(w, begin, offset, x, out, wide);
    else if (rows == 2) sums_of_run<K, W, 2>(w, begin, offset, x, out, wide);
    else sums_of_run<K, W, 1>(w, begin, offset, x, out, wide);
}

template <class K>
void vectors_few(const VectorProduct& p) {
    const Vectored& w = p.w;
    const int64_t wide = (w.m + 15) / 16 * 16 + 16;
#pragma omp parallel num_threads(p.threads)
    {
        int32_t* room = reinterpret_cast<int32_t*>(offsets_room.of(size_t(2 * wide + TOGETHER * w.width) * 4));
        float* sums = reinterpret_cast<float*>(room + 2 * wide);
        const int32_t* const offset[2] = {room, room + wide};
        const Offsets books[2] = {Offsets(w.books[0], w.width), Offsets(w.books[w.count - 1], w.width)};
#pragma omp for schedule(static)
        for (int64_t run = 0; run < w.runs(); run++) {
            for (int b = 0; b < w.count; b++) books[b].of(run, 0, w.m, room + b * wide);
            for (int64_t r = 0, some; r < p.rows; r += some) {
                some = bunch(p.rows, r);
                const auto* x = static_cast<const typename K::X*>(p.x) + r * w.m;
                if (w.width == 4) sums_of_run<K, 4>(some, w, 0, offset, x, sums, w.width);
                else
                    for (int64_t begin = 0; begin < w.width; begin += 8) sums_of_run<K, 8>(some, w, begin, offset, x, sums + begin, w.width);
                put_run(p, run, r, some, sums);
            }
        }
    }
}

} // namespace

} // namespace laconic
