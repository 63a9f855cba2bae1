// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.
#pragma once

#include "core/tensor.h"

namespace foveate {

// "acc" is float, and double where dtype is float64.
struct RmsNormParams {
  const void* x;       // [rows, cols], row stride x_stride
  const void* weight;  // [cols], weight_dtype: that of x, or float32; may be null
  void* out;           // [rows, cols], contiguous
  void* rstd;          // acc [rows]; may be null
  int64_t rows, cols, x_stride;
  double eps;
  DType dtype, weight_dtype;
};

// With n = x * rstd and g = dout * weight: dx = rstd * (g - n * mean(g * n)), dweight = sum over the rows of dout * n.
struct RmsNormBackwardParams {
  const void* dout;     // [rows, cols], contiguous
  const void* x;        // [rows, cols], row stride x_stride
  const void* weight;   // as above
  const void* rstd;     // acc [rows]
  void* dx;             // [rows, cols], contiguous
  void* dweight_parts;  // acc [parts, cols], one partial sum for each contiguous share of the rows; may be null
  int64_t rows, cols, x_stride, parts;
  DType dtype, weight_dtype;
};

}  // namespace foveate
