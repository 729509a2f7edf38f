// How much each run of weights errs when it is rounded to a grid with one of several scales. The reference is kernels/grids.py:
// reference_errors.
#pragma once
#include <cstdint>

namespace laconic {

struct Clip {
    const float* runs;   // (rows, groups, width)
    const float* weigh;  // (groups, width): what each square counts, or 0
    const float *scale, *whole, *over, *zero; // (steps, rows, groups); codes are round(w / scale + over) + whole, and mean (code - zero) * scale
    int64_t rows, groups, width, steps;
    float top; // the greatest code
    float* out; // (steps, rows, groups): sums of squares
    int threads;
};

// the same loop as the compiler makes it of each set of instructions
void clip_plain(const Clip& p);
void clip_avx2(const Clip& p);
void clip_avx512(const Clip& p);

} // namespace laconic
