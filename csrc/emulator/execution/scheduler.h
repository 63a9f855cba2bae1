// Which thread runs next. Lanes of a warp run one after another up to their next warp operation: a sweep; then a warp is chosen.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/options.h"

namespace foveate::emulator {

struct Thread;
struct Warp;

class Scheduler {
 public:
  void begin(Schedule schedule, uint64_t seed, int warps);
  // nullptr: no thread is ready.
  Thread* next(std::vector<Warp>& warps);
  uint64_t random();

 private:
  int choose(const std::vector<Warp>& warps);

  Schedule schedule_ = Schedule::kRoundRobin;
  uint64_t state_ = 0;
  int warp_ = 0;
  uint32_t sweep_ = 0;          // lanes of warp_ that this sweep has still to run
  int first_lane_ = 0;          // the sweep goes around from here
  std::vector<int> priorities_;  // warps, most urgent first
};

}  // namespace foveate::emulator
