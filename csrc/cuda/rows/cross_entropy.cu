// Cross-entropy and its gradient over rows of logits. The forward reads the logits once; the backward reads them once and writes the
// gradient, in place if asked to. A row whose target is neither a class nor ignore_index gets NaN: nothing tells the host without waiting
// for the GPU.
#include "cuda/host/kernels.h"
#include "cuda/rows/row.cuh"

namespace foveate::cuda {
namespace {

using Work = RowWork<CrossEntropyParams>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

__device__ __forceinline__ float capped(float logit, float softcap) { return softcap > 0 ? softcap * tanhf(logit / softcap) : logit; }

template <class T>
__global__ void __launch_bounds__(kLargestBlock, 1) cross_entropy_forward_kernel(const __grid_constant__ Work work) {
  const CrossEntropyParams& p = work.params;
  const Team team(work.lanes);
  const float softcap = static_cast<float>(p.options.softcap), smoothing = static_cast<float>(p.options.label_smoothing);
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < p.rows; first += int64_t{gridDim.x} * team.count) {
    const bool mine = first + team.index < p.rows;
    const int64_t row = mine ? first + team.index : p.rows - 1;
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    const int64_t target = dev::ld_global_nc<int64_t>(p.target + row);
    const bool ignored = target == p.options.ignore_index, outside = target < 0 || target >= p.cols;
    const int64_t cols = ignored || outside ? 0 : p.cols;  // such rows are not read
    const int64_t chunks = chunks_of(cols, kVec<T>);
    MaxSum all;
    float centred = 0, count = 0;  // of the smoothing: sum(x - all.max) over `count` logits
    for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kKeptChunks} * team.lanes) {
      float x[kKeptChunks][kVec<T>];
      const auto column = [&](int c) { return (chunk + c * team.lanes) * kVec<T>; };
#pragma unroll
      for (int c = 0; c < kKeptChunks; ++c) load_chunk<Read::kOnce>(logits, column(c), cols, -kInfinity, x[c]);
#pragma unroll
      for (int c = 0; c < kKeptChunks; ++c) {
        const float before = all.max;
        if (softcap > 0) {
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) x[c][i] = x[c][i] == -kInfinity ? x[c][i] : capped(x[c][i], softcap);
        }
        all.add(x[c]);
        if (smoothing > 0) {
          if (count > 0) centred += count * (before - all.max);
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) {
            const int64_t j = column(c) + i;
            if (j < cols) {
              centred += x[c][i] - all.max;
              count += 1;
            }
          }
        }
      }
    }
    const float own_max = all.max;
    all.join(team);
    if (smoothing > 0) centred = team.sum(count > 0 ? centred + count * (own_max - all.max) : 0.0f);
    if (!mine || team.thread != 0) continue;
    float *loss = static_cast<float*>(p.loss) + row, *stats = static_cast<float*>(p.stats) + 2 * row;
    float value = ignored ? 0.0f : kNaN, max = value, log_sum = value;
    if (cols > 0) {
      max = all.max;
      log_sum = logf(all.sum);
      value = log_sum - (1 - smoothing) * (capped(dev::to_float(dev::ld_global_nc<T>(logits + target)), softcap) - max);
      if (smoothing > 0) value -= smoothing * (centred / static_cast<float>(p.cols));
      const float lse = max + log_sum;
      if (p.options.z_loss != 0) value += static_cast<float>(p.options.z_loss) * lse * lse;
    }
    dev::st_global(loss, value);
    dev::st_global(stats, max);
    dev::st_global(stats + 1, log_sum);
  }
}

// The gradient of x[j]: probability * dlse - dloss * smoothing / cols, and - dloss * (1 - smoothing) at the target; then times the slope of
// the softcap.
template <class T>
__global__ void __launch_bounds__(kLargestBlock, 1) cross_entropy_backward_kernel(const __grid_constant__ Work work) {
  const CrossEntropyParams& p = work.params;
  const Team team(work.lanes);
  const float softcap = static_cast<float>(p.options.softcap), smoothing = static_cast<float>(p.options.label_smoothing);
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < p.rows; first += int64_t{gridDim.x} * team.count) {
    const int64_t row = first + team.index;
    if (row >= p.rows) continue;
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    T* dlogits = static_cast<T*>(p.dlogits) + row * p.cols;
    const int64_t target = dev::ld_global_nc<int64_t>(p.target + row);
    const bool ignored = target == p.options.ignore_index, outside = target < 0 || target >= p.cols;
    const float dloss = ignored   ? 0.0f
                        : outside ? kNaN
                                  : dev::ld_global_nc<float>(static_cast<const float*>(p.dloss) + row * p.dloss_stride);
    const float2 stats = dev::ld_global_nc<float2>(static_cast<const float*>(p.stats) + 2 * row);
    const float dlse = dloss * (1 + 2 * static_cast<float>(p.options.z_loss) * (stats.x + stats.y));
    const float uniform = dloss * smoothing / static_cast<float>(p.cols);
    const int64_t chunks = chunks_of(p.cols, kVec<T>);
    for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kKeptChunks} * team.lanes) {
      float x[kKeptChunks][kVec<T>];
      const auto column = [&](int c) { return (chunk + c * team.lanes) * kVec<T>; };
      if (!ignored) {
#pragma unroll
        for (int c = 0; c < kKeptChunks; ++c) load_chunk<Read::kInPlace>(logits, column(c), p.cols, 0.0f, x[c]);
      }
#pragma unroll
      for (int c = 0; c < kKeptChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) {
          const float t = softcap > 0 ? tanhf(x[c][i] / softcap) : 0.0f, value = softcap > 0 ? softcap * t : x[c][i];
          const float probability = dev::exp2_approx(((value - stats.x) - stats.y) * kLog2eF);
          const float at_target = column(c) + i == target ? dloss * (1 - smoothing) : 0.0f;
          x[c][i] = ignored ? 0.0f : (probability * dlse - uniform - at_target) * (1 - t * t);
        }
        store_chunk(dlogits, column(c), p.cols, x[c]);
      }
    }
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks);
    launch<cross_entropy_forward_kernel<T>>(plan.grid, plan.threads, kTeamBytes, stream, Work{p, plan.lanes});
  });
}

void cross_entropy_backward(const CrossEntropyParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks);
    launch<cross_entropy_backward_kernel<T>>(plan.grid, plan.threads, kTeamBytes, stream, Work{p, plan.lanes});
  });
}

}  // namespace foveate::cuda
