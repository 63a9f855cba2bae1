// What appending to a KV cache and attending to it share: where a key lies, and the angles of a position. The host has not seen the values
// of kv_lens and block_table; whatever they are, nothing outside the tensors is touched.
#pragma once

#include "contract/kv_cache.h"
#include "cuda/rows/rotate.cuh"

namespace foveate::cuda {

// Key `position` of sequence b, as batch (or page) and row of the cache. valid is false if the cache has no such place.
struct Slot {
  int64_t batch, row;
  bool valid;
};
__device__ __forceinline__ Slot slot_of(const KvCacheParams& p, int64_t b, int64_t position) {
  if (position < 0 || position >= p.seq_kv) return {0, 0, false};
  if (!p.block_table) return {b, position, true};
  const int64_t page = dev::ld_global_nc<int32_t>(p.block_table + b * p.block_table_stride + position / p.page_size);
  return {page, position % p.page_size, page >= 0 && page < p.pages};
}

__device__ __forceinline__ Angles angles_at(const KvCacheParams& p, int64_t position) {
  const int64_t at = min(max(position, int64_t{0}), p.rotary_positions - 1) * p.rotary_pairs;
  const bool wide = p.rotary_dtype == DType::kFloat32;
  const int64_t bytes = at * (wide ? 4 : 2);
  return {static_cast<const char*>(p.rotary_cos) + bytes,
          static_cast<const char*>(p.rotary_sin) + bytes,
          wide,
          p.rotary_pairs,
          p.rotary_interleaved,
          1.0f};
}

// The position by which the first query is rotated; the others follow.
__device__ __forceinline__ int64_t first_position(const KvCacheParams& p, int64_t b) {
  return int64_t{dev::ld_global_nc<int32_t>(p.kv_lens + b)} - (p.new_k.data ? 0 : p.seq_q);
}

// Elements j.. of query i of head h, rotated if there are angles.
template <class T>
__device__ __forceinline__ void load_query(const KvCacheParams& p, int64_t b, int64_t i, int64_t h, int64_t j, float (&x)[kVec<T>]) {
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch + i * p.q.seq + h * p.q.head;
  if (p.rotary_cos)
    load_rotated(q, p.head_dim, angles_at(p, first_position(p, b) + i), j, x);
  else
    load_chunk<Read::kCached>(q, j, p.head_dim, 0.0f, x);
}

}  // namespace foveate::cuda
