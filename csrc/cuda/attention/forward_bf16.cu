#include "cuda/attention/forward.cuh"

namespace foveate::cuda {

void attention_forward_bf16(const ForwardParams& f, ForwardKind kind, Stream stream) {
  switch (kind) {
    case ForwardKind::kPlain: return launch_forward<bf16, ForwardKind::kPlain, kForwardDims>(f, stream);
    case ForwardKind::kPaged: return launch_forward<bf16, ForwardKind::kPaged, kForwardDims>(f, stream);
    case ForwardKind::kGeneral: return launch_forward<bf16, ForwardKind::kGeneral, kGeneralForwardDims>(f, stream);
  }
}

}  // namespace foveate::cuda
