#pragma once

#include <pybind11/pybind11.h>

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
