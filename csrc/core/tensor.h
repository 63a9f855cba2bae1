// What the op layer (ops/) knows of a tensor: pointer, type, device, sizes, strides in elements.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

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

// Checks of one tensor, in the order in which they are written:
//   expect(lse, "lse").rank(3).dtype(acc).last_contiguous();
class Expect {
 public:
  Expect(const TensorView& t, const char* what) : t_(t), what_(what) {}

  const Expect& rank(int ndim) const {
    check(t_.ndim == ndim, what_, " has ", t_.ndim, " dimensions, expected ", ndim);
    return *this;
  }
  const Expect& size(int dim, int64_t size) const {
    check(t_.shape[dim] == size, what_, " has size ", t_.shape[dim], " in dimension ", dim, ", expected ", size);
    return *this;
  }
  const Expect& shape(std::initializer_list<int64_t> sizes) const {
    rank(static_cast<int>(sizes.size()));
    int dim = 0;
    for (const int64_t n : sizes) size(dim++, n);
    return *this;
  }
  const Expect& shape_of(const TensorView& other) const {
    rank(other.ndim);
    for (int dim = 0; dim < other.ndim; ++dim) size(dim, other.shape[dim]);
    return *this;
  }
  const Expect& dtype(DType dtype) const {
    check(t_.dtype == dtype, what_, " is ", name(t_.dtype), ", expected ", name(dtype));
    return *this;
  }
  const Expect& floating() const {
    check(t_.dtype == DType::kFloat32 || t_.dtype == DType::kFloat64 || t_.dtype == DType::kFloat16 || t_.dtype == DType::kBFloat16, what_,
          " is ", name(t_.dtype), "; the kernels take float32, bfloat16, float16 and (on the CPU) float64");
    return *this;
  }
  const Expect& last_contiguous() const {
    check(t_.ndim == 0 || t_.shape[t_.ndim - 1] <= 1 || t_.stride[t_.ndim - 1] == 1 || t_.numel() == 0, what_,
          ": the last dimension must be contiguous, its stride is ", t_.ndim ? t_.stride[t_.ndim - 1] : 0);
    return *this;
  }
  const Expect& contiguous() const {
    int64_t expected = 1;
    for (int i = t_.ndim - 1; i >= 0; --i) {
      check(t_.shape[i] <= 1 || t_.stride[i] == expected || t_.numel() == 0, what_, " must be contiguous, but dimension ", i,
            " has stride ", t_.stride[i]);
      expected *= t_.shape[i];
    }
    return *this;
  }

 private:
  const TensorView& t_;
  const char* what_;
};
inline Expect expect(const TensorView& t, const char* what) { return {t, what}; }

}  // namespace foveate
