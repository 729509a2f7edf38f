// What the kernels for any processor share. Included by files that are compiled without a processor's own instructions; nothing here is seen by the linker.
#pragma once
#include "linear.h"

namespace laconic {

namespace {

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

} // namespace laconic
