// What the kernels for any processor share. Included by files that are compiled without a processor's own instructions; nothing here is seen by the linker.
#pragma once
#include "linear.h"

namespace laconic {

namespace {

inline float wide(float value) { return value; }
inline float wide(uint16_t value) { return from_bf16(value); }

template <class T>
inline __attribute__((always_inline)) float dotted(const float* a, const T* b, int64_t count) {
    float lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int k = 0; k < 32; k++) lanes[k] += a[i + k] * wide(b[i + k]);
    float total = 0.0f;
    for (; i < count; i++) total += a[i] * wide(b[i]);
    for (int k = 0; k < 32; k++) total += lanes[k];
    return total;
}

// numbers of 16 bits are bf16
[[maybe_unused]] LACONIC_CLONES float dot(const float* a, const float* b, int64_t count) { return dotted(a, b, count); }
[[maybe_unused]] LACONIC_CLONES float dot(const float* a, const uint16_t* b, int64_t count) { return dotted(a, b, count); }

template <class T>
inline __attribute__((always_inline)) void added(float* to, const T* from, float times, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += times * wide(from[i]);
}

[[maybe_unused]] LACONIC_CLONES void add(float* to, const float* from, float times, int64_t count) { added(to, from, times, count); }
[[maybe_unused]] LACONIC_CLONES void add(float* to, const uint16_t* from, float times, int64_t count) { added(to, from, times, count); }

} // namespace

} // namespace laconic
