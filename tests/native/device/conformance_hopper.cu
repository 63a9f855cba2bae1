// Each function of sm90/hopper.cuh on its own, on the emulator or on an sm_90a GPU. Cases, input and output as in conformance.cu.
#include "conformance_main.h"
#include "cuda/device/sm90/hopper.cuh"

using namespace foveate;
using namespace foveate::cuda;

namespace {

// ---- TMA: in = a tensor of bf16, [6][20][40] = 2400 words; out = what lies in shared memory, or what has been stored ----------

struct TmaParams {
  TensorMap map;
  const uint32_t* in;
  uint32_t* out;
  int words;  // of the box
  int32_t at[3];
};

__global__ void tma_load_kernel(const __grid_constant__ TmaParams p) {
  const uint32_t tile = dev::smem_base(), barrier = tile + 16384;
  if (threadIdx.x == 0) {
    dev::mbarrier_init(barrier, 1);
    dev::mbarrier_init_fence();
  }
  dev::sync_threads();
  if (threadIdx.x == 0) {
    dev::mbarrier_arrive_expect_tx(barrier, p.words * 4);
    dev::tma_load(tile, p.map, p.at, barrier);
  }
  dev::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < p.words; i += blockDim.x) dev::st_global(p.out + i, dev::ld_shared<uint32_t>(tile + i * 4));
}

// The box is filled with the words 0, 1, 2, ... of `in`, and stored, or added, to out [6][20][40].
template <bool add>
__global__ void tma_store_kernel(const __grid_constant__ TmaParams p) {
  const uint32_t tile = dev::smem_base();
  for (int i = threadIdx.x; i < p.words; i += blockDim.x) dev::st_shared(tile + i * 4, dev::ld_global<uint32_t>(p.in + i));
  dev::fence_async_proxy();
  dev::sync_threads();
  if (threadIdx.x != 0) return;
  if (add) {
    dev::tma_add(p.map, p.at, tile);
  } else {
    dev::tma_store(p.map, p.at, tile);
  }
  dev::tma_store_commit();
  dev::tma_store_wait<0>();
}

// Rows of 32, 16 and 8 elements of bf16 fill the widths of the swizzles of 64 and 32 bytes, and half of that of 128.
template <int row, Swizzle swizzle>
TmaParams tma_params(const void* tensor, const Params& p, int first) {
  const TensorMapSpec spec{DType::kBFloat16, tensor, 3, {40, 20, 6}, {80, 1600}, {row, 8, 2}, swizzle};
  return {make_tensor_map(spec), p.in, p.out, row * 8 * 2 / 2, {first, 15, 4}};
}
template <int row, Swizzle swizzle, int first>
void tma_load_case(dim3 grid, dim3 block, size_t smem, const Stream& stream, const Params& p) {
  launch<tma_load_kernel>(grid, block, smem, stream, tma_params<row, swizzle>(p.in, p, first));
}
template <bool add>
void tma_store_case(dim3 grid, dim3 block, size_t smem, const Stream& stream, const Params& p) {
  launch<tma_store_kernel<add>>(grid, block, smem, stream, tma_params<32, Swizzle::k64>(p.out, p, 16));
}

// ---- mbarrier: in = 64 words; one warp fills a ring of two buffers, another empties it; out[i] = sum over rounds of in[i] * (round + 1)

__global__ void mbarrier_kernel(const __grid_constant__ Params p) {
  const uint32_t smem = dev::smem_base(), full = smem + 512, empty = full + 16;
  const int lane = dev::lane(), rounds = 5;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) dev::mbarrier_init(full + stage * 8, 32), dev::mbarrier_init(empty + stage * 8, 32);
    dev::mbarrier_init_fence();
  }
  dev::sync_threads();
  uint32_t sums[2] = {};
  for (int r = 0; r < rounds; ++r) {
    const uint32_t stage = r % 2, buffer = smem + stage * 256, parity = r / 2 % 2;
    if (dev::warp() == 0) {
      dev::mbarrier_wait(empty + stage * 8, parity ^ 1);
      for (int i = lane; i < 64; i += 32) dev::st_shared(buffer + i * 4, dev::ld_global<uint32_t>(p.in + i) * (r + 1));
      dev::mbarrier_arrive(full + stage * 8);
    } else {
      dev::mbarrier_wait(full + stage * 8, parity);
      for (int i = 0; i < 2; ++i) sums[i] += dev::ld_shared<uint32_t>(buffer + (63 - lane - i * 32) * 4);
      dev::mbarrier_arrive(empty + stage * 8);
    }
  }
  if (dev::warp() == 1)
    for (int i = 0; i < 2; ++i) dev::st_global(p.out + 63 - lane - i * 32, sums[i]);
}

// ---- wgmma: in = leading and stride bytes of a, of b; 6144 words of shared memory, a at its start and b at byte 8192; registers of a
// [128][4]; accumulators [128][n / 2]; out = d [128][n / 2] ----------------------------------------------------------------------

enum class A { kShared, kSharedMMajor, kRegisters };

template <class T, int n, A a, bool b_n_major, Swizzle swizzle>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ Params p) {
  const uint32_t smem = dev::smem_base(), thread = threadIdx.x;
  const uint32_t *image = p.in + 4, *registers = image + 6144, *accumulators = registers + 512;
  for (int i = thread; i < 6144; i += 128) dev::st_shared(smem + i * 4, dev::ld_global<uint32_t>(image + i));
  uint32_t fragment[4];
  float d[n / 2];
  for (int i = 0; i < 4; ++i) fragment[i] = dev::ld_global<uint32_t>(registers + thread * 4 + i);
  for (int i = 0; i < n / 2; ++i) d[i] = dev::ld_global<float>(accumulators + thread * (n / 2) + i);
  dev::fence_async_proxy();
  dev::sync_threads();
  const auto bytes = [&](int i) { return dev::ld_global<uint32_t>(p.in + i); };
  const uint64_t a_descriptor = dev::matrix_descriptor(smem, bytes(0), bytes(1), swizzle);
  const uint64_t b_descriptor = dev::matrix_descriptor(smem + 8192, bytes(2), bytes(3), swizzle);
  dev::wgmma_fence();
  if constexpr (a == A::kRegisters) {
    dev::wgmma<T, n, b_n_major>(d, fragment, b_descriptor, true);
  } else {
    dev::wgmma<T, n, a == A::kSharedMMajor, b_n_major>(d, a_descriptor, b_descriptor, true);
  }
  dev::wgmma_commit();
  dev::wgmma_wait<0>();
  dev::wgmma_keep(d);
  for (int i = 0; i < n / 2; ++i) dev::st_global(p.out + thread * (n / 2) + i, d[i]);
}

const Case cases[] = {
    {"tma_load_128", 256, 64, 1, tma_load_case<32, Swizzle::k128, 0>},
    {"tma_load_64", 256, 64, 1, tma_load_case<32, Swizzle::k64, 24>},
    {"tma_load_32", 128, 64, 1, tma_load_case<16, Swizzle::k32, 8>},
    {"tma_load_none", 64, 64, 1, tma_load_case<8, Swizzle::kNone, 32>},
    {"tma_store", 2400, 64, 1, tma_store_case<false>, true},
    {"tma_add", 2400, 64, 1, tma_store_case<true>, true},
    {"mbarrier", 64, 64, 1, launch<mbarrier_kernel, Params>},
    {"wgmma_k_k_128", 128 * 32, 128, 1, launch<wgmma_kernel<bf16, 64, A::kShared, false, Swizzle::k128>, Params>},
    {"wgmma_m_n_128", 128 * 64, 128, 1, launch<wgmma_kernel<f16, 128, A::kSharedMMajor, true, Swizzle::k128>, Params>},
    {"wgmma_k_n_64", 128 * 32, 128, 1, launch<wgmma_kernel<f16, 64, A::kShared, true, Swizzle::k64>, Params>},
    {"wgmma_m_k_32", 128 * 16, 128, 1, launch<wgmma_kernel<bf16, 32, A::kSharedMMajor, false, Swizzle::k32>, Params>},
    {"wgmma_r_k_128", 128 * 48, 128, 1, launch<wgmma_kernel<bf16, 96, A::kRegisters, false, Swizzle::k128>, Params>},
    {"wgmma_r_n_128", 128 * 32, 128, 1, launch<wgmma_kernel<f16, 64, A::kRegisters, true, Swizzle::k128>, Params>},
};

}  // namespace

int main(int argc, char** argv) { return conformance_main(cases, std::size(cases), argc, argv); }
