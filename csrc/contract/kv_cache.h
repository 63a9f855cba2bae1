// Attention against a KV cache, dense or paged: append the new keys and values in place, then attend to all of them.
// python/foveate/backend/reference/attention.py (attention_with_kv_cache) defines the meaning.
#pragma once

#include "contract/attention.h"
#include "core/tensor.h"

namespace foveate {

// Of int8 and fp8 storage: a value is stored * scale.
struct CacheScale {
  float* data = nullptr;                   // null: 1
  int64_t batch = 0, seq = 0, head = 0;    // strides: batch or page, token, KV head
  bool per_token = false;                  // written at append, else only read
};

// How decode divides its work, see python/foveate/ops/attention/plan.py. keys_per_split 0: each sequence in num_splits equal parts.
struct Division {
  int64_t num_splits = 1, keys_per_split = 0, rows_per_task = 1, heads_per_task = 1;
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
