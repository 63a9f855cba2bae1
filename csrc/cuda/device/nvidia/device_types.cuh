// What the declarations of device.cuh need under nvcc.
#pragma once

namespace foveate::cuda::dev {

struct Site {
  static __device__ constexpr Site here() { return {}; }
};

}  // namespace foveate::cuda::dev
