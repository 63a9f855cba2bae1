// rms_norm and its gradient. Forward: x (and the residual) is read once where it fits its threads' registers, out (and the sum) written once.
// Backward: dout and x are read once, dx written once; a block walks over one share of the rows and keeps its columns of dweight in registers, so that dweight needs no
// atomics and has bitwise the same result every time.
#include "cuda/host/kernels.h"
#include "cuda/rows/row.cuh"

namespace foveate::cuda {
namespace {

// weight[j..], 1 without a weight.
template <class W, int kCount>
__device__ __forceinline__ void load_weight(const void* weight, int64_t j, int64_t cols, float (&w)[kCount]) {
  if (weight) return load_chunk<Read::kCached>(static_cast<const W*>(weight), j, cols, 0.0f, w);
#pragma unroll
  for (int i = 0; i < kCount; ++i) w[i] = 1.0f;
}

// h[j..] = x[j..], or x[j..] + residual[j..] rounded to T, which is also written to sum unless that is null; 0 from element `cols` on.
template <Read kRead, class T>
__device__ __forceinline__ void load_sum(const T* x, const T* residual, T* sum, int64_t j, int64_t cols, float (&h)[kVec<T>]) {
  load_chunk<kRead>(x, j, cols, 0.0f, h);
  if (!residual) return;
  float r[kVec<T>];
  load_chunk<Read::kOnce>(residual, j, cols, 0.0f, r);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) h[i] = dev::to_float(dev::from_float<T>(h[i] + r[i]));
  if (sum) store_chunk(sum, j, cols, h);
}

template <class T, class W, bool kKept>
__global__ void __launch_bounds__(kLargestBlock, 1) rms_norm_forward_kernel(const __grid_constant__ RowWork<RmsNormParams> work) {
  constexpr int kChunks = kKept ? kKeptChunks : kKeptChunks / 2;
  const RmsNormParams& p = work.params;
  const Team team(work.lanes);
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < p.rows; first += int64_t{gridDim.x} * team.count) {
    const bool mine = first + team.index < p.rows;
    const int64_t row = mine ? first + team.index : p.rows - 1;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
    T* sum = residual && mine ? static_cast<T*>(p.sum) + row * p.cols : nullptr;
    T* out = static_cast<T*>(p.out) + row * p.cols;
    const int64_t chunks = chunks_of(p.cols, kVec<T>);
    const auto column = [&](int64_t chunk) { return chunk * kVec<T>; };
    float v[kChunks][kVec<T>], squares = 0;
    const auto add_squares = [&] {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) squares += v[c][i] * v[c][i];
    };
    const auto store = [&](int64_t chunk, float rstd) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t j = column(chunk + c * team.lanes);
        float w[kVec<T>];
        load_weight<W>(p.weight, j, p.cols, w);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) w[i] *= v[c][i] * rstd;
        store_chunk(out, j, p.cols, w);
      }
    };
    // Load h [cols] = x (+ residual) and sum its squares: once where the row fits the team's registers, else chunk by chunk.
    if constexpr (kKept) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) load_sum<Read::kOnce>(x, residual, sum, column(team.thread + c * team.lanes), p.cols, v[c]);
      add_squares();
    } else {
      for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kChunks} * team.lanes) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) load_sum<Read::kCached>(x, residual, sum, column(chunk + c * team.lanes), p.cols, v[c]);
        add_squares();
      }
    }
    squares = team.sum(squares);
    const float rstd = 1.0f / sqrtf(squares / static_cast<float>(p.cols) + static_cast<float>(p.eps));
    // Write rstd and out [cols] = h * rstd * weight, reading h a second time where it was not kept: each thread what it has written itself.
    if (!mine) continue;
    if (p.rstd && team.thread == 0) dev::st_global(static_cast<float*>(p.rstd) + row, rstd);
    if constexpr (kKept) {
      store(team.thread, rstd);
    } else {
      for (int64_t chunk = team.thread; chunk < chunks; chunk += int64_t{kChunks} * team.lanes) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int64_t j = column(chunk + c * team.lanes);
          if (sum)
            load_chunk<Read::kInPlace>(sum, j, p.cols, 0.0f, v[c]);
          else
            load_chunk<Read::kOnce>(x, j, p.cols, 0.0f, v[c]);
        }
        store(chunk, rstd);
      }
    }
  }
}

// part [cols] = the sum of the teams' dweight. The teams of the block add up in turn, in shared memory [chunk][element of it][thread], so
// that the order of the sum is that of the teams.
template <class T, int kChunks>
__device__ __forceinline__ void sum_teams(const Team& team, float (&dweight)[kChunks][kVec<T>], float* part, int64_t cols) {
  const uint32_t sums = dev::smem_base() + kTeamBytes;
  for (int turn = 0; turn < team.count; ++turn) {
    if (turn == team.index) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) {
          const uint32_t address = sums + 4 * ((c * kVec<T> + i) * team.lanes + team.thread);
          if (turn > 0) dweight[c][i] += dev::ld_shared<float>(address);
          if (turn + 1 < team.count) dev::st_shared<float>(address, dweight[c][i]);
        }
      if (turn + 1 == team.count)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) store_chunk(part, (team.thread + c * team.lanes) * kVec<T>, cols, dweight[c]);
    }
    if (turn + 1 < team.count) dev::sync_threads();
  }
}

template <class T, class W, bool kKept>
__global__ void __launch_bounds__(kLargestBlock, 1) rms_norm_backward_kernel(const __grid_constant__ RowWork<RmsNormBackwardParams> work) {
  constexpr int kChunks = kKeptChunks / 2;
  const RmsNormBackwardParams& p = work.params;
  const Team team(work.lanes);
  const int64_t chunks = chunks_of(p.cols, kVec<T>), step = int64_t{kChunks} * team.lanes;
  const int64_t begin = p.rows * blockIdx.x / p.parts, end = p.rows * (blockIdx.x + 1) / p.parts;
  float* part = p.dweight_parts ? static_cast<float*>(p.dweight_parts) + blockIdx.x * p.cols : nullptr;
  const auto column = [&](int64_t chunk, int c) { return (chunk + c * team.lanes) * kVec<T>; };
  // This thread's chunks: weight, dout (then dx), x, and its sum of dweight over the rows.
  float w[kChunks][kVec<T>], g[kChunks][kVec<T>], v[kChunks][kVec<T>], dweight[kChunks][kVec<T>] = {};
  const auto load_weights = [&](int64_t chunk) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) load_weight<W>(p.weight, column(chunk, c), p.cols, w[c]);
  };
  // A row that does not fit the registers: dweight is summed in global memory instead, by the one team of the block.
  const auto add_to_part = [&](int64_t chunk) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float sum[kVec<T>];
      load_chunk<Read::kInPlace>(part, column(chunk, c), p.cols, 0.0f, sum);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) sum[i] += dweight[c][i];
      store_chunk(part, column(chunk, c), p.cols, sum);
    }
  };
  // Before the rows: the weight [cols], once where it fits; zeros for the sums in global memory.
  if (kKept) load_weights(team.thread);
  if (!kKept && part)
    for (int64_t chunk = team.thread; chunk < chunks; chunk += team.lanes) store_chunk(part, chunk * kVec<T>, p.cols, dweight[0]);  // zeros

  // The rows [begin, end) of this block, one for each team at a time.
  for (int64_t first = begin; first < end; first += team.count) {
    const bool mine = first + team.index < end;
    const int64_t row = mine ? first + team.index : end - 1;
    const T *dout = static_cast<const T*>(p.dout) + row * p.cols, *x = static_cast<const T*>(p.x) + row * p.x_stride;
    const float rstd = dev::ld_global_nc<float>(static_cast<const float*>(p.rstd) + row);
    const auto load = [&]<Read kRead>(std::integral_constant<Read, kRead>, int64_t chunk) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        load_chunk<kRead>(dout, column(chunk, c), p.cols, 0.0f, g[c]);
        load_chunk<kRead>(x, column(chunk, c), p.cols, 0.0f, v[c]);
      }
    };
    // products = sum over the columns of dout * weight * x
    float products = 0;
    const auto add_products = [&] {
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) products += g[c][i] * w[c][i] * v[c][i];
    };
    // dx [cols] = rstd * (dout * weight - x * rstd * mean) + dsum; dweight takes dout * x * rstd.
    const auto finish = [&](int64_t chunk, float mean) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) {
          const float normed = v[c][i] * rstd;
          dweight[c][i] += g[c][i] * normed;
          g[c][i] = (g[c][i] * w[c][i] - normed * mean) * rstd;
        }
        if (p.dsum) {
          float d[kVec<T>];
          load_chunk<Read::kOnce>(static_cast<const T*>(p.dsum) + row * p.cols, column(chunk, c), p.cols, 0.0f, d);
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) g[c][i] += d[i];
        }
        store_chunk(static_cast<T*>(p.dx) + row * p.cols, column(chunk, c), p.cols, g[c]);
      }
    };
    const auto mean_of = [&](float sum) { return team.sum(sum) * rstd / static_cast<float>(p.cols); };
    if constexpr (kKept) {
      load(std::integral_constant<Read, Read::kOnce>{}, team.thread);
      add_products();
      const float mean = mean_of(products);
      if (mine) finish(team.thread, mean);
    } else {
      for (int64_t chunk = team.thread; chunk < chunks; chunk += step) {
        load(std::integral_constant<Read, Read::kCached>{}, chunk);
        load_weights(chunk);
        add_products();
      }
      const float mean = mean_of(products);
      for (int64_t chunk = team.thread; chunk < chunks; chunk += step) {
        load(std::integral_constant<Read, Read::kOnce>{}, chunk);
        load_weights(chunk);
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int i = 0; i < kVec<T>; ++i) dweight[c][i] = 0;
        finish(chunk, mean);
        if (part) add_to_part(chunk);
      }
    }
  }

  // After the rows: one part of dweight [cols] for the block.
  if (!kKept || !part) return;
  sum_teams<T>(team, dweight, part, p.cols);
}

// f(T, W): the dtypes of x and of the weight, which is that of x or float.
template <class F>
void visit_dtypes(DType dtype, DType weight_dtype, const F& f) {
  visit_activation(dtype, [&]<class T>(std::type_identity<T> t) {
    if (weight_dtype == dtype)
      f(t, t);
    else
      f(t, std::type_identity<float>{});
  });
}

}  // namespace

void rms_norm_forward(const RmsNormParams& p, Stream stream) {
  visit_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>(std::type_identity<T>, std::type_identity<W>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks);
    const RowWork<RmsNormParams> work{p, plan.lanes};
    if (plan.kept)
      launch<rms_norm_forward_kernel<T, W, true>>(plan.grid, plan.threads, kTeamBytes, stream, work);
    else
      launch<rms_norm_forward_kernel<T, W, false>>(plan.grid, plan.threads, kTeamBytes, stream, work);
  });
}

void rms_norm_backward(const RmsNormBackwardParams& p, Stream stream) {
  constexpr int64_t kSharesWithoutDweight = 4096;
  visit_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>(std::type_identity<T>, std::type_identity<W>) {
    const RowPlan plan = plan_rows<T>(p.rows, p.cols, kKeptChunks / 2);
    RowWork<RmsNormBackwardParams> work{p, plan.lanes};
    if (!p.dweight_parts) work.params.parts = std::min<int64_t>(plan.grid.x, kSharesWithoutDweight);
    const auto blocks = static_cast<unsigned>(work.params.parts);
    const size_t sums = plan.lanes < plan.threads ? static_cast<size_t>(plan.lanes) * (kKeptChunks / 2) * kVec<T> * sizeof(float) : 0;
    if (plan.kept)
      launch<rms_norm_backward_kernel<T, W, true>>(blocks, plan.threads, kTeamBytes + sums, stream, work);
    else
      launch<rms_norm_backward_kernel<T, W, false>>(blocks, plan.threads, kTeamBytes, stream, work);
  });
}

}  // namespace foveate::cuda
