// How attention is divided into blocks: pure functions of sizes and options, which run and are tested without a GPU
// (tests/cuda_kernels/test_cuda_config.py).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/math.h"

namespace foveate::cuda {

// Shared memory that a block may have on every GPU from sm_80 on (sm_86 and sm_89 have the least).
constexpr int kLeastSharedMemory = 99 * 1024;
constexpr int kMostSharedMemory = 163 * 1024;  // sm_80; sm_90 has more

// ---- tiles of the forward ----------------------------------------------------------------------------------------------------

// Head dims are padded to the next of these in shared memory and registers; global memory has no padding.
struct HeadDims {
  int d, dv;
};
constexpr HeadDims kForwardDims[] = {{32, 32}, {64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};
// With options that few calls have, and in fp32: fewer instances, smaller tiles.
constexpr HeadDims kGeneralForwardDims[] = {{64, 64}, {128, 128}, {256, 256}};

// The instances of the forward. All know masks by position (causal, window, lengths) and sinks; kPaged looks keys up in pages, and kGeneral
// does everything at run time: options on scores, dropout, fp32, rows at any address, pages of any size.
enum class ForwardKind { kPlain, kPaged, kGeneral };

// vector_loads: rows begin at multiples of 16 bytes and fill them. page_size: 0 without pages.
constexpr ForwardKind forward_kind(bool options, bool vector_loads, int element_bytes, int64_t page_size) {
  if (options || !vector_loads || element_bytes == 4) return ForwardKind::kGeneral;
  if (page_size == 0) return ForwardKind::kPlain;
  const bool power_of_two = (page_size & (page_size - 1)) == 0;  // a key's page and place are a shift and a mask
  return power_of_two && page_size < int64_t{1} << 31 ? ForwardKind::kPaged : ForwardKind::kGeneral;
}

// The smallest instance that holds these head dims, at most 256.
constexpr HeadDims forward_dims(int64_t d, int64_t dv, ForwardKind kind) {
  const auto fits = [&](const HeadDims& dims) { return d <= dims.d && dv <= dims.dv; };
  return kind == ForwardKind::kGeneral ? *std::ranges::find_if(kGeneralForwardDims, fits) : *std::ranges::find_if(kForwardDims, fits);
}

struct ForwardTile {
  int rows_per_warp, rows, keys;  // rows: queries
  int shared_bytes;
  int blocks_per_sm;  // so many have room in the 64 Ki registers of an SM: the bound on the registers of a thread
};

// A warp of 32 rows reads K and V from shared memory half as often per product as one of 16, but its output alone is dv fp32 registers
// a thread; beyond 128 that does not fit, and the general instance needs registers too. The number of keys is the same in all instances of
// a head dim, so that a row's bits do not depend on which of them computes it.
constexpr ForwardTile forward_tile(HeadDims dims, ForwardKind kind, int element_bytes) {
  const bool wide = element_bytes == 4 && dims.d > 128;
  const int rows_per_warp = kind == ForwardKind::kGeneral || dims.dv > 128 ? 16 : 32, rows = rows_per_warp * (wide ? 2 : 4),
            keys = wide ? 32 : 64;
  const int shared_bytes = element_bytes * (rows * dims.d + keys * (dims.d + dims.dv));
  return {rows_per_warp, rows, keys, shared_bytes, dims.dv <= 32 ? 3 : 2};
}

// ---- which block does what ---------------------------------------------------------------------------------------------------

// The rows of a tile are the queries of one head, or the queries of all heads that share a KV head, query-major: row r is query
// r / packed of head r % packed. The second where the first would leave tiles largely empty; then rows are few, and for up to kMostPacked
// heads the kernel's division of a row by multiplication is exact.
constexpr int64_t kMostPacked = 128;

constexpr int packed_heads(int64_t seq_q, int64_t group, int rows) {
  const int64_t apart = group * ceil_div<int64_t>(seq_q, rows), together = ceil_div<int64_t>(seq_q * group, rows);
  return group <= kMostPacked && 4 * together <= 3 * apart ? static_cast<int>(group) : 1;
}

// __umulhi(row, inverse_of(packed)) is row / packed.
constexpr uint32_t inverse_of(int packed) {
  return packed == 1 ? 0 : static_cast<uint32_t>(ceil_div<int64_t>(int64_t{1} << 32, packed));  // 1: there is none, and nothing to divide
}

// Blocks are numbered so that those that run at the same time share K and V in L2, and long ones start first: heads in
// sections whose keys and values fit the cache, in a section the last rows of every head (with a causal mask they see the most keys) before
// the ones above.
struct ForwardGrid {
  int64_t heads;  // of all sequences; packed ones count once
  int tiles, section;  // tiles of rows per head; heads in a section

  int64_t blocks() const { return heads * tiles; }
};

constexpr int64_t kSectionBytes = int64_t{16} << 20;

// bytes_per_head: of the keys and values that one of `heads` reads and no other does.
constexpr ForwardGrid forward_grid(int64_t heads, int64_t rows_per_head, int rows, int64_t bytes_per_head) {
  const int64_t fit = bytes_per_head > 0 ? kSectionBytes / bytes_per_head : heads;
  const int64_t section = std::clamp<int64_t>(fit, 1, std::max<int64_t>(heads, 1));
  return {heads, static_cast<int>(ceil_div<int64_t>(rows_per_head, rows)), static_cast<int>(section)};
}

struct ForwardBlock {
  int head, tile;
};

__host__ __device__ constexpr ForwardBlock forward_block(const ForwardGrid& g, int block) {
  const int per_section = g.section * g.tiles, first = block / per_section * g.section, at = block % per_section;  // at most all blocks
  const int left = static_cast<int>(g.heads) - first, heads = min(left, g.section);
  return {first + at % heads, g.tiles - 1 - at / heads};
}

}  // namespace foveate::cuda
