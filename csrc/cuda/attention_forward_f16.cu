#include "cuda/attention_forward.cuh"

namespace foveate::cuda {

void attention_forward_f16(const ForwardParams& f, bool general, Stream stream) {
  if (general)
    launch_forward<f16, true, kGeneralForwardDims>(f, stream);
  else
    launch_forward<f16, false, kForwardDims>(f, stream);
}

}  // namespace foveate::cuda
