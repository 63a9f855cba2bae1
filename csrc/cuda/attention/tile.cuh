// Tiles of a matrix in shared memory and their way to and from it: global memory -> tile by cp.async, tile -> mma fragments by ldmatrix,
// fragments -> tile -> global memory for results.
//
// A tile is stored by rows, in chunks of 16 bytes. ldmatrix reads the same chunk of 8 rows at once, which would hit the same banks; so
// chunk c of row r is stored where chunk c ^ f(r) would be (an XOR swizzle), with f such that any 8 rows from a multiple of 8 on lie in all
// 8 bank groups of 16 bytes.
#pragma once

#include <utility>

#include "core/math.h"
#include "cuda/device/device.cuh"

namespace foveate::cuda {

template <class T_, int kRows_, int kColumns_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kColumns / kPerChunk, kRowBytes = kChunks * 16, kBytes = kRows * kRowBytes;
  // Bank groups that the chunks of one row fill (8, 4 or 2), less 1; rows that lie within one turn over the 8 groups, as a shift.
  static constexpr int kMask = kChunks % 8 == 0 ? 7 : kChunks % 4 == 0 ? 3 : 1, kShift = kMask == 7 ? 0 : kMask == 3 ? 1 : 2;
  static_assert(kColumns % kPerChunk == 0 && kChunks % 2 == 0 && kRows % 8 == 0);

  // Bytes from the start of the tile to chunk `chunk` of row `row`.
  __host__ __device__ static constexpr uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row >> kShift & kMask)) * 16));
  }
};

// ---- global memory -> tile ---------------------------------------------------------------------------------------------------

// Which rows and chunks of a tile a thread copies: neighbours take neighbouring chunks of a row.
template <class Tile, int kThreads>
struct CopyShare {
  static constexpr int kLanes = Tile::kMask + 1, kRowsAtOnce = kThreads / kLanes;
  static constexpr int kCount = ceil_div(Tile::kRows, kRowsAtOnce);  // rows of a thread
  static constexpr bool kIdle = kRowsAtOnce > Tile::kRows;  // there are more threads than a tile's rows need: the last have none
  static_assert(kThreads % (8 * kLanes) == 0 && (kIdle || Tile::kRows % kRowsAtOnce == 0) && Tile::kChunks % kLanes == 0);
  using Rows = std::integer_sequence<int, kRowsAtOnce, kCount>;  // the same type where the rows of a thread are the same

  __device__ __forceinline__ static int row(int thread, int n) { return thread / kLanes + n * kRowsAtOnce; }
};

// Starts the copies of a tile by all kThreads threads of the block (`thread` is the caller's index among them); the caller commits and
// waits. row(r) is the address of row r of the tile, or null for a row of zeros; chunks from `columns` on are zero too. Rows begin at
// multiples of 16 bytes, and `columns` is a multiple of Tile::kPerChunk.
template <class Tile, int kThreads, class RowAddress>
__device__ __forceinline__ void load_tile_async(uint32_t tile, int thread, int columns, const RowAddress& row) {
  using Share = CopyShare<Tile, kThreads>;
  const int first_row = thread / Share::kLanes, first_chunk = thread % Share::kLanes;
  if (Share::kIdle && first_row >= Tile::kRows) return;
#pragma unroll
  for (int r = 0; r < Tile::kRows; r += Share::kRowsAtOnce) {
    const typename Tile::T* from = row(first_row + r);
#pragma unroll
    for (int c = 0; c < Tile::kChunks; c += Share::kLanes) {
      const int chunk = first_chunk + c, column = chunk * Tile::kPerChunk;
      const bool valid = from != nullptr && column < columns;
      dev::cp_async<16>(tile + Tile::offset(first_row + r, chunk), valid ? from + column : from, valid);
    }
  }
}

// The same for rows whose places are counted in 16 bytes from `base` on, which takes fewer instructions and registers: offset(n, row) is
// that of row `row`, the n-th of this thread's. Rows of which exists(n, row) is not true are zeros.
template <class Tile, int kThreads, class Exists, class Offset>
__device__ __forceinline__ void load_tile_at(uint32_t tile, int thread, const Exists& exists, int columns, const void* base,
                                             const Offset& offset) {
  using Share = CopyShare<Tile, kThreads>;
  const int first_chunk = thread % Share::kLanes;
  if (Share::kIdle && Share::row(thread, 0) >= Tile::kRows) return;
#pragma unroll
  for (int n = 0; n < Share::kCount; ++n) {
    const int row = Share::row(thread, n);
    const char* from = static_cast<const char*>(base) + size_t{offset(n, row) + first_chunk} * 16;
#pragma unroll
    for (int c = 0; c < Tile::kChunks; c += Share::kLanes)
      dev::cp_async<16>(tile + Tile::offset(row, first_chunk + c), from + c * 16,
                        exists(n, row) && (first_chunk + c) * Tile::kPerChunk < columns);
  }
}

// The same for rows at regular distances: row r begins 16 * (first + r * stride) bytes after `base`, rows from `rows` on are zeros.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_tile_async(uint32_t tile, int thread, int rows, int columns, const void* base, uint32_t first,
                                                uint32_t stride) {
  load_tile_at<Tile, kThreads>(
      tile, thread, [&](int, int row) { return row < rows; }, columns, base, [&](int, int row) { return first + row * stride; });
}

// The same for rows at any address and any number of columns, element by element and complete on return (for the calling thread).
template <class Tile, int kThreads, class RowAddress>
__device__ __forceinline__ void load_tile_unaligned(uint32_t tile, int thread, int columns, const RowAddress& row) {
  using T = typename Tile::T;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
#pragma unroll 1
  for (int at = thread; at < Tile::kRows * Tile::kChunks; at += kThreads) {
    const int r = at / Tile::kChunks, chunk = at % Tile::kChunks;
    const T* from = row(r);
    uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < Tile::kPerChunk; ++e) {
      const int column = chunk * Tile::kPerChunk + e;
      const uint32_t bits = from != nullptr && column < columns ? dev::ld_global<Bits>(from + column) : 0;
      words[e * sizeof(T) / 4] |= bits << (e * sizeof(T) % 4 * 8);
    }
    dev::st_shared(tile + Tile::offset(r, chunk), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// ---- tile -> fragments (16-bit elements) --------------------------------------------------------------------------------------

// An operand of mma_m16n8k16, by what it is and how the tile stores it:
//                             tile rows   tile columns   e.g. in attention
enum class Operand {
  kA,  // m           k              q of q k^T
  kB,  // n           k              k of q k^T
  kATransposed,  // k           m              p of p^T dout
  kBTransposed,  // k           n              v of p v
};

// Loads 16 x 16 blocks of a tile: an A fragment, or the B fragments of two neighbouring n8 tiles, d[0], d[1] of the first and d[2], d[3] of
// the second. What depends on the lane is computed once.
template <class Tile, Operand operand>
class Fragments {
 public:
  // Blocks are counted from row `first_row` of the tile, a multiple of 16; the tile begins at a multiple of 128 bytes.
  __device__ __forceinline__ explicit Fragments(uint32_t tile, int first_row = 0) {
    // Which 8x8 block comes second in d: the one below, or the one to the right.
    constexpr bool kBelow = operand == Operand::kA || operand == Operand::kBTransposed;
    const int lane = dev::lane();
    const int row = kBelow ? lane % 16 : lane % 8 + lane / 16 * 8, chunk = kBelow ? lane / 16 : lane / 8 % 2;
    at_ = tile + first_row * Tile::kRowBytes + Tile::offset(row, chunk);
  }
  // row and column: of the block's first element, multiples of 16. The swizzle repeats every 8 rows or less and changes only the last bits
  // of a chunk's number, so those of the column come in by one exclusive-or, all else is a constant of the instruction.
  __device__ __forceinline__ void load(uint32_t (&d)[4], int row, int column, dev::Site site = dev::Site::here()) const {
    const uint32_t chunk = column / Tile::kPerChunk, low = chunk & Tile::kMask;
    const uint32_t address = (at_ ^ low * 16) + row * Tile::kRowBytes + (chunk - low) * 16;
    if constexpr (operand == Operand::kA || operand == Operand::kB)
      dev::ldmatrix_x4(d, address, site);
    else
      dev::ldmatrix_x4_trans(d, address, site);
  }

 private:
  uint32_t at_;
};

// Element e of a C fragment [16 x 8] is (fragment_row(e), fragment_column(e)) of it.
__device__ __forceinline__ int fragment_row(int e) { return dev::lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int fragment_column(int e) { return dev::lane() % 4 * 2 + e % 2; }

// Two neighbouring C fragments [16 x 8] become the A fragment [16 x 16] of the next product: the layouts agree.
template <class T>
__device__ __forceinline__ void pack_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = dev::pack<T>(left[0], left[1]);
  a[1] = dev::pack<T>(left[2], left[3]);
  a[2] = dev::pack<T>(right[0], right[1]);
  a[3] = dev::pack<T>(right[2], right[3]);
}

// ---- fragments -> tile -> global memory --------------------------------------------------------------------------------------

// Stores the C fragments of rows [row, row + 16) and columns [0, 8 * kCount) into a tile, rounded to its type.
template <class Tile, int kCount>
__device__ __forceinline__ void store_fragments(uint32_t tile, int row, const float (&c)[kCount][4]) {
  using T = typename Tile::T;
  static_assert(8 * kCount <= Tile::kColumns);
  const int first = row + dev::lane() / 4, t = dev::lane() % 4;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float left = c[n][2 * half], right = c[n][2 * half + 1];
      if constexpr (sizeof(T) == 2)
        dev::st_shared(tile + Tile::offset(first + half * 8, n) + t * 4, dev::pack<T>(left, right));
      else
        dev::st_shared(tile + Tile::offset(first + half * 8, 2 * n + t / 2) + t % 2 * 8, make_float2(left, right));
    }
  }
}

// Copies rows [first, first + count) of a tile to global memory, by kThreads threads. row(r): the address of row r, or null for one that is
// not stored. vectors: rows begin at multiples of 16 bytes and `columns` is a multiple of Tile::kPerChunk.
template <class Tile, int kThreads, class RowAddress>
__device__ __forceinline__ void store_rows(uint32_t tile, int first, int count, int thread, int columns, bool vectors,
                                           const RowAddress& row) {
  using T = typename Tile::T;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int kLanes = Tile::kMask + 1;
#pragma unroll 1
  for (int r = first + thread / kLanes; r < first + count; r += kThreads / kLanes) {
    T* to = row(r);
    if (to == nullptr) continue;
#pragma unroll 1
    for (int chunk = thread % kLanes; chunk * Tile::kPerChunk < columns; chunk += kLanes) {
      const uint32_t address = tile + Tile::offset(r, chunk);
      const int column = chunk * Tile::kPerChunk;
      if (vectors) {
        dev::st_global(to + column, dev::ld_shared<uint4>(address));
        continue;
      }
      for (int e = 0; e < Tile::kPerChunk && column + e < columns; ++e)
        dev::st_global(to + column + e, dev::ld_shared<Bits>(address + static_cast<uint32_t>(e * sizeof(T))));
    }
  }
}

}  // namespace foveate::cuda
