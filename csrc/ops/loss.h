// cross_entropy: views -> checks -> CrossEntropyParams -> kernels.
#pragma once

#include "contract/loss.h"
#include "core/tensor.h"

namespace foveate {

void cross_entropy_forward(TensorView logits, TensorView target, TensorView loss, TensorView stats, CrossEntropyOptions options,
                           Threads threads);
void cross_entropy_backward(TensorView dloss, TensorView logits, TensorView target, TensorView stats, TensorView dlogits,
                            CrossEntropyOptions options, Threads threads);

}  // namespace foveate
