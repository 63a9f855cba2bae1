// Products of packed weights with AMX tiles (amx/tiles.h). docs/kernels/cpu_linear.md explains the choices.
//
// Blocks: 16 rows x 16 features x the 32 elements of a block are one instruction; its integer sums are the same as dot4's, and scales
// follow in the same operations and order, so a row has the same bits here and in block_tile, which serves few rows. The panel is first
// expanded to signed bytes, once for all the rows that pass it.
// bf16: 32 rows x 32 features, sums stay in the tiles. The instruction rounds otherwise than vdpbf16ps, so it serves every row count.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/linear/tile.inl.h"

namespace foveate::cpu::FOVEATE_ISA {

constexpr int64_t kTileRowsLeast = 5;  // fewer rows: block_tile, which reads the weights once and expands nothing
constexpr int kDotSlots = 4;
static_assert(kWeightPanel == 2 * kTileSide && kWeightBlock == 32);

using Lanes16 = vec<float, kTileSide>;  // a row of a tile, whatever the vectors of the instruction set
using Bytes64 = vec<uint8_t, 64>;

FOVEATE_INLINE Lanes16 load16(const f16* p) {
  Lanes16 v;
  for (int i = 0; i < kTileSide; i += kLanes<float>) {
    const VecF part = load<float>(p + i);
    std::memcpy(reinterpret_cast<float*>(&v) + i, &part, sizeof(part));
  }
  return v;
}

// The block formats that have tiles.
FOVEATE_INLINE bool has_int8_tiles(WeightFormat f) { return f >= WeightFormat::kQ8_0 && f <= WeightFormat::kQ4Z; }

// Bytes of a panel of one block format, expanded.
FOVEATE_INLINE int64_t expanded_bytes(int64_t in) { return kWeightPanel * in; }

// out: signed bytes [blocks][2 halves of the features][8 quads][16 features][4].
template <WeightFormat kFormat>
FOVEATE_INLINE void expand_panel(const uint8_t* panel, int64_t blocks, int8_t* out) {
  constexpr bool kNibbles = kFormat != WeightFormat::kQ8_0;
  constexpr uint8_t kOffset = offset_of(kFormat);
  const auto looked_up_bytes = [](Bytes64 nibbles) __attribute__((always_inline)) {
    if constexpr (has_table(kFormat)) {
      VecI parts[64 / kVecBytes];
      std::memcpy(parts, &nibbles, 64);
      for (VecI& part : parts) part = looked_up<kFormat>(part);
      std::memcpy(&nibbles, parts, 64);
    }
    return nibbles;
  };
  for (int64_t b = 0; b < blocks; ++b, panel += panel_bytes(kFormat, kWeightBlock), out += expanded_bytes(kWeightBlock))
    for (int half = 0; half < 2; ++half)
      for (int quad = 0; quad < (kNibbles ? 4 : 8); ++quad) {
        const auto q = load_raw<Bytes64>(panel + quad * 128 + half * 64);
        int8_t* to = out + (half * 8 + quad) * 64;
        if constexpr (kNibbles) {
          store_raw(to, looked_up_bytes(q & 15) - kOffset);
          store_raw(to + 4 * 64, looked_up_bytes(q >> 4) - kOffset);
        } else {
          store_raw(to, q - kOffset);
        }
      }
}

// c [16][32] = prepared rows [row, row + rows) times a panel, without the bias; rows <= 16. Rows of c beyond `rows` are of no meaning.
template <WeightFormat kFormat>
FOVEATE_INLINE void int8_tile(TileScope& tiles, const uint8_t* panel, const int8_t* expanded, const PreparedRows& a, int64_t row,
                              int64_t rows, float* c) {
  static_assert(kQuadUnits == 1, "rows are prepared as int8");
  constexpr int64_t kBytes = panel_bytes(kFormat, kWeightBlock), kQuants = kWeightPanel * (kFormat == WeightFormat::kQ8_0 ? 32 : 16);
  tiles.configure(rows, [&](TileConfig& config) {
    TileConfig::set(config, 0, rows, kWeightBlock);
    TileConfig::set(config, 1, rows, kWeightBlock);
    TileConfig::set(config, 2, 8, 64);
    TileConfig::set(config, 3, 8, 64);
    for (int i = 0; i < kDotSlots; ++i) TileConfig::set(config, 4 + i, rows, 64);
  });
  const char* x = PreparedRows::at<char>(a, row);
  const float* scales[kTileSide];
  for (int r = 0; r < kTileSide; ++r) scales[r] = reinterpret_cast<const float*>(x + (r < rows ? r : 0) * a.row_bytes) + a.blocks * 8;
  alignas(64) int32_t dots[kDotSlots][kTileSide * kTileSide] = {};
  for (int half = 0; half < 2; ++half) {
    Lanes16 acc[kTileSide] = {};
    const auto block = [&]<int kSlot>(std::integral_constant<int, kSlot>, int64_t b) __attribute__((always_inline)) {
      Tiles::load<kSlot % 2>(x + b * kWeightBlock, a.row_bytes);
      Tiles::load<2 + kSlot % 2>(expanded + (2 * b + half) * 512, 64);
      Tiles::zero<4 + kSlot>();
      Tiles::dot_int8<4 + kSlot, kSlot % 2, 2 + kSlot % 2>();
      Tiles::store<4 + kSlot>(dots[kSlot], 64);
    };
    const auto scale = [&]<int kSlot>(std::integral_constant<int, kSlot>, int64_t b) __attribute__((always_inline)) {
      const f16* header = reinterpret_cast<const f16*>(panel + b * kBytes + kQuants) + half * kTileSide;
      const auto d = load16(header);
      [[maybe_unused]] Lanes16 second;  // m or z
      if constexpr (has_minimum(kFormat) || has_zero(kFormat)) second = load16(header + kWeightPanel);
#pragma GCC unroll 16
      for (int r = 0; r < kTileSide; ++r) {
        const auto dot = load_raw<vec<int32_t, kTileSide>>(dots[kSlot] + r * kTileSide);
        auto whole = __builtin_convertvector(dot, Lanes16);
        if constexpr (has_zero(kFormat)) {
          int32_t sum;
          std::memcpy(&sum, scales[r] + 2 * a.blocks + b, 4);
          whole -= second * static_cast<float>(sum);
        }
        acc[r] += d * (whole * scales[r][b]);
        if constexpr (has_minimum(kFormat)) acc[r] += second * scales[r][a.blocks + b];
      }
    };
    // What a tile stores can be loaded once the stores have left the core's queue, so that the multiplications run kDotSlots - 1 blocks
    // ahead.
    const auto each_slot = [&](const auto& f) __attribute__((always_inline)) {
      f(std::integral_constant<int, 0>{});
      f(std::integral_constant<int, 1>{});
      f(std::integral_constant<int, 2>{});
      f(std::integral_constant<int, 3>{});
    };
    each_slot([&]<int kSlot>(std::integral_constant<int, kSlot> slot) __attribute__((always_inline)) {
      if (kSlot < kDotSlots - 1 && kSlot < a.blocks) block(slot, kSlot);
    });
    for (int64_t b = 0; b < a.blocks; b += kDotSlots)
      each_slot([&]<int kSlot>(std::integral_constant<int, kSlot> slot) __attribute__((always_inline)) {
        constexpr int64_t kAhead = kDotSlots - 1;
        if (b + kSlot + kAhead < a.blocks) block(std::integral_constant<int, (kSlot + kAhead) % kDotSlots>{}, b + kSlot + kAhead);
        if (b + kSlot < a.blocks) scale(slot, b + kSlot);
      });
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) store_raw(c + r * kWeightPanel + half * kTileSide, acc[r]);
  }
}

// c [32][32] = prepared rows [row, row + rows) times a panel of bf16, rows <= 32.
FOVEATE_INLINE void bf16_tile(TileScope& tiles, const uint8_t* panel, const PreparedRows& a, int64_t row, int64_t rows, int64_t in,
                              float* c) {
  const int64_t first = min<int64_t>(rows, kTileSide), second = rows - first, units = ceil_div<int64_t>(in, 2);
  tiles.configure(rows, [&](TileConfig& config) {
    TileConfig::set(config, 0, first, 64);
    TileConfig::set(config, 1, second, 64);
    TileConfig::set(config, 2, 16, 64);
    TileConfig::set(config, 3, 16, 64);
    TileConfig::set(config, 4, first, 64);
    TileConfig::set(config, 5, first, 64);
    TileConfig::set(config, 6, second, 64);
    TileConfig::set(config, 7, second, 64);
  });
  const char* x = PreparedRows::at<char>(a, row);
  Tiles::zero<4>();
  Tiles::zero<5>();
  if (second > 0) Tiles::zero<6>(), Tiles::zero<7>();
  alignas(64) uint8_t tail[kTileSide * 128];
  for (int64_t k = 0; k < units; k += kTileSide) {
    const uint8_t* b = panel + k * 128;
    if (units - k < kTileSide) {  // what follows the panel is not its own, and may be NaN
      std::memset(tail, 0, sizeof(tail));
      std::memcpy(tail, b, static_cast<size_t>(units - k) * 128);
      b = tail;
    } else {
      for (int64_t line = 0; line < kTileSide * 128; line += 64) prefetch(b + kLinearAhead + line);
    }
    Tiles::load<0>(x + k * 4, a.row_bytes);
    Tiles::load<2>(b, 128);
    Tiles::load<3>(b + 64, 128);
    Tiles::dot_bf16<4, 0, 2>();
    Tiles::dot_bf16<5, 0, 3>();
    if (second > 0) {
      Tiles::load<1>(x + kTileSide * a.row_bytes + k * 4, a.row_bytes);
      Tiles::dot_bf16<6, 1, 2>();
      Tiles::dot_bf16<7, 1, 3>();
    }
  }
  constexpr int64_t stride = kWeightPanel * 4;
  Tiles::store<4>(c, stride);
  Tiles::store<5>(c + kTileSide, stride);
  float* below = c + kTileSide * kWeightPanel;
  if (second > 0) Tiles::store<6>(below, stride), Tiles::store<7>(below + kTileSide, stride);
}

}  // namespace foveate::cpu::FOVEATE_ISA
