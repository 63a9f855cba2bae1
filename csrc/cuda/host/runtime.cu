#include <cuda_runtime_api.h>

#include "cuda/host/runtime.h"

namespace foveate::cuda {

RuntimeInfo runtime_info() {
  RuntimeInfo info{CUDART_VERSION, 0, 0, ""};
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;
  const cudaError_t status = cudaGetDeviceCount(&info.device_count);
  if (status != cudaSuccess) {
    info.device_count = 0;
    info.error = info.driver_version == 0 ? "no NVIDIA driver was found" : cudaGetErrorString(status);
    cudaGetLastError();  // the error is reported here; left in place, torch would raise it at its next call
  }
  return info;
}

}  // namespace foveate::cuda
