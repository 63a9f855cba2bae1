// softmax and log_softmax: views -> checks -> SoftmaxParams -> kernels.
#pragma once

#include "contract/softmax.h"
#include "core/tensor.h"

namespace foveate {

void softmax_forward(TensorView x, TensorView bias, TensorView mask, TensorView out, double scale, bool causal, bool log, Threads threads);
void softmax_backward(TensorView dout, TensorView out, TensorView dx, double scale, bool log, Threads threads);
void softmax_columns_forward(TensorView x, TensorView out, double scale, bool log, Threads threads);
void softmax_columns_backward(TensorView dout, TensorView out, TensorView dx, double scale, bool log, Threads threads);

}  // namespace foveate
