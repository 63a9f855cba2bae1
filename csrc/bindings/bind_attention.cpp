#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/attention.h"

namespace py = pybind11;

namespace foveate {

// The options in one order for both directions; python/foveate/ops/attention/op.py passes them by position.
#define OPTIONS_OF                                                                                                                        \
  TensorView bias, TensorView mask, TensorView alibi, TensorView rel_table, TensorView rel_buckets, TensorView sinks, TensorView kv_lens, \
      TensorView cu_q, TensorView cu_k, TensorView philox, int64_t max_q, int64_t max_k, bool causal, int64_t window_left,                \
      int64_t window_right, double scale, double softcap, double dropout_p, Threads threads

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, OPTIONS_OF) {
        attention_forward(q, k, v, out, lse,
                          {bias, mask, alibi, rel_table, rel_buckets, sinks, kv_lens, cu_q, cu_k, philox, max_q, max_k, causal, window_left,
                           window_right, scale, softcap, dropout_p},
                          threads);
      },
      release_gil());
  m.def(
      "attention_backward",
      [](TensorView dout, TensorView dlse, TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, TensorView dq,
         TensorView dk, TensorView dv, TensorView dbias, TensorView drel_table, TensorView dsinks, const py::function& workspace,
         bool deterministic, OPTIONS_OF) {
        py::object kept;
        Reachable reachable;
        const auto allocate = [&](int64_t bytes) {
          const py::gil_scoped_acquire gil;
          kept = workspace(bytes);
          const TensorView view = tensor_from_python(kept);
          reachable.set(view);
          return view.data;
        };
        const py::gil_scoped_release released;
        attention_backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias, drel_table, dsinks, allocate,
                           {bias, mask, alibi, rel_table, rel_buckets, sinks, kv_lens, cu_q, cu_k, philox, max_q, max_k, causal,
                            window_left, window_right, scale, softcap, dropout_p, deterministic},
                           threads);
      },
      "workspace: bytes -> a tensor of them on the device, asked for where the kernels need one");
}

}  // namespace foveate
