// What every processor can: a row of codes becomes numbers in a small buffer, then a product. Also what the vector kernels are tested against.
#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"
#include "dot.h"

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

// one run of x -> its scale and the sum of its whole numbers; a scale of NaN where x is not finite
LACONIC_CLONES float round_run(const float* x, int64_t count, int8_t* out, int32_t& sum) {
    float lanes[16] = {}, odd = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        lanes[i & 15] = std::max(lanes[i & 15], std::fabs(x[i]));
        odd += x[i] * 0.0f;
    }
    if (!(odd == 0.0f)) return NAN;
    float inverse;
    const float scale = step_of(*std::max_element(lanes, lanes + 16), inverse);
    sum = 0;
    for (int64_t i = 0; i < count; i++) {
        const int32_t whole = int32_t(std::nearbyint(x[i] * inverse));
        out[i] = int8_t(whole);
        sum += whole;
    }
    return scale;
}

// codes of a row less the zeros of their groups, run by run as x is laid out
void centred(const Weight& w, const Rounded& q, int64_t row, float* wide, int16_t* out) {
    numbers(w.codes + row * w.stride, w.m, w.bits, wide);
    for (int64_t run = 0; run < q.runs.count; run++) {
        const int64_t from = q.runs.begin(run), count = q.runs.end(run) - from;
        const float zero = zero_at(w, row, q.runs.group_of(run));
        // halves are doubled
        for (int64_t i = 0; i < count; i++) out[q.at[size_t(run)] + i] = int16_t((wide[from + i] - zero) / w.unit());
    }
}

LACONIC_CLONES int32_t dot(const int16_t* codes, const int8_t* x, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += int32_t(codes[i]) * x[i];
    return sum;
}

} // namespace

void span_plain(const Weight& w, int64_t row, int64_t from, int64_t to, float* out) {
    numbers(w.codes + row * w.stride + from / 8 * w.bits, to - from, w.bits, out);
    for (int64_t at = from; at < to;) {
        const int64_t g = at / w.group, end = std::min(to, (g + 1) * w.group);
        place(out + (at - from), end - at, zero_at(w, row, g), from_bf16(w.scales[row * w.groups + g]));
        at = end;
    }
}

Rounded::Rounded(const Product& p) : runs(p.w), wide(0) {
    for (int64_t run = 0; run < runs.count; run++) {
        at.push_back(wide);
        wide += (runs.end(run) - runs.begin(run) + 31) / 32 * 32;
    }
    at.push_back(wide);
    x.assign(size_t(p.rows * wide), 0);
    scale.resize(size_t(p.rows * runs.count));
    sum.resize(scale.size());
}

bool Rounded::fill(const Product& p) {
    const int64_t m = p.w.m;
    bool finite = true;
#pragma omp parallel for num_threads(p.threads) reduction(&& : finite) schedule(static) if (p.rows > 1)
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t run = 0; run < runs.count && finite; run++) {
            const int64_t from = runs.begin(run), count = runs.end(run) - from, place = r * runs.count + run;
            float part[RUN];
            if (p.bf16)
                for (int64_t i = 0; i < count; i++) part[i] = from_bf16(static_cast<const uint16_t*>(p.x)[r * m + from + i]);
            else std::copy_n(static_cast<const float*>(p.x) + r * m + from, count, part);
            scale[size_t(place)] = round_run(part, count, x.data() + r * wide + at[size_t(run)], sum[size_t(place)]);
            finite = !std::isnan(scale[size_t(place)]);
        }
    return finite;
}

bool int8_plain(const Product& p) {
    const Weight& w = p.w;
    Rounded q(p);
    if (!q.fill(p)) return false;
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> wide(size_t(w.m) + 1);
        std::vector<int16_t> codes(size_t(q.wide), 0);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < w.n; n++) {
            centred(w, q, n, wide.data(), codes.data());
            for (int64_t r = 0; r < p.rows; r++) {
                float total = 0.0f;
                for (int64_t run = 0; run < q.runs.count; run++) {
                    const int64_t at = q.at[size_t(run)], count = q.at[size_t(run) + 1] - at;
                    const float step = from_bf16(w.scales[n * w.groups + q.runs.group_of(run)]) * w.unit();
                    const float scale = step * q.scale[size_t(r * q.runs.count + run)];
                    total += float(dot(codes.data() + at, q.x.data() + r * q.wide + at, count)) * scale;
                }
                put(p, r * w.n + n, total);
            }
        }
    }
    return true;
}

void dense_plain(const Weight& w, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < w.n; i++) span_plain(w, i, 0, w.m, out + i * w.m);
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
            span_plain(w, i, 0, w.m, row.data());
            for (int64_t r = 0; r < p.rows; r++) put(p, r * w.n + i, dot(row.data(), x + r * w.m, w.m));
        }
    }
}

} // namespace laconic
