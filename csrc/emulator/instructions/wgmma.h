// The wgmma of one warp: its 16 of the 64 rows. Nothing is computed before the wait: the accumulators are NaN and the operands in shared
// memory must stay as they are until then.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <utility>
#include <vector>

#include "emulator/checks/site.h"

namespace foveate::emulator {

struct WgmmaShape {
  int n;
  bool bf16;
  bool accumulate;
  uint64_t a, b;
  bool a_m_major, b_n_major;
  bool operator==(const WgmmaShape&) const = default;
};

struct WgmmaLane {
  float* d;           // n / 2
  const uint32_t* a;  // 4 registers, or nullptr: a is in shared memory
  const WgmmaShape* shape;
};

class WgmmaQueue {
 public:
  void clear() { products_.clear(), tiles_.clear(), issued_.clear(), group_ = 0, fenced_ = false; }
  void fence() { fenced_ = true; }
  void issue(const WgmmaShape& shape, const std::array<WgmmaLane*, 32>& lanes, Site site);
  void commit() { ++group_; }
  void wait(int pending_groups);
  void check_done() const;  // throws if something is under way
  // The products of this warp, for comparison with those of its warpgroup's others.
  const std::vector<std::pair<WgmmaShape, Site>>& issued() const { return issued_; }

 private:
  // The accumulators of the lanes, while they are under way.
  struct Tile {
    int n;
    int users;  // products that will add to it
    std::array<float*, 32> registers;
    std::vector<float> d;  // [16][n]
  };
  struct Product {
    WgmmaShape shape;
    Tile* tile;
    int group;
    Site site;
    std::array<std::array<uint32_t, 4>, 32> a;
    // Offsets of the 16-byte pieces: of 8 numbers of k, or for mn-major of 8 numbers of m or n.
    std::vector<uint32_t> a_pieces, b_pieces;
  };

  Tile& tile_of(const WgmmaShape& shape, const std::array<WgmmaLane*, 32>& lanes);
  void compute(const Product& product);
  void hand_out(Tile& tile);

  std::deque<Product> products_;
  std::list<Tile> tiles_;
  std::vector<std::pair<WgmmaShape, Site>> issued_;
  int group_ = 0;  // of the next product
  bool fenced_ = false;
};

}  // namespace foveate::emulator
