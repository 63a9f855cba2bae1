#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/linear.h"

namespace py = pybind11;

namespace foveate {

void bind_linear(py::module_& m) {
  m.def("packed_linear", &packed_linear, py::arg("x"), py::arg("data"), py::arg("format"), py::arg("bias"), py::arg("out"),
        py::arg("threads"), release_gil());
  m.def("packed_rows", &packed_rows, py::arg("data"), py::arg("format"), py::arg("in_features"), py::arg("out_features"), py::arg("ids"),
        py::arg("out"), py::arg("threads"), release_gil());
}

}  // namespace foveate
