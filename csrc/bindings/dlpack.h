// The part of DLPack 1.x that reading a tensor needs, written from its published C layout: a plain tensor and the exchange table that
// torch puts on torch.Tensor.__dlpack_c_exchange_api__ (torch 2.10 and later).
#pragma once

#include <cstdint>

namespace foveate::dlpack {

enum DeviceCode : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kFloat8E4M3FN = 10 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t version_major;
  uint32_t version_minor;
  void* previous;
  void* allocator;
  void* managed_from_py;
  void* managed_to_py;
  int (*tensor_from_py)(void* py_object, Tensor* out);  // borrows; 0 on success, else a Python error is set
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace foveate::dlpack
