// The door to Python: addresses, shapes and strides, no headers of torch. What is handed in was checked by kernels/linear.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "linear.h"

namespace nb = nanobind;

void bind_attention(nb::module_& module);
void bind_lookup(nb::module_& module);

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

Weight weight(uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n, int64_t m, int bits, int64_t group,
              bool half) {
    const int64_t wide = group < 1 || group > m ? m : group;
    return {reinterpret_cast<const uint8_t*>(codes), stride, reinterpret_cast<const uint16_t*>(scales), reinterpret_cast<const uint8_t*>(zeros),
            zero_stride, n, m, wide, wide ? (m + wide - 1) / wide : 0, bits, half};
}

// false: x holds numbers that are not finite, and nothing was computed
bool linear(uintptr_t x, bool bf16, int64_t rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n,
            int64_t m, int bits, int64_t group, bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Product p{weight(codes, stride, scales, zeros, zero_stride, n, m, bits, group, half), reinterpret_cast<const void*>(x), bf16, rows,
                    reinterpret_cast<float*>(out), threads};
#if defined(LACONIC_X86)
    if (with == "avx512" && regular(p.w)) {
        thread_local Room room;
        Prepared q;
        q.planes = planes(bits);
        const int64_t width = 32 * q.planes;
        q.blocks = (m + width - 1) / width;
        q.groups = p.w.groups;
        q.padded = (q.groups + 15) / 16 * 16;
        q.terms = bf16 ? 1 : 2;
        const size_t bytes = size_t(rows * q.blocks * width) * 2 * size_t(q.terms), scale = size_t(rows * q.blocks + 15) / 16 * 64;
        uint8_t* at = room.of(bytes + scale + size_t(rows * q.padded) * 4);
        q.x = reinterpret_cast<int16_t*>(at);
        q.scale = reinterpret_cast<float*>(at + bytes);
        q.sums = reinterpret_cast<float*>(at + bytes + scale);
        if (!prepare_avx512(p, q)) return false;
        product_avx512(p, q);
        room.shrink();
        return true;
    }
    if (with == "avx2" && regular_avx2(p.w)) return product_avx2(p);
#endif
    product_plain(p);
    return true;
}

// the same with x rounded to 8 bits on the fly; out is bf16 where x is
bool linear_int8(uintptr_t x, bool bf16, int64_t rows, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n,
                 int64_t m, int bits, int64_t group, bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Product p{weight(codes, stride, scales, zeros, zero_stride, n, m, bits, group, half),
                    reinterpret_cast<const void*>(x),
                    bf16,
                    rows,
                    reinterpret_cast<float*>(out),
                    threads,
                    bf16 ? reinterpret_cast<uint16_t*>(out) : nullptr};
#if defined(LACONIC_X86)
    if (with == "avx512" && regular(p.w)) return int8_avx512(p);
    if (with == "avx2" && regular_avx2(p.w)) return int8_avx2(p);
#endif
    return int8_plain(p);
}

void dense(uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n, int64_t m, int bits, int64_t group,
           bool half, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
    const Weight w = weight(codes, stride, scales, zeros, zero_stride, n, m, bits, group, half);
    float* to = reinterpret_cast<float*>(out);
#if defined(LACONIC_X86)
    if (with == "avx512" && (w.group % 16 == 0 || w.group >= w.m)) return dense_avx512(w, to, threads);
    if (with == "avx2" && regular_avx2(w)) return dense_avx2(w, to, threads);
#endif
    dense_plain(w, to, threads);
}

} // namespace

NB_MODULE(_native, module) {
    module.def("best", &best);
    module.def("linear", &linear);
    module.def("linear_int8", &linear_int8);
    module.def("dense", &dense);
    bind_attention(module);
    bind_lookup(module);
}
