// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.
#pragma once

#include "core/tensor.h"

namespace foveate {

struct RmsNormParams {
  const void* x;       // [rows, cols], row stride x_stride
  const void* weight;  // [cols], same dtype as x; may be null
  void* out;           // [rows, cols], contiguous
  float* rstd;         // [rows]; may be null
  int64_t rows, cols, x_stride;
  double eps;
  DType dtype;
};

void rms_norm_forward(TensorView x, TensorView weight, TensorView out, TensorView rstd, double eps, int threads);

}  // namespace foveate
