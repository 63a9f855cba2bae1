// Which operands the kernels may load and store 16 bytes at a time: a pure function of addresses, sizes and strides.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

#include "contract/attention.h"

namespace foveate::cuda {

struct RowShape {
  int64_t batch, seq, heads, dim;
};

// Every row begins at a multiple of 16 bytes and fills its last 16, and 32 bits can count the 16-byte units of the whole. The stride of a
// dimension of one element does not matter.
inline bool suits_vectors(const Rows& x, const RowShape& shape, DType dtype) {
  const int64_t unit = 16 / size_of(dtype);
  int64_t last = 0;
  for (const auto& [size, stride] : {std::pair{shape.batch, x.batch}, {shape.seq, x.seq}, {shape.heads, x.head}}) {
    if (size <= 1) continue;
    if (stride % unit != 0) return false;
    last += (size - 1) * stride;
  }
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && shape.dim % unit == 0 && last / unit < std::numeric_limits<uint32_t>::max();
}

}  // namespace foveate::cuda
