// What a query sees: the one definition for every attention kernel. Key j is visible to query i if
//
//   0 <= j < keys   and   -left <= j - (i + shift) <= right,   shift = keys - queries (bottom-right alignment)
//
// and causal means right = 0. Positions are 64-bit on the CPU and in decode; the blocked CUDA kernels take 32 bits, where 64-bit arithmetic
// costs several times the instructions. Sums with the bounds of a window are ordered so that none overflows, whatever the lengths are.
#pragma once

#include <cstdint>
#include <limits>

#include "core/math.h"

namespace foveate {

template <class Int>
struct Window {
  Int left, right;
};

// window_left, window_right: -1 is unlimited, as the ops have it.
template <class Int>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr Window<Int> window_of(bool causal, int64_t window_left, int64_t window_right) {
  constexpr Int kUnlimited = std::numeric_limits<Int>::max() / 2 + 1;
  const int64_t left = window_left < 0 ? kUnlimited : min<int64_t>(window_left, kUnlimited);
  const int64_t right = causal ? 0 : window_right < 0 ? kUnlimited : min<int64_t>(window_right, kUnlimited);
  return {static_cast<Int>(left), static_cast<Int>(right)};
}

// Lengths of one batch entry or varlen sequence. Query i stands at key position i + shift.
template <class Int>
struct Lengths {
  Int q, k, shift;
};
template <class Int>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr Lengths<Int> lengths_of(Int q, Int k) {
  return {q, k, k - q};
}

template <class Int>
struct Span {
  Int begin, end;
  [[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr bool empty() const { return begin >= end; }
};

// The keys that some of the queries [first, last] see, all within [0, k). What the window excludes is taken off before the sum with it
// could overflow; k - (i + shift) is q - i.
template <class Int>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr Span<Int> visible_keys(const Window<Int>& w, const Lengths<Int>& s, Int first,
                                                                            Int last) {
  const Int begin = min(max<Int>(first + s.shift, w.left) - w.left, s.k);
  const Int end = max<Int>(last + s.shift + min<Int>(w.right + 1, s.q - last), 0);
  return {begin, max(begin, end)};
}
template <class Int>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr Span<Int> visible_keys(const Window<Int>& w, const Lengths<Int>& s, Int query) {
  return visible_keys(w, s, query, query);
}

// The queries that see some of the keys [first, last].
template <class Int>
[[gnu::always_inline]] FOVEATE_HOST_DEVICE constexpr Span<Int> visible_queries(const Window<Int>& w, const Lengths<Int>& s, Int first,
                                                                               Int last) {
  const Int begin = min(max<Int>(first - s.shift, w.right) - w.right, s.q);
  const Int end = max<Int>(last - s.shift + min<Int>(w.left + 1, s.k - last), 0);
  return {begin, max(begin, end)};
}

}  // namespace foveate
