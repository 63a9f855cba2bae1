// What the op layer (ops/) knows of a tensor: pointer, type, device, sizes, strides in elements.
#pragma once

#include <array>
#include <cstdint>

#include "core/check.h"
#include "core/dtype.h"
#include "core/threads.h"

namespace foveate {

enum class DeviceType : uint8_t { kCPU, kCUDA };

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  DeviceType device = DeviceType::kCPU;
  int device_index = 0;
  int ndim = -1;  // -1: None was passed
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> stride{};

  bool defined() const { return ndim >= 0; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {  // fits 64 bits: the bindings have looked
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // A dimension of size 1 may carry any stride, and broadcasting wants 0 there.
  int64_t broadcast_stride(int dim) const { return shape[dim] == 1 ? 0 : stride[dim]; }
};

inline void check_rank(const TensorView& t, const char* what, int ndim) {
  check(t.ndim == ndim, what, " has ", t.ndim, " dimensions, expected ", ndim);
}
inline void check_size(const TensorView& t, const char* what, int dim, int64_t size) {
  check(t.shape[dim] == size, what, " has size ", t.shape[dim], " in dimension ", dim, ", expected ", size);
}
inline void check_dtype(const TensorView& t, const char* what, DType dtype) {
  check(t.dtype == dtype, what, " is ", name(t.dtype), ", expected ", name(dtype));
}
inline void check_float(const TensorView& t, const char* what) {
  check(t.dtype == DType::kFloat32 || t.dtype == DType::kFloat64 || t.dtype == DType::kFloat16 || t.dtype == DType::kBFloat16, what, " is ",
        name(t.dtype), "; the kernels take float32, bfloat16, float16 and (on the CPU) float64");
}
inline void check_last_contiguous(const TensorView& t, const char* what) {
  check(t.ndim == 0 || t.shape[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1 || t.numel() == 0, what,
        ": the last dimension must be contiguous, its stride is ", t.ndim ? t.stride[t.ndim - 1] : 0);
}
inline void check_contiguous(const TensorView& t, const char* what) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    check(t.shape[i] <= 1 || t.stride[i] == expected || t.numel() == 0, what, " must be contiguous, but dimension ", i, " has stride ",
          t.stride[i]);
    expected *= t.shape[i];
  }
}

}  // namespace foveate
