#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/norm.h"

namespace py = pybind11;

namespace foveate {

void bind_norm(py::module_& m) {
  m.def("rms_norm_forward", &rms_norm_forward, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("out"), py::arg("sum"),
        py::arg("rstd"), py::arg("eps"), py::arg("threads"), release_gil());
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("dout"), py::arg("x"), py::arg("weight"), py::arg("rstd"), py::arg("dsum"),
        py::arg("dx"), py::arg("dweight_parts"), py::arg("threads"), release_gil());
}

}  // namespace foveate
