// Rotary embedding: one thread for each 16 bytes of the output, so that x is read and written once. The angles of a token are read by all
// of its heads, and come from the caches.
#include "core/math.h"
#include "cuda/host/kernels.h"
#include "cuda/rows/rotate.cuh"

namespace foveate::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryParams p) {
  const int64_t chunks = chunks_of(p.dim, kVec<T>), all = p.batch * p.seq * p.heads * chunks;
  const bool wide = p.table_dtype == DType::kFloat32;
  const int64_t table_bytes = wide ? 4 : sizeof(T);
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < all; item += int64_t{gridDim.x} * kThreads) {
    const int64_t j = item % chunks * kVec<T>, head = item / chunks;
    const int64_t h = head % p.heads, token = head / p.heads, s = token % p.seq, b = token / p.seq;
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + s * p.x_stride[1] + h * p.x_stride[2];
    const Angles angles{static_cast<const char*>(p.cos) + (b * p.cos_stride[0] + s * p.cos_stride[1]) * table_bytes,
                        static_cast<const char*>(p.sin) + (b * p.sin_stride[0] + s * p.sin_stride[1]) * table_bytes,
                        wide,
                        p.pairs,
                        p.interleaved,
                        p.inverse ? -1.0f : 1.0f};
    float y[kVec<T>];
    load_rotated(x, p.dim, angles, j, y);
    store_chunk(static_cast<T*>(p.out) + head * p.dim, j, p.dim, y);
  }
}

}  // namespace

void rotary(const RotaryParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const int64_t items = p.batch * p.seq * p.heads * ceil_div<int64_t>(p.dim, kVec<T>);
    launch<rotary_kernel<T>>(blocks_for(items, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace foveate::cuda
