// Arithmetic for the host, for CPU kernels of every instruction set and for CUDA kernels. Forced inline: no compiled copy is shared.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FOVEATE_HOST_DEVICE __host__ __device__
#else
#define FOVEATE_HOST_DEVICE
#endif

namespace foveate {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// As std::min, std::max and std::clamp, whose compiled copies the kernels of different instruction sets would share.
template <class T>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr T clamp(T x, T low, T high) {
  return x < low ? low : high < x ? high : x;
}
template <class T>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace foveate
