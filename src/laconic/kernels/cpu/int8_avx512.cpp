// Products with inputs of 8 bits, AVX-512 with VNNI and VBMI: codes are its unsigned bytes, x its signed ones, sums of a run exact in 32 bits.
// Few rows: a row of the weight is read along its columns, as in avx512.cpp, with bytes in place of words. Many rows: the codes of WIDE rows of the weight
// are taken apart once into a panel, lanes are outputs, and a tile of rows of x stays in registers over a run.
#include <type_traits>

#include "avx512.h"

namespace laconic {

namespace {

// up to so many rows of x go along the columns
constexpr int64_t FEW = 4;
// outputs of a panel, and rows of a tile: 24 sums, 2 vectors of codes and one of x fill the registers
constexpr int WIDE = 32, TALL = 12;
// rows of x whose sums stay in the second cache while a panel is used
constexpr int64_t LONG = 504;

// what a product holds while it runs: of all threads, and of each
thread_local Room whole, near;

// a block of codes as bytes, plane by plane: plane p of byte j is code P * j + p
template <int BITS>
struct Octets {
    static constexpr int P = BITS == 4 ? 2 : BITS == 2 ? 4 : 1;
    static constexpr int BYTES = P > 1 ? 64 : 8 * BITS;
    Bytes<BITS> bytes;

    __m512i raw(const uint8_t* at, __mmask64 there) const {
        if constexpr (P > 1) return _mm512_maskz_loadu_epi8(there, at);
        else return bytes.of(_mm512_maskz_loadu_epi8(there, at));
    }

    static void apart(__m512i v, __m512i (&out)[P]) {
        if constexpr (P == 1) out[0] = v;
        else
#pragma GCC unroll 4
            for (int k = 0; k < P; k++) out[k] = _mm512_and_si512(k ? _mm512_srli_epi16(v, BITS * k) : v, _mm512_set1_epi8((1 << BITS) - 1));
    }
};

// P vectors of bytes in their order -> planes of every P-th byte
template <int P>
inline void deal(__m512i* bytes, __m512i even, __m512i odd) {
    if constexpr (P > 1) {
        __m512i half[P];
        for (int i = 0; i < P; i += 2) {
            half[i / 2] = _mm512_permutex2var_epi8(bytes[i], even, bytes[i + 1]);
            half[P / 2 + i / 2] = _mm512_permutex2var_epi8(bytes[i], odd, bytes[i + 1]);
        }
        deal<P / 2>(half, even, odd);
        deal<P / 2>(half + P / 2, even, odd);
        for (int i = 0; i < P / 2; i++) bytes[2 * i] = half[i], bytes[2 * i + 1] = half[P / 2 + i];
    }
}

// one row of x in whole numbers: bytes (columns up to a multiple of WIDTH, block by block, plane by plane), scale and sum of each run
template <int P>
bool round_row(const Product& p, const Runs& runs, int64_t r, int64_t blocks, int8_t* bytes, float* scale, int32_t* sum) {
    const int64_t m = p.w.m;
    const float* wide = static_cast<const float*>(p.x) + r * m;
    const uint16_t* narrow = static_cast<const uint16_t*>(p.x) + r * m;
    for (int64_t run = 0; run < runs.count; run++) {
        const int64_t from = runs.begin(run), count = runs.end(run) - from;
        constexpr int MOST_PARTS = RUN / 16;
        __m512 part[MOST_PARTS], most = _mm512_setzero_ps();
        __mmask16 wrong = 0;
        for (int i = 0; i * 16 < count; i++) {
            const __mmask16 there = __mmask16(first(count - 16 * i));
            part[i] = p.bf16 ? widen(_mm256_maskz_loadu_epi16(there, narrow + from + 16 * i)) : _mm512_maskz_loadu_ps(there, wide + from + 16 * i);
            wrong |= _mm512_fpclass_ps_mask(part[i], 0x99);
            most = _mm512_max_ps(most, _mm512_abs_ps(part[i]));
        }
        if (wrong) return false;
        float inverse;
        scale[run] = step_of(_mm512_reduce_max_ps(most), inverse);
        const __m512 by = _mm512_set1_ps(inverse);
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i * 16 < count; i++) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(part[i], by));
            total = _mm512_add_epi32(total, whole);
            _mm_mask_storeu_epi8(bytes + from + 16 * i, __mmask16(first(count - 16 * i)), _mm512_cvtepi32_epi8(whole));
        }
        sum[run] = _mm512_reduce_add_epi32(total);
    }
    std::fill(bytes + m, bytes + blocks * 64 * P, int8_t(0));
    if constexpr (P > 1) {
        alignas(64) uint8_t at[64];
        for (int i = 0; i < 64; i++) at[i] = uint8_t(2 * i);
        const __m512i even = _mm512_load_si512(at), odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
        for (int64_t b = 0; b < blocks; b++) {
            __m512i v[P];
            for (int i = 0; i < P; i++) v[i] = _mm512_loadu_si512(bytes + (b * P + i) * 64);
            deal<P>(v, even, odd);
            for (int i = 0; i < P; i++) _mm512_storeu_si512(bytes + (b * P + i) * 64, v[i]);
        }
    }
    return true;
}

// ---- few rows

// x along its columns, rows in bunches as in Prepared: [bunch][block][row][plane][64], scales [bunch][block][row][16], one for each lane
struct Along {
    int64_t blocks, padded;
    int8_t* x;
    float *scale, *sums; // sums: [row][padded], of x over each group
};

template <int BITS, int N, int ROWS, bool SHARED>
inline void some(const Product& p, const Along& q, const Octets<BITS>& octets, const Scales& scales, int64_t row, int64_t r, const float* offset) {
    constexpr int P = Octets<BITS>::P, BYTES = Octets<BITS>::BYTES;
    const Weight& w = p.w;
    const uint8_t *at = w.codes + row * w.stride, *end = at + w.stride;
    const int8_t* x = q.x + r * q.blocks * P * 64;
    const float* of = q.scale + r * q.blocks * 16;
    Running<SHARED, N> scale{scales, w.scales + row * w.groups, w.groups, w.groups};
    __m512 total[N][ROWS], of_row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_setzero_ps();
    for (; at < end; at += BYTES, x += ROWS * P * 64, of += ROWS * 16) {
        scale.next(of_row);
        const __mmask64 there = first(std::min<int64_t>(BYTES, end - at));
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            ask(at + n * w.stride);
            __m512i plane[P];
            octets.apart(octets.raw(at + n * w.stride, there), plane);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int k = 0; k < P; k++) sum = _mm512_dpbusd_epi32(sum, plane[k], _mm512_load_si512(x + (i * P + k) * 64));
                total[n][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(of_row[n], _mm512_load_ps(of + i * 16)), total[n][i]);
            }
        }
    }
    for (int64_t g = 0; g < q.padded; g += 16)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const __m512 away = _mm512_loadu_ps(offset + n * q.padded + g);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) total[n][i] = _mm512_fnmadd_ps(away, _mm512_loadu_ps(q.sums + (r + i) * q.padded + g), total[n][i]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        float found[4];
        if constexpr (N == 4) _mm_storeu_ps(found, sums_of(total[0][i], total[1][i], total[2][i], total[3][i]));
        else
            for (int n = 0; n < N; n++) found[n] = _mm512_reduce_add_ps(total[n][i]);
        const int64_t to = (r + i) * w.n + row;
        for (int n = 0; n < N; n++) put(p, to + n, found[n]);
    }
}

template <int BITS>
bool along(const Product& p) {
    constexpr int P = Octets<BITS>::P;
    const Weight& w = p.w;
    const Runs runs(w);
    const Octets<BITS> octets;
    Along q;
    q.blocks = (w.m + 64 * P - 1) / (64 * P);
    q.padded = (w.groups + 15) / 16 * 16;
    const size_t bytes = size_t(q.blocks) * P * 64, lanes = size_t(q.blocks) * 16, sums = size_t(q.padded), each = size_t(runs.count + 15) / 16 * 16;
    uint8_t* at = whole.of(bytes * size_t(p.rows + 1) + 4 * (size_t(p.rows) * (lanes + sums) + 2 * each));
    q.x = reinterpret_cast<int8_t*>(at);
    int8_t* row = q.x + bytes * size_t(p.rows);
    q.scale = reinterpret_cast<float*>(row + bytes);
    q.sums = q.scale + size_t(p.rows) * lanes;
    float* scale = q.sums + size_t(p.rows) * sums;
    int32_t* sum = reinterpret_cast<int32_t*>(scale + each);
    std::fill(q.sums, scale, 0.0f);
    std::fill(q.scale, q.sums, 0.0f);
    for (int64_t r = 0; r < p.rows; r++) {
        if (!round_row<P>(p, runs, r, q.blocks, row, scale, sum)) return false;
        int64_t begin = r / TOGETHER * TOGETHER, size = bunch(p.rows, begin);
        while (r >= begin + size) begin += size, size = bunch(p.rows, begin);
        // block b of this row is the place-th
        const auto place = [&](int64_t b) { return begin * q.blocks + b * size + r - begin; };
        for (int64_t b = 0; b < q.blocks; b++) std::copy_n(row + b * P * 64, P * 64, q.x + place(b) * P * 64);
        for (int64_t run = 0; run < runs.count; run++) {
            q.sums[size_t(r) * sums + size_t(runs.group_of(run))] += float(sum[run]) * scale[run];
            for (int64_t l = runs.begin(run) / (4 * P), last = (runs.end(run) + 4 * P - 1) / (4 * P); l < last; l++)
                q.scale[place(l / 16) * 16 + l % 16] = scale[run];
        }
    }
    const Scales scales(w, 64 * P);
#pragma omp parallel num_threads(p.threads)
    {
        float* offset = reinterpret_cast<float*>(near.of(size_t(NEAR * q.padded) * 4));
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (w.n + NEAR - 1) / NEAR; block++) {
            const int64_t begin = block * NEAR, end = std::min(w.n, begin + NEAR);
            for (int64_t i = begin; i < end; i++) offsets<BITS>(w, octets.bytes, i, q.padded, offset + (i - begin) * q.padded);
            for (int64_t r = 0, size; r < p.rows; r += size) {
                size = bunch(p.rows, r);
                for (int64_t i = begin, number; i < end; i += number) {
                    number = end - i >= SIDE ? SIDE : 1;
                    const float* away = offset + (i - begin) * q.padded;
                    const auto run = [&](auto rows, auto shared) {
                        if (number == SIDE) some<BITS, SIDE, decltype(rows)::value, decltype(shared)::value>(p, q, octets, scales, i, r, away);
                        else some<BITS, 1, decltype(rows)::value, decltype(shared)::value>(p, q, octets, scales, i, r, away);
                    };
                    const auto by_rows = [&](auto shared) {
                        if (size == TOGETHER) run(std::integral_constant<int, TOGETHER>(), shared);
                        else if (size == 2) run(std::integral_constant<int, 2>(), shared);
                        else run(std::integral_constant<int, 1>(), shared);
                    };
                    if (scales.share) by_rows(std::true_type());
                    else by_rows(std::false_type());
                }
            }
        }
    }
    return true;
}

// ---- many rows

// A step is four columns of x and of a panel: step P * l + k are columns 4 P l + P i + k, i = 0..3. Steps of a run follow each other, and so do those of all
// rows of a tile: x is [chunk][run][tile][step][row of the tile] of four bytes; scale is [run][row] and so is
// away: -(sum of x), times the zero where all groups have the same.
struct Tiled {
    int64_t steps, chunk; // chunk: rows that pass by a panel together
    int32_t* x;
    float* scale;
    int32_t* away;
};

// tiles of nearly one height; the first row of each
inline int64_t tile_at(int64_t rows, int64_t tiles, int64_t tile) { return rows * tile / tiles; }

// _mm512_dpbusd_epi32 in place: with the intrinsic g++ copies sums from register to register, and to the stack, which halves the speed of a tile
inline void add(__m512i& sum, __m512i codes, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x)); }

// Zeros of a run: all the same and in `away`, each output's own as a whole number, or each output's own in fp32 (halves).
enum Zeros { SAME, WHOLE, HALVES };

// sums of one run, T rows by WIDE outputs, added to `out`
template <int T, Zeros ZEROS>
void tile(const uint8_t* panel, const int32_t* x, int64_t steps, const float* scale, const int32_t* zero, const float* of, const int32_t* away, float* out) {
    __m512i sum[T][2];
    if constexpr (ZEROS == WHOLE) {
        const __m512i low = _mm512_load_si512(zero), high = _mm512_load_si512(zero + 16);
#pragma GCC unroll 12
        for (int i = 0; i < T; i++) {
            const __m512i by = _mm512_set1_epi32(away[i]);
            sum[i][0] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, by);
            sum[i][1] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), high, by);
        }
    } else {
#pragma GCC unroll 12
        for (int i = 0; i < T; i++) sum[i][0] = sum[i][1] = _mm512_set1_epi32(ZEROS == SAME ? away[i] : 0);
    }
    for (int64_t s = 0; s < steps; s++, panel += 4 * WIDE, x += T) {
        const __m512i low = _mm512_load_si512(panel), high = _mm512_load_si512(panel + 64);
#pragma GCC unroll 12
        for (int i = 0; i < T; i++) {
            const __m512i by = _mm512_set1_epi32(x[i]);
            add(sum[i][0], low, by);
            add(sum[i][1], high, by);
        }
    }
    const __m512 low = _mm512_load_ps(scale), high = _mm512_load_ps(scale + 16);
#pragma GCC unroll 12
    for (int i = 0; i < T; i++) {
        const __m512 by = _mm512_set1_ps(of[i]);
        float* to = out + i * WIDE;
        __m512 first = _mm512_cvtepi32_ps(sum[i][0]), second = _mm512_cvtepi32_ps(sum[i][1]);
        if constexpr (ZEROS == HALVES) {
            const __m512 sums = _mm512_set1_ps(float(away[i]));
            first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_load_si512(zero)), sums, first);
            second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_load_si512(zero + 16)), sums, second);
        }
        _mm512_store_ps(to, _mm512_fmadd_ps(first, _mm512_mul_ps(low, by), _mm512_load_ps(to)));
        _mm512_store_ps(to + 16, _mm512_fmadd_ps(second, _mm512_mul_ps(high, by), _mm512_load_ps(to + 16)));
    }
}

using Tile = void (*)(const uint8_t*, const int32_t*, int64_t, const float*, const int32_t*, const float*, const int32_t*, float*);
template <Zeros ZEROS>
constexpr Tile TILES[TALL + 1] = {nullptr,        tile<1, ZEROS>, tile<2, ZEROS>, tile<3, ZEROS>,  tile<4, ZEROS>,  tile<5, ZEROS>, tile<6, ZEROS>,
                                  tile<7, ZEROS>, tile<8, ZEROS>, tile<9, ZEROS>, tile<10, ZEROS>, tile<11, ZEROS>, tile<12, ZEROS>};

// codes of WIDE rows of the weight from `row` on, blocks `begin` to `end`, step by step; rows behind the last are zeros
template <int BITS>
void fill(const Weight& w, const Octets<BITS>& octets, int64_t row, int64_t begin, int64_t end, uint8_t* panel) {
    constexpr int P = Octets<BITS>::P, BYTES = Octets<BITS>::BYTES;
    const int64_t number = std::min<int64_t>(WIDE, w.n - row);
    for (int64_t b = begin; b < end; b++, panel += 16 * P * 4 * WIDE) {
        const __mmask64 there = first(std::min<int64_t>(BYTES, int64_t(w.stride) - b * BYTES));
        const uint8_t* at = w.codes + row * w.stride + b * BYTES;
        for (int half = 0; half < 2; half++) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) v[i] = 16 * half + i < number ? octets.raw(at + (16 * half + i) * w.stride, there) : _mm512_setzero_si512();
            transpose(v);
#pragma GCC unroll 16
            for (int l = 0; l < 16; l++) {
                __m512i plane[P];
                octets.apart(v[l], plane);
                for (int k = 0; k < P; k++) _mm512_store_si512(panel + (l * P + k) * 4 * WIDE + half * 64, plane[k]);
            }
        }
    }
}

// scale and zero of each group of WIDE rows from `row` on
template <int BITS>
void grids(const Weight& w, const Octets<BITS>& octets, int64_t row, float* scale, int32_t* zero) {
    const int64_t number = std::min<int64_t>(WIDE, w.n - row);
    for (int64_t i = 0; i < WIDE; i++) {
        alignas(64) uint8_t bytes[64] = {};
        for (int64_t g = 0; g < w.groups; g++) {
            scale[g * WIDE + i] = i < number ? from_bf16(w.scales[(row + i) * w.groups + g]) : 0.0f;
            if (w.half) {
                const float value = i < number ? zero_at(w, row + i, g) : 0.0f;
                std::memcpy(zero + g * WIDE + i, &value, 4);
                continue;
            }
            if (!w.zeros) continue;
            if (g % 64 == 0 && i < number) _mm512_store_si512(bytes, zeros_of<BITS>(w, octets.bytes, row + i, g));
            zero[g * WIDE + i] = bytes[g % 64];
        }
    }
}

// asks for the codes of the next panel, columns begin to end, while this one is computed with
template <int BITS>
inline void ask(const Weight& w, int64_t row, int64_t begin, int64_t end) {
    for (int64_t i = row, last = std::min(w.n, row + WIDE); i < last; i++)
        for (int64_t at = begin * BITS / 8; at < (end * BITS + 7) / 8; at += 64)
            _mm_prefetch(reinterpret_cast<const char*>(w.codes + i * w.stride + at), _MM_HINT_T1);
}

template <int BITS>
bool tiled(const Product& p) {
    constexpr int P = Octets<BITS>::P;
    constexpr int64_t width = 64 * P, most = std::max(width, RUN);
    const Weight& w = p.w;
    const Runs runs(w);
    const Octets<BITS> octets;
    const int64_t blocks = (w.m + width - 1) / width, wide = (w.n + WIDE - 1) / WIDE;
    Tiled q;
    q.steps = (w.m + 4 * P - 1) / (4 * P) * P;
    // fewer rows at a time where there are fewer panels than threads
    q.chunk = std::min(p.rows, LONG);
    while (q.chunk > 2 * TALL && wide * ((p.rows + q.chunk - 1) / q.chunk) < p.threads) q.chunk = (q.chunk + 1) / 2;
    const int64_t chunks = (p.rows + q.chunk - 1) / q.chunk;
    const size_t each = size_t(runs.count * p.rows + 15) / 16 * 16;
    uint8_t* at = whole.of((size_t(q.steps * p.rows + 15) / 16 * 16 + 2 * each) * 4);
    q.scale = reinterpret_cast<float*>(at);
    q.away = reinterpret_cast<int32_t*>(at) + each;
    q.x = q.away + each;
    const auto rows_of = [&](int64_t chunk) { return std::min(q.chunk, p.rows - chunk * q.chunk); };
    bool finite = true;
#pragma omp parallel num_threads(p.threads) reduction(&& : finite)
    {
        const size_t bytes = size_t(blocks) * P * 64;
        int8_t* row = reinterpret_cast<int8_t*>(near.of(bytes + size_t(runs.count) * 8));
        float* scale = reinterpret_cast<float*>(row + bytes);
        int32_t* sum = reinterpret_cast<int32_t*>(scale + runs.count);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.rows; r++) {
            if (!finite || !round_row<P>(p, runs, r, blocks, row, scale, sum)) {
                finite = false;
                continue;
            }
            const int64_t chunk = r / q.chunk, size = rows_of(chunk), tiles = (size + TALL - 1) / TALL, inside = r - chunk * q.chunk;
            int64_t t = inside * tiles / size;
            while (tile_at(size, tiles, t + 1) <= inside) t++;
            const int64_t top = tile_at(size, tiles, t), tall = tile_at(size, tiles, t + 1) - top;
            for (int64_t run = 0; run < runs.count; run++) {
                const int64_t begin = runs.begin(run) / (4 * P), end = (runs.end(run) + 4 * P - 1) / (4 * P);
                int32_t* to = q.x + chunk * q.chunk * q.steps + begin * P * size + (end - begin) * P * top + inside - top;
                for (int64_t l = begin; l < end; l++)
                    for (int k = 0; k < P; k++, to += tall) std::memcpy(to, row + ((l / 16 * P + k) * 16 + l % 16) * 4, 4);
                q.scale[run * p.rows + r] = scale[run];
                q.away[run * p.rows + r] = w.zeros || w.half ? -sum[run] : -sum[run] * (1 << (BITS - 1));
            }
        }
    }
    if (!finite) return false;
#pragma omp parallel num_threads(p.threads)
    {
        const size_t numbers = size_t(w.groups) * WIDE;
        uint8_t* panel = near.of(size_t(most) * WIDE + (2 * numbers + size_t(q.chunk) * WIDE) * 4);
        float* scale = reinterpret_cast<float*>(panel + most * WIDE);
        int32_t* zero = reinterpret_cast<int32_t*>(scale + numbers);
        float* out = scale + 2 * numbers;
        // neighbours together, so that what is asked for is used by who asked
        const int64_t share = std::max<int64_t>(1, wide * chunks / (8 * p.threads));
#pragma omp for schedule(dynamic, share)
        for (int64_t item = 0; item < wide * chunks; item++) {
            const int64_t column = item / chunks * WIDE, chunk = item % chunks, size = rows_of(chunk), tiles = (size + TALL - 1) / TALL;
            grids<BITS>(w, octets, column, scale, zero);
            // a panel is what the blocks of a run hold: one run of several blocks, or several runs of one block
            int64_t filled = 0, first_block = 0;
            std::fill(out, out + size * WIDE, 0.0f);
            for (int64_t run = 0; run < runs.count; run++) {
                const int64_t begin = runs.begin(run) / (4 * P) * P, steps = (runs.end(run) + 4 * P - 1) / (4 * P) * P - begin;
                const int64_t g = runs.group_of(run), place = run * p.rows + chunk * q.chunk;
                const int32_t* x = q.x + chunk * q.chunk * q.steps + begin * size;
                if (runs.begin(run) >= filled * width) {
                    first_block = filled, filled = (runs.end(run) + width - 1) / width;
                    fill<BITS>(w, octets, column, first_block, filled, panel);
                }
                const uint8_t* codes = panel + (begin - first_block * 16 * P) * 4 * WIDE;
                ask<BITS>(w, column + WIDE, runs.begin(run), runs.end(run));
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t top = tile_at(size, tiles, t), tall = tile_at(size, tiles, t + 1) - top;
                    (w.half ? TILES<HALVES> : w.zeros ? TILES<WHOLE> : TILES<SAME>)[tall](codes, x + steps * top, steps, scale + g * WIDE,
                                                                 zero + g * WIDE, q.scale + place + top, q.away + place + top, out + top * WIDE);
                }
            }
            const int64_t number = std::min<int64_t>(WIDE, w.n - column);
            for (int64_t r = 0; r < size; r++)
                for (int64_t i = 0; i < number; i += 16) {
                    const __mmask16 there = __mmask16(first(number - i));
                    const __m512 value = _mm512_load_ps(out + r * WIDE + i);
                    const int64_t to = (chunk * q.chunk + r) * w.n + column + i;
                    if (p.narrow) _mm256_mask_storeu_epi16(p.narrow + to, there, narrowed(value));
                    else _mm512_mask_storeu_ps(p.out + to, there, value);
                }
        }
        near.shrink();
    }
    return true;
}

template <int BITS>
bool product(const Product& p) {
    const bool done = p.rows <= FEW ? along<BITS>(p) : tiled<BITS>(p);
    whole.shrink();
    return done;
}

} // namespace

bool int8_avx512(const Product& p) {
    switch (p.w.bits) {
    case 1: return product<1>(p);
    case 2: return product<2>(p);
    case 3: return product<3>(p);
    case 4: return product<4>(p);
    case 5: return product<5>(p);
    case 6: return product<6>(p);
    case 7: return product<7>(p);
    default: return product<8>(p);
    }
}

} // namespace laconic
