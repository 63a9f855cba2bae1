// mov, cvta and the packing of registers (PTX ISA, "mov", "cvta"). Generic addresses are those of global memory: they need no conversion.
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// mov.b32 {%rs1, %rs2}, %r: the first takes the lower bits.
template <class Whole, class Half>
void split(Warp& warp, const Instruction& i) {
  const LaneSource<Whole> whole(warp, i.rows[2]);
  Half low[kWarpSize], high[kWarpSize];
  for (int l = 0; l < kWarpSize; ++l) low[l] = static_cast<Half>(whole[l]), high[l] = static_cast<Half>(whole[l] >> 8 * sizeof(Half));
  store_lanes(warp, i.rows[0], low);
  store_lanes(warp, i.rows[1], high);
}

}  // namespace

void add_move(Table& table) {
  table.lanes({"mov.pred"}, [](bool a) { return a; });
  table.lanes({"mov.b16", "mov.u16", "mov.s16"}, [](u16 a) { return a; });
  table.lanes({"mov.b32", "mov.u32", "mov.s32", "mov.f32"}, [](u32 a) { return a; });
  table.lanes({"mov.b64", "mov.u64", "mov.s64", "mov.f64", "cvta.to.global.u64", "cvta.global.u64"}, [](u64 a) { return a; });

  table.lanes({"mov.b32"}, [](u16 low, u16 high) { return static_cast<u32>(high) << 16 | low; });
  table.lanes({"mov.b64"}, [](u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; });
  table.add("mov.b32", {split<u32, u16>, {Slot::k16, Slot::k16}, {Slot::k32}, Flow::kNext, 0, true});
  table.add("mov.b64", {split<u64, u32>, {Slot::k32, Slot::k32}, {Slot::k64}, Flow::kNext, 0, true});
}

}  // namespace foveate::emulator::ptx
