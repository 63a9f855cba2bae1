#include "emulator/instructions/mbarrier.h"

#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {
constexpr int kMostCounted = (1 << 20) - 1;  // arrivals, and bytes that are to come
}

void MBarriers::init(uint32_t address, int arrivals, Site site) {
  const uint32_t offset = current_block->shared.offset(address, 8, "mbarrier_init", site);
  current_block->race.access(Access::kWrite, offset, 8, current_thread->accessor(), site);
  if (arrivals < 1 || arrivals > kMostCounted)
    kernel_error("mbarrier_init at ", name(site), " for ", arrivals, " arrivals, expected 1 to ", kMostCounted);
  barriers_.insert_or_assign(offset, MBarrier{.expected = arrivals, .pending = arrivals, .waiting = {}});
}

void MBarriers::init_fence() {
  for (auto& [offset, barrier] : barriers_) barrier.fenced = true;
}

MBarriers::MBarrier& MBarriers::find(uint32_t address, const char* what, Site site) {
  const uint32_t offset = current_block->shared.offset(address, 8, what, site);
  const auto found = barriers_.find(offset);
  if (found == barriers_.end()) kernel_error(what, " at ", name(site), ": no mbarrier was initialised at smem_base() + ", offset);
  current_block->race.access(Access::kRead, offset, 8, current_thread->accessor(), site);
  return found->second;
}

void MBarriers::arrive(uint32_t address, uint32_t expected_bytes, const char* what, Site site) {
  MBarrier& barrier = find(address, what, site);
  if (barrier.pending == 0) {
    kernel_error(what, " at ", name(site), ": more than the ", barrier.expected, " arrivals of a phase, while ", barrier.bytes,
                 " bytes of it are to come");
  }
  RaceDetector& race = current_block->race;
  const int warp = current_thread->warp->id;
  race.release(warp, barrier.arriving);
  race.tick(warp);
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMostCounted)
    kernel_error(what, " at ", name(site), ": ", barrier.bytes, " bytes under way, an mbarrier counts up to ", kMostCounted);
  --barrier.pending;
  complete_if_done(barrier);
}

void MBarriers::wait(uint32_t address, uint32_t parity, Site site) {
  MBarrier& barrier = find(address, "mbarrier_wait", site);
  while (barrier.parity == (parity & 1)) {
    barrier.waiting.push_back(current_thread);
    current_block->wait("mbarrier_wait", site);
  }
  current_block->race.acquire(current_thread->warp->id, barrier.completed);
}

uint32_t MBarriers::for_tma(uint32_t address, Site site) {
  if (!find(address, "tma_load", site).fenced)
    kernel_error("tma_load at ", name(site), ": mbarrier_init_fence is missing after mbarrier_init");
  return address - SharedMemory::kBase;
}

void MBarriers::deliver(uint32_t offset, uint32_t bytes, const Clock& clock) {
  MBarrier& barrier = barriers_.at(offset);
  for (int w = 0; w < kMaxWarps; ++w) barrier.arriving[w] = std::max(barrier.arriving[w], clock[w]);
  barrier.bytes -= bytes;
  complete_if_done(barrier);
}

void MBarriers::complete_if_done(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.completed = barrier.arriving;
  barrier.arriving = {};
  barrier.pending = barrier.expected;
  barrier.parity ^= 1;
  for (Thread* thread : barrier.waiting) thread->warp->ready |= 1u << thread->lane;
  barrier.waiting.clear();
}

std::string MBarriers::describe() const {
  std::ostringstream text;
  for (const auto& [offset, barrier] : barriers_) {
    if (barrier.waiting.empty()) continue;
    text << " the mbarrier at smem_base() + " << offset << ", in a phase of parity " << barrier.parity << ", lacks " << barrier.pending
         << " arrivals and " << barrier.bytes << " bytes;";
  }
  return text.str();
}

}  // namespace foveate::emulator
