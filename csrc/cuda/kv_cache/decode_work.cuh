// The work of decode.cu: which rows and keys a block takes, and where those keys lie.
#pragma once

#include "core/visible.h"
#include "cuda/kv_cache/decode_layout.h"
#include "cuda/kv_cache/decode_tile.cuh"
#include "cuda/kv_cache/kv_cache.cuh"

namespace foveate::cuda {

constexpr int kSplitMultiple = kTileKeys * kMaxWarps;  // keys of a split, where the split does not say

struct DecodeWork : DecodeLayout {
  KvCacheParams params;
  int row_blocks, slices;  // slices: of the columns of V
  int k_copy_bytes, v_copy_bytes;  // that are moved at a time: 16, 4, or one element
};

// What one block does.
struct DecodeTask {
  int64_t b, head, split, row0;  // head: of K and V
  int first_column;  // of V
  int64_t begin, end;  // keys
};

// Whatever kv_lens holds: no more keys than the cache has.
__device__ __forceinline__ Lengths<int64_t> sequence(const KvCacheParams& p, int64_t b) {
  return lengths_of(p.seq_q, clamp<int64_t>(int64_t{dev::ld_global_nc<int32_t>(p.kv_lens + b)} + p.new_keys, 0, p.seq_kv));
}

__device__ __forceinline__ Span<int64_t> visible_to(const KvCacheParams& p, const Lengths<int64_t>& s, int64_t first, int64_t last) {
  return visible_keys(window_of<int64_t>(p.causal, p.window_left, p.window_right), s, first, last);
}

// The keys of `task`, whose other fields are there.
__device__ __forceinline__ DecodeTask task_of(const DecodeWork& work, const Lengths<int64_t>& s, DecodeTask task) {
  const KvCacheParams& p = work.params;
  const int64_t group = p.heads_q / p.heads_kv, rows = p.seq_q * group, last = min(task.row0 + kTileRows, rows) - 1;
  const Span<int64_t> seen = visible_to(p, s, task.row0 / group, last / group);
  task.begin = seen.begin;
  task.end = seen.end;
  const int64_t first = p.keys_per_split ? 0 : task.begin / kSplitMultiple * kSplitMultiple;
  int64_t part = p.keys_per_split;
  if (part == 0) {
    part = round_up(ceil_div(max<int64_t>(task.end - first, 0), p.num_splits), int64_t{kSplitMultiple});
  }
  task.begin = max(task.begin, first + task.split * part);
  task.end = min(task.end, first + (task.split + 1) * part);
  return task;
}

// Where this lane's key of a tile lies, in bytes from the cache's start, or -1, and its scale: lanes 0..15 for K, 16..31 for V.
struct KeyAddress {
  int64_t bytes;
  float scale;
};
template <class S>
__device__ __forceinline__ KeyAddress locate(const KvCacheParams& p, const DecodeTask& task, int64_t tile) {
  const int64_t key = tile * kTileKeys + dev::lane() % kTileKeys;
  if (key < task.begin || key >= task.end) return {-1, 0.0f};
  const Slot slot = slot_of(p, task.b, key);
  if (!slot.valid) return {-1, 0.0f};
  const bool is_key = dev::lane() < kTileKeys;
  const Rows& cache = is_key ? p.k : p.v;
  const CacheScale& scales = is_key ? p.k_scale : p.v_scale;
  const int64_t at = slot.batch * cache.batch + slot.row * cache.seq + task.head * cache.head + (is_key ? 0 : task.first_column);
  float scale = 1;
  if (sizeof(S) == 1)
    scale = dev::ld_global<float>(scales.data + slot.batch * scales.batch + slot.row * scales.seq + task.head * scales.head);
  return {at * static_cast<int64_t>(sizeof(S)), scale};
}

// Starts the copies of a tile's rows, `copy_bytes` at a time.
template <class S>
__device__ __forceinline__ void copy_rows(uint32_t to, int to_row_bytes, const void* from, int64_t place, int first_lane, int row_bytes,
                                          int copy_bytes) {
  const char* bytes = static_cast<const char*>(from);
  if (copy_bytes == 16)
    copy_tile<16>(to, to_row_bytes, bytes, place, first_lane, row_bytes);
  else if (copy_bytes == 4)
    copy_tile<4>(to, to_row_bytes, bytes, place, first_lane, row_bytes);
  else
    copy_tile<sizeof(S)>(to, to_row_bytes, bytes, place, first_lane, row_bytes);
}

}  // namespace foveate::cuda
