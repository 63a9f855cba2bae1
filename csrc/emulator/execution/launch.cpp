#include "emulator/execution/launch.h"

#include <atomic>
#include <fstream>
#include <memory>
#include <mutex>
#include <thread>

#include "core/check.h"
#include "emulator/execution/block.h"
#include "emulator/ptx/launch.h"

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

// "decode_kernel<bf16, 128>" from "void launch(...) [with auto kernel = foveate::cuda::(anonymous)::decode_kernel<foveate::bf16, 128>; ...]"
std::string name_of(std::string_view signature) {
  const size_t start = signature.find("kernel = ");
  std::string name(signature.substr(start + 9, signature.find("; Params", start) - start - 9));
  for (const std::string_view scope : {"foveate::", "cuda::", "{anonymous}::", "&"})
    for (size_t at; (at = name.find(scope)) != std::string::npos;) name.erase(at, scope.size());
  return name;
}

void append(const std::string& path, const std::string& line) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::ofstream file(path, std::ios::app);
  file << line << std::flush;
  check(file.good(), "FOVEATE_EMULATOR_COUNTERS: cannot write to '", path, "'");
}

}  // namespace

void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t smem_bytes) {
  if (const std::string folder = ptx::folder_from_environment(); !folder.empty())
    return ptx::run_grid(folder, kernel, grid, block, smem_bytes);
  const Options options = options_from_environment();
  check(block.y == 1 && block.z == 1 && block.x > 0 && block.x % kWarpSize == 0 && block.x <= kMaxWarps * kWarpSize, "a block of ", block.x,
        " x ", block.y, " x ", block.z,
        " threads; the kernels of this package have one-dimensional blocks of whole warps, up to 1024 threads");
  check(smem_bytes <= SharedMemory::kMost, smem_bytes, " bytes of shared memory; a block has at most ", SharedMemory::kMost);

  thread_local const auto global_race = std::make_unique<GlobalRace>();  // keeps its memory from launch to launch
  const Launch launch{kernel, grid, block, smem_bytes, options, *global_race};
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  Counters counters;
  launch.global_race.begin(options.race, options.threads > 1 && blocks > 1);
  const auto work = [&] {
    auto worker = pool().take();
    worker->global.begin();
    worker->counters.begin(!options.counters.empty());
    for (uint64_t index; (index = next.fetch_add(1)) < blocks;) {
      try {
        worker->run(launch, index);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next = blocks;
      }
    }
    {
      const std::lock_guard lock(mutex);
      counters.merge(worker->counters);
    }
    pool().give(std::move(worker));
  };

  std::vector<std::thread> helpers;
  for (uint64_t t = 1; t < std::min<uint64_t>(options.threads, blocks); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
  launch.global_race.end();
  if (!options.counters.empty()) append(options.counters, counters.json(name_of(kernel.signature), blocks, block.x));
}

}  // namespace foveate::emulator
