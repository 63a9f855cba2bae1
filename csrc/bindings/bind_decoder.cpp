#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "bindings/tuple_from_python.h"
#include "decoder/decoder.h"
#include "ops/linear.h"

namespace py = pybind11;

namespace foveate {
namespace {

Activation activation_of(const std::string& text) {
  constexpr std::pair<const char*, Activation> kNames[] = {
      {"none", Activation::kNone},          {"silu", Activation::kSilu},
      {"gelu_tanh", Activation::kGeluTanh}, {"relu", Activation::kRelu},
      {"gelu", Activation::kGelu},          {"relu2", Activation::kRelu2},
      {"tanh", Activation::kTanh},          {"clamped_silu", Activation::kClampedSilu}};
  for (const auto& [name, activation] : kNames)
    if (text == name) return activation;
  fail("activation ", text, " is not one of none, silu, gelu_tanh, relu, gelu, relu2, tanh, clamped_silu");
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

// (as norm_of, joint), or None; weights of `all` elements are of each head's own.
HeadNorm head_norm_of(const py::object& object, const char* what, int64_t head_dim, int64_t all) {
  if (object.is_none()) return {};
  const auto [kind, weight, bias, eps, joint] = object.cast<std::tuple<std::string, TensorView, TensorView, float, bool>>();
  const bool own = weight.defined() && weight.shape[0] == all && all != head_dim;
  return {norm_of(py::make_tuple(kind, object.cast<py::tuple>()[1], object.cast<py::tuple>()[2], eps), what, joint || own ? all : head_dim),
          joint, own && !joint};
}

// (data, bias or None, format, in, out), or None.
PackedWeight weight_of(const py::object& object) {
  if (object.is_none()) return {};
  const auto [data, bias, format, in, out] = object.cast<std::tuple<TensorView, TensorView, std::string, int64_t, int64_t>>();
  return packed_weight(data, bias, format, in, out);
}

// (gate or None, up, down), or None.
MlpWeights mlp_of(const py::object& object) {
  if (object.is_none()) return {};
  const auto [gate, up, down] = object.cast<std::tuple<py::object, py::object, py::object>>();
  return {weight_of(gate), weight_of(up), weight_of(down)};
}

// ((A, B) as of weight_of, or None) of each of a layer's products, in the order of Adapted; of all layers.
Adapter adapter_of(const std::vector<std::vector<py::object>>& layers) {
  Adapter made;
  for (const std::vector<py::object>& products : layers) {
    check(products.size() == kAdaptedProducts, "a layer of an adapter has ", products.size(), " products, expected ", +kAdaptedProducts);
    LayerUpdates& updates = made.layers.emplace_back();
    for (size_t i = 0; i < products.size(); ++i) {
      if (products[i].is_none()) continue;
      const auto [a, b] = products[i].cast<std::pair<py::object, py::object>>();
      updates.of[i] = {weight_of(a), weight_of(b)};
      check(updates.of[i].defined() && updates.of[i].b.data, "an adapter's A or B is missing");
      made.rank = std::max(made.rank, updates.of[i].a.out);
    }
  }
  return made;
}

RouterKind router_kind_of(const std::string& text) {
  if (text == "softmax") return RouterKind::kSoftmax;
  if (text == "top") return RouterKind::kTop;
  if (text == "sigmoid") return RouterKind::kSigmoid;
  fail("router ", text, " is not one of softmax, top, sigmoid");
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<Adapter>(m, "DecoderAdapter", "A LoRA adapter of all layers; python/foveate/models/native_adapter.py builds it")
      .def(py::init(&adapter_of), py::arg("layers"));
  py::class_<Decoder>(m, "Decoder", "All layers of a causal language model in one call; python/foveate/models/native_decoder.py builds it")
      .def(py::init([](int64_t hidden, int64_t heads_q, int64_t heads_kv, int64_t head_dim, double softcap, const std::string& activation,
                       float activation_limit, py::object final_norm, const std::vector<std::pair<TensorView, TensorView>>& rotary) {
             std::vector<RotaryTable> tables;
             for (const auto& [cos, sin] : rotary) tables.push_back({cos, sin});
             return Decoder({hidden, heads_q, heads_kv, head_dim, softcap, activation_of(activation), activation_limit},
                            norm_of(final_norm, "final_norm", hidden), tables);
           }),
           py::kw_only(), py::arg("hidden"), py::arg("heads_q"), py::arg("heads_kv"), py::arg("head_dim"), py::arg("softcap"),
           py::arg("activation"), py::arg("activation_limit"), py::arg("final_norm"), py::arg("rotary"))
      .def(
          "add_layer",
          [](Decoder& self, py::object attention_norm, py::object attention_out_norm, py::object mlp_norm, py::object mlp_out_norm,
             py::object q, py::object k, py::object v, py::object o, float clip, py::object q_norm, py::object k_norm,
             bool norms_after_rotary, int64_t rotary, bool interleaved, double scale, int64_t window_left, TensorView alibi,
             TensorView sinks, py::object mlp, bool parallel, float residual_scale) {
            const DecoderSizes& s = self.sizes();
            const AttentionPart attention{.norm = norm_of(attention_norm, "attention_norm", s.hidden),
                                          .out_norm = norm_of(attention_out_norm, "attention_out_norm", s.hidden),
                                          .q = weight_of(q),
                                          .k = weight_of(k),
                                          .v = weight_of(v),
                                          .o = weight_of(o),
                                          .clip = clip,
                                          .q_norm = head_norm_of(q_norm, "q_norm", s.head_dim, s.heads_q * s.head_dim),
                                          .k_norm = head_norm_of(k_norm, "k_norm", s.head_dim, s.heads_kv * s.head_dim),
                                          .norms_after_rotary = norms_after_rotary,
                                          .rotary = rotary,
                                          .interleaved = interleaved,
                                          .scale = scale,
                                          .window_left = usable_window(window_left),
                                          .alibi = floats_of(alibi, "alibi", s.heads_q),
                                          .sinks = floats_of(sinks, "sinks", s.heads_q)};
            self.add_layer({.attention = attention,
                            .mlp_norm = norm_of(mlp_norm, "mlp_norm", s.hidden),
                            .mlp_out_norm = norm_of(mlp_out_norm, "mlp_out_norm", s.hidden),
                            .mlp = mlp_of(mlp),
                            .experts = {},
                            .parallel = parallel,
                            .residual_scale = residual_scale});
          },
          py::kw_only(), py::arg("attention_norm") = py::none(), py::arg("attention_out_norm") = py::none(),
          py::arg("mlp_norm") = py::none(), py::arg("mlp_out_norm") = py::none(), py::arg("q"), py::arg("k") = py::none(),
          py::arg("v") = py::none(), py::arg("o"), py::arg("clip") = 0.0f, py::arg("q_norm") = py::none(), py::arg("k_norm") = py::none(),
          py::arg("norms_after_rotary") = false, py::arg("rotary") = -1, py::arg("interleaved") = false, py::arg("scale"),
          py::arg("window_left") = -1, py::arg("alibi") = py::none(), py::arg("sinks") = py::none(), py::arg("mlp") = py::none(),
          py::arg("parallel") = false, py::arg("residual_scale") = 1.0f)
      .def(
          "add_experts",
          [](Decoder& self, py::object router, const std::string& kind, TensorView choice_bias, int64_t per_token, int64_t groups,
             int64_t top_groups, bool normalize, float scale, const std::vector<py::object>& experts, py::object shared,
             py::object shared_gate) {
            ExpertsPart part{.router = {.weight = weight_of(router),
                                        .kind = router_kind_of(kind),
                                        .choice_bias = floats_of(choice_bias, "choice_bias", static_cast<int64_t>(experts.size())),
                                        .per_token = per_token,
                                        .groups = groups,
                                        .top_groups = top_groups,
                                        .normalize = normalize,
                                        .scale = scale},
                             .experts = {},
                             .shared = mlp_of(shared),
                             .shared_gate = weight_of(shared_gate)};
            for (const py::object& expert : experts) part.experts.push_back(mlp_of(expert));
            self.add_experts(part);
          },
          py::kw_only(), py::arg("router"), py::arg("kind"), py::arg("choice_bias") = py::none(), py::arg("per_token"),
          py::arg("groups") = 1, py::arg("top_groups") = 1, py::arg("normalize") = false, py::arg("scale") = 1.0f, py::arg("experts"),
          py::arg("shared") = py::none(), py::arg("shared_gate") = py::none())
      .def(
          "step",
          [](const Decoder& self, TensorView x, TensorView lens, TensorView block_table, TensorView k_pages, TensorView v_pages,
             TensorView k_scale, TensorView v_scale, const DecodePlan& plan, Threads threads,
             const std::vector<std::tuple<const Adapter*, int64_t, int64_t>>& adapters) {
            std::vector<AdapterTokens> parts;
            for (const auto& [adapter, first, tokens] : adapters)
              check(adapter, "an adapter of the step is None"), parts.push_back({adapter, first, tokens});
            self.step(x, lens, block_table, {k_pages, v_pages, k_scale, v_scale}, plan, threads, parts);
          },
          py::arg("x"), py::arg("lens"), py::arg("block_table"), py::arg("k_pages"), py::arg("v_pages"), py::arg("k_scale"),
          py::arg("v_scale"), py::arg("plan"), py::arg("threads"),
          py::arg("adapters") = std::vector<std::tuple<const Adapter*, int64_t, int64_t>>{}, release_gil());
}

}  // namespace foveate
