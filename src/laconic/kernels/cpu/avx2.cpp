// AVX2: the same products as in avx512.cpp without its instructions. Sixteen codes at a time, in their order, whatever the width: each word gets the
// two bytes that its code lies in, and a multiplication and a shift cut it out.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

namespace laconic {

namespace {

constexpr int64_t NEAR = 16;

template <int BITS>
struct Words {
    __m256i bytes, factors;

    Words() {
        alignas(32) uint8_t from[32];
        alignas(32) uint16_t by[16];
        for (int j = 0; j < 16; j++) {
            // eight codes for each half, which has its own bytes
            const int bit = j % 8 * BITS, shift = bit & 7;
            from[2 * j] = uint8_t(bit >> 3);
            from[2 * j + 1] = uint8_t((bit >> 3) + 1);
            by[j] = uint16_t(1u << (16 - BITS - shift));
        }
        bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
        factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(by));
    }

    // sixteen codes from 2 * BITS bytes; reads 16 bytes from `at` and from at + BITS
    __m256i load(const uint8_t* at) const {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + BITS));
        const __m256i two = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), bytes);
        return _mm256_srli_epi16(_mm256_mullo_epi16(two, factors), 16 - BITS);
    }
};

// bytes behind the last that a load at the end of a row may touch
constexpr int64_t OVER = 32;

inline float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// what x is in whole numbers, one scale for each run of STEP columns that no group's end divides
struct Whole {
    int64_t step, steps, wide; // wide: columns, up to a multiple of 16
    int terms;
    std::vector<int16_t> x;    // [row][term][wide], terms as in Prepared
    std::vector<float> scale;  // [row][steps]
    std::vector<float> sums;   // [row][groups]
};

bool prepare(const Product& p, Whole& q) {
    const Weight& w = p.w;
    q.step = w.group >= w.m ? 64 : std::min<int64_t>(w.group, 64);
    while (w.group < w.m && w.group % q.step) q.step -= 16;
    q.wide = (w.m + 15) / 16 * 16;
    q.steps = (w.m + q.step - 1) / q.step;
    q.terms = p.bf16 ? 1 : 2;
    q.x.assign(size_t(p.rows * q.terms * q.wide), 0);
    q.scale.assign(size_t(p.rows * q.steps), 0.0f);
    q.sums.assign(size_t(p.rows * w.groups), 0.0f);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t s = 0; s < q.steps; s++) {
            float part[64];
            const int64_t first = s * q.step, count = std::min(q.step, w.m - first);
            float peak = 0.0f, odd = 0.0f;
            for (int64_t i = 0; i < count; i++) {
                const int64_t at = r * w.m + first + i;
                part[i] = p.bf16 ? from_bf16(static_cast<const uint16_t*>(p.x)[at]) : static_cast<const float*>(p.x)[at];
                peak = std::max(peak, std::fabs(part[i]));
                odd += part[i] * 0.0f;
            }
            // 0 only where all are finite
            if (!(odd == 0.0f)) return false;
            const float scale = peak < 1e-33f ? 0.0f : peak / TOP, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
            int16_t* to = q.x.data() + r * q.terms * q.wide + first;
            int32_t sum = 0, rest = 0;
            for (int64_t i = 0; i < count; i++) {
                const float exact = part[i] * inverse, near = std::nearbyint(exact);
                const int32_t value = std::min(32767, std::max(-32767, int32_t(near)));
                to[i] = int16_t(value);
                sum += value;
                if (q.terms == 2) {
                    const int32_t finer = int32_t(std::nearbyint((exact - near) * FINER));
                    to[q.wide + i] = int16_t(finer);
                    rest += finer;
                }
            }
            q.scale[size_t(r * q.steps + s)] = scale;
            q.sums[size_t(r * w.groups + first / w.group)] += (float(sum) + float(rest) / FINER) * scale;
        }
    return true;
}

// one row of the weight times ROWS rows of x, from `begin` on
template <int BITS, int ROWS, int TERMS>
void row(const Product& p, const Whole& q, const Words<BITS>& words, int64_t n, const uint8_t* codes, int64_t begin) {
    const Weight& w = p.w;
    const uint16_t* scales = w.scales + n * w.groups;
    __m256 total[ROWS];
    float away[ROWS] = {};
    for (int i = 0; i < ROWS; i++) total[i] = _mm256_setzero_ps();
    for (int64_t s = 0; s < q.steps; s++) {
        const int64_t first = s * q.step, end = std::min(q.wide, first + q.step);
        const float scale = from_bf16(scales[first / w.group]);
        __m256i sum[ROWS][TERMS];
        for (int i = 0; i < ROWS; i++)
            for (int t = 0; t < TERMS; t++) sum[i][t] = _mm256_setzero_si256();
        for (int64_t j = first; j < end; j += 16) {
            const __m256i code = words.load(codes + j / 8 * BITS);
            for (int i = 0; i < ROWS; i++)
                for (int t = 0; t < TERMS; t++) {
                    const int16_t* x = q.x.data() + ((begin + i) * TERMS + t) * q.wide + j;
                    sum[i][t] = _mm256_add_epi32(sum[i][t], _mm256_madd_epi16(code, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
                }
        }
        for (int i = 0; i < ROWS; i++) {
            __m256 value = _mm256_cvtepi32_ps(sum[i][0]);
            if constexpr (TERMS == 2) value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][1]), _mm256_set1_ps(1.0f / FINER), value);
            total[i] = _mm256_fmadd_ps(value, _mm256_set1_ps(scale * q.scale[size_t((begin + i) * q.steps + s)]), total[i]);
        }
    }
    for (int64_t g = 0; g < w.groups; g++) {
        const float offset = from_bf16(scales[g]) * zero_at(w, n, g);
        for (int i = 0; i < ROWS; i++) away[i] += offset * q.sums[size_t((begin + i) * w.groups + g)];
    }
    for (int i = 0; i < ROWS; i++) put(p, (begin + i) * w.n + n, sum_of(total[i]) - away[i]);
}

template <int BITS, int TERMS>
void product(const Product& p, const Whole& q) {
    const Weight& w = p.w;
    const Words<BITS> words;
#pragma omp parallel num_threads(p.threads)
    {
        // the last rows are copied, so that no load goes behind the codes
        std::vector<uint8_t> copy(size_t(w.stride) + OVER + 16, 0);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (w.n + NEAR - 1) / NEAR; block++)
            for (int64_t r = 0; r < p.rows; r += 4)
                for (int64_t n = block * NEAR; n < std::min(w.n, (block + 1) * NEAR); n++) {
                    const uint8_t* codes = w.codes + n * w.stride;
                    if (int64_t(w.n - n - 1) * int64_t(w.stride) < OVER + 16) {
                        std::copy_n(codes, w.stride, copy.data());
                        codes = copy.data();
                    }
                    if (p.rows - r >= 4) row<BITS, 4, TERMS>(p, q, words, n, codes, r);
                    else
                        for (int64_t i = r; i < p.rows; i++) row<BITS, 1, TERMS>(p, q, words, n, codes, i);
                }
    }
}

// numbers of one row of codes, 16 at a time into `out`, which has room for a multiple of 16
template <int BITS>
void decode(const Weight& w, const Words<BITS>& words, int64_t n, const uint8_t* codes, float* out) {
    for (int64_t j = 0; j < w.m; j += 16) {
        const __m256i code = words.load(codes + j / 8 * BITS);
        const int64_t g = j / w.group;
        const __m256 away = _mm256_set1_ps(zero_at(w, n, g)), scale = _mm256_set1_ps(from_bf16(w.scales[n * w.groups + g]));
        const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(code)));
        const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(code, 1)));
        _mm256_storeu_ps(out + j, _mm256_mul_ps(_mm256_sub_ps(low, away), scale));
        _mm256_storeu_ps(out + j + 8, _mm256_mul_ps(_mm256_sub_ps(high, away), scale));
    }
}

template <int BITS>
void dense(const Weight& w, float* out, int threads) {
    const Words<BITS> words;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> copy(size_t(w.stride) + OVER + 16, 0);
        std::vector<float> last(size_t(w.m) + 16);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < w.n; n++) {
            const uint8_t* codes = w.codes + n * w.stride;
            const bool ends = int64_t(w.n - n - 1) * int64_t(w.stride) < OVER + 16;
            if (ends) {
                std::copy_n(codes, w.stride, copy.data());
                codes = copy.data();
            }
            // a row that is no multiple of 16 would run into the next one
            if (w.m % 16) {
                decode<BITS>(w, words, n, codes, last.data());
                std::copy_n(last.data(), w.m, out + n * w.m);
            } else {
                decode<BITS>(w, words, n, codes, out + n * w.m);
            }
        }
    }
}

// ---- inputs of 8 bits

// Bytes of codes times bytes of x, in pairs, are sums of 16 bits that saturate: so many of them are added before they become 32 bits. Two of 8 bits alone
// are too much, so those codes come as their low 7 bits and their highest one.
template <int BITS>
constexpr int PAIRS = BITS <= 5 ? 4 : BITS == 6 ? 2 : 1;

template <int BITS, int N, int ROWS>
inline void run_of(const uint8_t* codes, int64_t apart, const int8_t* x, int64_t wide, int64_t count, __m256i (&sum)[N][ROWS]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(0x7f);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < ROWS; i++) sum[n][i] = _mm256_setzero_si256();
    for (int64_t j = 0; j < count; j += 32 * PAIRS<BITS>) {
        __m256i half[N][ROWS];
        for (int n = 0; n < N; n++)
            for (int i = 0; i < ROWS; i++) half[n][i] = _mm256_setzero_si256();
        const int64_t end = std::min<int64_t>(count, j + 32 * PAIRS<BITS>);
        for (int64_t k = j; k < end; k += 32) {
            __m256i code[N];
            for (int n = 0; n < N; n++) code[n] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + n * apart + k));
            for (int i = 0; i < ROWS; i++) {
                const __m256i by = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * wide + k));
                for (int n = 0; n < N; n++) {
                    if constexpr (BITS == 8) {
                        const __m256i top = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(low, code[n]), by), ones);
                        sum[n][i] = _mm256_add_epi32(sum[n][i], top);
                        half[n][i] = _mm256_maddubs_epi16(_mm256_and_si256(code[n], low), by);
                    } else {
                        half[n][i] = _mm256_add_epi16(half[n][i], _mm256_maddubs_epi16(code[n], by));
                    }
                }
            }
        }
        for (int n = 0; n < N; n++)
            for (int i = 0; i < ROWS; i++) sum[n][i] = _mm256_add_epi32(sum[n][i], _mm256_madd_epi16(half[n][i], ones));
    }
}

// N rows of the weight, unpacked, times ROWS rows of x
template <int BITS, int N, int ROWS>
void rounded(const Product& p, const Rounded& q, int64_t n, const uint8_t* codes, const float* zeros, int64_t r) {
    const Weight& w = p.w;
    __m256 total[N][ROWS];
    float away[N][ROWS] = {};
    for (int a = 0; a < N; a++)
        for (int i = 0; i < ROWS; i++) total[a][i] = _mm256_setzero_ps();
    for (int64_t run = 0; run < q.runs.count; run++) {
        const int64_t at = q.at[size_t(run)], g = q.runs.group_of(run);
        __m256i sum[N][ROWS];
        run_of<BITS, N, ROWS>(codes + at, q.wide, q.x.data() + r * q.wide + at, q.wide, q.at[size_t(run) + 1] - at, sum);
        for (int a = 0; a < N; a++) {
            const float scale = from_bf16(w.scales[(n + a) * w.groups + g]), zero = zeros[a * w.groups + g];
            for (int i = 0; i < ROWS; i++) {
                const size_t place = size_t((r + i) * q.runs.count + run);
                const float both = scale * q.scale[place];
                total[a][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[a][i]), _mm256_set1_ps(both), total[a][i]);
                away[a][i] += zero * float(q.sum[place]) * both;
            }
        }
    }
    for (int a = 0; a < N; a++)
        for (int i = 0; i < ROWS; i++) put(p, (r + i) * w.n + n + a, sum_of(total[a][i]) - away[a][i]);
}

template <int BITS>
void int8(const Product& p, const Rounded& q) {
    const Weight& w = p.w;
    const Words<BITS> words;
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<uint8_t> copy(size_t(w.stride) + OVER + 16, 0), codes(size_t(NEAR * q.wide), 0);
        std::vector<float> zeros(size_t(NEAR * w.groups));
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (w.n + NEAR - 1) / NEAR; block++) {
            const int64_t begin = block * NEAR, number = std::min(w.n - begin, NEAR);
            for (int64_t a = 0; a < number; a++) {
                const uint8_t* row = w.codes + (begin + a) * w.stride;
                if (int64_t(w.n - begin - a - 1) * int64_t(w.stride) < OVER + 16) {
                    std::copy_n(row, w.stride, copy.data());
                    row = copy.data();
                }
                for (int64_t g = 0; g < w.groups; g++) zeros[size_t(a * w.groups + g)] = zero_at(w, begin + a, g);
                for (int64_t run = 0; run < q.runs.count; run++)
                    for (int64_t j = q.runs.begin(run), to = a * q.wide + q.at[size_t(run)]; j < q.runs.end(run); j += 16, to += 16) {
                        const __m256i code = words.load(row + j / 8 * BITS);
                        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
                        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes.data() + to), bytes);
                    }
            }
            for (int64_t r = 0; r < p.rows; r += 4) {
                int64_t a = 0;
                const auto place = [&](int64_t row) { return codes.data() + row * q.wide; };
                if (p.rows - r >= 4)
                    for (; a + 2 <= number; a += 2) rounded<BITS, 2, 4>(p, q, begin + a, place(a), zeros.data() + a * w.groups, r);
                for (; a < number; a++)
                    for (int64_t i = r; i < std::min(p.rows, r + 4); i++)
                        rounded<BITS, 1, 1>(p, q, begin + a, place(a), zeros.data() + a * w.groups, i);
            }
        }
    }
}

template <template <int> class F, class... A>
void by_bits(int bits, A&&... a) {
    switch (bits) {
    case 1: return F<1>::run(a...);
    case 2: return F<2>::run(a...);
    case 3: return F<3>::run(a...);
    case 4: return F<4>::run(a...);
    case 5: return F<5>::run(a...);
    case 6: return F<6>::run(a...);
    case 7: return F<7>::run(a...);
    default: return F<8>::run(a...);
    }
}

template <int BITS>
struct Multiply {
    static void run(const Product& p, const Whole& q) { q.terms == 2 ? product<BITS, 2>(p, q) : product<BITS, 1>(p, q); }
};

template <int BITS>
struct Bytewise {
    static void run(const Product& p, const Rounded& q) { int8<BITS>(p, q); }
};

template <int BITS>
struct Decode {
    static void run(const Weight& w, float* out, int threads) { dense<BITS>(w, out, threads); }
};

} // namespace

bool product_avx2(const Product& p) {
    Whole q;
    if (!prepare(p, q)) return false;
    by_bits<Multiply>(p.w.bits, p, q);
    return true;
}

bool int8_avx2(const Product& p) {
    Rounded q(p);
    if (!q.fill(p)) return false;
    by_bits<Bytewise>(p.w.bits, p, q);
    return true;
}

void dense_avx2(const Weight& w, float* out, int threads) { by_bits<Decode>(w.bits, w, out, threads); }

} // namespace laconic
