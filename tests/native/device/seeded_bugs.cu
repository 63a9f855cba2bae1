// A small flash attention, and the same with one mistake each: what the emulator says of every one. tests/cuda_kernels/test_emulator.py runs it.
//   usage: emulated_seeded_bugs BUG S; prints one line per schedule and seed: "ok", "wrong" or the report.
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
  kNoBarrierBeforeReuse,   // a tile is overwritten while other warps may still read it
  kNoBarrierAfterWait,     // each thread waits for its own copies only
  kWaitTooLax,             // the wait leaves the group of the tile that is used
  kWrongSwizzleOfV,        // read with the chunk of another row
  kRowNeverLoaded,         // the last row of a tile
  kRowOutOfBounds,         // keys beyond S are copied
  kStoreOutOfBounds,       // queries beyond S are stored
  kDivergentShuffle,       // half of the warp does not take part
  kWarpSkipsBarrier,       // the last warp does not come to a barrier
  kNoSyncWarp,             // lanes read what other lanes of the warp have just written
  kCopyNeverWaitedFor,     // one tile too many is prefetched
  kThirdStage,             // of a ring of two
  kMisaligned,             // 16 bytes at an address that is a multiple of 8
  kNoBase,                 // an address that does not start from smem_base()
  kLaneReturnsEarly,       // before a shuffle of its warp
  kSpinsForever,           // on a counter that nobody raises
  kBarrierCountsDiffer,    // 128 threads on one side, 64 on the other
  kReadWhileWriting,       // the output is staged over a tile that others read
  kMissingArrival,         // a barrier for three warps, to which two come
  kBugs
};

constexpr int kRows = 64, kDim = 64, kThreads = 128;
constexpr uint32_t kTileBytes = kRows * kDim * 2;
// Q, then two stages of K and V.
constexpr uint32_t kSmemBytes = kTileBytes * 5;

struct Params {
  const bf16 *q, *k, *v;  // [S, 64]
  bf16* out;              // [S, 64]
  uint32_t* counter;
  int s;
  float scale_log2;
};

// 16-byte chunks of a row of 128 bytes change places with the row, so that the 8 rows of an ldmatrix lie in different banks.
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

template <int bug>
__device__ void load_tile(uint32_t tile, const bf16* x, int first_row, int s) {
  for (int i = threadIdx.x; i < kRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    if (bug == kRowNeverLoaded && row == kRows - 1) continue;
    const bool valid = first_row + row < s || bug == kRowOutOfBounds;
    dev::cp_async<16>(chunk_address(tile, row, chunk), x + static_cast<int64_t>(first_row + row) * kDim + chunk * 8, valid);
  }
}

template <int bug>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ Params p) {
  const uint32_t q_tile = bug == kNoBase ? 0 : dev::smem_base();
  const auto k_tile = [&](int n) { return q_tile + kTileBytes * (1 + (bug == kThirdStage ? n % 3 : n % 2) * 2); };
  const int warp = dev::warp(), lane = dev::lane(), first_query = blockIdx.x * kRows, tiles = (p.s + kRows - 1) / kRows;

  load_tile<bug>(q_tile, p.q, first_query, p.s);
  load_tile<bug>(k_tile(0), p.k, 0, p.s);
  load_tile<bug>(k_tile(0) + kTileBytes, p.v, 0, p.s);
  dev::cp_async_commit();

  if (bug == kLaneReturnsEarly && lane == 7) {
    dev::cp_async_wait_all();
    return;
  }
  if (bug == kSpinsForever && threadIdx.x == 0) {
    while (dev::ld_acquire(p.counter) == 0) dev::spin_pause();
  }
  if (bug == kBarrierCountsDiffer) dev::named_barrier_sync(1, warp < 2 ? 128 : 64);
  if (bug == kMissingArrival && warp < 2) dev::named_barrier_sync(1, 96);

  float out[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};
  for (int n = 0; n < tiles; ++n) {
    const int last = bug == kCopyNeverWaitedFor ? tiles : tiles - 1;
    if (n < last) {
      load_tile<bug>(k_tile(n + 1), p.k, (n + 1) * kRows, p.s);
      load_tile<bug>(k_tile(n + 1) + kTileBytes, p.v, (n + 1) * kRows, p.s);
    }
    dev::cp_async_commit();
    if (bug == kWaitTooLax) {
      dev::cp_async_wait<2>();
    } else {
      dev::cp_async_wait<1>();
    }
    if (bug != kNoBarrierAfterWait && !(bug == kWarpSkipsBarrier && warp == 3 && n == 1)) dev::sync_threads();

    float score[8][4] = {};
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      dev::ldmatrix_x4(a, chunk_address(q_tile, warp * 16 + lane % 16, k * 2 + lane / 16));
      for (int j = 0; j < 4; ++j) {
        uint32_t b[4];  // keys 16j..16j+7 with dims 16k.. and 16k+8.., then keys 16j+8..
        dev::ldmatrix_x4(b, chunk_address(k_tile(n), j * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
        dev::mma_m16n8k16<bf16>(score[2 * j], a, b[0], b[1]);
        dev::mma_m16n8k16<bf16>(score[2 * j + 1], a, b[2], b[3]);
      }
    }
    float old_max[2] = {row_max[0], row_max[1]};
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        if (n * kRows + j * 8 + lane % 4 * 2 + i % 2 >= p.s) score[j][i] = -INFINITY;
        row_max[i / 2] = fmaxf(row_max[i / 2], score[j][i]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      if (bug == kDivergentShuffle && lane >= 16) continue;
      row_max[r] = fmaxf(row_max[r], dev::shfl_xor(row_max[r], 1));
      row_max[r] = fmaxf(row_max[r], dev::shfl_xor(row_max[r], 2));
      const float rescale = dev::exp2_approx((old_max[r] - row_max[r]) * p.scale_log2);
      row_sum[r] *= rescale;
      for (int j = 0; j < 8; ++j) out[j][2 * r] *= rescale, out[j][2 * r + 1] *= rescale;
    }
    for (int j = 0; j < 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        score[j][i] = dev::exp2_approx((score[j][i] - row_max[i / 2]) * p.scale_log2);
        row_sum[i / 2] += score[j][i];
      }
    }
    for (int k = 0; k < 4; ++k) {
      const uint32_t a[4] = {dev::pack<bf16>(score[2 * k][0], score[2 * k][1]), dev::pack<bf16>(score[2 * k][2], score[2 * k][3]),
                             dev::pack<bf16>(score[2 * k + 1][0], score[2 * k + 1][1]),
                             dev::pack<bf16>(score[2 * k + 1][2], score[2 * k + 1][3])};
      for (int j = 0; j < 4; ++j) {
        uint32_t b[4];  // keys 16k..16k+7 and 16k+8.. of dims 16j.., then of dims 16j+8..
        const int row = k * 16 + lane % 16, chunk = j * 2 + lane / 16;
        const uint32_t v_tile = k_tile(n) + kTileBytes;
        dev::ldmatrix_x4_trans(
            b, bug == kWrongSwizzleOfV ? v_tile + row * 128 + ((chunk ^ (row / 2 & 7)) << 4) : chunk_address(v_tile, row, chunk));
        dev::mma_m16n8k16<bf16>(out[2 * j], a, b[0], b[1]);
        dev::mma_m16n8k16<bf16>(out[2 * j + 1], a, b[2], b[3]);
      }
    }
    if (bug != kNoBarrierBeforeReuse) dev::sync_threads();
  }

  // The warp's 16 rows go through its part of Q's tile, so that each lane stores 16 bytes at a time.
  const uint32_t staging = bug == kReadWhileWriting ? q_tile + (warp + 1) % 4 * 16 * 128 : q_tile + warp * 16 * 128;
  if (bug == kReadWhileWriting) {
    uint32_t a[4];
    dev::ldmatrix_x4(a, q_tile + warp * 16 * 128 + lane % 16 * 128);
  }
  for (int r = 0; r < 2; ++r) {
    row_sum[r] += dev::shfl_xor(row_sum[r], 1);
    row_sum[r] += dev::shfl_xor(row_sum[r], 2);
    const float inverse = 1.0f / row_sum[r];
    for (int j = 0; j < 8; ++j) {
      const uint32_t at = staging + (lane / 4 + r * 8) * 128 + j * 16 + lane % 4 * 4;
      dev::st_shared(at, dev::pack<bf16>(out[j][2 * r] * inverse, out[j][2 * r + 1] * inverse));
    }
  }
  if (bug != kNoSyncWarp) dev::sync_warp();
  for (int i = lane; i < 16 * 8; i += 32) {
    const int query = first_query + warp * 16 + i / 8;
    const uint4 chunk = dev::ld_shared<uint4>(staging + i / 8 * 128 + i % 8 * 16 + (bug == kMisaligned ? 8 : 0));
    if (query < p.s || bug == kStoreOutOfBounds) dev::st_global(p.out + static_cast<int64_t>(query) * kDim + i % 8 * 8, chunk);
  }
}

float to_float(uint16_t code) { return __uint_as_float(static_cast<uint32_t>(code) << 16); }

struct Problem {
  int s;
  std::vector<uint16_t> q, k, v;
  std::vector<double> expected;

  explicit Problem(int s) : s(s), q(s * kDim), k(s * kDim), v(s * kDim), expected(s * kDim) {
    uint32_t state = 1;
    for (auto* x : {&q, &k, &v}) {
      for (uint16_t& code : *x) {
        state = state * 1664525u + 1013904223u;
        code = static_cast<uint16_t>(__float_as_uint(static_cast<float>(state >> 8) / 8388608.0f - 1.0f) >> 16);
      }
    }
    for (int i = 0; i < s; ++i) {
      std::vector<double> weight(s);
      double sum = 0;
      for (int j = 0; j < s; ++j) {
        double score = 0;
        for (int d = 0; d < kDim; ++d) score += double(to_float(q[i * kDim + d])) * to_float(k[j * kDim + d]);
        sum += weight[j] = std::exp(score / 8);
      }
      for (int j = 0; j < s; ++j)
        for (int d = 0; d < kDim; ++d) expected[i * kDim + d] += weight[j] / sum * to_float(v[j * kDim + d]);
    }
  }
};

using Launch = void (*)(dim3, dim3, size_t, const Stream&, const Params&);
template <int bug>
struct LaunchOf {
  static constexpr Launch value = launch<attention_kernel<bug>, Params>;
};

std::string run(int bug, Problem& problem) {
  // Canaries on both sides, as a debug allocator would have them.
  std::vector<uint16_t> out(problem.s * kDim + 128, 0xffff);
  uint32_t counter = 0;
  const emulator::GlobalSpan spans[] = {{problem.q.data(), problem.q.size() * 2, "q"},
                                        {problem.k.data(), problem.k.size() * 2, "k"},
                                        {problem.v.data(), problem.v.size() * 2, "v"},
                                        {out.data() + 64, problem.s * kDim * 2ul, "out"},
                                        {&counter, 4, "counter"}};
  const auto as = [](auto& x, int first = 0) { return reinterpret_cast<bf16*>(x.data() + first); };
  const Params params{as(problem.q), as(problem.k), as(problem.v), as(out, 64), &counter, problem.s, 1.4426950408889634f / 8};
  try {
    launcher<Launch, LaunchOf>(bug, std::make_integer_sequence<int, kBugs>())((problem.s + kRows - 1) / kRows, kThreads, kSmemBytes,
                                                                              Stream{0, nullptr}, params);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (int i = 0; i < problem.s * kDim; ++i) {
    const double difference = std::fabs(to_float(out[64 + i]) - problem.expected[i]);
    if (!(difference < 0.004)) return "wrong: element " + std::to_string(i) + " is off by " + std::to_string(difference);
  }
  return "ok";
}

}  // namespace

int main(int argc, char** argv) {
  Problem problem(argc == 3 ? std::atoi(argv[2]) : 1);
  return seeded_bugs_main(argc, argv, kBugs, [&](int bug) { return run(bug, problem); });
}
