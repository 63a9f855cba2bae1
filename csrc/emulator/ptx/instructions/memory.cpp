// ld and st (PTX ISA, "Data Movement and Conversion Instructions"). Hints to caches (L1::no_allocate, .cs) change no result.
#include "emulator/ptx/instructions/access.h"

namespace foveate::emulator::ptx {

namespace {

enum class Space : uint8_t { kParam, kShared, kGlobal, kGlobalReadOnly };

template <class T>
void put(Warp& warp, Row row, int lane, uint8_t register_bytes, T value) {
  if (register_bytes == 2) warp.row<uint16_t>(row)[lane] = static_cast<uint16_t>(value);
  if (register_bytes == 4) warp.row<uint32_t>(row)[lane] = static_cast<uint32_t>(value);
  if (register_bytes == 8) warp.row<uint64_t>(row)[lane] = static_cast<uint64_t>(value);
}

template <Space space, class T, int count>
void load(Warp& warp, const Instruction& i) {
  constexpr uint32_t kBytes = sizeof(T) * count;
  for_lanes(warp, [&](int lane, Site site) {
    const void* from;
    if constexpr (space == Space::kParam) {
      from = warp.block->param(address_of(warp, i, i.rows[count], lane), kBytes);
    } else if constexpr (space == Space::kShared) {
      from = shared_for_reading(shared_address(warp, i, i.rows[count], lane), kBytes, i.name, site);
    } else {
      from = global_address<const void>(warp, i, i.rows[count], lane);
      check_global(space == Space::kGlobal ? GlobalAccess::kRead : GlobalAccess::kReadOnly, from, kBytes, i.name, site);
    }
    T values[count];
    std::memcpy(values, from, kBytes);
    for (int k = 0; k < count; ++k) put(warp, i.rows[k], lane, i.data_bytes, values[k]);
  });
}

template <Space space, class T, int count>
void store(Warp& warp, const Instruction& i) {
  constexpr uint32_t kBytes = sizeof(T) * count;
  for_lanes(warp, [&](int lane, Site site) {
    void* to;
    if constexpr (space == Space::kShared) {
      to = shared_for_writing(shared_address(warp, i, i.rows[0], lane), kBytes, i.name, site);
    } else {
      to = global_address<void>(warp, i, i.rows[0], lane);
      check_global(GlobalAccess::kWrite, to, kBytes, i.name, site);
    }
    T values[count];
    for (int k = 0; k < count; ++k) {
      const Row row = i.rows[1 + k];
      values[k] = static_cast<T>(i.data_bytes == 2   ? warp.row<uint16_t>(row)[lane]
                                 : i.data_bytes == 4 ? warp.row<uint32_t>(row)[lane]
                                                     : warp.row<uint64_t>(row)[lane]);
    }
    std::memcpy(to, values, kBytes);
  });
}

template <Space space, class T, int count>
void add_access(Table& table, const std::string& before, const std::string& after) {
  Semantics read{load<space, T, count>, std::vector<Slot>(count, Slot::kData), {Slot::kAddress}};
  read.access_bytes = sizeof(T);
  table.add("ld." + before + after, read);
  if constexpr (space == Space::kShared || space == Space::kGlobal) {
    Semantics write{store<space, T, count>, {}, std::vector<Slot>(count + 1, Slot::kData)};
    write.sources[0] = Slot::kAddress;
    write.access_bytes = sizeof(T);
    table.add("st." + before + after, write);
  }
}

template <Space space, class T>
void add_type(Table& table, const std::string& before, const std::string& type) {
  add_access<space, T, 1>(table, before, type);
  add_access<space, T, 2>(table, before, "v2." + type);
  if constexpr (sizeof(T) <= 4) add_access<space, T, 4>(table, before, "v4." + type);
}

template <Space space>
void add_space(Table& table, const std::string& before) {
  add_type<space, uint8_t>(table, before, "u8");
  add_type<space, uint8_t>(table, before, "b8");
  add_type<space, int8_t>(table, before, "s8");
  add_type<space, uint16_t>(table, before, "u16");
  add_type<space, uint16_t>(table, before, "b16");
  add_type<space, int16_t>(table, before, "s16");
  for (const char* type : {"u32", "b32", "f32"}) add_type<space, uint32_t>(table, before, type);
  add_type<space, int32_t>(table, before, "s32");
  for (const char* type : {"u64", "s64", "b64", "f64"}) add_type<space, uint64_t>(table, before, type);
}

}  // namespace

void add_memory(Table& table) {
  add_space<Space::kParam>(table, "param.");
  add_space<Space::kShared>(table, "shared.");
  add_space<Space::kGlobal>(table, "global.");
  add_space<Space::kGlobal>(table, "global.cs.");
  add_space<Space::kGlobalReadOnly>(table, "global.nc.");
  add_space<Space::kGlobalReadOnly>(table, "global.nc.L1::no_allocate.");
}

}  // namespace foveate::emulator::ptx
