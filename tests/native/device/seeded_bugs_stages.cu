// Warps that each copy tiles of their own to two stages by cp.async and add up their columns, as decode does, and the same with one mistake
// each: what the emulator says of every one.
//   usage: emulated_seeded_bugs_stages BUG BY; BY: 0 by ldmatrix and mma, 1 by loads; prints one line per schedule and seed: "ok", "wrong" or
//   the report.
#include <cmath>
#include <vector>

#include "cuda/device/device.cuh"
#include "cuda/host/launch.h"
#include "emulator/checks/global_memory.h"
#include "seeded_bugs_main.h"

using namespace foveate;
using namespace foveate::cuda;

namespace {

enum Bug {
  kNone,
  kNoSyncWarpBeforeReuse,  // a lane's next copy goes where others may still read
  kNoSyncWarpAfterWait,  // each lane waits for its own copies only
  kNoWait,  // nobody waits
  kWaitTooLax,  // the wait leaves the group of the tile that is used
  kThreeStagesOfTwo,  // one more tile is under way than there are stages
  kWarpInBranch,  // warp() where one lane comes
  kBugs
};

constexpr int kKeys = 16, kColumns = 64, kWarps = 2, kTiles = 12, kStages = 2;
constexpr int kRowBytes = kColumns * 2 + 16;  // an odd multiple of 16: 8 rows lie in different banks
constexpr uint32_t kStageBytes = kKeys * kRowBytes;

struct Params {
  const bf16* x;  // [kTiles, 16, 64]
  float* sums;  // [kWarps, 64]
  int by_loads;
};

__device__ void copy_tile(uint32_t stage, const bf16* tile) {
  for (int i = dev::lane(); i < kKeys * 8; i += 32) dev::cp_async<16>(stage + i / 8 * kRowBytes + i % 8 * 16, tile + i * 8);
}

// Columns 8n + 2t, 8n + 2t + 1, as mma leaves them, of a matrix of ones times the tile.
__device__ void add_by_mma(float (&sum)[8][4], uint32_t stage) {
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  for (int n = 0; n < 8; n += 2) {
    uint32_t b[4];
    dev::ldmatrix_x4_trans(b, stage + dev::lane() % 16 * kRowBytes + n * 16 + dev::lane() / 16 * 16);
    dev::mma_m16n8k16<bf16>(sum[n], ones, b[0], b[1]);
    dev::mma_m16n8k16<bf16>(sum[n + 1], ones, b[2], b[3]);
  }
}
__device__ void add_by_loads(float (&sum)[8][4], uint32_t stage) {
  for (int n = 0; n < 8; ++n) {
    for (int key = 0; key < kKeys; ++key) {
      const float2 x = dev::unpack<bf16>(dev::ld_shared<uint32_t>(stage + key * kRowBytes + n * 16 + dev::lane() % 4 * 4));
      sum[n][0] += x.x, sum[n][1] += x.y;
    }
  }
}

template <int bug>
__global__ void __launch_bounds__(32 * kWarps) sum_kernel(const __grid_constant__ Params p) {
  int warp = 0;
  if (bug != kWarpInBranch || dev::lane() == 0) warp = dev::warp();
  const uint32_t stages = dev::smem_base() + warp * kStages * kStageBytes;
  const auto fetch = [&](int tile) {
    if (tile < kTiles) copy_tile(stages + tile / kWarps % kStages * kStageBytes, p.x + tile * kKeys * kColumns);
    dev::cp_async_commit();
  };
  const int ahead = bug == kThreeStagesOfTwo ? 3 : 2;
  for (int i = 0; i < ahead; ++i) fetch(warp + i * kWarps);
  float sum[8][4] = {};
  for (int tile = warp; tile < kTiles; tile += kWarps) {
    if (bug == kWaitTooLax) {
      dev::cp_async_wait<kStages>();
    } else if (bug != kNoWait) {
      dev::cp_async_wait<kStages - 1>();
    }
    if (bug != kNoSyncWarpAfterWait) dev::sync_warp();
    const uint32_t stage = stages + tile / kWarps % kStages * kStageBytes;
    if (p.by_loads) {
      add_by_loads(sum, stage);
    } else {
      add_by_mma(sum, stage);
    }
    if (bug != kNoSyncWarpBeforeReuse) dev::sync_warp();
    fetch(tile + ahead * kWarps);
  }
  dev::cp_async_wait_all();
  if (dev::lane() < 4) {
    for (int n = 0; n < 8; ++n) {
      for (int c = 0; c < 2; ++c) dev::st_global(p.sums + warp * kColumns + 8 * n + 2 * dev::lane() + c, sum[n][c]);
    }
  }
}

using Launch = void (*)(dim3, dim3, size_t, const Stream&, const Params&);
template <int bug>
struct LaunchOf {
  static constexpr Launch value = launch<sum_kernel<bug>, Params>;
};

std::string run(int bug, int by_loads) {
  std::vector<uint16_t> x(kTiles * kKeys * kColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(__float_as_uint(static_cast<float>(i * 7919 % 251)) >> 16);  // whole
  std::vector<float> sums(kWarps * kColumns, NAN);
  const emulator::GlobalSpan spans[] = {{x.data(), x.size() * 2, "x"}, {sums.data(), sums.size() * 4, "sums"}};
  const Params params{reinterpret_cast<const bf16*>(x.data()), sums.data(), by_loads};
  try {
    launcher<Launch, LaunchOf>(bug, std::make_integer_sequence<int, kBugs>())(1, 32 * kWarps, kWarps * kStages * kStageBytes,
                                                                              Stream{0, nullptr}, params);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int column = 0; column < kWarps * kColumns; ++column) {
    float expected = 0;
    for (int tile = column / kColumns; tile < kTiles; tile += kWarps)
      for (int key = 0; key < kKeys; ++key)
        expected += __uint_as_float(static_cast<uint32_t>(x[(tile * kKeys + key) * kColumns + column % kColumns]) << 16);
    if (sums[column] != expected) return "wrong: column " + std::to_string(column) + " is " + std::to_string(sums[column]);
  }
  return "ok";
}

}  // namespace

int main(int argc, char** argv) {
  const int by_loads = argc == 3 ? std::atoi(argv[2]) : 0;
  return seeded_bugs_main(argc, argv, kBugs, [&](int bug) { return run(bug, by_loads); });
}
