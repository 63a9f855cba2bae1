// swiglu and geglu in one pass: each input is read once, nothing is kept between. The backward computes the activation again.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/row.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;
constexpr double kTwiceRoot2OverPi = 1.5957691216057308, kCubic = 0.044715;

template <class A>
struct Activation {
  Vec<A> value, slope;
};

// g * sigmoid(h) and its derivative. e = exp(-|h|) is at most 1, so nothing overflows.
template <bool kGelu, class A>
FOVEATE_INLINE Activation<A> activation(Vec<A> g) {
  Vec<A> h = g, dh = splat<A>(1);
  if constexpr (kGelu) {
    // Beyond this the sigmoid is 0 or 1 to the last bit, and the cube would overflow for huge g. NaN passes both comparisons.
    const A limit = 40;
    const Vec<A> c = g > limit ? splat<A>(limit) : g < -limit ? splat<A>(-limit) : g;
    const Vec<A> square = c * c;
    h = static_cast<A>(kTwiceRoot2OverPi) * c * (1 + static_cast<A>(kCubic) * square);
    dh = static_cast<A>(kTwiceRoot2OverPi) * (1 + static_cast<A>(3 * kCubic) * square);
  }
  const Vec<A> e = expv<A>(-vabs<A>(h)), r = 1 / (1 + e);
  const Vec<A> s = h < 0 ? e * r : r, rest = h < 0 ? r : e * r;  // sigmoid(h) and sigmoid(-h)
  const Vec<A> value = g * s;
  return {value, s + value * rest * dh};
}

template <class T, bool kGelu>
void forward_rows(const GluParams& p, int64_t begin, int64_t end, bool stream) {
  using A = AccumulatorOf<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = static_cast<const T*>(p.gate) + row * p.gate_stride, *up = static_cast<const T*>(p.up) + row * p.up_stride;
    write_row<A>(static_cast<T*>(p.out) + row * p.cols, p.cols, stream,
                 [&](int64_t j, int64_t rest) { return activation<kGelu, A>(load_n<A>(gate + j, rest)).value * load_n<A>(up + j, rest); });
  }
}

template <class T, bool kGelu>
void backward_rows(const GluParams& p, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = static_cast<const T*>(p.gate) + row * p.gate_stride, *up = static_cast<const T*>(p.up) + row * p.up_stride;
    const T* dout = static_cast<const T*>(p.dout) + row * p.cols;
    T *dgate = static_cast<T*>(p.dgate) + row * p.cols, *dup = static_cast<T*>(p.dup) + row * p.cols;
    for (int64_t j = 0; j < p.cols; j += kLanes<A>) {
      const int64_t rest = p.cols - j;
      const Vec<A> d = load_n<A>(dout + j, rest);
      const Activation<A> a = activation<kGelu, A>(load_n<A>(gate + j, rest));
      store_n(dgate + j, d * load_n<A>(up + j, rest) * a.slope, rest);
      store_n(dup + j, d * a.value, rest);
    }
  }
}

}  // namespace

void glu_forward(const GluParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    const bool stream = p.rows * p.cols * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    visit_bool(p.gelu, [&](auto gelu) {
      parallel_for(p.rows, 1 + kGrainElements / p.cols, threads,
                   [&](int64_t begin, int64_t end) { forward_rows<T, gelu>(p, begin, end, stream); });
    });
  });
}

void glu_backward(const GluParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    visit_bool(p.gelu, [&](auto gelu) {
      parallel_for(p.rows, 1 + kGrainElements / p.cols, threads,
                   [&](int64_t begin, int64_t end) { backward_rows<T, gelu>(p, begin, end); });
    });
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
