// Products with sparse rows for AVX-512: read as sparse, computed as dense. A block is 32 columns: a word of the mask spreads the weights that follow over
// it (vpexpandw), and the block is multiplied as if it had always been dense. What differs between dtypes is a K; see sparse_avx512.cpp and sparse_bf16.cpp.
#pragma once
#include "panels_avx512.h"
#include "sparse.h"

namespace laconic {

namespace {

// columns of a block
constexpr int64_t BLOCK = 32;
// rows of x that are multiplied straight from registers, TOGETHER at once; with more of them, dense rows of the weight pass through the nearest caches
constexpr int64_t FEW = 16;
// what a vector may read behind the last weight
constexpr int64_t BEHIND = 128;

thread_local Room whole, near;

inline int64_t padded(int64_t m) { return (m + BLOCK - 1) / BLOCK * BLOCK; }

// 32 words, none of them from behind `end` where CAREFUL
template <bool CAREFUL>
inline __m512i words(const uint16_t* at, const uint16_t* end) {
    if constexpr (CAREFUL) return _mm512_maskz_loadu_epi16(__mmask32(first(std::clamp<int64_t>(end - at, 0, 32))), at);
    else return _mm512_loadu_si512(at);
}

// Words, or numbers of 32 bits, of which the next goes to each place whose bit is set; zeros elsewhere. In their own register: on Zen 4 the
// instruction waits for what the register that it writes to held before, so that blocks would come one after another, at half the speed.
inline __m512i spread(__m512i v, uint32_t bits) {
    asm("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask32(bits)));
    return v;
}

inline __m512i spread_wide(__m512i v, uint32_t bits) {
    asm("vpexpandd %0, %0 %{%1%}%{z%}" : "+v"(v) : "Yk"(__mmask16(bits)));
    return v;
}

// A row's weights as they are read: `at` goes on, and nothing is read from `end` on.
template <class V>
struct Cursor {
    const V *at, *end;
};

// fp32 of a row's weights that are no bf16; `room` has space for m + BEHIND of them
inline const float* numbers_of(const Sparse& w, int64_t row, float* room) {
    const int64_t from = w.starts[row], count = w.count(row);
    if (!count) return room;
    if (!w.values) {
        const bool own = w.codes.n == w.n;
        const int64_t begin = own ? 0 : from;
        const bool known = w.codes.group % 16 == 0 || w.codes.group >= w.codes.m;
        const int64_t odd = begin % (known ? 64 : 8);
        (known ? span_avx512 : span_plain)(w.codes, own ? row : 0, begin - odd, begin + count, room);
        return room + odd;
    }
    if (w.type == Type::fp32) std::copy_n(static_cast<const float*>(w.values) + from, count, room);
    else
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 there = __mmask16(first(count - i));
            const __m256i part = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(w.values) + from + i);
            _mm512_storeu_ps(room + i, w.type == Type::bf16 ? widen(part) : _mm512_cvtph_ps(part));
        }
    return room;
}

// whether no vector that begins at a weight of `row`, or of any before it, ends behind the last weight; rows have at most m, whatever a mask says
inline bool safe(const Sparse& w, int64_t row) { return w.starts[row] + w.m + BLOCK <= w.total(); }

// Asks for what rows first..last of the weight are read from, a share at a time, while others are computed with: what a row reads begins and ends
// anywhere, and the processor does not see where the next one is.
class Ask {
    const char *at = nullptr, *end = nullptr;
    int64_t each = 0;

  public:
    // in `shares`
    Ask(const Sparse& w, int64_t first, int64_t last, int64_t shares) {
        first = std::min(first, w.n), last = std::min(last, w.n);
        for (const uint8_t *mask = w.mask + first * w.stride, *stop = w.mask + last * w.stride; mask < stop; mask += 64) _mm_prefetch(mask, _MM_HINT_T0);
        const int64_t size = w.values ? size_of(w.type) : 0;
        at = static_cast<const char*>(w.values) + w.starts[first] * size, end = at + (w.starts[last] - w.starts[first]) * size;
        each = (end - at) / shares + 1;
    }
    void next() {
        for (const char* stop = std::min(end, at + each); at < stop; at += 64) _mm_prefetch(at, _MM_HINT_T0);
    }
};

// N rows of the weight, side by side, times ROWS rows of x
template <class K, bool CAREFUL, int N, int ROWS>
inline void few(const Sparse& w, int64_t row, Cursor<typename K::Value>* given, const typename K::X* x, int64_t wide, __m512 (&total)[N][ROWS]) {
    Cursor<typename K::Value> from[N];
    const uint8_t* mask = w.mask + row * w.stride;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        from[n] = given[n];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) total[n][r] = _mm512_setzero_ps();
    }
    const auto step = [&](int64_t b, const uint32_t (&bits)[N]) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            __m512i part[K::PARTS];
            K::template expand<CAREFUL>(from[n], bits[n], part);
#pragma GCC unroll 2
            for (int k = 0; k < K::PARTS; k++)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
                    total[n][r] = K::madd(total[n][r], part[k], _mm512_loadu_si512(x + r * wide + b * BLOCK + k * BLOCK / K::PARTS));
        }
    };
    const int64_t full = w.m / BLOCK;
    // what the rows after the next are read from
    Ask ask(w, row + 2 * N, row + 3 * N, full + 1);
    uint32_t bits[N];
    for (int64_t b = 0; b < full; b++) {
        ask.next();
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) bits[n] = bits_at(mask + n * w.stride, b);
        step(b, bits);
    }
    if (w.m % BLOCK) {
        for (int n = 0; n < N; n++) bits[n] = last_bits(mask + n * w.stride, full, w.m % BLOCK);
        step(full, bits);
    }
}

// the same for what N rows of the weight begin with, results put where they belong
template <class K, int N, int ROWS>
void few(const SparseProduct& p, int64_t row, Cursor<typename K::Value>* from, const typename K::X* x, int64_t wide, int64_t r) {
    const Sparse& w = p.w;
    __m512 total[N][ROWS];
    if (K::BUFFERED || safe(w, row + N - 1)) few<K, false, N, ROWS>(w, row, from, x + r * wide, wide, total);
    else few<K, true, N, ROWS>(w, row, from, x + r * wide, wide, total);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
        const int64_t to = (r + i) * w.n + row;
        if constexpr (N == SIDE) put_four(p, to, sums_of(total[0][i], total[1][i], total[2][i], total[3][i]));
        else
            for (int n = 0; n < N; n++) put(p, to + n, _mm512_reduce_add_ps(total[n][i]));
    }
}

// N rows of the weight times rows r..stop of x
template <class K, int N>
void few(const SparseProduct& p, int64_t row, const typename K::X* x, int64_t wide, int64_t r, int64_t stop, float* room) {
    Cursor<typename K::Value> from[N];
    for (int n = 0; n < N; n++) from[n] = K::begin(p.w, row + n, room + n * (p.w.m + BEHIND));
    for (; r < stop; r += TOGETHER) switch (stop - r) {
        case 1: few<K, N, 1>(p, row, from, x, wide, r); break;
        case 2: few<K, N, 2>(p, row, from, x, wide, r); break;
        case 3: few<K, N, 3>(p, row, from, x, wide, r); break;
        default: few<K, N, TOGETHER>(p, row, from, x, wide, r); break;
        }
}

// one block of 16 rows of the weight, dense, word by word with rows as lanes; without PLAIN `here` of them are there and may be the last
template <class K, bool PLAIN>
inline void block_of(const Sparse& w, const uint8_t* mask, Cursor<typename K::Value> (&from)[16], int64_t b, int64_t here, int32_t* to) {
    __m512i part[K::PARTS][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        __m512i one[K::PARTS];
        if (PLAIN) K::template expand<false>(from[i], bits_at(mask + i * w.stride, b), one);
        else if (i < here) {
            const int64_t left = w.m - b * BLOCK;
            const uint32_t bits = left < BLOCK ? last_bits(mask + i * w.stride, b, left) : bits_at(mask + i * w.stride, b);
            K::template expand<!K::BUFFERED>(from[i], bits, one);
        } else std::fill(one, one + K::PARTS, _mm512_setzero_si512());
#pragma GCC unroll 2
        for (int k = 0; k < K::PARTS; k++) part[k][i] = one[k];
    }
#pragma GCC unroll 2
    for (int k = 0; k < K::PARTS; k++) {
        transpose(part[k]);
#pragma GCC unroll 16
        for (int l = 0; l < 16; l++) _mm512_store_si512(to + ((b * K::PARTS + k) * 16 + l) * WIDE, part[k][l]);
    }
}

// WIDE rows of the weight from `row` on; rows behind the last are zeros
template <class K>
void fill(const Sparse& w, int64_t row, float* room, int32_t* panel) {
    const int64_t full = w.m / BLOCK, blocks = padded(w.m) / BLOCK;
    Ask ask(w, row + WIDE, row + 2 * WIDE, 2 * blocks);
    for (int half = 0; half < 2; half++) {
        Cursor<typename K::Value> from[16];
        const int64_t begin = row + 16 * half, here = std::clamp<int64_t>(w.n - begin, 0, 16);
        const uint8_t* mask = w.mask + begin * w.stride;
        for (int64_t i = 0; i < here; i++) from[i] = K::begin(w, begin + i, room + i * (w.m + BEHIND));
        const bool plain = here == 16 && (K::BUFFERED || safe(w, begin + 15));
        for (int64_t b = 0; b < blocks; b++) {
            ask.next();
            if (plain && b < full) block_of<K, true>(w, mask, from, b, here, panel + 16 * half);
            else block_of<K, false>(w, mask, from, b, here, panel + 16 * half);
        }
    }
}

template <class K>
void many(const SparseProduct& p) {
    const Sparse& w = p.w;
    const int64_t wide = padded(w.m), bytes = wide * int64_t(sizeof(typename K::X));
    const uint8_t* x = reinterpret_cast<const uint8_t*>(K::ready(p, wide));
    // what comes next of a row is known only behind what came before, so that rows are made dense whole
    over_panels<K>({x, bytes, bytes, p.rows, w.n, p.narrow ? nullptr : p.out, p.narrow, p.threads}, bytes, 1,
                   [&](const Part& part, int32_t* panel) {
                       fill<K>(w, part.row, K::BUFFERED ? reinterpret_cast<float*>(near.of(size_t(16 * (w.m + BEHIND)) * 4)) : nullptr, panel);
                   });
}

template <class K>
void few(const SparseProduct& p) {
    const Sparse& w = p.w;
    const int64_t wide = padded(w.m);
    const typename K::X* x = K::ready(p, wide);
    // what is decoded is decoded once; else x is what stays in the nearest cache, while the same few rows of the weight pass by again
    const int64_t each = K::BUFFERED ? p.rows : TOGETHER;
#pragma omp parallel num_threads(p.threads)
    {
        float* room = K::BUFFERED ? reinterpret_cast<float*>(near.of(size_t(SIDE * (w.m + BEHIND)) * 4)) : nullptr;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (w.n + NEAR - 1) / NEAR; block++) {
            const int64_t begin = block * NEAR, end = std::min(w.n, begin + NEAR);
            for (int64_t r = 0; r < p.rows; r += each) {
                const int64_t stop = std::min(p.rows, r + each);
                int64_t i = begin;
                for (; i + SIDE <= end; i += SIDE) few<K, SIDE>(p, i, x, wide, r, stop, room);
                for (; i < end; i++) few<K, 1>(p, i, x, wide, r, stop, room);
            }
        }
        near.shrink();
    }
}

template <class K>
void sparse_product(const SparseProduct& p) {
    if (p.rows <= FEW) few<K>(p);
    else many<K>(p);
    whole.shrink();
}

} // namespace

} // namespace laconic
