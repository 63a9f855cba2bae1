// Conversions (PTX ISA, "cvt"). Registers may be wider than the types: of a source the lower bits count, a result is widened by its sign.
#include <bit>

#include "cuda/device/device.cuh"
#include "emulator/ptx/instructions/rounding.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

uint32_t bfloat_pair(float high, float low) { return static_cast<u32>(bfloat_from_float(high)) << 16 | bfloat_from_float(low); }
uint32_t half_pair(float high, float low) { return static_cast<u32>(half_from_float(high)) << 16 | half_from_float(low); }

// Float to integer clamps; a NaN is 0.
int32_t truncated(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(x);
}
int32_t nearest(float x) { return truncated(std::nearbyint(x)); }

}  // namespace

void add_convert(Table& table) {
  table.lanes({"cvt.u32.u16"}, [](u16 a) { return static_cast<u32>(a); });
  table.lanes({"cvt.s32.s16"}, [](int16_t a) { return static_cast<int32_t>(a); });
  table.lanes({"cvt.u64.u16"}, [](u16 a) { return static_cast<u64>(a); });
  table.lanes({"cvt.s16.s8"}, [](u16 a) { return static_cast<int16_t>(static_cast<int8_t>(a)); });
  table.lanes({"cvt.s32.s8"}, [](u16 a) { return static_cast<int32_t>(static_cast<int8_t>(a)); });
  table.lanes({"cvt.s32.s8"}, [](u32 a) { return static_cast<int32_t>(static_cast<int8_t>(a)); });
  table.lanes({"cvt.u16.u32"}, [](u32 a) { return static_cast<u16>(a); });
  table.lanes({"cvt.u16.u64"}, [](u64 a) { return static_cast<u16>(a); });
  table.lanes({"cvt.u32.u64"}, [](u64 a) { return static_cast<u32>(a); });
  table.lanes({"cvt.u64.u32"}, [](u32 a) { return static_cast<u64>(a); });
  table.lanes({"cvt.s64.s32"}, [](int32_t a) { return static_cast<int64_t>(a); });
  table.lanes({"cvt.s64.s32"}, [](u64 a) { return static_cast<int64_t>(static_cast<int32_t>(a)); });
  table.lanes({"cvt.u64.u32"}, [](u64 a) { return static_cast<u64>(static_cast<u32>(a)); });
  table.lanes({"cvt.u32.u16"}, [](u32 a) { return static_cast<u32>(static_cast<u16>(a)); });

  table.lanes({"cvt.f32.f16"}, [](u16 a) { return float_from_half(a); });
  table.lanes({"cvt.f32.bf16"}, [](u16 a) { return std::bit_cast<float>(static_cast<u32>(a) << 16); });
  table.lanes({"cvt.rn.f16.f32"}, [](float a) { return half_from_float(a); });
  table.lanes({"cvt.rn.bf16.f32"}, [](float a) { return bfloat_from_float(a); });
  table.lanes({"cvt.rn.bf16x2.f32"}, [](float a, float b) { return bfloat_pair(a, b); });
  table.lanes({"cvt.rn.f16x2.f32"}, [](float a, float b) { return half_pair(a, b); });
  table.lanes({"cvt.rna.tf32.f32"}, [](float a) { return cuda::dev::to_tf32(a); });
  table.lanes({"cvt.rn.f32.f64"}, [](double a) { return canonical(static_cast<float>(a)); });
  table.lanes({"cvt.f64.f32"}, [](float a) { return canonical(static_cast<double>(a)); });

  table.lanes({"cvt.rn.f32.s16"}, [](int16_t a) { return static_cast<float>(a); });
  table.lanes({"cvt.rn.f32.u16"}, [](u16 a) { return static_cast<float>(a); });
  table.lanes({"cvt.rn.f32.s32"}, [](int32_t a) { return static_cast<float>(a); });
  table.lanes({"cvt.rn.f32.u32"}, [](u32 a) { return static_cast<float>(a); });
  table.lanes({"cvt.rn.f32.s64"}, [](int64_t a) { return static_cast<float>(a); });
  table.lanes({"cvt.rn.f64.s32"}, [](int32_t a) { return static_cast<double>(a); });
  table.lanes({"cvt.rzi.s32.f32"}, [](float a) { return truncated(a); });
  table.lanes({"cvt.rni.s32.f32"}, [](float a) { return nearest(a); });
  table.lanes({"cvt.rni.f32.f32"}, [](float a) { return canonical(std::nearbyint(a)); });
  table.lanes({"cvt.rmi.f32.f32"}, [](float a) { return canonical(std::floor(a)); });
  table.lanes({"cvt.rzi.f32.f32"}, [](float a) { return canonical(std::trunc(a)); });
  // .sat: to 0..1, a NaN to +0.
  table.lanes({"cvt.sat.f32.f32"}, [](float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; });
}

}  // namespace foveate::emulator::ptx
