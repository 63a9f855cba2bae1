// launch() of cuda/host/launch.h on a GPU, by the CUDA runtime.
#pragma once

#include <atomic>
#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "cuda/host/stream.h"

namespace foveate::cuda {

template <class... Parts>
void check_cuda(cudaError_t status, const Parts&... doing) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // reported here; left in place, torch would raise it once more at its next call
  std::ostringstream text;
  (text << ... << doing);
  text << ": " << cudaGetErrorString(status) << " (" << cudaGetErrorName(status) << ")";
  throw std::runtime_error(text.str());
}

// Makes `device` current and restores the previous one; does nothing if it is current already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "the current CUDA device could not be read");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "CUDA device ", device, " could not be made current");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

constexpr size_t kSharedMemoryWithoutOptIn = 48 * 1024;
constexpr int kMaxDevices = 64;

// Dynamic shared memory beyond 48 KiB must be allowed for each kernel on each device, once.
template <auto kernel>
void allow_shared_memory(int device, size_t bytes) {
  static std::atomic<size_t> allowed[kMaxDevices];
  if (bytes <= kSharedMemoryWithoutOptIn || (device < kMaxDevices && bytes <= allowed[device].load(std::memory_order_relaxed))) return;
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "CUDA device ", device, " does not give a kernel ", bytes, " bytes of shared memory");
  if (device < kMaxDevices) allowed[device].store(bytes, std::memory_order_relaxed);
}

template <auto kernel, class Params>
void launch(dim3 grid, dim3 block, size_t smem_bytes, const Stream& stream, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "the parameters of a kernel are copied byte by byte");
  static_assert(std::is_invocable_v<decltype(kernel), const Params&>, "the kernel takes one `const __grid_constant__ Params`");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const DeviceGuard guard(stream.device);
  allow_shared_memory<kernel>(stream.device, smem_bytes);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, smem_bytes, static_cast<cudaStream_t>(stream.handle)),
      "a kernel could not be launched on CUDA device ", stream.device, " with a grid of ", grid.x, " x ", grid.y, " x ", grid.z,
      " blocks of ", block.x * block.y * block.z, " threads and ", smem_bytes, " bytes of shared memory");
}

}  // namespace foveate::cuda
