// AVX-512 with VNNI and VBMI. Products of codes with x's 16 bits are exact in 32 bits, and become fp32 once a block, times both scales.
#include <type_traits>
#include <vector>

#include "avx512.h"

namespace laconic {

namespace {

// a block of codes as words, plane by plane
template <int BITS>
struct Codes {
    static constexpr int PLANES = BITS == 4 ? 4 : BITS == 2 ? 8 : 2;
    static constexpr int BYTES = BITS == 4 || BITS == 2 ? 64 : 8 * BITS;
    Bytes<BITS> bytes;

    void load(const uint8_t* at, __mmask64 there, __m512i (&out)[PLANES]) const {
        __m512i v = BYTES == 64 && there == ~__mmask64(0) ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(there, at);
        constexpr int STEP = 16 / PLANES;
        if constexpr (PLANES == 2) v = bytes.of(v);
        const __m512i mask = _mm512_set1_epi16((1 << STEP) - 1);
#pragma GCC unroll 8
        for (int k = 0; k < PLANES - 1; k++) out[k] = _mm512_and_si512(k ? _mm512_srli_epi16(v, STEP * k) : v, mask);
        out[PLANES - 1] = _mm512_srli_epi16(v, 16 - STEP);
    }
};

// the same columns of one row of the weight and of a bunch of x
template <int P, int ROWS, int TERMS>
inline void step(const __m512i (&plane)[P], __m512 scale, const int16_t* x, const float* of, __m512 (&total)[ROWS]) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        __m512i sum[TERMS];
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; t++) {
            sum[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int k = 0; k < P; k++) sum[t] = _mm512_dpwssd_epi32(sum[t], plane[k], _mm512_load_si512(x + ((i * TERMS + t) * P + k) * 32));
        }
        __m512 value = _mm512_cvtepi32_ps(sum[0]);
        if constexpr (TERMS == 2) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), _mm512_set1_ps(1.0f / FINER), value);
        total[i] = _mm512_fmadd_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(of[i])), total[i]);
    }
}

// N rows of the weight from `row` on times a bunch: x and of are the bunch's, sums those of its first row
template <int BITS, int N, int ROWS, int TERMS, bool SHARED>
inline void some(const Product& p, const Prepared& q, const Codes<BITS>& codes, const Scales& scales, int64_t row, const int16_t* x, const float* of,
                 const float* sums, const float* offset, int64_t to) {
    const Weight& w = p.w;
    constexpr int P = Codes<BITS>::PLANES, BYTES = Codes<BITS>::BYTES;
    const uint8_t *at = w.codes + row * w.stride, *end = at + w.stride;
    Running<SHARED, N> scale{scales, w.scales + row * w.groups, w.groups, w.groups};
    __m512 total[N][ROWS], of_row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_setzero_ps();
    __m512i plane[P];
    for (; at + BYTES <= end; at += BYTES, x += ROWS * TERMS * P * 32, of += ROWS) {
        scale.next(of_row);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            ask(at + n * w.stride);
            codes.load(at + n * w.stride, low_bits(BYTES), plane);
            step<P, ROWS, TERMS>(plane, of_row[n], x, of, total[n]);
        }
    }
    if (at < end) {
        scale.next(of_row);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            codes.load(at + n * w.stride, first(end - at), plane);
            step<P, ROWS, TERMS>(plane, of_row[n], x, of, total[n]);
        }
    }
    for (int64_t g = 0; g < q.padded; g += 16)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const __m512 away = _mm512_loadu_ps(offset + n * q.padded + g);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_fnmadd_ps(away, _mm512_loadu_ps(sums + i * q.padded + g), total[n][i]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        if constexpr (N == SIDE) put_four(p, to + i * w.n, sums_of(total[0][i], total[1][i], total[2][i], total[3][i]));
        else
            for (int n = 0; n < N; n++) put(p, to + i * w.n + n, _mm512_reduce_add_ps(total[n][i]));
    }
}

template <int BITS, int TERMS, bool SHARED>
void product(const Product& p, const Prepared& q, const Scales& scales) {
    const Weight& w = p.w;
    const Codes<BITS> codes;
    constexpr int64_t WIDTH = 32 * Codes<BITS>::PLANES;
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> offset(size_t(NEAR * q.padded));
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (w.n + NEAR - 1) / NEAR; block++) {
            const int64_t begin = block * NEAR, end = std::min(w.n, begin + NEAR);
            for (int64_t i = begin; i < end; i++) offsets<BITS>(w, codes.bytes, i, q.padded, offset.data() + (i - begin) * q.padded);
            for (int64_t r = 0, size; r < p.rows; r += size) {
                size = bunch(p.rows, r);
                const int16_t* x = q.x + r * q.blocks * WIDTH * TERMS;
                const float *of = q.scale + r * q.blocks, *sums = q.sums + r * q.padded;
                for (int64_t i = begin, number; i < end; i += number) {
                    number = end - i >= SIDE ? SIDE : 1;
                    const float* away = offset.data() + (i - begin) * q.padded;
                    const auto run = [&](auto rows) {
                        constexpr int ROWS = decltype(rows)::value;
                        if (number == SIDE) some<BITS, SIDE, ROWS, TERMS, SHARED>(p, q, codes, scales, i, x, of, sums, away, r * w.n + i);
                        else some<BITS, 1, ROWS, TERMS, SHARED>(p, q, codes, scales, i, x, of, sums, away, r * w.n + i);
                    };
                    if (size == TOGETHER) run(std::integral_constant<int, TOGETHER>());
                    else if (size == 2) run(std::integral_constant<int, 2>());
                    else run(std::integral_constant<int, 1>());
                }
            }
        }
    }
}

template <int BITS>
void product(const Product& p, const Prepared& q) {
    const Scales scales(p.w, 32 * Codes<BITS>::PLANES);
    if (q.terms == 2) {
        if (scales.share) product<BITS, 2, true>(p, q, scales);
        else product<BITS, 2, false>(p, q, scales);
    } else {
        if (scales.share) product<BITS, 1, true>(p, q, scales);
        else product<BITS, 1, false>(p, q, scales);
    }
}

// columns from..to of a row, (code - zero) * scale, in that order: the same numbers as the reference to the last bit
template <int BITS>
void span(const Weight& w, const Bytes<BITS>& bytes, int64_t row, int64_t from, int64_t to, float* out) {
    const uint8_t* at = w.codes + row * w.stride + from / 8 * BITS;
    const uint16_t* scales = w.scales + row * w.groups;
    int64_t left = int64_t(w.stride) - from / 8 * BITS, group = from / w.group - 1, ends = (group + 1) * w.group, read = -1;
    alignas(64) uint8_t codes[64], zeros[64];
    __m512 scale = _mm512_setzero_ps(), zero = _mm512_set1_ps(float(w.middle()) * w.unit());
    for (int64_t j = from; j < to; j += 64, at += 8 * BITS, left -= 8 * BITS) {
        _mm512_store_si512(codes, bytes.load(at, left));
        for (int64_t k = 0; k < 64 && j + k < to; k += 16) {
            // counted, since a division takes as long as all the rest
            if (j + k >= ends) {
                group++, ends += w.group;
                scale = _mm512_set1_ps(from_bf16(scales[group]));
                if (w.zeros) {
                    if (group / 64 != read) {
                        read = group / 64;
                        _mm512_store_si512(zeros, zeros_of<BITS>(w, bytes, row, 64 * read));
                    }
                    zero = _mm512_set1_ps(float(zeros[group % 64]) * w.unit());
                }
            }
            const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + k))));
            const __m512 value = _mm512_mul_ps(_mm512_sub_ps(code, zero), scale);
            // a store under a mask takes longer
            if (j + k + 16 <= to) _mm512_storeu_ps(out + (j - from) + k, value);
            else _mm512_mask_storeu_ps(out + (j - from) + k, __mmask16(first(to - j - k)), value);
        }
    }
}

template <int BITS>
void dense(const Weight& w, float* out, int threads) {
    const Bytes<BITS> bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < w.n; i++) span<BITS>(w, bytes, i, 0, w.m, out + i * w.m);
}

template <int BITS>
void span(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
    static const Bytes<BITS> bytes;
    span<BITS>(w, bytes, row, from, to, out);
}

// one row of x, see Prepared; false where it holds NaN or an infinity
template <int P>
bool prepare_row(const Product& p, const Prepared& q, int64_t r) {
    const Weight& w = p.w;
    constexpr int64_t WIDTH = 32 * P;
    // the bunch of this row
    int64_t begin = r / TOGETHER * TOGETHER, size = bunch(p.rows, begin);
    while (r >= begin + size) begin += size, size = bunch(p.rows, begin);
    const Deal deal;
    float* sums = q.sums + r * q.padded;
    std::fill(sums, sums + q.padded, 0.0f);
    const float* wide = static_cast<const float*>(p.x) + r * w.m;
    const uint16_t* narrow = static_cast<const uint16_t*>(p.x) + r * w.m;
    for (int64_t b = 0; b < q.blocks; b++) {
        const int64_t from = b * WIDTH, count = std::min(WIDTH, w.m - from);
        __m512 part[2 * P], most = _mm512_setzero_ps();
        __mmask16 wrong = 0;
        for (int i = 0; i < 2 * P; i++) {
            const __mmask16 there = __mmask16(first(std::max<int64_t>(0, count - 16 * i)));
            part[i] = p.bf16 ? widen(_mm256_maskz_loadu_epi16(there, narrow + from + 16 * i)) : _mm512_maskz_loadu_ps(there, wide + from + 16 * i);
            // quiet and signalling NaN, both infinities
            wrong |= _mm512_fpclass_ps_mask(part[i], 0x99);
            most = _mm512_max_ps(most, _mm512_abs_ps(part[i]));
        }
        if (wrong) return false;
        const float peak = _mm512_reduce_max_ps(most);
        // below this the inverse would be infinite: as good as zero
        const float scale = peak < 1e-33f ? 0.0f : peak / TOP;
        const __m512 inverse = _mm512_set1_ps(scale == 0.0f ? 0.0f : 1.0f / scale);
        alignas(64) int16_t whole[2][WIDTH];
        for (int i = 0; i < 2 * P; i++) {
            // a product rounded up may come to one more than the greatest: saturated
            const __m512 exact = _mm512_mul_ps(part[i], inverse);
            const __m512 rest = _mm512_sub_ps(exact, _mm512_roundscale_ps(exact, 0));
            _mm256_store_si256(reinterpret_cast<__m256i*>(whole[0] + 16 * i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(exact)));
            _mm256_store_si256(reinterpret_cast<__m256i*>(whole[1] + 16 * i),
                               _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(FINER)))));
        }
        const int64_t place = begin * q.blocks + b * size + r - begin;
        for (int t = 0; t < q.terms; t++) {
            __m512i words[P];
            for (int i = 0; i < P; i++) words[i] = _mm512_load_si512(whole[t] + 32 * i);
            deal.planes<P>(words);
            for (int i = 0; i < P; i++) _mm512_store_si512(q.x + ((place * q.terms + t) * P + i) * 32, words[i]);
        }
        q.scale[place] = scale;
        for (int64_t i = 0; i < count;) {
            const int64_t g = (from + i) / w.group, end = std::min(count, (g + 1) * w.group - from);
            int32_t sum = 0, rest = 0;
            for (; i < end; i++) sum += whole[0][i], rest += whole[1][i];
            sums[g] += (float(sum) + (q.terms == 2 ? float(rest) / FINER : 0.0f)) * scale;
        }
    }
    return true;
}

} // namespace

bool prepare_avx512(const Product& p, const Prepared& q) {
    bool finite = true;
#pragma omp parallel for num_threads(p.threads) reduction(&& : finite) schedule(static) if (p.rows > 1)
    for (int64_t r = 0; r < p.rows; r++)
        finite = (q.planes == 8 ? prepare_row<8>(p, q, r) : q.planes == 4 ? prepare_row<4>(p, q, r) : prepare_row<2>(p, q, r)) && finite;
    return finite;
}

void dense_avx512(const Weight& w, float* out, int threads) {
    switch (w.bits) {
    case 1: return dense<1>(w, out, threads);
    case 2: return dense<2>(w, out, threads);
    case 3: return dense<3>(w, out, threads);
    case 4: return dense<4>(w, out, threads);
    case 5: return dense<5>(w, out, threads);
    case 6: return dense<6>(w, out, threads);
    case 7: return dense<7>(w, out, threads);
    default: return dense<8>(w, out, threads);
    }
}

void span_avx512(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
    switch (w.bits) {
    case 1: return span<1>(w, row, from, to, out);
    case 2: return span<2>(w, row, from, to, out);
    case 3: return span<3>(w, row, from, to, out);
    case 4: return span<4>(w, row, from, to, out);
    case 5: return span<5>(w, row, from, to, out);
    case 6: return span<6>(w, row, from, to, out);
    case 7: return span<7>(w, row, from, to, out);
    default: return span<8>(w, row, from, to, out);
    }
}

void product_avx512(const Product& p, const Prepared& q) {
    switch (p.w.bits) {
    case 1: return product<1>(p, q);
    case 2: return product<2>(p, q);
    case 3: return product<3>(p, q);
    case 4: return product<4>(p, q);
    case 5: return product<5>(p, q);
    case 6: return product<6>(p, q);
    case 7: return product<7>(p, q);
    default: return product<8>(p, q);
    }
}

} // namespace laconic
