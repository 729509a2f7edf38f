// What every processor can: a row of codes becomes numbers in a small buffer, then a product.
#include "lookup.h"
#include "dot.h"

#include <algorithm>
#include <vector>

namespace laconic {

namespace {

// the values of a row's codes: eight codes are `bits` whole bytes
LACONIC_CLONES void numbers(const uint8_t* codes, int64_t m, int bits, const float* table, float* out) {
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    int64_t j = 0;
    for (; j + 8 <= m; j += 8, codes += bits) {
        uint64_t word = 0;
        for (int k = 0; k < bits; k++) word |= uint64_t(codes[k]) << (8 * k);
        for (int k = 0; k < 8; k++) out[j + k] = table[(word >> (k * bits)) & mask];
    }
    for (int64_t k = 0; j + k < m; k++) out[j + k] = table[code_at(codes, k, bits)];
}

LACONIC_CLONES void times(float* out, int64_t count, float scale) {
    for (int64_t j = 0; j < count; j++) out[j] *= scale;
}

struct Table {
    float values[256];
    explicit Table(const Leveled& w) {
        for (int i = 0; i < 1 << w.bits; i++) values[i] = from_bf16(w.table[i]);
    }
};

void decode_row(const Leveled& w, const Table& table, int64_t row, float* out) {
    numbers(w.codes + row * w.stride, w.m, w.bits, table.values, out);
    for (int64_t g = 0; g < w.groups; g++) times(out + g * w.group, std::min(w.group, w.m - g * w.group), scale_at(w, row, g));
}

} // namespace

void lookup_dense_plain(const Leveled& w, float* out, int threads) {
    const Table table(w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < w.n; i++) decode_row(w, table, i, out + i * w.m);
}

void lookup_plain(const Looked& p) {
    const Leveled& w = p.w;
    const Table table(w);
    std::vector<float> wide;
    const float* x = static_cast<const float*>(p.x);
    if (p.bf16) {
        wide.resize(size_t(p.rows * w.m));
        for (size_t i = 0; i < wide.size(); i++) wide[i] = from_bf16(static_cast<const uint16_t*>(p.x)[i]);
        x = wide.data();
    }
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> row(size_t(w.m) + 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < w.n; i++) {
            decode_row(w, table, i, row.data());
            for (int64_t r = 0; r < p.rows; r++) put(p, r * w.n + i, dot(row.data(), x + r * w.m, w.m));
        }
    }
}

} // namespace laconic
