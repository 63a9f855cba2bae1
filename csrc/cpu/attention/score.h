// What happens to one row of scores between q k^T and the softmax, and to one row of probabilities after it. Shared by forward and
// backward, so that the backward recomputes exactly what the forward saw. Order and signs: python/foveate/backend/reference/attention.py.
#pragma once

#include "core/philox.h"
#include "core/visible.h"
#include "cpu/attention/pack.h"

namespace foveate::cpu::FOVEATE_ISA {

using Sequence = Lengths<int64_t>;
using Range = Span<int64_t>;

FOVEATE_INLINE Window<int64_t> window(const AttentionProblem& p) { return window_of<int64_t>(p.causal, p.window_left, p.window_right); }
FOVEATE_INLINE Sequence sequence(const AttentionProblem& p, int64_t b) {
  return lengths_of(p.seq_q, p.kv_lens ? p.kv_lens[b] + p.new_keys : p.seq_kv);
}
FOVEATE_INLINE Sequence sequence(const AttentionParams& p, int64_t b) {
  if (!p.cu_q) return sequence(static_cast<const AttentionProblem&>(p), b);
  return lengths_of<int64_t>(p.cu_q[b + 1] - p.cu_q[b], p.cu_k[b + 1] - p.cu_k[b]);
}

// True if anything but scale and the visible range changes the scores. Dropout acts on probabilities.
FOVEATE_INLINE bool changes_scores(const AttentionParams& p) {
  return p.softcap > 0 || p.bias.defined() || p.mask.defined() || p.alibi || p.rel_table || !(p.scale > 0);
}

// One bias value per distance j - (i + shift), expanded from the bucket table: [Hq][seq_q + seq_kv - 1], so that the bias of a row is a
// slice.
template <class Acc>
FOVEATE_INLINE void expand_relative(const AttentionParams& p, Acc* expanded) {
  const int64_t n = p.seq_q + p.seq_kv - 1;
  const Acc* table = static_cast<const Acc*>(p.rel_table);
  for (int64_t h = 0; h < p.heads_q; ++h)
    for (int64_t t = 0; t < n; ++t) expanded[h * n + t] = table[p.rel_buckets[t] * p.heads_q + h];
}
// Index of the distance of key 0 from query i.
FOVEATE_INLINE int64_t relative_origin(const AttentionParams& p, const Sequence& s, int64_t i) { return p.seq_kv - 1 - (i + s.shift); }

template <class Acc, class T>
FOVEATE_INLINE void add_typed(Acc* x, const T* operand, int64_t stride, int64_t n) {
  constexpr int w = kLanes<Acc>;
  if (stride == 1) {
    for (int64_t j = 0; j < n; j += w) store_raw(x + j, load_raw<Vec<Acc>>(x + j) + load_n<Acc>(operand + j, n - j));
  } else {
    for (int64_t j = 0; j < n; ++j) x[j] += static_cast<Acc>(to_float(operand[j * stride]));
  }
}

FOVEATE_INLINE const char* operand_at(const ScoreOperand& t, int64_t b, int64_t h, int64_t i, int64_t j) {
  return static_cast<const char*>(t.data) + (b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + j * t.stride[3]) * size_of(t.dtype);
}

// x: raw q k^T of query i of head h against keys [j, j + n) -> logits. slope (may be null) takes d(logit)/d(scale * q k^T)
// of the softcap. x has room for n rounded up to a vector; the rest of the vector becomes garbage.
template <class Acc>
FOVEATE_INLINE void score_row(const AttentionParams& p, const Sequence& s, const Acc* relative, int64_t b, int64_t h, int64_t i, int64_t j,
                              int64_t n, Acc* x, Acc* slope) {
  using V = Vec<Acc>;
  constexpr int w = kLanes<Acc>;
  const Acc scale = static_cast<Acc>(p.scale);
  if (p.softcap > 0) {
    const Acc cap = static_cast<Acc>(p.softcap), inner = static_cast<Acc>(p.scale / p.softcap);
    for (int64_t t = 0; t < n; t += w) {
      const V tanh = tanhv(load_raw<V>(x + t) * inner);
      store_raw(x + t, tanh * cap);
      if (slope) store_raw(slope + t, 1 - tanh * tanh);
    }
  } else {
    for (int64_t t = 0; t < n; t += w) store_raw(x + t, load_raw<V>(x + t) * scale);
  }
  if (p.alibi) {
    const Acc slope_h = p.alibi[p.alibi_batch * b + p.alibi_head * h];
    V distance = __builtin_convertvector(iota<Acc>(), V) + static_cast<Acc>(j - (i + s.shift));
    for (int64_t t = 0; t < n; t += w) {
      store_raw(x + t, load_raw<V>(x + t) - slope_h * vabs<Acc>(distance));
      distance += static_cast<Acc>(w);
    }
  }
  if (p.bias.defined())
    visit_float(p.bias.dtype, [&]<class T>(std::type_identity<T>) {
      add_typed(x, reinterpret_cast<const T*>(operand_at(p.bias, b, h, i, j)), p.bias.stride[3], n);
    });
  if (relative) add_typed(x, relative + h * (p.seq_q + p.seq_kv - 1) + relative_origin(p, s, i) + j, 1, n);
  if (p.mask.defined()) {
    const char* keep = operand_at(p.mask, b, h, i, j);
    for (int64_t t = 0; t < n; ++t) x[t] = keep[t * p.mask.stride[3]] ? x[t] : -std::numeric_limits<Acc>::infinity();
  }
}

// -inf outside the visible keys, for columns [begin, end) of the block that starts at key `first`.
template <class Acc>
FOVEATE_INLINE void mask_row(Acc* x, int64_t first, int64_t begin, int64_t end, const Range& visible) {
  for (int64_t t = begin; t < end && first + t < visible.begin; ++t) x[t] = -std::numeric_limits<Acc>::infinity();
  for (int64_t t = max(visible.end - first, begin); t < end; ++t) x[t] = -std::numeric_limits<Acc>::infinity();
}

struct Dropout {
  uint32_t threshold;  // keep where the draw is at least this
  double scale;
};
FOVEATE_INLINE Dropout dropout_of(const AttentionParams& p) {
  // round half to even, as Python's round
  const double t = std::nearbyint(p.dropout_p * 0x1p32);
  return {t >= 0x1p32 ? 0xffffffffu : static_cast<uint32_t>(t), 1.0 / (1.0 - p.dropout_p)};
}

// x[t] = 0 where dropout drops key j + t of query i; j is a multiple of 4.
template <class Acc>
FOVEATE_INLINE void apply_dropout(const AttentionParams& p, uint32_t threshold, int64_t head_index, int64_t i, int64_t j, int64_t n,
                                  Acc* x) {
  constexpr int w = kVecBytes / 4;
  using U = vec<uint32_t, w>;
  using W = vec<uint64_t, w>;
  const auto mul = [](uint32_t factor, U x, U& high, U& low) {
    const W product = __builtin_convertvector(x, W) * static_cast<uint64_t>(factor);
    high = __builtin_convertvector(product >> 32, U);
    low = __builtin_convertvector(product, U);
  };
  for (int64_t t = 0; t < n; t += 4 * w) {
    uint32_t key0 = static_cast<uint32_t>(p.philox_seed), key1 = static_cast<uint32_t>(p.philox_seed >> 32);
    U c0 = bit_cast<U>(iota<float>()) + static_cast<uint32_t>((j + t) / 4), c1 = U{} + static_cast<uint32_t>(i),
      c2 = U{} + static_cast<uint32_t>(head_index), c3 = U{} + p.philox_offset;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      U high0, low0, high1, low1;
      mul(kPhiloxMul0, c0, high0, low0);
      mul(kPhiloxMul1, c2, high1, low1);
      c0 = high1 ^ c1 ^ key0;
      c1 = low1;
      c2 = high0 ^ c3 ^ key1;
      c3 = low0;
      key0 += kPhiloxKey0;
      key1 += kPhiloxKey1;
    }
    const int64_t count = min<int64_t>(n - t, 4 * w);
    uint32_t draws[4][w];
    store_raw(draws[0], c0);
    store_raw(draws[1], c1);
    store_raw(draws[2], c2);
    store_raw(draws[3], c3);
    for (int64_t u = 0; u < count; ++u) x[t + u] = draws[u % 4][u / 4] >= threshold ? x[t + u] : Acc{0};
  }
}

}  // namespace foveate::cpu::FOVEATE_ISA
