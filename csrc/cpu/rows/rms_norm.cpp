// rms_norm, one row at a time: a row fits the cache, so the second pass reads it from there.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/row.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// With a residual, sum = x + residual, rounded to T, and the norm is that of sum.
template <class T, class W, class A = AccumulatorOf<T>>
void forward_row(const T* x, const T* residual, const W* weight, T* sum, T* out, A* rstd, int64_t cols, double eps) {
  constexpr int n = kLanes<A>;
  if (residual) {
    for (int64_t j = 0; j < cols; j += n) store_n(sum + j, load_n<A>(x + j, cols - j) + load_n<A>(residual + j, cols - j), cols - j);
    x = sum;
  }
  const A squares = sum_row<A>(cols, [&](int64_t j, int64_t rest) {
    const Vec<A> v = load_n<A>(x + j, rest);
    return v * v;
  });
  const A scale = 1 / std::sqrt(squares / static_cast<A>(cols) + static_cast<A>(eps));
  if (rstd) *rstd = scale;
  for (int64_t j = 0; j < cols; j += n) {
    const int64_t rest = cols - j;
    Vec<A> y = load_n<A>(x + j, rest) * scale;
    if (weight) y *= load_n<A>(weight + j, rest);
    store_n(out + j, y, rest);
  }
}

// dsum and dweight may be null; dweight is added to.
template <class T, class W, class A = AccumulatorOf<T>>
void backward_row(const T* dout, const T* x, const W* weight, A rstd, const T* dsum, T* dx, A* dweight, int64_t cols) {
  constexpr int n = kLanes<A>;
  const auto weighted = [&](int64_t j, int64_t rest) {
    const Vec<A> g = load_n<A>(dout + j, rest);
    return weight ? g * load_n<A>(weight + j, rest) : g;
  };
  const A products = sum_row<A>(cols, [&](int64_t j, int64_t rest) { return weighted(j, rest) * load_n<A>(x + j, rest); });
  const A mean = products * rstd / static_cast<A>(cols);  // of g * n, n = x * rstd
  for (int64_t j = 0; j < cols; j += n) {
    const int64_t rest = cols - j;
    const Vec<A> normed = load_n<A>(x + j, rest) * rstd;
    Vec<A> d = (weighted(j, rest) - normed * mean) * rstd;
    if (dsum) d += load_n<A>(dsum + j, rest);
    store_n(dx + j, d, rest);
    if (dweight) store_n(dweight + j, load_n<A>(dweight + j, rest) + load_n<A>(dout + j, rest) * normed, rest);
  }
}

// f(T, W): the dtypes of x and of the weight, which is that of x or the accumulator's.
template <class F>
FOVEATE_INLINE void visit_dtypes(DType dtype, DType weight_dtype, const F& f) {
  visit_float(dtype, [&]<class T>(std::type_identity<T> t) {
    if (weight_dtype == dtype)
      f(t, t);
    else
      f(t, std::type_identity<AccumulatorOf<T>>{});
  });
}

}  // namespace

void rms_norm_forward(const RmsNormParams& p, int threads) {
  visit_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>(std::type_identity<T>, std::type_identity<W>) {
    using A = AccumulatorOf<T>;
    parallel_for(p.rows, 1 + 16384 / p.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* residual = p.residual ? static_cast<const T*>(p.residual) + i * p.residual_stride : nullptr;
        T* sum = p.sum ? static_cast<T*>(p.sum) + i * p.cols : nullptr;
        forward_row(static_cast<const T*>(p.x) + i * p.x_stride, residual, static_cast<const W*>(p.weight), sum,
                    static_cast<T*>(p.out) + i * p.cols, p.rstd ? static_cast<A*>(p.rstd) + i : nullptr, p.cols, p.eps);
      }
    });
  });
}

void rms_norm_backward(const RmsNormBackwardParams& p, int threads) {
  visit_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>(std::type_identity<T>, std::type_identity<W>) {
    using A = AccumulatorOf<T>;
    parallel_tasks(p.parts, threads, [&](int64_t part, int) {
      A* dweight = p.dweight_parts ? static_cast<A*>(p.dweight_parts) + part * p.cols : nullptr;
      if (dweight) std::memset(dweight, 0, static_cast<size_t>(p.cols) * sizeof(A));
      for (int64_t i = p.rows * part / p.parts; i < p.rows * (part + 1) / p.parts; ++i) {
        const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + i * p.cols : nullptr;
        backward_row(static_cast<const T*>(p.dout) + i * p.cols, static_cast<const T*>(p.x) + i * p.x_stride,
                     static_cast<const W*>(p.weight), static_cast<const A*>(p.rstd)[i], dsum, static_cast<T*>(p.dx) + i * p.cols, dweight,
                     p.cols);
      }
    });
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
