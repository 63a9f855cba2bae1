// A block of CUDA threads, each on a fiber of one OS thread, and the warps and barriers that join them.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <vector>

#include "emulator/checks/global_memory.h"
#include "emulator/checks/global_race.h"
#include "emulator/checks/race.h"
#include "emulator/checks/shared_memory.h"
#include "emulator/counters.h"
#include "emulator/execution/fiber.h"
#include "emulator/execution/launch.h"
#include "emulator/execution/scheduler.h"
#include "emulator/instructions/async_copies.h"
#include "emulator/instructions/hopper.h"
#include "emulator/options.h"

namespace foveate::emulator {

constexpr int kWarpSize = 32, kBarriers = 16;

struct Warp;

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  uint3 index{};
  int lane = 0;
  // Where it waits, if it does.
  const char* waits_in = "";
  Site waits_at;
  AsyncCopies copies;

  Accessor accessor() const;
};

// What a warp asks of a barrier.
struct BarrierRequest {
  int id;
  int threads;  // expected; 0: the live warps of the block
  bool waits;
};

struct Warp {
  int id = 0;
  Thread* threads = nullptr;  // 32
  uint32_t live = 0;          // lanes that have not returned from the kernel
  uint32_t ready = 0;         // lanes that can run
  // The warp operation under way: the lanes that have come to it, and what each brought.
  uint32_t arrived = 0;
  const char* operation = "";
  Site site;
  std::array<void*, kWarpSize> brought{};
  BarrierRequest request{};  // of a barrier operation
  bool predicate = false;
};

inline Accessor Thread::accessor() const { return {static_cast<uint8_t>(warp->id), static_cast<uint8_t>(lane)}; }

class Block;

struct Launch {
  Kernel kernel;
  dim3 grid, block;
  size_t smem_bytes;
  Options options;
  GlobalRace& global_race;
};

// The block and the thread that this OS thread runs.
extern constinit thread_local Block* current_block [[gnu::tls_model("initial-exec")]];
extern constinit thread_local Thread* current_thread [[gnu::tls_model("initial-exec")]];

class Block {
 public:
  // Runs one block to its end. Throws what the kernel threw, or KernelError.
  void run(const Launch& launch, uint64_t index);

  SharedMemory shared;
  GlobalMemory global;
  RaceDetector race;
  GlobalRace* global_race = nullptr;
  BlockOrder order;
  Counters counters;
  Hopper hopper;

  // All 32 lanes of the running thread's warp come here with the same operation at the same site; the last one executes
  // run(std::array<T*, 32>&) for all, and the others go on.
  template <class T, class Run>
  void warp_operation(const char* operation, Site site, T& mine, Run run) {
    if (!join(operation, site, &mine, Lanes::kAll)) return;
    Warp& warp = *current_thread->warp;
    std::array<T*, kWarpSize> lanes;
    for (int l = 0; l < kWarpSize; ++l) lanes[l] = static_cast<T*>(warp.brought[l]);
    run(lanes);
    release(warp);
  }

  // By whole warps, but for lanes that have exited.
  void barrier(BarrierRequest request, const char* operation, Site site);
  bool barrier_or(bool predicate, const char* operation, Site site);

  // The running thread is no longer ready; others run until someone makes it ready again.
  void wait(const char* what, Site site);
  // The running thread lets others run. Throws when it has waited for too long.
  void spin(const char* operation, Site site);

 private:
  struct Barrier {
    int threads = 0;  // as the first to come said
    int arrived = 0;
    uint32_t waiting = 0;  // warps
    bool predicate = false, result = false;
    Clock clock{};
  };
  enum class Lanes : bool { kAll, kLive };

  static void thread_main();

  void begin(const Launch& launch, uint64_t index);
  // True in the last lane to come; the others return false when they are ready again.
  bool join(const char* operation, Site site, void* mine, Lanes lanes);
  static void release(Warp& warp);
  void arrive(Warp& warp);  // the whole warp, at the barrier of its request
  void complete_if_full(Barrier& barrier);
  void leave();    // the running thread has returned from the kernel
  Thread& next();  // throws if there is none
  static void switch_to(Thread& thread, Fiber& from);
  [[noreturn]] void deadlock() const;

  Kernel kernel_;
  Options options_;
  Scheduler scheduler_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::array<Barrier, kBarriers> barriers_;
  Fiber host_;
  int live_threads_ = 0;
  int64_t spins_ = 0;  // since a thread last did something else
  std::chrono::steady_clock::time_point spins_since_;
  std::exception_ptr error_;
};

}  // namespace foveate::emulator
