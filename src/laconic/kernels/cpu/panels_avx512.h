// Products over many rows of x: some rows of the weight at a time are made dense, and pass all rows of x in the nearest caches. A panel is WIDE rows of the
// weight, word by word (a number in fp32, or two in bf16) with rows as lanes; a tile is up to TALL rows of x, word by word too, so that sums of one
// times the other stay in registers. Included by files that are compiled with AVX-512 only; nothing here is seen by the linker.
#pragma once
#include "avx512.h"

namespace laconic {

namespace {

constexpr int WIDE = 32, TALL = 12;
// panels that pass a tile of x together, and words of a row that a panel has at most, so that they and the tile stay in the second cache
constexpr int64_t BESIDE = 2, LONG = 1280;
// rows of x at a time, and bytes that these may take
constexpr int64_t STRIP = 2040, FEWEST = 252, STRIP_BYTES = 1 << 24;
// words of a row come in so many at once
constexpr int64_t LANES = 16;

thread_local Room tiles_room, panels_room;

// Rows of x as they lie, `stride` bytes apart and `bytes` long; results (rows, n), in bf16 in `narrow` or in fp32 in `out`. Where x is in bf16, a panel may
// have the columns of a row as `planes` of every so many-th column, 32 of each: words of two columns that lie so far apart.
struct Many {
    const uint8_t* x;
    int64_t stride, bytes, rows, n;
    float* out;
    uint16_t* narrow;
    int threads;
    int planes = 1;
    // of a row, whole blocks of planes
    int64_t words() const {
        const int64_t block = LANES * planes, all = (bytes + 3) / 4;
        return (all + block - 1) / block * block;
    }
};

// how words are multiplied: numbers in fp32, or pairs of bf16
struct Alone {
    static inline __m512 madd(__m512 total, __m512i w, __m512i x) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), total);
    }
};
#if defined(__AVX512BF16__)
struct Paired {
    static inline __m512 madd(__m512 total, __m512i w, __m512i x) { return _mm512_dpbf16_ps(total, (__m512bh)w, (__m512bh)x); }
};
#endif

// up to 16 rows of x word by word; words behind the last are zeros
template <int P>
void lay(const Many& p, int64_t row, int64_t rows, int32_t* to) {
    const __mmask16 there = __mmask16(first(rows));
    const Deal deal;
    const int64_t words = p.words();
    for (int64_t k = 0; k < words; k += LANES * P) {
        __m512i v[P][16];
        for (int64_t i = 0; i < 16; i++) {
            __m512i part[P];
            for (int64_t q = 0; q < P; q++) {
                const int64_t at = 4 * (k + q * LANES);
                part[q] = i < rows ? _mm512_maskz_loadu_epi8(first(std::max<int64_t>(0, p.bytes - at)), p.x + (row + i) * p.stride + at)
                                   : _mm512_setzero_si512();
            }
            deal.planes<P>(part);
            for (int64_t q = 0; q < P; q++) v[q][i] = part[q];
        }
        for (int64_t q = 0; q < P; q++) {
            transpose(v[q]);
            for (int64_t l = 0; l < LANES; l++) _mm512_mask_storeu_epi32(to + (k + q * LANES + l) * rows, there, v[q][l]);
        }
    }
}

// Where sums begin and end: `sums` have those of the words before, of all panels of a row beside each other, unless these are the first; without
// `last` they take them, else the results do, of `number` rows of the weight.
struct Place {
    float* sums;
    int64_t wide;
    bool begin, last;
    float* out;
    uint16_t* narrow;
    int64_t stride, number;
};

// ROWS rows of x times a panel
template <class K, int ROWS>
void tile(const int32_t* panel, const int32_t* x, int64_t words, const Place& place) {
    __m512 total[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            total[i][half] = place.begin ? _mm512_setzero_ps() : _mm512_loadu_ps(place.sums + i * place.wide + 16 * half);
    for (int64_t k = 0; k < words; k++, panel += WIDE, x += ROWS) {
        const __m512i low = _mm512_load_si512(panel), high = _mm512_load_si512(panel + 16);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const __m512i given = _mm512_set1_epi32(x[i]);
            total[i][0] = K::madd(total[i][0], low, given), total[i][1] = K::madd(total[i][1], high, given);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __mmask16 there = __mmask16(first(std::max<int64_t>(0, place.number - 16 * half)));
            const int64_t to = i * place.stride + 16 * half;
            if (!place.last) _mm512_storeu_ps(place.sums + i * place.wide + 16 * half, total[i][half]);
            else if (place.narrow) _mm256_mask_storeu_epi16(place.narrow + to, there, narrowed(total[i][half]));
            else _mm512_mask_storeu_ps(place.out + to, there, total[i][half]);
        }
}

using Tile = void (*)(const int32_t*, const int32_t*, int64_t, const Place&);
template <class K>
constexpr Tile TILES[TALL + 1] = {nullptr,    tile<K, 1>, tile<K, 2>, tile<K, 3>, tile<K, 4>,  tile<K, 5>, tile<K, 6>,
                                  tile<K, 7>, tile<K, 8>, tile<K, 9>, tile<K, 10>, tile<K, 11>, tile<K, 12>};

// Which panel is made: `number` rows of the weight from `row` on, rows behind them zeros, `words` of each from the one numbered `from` on; and the row and
// the word that the next one begins with, so that what it is made of can be asked for.
struct Part {
    int64_t row, number, from, words, next_row, next_from;
};

// All of a product. fill(part, panel) makes a panel; words behind a row's last are zeros. A row comes in parts of at most `longest` words, each from a
// multiple of `step` on.
template <class K, class Fill>
void over_panels(const Many& p, int64_t longest, int64_t step, const Fill& fill) {
    const int64_t words = p.words(), parts = (words + longest - 1) / longest;
    const int64_t each = parts == 1 ? words : ((words + parts - 1) / parts + step - 1) / step * step;
    // so that every thread has something to do, and panels of rows that do not come in parts stay near
    const int64_t beside = p.n < 4 * BESIDE * WIDE * p.threads || each > LONG ? 1 : BESIDE, wide = beside * WIDE;
    const int64_t strip = std::min(p.rows, std::clamp(STRIP_BYTES / (4 * words + 1), FEWEST, STRIP));
    int32_t* x = reinterpret_cast<int32_t*>(tiles_room.of(size_t(strip * words) * 4));
    for (int64_t start = 0; start < p.rows; start += strip) {
        const int64_t rows = std::min(strip, p.rows - start), tiles = (rows + TALL - 1) / TALL;
#pragma omp parallel num_threads(p.threads)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t r = rows * t / tiles, count = rows * (t + 1) / tiles - r;
                switch (p.planes) {
                case 1: lay<1>(p, start + r, count, x + r * words); break;
                case 2: lay<2>(p, start + r, count, x + r * words); break;
                case 4: lay<4>(p, start + r, count, x + r * words); break;
                default: lay<8>(p, start + r, count, x + r * words);
                }
            }
            const size_t size = size_t(each * wide) * 4;
            uint8_t* at = panels_room.of(size + (parts > 1 ? size_t(rows * wide) * 4 : 0));
            int32_t* panels = reinterpret_cast<int32_t*>(at);
            float* sums = reinterpret_cast<float*>(at + size);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < (p.n + wide - 1) / wide; block++)
                for (int64_t from = 0; from < words; from += each) {
                    const int64_t count = std::min(each, words - from), row = block * wide, there = std::min(beside, (p.n - row + WIDE - 1) / WIDE);
                    for (int64_t s = 0; s < there; s++) {
                        const bool same = s + 1 < there, on = from + count < words;
                        fill(Part{row + s * WIDE, std::min<int64_t>(WIDE, p.n - row - s * WIDE), from, count,
                                  same ? row + (s + 1) * WIDE : on ? row : row + wide, same ? from : on ? from + count : 0},
                             panels + s * WIDE * each);
                    }
                    for (int64_t t = 0; t < tiles; t++) {
                        const int64_t r = rows * t / tiles, tall = rows * (t + 1) / tiles - r;
                        for (int64_t s = 0; s < there; s++) {
                            const int64_t to = (start + r) * p.n + row + s * WIDE;
                            const Place place{sums + r * wide + s * WIDE, wide, from == 0, from + count == words, p.out ? p.out + to : nullptr,
                                              p.narrow ? p.narrow + to : nullptr, p.n, std::min<int64_t>(WIDE, p.n - row - s * WIDE)};
                            TILES<K>[tall](panels + s * WIDE * each, x + r * words + from * tall, count, place);
                        }
                    }
                }
            panels_room.shrink();
        }
    }
    tiles_room.shrink();
}

// columns of a row that are made dense at once, whole blocks of planes
constexpr int64_t SPAN = 256;

// What over_panels wants, of a source that knows its rows: source.row(span, row, from, count, out) gives `count` numbers in bf16, of at most SPAN columns
// from a multiple of SPAN on, as planes, and finite ones up to the end of their block; `span` is source.span(from), the same for all rows;
// source.ask(row, from, count) asks for what such a call will read.
template <class Source>
void fill_rows(const Source& source, int64_t m, const Part& part, int32_t* panel) {
    // rows lie a little apart, since all of one bank of the nearest cache would take each other's place
    alignas(64) uint16_t rows[16][SPAN + 32];
    for (int64_t half = 0; half < 2; half++) {
        const int64_t here = std::clamp<int64_t>(part.number - 16 * half, 0, 16);
        for (int64_t i = here; i < 16; i++) std::fill_n(rows[i], SPAN, uint16_t(0));
        for (int64_t k = 0; k < part.words; k += SPAN / 2) {
            const int64_t column = 2 * (part.from + k), count = std::min(SPAN, m - column);
            const auto span = source.span(column);
            for (int64_t i = 0; i < here; i++) {
                source.ask(part.next_row + 16 * half + i, 2 * (part.next_from + k), count);
                source.row(span, part.row + 16 * half + i, column, count, rows[i]);
            }
            for (int64_t b = 0; b < std::min(SPAN / 2, part.words - k); b += LANES) {
                __m512i v[16];
#pragma GCC unroll 16
                for (int64_t i = 0; i < 16; i++) v[i] = _mm512_load_si512(rows[i] + 2 * b);
                transpose(v);
#pragma GCC unroll 16
                for (int64_t l = 0; l < LANES; l++) _mm512_store_si512(panel + (k + b + l) * WIDE + 16 * half, v[l]);
            }
        }
    }
}

} // namespace

} // namespace laconic
