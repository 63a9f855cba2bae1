// softmax and log_softmax over rows, and their gradient. Each element moves once: a row that fits its threads' registers (16,384 elements
// of 16 bits) is read once and written once; a longer one is read twice, the second time from the L2 cache if it is still there.
#include "cuda/host/kernels.h"
#include "cuda/rows/row.cuh"

namespace foveate::cuda {
namespace {

// Where the operands of a row begin, and how many of its columns are not masked by causal or by a mask of one value for the row.
template <class T>
struct Scores {
  const SoftmaxParams& p;
  const T* x;
  const void* bias = nullptr;
  const int8_t* mask = nullptr;
  float row_bias = 0;
  int64_t visible;

  __device__ Scores(const SoftmaxParams& p, int64_t row) : p(p), x(static_cast<const T*>(p.x)), visible(p.cols) {
    if (p.causal_rows) visible = min(p.cols, max(int64_t{0}, row % p.causal_rows + 1 + p.cols - p.causal_rows));
    int64_t bias_at = 0, mask_at = 0;
    for (int d = p.ndim - 1; d >= 0; --d) {
      const int64_t index = d > 0 ? row % p.shape[d] : row;
      if (d > 0) row /= p.shape[d];
      x += index * p.x_stride[d];
      bias_at += index * p.bias_stride[d];
      mask_at += index * p.mask_stride[d];
    }
    if (p.bias) {
      const int64_t bytes = p.bias_dtype == DType::kFloat32 ? 4 : sizeof(T);
      bias = static_cast<const char*>(p.bias) + bias_at * bytes;
      if (!p.bias_per_column)
        row_bias = p.bias_dtype == DType::kFloat32 ? dev::ld_global_nc<float>(bias) : dev::to_float(dev::ld_global_nc<T>(bias));
    }
    if (p.mask) {
      mask = p.mask + mask_at;
      if (!p.mask_per_column && !dev::ld_global_nc<int8_t>(mask)) visible = 0;
    }
  }

  // The scores from column j on, -inf where they are masked.
  template <Read kRead>
  __device__ __forceinline__ void load(int64_t j, float (&s)[kVec<T>]) const {
    const float scale = static_cast<float>(p.scale);
    load_chunk<kRead>(x, j, visible, 0.0f, s);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) s[i] = s[i] * scale + row_bias;
    float operand[kVec<T>];
    if (p.bias_per_column) {
      if (p.bias_dtype == DType::kFloat32)
        load_chunk<Read::kCached>(static_cast<const float*>(bias), j, visible, 0.0f, operand);
      else
        load_chunk<Read::kCached>(static_cast<const T*>(bias), j, visible, 0.0f, operand);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) s[i] += operand[i];
    }
    if (p.mask_per_column) {
      load_chunk<Read::kCached>(mask, j, visible, 0.0f, operand);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) s[i] = operand[i] != 0 ? s[i] : -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) s[i] = j + i < visible ? s[i] : -kInfinity;
  }

  __device__ __forceinline__ void store(int64_t row, int64_t j, float (&y)[kVec<T>]) const {
    if (!p.log) {  // a row whose sum is NaN has zeros behind the visible columns too
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) y[i] = j + i < visible ? y[i] : 0.0f;
    }
    store_chunk(static_cast<T*>(p.out) + row * p.cols, j, p.cols, y);
  }
};

template <class T>
__device__ __forceinline__ void normalise(float (&s)[kVec<T>], bool log, const MaxSum& row, float log_sum, float inverse) {
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) s[i] = log ? (s[i] - row.max) - log_sum : dev::exp2_approx((s[i] - row.max) * kLog2eF) * inverse;
}

// kKept: the scores of a row stay in registers. Else it is read a second time.
template <class T, bool kKept>
__global__ void __launch_bounds__(kLargestBlock, 1) softmax_forward_kernel(const __grid_constant__ RowWork<SoftmaxParams> work) {
  constexpr int kChunks = kKept ? kKeptChunks : kKeptChunks / 2;  // at a time
  const SoftmaxParams& p = work.params;
  const Team team(work.lanes);
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < p.rows; first += int64_t{gridDim.x} * team.count) {
    const bool mine = first + team.index < p.rows;
    const int64_t row = mine ? first + team.index : p.rows - 1;
    const Scores<T> scores(p, row);
    const int64_t chunks = chunks_of(p.cols, kVec<T>);
    const auto column = [&](int64_t chunk) { return chunk * kVec<T>; };
    MaxSum all;
    float s[kChunks][kVec<T>];
    if constexpr (kKept) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) scores.template load<Read::kOnce>(column(team.thread + c * team.lanes), s[c]);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) all.max = fmaxf(all.max, s[c][i]);
      all.max = team.max(all.max);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) {
          const float e = dev::exp2_approx((s[c][i] - all.max) * kLog2eF);
          all.sum += e;
          if (!p.log) s[c][i] = e;
        }
      all.sum = team.sum(all.sum);
    } else {
      for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kChunks} * team.lanes) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) scores.template load<Read::kCached>(column(chunk + c * team.lanes), s[c]);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) all.add(s[c]);
      }
      all.join(team);
    }
    // An empty row has sum 0: zeros, and -inf stays -inf in the logarithm.
    const float inverse = all.sum == 0 ? 0.0f : 1.0f / all.sum, log_sum = all.sum == 0 ? 0.0f : logf(all.sum);
    if (!mine) continue;
    if constexpr (kKept) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) s[c][i] = p.log ? (s[c][i] - all.max) - log_sum : s[c][i] * inverse;
        scores.store(row, column(team.thread + c * team.lanes), s[c]);
      }
    } else {
      for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kChunks} * team.lanes) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) scores.template load<Read::kOnce>(column(chunk + c * team.lanes), s[c]);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          normalise<T>(s[c], p.log, all, log_sum, inverse);
          scores.store(row, column(chunk + c * team.lanes), s[c]);
        }
      }
    }
  }
}

// dx = scale * y * (dy - sum(dy * y)), of log_softmax dy - exp(y) * sum(dy).
template <class T, class Out, bool kKept>
__global__ void __launch_bounds__(kLargestBlock, 1) softmax_backward_kernel(const __grid_constant__ RowWork<SoftmaxBackwardParams> work) {
  constexpr int kChunks = kKeptChunks / 2;  // of two operands
  const SoftmaxBackwardParams& p = work.params;
  const Team team(work.lanes);
  const float scale = static_cast<float>(p.scale);
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < p.rows; first += int64_t{gridDim.x} * team.count) {
    const bool mine = first + team.index < p.rows;
    const int64_t at = (mine ? first + team.index : p.rows - 1) * p.cols;
    const T *out = static_cast<const T*>(p.out) + at, *dout = static_cast<const T*>(p.dout) + at;
    const int64_t chunks = chunks_of(p.cols, kVec<T>);
    const auto column = [&](int64_t chunk) { return chunk * kVec<T>; };
    float y[kChunks][kVec<T>], dy[kChunks][kVec<T>];
    const auto load = [&]<Read kRead>(std::integral_constant<Read, kRead>, int64_t chunk) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        load_chunk<kRead>(out, column(chunk + c * team.lanes), p.cols, 0.0f, y[c]);
        load_chunk<kRead>(dout, column(chunk + c * team.lanes), p.cols, 0.0f, dy[c]);
      }
    };
    const auto products = [&] {
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) sum += p.log ? dy[c][i] : dy[c][i] * y[c][i];
      return sum;
    };
    const auto store = [&](int64_t chunk, float sum) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i)
          dy[c][i] = p.log ? dy[c][i] - dev::exp2_approx(y[c][i] * kLog2eF) * sum : (dy[c][i] - sum) * y[c][i] * scale;
        store_chunk(static_cast<Out*>(p.dx) + at, column(chunk + c * team.lanes), p.cols, dy[c]);
      }
    };
    if constexpr (kKept) {
      load(std::integral_constant<Read, Read::kOnce>{}, team.thread);
      const float sum = team.sum(products());
      if (mine) store(team.thread, sum);
    } else {
      const int64_t step = int64_t{kChunks} * team.lanes;
      float sum = 0;
      for (int64_t chunk = team.thread; chunk < chunks; chunk += step) {
        load(std::integral_constant<Read, Read::kCached>{}, chunk);
        sum += products();
      }
      sum = team.sum(sum);
      for (int64_t chunk = team.thread; chunk < chunks; chunk += step) {
        load(std::integral_constant<Read, Read::kOnce>{}, chunk);
        store(chunk, sum);
      }
    }
  }
}

}  // namespace

void softmax_forward(const SoftmaxParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks);
    const RowWork<SoftmaxParams> work{p, plan.lanes};
    if (plan.kept)
      launch<softmax_forward_kernel<T, true>>(plan.grid, plan.threads, kTeamBytes, stream, work);
    else
      launch<softmax_forward_kernel<T, false>>(plan.grid, plan.threads, kTeamBytes, stream, work);
  });
}

void softmax_backward(const SoftmaxBackwardParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks / 2);
    const auto run = [&]<class Out>(std::type_identity<Out>) {
      const RowWork<SoftmaxBackwardParams> work{p, plan.lanes};
      if (plan.kept)
        launch<softmax_backward_kernel<T, Out, true>>(plan.grid, plan.threads, kTeamBytes, stream, work);
      else
        launch<softmax_backward_kernel<T, Out, false>>(plan.grid, plan.threads, kTeamBytes, stream, work);
    };
    if (p.dx_wide)
      run(std::type_identity<float>{});
    else
      run(std::type_identity<T>{});
  });
}

}  // namespace foveate::cuda
