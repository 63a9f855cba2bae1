// The stream that a launch goes to.
#pragma once

namespace foveate::cuda {

struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t; null: the default stream
};

}  // namespace foveate::cuda
