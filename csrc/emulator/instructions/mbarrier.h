// Barriers in shared memory that count arrivals and delivered bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator/checks/race.h"

namespace foveate::emulator {

struct Thread;

class MBarriers {
 public:
  void clear() { barriers_.clear(); }
  void init(uint32_t address, int arrivals, Site site);
  void init_fence();
  void arrive(uint32_t address, uint32_t expected_bytes, const char* what, Site site);
  void wait(uint32_t address, uint32_t parity, Site site);
  // For TMA: a barrier that it may use, by its offset; later, bytes that have come, with what their reader may know.
  uint32_t for_tma(uint32_t address, Site site);
  void deliver(uint32_t offset, uint32_t bytes, const Clock& clock);
  std::string describe() const;  // those that are waited for

 private:
  struct MBarrier {
    int expected;  // arrivals in each phase
    int pending;   // arrivals that this phase still needs
    int64_t bytes = 0;
    uint32_t parity = 0;
    bool fenced = false;
    Clock arriving{}, completed{};  // what those who arrive in this phase know; what those of the last one knew
    std::vector<Thread*> waiting;
  };

  MBarrier& find(uint32_t address, const char* what, Site site);
  static void complete_if_done(MBarrier& barrier);

  std::map<uint32_t, MBarrier> barriers_;  // by offset
};

}  // namespace foveate::emulator
