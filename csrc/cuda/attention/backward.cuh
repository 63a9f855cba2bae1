// Attention backward (Dao et al. 2022, section 3.2; Dao 2023, section 3.1.2), what its kernels share.
//
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dV = P^T dO   dK = dS^T Q   dQ = dS K   delta = rowsum(dO O) - dlse
//
// Two kernels of one shape: a block keeps a stationary tile of rows in shared memory, streams tiles of the other side past it (two stages
// of cp.async) and adds up the gradient of the stationary rows in registers. For dQ these are the rows of Q and dO; for dK and dV those of
// K and V, with S and dP transposed, so that P^T and dS^T leave the first products in the registers where the second ones want them. A warp
// owns 16 rows, and warps meet only where a stage changes. No block adds to what another writes: equal calls give bitwise equal results, in
// O(S) memory. S and dP are computed by both kernels: seven products instead of five. Where bits may differ, the kernel for dK and dV does
// the work of both and adds to dQ by atomics (bf16 and fp16).
//
// Head dims are padded to 64, 96 (16 bit), 128 or 256. With 256 (fp32: 128), dK and dV do not fit the registers together and are different
// blocks' work. fp32 uses the same code with products by FMA.
#pragma once

#include <bit>
#include <type_traits>

#include "core/check.h"
#include "cuda/attention/score.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/host/launch.h"

namespace foveate::cuda {

constexpr int kRowAlign = 128;  // rows of lse and delta in the workspace, of each head: a multiple of every tile

// The parameters of every kernel of the backward.
struct BackwardParams {
  AttentionParams attention;
  AttentionGrads grads;
  ScoreParams score;
  int batch, heads_q, heads_kv, group;  // group = heads_q / heads_kv
  int tiles;  // of the kernel's own rows, per head
  int64_t rows;  // seq_q rounded up to kRowAlign
  float *lse, *delta;  // [B, Hq, rows]; lse: see stored_lse
  float* sink_parts;  // [B, Hq, rows / kRowAlign]
  float* dq_sum;  // [B, Hq, rows, padded head dim]: dQ before the scale, or null where backward_query_gradient computes dQ
  bool vectors;  // all rows begin at multiples of 16 bytes
};

// Tile sizes. Shared memory: 2 * kStationary * kHeadDim + 2 stages * 2 * kStreamed * kHeadDim elements and the statistics of the streamed
// queries.
//   16 bit: D 64: 64 KiB, D 96: 72 KiB, D 128: 96 KiB, D 256: 96 KiB;   fp32: 64, 96 and 96 KiB.   99 KiB is what every GPU from sm_80 on gives.
template <class T_, int kHeadDim_>
struct BackwardTiles {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = kHeadDim == 256 ? (kFloat ? 2 : 4) : kFloat ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps, kStationary = 16 * kWarps,
                       kStreamed = (kFloat ? 2048 : 4096) / std::bit_ceil(unsigned{kHeadDim});
  static constexpr int kBlocks = kStreamed / 8, kColumns = kHeadDim / 8;  // 16 x 8 fragments of a tile of scores, and of a gradient
  using Stationary = Tile<T, kStationary, kHeadDim>;
  using Streamed = Tile<T, kStreamed, kHeadDim>;

  // Two stationary tiles: Q and dO, or K and V. Each stage: the two streamed tiles, then lse and delta of the streamed queries.
  static constexpr uint32_t kStatistics = 2 * Streamed::kBytes, kStage = kStatistics + 2 * kStreamed * 4;
  static constexpr uint32_t kStationary1 = Stationary::kBytes, kStages = 2 * Stationary::kBytes, kSharedBytes = kStages + 2 * kStage;
  static_assert(kSharedBytes <= 99 * 1024 && kRowAlign % kStationary == 0 && kRowAlign % kStreamed == 0 && (kFloat || kStage % 128 == 0));
};

// ---- rows in global memory ---------------------------------------------------------------------------------------------------

// Row i of one head of a [batch, seq, head, dim] operand.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  __device__ HeadRows(const Rows& rows, int b, int h, int64_t first)
      : data(static_cast<T*>(rows.data) + rows.batch * b + rows.head * h + rows.seq * first), stride(rows.seq) {}
  __device__ T* row(int i) const { return data + stride * i; }
};

// Starts the load of rows [i, i + Tile::kRows) of head h of a sequence that begins at row `first`; those from `length` on are zero. Where
// rows suit vectors, their offsets are counted in 16 bytes, which fits 32 bits.
template <class Tile, int kThreads>
__device__ __forceinline__ void load_rows(uint32_t tile, const Rows& rows, int b, int h, int64_t first, int i, int length, int columns,
                                          bool vectors) {
  using T = typename Tile::T;
  const int thread = static_cast<int>(threadIdx.x);
  if (vectors) {
    const auto units = [](int64_t stride) { return static_cast<uint32_t>(static_cast<uint64_t>(stride) / Tile::kPerChunk); };
    const uint32_t seq = units(rows.seq), at = units(rows.batch) * b + units(rows.head) * h + (static_cast<uint32_t>(first) + i) * seq;
    load_tile_async<Tile, kThreads>(tile, thread, length - i, columns, rows.data, at, seq);
  } else {
    const HeadRows<T> head(rows, b, h, first);
    load_tile_unaligned<Tile, kThreads>(tile, thread, columns,
                                        [&](int r) -> const T* { return i + r < length ? head.row(i + r) : nullptr; });
  }
}

// Stores rows [row, row + 16) of a gradient times `factor`: rows from `stop` on are not there, those from `length` on are zero.
template <class T, int n>
__device__ __forceinline__ void store_gradient(const HeadRows<T>& to, int row, int length, int stop, int columns, bool vectors,
                                               float factor, const float (&acc)[n][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + fragment_row(2 * half);
    if (i >= stop) continue;
    T* out = to.row(i);
    const bool inside = i < length;
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int column = 8 * c + fragment_column(0);
      const float x = inside ? acc[c][2 * half] * factor : 0.0f, y = inside ? acc[c][2 * half + 1] * factor : 0.0f;
      if (vectors && column < columns) {
        if constexpr (std::is_same_v<T, float>)
          dev::st_global(out + column, make_float2(x, y));
        else
          dev::st_global(out + column, dev::pack<T>(x, y));
      } else if (column < columns) {
        dev::st_global(out + column, dev::from_float<T>(x));
        if (column + 1 < columns) dev::st_global(out + column + 1, dev::from_float<T>(y));
      }
    }
  }
}

// ---- products ----------------------------------------------------------------------------------------------------------------

// fp32: each thread computes its elements of the fragment of mma_m16n8k16, so that everything else is the same for all types. tf32 products
// of split values would be faster, but their 22 bits of mantissa are too few where dP - delta cancels. Sums are made of sums of kChain
// products. S has the forward's 32, so that what both round cancels in S - lse; dP has 8, an order that row_statistics can have too. Then
// dP - delta is exactly 0 where a query sees one key, as it is in torch.

constexpr int kForwardChain = 32, kShortChain = 8;

__device__ __forceinline__ float dot4(const float4& x, const float4& y, float sum) {
  return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
}

// Four elements of a tile, from a column on that is a multiple of 4.
template <class Tile>
__device__ __forceinline__ float4 four(uint32_t tile, int row, int column) {
  return dev::ld_shared<float4>(tile + Tile::offset(row, column / 4));
}

// Columns of a tile of 256 that are padding are left out of the products, 64 at a time.
template <int kHeadDim>
__device__ __forceinline__ bool used(int column, int columns) {
  return kHeadDim < 256 || column / 64 * 64 < columns;
}

// x [16 x 8n] = rows [row, row + 16) of `own` times the first 8n rows of `other`, transposed.
template <class Stationary, class Streamed, int kChain, int n>
__device__ __forceinline__ void multiply_rows(float (&x)[n][4], uint32_t own, int row, uint32_t other, int columns) {
#pragma unroll
  for (int c = 0; c < n; ++c) x[c][0] = x[c][1] = x[c][2] = x[c][3] = 0.0f;
  if constexpr (std::is_same_v<typename Stationary::T, float>) {
    const int own_row = row + fragment_row(0), other_row = fragment_column(0);
#pragma unroll 1
    for (int first = 0; first < Stationary::kColumns; first += kChain) {
      if (!used<Stationary::kColumns>(first, columns)) break;
      float part[n][4] = {};
#pragma unroll 2
      for (int d = first; d < first + kChain; d += 4) {
        const float4 a0 = four<Stationary>(own, own_row, d), a1 = four<Stationary>(own, own_row + 8, d);
#pragma unroll
        for (int c = 0; c < n; ++c) {
          const float4 b0 = four<Streamed>(other, 8 * c + other_row, d), b1 = four<Streamed>(other, 8 * c + other_row + 1, d);
          part[c][0] = dot4(a0, b0, part[c][0]);
          part[c][1] = dot4(a0, b1, part[c][1]);
          part[c][2] = dot4(a1, b0, part[c][2]);
          part[c][3] = dot4(a1, b1, part[c][3]);
        }
      }
#pragma unroll
      for (int c = 0; c < n; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[c][e] += part[c][e];
    }
  } else {
    const Fragments<Stationary, Operand::kA> from_own(own, row);
    const Fragments<Streamed, Operand::kB> from_other(other);
#pragma unroll
    for (int d = 0; d < Stationary::kColumns; d += 16) {
      if (!used<Stationary::kColumns>(d, columns)) break;
      uint32_t a[4];
      from_own.load(a, 0, d);
#pragma unroll
      for (int c = 0; c < n; c += 2) {
        uint32_t b[4];
        from_other.load(b, 8 * c, d);
        dev::mma_m16n8k16<typename Stationary::T>(x[c], a, b[0], b[1]);
        dev::mma_m16n8k16<typename Stationary::T>(x[c + 1], a, b[2], b[3]);
      }
    }
  }
}

// acc [16 x 8m] += x [16 x 8n] times the first 8n rows of `other`; x is rounded to the tile's type.
template <class Streamed, int n, int m>
__device__ __forceinline__ void accumulate(float (&acc)[m][4], const float (&x)[n][4], uint32_t other, int columns) {
  if constexpr (std::is_same_v<typename Streamed::T, float>) {
    const int first_lane = dev::lane() / 4 * 4, column = fragment_column(0);
#pragma unroll
    for (int block = 0; block < n; ++block) {
      float x0[8], x1[8];  // the row of this thread, of which four lanes hold two elements each, and the row 8 below
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        x0[k] = dev::shfl_idx(x[block][k % 2], first_lane + k / 2);
        x1[k] = dev::shfl_idx(x[block][2 + k % 2], first_lane + k / 2);
      }
#pragma unroll
      for (int c = 0; c < m; ++c) {
        if (!used<Streamed::kColumns>(8 * c, columns)) break;
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float2 b = dev::ld_shared<float2>(other + Streamed::offset(8 * block + k, 2 * c + column / 4) + column % 4 * 4);
          sum[0] = fmaf(x0[k], b.x, sum[0]);
          sum[1] = fmaf(x0[k], b.y, sum[1]);
          sum[2] = fmaf(x1[k], b.x, sum[2]);
          sum[3] = fmaf(x1[k], b.y, sum[3]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[c][e] += sum[e];
      }
    }
  } else {
    const Fragments<Streamed, Operand::kBTransposed> from_other(other);
#pragma unroll
    for (int k = 0; k < n; k += 2) {
      uint32_t a[4];
      pack_a<typename Streamed::T>(a, x[k], x[k + 1]);
#pragma unroll
      for (int c = 0; c < m; c += 2) {
        if (!used<Streamed::kColumns>(8 * c, columns)) break;
        uint32_t b[4];
        from_other.load(b, 8 * k, 8 * c);
        dev::mma_m16n8k16<typename Streamed::T>(acc[c], a, b[0], b[1]);
        dev::mma_m16n8k16<typename Streamed::T>(acc[c + 1], a, b[2], b[3]);
      }
    }
  }
}

// ---- scores ------------------------------------------------------------------------------------------------------------------

// The unit of the workspace's lse: base 2 where the exponent is one fused multiply-add, natural in fp32, where the difference comes first
// for its precision. Of a row that sees no key it is +inf, so that its probabilities are 0.
template <class T>
__device__ __forceinline__ float stored_lse(float natural) {
  return std::is_same_v<T, float> ? natural : natural * static_cast<float>(kLog2e);
}

// exp(factor * x - lse)
template <class T>
__device__ __forceinline__ float probability(float x, float factor, float lse) {
  if constexpr (std::is_same_v<T, float>) return dev::exp2_approx(fmaf(x, factor, -lse) * static_cast<float>(kLog2e));
  return dev::exp2_approx(fmaf(x, factor, -lse));
}

// One tile of scores on its way from Q K^T and dO V^T to P and dS. kOptions: with the options of needs_general_kernel.
template <class T, bool kTransposed, bool kOptions, int n>
struct ScoreTile {
  float s[n][4], dp[n][4];  // q.k -> P;  dO V^T -> dS
  float slope[kOptions ? n : 1][4];
  uint32_t dropout_mask = 0;  // bit 4c + e: element e of block c is kept
  static_assert(4 * n <= 32);

  // A thread's part of a statistic of queries: of its two columns in a block of S^T, or its two rows of S.
  static __device__ __forceinline__ float of_query(const float2& pair, int e) { return (kTransposed ? e % 2 : e / 2) ? pair.y : pair.x; }

  // s -> P. lse(c): of block c.
  template <class Lse>
  __device__ __forceinline__ void probabilities(const BackwardParams& a, const Sequence& q, int b, int h,
                                                const FragmentCoords<kTransposed>& at, bool partial, const Lse& lse) {
    constexpr bool kFloat = std::is_same_v<T, float>;
    float factor = kFloat ? a.score.scale : a.score.scale_log2;
    if constexpr (kOptions) {
      apply_options<kFloat>(a.attention, a.score, q, b, h, at, s, slope);
      factor = kFloat ? 1.0f : static_cast<float>(kLog2e);
    }
    if (partial) mask_invisible(a.score.window, q, at, s);
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const float2 pair = lse(c);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[c][e] = probability<T>(s[c][e], factor, of_query(pair, e));
    }
  }

  __device__ __forceinline__ void draw(const BackwardParams& a, const Philox& key, int bh, const FragmentCoords<kTransposed>& at) {
#pragma unroll
    for (int c = 0; c < n; ++c) dropout_mask |= dropout_mask_of_block(key, a.score.dropout_threshold, at, c, bh) << (4 * c);
  }

  // What dropout does to x: to P, and to dP.
  __device__ __forceinline__ void drop(const BackwardParams& a, float (&x)[n][4]) const {
    if constexpr (kOptions) {
      if (a.attention.dropout_p > 0) {
#pragma unroll
        for (int c = 0; c < n; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) x[c][e] = dropout_mask >> (4 * c + e) & 1 ? x[c][e] * a.score.dropout_scale : 0.0f;
      }
    }
  }

  // dp -> dS, the gradient of the logits.
  template <class Delta>
  __device__ __forceinline__ void gradients(const BackwardParams& a, const Delta& delta) {
    drop(a, dp);
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const float2 pair = delta(c);
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[c][e] = s[c][e] * (dp[c][e] - of_query(pair, e));
    }
  }

  __device__ __forceinline__ void no_gradient() {
#pragma unroll
    for (int c = 0; c < n; ++c) dp[c][0] = dp[c][1] = dp[c][2] = dp[c][3] = 0.0f;
  }

  // dS -> the gradient of scale * q.k. Where dS is 0 the slope may be NaN.
  __device__ __forceinline__ void through_softcap(const BackwardParams& a) {
    if constexpr (kOptions) {
      if (a.score.softcap > 0) {
#pragma unroll
        for (int c = 0; c < n; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) dp[c][e] = dp[c][e] == 0.0f ? 0.0f : dp[c][e] * slope[c][e];
      }
    }
  }
};

// lse and delta of a thread's two rows of S.
struct RowStatistics {
  float2 lse, delta;
  __device__ RowStatistics(const BackwardParams& a, int b, int h, int row) {
    const int64_t at = (int64_t{b} * a.heads_q + h) * a.rows + row + fragment_row(0);
    lse = make_float2(dev::ld_global_nc<float>(a.lse + at), dev::ld_global_nc<float>(a.lse + at + 8));
    delta = make_float2(dev::ld_global_nc<float>(a.delta + at), dev::ld_global_nc<float>(a.delta + at + 8));
  }
};

// ---- which block does what ---------------------------------------------------------------------------------------------------

// Block x of a grid of batch * heads * tiles: tiles of a head are neighbours, for L2.
struct BlockPlace {
  int b, h, tile;
};
__device__ inline BlockPlace block_place(int tiles, int heads) {
  const int head = static_cast<int>(blockIdx.x) / tiles;
  return {head / heads, head % heads, static_cast<int>(blockIdx.x) % tiles};
}

inline dim3 one_dimensional(int64_t blocks) {
  check(blocks <= std::numeric_limits<int32_t>::max(), "attention backward: ", blocks, " blocks are more than a grid has, 2147483647");
  return dim3(static_cast<unsigned>(blocks));
}

// Calls f with the BackwardTiles of the call's dtype and head dims, and whether it has options; fp32 has the instance with options only.
template <class F>
void visit_backward(const AttentionParams& p, const F& f) {
  const int64_t dim = max(p.head_dim, p.head_dim_v);
  const auto with_dim = [&]<class T, bool kOptions>() {
    if (dim <= 64) return f(BackwardTiles<T, 64>{}, std::bool_constant<kOptions>{});
    if constexpr (sizeof(T) == 2) {
      if (dim <= 96) return f(BackwardTiles<T, 96>{}, std::bool_constant<kOptions>{});
    }
    if (dim <= 128) return f(BackwardTiles<T, 128>{}, std::bool_constant<kOptions>{});
    f(BackwardTiles<T, 256>{}, std::bool_constant<kOptions>{});
  };
  const bool options = needs_general_kernel(p);
  if (p.dtype == DType::kBFloat16)
    return options ? with_dim.template operator()<bf16, true>() : with_dim.template operator()<bf16, false>();
  if (p.dtype == DType::kFloat16) return options ? with_dim.template operator()<f16, true>() : with_dim.template operator()<f16, false>();
  with_dim.template operator()<float, true>();
}

__host__ __device__ constexpr int64_t padded_head_dim(const AttentionParams& p) {
  const int64_t dim = max(p.head_dim, p.head_dim_v);
  return dim <= 64 ? 64 : dim <= 96 && p.dtype != DType::kFloat32 ? 96 : dim <= 128 ? 128 : 256;
}

// The launches, each in a file of its own.
void backward_key_gradients(const BackwardParams& a, const Stream& stream);  // dk, dv
void backward_query_gradient(const BackwardParams& a, const Stream& stream);  // dq
int64_t bias_gradient_workspace(const AttentionParams& p, const AttentionGrads& g);  // floats
void backward_bias_gradients(const BackwardParams& a, float* workspace, const Stream& stream);  // dbias, drel_table

}  // namespace foveate::cuda
