#include "emulator/ptx/machine.h"

#include <algorithm>
#include <bit>
#include <sstream>

#include "core/check.h"
#include "emulator/checks/error.h"

namespace foveate::emulator::ptx {

namespace {
// A warp that executes more has an endless loop.
constexpr int64_t kMostInstructions = int64_t{1} << 26;
constexpr int64_t kTurn = int64_t{1} << 20, kLongestDrawnTurn = 256;
}  // namespace

void MachineBlock::begin(const MachineLaunch& launch, uint64_t index) {
  launch_ = &launch;
  const dim3 grid = launch.grid;
  const int threads = static_cast<int>(launch.block.x), warps = (threads + kWarpSize - 1) / kWarpSize;
  gridDim = grid;
  blockDim = launch.block;
  blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
              static_cast<unsigned>(index / grid.x / grid.y)};
  memories.shared.begin(launch.smem_bytes);
  memories.race.begin(launch.options.race, warps, memories.shared.size());
  memories.global_race = &launch.global_race;
  memories.order.begin(static_cast<uint32_t>(index));
  current_block = &memories;
  barriers_.fill({});
  random_ = launch.options.seed * 0x100000001b3u + index;
  warp_ = 0;
  live_warps_ = warps;
  threads_.resize(warps * kWarpSize);
  shadow_warps_.resize(warps);
  for (int w = 0; w < warps; ++w) {
    shadow_warps_[w].id = w;
    for (int l = 0; l < kWarpSize; ++l) {
      Thread& thread = threads_[w * kWarpSize + l];
      thread.warp = &shadow_warps_[w];
      thread.lane = l;
      thread.copies.clear();
    }
  }
  while (static_cast<int>(warps_.size()) < warps) warps_.push_back(std::make_unique<Warp>());
  for (int w = 0; w < warps; ++w) warps_[w]->begin(launch.program, *this, w, threads - w * kWarpSize);
}

int64_t MachineBlock::run(const MachineLaunch& launch, uint64_t index) {
  begin(launch, index);
  while (live_warps_ > 0) {
    Warp* warp = next();
    if (!warp) {
      memories.race.forget();  // copies may be under way that will never land
      deadlock();
    }
    try {
      warp->run(launch.options.schedule == Schedule::kRoundRobin ? kTurn : 1 + random() % kLongestDrawnTurn);
      if (warp->executed > kMostInstructions) kernel_error("the warp has executed ", warp->executed, " instructions: an endless loop?");
    } catch (const KernelError& error) {
      memories.race.forget();
      rethrow(*warp, error);
    }
    if (warp->state == Warp::State::kDone) {
      --live_warps_;
      complete_if_full(barriers_[0]);
    }
  }
  int64_t executed = 0;
  for (int w = 0; w < static_cast<int>(shadow_warps_.size()); ++w) executed += warps_[w]->executed;
  current_block = nullptr;
  current_thread = nullptr;
  return executed;
}

void MachineBlock::rethrow(const Warp& warp, const KernelError& error) const {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), warp " << warp.id << ", "
       << launch_->program.where(warp.pc()) << ": " << error.what();
  throw KernelError(text.str());
}

uint64_t MachineBlock::random() {  // splitmix64
  uint64_t x = random_ += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

Warp* MachineBlock::next() {
  const size_t count = shadow_warps_.size(), first = launch_->options.schedule == Schedule::kRoundRobin ? warp_ : random() % count;
  for (size_t k = 0; k < count; ++k) {
    const size_t candidate = (first + k) % count;
    if (warps_[candidate]->state != Warp::State::kReady) continue;
    warp_ = (candidate + 1) % count;
    return warps_[candidate].get();
  }
  return nullptr;
}

uint32_t MachineBlock::special(Special special, int thread) const {
  switch (special) {
    case Special::kTidX: return thread;
    case Special::kTidY:
    case Special::kTidZ: return 0;
    case Special::kNtidX: return blockDim.x;
    case Special::kNtidY:
    case Special::kNtidZ: return 1;
    case Special::kCtaidX: return blockIdx.x;
    case Special::kCtaidY: return blockIdx.y;
    case Special::kCtaidZ: return blockIdx.z;
    case Special::kNctaidX: return gridDim.x;
    case Special::kNctaidY: return gridDim.y;
    case Special::kNctaidZ: return gridDim.z;
    case Special::kLaneId: return thread % kWarpSize;
    case Special::kWarpId: return thread / kWarpSize;
  }
  return 0;
}

const unsigned char* MachineBlock::param(uint64_t address, uint32_t bytes) const {
  const uint64_t size = launch_->program.entry.param_bytes;
  if (address % bytes != 0 || address > size || bytes > size - address)
    kernel_error("byte ", static_cast<int64_t>(address), " of the parameters, for ", bytes, " bytes of ", size);
  return static_cast<const unsigned char*>(launch_->params) + address;
}

void MachineBlock::lanes_return(Warp& warp) {
  for (uint32_t rest = warp.lanes; rest; rest &= rest - 1) {
    const Thread& thread = threads_[warp.id * kWarpSize + std::countr_zero(rest)];
    if (!thread.copies.empty())
      kernel_error("it returns with an asynchronous copy under way, issued at ", name(thread.copies.first().site),
                   ": nobody has waited for it");
  }
}

// ---- barriers ----------------------------------------------------------------------------------------------------------------

void MachineBlock::barrier(Warp& warp, BarrierRequest request, bool predicate) {
  if (request.id < 0 || request.id >= kBarriers || request.threads % kWarpSize != 0)
    kernel_error("barrier ", request.id, " for ", request.threads, " threads; a block has barriers 0..15, and whole warps");
  Barrier& barrier = barriers_[request.id];
  if (barrier.arrived == 0) barrier.threads = request.threads;
  if (barrier.threads != request.threads)
    kernel_error("barrier ", request.id, " is for ", request.threads, " threads here, and for ", barrier.threads,
                 " where others came to it");
  barrier.arrived += kWarpSize;
  barrier.predicate |= predicate;
  memories.race.release(warp.id, barrier.clock);
  if (request.waits) {
    barrier.waiting |= 1u << warp.id;
    warp.state = Warp::State::kWaits;
  } else {
    memories.race.tick(warp.id);
  }
  complete_if_full(barrier);
}

void MachineBlock::complete_if_full(Barrier& barrier) {
  if (barrier.arrived == 0 || barrier.arrived < (barrier.threads ? barrier.threads : live_warps_ * kWarpSize)) return;
  for (size_t w = 0; w < shadow_warps_.size(); ++w) {
    if (!(barrier.waiting >> w & 1)) continue;
    memories.race.acquire(static_cast<int>(w), barrier.clock);
    memories.race.tick(static_cast<int>(w));
    warps_[w]->go_on(barrier.predicate);
  }
  barrier = {};
}

void MachineBlock::deadlock() const {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "): deadlock:";
  for (size_t w = 0; w < shadow_warps_.size(); ++w)
    if (warps_[w]->state == Warp::State::kWaits)
      text << " warp " << w << " waits at " << launch_->program.where(warps_[w]->pc() - 1) << ";";
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived)
      text << " barrier " << id << " has " << barrier.arrived << " threads of "
           << (barrier.threads ? barrier.threads : live_warps_ * kWarpSize);
  }
  throw KernelError(text.str());
}

// ---- launch ------------------------------------------------------------------------------------------------------------------

int64_t run_program(const Program& program, const void* params, size_t params_bytes, dim3 grid, dim3 block, size_t smem_bytes) {
  const Options options = options_from_environment();
  check(options.threads == 1, "FOVEATE_EMULATOR_THREADS is ", options.threads, "; the PTX machine runs one block at a time");
  check(options.counters.empty(), "FOVEATE_EMULATOR_COUNTERS: the PTX machine does not count what accesses cost");
  check(block.y == 1 && block.z == 1 && block.x > 0 && block.x % kWarpSize == 0 && block.x <= kMaxWarps * kWarpSize, "a block of ", block.x,
        " x ", block.y, " x ", block.z, " threads; the PTX machine runs one-dimensional blocks of whole warps, up to 1024 threads");
  const Entry& entry = program.entry;
  check(entry.most_threads == 0 || block.x <= entry.most_threads, entry.name, " is compiled for at most ", entry.most_threads,
        " threads in a block, and launched with ", block.x);
  check(entry.required_threads == 0 || block.x == entry.required_threads, entry.name, " is compiled for ", entry.required_threads,
        " threads in a block, and launched with ", block.x);
  check(params_bytes == static_cast<size_t>(entry.param_bytes), entry.name, " takes ", entry.param_bytes,
        " bytes of parameters, and is given ", params_bytes);
  check(smem_bytes <= SharedMemory::kMost, smem_bytes, " bytes of shared memory; a block has at most ", SharedMemory::kMost);

  // Kept from launch to launch, for their memory.
  thread_local const auto global_race = std::make_unique<GlobalRace>();
  thread_local const auto worker = std::make_unique<MachineBlock>();
  const MachineLaunch launch{program, params, grid, block, smem_bytes, options, *global_race};
  global_race->begin(options.race, false);
  worker->memories.global.begin();
  worker->memories.counters.begin(false);
  int64_t executed = 0;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t index = 0; index < blocks; ++index) executed += worker->run(launch, index);
  global_race->end();
  return executed;
}

}  // namespace foveate::emulator::ptx
