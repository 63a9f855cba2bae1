#pragma once

#include <cstdint>

namespace foveate {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class T>
[[gnu::always_inline]] constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
[[gnu::always_inline]] constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace foveate
