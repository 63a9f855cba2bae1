// What the CUDA runtime says of this machine. The runtime is linked statically and finds the driver at run time, so the module
// loads and answers on a machine without a GPU or a driver.
#pragma once

#include <string>

namespace foveate::cuda {

struct RuntimeInfo {
  int runtime_version;  // 13000 is CUDA 13.0
  int driver_version;   // newest CUDA that the driver serves; 0 without a driver
  int device_count;     // 0 without a driver
  std::string error;    // why there is no device; empty if there is one
};

RuntimeInfo runtime_info();

}  // namespace foveate::cuda
