// Causal attention of a prompt over some blocks of keys.
#pragma once
#include "linear.h"

namespace laconic {

// Queries (b, h, t, d) are the last t of s tokens with keys (b, k, s, d) and values (b, k, s, v), all of one dtype and in one piece, heads h served by k in
// order; keep (b, h, ceil(t / block), ceil(s / block)), one byte each, says which blocks of keys a block of queries looks at. out (b, h, t, v) in the
// same dtype; zeros where a query sees nothing.
struct Blocks {
    const uint8_t *query, *key, *value, *keep;
    int64_t b, h, k, t, s, d, v, block;
    float scale;
    uint8_t* out;
    int threads;
};

#if defined(LACONIC_X86)
// in fp32
void blocks_avx512(const Blocks& p);
// in bf16, where the processor multiplies pairs of such numbers
void blocks_bf16(const Blocks& p);
#endif

} // namespace laconic
