// The loop of clip.h; included by one file for each set of instructions.
#include <cmath>

#include "clip.h"

namespace laconic {

namespace {

// division, not a product with the inverse: codes are those of the reference
inline void losses(const Clip& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t run = 0; run < p.rows * p.groups; run++) {
        const float* w = p.runs + run * p.width;
        const float* weigh = p.weigh ? p.weigh + run % p.groups * p.width : nullptr;
        for (int64_t step = 0; step < p.steps; step++) {
            const int64_t at = step * p.rows * p.groups + run;
            const float scale = p.scale[at], whole = p.whole[at], over = p.over[at], zero = p.zero[at], top = p.top;
            const auto square = [&](int64_t j) {
                float code = std::nearbyint(w[j] / scale + over) + whole;
                code = code < 0 ? 0.0f : code > top ? top : code;
                const float error = (code - zero) * scale - w[j];
                return error * error;
            };
            float sum = 0;
            if (weigh) {
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < p.width; j++) sum += square(j) * weigh[j];
            } else {
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < p.width; j++) sum += square(j);
            }
            p.out[at] = sum;
        }
    }
}

} // namespace

} // namespace laconic
