// What every processor can: a row of codes becomes numbers in a small buffer, then a product. Also what the vector kernels are tested against.
#include <algorithm>
#include <vector>

#include "linear.h"

namespace laconic {

namespace {

// codes of a row as numbers: eight codes are `bits` whole bytes
LACONIC_CLONES void numbers(const uint8_t* codes, int64_t m, int bits, float* out) {
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    int64_t j = 0;
    for (; j + 8 <= m; j += 8, codes += bits) {
        uint64_t word = 0;
        for (int k = 0; k < bits; k++) word |= uint64_t(codes[k]) << (8 * k);
        for (int k = 0; k < 8; k++) out[j + k] = float(int32_t((word >> (k * bits)) & mask));
    }
    for (int64_t k = 0; j + k < m; k++) out[j + k] = float(code_at(codes, k, bits));
}

LACONIC_CLONES void place(float* out, int64_t count, float zero, float scale) {
    for (int64_t j = 0; j < count; j++) out[j] = (out[j] - zero) * scale;
}

void decode_row(const Weight& w, int64_t row, float* out) {
    numbers(w.codes + row * w.stride, w.m, w.bits, out);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t begin = g * w.group;
        place(out + begin, std::min(w.group, w.m - begin), zero_at(w, row, g), from_bf16(w.scales[row * w.groups + g]));
    }
}

LACONIC_CLONES float dot(const float* a, const float* b, int64_t count) {
    float lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int k = 0; k < 16; k++) lanes[k] += a[i + k] * b[i + k];
    float total = 0.0f;
    for (; i < count; i++) total += a[i] * b[i];
    for (int k = 0; k < 16; k++) total += lanes[k];
    return total;
}

} // namespace

void dense_plain(const Weight& w, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < w.n; i++) decode_row(w, i, out + i * w.m);
}

void product_plain(const Product& p) {
    const Weight& w = p.w;
    std::vector<float> wide;
    const float* x = static_cast<const float*>(p.x);
    if (p.bf16) {
        const uint16_t* given = static_cast<const uint16_t*>(p.x);
        wide.resize(size_t(p.rows * w.m));
        for (size_t i = 0; i < wide.size(); i++) wide[i] = from_bf16(given[i]);
        x = wide.data();
    }
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> row(size_t(w.m) + 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < w.n; i++) {
            decode_row(w, i, row.data());
            for (int64_t r = 0; r < p.rows; r++) p.out[r * w.n + i] = dot(row.data(), x + r * w.m, w.m);
        }
    }
}

} // namespace laconic
