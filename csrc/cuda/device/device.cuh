// The device layer: everything that a kernel does beyond plain C++. Kernels call these functions and contain no `asm` and no `#ifdef`, so
// one source is compiled by nvcc and by g++. The include path says what implements the functions: device_types.cuh, device_impl.cuh and
// their siblings stand in cuda/device/nvidia/, the only place with PTX, and in a folder of the emulator, which runs kernels on the CPU.
//
// Warp functions are for all 32 threads of a warp, each with its own values: no masks, no divergence. A block has a multiple of 32 threads.
// Shared memory is dynamic and addressed by 32-bit offsets from smem_base(); there are no `__shared__` variables and no pointers to it.
// Global memory goes through ld_global, st_global, atomic_add and cp_async, so that the emulator can check bounds.
// `Site` is the line of the call, for the emulator's reports; it is empty under nvcc and no caller passes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "device_types.cuh"

namespace foveate::cuda::dev {

// ---- who am I ----------------------------------------------------------------------------------------------------------------
// Blocks are one-dimensional: blockDim.y == blockDim.z == 1. threadIdx, blockIdx, blockDim and gridDim are CUDA's own.

__device__ int lane();  // 0..31
// 0..blockDim.x / 32 - 1, the same register in all lanes: a warp function, like a shuffle.
__device__ int warp(Site site = Site::here());

// ---- shared memory -----------------------------------------------------------------------------------------------------------

// The first byte of dynamic shared memory, a multiple of 1024 (the swizzle pattern of TMA).
__device__ uint32_t smem_base();
// T of 1, 2, 4, 8 or 16 bytes, aligned to its size. Pass T: ld_shared<float4>(address).
template <class T>
__device__ __forceinline__ T ld_shared(uint32_t address, Site site = Site::here());
template <class T>
__device__ __forceinline__ void st_shared(uint32_t address, T value, Site site = Site::here());
__device__ void atomic_add_shared(uint32_t address, float value, Site site = Site::here());

// ---- matrix fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16", "ldmatrix") ---------------------------------------------
// With g = lane / 4, t = lane % 4, two 16-bit elements a register, the lower column (row, for B) in the lower half:
//   A [16 x 16]  a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..)
//   B [16 x 8]   b0 = (2t..2t+1, g)    b1 = (2t+8..2t+9, g)
//   C, D [16 x 8] d[0], d[1] = (g, 2t), (g, 2t+1)          d[2], d[3] = (g+8, 2t), (g+8, 2t+1)

// d += a @ b, T = bf16 or f16, accumulated in fp32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here());

// The same for tf32 (fp32 bits as to_tf32 rounds them): A [16 x 8] a = (g, t) (g+8, t) (g, t+4) (g+8, t+4), B [8 x 8] b0 = (t, g),
// b1 = (t+4, g).
__device__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here());
// Rounds to 10 mantissa bits, ties away from zero. 3xtf32: big = to_tf32(x), small = to_tf32(x - big), then small*big + big*small +
// big*big.
__device__ uint32_t to_tf32(float x);

// Loads four (two) 8x8 matrices of 16-bit elements. Lane l gives the address of the 16-byte row l % 8 of matrix l / 8; x2 looks at lanes
// 0..15 only, but the others pass valid addresses too. d[i] = (row g, columns 2t, 2t+1) of matrix i; _trans: of its transpose.
__device__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address, Site site = Site::here());
__device__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t row_address, Site site = Site::here());
__device__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_address, Site site = Site::here());
__device__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row_address, Site site = Site::here());

// ---- asynchronous copies, global to shared -----------------------------------------------------------------------------------

// Copies kBytes = 4, 8 or 16, both addresses aligned to it; with valid = false writes zeros and does not read. 16 bytes pass by L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool valid = true, Site site = Site::here());
// Each thread's copies since its last commit become one group (empty ones count too).
__device__ void cp_async_commit();
// Waits until at most kPending of this thread's groups are under way. Other threads see the data after a barrier that follows the wait.
template <int kPending>
__device__ __forceinline__ void cp_async_wait(Site site = Site::here());
// Waits for all of this thread's copies, committed or not. No thread may exit with copies under way.
__device__ void cp_async_wait_all(Site site = Site::here());

// ---- warp --------------------------------------------------------------------------------------------------------------------

// T of 4 or 8 bytes. xor: from lane ^ mask; idx: from lane `source`; down, up: from lane + delta, lane - delta, or one's own value where
// that is beyond the warp.
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask, Site site = Site::here());
template <class T>
__device__ __forceinline__ T shfl_idx(T value, int source, Site site = Site::here());
template <class T>
__device__ __forceinline__ T shfl_down(T value, int delta, Site site = Site::here());
template <class T>
__device__ __forceinline__ T shfl_up(T value, int delta, Site site = Site::here());
__device__ uint32_t ballot(bool predicate, Site site = Site::here());  // bit l: lane l's
__device__ bool any(bool predicate, Site site = Site::here());
__device__ bool all(bool predicate, Site site = Site::here());
// The lanes of this warp see each other's earlier writes to shared and global memory. Shuffles and mma give no such promise.
__device__ void sync_warp(Site site = Site::here());

// ---- block -------------------------------------------------------------------------------------------------------------------

__device__ void sync_threads(Site site = Site::here());
// True in all threads if it is true in any.
__device__ bool sync_threads_or(bool predicate, Site site = Site::here());
// Barriers 1..15 among `threads` threads, a multiple of 32 (barrier 0 is sync_threads). By whole warps.
__device__ void named_barrier_sync(int id, int threads, Site site = Site::here());
__device__ void named_barrier_arrive(int id, int threads, Site site = Site::here());

// ---- approximate math --------------------------------------------------------------------------------------------------------
// One instruction of the special function unit each. exp2: 2 ulp, exp2(-inf) = 0; log2(0) = -inf; rcp, rsqrt: 1 ulp;
// tanh: relative error 2^-11. The emulator computes exactly and rounds: kernels are compared under tolerances.

__device__ float exp2_approx(float x);
__device__ float log2_approx(float x);
__device__ float rcp_approx(float x);
__device__ float rsqrt_approx(float x);
__device__ float tanh_approx(float x);

// ---- conversions -------------------------------------------------------------------------------------------------------------
// Bit for bit the same on a GPU and in the emulator, but for the payload of a NaN that widens from f16.

__device__ float to_float(float x);
__device__ float to_float(bf16 x);
__device__ float to_float(f16 x);
__device__ float to_float(f8e4m3 x);
__device__ float to_float(int8_t x);
// T = float, bf16, f16: to nearest even, overflow to infinity, NaN to 0x7fff. f8e4m3: to nearest even, beyond 448 (infinity too) to 448
// with its sign, NaN to 0x7f. int8_t: to nearest even, clamped to -128..127, NaN to 0.
template <class T>
__device__ __forceinline__ T from_float(float x);
// Two values in one register, `low` in the lower half: T = bf16 or f16, rounded as from_float does.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);  // x: lower half

// ---- global memory -----------------------------------------------------------------------------------------------------------
// T of 1, 2, 4, 8 or 16 bytes, aligned to its size: ld_global<uint4>(pointer).

template <class T>
__device__ __forceinline__ T ld_global(const void* p, Site site = Site::here());
// Through the read-only path: nobody writes this memory while the kernel runs.
template <class T>
__device__ __forceinline__ T ld_global_nc(const void* p, Site site = Site::here());
// The same for data that is read once: not kept in L1.
template <class T>
__device__ __forceinline__ T ld_global_stream(const void* p, Site site = Site::here());
template <class T>
__device__ __forceinline__ void st_global(void* p, T value, Site site = Site::here());
// For results that this kernel does not read again: evicted first.
template <class T>
__device__ __forceinline__ void st_global_stream(void* p, T value, Site site = Site::here());
__device__ void atomic_add(float* p, float value, Site site = Site::here());

// Between blocks. The last block of a group to finish reduces: every thread writes its part, fence_gpu(), sync_threads(); one thread
// counts with atomic_add_acq_rel; the block whose count is the last reads the parts, after a barrier, with ld_global (never _nc or
// _stream), and sets the counter to what it was before the launch.
__device__ void fence_gpu();
__device__ uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value, Site site = Site::here());  // returns the value before
__device__ uint32_t ld_acquire(const uint32_t* p, Site site = Site::here());
__device__ void st_release(uint32_t* p, uint32_t value, Site site = Site::here());
// In the body of a loop that waits for another block. A block may only wait for blocks of a lower linear index.
__device__ void spin_pause(Site site = Site::here());

}  // namespace foveate::cuda::dev

#include "cuda/device/convert.cuh"
#include "device_impl.cuh"
