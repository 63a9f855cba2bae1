// Barriers of the block (PTX ISA, "bar"). `bar` is `barrier` with .aligned: all lanes of a warp come together.
#include "emulator/ptx/machine.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

int uniform(Warp& warp, Row row) {
  const uint32_t* values = warp.row<uint32_t>(row);
  int first = -1;
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(warp.lanes >> l & 1)) continue;
    if (first == -1) first = l;
    if (values[l] != values[first]) kernel_error("lane ", l, " comes with ", values[l], ", lane ", first, " with ", values[first]);
  }
  return static_cast<int>(values[first]);
}

void sync(Warp& warp, const Instruction& i) { warp.block->barrier(warp, {uniform(warp, i.rows[0]), 0, true}); }
void sync_some(Warp& warp, const Instruction& i) { warp.block->barrier(warp, {uniform(warp, i.rows[0]), uniform(warp, i.rows[1]), true}); }
void arrive(Warp& warp, const Instruction& i) { warp.block->barrier(warp, {uniform(warp, i.rows[0]), uniform(warp, i.rows[1]), false}); }

// bar.red.or.pred p, barrier, q: the result is there when the warp goes on.
void reduce_or(Warp& warp, const Instruction& i) {
  warp.result_row = i.rows[0];
  warp.block->barrier(warp, {uniform(warp, i.rows[1]), 0, true}, (*warp.row<uint32_t>(i.rows[2]) & warp.lanes) != 0);
}

// A thread that waits for another's store: the others run first. Who waits for ever is told apart by how often.
void sleep(Warp& warp, const Instruction&) {
  warp.rests = true;
  warp.executed += 10000;
}

}  // namespace

void add_barrier(Table& table) {
  table.add("bar.sync", {sync, {}, {Slot::k32}, Flow::kTogether});
  table.add("bar.sync", {sync_some, {}, {Slot::k32, Slot::k32}, Flow::kTogether});
  table.add("bar.arrive", {arrive, {}, {Slot::k32, Slot::k32}, Flow::kTogether});
  table.add("bar.red.or.pred", {reduce_or, {Slot::kPredicate}, {Slot::k32, Slot::kPredicate}, Flow::kTogether});
  table.add("nanosleep.u32", {sleep, {}, {Slot::k32}});
}

}  // namespace foveate::emulator::ptx
