// The device layer on the CPU, but for matrix fragments (fragments.cpp) and conversions (convert.cpp).
#include "cuda/device/device.cuh"

#include <atomic>

#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {
void count(Memory memory, const char* what, uint64_t address, uint32_t bytes, Site site) {
  if (current_block->counters.enabled()) [[unlikely]]
    current_block->counters.add(memory, what, address, bytes, current_thread->accessor(), site);
}
}  // namespace

const void* shared_for_reading(uint32_t address, uint32_t bytes, const char* what, Site site) {
  Block& block = *current_block;
  const uint32_t offset = block.shared.offset(address, bytes, what, site);
  block.race.access(Access::kRead, offset, bytes, current_thread->accessor(), site);
  count(Memory::kShared, what, offset, bytes, site);
  return block.shared.at(offset);
}

void* shared_for_writing(uint32_t address, uint32_t bytes, const char* what, Site site) {
  Block& block = *current_block;
  const uint32_t offset = block.shared.offset(address, bytes, what, site);
  block.race.access(Access::kWrite, offset, bytes, current_thread->accessor(), site);
  count(Memory::kShared, what, offset, bytes, site);
  return block.shared.at(offset);
}

void check_global(GlobalAccess kind, const void* p, size_t bytes, const char* what, Site site) {
  current_block->global.check(p, bytes, what, site);
  current_block->global_race->access(kind, p, bytes, what, site);
  count(Memory::kGlobal, what, reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes), site);
}

void issue_copy(uint32_t to, const void* from, uint32_t bytes, bool valid, Site site) {
  Block& block = *current_block;
  const uint32_t offset = block.shared.offset(to, bytes, "cp_async", site);
  if (valid) check_global(GlobalAccess::kRead, from, bytes, "cp_async", site);
  count(Memory::kShared, "cp_async", offset, bytes, site);
  block.race.access(Access::kWrite, offset, bytes, current_thread->accessor(), site);
  block.race.under_way(offset, bytes, site);
  block.shared.poison(offset, bytes);
  current_thread->copies.issue({offset, valid ? from : nullptr, bytes, site});
}

namespace {
void land(const AsyncCopy& copy) {
  Block& block = *current_block;
  if (copy.from) {
    std::memcpy(block.shared.at(copy.to), copy.from, copy.bytes);
  } else {
    std::memset(block.shared.at(copy.to), 0, copy.bytes);
  }
  const Accessor who = current_thread->accessor();
  block.race.landed(copy.to, copy.bytes, who, copy.site, block.race.clock(who.warp)[who.warp]);
}
}  // namespace

void wait_for_copies(int pending_groups, Site) { current_thread->copies.wait(pending_groups, land); }

uint64_t shuffle(const char* what, uint64_t value, int source, Site site) {
  struct Lane {
    uint64_t value;
    int source;
    uint64_t result;
  } mine{value, source, 0};
  current_block->warp_operation(what, site, mine, [](auto& lanes) {
    for (Lane* lane : lanes) lane->result = lanes[lane->source]->value;
  });
  return mine.result;
}

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

using namespace emulator;

int warp(Site site) {
  int nothing = 0;
  current_block->warp_operation("warp", site, nothing, [](auto&) {});
  return current_thread->warp->id;
}

uint32_t smem_base() { return SharedMemory::kBase; }

void atomic_add_shared(uint32_t address, float value, Site site) {
  Block& block = *current_block;
  const uint32_t offset = block.shared.offset(address, 4, "atomic_add_shared", site);
  block.race.access(Access::kAtomic, offset, 4, current_thread->accessor(), site);
  count(Memory::kSharedAtomic, "atomic_add_shared", offset, 4, site);
  float sum;
  std::memcpy(&sum, block.shared.at(offset), 4);
  sum += value;
  std::memcpy(block.shared.at(offset), &sum, 4);
}

void cp_async_commit() { current_thread->copies.commit(); }
void cp_async_wait_all(Site) { current_thread->copies.wait_all(land); }

namespace {
uint32_t vote(const char* what, bool predicate, Site site) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  current_block->warp_operation(what, site, mine, [](auto& lanes) {
    uint32_t bits = 0;
    for (int l = 0; l < kWarpSize; ++l) bits |= static_cast<uint32_t>(lanes[l]->predicate) << l;
    for (Lane* lane : lanes) lane->result = bits;
  });
  return mine.result;
}
}  // namespace

uint32_t ballot(bool predicate, Site site) { return vote("ballot", predicate, site); }
bool any(bool predicate, Site site) { return vote("any", predicate, site) != 0; }
bool all(bool predicate, Site site) { return vote("all", predicate, site) == 0xffffffffu; }
void sync_warp(Site site) {
  int nothing = 0;
  current_block->warp_operation("sync_warp", site, nothing, [](auto&) { current_block->race.sync_lanes(current_thread->warp->id); });
}

void sync_threads(Site site) { current_block->barrier({0, 0, true}, "sync_threads", site); }
bool sync_threads_or(bool predicate, Site site) { return current_block->barrier_or(predicate, "sync_threads_or", site); }
void named_barrier_sync(int id, int threads, Site site) { current_block->barrier({id, threads, true}, "named_barrier_sync", site); }
void named_barrier_arrive(int id, int threads, Site site) { current_block->barrier({id, threads, false}, "named_barrier_arrive", site); }

void atomic_add(float* p, float value, Site site) {
  check_global(GlobalAccess::kAtomic, p, sizeof(float), "atomic_add", site);
  std::atomic_ref(*p).fetch_add(value);
}

// Blocks run on several OS threads at most, which see each other's writes in order: only the race detector knows of fences.
void fence_gpu() { GlobalRace::fence(); }
uint32_t atomic_add_acq_rel(uint32_t* counter, uint32_t value, Site site) {
  current_block->global.check(counter, sizeof(uint32_t), "atomic_add_acq_rel", site);
  return current_block->global_race->synchronise(counter, true, true, "atomic_add_acq_rel", site,
                                                 [=] { return std::atomic_ref(*counter).fetch_add(value); });
}
uint32_t ld_acquire(const uint32_t* p, Site site) {
  current_block->global.check(p, sizeof(uint32_t), "ld_acquire", site);
  return current_block->global_race->synchronise(p, true, false, "ld_acquire", site,
                                                 [=] { return std::atomic_ref(*const_cast<uint32_t*>(p)).load(); });
}
void st_release(uint32_t* p, uint32_t value, Site site) {
  current_block->global.check(p, sizeof(uint32_t), "st_release", site);
  current_block->global_race->synchronise(p, false, true, "st_release", site, [=] {
    std::atomic_ref(*p).store(value);
    return value;
  });
}
void spin_pause(Site site) { current_block->spin("spin_pause", site); }

}  // namespace foveate::cuda::dev
