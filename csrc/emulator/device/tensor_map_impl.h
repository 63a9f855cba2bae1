// Tensor maps of the emulator: the specification itself, in the 128 bytes that the driver would fill.
#pragma once

namespace foveate::cuda {

TensorMap make_tensor_map(const TensorMapSpec& spec);

}  // namespace foveate::cuda
