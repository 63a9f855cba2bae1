// Rotary position embedding: pairs of the first `rot` elements of each head are rotated by the angles in cos and sin.
#pragma once

#include "core/tensor.h"

namespace foveate {

struct RotaryParams {
  const void* x;                         // [B, S, H, D], D contiguous
  void* out;                             // [B, S, H, D], contiguous
  const void *cos, *sin;                 // [B, S, pairs], pairs contiguous, table_dtype: that of x, or float32
  int64_t x_stride[3];                   // B, S, H
  int64_t cos_stride[2], sin_stride[2];  // B (0 without a batch dimension), S
  int64_t batch, seq, heads, dim, pairs;
  bool interleaved;  // a pair is (x[2c], x[2c + 1]), else (x[c], x[c + pairs])
  bool inverse;      // rotate back: the gradient
  DType dtype, table_dtype;
};

}  // namespace foveate
