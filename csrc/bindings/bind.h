#pragma once

#include <pybind11/pybind11.h>

#include "core/threads.h"

namespace foveate {

// Converting the arguments needs the GIL, the kernel does not: the guard is entered between the two.
using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_attention(pybind11::module_& m);
void bind_loss(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_kv_cache(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_glu(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_roofline(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);

}  // namespace foveate

namespace pybind11::detail {

// Any integer of Python; one that is no number of threads raises.
template <>
struct type_caster<foveate::Threads> {
  PYBIND11_TYPE_CASTER(foveate::Threads, make_caster<int64_t>::name);
  bool load(handle source, bool convert) {
    make_caster<int64_t> count;
    if (!count.load(source, convert)) return false;
    value = foveate::Threads(cast_op<int64_t>(count));
    return true;
  }
};

}  // namespace pybind11::detail
