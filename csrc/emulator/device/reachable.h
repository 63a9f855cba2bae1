// The memory of a tensor that a call has been given: kernels may touch no other.
#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"
#include "emulator/checks/global_memory.h"

namespace foveate {

class Reachable {
 public:
  void set(const TensorView& tensor) {
    if (!tensor.defined()) return;
    int64_t last = 0;
    std::string name = std::string("a tensor of ") + foveate::name(tensor.dtype) + " [";
    for (int i = 0; i < tensor.ndim; ++i) {
      last += (tensor.shape[i] - 1) * tensor.stride[i];
      name += (i ? ", " : "") + std::to_string(tensor.shape[i]);
    }
    span_.emplace(tensor.data, tensor.numel() == 0 ? 0 : (last + 1) * size_of(tensor.dtype), name + "]");
  }

 private:
  std::optional<emulator::GlobalSpan> span_;
};

}  // namespace foveate
