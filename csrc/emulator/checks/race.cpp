#include "emulator/checks/race.h"

#include <algorithm>

#include "emulator/checks/error.h"

namespace foveate::emulator {

namespace {

uint32_t where(Site site, uint8_t lane) { return site_number(site) << 8 | lane; }

std::string describe(int warp, uint32_t where) {
  const uint32_t lane = where & 0xff;
  std::string text = "by warp " + std::to_string(warp);
  if (lane < 32) text += " lane " + std::to_string(lane);
  return text + " at " + name(site_of_number(where >> 8));
}

const char* verb(Access kind) {
  switch (kind) {
    case Access::kRead: return "read";
    case Access::kWrite: return "write";
    case Access::kAtomic: return "atomic addition";
    case Access::kAsyncRead: return "asynchronous read";
    case Access::kAsyncWrite: return "asynchronous write";
  }
  return "";
}
bool only_reads(Access kind) { return kind == Access::kRead || kind == Access::kAsyncRead; }

[[noreturn]] void race(const char* earlier, int warp, uint32_t earlier_where, Access kind, uint32_t offset, Accessor who, Site site) {
  kernel_error("race on byte ", offset, " of shared memory: ", verb(kind), " ", describe(who.warp, where(site, who.lane)), ", and ",
               earlier, " ", describe(warp, earlier_where), ", with ", warp == who.warp ? "no sync_warp" : "no barrier", " between them");
}

}  // namespace

void RaceDetector::begin(bool enabled, int warps, uint32_t bytes) {
  enabled_ = enabled;
  if (!enabled) return;
  const uint32_t granules = (bytes + 15) / 16;
  if (warps != warps_ || granules > granules_.size() || latest_ > UINT32_MAX / 2) {
    warps_ = warps;
    latest_ = 0;
    granules_.assign(granules, {});
    reads_.assign(static_cast<size_t>(granules) * warps, {});
  }
  const uint32_t start = latest_ + 1;
  for (int w = 0; w < warps; ++w) {
    clocks_[w].fill(start);
    clocks_[w][w] = start + 1;
    synced_[w] = start + 1;
    async_visible_[w] = start;
  }
  latest_ = start + 1;
}

void RaceDetector::release(int warp, Clock& clock) const {
  for (int w = 0; w < warps_; ++w) clock[w] = std::max(clock[w], clocks_[warp][w]);
}
void RaceDetector::acquire(int warp, const Clock& clock) {
  for (int w = 0; w < warps_; ++w) clocks_[warp][w] = std::max(clocks_[warp][w], clock[w]);
  synced_[warp] = std::max(synced_[warp], clock[warp] + 1);  // what a lane of this warp has given, another knows now
}
void RaceDetector::tick(int warp) { latest_ = std::max(latest_, ++clocks_[warp][warp]); }
void RaceDetector::sync_lanes(int warp) {
  tick(warp);
  synced_[warp] = clocks_[warp][warp];
}

void RaceDetector::check_write(const Write& write, uint32_t bytes, Access kind, uint32_t offset, Accessor who, Site site) const {
  if (!(write.bytes & bytes)) return;
  if ((kind == Access::kAsyncRead || kind == Access::kAsyncWrite) && !write.async && write.clock > async_visible_[write.warp]) {
    kernel_error(verb(kind), " ", describe(who.warp, where(site, who.lane)), " of byte ", offset, " of shared memory, written ",
                 describe(write.warp, write.where), ": fence_async_proxy is missing between them");
  }
  if (write.atomic && kind == Access::kAtomic) return;
  if (ordered({write.warp, static_cast<uint8_t>(write.where)}, write.clock, who)) return;
  race(write.atomic ? "atomic addition" : "write", write.warp, write.where, kind, offset, who, site);
}

void RaceDetector::check_reads(const Read* reads, uint32_t bytes, uint32_t offset, Accessor who, Site site) const {
  for (int w = 0; w < warps_; ++w) {
    const Read& read = reads[w];
    if (!(read.bytes & bytes)) continue;
    for (int i = 0; i < 4; ++i) {
      if ((read.bytes & bytes) >> 4 * i & 0xf && !ordered({static_cast<uint8_t>(w), read.lane[i]}, read.clock, who))
        race("read", w, read.site << 8 | read.lane[i], Access::kWrite, offset, who, site);
    }
  }
}

void RaceDetector::record_read(Read& read, uint32_t clock, uint32_t bytes, uint32_t site, uint8_t lane) {
  if (read.clock != clock) read = {clock, site, 0, {}};
  for (int i = 0; i < 4; ++i) {
    if (!(bytes >> 4 * i & 0xf)) continue;
    const bool first = !(read.bytes >> 4 * i & 0xf);
    if (first || read.lane[i] == Accessor::kWholeWarp)
      read.lane[i] = lane;
    else if (lane != Accessor::kWholeWarp && lane != read.lane[i])
      read.lane[i] = Accessor::kSeveralLanes;
  }
  read.bytes |= static_cast<uint16_t>(bytes);
}

void RaceDetector::record_write(Granule& granule, const Write& write, uint32_t bytes) {
  if (bytes == 0xffff) {
    granule.whole = true;
    granule.word[0] = write;
    granule.word[0].bytes = 0xf;
    return;
  }
  if (granule.whole) {
    granule.whole = false;
    granule.word[3] = granule.word[2] = granule.word[1] = granule.word[0];
  }
  for (int i = 0; i < 4; ++i) {
    const uint8_t in_word = bytes >> 4 * i & 0xf;
    if (!in_word) continue;
    // Several writes of one tick to parts of a word, as of 16-bit numbers, are one.
    const bool same = granule.word[i].clock == write.clock && granule.word[i].where == write.where && granule.word[i].warp == write.warp;
    const uint8_t before = same ? granule.word[i].bytes : 0;
    granule.word[i] = write;
    granule.word[i].bytes = before | in_word;
  }
}

void RaceDetector::checked_access(Access kind, uint32_t offset, uint32_t bytes, Accessor who, Site site) {
  const uint32_t place = where(site, who.lane), clock = clocks_[who.warp][who.warp];
  for (uint32_t done = 0; done < bytes;) {
    const uint32_t index = (offset + done) / 16, first = (offset + done) % 16, count = std::min(16 - first, bytes - done);
    const uint32_t mask = ((1u << count) - 1) << first;
    Granule& granule = granules_[index];
    Read* reads = &reads_[static_cast<size_t>(index) * warps_];
    if (granule.pending & mask) {
      kernel_error(verb(kind), " ", describe(who.warp, place), " of byte ", offset,
                   " of shared memory, to which the asynchronous copy issued at ", name(site_of_number(granule.pending_site)),
                   " is under way: it has not been waited for");
    }
    if (granule.whole) {
      check_write(granule.word[0], 0xf, kind, offset, who, site);
    } else {
      for (int i = 0; i < 4; ++i) check_write(granule.word[i], mask >> 4 * i & 0xf, kind, offset, who, site);
    }
    if (!only_reads(kind) && granule.readers > 0) {
      kernel_error(verb(kind), " ", describe(who.warp, place), " of byte ", offset,
                   " of shared memory, which the asynchronous operation issued at ", name(site_of_number(granule.pending_site)),
                   " may still read: it has not been waited for");
    }
    if (only_reads(kind)) {
      record_read(reads[who.warp], clock, mask, place >> 8, who.lane);
    } else {
      check_reads(reads, mask, offset, who, site);
      record_write(granule, {clock, place, who.warp, 0, kind == Access::kAtomic, kind == Access::kAsyncWrite}, mask);
    }
    done += count;
  }
}

void RaceDetector::under_way(uint32_t offset, uint32_t bytes, Site site) {
  if (!enabled_) return;
  const uint32_t number = site_number(site);
  for (uint32_t b = offset; b < offset + bytes; ++b) {
    granules_[b / 16].pending |= 1u << b % 16;
    granules_[b / 16].pending_site = number;
  }
}

void RaceDetector::landed(uint32_t offset, uint32_t bytes, Accessor who, Site site, uint32_t clock) {
  if (!enabled_) return;
  const uint32_t place = where(site, who.lane);
  for (uint32_t done = 0; done < bytes;) {
    const uint32_t first = (offset + done) % 16, count = std::min(16 - first, bytes - done), mask = ((1u << count) - 1) << first;
    Granule& granule = granules_[(offset + done) / 16];
    const Write& before = granule.word[granule.whole ? 0 : first / 4];
    granule.pending &= ~mask;
    record_write(granule, {clock, place, who.warp, 0, false, before.async}, mask);
    done += count;
  }
}

void RaceDetector::will_read(uint32_t offset, Site site) {
  if (!enabled_) return;
  granules_[offset / 16].readers++;
  granules_[offset / 16].pending_site = site_number(site);
}
void RaceDetector::has_read(uint32_t offset) {
  if (enabled_) granules_[offset / 16].readers--;
}

void RaceDetector::fence_async(int warp) {
  for (int w = 0; w < warps_; ++w) async_visible_[w] = std::max(async_visible_[w], clocks_[warp][w]);
  if (enabled_) tick(warp);
}

}  // namespace foveate::emulator
