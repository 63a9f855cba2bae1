// Who does the work of a phase: threads that a kernel starts for itself, or the team of one parallel region, whose threads call every phase
// together and meet at its end.
#pragma once

#include <algorithm>

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"

namespace foveate {

struct Workers {
  int threads = 1;  // of a kernel
  const cpu::Team* team = nullptr;  // null: none
  char* scratch = nullptr;  // of a team, linear_scratch_bytes, shared

  void linear(const LinearParams& p) const {
    if (!team) return cpu::kernels().linear(p, threads);
    cpu::kernels().linear_share(p, *team, scratch);
    team->wait();
  }
  void grouped_linear(const GroupedLinearParams& p) const {
    if (!team) return cpu::kernels().grouped_linear(p, threads);
    cpu::kernels().grouped_linear_share(p, *team, scratch);
    team->wait();
  }
  void norm_rows(NormRowsParams p) const {
    if (!team) return cpu::kernels().norm_rows(p, threads);
    const int64_t begin = team->begin(p.rows), end = team->end(p.rows);
    p.x += begin * p.cols;
    p.out += begin * p.cols;
    p.rows = end - begin;
    cpu::kernels().norm_rows(p, 1);
    team->wait();
  }
  // f(begin, end) on contiguous shares of n items.
  template <class F>
  void divide(int64_t n, const F& f) const {
    if (team) {
      if (team->begin(n) < team->end(n)) f(team->begin(n), team->end(n));
      return team->wait();
    }
    const int count = static_cast<int>(std::min<int64_t>(n, threads));
#pragma omp parallel for num_threads(count) schedule(static, 1)
    for (int i = 0; i < count; ++i) f(n * i / count, n * (i + 1) / count);
  }
  template <class F>
  void alone(const F& f) const {
    if (!team || team->id == 0) f();
    if (team) team->wait();
  }
};

}  // namespace foveate
