// Rows that are needed are shared out evenly between threads, each of which sums what its own come to; a row is asked for while the one before it is read,
// since no prefetcher knows which comes next.
#include "skip.h"

#include <algorithm>
#include <vector>

#include "dot.h"

namespace laconic {

namespace {

// fewer multiplications than this are done before a second thread has begun
constexpr int64_t SMALL = 1 << 17;
// rows that are added together, so that the sum is read and written once for all of them
constexpr int TOGETHER = 4;

template <class T>
inline __attribute__((always_inline)) void added(float* to, const T* const* from, const float* times, int64_t count) {
    const T *a = from[0], *b = from[1], *c = from[2], *d = from[3];
    const float p = times[0], q = times[1], r = times[2], s = times[3];
    for (int64_t i = 0; i < count; i++) to[i] += (p * wide(a[i]) + q * wide(b[i])) + (r * wide(c[i]) + s * wide(d[i]));
}

LACONIC_CLONES void add(float* to, const float* const* from, const float* times, int64_t count) { added(to, from, times, count); }
LACONIC_CLONES void add(float* to, const uint16_t* const* from, const float* times, int64_t count) { added(to, from, times, count); }

template <class T>
inline void ask(const T* row, int64_t count) {
    const uint8_t* at = reinterpret_cast<const uint8_t*>(row);
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 2);
}

// x . row, while what is read after it, `next` of as many numbers and `then` of n, is asked for bit by bit: all at once, memory and arithmetic would take turns
template <class T>
inline __attribute__((always_inline)) float dotted_asking(const float* x, const T* row, const T* next, const T* then, int64_t m, int64_t n) {
    constexpr int64_t LINE = 64 / sizeof(T);
    float lanes[LINE] = {};
    int64_t i = 0;
    for (; i + LINE <= m; i += LINE) {
        __builtin_prefetch(next + i, 0, 2);
        if (i < n) __builtin_prefetch(then + i, 0, 3);
        for (int64_t k = 0; k < LINE; k++) lanes[k] += x[i + k] * wide(row[i + k]);
    }
    for (int64_t j = i; j < n; j += LINE) __builtin_prefetch(then + j, 0, 3);
    float total = 0.0f;
    for (; i < m; i++) total += x[i] * wide(row[i]);
    for (int64_t k = 0; k < LINE; k++) total += lanes[k];
    return total;
}

LACONIC_CLONES float dot_asking(const float* x, const float* row, const float* next, const float* then, int64_t m, int64_t n) {
    return dotted_asking(x, row, next, then, m, n);
}
LACONIC_CLONES float dot_asking(const float* x, const uint16_t* row, const uint16_t* next, const uint16_t* then, int64_t m, int64_t n) {
    return dotted_asking(x, row, next, then, m, n);
}

// the rows first to last - 1 of those that are needed, into `to`
template <class T>
void share(const Skipping& s, int64_t row, const int64_t* first, const int64_t* last, float* to) {
    const T *up = static_cast<const T*>(s.up), *down = static_cast<const T*>(s.down);
    const T* from[TOGETHER];
    float times[TOGETHER];
    for (int waiting = 0; first < last; first++) {
        const int64_t j = *first, after = first + 1 < last ? first[1] : j;
        float factor = s.a[row * s.h + j];
        if (up)
            factor *= dot_asking(s.x + row * s.m, up + j * s.m, up + after * s.m, down + j * s.n, s.m, s.n) + (s.bias ? s.bias[j] : 0.0f);
        else ask(down + after * s.n, s.n);
        from[waiting] = down + j * s.n, times[waiting] = factor;
        if (++waiting == TOGETHER) add(to, from, times, s.n), waiting = 0;
        else if (first + 1 == last)
            for (int i = 0; i < waiting; i++) add(to, from[i], times[i], s.n);
    }
}

} // namespace

void skip(const Skipping& s) {
    std::vector<int64_t> needed(size_t(s.h));
    std::vector<float> sums;
    for (int64_t row = 0; row < s.rows; row++) {
        float* out = s.out + row * s.n;
        int64_t count = 0;
        for (int64_t j = 0; j < s.h; j++)
            if (s.a[row * s.h + j] != 0.0f) needed[size_t(count++)] = j;
        std::fill(out, out + s.n, 0.0f);
        const int workers = count * (s.n + (s.up ? s.m : 0)) < SMALL ? 1 : s.threads;
        sums.assign(size_t(workers - 1) * size_t(s.n), 0.0f);
#pragma omp parallel for num_threads(workers) schedule(static, 1) if (workers > 1)
        for (int w = 0; w < workers; w++) {
            const int64_t *first = needed.data() + count * w / workers, *last = needed.data() + count * (w + 1) / workers;
            float* to = w ? sums.data() + (w - 1) * s.n : out;
            if (s.narrow) share<uint16_t>(s, row, first, last, to);
            else share<float>(s, row, first, last, to);
        }
        for (int w = 1; w < workers; w++) add(out, sums.data() + (w - 1) * s.n, 1.0f, s.n);
    }
}

} // namespace laconic
