// Race detector for global memory: two accesses of one launch to a byte, one of them a write, that nothing orders. Threads of a block are
// ordered by its barriers (race.h), blocks by atomic_add_acq_rel, st_release and ld_acquire: these hand on what the releasing thread knows of
// its block and fence_gpu has passed. It does not depend on the schedule.
//
// Each word that a launch touches remembers its last write and its last read.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "emulator/checks/global_access.h"
#include "emulator/checks/race.h"

namespace foveate::emulator {

// What one block knows of the order.
struct BlockOrder {
  struct Learned {  // block `block` up to `clock`, by `who` in its tick `at`
    uint32_t block;
    Clock clock;
    Accessor who;
    uint32_t at;
  };
  uint32_t block = 0;
  Clock fenced{};  // what fence_gpu has made ready to be handed on
  std::vector<Learned> learned;

  void begin(uint32_t index) {
    block = index;
    fenced.fill(0);
    learned.clear();
  }
};

// The state of one launch; its blocks share it.
class GlobalRace {
 public:
  void begin(bool enabled, bool several_threads);
  // Throws KernelError if a counter is not as the launch found it.
  void end() const;

  static void fence();
  // Throws KernelError at a race.
  void access(GlobalAccess kind, const void* p, size_t bytes, const char* what, Site site) {
    if (!enabled_) return;
    const auto lock = take();
    checked_access(kind, reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes), what, site);
  }
  // `act` on a word by which blocks synchronise; returns what it returns.
  template <class Act>
  uint32_t synchronise(const uint32_t* p, bool acquires, bool releases, const char* what, Site site, Act act) {
    if (!enabled_) return act();
    const auto lock = take();
    if (acquires) acquire(p);
    checked_access(GlobalAccess::kAtomic, reinterpret_cast<uintptr_t>(p), 4, what, site);
    if (acquires && releases && !variables_[p].counter) variables_[p].counter = Counter{*p, site};
    if (releases && !acquires) variables_[p].released.clear();  // a plain store: who reads it has heard of nothing before
    if (releases) release(p);
    return act();
  }

 private:
  struct Access {
    uint32_t block = 0;
    uint32_t clock = 0;
    uint32_t where = 0;  // site and lane
    uint8_t warp = 0;
    uint8_t bytes = 0;  // of the word
    Accessor who() const { return {warp, static_cast<uint8_t>(where)}; }
  };
  struct Write : Access {
    bool atomic = false;
  };
  struct Read : Access {
    bool several = false;  // blocks in no order have read
    bool read_only = false;  // one of them in that way
  };
  struct Word {
    Write write;
    Read read;
  };
  static constexpr int kPageBits = 12;
  using Page = std::array<Word, (1 << kPageBits) / 4>;
  struct Counter {
    uint32_t first;
    Site site;
  };
  struct Variable {
    std::vector<BlockOrder::Learned> released;
    std::optional<Counter> counter;
  };

  std::unique_lock<std::mutex> take() { return several_threads_ ? std::unique_lock(mutex_) : std::unique_lock<std::mutex>(); }
  Page& page_of(uintptr_t address);
  void checked_access(GlobalAccess kind, uintptr_t address, uint32_t bytes, const char* what, Site site);
  static void access_word(GlobalAccess kind, Word& word, const Access& now, uintptr_t address, const char* what, Site site);
  void acquire(const uint32_t* p);
  void release(const uint32_t* p);
  static bool ordered(const Access& before);
  static void record_read(Read& read, const Access& now, bool read_only);
  [[noreturn]] static void race(const char* before_what, const Access& before, uintptr_t address, const char* what, Site site);

  bool enabled_ = false, several_threads_ = false;
  std::mutex mutex_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> unused_;  // zeros
  std::array<std::pair<uintptr_t, Page*>, 256> recent_{};
  std::unordered_map<const uint32_t*, Variable> variables_;
};

}  // namespace foveate::emulator
