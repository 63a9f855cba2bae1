// Element types as they lie in memory. Forced inline: kernels of every instruction set use these, and must not share a compiled copy.
// The conversions to float live with the vector code (cpu/simd/vec.h), per instruction set.
#pragma once

#include <cstdint>

namespace foveate {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kFloat8E4M3, kInt32, kInt64, kBool };

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct f8e4m3 {
  uint8_t bits;
};

[[gnu::always_inline]] constexpr const char* name(DType t) {
  switch (t) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt8: return "int8";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

// What kernels add up in, and what statistics of a row are stored as.
[[gnu::always_inline]] constexpr DType accumulator_of(DType t) { return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

[[gnu::always_inline]] constexpr int64_t size_of(DType t) {
  switch (t) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    default: return 1;
  }
}

}  // namespace foveate
