// Threads of torch's own OpenMP runtime (the same libgomp.so.1): the count comes from torch.get_num_threads() with every call.
#pragma once

#include <omp.h>

#include <cstdint>

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

// f(begin, end) on contiguous chunks, for even work. Below `grain` items per thread, fewer threads are used.
template <class F>
FOVEATE_INLINE void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
  const int64_t useful = grain > 0 ? (n + grain - 1) / grain : n;
  const int team = static_cast<int>(min<int64_t>(useful, threads));
  if (team <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = n * id / count, end = n * (id + 1) / count;
    if (begin < end) f(begin, end);
  }
}

// f(task, thread) one task at a time in order of index, for uneven work: put the heavy tasks first.
template <class F>
FOVEATE_INLINE void parallel_tasks(int64_t n, int threads, const F& f) {
  const int team = static_cast<int>(min<int64_t>(n, threads));
  if (team <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < n; ++i) f(i, omp_get_thread_num());
}

}  // namespace foveate::cpu::FOVEATE_ISA
