#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "bindings/tuple_from_python.h"
#include "ops/attention.h"

namespace py = pybind11;

namespace foveate {
namespace {

void attention_backward_with_workspace(const AttentionOperands& operands, TensorView rel_buckets, TensorView dout, TensorView dlse,
                                       TensorView out, TensorView lse, const AttentionGradOperands& grads, const py::function& workspace,
                                       Threads threads) {
  py::object memory;
  Reachable reachable;
  const auto allocate = [&](int64_t bytes) {
    const py::gil_scoped_acquire gil;
    memory = workspace(bytes);
    const TensorView view = tensor_from_python(memory);
    reachable.set(view);
    return view.data;
  };
  const py::gil_scoped_release released;
  attention_backward(operands, rel_buckets, dout, dlse, out, lse, grads, allocate, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "operand_names",
      [] {
        py::dict names;
        names["Operands"] = field_names<AttentionOperands>();
        names["Gradients"] = field_names<AttentionGradOperands>();
        names["CacheOperands"] = field_names<CacheOperands>();
        names["CacheWorkspace"] = field_names<CacheWorkspace>();
        names["DecodePlan"] = field_names<DecodePlan>();
        return names;
      },
      "the fields of each NamedTuple that a function here takes, by the name of its class");
  m.def("attention_forward", &attention_forward, py::arg("operands"), py::arg("rel_buckets"), py::arg("out"), py::arg("lse"),
        py::arg("plan"), py::arg("threads"), release_gil());
  m.def("attention_backward", &attention_backward_with_workspace, py::arg("operands"), py::arg("rel_buckets"), py::arg("dout"),
        py::arg("dlse"), py::arg("out"), py::arg("lse"), py::arg("grads"), py::arg("workspace"), py::arg("threads"),
        "workspace: bytes -> a tensor of them on the device, asked for where the kernels need one");
}

}  // namespace foveate
