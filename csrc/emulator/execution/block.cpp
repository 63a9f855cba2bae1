#include "emulator/execution/block.h"

#include <bit>
#include <cstring>
#include <map>

#include "emulator/checks/error.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace foveate::emulator {

constinit thread_local Block* current_block = nullptr;
constinit thread_local Thread* current_thread = nullptr;

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int64_t kSpinsBeforeClock = 10000;
// Alone, a block waits for its own threads only, and those take their turns between the spins.
constexpr std::chrono::milliseconds kLongestSpin{5000}, kLongestSpinAlone{200};

uint32_t lane_bit(const Thread& thread) { return 1u << thread.lane; }

// "0-3, 7"
std::string ranges(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t end = i + 1;
    while (end < sorted.size() && sorted[end] == sorted[end - 1] + 1) ++end;
    if (i > 0) text += ", ";
    text += std::to_string(sorted[i]);
    if (end - i > 1) text.append("-").append(std::to_string(sorted[end - 1]));
    i = end;
  }
  return text;
}

}  // namespace

// ---- life of a block ---------------------------------------------------------------------------------------------------------

void Block::begin(const Launch& launch, uint64_t index) {
  const dim3 grid = launch.grid, block = launch.block;
  const Options& options = launch.options;
  const int threads = static_cast<int>(block.x), warps = threads / kWarpSize;
  kernel_ = launch.kernel;
  options_ = options;
  live_threads_ = threads;
  spins_ = 0;
  error_ = nullptr;
  host_ = Fiber();
  gridDim = grid;
  blockDim = block;
  blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
              static_cast<unsigned>(index / grid.x / grid.y)};
  shared.begin(launch.smem_bytes);
  race.begin(options.race, warps, shared.size());
  global_race = &launch.global_race;
  order.begin(static_cast<uint32_t>(index));
  scheduler_.begin(options.schedule, options.seed * 0x100000001b3u + index, warps);
  barriers_.fill({});
  hopper.clear();
  stacks_.reserve(threads);
  if (static_cast<int>(threads_.size()) < threads) threads_.resize(threads);
  warps_.resize(warps);
  for (int w = 0; w < warps; ++w) {
    warps_[w] = {};
    warps_[w].id = w;
    warps_[w].threads = &threads_[w * kWarpSize];
    warps_[w].live = warps_[w].ready = kAllLanes;
  }
  for (int t = 0; t < threads; ++t) {
    Thread& thread = threads_[t];
    thread.warp = &warps_[t / kWarpSize];
    thread.lane = t % kWarpSize;
    thread.index = {static_cast<unsigned>(t), 0, 0};
    thread.copies.clear();
    thread.fiber.start(stacks_[t], Stacks::kBytes, &thread_main);
  }
}

void Block::run(const Launch& launch, uint64_t index) {
  begin(launch, index);
  current_block = this;
  switch_to(next(), host_);
  current_block = nullptr;
  current_thread = nullptr;
  if (!error_) return;
  race.forget();
  std::rethrow_exception(error_);
}

void Block::thread_main() {
  Fiber::entered();
  Block& block = *current_block;
  Thread* next = nullptr;
  try {
    block.kernel_.run(block.kernel_.params);
    block.leave();
    if (block.live_threads_ > 0) next = &block.next();
  } catch (const KernelError& error) {
    std::ostringstream text;
    text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), thread " << threadIdx.x << ": " << error.what();
    block.error_ = std::make_exception_ptr(KernelError(text.str()));
  } catch (...) {
    block.error_ = std::current_exception();
  }
  Fiber& self = current_thread->fiber;
  if (next) switch_to(*next, self);
  Fiber::switch_to(self, block.host_);
}

void Block::leave() {
  Thread& self = *current_thread;
  Warp& warp = *self.warp;
  if (!self.copies.empty()) {
    kernel_error("it returns from the kernel with an asynchronous copy under way, issued at ", name(self.copies.first().site),
                 ": nobody has waited for it");
  }
  hopper.tma.check_done(live_threads_ == 1);
  hopper.wgmma[warp.id].check_done();
  warp.live &= ~lane_bit(self);
  warp.ready &= ~lane_bit(self);
  if (!warp.live && counters.enabled()) counters.flush(warp.id);
  --live_threads_, spins_ = 0;
  if (warp.arrived && warp.request.id < 0) {
    kernel_error("it returns from the kernel, but other lanes of warp ", warp.id, " wait for it in ", warp.operation, " at ",
                 name(warp.site));
  }
  if (warp.arrived && warp.arrived == warp.live) arrive(warp);
  if (!warp.live) complete_if_full(barriers_[0]);
  if (live_threads_ == 0) hopper.check_warpgroups(static_cast<int>(warps_.size()));
}

// ---- switching ---------------------------------------------------------------------------------------------------------------

Thread& Block::next() {
  if (options_.schedule == Schedule::kRandom && hopper.tma.loads_under_way() && scheduler_.random() % 8 == 0)
    hopper.tma.deliver(scheduler_.random());
  Thread* thread = scheduler_.next(warps_);
  while (!thread && hopper.tma.loads_under_way()) {
    hopper.tma.deliver(0);
    thread = scheduler_.next(warps_);
  }
  if (!thread) deadlock();
  return *thread;
}

void Block::switch_to(Thread& thread, Fiber& from) {
  current_thread = &thread;
  threadIdx = thread.index;
  Fiber::switch_to(from, thread.fiber);
}

void Block::wait(const char* what, Site site) {
  Thread& self = *current_thread;
  self.waits_in = what;
  self.waits_at = site;
  self.warp->ready &= ~lane_bit(self);
  spins_ = 0;
  Thread& thread = next();
  if (&thread != &self) switch_to(thread, self.fiber);
}

void Block::spin(const char* operation, Site site) {
  if (++spins_ == kSpinsBeforeClock) spins_since_ = std::chrono::steady_clock::now();
  const auto longest = options_.threads == 1 ? kLongestSpinAlone : kLongestSpin;
  if (spins_ > kSpinsBeforeClock && spins_ % kSpinsBeforeClock == 0 && std::chrono::steady_clock::now() - spins_since_ > longest) {
    kernel_error(operation, " at ", name(site), ": it waits for something that no thread does; blocks run in the order of their index, ",
                 options_.threads, " at a time");
  }
  Thread& self = *current_thread;
  Thread& thread = next();
  if (&thread != &self) switch_to(thread, self.fiber);
}

void Block::deadlock() const {
  std::map<std::string, std::vector<int>> warps_at;  // by operation, site and, if they are not all there, lanes
  for (const Warp& warp : warps_) {
    std::map<std::string, std::vector<int>> lanes_at;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Thread& thread = warp.threads[lane];
      if (warp.live >> lane & 1) lanes_at[std::string(thread.waits_in) + " at " + name(thread.waits_at)].push_back(lane);
    }
    for (const auto& [place, lanes] : lanes_at) {
      const bool all = lanes.size() == static_cast<size_t>(std::popcount(warp.live));
      warps_at[all ? place : place + " (lanes " + ranges(lanes) + ")"].push_back(warp.id);
    }
  }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [place, warps] : warps_at) text << " warp " << ranges(warps) << " waits in " << place << ";";
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) continue;
    text << " barrier " << id << " has " << barrier.arrived << " threads of " << (id == 0 ? live_threads_ : barrier.threads) << ";";
  }
  text << hopper.barriers.describe();
  throw KernelError(text.str());
}

// ---- warp operations ---------------------------------------------------------------------------------------------------------

bool Block::join(const char* operation, Site site, void* mine, Lanes lanes) {
  Thread& self = *current_thread;
  Warp& warp = *self.warp;
  if (warp.arrived && (warp.site != site || (warp.operation != operation && std::strcmp(warp.operation, operation) != 0))) {
    kernel_error("divergence in warp ", warp.id, ": lane ", self.lane, " comes to ", operation, " at ", name(site), " while lane ",
                 std::countr_zero(warp.arrived), " waits in ", warp.operation, " at ", name(warp.site));
  }
  if (lanes == Lanes::kAll) {
    warp.request.id = -1;
    if (warp.live != kAllLanes) {
      kernel_error("divergence in warp ", warp.id, ": lane ", self.lane, " comes to ", operation, " at ", name(site), ", but lane ",
                   std::countr_one(warp.live), " has returned from the kernel");
    }
  }
  warp.operation = operation;
  warp.site = site;
  warp.brought[self.lane] = mine;
  warp.arrived |= lane_bit(self);
  if (warp.arrived == warp.live) {
    if (counters.enabled()) counters.flush(warp.id);
    return true;
  }
  wait(operation, site);
  return false;
}

void Block::release(Warp& warp) { warp.arrived = 0, warp.ready = warp.live; }

// ---- barriers ----------------------------------------------------------------------------------------------------------------

void Block::barrier(BarrierRequest request, const char* operation, Site site) {
  Warp& warp = *current_thread->warp;
  if (request.id < 0 || request.id >= kBarriers || request.threads % kWarpSize != 0)
    kernel_error(operation, " at ", name(site), ": barrier ", request.id, " for ", request.threads,
                 " threads; a block has barriers 0..15, and whole warps");
  warp.request = request;
  if (!join(operation, site, nullptr, Lanes::kLive)) return;
  arrive(warp);
  if (!(warp.ready & lane_bit(*current_thread))) wait(operation, site);
}

bool Block::barrier_or(bool predicate, const char* operation, Site site) {
  current_thread->warp->predicate |= predicate;
  barrier({0, 0, true}, operation, site);
  return barriers_[0].result;
}

void Block::arrive(Warp& warp) {
  const BarrierRequest request = warp.request;
  Barrier& barrier = barriers_[request.id];
  if (barrier.arrived == 0) barrier.threads = request.threads;
  if (barrier.threads != request.threads) {
    kernel_error(warp.operation, " at ", name(warp.site), ": barrier ", request.id, " is for ", request.threads, " threads here, and for ",
                 barrier.threads, " where others came to it");
  }
  barrier.arrived += kWarpSize;
  barrier.predicate |= warp.predicate;
  warp.predicate = false;
  race.release(warp.id, barrier.clock);
  warp.arrived = 0;
  if (request.waits) {
    barrier.waiting |= 1u << warp.id;
    warp.ready = 0;
  } else {
    race.tick(warp.id);
    warp.ready = warp.live;
  }
  complete_if_full(barrier);
}

void Block::complete_if_full(Barrier& barrier) {
  if (barrier.arrived == 0) return;
  int expected = barrier.threads;
  if (expected == 0)
    for (const Warp& warp : warps_) expected += warp.live ? kWarpSize : 0;
  if (barrier.arrived < expected) return;
  for (Warp& warp : warps_) {
    if (!(barrier.waiting >> warp.id & 1)) continue;
    race.acquire(warp.id, barrier.clock);
    race.tick(warp.id);
    warp.ready = warp.live;
  }
  const bool result = barrier.predicate;
  barrier = {};
  barrier.result = result;
}

}  // namespace foveate::emulator
