// The walk over a cache's parts, the same for every processor, and operations for any.
#include "attention.h"
#include "dot.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

namespace laconic {

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Free {
    void operator()(uint8_t* at) const { ::operator delete(at, std::align_val_t(64)); }
};

// memory for one worker, cut into pieces that begin at cache lines
struct Arena {
    std::unique_ptr<uint8_t, Free> at;
    size_t used = 0;
    static size_t room(int64_t floats) { return (size_t(floats) * 4 + 63) / 64 * 64; }
    explicit Arena(size_t bytes) : at(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)))) { std::memset(at.get(), 0, bytes); }
    float* floats(int64_t count) {
        float* found = reinterpret_cast<float*>(at.get() + used);
        used += room(count);
        return found;
    }
};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

LACONIC_CLONES void numbers(const uint8_t* codes, int64_t count, int bits, float* out) {
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    int64_t j = 0;
    for (; j + 8 <= count; j += 8, codes += bits) {
        uint64_t word = 0;
        for (int k = 0; k < bits; k++) word |= uint64_t(codes[k]) << (8 * k);
        for (int k = 0; k < 8; k++) out[j + k] = float(int32_t((word >> (k * bits)) & mask));
    }
    for (int64_t k = 0; j + k < count; k++) out[j + k] = float(code_at(codes, k, bits));
}

// tokens `from` to `to` of grouped entries, LITTLE at most, in fp32, one after the other
void decode(const Part& part, const Stretch& s, int64_t from, int64_t to, float* out) {
    if (part.unit == 1) {
        for (int64_t t = from; t < to; t++, out += part.d) {
            numbers(s.data + t * part.codes(), part.d, part.bits, out);
            const uint16_t *scales = s.scales + t * part.scales(), *zeros = s.zeros + t * part.scales();
            for (int64_t c = 0; c < part.d; c++) {
                const int64_t g = c / part.group;
                // rounded twice, as torch does it
                const float stepped = out[c] * from_16(scales[g], part.type);
                out[c] = stepped + from_16(zeros[g], part.type);
            }
        }
        return;
    }
    // one group of tokens: a row of codes for every channel
    const int64_t first = from / 8 * 8;
    float row[LITTLE + 8];
    for (int64_t c = 0; c < part.d; c++) {
        const float scale = from_16(s.scales[c], part.type), zero = from_16(s.zeros[c], part.type);
        numbers(s.data + c * part.codes() + first / 8 * part.bits, to - first, part.bits, row);
        for (int64_t t = from; t < to; t++) {
            const float stepped = row[t - first] * scale;
            out[(t - from) * part.d + c] = stepped + zero;
        }
    }
}

LACONIC_CLONES void widen_bf16(const uint16_t* from, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(from[i]);
}

// a token as fp32: where it lies, or in w.room
const float* token(const Work& w, Type type, const void* tokens, int64_t index, int64_t d) {
    if (type == Type::fp32) return static_cast<const float*>(tokens) + index * d;
    const uint16_t* from = static_cast<const uint16_t*>(tokens) + index * d;
    if (type == Type::bf16) widen_bf16(from, d, w.room);
    else
        for (int64_t i = 0; i < d; i++) w.room[i] = from_fp16(from[i]);
    return w.room;
}

void plain_scores(const Work& w, Type type, const void* keys, int64_t n, int64_t at) {
    for (int64_t i = 0; i < n; i++) {
        const float* key = token(w, type, keys, i, w.d);
        for (int64_t r = 0; r < w.rows; r++) w.scores[r * w.ld + at + i] = dot(w.q + r * w.wide, key, w.d);
    }
}

void plain_values(const Work& w, Type type, const void* values, int64_t n, int64_t at) {
    for (int64_t i = 0; i < n; i++) {
        const float* value = token(w, type, values, i, w.e);
        for (int64_t r = 0; r < w.rows; r++) add(w.o + r * w.high, value, w.scores[r * w.ld + at + i], w.e);
    }
}

void plain_weigh(const Work& w, int64_t n) {
    for (int64_t r = 0; r < w.rows; r++) {
        float *s = w.scores + r * w.ld, most = w.top[r];
        // NaN wins, so that it is seen in what comes out
        for (int64_t i = 0; i < n; i++) most = s[i] > most || s[i] != s[i] ? s[i] : most;
        if (most == NEVER) {
            std::fill(s, s + n, 0.0f);
            continue;
        }
        const float before = w.top[r] == NEVER ? 0.0f : std::exp2(w.top[r] - most);
        float sum = 0.0f;
        for (int64_t i = 0; i < n; i++) sum += s[i] = std::exp2(s[i] - most);
        w.sum[r] = w.sum[r] * before + sum;
        w.top[r] = most;
        for (int64_t c = 0; c < w.e; c++) w.o[r * w.high + c] *= before;
    }
}

bool plain_channels(const Work&, const Part&, const Stretch&, int64_t) { return false; }
int64_t plain_grouped(const Work&, const Part&, const Stretch&, int64_t) { return 0; }
void plain_gather(const Work&, const Part&) {}

// tokens from..to of a row, counted from its first, into or out of the scores of a tile that begins at token `begin`
void half(const Ops& ops, const Work& w, const std::vector<Part>& parts, bool keys, int64_t row, int64_t head, int64_t from, int64_t to) {
    const int64_t stride = std::max(w.wide, w.high), begin = from;
    const auto act = keys ? ops.scores : ops.values;
    int64_t base = 0;
    for (const Part& part : parts) {
        const int64_t end = base + part.lengths[size_t(row)] * part.unit;
        while (from < std::min(to, end)) {
            const int64_t unit = part.unit, entry = (from - base) / unit, in = (from - base) % unit, last = std::min(to, end) - base;
            const Stretch s = stretch(part, row, head, entry, (last + unit - 1) / unit - entry);
            const int64_t count = std::min(s.count * unit, last - entry * unit) - in;
            if (!part.bits) {
                act(w, part.type, s.data, count, from - begin);
                from += count;
                continue;
            }
            if (unit == 1) {
                const int64_t done = keys ? 0 : ops.grouped(w, part, s, from - begin);
                for (int64_t i = done; i < s.count; i += LITTLE) {
                    const int64_t some = std::min(LITTLE, s.count - i);
                    decode(part, s, i, i + some, w.room + stride);
                    act(w, Type::fp32, w.room + stride, some, from - begin + i);
                }
                from += s.count;
                continue;
            }
            // one group at a time
            const int64_t some = std::min(unit - in, count);
            if (!keys || some < unit || !ops.channels(w, part, s, from - begin)) {
                for (int64_t i = 0; i < some; i += LITTLE) {
                    const int64_t few = std::min(LITTLE, some - i);
                    decode(part, s, in + i, in + i + few, w.room + stride);
                    act(w, Type::fp32, w.room + stride, few, from - begin + i);
                }
            }
            from += some;
        }
        base = end;
        if (from >= to) break;
    }
}

inline void ask(const void* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(at) + i, 0, 2);
}

// codes of tokens from..to of a row are asked for before their turn: they are too short in a page for the processor to see where they go on
void ask(const std::vector<Part>& parts, int64_t row, int64_t head, int64_t from, int64_t to) {
    int64_t base = 0;
    for (const Part& part : parts) {
        const int64_t length = part.lengths[size_t(row)], last = (std::min(to - base, length * part.unit) + part.unit - 1) / part.unit;
        if (part.bits)
            for (int64_t entry = std::max<int64_t>(0, from - base) / part.unit; entry < last;) {
                const Stretch s = stretch(part, row, head, entry, last - entry);
                ask(s.data, s.count * part.bytes());
                ask(s.scales, s.count * part.scales() * 2);
                ask(s.zeros, s.count * part.scales() * 2);
                entry += s.count;
            }
        base += length * part.unit;
    }
}

// next: where the tile after this one ends, if that is this worker's
void tile(const Held& h, const Ops& ops, const Work& w, int64_t row, int64_t head, int64_t from, int64_t to, int64_t next) {
    ask(h.values, row, head, from, to);
    half(ops, w, h.keys, true, row, head, from, to);
    const int64_t length = h.lengths[size_t(row)], n = to - from;
    const int64_t longest = *std::max_element(h.lengths.begin(), h.lengths.end());
    for (int64_t r = 0; r < w.rows; r++) {
        float* s = w.scores + r * w.ld;
        const int64_t j = r % h.t, sees = std::max<int64_t>(0, length - h.t + j + 1 - from);
        for (int64_t i = sees; i < n; i++) s[i] = NEVER;
        if (h.mask) {
            const uint8_t* mask = h.mask + (row * h.t + j) * longest + from;
            for (int64_t i = 0; i < n; i++)
                if (!mask[i]) s[i] = NEVER;
        }
    }
    ops.weigh(w, n);
    ask(h.keys, row, head, to, next);
    half(ops, w, h.values, false, row, head, from, to);
}

} // namespace

const Ops plain_ops = {plain_scores, plain_values, plain_weigh, plain_channels, plain_grouped, plain_gather};

void attend(const Held& h, const Ops& ops) {
    const int64_t rows = h.h / h.k * h.t, wide = up(h.d, 32), high = up(h.e, 32), far = up(h.e, 128), ld = up(h.tile, 32) + 32, stride = std::max(wide, high);
    const int64_t results = rows * (h.e + 2);
    const Part* grouped = nullptr;
    for (const Part& part : h.values)
        if (part.bits) grouped = &part;
    std::vector<float> found(h.runs.size() * size_t(results));
#pragma omp parallel num_threads(h.workers)
    {
        // integers of a bunch of 4 rows: of queries, or of a pair of weights for each of 16 groups at most
        const int64_t words = 4 * (wide + ld * 16);
        Arena arena(Arena::room(rows * wide) * 2 + Arena::room(rows * ld) + Arena::room(rows) * 2 + Arena::room(rows * high) + Arena::room(rows * far) +
                    Arena::room(rows * 16) +
                    Arena::room((LITTLE + 2) * stride) + Arena::room(words));
        Work w{rows, h.d, h.e, wide, high, far, ld, h.fine, arena.floats(rows * wide), arena.floats(rows * wide), arena.floats(rows * ld), arena.floats(rows),
               arena.floats(rows), arena.floats(rows * high), arena.floats(rows * far), arena.floats(rows * 16),
               arena.floats((LITTLE + 2) * stride), reinterpret_cast<uint8_t*>(arena.floats(words))};
#pragma omp for schedule(static, 1)
        for (int64_t worker = 0; worker < h.workers; worker++) {
            for (size_t i = 0; i < h.runs.size(); i++) {
                const Run& run = h.runs[i];
                if (run.worker != worker) continue;
                const int64_t row = run.pair / h.k, head = run.pair % h.k;
                const float* query = h.query + (row * h.h + head * (h.h / h.k)) * h.t * h.d;
                for (int64_t r = 0; r < rows; r++) {
                    for (int64_t c = 0; c < h.d; c++) w.q[r * wide + c] = query[r * h.d + c] * h.scale * 1.4426950408889634f;
                    for (int64_t c = 0; c < wide; c++) w.split[r * wide + c / 32 * 32 + c % 2 * 16 + c % 32 / 2] = w.q[r * wide + c];
                }
                std::fill(w.top, w.top + rows, NEVER);
                std::fill(w.sum, w.sum + rows, 0.0f);
                std::fill(w.o, w.o + rows * high, 0.0f);
                std::fill(w.planes, w.planes + rows * far, 0.0f);
                std::fill(w.shift, w.shift + rows * 16, 0.0f);
                const int64_t length = h.lengths[size_t(row)];
                for (int64_t at = run.first; at < run.last; at++) {
                    const int64_t begin = at * h.tile, next = at + 1 < run.last ? (at + 2) * h.tile : 0;
                    tile(h, ops, w, row, head, begin, std::min(begin + h.tile, length), std::min(next, length));
                }
                if (grouped) ops.gather(w, *grouped);
                float* to = found.data() + i * size_t(results);
                for (int64_t r = 0; r < rows; r++, to += h.e + 2) {
                    to[0] = w.top[r], to[1] = w.sum[r];
                    std::copy(w.o + r * high, w.o + r * high + h.e, to + 2);
                }
            }
        }
    }
    // m = max(m1, m2), l = 2^(m1-m) l1 + 2^(m2-m) l2, o likewise, over the runs of a pair, then o / l
    std::vector<std::vector<size_t>> of(size_t(h.b * h.k));
    for (size_t i = 0; i < h.runs.size(); i++) of[size_t(h.runs[i].pair)].push_back(i);
    for (size_t pair = 0; pair < of.size(); pair++) {
        float* out = h.out + int64_t(pair) * rows * h.e;
        for (int64_t r = 0; r < rows; r++, out += h.e) {
            float most = NEVER, sum = 0.0f;
            for (size_t i : of[pair]) {
                const float top = found[i * size_t(results) + size_t(r * (h.e + 2))];
                most = top > most || top != top ? top : most;
            }
            std::fill(out, out + h.e, 0.0f);
            if (most == NEVER) continue;
            for (size_t i : of[pair]) {
                const float* from = found.data() + i * size_t(results) + size_t(r * (h.e + 2));
                if (from[0] == NEVER) continue;
                const float times = std::exp2(from[0] - most);
                sum += from[1] * times;
                add(out, from + 2, times, h.e);
            }
            for (int64_t c = 0; c < h.e; c++) out[c] /= sum;
        }
    }
}

} // namespace laconic
