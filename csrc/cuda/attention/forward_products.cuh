// The two products of the attention forward, on tensor cores for bf16 and fp16 and by FMA for fp32, and the registers they work on.
#pragma once

#include "cuda/attention/forward_params.cuh"

namespace foveate::cuda {

template <class T_, int kD_, int kDv_, ForwardKind kKind_>
struct ForwardInstance {
  using T = T_;
  static constexpr int kD = kD_, kDv = kDv_;
  static constexpr ForwardKind kKind = kKind_;
  static constexpr bool kGeneral = kKind == ForwardKind::kGeneral;
  static constexpr ForwardTile kTile = forward_tile({kD, kDv}, kKind, sizeof(T));
  static constexpr int kRows = kTile.rows, kRowsPerWarp = kTile.rows_per_warp, kKeys = kTile.keys, kThreads = kRows / kRowsPerWarp * 32;
  static constexpr int kDimsAtOnce = kD == 192 ? 2 : kD / 16;  // unrolled steps of q k^T: all of them, but where registers would spill
  static constexpr int kFragments = kRowsPerWarp / 16, kScores = kKeys / 8, kOutputs = kDv / 8;  // of 16 rows; of 8 columns
  using QTile = Tile<T, kRows, kD>;
  using KTile = Tile<T, kKeys, kD>;
  using VTile = Tile<T, kKeys, kDv>;
  static_assert(QTile::kBytes + KTile::kBytes + VTile::kBytes == kTile.shared_bytes && kTile.shared_bytes <= kLeastSharedMemory);
};

// What a warp knows of its rows. score and output are C fragments of mma (FragmentCoords in score.cuh), for fp32 too. row_max and row_sum:
// of rows lane / 4 and lane / 4 + 8 of each fragment; the maximum of the scores so far, the sum of this lane's columns.
template <class C>
struct ForwardState {
  float score[C::kFragments][C::kScores][4];
  float output[C::kFragments][C::kOutputs][4] = {};
  float row_max[C::kFragments][2], row_sum[C::kFragments][2] = {};
};

// score = q k^T, from row `warp_row` of the tile of q on.
template <class C>
__device__ __forceinline__ void multiply_qk(ForwardState<C>& state, uint32_t q_tile, uint32_t k_tile, int warp_row) {
  const Fragments<typename C::QTile, Operand::kA> q(q_tile, warp_row);
  const Fragments<typename C::KTile, Operand::kB> k(k_tile);
#pragma unroll C::kDimsAtOnce
  for (int d = 0; d < C::kD; d += 16) {
    uint32_t a[C::kFragments][4];
#pragma unroll
    for (int m = 0; m < C::kFragments; ++m) q.load(a[m], 16 * m, d);
#pragma unroll
    for (int n = 0; n < C::kScores; n += 2) {
      uint32_t b[4];
      k.load(b, 8 * n, d);
#pragma unroll
      for (int m = 0; m < C::kFragments; ++m) {
        dev::mma_m16n8k16<typename C::T>(state.score[m][n], a[m], b[0], b[1]);
        dev::mma_m16n8k16<typename C::T>(state.score[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// output += score v, with the scores rounded to T.
template <class C>
__device__ __forceinline__ void multiply_pv(ForwardState<C>& state, uint32_t v_tile) {
  const Fragments<typename C::VTile, Operand::kBTransposed> v(v_tile);
#pragma unroll
  for (int key = 0; key < C::kKeys; key += 16) {
    uint32_t a[C::kFragments][4];
#pragma unroll
    for (int m = 0; m < C::kFragments; ++m) pack_a<typename C::T>(a[m], state.score[m][key / 8], state.score[m][key / 8 + 1]);
#pragma unroll
    for (int n = 0; n < C::kOutputs; n += 2) {
      uint32_t b[4];
      v.load(b, key, 8 * n);
#pragma unroll
      for (int m = 0; m < C::kFragments; ++m) {
        dev::mma_m16n8k16<typename C::T>(state.output[m][n], a[m], b[0], b[1]);
        dev::mma_m16n8k16<typename C::T>(state.output[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// The same in fp32. A lane computes the elements of the C fragments that it owns: 2 rows (of 16) x 2 columns (of 8). Sums of 32 dims are
// added up: one long sum of 256 products would lose a bit or two.
template <class C>
__device__ __forceinline__ void multiply_qk_by_fma(ForwardState<C>& state, uint32_t q_tile, uint32_t k_tile, int warp_row, int dims) {
#pragma unroll 1
  for (int first = 0; first < dims; first += 32) {
    float part[C::kFragments][C::kScores][4] = {};
#pragma unroll 1
    for (int chunk = first / 4; chunk < first / 4 + 8; ++chunk) {
      float4 q[C::kFragments][2];
#pragma unroll
      for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          q[m][half] = dev::ld_shared<float4>(q_tile + C::QTile::offset(warp_row + 16 * m + fragment_row(2 * half), chunk));
#pragma unroll
      for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 k = dev::ld_shared<float4>(k_tile + C::KTile::offset(8 * n + fragment_column(e), chunk));
#pragma unroll
          for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& s = part[m][n][2 * half + e];
              s = fmaf(q[m][half].x, k.x, s);
              s = fmaf(q[m][half].y, k.y, s);
              s = fmaf(q[m][half].z, k.z, s);
              s = fmaf(q[m][half].w, k.w, s);
            }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
      for (int n = 0; n < C::kScores; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) state.score[m][n][e] += part[m][n][e];
  }
}

// The scores of a row lie in the 4 lanes of a quad; each of them in turn gives its own to the others.
template <class C>
__device__ __forceinline__ void multiply_pv_by_fma(ForwardState<C>& state, uint32_t v_tile, int dims) {
  const int t = dev::lane() % 4, quad = dev::lane() - t;
#pragma unroll 1
  for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
    for (int n = 0; n < C::kScores; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float p[C::kFragments][2];
#pragma unroll
        for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) p[m][half] = dev::shfl_idx(state.score[m][n][2 * half + e], quad + owner);
        const int key = 8 * n + 2 * owner + e;
#pragma unroll
        for (int c = 0; c < C::kOutputs; ++c) {
          if (8 * c >= dims) break;
          const float2 v = dev::ld_shared<float2>(v_tile + C::VTile::offset(key, 2 * c + t / 2) + t % 2 * 8);
#pragma unroll
          for (int m = 0; m < C::kFragments; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              state.output[m][c][2 * half] = fmaf(p[m][half], v.x, state.output[m][c][2 * half]);
              state.output[m][c][2 * half + 1] = fmaf(p[m][half], v.y, state.output[m][c][2 * half + 1]);
            }
        }
      }
    }
  }
}

}  // namespace foveate::cuda
