// The kernels of docs/kernels/first_kernel.md: softmax from nothing, first by a warp, then by a block, and by a block without one of its
// barriers. `first_kernel warp`, `block` or `no-barrier` runs one of them; the page shows the parts between the lines of dashes.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda/device/device.cuh"
#include "cuda/host/launch.h"
#include "emulator/checks/global_memory.h"

using namespace foveate::cuda;

// ------------------------------------------------------------------------------------------------------------------------------
struct SoftmaxParams {
  const float* x;  // [rows, cols]
  float* y;        // [rows, cols]
  int rows, cols;
};

constexpr float kLog2e = 1.44269504f;

// ------------------------------------------------------------------------------------------------------------------------------
// One row for each warp: lane l has columns l, l + 32, l + 64, ...
__global__ void __launch_bounds__(32) softmax_by_warp(const __grid_constant__ SoftmaxParams p) {
  const float* x = p.x + int64_t{blockIdx.x} * p.cols;
  float* y = p.y + int64_t{blockIdx.x} * p.cols;

  float row_max = -INFINITY;
  for (int j = dev::lane(); j < p.cols; j += 32) row_max = fmaxf(row_max, dev::ld_global<float>(x + j));
  for (int mask = 16; mask > 0; mask /= 2) row_max = fmaxf(row_max, dev::shfl_xor(row_max, mask));

  float row_sum = 0;
  for (int j = dev::lane(); j < p.cols; j += 32) row_sum += dev::exp2_approx((dev::ld_global<float>(x + j) - row_max) * kLog2e);
  for (int mask = 16; mask > 0; mask /= 2) row_sum += dev::shfl_xor(row_sum, mask);

  for (int j = dev::lane(); j < p.cols; j += 32)
    dev::st_global(y + j, dev::exp2_approx((dev::ld_global<float>(x + j) - row_max) * kLog2e) / row_sum);
}

// ------------------------------------------------------------------------------------------------------------------------------
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The values of all threads of the block, combined; every thread gets the result.
template <bool kBarrier, class Combine>
__device__ float block_reduce(float value, Combine combine) {
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, dev::shfl_xor(value, mask));

  const uint32_t slots = dev::smem_base();  // one float for each warp
  const int warp = dev::warp();
  if (kBarrier) dev::sync_threads();  // every warp has read the slots of the reduction before this one
  if (dev::lane() == 0) dev::st_shared(slots + 4 * warp, value);
  dev::sync_threads();  // every warp has written its slot

  value = dev::ld_shared<float>(slots);
  for (int w = 1; w < kWarps; ++w) value = combine(value, dev::ld_shared<float>(slots + 4 * w));
  return value;
}

// One row for each block.
template <bool kBarrier>
__global__ void __launch_bounds__(kThreads) softmax_by_block(const __grid_constant__ SoftmaxParams p) {
  const float* x = p.x + int64_t{blockIdx.x} * p.cols;
  float* y = p.y + int64_t{blockIdx.x} * p.cols;
  const int first = threadIdx.x;

  float row_max = -INFINITY;
  for (int j = first; j < p.cols; j += kThreads) row_max = fmaxf(row_max, dev::ld_global<float>(x + j));
  row_max = block_reduce<kBarrier>(row_max, Max());

  float row_sum = 0;
  for (int j = first; j < p.cols; j += kThreads) row_sum += dev::exp2_approx((dev::ld_global<float>(x + j) - row_max) * kLog2e);
  row_sum = block_reduce<kBarrier>(row_sum, Sum());

  for (int j = first; j < p.cols; j += kThreads)
    dev::st_global(y + j, dev::exp2_approx((dev::ld_global<float>(x + j) - row_max) * kLog2e) / row_sum);
}
// ------------------------------------------------------------------------------------------------------------------------------

// The largest |y - exact|, with the exact softmax in fp64.
double largest_error(const std::vector<float>& x, const std::vector<float>& y, int rows, int cols) {
  double largest = 0;
  for (int i = 0; i < rows; ++i) {
    double sum = 0;
    for (int j = 0; j < cols; ++j) sum += std::exp(double{x[i * cols + j]});
    for (int j = 0; j < cols; ++j) largest = std::fmax(largest, std::fabs(y[i * cols + j] - std::exp(double{x[i * cols + j]}) / sum));
  }
  return largest;
}

int main(int argc, char** argv) {
  const char* which = argc == 2 ? argv[1] : "";
  constexpr int kRows = 3, kCols = 1000;
  std::vector<float> x(kRows * kCols), y(kRows * kCols, NAN);
  for (int i = 0; i < kRows * kCols; ++i) x[i] = std::sin(1.7f * i) * 4;
  // ----------------------------------------------------------------------------------------------------------------------------
  // What the kernel may touch: an access outside of these is reported with the nearest of them.
  const foveate::emulator::GlobalSpan spans[] = {{x.data(), 4 * x.size(), "x"}, {y.data(), 4 * y.size(), "y"}};
  const SoftmaxParams params{x.data(), y.data(), kRows, kCols};
  const Stream stream{0, nullptr};
  try {
    if (!std::strcmp(which, "warp"))
      launch<softmax_by_warp>(kRows, 32, 0, stream, params);
    else if (!std::strcmp(which, "block"))
      launch<softmax_by_block<true>>(kRows, kThreads, 4 * kWarps, stream, params);
    else if (!std::strcmp(which, "no-barrier"))
      launch<softmax_by_block<false>>(kRows, kThreads, 4 * kWarps, stream, params);
    else
      return std::fprintf(stderr, "usage: first_kernel warp|block|no-barrier\n"), 2;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  // ----------------------------------------------------------------------------------------------------------------------------
  std::printf("largest error %.1e\n", largest_error(x, y, kRows, kCols));
}
