// Threads that run one function together, each on its share, and meet at barriers. For steps of a few tokens: a parallel region for each of
// a model's 150 phases would cost as much as a fifth of the reading. Waiting threads spin, and give way when that takes long.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace foveate::cpu {

class Barrier {
 public:
  [[gnu::always_inline]] void wait(int count) {
    const int64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins >= kSpins) {
        sched_yield();
        continue;
      }
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 4000;  // some tens of microseconds
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

struct Team {
  int id = 0, count = 1;
  Barrier* barrier = nullptr;

  [[gnu::always_inline]] void wait() const {
    if (count > 1) barrier->wait(count);
  }
  // This thread's part of n items.
  [[gnu::always_inline]] int64_t begin(int64_t n) const { return n * id / count; }
  [[gnu::always_inline]] int64_t end(int64_t n) const { return n * (id + 1) / count; }
};

}  // namespace foveate::cpu
