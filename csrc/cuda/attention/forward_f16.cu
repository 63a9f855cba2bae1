#include "cuda/attention/forward.cuh"

namespace foveate::cuda {

void attention_forward_f16(const ForwardParams& f, ForwardKind kind, Stream stream) {
  switch (kind) {
    case ForwardKind::kPlain: return launch_forward<f16, ForwardKind::kPlain, kForwardDims>(f, stream);
    case ForwardKind::kPaged: return launch_forward<f16, ForwardKind::kPaged, kForwardDims>(f, stream);
    case ForwardKind::kGeneral: return launch_forward<f16, ForwardKind::kGeneral, kGeneralForwardDims>(f, stream);
  }
}

}  // namespace foveate::cuda
