// The limits of the machine, for the benches: views -> checks -> params -> kernels.
#pragma once

#include <string>

#include "contract/roofline.h"
#include "core/tensor.h"

namespace foveate {

// Returns the floating-point operations that it did; 0 if the CPU target has no such instruction.
int64_t multiply_add(TensorView sums, const std::string& dtype, int64_t steps, Threads threads);
void read_memory(TensorView x, TensorView sums, Threads threads);
void copy_memory(TensorView x, TensorView out, Threads threads);

}  // namespace foveate
