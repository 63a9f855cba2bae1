// torch.Tensor -> TensorView without libtorch: by the DLPack C exchange table (0.1 us a tensor), or by data_ptr(), shape and stride() on a
// torch that lacks it. None -> an undefined view. Fake and meta tensors have no memory and are refused here.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dlpack.h"
#include "core/tensor.h"
#include "reachable.h"  // of the emulator in a test build, else of cuda/device/nvidia/

namespace foveate {

TensorView tensor_from_python(pybind11::handle object);  // throws type_error for anything but a tensor or None
bool uses_dlpack_exchange();
void set_dlpack_exchange(bool enabled);  // tests run both ways in

}  // namespace foveate

namespace pybind11::detail {

template <>
struct type_caster<foveate::TensorView> {
  PYBIND11_TYPE_CASTER(foveate::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = foveate::tensor_from_python(source);
    reachable.set(value);
    return true;
  }
  foveate::Reachable reachable;  // as long as the call lasts
};

}  // namespace pybind11::detail
