// Attention over blocks for AVX-512: keys and values become panels once, with keys, then channels of values as lanes; tiles of up to 12 queries pass the
// blocks that are kept, one block after another, with a running maximum and sum (Dao et al. 2022, arXiv:2205.14135, algorithm 1). What differs between
// dtypes is a K; see blocks_avx512.cpp and blocks_bf16.cpp.
#pragma once
#include <cmath>
#include <limits>

#include "blocks.h"
#include "panels_avx512.h"

namespace laconic {

namespace {

thread_local Room packed_room, work_room;

// 2^x for x <= 0, to fp32's last places; what is no number stays none
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 out = _mm512_set1_ps(1.540353039e-4f);
    for (const float next : {1.333355815e-3f, 9.618129108e-3f, 5.550410866e-2f, 2.402265070e-1f, 6.931471806e-1f, 1.0f})
        out = _mm512_fmadd_ps(out, rest, _mm512_set1_ps(next));
    return _mm512_scalef_ps(out, whole);
}

template <class K>
struct Packed {
    static constexpr int64_t SIZE = sizeof(typename K::Number), EACH = 4 / SIZE;
    const Blocks& p;
    int64_t blocks, of_key, of_value; // words of a key, and of a channel of values of a block
    int64_t key_panels, value_panels, each; // panels of a block; words of it
    int32_t* at;

    explicit Packed(const Blocks& p)
        : p(p), blocks((p.s + p.block - 1) / p.block), of_key(((p.d + EACH - 1) / EACH + LANES - 1) / LANES * LANES),
          of_value((p.block + EACH - 1) / EACH), key_panels((p.block + WIDE - 1) / WIDE), value_panels((p.v + WIDE - 1) / WIDE),
          each((key_panels * of_key + value_panels * of_value) * WIDE),
          at(reinterpret_cast<int32_t*>(packed_room.of(size_t(p.b * p.k * blocks * each) * 4))) {}

    int32_t* keys(int64_t head, int64_t block) const { return at + (head * blocks + block) * each; }
    int32_t* values(int64_t head, int64_t block) const { return keys(head, block) + key_panels * of_key * WIDE; }
    int64_t width(int64_t block) const { return std::min(p.block, p.s - block * p.block); }

    // head: of all rows
    void fill(int64_t head, int64_t block) const {
        const int64_t tokens = width(block);
        const uint8_t* key = p.key + (head * p.s + block * p.block) * p.d * SIZE;
        for (int64_t panel = 0; panel < (tokens + WIDE - 1) / WIDE; panel++)
            for (int64_t half = 0; half < 2; half++) {
                const int64_t begin = panel * WIDE + 16 * half, here = std::clamp<int64_t>(tokens - begin, 0, 16);
                for (int64_t w = 0; w < of_key; w += LANES) {
                    const __mmask64 left = first(std::max<int64_t>(0, p.d * SIZE - 4 * w));
                    __m512i v[16];
                    for (int64_t i = 0; i < 16; i++)
                        v[i] = i < here ? _mm512_maskz_loadu_epi8(left, key + (begin + i) * p.d * SIZE + 4 * w) : _mm512_setzero_si512();
                    transpose(v);
                    for (int64_t l = 0; l < LANES; l++) _mm512_store_si512(keys(head, block) + (panel * of_key + w + l) * WIDE + 16 * half, v[l]);
                }
            }
        const uint8_t* value = p.value + (head * p.s + block * p.block) * p.v * SIZE;
        for (int64_t panel = 0; panel < value_panels; panel++)
            for (int64_t w = 0; w < (tokens + EACH - 1) / EACH; w++)
                for (int64_t half = 0; half < 2; half++) {
                    const int64_t channel = panel * WIDE + 16 * half;
                    const __mmask16 there = __mmask16(first(std::max<int64_t>(0, p.v - channel)));
                    _mm512_store_si512(values(head, block) + (panel * of_value + w) * WIDE + 16 * half,
                                       K::words(value + channel * SIZE, p.v * SIZE, EACH * w, tokens, there));
                }
    }
};

// One block of queries of one head, over all blocks that are kept.
template <class K>
void queries(const Packed<K>& packed, int64_t head, int64_t i) {
    using Number = typename K::Number;
    const Blocks& p = packed.p;
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
    const int64_t number = std::min(p.block, p.t - i * p.block), tiles = (number + TALL - 1) / TALL, served = head / p.h * p.k + head % p.h / (p.h / p.k);
    const int64_t wide = packed.value_panels * WIDE, across = packed.key_panels * WIDE, laid_words = across + LANES;
    // queries word by word; scores, weights and weights word by word of a tile; sums, and each query's greatest score and sum of weights
    float* sums = reinterpret_cast<float*>(work_room.of(size_t(number * (packed.of_key + wide + 2) + 16 * (2 * across + laid_words) + 64) * 4));
    int32_t* x = reinterpret_cast<int32_t*>(sums + number * wide);
    float *score = reinterpret_cast<float*>(x + number * packed.of_key + 16), *weight = score + 16 * across;
    int32_t* laid = reinterpret_cast<int32_t*>(weight + 16 * across);
    float *top = reinterpret_cast<float*>(laid + 16 * laid_words), *total = top + number;
    std::fill_n(sums, number * wide, 0.0f);
    std::fill_n(top, number, NEVER);
    std::fill_n(total, number, 0.0f);
    const int64_t of_row = p.d * packed.SIZE;
    const Many given{p.query + (head * p.t + i * p.block) * of_row, of_row, of_row, number, 0, nullptr, nullptr, 1};
    const auto begin = [&](int64_t t) { return number * t / tiles; };
    for (int64_t t = 0; t < tiles; t++) lay<1>(given, begin(t), begin(t + 1) - begin(t), x + begin(t) * packed.of_key);
    const __m512 scale = _mm512_set1_ps(p.scale * 1.44269504088896f);
    const uint8_t* keep = p.keep + (head * ((p.t + p.block - 1) / p.block) + i) * packed.blocks;
    for (int64_t j = 0; j < packed.blocks; j++) {
        if (!keep[j]) continue;
        const int64_t tokens = packed.width(j), panels = (tokens + WIDE - 1) / WIDE;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t r = begin(t), rows = begin(t + 1) - r;
            // how many tokens of the block the first query of the tile may see
            const int64_t sees = i * p.block + r + p.s - p.t - j * p.block + 1;
            if (sees + rows - 1 <= 0) continue;
            for (int64_t q = 0; q < panels; q++)
                TILES<K>[rows](packed.keys(served, j) + q * packed.of_key * WIDE, x + r * packed.of_key, packed.of_key,
                               Place{nullptr, 0, true, true, score + q * WIDE, nullptr, across, WIDE});
            for (int64_t e = 0; e < rows; e++) {
                const int64_t seen = std::clamp<int64_t>(sees + e, 0, tokens);
                float* line = score + e * across;
                Number* to = reinterpret_cast<Number*>(weight) + e * across;
                __m512 most = _mm512_set1_ps(NEVER);
                for (int64_t c = 0; c < seen; c += 16) {
                    const __m512 value = _mm512_mul_ps(_mm512_load_ps(line + c), scale);
                    _mm512_store_ps(line + c, value);
                    most = _mm512_mask_max_ps(most, __mmask16(first(seen - c)), most, value);
                }
                const float before = top[r + e], now = std::max(before, _mm512_reduce_max_ps(most));
                __m512 sum = _mm512_setzero_ps();
                for (int64_t c = 0; c < panels * WIDE; c += 16) {
                    const __mmask16 there = __mmask16(first(std::max<int64_t>(0, seen - c)));
                    __m512 value = _mm512_setzero_ps();
                    if (there) value = _mm512_maskz_mov_ps(there, exp2_of(_mm512_sub_ps(_mm512_load_ps(line + c), _mm512_set1_ps(now))));
                    sum = _mm512_add_ps(sum, value);
                    K::put(to + c, value);
                }
                if (!seen) continue;
                top[r + e] = now;
                if (before == now) total[r + e] += _mm512_reduce_add_ps(sum);
                else {
                    const float less = before == NEVER ? 0.0f : std::exp2(before - now);
                    total[r + e] = total[r + e] * less + _mm512_reduce_add_ps(sum);
                    for (int64_t c = 0; c < wide; c += 16) {
                        float* of = sums + (r + e) * wide + c;
                        _mm512_store_ps(of, _mm512_mul_ps(_mm512_load_ps(of), _mm512_set1_ps(less)));
                    }
                }
            }
            const int64_t bytes = across * packed.SIZE, words = (tokens + packed.EACH - 1) / packed.EACH;
            lay<1>(Many{reinterpret_cast<const uint8_t*>(weight), bytes, words * 4, rows, 0, nullptr, nullptr, 1}, 0, rows, laid);
            for (int64_t q = 0; q < packed.value_panels; q++)
                TILES<K>[rows](packed.values(served, j) + q * packed.of_value * WIDE, laid, words,
                               Place{sums + r * wide + q * WIDE, wide, false, false, nullptr, nullptr, 0, 0});
        }
    }
    Number* out = reinterpret_cast<Number*>(p.out) + (head * p.t + i * p.block) * p.v;
    for (int64_t e = 0; e < number; e++) {
        const __m512 by = _mm512_set1_ps(total[e] == 0.0f ? 0.0f : 1.0f / total[e]);
        for (int64_t c = 0; c < p.v; c += 16)
            K::put(out + e * p.v + c, _mm512_mul_ps(_mm512_load_ps(sums + e * wide + c), by), __mmask16(first(p.v - c)));
    }
}

template <class K>
void attend_blocks(const Blocks& p) {
    const Packed<K> packed(p);
    const int64_t groups = (p.t + p.block - 1) / p.block;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t head = 0; head < p.b * p.k; head++)
            for (int64_t block = 0; block < packed.blocks; block++) packed.fill(head, block);
        // the last queries see most
#pragma omp for schedule(dynamic)
        for (int64_t item = p.b * p.h * groups - 1; item >= 0; item--) queries<K>(packed, item % (p.b * p.h), item / (p.b * p.h));
        work_room.shrink();
    }
    packed_room.shrink();
}

} // namespace

} // namespace laconic
