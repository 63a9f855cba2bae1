// Environment variables of the emulator, read at each launch.
#pragma once

#include <cstdint>
#include <string>

namespace foveate::emulator {

enum class Schedule : uint8_t {
  kRoundRobin,  // the warps take turns, from one warp operation to the next
  kRandom,      // the next warp is drawn
  kPriority,    // the warp of the highest priority runs as far as it can; priorities are drawn and change now and then
};

struct Options {
  Schedule schedule = Schedule::kRoundRobin;  // FOVEATE_EMULATOR_SCHEDULE = round-robin, random, priority
  uint64_t seed = 0;                          // FOVEATE_EMULATOR_SEED
  bool race = true;                           // FOVEATE_EMULATOR_RACE = 0 switches the race detector off
  int threads = 1;                            // FOVEATE_EMULATOR_THREADS: blocks at a time
  std::string counters;  // FOVEATE_EMULATOR_COUNTERS: a file for what each launch's accesses cost; "" counts nothing
};

// Throws std::invalid_argument at a value that is none of these.
Options options_from_environment();

}  // namespace foveate::emulator
