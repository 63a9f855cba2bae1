// Cross-entropy and its gradient over rows of logits. The forward reads the logits once; the backward reads them again and writes
// the gradient, so nothing but max and log-sum is kept for a row.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/row.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;

template <class A>
struct Capped {
  Vec<A> x, slope;  // softcap * tanh(logit / softcap) and its derivative
};

template <bool kSoftcap, class A, class T>
FOVEATE_INLINE Capped<A> capped(const T* logits, int64_t rest, A softcap, A rest_value) {
  const Vec<A> logit = load_n<A>(logits, rest, rest_value);
  if constexpr (!kSoftcap) return {logit, splat<A>(1)};
  const Vec<A> t = tanhv(logit / softcap);
  const Vec<A> x = t * softcap;
  return {rest >= kLanes<A> ? x : iota<A>() < static_cast<IntOf<A>>(rest) ? x : splat<A>(rest_value), 1 - t * t};
}

template <bool kSoftcap, class A, class T>
FOVEATE_INLINE Capped<A> capped_at(const T* logit, A softcap) {
  return capped<kSoftcap, A>(logit, 1, softcap, A{0});
}

template <class T, bool kSoftcap>
void forward_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  const A softcap = static_cast<A>(p.options.softcap), smoothing = static_cast<A>(p.options.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    A &loss = static_cast<A*>(p.loss)[row], *stats = static_cast<A*>(p.stats) + 2 * row;
    const int64_t target = p.target[row];
    if (target == p.options.ignore_index) {
      loss = stats[0] = stats[1] = 0;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    const auto [max, sum] = max_and_sum<kExpDegree<T>, A>(p.cols, [&](int64_t j, int64_t rest) {
      return capped<kSoftcap, A>(logits + j, rest, softcap, -std::numeric_limits<A>::infinity()).x;
    });
    const A log_sum = std::log(sum), lse = max + log_sum;
    const A at_target = capped_at<kSoftcap, A>(logits + target, softcap).x[0];
    stats[0] = max;
    stats[1] = log_sum;
    loss = log_sum - (1 - smoothing) * (at_target - max);
    if (smoothing > 0) {
      const A total =
          sum_row<A>(p.cols, [&](int64_t j, int64_t rest) { return capped<kSoftcap, A>(logits + j, rest, softcap, max).x - max; });
      loss -= smoothing * (total / static_cast<A>(p.cols));
    }
    if (p.options.z_loss != 0) loss += static_cast<A>(p.options.z_loss) * lse * lse;
  }
}

template <class T, bool kSoftcap>
void backward_rows(const CrossEntropyParams& p, int64_t begin, int64_t end, bool stream) {
  using A = AccumulatorOf<T>;
  const A softcap = static_cast<A>(p.options.softcap), smoothing = static_cast<A>(p.options.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    T* dlogits = static_cast<T*>(p.dlogits) + row * p.cols;
    const int64_t target = p.target[row];
    if (target == p.options.ignore_index) {
      std::memset(static_cast<void*>(dlogits), 0, static_cast<size_t>(p.cols) * sizeof(T));
      continue;
    }
    const A dloss = static_cast<const A*>(p.dloss)[row * p.dloss_stride];
    const A max = static_cast<const A*>(p.stats)[2 * row], log_sum = static_cast<const A*>(p.stats)[2 * row + 1];
    // The gradient of x[j]: probability * dlse - dloss * smoothing / cols, and - dloss * (1 - smoothing) at the target.
    const A dlse = dloss * (1 + 2 * static_cast<A>(p.options.z_loss) * (max + log_sum));
    const A uniform = dloss * smoothing / static_cast<A>(p.cols);
    const auto gradient = [&](const Capped<A>& c, A at_target) {
      return (exp_to<kExpDegree<T>, A>((c.x - max) - log_sum) * dlse - uniform - at_target) * c.slope;
    };
    // dlogits may be logits: the target's gradient is taken before its logit is overwritten.
    const A dtarget = gradient(capped_at<kSoftcap, A>(logits + target, softcap), dloss * (1 - smoothing))[0];
    write_row<A>(dlogits, p.cols, stream,
                 [&](int64_t j, int64_t rest) { return gradient(capped<kSoftcap, A>(logits + j, rest, softcap, A{0}), 0); });
    from_float(dlogits + target, dtarget);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    visit_bool(p.options.softcap > 0, [&](auto softcap) {
      parallel_for(p.rows, 1 + kGrainElements / p.cols, threads,
                   [&](int64_t begin, int64_t end) { forward_rows<T, softcap>(p, begin, end); });
    });
  });
}

void cross_entropy_backward(const CrossEntropyParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    const bool stream = p.dlogits != p.logits && p.rows * p.cols * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    visit_bool(p.options.softcap > 0, [&](auto softcap) {
      parallel_for(p.rows, 1 + kGrainElements / p.cols, threads,
                   [&](int64_t begin, int64_t end) { backward_rows<T, softcap>(p, begin, end, stream); });
    });
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
