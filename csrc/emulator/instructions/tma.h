// Copies of boxes between global and shared memory. A load is delivered as late as the schedule allows (when no thread can run), or, in
// the random schedule, at some time before; a store when it is waited for.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/device/sm90/tensor_map.h"
#include "emulator/checks/race.h"

namespace foveate::emulator {

// Where the swizzle puts what would lie at this offset.
uint32_t swizzled(uint32_t offset, cuda::Swizzle swizzle);

struct Box {
  cuda::TensorMapSpec map;
  int32_t at[cuda::kMaxTmaRank];
  uint32_t offset;  // in shared memory
  uint32_t bytes;
  Accessor who;
  Site site;
};

class Tma {
 public:
  void clear() { loads_.clear(), stores_.clear(); }
  void load(uint32_t to, const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t barrier, Site site);
  void store(const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t from, bool add, Site site);
  void commit();
  void wait(int pending_groups);

  bool loads_under_way() const { return !loads_.empty(); }
  void deliver(uint64_t which);
  // Throws if the running thread or, where it is the last, the block leaves something under way.
  void check_done(bool last_thread) const;

 private:
  struct Load {
    Box box;
    uint32_t barrier;
    Clock clock;
  };
  struct Store {
    Box box;
    bool add;
    int thread;
    bool committed;
    int group;
  };

  std::vector<Load> loads_;
  std::vector<Store> stores_;
};

}  // namespace foveate::emulator
