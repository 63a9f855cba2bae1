// attention and attention_varlen: views -> checks -> AttentionParams -> kernels.
#pragma once

#include <functional>

#include "contract/attention.h"
#include "core/tensor.h"

namespace foveate {

// What Python passes beside the tensors; the views become pointers of AttentionParams once their memory is checked.
struct AttentionOptions {
  TensorView bias, mask, alibi, rel_table, rel_buckets, sinks, kv_lens, cu_q, cu_k, philox;  // lengths int32 or int64
  int64_t max_q = 0, max_k = 0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double scale = 1, softcap = 0, dropout_p = 0;
  bool deterministic = true;  // of the backward: equal calls give bitwise equal results
};

// Bytes -> memory on the device of the call, which its caller keeps until the kernels that were launched with it are queued.
using Allocate = std::function<void*(int64_t)>;

void attention_forward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, const AttentionOptions& options,
                       Threads threads);
void attention_backward(TensorView dout, TensorView dlse, TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse,
                        TensorView dq, TensorView dk, TensorView dv, TensorView dbias, TensorView drel_table, TensorView dsinks,
                        const Allocate& allocate, const AttentionOptions& options, Threads threads);

}  // namespace foveate
