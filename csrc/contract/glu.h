// swiglu and geglu: out = gate * sigmoid(h(gate)) * up, with h(g) = g for SiLU and 2 * sqrt(2 / pi) * (g + 0.044715 * g^3) for GELU in its
// tanh form, which is the same function.
#pragma once

#include "core/tensor.h"

namespace foveate {

struct GluParams {
  const void* gate;  // [rows, cols], row stride gate_stride
  const void* up;    // [rows, cols], row stride up_stride
  const void* dout;  // [rows, cols], contiguous; backward only
  void* out;         // [rows, cols], contiguous; forward only
  void* dgate;       // [rows, cols], contiguous; backward only
  void* dup;         // the same
  int64_t rows, cols, gate_stride, up_stride;
  bool gelu;
  DType dtype;
};

}  // namespace foveate
