// Runs the blocks of a grid on the CPU.
#pragma once

#include <cstddef>
#include <string_view>

#include "emulator/include/cuda_runtime.h"

namespace foveate::emulator {

// A kernel with its parameters, without its type.
struct Kernel {
  void (*run)(const void* params);
  const void* params;
  std::string_view signature;  // of launch<kernel>, which has the kernel's name in it
  const char* symbol;          // the mangled name of Symbol<kernel>, for the PTX machine
  size_t params_bytes;
};
template <auto kernel>
struct Symbol {};

void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t smem_bytes);

}  // namespace foveate::emulator
