// The door to Python: addresses, shapes and strides, no headers of torch. What is handed in was checked by kernels/linear.py,
// skipping.py and grids.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "clip.h"
#include "linear.h"
#include "skip.h"

namespace nb = nanobind;

void bind_attention(nb::module_& module);
void bind_lookup(nb::module_& module);
void bind_sparse(nb::module_& module);
void bind_tape(nb::module_& module);
void bind_vectors(nb::module_& module);

using namespace laconic;

namespace {

// the best that this processor can run
std::string best() {
#if defined(LACONIC_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "plain";
}

// whether it multiplies pairs of bf16, and whether that is its quickest way
bool paired() {
#if defined(LACONIC_X86)
    return best() == "avx512" && pairs();
#else
    return false;
#endif
}
bool only_paired() {
#if defined(LACONIC_X86)
    return best() == "avx512" && only_pairs();
#else
    return false;
#endif
}

// false: x holds numbers that are not finite, and nothing was computed; out is bf16 where x is
bool linear(uintptr_t x, bool bf16, int64_t rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n,
            int64_t m, int bits, int64_t group, bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    return multiply({weight_of({codes, stride, scales, zeros, zero_stride, n, m, bits, group, half}), reinterpret_cast<const void*>(x), bf16, rows,
                     reinterpret_cast<float*>(out), threads, bf16 ? reinterpret_cast<uint16_t*>(out) : nullptr},
                    level_of(with));
}

// the same with x rounded to 8 bits on the fly
bool linear_int8(uintptr_t x, bool bf16, int64_t rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n,
                 int64_t m, int bits, int64_t group, bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    return multiply_int8({weight_of({codes, stride, scales, zeros, zero_stride, n, m, bits, group, half}), reinterpret_cast<const void*>(x), bf16, rows,
                          reinterpret_cast<float*>(out), threads, bf16 ? reinterpret_cast<uint16_t*>(out) : nullptr},
                         level_of(with));
}

void dense_of(uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n, int64_t m, int bits, int64_t group,
              bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    dense(weight_of({codes, stride, scales, zeros, zero_stride, n, m, bits, group, half}), reinterpret_cast<float*>(out), threads, level_of(with));
}

// numbers with the rows of a matrix whose factor is not zero; up and bias are 0 where there are none
void skip_of(uintptr_t a, uintptr_t x, uintptr_t up, uintptr_t bias, uintptr_t down, bool narrow, int64_t rows, int64_t m, int64_t h, int64_t n,
             uintptr_t out, int threads) {
    nb::gil_scoped_release free;
    skip({reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(x), reinterpret_cast<const void*>(up), reinterpret_cast<const float*>(bias),
          reinterpret_cast<const void*>(down), narrow, rows, m, h, n, reinterpret_cast<float*>(out), threads});
}

// how much runs of weights err with each of several scales
void clip_losses(uintptr_t runs, uintptr_t weigh, const std::vector<uintptr_t>& tried, const std::vector<int64_t>& sizes, float top, uintptr_t out,
                 int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const auto of = [](uintptr_t at) { return reinterpret_cast<const float*>(at); };
    const Clip p{of(runs), of(weigh), of(tried[0]), of(tried[1]), of(tried[2]), of(tried[3]), sizes[0], sizes[1], sizes[2], sizes[3], top,
                 reinterpret_cast<float*>(out), threads};
#if defined(LACONIC_X86)
    if (with == "avx512") return clip_avx512(p);
    if (with == "avx2") return clip_avx2(p);
#endif
    (void)with;
    clip_plain(p);
}

} // namespace

NB_MODULE(_native, module) {
    module.def("best", &best);
    module.def("pairs", &paired);
    module.def("only_pairs", &only_paired);
    module.def("linear", &linear);
    module.def("linear_int8", &linear_int8);
    module.def("dense", &dense_of);
    module.def("skip", &skip_of);
    module.def("clip_losses", &clip_losses);
    bind_attention(module);
    bind_lookup(module);
    bind_sparse(module);
    bind_tape(module);
    bind_vectors(module);
}
