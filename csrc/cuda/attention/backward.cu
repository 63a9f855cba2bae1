// The backward's launches, and what needs no products: lse and delta of every query, the gradient of the sinks.
//
// Workspace, fp32: lse [B, Hq, rows], delta [B, Hq, rows], sums of dQ [B, Hq, rows, padded D] unless the call is deterministic, the sinks'
// partial sums [B, Hq, rows / 128], then what the gradients of bias and relative table need; rows is seq_q rounded up to 128.
#include <algorithm>
#include <initializer_list>

#include "cuda/attention/alignment.h"
#include "cuda/attention/backward.cuh"
#include "cuda/host/kernels.h"

namespace foveate::cuda {
namespace {

constexpr int kStatisticsThreads = 256, kLanesPerRow = 8, kRowsAtOnce = kStatisticsThreads / kLanesPerRow;
constexpr int kSinkThreads = 128;

// Columns [d, d + 8) of dO . O; those from `columns` on are not there.
template <class T>
__device__ __forceinline__ float dot8(const T* x, const T* y, int d, int columns, bool vectors) {
  float sum = 0;
  if (vectors) {
    constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
    for (int at = d; at < d + 8; at += kPerVector) {
      if (at >= columns) break;
      const uint4 a = dev::ld_global_stream<uint4>(x + at), b = dev::ld_global_stream<uint4>(y + at);
      const uint32_t words_a[4] = {a.x, a.y, a.z, a.w}, words_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (std::is_same_v<T, float>) {
          sum = fmaf(__uint_as_float(words_a[w]), __uint_as_float(words_b[w]), sum);
        } else {
          const float2 pair_a = dev::unpack<T>(words_a[w]), pair_b = dev::unpack<T>(words_b[w]);
          sum = fmaf(pair_a.y, pair_b.y, fmaf(pair_a.x, pair_b.x, sum));
        }
      }
    }
  } else {
    for (int at = d; at < d + 8 && at < columns; ++at)
      sum = fmaf(dev::to_float(dev::ld_global_nc<T>(x + at)), dev::to_float(dev::ld_global_nc<T>(y + at)), sum);
  }
  return sum;
}

// lse with the sink in it, and delta = dO . O - dlse dlse'/dlse: what the other kernels read; and zeros for the sums of dQ. A block has
// kRowAlign queries of one head.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) row_statistics(const __grid_constant__ BackwardParams a) {
  const auto [b, h, tile] = block_place(a.tiles, a.heads_q);
  const Sequence s = sequence(a.attention, b);
  const HeadRows<T> dout(a.grads.dout, b, h, s.first_q), out(a.attention.out, b, h, s.first_q);
  const int64_t lse_at = a.attention.lse.batch * b + a.attention.lse.head * h + s.first_q;
  const int64_t to = (int64_t{b} * a.heads_q + h) * a.rows + tile * kRowAlign;
  const int columns = static_cast<int>(a.attention.head_dim_v), lane = threadIdx.x % kLanesPerRow;
  const float sink = a.attention.sinks ? dev::ld_global_nc<float>(static_cast<const float*>(a.attention.sinks) + h) : -kInfinity;
  if (a.dq_sum) {
    const int count = kRowAlign * static_cast<int>(padded_head_dim(a.attention));
    for (int at = 4 * static_cast<int>(threadIdx.x); at < count; at += 4 * kStatisticsThreads)
      dev::st_global(a.dq_sum + to * (count / kRowAlign) + at, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  float dsink = 0;
  for (int row = threadIdx.x / kLanesPerRow; row < kRowAlign; row += kRowsAtOnce) {
    const int i = tile * kRowAlign + row;
    const bool inside = i < s.q;
    float dot = 0;
    for (int d = 0; d < columns; d += kLanesPerRow * 8) {  // summed in the order of multiply_rows
      const float part = inside ? dot8(dout.row(i), out.row(i), d + lane * 8, columns, a.vectors) : 0.0f;
#pragma unroll
      for (int l = 0; l < kLanesPerRow; ++l) dot += dev::shfl_idx(part, dev::lane() / kLanesPerRow * kLanesPerRow + l);
    }
    if (lane != 0) continue;
    float total = kInfinity, delta = 0;
    if (inside) {
      const float lse = dev::ld_global_nc<float>(static_cast<const float*>(a.attention.lse.data) + lse_at + i);
      const float top = fmaxf(lse, sink);
      total = a.attention.sinks && top > -kInfinity ? top + logf(expf(sink - top) + expf(lse - top)) : lse;
      if (a.attention.sinks && total > -kInfinity) dsink -= expf(sink - total) * dot;
      delta = dot;
      if (a.grads.dlse && lse > -kInfinity) {
        const float dlse = dev::ld_global_nc<float>(static_cast<const float*>(a.grads.dlse) + lse_at + i);
        delta -= dlse * expf(total - lse);
      }
      if (lse == -kInfinity) total = kInfinity;
    }
    dev::st_global(a.lse + to + row, stored_lse<T>(total));
    dev::st_global(a.delta + to + row, delta);
  }
  if (!a.grads.dsinks) return;
  // The sums of the leaders (every eighth lane) in a fixed order.
  const uint32_t sums = dev::smem_base();
  if (lane == 0) dev::st_shared(sums + threadIdx.x / kLanesPerRow * 4, dsink);
  dev::sync_threads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int r = 0; r < kRowsAtOnce; ++r) sum += dev::ld_shared<float>(sums + r * 4);
  dev::st_global(a.sink_parts + (int64_t{b} * a.heads_q + h) * a.tiles + tile, sum);
}

// A block adds the parts of one head, of all sequences.
__global__ void __launch_bounds__(kSinkThreads) sum_sinks(const __grid_constant__ BackwardParams a) {
  const int h = blockIdx.x;
  float sum = 0;
  for (int64_t at = threadIdx.x; at < int64_t{a.batch} * a.tiles; at += kSinkThreads)
    sum += dev::ld_global_nc<float>(a.sink_parts + (at / a.tiles * a.heads_q + h) * a.tiles + at % a.tiles);
  const uint32_t sums = dev::smem_base();
  dev::st_shared(sums + threadIdx.x * 4, sum);
  dev::sync_threads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int t = 0; t < kSinkThreads; ++t) sum += dev::ld_shared<float>(sums + t * 4);
  dev::st_global(static_cast<float*>(a.grads.dsinks) + h, sum);
}

// dQ = scale * dq_sum, rounded. A block has kRowAlign queries of one head.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) round_query_gradient(const __grid_constant__ BackwardParams a) {
  const auto [b, h, tile] = block_place(a.tiles, a.heads_q);
  const Sequence s = sequence(a.attention, b);
  const HeadRows<T> dq(a.grads.dq, b, h, s.first_q);
  const int width = static_cast<int>(padded_head_dim(a.attention)), columns = static_cast<int>(a.attention.head_dim);
  const float* sums = a.dq_sum + ((int64_t{b} * a.heads_q + h) * a.rows + tile * kRowAlign) * width;
  for (int at = 4 * static_cast<int>(threadIdx.x); at < kRowAlign * width; at += 4 * kStatisticsThreads) {
    const int i = tile * kRowAlign + at / width, column = at % width;
    if (i >= s.q || column >= columns) continue;
    const float4 x = dev::ld_global_nc<float4>(sums + at);
    const float values[4] = {x.x * a.score.scale, x.y * a.score.scale, x.z * a.score.scale, x.w * a.score.scale};
    T* to = dq.row(i) + column;
    if (a.vectors) {
      dev::st_global(to, make_uint2(dev::pack<T>(values[0], values[1]), dev::pack<T>(values[2], values[3])));
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < columns) dev::st_global(to + e, dev::from_float<T>(values[e]));
  }
}

bool vectors(const AttentionParams& p, const AttentionGrads& g) {
  const bool varlen = p.cu_q != nullptr;
  const RowShape q{p.batch, varlen ? p.total_q : p.seq_q, p.heads_q, p.head_dim};
  const RowShape k{p.batch, varlen ? p.total_k : p.seq_kv, p.heads_kv, p.head_dim};
  const RowShape v{k.batch, k.seq, k.heads, p.head_dim_v}, out{q.batch, q.seq, q.heads, p.head_dim_v};
  const auto suit = [&](const RowShape& shape, std::initializer_list<const Rows*> operands) {
    return std::ranges::all_of(operands, [&](const Rows* x) { return suits_vectors(*x, shape, p.dtype); });
  };
  return suit(q, {&p.q, &g.dq}) && suit(k, {&p.k, &g.dk}) && suit(v, {&p.v, &g.dv}) && suit(out, {&p.out, &g.dout});
}

BackwardParams backward_params(const AttentionParams& p, const AttentionGrads& g) {
  BackwardParams a{};
  a.attention = p;
  a.grads = g;
  a.score = score_params(p);
  a.vectors = vectors(p, g);
  a.batch = static_cast<int>(p.batch);
  a.heads_q = static_cast<int>(p.heads_q);
  a.heads_kv = static_cast<int>(p.heads_kv);
  a.group = a.heads_kv > 0 ? a.heads_q / a.heads_kv : 1;
  a.rows = round_up<int64_t>(p.seq_q, kRowAlign);
  return a;
}

// Floats of lse and delta, and of the sinks' parts.
int64_t statistics_size(const BackwardParams& a) { return int64_t{a.batch} * a.heads_q * a.rows; }
int64_t dq_sum_size(const BackwardParams& a) {
  const bool fused =
      !a.grads.deterministic && a.attention.dtype != DType::kFloat32 && a.grads.dq.data && (a.grads.dk.data || a.grads.dv.data);
  return fused ? statistics_size(a) * padded_head_dim(a.attention) : 0;
}
int64_t sink_parts_size(const BackwardParams& a) { return a.grads.dsinks ? statistics_size(a) / kRowAlign : 0; }

}  // namespace

int64_t attention_backward_workspace(const AttentionParams& p, const AttentionGrads& g) {
  const BackwardParams a = backward_params(p, g);
  return 4 * (2 * statistics_size(a) + dq_sum_size(a) + sink_parts_size(a) + bias_gradient_workspace(p, g));
}

void attention_backward(const AttentionParams& p, const AttentionGrads& g, void* workspace, Stream stream) {
  BackwardParams a = backward_params(p, g);
  a.lse = static_cast<float*>(workspace);
  a.delta = a.lse + statistics_size(a);
  float* rest = a.delta + statistics_size(a);
  if (dq_sum_size(a) > 0) {
    a.dq_sum = rest;
    rest += dq_sum_size(a);
  }
  a.sink_parts = rest;
  rest += sink_parts_size(a);
  a.tiles = static_cast<int>(a.rows / kRowAlign);
  const dim3 grid = one_dimensional(int64_t{a.batch} * a.heads_q * a.tiles), block(kStatisticsThreads);
  if (p.dtype == DType::kBFloat16)
    launch<row_statistics<bf16>>(grid, block, kRowsAtOnce * 4, stream, a);
  else if (p.dtype == DType::kFloat16)
    launch<row_statistics<f16>>(grid, block, kRowsAtOnce * 4, stream, a);
  else
    launch<row_statistics<float>>(grid, block, kRowsAtOnce * 4, stream, a);
  if (g.dsinks) launch<sum_sinks>(dim3(a.heads_q), dim3(kSinkThreads), kSinkThreads * 4, stream, a);
  if (g.dk.data || g.dv.data) backward_key_gradients(a, stream);
  if (a.dq_sum && p.dtype == DType::kBFloat16)
    launch<round_query_gradient<bf16>>(grid, block, 0, stream, a);
  else if (a.dq_sum)
    launch<round_query_gradient<f16>>(grid, block, 0, stream, a);
  else if (g.dq.data)
    backward_query_gradient(a, stream);
  backward_bias_gradients(a, rest, stream);
}

}  // namespace foveate::cuda
