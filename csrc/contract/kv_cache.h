// Attention against a KV cache, dense or paged: append the new keys and values in place, then attend to all of them.
// python/foveate/_reference.py (attention_with_kv_cache) defines the meaning.
#pragma once

#include "contract/attention.h"
#include "core/tensor.h"

namespace foveate {

// One of the two caches. batch is the page stride of a paged cache. A value is stored * scale.
struct CacheOperand {
  Rows rows;               // [B or pages, Smax or page_size, Hkv, D]
  float* scale = nullptr;  // int8 and fp8 storage, addressed by the strides below; null: 1
  int64_t scale_batch = 0, scale_seq = 0, scale_head = 0;
  bool scale_per_token = false;  // written at append, else only read
};

struct KvCacheParams {
  Rows q, out;                           // [B, Sq, Hq, D], [B, Sq, Hq, Dv]
  Rows new_k, new_v;                     // [B, Snew, Hkv, D or Dv]; data null: nothing to append
  CacheOperand k, v;                     // [B or pages, ..., Hkv, D or Dv]
  float* lse = nullptr;                  // [B, Hq, Sq], natural log, without the sink; may be null
  float* partial_out = nullptr;          // [num_splits, B, Hq, Sq, Dv], only with num_splits > 1
  float* partial_lse = nullptr;          // [num_splits, B, Hq, Sq]
  uint32_t* counters = nullptr;  // [B * Hkv * ceil(rows / rows_per_task)], zero before and after a call; on a GPU with num_splits > 1
  const int32_t* kv_lens = nullptr;  // [B], keys before the append
  const int32_t* block_table = nullptr;  // [B, max_pages], row stride block_table_stride; null: dense
  int64_t block_table_stride = 0, page_size = 0;
  int64_t capacity = 0, pages = 0;  // keys that a sequence may have; the first size of a paged cache
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;  // [max_pos, rotary_pairs], contiguous, of rotary_dtype; null: none
  int64_t rotary_pairs = 0, rotary_positions = 0;  // rotary_positions: max_pos
  bool rotary_interleaved = false;
  const float* alibi = nullptr;  // slopes, [B, Hq] by the strides below
  int64_t alibi_batch = 0, alibi_head = 0;
  const float* sinks = nullptr;  // [Hq]
  ScoreOperand bias, mask;       // of foveate.attention's few queries, on the CPU
  int64_t batch = 0, seq_q = 0, seq_new = 0, heads_q = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  double scale = 1, softcap = 0;  // softcap 0: none
  bool causal = true;
  int64_t window_left = -1, window_right = -1;  // -1: unlimited
  // The division of the work, see decode_plan in python/foveate/_decode_plan.py. keys_per_split 0: each sequence in num_splits equal parts.
  int64_t num_splits = 1, keys_per_split = 0, rows_per_task = 1, heads_per_task = 1;
  DType dtype = DType::kFloat32, kv_dtype = DType::kFloat32, rotary_dtype = DType::kFloat32;
};

// How attention divides its work, see KvCacheParams.
struct Division {
  int64_t num_splits = 1, keys_per_split = 0, rows_per_task = 1, heads_per_task = 1;
};

}  // namespace foveate
