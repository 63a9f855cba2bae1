// The gradients of bias and of the relative table: sums of dS over everything that one of their elements was added to.
//
// A block walks over tiles of scores in a fixed order, computes dS of each and adds it to registers, element by element. For bias it owns a
// tile of the result: the dimensions that bias broadcasts are the walk, and where rows or columns are among them, those of the tile are
// added up at the end. A long walk is divided among blocks, whose parts are added in order by a second kernel.
// For the relative table the walk follows a diagonal of tiles, along which each element keeps its distance j - i; at the end a block adds
// up the diagonals of its tile, and a second kernel adds the distances that share a bucket. Its parts are a few floats for each distance:
// O(S).
#include <algorithm>

#include "cuda/attention/backward.cuh"
#include "cuda/host/kernels.h"

namespace foveate::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int64_t kDesiredBlocks = 512;

// ---- dS of one tile ----------------------------------------------------------------------------------------------------------

// acc += dS of queries [i, i + kStationary) and keys [j, j + kStreamed) of one head.
template <class Tiles>
__device__ __forceinline__ void add_scores(const BackwardParams& a, const Philox& key, int b, int h, int i, int j,
                                           float (&acc)[Tiles::kBlocks][4]) {
  using T = typename Tiles::T;
  using Stationary = typename Tiles::Stationary;
  using Streamed = typename Tiles::Streamed;
  constexpr int kThreads = Tiles::kThreads;
  const Sequence s = sequence(a.attention, b);
  if (tile_kind(a.score.window, s, i, Tiles::kStationary, j, Tiles::kStreamed) == TileKind::kEmpty) return;
  const int columns = static_cast<int>(a.attention.head_dim), columns_v = static_cast<int>(a.attention.head_dim_v), hkv = h / a.group;
  const uint32_t q = dev::smem_base(), dout = q + Stationary::kBytes, k = dout + Stationary::kBytes, v = k + Streamed::kBytes;
  dev::sync_threads();  // all warps are done with the last tiles
  load_rows<Stationary, kThreads>(q, a.attention.q, b, h, s.first_q, i, s.q, columns, a.vectors);
  load_rows<Stationary, kThreads>(dout, a.grads.dout, b, h, s.first_q, i, s.q, columns_v, a.vectors);
  load_rows<Streamed, kThreads>(k, a.attention.k, b, hkv, s.first_k, j, s.k, columns, a.vectors);
  load_rows<Streamed, kThreads>(v, a.attention.v, b, hkv, s.first_k, j, s.k, columns_v, a.vectors);
  dev::cp_async_wait_all();
  dev::sync_threads();

  const int row0 = 16 * dev::warp();
  const FragmentCoords<false> at(i + row0, j);
  const RowStatistics statistics(a, b, h, i + row0);
  ScoreTile<T, false, true, Tiles::kBlocks> x;
  multiply_rows<Stationary, Streamed, kForwardChain>(x.s, q, row0, k, columns);
  x.probabilities(a, s, b, h, at, true, [&](int) { return statistics.lse; });
  if (a.attention.dropout_p > 0) x.draw(a, key, b * a.heads_q + h, at);
  multiply_rows<Stationary, Streamed, kShortChain>(x.dp, dout, row0, v, columns_v);
  x.gradients(a, [&](int) { return statistics.delta; });
#pragma unroll
  for (int c = 0; c < Tiles::kBlocks; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[c][e] += x.dp[c][e];
}

// The block's registers as a matrix [kStationary, kStreamed] of fp32 in shared memory, and the sums of its rows.
template <class Tiles>
struct SumTile {
  static constexpr uint32_t kStride = Tiles::kStreamed + 1, kRowSums = Tiles::kStationary * kStride * 4,
                            kBytes = kRowSums + Tiles::kStationary * 4;

  __device__ explicit SumTile(const float (&acc)[Tiles::kBlocks][4]) {
    dev::sync_threads();
#pragma unroll
    for (int c = 0; c < Tiles::kBlocks; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t row = 16 * dev::warp() + fragment_row(e), column = 8 * c + fragment_column(e);
        dev::st_shared(dev::smem_base() + (row * kStride + column) * 4, acc[c][e]);
      }
    dev::sync_threads();
  }
  __device__ float get(int row, int column) const { return dev::ld_shared<float>(dev::smem_base() + (row * kStride + column) * 4); }

  __device__ void sum_rows() const {
    const int row = static_cast<int>(threadIdx.x);
    if (row < Tiles::kStationary) {
      float sum = 0;
      for (int c = 0; c < Tiles::kStreamed; ++c) sum += get(row, c);
      dev::st_shared(dev::smem_base() + kRowSums + row * 4, sum);
    }
    dev::sync_threads();
  }
  __device__ float row_sum(int row) const { return dev::ld_shared<float>(dev::smem_base() + kRowSums + row * 4); }
};

template <class Tiles>
constexpr uint32_t kWalkSharedBytes =
    std::max<uint32_t>(2 * Tiles::Stationary::kBytes + 2 * Tiles::Streamed::kBytes, SumTile<Tiles>::kBytes);

// ---- bias --------------------------------------------------------------------------------------------------------------------

// Tiles of [B, Hq, Sq, Skv]: in each dimension either owned by different blocks or walked by all.
struct BiasParams {
  BackwardParams a;
  int owned[4], walked[4];  // one of the two is 1
  int splits;
  float* to;  // dbias, or [splits, dbias_numel]
};

template <class Tiles>
BiasParams bias_params(const AttentionParams& p, const AttentionGrads& g) {
  BiasParams r{};
  const int64_t tiles[4] = {p.batch, p.heads_q, ceil_div<int64_t>(p.seq_q, Tiles::kStationary),
                            ceil_div<int64_t>(p.seq_kv, Tiles::kStreamed)};
  int64_t blocks = 1, steps = 1;
  for (int i = 0; i < 4; ++i) {
    r.owned[i] = g.dbias_stride[i] == 0 ? 1 : static_cast<int>(tiles[i]);
    r.walked[i] = g.dbias_stride[i] == 0 ? static_cast<int>(tiles[i]) : 1;
    blocks *= r.owned[i];
    steps *= r.walked[i];
  }
  r.splits = blocks == 0 ? 1 : static_cast<int>(std::clamp<int64_t>(kDesiredBlocks / blocks, 1, std::max<int64_t>(steps, 1)));
  return r;
}

// index -> one number for each of four dimensions, the last the fastest.
__device__ inline void divide(int64_t index, const int (&sizes)[4], int (&at)[4]) {
#pragma unroll
  for (int i = 3; i >= 0; --i) at[i] = static_cast<int>(index % sizes[i]), index /= sizes[i];
}

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) bias_gradient(const __grid_constant__ BiasParams r) {
  const BackwardParams& a = r.a;
  const int split = static_cast<int>(blockIdx.x) % r.splits;
  int own[4], walk[4];
  divide(static_cast<int>(blockIdx.x) / r.splits, r.owned, own);
  const int64_t steps = int64_t{r.walked[0]} * r.walked[1] * r.walked[2] * r.walked[3];
  const Philox key = a.attention.dropout_p > 0 ? philox(a.attention) : Philox{};
  float acc[Tiles::kBlocks][4] = {};
  for (int64_t step = steps * split / r.splits; step < steps * (split + 1) / r.splits; ++step) {
    divide(step, r.walked, walk);
    add_scores<Tiles>(a, key, own[0] + walk[0], own[1] + walk[1], (own[2] + walk[2]) * Tiles::kStationary,
                      (own[3] + walk[3]) * Tiles::kStreamed, acc);
  }
  const SumTile<Tiles> sums(acc);
  const int64_t* stride = a.grads.dbias_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const bool one_row = stride[2] == 0, one_column = stride[3] == 0;
  const int rows = one_row ? 1 : Tiles::kStationary, columns = one_column ? 1 : Tiles::kStreamed;
  if (one_column) sums.sum_rows();
  float* to = r.to + split * a.grads.dbias_numel + own[0] * stride[0] + own[1] * stride[1];
  for (int at = thread; at < rows * columns; at += Tiles::kThreads) {
    const int row = at / columns, column = at % columns, last = one_row ? Tiles::kStationary : row + 1;
    const int64_t i = one_row ? 0 : own[2] * Tiles::kStationary + row, j = one_column ? 0 : own[3] * Tiles::kStreamed + column;
    if ((!one_row && i >= a.attention.seq_q) || (!one_column && j >= a.attention.seq_kv)) continue;
    float sum = 0;
    for (int x = row; x < last; ++x) sum += one_column ? sums.row_sum(x) : sums.get(x, column);
    dev::st_global(to + i * stride[2] + j * stride[3], sum);
  }
}

__global__ void __launch_bounds__(kSumThreads) sum_bias_parts(const __grid_constant__ BiasParams r) {
  const int64_t at = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (at >= r.a.grads.dbias_numel) return;
  float sum = 0;
  for (int split = 0; split < r.splits; ++split) sum += dev::ld_global_nc<float>(r.to + split * r.a.grads.dbias_numel + at);
  dev::st_global(static_cast<float*>(r.a.grads.dbias) + at, sum);
}

// ---- relative table ----------------------------------------------------------------------------------------------------------

// Diagonal d of tiles: queries kStationary * m .. against keys kStreamed * (first + d) + kStationary * m .., for all m.
struct RelativeParams {
  BackwardParams a;
  int diagonals, first;  // first <= 0
  float* parts;  // [B, Hq, diagonals, kStationary + kStreamed - 1]: distances j - i from kStreamed * (first + d) - (kStationary - 1) on
};

template <class Tiles>
constexpr int kDistances = Tiles::kStationary + Tiles::kStreamed - 1;

template <class Tiles>
RelativeParams relative_params(const AttentionParams& p) {
  RelativeParams r{};
  const int64_t tiles_q = ceil_div<int64_t>(p.seq_q, Tiles::kStationary), tiles_k = ceil_div<int64_t>(p.seq_kv, Tiles::kStreamed);
  const int64_t first = tiles_q > 0 ? -(tiles_q - 1) * (Tiles::kStationary / Tiles::kStreamed) : 0;
  r.first = static_cast<int>(first);
  r.diagonals = static_cast<int>(tiles_q > 0 && tiles_k > 0 ? tiles_k - first : 0);
  return r;
}

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads) relative_distances(const __grid_constant__ RelativeParams r) {
  const BackwardParams& a = r.a;
  const auto [b, h, diagonal] = block_place(r.diagonals, a.heads_q);
  const int offset = (r.first + diagonal) * Tiles::kStreamed;
  const Philox key = a.attention.dropout_p > 0 ? philox(a.attention) : Philox{};
  float acc[Tiles::kBlocks][4] = {};
  const int first_i = offset < 0 ? (Tiles::kStationary - 1 - offset) / Tiles::kStationary * Tiles::kStationary : 0;
  for (int i = first_i; i < a.attention.seq_q && i + offset < a.attention.seq_kv; i += Tiles::kStationary)
    add_scores<Tiles>(a, key, b, h, i, i + offset, acc);
  const SumTile<Tiles> sums(acc);
  for (int at = static_cast<int>(threadIdx.x); at < kDistances<Tiles>; at += Tiles::kThreads) {
    const int shift = at - (Tiles::kStationary - 1);  // column - row
    float sum = 0;
    for (int row = max(0, -shift); row < min(Tiles::kStationary, Tiles::kStreamed - shift); ++row) sum += sums.get(row, row + shift);
    dev::st_global(r.parts + int64_t{blockIdx.x} * kDistances<Tiles> + at, sum);
  }
}

// A block adds the distances of one bucket and head, of all sequences.
template <class Tiles>
__global__ void __launch_bounds__(kSumThreads) sum_buckets(const __grid_constant__ RelativeParams r) {
  const AttentionParams& p = r.a.attention;
  const int bucket = static_cast<int>(blockIdx.x) / r.a.heads_q, h = static_cast<int>(blockIdx.x) % r.a.heads_q;
  const int64_t count = int64_t{r.diagonals} * kDistances<Tiles>, buckets = p.seq_q + p.seq_kv - 1;
  float sum = 0;
  for (int b = 0; b < r.a.batch; ++b) {
    const float* parts = r.parts + (int64_t{b} * r.a.heads_q + h) * count;
    const int64_t origin = p.seq_kv - 1 - sequence(p, b).shift;
    for (int64_t at = threadIdx.x; at < count; at += kSumThreads) {
      const int64_t distance = (r.first + at / kDistances<Tiles>)*Tiles::kStreamed + at % kDistances<Tiles> - (Tiles::kStationary - 1);
      const int64_t index = origin + distance;  // distances of no pair of the sequence are outside, and their sums 0
      if (index < 0 || index >= buckets) continue;
      if (clamp_length(dev::ld_global_nc<int32_t>(p.rel_buckets + index), p.rel_num_buckets - 1) == bucket)
        sum += dev::ld_global_nc<float>(parts + at);
    }
  }
  const uint32_t sums = dev::smem_base();
  dev::st_shared(sums + threadIdx.x * 4, sum);
  dev::sync_threads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int t = 0; t < kSumThreads; ++t) sum += dev::ld_shared<float>(sums + t * 4);
  dev::st_global(static_cast<float*>(r.a.grads.drel_table) + blockIdx.x, sum);
}

template <class F>
void visit_walk(const AttentionParams& p, const F& f) {
  visit_backward(p, [&]<class Tiles, bool kOptions>(Tiles tiles, std::bool_constant<kOptions>) {
    if constexpr (kOptions) f(tiles);  // bias and relative table are options
  });
}

int64_t bias_parts(const BiasParams& r, const AttentionGrads& g) { return r.splits > 1 ? r.splits * g.dbias_numel : 0; }

template <class Tiles>
int64_t relative_parts(const RelativeParams& r, const AttentionParams& p) {
  return p.batch * p.heads_q * r.diagonals * kDistances<Tiles>;
}

}  // namespace

int64_t bias_gradient_workspace(const AttentionParams& p, const AttentionGrads& g) {
  int64_t size = 0;
  visit_walk(p, [&]<class Tiles>(Tiles) {
    if (g.dbias) size += bias_parts(bias_params<Tiles>(p, g), g);
    if (g.drel_table) size += relative_parts<Tiles>(relative_params<Tiles>(p), p);
  });
  return size;
}

void backward_bias_gradients(const BackwardParams& a, float* workspace, const Stream& stream) {
  visit_walk(a.attention, [&]<class Tiles>(Tiles) {
    if (a.grads.dbias) {
      BiasParams r = bias_params<Tiles>(a.attention, a.grads);
      r.a = a;
      r.to = r.splits > 1 ? workspace : static_cast<float*>(a.grads.dbias);
      workspace += bias_parts(r, a.grads);
      const int64_t blocks = int64_t{r.owned[0]} * r.owned[1] * r.owned[2] * r.owned[3];
      launch<bias_gradient<Tiles>>(one_dimensional(blocks * r.splits), dim3(Tiles::kThreads), kWalkSharedBytes<Tiles>, stream, r);
      if (r.splits > 1)
        launch<sum_bias_parts>(one_dimensional(ceil_div<int64_t>(a.grads.dbias_numel, kSumThreads)), dim3(kSumThreads), 0, stream, r);
    }
    if (a.grads.drel_table) {
      RelativeParams r = relative_params<Tiles>(a.attention);
      r.a = a;
      r.parts = workspace;
      const int64_t heads = int64_t{a.batch} * a.heads_q;
      launch<relative_distances<Tiles>>(one_dimensional(heads * r.diagonals), dim3(Tiles::kThreads), kWalkSharedBytes<Tiles>, stream, r);
      launch<sum_buckets<Tiles>>(one_dimensional(int64_t{a.attention.rel_num_buckets} * a.heads_q), dim3(kSumThreads), kSumThreads * 4,
                                 stream, r);
    }
  });
}

}  // namespace foveate::cuda
