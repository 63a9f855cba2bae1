// Attention against a KV cache, dense or paged: append the new keys and values in place, then attend to all of them.
// python/foveate/backend/reference/attention.py (attention_with_kv_cache) defines the meaning.
#pragma once

#include <tuple>

#include "contract/attention.h"
#include "core/fields.h"
#include "core/tensor.h"

namespace foveate {

// python/foveate/ops/attention/cache_operands.py: CacheOperands, which has the shapes. What is not given is an undefined view.
struct CacheOperands {
  TensorView q, k_cache, v_cache, k, v;
  TensorView kv_lens;  // int32 or int64
  TensorView block_table, rotary_cos, rotary_sin;
  bool rotary_interleaved = false, causal = true;
  int64_t window_left = -1, window_right = -1;
  double scale = 1, softcap = 0;
  TensorView alibi_slopes, sinks;
  TensorView k_scale, v_scale;  // of int8 and fp8 caches: one number, [Hkv], or one for each token and head, written at append

  static constexpr auto fields() {
    using C = CacheOperands;
    return std::tuple{Field{"q", &C::q},
                      Field{"k_cache", &C::k_cache},
                      Field{"v_cache", &C::v_cache},
                      Field{"k", &C::k},
                      Field{"v", &C::v},
                      Field{"kv_lens", &C::kv_lens},
                      Field{"block_table", &C::block_table},
                      Field{"rotary_cos", &C::rotary_cos},
                      Field{"rotary_sin", &C::rotary_sin},
                      Field{"rotary_interleaved", &C::rotary_interleaved},
                      Field{"causal", &C::causal},
                      Field{"window_left", &C::window_left},
                      Field{"window_right", &C::window_right},
                      Field{"scale", &C::scale},
                      Field{"softcap", &C::softcap},
                      Field{"alibi_slopes", &C::alibi_slopes},
                      Field{"sinks", &C::sinks},
                      Field{"k_scale", &C::k_scale},
                      Field{"v_scale", &C::v_scale},
                      UnreadField{"num_splits"},  // in the plan
                      UnreadField{"batch_invariant"},
                      UnreadField{"backend"}};
  }
};

// Workspace of the same file: memory that the kernels need beside the results.
struct CacheWorkspace {
  TensorView partial_out, partial_lse;  // with splits: [num_splits, B, Hq, Sq, Dv] and without Dv
  TensorView q_rotated;                 // of a blocked plan with rotary: [B, Sq, Hq, D]
  TensorView counters;                  // on a GPU, with splits: int32 [B * Hkv * ceil(rows / rows_per_task)]

  static constexpr auto fields() {
    using W = CacheWorkspace;
    return std::tuple{Field{"partial_out", &W::partial_out}, Field{"partial_lse", &W::partial_lse}, Field{"q_rotated", &W::q_rotated},
                      Field{"counters", &W::counters}};
  }
};

// Scales of int8 and fp8 storage: a value is stored * scale.
struct CacheScale {
  float* data = nullptr;                   // null: 1
  int64_t batch = 0, seq = 0, head = 0;    // strides: batch or page, token, KV head
  bool per_token = false;                  // written at append, else only read
};

// How decode divides its work, see python/foveate/ops/attention/plan.py. keys_per_split 0: each sequence in num_splits equal parts.
struct Division {
  int64_t num_splits = 1, keys_per_split = 0, rows_per_task = 1, heads_per_task = 1;
};

// DecodePlan of that file.
struct DecodePlan : Division {
  bool blocked = false;  // many queries: the blocked kernel attends after the append

  static constexpr auto fields() {
    using P = DecodePlan;
    return std::tuple{Field{"num_splits", &P::num_splits}, Field{"keys_per_split", &P::keys_per_split},
                      Field{"rows_per_task", &P::rows_per_task}, Field{"heads_per_task", &P::heads_per_task},
                      Field{"blocked", &P::blocked}};
  }
};

// k and v of the problem are the caches, [B or pages, seq_kv or page_size, Hkv, D or Dv] of kv_dtype; kv_lens counts the keys before the
// append, and new_keys are appended.
struct KvCacheParams : AttentionProblem, Division {
  Rows new_k, new_v;  // [B, new_keys, Hkv, D or Dv]; data null: nothing to append
  CacheScale k_scale, v_scale;
  float* partial_out = nullptr;  // [num_splits, B, Hq, Sq, Dv], only with num_splits > 1
  float* partial_lse = nullptr;  // [num_splits, B, Hq, Sq]
  uint32_t* counters = nullptr;  // [B * Hkv * ceil(rows / rows_per_task)], zero before and after a call; on a GPU with num_splits > 1
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;  // [rotary_positions, rotary_pairs], contiguous, of rotary_dtype; null: none
  int64_t rotary_pairs = 0, rotary_positions = 0;
  bool rotary_interleaved = false;
  DType kv_dtype = DType::kFloat32, rotary_dtype = DType::kFloat32;
};

}  // namespace foveate
