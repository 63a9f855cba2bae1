// What one warp does with 16 query rows and 16 keys: scores = q k^T and out += p v, by mma.m16n8k16 where q is bf16 or fp16, by fused
// multiply-adds where it is fp32. Both leave the elements where mma leaves them: with g = lane / 4 and t = lane % 4, c[n][0..3] are
// (row g, column 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1).
//
// Tiles lie in shared memory, 16 rows of `row_bytes`, an odd multiple of 16, so that the 8 rows that ldmatrix (or 8 lanes) read at once
// fall into different banks.
#pragma once

#include "cuda/kv_cache/decode_layout.h"
#include "cuda/rows/row.cuh"

namespace foveate::cuda {

// scores[n] = q . k over dim elements, a multiple of 16.
template <class T>
__device__ __forceinline__ void score_tile(float (&scores)[2][4], uint32_t q, int q_row_bytes, uint32_t k, int k_row_bytes, int dim) {
  const int lane = dev::lane();
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] = 0;
  if constexpr (sizeof(T) == 2) {
    uint32_t q_at = q + lane % 16 * q_row_bytes + lane / 16 * 16;
    uint32_t k_at = k + (lane % 8 + lane / 16 * 8) * k_row_bytes + lane / 8 % 2 * 16;
#pragma unroll 4
    for (int d = 0; d < dim; d += 16, q_at += 32, k_at += 32) {
      uint32_t a[4], b[4];
      dev::ldmatrix_x4(a, q_at);
      dev::ldmatrix_x4(b, k_at);
      dev::mma_m16n8k16<T>(scores[0], a, b[0], b[1]);
      dev::mma_m16n8k16<T>(scores[1], a, b[2], b[3]);
    }
  } else {
    const uint32_t q_at = q + lane / 4 * q_row_bytes, k_at = k + lane % 4 * 2 * k_row_bytes;
    for (uint32_t d = 0; d < 4u * dim; d += 16) {
      const float4 q0 = dev::ld_shared<float4>(q_at + d), q1 = dev::ld_shared<float4>(q_at + 8 * q_row_bytes + d);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 key = dev::ld_shared<float4>(k_at + (8 * n + c) * k_row_bytes + d);
          scores[n][c] += q0.x * key.x + q0.y * key.y + q0.z * key.z + q0.w * key.w;
          scores[n][2 + c] += q1.x * key.x + q1.y * key.y + q1.z * key.z + q1.w * key.w;
        }
    }
  }
}

// out[n] += p . v for columns 8n.. below dim, a multiple of 16.
template <class T, int kColumns>
__device__ __forceinline__ void value_tile(float (&out)[kColumns / 8][4], const float (&p)[2][4], uint32_t v, int v_row_bytes, int dim) {
  const int lane = dev::lane();
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {dev::pack<T>(p[0][0], p[0][1]), dev::pack<T>(p[0][2], p[0][3]), dev::pack<T>(p[1][0], p[1][1]),
                           dev::pack<T>(p[1][2], p[1][3])};
    const uint32_t v_at = v + lane % 16 * v_row_bytes + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      if (8 * n >= dim) break;
      uint32_t b[4];
      dev::ldmatrix_x4_trans(b, v_at + 16 * n);
      dev::mma_m16n8k16<T>(out[n], a, b[0], b[1]);
      dev::mma_m16n8k16<T>(out[n + 1], a, b[2], b[3]);
    }
  } else {
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          // Key 8 * half + 2 * pair + c: its weights are in lane `pair` of each row's four.
          const float p0 = dev::shfl_idx(p[half][c], (lane & ~3) | pair), p1 = dev::shfl_idx(p[half][2 + c], (lane & ~3) | pair);
          const uint32_t v_at = v + (8 * half + 2 * pair + c) * v_row_bytes + lane % 4 * 8;
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            if (8 * n >= dim) break;
            const float2 value = dev::ld_shared<float2>(v_at + 32 * n);
            out[n][0] += p0 * value.x;
            out[n][1] += p0 * value.y;
            out[n][2] += p1 * value.x;
            out[n][3] += p1 * value.y;
          }
        }
  }
}

// A tile of int8 or fp8 becomes one of T, times the scale of each row. dim: a multiple of 16.
template <class T, class S>
__device__ __forceinline__ void widen_tile(uint32_t to, int to_row_bytes, uint32_t from, int from_row_bytes, uint32_t scales, int dim) {
  const int chunks = dim / 16;
  for (int item = dev::lane(); item < kTileKeys * chunks; item += 32) {
    const int row = item / chunks, chunk = item % chunks;
    const auto raw = dev::ld_shared<Packed<S, 16>>(from + row * from_row_bytes + chunk * 16);
    const float scale = dev::ld_shared<float>(scales + 4 * row);
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = dev::to_float(raw.lane[i]) * scale;
#pragma unroll
    for (int i = 0; i < 16; i += kVec<T>)
      dev::st_shared(to + row * to_row_bytes + (chunk * 16 + i) * static_cast<int>(sizeof(T)), pack_chunk<T, kVec<T>>(x + i));
  }
}

// Copies 16 rows to a tile asynchronously, kBytes at a time. Lane first_lane + r holds the place of row r in the cache, in bytes; below 0
// there is none, and the row becomes zeros.
template <int kBytes>
__device__ __forceinline__ void copy_tile(uint32_t to, int to_row_bytes, const char* from, int64_t place, int first_lane, int row_bytes) {
  const int parts = row_bytes / kBytes, row_step = 32 / parts, part_step = 32 % parts;
  int row = dev::lane() / parts, part = dev::lane() % parts;
  for (int item = 0; item < kTileKeys * parts; item += 32) {  // of lane 0
    const int64_t at = dev::shfl_idx(place, first_lane + min(row, kTileKeys - 1));
    if (row < kTileKeys) {
      const uint32_t target = to + row * to_row_bytes + part * kBytes;
      const char* source = from + (at < 0 ? 0 : at) + part * kBytes;
      if constexpr (kBytes >= 4) {
        dev::cp_async<kBytes>(target, source, at >= 0);
      } else {
        using Raw = std::conditional_t<kBytes == 2, uint16_t, uint8_t>;
        dev::st_shared<Raw>(target, at < 0 ? Raw{0} : dev::ld_global<Raw>(source));
      }
    }
    row += row_step;
    part += part_step;
    if (part >= parts) part -= parts, ++row;
  }
}

}  // namespace foveate::cuda
