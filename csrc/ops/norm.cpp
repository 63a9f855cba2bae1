#include "ops/norm.h"

#include "cpu/kernels.h"
#include "cpu/target.h"

namespace foveate {

void rms_norm_forward(TensorView x, TensorView weight, TensorView out, TensorView rstd, double eps, int threads) {
  check_rank(x, "x", 2);
  check_last_contiguous(x, "x");
  const int64_t rows = x.shape[0], cols = x.shape[1];
  check_rank(out, "out", 2), check_size(out, "out", 0, rows), check_size(out, "out", 1, cols);
  check_contiguous(out, "out"), check_dtype(out, "out", x.dtype);
  if (weight.defined()) check_rank(weight, "weight", 1), check_size(weight, "weight", 0, cols), check_contiguous(weight, "weight"), check_dtype(weight, "weight", x.dtype);
  if (rstd.defined()) check_rank(rstd, "rstd", 1), check_size(rstd, "rstd", 0, rows), check_contiguous(rstd, "rstd"), check_dtype(rstd, "rstd", DType::kFloat32);
  if (rows == 0 || cols == 0) return;
  const RmsNormParams p{x.data, weight.data, out.data, rstd.as<float>(), rows, cols, x.stride[0], eps, x.dtype};
  cpu::kernels().rms_norm_forward(p, threads);
}

}  // namespace foveate
