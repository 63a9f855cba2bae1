// softmax and log_softmax over rows. Every row is read from memory once: what follows the first pass finds it in the cache.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/rows/softmax_columns.inl.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/row.h"
#include "cpu/simd/scratch.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// Rows are handed out in blocks of about this many elements: enough to hide the hand-out, small enough to balance causal rows.
constexpr int64_t kTaskElements = 32768;
// Columns up to which exp is kept: 256 KiB of fp32, which stays in L2.
constexpr int64_t kKeptColumns = 65536;

// One exp per element: maximum, then exp and sum, then the division. `next` is asked for meanwhile: the exp keeps the CPU busy for as long
// as memory needs for a row.
template <class T, class A, class Scores>
FOVEATE_INLINE void softmax_short_row(T* out, int64_t cols, bool stream, const T* next, A* kept, const Scores& scores) {
  constexpr int lanes = kLanes<A>, unroll = 4;
  Vec<A> peaks[unroll];
  for (auto& peak : peaks) peak = splat<A>(std::numeric_limits<A>::lowest());
  int64_t j = 0;
  for (; j + unroll * lanes <= cols; j += unroll * lanes)
    for (int u = 0; u < unroll; ++u) peaks[u] = vmax(peaks[u], scores(j + u * lanes, lanes));
  for (; j < cols; j += lanes) peaks[0] = vmax(peaks[0], scores(j, cols - j));
  const A max = hmax(vmax(vmax(peaks[0], peaks[1]), vmax(peaks[2], peaks[3])));

  const A sum = sum_row<A>(cols, [&](int64_t j, int64_t rest) {
    const Vec<A> e = exp_to<kExpDegree<T>, A>(scores(j, rest) - max);
    __builtin_prefetch(next + j);
    store(kept + j, e);
    return e;
  });
  const A inverse = sum == 0 ? 0 : 1 / sum;
  write_row<A>(out, cols, stream, [&](int64_t j, int64_t) { return load<A>(kept + j) * inverse; });
}

// Longer rows: max and sum in one pass over memory, exp again in the second rather than stored.
template <class T, class A, class Scores>
FOVEATE_INLINE void softmax_long_row(T* out, int64_t cols, bool stream, const Scores& scores) {
  const auto [max, sum] = max_and_sum<kExpDegree<T>, A>(cols, scores);
  const A inverse = sum == 0 ? 0 : 1 / sum;
  write_row<A>(out, cols, stream, [&](int64_t j, int64_t rest) { return exp_to<kExpDegree<T>, A>(scores(j, rest) - max) * inverse; });
}

template <class T, class A, class Scores>
FOVEATE_INLINE void log_softmax_row(T* out, int64_t cols, bool stream, const Scores& scores) {
  const auto [max, sum] = max_and_sum<kExpDegree<T>, A>(cols, scores);
  // An empty row keeps its -inf: max is the lowest finite number there, and log(0) must not meet it.
  const A log_sum = sum == 0 ? 0 : std::log(sum);
  write_row<A>(out, cols, stream, [&](int64_t j, int64_t rest) { return (scores(j, rest) - max) - log_sum; });
}

struct Offsets {
  int64_t x = 0, bias = 0, mask = 0;
};

FOVEATE_INLINE Offsets offsets_of(const SoftmaxParams& p, int64_t row) {
  Offsets at;
  for (int d = p.ndim - 1; d >= 0; --d) {
    const int64_t index = row % p.shape[d];
    row /= p.shape[d];
    at.x += index * p.x_stride[d];
    at.bias += index * p.bias_stride[d];
    at.mask += index * p.mask_stride[d];
  }
  return at;
}

// B is the dtype of the bias, void without one.
template <class T, class B, bool kMask, bool kLog>
void softmax_rows(const SoftmaxParams& p, int64_t begin, int64_t end, bool stream, AccumulatorOf<T>* kept) {
  using A = AccumulatorOf<T>;
  const A scale = static_cast<A>(p.scale), hidden = -std::numeric_limits<A>::infinity();
  for (int64_t row = begin; row < end; ++row) {
    const Offsets at = offsets_of(p, row);
    const T* x = static_cast<const T*>(p.x) + at.x;
    T* out = static_cast<T*>(p.out) + row * p.cols;
    int64_t cols = p.cols;
    if (p.causal_rows) {
      cols = row % p.causal_rows + 1 + p.cols - p.causal_rows;
      cols = clamp<int64_t>(cols, 0, p.cols);
    }
    const int8_t* mask = kMask ? p.mask + at.mask : nullptr;
    if (kMask && !p.mask_per_column && !*mask) cols = 0;

    const auto scores = [&](int64_t j, int64_t rest) {
      Vec<A> s = load_n<A>(x + j, rest) * scale;
      if constexpr (!std::is_void_v<B>) {
        const B* bias = static_cast<const B*>(p.bias) + at.bias;
        s += p.bias_per_column ? load_n<A>(bias + j, rest) : splat<A>(static_cast<A>(to_float(*bias)));
      }
      if constexpr (kMask) {
        if (p.mask_per_column) s = load_n<A>(mask + j, rest) != 0 ? s : splat<A>(hidden);
      }
      return rest >= kLanes<A> ? s : iota<A>() < static_cast<IntOf<A>>(rest) ? s : splat<A>(hidden);
    };
    if constexpr (kLog)
      log_softmax_row<T, A>(out, cols, stream, scores);
    else if (cols <= kKeptColumns)
      softmax_short_row<T, A>(out, cols, stream, x + p.cols, kept, scores);
    else
      softmax_long_row<T, A>(out, cols, stream, scores);
    if (cols < p.cols) std::memset(static_cast<void*>(out + cols), 0, static_cast<size_t>(p.cols - cols) * sizeof(T));
  }
}

// Rows shorter than a vector, without options: transposed, a row is a lane, and none is empty.
constexpr int64_t kTinyColumns = 16;

template <class T, bool kLog>
void softmax_tiny_rows(const SoftmaxParams& p, int64_t begin, int64_t end) {
  using A = AccumulatorOf<T>;
  constexpr int64_t block = kColumnBlock<A>;
  A in[kTinyColumns * block], out[kTinyColumns * block];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t n = min<int64_t>(block, end - first);
    for (int64_t i = 0; i < n; ++i) {
      const T* x = static_cast<const T*>(p.x) + offsets_of(p, first + i).x;
      for (int64_t c = 0; c < p.cols; ++c) in[c * block + i] = static_cast<A>(to_float(x[c]));
    }
    softmax_columns_tile<kExpDegree<T>, kLog>(in, block, out, block, p.cols, n, static_cast<A>(p.scale), out);
    for (int64_t i = 0; i < n; ++i) {
      T* y = static_cast<T*>(p.out) + (first + i) * p.cols;
      for (int64_t c = 0; c < p.cols; ++c) from_float(y + c, out[c * block + i]);
    }
  }
}

template <class T, class B, bool kMask, bool kLog>
void softmax_tasks(const SoftmaxParams& p, int threads) {
  const bool stream = p.rows * p.cols * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  const int64_t block = 1 + kTaskElements / p.cols;
  using A = AccumulatorOf<T>;
  if constexpr (std::is_void_v<B> && !kMask) {
    if (p.cols <= kTinyColumns && p.causal_rows == 0)
      return parallel_tasks(ceil_div(p.rows, block), threads, [&](int64_t task, int) {
        softmax_tiny_rows<T, kLog>(p, task * block, min<int64_t>(p.rows, (task + 1) * block));
      });
  }
  const int64_t kept =
      kLog || p.cols > kKeptColumns ? 0 : (round_up<int64_t>(p.cols, kLanes<A>) + kLanes<A>)*static_cast<int64_t>(sizeof(A));
  Scratch scratch;
  scratch.allocate(kept * threads);  // a vector more than the row: past the cache, stores begin at the output's alignment
  parallel_tasks(ceil_div(p.rows, block), threads, [&](int64_t task, int thread) {
    softmax_rows<T, B, kMask, kLog>(p, task * block, min<int64_t>(p.rows, (task + 1) * block), stream, scratch.at<A>(kept * thread));
  });
}

template <class T, bool kLog>
void softmax_backward_row(const T* dout, const T* out, auto* dx, int64_t cols, AccumulatorOf<T> scale, bool stream) {
  using A = AccumulatorOf<T>;
  const A sum = sum_row<A>(cols, [&](int64_t j, int64_t rest) {
    const Vec<A> dy = load_n<A>(dout + j, rest);
    return kLog ? dy : dy * load_n<A>(out + j, rest);
  });
  write_row<A>(dx, cols, stream, [&](int64_t j, int64_t rest) {
    const Vec<A> dy = load_n<A>(dout + j, rest), y = load_n<A>(out + j, rest);
    return kLog ? dy - exp_to<kExpDegree<T>, A>(y) * sum : (dy - sum) * y * scale;
  });
}

}  // namespace

void softmax_forward(const SoftmaxParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    using A = AccumulatorOf<T>;
    if (p.log) return softmax_tasks<T, void, false, true>(p, threads);
    visit_bool(p.mask != nullptr, [&](auto mask) {
      if (!p.bias)
        softmax_tasks<T, void, mask, false>(p, threads);
      else if (p.bias_dtype == p.dtype)
        softmax_tasks<T, T, mask, false>(p, threads);
      else
        softmax_tasks<T, A, mask, false>(p, threads);
    });
  });
}

void softmax_backward(const SoftmaxBackwardParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    using A = AccumulatorOf<T>;
    const auto run = [&]<class Out>(Out* dx) {
      const bool stream = p.rows * p.cols * static_cast<int64_t>(sizeof(Out)) >= kStreamBytes;
      const int64_t block = 1 + kTaskElements / p.cols;
      parallel_tasks(ceil_div(p.rows, block), threads, [&](int64_t task, int) {
        for (int64_t row = task * block; row < min<int64_t>(p.rows, (task + 1) * block); ++row) {
          const int64_t at = row * p.cols;
          const T *dout = static_cast<const T*>(p.dout) + at, *out = static_cast<const T*>(p.out) + at;
          if (p.log)
            softmax_backward_row<T, true>(dout, out, dx + at, p.cols, static_cast<A>(p.scale), stream);
          else
            softmax_backward_row<T, false>(dout, out, dx + at, p.cols, static_cast<A>(p.scale), stream);
        }
      });
    };
    if (p.dx_wide)
      run(static_cast<A*>(p.dx));
    else
      run(static_cast<T*>(p.dx));
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
