// The memory of a tensor that a call has been given. Only the emulator, in a test build, keeps kernels out of all other memory.
#pragma once

#include "core/tensor.h"

namespace foveate {

class Reachable {
 public:
  void set(const TensorView&) {}
};

}  // namespace foveate
