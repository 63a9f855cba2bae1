// The products of attention in bf16 with AMX tiles: operands are packed as for the dot instruction (pack.h), a tile of rows is 32 high.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/simd/gemm.h"

namespace foveate::cpu::FOVEATE_ISA {

struct MathTiles : MathBf16 {
  static constexpr bool kTiled = true;
  static constexpr int kRows = 2 * kTileSide;
  static constexpr int64_t kColumns = 2 * kTileSide;  // ranges of keys and of packed dims start and end at multiples of it, or of kTileSide

  FOVEATE_INLINE void configure(TileScope& tiles) {
    tiles.configure(0, [](TileConfig& c) {
      for (int t = 0; t < 8; ++t) TileConfig::set(c, t, kTileSide, 64);
    });
  }

  // c [32][columns begin..end) = a [32][units] times columns of pack_columns; begin and end are multiples of kColumns, units of kTileSide.
  // Strides count units and floats. rows <= 16: the lower half is left as it is.
  FOVEATE_INLINE void columns(int64_t rows, int64_t begin, int64_t end, int64_t units, const Unit* a, int64_t a_stride, const Unit* columns,
                              float* c, int64_t c_stride) {
    constexpr int64_t panel = kPanel<MathBf16>, side = kTileSide;
    static_assert(panel % side == 0);
    const bool two = rows > side;
    const auto column = [&](int64_t p) { return columns + p / panel * panel * units + p % panel; };
    for (int64_t p = begin; p < end; p += 2 * side) {
      const Unit *left = column(p), *right = column(p + side);
      Tiles::zero<4>();
      Tiles::zero<5>();
      if (two) Tiles::zero<6>(), Tiles::zero<7>();
      for (int64_t u = 0; u < units; u += side) {
        Tiles::load<0>(a + u, a_stride * 4);
        Tiles::load<2>(left + u * panel, panel * 4);
        Tiles::load<3>(right + u * panel, panel * 4);
        Tiles::dot_bf16<4, 0, 2>();
        Tiles::dot_bf16<5, 0, 3>();
        if (two) {
          Tiles::load<1>(a + side * a_stride + u, a_stride * 4);
          Tiles::dot_bf16<6, 1, 2>();
          Tiles::dot_bf16<7, 1, 3>();
        }
      }
      Tiles::store<4>(c + p, c_stride * 4);
      Tiles::store<5>(c + p + side, c_stride * 4);
      if (two) {
        Tiles::store<6>(c + side * c_stride + p, c_stride * 4);
        Tiles::store<7>(c + side * c_stride + p + side, c_stride * 4);
      }
    }
  }

  // c [32][width] += a [32][units] times rows of pack_stacked; width and units are multiples of kTileSide.
  FOVEATE_INLINE void rows(int64_t rows, int64_t width, int64_t units, const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride,
                           float* c, int64_t c_stride) {
    constexpr int64_t side = kTileSide;
    const bool two = rows > side;
    for (int64_t n = 0; n < width; n += 2 * side) {
      const bool wide = n + side < width;
      float *upper = c + n, *lower = upper + side * c_stride;
      Tiles::load<4>(upper, c_stride * 4);
      if (wide) Tiles::load<5>(upper + side, c_stride * 4);
      if (two) Tiles::load<6>(lower, c_stride * 4);
      if (two && wide) Tiles::load<7>(lower + side, c_stride * 4);
      for (int64_t u = 0; u < units; u += side) {
        const Unit* row = b + u * b_stride + n;
        Tiles::load<0>(a + u, a_stride * 4);
        Tiles::load<2>(row, b_stride * 4);
        Tiles::dot_bf16<4, 0, 2>();
        if (wide) {
          Tiles::load<3>(row + side, b_stride * 4);
          Tiles::dot_bf16<5, 0, 3>();
        }
        if (two) {
          Tiles::load<1>(a + side * a_stride + u, a_stride * 4);
          Tiles::dot_bf16<6, 1, 2>();
          if (wide) Tiles::dot_bf16<7, 1, 3>();
        }
      }
      Tiles::store<4>(upper, c_stride * 4);
      if (wide) Tiles::store<5>(upper + side, c_stride * 4);
      if (two) Tiles::store<6>(lower, c_stride * 4);
      if (two && wide) Tiles::store<7>(lower + side, c_stride * 4);
    }
  }
};

}  // namespace foveate::cpu::FOVEATE_ISA
