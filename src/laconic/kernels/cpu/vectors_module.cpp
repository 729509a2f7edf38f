// The door to products with vectors. What is handed in was checked by kernels/books.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "vectors.h"

namespace nb = nanobind;
using namespace laconic;

namespace {

// told: of each book its codes, the bytes of a run of them, their bits and its table
Vectored vectored(const std::vector<int64_t>& told, uintptr_t scales, int64_t n, int64_t m, int64_t width) {
    Vectored w{{}, int(told.size() / 4), reinterpret_cast<const uint16_t*>(scales), n, m, width};
    for (size_t b = 0; b < told.size() / 4 && b < 2; b++)
        w.books[b] = {reinterpret_cast<const uint8_t*>(told[4 * b]), size_t(told[4 * b + 1]), int(told[4 * b + 2]),
                      reinterpret_cast<const uint16_t*>(told[4 * b + 3])};
    return w;
}

void vector_linear(uintptr_t x, bool bf16, int64_t rows, const std::vector<int64_t>& told, uintptr_t scales, int64_t n, int64_t m, int64_t width,
            uintptr_t out, bool panels, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const VectorProduct p{vectored(told, scales, n, m, width), reinterpret_cast<const void*>(x), bf16, rows, reinterpret_cast<void*>(out), threads};
#if defined(LACONIC_X86)
    if (panels) return vectors_panels_bf16(p);
    if (with == "avx512" && regular(p.w) && !bf16) return vectors_few_avx512(p);
    if (with == "avx512" && regular(p.w) && pairs()) return vectors_few_bf16(p);
#endif
    (void)panels, (void)with;
    vectors_plain(p);
}

void vector_dense(const std::vector<int64_t>& told, uintptr_t scales, int64_t n, int64_t m, int64_t width, uintptr_t out, int threads) {
    nb::gil_scoped_release free;
    vectors_dense_plain(vectored(told, scales, n, m, width), reinterpret_cast<float*>(out), threads);
}

} // namespace

void bind_vectors(nb::module_& module) {
    module.def("vector_linear", &vector_linear);
    module.def("vector_dense", &vector_dense);
}
