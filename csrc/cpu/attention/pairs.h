// P and dS of the backward as operands in bf16. A unit is two elements that are neighbours along the sum: pairs of queries for P^T dO and
// dS^T Q, pairs of keys for dS K. x is [rows, stride] in fp32, of which the columns [begin, end) count; rows are even.
#pragma once

#include "cpu/attention/pack.h"

namespace foveate::cpu::FOVEATE_ISA {

// Elements of two rows side by side.
FOVEATE_INLINE vec<uint32_t, kLanes<float>> rounded_pairs(const float* low, const float* high) {
  constexpr int w = kLanes<float>;
  const auto bits = [](VecF v) {
    bf16 rounded[w];
    store(rounded, v);
    return widen<uint32_t>(load_raw<vec<uint16_t, w>>(rounded));
  };
  return bits(load_raw<VecF>(low)) | bits(load_raw<VecF>(high)) << 16;
}

// out [rows / 2][stride]
FOVEATE_INLINE void pair_rows(const float* x, int64_t rows, int64_t begin, int64_t end, int64_t stride, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = begin; c < end; c += kLanes<float>)
      store_raw(out + r / 2 * stride + c, rounded_pairs(x + r * stride + c, x + (r + 1) * stride + c));
}

// out [columns][out_stride]: the pairs of a column side by side, which is operand A of AMX. rows are a multiple of two vectors.
FOVEATE_INLINE void pair_rows_of_columns(const float* x, int64_t rows, int64_t begin, int64_t end, int64_t stride, uint32_t* out,
                                         int64_t out_stride) {
  constexpr int w = kLanes<float>;
  for (int64_t r = 0; r < rows; r += 2 * w)
    for (int64_t c = begin; c < end; c += w) {
      vec<uint32_t, w> pairs[w];
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) {
        const float* low = x + (r + 2 * i) * stride + c;
        pairs[i] = rounded_pairs(low, low + stride);
      }
      transpose_steps<w, 1>(pairs);
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) store_raw(out + (c + i) * out_stride + r / 2, pairs[i]);
    }
}

// out [rows][stride / 2]
FOVEATE_INLINE void pair_columns(const float* x, int64_t rows, int64_t begin, int64_t end, int64_t stride, uint32_t* out) {
  bf16* rounded = reinterpret_cast<bf16*>(out);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = begin; c < end; c += kLanes<float>) store(rounded + r * stride + c, load_raw<VecF>(x + r * stride + c));
}

}  // namespace foveate::cpu::FOVEATE_ISA
