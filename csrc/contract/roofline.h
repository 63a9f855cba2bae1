// The limits of the machine, for the benches: how fast a CPU multiplies and adds, reads and copies, on as many threads as the kernels use.
#pragma once

#include "core/tensor.h"

namespace foveate {

// Independent multiply-add chains on registers, no memory: bfloat16 means the dot instruction with fp32 sums.
struct MultiplyAddParams {
  float* sums;    // [threads], so that the chains have a result
  int64_t steps;  // of each chain
  DType dtype;    // float32, float64, bfloat16
};

struct ReadParams {
  const float* x;  // [n]
  float* sums;     // [threads]
  int64_t n;
};

// With stores that go past the caches, where the instruction set has them: a plain store reads the line first.
struct CopyParams {
  const float* x;  // [n]
  float* out;      // [n], not overlapping x
  int64_t n;
};

}  // namespace foveate
