// launch() of cuda/host/launch.h on the CPU: returns when the last block has run.
#pragma once

#include <cstddef>
#include <type_traits>
#include <typeinfo>

#include "cuda/host/stream.h"
#include "emulator/execution/launch.h"

namespace foveate::cuda {

template <auto kernel, class Params>
void launch(dim3 grid, dim3 block, size_t smem_bytes, const Stream&, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "the parameters of a kernel are copied byte by byte");
  static_assert(std::is_invocable_v<decltype(kernel), const Params&>, "the kernel takes one `const __grid_constant__ Params`");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run_grid({[](const void* p) { kernel(*static_cast<const Params*>(p)); }, &params, __PRETTY_FUNCTION__,
                      typeid(emulator::Symbol<kernel>).name(), sizeof(Params)},
                     grid, block, smem_bytes);
}

}  // namespace foveate::cuda
