// What the declarations of device.cuh need under g++: CUDA's keywords, built-in types and variables, and the line of a call.
#pragma once

#include <cmath>

#include "emulator/checks/site.h"
#include "emulator/include/cuda_runtime.h"

namespace foveate::cuda::dev {

using emulator::Site;

}  // namespace foveate::cuda::dev
