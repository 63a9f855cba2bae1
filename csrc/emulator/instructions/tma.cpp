#include "emulator/instructions/tma.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "cuda/device/sm90/hopper.cuh"
#include "emulator/execution/block.h"

namespace foveate::cuda {

TensorMap make_tensor_map(const TensorMapSpec& spec) {
  static_assert(sizeof(TensorMapSpec) <= sizeof(TensorMap));
  const int64_t element = size_of(spec.dtype), row = spec.box[0] * element;
  const int64_t widest = spec.swizzle == Swizzle::k128 ? 128 : spec.swizzle == Swizzle::k64 ? 64 : spec.swizzle == Swizzle::k32 ? 32 : 4096;
  check(spec.rank >= 2 && spec.rank <= kMaxTmaRank, "a tensor map of rank ", spec.rank, ", expected 2..5");
  check(reinterpret_cast<uintptr_t>(spec.data) % 16 == 0, "the data of a tensor map is not aligned to 16 bytes");
  check(row % 16 == 0 && row <= widest, "a row of the box has ", row, " bytes, expected a multiple of 16 up to ", widest);
  for (int i = 0; i < spec.rank; ++i)
    check(spec.box[i] >= 1 && spec.box[i] <= 256 && spec.size[i] >= 1, "a tensor map has size ", spec.size[i], " and box ", spec.box[i],
          " in dimension ", i, ", expected a box of 1..256");
  for (int i = 0; i + 1 < spec.rank; ++i)
    check(spec.stride_bytes[i] % 16 == 0, "stride ", i, " of a tensor map is ", spec.stride_bytes[i], " bytes, expected a multiple of 16");
  TensorMap map{};
  std::memcpy(&map, &spec, sizeof(spec));
  return map;
}

}  // namespace foveate::cuda

namespace foveate::emulator {

using cuda::Swizzle;
using cuda::TensorMapSpec;

namespace {

Box make_box(const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t address, const char* what, Site site) {
  Box box{.map = {}, .at = {}, .offset = 0, .bytes = 0, .who = current_thread->accessor(), .site = site};
  std::memcpy(&box.map, &map, sizeof(box.map));
  if (box.map.rank != rank) kernel_error(what, " of rank ", rank, " at ", name(site), " by a tensor map of rank ", box.map.rank);
  std::copy(at, at + rank, box.at);
  box.bytes = static_cast<uint32_t>(size_of(box.map.dtype));
  for (int i = 0; i < rank; ++i) box.bytes *= box.map.box[i];
  box.offset = current_block->shared.offset(address, box.bytes, box.map.swizzle == Swizzle::kNone ? 128 : 1024, what, site);
  return box;
}

// f(offset in shared memory, address in global memory or nullptr, bytes) for each 16 bytes of the box; fewer where the tensor ends inside.
template <class F>
void for_each_chunk(const Box& box, F f) {
  const TensorMapSpec& map = box.map;
  const int64_t element = size_of(map.dtype), row_bytes = map.box[0] * element;
  const uint32_t rows = static_cast<uint32_t>(box.bytes / row_bytes);
  for (uint32_t row = 0; row < rows; ++row) {
    char* start = static_cast<char*>(const_cast<void*>(map.data));
    uint32_t rest = row;
    bool inside = true;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = box.at[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && index >= 0 && index < static_cast<int64_t>(map.size[i]);
      start += index * static_cast<int64_t>(map.stride_bytes[i - 1]);
    }
    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
      const uint32_t linear = box.offset + static_cast<uint32_t>(row * row_bytes + byte);
      const int64_t first = box.at[0] * element + byte, end = static_cast<int64_t>(map.size[0]) * element;
      const int64_t count = inside && first >= 0 ? std::clamp<int64_t>(end - first, 0, 16) : 0;
      if (inside && first < 0 && first > -16) kernel_error("TMA at ", name(box.site), ": the box begins within 16 bytes before the tensor");
      f(swizzled(linear, map.swizzle), count > 0 ? start + first : nullptr, static_cast<uint32_t>(count));
    }
  }
}

template <class T, class Sum>
void add_to(void* to, const void* from, uint32_t bytes, Sum sum) {
  for (uint32_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, static_cast<char*>(to) + i, sizeof(T));
    std::memcpy(&b, static_cast<const char*>(from) + i, sizeof(T));
    a = sum(a, b);
    std::memcpy(static_cast<char*>(to) + i, &a, sizeof(T));
  }
}

}  // namespace

uint32_t swizzled(uint32_t offset, Swizzle swizzle) {
  // The pattern belongs to addresses; kBase is a multiple of it.
  const uint32_t mask = swizzle == Swizzle::k128 ? 7 : swizzle == Swizzle::k64 ? 3 : swizzle == Swizzle::k32 ? 1 : 0;
  return offset ^ (offset >> 7 & mask) << 4;
}

void Tma::load(uint32_t to, const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t barrier, Site site) {
  Block& block = *current_block;
  Load load{make_box(map, at, rank, to, "tma_load", site), block.hopper.barriers.for_tma(barrier, site), {}};
  const Box& box = load.box;
  for_each_chunk(box, [&](uint32_t, const char* from, uint32_t bytes) {
    if (!from) return;
    block.global.check_range(from, bytes, "tma_load", site);
    block.global_race->access(GlobalAccess::kRead, from, bytes, "tma_load", site);
  });
  block.race.access(Access::kAsyncWrite, box.offset, box.bytes, box.who, site);
  block.race.under_way(box.offset, box.bytes, site);
  block.shared.poison(box.offset, box.bytes);
  load.clock = block.race.clock(box.who.warp);
  block.race.tick(box.who.warp);
  loads_.push_back(load);
}

void Tma::deliver(uint64_t which) {
  const Load load = loads_[which % loads_.size()];
  loads_.erase(loads_.begin() + static_cast<long>(which % loads_.size()));
  Block& block = *current_block;
  for_each_chunk(load.box, [&](uint32_t offset, const char* from, uint32_t bytes) {
    std::memset(block.shared.at(offset), 0, 16);
    if (from) std::memcpy(block.shared.at(offset), from, bytes);
  });
  block.race.landed(load.box.offset, load.box.bytes, load.box.who, load.box.site, load.clock[load.box.who.warp]);
  block.hopper.barriers.deliver(load.barrier, load.box.bytes, load.clock);
}

void Tma::store(const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t from, bool add, Site site) {
  Block& block = *current_block;
  const char* what = add ? "tma_add" : "tma_store";
  const Box box = make_box(map, at, rank, from, what, site);
  for_each_chunk(box, [&](uint32_t offset, const char* to, uint32_t bytes) {
    if (to) block.global.check_range(to, bytes, what, site);
    block.race.access(Access::kAsyncRead, offset, 16, box.who, site);
    block.race.will_read(offset, site);
  });
  stores_.push_back({box, add, static_cast<int>(current_thread->index.x), false, 0});
}

void Tma::commit() {
  const int thread = static_cast<int>(current_thread->index.x);
  for (Store& store : stores_) {
    if (store.thread != thread) continue;
    if (store.committed) ++store.group;  // counts how many groups came after
    store.committed = true;
  }
}

void Tma::wait(int pending_groups) {
  Block& block = *current_block;
  const int thread = static_cast<int>(current_thread->index.x);
  for (const Store& store : stores_) {
    if (store.thread != thread || !store.committed || store.group < pending_groups) continue;
    for_each_chunk(store.box, [&](uint32_t offset, char* to, uint32_t bytes) {
      const unsigned char* from = block.shared.at(offset);
      if (to) block.global_race->access(store.add ? GlobalAccess::kAtomic : GlobalAccess::kWrite, to, bytes, "tma_store", store.box.site);
      if (to && !store.add) std::memcpy(to, from, bytes);
      if (to && store.add) {
        if (store.box.map.dtype == DType::kFloat32) {
          add_to<float>(to, from, bytes, [](float a, float b) { return a + b; });
        } else if (store.box.map.dtype == DType::kBFloat16) {
          add_to<bf16>(to, from, bytes,
                       [](bf16 a, bf16 b) { return cuda::dev::from_float<bf16>(cuda::dev::to_float(a) + cuda::dev::to_float(b)); });
        } else {
          add_to<f16>(to, from, bytes,
                      [](f16 a, f16 b) { return cuda::dev::from_float<f16>(cuda::dev::to_float(a) + cuda::dev::to_float(b)); });
        }
      }
      block.race.has_read(offset);
      block.race.access(Access::kAsyncRead, offset, 16, store.box.who, store.box.site);  // in use until now
    });
  }
  std::erase_if(stores_, [&](const Store& s) { return s.thread == thread && s.committed && s.group >= pending_groups; });
}

void Tma::check_done(bool last_thread) const {
  const int thread = static_cast<int>(current_thread->index.x);
  for (const Store& store : stores_)
    if (store.thread == thread) kernel_error("it returns from the kernel with a TMA store under way, issued at ", name(store.box.site));
  if (last_thread && !loads_.empty())
    kernel_error("the block ends with a TMA load under way, issued at ", name(loads_.front().box.site), ": nobody has waited for it");
}

}  // namespace foveate::emulator
