// The attention forward, sm_80 and later: FlashAttention-2 (Dao 2023). docs/kernels/cuda_attention.md explains it.
//
//   block    4 warps, a tile of 128 or 64 rows; rows = queries of one head, or of the heads that share a KV head
//   warp     32 or 16 of the rows, in fragments of 16; a row's keys lie in the 4 lanes of a quad, so a row's maximum takes two shuffles
//   steps    of 64 keys; those that no row sees are left out, those that some row does not see are masked
//   shared   the tile of q, one tile of k, one of v. K of the next step is on its way during softmax and P V, V during Q K^T.
//   registers of a thread: 64 scores and dv outputs (128 rows), or half of that (64 rows)
//
// bf16 and fp16 use tensor cores; fp32 uses FMA in the same kernel, with smaller tiles. ForwardKind in config.h: which instance does what.
#pragma once

#include "cuda/attention/forward.h"
#include "cuda/attention/forward_products.cuh"
#include "cuda/host/launch.h"

namespace foveate::cuda {

// Starts the copies of the rows of q; those that do not exist are zeros.
template <class C>
__device__ __forceinline__ void load_queries(const ForwardParams& f, const Sequence& s, const BlockRows& rows, uint32_t tile) {
  using T = typename C::T;
  const AttentionParams& p = f.attention;
  const int thread = static_cast<int>(threadIdx.x), columns = static_cast<int>(p.head_dim), total = s.q * rows.packed;
  const auto row = [&](int r) -> const T* {
    return rows.first + r < total ? query_row<const T>(p.q, s.first_q, rows.batch, rows.head_of(r), rows.query(r)) : nullptr;
  };
  if (!C::kGeneral || f.vector_loads)
    load_tile_async<typename C::QTile, C::kThreads>(tile, thread, columns, row);
  else
    load_tile_unaligned<typename C::QTile, C::kThreads>(tile, thread, columns, row);
  dev::cp_async_commit();
}

// Starts the copies of keys or values from key0 on. Keys outside of [begin, end) of pages, and from `end` on of a dense operand, which no
// row sees, are zeros and are not read: what lies there may be
// NaN, and in v 0 * NaN would be NaN.
template <class C, class Tile>
__device__ __forceinline__ void load_keys(const ForwardParams& f, const KeyRows<typename C::T>& source, uint32_t tile, int64_t head_dim,
                                          int key0, int begin, int end) {
  const int thread = static_cast<int>(threadIdx.x), columns = static_cast<int>(head_dim);
  // Pages before a window may be another's by now.
  const auto row = [&](int r) { return key0 + r >= begin && key0 + r < end ? source.row(key0 + r) : nullptr; };
  if (!C::kGeneral || (f.vector_loads && source.table == nullptr))
    source.template load<Tile, C::kThreads>(tile, thread, columns, key0, end);
  else if (f.vector_loads)
    load_tile_async<Tile, C::kThreads>(tile, thread, columns, row);
  else
    load_tile_unaligned<Tile, C::kThreads>(tile, thread, columns, row);
}

template <class C>
__device__ __forceinline__ void clear_scores(ForwardState<C>& state) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
    for (int n = 0; n < C::kScores; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) state.score[m][n][e] = 0;
}

// By how many powers of two a weight may exceed 1 before what was summed is rescaled to a new maximum, so that few steps rescale (as in
// FlashAttention-4). The sums are fp32, and a weight of 256 is as exact in bf16 and fp16 as one of 1. Not in fp32, where the largest
// weight is exactly 1.
template <class T>
constexpr float kRise = sizeof(T) == 4 ? 0.0f : 8.0f;

// Raises the reference of each row, a maximum of its scores so far that a later one may exceed by kRise, and rescales what was summed.
template <class C>
__device__ __forceinline__ void raise_step(ForwardState<C>& state, float factor) {
  float rise[C::kFragments][2];  // in powers of two
  bool raised = false;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = state.row_max[m][half];
      float top = before;
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) top = fmaxf(top, fmaxf(state.score[m][n][2 * half], state.score[m][n][2 * half + 1]));
      top = fmaxf(top, dev::shfl_xor(top, 1));
      top = fmaxf(top, dev::shfl_xor(top, 2));
      rise[m][half] = (top - before) * factor;  // NaN where both are infinite
      const bool stays = rise[m][half] <= kRise<typename C::T> || top == before;
      state.row_max[m][half] = stays ? before : top;
      rise[m][half] = stays ? 0.0f : rise[m][half];
      raised |= !stays;
    }
  }
  if (!dev::any(raised)) return;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float rescale = dev::exp2_approx(-rise[m][half]);
      state.row_sum[m][half] *= rescale;
#pragma unroll
      for (int n = 0; n < C::kOutputs; ++n) state.output[m][n][2 * half] *= rescale, state.output[m][n][2 * half + 1] *= rescale;
    }
  }
}

// Scores -> exp2(factor * (score - reference)), and their sums.
template <class C>
__device__ __forceinline__ void softmax_step(ForwardState<C>& state, float factor) {
  raise_step<C>(state, factor);
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = state.row_max[m][half] == -kInfinity ? 0.0f : state.row_max[m][half];  // no key: -inf - -inf would be NaN
      const float offset = base * factor;
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          // In fp32 the difference first: exactly 1 at the maximum.
          if constexpr (sizeof(typename C::T) == 4)
            state.score[m][n][e] = dev::exp2_approx((state.score[m][n][e] - base) * factor);
          else
            state.score[m][n][e] = dev::exp2_approx(fmaf(state.score[m][n][e], factor, -offset));
          state.row_sum[m][half] += state.score[m][n][e];
        }
      }
    }
  }
}

// -inf for keys that a row does not see: those before the ones it sees, or those after them.
template <class C, bool kBefore>
__device__ __forceinline__ void mask_step(ForwardState<C>& state, const ScoreParams& o, const Sequence& s, const BlockRows& rows,
                                          int warp_row, int key0) {
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = rows.query(warp_row + 16 * m + fragment_row(2 * half));
      const Range seen = visible_keys(o.window, s, i);
      const int edge = (kBefore ? seen.begin : seen.end) - key0 - fragment_column(0);
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (kBefore ? 8 * n + e < edge : 8 * n + e >= edge) state.score[m][n][2 * half + e] = -kInfinity;
      }
    }
  }
}

// Softcap, biases and mask of the general instance, in which the rows of a tile are queries of one head. Rows that do not exist get the
// options of the last one.
template <class C>
__device__ __forceinline__ void options_step(ForwardState<C>& state, const ForwardParams& f, const Sequence& s, const BlockRows& rows,
                                             int warp_row, int key0) {
  if (!f.score_options) return;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m)
    apply_options<std::is_same_v<typename C::T, float>>(f.attention, f.score, s, rows.batch, rows.head,
                                                        FragmentCoords<false>(rows.first + warp_row + 16 * m, key0), state.score[m]);
}

template <class C>
__device__ __forceinline__ void dropout_step(ForwardState<C>& state, const ForwardParams& f, const BlockRows& rows, int warp_row,
                                             int key0) {
  const AttentionParams& p = f.attention;
  if (!(p.dropout_p > 0)) return;
  const Philox words = philox(p);
  const int bh = rows.batch * static_cast<int>(p.heads_q) + rows.head;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
    const FragmentCoords<false> at(rows.first + warp_row + 16 * m, key0);
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
      const uint32_t kept = dropout_mask_of_block<false>(words, f.score.dropout_threshold, at, n, bh);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(kept >> e & 1)) state.score[m][n][e] = 0;
    }
  }
}

// Divides by the sums, stores output (by way of the tile of q, of which each warp needs only its own rows) and lse.
template <class C>
__device__ __forceinline__ void finish(ForwardState<C>& state, const ForwardParams& f, const Sequence& s, const BlockRows& rows,
                                       int warp_row, uint32_t q_tile) {
  using T = typename C::T;
  const AttentionParams& p = f.attention;
  const int total = s.q * rows.packed;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + fragment_row(2 * half);
      float sum = state.row_sum[m][half];
      sum += dev::shfl_xor(sum, 1);
      sum += dev::shfl_xor(sum, 2);
      const bool exists = rows.first + row < total;
      const int h = exists ? rows.head_of(row) : 0, i = rows.query(row);
      const RowEnd end = end_of_row(p, h, state.row_max[m][half] * f.logit, sum);
      if (p.lse.data && exists && fragment_column(0) == 0) dev::st_global(lse_row(p, s, rows.batch, h, i), end.lse);
      const float share = end.share * f.score.dropout_scale;
#pragma unroll
      for (int n = 0; n < C::kOutputs; ++n) state.output[m][n][2 * half] *= share, state.output[m][n][2 * half + 1] *= share;
    }
    store_fragments<typename C::QTile>(q_tile, warp_row + 16 * m, state.output[m]);
  }
  dev::sync_warp();
  store_rows<typename C::QTile, 32>(q_tile, warp_row, C::kRowsPerWarp, dev::lane(), static_cast<int>(p.head_dim_v), f.vector_stores,
                                    [&](int row) -> T* {
                                      if (rows.first + row >= total) return nullptr;
                                      return query_row<T>(p.out, s.first_q, rows.batch, rows.head_of(row), rows.query(row));
                                    });
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kTile.blocks_per_sm) attention_forward_kernel(const __grid_constant__ ForwardParams f) {
  using T = typename C::T;
  constexpr bool kFloat = std::is_same_v<T, float>;
  const AttentionParams& p = f.attention;
  const BlockRows rows = block_rows(f, forward_block(f.grid, static_cast<int>(blockIdx.x)), C::kRows);
  const Sequence s = sequence(p, rows.batch);
  const int total = s.q * rows.packed, warp_row = dev::warp() * C::kRowsPerWarp;
  if (rows.first >= total) return;
  const int first = rows.query(0), last = min(rows.query(C::kRows - 1), s.q - 1);
  const Range some = visible_keys(f.score.window, s, first, last);  // each key of it may be seen by some row
  const int all_begin = visible_keys(f.score.window, s, last).begin, all_end = visible_keys(f.score.window, s, first).end;  // and by all
  const int begin = some.begin / C::kKeys * C::kKeys, head_kv = rows.head / f.group;

  const uint32_t q_tile = dev::smem_base(), k_tile = q_tile + C::QTile::kBytes, v_tile = k_tile + C::KTile::kBytes;
  const KeyRows<T> k_rows(p, p.k, s.first_k, rows.batch, head_kv), v_rows(p, p.v, s.first_k, rows.batch, head_kv);
  KeyPages<C> pages;
  const auto look_up = [&](int key0) {
    if constexpr (C::kKind == ForwardKind::kPaged) pages.look_up(f, rows.batch, some, key0);
  };
  const auto load = [&]<class Tile>(const Rows& x, const KeyRows<T>& source, uint32_t tile, int64_t columns, int key0) {
    if constexpr (C::kKind == ForwardKind::kPaged)
      pages.template load<Tile>(f, x, head_kv, tile, static_cast<int>(columns), key0);
    else
      load_keys<C, Tile>(f, source, tile, columns, key0, some.begin, some.end);
    dev::cp_async_commit();
  };
  const auto load_k = [&](int key0) { load.template operator()<typename C::KTile>(p.k, k_rows, k_tile, p.head_dim, key0); };
  const auto load_v = [&](int key0) { load.template operator()<typename C::VTile>(p.v, v_rows, v_tile, p.head_dim_v, key0); };

  // Prologue: row_max = -inf, row_sum = 0, out = 0; Q [kRows, D] and the first K [kKeys, D] are on their way.
  ForwardState<C> state;
#pragma unroll
  for (int m = 0; m < C::kFragments; ++m) state.row_max[m][0] = state.row_max[m][1] = -kInfinity;

  if (!some.empty()) {
    look_up(begin);
    load_queries<C>(f, s, rows, q_tile);
    load_k(begin);
  }
#pragma unroll 1
  for (int key0 = begin; key0 < some.end; key0 += C::kKeys) {
    dev::cp_async_wait<0>();
    dev::sync_threads();  // k (and q) have landed, and all warps are done with the v of the last step
    // S [rows of the warp, kKeys] = Q K^T, while V [kKeys, Dv] arrives
    load_v(key0), look_up(key0 + C::kKeys);
    clear_scores<C>(state);
    if constexpr (kFloat)
      multiply_qk_by_fma<C>(state, q_tile, k_tile, warp_row, static_cast<int>(p.head_dim));
    else
      multiply_qk<C>(state, q_tile, k_tile, warp_row);
    dev::cp_async_wait<0>();
    dev::sync_threads();  // v has landed, and all warps are done with k
    if (key0 + C::kKeys < some.end) load_k(key0 + C::kKeys);
    // S -> logits, -inf where invisible -> P, row_max, row_sum; out is rescaled
    if constexpr (C::kGeneral) options_step<C>(state, f, s, rows, warp_row, key0);
    if (key0 < all_begin) mask_step<C, true>(state, f.score, s, rows, warp_row, key0);
    if (key0 + C::kKeys > all_end) mask_step<C, false>(state, f.score, s, rows, warp_row, key0);
    softmax_step<C>(state, f.factor);
    // out [rows of the warp, Dv] += P V
    if constexpr (C::kGeneral) dropout_step<C>(state, f, rows, warp_row, key0);
    if constexpr (kFloat)
      multiply_pv_by_fma<C>(state, v_tile, static_cast<int>(p.head_dim_v));
    else
      multiply_pv<C>(state, v_tile);
  }
  finish<C>(state, f, s, rows, warp_row, q_tile);
}

// Launches the first of the instances kDims whose head dims are large enough.
template <class T, ForwardKind kKind, const auto& kDims>
void launch_forward(const ForwardParams& f, Stream stream) {
  const auto launched = [&]<size_t i>(std::integral_constant<size_t, i>) {
    if (f.attention.head_dim > kDims[i].d || f.attention.head_dim_v > kDims[i].dv) return false;
    using C = ForwardInstance<T, kDims[i].d, kDims[i].dv, kKind>;
    launch<attention_forward_kernel<C>>(dim3(static_cast<unsigned>(f.grid.blocks())), dim3(C::kThreads), C::kTile.shared_bytes, stream, f);
    return true;
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (launched(std::integral_constant<size_t, i>()) || ...);
  }(std::make_index_sequence<std::size(kDims)>());
}

}  // namespace foveate::cuda
