// Instructions by which the lanes of a warp exchange values (PTX ISA, "shfl.sync", "vote.sync", "bar.warp.sync").
#include <bit>

#include "emulator/ptx/machine.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

// The lanes that the instruction names must be those that are here; of those that have returned none is waited for.
void check_members(const Warp& warp, const uint32_t* masks) {
  for (int l = 0; l < kWarpSize; ++l) {
    if (!(warp.lanes >> l & 1) || (masks[l] & warp.live) == warp.lanes) continue;
    kernel_error("divergence: lane ", l, " names the lanes ", std::hex, "0x", masks[l], ", but 0x", warp.lanes, " are here");
  }
}

enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };

// shfl.sync d|p, a, b, c, members: c holds the last lane that may be read and, from bit 8, which bits of the lane stay.
template <Shuffle mode, bool with_predicate>
void shuffle(Warp& warp, const Instruction& i) {
  const Row* sources = i.rows + i.results;
  const uint32_t *a = warp.row<uint32_t>(sources[0]), *b = warp.row<uint32_t>(sources[1]), *c = warp.row<uint32_t>(sources[2]);
  check_members(warp, warp.row<uint32_t>(sources[3]));
  uint32_t values[kWarpSize], inside = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = mode == Shuffle::kUp          ? lane - by
               : mode == Shuffle::kDown      ? lane + by
               : mode == Shuffle::kButterfly ? lane ^ by
                                             : first | (by & ~segment);
    const bool is_inside = mode == Shuffle::kUp ? from >= last : from <= last;
    if (!is_inside) from = lane;
    inside |= static_cast<uint32_t>(is_inside) << lane;
    if (warp.lanes >> lane & 1 && !(warp.lanes >> from & 1)) kernel_error("lane ", lane, " reads from lane ", from, ", which is not here");
    values[lane] = a[from];
  }
  store_lanes(warp, i.rows[0], values);
  if constexpr (with_predicate) store_mask(warp, i.rows[1], inside);
}

template <Shuffle mode>
void add_shuffle(Table& table, const char* name) {
  const std::vector<Slot> sources(4, Slot::k32);
  table.add(name, {shuffle<mode, false>, {Slot::k32}, sources, Flow::kTogether});
  table.add(name, {shuffle<mode, true>, {Slot::k32, Slot::kPredicate}, sources, Flow::kTogether});
}

enum class Vote : uint8_t { kAny, kAll, kUniform, kBallot };

template <Vote vote>
void count_votes(Warp& warp, const Instruction& i) {
  check_members(warp, warp.row<uint32_t>(i.rows[2]));
  const uint32_t yes = *warp.row<uint32_t>(i.rows[1]) & warp.lanes;
  if constexpr (vote == Vote::kBallot) {
    uint32_t values[kWarpSize];
    for (uint32_t& value : values) value = yes;
    store_lanes(warp, i.rows[0], values);
  } else {
    const bool any = yes != 0, all = yes == warp.lanes;
    store_mask(warp, i.rows[0], (vote == Vote::kAny ? any : vote == Vote::kAll ? all : all || !any) ? kAllLanes : 0);
  }
}

void sync(Warp& warp, const Instruction& i) {
  check_members(warp, warp.row<uint32_t>(i.rows[0]));
  warp.block->memories.race.sync_lanes(warp.id);
}

}  // namespace

void add_warp(Table& table) {
  add_shuffle<Shuffle::kUp>(table, "shfl.sync.up.b32");
  add_shuffle<Shuffle::kDown>(table, "shfl.sync.down.b32");
  add_shuffle<Shuffle::kButterfly>(table, "shfl.sync.bfly.b32");
  add_shuffle<Shuffle::kIndex>(table, "shfl.sync.idx.b32");
  table.add("vote.sync.any.pred", {count_votes<Vote::kAny>, {Slot::kPredicate}, {Slot::kPredicate, Slot::k32}, Flow::kTogether});
  table.add("vote.sync.all.pred", {count_votes<Vote::kAll>, {Slot::kPredicate}, {Slot::kPredicate, Slot::k32}, Flow::kTogether});
  table.add("vote.sync.uni.pred", {count_votes<Vote::kUniform>, {Slot::kPredicate}, {Slot::kPredicate, Slot::k32}, Flow::kTogether});
  table.add("vote.sync.ballot.b32", {count_votes<Vote::kBallot>, {Slot::k32}, {Slot::kPredicate, Slot::k32}, Flow::kTogether});
  table.add("bar.warp.sync", {sync, {}, {Slot::k32}, Flow::kTogether});
}

}  // namespace foveate::emulator::ptx
