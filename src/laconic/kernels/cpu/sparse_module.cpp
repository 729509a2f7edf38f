// The door to sparse products: addresses and shapes that kernels/sparse.py has checked, but for what only all starts say together.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "sparse.h"

namespace nb = nanobind;
using namespace laconic;

namespace {

// what a vector kernel here needs beyond what "avx512" means everywhere; every processor with VNNI and VBMI that is sold has it
bool spreads() {
#if defined(LACONIC_X86)
    return __builtin_cpu_supports("avx512vbmi2");
#else
    return false;
#endif
}

// told: of numbers where they are and their type; of codes what `linear` is told of a weight, n first
Sparse sparse(uintptr_t mask, size_t stride, uintptr_t starts, int64_t n, int64_t m, const std::vector<int64_t>& told) {
    Sparse w{reinterpret_cast<const uint8_t*>(mask), stride, reinterpret_cast<const int64_t*>(starts), n, m, Type::fp32, nullptr, {}};
    // of no numbers at all torch gives no address
    static const float none = 0.0f;
    if (told.size() == 3) w.values = told[0] ? reinterpret_cast<const void*>(told[0]) : &none, w.type = Type(told[1]);
    else {
        const int64_t wide = told[8] < 1 || told[8] > told[6] ? told[6] : told[8];
        w.codes = {reinterpret_cast<const uint8_t*>(told[0]), size_t(told[1]), reinterpret_cast<const uint16_t*>(told[2]),
                   reinterpret_cast<const uint8_t*>(told[3]), size_t(told[4]), told[5], told[6], wide, wide ? (told[6] + wide - 1) / wide : 0,
                   int(told[7]), bool(told[9])};
    }
    return w;
}

// whether starts and what is stored belong together, so that nothing is read that is not there
bool sound(const Sparse& w, const std::vector<int64_t>& told) {
    const int64_t count = told.size() == 3 ? told[2] : told[5] * told[6];
    bool good = w.starts[0] == 0 && w.total() == count;
    const bool own = told.size() != 3 && w.codes.n == w.n;
    for (int64_t i = 0; i < w.n; i++) good = good && w.count(i) >= 0 && w.count(i) <= w.m && (!own || w.count(i) == w.codes.m);
    return good;
}

// whether starts are those of the mask
bool counted(const Sparse& w) {
    std::vector<int64_t> right(size_t(w.n) + 1);
    starts_plain(w.mask, w.stride, w.n, w.m, right.data());
    return std::equal(right.begin(), right.end(), w.starts);
}

// false: starts are not those of the values, and nothing was computed
bool product(uintptr_t x, bool bf16, int64_t rows, uintptr_t mask, size_t stride, uintptr_t starts, int64_t n, int64_t m,
             const std::vector<int64_t>& told, uintptr_t out, bool narrow, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Sparse w = sparse(mask, stride, starts, n, m, told);
    if (!sound(w, told)) return false;
    const SparseProduct p{w, reinterpret_cast<const void*>(x), bf16, rows, narrow ? nullptr : reinterpret_cast<float*>(out),
                          narrow ? reinterpret_cast<uint16_t*>(out) : nullptr, threads};
#if defined(LACONIC_X86)
    if (with == "avx512" && spreads()) {
        if (bf16 && pairs()) sparse_bf16(p);
        else sparse_avx512(p);
        return true;
    }
#endif
    sparse_plain(p);
    return true;
}

// rows of the matrix: those of an index (its address), or from the first on
bool rows_of(uintptr_t mask, size_t stride, uintptr_t starts, int64_t n, int64_t m, const std::vector<int64_t>& told, uintptr_t index, int64_t first,
             int64_t count, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Sparse w = sparse(mask, stride, starts, n, m, told);
    if (!sound(w, told)) return false;
    const SparseRows p{w, reinterpret_cast<const int64_t*>(index), first, count, reinterpret_cast<float*>(out), threads};
#if defined(LACONIC_X86)
    if (with == "avx512" && spreads()) {
        sparse_rows_avx512(p);
        return true;
    }
#endif
    sparse_rows_plain(p);
    return true;
}

// of every pixel, whatever the processor
bool pixels_of(uintptr_t x, int64_t images, int64_t pixels, uintptr_t mask, size_t stride, uintptr_t starts, int64_t n, int64_t m,
               const std::vector<int64_t>& told, uintptr_t out, int threads) {
    nb::gil_scoped_release free;
    const Sparse w = sparse(mask, stride, starts, n, m, told);
    if (!sound(w, told) || !counted(w)) return false;
    sparse_pixels({w, reinterpret_cast<const float*>(x), images, pixels, reinterpret_cast<float*>(out), threads});
    return true;
}

void starts(uintptr_t mask, size_t stride, int64_t n, int64_t m, uintptr_t out) {
    nb::gil_scoped_release free;
    starts_plain(reinterpret_cast<const uint8_t*>(mask), stride, n, m, reinterpret_cast<int64_t*>(out));
}

} // namespace

void bind_sparse(nb::module_& module) {
    module.def("sparse_linear", &product);
    module.def("sparse_rows", &rows_of);
    module.def("sparse_pixels", &pixels_of);
    module.def("sparse_starts", &starts);
}
