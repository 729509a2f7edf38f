// AVX-512: values are looked up 32 at a time as bf16, and lane i of a sum takes what words 2i and 2i + 1 of each plane give. What a plane is says
// linear.h. Included by the file of each way to multiply, which is a type `Way`.
#pragma once
#include <type_traits>
#include <vector>

#include "avx512.h"
#include "lookup.h"

namespace laconic {

namespace {

// The values of codes. Of signed ones the table of wide codes is half as long; floats of 8 bits are made of their bits.
template <int BITS, Kind KIND>
struct Values {
    static constexpr bool FLOATS = KIND == Kind::e4m3 || KIND == Kind::e5m2, SIGNED = FLOATS || (KIND == Kind::signs && BITS > 5);
    static constexpr int MANTISSA = KIND == Kind::e5m2 ? 2 : 3, BIAS = KIND == Kind::e5m2 ? 15 : 7;
    static constexpr int INDEX = FLOATS ? MANTISSA : SIGNED ? BITS - 1 : BITS;
    static constexpr int PARTS = INDEX <= 5 ? 1 : 1 << (INDEX - 5);
    __m512i part[PARTS];

    explicit Values(const uint16_t* table) {
        alignas(64) uint16_t all[32 * PARTS];
        // again and again where a part has room for more: bits above a code then do not matter
        for (int i = 0; i < 32 * PARTS; i++) all[i] = table[i & ((1 << INDEX) - 1)];
        for (int i = 0; i < PARTS; i++) part[i] = _mm512_load_si512(all + 32 * i);
    }

    // of 32 words whose lowest bits are codes
    __m512i of(__m512i words) const {
        __m512i out;
        if constexpr (FLOATS) {
            // exponent and mantissa in their places, another bias; numbers without a leading one are looked up
            constexpr int UP = 7 - MANTISSA;
            out = _mm512_and_si512(_mm512_slli_epi16(words, UP), _mm512_set1_epi16(127 << UP));
            out = _mm512_add_epi16(out, _mm512_set1_epi16((127 - BIAS) << 7));
            const __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(127 >> MANTISSA << MANTISSA));
            out = _mm512_mask_permutexvar_epi16(out, small, words, part[0]);
        } else if constexpr (PARTS == 1) out = _mm512_permutexvar_epi16(words, part[0]);
        else {
            __m512i half[PARTS / 2];
#pragma GCC unroll 4
            for (int i = 0; i < PARTS / 2; i++) half[i] = _mm512_permutex2var_epi16(part[2 * i], words, part[2 * i + 1]);
            if constexpr (PARTS >= 4) {
                const __mmask32 high = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
#pragma GCC unroll 2
                for (int i = 0; i < PARTS / 4; i++) half[i] = _mm512_mask_blend_epi16(high, half[2 * i], half[2 * i + 1]);
            }
            if constexpr (PARTS == 8) half[0] = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(words, _mm512_set1_epi16(128)), half[0], half[1]);
            out = half[0];
        }
        // out ^ (words & sign)
        if constexpr (SIGNED) out = _mm512_ternarylogic_epi32(out, _mm512_slli_epi16(words, 16 - BITS), _mm512_set1_epi16(int16_t(-32768)), 0x78);
        return out;
    }
};

// a block of codes as values, plane by plane
template <int BITS, Kind KIND>
struct Block {
    static constexpr int PLANES = BITS == 4 ? 4 : BITS == 2 ? 8 : 2;
    static constexpr int BYTES = BITS == 4 || BITS == 2 ? 64 : 8 * BITS;
    Bytes<BITS> bytes;
    Values<BITS, KIND> values;

    explicit Block(const Leveled& w) : values(w.table) {}

    void load(const uint8_t* at, __mmask64 there, __m512i (&out)[PLANES]) const {
        __m512i v = BYTES == 64 && there == ~__mmask64(0) ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(there, at);
        if constexpr (PLANES == 2) v = bytes.of(v);
        constexpr int STEP = 16 / PLANES;
#pragma GCC unroll 8
        for (int k = 0; k < PLANES; k++) out[k] = values.of(k ? _mm512_srli_epi16(v, STEP * k) : v);
    }
};

// up to 16 scales that lie one after another
inline __m512 scales_at(const Leveled& w, const uint8_t* at, __mmask16 there) {
    if (w.scaling == Scaling::bf16) return widen(_mm256_maskz_loadu_epi16(there, at));
    const __m128i bytes = _mm_maskz_loadu_epi8(there, at);
    if (w.scaling == Scaling::e8m0)
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23), _mm512_set1_epi32(1 << 22)));
    // a float of 8 bits is one of 16 bits, but for a factor of 2^8
    const __m256i half = _mm256_slli_epi16(_mm256_and_si256(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(127)), 7);
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f)), _mm512_set1_ps(w.whole));
}

// the scales of N rows, of one block that holds several groups, or of all blocks of the next group
template <bool SHARED, int N>
struct Steps {
    const Leveled& w;
    const Scales& scales;
    int64_t row, group = 0;

    void next(__m512 (&out)[N]) {
        if constexpr (SHARED) {
            const __mmask16 there = __mmask16(first(std::min(scales.share, w.groups - group)));
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                out[n] = _mm512_permutexvar_ps(scales.lanes, scales_at(w, w.scales + ((row + n) * w.groups + group) * w.wide(), there));
            group += scales.share;
        } else {
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) out[n] = _mm512_set1_ps(scale_at(w, row + n, group));
            group++;
        }
    }
};

// Rows of x that share the values of a block, and rows of the weight that are read side by side then: 16 sums stay in registers.
constexpr int MANY = 8;
// blocks of one row of the weight at a time
constexpr int64_t TURN = 8;
inline int64_t bunch_of(int64_t rows, int64_t r) { return rows - r >= MANY ? MANY : bunch(rows, r); }

// x as a Way wants it: bunches of rows, each [block][row][plane] of Way::BYTES
template <class Way, int P>
void arrange(const Looked& p, int64_t blocks, int64_t r, uint8_t* out) {
    constexpr int64_t WIDTH = 32 * P;
    // the bunch of this row
    int64_t begin = r / MANY * MANY, size = bunch_of(p.rows, begin);
    while (r >= begin + size) begin += size, size = bunch_of(p.rows, begin);
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t* to = out + (begin * blocks + b * size + r - begin) * P * Way::BYTES;
        const int64_t from = b * WIDTH, count = std::min(WIDTH, p.w.m - from);
        for (int k = 0; k < P; k++)
            for (int j = 0; j < 32; j++) {
                const int64_t column = int64_t(P) * j + k, at = r * p.w.m + from + column;
                Way::set(to + k * Way::BYTES, j, p, at, column < count);
            }
    }
}

// N rows of the weight from `row` on times a bunch
template <class Way, int BITS, Kind KIND, int N, int ROWS, bool SHARED>
inline void some(const Looked& p, const Block<BITS, KIND>& block, const Scales& scales, int64_t row, const uint8_t* x, int64_t to) {
    constexpr int P = Block<BITS, KIND>::PLANES, BYTES = Block<BITS, KIND>::BYTES;
    const Leveled& w = p.w;
    const uint8_t *at = w.codes + row * w.stride, *end = at + w.stride;
    Steps<SHARED, N> steps{w, scales, row};
    __m512 total[N][ROWS], of_row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_setzero_ps();
    // blocks that share their scales, as far as x of them is near
    int64_t left = 0, count;
    for (; at < end; at += count * BYTES, x += count * ROWS * P * Way::BYTES, left -= count) {
        if (left == 0) steps.next(of_row), left = scales.blocks;
        count = std::min({left, TURN, (end - at + BYTES - 1) / BYTES});
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            __m512 sum[ROWS];
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) sum[i] = _mm512_setzero_ps();
            const uint8_t *from = at + n * w.stride, *last = end + n * w.stride, *given = x;
            for (int64_t b = 0; b < count; b++, from += BYTES, given += ROWS * P * Way::BYTES) {
                __m512i plane[P];
                ask(from);
                block.load(from, last - from >= BYTES ? low_bits(BYTES) : first(last - from), plane);
#pragma GCC unroll 8
                for (int k = 0; k < P; k++) Way::template add<ROWS>(sum, plane[k], given + k * Way::BYTES, P * Way::BYTES);
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_fmadd_ps(sum[i], of_row[n], total[n][i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        // added up in one order, whatever stands beside a row
        const auto of = [&](int n) { return n < N ? total[n][i] : _mm512_setzero_ps(); };
        alignas(16) float four[4];
        _mm_store_ps(four, sums_of(of(0), of(1), of(2), of(3)));
        for (int n = 0; n < N; n++) put(p, to + i * w.n + n, four[n]);
    }
}

template <class Way, int BITS, Kind KIND, bool SHARED>
void product(const Looked& p, const Scales& scales, const uint8_t* x, int64_t blocks) {
    const Leveled& w = p.w;
    constexpr int P = Block<BITS, KIND>::PLANES;
    const Block<BITS, KIND> block(w);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < (w.n + NEAR - 1) / NEAR; part++) {
            const int64_t begin = part * NEAR, end = std::min(w.n, begin + NEAR);
            for (int64_t r = 0, size; r < p.rows; r += size) {
                size = bunch_of(p.rows, r);
                const uint8_t* given = x + r * blocks * P * Way::BYTES;
                const auto run = [&](auto rows) {
                    constexpr int ROWS = decltype(rows)::value, BESIDE = ROWS == MANY ? SIDE / 2 : SIDE;
                    int64_t i = begin;
                    for (; i + BESIDE <= end; i += BESIDE) some<Way, BITS, KIND, BESIDE, ROWS, SHARED>(p, block, scales, i, given, r * w.n + i);
                    for (; i < end; i++) some<Way, BITS, KIND, 1, ROWS, SHARED>(p, block, scales, i, given, r * w.n + i);
                };
                if (size == MANY) run(std::integral_constant<int, MANY>());
                else if (size == TOGETHER) run(std::integral_constant<int, TOGETHER>());
                else if (size == 2) run(std::integral_constant<int, 2>());
                else run(std::integral_constant<int, 1>());
            }
        }
    }
}

template <class Way, int BITS, Kind KIND>
void product(const Looked& p) {
    constexpr int P = Block<BITS, KIND>::PLANES;
    thread_local Room room;
    const int64_t blocks = (p.w.m + 32 * P - 1) / (32 * P);
    uint8_t* x = room.of(size_t(p.rows * blocks * P) * Way::BYTES);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows > 1)
    for (int64_t r = 0; r < p.rows; r++) arrange<Way, P>(p, blocks, r, x);
    const Scales scales(p.w.group, p.w.m, 32 * P);
    if (scales.share) product<Way, BITS, KIND, true>(p, scales, x, blocks);
    else product<Way, BITS, KIND, false>(p, scales, x, blocks);
    room.shrink();
}

// calls with the width and the kind of a matrix as types
template <class Call>
void by_kind(const Leveled& w, const Call& call) {
    const auto known = [&](auto bits) { call(bits, std::integral_constant<Kind, Kind::any>()); };
    switch (w.bits) {
    case 1: return known(std::integral_constant<int, 1>());
    case 2: return known(std::integral_constant<int, 2>());
    case 3: return known(std::integral_constant<int, 3>());
    case 4: return known(std::integral_constant<int, 4>());
    case 5: return known(std::integral_constant<int, 5>());
    case 6:
        if (w.values == Kind::signs) return call(std::integral_constant<int, 6>(), std::integral_constant<Kind, Kind::signs>());
        return known(std::integral_constant<int, 6>());
    case 7: return known(std::integral_constant<int, 7>());
    default:
        if (w.values == Kind::e4m3) return call(std::integral_constant<int, 8>(), std::integral_constant<Kind, Kind::e4m3>());
        if (w.values == Kind::e5m2) return call(std::integral_constant<int, 8>(), std::integral_constant<Kind, Kind::e5m2>());
        return known(std::integral_constant<int, 8>());
    }
}

template <class Way>
void product(const Looked& p) {
    by_kind(p.w, [&](auto bits, auto kind) { product<Way, decltype(bits)::value, decltype(kind)::value>(p); });
}

} // namespace

} // namespace laconic
