// Where a kernel is launched. Plain C++: the op layer passes it on without knowing CUDA.
#pragma once

namespace foveate::cuda {

struct Stream {
  int device;    // CUDA device index
  void* handle;  // cudaStream_t; nullptr is the legacy default stream
};

}  // namespace foveate::cuda
