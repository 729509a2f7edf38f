// AVX-512 with VBMI2 and BF16: weights and x in bf16, multiplied in pairs and added in fp32. Weights of other kinds are rounded to bf16 as torch would
// before a product with x in bf16, a row at a time.
#include <type_traits>

#include "sparse_avx512.h"

namespace laconic {

namespace {

template <bool STORED>
struct Pairs : Paired {
    using Value = uint16_t;
    using X = uint16_t;
    static constexpr int PARTS = 1;
    static constexpr bool BUFFERED = !STORED;

    static Cursor<Value> begin(const Sparse& w, int64_t row, float* room) {
        if constexpr (!STORED) {
            const float* wide = numbers_of(w, row, room);
            // over what was read before
            Value* near = reinterpret_cast<Value*>(room);
            for (int64_t i = 0; i < w.count(row); i += 16)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(near + i), narrowed(_mm512_loadu_ps(wide + i)));
            return {near, nullptr};
        }
        const uint16_t* values = static_cast<const uint16_t*>(w.values);
        return {values + w.starts[row], values + w.total()};
    }
    template <bool CAREFUL>
    static inline void expand(Cursor<Value>& from, uint32_t bits, __m512i (&out)[PARTS]) {
        out[0] = spread(words<CAREFUL>(from.at, from.end), bits);
        from.at += _mm_popcnt_u32(bits);
    }

    // rows of x, `wide` apart, filled up with zeros
    static const X* ready(const SparseProduct& p, int64_t wide) {
        const X* given = static_cast<const X*>(p.x);
        if (wide == p.w.m) return given;
        X* out = reinterpret_cast<X*>(whole.of(size_t(p.rows * wide) * sizeof(X)));
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows > 16)
        for (int64_t r = 0; r < p.rows; r++) std::fill_n(std::copy_n(given + r * p.w.m, p.w.m, out + r * wide), wide - p.w.m, X(0));
        return out;
    }
};

} // namespace

void sparse_bf16(const SparseProduct& p) {
    if (p.w.values && p.w.type == Type::bf16) sparse_product<Pairs<true>>(p);
    else sparse_product<Pairs<false>>(p);
}

} // namespace laconic
