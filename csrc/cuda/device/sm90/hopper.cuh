// No kernel of the package uses this file yet; tests do (tests/native/device/).
// The device layer of sm_90a: barriers in shared memory, copies of boxes by the tensor memory accelerator (TMA), matrix products of a
// warpgroup (wgmma). Kernels that call these are compiled for sm_90a alone. No clusters: one block is one cluster.
//
// TMA and wgmma reach shared memory by another way than plain accesses, the async proxy. What threads have written themselves they
// hand over with fence_async_proxy().
#pragma once

#include "cuda/device/device.cuh"
#include "cuda/device/sm90/tensor_map.h"

namespace foveate::cuda::dev {

// ---- mbarriers: 8 bytes of shared memory, aligned to 8 -----------------------------------------------------------------------
// A phase of a barrier ends when `arrivals` threads have arrived and all announced bytes have been delivered; the next begins at once.
// Phases have parity 0, 1, 0, ...

__device__ void mbarrier_init(uint32_t barrier, int arrivals, Site site = Site::here());
// By the thread that initialised barriers, before the block's sync_threads(): TMA and the other threads see them.
__device__ void mbarrier_init_fence(Site site = Site::here());
__device__ void mbarrier_arrive(uint32_t barrier, Site site = Site::here());
// Announces `bytes` that TMA will deliver in this phase, and arrives.
__device__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, Site site = Site::here());
// Waits for the end of the phase of this parity. A fresh barrier is in phase 0: waiting for parity 1 returns at once.
__device__ void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site = Site::here());

// ---- TMA: by one thread ------------------------------------------------------------------------------------------------------

// Copies the map's box at element `at` (innermost first) to `to`, a multiple of 128 (1024 with a swizzle), and counts its bytes, zeros
// included, on `barrier`. The map lies in the kernel's __grid_constant__ parameters.
template <int kRank>
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, const int32_t (&at)[kRank], uint32_t barrier,
                                         Site site = Site::here());
// Copies the box at `from` to global memory, or adds it there (fp32, bf16, fp16). It belongs to the thread's next group.
template <int kRank>
__device__ __forceinline__ void tma_store(const TensorMap& map, const int32_t (&at)[kRank], uint32_t from, Site site = Site::here());
template <int kRank>
__device__ __forceinline__ void tma_add(const TensorMap& map, const int32_t (&at)[kRank], uint32_t from, Site site = Site::here());
__device__ void tma_store_commit();
// Until at most kPending groups of this thread still read shared memory. A thread that has stored ends with wait<0>.
template <int kPending>
__device__ __forceinline__ void tma_store_wait(Site site = Site::here());

// This thread's writes to shared memory, and those it knows of, become visible to TMA and wgmma that a barrier orders after it.
__device__ void fence_async_proxy(Site site = Site::here());

// ---- wgmma: by the four warps of a warpgroup, all at the same line -----------------------------------------------------------
// D [64 x N] fp32: with w = warp % 4, g and t as in device.cuh, d[4j], d[4j + 1] = (16w + g, 8j + 2t..), d[4j + 2], d[4j + 3] = (16w + g +
// 8, ..). A in registers: rows 16w..16w+15 as the A of mma_m16n8k16. Operands in shared memory are 16 deep:
//   K-major, 128-byte swizzle: rows (m or n) of 128 bytes in groups of 8; stride_bytes from group to group (1024 if dense); the next 16 of k
//   are 32 bytes on, within the row. leading_bytes is not used.
//   MN-major, 128-byte swizzle: rows (k) of 128 bytes, that is 64 of m or n, in groups of 8; stride_bytes from one group of 8 k to the next,
//   leading_bytes from one 64 of m or n to the next.
// 64- and 32-byte swizzles: the same with rows of 64 and 32 bytes.

__host__ __device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// Before the first wgmma, and before one that uses registers which other instructions have written (but for the accumulators of a wgmma).
__device__ void wgmma_fence(Site site = Site::here());
// d = a @ b, += with `accumulate`; T = bf16 or f16. The registers of d and a are wgmma's until the wait. kN: see nvidia/wgmma_impl.cuh.
template <class T, int kN, bool a_m_major = false, bool b_n_major = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::here());
template <class T, int kN, bool b_n_major = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = Site::here());
__device__ void wgmma_commit(Site site = Site::here());
// Until at most kPending committed groups of this warp are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(Site site = Site::here());
// Keeps the compiler from moving uses of d across this point: after the wait that completes d, where others stay under way.
template <int n>
__device__ __forceinline__ void wgmma_keep(float (&d)[n]);

// ---- warpgroups and warps ----------------------------------------------------------------------------------------------------

// All warps of a warpgroup: their registers per thread from now on, a multiple of 8 in 24..256.
template <int count>
__device__ __forceinline__ void more_registers(Site site = Site::here());
template <int count>
__device__ __forceinline__ void fewer_registers(Site site = Site::here());
// True in one lane of the warp, always the same.
__device__ bool elect_one(Site site = Site::here());

}  // namespace foveate::cuda::dev

#include "hopper_impl.cuh"
