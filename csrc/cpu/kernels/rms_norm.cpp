// rms_norm, one row at a time: a row fits the cache, so the second pass reads it from there.
#include "core/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops/norm.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

template <class T>
void rms_norm_row(const T* x, const T* weight, T* out, float* rstd, int64_t cols, double eps) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int n = kLanes<A>;
  Vec<A> squares{};
  for (int64_t j = 0; j < cols; j += n) {
    const Vec<A> v = load_n<A>(x + j, cols - j);
    squares += v * v;
  }
  const A scale = 1 / std::sqrt(hsum(squares) / static_cast<A>(cols) + static_cast<A>(eps));
  if (rstd) *rstd = static_cast<float>(scale);
  for (int64_t j = 0; j < cols; j += n) {
    const int64_t rest = cols - j;
    Vec<A> y = load_n<A>(x + j, rest) * scale;
    if (weight) y *= load_n<A>(weight + j, rest);
    store_n(out + j, y, rest);
  }
}

}  // namespace

void rms_norm_forward(const RmsNormParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    parallel_for(p.rows, 1 + 16384 / p.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        rms_norm_row(static_cast<const T*>(p.x) + i * p.x_stride, static_cast<const T*>(p.weight), static_cast<T*>(p.out) + i * p.cols,
                     p.rstd ? p.rstd + i : nullptr, p.cols, p.eps);
    });
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
