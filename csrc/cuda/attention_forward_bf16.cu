#include "cuda/attention_forward.cuh"

namespace foveate::cuda {

void attention_forward_bf16(const ForwardParams& f, bool general, Stream stream) {
  if (general)
    launch_forward<bf16, true, kGeneralForwardDims>(f, stream);
  else
    launch_forward<bf16, false, kForwardDims>(f, stream);
}

}  // namespace foveate::cuda
