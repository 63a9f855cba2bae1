// What the memory accesses of a launch cost, counted from their addresses (docs/kernels/emulator.md): passes over the banks of shared
// memory, sectors of global memory. On if FOVEATE_EMULATOR_COUNTERS names a file; each launch adds a line of JSON to it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "emulator/checks/race.h"

namespace foveate::emulator {

enum class Memory : uint8_t { kShared, kSharedAtomic, kGlobal };

class Counters {
 public:
  void begin(bool enabled) {
    enabled_ = enabled;
    counts_.clear();
    for (auto& accesses : pending_) accesses.clear();  // of a launch that failed
  }
  bool enabled() const { return enabled_; }

  // One lane's access; those of the lanes that come to the same line for the same time since the last warp operation are one request.
  void add(Memory memory, const char* what, uint64_t address, uint32_t bytes, Accessor who, Site site);
  // The 8 rows of 16 bytes of a matrix of ldmatrix.
  void add_matrix(const char* what, const std::array<uint32_t, 8>& rows, Site site);
  // The warp's lanes have come together: what they have accessed is counted.
  void flush(int warp);

  void merge(const Counters& other);
  std::string json(std::string_view kernel, uint64_t blocks, unsigned threads) const;

 private:
  struct Access {
    uint64_t address;
    uint8_t lane;
  };
  struct Key {
    Memory memory;
    std::string_view what;
    uint32_t bytes;
    uint32_t site;
    auto operator<=>(const Key&) const = default;
  };
  struct Count {
    uint64_t requests = 0;
    uint64_t cost = 0;   // passes or sectors
    uint64_t least = 0;  // that any addresses would need
  };
  static Count cost_of(const Key& key, const std::vector<Access>& lanes);

  bool enabled_ = false;
  std::map<Key, Count> counts_;
  // [warp]: for each line, the accesses of the first time that lanes came there since the last warp operation, of the second, ...
  std::array<std::map<Key, std::vector<std::vector<Access>>>, kMaxWarps> pending_;
};

}  // namespace foveate::emulator
