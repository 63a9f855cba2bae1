#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "bindings/tuple_from_python.h"
#include "ops/copy_pages.h"
#include "ops/kv_cache.h"

namespace py = pybind11;

namespace foveate {

void bind_kv_cache(py::module_& m) {
  m.def("attention_with_kv_cache", &attention_with_kv_cache, py::arg("operands"), py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("plan"), py::arg("threads"), release_gil());
  m.def("copy_pages", &copy_pages, py::arg("pool"), py::arg("from_pages"), py::arg("to_pages"), release_gil());
}

}  // namespace foveate
