#include "emulator/checks/global_race.h"

#include <algorithm>

#include "emulator/checks/error.h"
#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {

constexpr size_t kKeptPages = 1024;  // of shadow memory, from one launch to the next

std::string describe(uint32_t block, int warp, uint32_t where) {
  return "by block " + std::to_string(block) + " warp " + std::to_string(warp) + " lane " + std::to_string(where & 0xff) + " at " +
         name(site_of_number(where >> 8));
}

// What a thread of this block knows of another block, if it does.
bool knows(const BlockOrder::Learned& learned, Accessor who) { return current_block->race.ordered(learned.who, learned.at, who); }

void merge(std::vector<BlockOrder::Learned>& known, uint32_t block, const Clock& clock) {
  for (auto& entry : known) {
    if (entry.block != block) continue;
    for (size_t w = 0; w < clock.size(); ++w) entry.clock[w] = std::max(entry.clock[w], clock[w]);
    return;
  }
  known.push_back({block, clock, {}, 0});
}

}  // namespace

void GlobalRace::begin(bool enabled, bool several_threads) {
  enabled_ = enabled;
  several_threads_ = several_threads;
  for (auto& [number, page] : pages_) {
    if (unused_.size() < kKeptPages) unused_.push_back(std::move(page));
  }
  pages_.clear();
  variables_.clear();
  recent_.fill({});
}

void GlobalRace::end() const {
  for (const auto& [p, variable] : variables_) {
    if (!variable.counter || *p == variable.counter->first) continue;
    kernel_error("the counter of atomic_add_acq_rel at ", name(variable.counter->site), " is left at ", *p,
                 " by the launch that found it at ", variable.counter->first, ": the next launch would go on from there");
  }
}

void GlobalRace::fence() {
  Block& block = *current_block;
  const int warp = current_thread->warp->id;
  const Clock& clock = block.race.clock(warp);
  for (size_t w = 0; w < clock.size(); ++w) block.order.fenced[w] = std::max(block.order.fenced[w], clock[w]);
  block.race.tick(warp);
}

GlobalRace::Page& GlobalRace::page_of(uintptr_t address) {
  const uintptr_t number = address >> kPageBits;
  auto& [recent, page] = recent_[number % recent_.size()];
  if (page && recent == number) return *page;
  std::unique_ptr<Page>& found = pages_[number];
  if (!found && unused_.empty()) {
    found = std::make_unique<Page>();
  } else if (!found) {
    found = std::move(unused_.back());
    unused_.pop_back();
    found->fill({});
  }
  recent = number;
  page = found.get();
  return *page;
}

void GlobalRace::acquire(const uint32_t* p) {
  Block& block = *current_block;
  const Accessor who = current_thread->accessor();
  std::vector<BlockOrder::Learned>& learned = block.order.learned;
  for (const BlockOrder::Learned& given : variables_[p].released) {
    if (given.block == block.order.block) {
      block.race.acquire(who.warp, given.clock);
      continue;
    }
    const bool known = std::any_of(learned.begin(), learned.end(), [&](const auto& entry) {
      return entry.block == given.block && entry.clock == given.clock && knows(entry, who);
    });
    if (!known) learned.push_back({given.block, given.clock, who, block.race.clock(who.warp)[who.warp]});
  }
}

void GlobalRace::release(const uint32_t* p) {
  Block& block = *current_block;
  const Accessor who = current_thread->accessor();
  std::vector<BlockOrder::Learned>& released = variables_[p].released;
  Clock mine = block.race.clock(who.warp);
  for (size_t w = 0; w < mine.size(); ++w) mine[w] = std::min(mine[w], block.order.fenced[w]);
  merge(released, block.order.block, mine);
  for (const BlockOrder::Learned& entry : block.order.learned)
    if (knows(entry, who)) merge(released, entry.block, entry.clock);
}

bool GlobalRace::ordered(const Access& before) {
  const Block& block = *current_block;
  const Accessor who = current_thread->accessor();
  if (before.block == block.order.block) return block.race.ordered(before.who(), before.clock, who);
  const auto& learned = block.order.learned;
  return std::any_of(learned.begin(), learned.end(), [&](const BlockOrder::Learned& entry) {
    return entry.block == before.block && before.clock <= entry.clock[before.warp] && knows(entry, who);
  });
}

void GlobalRace::race(const char* before_what, const Access& before, uintptr_t address, const char* what, Site site) {
  const Block& block = *current_block;
  const Accessor who = current_thread->accessor();
  const bool heard_of =
      std::any_of(block.order.learned.begin(), block.order.learned.end(), [&](const auto& entry) { return entry.block == before.block; });
  const char* cure = before.block == block.order.block ? "no sync_warp or barrier is between them"
                     : heard_of ? "what counters say of that block does not cover it: a fence_gpu or a barrier is missing before or after"
                                : "no atomic_add_acq_rel, st_release or ld_acquire orders them";
  kernel_error("race on ", block.global.describe(address), " in global memory: ", what, " ",
               describe(block.order.block, who.warp, site_number(site) << 8 | who.lane), ", and ", before_what, " ",
               describe(before.block, before.warp, before.where), "; ", cure);
}

void GlobalRace::record_read(Read& read, const Access& now, bool read_only) {
  const bool others = read.bytes != 0 && read.block != now.block && !ordered(read);
  const uint8_t before = read.bytes;
  static_cast<Access&>(read) = now;
  read.bytes |= before;
  read.several |= others;
  read.read_only |= read_only;
}

void GlobalRace::access_word(GlobalAccess kind, Word& word, const Access& now, uintptr_t address, const char* what, Site site) {
  auto& [write, read] = word;
  const auto place = [&] { return std::string(" at ") + name(site) + " of " + current_block->global.describe(address); };
  if (write.bytes & now.bytes) {
    if (kind == GlobalAccess::kReadOnly) {
      kernel_error(what, place(), ", which this launch has written ", describe(write.block, write.warp, write.where),
                   ": the read-only path may not see it");
    }
    if (!(write.atomic && kind == GlobalAccess::kAtomic) && !ordered(write))
      race(write.atomic ? "atomic operation" : "write", write, address, what, site);
  }
  if (kind == GlobalAccess::kRead || kind == GlobalAccess::kReadOnly) {
    record_read(read, now, kind == GlobalAccess::kReadOnly);
    return;
  }
  if (read.bytes & now.bytes) {
    if (read.read_only) {
      kernel_error(what, place(), ", which this launch reads ", describe(read.block, read.warp, read.where),
                   " by the read-only path: that is for memory that nobody writes");
    }
    // Where several blocks have read, one that has heard of others may know of all of them.
    const bool safe = read.several ? !current_block->order.learned.empty() : ordered(read);
    if (!safe) race("read", read, address, what, site);
  }
  // Writes of a thread to parts of a word, as of 16-bit numbers, are one.
  const bool same = write.clock == now.clock && write.where == now.where && write.block == now.block && write.warp == now.warp;
  const uint8_t before = same ? write.bytes : 0;
  static_cast<Access&>(write) = now;
  write.bytes |= before;
  write.atomic = kind == GlobalAccess::kAtomic;
}

void GlobalRace::checked_access(GlobalAccess kind, uintptr_t address, uint32_t bytes, const char* what, Site site) {
  const Accessor who = current_thread->accessor();
  Access now{current_block->order.block, current_block->race.clock(who.warp)[who.warp], site_number(site) << 8 | who.lane, who.warp, 0};
  for (uint32_t done = 0; done < bytes;) {
    const uintptr_t at = address + done;
    const uint32_t first = at % 4, count = std::min(4 - first, bytes - done);
    now.bytes = static_cast<uint8_t>(((1u << count) - 1) << first);
    access_word(kind, page_of(at)[at % (1 << kPageBits) / 4], now, at, what, site);
    done += count;
  }
}

}  // namespace foveate::emulator
