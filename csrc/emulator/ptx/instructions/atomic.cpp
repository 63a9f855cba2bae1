// atom, red and fences (PTX ISA, "atom", "red", "ld.acquire", "st.release", "membar"). Lanes act one after the other.
#include <atomic>
#include <bit>

#include "emulator/ptx/instructions/access.h"

namespace foveate::emulator::ptx {

namespace {

// Adds without an order: of the result only the sum is sure.
void add_global_float(Warp& warp, const Instruction& i, Row address, Row value, Row before) {
  for_lanes(warp, [&](int lane, Site site) {
    float* p = global_address<float>(warp, i, address, lane);
    check_global(GlobalAccess::kAtomic, p, sizeof(float), i.name, site);
    const float old = std::atomic_ref(*p).fetch_add(warp.row<float>(value)[lane]);
    if (before) warp.row<float>(before)[lane] = old;
  });
}

void atom_add_float(Warp& warp, const Instruction& i) { add_global_float(warp, i, i.rows[1], i.rows[2], i.rows[0]); }
void red_add_float(Warp& warp, const Instruction& i) { add_global_float(warp, i, i.rows[0], i.rows[1], 0); }
void red_add_shared(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) {
    cuda::dev::atomic_add_shared(shared_address(warp, i, i.rows[0], lane), warp.row<float>(i.rows[1])[lane], site);
  });
}

void atom_add_acq_rel(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) {
    uint32_t* p = global_address<uint32_t>(warp, i, i.rows[1], lane);
    const uint32_t value = warp.row<uint32_t>(i.rows[2])[lane];
    warp.row<uint32_t>(i.rows[0])[lane] = cuda::dev::atomic_add_acq_rel(p, value, site);
  });
}
void load_acquire(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) {
    warp.row<uint32_t>(i.rows[0])[lane] = cuda::dev::ld_acquire(global_address<const uint32_t>(warp, i, i.rows[1], lane), site);
  });
}
void store_release(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) {
    cuda::dev::st_release(global_address<uint32_t>(warp, i, i.rows[0], lane), warp.row<uint32_t>(i.rows[1])[lane], site);
  });
}

void fence(Warp& warp, const Instruction&) {
  for_lanes(warp, [](int, Site) { GlobalRace::fence(); });
}

}  // namespace

void add_atomic(Table& table) {
  table.add("atom.global.add.f32", {atom_add_float, {Slot::k32}, {Slot::kAddress, Slot::k32}});
  table.add("red.global.add.f32", {red_add_float, {}, {Slot::kAddress, Slot::k32}});
  table.add("red.shared.add.f32", {red_add_shared, {}, {Slot::kAddress, Slot::k32}});
  table.add("atom.acq_rel.gpu.global.add.u32", {atom_add_acq_rel, {Slot::k32}, {Slot::kAddress, Slot::k32}});
  table.add("ld.acquire.gpu.global.u32", {load_acquire, {Slot::k32}, {Slot::kAddress}});
  table.add("st.release.gpu.global.u32", {store_release, {}, {Slot::kAddress, Slot::k32}});
  table.add("membar.gl", {fence, {}, {}});
  table.add("fence.acq_rel.gpu", {fence, {}, {}});
}

}  // namespace foveate::emulator::ptx
