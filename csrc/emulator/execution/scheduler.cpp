#include "emulator/execution/scheduler.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {
constexpr int kSweepsBetweenPriorityChanges = 64;  // on average
}

void Scheduler::begin(Schedule schedule, uint64_t seed, int warps) {
  schedule_ = schedule;
  state_ = seed;
  warp_ = warps - 1;
  sweep_ = 0;
  first_lane_ = 0;
  priorities_.resize(warps);
  std::iota(priorities_.begin(), priorities_.end(), 0);
  for (int i = warps - 1; i > 0; --i) std::swap(priorities_[i], priorities_[random() % (i + 1)]);
}

uint64_t Scheduler::random() {  // SplitMix64 (Steele, Lea, Flood 2014)
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

int Scheduler::choose(const std::vector<Warp>& warps) {
  const int count = static_cast<int>(warps.size());
  if (schedule_ == Schedule::kPriority) {
    if (random() % kSweepsBetweenPriorityChanges == 0) {
      const auto running = std::find(priorities_.begin(), priorities_.end(), warp_);
      std::rotate(running, running + 1, priorities_.end());  // the last from now on
    }
    for (int w : priorities_)
      if (warps[w].ready) return w;
    return -1;
  }
  const int start = schedule_ == Schedule::kRandom ? static_cast<int>(random() % count) : warp_ + 1;
  for (int i = 0; i < count; ++i)
    if (warps[(start + i) % count].ready) return (start + i) % count;
  return -1;
}

Thread* Scheduler::next(std::vector<Warp>& warps) {
  uint32_t lanes = sweep_ & warps[warp_].ready;
  if (!lanes) {
    const int warp = choose(warps);
    if (warp < 0) return nullptr;
    warp_ = warp;
    lanes = warps[warp].ready;
    first_lane_ = schedule_ == Schedule::kRandom ? static_cast<int>(random() % kWarpSize) : 0;
  }
  const int lane = (std::countr_zero(std::rotr(lanes, first_lane_)) + first_lane_) % kWarpSize;
  sweep_ = lanes & ~(1u << lane);
  return &warps[warp_].threads[lane];
}

}  // namespace foveate::emulator
