// Tensor maps by the CUDA driver. Its function is looked up at run time: the package does not link libcuda.
#pragma once

#include <cuda.h>

#include "cuda/host/launch.h"

namespace foveate::cuda {

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
               "the driver's cuTensorMapEncodeTiled was not found");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  const CUtensorMapDataType type = spec.dtype == DType::kBFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : spec.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : spec.dtype == DType::kFloat32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUtensorMapSwizzle swizzle = spec.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : spec.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : spec.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  const uint32_t element_strides[kMaxTmaRank] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status = encode(reinterpret_cast<CUtensorMap*>(&map), type, spec.rank, const_cast<void*>(spec.data), spec.size,
                                 spec.stride_bytes, spec.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::ostringstream text;
    text << "the driver refuses a tensor map of rank " << spec.rank << " with rows of " << spec.size[0] << " and a box with rows of "
         << spec.box[0] << " elements: CUresult " << status;
    throw std::runtime_error(text.str());
  }
  return map;
}

}  // namespace foveate::cuda
