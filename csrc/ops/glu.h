// swiglu and geglu: views -> checks -> GluParams -> kernels.
#pragma once

#include "contract/glu.h"
#include "core/tensor.h"

namespace foveate {

void glu_forward(TensorView gate, TensorView up, TensorView out, bool gelu, Threads threads);
void glu_backward(TensorView dout, TensorView gate, TensorView up, TensorView dgate, TensorView dup, bool gelu, Threads threads);

}  // namespace foveate
