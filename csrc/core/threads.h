// How many threads a call may use. A type of its own, so that no entry of the compiled module passes on a count that nobody has checked:
// workspaces are sized by it and loops are divided by it.
#pragma once

#include <cstdint>

#include "core/check.h"

namespace foveate {

class Threads {
 public:
  Threads() = default;
  explicit Threads(int64_t count) : count_(count < kMost ? static_cast<int>(count) : kMost) {
    check(count >= 1, "threads = ", count, " must be at least 1, as torch.get_num_threads() is");
  }
  operator int() const { return count_; }

 private:
  static constexpr int kMost = 1024;
  int count_ = 1;
};

}  // namespace foveate
