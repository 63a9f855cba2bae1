// One lane's accesses, through the emulator's checks: bounds, alignment, races, copies under way.
#pragma once

#include <cstring>

#include "cuda/device/device.cuh"
#include "emulator/ptx/machine.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

inline uint64_t address_of(Warp& warp, const Instruction& i, Row row, int lane) {
  const uint64_t base = i.address_bytes == 4 ? warp.row<uint32_t>(row)[lane] : warp.row<uint64_t>(row)[lane];
  return base + static_cast<uint64_t>(i.offset);
}

inline uint32_t shared_address(Warp& warp, const Instruction& i, Row row, int lane) {
  const uint64_t address = address_of(warp, i, row, lane);
  const uint64_t shown = i.address_bytes == 4 ? address & 0xffffffffu : address;
  if (shown > 0xffffffffu) kernel_error("the address ", shown, " is not one of shared memory");
  return static_cast<uint32_t>(shown);
}

template <class T>
T* global_address(Warp& warp, const Instruction& i, Row row, int lane) {
  return reinterpret_cast<T*>(address_of(warp, i, row, lane));
}

// Runs body(lane, site) for each lane that takes part; the emulator knows it as the current thread.
template <class Body>
void for_lanes(Warp& warp, Body body) {
  for (int l = 0; l < kWarpSize; ++l)
    if (warp.lanes >> l & 1) body(l, warp.act_as(l));
}

}  // namespace foveate::emulator::ptx
