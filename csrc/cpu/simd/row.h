// What kernels over rows share: sums, the maximum of a row and the sum of exp(s - max) in one pass over memory (Milakov and
// Gimelshein 2018), and stores that bypass the cache. A row is given as a function (j, rest) -> Vec<A> of the columns from j on.
#pragma once

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

template <class T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// exp's polynomial degree in front of a rounding to T.
template <class T>
constexpr int kExpDegree = sizeof(T) == 2 ? 4 : 5;

template <int kDegree, class A>
FOVEATE_INLINE Vec<A> exp_to(Vec<A> x) {
  return exp2v<kDegree>(x * static_cast<A>(kLog2e));
}

// The sum of a row, whose function gives 0 in lanes from `rest` on. Blocks add up by themselves before they join the total: with one
// running sum the rounding of a row of 50k columns shows in vectors of 4 lanes.
template <class A, class Value>
FOVEATE_INLINE A sum_row(int64_t cols, const Value& value) {
  constexpr int lanes = kLanes<A>, unroll = 4;
  constexpr int64_t block = 1024;
  static_assert(block % (unroll * lanes) == 0);
  Vec<A> total{};
  for (int64_t begin = 0; begin < cols; begin += block) {
    const int64_t end = min<int64_t>(cols, begin + block);
    Vec<A> sums[unroll] = {};
    int64_t j = begin;
    for (; j + unroll * lanes <= end; j += unroll * lanes)
      for (int u = 0; u < unroll; ++u) sums[u] += value(j + u * lanes, lanes);
    for (; j < end; j += lanes) sums[0] += value(j, end - j);
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return hsum(total);
}

template <class A>
struct MaxSum {
  A max, sum;  // sum 0: every score was -inf
};

// scores(j, rest) gives Vec<A> of columns j.., -inf in lanes from `rest` on. Each lane keeps its own running maximum; it starts at the
// lowest finite number and not at -inf, so that no difference is inf - inf. NaN reaches the sum.
template <int kDegree, class A, class Scores>
FOVEATE_INLINE MaxSum<A> max_and_sum(int64_t cols, const Scores& scores) {
  constexpr int lanes = kLanes<A>, group = 8;
  Vec<A> peak = splat<A>(std::numeric_limits<A>::lowest()), sum{};
  int64_t j = 0;
  for (; j + group * lanes <= cols; j += group * lanes) {
    Vec<A> s[group];
    for (int u = 0; u < group; ++u) s[u] = scores(j + u * lanes, lanes);
    const Vec<A> top = vmax(vmax(vmax(s[0], s[1]), vmax(s[2], s[3])), vmax(vmax(s[4], s[5]), vmax(s[6], s[7])));
    const Vec<A> next = vmax(peak, top), shrink = exp_to<kDegree, A>(peak - next);
    for (int u = 0; u < group; ++u) s[u] = exp_to<kDegree, A>(s[u] - next);
    // The group adds up by itself first: fewer roundings of the running sum.
    sum = sum * shrink + (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
    peak = next;
  }
  for (; j < cols; j += lanes) {
    const Vec<A> s = scores(j, cols - j), next = vmax(peak, s), shrink = exp_to<kDegree, A>(peak - next);
    sum = sum * shrink + exp_to<kDegree, A>(s - next);
    peak = next;
  }
  const A max = hmax(peak);
  return {max, hsum(sum * exp_to<kDegree, A>(peak - splat<A>(max)))};
}

// store() past the cache, for outputs that it could not hold anyway. p is aligned to the bytes of one vector of T.
template <class T, class V>
FOVEATE_INLINE void store_stream(T* p, V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  [[maybe_unused]] constexpr int bytes = lanes * sizeof(T);
  T converted[lanes];
  store(converted, v);
#if defined(__AVX512F__)
  if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_raw<__m512i>(converted));
#endif
#if defined(__AVX2__)
  if constexpr (bytes == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_raw<__m256i>(converted));
#endif
#if defined(__SSE2__)
  if constexpr (bytes == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_raw<__m128i>(converted));
#endif
  store(p, v);
}

// Outputs from this size on are stored past the cache: they would only push the input out of it.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// out[j..] = value(j, rest) for a whole row. With `stream`, the aligned part goes past the cache.
template <class A, class T, class Value>
FOVEATE_INLINE void write_row(T* out, int64_t cols, bool stream, const Value& value) {
  constexpr int lanes = kLanes<A>;
  constexpr int64_t bytes = lanes * sizeof(T);
  int64_t j = 0;
  if (stream) {
    const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % bytes / sizeof(T));
    if (head > 0 && head < cols) store_n(out, value(0, head), head), j = head;
    if (head < cols)
      for (; j + lanes <= cols; j += lanes) store_stream(out + j, value(j, lanes));
#if defined(__SSE2__)
    _mm_sfence();  // other threads may read the row after the join
#endif
  }
  for (; j + lanes <= cols; j += lanes) store(out + j, value(j, lanes));
  if (j < cols) store_n(out + j, value(j, cols - j), cols - j);
}

}  // namespace foveate::cpu::FOVEATE_ISA
