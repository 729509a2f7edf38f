// The steps of a tape, for any processor; products and attention are those of the other files.
#include "tape.h"

#include <algorithm>
#include <cmath>

#include "dot.h"
#include "skip.h"

namespace laconic {

namespace {

// products of fewer multiplications than this are done before a second thread has begun
constexpr int64_t SMALL = 1 << 17;

// e^x to the last bit but one, as a vector can have it (Cephes' polynomial); below -87 as there, infinite above 88
inline float exp_of(float x) {
    const float y = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
    const float shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t whole;
    std::memcpy(&whole, &shifted, 4);
    whole = (whole - 0x4B400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &whole, 4);
    return p * power;
}

LACONIC_CLONES void norm(const float* x, float* out, const float* times, int64_t width, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
    const float by = 1.0f / std::sqrt(sum / float(width) + eps);
    for (int64_t i = 0; i < width; i++) out[i] = times[i] * (x[i] * by);
}

// x * sigmoid(x) * y
LACONIC_CLONES void gate(const float* x, const float* y, float* out, int64_t width) {
    for (int64_t i = 0; i < width; i++) out[i] = x[i] / (1.0f + exp_of(-x[i])) * y[i];
}

// what is not below its threshold: of x, or of x * sigmoid(x)
LACONIC_CLONES void loud(const float* x, const float* least, bool each, bool silu, float* out, int64_t width) {
    for (int64_t i = 0; i < width; i++) {
        const float value = silu ? x[i] / (1.0f + exp_of(-x[i])) : x[i];
        out[i] = std::fabs(value) < least[each ? i : 0] ? 0.0f : value;
    }
}

LACONIC_CLONES void sum(const float* x, float* out, int64_t width) {
    for (int64_t i = 0; i < width; i++) out[i] += x[i];
}

LACONIC_CLONES void rounded(const float* x, uint16_t* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = to_bf16(x[i]);
}

// as numbers of 16 bits hold it
LACONIC_CLONES void coarsened(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(to_bf16(x[i]));
}

// halves of a head turned against each other
LACONIC_CLONES void turned(float* x, const float* cosine, const float* sine, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

} // namespace

void Tape::hold(const std::vector<uintptr_t>& places) {
    buffers.clear();
    for (uintptr_t place : places) buffers.push_back(reinterpret_cast<float*>(place));
}

void Tape::turn(uintptr_t cosine, uintptr_t sine) {
    cosines = reinterpret_cast<const float*>(cosine);
    sines = reinterpret_cast<const float*>(sine);
}

void Tape::page(int64_t layer, const std::vector<uintptr_t>& k, const std::vector<uintptr_t>& v) {
    const auto pages = [](const std::vector<uintptr_t>& places) {
        std::vector<Page> found;
        for (uintptr_t place : places) found.push_back({reinterpret_cast<const uint8_t*>(place), nullptr, nullptr, PAGE});
        return found;
    };
    keys[size_t(layer)] = pages(k);
    values[size_t(layer)] = pages(v);
}

bool Tape::linear(const Step& s, int64_t rows, int threads) {
    const float* x = buffers[size_t(s.from)];
    float* out = buffers[size_t(s.to)];
    const int64_t work = s.w.n * s.w.m * rows;
    Product p{s.w, x, false, rows, out, work < SMALL ? 1 : threads};
    if (s.int8) {
        if (!multiply_int8(p, level)) return false;
    } else {
        if (bf16) {
            narrow.resize(size_t(rows * s.w.m));
            rounded(x, narrow.data(), rows * s.w.m);
            p.x = narrow.data();
            p.bf16 = true;
        }
        if (!multiply(p, level)) return false;
    }
    if (s.values)
        for (int64_t r = 0; r < rows; r++) sum(s.values, out + r * s.w.n, s.w.n);
    return true;
}

void Tape::dense(const Step& s, int64_t rows, int threads) {
    const int64_t n = s.heads, m = s.width;
    const float* x = buffers[size_t(s.from)];
    float* out = buffers[size_t(s.to)];
    if (bf16) {
        coarse.resize(size_t(rows * m));
        coarsened(x, coarse.data(), rows * m);
        x = coarse.data();
    }
    const int many = n * m * rows < SMALL ? 1 : threads;
#pragma omp parallel for num_threads(many) schedule(static) if (many > 1)
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < rows; r++) {
            const float found = s.narrow ? dot(x + r * m, static_cast<const uint16_t*>(s.matrix) + i * m, m)
                                         : dot(x + r * m, static_cast<const float*>(s.matrix) + i * m, m);
            out[r * n + i] = found + (s.values ? s.values[i] : 0.0f);
        }
}

void Tape::skip(const Step& s, int64_t rows, int threads) {
    const bool gates = s.by >= 0;
    found.resize(size_t(rows * s.width));
    for (int64_t r = 0; r < rows; r++) loud(buffers[size_t(s.from)] + r * s.width, s.values, s.groups > 1, gates, found.data() + r * s.width, s.width);
    if (bf16) coarsened(found.data(), found.data(), rows * s.width);
    const float* x = gates ? buffers[size_t(s.by)] : nullptr;
    if (gates && bf16) {
        coarse.resize(size_t(rows * s.inner));
        coarsened(x, coarse.data(), rows * s.inner);
        x = coarse.data();
    }
    laconic::skip({found.data(), x, s.second, nullptr, s.matrix, s.narrow, rows, s.inner, s.width, s.heads, buffers[size_t(s.to)], threads});
}

void Tape::append(const Step& s, int64_t b, int64_t t, int64_t past) {
    for (const auto& [buffer, pages] : {std::pair{s.from, &keys[size_t(s.layer)]}, std::pair{s.to, &values[size_t(s.layer)]}}) {
        const float* x = buffers[size_t(buffer)];
        for (int64_t row = 0; row < b; row++)
            for (int64_t j = 0; j < t; j++)
                for (int64_t head = 0; head < s.heads; head++, x += s.width) {
                    const int64_t at = past + j;
                    uint8_t* page = const_cast<uint8_t*>((*pages)[size_t(at / PAGE)].data);
                    const int64_t place = ((row * s.heads + head) * PAGE + at % PAGE) * s.width;
                    if (bf16) rounded(x, reinterpret_cast<uint16_t*>(page) + place, s.width);
                    else std::copy(x, x + s.width, reinterpret_cast<float*>(page) + place);
                }
    }
}

void Tape::attend(const Step& s, int64_t b, int64_t t, int64_t past, int threads) {
    const int64_t length = past + t, d = s.width, h = s.heads, k = s.groups, tile = 128, pairs = b * k, tiles = (length + tile - 1) / tile;
    query.resize(size_t(b * t * h * d));
    found.resize(query.size());
    // (b, t, h, d) and (b, h, t, d) into each other
    const auto crossed = [&](const float* x, float* out, bool back) {
        for (int64_t row = 0; row < b; row++)
            for (int64_t j = 0; j < t; j++)
                for (int64_t head = 0; head < h; head++) {
                    const int64_t near = ((row * t + j) * h + head) * d, far = ((row * h + head) * t + j) * d;
                    std::copy(x + (back ? far : near), x + (back ? far : near) + d, out + (back ? near : far));
                }
    };
    crossed(buffers[size_t(s.from)], query.data(), false);
    const Type type = bf16 ? Type::bf16 : Type::fp32;
    const std::vector<int64_t> lengths(size_t(b), length);
    const auto part = [&](const std::vector<Page>& pages) { return std::vector<Part>{{type, 0, 1, 1, d, k, PAGE, lengths, pages}}; };
    const int workers = pairs * length * d < SMALL ? 1 : threads;
    Held held{query.data(), !bf16, b, h, k, t, d, d, part(keys[size_t(s.layer)]), part(values[size_t(s.layer)]), lengths, nullptr, s.scale, tile, {},
              found.data(), workers};
    // equal shares of all tiles, cut wherever a pair ends
    const int64_t total = pairs * tiles;
    for (int64_t w = 0; w < workers; w++)
        for (int64_t at = total * w / workers, end = total * (w + 1) / workers; at < end;) {
            const int64_t pair = at / tiles, stop = std::min(end, (pair + 1) * tiles);
            held.runs.push_back({w, pair, at - pair * tiles, stop - pair * tiles});
            at = stop;
        }
#if defined(LACONIC_X86)
    laconic::attend(held, level == Level::avx512 ? avx512_ops : plain_ops);
#else
    laconic::attend(held, plain_ops);
#endif
    crossed(found.data(), buffers[size_t(s.to)], true);
}

int64_t Tape::run(int64_t first, int64_t last, int64_t b, int64_t t, int64_t past, int threads) {
    const int64_t rows = b * t;
    for (int64_t i = first; i < last; i++) {
        const Step& s = steps[size_t(i)];
        const float* from = buffers[size_t(s.from)];
        float* to = buffers[size_t(s.to)];
        const int64_t heads = rows * s.heads;
        const int many = rows * s.heads * s.width < SMALL ? 1 : threads;
        switch (s.kind) {
        case Step::Kind::norm:
#pragma omp parallel for num_threads(many) schedule(static) if (many > 1)
            for (int64_t r = 0; r < heads; r++) norm(from + r * s.width, to + r * s.width, s.values, s.width, s.eps);
            break;
        case Step::Kind::gate:
            // `to` is what is multiplied with
#pragma omp parallel for num_threads(many) schedule(static) if (many > 1)
            for (int64_t r = 0; r < rows; r++) gate(from + r * s.width, to + r * s.width, to + r * s.width, s.width);
            break;
        case Step::Kind::add: sum(from, to, rows * s.width); break;
        case Step::Kind::rope:
            for (int64_t r = 0; r < heads; r++) {
                const int64_t place = (past + r / s.heads % t) * s.width;
                turned(to + r * s.width, cosines + place, sines + place, s.width);
            }
            break;
        case Step::Kind::append: append(s, b, t, past); break;
        case Step::Kind::attend:
            if (t > s.most) return i;
            attend(s, b, t, past, threads);
            break;
        case Step::Kind::linear:
            if (rows > s.most || !linear(s, rows, threads)) return i;
            break;
        case Step::Kind::dense:
            if (rows > s.most) return i;
            dense(s, rows, threads);
            break;
        case Step::Kind::skip:
            if (rows > s.most) return i;
            skip(s, rows, threads);
            break;
        case Step::Kind::outside: return i;
        }
    }
    return last;
}

} // namespace laconic
