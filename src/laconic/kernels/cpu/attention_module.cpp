// The door to attention: a part is a list of numbers, as kernels/attention.py writes it, which has checked all of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "attention.h"
#include "blocks.h"

namespace nb = nanobind;
using namespace laconic;

namespace {

Part part(const std::vector<int64_t>& told, int64_t rows, int64_t heads) {
    size_t at = 0;
    Part p{Type(told[0]), int(told[1]), told[2], told[3], told[4], heads, told[5], {}, {}};
    for (at = 6; at < 6 + size_t(rows); at++) p.lengths.push_back(told[at]);
    for (; at + 4 <= told.size(); at += 4)
        p.pages.push_back({reinterpret_cast<const uint8_t*>(told[at]), reinterpret_cast<const uint16_t*>(told[at + 1]),
                           reinterpret_cast<const uint16_t*>(told[at + 2]), told[at + 3]});
    return p;
}

void attention(uintptr_t query, bool fine, const std::vector<int64_t>& shape, const std::vector<std::vector<int64_t>>& keys,
               const std::vector<std::vector<int64_t>>& values, const std::vector<int64_t>& lengths, uintptr_t mask, double scale, int64_t tile,
               const std::vector<int64_t>& runs, uintptr_t out, int workers, const std::string& with) {
    nb::gil_scoped_release free;
    Held h{reinterpret_cast<const float*>(query), fine, shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], {}, {}, lengths,
           reinterpret_cast<const uint8_t*>(mask), float(scale), tile, {}, reinterpret_cast<float*>(out), workers};
    for (const auto& told : keys) h.keys.push_back(part(told, h.b, h.k));
    for (const auto& told : values) h.values.push_back(part(told, h.b, h.k));
    for (size_t i = 0; i + 4 <= runs.size(); i += 4) h.runs.push_back({runs[i], runs[i + 1], runs[i + 2], runs[i + 3]});
#if defined(LACONIC_X86)
    if (with == "avx512") return attend(h, avx512_ops);
#endif
    attend(h, plain_ops);
}

// false: this processor has no kernel for it, and nothing was computed; shape: b, h, k, t, s, d, v
bool block_attention(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t keep, const std::vector<int64_t>& shape, int64_t block, bool bf16,
                     double scale, uintptr_t out, int threads, const std::string& with) {
    nb::gil_scoped_release free;
#if defined(LACONIC_X86)
    const auto at = [](uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); };
    const Blocks p{at(query), at(key), at(value), at(keep), shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], block,
                   float(scale), reinterpret_cast<uint8_t*>(out), threads};
    if (with == "avx512" && (!bf16 || pairs())) {
        (bf16 ? blocks_bf16 : blocks_avx512)(p);
        return true;
    }
#endif
    return false;
}

} // namespace

void bind_attention(nb::module_& module) {
    module.def("attention", &attention);
    module.def("block_attention", &block_attention);
}
