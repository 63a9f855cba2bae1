// Blocks that work together through global memory, and the same with one mistake each: what the emulator says of every one.
//   reduce   the blocks of a group write a part each, the last of them to finish adds the parts up (decode, split over keys)
//   in turn  each block adds to what the block before it has left (a deterministic sum)
//   usage: emulated_seeded_bugs_global BUG; prints one line per schedule and seed: "ok", "wrong" or the report.
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
  kNoFence,             // parts are not made visible before the block is counted
  kFenceTooEarly,       // some are written after the fence
  kNoBarrierBefore,     // a thread counts while others still write
  kNoBarrierAfter,      // threads read before the counting thread has seen the others
  kNotCounted,          // the block of the highest index reduces, and believes that the others are done
  kCounterNotReset,     // for the next launch
  kResetTooEarly,       // by each block
  kReadOnlyPath,        // parts are read by ld_global_nc
  kPlainAddition,       // two blocks add to one address by a load and a store
  kSameAddress,         // two blocks write one address
  kReadBeforeWrite,     // a block reads what the next block will write
  kNoFenceInTurn,       // before the release
  kNoAcquire,           // waits by plain loads
  kTurnNotAwaited,      // blocks of a lower index are believed to be done
  kNoBarrierInBlock,    // a thread reads what a thread of another warp has written
  kBugs
};

constexpr int kThreads = 64, kParts = 4, kGroups = 3;

struct Params {
  float *parts, *sums;  // [kGroups, kParts, kThreads], [kGroups, kThreads]
  float* in_turn;       // [kThreads]
  float *total, *atomics;
  uint32_t *counters, *turn;  // [kGroups], [1]
};

template <int bug>
__device__ void reduce(const Params& p, int group, int part, int thread) {
  float* mine = p.parts + (group * kParts + part) * kThreads;
  const float x = static_cast<float>(group * 100 + part * 10 + thread);
  dev::st_global(mine + thread, x);
  if (bug == kNoBarrierInBlock && dev::ld_global<float>(mine + (thread ^ 32)) < 0) return;
  if (bug != kNoFence) dev::fence_gpu();
  if (bug == kFenceTooEarly && dev::warp() == 1) dev::st_global(mine + thread, x);
  if (bug != kNoBarrierBefore) dev::sync_threads();
  uint32_t* counter = p.counters + group;
  bool last = bug == kNotCounted ? part == kParts - 1 : thread == 0 && dev::atomic_add_acq_rel(counter, 1) == kParts - 1;
  last = bug == kNoBarrierAfter ? dev::any(last) || (thread >= 32 && part == kParts - 1) : dev::sync_threads_or(last);
  if (!last) return;
  float sum = 0;
  for (int i = 0; i < kParts; ++i) {
    const float* from = p.parts + (group * kParts + i) * kThreads + thread;
    sum += bug == kReadOnlyPath ? dev::ld_global_nc<float>(from) : dev::ld_global<float>(from);
  }
  dev::st_global(p.sums + group * kThreads + thread, sum);
  if (thread == 0 && bug != kCounterNotReset) dev::st_global<uint32_t>(counter, 0);
}

template <int bug>
__device__ void add_in_turn(const Params& p, uint32_t block, int thread) {
  if (thread == 0 && bug != kTurnNotAwaited) {
    while ((bug == kNoAcquire ? dev::ld_global<uint32_t>(p.turn) : dev::ld_acquire(p.turn)) != block) dev::spin_pause();
  }
  dev::sync_threads();
  dev::st_global(p.in_turn + thread, dev::ld_global<float>(p.in_turn + thread) + 1);
  if (bug != kNoFenceInTurn) dev::fence_gpu();
  dev::sync_threads();
  if (thread == 0) dev::st_release(p.turn, block + 1);
}

template <int bug>
__global__ void __launch_bounds__(kThreads) work_together(const __grid_constant__ Params p) {
  const int block = static_cast<int>(blockIdx.x), group = block / kParts, part = block % kParts, thread = static_cast<int>(threadIdx.x);
  if (thread == 0) dev::atomic_add(p.atomics, 1.0f);
  if (bug == kPlainAddition && thread == 0) dev::st_global(p.total, dev::ld_global<float>(p.total) + 1);
  if (bug == kSameAddress && thread == 0) dev::st_global(p.total, 1.0f);
  if (bug == kReadBeforeWrite && thread == 0 && dev::ld_global<float>(p.parts + (block + 1) % (kGroups * kParts) * kThreads) < 0) return;
  if (bug == kResetTooEarly && thread == 0) dev::st_global<uint32_t>(p.counters + group, static_cast<uint32_t>(part));
  reduce<bug>(p, group, part, thread);
  add_in_turn<bug>(p, blockIdx.x, thread);
}

using Launch = void (*)(dim3, dim3, size_t, const Stream&, const Params&);
template <int bug>
struct LaunchOf {
  static constexpr Launch value = launch<work_together<bug>, Params>;
};

std::string run(int bug) {
  std::vector<float> parts(kGroups * kParts * kThreads), sums(kGroups * kThreads), in_turn(kThreads), total(1), atomics(1);
  std::vector<uint32_t> counters(kGroups), turn(1);
  const auto span = [](auto& x, const char* name) { return emulator::GlobalSpan(x.data(), x.size() * 4, name); };
  const emulator::GlobalSpan spans[] = {span(parts, "parts"), span(sums, "sums"),       span(in_turn, "in_turn"),
                                        span(total, "total"), span(atomics, "atomics"), span(counters, "counters"),
                                        span(turn, "turn")};
  const Params params{parts.data(), sums.data(), in_turn.data(), total.data(), atomics.data(), counters.data(), turn.data()};
  for (int time = 1; time <= 2; ++time) {  // the second launch finds what the first has left
    turn[0] = 0;
    std::fill(sums.begin(), sums.end(), NAN);
    try {
      launcher<Launch, LaunchOf>(bug, std::make_integer_sequence<int, kBugs>())(kGroups * kParts, kThreads, 0, Stream{0, nullptr}, params);
    } catch (const std::exception& error) {
      return error.what();
    }
    for (int i = 0; i < kGroups * kThreads; ++i) {
      const int group = i / kThreads, thread = i % kThreads;
      const auto expected = static_cast<float>(kParts * (group * 100 + thread) + 10 * kParts * (kParts - 1) / 2);
      if (sums[i] != expected) return "wrong: sum " + std::to_string(i) + " of launch " + std::to_string(time);
    }
    if (in_turn[1] != static_cast<float>(time * kGroups * kParts) || atomics[0] != in_turn[1]) return "wrong: in turn";
  }
  return "ok";
}

}  // namespace

int main(int argc, char** argv) { return seeded_bugs_main(argc, argv, kBugs, run); }
