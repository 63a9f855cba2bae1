#include "core/check.h"
#include "cuda/host/kernels.h"

namespace foveate::cuda {

#ifdef FOVEATE_WITH_CUDA
const Kernels& kernels() {
  static const Kernels table{
      .attention_forward = attention_forward,
      .attention_backward = attention_backward,
      .attention_backward_workspace = attention_backward_workspace,
      .kv_append = kv_append,
      .decode = decode,
      .rotate_queries = rotate_queries,
      .softmax_forward = softmax_forward,
      .softmax_backward = softmax_backward,
      .cross_entropy_forward = cross_entropy_forward,
      .cross_entropy_backward = cross_entropy_backward,
      .rms_norm_forward = rms_norm_forward,
      .rms_norm_backward = rms_norm_backward,
      .rotary = rotary,
      .copy_pages = copy_pages,
  };
  return table;
}
#else
const Kernels& kernels() { fail("this build has no CUDA kernels (FOVEATE_CUDA=OFF, or no nvcc was found): use backend='triton'"); }
#endif

}  // namespace foveate::cuda
