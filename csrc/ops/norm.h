// rms_norm: views -> checks -> RmsNormParams -> kernels.
#pragma once

#include "contract/norm.h"
#include "core/tensor.h"

namespace foveate {

// residual and sum are both given or neither.
void rms_norm_forward(TensorView x, TensorView residual, TensorView weight, TensorView out, TensorView sum, TensorView rstd, double eps,
                      Threads threads);
void rms_norm_backward(TensorView dout, TensorView x, TensorView weight, TensorView rstd, TensorView dsum, TensorView dx,
                       TensorView dweight_parts, Threads threads);

}  // namespace foveate
