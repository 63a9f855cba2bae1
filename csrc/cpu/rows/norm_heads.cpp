// Norms of the heads of q and k in a decoder layer.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/rows/norm.inl.h"
#include "cpu/simd/parallel.h"

namespace foveate::cpu::FOVEATE_ISA {

void norm_heads(const NormHeadsParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    if constexpr (!std::is_same_v<T, double>) {
      parallel_for(p.tokens * p.heads, 1 + 16384 / p.cols, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i % p.heads, weight = head * p.weight_stride;
          Norm norm = p.norm;
          if (norm.weight) norm.weight += weight;
          if (norm.bias) norm.bias += weight;
          T* x = static_cast<T*>(p.x) + i / p.heads * p.x_stride + head * p.cols;
          norm_row(norm, x, x, p.cols, false);
        }
      });
    }
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
