// apply_rotary: views -> checks -> RotaryParams -> kernels.
#pragma once

#include "contract/rotary.h"
#include "core/tensor.h"

namespace foveate {

void rotary(TensorView x, TensorView cos, TensorView sin, TensorView out, bool interleaved, bool inverse, Threads threads);

}  // namespace foveate
