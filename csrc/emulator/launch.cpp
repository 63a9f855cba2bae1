#include "emulator/launch.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "core/check.h"
#include "emulator/block.h"

namespace foveate::emulator {

namespace {

// Blocks keep their stacks and shared memory from launch to launch.
class BlockPool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Block>();
    auto block = std::move(free_.back());
    free_.pop_back();
    return block;
  }
  void give(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> free_;
};

BlockPool& pool() {
  static BlockPool blocks;
  return blocks;
}

}  // namespace

void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t smem_bytes) {
  const Options options = options_from_environment();
  check(block.y == 1 && block.z == 1 && block.x > 0 && block.x % kWarpSize == 0 && block.x <= kMaxWarps * kWarpSize, "a block of ", block.x,
        " x ", block.y, " x ", block.z,
        " threads; the kernels of this package have one-dimensional blocks of whole warps, up to 1024 threads");
  check(smem_bytes <= SharedMemory::kMost, smem_bytes, " bytes of shared memory; a block has at most ", SharedMemory::kMost);

  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next = 0;
  std::mutex error_mutex;
  std::exception_ptr error;
  const auto work = [&] {
    auto worker = pool().take();
    worker->global.begin();
    for (uint64_t index; (index = next.fetch_add(1)) < blocks;) {
      try {
        worker->run(kernel, grid, block, index, smem_bytes, options);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next = blocks;
      }
    }
    pool().give(std::move(worker));
  };

  std::vector<std::thread> helpers;
  for (uint64_t t = 1; t < std::min<uint64_t>(options.threads, blocks); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace foveate::emulator
