// How decode divides the shared memory of a block: a pure function of head dims and types, which runs and is tested without a GPU
// (tests/cuda_kernels/test_cuda_config.py).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/math.h"
#include "cuda/attention/config.h"

namespace foveate::cuda {

constexpr int kTileRows = 16, kTileKeys = 16;  // of what a warp multiplies at a time: query rows, keys
constexpr int kMaxWarps = 4, kMaxStages = 2;
constexpr int kMergePadding = 8;  // columns, so that 4 rows of a fragment lie in different banks when the warps merge

// The tile of q, then for each warp its stages, each with a tile of K, one of V and the scales of int8 and fp8, and a tile for what is
// widened.
struct DecodeLayout {
  int dim, slice_columns;  // D and the columns of a slice of V, to multiples of 16
  int q_row_bytes, k_row_bytes, v_row_bytes, wide_row_bytes;  // of tiles; wide: of widened int8 and fp8
  int stage_bytes, warp_bytes;
  int warps, stages;
  int shared_bytes;
};

// An odd multiple of 16, see decode_tile.cuh.
constexpr int tile_row_bytes(int64_t bytes) { return static_cast<int>(ceil_div<int64_t>(bytes, 16) | 1) * 16; }

// columns: of V, at most, of one block; q_size, kv_size: bytes of an element. As many warps and stages as every GPU has memory for; with
// one stage a warp waits for its keys and has none under way; of the usual head dims only MLA's in fp32 come to it. Beyond them
// shared_bytes may exceed what a GPU has.
constexpr DecodeLayout decode_layout(int64_t head_dim, int64_t head_dim_v, int columns, int q_size, int kv_size) {
  DecodeLayout d{};
  d.dim = static_cast<int>(round_up<int64_t>(head_dim, 16));
  d.slice_columns = static_cast<int>(round_up<int64_t>(std::min<int64_t>(head_dim_v, columns), 16));
  d.q_row_bytes = tile_row_bytes(d.dim * q_size);
  d.k_row_bytes = tile_row_bytes(d.dim * kv_size);
  d.v_row_bytes = tile_row_bytes(d.slice_columns * kv_size);
  const bool widen = kv_size == 1;
  d.wide_row_bytes = widen ? tile_row_bytes(std::max(d.dim, d.slice_columns) * q_size) : 0;
  d.stage_bytes = kTileKeys * (d.k_row_bytes + d.v_row_bytes) + (widen ? 2 * kTileKeys * 4 : 0);
  constexpr struct {
    int warps, stages;
  } kChoices[] = {{kMaxWarps, kMaxStages}, {2, kMaxStages}, {1, kMaxStages}, {1, 1}};
  for (const auto& [warps, stages] : kChoices) {
    d.warps = warps;
    d.stages = stages;
    d.warp_bytes = stages * d.stage_bytes + kTileKeys * d.wide_row_bytes;
    // Outputs, maxima and sums of the warps, at the end, over everything else.
    const int merge_bytes = warps * kTileRows * (d.slice_columns + kMergePadding + 2) * 4;
    d.shared_bytes = std::max(kTileRows * d.q_row_bytes + warps * d.warp_bytes, merge_bytes);
    if (d.shared_bytes <= kLeastSharedMemory) break;
  }
  return d;
}

}  // namespace foveate::cuda
