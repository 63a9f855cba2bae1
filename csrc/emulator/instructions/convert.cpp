// Conversions and approximate math on the CPU.
#include <cmath>

#include "cuda/device/device.cuh"

namespace foveate::emulator {

float float_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Exponent and mantissa moved to float's place, then scaled by 2^112, the difference of the biases.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
}

uint16_t half_from_float(float x) {
  if (x != x) return 0x7fff;
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  const uint32_t u = std::bit_cast<uint32_t>(magnitude);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f) {  // denormal: the last bit of the sum is 2^-24
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f)));
  }
  return static_cast<uint16_t>(sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112u << 10)));
}

uint16_t bfloat_from_float(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

namespace {
// .ftz: subnormal numbers become zeros of their sign.
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace

float exp2_approx(float x) { return flush(std::exp2(flush(x))); }
float log2_approx(float x) { return std::log2(flush(x)); }
float rcp_approx(float x) { return flush(1.0f / flush(x)); }
float rsqrt_approx(float x) { return flush(1.0f / std::sqrt(flush(x))); }
float tanh_approx(float x) { return std::tanh(x); }

uint32_t to_tf32(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fffffff;
  if ((u & 0x7fffffff) == 0x7f800000) return u;
  return (u + 0x1000) & 0xffffe000u;
}

}  // namespace foveate::cuda::dev
