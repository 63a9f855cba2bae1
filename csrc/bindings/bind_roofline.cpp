#include <pybind11/stl.h>

#include "bench/roofline.h"
#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"

namespace py = pybind11;

namespace foveate {

void bind_roofline(py::module_& m) {
  m.def("multiply_add", &multiply_add, py::arg("sums"), py::arg("dtype"), py::arg("steps"), py::arg("threads"), release_gil());
  m.def("read_memory", &read_memory, py::arg("x"), py::arg("sums"), py::arg("threads"), release_gil());
  m.def("copy_memory", &copy_memory, py::arg("x"), py::arg("out"), py::arg("threads"), release_gil());
}

}  // namespace foveate
