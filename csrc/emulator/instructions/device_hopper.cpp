// sm90/hopper.cuh on the CPU.
#include "cuda/device/sm90/hopper.cuh"
#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {
// All lanes of the warp come; the last one does it, once.
template <class Do>
void once_per_warp(const char* what, Site site, Do act) {
  int nothing = 0;
  current_block->warp_operation(what, site, nothing, [&](auto&) { act(current_block->hopper.wgmma[current_thread->warp->id]); });
}
}  // namespace

void tma_load(uint32_t to, const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t barrier, Site site) {
  current_block->hopper.tma.load(to, map, at, rank, barrier, site);
}
void tma_store(const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t from, bool add, Site site) {
  current_block->hopper.tma.store(map, at, rank, from, add, site);
}
void tma_store_wait(int pending_groups) { current_block->hopper.tma.wait(pending_groups); }

void wgmma(float* d, int n, bool bf16, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_m_major, bool b_n_major, bool accumulate,
           Site site) {
  const WgmmaShape shape{n, bf16, accumulate, a, b, a_m_major, b_n_major};
  WgmmaLane mine{d, a_registers, &shape};
  current_block->warp_operation("wgmma", site, mine,
                                [&](auto& lanes) { current_block->hopper.wgmma[current_thread->warp->id].issue(shape, lanes, site); });
}
void wgmma_wait(int pending_groups, Site site) {
  once_per_warp("wgmma_wait", site, [=](WgmmaQueue& queue) { queue.wait(pending_groups); });
}
void rendezvous(const char* what, Site site) {
  once_per_warp(what, site, [](WgmmaQueue&) {});
}

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

using namespace emulator;

void mbarrier_init(uint32_t barrier, int arrivals, Site site) { current_block->hopper.barriers.init(barrier, arrivals, site); }
void mbarrier_init_fence(Site) { current_block->hopper.barriers.init_fence(); }
void mbarrier_arrive(uint32_t barrier, Site site) { current_block->hopper.barriers.arrive(barrier, 0, "mbarrier_arrive", site); }
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes, Site site) {
  current_block->hopper.barriers.arrive(barrier, bytes, "mbarrier_arrive_expect_tx", site);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site) { current_block->hopper.barriers.wait(barrier, parity, site); }

void tma_store_commit() { current_block->hopper.tma.commit(); }
void fence_async_proxy(Site) { current_block->race.fence_async(current_thread->warp->id); }

void wgmma_fence(Site site) {
  once_per_warp("wgmma_fence", site, [](WgmmaQueue& queue) { queue.fence(); });
}
void wgmma_commit(Site site) {
  once_per_warp("wgmma_commit", site, [](WgmmaQueue& queue) { queue.commit(); });
}

bool elect_one(Site site) {
  rendezvous("elect_one", site);
  return lane() == 0;
}

}  // namespace foveate::cuda::dev
