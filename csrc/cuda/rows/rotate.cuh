// The rotation of a head's first 2 * pairs elements, chunk by chunk: what rotary, the append to a KV cache and decode share.
#pragma once

#include "cuda/rows/row.cuh"

namespace foveate::cuda {

// cos and sin of one position, `pairs` of each. A pair is (x[c], x[c + pairs]), or (x[2c], x[2c + 1]) when interleaved.
struct Angles {
  const void *cos, *sin;
  bool wide;  // float, else the dtype of x
  int64_t pairs;
  bool interleaved;
  float sign;  // of sin: -1 rotates back

  template <class T, int kCount>
  __device__ __forceinline__ void load(int64_t c, float (&cosine)[kCount], float (&sine)[kCount]) const {
    if (wide) {
      load_chunk<Read::kCached>(static_cast<const float*>(cos), c, pairs, 1.0f, cosine);
      load_chunk<Read::kCached>(static_cast<const float*>(sin), c, pairs, 0.0f, sine);
    } else {
      load_chunk<Read::kCached>(static_cast<const T*>(cos), c, pairs, 1.0f, cosine);
      load_chunk<Read::kCached>(static_cast<const T*>(sin), c, pairs, 0.0f, sine);
    }
  }
};

// y = the rotated row's elements from j on, j a multiple of kVec. x: n elements. Each thread reads the partners of its elements itself;
// they come from the L1 cache, where another thread of the warp has brought them.
template <class T>
__device__ __forceinline__ void load_rotated(const T* x, int64_t n, const Angles& angles, int64_t j, float (&y)[kVec<T>]) {
  constexpr int kCount = kVec<T>;
  load_chunk<Read::kCached>(x, j, n, 0.0f, y);
  const int64_t pairs = angles.pairs;
  if (j >= 2 * pairs) return;
  if (angles.interleaved) {
    float cosine[kCount / 2], sine[kCount / 2];
    angles.load<T>(j / 2, cosine, sine);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float a = y[i], b = y[i + 1], signed_sine = angles.sign * sine[i / 2];
      y[i] = a * cosine[i / 2] - b * signed_sine;
      y[i + 1] = b * cosine[i / 2] + a * signed_sine;
    }
    return;
  }
  // A chunk may reach from the first halves of pairs into the second, and from these into what is not rotated.
  float cosine[kCount], sine[kCount], other[kCount];
  if (j + kCount <= pairs) {
    angles.load<T>(j, cosine, sine);
    load_chunk<Read::kCached>(x, j + pairs, 2 * pairs, 0.0f, other);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * cosine[i] - other[i] * (angles.sign * sine[i]);
  } else if (j >= pairs) {
    angles.load<T>(j - pairs, cosine, sine);
    load_chunk<Read::kCached>(x, j - pairs, pairs, 0.0f, other);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = y[i] * cosine[i] + other[i] * (angles.sign * sine[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool second = j + i >= pairs;
      const int64_t c = second ? j + i - pairs : j + i;
      if (c >= pairs) continue;
      float one[1], cos_one[1], sin_one[1];
      angles.load<T>(c, cos_one, sin_one);
      load_chunk<Read::kCached>(x, second ? c : c + pairs, n, 0.0f, one);
      y[i] = y[i] * cos_one[0] + one[0] * (second ? angles.sign : -angles.sign) * sin_one[0];
    }
  }
}

}  // namespace foveate::cuda
