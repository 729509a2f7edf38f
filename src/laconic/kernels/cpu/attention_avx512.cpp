// AVX-512. Codes are multiplied with integers of 16 bits, as in avx512.cpp: with queries times the scales of a group of keys, and with weights times the
// scales of a value. The code k of a word of 16 bits is masked where it stands, so that no shift is needed within a byte: it counts 2^(its place) too much,
// which the factor behind the sum takes back.
#include "attention.h"

#if defined(LACONIC_X86)
#include <immintrin.h>

#include <limits>
#include <utility>

namespace laconic {

namespace {

constexpr float SMALL = 1e-30f; // what is below cannot be seen in a sum
constexpr int64_t LONGEST = 256; // terms of codes below 256 and integers below 2^15 that fit into 32 bits

// bytes that are asked for ahead of their use
constexpr int64_t AHEAD = 4096;

inline void ask(const void* at) { _mm_prefetch(static_cast<const char*>(at) + AHEAD, _MM_HINT_T0); }

inline __mmask16 first16(int64_t count) { return count >= 16 ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1); }

inline __m512 widen(__m256i v, bool bf16) {
    return bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)) : _mm512_cvtph_ps(v);
}

inline __m512i iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// the greatest absolute value of lanes
inline __m512 greater(__m512 most, __m512 x) { return _mm512_range_ps(most, x, 0x0B); }

// 32 numbers of a token in two vectors, zeros behind the `left` ones that there are: bf16 with the even ones in the first, others in their order
template <Type TYPE, bool WHOLE>
inline void load(const void* tokens, int64_t at, int64_t left, __m512& a, __m512& b) {
    if constexpr (TYPE == Type::fp32) {
        const float* from = static_cast<const float*>(tokens) + at;
        ask(from), ask(from + 16);
        a = WHOLE ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(first16(left), from);
        b = WHOLE ? _mm512_loadu_ps(from + 16) : _mm512_maskz_loadu_ps(first16(left - 16), from + 16);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(tokens) + at;
        ask(from);
        const __m512i v = WHOLE ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1, from);
        if constexpr (TYPE == Type::bf16) {
            a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
            b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xFFFF0000u))));
        } else {
            a = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
            b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
        }
    }
}

// lane i: the sum of v[i]
inline __m512 sums(__m512 (&v)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
    // quads: two of i, two of i + 8
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD));
    // a quad each of i, i + 8, i + 4, i + 12
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2]));
    // a quad: i, i + 2, i, i + 2
    v[0] = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    // a quad: 0, 1, 2, 3, and 8, 4, 12 more
    return _mm512_shuffle_f32x4(v[0], v[0], 0xD8);
}

template <Type TYPE, bool WHOLE, int ROWS>
void scores_of(const Work& w, const void* keys, int64_t n, int64_t at, int64_t row) {
    constexpr int TOKENS = 16 / ROWS;
    const float* q = (TYPE == Type::bf16 ? w.split : w.q) + row * w.wide;
    float* to = w.scores + row * w.ld + at;
    for (int64_t t = 0; t < n; t += TOKENS) {
        __m512 total[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) total[i] = _mm512_setzero_ps();
        int64_t from[TOKENS];
        for (int i = 0; i < TOKENS; i++) from[i] = (t + i < n ? t + i : n - 1) * w.d;
        for (int64_t c = 0; c < w.d; c += 32) {
            __m512 x[ROWS], y[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) x[r] = _mm512_load_ps(q + r * w.wide + c), y[r] = _mm512_load_ps(q + r * w.wide + c + 16);
#pragma GCC unroll 16
            for (int i = 0; i < TOKENS; i++) {
                __m512 a, b;
                load<TYPE, WHOLE>(keys, from[i] + c, w.d - c, a, b);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    __m512& sum = total[r * TOKENS + i];
                    sum = _mm512_fmadd_ps(b, y[r], _mm512_fmadd_ps(a, x[r], sum));
                }
            }
        }
        const __m512 found = sums(total);
        const __mmask16 there = first16(n - t < TOKENS ? n - t : TOKENS);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) _mm512_mask_storeu_ps(to + r * w.ld + t - r * TOKENS, __mmask16(there << (r * TOKENS)), found);
    }
}

template <Type TYPE, bool WHOLE, int ROWS>
void values_of(const Work& w, const void* values, int64_t n, int64_t at, int64_t row) {
    const float* p = w.scores + row * w.ld + at;
    for (int64_t c = 0; c < w.e; c += 64) {
        const bool wider = WHOLE || w.e - c > 32;
        __m512 total[ROWS][4];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) total[r][i] = _mm512_setzero_ps();
        for (int64_t t = 0; t < n; t++) {
            __m512 a, b, x = _mm512_setzero_ps(), y = _mm512_setzero_ps();
            load<TYPE, WHOLE>(values, t * w.e + c, w.e - c, a, b);
            if (wider) load<TYPE, WHOLE>(values, t * w.e + c + 32, w.e - c - 32, x, y);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const __m512 weight = _mm512_set1_ps(p[r * w.ld + t]);
                total[r][0] = _mm512_fmadd_ps(a, weight, total[r][0]);
                total[r][1] = _mm512_fmadd_ps(b, weight, total[r][1]);
                total[r][2] = _mm512_fmadd_ps(x, weight, total[r][2]);
                total[r][3] = _mm512_fmadd_ps(y, weight, total[r][3]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float* o = w.o + (row + r) * w.high + c;
            for (int i = 0; i < (wider ? 4 : 2); i += 2) {
                __m512 a = total[r][i], b = total[r][i + 1];
                if constexpr (TYPE == Type::bf16) {
                    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                    const __m512 even = a;
                    a = _mm512_permutex2var_ps(even, low, b);
                    b = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
                }
                _mm512_store_ps(o + i * 16, _mm512_add_ps(a, _mm512_load_ps(o + i * 16)));
                _mm512_store_ps(o + i * 16 + 16, _mm512_add_ps(b, _mm512_load_ps(o + i * 16 + 16)));
            }
        }
    }
}

// calls act<ROWS>(row) in bunches of 4, 2 and 1 rows
template <class Act>
inline void bunches(int64_t rows, Act&& act) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) act(std::integral_constant<int, 4>(), r);
    if (r + 2 <= rows) act(std::integral_constant<int, 2>(), r), r += 2;
    if (r < rows) act(std::integral_constant<int, 1>(), r);
}

template <Type TYPE, int ROWS>
void act(const Work& w, bool keys, const void* tokens, int64_t n, int64_t at, int64_t row) {
    if (keys) w.d % 32 ? scores_of<TYPE, false, ROWS>(w, tokens, n, at, row) : scores_of<TYPE, true, ROWS>(w, tokens, n, at, row);
    else w.e % 64 ? values_of<TYPE, false, ROWS>(w, tokens, n, at, row) : values_of<TYPE, true, ROWS>(w, tokens, n, at, row);
}

void plain(const Work& w, bool keys, Type type, const void* tokens, int64_t n, int64_t at) {
    bunches(w.rows, [&](auto count, int64_t r) {
        constexpr int ROWS = decltype(count)::value;
        if (type == Type::bf16) act<Type::bf16, ROWS>(w, keys, tokens, n, at, r);
        else if (type == Type::fp16) act<Type::fp16, ROWS>(w, keys, tokens, n, at, r);
        else act<Type::fp32, ROWS>(w, keys, tokens, n, at, r);
    });
}

void scores(const Work& w, Type type, const void* keys, int64_t n, int64_t at) { plain(w, true, type, keys, n, at); }
void values(const Work& w, Type type, const void* of, int64_t n, int64_t at) { plain(w, false, type, of, n, at); }

// 2^x for x <= 0, to about 1e-7
inline __m512 power(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

void weigh(const Work& w, int64_t n) {
    const float never = -std::numeric_limits<float>::infinity();
    const int64_t end = (n + 15) / 16 * 16;
    for (int64_t r = 0; r < w.rows; r++) {
        float* s = w.scores + r * w.ld;
        for (int64_t i = n; i < end; i++) s[i] = never;
        __m512 most = _mm512_set1_ps(w.top[r]);
        __mmask16 odd = 0;
        for (int64_t i = 0; i < end; i += 16) {
            const __m512 x = _mm512_load_ps(s + i);
            odd = __mmask16(odd | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
            most = _mm512_max_ps(most, x);
        }
        const float top = odd ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
        // what vector kernels read behind the last weight
        _mm512_store_ps(s + end, _mm512_setzero_ps());
        if (top == never) {
            for (int64_t i = 0; i < end; i += 16) _mm512_store_ps(s + i, _mm512_setzero_ps());
            continue;
        }
        __m512 sum = _mm512_setzero_ps();
        const __m512 all = _mm512_set1_ps(top), lowest = _mm512_set1_ps(-1e4f);
        for (int64_t i = 0; i < end; i += 16) {
            // 2^-infinity by scalef is NaN
            const __m512 x = power(_mm512_max_ps(lowest, _mm512_sub_ps(_mm512_load_ps(s + i), all)));
            _mm512_store_ps(s + i, x);
            sum = _mm512_add_ps(sum, x);
        }
        if (top != w.top[r]) {
            const float gap = w.top[r] - top < -1e4f ? -1e4f : w.top[r] - top;
            const __m512 before = power(_mm512_set1_ps(gap));
            w.sum[r] *= _mm512_cvtss_f32(before);
            for (int64_t c = 0; c < w.high; c += 16) _mm512_store_ps(w.o + r * w.high + c, _mm512_mul_ps(before, _mm512_load_ps(w.o + r * w.high + c)));
            for (int64_t c = 0; c < w.far; c += 16) _mm512_store_ps(w.planes + r * w.far + c, _mm512_mul_ps(before, _mm512_load_ps(w.planes + r * w.far + c)));
            _mm512_store_ps(w.shift + r * 16, _mm512_mul_ps(before, _mm512_load_ps(w.shift + r * 16)));
        }
        w.sum[r] += _mm512_reduce_add_ps(sum);
        w.top[r] = top;
    }
}

// sum += a b over pairs of words. As an instruction, because the compiler copies sums of its own one to and fro, and runs out of registers.
inline void dot(__m512i& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// COUNT words of 32 bits, over and over
template <int COUNT>
inline __m512i repeated(const void* from) {
    if constexpr (COUNT == 1) return _mm512_set1_epi32(*static_cast<const int32_t*>(from));
    else if constexpr (COUNT == 2) {
        int64_t two;
        std::memcpy(&two, from, 8);
        return _mm512_set1_epi64(two);
    } else return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// Codes of 2, 4 or 8 bits in words of 16: PLANES of them, in bytes of IN; STEPS passes of so many planes that sums stay in registers.
template <int BITS>
struct Planes {
    static constexpr int PLANES = 16 / BITS, IN = 8 / BITS, STEPS = BITS == 2 ? 2 : 1, EACH = PLANES / STEPS;

    // of a pass: each code where it stands in its byte
    static inline void of(__m512i v, int step, __m512i (&out)[EACH]) {
        const __m512i upper = _mm512_srli_epi16(v, 8);
#pragma GCC unroll 4
        for (int k = 0; k < EACH; k++) {
            const int plane = step * EACH + k;
            out[k] = _mm512_and_si512(plane < IN ? v : upper, _mm512_set1_epi16(short(((1 << BITS) - 1) << (BITS * (plane % IN)))));
        }
    }
    static constexpr float factor(int plane) { return 1.0f / float(1 << (BITS * (plane % IN))); }
};

// bytes of 64 that hold 2 * PAIRS rows of 16 / PAIRS words: lane i gets word `word(i)` of both rows of pair i % PAIRS
template <int PAIRS, class Word>
inline __m512i interleaved(Word&& word) {
    alignas(64) uint8_t from[64];
    for (int i = 0; i < 16; i++)
        for (int side = 0; side < 2; side++)
            for (int byte = 0; byte < 2; byte++) from[4 * i + 2 * side + byte] = uint8_t((2 * (i % PAIRS) + side) * (32 / PAIRS) + 2 * word(i) + byte);
    return _mm512_load_si512(from);
}

// x as integers of 16 bits in steps of `step`: what is left of x after the first is taken in steps 2^15 times as fine
inline __m512i whole(__m512 x, __m512 inverse, bool second) {
    const __m512 scaled = _mm512_mul_ps(x, inverse);
    __m512i found = _mm512_cvtps_epi32(scaled);
    if (second) found = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(found)), _mm512_set1_ps(32768.0f)));
    return found;
}

// ---- keys by channels

// Where the sums of a chunk of tokens come to lie: in lane i of vector j is plane j * PAIRS + i % PAIRS of word i / PAIRS, and token x is plane x % PLANES
// of word x / PLANES.
template <int BITS, int PAIRS>
struct Table {
    using P = Planes<BITS>;
    alignas(64) uint8_t order[64];
    alignas(64) float factor[P::PLANES / PAIRS][16];
    alignas(64) int32_t from[P::PLANES / PAIRS][16];
    Table() {
        _mm512_store_si512(order, interleaved<PAIRS>([](int i) { return i / PAIRS; }));
        for (int j = 0; j < P::PLANES / PAIRS; j++)
            for (int i = 0; i < 16; i++) {
                const int x = j * 16 + i, word = x / P::PLANES, plane = x % P::PLANES;
                factor[j][i] = P::factor(j * PAIRS + i % PAIRS);
                from[j][i] = plane / PAIRS * 16 + word * PAIRS + plane % PAIRS;
            }
    }
};

template <int BITS, int PAIRS, int ROWS>
__attribute__((noinline)) void channel_scores(const Work& w, const Part& part, const uint8_t* codes, const int16_t* words, const float* steps, int64_t row, float* to) {
    using P = Planes<BITS>;
    constexpr int VECTORS = P::PLANES / PAIRS;
    static const Table<BITS, PAIRS> table;
    const __m512i order = _mm512_load_si512(table.order);
    const int64_t stride = part.codes();
    for (int64_t chunk = 0; chunk < (PAIRS == 1 ? stride : 1); chunk += 32) {
        alignas(64) float found[ROWS][16 * VECTORS];
#pragma GCC unroll 2
        for (int step = 0; step < P::STEPS; step++) {
            __m512i total[ROWS][P::EACH];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int k = 0; k < P::EACH; k++) total[r][k] = _mm512_setzero_si512();
            const uint8_t* at = codes + chunk;
            for (int64_t c = 0; c < w.d; c += 2 * PAIRS, at += 2 * PAIRS * stride) {
                __m512i v;
                if constexpr (PAIRS == 1)
                    v = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))),
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + stride)), 1);
                else v = _mm512_loadu_si512(at);
                __m512i planes[P::EACH];
                P::of(_mm512_permutexvar_epi8(order, v), step, planes);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const __m512i x = repeated<PAIRS>(words + r * w.wide + c);
#pragma GCC unroll 4
                    for (int k = 0; k < P::EACH; k++) dot(total[r][k], planes[k], x);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int j = 0; j < P::EACH / PAIRS; j++) {
                    // lane i of one vector: the sum over its pairs of plane j * PAIRS + i % PAIRS
                    __m512i v = _mm512_setzero_si512();
#pragma GCC unroll 4
                    for (int k = 0; k < PAIRS; k++) {
                        __m512i one = total[r][j * PAIRS + k];
                        if constexpr (PAIRS > 1) one = _mm512_add_epi32(one, _mm512_shuffle_epi32(one, _MM_PERM_ENUM(0xB1)));
                        if constexpr (PAIRS > 2) one = _mm512_add_epi32(one, _mm512_shuffle_epi32(one, _MM_PERM_ENUM(0x4E)));
                        constexpr int EVERY[] = {0, 0xFFFF, 0x5555, 0, 0x1111};
                        v = _mm512_mask_mov_epi32(v, __mmask16(EVERY[PAIRS] << k), one);
                    }
                    const __m512 times = _mm512_mul_ps(_mm512_load_ps(table.factor[step * P::EACH / PAIRS + j]), _mm512_set1_ps(steps[r]));
                    _mm512_store_ps(found[r] + (step * P::EACH / PAIRS + j) * 16, _mm512_mul_ps(_mm512_cvtepi32_ps(v), times));
                }
        }
        for (int part_of = 0; part_of < VECTORS; part_of++) {
            const __m512i index = _mm512_load_si512(table.from[part_of]);
            for (int r = 0; r < ROWS; r++) {
                float* here = to + (row + r) * w.ld + chunk * 8 / BITS + part_of * 16;
                __m512 v;
                if constexpr (VECTORS == 1) v = _mm512_load_ps(found[r]);
                else if constexpr (VECTORS == 2) v = _mm512_permutex2var_ps(_mm512_load_ps(found[r]), index, _mm512_load_ps(found[r] + 16));
                else v = _mm512_i32gather_ps(index, found[r], 4);
                _mm512_storeu_ps(here, _mm512_add_ps(v, _mm512_loadu_ps(here)));
            }
        }
    }
}

template <int ROWS>
bool channel_rows(const Work& w, const Part& part, const Stretch& s, int64_t at, int64_t row) {
    int16_t* words = reinterpret_cast<int16_t*>(w.words);
    const bool bf16 = part.type == Type::bf16;
    const int64_t pairs = part.codes() == 8 ? 4 : part.codes() == 16 ? 2 : 1;
    __m512 most[ROWS], shift[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) most[r] = shift[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < w.d; c += 16) {
        const __mmask16 there = first16(w.d - c);
        const __m512 scale = widen(_mm256_maskz_loadu_epi16(there, s.scales + c), bf16), zero = widen(_mm256_maskz_loadu_epi16(there, s.zeros + c), bf16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const __m512 q = _mm512_load_ps(w.q + (row + r) * w.wide + c);
            most[r] = greater(most[r], _mm512_mul_ps(q, scale));
            shift[r] = _mm512_fmadd_ps(q, zero, shift[r]);
        }
    }
    float steps[ROWS], inverse[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const float greatest = _mm512_reduce_max_ps(most[r]), zero = _mm512_reduce_add_ps(shift[r]);
        if (!(greatest <= std::numeric_limits<float>::max())) return false;
        steps[r] = greatest < SMALL ? 0.0f : greatest / 32767.0f;
        inverse[r] = greatest < SMALL ? 0.0f : 32767.0f / greatest;
        float* to = w.scores + (row + r) * w.ld + at;
        for (int64_t i = 0; i < part.unit; i += 16) _mm512_mask_storeu_ps(to + i, first16(part.unit - i), _mm512_set1_ps(zero));
    }
    for (int term = 0; term < (w.fine ? 2 : 1); term++) {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        for (int64_t c = 0; c < w.d; c += 32) {
            const __m512 low = widen(_mm256_maskz_loadu_epi16(first16(w.d - c), s.scales + c), bf16);
            const __m512 high = widen(_mm256_maskz_loadu_epi16(first16(w.d - c - 16), s.scales + c + 16), bf16);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const float* q = w.q + (row + r) * w.wide + c;
                const __m512 times = _mm512_set1_ps(inverse[r]);
                const __m512i a = whole(_mm512_mul_ps(_mm512_load_ps(q), low), times, term), b = whole(_mm512_mul_ps(_mm512_load_ps(q + 16), high), times, term);
                _mm512_storeu_si512(words + r * w.wide + c, _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b)));
            }
        }
        if (term)
            for (int r = 0; r < ROWS; r++) steps[r] /= 32768.0f;
        float* to = w.scores + at;
        const auto act = [&](auto bits) {
            constexpr int BITS = decltype(bits)::value;
            if (pairs == 4) {
                if constexpr (BITS < 8) channel_scores<BITS, 4, ROWS>(w, part, s.data, words, steps, row, to);
            } else if (pairs == 2) {
                if constexpr (BITS < 8) channel_scores<BITS, 2, ROWS>(w, part, s.data, words, steps, row, to);
            } else channel_scores<BITS, 1, ROWS>(w, part, s.data, words, steps, row, to);
        };
        if (part.bits == 2) act(std::integral_constant<int, 2>());
        else if (part.bits == 4) act(std::integral_constant<int, 4>());
        else act(std::integral_constant<int, 8>());
    }
    return true;
}

bool channels(const Work& w, const Part& part, const Stretch& s, int64_t at) {
    const int64_t bytes = part.codes();
    const bool rows = bytes % 32 == 0 || (part.bits < 8 && (bytes == 8 || bytes == 16));
    if ((part.bits != 2 && part.bits != 4 && part.bits != 8) || part.unit * part.bits % 8 || !rows || w.d > LONGEST || w.d % 8) return false;
    bool done = true;
    bunches(w.rows, [&](auto count, int64_t r) { done = done && channel_rows<decltype(count)::value>(w, part, s, at, r); });
    return done;
}

// ---- values by tokens

// how the codes of 32 bytes of a token fall into groups of one scale each: 1, 2 or 4 of them, 0 if this is not known here
inline int64_t spread(const Part& part) {
    const int64_t codes = 256 / part.bits, many = part.scales();
    if ((part.bits != 2 && part.bits != 4 && part.bits != 8) || many > 16 || (many & (many - 1))) return 0;
    if (many == 1) return 1;
    if (part.group % codes == 0) return 1;
    const int64_t found = codes % part.group == 0 ? codes / part.group : 0;
    return found == 2 || found == 4 ? found : 0;
}

template <int BITS, int GROUPS, int ROWS>
__attribute__((noinline)) void value_sums(const Work& w, const Part& part, const uint8_t* codes, const int32_t* words, int64_t apart, int64_t pairs, const float (*steps)[32], int64_t row) {
    using P = Planes<BITS>;
    static const __m512i order = interleaved<1>([](int i) { return i % GROUPS * (16 / GROUPS) + i / GROUPS; });
    const int64_t bytes = part.codes(), many = part.scales();
    for (int64_t chunk = 0; chunk * 32 < bytes; chunk++) {
        const int64_t left = bytes - chunk * 32, group = GROUPS > 1 ? chunk * GROUPS : chunk * (256 / BITS) / part.group;
        const __mmask32 there = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
#pragma GCC unroll 2
        for (int step = 0; step < P::STEPS; step++) {
            __m512i total[ROWS][P::EACH];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int k = 0; k < P::EACH; k++) total[r][k] = _mm512_setzero_si512();
            const uint8_t* at = codes + chunk * 32;
            const int32_t* x = words + group;
            for (int64_t i = 0; i < pairs; i++, at += bytes, x += many) {
                __m512i planes[P::EACH];
                const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(there, at)), _mm256_maskz_loadu_epi8(there, at + pairs * bytes), 1);
                P::of(_mm512_permutexvar_epi8(order, v), step, planes);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const __m512i weight = repeated<GROUPS>(x + r * apart);
#pragma GCC unroll 4
                    for (int k = 0; k < P::EACH; k++) dot(total[r][k], planes[k], weight);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const __m512 times = _mm512_castsi512_ps(repeated<GROUPS>(steps[r] + group));
                float* to = w.planes + (row + r) * w.far + chunk * (256 / BITS) + step * P::EACH * 16;
#pragma GCC unroll 4
                for (int k = 0; k < P::EACH; k++) {
                    const __m512 factor = _mm512_mul_ps(times, _mm512_set1_ps(P::factor(step * P::EACH + k)));
                    _mm512_store_ps(to + k * 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][k]), factor, _mm512_load_ps(to + k * 16)));
                }
            }
        }
    }
}

// an even number of tokens, LONGEST at most: token i and token i + n / 2 are a pair
template <int ROWS>
bool value_rows(const Work& w, const Part& part, const Stretch& s, int64_t n, int64_t at, int64_t row, int64_t groups) {
    const bool bf16 = part.type == Type::bf16;
    const int64_t pairs = n / 2, many = part.scales(), flat = pairs * many, apart = (flat + 31) / 16 * 16;
    // a scale's token and group: `many` divides 16
    const __m512i token = _mm512_srlv_epi32(iota(), _mm512_set1_epi32(__builtin_ctz(unsigned(many))));
    int32_t* words = reinterpret_cast<int32_t*>(w.words);
    float* products = reinterpret_cast<float*>(words + ROWS * apart);
    __m512 most[ROWS], shift[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) most[r] = shift[r] = _mm512_setzero_ps();
    for (int64_t f = 0; f < flat; f += 16) {
        const __mmask16 there = first16(flat - f);
        const __m512 s0 = widen(_mm256_maskz_loadu_epi16(there, s.scales + f), bf16), s1 = widen(_mm256_maskz_loadu_epi16(there, s.scales + flat + f), bf16);
        const __m512 z0 = widen(_mm256_maskz_loadu_epi16(there, s.zeros + f), bf16), z1 = widen(_mm256_maskz_loadu_epi16(there, s.zeros + flat + f), bf16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const float* p = w.scores + (row + r) * w.ld + at + f / many;
            const __m512 p0 = _mm512_permutexvar_ps(token, _mm512_loadu_ps(p)), p1 = _mm512_permutexvar_ps(token, _mm512_loadu_ps(p + pairs));
            const __m512 x0 = _mm512_mul_ps(p0, s0), x1 = _mm512_mul_ps(p1, s1);
            _mm512_store_ps(products + r * 2 * apart + f, x0);
            _mm512_store_ps(products + r * 2 * apart + apart + f, x1);
            most[r] = greater(greater(most[r], x0), x1);
            shift[r] = _mm512_fmadd_ps(p1, z1, _mm512_fmadd_ps(p0, z0, shift[r]));
        }
    }
    alignas(64) float steps[ROWS][32] = {};
    __m512 inverse[ROWS];
    for (int r = 0; r < ROWS; r++) {
        // over lanes of the same group
        for (int64_t by = 8; by >= many; by /= 2) {
            const __m512i other = _mm512_xor_si512(iota(), _mm512_set1_epi32(int(by)));
            most[r] = _mm512_max_ps(most[r], _mm512_permutexvar_ps(other, most[r]));
        }
        if (!(_mm512_reduce_max_ps(most[r]) <= std::numeric_limits<float>::max())) return false;
        const __mmask16 seen = _mm512_cmp_ps_mask(most[r], _mm512_set1_ps(SMALL), _CMP_GE_OQ);
        inverse[r] = _mm512_maskz_div_ps(seen, _mm512_set1_ps(32767.0f), most[r]);
        _mm512_store_ps(steps[r], _mm512_maskz_mul_ps(seen, most[r], _mm512_set1_ps(1.0f / 32767.0f)));
    }
    for (int r = 0; r < ROWS; r++) {
        float* to = w.shift + (row + r) * 16;
        _mm512_store_ps(to, _mm512_add_ps(shift[r], _mm512_load_ps(to)));
    }
    for (int term = 0; term < (w.fine ? 2 : 1); term++) {
        for (int64_t f = 0; f < flat; f += 16)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const float* x = products + r * 2 * apart + f;
                const __m512i a = whole(_mm512_load_ps(x), inverse[r], term), b = whole(_mm512_load_ps(x + apart), inverse[r], term);
                _mm512_storeu_si512(words + r * apart + f, _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16)));
            }
        if (term)
            for (int r = 0; r < ROWS; r++) _mm512_store_ps(steps[r], _mm512_mul_ps(_mm512_load_ps(steps[r]), _mm512_set1_ps(1.0f / 32768.0f)));
        const auto act = [&](auto bits) {
            constexpr int BITS = decltype(bits)::value;
            if (groups == 4) value_sums<BITS, 4, ROWS>(w, part, s.data, words, apart, pairs, steps, row);
            else if (groups == 2) value_sums<BITS, 2, ROWS>(w, part, s.data, words, apart, pairs, steps, row);
            else value_sums<BITS, 1, ROWS>(w, part, s.data, words, apart, pairs, steps, row);
        };
        if (part.bits == 2) act(std::integral_constant<int, 2>());
        else if (part.bits == 4) act(std::integral_constant<int, 4>());
        else act(std::integral_constant<int, 8>());
    }
    return true;
}

int64_t grouped(const Work& w, const Part& part, const Stretch& s, int64_t at) {
    const int64_t groups = spread(part);
    int64_t done = 0;
    while (groups && s.count - done > 1) {
        const int64_t n = (s.count - done < LONGEST ? s.count - done : LONGEST) / 2 * 2;
        const Stretch some{s.data + done * part.codes(), s.scales + done * part.scales(), s.zeros + done * part.scales(), n};
        bool good = true;
        bunches(w.rows, [&](auto count, int64_t r) { good = good && value_rows<decltype(count)::value>(w, part, some, n, at + done, r, groups); });
        if (!good) break;
        done += n;
    }
    return done;
}

void gather(const Work& w, const Part& part) {
    const int64_t groups = spread(part), many = part.scales(), planes = 16 / part.bits;
    if (!groups || part.unit > 1) return;
    const int64_t codes = 256 / part.bits, each = 16 / groups;
    for (int64_t r = 0; r < w.rows; r++) {
        float *o = w.o + r * w.high, *shift = w.shift + r * 16;
        for (int64_t i = many; i < 16; i++) shift[i % many] += shift[i];
        for (int64_t g = 0; g < many; g++)
            for (int64_t c = g * part.group; c < w.e && c < (g + 1) * part.group; c++) o[c] += shift[g];
        for (int64_t chunk = 0; chunk < w.e; chunk += codes)
            for (int64_t lane = 0; lane < 16; lane++) {
                const int64_t first = chunk + (lane % groups * each + lane / groups) * planes;
                const float* from = w.planes + r * w.far + chunk + lane;
                for (int64_t k = 0; k < planes && first + k < w.e; k++) o[first + k] += from[k * 16];
            }
    }
}

} // namespace

const Ops avx512_ops = {scores, values, weigh, channels, grouped, gather};

} // namespace laconic
#endif
