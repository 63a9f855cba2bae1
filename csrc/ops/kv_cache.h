// Attention against a KV cache: views -> checks -> KvCacheParams -> kernels.
#pragma once

#include "contract/kv_cache.h"
#include "core/tensor.h"

namespace foveate {

// What Python passes beside the main tensors.
struct KvCacheOptions {
  TensorView counters, block_table, rotary_cos, rotary_sin, k_scale, v_scale, alibi, sinks;
  bool rotary_interleaved = false, k_scale_per_token = false, v_scale_per_token = false;
  bool causal = true;
  int64_t window_left = -1, window_right = -1;
  double scale = 1, softcap = 0;
  Division division;
  bool blocked = false;  // many queries: attention_forward attends after the append
};

// k, v, partial_out, partial_lse may be undefined; q_rotated [B, Sq, Hq, D] is needed with blocked and rotary. Every check comes before the
// first write to a cache.
void attention_with_kv_cache(TensorView q, TensorView k_cache, TensorView v_cache, TensorView k, TensorView v, TensorView kv_lens,
                             TensorView out, TensorView lse, TensorView partial_out, TensorView partial_lse, TensorView q_rotated,
                             const KvCacheOptions& options, Threads threads);

// The two halves of it, for callers that fill KvCacheParams themselves (decoder/decoder.cpp), on the CPU. The first throws before anything
// is written; a CUDA call has no such check, its kernels stay inside the cache whatever the values are.
void check_cache_values(const KvCacheParams& p);
// The division as p has it; p has its sizes already.
void set_division(KvCacheParams& p, const Division& division);
// blocked: by attention_forward; with rotary, the rotated queries [B, Sq, Hq, D], contiguous, go to q_rotated first.
void append_and_attend(KvCacheParams p, bool blocked, void* q_rotated, int threads);

}  // namespace foveate
