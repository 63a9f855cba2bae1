// Conversions that are the same plain arithmetic on a GPU and in the emulator.
#pragma once

namespace foveate::cuda::dev {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(int8_t x) { return x; }
__device__ inline float to_float(f8e4m3 x) {
  // Exponent and mantissa moved to float's place, then scaled by 2^120, the difference of the biases: denormals come out right too.
  const uint32_t magnitude = x.bits & 0x7f, sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  if (magnitude == 0x7f) return __uint_as_float(sign | 0x7fc00000u);
  return __uint_as_float(__float_as_uint(__uint_as_float(magnitude << 20) * 0x1p120f) | sign);
}

// sm_80 has no instruction for it.
__device__ inline f8e4m3 round_to_f8e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
  const float magnitude = fminf(fabsf(x), 448.0f);  // fminf drops a NaN
  uint32_t code;
  if (x != x) return f8e4m3{0x7f};
  if (magnitude < 0x1p-6f) {
    code = __float_as_uint(magnitude + 0x1p14f) - __float_as_uint(0x1p14f);  // denormal: the sum's last bit is 2^-9
  } else {
    const uint32_t u = __float_as_uint(magnitude);
    code = ((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120u << 3);  // the biases differ by 120
  }
  return f8e4m3{static_cast<uint8_t>(sign | code)};
}

__device__ inline int8_t round_to_int8(float x) {
  return x != x ? static_cast<int8_t>(0) : static_cast<int8_t>(rintf(fminf(fmaxf(x, -128.0f), 127.0f)));
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, f8e4m3>) {
    return round_to_f8e4m3(x);
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return round_to_int8(x);
  } else {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return make_float2(to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)}));
}

}  // namespace foveate::cuda::dev
