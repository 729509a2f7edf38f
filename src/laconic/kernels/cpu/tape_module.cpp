// The door to tapes: addresses and numbers, which kernels/tape.py has checked and keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "tape.h"

namespace nb = nanobind;
using namespace laconic;

namespace {

const float* floats(uintptr_t at) { return reinterpret_cast<const float*>(at); }

} // namespace

void bind_tape(nb::module_& module) {
    using Kind = Step::Kind;
    nb::class_<Tape>(module, "Tape")
        .def("__init__", [](Tape* at, const std::string& level, bool bf16, int64_t layers) { new (at) Tape(level_of(level), bf16, layers); })
        .def("norm",
             [](Tape& tape, int64_t from, int64_t to, int64_t width, int64_t heads, uintptr_t times, double eps) {
                 Step s{Kind::norm, from, to, width, heads};
                 s.values = floats(times), s.eps = float(eps);
                 return tape.add(s);
             })
        .def("linear",
             [](Tape& tape, int64_t from, int64_t to, uintptr_t codes, size_t stride, uintptr_t scales, uintptr_t zeros, size_t zero_stride, int64_t n,
                int64_t m, int bits, int64_t group, bool half, uintptr_t bias, bool int8, int64_t most) {
                 Step s{Kind::linear, from, to};
                 s.w = weight_of({codes, stride, scales, zeros, zero_stride, n, m, bits, group, half});
                 s.values = floats(bias), s.int8 = int8, s.most = most;
                 return tape.add(s);
             })
        .def("dense",
             [](Tape& tape, int64_t from, int64_t to, uintptr_t matrix, bool narrow, int64_t n, int64_t m, uintptr_t bias, int64_t most) {
                 Step s{Kind::dense, from, to, m, n};
                 s.matrix = reinterpret_cast<const void*>(matrix), s.narrow = narrow, s.values = floats(bias), s.most = most;
                 return tape.add(s);
             })
        .def("rope", [](Tape& tape, int64_t to, int64_t width, int64_t heads) { return tape.add({Kind::rope, to, to, width, heads}); })
        .def("append", [](Tape& tape, int64_t keys, int64_t values, int64_t width, int64_t heads,
                          int64_t layer) { return tape.add({Kind::append, keys, values, width, heads, layer}); })
        .def("attend",
             [](Tape& tape, int64_t from, int64_t to, int64_t width, int64_t heads, int64_t layer, int64_t groups, double scale, int64_t most) {
                 Step s{Kind::attend, from, to, width, heads, layer, groups};
                 s.scale = float(scale), s.most = most;
                 return tape.add(s);
             })
        .def("gate", [](Tape& tape, int64_t from, int64_t to, int64_t width) { return tape.add({Kind::gate, from, to, width}); })
        .def("skip",
             [](Tape& tape, int64_t from, int64_t to, int64_t width, uintptr_t least, int64_t many, uintptr_t matrix, bool narrow, int64_t n, int64_t by,
                int64_t inner, uintptr_t second, int64_t most) {
                 Step s{Kind::skip, from, to, width, n};
                 s.groups = many, s.values = floats(least), s.matrix = reinterpret_cast<const void*>(matrix), s.narrow = narrow;
                 s.by = by, s.inner = inner, s.second = reinterpret_cast<const void*>(second), s.most = most;
                 return tape.add(s);
             })
        .def("add", [](Tape& tape, int64_t from, int64_t to, int64_t width) { return tape.add({Kind::add, from, to, width}); })
        .def("outside", [](Tape& tape) { return tape.add({Kind::outside}); })
        .def("hold", &Tape::hold)
        .def("turn", &Tape::turn)
        .def("page", &Tape::page)
        .def("run", &Tape::run, nb::call_guard<nb::gil_scoped_release>());
}
