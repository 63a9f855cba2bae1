#include "bench/roofline.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"

namespace foveate {
namespace {

constexpr int64_t kMostSteps = int64_t{1} << 30;  // seconds

void check_floats(const TensorView& x, const char* what) { expect(x, what).rank(1).contiguous().dtype(DType::kFloat32); }

void check_sums(const TensorView& sums, int threads) {
  check_floats(sums, "sums");
  expect(sums, "sums").size(0, threads);
}

DType chain_dtype(const std::string& wanted) {
  for (const DType t : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
    if (wanted == name(t)) return t;
  fail("dtype \"", wanted, "\" is not one of float32, float64, bfloat16");
}

}  // namespace

int64_t multiply_add(TensorView sums, const std::string& dtype, int64_t steps, Threads threads) {
  check_sums(sums, threads);
  check(steps > 0 && steps <= kMostSteps, "steps = ", steps, " is outside 1..", kMostSteps);
  return cpu::kernels().multiply_add({.sums = sums.as<float>(), .steps = steps, .dtype = chain_dtype(dtype)}, threads);
}

void read_memory(TensorView x, TensorView sums, Threads threads) {
  check_floats(x, "x");
  check_sums(sums, threads);
  cpu::kernels().read_memory({.x = x.as<float>(), .sums = sums.as<float>(), .n = x.numel()}, threads);
}

void copy_memory(TensorView x, TensorView out, Threads threads) {
  check_floats(x, "x");
  check_floats(out, "out");
  expect(out, "out").size(0, x.shape[0]);
  cpu::kernels().copy_memory({.x = x.as<float>(), .out = out.as<float>(), .n = x.numel()}, threads);
}

}  // namespace foveate
