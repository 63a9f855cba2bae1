// Runs entries of PTX on the CPU, block after block. Memories and the checks of what an access may do are the emulator's.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "emulator/execution/block.h"
#include "emulator/ptx/program.h"
#include "emulator/ptx/warp.h"

namespace foveate::emulator::ptx {

struct MachineLaunch {
  const Program& program;
  const void* params;
  dim3 grid, block;
  size_t smem_bytes;
  Options options;
  GlobalRace& global_race;
};

// Runs all blocks of a launch, with the options of the environment; returns the instructions that its warps have executed. Throws KernelError.
int64_t run_program(const Program& program, const void* params, size_t params_bytes, dim3 grid, dim3 block, size_t smem_bytes);

class MachineBlock {
 public:
  // Runs one block to its end; returns how many instructions its warps have executed. Throws KernelError.
  int64_t run(const MachineLaunch& launch, uint64_t index);

  uint32_t special(Special special, int thread) const;
  // The emulator's current thread becomes this one.
  void act_as(int thread) { current_thread = &threads_[thread]; }
  const unsigned char* param(uint64_t address, uint32_t bytes) const;
  // Whether a branch that parts lanes runs the side that does not jump first.
  bool draws_side() { return launch_->options.schedule != Schedule::kRoundRobin && random() % 2 == 0; }
  void lanes_return(Warp& warp);

  // The warp comes to a barrier, and waits there unless it only arrives. `predicate`: whether any of its lanes has one that is true.
  void barrier(Warp& warp, BarrierRequest request, bool predicate = false);

  Block memories;  // its fibers are not used

 private:
  struct Barrier {
    int threads = 0, arrived = 0;
    uint32_t waiting = 0;
    bool predicate = false;
    Clock clock{};
  };

  void begin(const MachineLaunch& launch, uint64_t index);
  Warp* next();
  void complete_if_full(Barrier& barrier);
  [[noreturn]] void deadlock() const;
  [[noreturn]] void rethrow(const Warp& warp, const KernelError& error) const;
  uint64_t random();

  const MachineLaunch* launch_ = nullptr;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<emulator::Warp> shadow_warps_;  // for the emulator's checks: who is who
  std::vector<Thread> threads_;
  std::array<Barrier, kBarriers> barriers_;
  uint64_t random_ = 0;
  size_t warp_ = 0;
  int live_warps_ = 0;
};

}  // namespace foveate::emulator::ptx
