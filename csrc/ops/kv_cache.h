// Attention against a KV cache: operands -> checks -> KvCacheParams -> kernels.
#pragma once

#include "contract/kv_cache.h"
#include "core/tensor.h"

namespace foveate {

// Every check comes before the first write to a cache.
void attention_with_kv_cache(const CacheOperands& operands, TensorView out, TensorView lse, const CacheWorkspace& workspace,
                             const DecodePlan& plan, Threads threads);

// The two halves of it, for callers that fill KvCacheParams themselves (decoder/decoder.cpp), on the CPU. The first throws before anything
// is written; a CUDA call has no such check, its kernels stay inside the cache whatever the values are.
void check_cache_values(const KvCacheParams& p);
// The division as p has it; p has its sizes already.
void set_division(KvCacheParams& p, const Division& division);
// blocked: by attention_forward; with rotary, the rotated queries [B, Sq, Hq, D], contiguous, go to q_rotated first.
void append_and_attend(KvCacheParams p, bool blocked, void* q_rotated, int threads);

}  // namespace foveate
