#include "bindings/bind.h"

#if defined(FOVEATE_WITH_CUDA) && !defined(FOVEATE_CUDA_EMULATED)
#define FOVEATE_WITH_CUDA_RUNTIME
#include "cuda/host/runtime.h"
#endif

namespace py = pybind11;

namespace foveate {
namespace {

py::dict cuda_info() {
  py::dict info;
#ifdef FOVEATE_WITH_CUDA_RUNTIME
  const cuda::RuntimeInfo runtime = cuda::runtime_info();
  info["compiled"] = true;
  info["runtime_version"] = runtime.runtime_version;
  info["driver_version"] = runtime.driver_version;
  info["device_count"] = runtime.device_count;
  info["error"] = runtime.error;
#else
  info["compiled"] = false;
  info["runtime_version"] = 0;
  info["driver_version"] = 0;
  info["device_count"] = 0;
  info["error"] = "this build has no CUDA kernels (FOVEATE_CUDA=OFF, or no nvcc was found)";
#endif
  return info;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_info", &cuda_info,
        "whether CUDA kernels are compiled in, the CUDA versions (13000 is 13.0), the number of devices, why there are none");
  m.def(
      "has_cuda_kernels",
      [] {
#ifdef FOVEATE_WITH_CUDA
        return true;
#else
        return false;
#endif
      },
      "whether this build has CUDA kernels, or the emulator's");
#ifdef FOVEATE_CUDA_EMULATED
  m.attr("cuda_emulated") = true;
#else
  m.attr("cuda_emulated") = false;
#endif
}

}  // namespace foveate
