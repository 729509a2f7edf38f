// What every processor can: the weights of a row are put in their places in a small buffer, then a product.
#include <algorithm>
#include <vector>

#include "sparse.h"
#include "dot.h"

namespace laconic {

namespace {

// the weights of a row that are there, as numbers
void kept(const Sparse& w, int64_t row, float* out) {
    const int64_t from = w.starts[row], count = w.count(row);
    if (!count) return;
    if (!w.values) {
        const bool own = w.codes.n == w.n;
        // spans begin at whole bytes
        const int64_t begin = own ? 0 : from, odd = begin % 8;
        span_plain(w.codes, own ? row : 0, begin - odd, begin + count, out);
        if (odd) std::move(out + odd, out + odd + count, out);
    } else if (w.type == Type::fp32) {
        std::copy_n(static_cast<const float*>(w.values) + from, count, out);
    } else {
        const uint16_t* values = static_cast<const uint16_t*>(w.values) + from;
        if (w.type == Type::bf16)
            for (int64_t i = 0; i < count; i++) out[i] = from_bf16(values[i]);
        else
            for (int64_t i = 0; i < count; i++) out[i] = from_fp16(values[i]);
    }
}

// a row in its places; a mask that knows more weights than there are gets zeros for them
void place(const Sparse& w, int64_t row, float* room, float* out) {
    kept(w, row, room);
    const uint8_t* mask = w.mask + row * w.stride;
    const float *at = room, *end = room + w.count(row);
    std::fill(out, out + w.m, 0.0f);
    for (int64_t block = 0; block * 32 < w.m; block++) {
        const int64_t left = w.m - block * 32;
        for (uint32_t bits = left < 32 ? last_bits(mask, block, left) : bits_at(mask, block); bits && at < end; bits &= bits - 1)
            out[block * 32 + __builtin_ctz(bits)] = *at++;
    }
}

// pixels that are summed together, from a copy of them that the nearest caches hold
constexpr int64_t STRIP = 64;

// out: STRIP sums over `count` weights of one output, each times the strip of its channel
LACONIC_CLONES void summed(const float* values, const int32_t* channels, int64_t count, const float* strips, float* out) {
    std::fill(out, out + STRIP, 0.0f);
    for (int64_t i = 0; i < count; i++) {
        const float value = values[i], *at = strips + channels[i] * STRIP;
#pragma omp simd
        for (int64_t k = 0; k < STRIP; k++) out[k] += value * at[k];
    }
}

// room for a row's weights, which may begin up to 7 behind where they are decoded
size_t room_of(const Sparse& w) { return size_t(w.m) + 8; }

} // namespace

void starts_plain(const uint8_t* mask, size_t stride, int64_t n, int64_t m, int64_t* starts) {
    starts[0] = 0;
    for (int64_t i = 0; i < n; i++, mask += stride) {
        int64_t count = 0;
        for (int64_t block = 0; block < m / 32; block++) count += __builtin_popcount(bits_at(mask, block));
        if (m % 32) count += __builtin_popcount(last_bits(mask, m / 32, m % 32));
        starts[i + 1] = starts[i] + count;
    }
}

void sparse_plain(const SparseProduct& p) {
    const Sparse& w = p.w;
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
        std::vector<float> room(room_of(w)), row(size_t(w.m) + 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < w.n; i++) {
            place(w, i, room.data(), row.data());
            for (int64_t r = 0; r < p.rows; r++) put(p, r * w.n + i, dot(row.data(), x + r * w.m, w.m));
        }
    }
}

void sparse_rows_plain(const SparseRows& p) {
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> room(room_of(p.w));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.count; i++) place(p.w, p.row(i), room.data(), p.out + i * p.w.m);
    }
}

void sparse_pixels(const SparsePixels& p) {
    const Sparse& w = p.w;
    // the channel of each weight, and the weights as numbers: little beside so many pixels
    std::vector<float> values(size_t(w.total()) + 16);
    std::vector<int32_t> channels(size_t(w.total()) + 1);
    for (int64_t i = 0; i < w.n; i++) {
        // a few numbers behind them may be written to, which the next row's take the place of
        kept(w, i, values.data() + w.starts[i]);
        int32_t* at = channels.data() + w.starts[i];
        const uint8_t* mask = w.mask + i * int64_t(w.stride);
        for (int64_t block = 0; block * 32 < w.m; block++) {
            const int64_t left = w.m - block * 32;
            for (uint32_t bits = left < 32 ? last_bits(mask, block, left) : bits_at(mask, block); bits; bits &= bits - 1)
                *at++ = int32_t(block * 32 + __builtin_ctz(bits));
        }
    }
    const int64_t strips = (p.pixels + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(p.threads)
    {
        Room own;
        float* x = reinterpret_cast<float*>(own.of(size_t(w.m * STRIP + STRIP) * 4));
        float* sums = x + w.m * STRIP;
#pragma omp for schedule(static)
        for (int64_t job = 0; job < p.images * strips; job++) {
            const int64_t image = job / strips, first = job % strips * STRIP, wide = std::min(STRIP, p.pixels - first);
            for (int64_t c = 0; c < w.m; c++) {
                const float* from = p.x + (image * w.m + c) * p.pixels + first;
                std::fill(std::copy(from, from + wide, x + c * STRIP), x + (c + 1) * STRIP, 0.0f);
            }
            for (int64_t i = 0; i < w.n; i++) {
                summed(values.data() + w.starts[i], channels.data() + w.starts[i], w.count(i), x, sums);
                std::copy(sums, sums + wide, p.out + (image * w.n + i) * p.pixels + first);
            }
        }
    }
}

} // namespace laconic
