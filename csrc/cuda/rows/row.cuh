// What kernels over rows share: elements in chunks of 16 bytes, the threads that work on one row, and how many those are.
//
// A row is cut into chunks of 16 bytes from its first element on, so that the order of every sum, and with it every bit of a result, is the
// same wherever the row lies in memory. A chunk that is not whole or not aligned is accessed element by element.
#pragma once

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "core/dtype.h"
#include "core/math.h"
#include "cuda/device/device.cuh"
#include "cuda/host/launch.h"

namespace foveate::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kLowest = std::numeric_limits<float>::lowest();
constexpr float kLog2eF = static_cast<float>(kLog2e);

// f(std::type_identity<T>) for the dtypes of activations on a GPU.
template <class F>
void visit_activation(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(std::type_identity<float>{});
    case DType::kFloat16: return f(std::type_identity<f16>{});
    case DType::kBFloat16: return f(std::type_identity<bf16>{});
    default: fail("the CUDA kernels take float32, bfloat16 and float16, not ", name(dtype));
  }
}

// ---- chunks ------------------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));  // elements of T in 16 bytes

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T lane[kCount];
};

enum class Read { kOnce, kCached, kInPlace };  // kInPlace: this kernel writes the same memory

template <Read kRead, class T>
__device__ __forceinline__ T read(const void* p) {
  if constexpr (kRead == Read::kOnce)
    return dev::ld_global_stream<T>(p);
  else if constexpr (kRead == Read::kCached)
    return dev::ld_global_nc<T>(p);
  else
    return dev::ld_global<T>(p);
}

template <int kBytes>
__device__ __forceinline__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

// x[i] = row[j + i], and `fill` from element n on, which is not read.
template <Read kRead, int kCount, class T>
__device__ __forceinline__ void load_chunk(const T* row, int64_t j, int64_t n, float fill, float (&x)[kCount]) {
  constexpr int kEach = kCount < kVec<T> ? kCount : kVec<T>;
  if (j + kCount <= n && aligned<sizeof(T) * kEach>(row + j)) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      const auto packed = read<kRead, Packed<T, kEach>>(row + j + i);
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[i + e] = dev::to_float(packed.lane[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fill;
    if (j >= n) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (j + i < n) x[i] = dev::to_float(read<kRead, T>(row + j + i));
  }
}

template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> pack_chunk(const float* x) {
  Packed<T, kCount> packed;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      const uint32_t pair = dev::pack<T>(x[e], x[e + 1]);
      packed.lane[e] = T{static_cast<uint16_t>(pair)}, packed.lane[e + 1] = T{static_cast<uint16_t>(pair >> 16)};
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) packed.lane[e] = dev::from_float<T>(x[e]);
  }
  return packed;
}

// row[j + i] = x[i], below element n.
template <int kCount, class T>
__device__ __forceinline__ void store_chunk(T* row, int64_t j, int64_t n, const float (&x)[kCount]) {
  constexpr int kEach = kCount < kVec<T> ? kCount : kVec<T>;
  if (j + kCount <= n && aligned<sizeof(T) * kEach>(row + j)) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) dev::st_global(row + j + i, pack_chunk<T, kEach>(x + i));
  } else if (j < n) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (j + i < n) dev::st_global(row + j + i, dev::from_float<T>(x[i]));
  }
}

__device__ __forceinline__ int64_t chunks_of(int64_t elements, int vec) { return (elements + vec - 1) / vec; }

// ---- teams -------------------------------------------------------------------------------------------------------------------

constexpr size_t kTeamBytes = 32 * sizeof(float);  // of shared memory

// The threads that share a row: 1, 2, 4, .. 32 neighbours of a warp, or all of the block. Every thread of the block calls reduce().
struct Team {
  int lanes, thread, index, count;  // its threads, which of them this is, which team of the block's

  __device__ explicit Team(int lanes)
      : lanes(lanes),
        thread(static_cast<int>(threadIdx.x) % lanes),
        index(static_cast<int>(threadIdx.x) / lanes),
        count(static_cast<int>(blockDim.x) / lanes) {}

  // The sum of x over its threads, in an order that depends on `lanes` alone.
  template <class Op>
  __device__ __forceinline__ float reduce(float x, const Op& op) const {
    for (int mask = (lanes < 32 ? lanes : 32) / 2; mask > 0; mask /= 2) x = op(x, dev::shfl_xor(x, mask));
    if (lanes <= 32) return x;
    const uint32_t memory = dev::smem_base(), own = memory + 4 * dev::warp();
    dev::sync_threads();  // the values of the reduction before have been read
    if (dev::lane() == 0) dev::st_shared<float>(own, x);
    dev::sync_threads();
    x = dev::ld_shared<float>(memory);
    for (int warp = 1; warp < lanes / 32; ++warp) x = op(x, dev::ld_shared<float>(memory + 4 * warp));
    return x;
  }
  __device__ __forceinline__ float sum(float x) const {
    return reduce(x, [](float a, float b) { return a + b; });
  }
  __device__ __forceinline__ float max(float x) const {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
};

// The maximum of some elements and the sum of exp(x - max), in one pass (Milakov and Gimelshein 2018). max begins at the lowest finite
// number and not at -inf, so that no difference is inf - inf; a NaN reaches the sum.
struct MaxSum {
  float max = kLowest, sum = 0;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount]) {
    float top = max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, x[i]);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += dev::exp2_approx((x[i] - top) * kLog2eF);
    sum = sum * dev::exp2_approx((max - top) * kLog2eF) + total;
    max = top;
  }
  __device__ __forceinline__ void join(const Team& team) {
    const float top = team.max(max);
    sum = team.sum(sum * dev::exp2_approx((max - top) * kLog2eF));
    max = top;
  }
};

// ---- division of the work ----------------------------------------------------------------------------------------------------

constexpr int kKeptChunks = 4;  // that a thread holds in registers
constexpr int kWarpBlock = 128, kLargestBlock = 512;

struct RowPlan {
  int lanes;  // of a team
  int threads;
  bool kept;  // a row fits its team's registers, `chunks` for each thread
  dim3 grid;
};

template <class Params>
struct RowWork {  // what a kernel over rows gets
  Params params;
  int lanes;  // of a team
};

// A grid for kernels that walk over items in steps of all their threads.
inline dim3 blocks_for(int64_t items, int threads) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(items, threads), int64_t{1} << 30)));
}

// A warp or a part of one for each row that fits its registers, else a block. chunks: of a thread.
template <class T>
RowPlan plan_rows(int64_t rows, int64_t cols, int chunks) {
  const int64_t row_chunks = ceil_div<int64_t>(cols, kVec<T>);
  RowPlan plan{32, kWarpBlock, true, 1};
  if (row_chunks <= 32 * chunks) {
    while (plan.lanes > 1 && plan.lanes / 2 >= row_chunks) plan.lanes /= 2;
  } else {
    const int64_t wanted = round_up<int64_t>(ceil_div<int64_t>(row_chunks, chunks), 32);
    plan.lanes = plan.threads = wanted < kLargestBlock ? static_cast<int>(wanted) : kLargestBlock;
    plan.kept = row_chunks <= int64_t{plan.lanes} * chunks;
  }
  plan.grid = blocks_for(rows, plan.threads / plan.lanes);
  return plan;
}

}  // namespace foveate::cuda
