#include "core/check.h"
#include "cuda/kernels.h"

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

std::vector<std::pair<std::string, bool>> compiled_kernels() {
#ifdef FOVEATE_WITH_CUDA
  const Kernels& k = kernels();
#else
  const Kernels k{};
#endif
  return {{"attention_forward", k.attention_forward},
          {"attention_backward", k.attention_backward},
          {"kv_append", k.kv_append},
          {"decode", k.decode},
          {"rotate_queries", k.rotate_queries},
          {"softmax_forward", k.softmax_forward},
          {"softmax_backward", k.softmax_backward},
          {"cross_entropy_forward", k.cross_entropy_forward},
          {"cross_entropy_backward", k.cross_entropy_backward},
          {"rms_norm_forward", k.rms_norm_forward},
          {"rms_norm_backward", k.rms_norm_backward},
          {"rotary", k.rotary},
          {"copy_pages", k.copy_pages}};
}

}  // namespace foveate::cuda
