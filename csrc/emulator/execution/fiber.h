// Fibers: stacks that one OS thread switches between. Each CUDA thread of a block runs on one.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace foveate::emulator {

// A suspended computation. Default-constructed: that of the OS thread, filled in when it switches away.
class Fiber {
 public:
  Fiber() = default;
  // Arranges that the first switch to this fiber calls `entry`, which must not return, on the given stack.
  void start(void* stack, size_t bytes, void (*entry)());
  // Suspends `from`, the running fiber, and continues `to`.
  static void switch_to(Fiber& from, Fiber& to);
  // The first thing that `entry` calls.
  static void entered();

 private:
  void prepare(void* stack, size_t bytes, void (*entry)());
  static void exchange(Fiber& from, Fiber& to);

#if defined(__SANITIZE_ADDRESS__)
  // AddressSanitizer must be told of stacks.
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

// Stacks of equal size, each above a page that faults, so that an overflow is no silent corruption.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  Stacks() = default;
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void reserve(int count);
  void* operator[](int i) const;

 private:
  void release();

  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace foveate::emulator
