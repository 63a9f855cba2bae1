#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/glu.h"

namespace py = pybind11;

namespace foveate {

void bind_glu(py::module_& m) {
  m.def("glu_forward", &glu_forward, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("gelu"), py::arg("threads"), release_gil());
  m.def("glu_backward", &glu_backward, py::arg("dout"), py::arg("gate"), py::arg("up"), py::arg("dgate"), py::arg("dup"), py::arg("gelu"),
        py::arg("threads"), release_gil());
}

}  // namespace foveate
