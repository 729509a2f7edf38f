// Products that leave out what is multiplied with zero: of a matrix only those rows are read whose factor is none.
#pragma once
#include "linear.h"

namespace laconic {

// out (rows, n) = the sum over those j with a[j] != 0 of a[j] * (x . up[j] + bias[j]) * down[j], without `up` of a[j] * down[j]
struct Skipping {
    const float* a;    // (rows, h)
    const float* x;    // (rows, m), with `up` only
    const void* up;    // (h, m)
    const float* bias; // (h) or null
    const void* down;  // (h, n)
    bool narrow;       // up and down in bf16, else in fp32
    int64_t rows, m, h, n;
    float* out;
    int threads;
};

void skip(const Skipping& s);

} // namespace laconic
