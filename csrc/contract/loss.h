// cross_entropy per row: log_sum - (1 - eps) * (x[target] - max) - eps * (mean(x) - max) + z_loss * lse^2, with
// x = softcap * tanh(logits / softcap), log_sum = log(sum(exp(x - max))) and lse = max + log_sum.
#pragma once

#include "core/tensor.h"

namespace foveate {

struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  double label_smoothing = 0, z_loss = 0, softcap = 0;  // softcap 0: none
};

// "acc" is float, and double where dtype is float64.
struct CrossEntropyParams {
  const void* logits;     // [rows, cols], row stride logits_stride
  const int64_t* target;  // [rows]
  void* loss;             // acc [rows]; forward only
  void* stats;            // acc [rows, 2]: max and log_sum. Kept apart, as their sum would lose the digits of log_sum under large logits
  const void* dloss;      // acc [rows], stride dloss_stride; backward only
  void* dlogits;          // [rows, cols], contiguous; may be logits itself; backward only
  int64_t rows, cols, logits_stride, dloss_stride;
  CrossEntropyOptions options;
  DType dtype;
};

}  // namespace foveate
