// attention and attention_varlen: operands -> checks -> AttentionParams -> kernels.
#pragma once

#include <functional>

#include "contract/attention.h"
#include "contract/kv_cache.h"
#include "core/tensor.h"

namespace foveate {

// Bytes -> memory on the device of the call, which its caller keeps until the kernels that were launched with it are queued.
using Allocate = std::function<void*(int64_t)>;

// rel_buckets, with a rel_table: int32 [max_q + max_k - 1], entry t is the bucket of distance t - (max_k - 1).
// plan: of the CPU's kernels; blocked, or a division for the decode kernel, which knows no cu_q, rel_table and dropout and no float64.
void attention_forward(const AttentionOperands& operands, TensorView rel_buckets, TensorView out, TensorView lse, const DecodePlan& plan,
                       Threads threads);
void attention_backward(const AttentionOperands& operands, TensorView rel_buckets, TensorView dout, TensorView dlse, TensorView out,
                        TensorView lse, const AttentionGradOperands& grads, const Allocate& allocate, Threads threads);

}  // namespace foveate
