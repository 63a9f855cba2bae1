// The device layer on a GPU, sm_80 and later. What each function promises stands in device.cuh.
//
// Shared memory is read and written by volatile asm, which the compiler keeps in order among itself and with barriers; what writes memory,
// or makes others' writes visible, also clobbers "memory" so that plain accesses stay on their side of it.
#pragma once

namespace foveate::cuda::dev {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp(Site) { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0); }

// ---- shared memory -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// The unsigned integer or integer vector of T's size, in which its bits travel.
template <int bytes>
struct Carrier;
template <>
struct Carrier<1> {
  using type = unsigned char;
};
template <>
struct Carrier<2> {
  using type = unsigned short;
};
template <>
struct Carrier<4> {
  using type = unsigned int;
};
template <>
struct Carrier<8> {
  using type = uint2;
};
template <>
struct Carrier<16> {
  using type = uint4;
};
template <class T>
using carrier = typename Carrier<sizeof(T)>::type;

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {  // by value: through a reference, the copy would be from memory, byte by byte
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>);
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
__device__ __forceinline__ T ld_shared(uint32_t address, Site) {
  carrier<T> v;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  } else {
    uint32_t byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address));
    v = static_cast<unsigned char>(byte);
  }
  return bits_as<T>(v);
}

template <class T>
__device__ __forceinline__ void st_shared(uint32_t address, T value, Site) {
  const auto v = bits_as<carrier<T>>(value);
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
  } else {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(static_cast<uint32_t>(v)) : "memory");
  }
}

__device__ __forceinline__ void atomic_add_shared(uint32_t address, float value, Site) {
  asm volatile("red.shared.add.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// ---- matrix fragments --------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address, Site) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address));
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t row_address, Site) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row_address));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_address, Site) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address));
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row_address, Site) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row_address));
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------------------

template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool valid, Site) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const size_t source = __cvta_generic_to_global(from);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(to), "l"(source), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait(Site) {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all(Site) { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- warp and block ----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T shfl_xor(T value, int mask, Site) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>
__device__ __forceinline__ T shfl_idx(T value, int source, Site) {
  return __shfl_sync(kAllLanes, value, source);
}
template <class T>
__device__ __forceinline__ T shfl_down(T value, int delta, Site) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
template <class T>
__device__ __forceinline__ T shfl_up(T value, int delta, Site) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
__device__ __forceinline__ uint32_t ballot(bool predicate, Site) { return __ballot_sync(kAllLanes, predicate); }
__device__ __forceinline__ bool any(bool predicate, Site) { return __any_sync(kAllLanes, predicate); }
__device__ __forceinline__ bool all(bool predicate, Site) { return __all_sync(kAllLanes, predicate); }
__device__ __forceinline__ void sync_warp(Site) { __syncwarp(); }

__device__ __forceinline__ void sync_threads(Site) { __syncthreads(); }
__device__ __forceinline__ bool sync_threads_or(bool predicate, Site) { return __syncthreads_or(predicate); }
__device__ __forceinline__ void named_barrier_sync(int id, int threads, Site) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads, Site) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- approximate math and conversions ----------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// ---- global memory -----------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T ld_global(const void* p, Site) {
  const carrier<T> v = *static_cast<const carrier<T>*>(p);
  return bits_as<T>(v);
}
template <class T>
__device__ __forceinline__ T ld_global_nc(const void* p, Site) {
  return bits_as<T>(__ldg(static_cast<const carrier<T>*>(p)));
}
template <class T>
__device__ __forceinline__ T ld_global_stream(const void* p, Site) {
  carrier<T> v;
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof(T) == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  } else if constexpr (sizeof(T) == 8) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  } else if constexpr (sizeof(T) == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
  } else {
    v = __ldg(static_cast<const carrier<T>*>(p));
  }
  return bits_as<T>(v);
}
template <class T>
__device__ __forceinline__ void st_global(void* p, T value, Site) {
  *static_cast<carrier<T>*>(p) = bits_as<carrier<T>>(value);
}
template <class T>
__device__ __forceinline__ void st_global_stream(void* p, T value, Site) {
  __stcs(static_cast<carrier<T>*>(p), bits_as<carrier<T>>(value));
}
__device__ __forceinline__ void atomic_add(float* p, float value, Site) { atomicAdd(p, value); }

__device__ __forceinline__ void fence_gpu() { __threadfence(); }
__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value, Site) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ uint32_t ld_acquire(const uint32_t* p, Site) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  return value;
}
__device__ __forceinline__ void st_release(uint32_t* p, uint32_t value, Site) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}
__device__ __forceinline__ void spin_pause(Site) { __nanosleep(32); }

}  // namespace foveate::cuda::dev
