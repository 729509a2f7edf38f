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

// the rows first to last - 1 of those that are needed, into `to`
template <class T>
void share(const Skipping& s, int64_t row, const int64_t* first, const int64_t* last, float* to) {
    const T *up = static_cast<const T*>(s.up), *down = static_cast<const T*>(s.down);
    const T* from[TOGETHER];
    float times[TOGETHER];
    for (int waiting = 0; first < last; first++) {
        const int64_t j = *first;
        if (first + 1 < last) {
            if (up) ask(up + first[1] * s.m, s.m);
            ask(down + first[1] * s.n, s.n);
        }
        float factor = s.a[row * s.h + j];
        if (up) factor *= dot(s.x + row * s.m, up + j * s.m, s.m) + (s.bias ? s.bias[j] : 0.0f);
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
