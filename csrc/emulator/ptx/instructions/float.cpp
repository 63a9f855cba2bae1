// Floating-point arithmetic (PTX ISA, "Floating Point Instructions"). Without .rn, mul and add may be fused by ptxas; here they are not.
// ex2, lg2, rcp, rsqrt and tanh .approx are computed exactly and rounded: the hardware is within the error bounds of the ISA.
#include "emulator/ptx/instructions/rounding.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

// A NaN loses against a number, and -0 is less than +0.
template <class T>
T least(T a, T b) {
  if (a != a || b != b) return canonical(a != a ? b : a);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T largest(T a, T b) {
  if (a != a || b != b) return canonical(a != a ? b : a);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

float with_sign_of(float sign, float magnitude) { return std::copysign(magnitude, sign); }

}  // namespace

void add_float(Table& table) {
  table.lanes({"add.f32", "add.rn.f32"}, [](float a, float b) { return canonical(a + b); });
  table.lanes({"sub.f32", "sub.rn.f32"}, [](float a, float b) { return canonical(a - b); });
  table.lanes({"mul.f32", "mul.rn.f32"}, [](float a, float b) { return canonical(a * b); });
  table.lanes({"fma.rn.f32"}, [](float a, float b, float c) { return canonical(std::fma(a, b, c)); });
  table.lanes({"fma.rm.f32"}, [](float a, float b, float c) { return canonical(fma_to(a, b, c, Direction::kDown)); });
  table.lanes({"div.rn.f32"}, [](float a, float b) { return canonical(a / b); });
  table.lanes({"rcp.rn.f32"}, [](float a) { return canonical(1.0f / a); });
  table.lanes({"sqrt.rn.f32"}, [](float a) { return canonical(std::sqrt(a)); });
  table.lanes({"add.f64", "add.rn.f64"}, [](double a, double b) { return canonical(a + b); });
  table.lanes({"sub.f64", "sub.rn.f64"}, [](double a, double b) { return canonical(a - b); });
  table.lanes({"mul.f64", "mul.rn.f64"}, [](double a, double b) { return canonical(a * b); });
  table.lanes({"div.rn.f64"}, [](double a, double b) { return canonical(a / b); });
  table.lanes({"fma.rn.f64"}, [](double a, double b, double c) { return canonical(std::fma(a, b, c)); });

  table.lanes({"min.f32"}, [](float a, float b) { return least(a, b); });
  table.lanes({"max.f32"}, [](float a, float b) { return largest(a, b); });
  // Changes the sign bit alone, whatever the number.
  table.lanes({"abs.f32"}, [](uint32_t a) { return a & 0x7fffffffu; });
  table.lanes({"neg.f32"}, [](uint32_t a) { return a ^ 0x80000000u; });
  table.lanes({"abs.f64"}, [](uint64_t a) { return a & ~(uint64_t{1} << 63); });
  table.lanes({"neg.f64"}, [](uint64_t a) { return a ^ uint64_t { 1 } << 63; });
  table.lanes({"copysign.f32"}, [](float a, float b) { return with_sign_of(a, b); });

  table.lanes({"ex2.approx.ftz.f32"}, [](float a) { return canonical(flush(std::exp2(flush(a)))); });
  table.lanes({"ex2.approx.f32"}, [](float a) { return canonical(std::exp2(a)); });
  table.lanes({"lg2.approx.ftz.f32"}, [](float a) { return canonical(std::log2(flush(a))); });
  table.lanes({"lg2.approx.f32"}, [](float a) { return canonical(std::log2(a)); });
  table.lanes({"rcp.approx.ftz.f32"}, [](float a) { return canonical(flush(1.0f / flush(a))); });
  table.lanes({"rsqrt.approx.ftz.f32"}, [](float a) { return canonical(flush(1.0f / std::sqrt(flush(a)))); });
  table.lanes({"tanh.approx.f32"}, [](float a) { return canonical(std::tanh(a)); });
}

}  // namespace foveate::emulator::ptx
