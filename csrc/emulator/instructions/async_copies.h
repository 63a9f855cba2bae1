// One thread's cp.async: nothing arrives before it is waited for.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/checks/site.h"

namespace foveate::emulator {

struct AsyncCopy {
  uint32_t to;       // offset in shared memory
  const void* from;  // nullptr: zeros
  uint32_t bytes;
  Site site;
};

class AsyncCopies {
 public:
  void issue(const AsyncCopy& copy) { copies_.push_back(copy); }
  void commit() { group_ends_.push_back(copies_.size()); }
  bool empty() const { return first_copy_ == copies_.size(); }
  const AsyncCopy& first() const { return copies_[first_copy_]; }
  void clear() { copies_.clear(), group_ends_.clear(), first_copy_ = first_group_ = 0; }

  // Lands the oldest groups until `pending` are left.
  template <class Land>
  void wait(size_t pending, Land land) {
    while (group_ends_.size() - first_group_ > pending) land_until(group_ends_[first_group_++], land);
    if (empty() && first_group_ == group_ends_.size()) clear();
  }
  template <class Land>
  void wait_all(Land land) {
    land_until(copies_.size(), land);
    clear();
  }

 private:
  template <class Land>
  void land_until(size_t end, Land land) {
    for (; first_copy_ < end; ++first_copy_) land(copies_[first_copy_]);
  }

  std::vector<AsyncCopy> copies_;
  std::vector<size_t> group_ends_;
  size_t first_copy_ = 0, first_group_ = 0;
};

}  // namespace foveate::emulator
