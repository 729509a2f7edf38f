// The door to products through a table. What is handed in was checked by kernels/lookup.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "lookup.h"

namespace nb = nanobind;
using namespace laconic;

namespace {

Leveled leveled(uintptr_t codes, size_t stride, uintptr_t scales, int scaling, uintptr_t whole, uintptr_t table, int kind, int64_t n, int64_t m,
                int bits, int64_t group) {
    const int64_t wide = group < 1 || group > m ? m : group;
    return {reinterpret_cast<const uint8_t*>(codes), stride, reinterpret_cast<const uint8_t*>(scales), Scaling(scaling),
            whole ? *reinterpret_cast<const float*>(whole) : 1.0f, reinterpret_cast<const uint16_t*>(table), Kind(kind), n, m, wide,
            wide ? (m + wide - 1) / wide : 0, bits};
}

void linear(uintptr_t x, bool bf16, int64_t rows, uintptr_t codes, size_t stride, uintptr_t scales, int scaling, uintptr_t whole, uintptr_t table,
            int kind, int64_t n, int64_t m, int bits, int64_t group, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Looked p{leveled(codes, stride, scales, scaling, whole, table, kind, n, m, bits, group), reinterpret_cast<const void*>(x), bf16, rows,
                   reinterpret_cast<void*>(out), threads};
#if defined(LACONIC_X86)
    if (with == "avx512" && bf16 && rows > SOME && only_pairs() && (p.w.group % 16 == 0 || p.w.group >= m)) return lookup_panels_bf16(p);
    if (with == "avx512" && regular(p.w)) return bf16 && pairs() ? lookup_narrow_avx512(p) : lookup_wide_avx512(p);
#endif
    lookup_plain(p);
}

void dense_of(uintptr_t codes, size_t stride, uintptr_t scales, int scaling, uintptr_t whole, uintptr_t table, int kind, int64_t n, int64_t m, int bits,
           int64_t group, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Leveled w = leveled(codes, stride, scales, scaling, whole, table, kind, n, m, bits, group);
    float* to = reinterpret_cast<float*>(out);
#if defined(LACONIC_X86)
    if (with == "avx512" && (w.group % 16 == 0 || w.group >= w.m)) return lookup_dense_avx512(w, to, threads);
#endif
    lookup_dense_plain(w, to, threads);
}

} // namespace

void bind_lookup(nb::module_& module) {
    module.def("lookup_linear", &linear);
    module.def("lookup_dense", &dense_of);
}
