// Race detector for shared memory: two accesses to a byte, one of them a write, that no barrier orders. It does not depend on the
// schedule: what counts is whether an order exists, not which came first.
//
// Each warp has a vector clock (what it knows of the others' time); barriers hand clocks on. Each 16 bytes of shared memory remember the last
// write of each word and the last read of each warp. Within a warp, whose lanes share a clock, two lanes race if they touch a byte with
// no sync_warp or barrier between.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator/checks/site.h"

namespace foveate::emulator {

constexpr int kMaxWarps = 32;
using Clock = std::array<uint32_t, kMaxWarps>;

// Who accesses. kWholeWarp: an operation that all lanes have waited for together, before whatever each does after it. kSeveralLanes: one
// that all lanes take part in, but that orders nothing.
struct Accessor {
  static constexpr uint8_t kWholeWarp = 0xff, kSeveralLanes = 0xfe;
  uint8_t warp;
  uint8_t lane;
};

// kAsync...: by TMA or wgmma, which see what threads have written only after fence_async().
enum class Access : uint8_t { kRead, kWrite, kAtomic, kAsyncRead, kAsyncWrite };

class RaceDetector {
 public:
  // Forgets the last block: one of `warps` warps begins.
  void begin(bool enabled, int warps, uint32_t bytes);
  // After a block that failed: copies may be under way that will never land.
  void forget() { granules_.clear(), warps_ = 0; }

  // `offset` counts from the start of the block's shared memory. Throws KernelError at a race, or where an asynchronous copy is under way.
  void access(Access kind, uint32_t offset, uint32_t bytes, Accessor who, Site site) {
    if (enabled_ && !(kind == Access::kRead && has_just_read(offset, bytes, who))) checked_access(kind, offset, bytes, who, site);
  }
  // An asynchronous copy has been issued to these bytes (after a kWrite access); until `landed` nobody may touch them.
  void under_way(uint32_t offset, uint32_t bytes, Site site);
  // `clock`: the warp's own at the time from which others may know of the copy.
  void landed(uint32_t offset, uint32_t bytes, Accessor who, Site site, uint32_t clock);
  // An asynchronous operation will read these 16-byte pieces (after a kAsyncRead access); until `has_read` nobody may write them.
  void will_read(uint32_t offset, Site site);
  void has_read(uint32_t offset);
  void fence_async(int warp);

  // Order: a warp gives what it knows to `clock`; another, or another lane, takes it over. tick() separates what follows from what was given.
  void release(int warp, Clock& clock) const;
  void acquire(int warp, const Clock& clock);
  void tick(int warp);
  void sync_lanes(int warp);
  const Clock& clock(int warp) const { return clocks_[warp]; }
  // Whether what `by` did when its warp's clock said so comes before what `who` does now.
  bool ordered(Accessor by, uint32_t clock, Accessor who) const {
    return clock < unordered_from(by.warp, who.warp) || (by.warp == who.warp && !lanes_race(by.lane, who.lane));
  }

 private:
  struct Write {
    uint32_t clock = 0;
    uint32_t where = 0;  // site and lane
    uint8_t warp = 0;
    uint8_t bytes = 0;  // of the word
    bool atomic = false;
    bool async = false;
  };
  struct Granule {
    Write word[4];  // `whole`: word[0] stands for all four
    uint32_t pending_site = 0;
    uint16_t pending = 0;  // bytes that an asynchronous copy will write
    bool whole = true;
    uint16_t readers = 0;  // asynchronous operations that will read it
  };
  struct Read {
    uint32_t clock = 0;
    uint32_t site = 0;
    uint16_t bytes = 0;
    uint8_t lane[4] = {};  // of each word
  };

  // Whether this read repeats one of the same tick: a write between the two would have been a race with the first. Not so where the
  // whole warp reads, whose lanes may write after it.
  bool has_just_read(uint32_t offset, uint32_t bytes, Accessor who) const {
    const uint32_t index = offset / 16, mask = ((1u << bytes) - 1) << offset % 16;  // no read has the bits of a second granule
    const Read& read = reads_[static_cast<size_t>(index) * warps_ + who.warp];
    if (read.clock != clocks_[who.warp][who.warp] || (mask & ~read.bytes) || who.lane == Accessor::kWholeWarp) return false;
    for (uint32_t word = offset % 16 / 4; word <= (offset % 16 + bytes - 1) / 4 && word < 4; ++word)
      if (read.lane[word] != who.lane && read.lane[word] != Accessor::kSeveralLanes) return false;
    return !(granules_[index].pending & mask);
  }
  // The first tick of warp `by` of which warp `who` does not know; of its own, the first since its lanes were last in step.
  uint32_t unordered_from(int by, int who) const { return by == who ? synced_[who] : clocks_[who][by] + 1; }
  // Whether two lanes of one warp race where nothing orders them.
  static bool lanes_race(uint8_t a, uint8_t b) { return a != Accessor::kWholeWarp && (a != b || a == Accessor::kSeveralLanes); }
  void checked_access(Access kind, uint32_t offset, uint32_t bytes, Accessor who, Site site);
  void check_write(const Write& write, uint32_t bytes, Access kind, uint32_t offset, Accessor who, Site site) const;
  void check_reads(const Read* reads, uint32_t bytes, uint32_t offset, Accessor who, Site site) const;
  static void record_read(Read& read, uint32_t clock, uint32_t bytes, uint32_t site, uint8_t lane);
  static void record_write(Granule& granule, const Write& write, uint32_t bytes);

  bool enabled_ = false;
  int warps_ = 0;
  uint32_t latest_ = 0;  // the largest clock yet; a block begins after it, so that shadow memory needs no clearing
  std::array<Clock, kMaxWarps> clocks_{};
  Clock synced_{};  // of each warp, the tick in which its lanes were last in step
  Clock async_visible_{};  // how much of each warp's writes fences have handed to TMA and wgmma
  std::vector<Granule> granules_;
  std::vector<Read> reads_;  // [granule][warp]
};

}  // namespace foveate::emulator
