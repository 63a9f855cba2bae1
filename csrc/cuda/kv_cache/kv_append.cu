// Writes new keys (rotated) and values into a dense or paged cache, quantised where it stores int8 or fp8; and rotates queries, where
// another kernel than decode attends. A row of K or V is the work of up to 32 threads; it is read once from memory and written once.
#include "cuda/host/kernels.h"
#include "cuda/kv_cache/kv_cache.cuh"

namespace foveate::cuda {
namespace {

constexpr int kThreads = 128;

template <class S>
constexpr bool kQuantized = sizeof(S) == 1;
template <class S>
constexpr float kLargest = std::is_same_v<S, int8_t> ? 127.0f : 448.0f;

// NaN is larger than any number.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// T: of the new rows, S: of the cache.
template <class T, class S>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const __grid_constant__ RowWork<KvCacheParams> work) {
  const KvCacheParams& p = work.params;
  const Team team(work.lanes);
  const int64_t heads = p.batch * p.new_keys * p.heads_kv;
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < 2 * heads; first += int64_t{gridDim.x} * team.count) {
    const int64_t item = min(first + team.index, 2 * heads - 1);
    const bool is_key = item < heads;
    const int64_t h = item % p.heads_kv, token = item % heads / p.heads_kv, i = token % p.new_keys, b = token / p.new_keys;
    const int64_t position = int64_t{dev::ld_global_nc<int32_t>(p.kv_lens + b)} + i;
    const Slot slot = slot_of(p, b, position);
    const bool mine = first + team.index < 2 * heads && slot.valid;

    const Rows& source = is_key ? p.new_k : p.new_v;
    const Rows cache = is_key ? p.k : p.v;
    const int64_t n = is_key ? p.head_dim : p.head_dim_v, chunks = chunks_of(n, kVec<T>);
    const T* row = static_cast<const T*>(source.data) + b * source.batch + i * source.seq + h * source.head;
    const bool rotated = is_key && p.rotary_cos;
    const Angles angles = rotated ? angles_at(p, position) : Angles{};
    const auto load = [&](int64_t chunk, float(&x)[kVec<T>]) {
      if (rotated)
        load_rotated(row, n, angles, chunk * kVec<T>, x);
      else
        load_chunk<Read::kCached>(row, chunk * kVec<T>, n, 0.0f, x);
    };

    float scale = 1;
    if constexpr (kQuantized<S>) {
      const CacheScale scales = is_key ? p.k_scale : p.v_scale;
      float* stored = scales.data + (slot.valid ? slot.batch * scales.batch + slot.row * scales.seq : 0) + h * scales.head;
      float peak = 0;
      if (scales.per_token) {
        for (int64_t chunk = team.thread; chunk < chunks; chunk += team.lanes) {
          float x[kVec<T>];
          load(chunk, x);
#pragma unroll
          for (int e = 0; e < kVec<T>; ++e) peak = larger(peak, fabsf(x[e]));
        }
      }
      peak = team.reduce(peak, larger);  // by all threads of the warp, whose rows may be of K and of V
      scale = scales.per_token ? peak / kLargest<S> : dev::ld_global<float>(stored);
      if (mine && scales.per_token && team.thread == 0) dev::st_global(stored, scale);
    }
    if (!mine) continue;
    S* out = static_cast<S*>(cache.data) + slot.batch * cache.batch + slot.row * cache.seq + h * cache.head;
    for (int64_t chunk = team.thread; chunk < chunks; chunk += team.lanes) {
      float x[kVec<T>];
      load(chunk, x);
      if constexpr (kQuantized<S>) {
#pragma unroll
        for (int e = 0; e < kVec<T>; ++e) {
          const float y = scale == 0 ? 0.0f : x[e] / scale;
          x[e] = y > kLargest<S> ? kLargest<S> : y < -kLargest<S> ? -kLargest<S> : y;
        }
      }
      store_chunk(out, chunk * kVec<T>, n, x);
    }
  }
}

struct RotateWork {
  KvCacheParams params;
  void* out;  // [B, Sq, Hq, D], contiguous
};

template <class T>
__global__ void __launch_bounds__(kThreads) rotate_queries_kernel(const __grid_constant__ RotateWork work) {
  const KvCacheParams& p = work.params;
  const int64_t chunks = chunks_of(p.head_dim, kVec<T>), all = p.batch * p.seq_q * p.heads_q * chunks;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < all; item += int64_t{gridDim.x} * kThreads) {
    const int64_t j = item % chunks * kVec<T>, row = item / chunks, token = row / p.heads_q;
    float x[kVec<T>];
    load_query<T>(p, token / p.seq_q, token % p.seq_q, row % p.heads_q, j, x);
    store_chunk(static_cast<T*>(work.out) + row * p.head_dim, j, p.head_dim, x);
  }
}

}  // namespace

void kv_append(const KvCacheParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const RowPlan plan =
        plan_rows<T>(2 * p.batch * p.new_keys * p.heads_kv, std::min(std::max(p.head_dim, p.head_dim_v), int64_t{32} * kVec<T>), 1);
    const RowWork<KvCacheParams> work{p, plan.lanes};
    switch (p.kv_dtype) {
      case DType::kInt8: return launch<kv_append_kernel<T, int8_t>>(plan.grid, kThreads, 0, stream, work);
      case DType::kFloat8E4M3: return launch<kv_append_kernel<T, f8e4m3>>(plan.grid, kThreads, 0, stream, work);
      default: return launch<kv_append_kernel<T, T>>(plan.grid, kThreads, 0, stream, work);
    }
  });
}

void rotate_queries(const KvCacheParams& p, void* out, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const int64_t items = p.batch * p.seq_q * p.heads_q * ceil_div<int64_t>(p.head_dim, kVec<T>);
    launch<rotate_queries_kernel<T>>(blocks_for(items, kThreads), kThreads, 0, stream, RotateWork{p, out});
  });
}

}  // namespace foveate::cuda
