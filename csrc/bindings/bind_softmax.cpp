#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/softmax.h"

namespace py = pybind11;

namespace foveate {

void bind_softmax(py::module_& m) {
  m.def("softmax_forward", &softmax_forward, py::arg("x"), py::arg("bias"), py::arg("mask"), py::arg("out"), py::arg("scale"),
        py::arg("causal"), py::arg("log"), py::arg("threads"), release_gil());
  m.def("softmax_backward", &softmax_backward, py::arg("dout"), py::arg("out"), py::arg("dx"), py::arg("scale"), py::arg("log"),
        py::arg("threads"), release_gil());
  m.def("softmax_columns_forward", &softmax_columns_forward, py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("log"),
        py::arg("threads"), release_gil());
  m.def("softmax_columns_backward", &softmax_columns_backward, py::arg("dout"), py::arg("out"), py::arg("dx"), py::arg("scale"),
        py::arg("log"), py::arg("threads"), release_gil());
}

}  // namespace foveate
