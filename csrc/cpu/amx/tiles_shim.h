// The tile registers of AMX in plain C++, after the instructions' pseudocode (Intel SDM volume 2): the same kernels then run on CPUs
// without AMX. For test builds only. What the CPU answers with #UD or #GP ends the process here, with a sentence.
// tests/native/tiles_check.cpp compares it with the hardware bit for bit.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cpu/amx/tiles.h"

namespace foveate::cpu::FOVEATE_ISA {

struct ShimTiles {
  struct State {
    bool configured = false;
    int64_t rows[8] = {}, bytes[8] = {};
    uint8_t data[8][16][64] = {};
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void require(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
  }

  static void configure(const TileConfig& c) {
    require(c.palette == 1 && c.start_row == 0, "the palette must be 1 and the start row 0");
    for (uint8_t r : c.reserved) require(r == 0, "reserved bytes of a configuration must be 0");
    for (int t = 0; t < 16; ++t) {
      require(t < 8 || (c.rows[t] == 0 && c.row_bytes[t] == 0), "there are 8 tiles");
      require(c.rows[t] <= 16 && c.row_bytes[t] <= 64, "a tile has at most 16 rows of 64 bytes");
      require((c.rows[t] == 0) == (c.row_bytes[t] == 0), "a tile with rows has bytes, and the other way round");
    }
    State& s = state();
    s = State{};
    s.configured = true;
    for (int t = 0; t < 8; ++t) s.rows[t] = c.rows[t], s.bytes[t] = c.row_bytes[t];
  }
  static void release() { state() = State{}; }

  template <int kTile>
  static State& valid() {
    static_assert(kTile >= 0 && kTile < 8);
    State& s = state();
    require(s.configured && s.rows[kTile] > 0, "a tile was used that is not configured");
    return s;
  }
  template <int kTile>
  static void zero() {
    std::memset(valid<kTile>().data[kTile], 0, sizeof(State::data[kTile]));
  }
  template <int kTile>
  static void load(const void* p, int64_t stride) {
    State& s = valid<kTile>();
    std::memset(s.data[kTile], 0, sizeof(s.data[kTile]));
    for (int64_t r = 0; r < s.rows[kTile]; ++r)
      std::memcpy(s.data[kTile][r], static_cast<const char*>(p) + r * stride, static_cast<size_t>(s.bytes[kTile]));
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    State& s = valid<kTile>();
    for (int64_t r = 0; r < s.rows[kTile]; ++r)
      std::memcpy(static_cast<char*>(p) + r * stride, s.data[kTile][r], static_cast<size_t>(s.bytes[kTile]));
  }

  template <int kC, int kA, int kB>
  static State& shapes() {
    static_assert(kC != kA && kC != kB && kA != kB, "the three tiles of a product must differ");
    valid<kC>();
    valid<kA>();
    State& s = valid<kB>();
    require(s.rows[kA] == s.rows[kC] && s.bytes[kB] == s.bytes[kC] && s.bytes[kA] % 4 == 0 && s.bytes[kB] % 4 == 0 &&
                s.bytes[kA] / 4 == s.rows[kB],
            "the shapes of a product do not match");
    return s;
  }
  template <int kC, int kA, int kB>
  static void dot_int8() {
    State& s = shapes<kC, kA, kB>();
    for (int64_t m = 0; m < s.rows[kC]; ++m)
      for (int64_t n = 0; n < s.bytes[kC] / 4; ++n) {
        uint32_t c;
        std::memcpy(&c, s.data[kC][m] + 4 * n, 4);
        for (int64_t k = 0; k < s.bytes[kA]; ++k)
          c += static_cast<uint32_t>(static_cast<int8_t>(s.data[kA][m][k]) * static_cast<int8_t>(s.data[kB][k / 4][4 * n + k % 4]));
        std::memcpy(s.data[kC][m] + 4 * n, &c, 4);
      }
  }
  // Denormals count as zeros on the way in and out, whatever the thread's mode.
  static float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static float element(const uint8_t* row, int64_t i) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * i, 2);
    return flush(bit_cast<float>(static_cast<uint32_t>(bits) << 16));
  }
  template <int kC, int kA, int kB>
  static void dot_bf16() {
    State& s = shapes<kC, kA, kB>();
    for (int64_t m = 0; m < s.rows[kC]; ++m)
      for (int64_t n = 0; n < s.bytes[kC] / 4; ++n) {
        float even = 0, odd = 0, c;
        for (int64_t k = 0; k < s.bytes[kA] / 4; ++k) {
          even = flush(std::fma(element(s.data[kA][m], 2 * k), element(s.data[kB][k], 2 * n), even));
          odd = flush(std::fma(element(s.data[kA][m], 2 * k + 1), element(s.data[kB][k], 2 * n + 1), odd));
        }
        std::memcpy(&c, s.data[kC][m] + 4 * n, 4);
        c = flush(flush(c) + flush(even + odd));
        std::memcpy(s.data[kC][m] + 4 * n, &c, 4);
      }
  }
};

}  // namespace foveate::cpu::FOVEATE_ISA
