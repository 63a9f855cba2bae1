#include "cuda/attention/forward.cuh"

namespace foveate::cuda {

void attention_forward_f32(const ForwardParams& f, Stream stream) {
  launch_forward<float, ForwardKind::kGeneral, kGeneralForwardDims>(f, stream);
}

}  // namespace foveate::cuda
