// What the forward kernels share: their parameters, which rows a block works on, where rows of q, k, v and out lie.
#pragma once

#include "contract/attention.h"
#include "cuda/attention/config.h"
#include "cuda/attention/score.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/device/device.cuh"

namespace foveate::cuda {

struct ForwardParams {
  AttentionParams attention;
  ScoreParams score;
  ForwardGrid grid;
  int group;  // query heads that share a KV head
  int packed;  // heads in a tile of rows: 1, or the heads that share a KV head
  uint32_t packed_inverse;  // see inverse_of
  int page_shift;  // log2 of the page size, with ForwardKind::kPaged
  bool score_options;  // options make logits of q.k before the softmax
  float factor, logit;  // exp2(factor * score) is summed, logit * score is the logit
  bool vector_loads, vector_stores;  // rows of q, k, v and of out begin at multiples of 16 bytes and fill them
};

// The rows of one block: those from `first` on of a head or of `packed` heads.
struct BlockRows {
  int batch, head, first, packed;
  uint32_t packed_inverse;

  __device__ __forceinline__ int query(int row) const {
    return packed == 1 ? first + row : static_cast<int>(__umulhi(static_cast<uint32_t>(first + row), packed_inverse));
  }
  __device__ __forceinline__ int head_of(int row) const { return packed == 1 ? head : head + first + row - packed * query(row); }
};

// No row is left if the sequence is shorter than the longest.
__device__ __forceinline__ BlockRows block_rows(const ForwardParams& f, const ForwardBlock& block, int rows) {
  const int heads = static_cast<int>(f.attention.heads_q) / f.packed;
  const int batch = block.head / heads;
  return {batch, (block.head - batch * heads) * f.packed, block.tile * rows, f.packed, f.packed_inverse};
}

// Where row i of head h of a [batch, seq, head, dim] operand of queries begins; `start` is that of the sequence in a packed batch, else 0.
template <class T>
__device__ __forceinline__ T* query_row(const Rows& x, int64_t start, int b, int h, int i) {
  return static_cast<T*>(x.data) + (x.batch * b + x.seq * (start + i) + x.head * h);
}

__device__ __forceinline__ float* lse_row(const AttentionParams& p, const Sequence& s, int b, int h, int i) {
  return static_cast<float*>(p.lse.data) + (p.lse.batch * b + p.lse.head * h + s.first_q + i);
}

// How a row ends: what its output is multiplied by, and its log-sum-exp. max: the largest logit; sum: of exp(logit - max).
struct RowEnd {
  float share, lse;
};
__device__ __forceinline__ RowEnd end_of_row(const AttentionParams& p, int h, float max, float sum) {
  if (sum == 0) return {0, -kInfinity};  // no key
  const RowEnd end{1 / sum, max + logf(sum)};
  if (p.sinks == nullptr) return end;
  // The sink is one more column: both sums under the larger of the two maxima.
  const float sink = dev::ld_global_nc<float>(static_cast<const float*>(p.sinks) + h), top = fmaxf(sink, max);
  const float mine = expf(max - top);
  return {mine / (sum * mine + expf(sink - top)), end.lse};
}

// The keys or values of one KV head of one sequence, dense or in pages.
template <class T>
struct KeyRows {
  const Rows& x;
  int64_t first;  // elements before the first key, or before the first page's first key
  const int32_t* table;  // of the sequence; null: dense
  int page_size, pages;

  __device__ __forceinline__ KeyRows(const AttentionParams& p, const Rows& x, int64_t start, int b, int h)
      : x(x),
        first(x.head * h + (p.block_table ? 0 : x.batch * b + x.seq * start)),
        table(p.block_table ? p.block_table + p.block_table_stride * b : nullptr),
        page_size(static_cast<int>(p.page_size)),
        pages(static_cast<int>(p.pages)) {}

  __device__ __forceinline__ const T* row(int key) const {
    const T* base = static_cast<const T*>(x.data) + first;
    if (table == nullptr) return base + x.seq * key;
    const int id = dev::ld_global_nc<int32_t>(table + key / page_size);
    return base + x.batch * max(0, min(id, pages - 1)) + x.seq * (key % page_size);
  }

  // Starts the copies of keys [key, end) of a dense operand, see load_tile_async. Offsets are counted in 16 bytes, so that 32 bits are
  // enough for 64 GiB and the loop needs few registers.
  template <class Tile, int kThreads>
  __device__ __forceinline__ void load(uint32_t tile, int thread, int columns, int key, int end) const {
    const uint32_t seq = static_cast<uint32_t>(x.seq / Tile::kPerChunk), at = static_cast<uint32_t>(first / Tile::kPerChunk);
    load_tile_async<Tile, kThreads>(tile, thread, end - key, columns, x.data, at + static_cast<uint32_t>(key) * seq, seq);
  }
};

// The pages of the rows of keys that a thread copies, looked up once for K and V, a step before they are needed.
template <class C>
struct KeyPages {
  using Share = CopyShare<typename C::KTile, C::kThreads>;
  static_assert(std::is_same_v<typename Share::Rows, typename CopyShare<typename C::VTile, C::kThreads>::Rows>);
  int page[Share::kCount];  // -1: of a key outside of those that some row sees, whose page may be another's by now; its row is zeros

  // Keys [key0, key0 + C::kKeys) of sequence b, of which rows see `some`.
  __device__ __forceinline__ void look_up(const ForwardParams& f, int b, const Range& some, int key0) {
    const AttentionParams& p = f.attention;
    const int32_t* table = p.block_table + p.block_table_stride * b;
#pragma unroll
    for (int n = 0; n < Share::kCount; ++n) {
      const int key = key0 + Share::row(threadIdx.x, n);
      page[n] = -1;
      if (key >= some.begin && key < some.end)
        page[n] = max(0, min(dev::ld_global_nc<int32_t>(table + (key >> f.page_shift)), static_cast<int>(p.pages) - 1));
    }
  }
  // Starts the copies of those keys or values of head h.
  template <class Tile>
  __device__ __forceinline__ void load(const ForwardParams& f, const Rows& x, int h, uint32_t tile, int columns, int key0) const {
    const auto units = [](int64_t stride) { return static_cast<uint32_t>(static_cast<uint64_t>(stride) / Tile::kPerChunk); };
    const uint32_t head = units(x.head) * h;
    const auto exists = [&](int n, int) { return page[n] >= 0; };
    load_tile_at<Tile, C::kThreads>(tile, static_cast<int>(threadIdx.x), exists, columns, x.data, [&](int n, int row) {
      return head + units(x.batch) * page[n] + units(x.seq) * ((key0 + row) & ((1 << f.page_shift) - 1));
    });
  }
};

}  // namespace foveate::cuda
