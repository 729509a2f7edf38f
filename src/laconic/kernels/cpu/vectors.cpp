// What every processor can: of each run of rows the indices are read once, then each column adds x times its entry to the sums of the run.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace laconic {

namespace {

// rows of x that share a reading of the entries
constexpr int64_t BUNCH = 4;

struct Sums {
    const int32_t* index[2];
    const uint16_t* table[2];
    int64_t width, m;
    const float* x; // ROWS rows, m apart
    float* out;     // ROWS times `width` sums
};

// W: numbers of an entry, from `first` on; apart: chains of sums that do not wait for each other
template <int W, int ROWS, bool TWO>
inline __attribute__((always_inline)) void added(const Sums& s, int64_t first) {
    constexpr int APART = ROWS == 1 ? 4 : 1;
    float total[APART][ROWS][W] = {};
    const auto step = [&](int64_t j, int chain) __attribute__((always_inline)) {
        const uint16_t* entry = s.table[0] + int64_t(s.index[0][j]) * s.width + first;
        float value[W];
        for (int i = 0; i < W; i++) value[i] = from_bf16(entry[i]);
        if (TWO) {
            const uint16_t* finer = s.table[1] + int64_t(s.index[1][j]) * s.width + first;
            for (int i = 0; i < W; i++) value[i] += from_bf16(finer[i]);
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < W; i++) total[chain][r][i] += s.x[r * s.m + j] * value[i];
    };
    int64_t j = 0;
    for (; j + APART <= s.m; j += APART)
        for (int chain = 0; chain < APART; chain++) step(j + chain, chain);
    for (; j < s.m; j++) step(j, 0);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < W; i++) {
            float sum = 0.0f;
            for (int chain = 0; chain < APART; chain++) sum += total[chain][r][i];
            s.out[r * s.width + first + i] = sum;
        }
}

template <int ROWS, bool TWO>
inline __attribute__((always_inline)) void by_width(const Sums& s) {
    int64_t first = 0;
    for (; first + 8 <= s.width; first += 8) added<8, ROWS, TWO>(s, first);
    for (; first + 4 <= s.width; first += 4) added<4, ROWS, TWO>(s, first);
    for (; first + 2 <= s.width; first += 2) added<2, ROWS, TWO>(s, first);
    for (; first < s.width; first++) added<1, ROWS, TWO>(s, first);
}

LACONIC_CLONES void one_row(const Sums& s, bool two) {
    if (two) by_width<1, true>(s);
    else by_width<1, false>(s);
}

LACONIC_CLONES void four_rows(const Sums& s, bool two) {
    if (two) by_width<BUNCH, true>(s);
    else by_width<BUNCH, false>(s);
}

// indices of `bits` bits; four bytes may be read from where the last begins
LACONIC_CLONES void unpacked(const uint8_t* codes, int bits, int64_t m, int32_t* out) {
    if (bits == 8) {
        for (int64_t j = 0; j < m; j++) out[j] = codes[j];
        return;
    }
    const uint32_t mask = (uint32_t(1) << bits) - 1;
    for (int64_t j = 0; j < m; j++) {
        const int64_t at = j * bits;
        uint32_t word;
        std::memcpy(&word, codes + (at >> 3), 4);
        out[j] = int32_t(word >> (at & 7) & mask);
    }
}

} // namespace

void indices_of(const Book& book, int64_t run, int64_t m, int32_t* out) {
    const uint8_t* codes = book.codes + run * book.stride;
    // the last few one by one, so that nothing is read behind the row
    const int64_t most = book.stride < 4 ? 0 : std::min(m, int64_t(book.stride - 4) * 8 / book.bits);
    const int64_t whole = book.bits == 8 ? m : most;
    unpacked(codes, book.bits, whole, out);
    for (int64_t j = whole; j < m; j++) {
        uint32_t word = 0;
        const int64_t at = j * book.bits, from = at >> 3, bytes = ((at & 7) + book.bits + 7) >> 3;
        for (int64_t k = 0; k < bytes; k++) word |= uint32_t(codes[from + k]) << (8 * k);
        out[j] = int32_t(word >> (at & 7) & ((uint32_t(1) << book.bits) - 1));
    }
}

void vectors_plain(const VectorProduct& p) {
    const Vectored& w = p.w;
    std::vector<float> widened;
    const float* x = static_cast<const float*>(p.x);
    if (p.bf16) {
        widened.resize(size_t(p.rows * w.m));
        for (size_t i = 0; i < widened.size(); i++) widened[i] = from_bf16(static_cast<const uint16_t*>(p.x)[i]);
        x = widened.data();
    }
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<int32_t> index(size_t(2 * w.m));
        std::vector<float> sums(size_t(BUNCH * w.width));
#pragma omp for schedule(static)
        for (int64_t run = 0; run < w.runs(); run++) {
            Sums s{{index.data(), index.data() + w.m}, {w.books[0].table, w.books[1].table}, w.width, w.m, x, sums.data()};
            for (int b = 0; b < w.count; b++) indices_of(w.books[b], run, w.m, index.data() + b * w.m);
            for (int64_t r = 0, some; r < p.rows; r += some, s.x += some * w.m) {
                some = p.rows - r >= BUNCH ? BUNCH : 1;
                if (some == BUNCH) four_rows(s, w.count == 2);
                else one_row(s, w.count == 2);
                put_run(p, run, r, some, sums.data());
            }
        }
    }
}

void vectors_dense_plain(const Vectored& w, float* out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> index(size_t(2 * w.m));
#pragma omp for schedule(static)
        for (int64_t run = 0; run < w.runs(); run++) {
            for (int b = 0; b < w.count; b++) indices_of(w.books[b], run, w.m, index.data() + b * w.m);
            const int64_t begin = run * w.width, number = std::min(w.width, w.n - begin);
            float* rows = out + begin * w.m;
            for (int64_t j = 0; j < w.m; j++) {
                const uint16_t* entry = w.books[0].table + int64_t(index[size_t(j)]) * w.width;
                const uint16_t* finer = w.count == 2 ? w.books[1].table + int64_t(index[size_t(w.m + j)]) * w.width : nullptr;
                for (int64_t k = 0; k < number; k++) {
                    const float value = finer ? from_bf16(entry[k]) + from_bf16(finer[k]) : from_bf16(entry[k]);
                    rows[k * w.m + j] = w.scales ? value * from_bf16(w.scales[begin + k]) : value;
                }
            }
        }
    }
}

} // namespace laconic
