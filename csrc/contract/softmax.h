// softmax and log_softmax over the last dimension, with the options of attention's scores: s = scale * x + bias, masks, softmax.
#pragma once

#include "core/tensor.h"

namespace foveate {

struct SoftmaxParams {
  const void* x;       // [..., cols], last dimension contiguous
  void* out;           // [..., cols], contiguous, same dtype as x
  const void* bias;    // [..., cols] by strides of 0 where it broadcasts, bias_dtype; its last dimension has stride 1 or 0; may be null
  const int8_t* mask;  // bool, true = keep, strides as for bias; may be null
  int64_t rows, cols, causal_rows;  // causal_rows: size of the dimension before the last, 0 without causal
  int ndim;                         // dimensions before the last, merged as far as the strides allow
  int64_t shape[kMaxDims], x_stride[kMaxDims], bias_stride[kMaxDims], mask_stride[kMaxDims];
  bool bias_per_column, mask_per_column;  // false: one value for the whole row
  double scale;
  bool log;
  DType dtype, bias_dtype;
};

// softmax: dx = scale * out * (dout - sum(dout * out)); log_softmax: dx = dout - exp(out) * sum(dout). All [rows, cols], contiguous.
struct SoftmaxBackwardParams {
  const void *dout, *out;
  void* dx;  // dtype, or float32 where dx_wide
  int64_t rows, cols;
  double scale;
  bool log, dx_wide;
  DType dtype;
};

// Over a dimension that is not the last, on the CPU: all [outer, cols, inner], contiguous.
struct SoftmaxColumnsParams {
  const void* x;
  void* out;
  int64_t outer, cols, inner;
  double scale;
  bool log;
  DType dtype;
};
struct SoftmaxColumnsBackwardParams {
  const void *dout, *out;
  void* dx;  // dtype, or float32 where dx_wide
  int64_t outer, cols, inner;
  double scale;
  bool log, dx_wide;
  DType dtype;
};

}  // namespace foveate
