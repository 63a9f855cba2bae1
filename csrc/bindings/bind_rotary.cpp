#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/rotary.h"

namespace py = pybind11;

namespace foveate {

void bind_rotary(py::module_& m) {
  m.def("rotary", &rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"), py::arg("interleaved"), py::arg("inverse"),
        py::arg("threads"), release_gil());
}

}  // namespace foveate
