#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "bindings/tensor_from_python.h"
#include "ops/copy_pages.h"
#include "ops/kv_cache.h"

namespace py = pybind11;

namespace foveate {
namespace {

void attention_with_kv_cache_flat(TensorView q, TensorView k_cache, TensorView v_cache, TensorView k, TensorView v, TensorView kv_lens,
                                  TensorView out, TensorView lse, TensorView partial_out, TensorView partial_lse, TensorView q_rotated,
                                  TensorView counters, TensorView block_table, TensorView rotary_cos, TensorView rotary_sin,
                                  bool rotary_interleaved, TensorView k_scale, TensorView v_scale, bool k_scale_per_token,
                                  bool v_scale_per_token, TensorView alibi, TensorView sinks, bool causal, int64_t window_left,
                                  int64_t window_right, double scale, double softcap, int64_t num_splits, int64_t keys_per_split,
                                  int64_t rows_per_task, int64_t heads_per_task, bool blocked, Threads threads) {
  const KvCacheOptions options{counters,
                               block_table,
                               rotary_cos,
                               rotary_sin,
                               k_scale,
                               v_scale,
                               alibi,
                               sinks,
                               rotary_interleaved,
                               k_scale_per_token,
                               v_scale_per_token,
                               causal,
                               window_left,
                               window_right,
                               scale,
                               softcap,
                               {num_splits, keys_per_split, rows_per_task, heads_per_task},
                               blocked};
  attention_with_kv_cache(q, k_cache, v_cache, k, v, kv_lens, out, lse, partial_out, partial_lse, q_rotated, options, threads);
}

}  // namespace

void bind_kv_cache(py::module_& m) {
  m.def("attention_with_kv_cache", &attention_with_kv_cache_flat, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("k"),
        py::arg("v"), py::arg("kv_lens"), py::arg("out"), py::arg("lse"), py::arg("partial_out"), py::arg("partial_lse"),
        py::arg("q_rotated"), py::arg("counters"), py::arg("block_table"), py::arg("rotary_cos"), py::arg("rotary_sin"),
        py::arg("rotary_interleaved"), py::arg("k_scale"), py::arg("v_scale"), py::arg("k_scale_per_token"), py::arg("v_scale_per_token"),
        py::arg("alibi"), py::arg("sinks"), py::arg("causal"), py::arg("window_left"), py::arg("window_right"), py::arg("scale"),
        py::arg("softcap"), py::arg("num_splits"), py::arg("keys_per_split"), py::arg("rows_per_task"), py::arg("heads_per_task"),
        py::arg("blocked"), py::arg("threads"), release_gil());
  m.def("copy_pages", &copy_pages, py::arg("pool"), py::arg("from_pages"), py::arg("to_pages"), release_gil());
}

}  // namespace foveate
