// rms_norm: y = h / sqrt(mean(h^2) + eps) * weight over the last dimension, where h is x, or x + residual rounded to the dtype of x.
#pragma once

#include "core/tensor.h"

namespace foveate {

// "acc" is float, and double where dtype is float64.
struct RmsNormParams {
  const void* x;       // [rows, cols], row stride x_stride
  const void* weight;  // [cols], weight_dtype: that of x, or float32; may be null
  const void* residual;  // [rows, cols], row stride residual_stride, in the dtype of x; may be null
  void* sum;           // h [rows, cols], contiguous; null without a residual
  void* out;           // [rows, cols], contiguous
  void* rstd;          // acc [rows]; may be null
  int64_t rows, cols, x_stride, residual_stride;
  double eps;
  DType dtype, weight_dtype;
};

// With n = x * rstd and g = dout * weight: dx = rstd * (g - n * mean(g * n)) + dsum, dweight = sum over the rows of dout * n.
struct RmsNormBackwardParams {
  const void* dout;     // [rows, cols], contiguous
  const void* x;        // [rows, cols], row stride x_stride
  const void* weight;   // as above
  const void* rstd;     // acc [rows]
  const void* dsum;     // [rows, cols], contiguous: the gradient of x = h as a result of its own; may be null
  void* dx;             // [rows, cols], contiguous
  void* dweight_parts;  // acc [parts, cols], one partial sum for each contiguous share of the rows; may be null
  int64_t rows, cols, x_stride, parts;
  DType dtype, weight_dtype;
};

}  // namespace foveate
