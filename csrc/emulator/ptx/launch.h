// Launches of the package's kernels as nvcc compiled them, in place of their sources: on where FOVEATE_EMULATOR_PTX names a folder of .ptx files.
#pragma once

#include <string>

#include "emulator/execution/launch.h"

namespace foveate::emulator::ptx {

// FOVEATE_EMULATOR_PTX, "" if the emulator runs the sources.
std::string folder_from_environment();

// Like emulator::run_grid. Throws std::runtime_error if the folder has no entry of the kernel's name.
void run_grid(const std::string& folder, const Kernel& kernel, dim3 grid, dim3 block, size_t smem_bytes);

}  // namespace foveate::emulator::ptx
