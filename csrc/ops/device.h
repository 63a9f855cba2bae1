// Where a call runs: on the device that all of its tensors are on.
#pragma once

#include <initializer_list>

#include "core/tensor.h"
#include "cuda/host/kernels.h"

namespace foveate {

struct CallDevice {
  bool cuda = false;
  int index = 0;
  bool readable = true;  // the values of its tensors can be read here, at once: not those on a GPU
};

// Undefined tensors are anywhere. Throws if the others are not together.
CallDevice device_of(std::initializer_list<const TensorView*> tensors);

// What the kernels of a CUDA call take beside their params: torch's current stream on that device.
cuda::Stream current_stream(const CallDevice& device);

// The source of current_stream, set once by the bindings.
using StreamOfDevice = void* (*)(int device);
void set_stream_source(StreamOfDevice source);

}  // namespace foveate
