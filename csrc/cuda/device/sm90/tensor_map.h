// What TMA knows of a tensor in global memory: base, sizes, strides, and the box that one copy moves. Made on the host, passed to a kernel
// inside its __grid_constant__ parameters.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace foveate::cuda {

// How 16-byte chunks change places in shared memory, by address: with kN, N bytes form a row, and chunk c of row r lies where chunk
// c ^ (r % (N / 16)) would be (for N = 128; 64 and 32: every second, every fourth row has the next pattern). Tiles start at multiples of
// 1024.
enum class Swizzle : uint8_t { kNone, k128, k64, k32 };

struct alignas(128) TensorMap {
  uint64_t words[16];
};

constexpr int kMaxTmaRank = 5;

// Sizes, strides and the box run from the innermost dimension out. The innermost dimension is contiguous; stride_bytes[i] belongs to
// dimension i + 1 and is a multiple of 16, as `data` is. A row of the box has at most as many bytes as the swizzle's name says. Loads fill
// what is outside the tensor with zeros, stores leave it out. Throws std::invalid_argument or, where the driver refuses,
// std::runtime_error.
struct TensorMapSpec {
  DType dtype;
  const void* data;
  int rank;  // 2..5
  uint64_t size[kMaxTmaRank];
  uint64_t stride_bytes[kMaxTmaRank - 1];
  uint32_t box[kMaxTmaRank];
  Swizzle swizzle;
};

}  // namespace foveate::cuda

#include "tensor_map_impl.h"
