// Each function of the device layer on its own, on the emulator or on a GPU.
//   usage: conformance CASE < input > output; both are 32-bit words. tests/cuda_kernels/test_device_layer.py knows what must come out.
#include "conformance_main.h"
#include "cuda/device/device.cuh"

using namespace foveate;
using namespace foveate::cuda;

namespace {

// ---- matrix fragments: in = a [32][4], b [32][2], c [32][4]; out = d [32][4] --------------------------------------------------

enum class Mma { kBf16, kF16, kTf32 };

template <Mma kind>
__global__ void mma_kernel(const __grid_constant__ Params p) {
  const int lane = dev::lane();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = dev::ld_global<uint32_t>(p.in + lane * 4 + i);
  for (int i = 0; i < 2; ++i) b[i] = dev::ld_global<uint32_t>(p.in + 128 + lane * 2 + i);
  for (int i = 0; i < 4; ++i) d[i] = dev::ld_global<float>(p.in + 192 + lane * 4 + i);
  if constexpr (kind == Mma::kBf16) {
    dev::mma_m16n8k16<bf16>(d, a, b[0], b[1]);
  } else if constexpr (kind == Mma::kF16) {
    dev::mma_m16n8k16<f16>(d, a, b[0], b[1]);
  } else {
    dev::mma_m16n8k8_tf32(d, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; ++i) dev::st_global(p.out + lane * 4 + i, d[i]);
}

// in = 32 rows of 16 bytes, then the row that each lane points to; out = d [32][count]
template <int count, bool transposed>
__global__ void ldmatrix_kernel(const __grid_constant__ Params p) {
  const int lane = dev::lane();
  const uint32_t smem = dev::smem_base();
  dev::st_shared(smem + lane * 16, dev::ld_global<uint4>(p.in + lane * 4));
  dev::sync_warp();
  const uint32_t row = smem + dev::ld_global<uint32_t>(p.in + 128 + lane) * 16;
  uint32_t d[count];
  if constexpr (count == 4 && transposed) dev::ldmatrix_x4_trans(d, row);
  if constexpr (count == 4 && !transposed) dev::ldmatrix_x4(d, row);
  if constexpr (count == 2 && transposed) dev::ldmatrix_x2_trans(d, row);
  if constexpr (count == 2 && !transposed) dev::ldmatrix_x2(d, row);
  for (int i = 0; i < count; ++i) dev::st_global(p.out + lane * count + i, d[i]);
}

// ---- warp: in = value [32]; out = [32][9] ------------------------------------------------------------------------------------

__global__ void warp_kernel(const __grid_constant__ Params p) {
  const int lane = dev::lane();
  const uint32_t value = dev::ld_global<uint32_t>(p.in + lane);
  const uint2 two = make_uint2(value, ~value);
  double wide;
  memcpy(&wide, &two, 8);
  wide = dev::shfl_xor(wide, 1);
  uint2 other;
  memcpy(&other, &wide, 8);
  const uint32_t results[9] = {dev::shfl_xor(value, 5),
                               dev::shfl_idx(value, lane * 7 + 3),
                               dev::shfl_down(value, 3),
                               dev::shfl_up(value, 2),
                               other.y,
                               dev::ballot(value % 3 == 0),
                               static_cast<uint32_t>(dev::any(value == 0)),
                               static_cast<uint32_t>(dev::all(value < 1000000)),
                               static_cast<uint32_t>(dev::warp())};
  for (int i = 0; i < 9; ++i) dev::st_global(p.out + lane * 9 + i, results[i]);
}

// ---- memory ------------------------------------------------------------------------------------------------------------------

// in = 128 words; out = 256 words of shared memory that asynchronous copies have filled, by 16, 8 and 4 bytes, every third with zeros
__global__ void cp_async_kernel(const __grid_constant__ Params p) {
  const int lane = dev::lane();
  const uint32_t smem = dev::smem_base();
  const bool valid = lane % 3 != 2;
  dev::cp_async<16>(smem + lane * 16, p.in + lane * 4, valid);
  dev::cp_async_commit();
  dev::cp_async<8>(smem + 512 + lane * 8, p.in + lane * 2, valid);
  dev::cp_async_commit();
  dev::cp_async<4>(smem + 768 + lane * 4, p.in + lane, valid);
  dev::cp_async<4>(smem + 896 + lane * 4, p.in + 127 - lane);
  dev::cp_async_wait<1>();
  dev::sync_warp();
  for (int i = 0; i < 4; ++i) dev::st_global(p.out + i * 32 + lane, dev::ld_shared<uint32_t>(smem + (i * 32 + lane) * 4));
  dev::cp_async_wait_all();
  dev::sync_warp();
  for (int i = 4; i < 8; ++i) dev::st_global(p.out + i * 32 + lane, dev::ld_shared<uint32_t>(smem + (i * 32 + lane) * 4));
}

// in = 128 words, passed on byte by byte, by 2, 4, 8 and 16 bytes through shared memory and every kind of global access
template <class T>
__device__ void copy_through(const Params& p, uint32_t first_byte) {
  const int lane = dev::lane();
  const uint32_t at = first_byte + lane * sizeof(T);
  const char* in = reinterpret_cast<const char*>(p.in) + at;
  char* out = reinterpret_cast<char*>(p.out) + at;
  const T value = lane % 3 == 0 ? dev::ld_global<T>(in) : lane % 3 == 1 ? dev::ld_global_nc<T>(in) : dev::ld_global_stream<T>(in);
  dev::st_shared(dev::smem_base() + at, value);
  dev::sync_warp();
  const T back = dev::ld_shared<T>(dev::smem_base() + at);
  if (lane % 2 == 0) {
    dev::st_global(out, back);
  } else {
    dev::st_global_stream(out, back);
  }
}

__global__ void memory_kernel(const __grid_constant__ Params p) {
  copy_through<uint8_t>(p, 0);
  copy_through<uint16_t>(p, 64);
  copy_through<uint32_t>(p, 128);
  copy_through<uint2>(p, 256);
  copy_through<uint4>(p, 512);
}

// in = 512 floats that are small whole numbers; out = their sum by atomics in shared and global memory, and by the block that comes last
__global__ void sums_kernel(const __grid_constant__ Params p) {
  const uint32_t smem = dev::smem_base();
  float* sums = reinterpret_cast<float*>(p.out);
  float* parts = reinterpret_cast<float*>(p.scratch) + 16;
  const float value = dev::ld_global<float>(p.in + blockIdx.x * blockDim.x + threadIdx.x);
  if (threadIdx.x == 0) dev::st_shared(smem, 0.0f);
  dev::sync_threads();
  dev::atomic_add_shared(smem, value);
  dev::atomic_add(reinterpret_cast<float*>(p.scratch) + 1, value);
  dev::sync_threads();
  if (threadIdx.x == 0) dev::st_global(parts + blockIdx.x, dev::ld_shared<float>(smem));
  dev::fence_gpu();
  dev::sync_threads();
  bool last = false;
  if (threadIdx.x == 0) last = dev::atomic_add_acq_rel(p.scratch, 1) == gridDim.x - 1;
  if (!dev::sync_threads_or(last) || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += dev::ld_global<float>(parts + b);
  dev::st_global(sums, sum);
  dev::st_global(sums + 1, dev::ld_global<float>(p.scratch + 1));
  dev::st_global<uint32_t>(p.scratch, 0);
}

// Blocks hand a number on, each to the next: in = 4 words, out[b] = the sum of in[0..b].
__global__ void chain_kernel(const __grid_constant__ Params p) {
  if (threadIdx.x != 0) return;
  while (dev::ld_acquire(p.scratch) != blockIdx.x) dev::spin_pause();
  const uint32_t before = blockIdx.x == 0 ? 0 : dev::ld_global<uint32_t>(p.out + blockIdx.x - 1);
  dev::st_global(p.out + blockIdx.x, before + dev::ld_global<uint32_t>(p.in + blockIdx.x));
  dev::fence_gpu();
  dev::st_release(p.scratch, blockIdx.x + 1);
}

// Warps 0 and 1 fill a buffer of 64 words again and again, warps 2 and 3 add it up; barriers 1 (full) and 2 (empty) keep them apart.
// in = 64 words, out = [64] = sum over rounds r of in[i] * (r + 1)
__global__ void named_barriers_kernel(const __grid_constant__ Params p) {
  const uint32_t smem = dev::smem_base();
  const int i = threadIdx.x % 64, rounds = 3;
  if (threadIdx.x < 64) {
    const uint32_t value = dev::ld_global<uint32_t>(p.in + i);
    for (int r = 0; r < rounds; ++r) {
      dev::named_barrier_sync(2, 128);
      dev::st_shared(smem + i * 4, value * (r + 1));
      dev::named_barrier_arrive(1, 128);
    }
  } else {
    uint32_t sum = 0;
    for (int r = 0; r < rounds; ++r) {
      dev::named_barrier_arrive(2, 128);
      dev::named_barrier_sync(1, 128);
      sum += dev::ld_shared<uint32_t>(smem + (63 - i) * 4);
    }
    dev::st_global(p.out + i, sum);
  }
}

// ---- one word to one word ----------------------------------------------------------------------------------------------------

template <class Op>
__global__ void elementwise_kernel(const __grid_constant__ Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) dev::st_global(p.out + i, Op::apply(dev::ld_global<uint32_t>(p.in + i)));
}

template <class T>
struct Widen {
  static __device__ uint32_t apply(uint32_t x) {
    if constexpr (sizeof(T) == 2) {
      // both ways to widen agree, or the result is a number that no 16 bits widen to
      const float one = dev::to_float(T{static_cast<uint16_t>(x)}), two = dev::unpack<T>(x << 16).y;
      return __float_as_uint(one) == __float_as_uint(two) ? __float_as_uint(one) : 1u;
    } else {
      return __float_as_uint(dev::to_float(T{static_cast<uint8_t>(x)}));
    }
  }
};
template <class T>
struct Narrow {
  static __device__ uint32_t apply(uint32_t x) {
    const float value = __uint_as_float(x);
    if constexpr (std::is_same_v<T, int8_t>) {
      return static_cast<uint8_t>(dev::from_float<int8_t>(value));
    } else if constexpr (sizeof(T) == 1) {
      return dev::from_float<T>(value).bits;
    } else {
      return dev::from_float<T>(value).bits | (dev::pack<T>(1.0f, value) & 0xffff0000u);
    }
  }
};
struct Tf32 {
  static __device__ uint32_t apply(uint32_t x) { return dev::to_tf32(__uint_as_float(x)); }
};
struct Exp2 {
  static __device__ uint32_t apply(uint32_t x) { return __float_as_uint(dev::exp2_approx(__uint_as_float(x))); }
};
struct Log2 {
  static __device__ uint32_t apply(uint32_t x) { return __float_as_uint(dev::log2_approx(__uint_as_float(x))); }
};
struct Rcp {
  static __device__ uint32_t apply(uint32_t x) { return __float_as_uint(dev::rcp_approx(__uint_as_float(x))); }
};
struct Rsqrt {
  static __device__ uint32_t apply(uint32_t x) { return __float_as_uint(dev::rsqrt_approx(__uint_as_float(x))); }
};
struct Tanh {
  static __device__ uint32_t apply(uint32_t x) { return __float_as_uint(dev::tanh_approx(__uint_as_float(x))); }
};

// ---- the table ---------------------------------------------------------------------------------------------------------------

template <class Op>
constexpr Case elementwise(const char* name) {
  return {name, 0, 128, 0, launch<elementwise_kernel<Op>, Params>};
}

const Case cases[] = {
    {"mma_bf16", 128, 32, 1, launch<mma_kernel<Mma::kBf16>, Params>},
    {"mma_f16", 128, 32, 1, launch<mma_kernel<Mma::kF16>, Params>},
    {"mma_tf32", 128, 32, 1, launch<mma_kernel<Mma::kTf32>, Params>},
    {"ldmatrix_x4", 128, 32, 1, launch<ldmatrix_kernel<4, false>, Params>},
    {"ldmatrix_x2", 64, 32, 1, launch<ldmatrix_kernel<2, false>, Params>},
    {"ldmatrix_x4_trans", 128, 32, 1, launch<ldmatrix_kernel<4, true>, Params>},
    {"ldmatrix_x2_trans", 64, 32, 1, launch<ldmatrix_kernel<2, true>, Params>},
    {"warp", 288, 32, 1, launch<warp_kernel, Params>},
    {"cp_async", 256, 32, 1, launch<cp_async_kernel, Params>},
    {"memory", 256, 32, 1, launch<memory_kernel, Params>},
    {"sums", 2, 128, 4, launch<sums_kernel, Params>},
    {"chain", 4, 32, 4, launch<chain_kernel, Params>},
    {"named_barriers", 64, 128, 1, launch<named_barriers_kernel, Params>},
    elementwise<Widen<bf16>>("widen_bf16"),
    elementwise<Widen<f16>>("widen_f16"),
    elementwise<Widen<f8e4m3>>("widen_f8e4m3"),
    elementwise<Narrow<bf16>>("narrow_bf16"),
    elementwise<Narrow<f16>>("narrow_f16"),
    elementwise<Narrow<f8e4m3>>("narrow_f8e4m3"),
    elementwise<Narrow<int8_t>>("narrow_int8"),
    elementwise<Tf32>("to_tf32"),
    elementwise<Exp2>("exp2"),
    elementwise<Log2>("log2"),
    elementwise<Rcp>("rcp"),
    elementwise<Rsqrt>("rsqrt"),
    elementwise<Tanh>("tanh"),
};

}  // namespace

int main(int argc, char** argv) { return conformance_main(cases, std::size(cases), argc, argv); }
