// A matrix product by TMA, mbarriers and wgmma, and the same with one mistake each: what the emulator says of every one.
//   usage: emulated_seeded_bugs_hopper BUG; prints one line per schedule and seed: "ok", "wrong" or the report.
#include <cmath>
#include <vector>

#include "cuda/device/sm90/hopper.cuh"
#include "cuda/host/launch.h"
#include "emulator/checks/global_memory.h"
#include "seeded_bugs_main.h"

using namespace foveate;
using namespace foveate::cuda;

namespace {

enum Bug {
  kNone,
  kNoBarrierAfterInit,    // other warps may come to an mbarrier before it is one
  kNoInitFence,           // TMA may
  kNoEmptyWait,           // the producer does not wait until a stage is free
  kNoWgmmaWait,           // accumulators are used before the product is complete
  kWrongBytes,            // more bytes are announced than come
  kWrongParity,           // the consumers wait for the other phase
  kNoRelease,             // stages are never given back
  kNoFullWait,            // the consumers do not wait for the data
  kReleaseTooEarly,       // a stage is given back while wgmma reads it
  kWrongStride,           // of the 8-row groups of b
  kNoWgmmaFence,          // registers were written before
  kNoProxyFence,          // TMA stores what threads have just written
  kStoreNotWaitedFor,     // the kernel returns, and its shared memory with it
  kWgmmaNotWaitedFor,     // the last product
  kTooManyArrivals,       // the first warp gives each stage back twice
  kNoFenceBeforeLoad,     // TMA writes over what a thread has written
  kFenceIsNoSyncWarp,     // lanes read what others have written, with a proxy fence between
  kWarpSkipsWgmma,        // one of a warpgroup's four
  kBoxOutOfPlace,         // a tile that is not a multiple of 1024 bytes from the start
  kBugs
};

constexpr int kRows = 64, kDepth = 64, kStages = 2, kTiles = 5;
constexpr uint32_t kTileBytes = kRows * kDepth * 2, kStageBytes = 2 * kTileBytes;
constexpr uint32_t kBarriers = kStages * kStageBytes + kTileBytes, kSmemBytes = kBarriers + 64;
constexpr int kThreads = 160;  // a warpgroup that multiplies, and a warp that copies

struct Params {
  TensorMap a, b, out;  // [64, K], [64, K], [64, 64], bf16
};

template <int bug>
__device__ void copy_tiles(const Params& p, uint32_t smem, uint32_t full, uint32_t empty) {
  dev::st_shared<uint32_t>(smem, 0);
  if (bug != kNoFenceBeforeLoad) dev::fence_async_proxy();
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t stage = n % kStages, tile = smem + stage * kStageBytes + (bug == kBoxOutOfPlace ? 512 : 0);
    if (bug != kNoEmptyWait) dev::mbarrier_wait(empty + stage * 8, n / kStages % 2 ^ 1);
    dev::mbarrier_arrive_expect_tx(full + stage * 8, kStageBytes + (bug == kWrongBytes ? 16 : 0));
    const int32_t at[2] = {n * kDepth, 0};
    dev::tma_load(tile, p.a, at, full + stage * 8);
    dev::tma_load(tile + kTileBytes, p.b, at, full + stage * 8);
  }
}

template <int bug>
__device__ void multiply(float (&d)[32], uint32_t smem, uint32_t full, uint32_t empty) {
  for (int n = 0; n < kTiles; ++n) {
    const uint32_t stage = n % kStages, tile = smem + stage * kStageBytes;
    if (bug != kNoFullWait) dev::mbarrier_wait(full + stage * 8, n / kStages % 2 ^ (bug == kWrongParity ? 1 : 0));
    if (bug != kNoWgmmaFence) dev::wgmma_fence();
    for (uint32_t k = 0; k < kDepth / 16; ++k) {
      const uint64_t a = dev::matrix_descriptor(tile + k * 32, 0, 1024, Swizzle::k128);
      const uint64_t b = dev::matrix_descriptor(tile + kTileBytes + k * 32, 0, bug == kWrongStride ? 512 : 1024, Swizzle::k128);
      if (bug == kWarpSkipsWgmma && n == 2 && threadIdx.x / 32 == 1) continue;
      dev::wgmma<bf16, 64>(d, a, b, n > 0 || k > 0);
    }
    dev::wgmma_commit();
    if (bug == kReleaseTooEarly) dev::mbarrier_arrive(empty + stage * 8);
    if (bug == kNoWgmmaWait || (bug == kWgmmaNotWaitedFor && n == kTiles - 1)) {
      dev::wgmma_wait<1>();
    } else {
      dev::wgmma_wait<0>();
    }
    if (bug != kReleaseTooEarly && bug != kNoRelease) dev::mbarrier_arrive(empty + stage * 8);
    if (bug == kTooManyArrivals && threadIdx.x < 32) dev::mbarrier_arrive(empty + stage * 8);
  }
  dev::wgmma_keep(d);
}

template <int bug>
__global__ void __launch_bounds__(kThreads) gemm_kernel(const __grid_constant__ Params p) {
  const uint32_t smem = dev::smem_base(), staging = smem + kStages * kStageBytes, full = smem + kBarriers, empty = full + 8 * kStages;
  const int warp = dev::warp(), lane = dev::lane();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) dev::mbarrier_init(full + stage * 8, 1), dev::mbarrier_init(empty + stage * 8, 128);
    if (bug != kNoInitFence) dev::mbarrier_init_fence();
  }
  if (bug != kNoBarrierAfterInit) dev::sync_threads();
  if (warp == 4) {
    if (lane == 0) copy_tiles<bug>(p, smem, full, empty);
    return;
  }
  float d[32];
  multiply<bug>(d, smem, full, empty);
  for (int i = 0; i < 32; i += 2) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    dev::st_shared(staging + row * 128 + column * 2, dev::pack<bf16>(d[i], d[i + 1]));
  }
  if (bug != kNoProxyFence) dev::fence_async_proxy();
  if (bug == kFenceIsNoSyncWarp) {
    dev::fence_async_proxy();
    if (dev::ld_shared<uint32_t>(staging + warp * 16 * 128) == 1) return;
  }
  dev::named_barrier_sync(1, 128);
  if (threadIdx.x != 0) return;
  const int32_t at[2] = {0, 0};
  dev::tma_store(p.out, at, staging);
  dev::tma_store_commit();
  if (bug != kStoreNotWaitedFor) dev::tma_store_wait<0>();
}

using Launch = void (*)(dim3, dim3, size_t, const Stream&, const Params&);
template <int bug>
struct LaunchOf {
  static constexpr Launch value = launch<gemm_kernel<bug>, Params>;
};

struct alignas(128) Matrices {
  uint16_t a[kRows][kTiles * kDepth], b[kRows][kTiles * kDepth], out[kRows][kRows];
};

float to_float(uint16_t code) { return __uint_as_float(static_cast<uint32_t>(code) << 16); }

std::string run(int bug) {
  static Matrices m;
  uint32_t state = 1;
  for (uint16_t* x = &m.a[0][0]; x < &m.out[0][0]; ++x) {
    state = state * 1664525u + 1013904223u;
    *x = static_cast<uint16_t>(__float_as_uint(static_cast<float>(state >> 8) / 8388608.0f - 1.0f) >> 16);
  }
  std::fill_n(&m.out[0][0], kRows * kRows, 0xffff);
  const emulator::GlobalSpan spans[] = {{m.a, sizeof(m.a), "a"}, {m.b, sizeof(m.b), "b"}, {m.out, sizeof(m.out), "out"}};
  const auto map = [](const void* data, uint64_t columns, Swizzle swizzle) {
    return make_tensor_map({DType::kBFloat16, data, 2, {columns, kRows}, {columns * 2}, {kDepth, kRows}, swizzle});
  };
  const Params params{map(m.a, kTiles * kDepth, Swizzle::k128), map(m.b, kTiles * kDepth, Swizzle::k128),
                      map(m.out, kRows, Swizzle::kNone)};
  try {
    launcher<Launch, LaunchOf>(bug, std::make_integer_sequence<int, kBugs>())(1, kThreads, kSmemBytes, Stream{0, nullptr}, params);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) {
      double expected = 0;
      for (int k = 0; k < kTiles * kDepth; ++k) expected += double(to_float(m.a[i][k])) * to_float(m.b[j][k]);
      const double difference = std::fabs(to_float(m.out[i][j]) - expected);
      if (!(difference <= 0.004 * (1 + std::fabs(expected))))
        return "wrong: element " + std::to_string(i * kRows + j) + " is off by " + std::to_string(difference);
    }
  }
  return "ok";
}

}  // namespace

int main(int argc, char** argv) {
  return seeded_bugs_main(argc, argv, kBugs, [](int bug) { return run(bug); });
}
