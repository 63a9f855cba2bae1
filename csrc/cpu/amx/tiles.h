// AMX: eight tile registers of at most 16 rows of 64 bytes, and their products.
//
//   A tile [rows][k] times B tile [k][columns] is added to C tile [rows][columns], columns of 4 bytes. Neighbours along k lie side by side: B's row holds
//   4 int8 (or 2 bf16) of each column, which is how linear weights, transposed keys and stacked values are packed anyway.
//
// Tiles are numbered at compile time. A thread configures them for a kernel (TileScope) and releases them after it, so that its state stays
// small when the system saves it. Test builds put a simulation in the place of the instructions (tiles_shim.h): kernels are the same
// source.
#pragma once

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of tiles 0 to 7; the rest is reserved
  uint8_t rows[16] = {};

  FOVEATE_INLINE void set(TileConfig& c, int tile, int64_t rows, int64_t bytes) {
    c.rows[tile] = static_cast<uint8_t>(rows);
    c.row_bytes[tile] = static_cast<uint16_t>(rows > 0 ? bytes : 0);
  }
};
static_assert(sizeof(TileConfig) == 64);

constexpr int kTileSide = 16;  // rows of a tile, and its columns of 4 bytes

#if defined(__x86_64__)
struct HardwareTiles {
  FOVEATE_INLINE void configure(const TileConfig& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
  FOVEATE_INLINE void release() { asm volatile("tilerelease"); }
  template <int kTile>
  FOVEATE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  FOVEATE_INLINE void load(const void* p, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  FOVEATE_INLINE void store(void* p, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  // C += A B: signed bytes into int32, pairs of bf16 into fp32 (denormals are zeros, whatever MXCSR says).
  template <int kC, int kA, int kB>
  FOVEATE_INLINE void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  FOVEATE_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};
#endif

}  // namespace foveate::cpu::FOVEATE_ISA

#if defined(FOVEATE_TILE_SHIM)
#include "cpu/amx/tiles_shim.h"
#endif

namespace foveate::cpu::FOVEATE_ISA {

#if defined(FOVEATE_TILE_SHIM)
using Tiles = ShimTiles;
#else
using Tiles = HardwareTiles;
#endif

// Tiles of one thread while it computes.
class TileScope {
 public:
  TileScope() = default;
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (key_ >= 0) Tiles::release();
  }
  // Configures unless the last call had the same key: what decides the shapes, 0 or more.
  template <class Fill>
  void configure(int64_t key, const Fill& fill) {
    if (key == key_) return;
    TileConfig c;
    fill(c);
    Tiles::configure(c);
    key_ = key;
  }

 private:
  int64_t key_ = -1;
};

}  // namespace foveate::cpu::FOVEATE_ISA
