// Rounding that C++ does not offer, and the NaN of PTX.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace foveate::emulator::ptx {

// Floating-point instructions return this NaN, whichever they were given (PTX ISA, "Floating-Point Instructions").
inline float canonical(float x) { return x != x ? std::bit_cast<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x != x ? std::bit_cast<double>(uint64_t{0x7fffffffffffffff}) : x; }

// .ftz: subnormal numbers become zeros of their sign.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

enum class Direction : int8_t { kDown = -1, kZero = 0, kUp = 1 };

// The float next to value + error in this direction; `error` is what `value` lacks, at most half of its last bit.
inline float round_to(double value, double error, Direction direction) {
  const float nearest = static_cast<float>(value);
  if (nearest != nearest || std::isinf(value)) return nearest;
  const double off = value - nearest;  // exact, or infinite where the float is
  const double beyond = off != 0 ? off : error;
  const bool down = direction == Direction::kDown || (direction == Direction::kZero && value > 0);
  const bool up = direction == Direction::kUp || (direction == Direction::kZero && value < 0);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (down && beyond < 0) return std::nextafterf(nearest, -kInfinity);
  if (up && beyond > 0) return std::nextafterf(nearest, kInfinity);
  return nearest;
}

// a * b + c rounded once. The product of two floats is exact in double; the sum's error is found as by D. Knuth (TwoSum).
inline float fma_to(float a, float b, float c, Direction direction) {
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double other = sum - product;
  return round_to(sum, (product - (sum - other)) + (addend - other), direction);
}

}  // namespace foveate::emulator::ptx
