#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "bindings/tuple_from_python.h"
#include "decoder/decoder.h"

namespace py = pybind11;

namespace foveate {
namespace {

Activation activation_of(const std::string& text) {
  if (text == "none") return Activation::kNone;
  if (text == "silu") return Activation::kSilu;
  if (text == "gelu_tanh") return Activation::kGeluTanh;
  if (text == "relu") return Activation::kRelu;
  fail("activation ", text, " is not one of none, silu, gelu_tanh, relu");
}

const float* floats_of(const TensorView& t, const char* what, int64_t size) {
  if (!t.defined()) return nullptr;
  expect(t, what).rank(1).size(0, size).dtype(DType::kFloat32).contiguous();
  check(t.device == DeviceType::kCPU, what, " must be on the CPU");
  return t.as<const float>();
}

// (kind "rms" or "layer", weight, bias or None, eps), or None.
Norm norm_of(const py::object& object, const char* what, int64_t size) {
  if (object.is_none()) return {};
  const auto [kind, weight, bias, eps] = object.cast<std::tuple<std::string, TensorView, TensorView, float>>();
  check(kind == "rms" || kind == "layer", what, " is of kind ", kind, ", expected rms or layer");
  return {kind == "rms" ? NormKind::kRms : NormKind::kLayer, floats_of(weight, what, size), floats_of(bias, what, size), eps};
}

// (data, bias or None, format, in, out), or None.
PackedWeight weight_of(const py::object& object) {
  if (object.is_none()) return {};
  const auto [data, bias, format, in, out] = object.cast<std::tuple<TensorView, TensorView, std::string, int64_t, int64_t>>();
  return packed_weight(data, bias, format, in, out);
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", "All layers of a causal language model in one call; python/foveate/models/native_decoder.py builds it")
      .def(py::init([](int64_t hidden, int64_t inner, int64_t heads_q, int64_t heads_kv, int64_t head_dim, double softcap,
                       const std::string& activation, py::object final_norm, TensorView rotary_cos, TensorView rotary_sin) {
             return Decoder({hidden, inner, heads_q, heads_kv, head_dim, softcap, activation_of(activation)},
                            norm_of(final_norm, "final_norm", hidden), rotary_cos, rotary_sin);
           }),
           py::arg("hidden"), py::arg("inner"), py::arg("heads_q"), py::arg("heads_kv"), py::arg("head_dim"), py::arg("softcap"),
           py::arg("activation"), py::arg("final_norm"), py::arg("rotary_cos"), py::arg("rotary_sin"))
      .def(
          "add_layer",
          [](Decoder& self, py::object attention_norm, py::object mlp_norm, py::object attention_out_norm, py::object mlp_out_norm,
             TensorView q_norm, TensorView k_norm, float head_norm_eps, py::object q, py::object k, py::object v, py::object o,
             py::object gate, py::object up, py::object down, double scale, int64_t window_left) {
            const int64_t hidden = self.sizes().hidden, head_dim = self.sizes().head_dim;
            self.add_layer({.attention_norm = norm_of(attention_norm, "attention_norm", hidden),
                            .mlp_norm = norm_of(mlp_norm, "mlp_norm", hidden),
                            .attention_out_norm = norm_of(attention_out_norm, "attention_out_norm", hidden),
                            .mlp_out_norm = norm_of(mlp_out_norm, "mlp_out_norm", hidden),
                            .q_norm = floats_of(q_norm, "q_norm", head_dim),
                            .k_norm = floats_of(k_norm, "k_norm", head_dim),
                            .head_norm_eps = head_norm_eps,
                            .q = weight_of(q),
                            .k = weight_of(k),
                            .v = weight_of(v),
                            .o = weight_of(o),
                            .gate = weight_of(gate),
                            .up = weight_of(up),
                            .down = weight_of(down),
                            .scale = scale,
                            .window_left = usable_window(window_left)});
          },
          py::kw_only(), py::arg("attention_norm"), py::arg("mlp_norm"), py::arg("attention_out_norm") = py::none(),
          py::arg("mlp_out_norm") = py::none(), py::arg("q_norm") = py::none(), py::arg("k_norm") = py::none(),
          py::arg("head_norm_eps") = 0.0f, py::arg("q"), py::arg("k") = py::none(), py::arg("v") = py::none(), py::arg("o"),
          py::arg("gate") = py::none(), py::arg("up"), py::arg("down"), py::arg("scale"), py::arg("window_left") = -1)
      .def(
          "step",
          [](const Decoder& self, TensorView x, TensorView lens, TensorView block_table, TensorView k_pages, TensorView v_pages,
             TensorView k_scale, TensorView v_scale, const DecodePlan& plan,
             Threads threads) { self.step(x, lens, block_table, {k_pages, v_pages, k_scale, v_scale}, plan, threads); },
          py::arg("x"), py::arg("lens"), py::arg("block_table"), py::arg("k_pages"), py::arg("v_pages"), py::arg("k_scale"),
          py::arg("v_scale"), py::arg("plan"), py::arg("threads"), release_gil());
}

}  // namespace foveate
