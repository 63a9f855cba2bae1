// softmax(scale * q k^T + bias ...) v, dense and varlen, forward and backward: the operands of a call, and what the kernels read after
// ops/attention.cpp has checked them. python/foveate/backend/reference/attention.py defines the meaning of each option.
#pragma once

#include <tuple>

#include "core/fields.h"
#include "core/tensor.h"

namespace foveate {

// python/foveate/ops/attention/operands.py: Operands, which has the shapes. What is not given is an undefined view.
struct AttentionOperands {
  TensorView q, k, v, bias, mask, alibi, rel_table, sinks;
  TensorView kv_lens, cu_q, cu_k;  // int32 or int64
  TensorView philox;
  int64_t max_q = 0, max_k = 0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double scale = 1, softcap = 0, dropout_p = 0;
  bool deterministic = true;  // of the backward: equal calls give bitwise equal gradients

  static constexpr auto fields() {
    using A = AttentionOperands;
    return std::tuple{Field{"q", &A::q},
                      Field{"k", &A::k},
                      Field{"v", &A::v},
                      Field{"bias", &A::bias},
                      Field{"mask", &A::mask},
                      Field{"alibi", &A::alibi},
                      Field{"rel_table", &A::rel_table},
                      Field{"sinks", &A::sinks},
                      Field{"kv_lens", &A::kv_lens},
                      Field{"cu_q", &A::cu_q},
                      Field{"cu_k", &A::cu_k},
                      Field{"philox", &A::philox},
                      Field{"max_q", &A::max_q},
                      Field{"max_k", &A::max_k},
                      Field{"causal", &A::causal},
                      Field{"window_left", &A::window_left},
                      Field{"window_right", &A::window_right},
                      Field{"scale", &A::scale},
                      Field{"softcap", &A::softcap},
                      UnreadField{"rel_bidirectional"},  // in the buckets
                      UnreadField{"rel_max_distance"},
                      Field{"dropout_p", &A::dropout_p},
                      Field{"deterministic", &A::deterministic},
                      UnreadField{"backend"}};
  }
};

// Gradients of the same file: where those that are wanted go.
struct AttentionGradOperands {
  TensorView q, k, v, bias, rel_table, sinks;

  static constexpr auto fields() {
    using A = AttentionGradOperands;
    return std::tuple{
        Field{"q", &A::q},        Field{"k", &A::k}, Field{"v", &A::v}, Field{"bias", &A::bias}, Field{"rel_table", &A::rel_table},
        Field{"sinks", &A::sinks}};
  }
};

// Head dims that the blocked kernels take; decode takes more. 576: the widest that models use (MLA).
constexpr int64_t kMaxHeadDim = 576, kMaxCudaHeadDim = 256;

// A [batch, seq, head, dim] operand with contiguous dim; strides in elements. In varlen, batch is 0 and cu_seqlens move along seq.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, seq = 0, head = 0;
};

// A window beyond every sequence is none; sums of positions and windows fit 64 bits.
[[gnu::always_inline]] constexpr int64_t usable_window(int64_t window) {
  constexpr int64_t kMost = int64_t{1} << 40;
  return window < 0 || window > kMost ? -1 : window;
}

// Added to or masking the scores, broadcast to [B, Hq, Sq, Skv] by strides of 0.
struct ScoreOperand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {};
  bool defined() const { return data != nullptr; }
};

// What every attention kernel is asked: forward, backward and decode. "acc" is float, and double where dtype is float64.
struct AttentionProblem {
  Rows q, k, v, out;  // q [B, Sq, Hq, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv], out [B, Sq, Hq, Dv]
  Rows lse;  // acc; natural log, without the sink: [B, Hq, Sq], varlen [Hq, total_q]; seq stride 1; data may be null
  ScoreOperand bias;  // added
  ScoreOperand mask;  // bool, true = keep
  const float* alibi = nullptr;  // slopes, [B, Hq] by the strides below
  int64_t alibi_batch = 0, alibi_head = 0;
  const void* sinks = nullptr;  // acc [Hq]
  const int32_t* kv_lens = nullptr;  // [B]; sequence b has kv_lens[b] + new_keys keys; null: seq_kv
  int64_t new_keys = 0;
  const int32_t* block_table = nullptr;  // [B, max_pages] of a paged k/v [pages, page_size, Hkv, D]: Rows.batch is the page stride
  int64_t block_table_stride = 0, page_size = 0, pages = 0;
  int64_t batch = 0, heads_q = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  int64_t seq_q = 0, seq_kv = 0;  // the longest in varlen; seq_kv of a cache: the keys that a sequence may have
  double scale = 1, softcap = 0;  // softcap 0: none
  bool causal = false;
  int64_t window_left = -1, window_right = -1;  // -1: unlimited
  DType dtype = DType::kFloat32;
};

struct AttentionParams : AttentionProblem {
  const void* rel_table = nullptr;  // acc [rel_num_buckets, Hq]
  const int32_t* rel_buckets = nullptr;  // [seq_q + seq_kv - 1]: bucket of distance (index - (seq_kv - 1))
  int rel_num_buckets = 0;
  const int32_t *cu_q = nullptr, *cu_k = nullptr;  // [B + 1], varlen only
  int64_t total_q = 0, total_k = 0;  // rows of the packed tensors, varlen only
  double dropout_p = 0;
  uint64_t philox_seed = 0;
  uint32_t philox_offset = 0;
  const int64_t* philox = nullptr;  // [2], seed and offset in the memory of the GPU, where it cannot be read here
};

struct AttentionGrads {
  Rows dout;  // [B, Sq, Hq, Dv]
  const void* dlse = nullptr;  // acc, strides of p.lse
  Rows dq, dk, dv;  // as q, k, v; data may be null: not wanted
  void* dbias = nullptr;  // acc, contiguous over the broadcast shape of bias: dbias_stride is 0 where bias broadcasts
  int64_t dbias_stride[4] = {}, dbias_numel = 0;
  void *drel_table = nullptr, *dsinks = nullptr;  // acc [rel_num_buckets, Hq], acc [Hq]
  bool deterministic = true;  // equal calls give bitwise equal gradients
};

}  // namespace foveate
