// softmax down the columns of a tile [cols][n], n lanes of up to kColumnBlock beside each other: for a dimension that is not the last, and
// for rows so short that a few of them, transposed, fill a vector. Three passes over the tile, which the cache holds: maximum,
// exponentials, division.
#pragma once

#include "cpu/simd/row.h"

namespace foveate::cpu::FOVEATE_ISA {

constexpr int kColumnVecs = 4;
template <class A>
constexpr int64_t kColumnBlock = kColumnVecs * kLanes<A>;
// Exponentials kept for the last pass: 256 KiB of fp32. Longer columns take them twice.
constexpr int64_t kKeptElements = 65536;
// A running sum is added to the total after so many terms: with one alone, the rounding of a column of 50k shows.
constexpr int64_t kColumnChain = 512;

// The natural logarithm of a sum of exponentials, 1 or more, infinite or NaN: Cephes' logf, in a relative error of 1e-7 of 1 + the result.
FOVEATE_INLINE VecF log_of_sum(VecF x) {
  const VecI bits = bit_cast<VecI>(x);
  const VecF half = bit_cast<VecF>((bits & 0x7fffff) | 0x3f000000);  // in [1/2, 1)
  const auto small = half < 0.707106781186547524f;
  const VecF e = __builtin_convertvector((bits >> 23) - 126 + small, VecF), m = (small ? half + half : half) - 1.0f, z = m * m;
  VecF y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + e * -2.12194440e-4f - z * 0.5f;
  return x < kInf ? m + y + e * 0.693359375f : x;
}
FOVEATE_INLINE Vec<double> log_of_sum(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// f(v, j, rest): vector v of a row at column j, of which `rest` lanes are inside.
template <class A, class F>
FOVEATE_INLINE void each_vector(int64_t n, const F& f) {
  if (n == kColumnBlock<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumnVecs; ++v) f(v, v * kLanes<A>, int64_t{kLanes<A>});
  } else {
    for (int v = 0; v * kLanes<A> < n; ++v) f(v, v * kLanes<A>, n - v * kLanes<A>);
  }
}

// x, out: rows at the given strides. kept: [cols][kColumnBlock], or null.
template <int kDegree, bool kLog, class A, class In, class Out>
FOVEATE_INLINE void softmax_columns_tile(const In* x, int64_t x_stride, Out* out, int64_t out_stride, int64_t cols, int64_t n, A scale,
                                         A* kept) {
  constexpr int64_t block = kColumnBlock<A>;
  Vec<A> peak[kColumnVecs], sum[kColumnVecs] = {}, total[kColumnVecs] = {};
  for (auto& p : peak) p = splat<A>(std::numeric_limits<A>::lowest());
  for (int64_t c = 0; c < cols; ++c)
    each_vector<A>(n, [&](int v, int64_t j, int64_t rest) { peak[v] = vmax(peak[v], load_n<A>(x + c * x_stride + j, rest) * scale); });
  const auto exponential = [&](int64_t c, int v, int64_t j, int64_t rest) {
    return exp_to<kDegree, A>(load_n<A>(x + c * x_stride + j, rest) * scale - peak[v]);
  };
  for (int64_t c = 0; c < cols; ++c) {
    each_vector<A>(n, [&](int v, int64_t j, int64_t rest) {
      const Vec<A> e = exponential(c, v, j, rest);
      sum[v] += e;
      if (!kLog && kept) store(kept + c * block + j, e);
    });
    if (c % kColumnChain == kColumnChain - 1)
      for (int v = 0; v < kColumnVecs; ++v) total[v] += sum[v], sum[v] = Vec<A>{};
  }
  for (int v = 0; v < kColumnVecs; ++v) {
    total[v] += sum[v];
    if constexpr (kLog) {
      // An empty column keeps its -inf: the peak is the lowest finite number there, and log(0) must not meet it.
      total[v] = total[v] == 0 ? Vec<A>{} : log_of_sum(total[v]);
    } else {
      total[v] = total[v] == 0 ? Vec<A>{} : 1 / total[v];
    }
  }
  for (int64_t c = 0; c < cols; ++c)
    each_vector<A>(n, [&](int v, int64_t j, int64_t rest) {
      Vec<A> y;
      if constexpr (kLog)
        y = (load_n<A>(x + c * x_stride + j, rest) * scale - peak[v]) - total[v];
      else
        y = (kept ? load<A>(kept + c * block + j) : exponential(c, v, j, rest)) * total[v];
      store_n(out + c * out_stride + j, y, rest);
    });
}

template <int kDegree, bool kLog, class A, class In, class Out>
FOVEATE_INLINE void softmax_backward_columns_tile(const In* dout, const In* out, Out* dx, int64_t stride, int64_t cols, int64_t n,
                                                  A scale) {
  Vec<A> sum[kColumnVecs] = {}, total[kColumnVecs] = {};
  for (int64_t c = 0; c < cols; ++c) {
    each_vector<A>(n, [&](int v, int64_t j, int64_t rest) {
      const Vec<A> dy = load_n<A>(dout + c * stride + j, rest);
      sum[v] += kLog ? dy : dy * load_n<A>(out + c * stride + j, rest);
    });
    if (c % kColumnChain == kColumnChain - 1)
      for (int v = 0; v < kColumnVecs; ++v) total[v] += sum[v], sum[v] = Vec<A>{};
  }
  for (int v = 0; v < kColumnVecs; ++v) total[v] += sum[v];
  for (int64_t c = 0; c < cols; ++c)
    each_vector<A>(n, [&](int v, int64_t j, int64_t rest) {
      const Vec<A> dy = load_n<A>(dout + c * stride + j, rest), y = load_n<A>(out + c * stride + j, rest);
      store_n(dx + c * stride + j, kLog ? dy - exp_to<kDegree, A>(y) * total[v] : (dy - total[v]) * y * scale, rest);
    });
}

}  // namespace foveate::cpu::FOVEATE_ISA
