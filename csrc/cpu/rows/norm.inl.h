// The norm of a row in a decoder: RMS or layer norm in fp32, whatever the row's dtype.
#pragma once

#include "contract/linear.h"
#include "cpu/simd/row.h"

namespace foveate::cpu::FOVEATE_ISA {

// y = norm(x), or += it; in place is fine.
template <class T>
void norm_row(const Norm& norm, const T* x, T* y, int64_t cols, bool accumulate) {
  constexpr int n = kLanes<float>;
  float mean = 0;
  if (norm.kind == NormKind::kLayer)
    mean = sum_row<float>(cols, [&](int64_t j, int64_t rest) { return load_n<float>(x + j, rest); }) / static_cast<float>(cols);
  float scale = 1;
  if (norm.kind != NormKind::kNone) {
    const float squares = sum_row<float>(cols, [&](int64_t j, int64_t rest) {
      const VecF v = load_n<float>(x + j, rest, mean) - mean;
      return v * v;
    });
    scale = 1 / std::sqrt(squares / static_cast<float>(cols) + norm.eps);
  }
  for (int64_t j = 0; j < cols; j += n) {
    const int64_t rest = cols - j;
    VecF v = (load_n<float>(x + j, rest) - mean) * scale;
    if (norm.weight) v *= load_n<float>(norm.weight + j, rest);
    if (norm.bias) v += load_n<float>(norm.bias + j, rest);
    if (accumulate) v += load_n<float>(y + j, rest);
    store_n(y + j, v, rest);
  }
}

}  // namespace foveate::cpu::FOVEATE_ISA
