// What appending to a KV cache and attending to it share: where a key lies, and the rotation of one head's row.
#pragma once

#include <memory>
#include <new>

#include "contract/kv_cache.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

// Not std::vector: its functions, compiled here for this instruction set, could be what the linker keeps for all.
struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float, AlignedDelete>;
inline AlignedFloats aligned_floats(int64_t n) {
  return AlignedFloats(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t{64})));
}

// Position t of sequence b, as batch (or page) and row of the cache.
struct Slot {
  int64_t batch, row;
};
FOVEATE_INLINE Slot slot_of(const KvCacheParams& p, int64_t b, int64_t t) {
  if (!p.block_table) return {b, t};
  return {p.block_table[b * p.block_table_stride + t / p.page_size], t % p.page_size};
}

template <class T>
FOVEATE_INLINE void load_floats(float* out, const void* in, int64_t begin, int64_t n) {
  const T* p = static_cast<const T*>(in) + begin;
  for (int64_t i = 0; i < n; i += kLanes<float>) store_n(out + i, load_n<float>(p + i, n - i), n - i);
}
FOVEATE_INLINE void load_floats(float* out, const void* in, int64_t begin, int64_t n, DType dtype) {
  if (dtype == DType::kFloat32)
    load_floats<float>(out, in, begin, n);
  else if (dtype == DType::kBFloat16)
    load_floats<bf16>(out, in, begin, n);
  else
    load_floats<f16>(out, in, begin, n);
}

// Rotates the pairs (x[c], x[c + pairs]), or (x[2c], x[2c + 1]) when interleaved, by the angles of one position. x: [>= 2 * pairs]
FOVEATE_INLINE void rotate_row(float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : pairs;
  for (int64_t c = 0; c < pairs; ++c) {
    const float a = x[c * step], b = x[c * step + other];
    x[c * step] = a * cos[c] - b * sin[c];
    x[c * step + other] = b * cos[c] + a * sin[c];
  }
}

}  // namespace foveate::cpu::FOVEATE_ISA
