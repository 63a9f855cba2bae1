#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/loss.h"

namespace py = pybind11;

namespace foveate {

void bind_loss(py::module_& m) {
  m.def(
      "cross_entropy_forward",
      [](TensorView logits, TensorView target, TensorView loss, TensorView stats, int64_t ignore_index, double label_smoothing,
         double z_loss, double softcap, Threads threads) {
        cross_entropy_forward(logits, target, loss, stats, {ignore_index, label_smoothing, z_loss, softcap}, threads);
      },
      py::arg("logits"), py::arg("target"), py::arg("loss"), py::arg("stats"), py::arg("ignore_index"), py::arg("label_smoothing"),
      py::arg("z_loss"), py::arg("softcap"), py::arg("threads"), release_gil());
  m.def(
      "cross_entropy_backward",
      [](TensorView dloss, TensorView logits, TensorView target, TensorView stats, TensorView dlogits, int64_t ignore_index,
         double label_smoothing, double z_loss, double softcap, Threads threads) {
        cross_entropy_backward(dloss, logits, target, stats, dlogits, {ignore_index, label_smoothing, z_loss, softcap}, threads);
      },
      py::arg("dloss"), py::arg("logits"), py::arg("target"), py::arg("stats"), py::arg("dlogits"), py::arg("ignore_index"),
      py::arg("label_smoothing"), py::arg("z_loss"), py::arg("softcap"), py::arg("threads"), release_gil());
}

}  // namespace foveate
