// What happens to scores between q k^T and the softmax, and to probabilities after it; shared by forward and backward, so that the backward
// recomputes what the forward saw. Order and signs: python/foveate/backend/reference/attention.py.
//
// Nobody has looked at the values of kv_lens and cu_seqlens: sequence() clamps them to the tensors. Positions are int, and sums with the
// bounds of a window are ordered so that none leaves 32 bits: 64-bit arithmetic takes several times the instructions.
//
// Scores are handled as fragments of mma: x[n][4], n blocks of 16 x 8. With kTransposed = false rows are queries and columns keys (S = Q
// K^T), else rows are keys and columns queries (S^T).
#pragma once

#include <cmath>
#include <limits>

#include "contract/attention.h"
#include "core/math.h"
#include "core/philox.h"
#include "core/visible.h"
#include "cuda/device/device.cuh"

namespace foveate::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The options in the form that kernels use; made on the host.
struct ScoreParams {
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  float softcap, softcap_inner;  // softcap * tanh(softcap_inner * q.k); 0: none
  Window<int> window;
  uint32_t dropout_threshold;  // dropout drops where the draw is below this
  float dropout_scale;  // 1 / (1 - dropout_p)
};

inline ScoreParams score_params(const AttentionParams& p) {
  const double drop = std::nearbyint(p.dropout_p * 0x1p32);  // half to even, as Python's round
  ScoreParams s{};
  s.scale = static_cast<float>(p.scale);
  s.scale_log2 = static_cast<float>(p.scale * kLog2e);
  if (p.softcap > 0) {
    s.softcap = static_cast<float>(p.softcap);
    s.softcap_inner = static_cast<float>(p.scale / p.softcap);
  }
  s.window = window_of<int>(p.causal, p.window_left, p.window_right);
  s.dropout_threshold = drop >= 0x1p32 ? 0xffffffffu : static_cast<uint32_t>(drop);
  s.dropout_scale = static_cast<float>(1 / (1 - p.dropout_p));
  return s;
}

// True if anything but the scale and the visible range acts on scores or probabilities: what the plain instances of the kernels leave out.
// A scale <= 0 is among it, because they take the maximum before they scale.
inline bool needs_general_kernel(const AttentionParams& p) {
  return p.softcap > 0 || p.bias.defined() || p.mask.defined() || p.alibi || p.rel_table || p.dropout_p > 0 || !(p.scale > 0);
}

// ---- lengths and visible ranges ----------------------------------------------------------------------------------------------

// One batch entry or varlen sequence.
struct Sequence : Lengths<int> {
  int64_t first_q, first_k;  // its first row in a packed batch, else 0
};
using Range = Span<int>;

__device__ inline int clamp_length(int64_t length, int64_t longest) { return static_cast<int>(max<int64_t>(min(length, longest), 0)); }

// The rows [cu[b], cu[b + 1]), at most `longest` and within `total`.
__device__ inline int packed_length(const int32_t* cu, int b, int64_t total, int64_t longest, int64_t& first) {
  first = clamp_length(dev::ld_global_nc<int32_t>(cu + b), total);
  const int64_t room = total - first;
  return clamp_length(dev::ld_global_nc<int32_t>(cu + b + 1) - first, min(longest, room));
}

__device__ inline Sequence sequence(const AttentionParams& p, int b) {
  Sequence s{{static_cast<int>(p.seq_q), static_cast<int>(p.seq_kv), 0}, 0, 0};
  if (p.cu_q) {
    s.q = packed_length(p.cu_q, b, p.total_q, p.seq_q, s.first_q);
    s.k = packed_length(p.cu_k, b, p.total_k, p.seq_kv, s.first_k);
  } else if (p.kv_lens) {
    s.k = clamp_length(dev::ld_global_nc<int32_t>(p.kv_lens + b) + p.new_keys, p.seq_kv);
  }
  s.shift = s.k - s.q;
  return s;
}

enum class TileKind { kEmpty, kPartial, kFull };

// Queries [i, i + rows) against keys [j, j + columns). kFull: each of the queries that exist sees all of the keys; kEmpty: none sees any.
__device__ inline TileKind tile_kind(const Window<int>& w, const Lengths<int>& s, int i, int rows, int j, int columns) {
  const int last_i = min(i + rows, s.q) - 1, last_j = min(j + columns, s.k) - 1;
  if (last_i < i || last_j < j) return TileKind::kEmpty;
  const int nearest = (j - s.k) + (s.q - last_i), farthest = (last_j - s.k) + (s.q - i);  // extremes of j - (i + shift)
  if (nearest > w.right || farthest < -w.left) return TileKind::kEmpty;
  return j + columns <= s.k && farthest <= w.right && nearest >= -w.left ? TileKind::kFull : TileKind::kPartial;
}

// ---- places of a fragment's elements -----------------------------------------------------------------------------------------

// Where element e of block c stands: query i(c, e), key j(c, e). `row` and `column` are those of the fragment's corner.
template <bool kTransposed>
struct FragmentCoords {
  int row, column;  // this thread's first
  __device__ FragmentCoords(int row, int column) : row(row + dev::lane() / 4), column(column + dev::lane() % 4 * 2) {}
  __device__ int i(int c, int e) const { return kTransposed ? column + 8 * c + e % 2 : row + e / 2 * 8; }
  __device__ int j(int c, int e) const { return kTransposed ? row + e / 2 * 8 : column + 8 * c + e % 2; }
};

// -inf where the key is not visible. A row of the fragment sees a range of its columns, so two comparisons with constants say which.
template <bool kTransposed, int n>
__device__ __forceinline__ void mask_invisible(const Window<int>& w, const Lengths<int>& s, const FragmentCoords<kTransposed>& at,
                                               float (&x)[n][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row + 8 * half;
    const Range seen = kTransposed ? visible_queries(w, s, row, row) : visible_keys(w, s, row);
    const int begin = seen.begin - at.column, end = (kTransposed && row >= s.k ? 0 : seen.end) - at.column;
#pragma unroll
    for (int c = 0; c < n; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * c + e < begin || 8 * c + e >= end) x[c][2 * half + e] = -kInfinity;
  }
}

// ---- options -----------------------------------------------------------------------------------------------------------------

// tanh by two instructions of the special function unit: absolute error 2e-7, where tanh_approx has a relative one of 5e-4.
template <bool kPrecise>
__device__ __forceinline__ float tanh_of(float x) {
  if constexpr (kPrecise) return tanhf(x);
  return 1.0f - 2.0f * dev::rcp_approx(1.0f + dev::exp2_approx(x * static_cast<float>(2 * kLog2e)));
}

__device__ inline float load_float(const ScoreOperand& t, int64_t index) {
  switch (t.dtype) {
    case DType::kFloat32: return dev::ld_global_nc<float>(static_cast<const float*>(t.data) + index);
    case DType::kFloat64: return static_cast<float>(dev::ld_global_nc<double>(static_cast<const double*>(t.data) + index));
    case DType::kFloat16: return dev::to_float(dev::ld_global_nc<f16>(static_cast<const f16*>(t.data) + index));
    default: return dev::to_float(dev::ld_global_nc<bf16>(static_cast<const bf16*>(t.data) + index));
  }
}

// q.k -> logits (natural) of head h, all options but the visible range and dropout. `slope` gets d(logit)/d(scale * q.k) of the softcap; it
// is not touched without one. Elements beyond the sequence read the options of its last row and column: their results are to be masked.
template <bool kPrecise, bool kTransposed, int n>
__device__ __forceinline__ void apply_options(const AttentionParams& p, const ScoreParams& o, const Sequence& s, int b, int h,
                                              const FragmentCoords<kTransposed>& at, float (&x)[n][4], float (*slope)[4] = nullptr) {
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
#pragma unroll
    for (int c = 0; c < n; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(c, e, min(at.i(c, e), s.q - 1), min(at.j(c, e), s.k - 1));
  };
  if (o.softcap > 0)
    each([&](int c, int e, int, int) {
      const float t = tanh_of<kPrecise>(x[c][e] * o.softcap_inner);
      x[c][e] = t * o.softcap;
      if (slope) slope[c][e] = 1.0f - t * t;
    });
  else
    each([&](int c, int e, int, int) { x[c][e] *= o.scale; });
  if (p.alibi) {
    const float per_key = dev::ld_global_nc<float>(p.alibi + p.alibi_batch * b + p.alibi_head * h);
    each([&](int c, int e, int i, int j) { x[c][e] -= per_key * fabsf(static_cast<float>(j - (i + s.shift))); });
  }
  if (p.bias.data) {
    const int64_t* stride = p.bias.stride;
    const int64_t head = b * stride[0] + h * stride[1];
    each([&](int c, int e, int i, int j) { x[c][e] += load_float(p.bias, head + i * stride[2] + j * stride[3]); });
  }
  if (p.rel_table) {
    const int32_t* bucket_of = p.rel_buckets + p.seq_kv - 1 - s.shift;
    const float* table = static_cast<const float*>(p.rel_table) + h;
    each([&](int c, int e, int i, int j) {
      const int bucket = clamp_length(dev::ld_global_nc<int32_t>(bucket_of + (j - i)), p.rel_num_buckets - 1);
      x[c][e] += dev::ld_global_nc<float>(table + bucket * p.heads_q);
    });
  }
  if (p.mask.data) {
    const int64_t* stride = p.mask.stride;
    const uint8_t* head = static_cast<const uint8_t*>(p.mask.data) + b * stride[0] + h * stride[1];
    each([&](int c, int e, int i, int j) {
      if (dev::ld_global_nc<uint8_t>(head + i * stride[2] + j * stride[3]) == 0) x[c][e] = -kInfinity;
    });
  }
}

// ---- dropout -----------------------------------------------------------------------------------------------------------------

struct Philox {
  uint32_t key0, key1, offset;
};

// Seed and offset lie in device memory where a host cannot read them (torch's generator in a CUDA graph).
__device__ inline Philox philox(const AttentionParams& p) {
  uint64_t seed = p.philox_seed;
  uint32_t offset = p.philox_offset;
  if (p.philox) {
    seed = static_cast<uint64_t>(dev::ld_global_nc<int64_t>(p.philox));
    offset = static_cast<uint32_t>(dev::ld_global_nc<int64_t>(p.philox + 1));
  }
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), offset};
}

// Dropout's bits for the keys 4 * quad .. + 3 of query i: bit u is set if key u is kept. bh = b * Hq + h.
__device__ __forceinline__ uint32_t dropout_mask_of_quad(const Philox& philox, uint32_t dropout_threshold, int quad, int i, int bh) {
  uint32_t c0 = quad, c1 = i, c2 = bh, c3 = philox.offset, key0 = philox.key0, key1 = philox.key1;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = __umulhi(kPhiloxMul0, c0), low0 = kPhiloxMul0 * c0;
    const uint32_t high1 = __umulhi(kPhiloxMul1, c2), low1 = kPhiloxMul1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return (c0 >= dropout_threshold ? 1u : 0u) | (c1 >= dropout_threshold ? 2u : 0u) | (c2 >= dropout_threshold ? 4u : 0u) |
         (c3 >= dropout_threshold ? 8u : 0u);
}

// Bit e: element e of block c is kept. Each lane draws one quad of keys and lanes exchange, so that no word is drawn twice in a warp.
// The fragment's first key must be a multiple of 4.
template <bool kTransposed>
__device__ __forceinline__ uint32_t dropout_mask_of_block(const Philox& philox, uint32_t dropout_threshold,
                                                          const FragmentCoords<kTransposed>& at, int c, int bh) {
  const int lane = dev::lane();
  if constexpr (kTransposed) {
    // Four lanes (g % 4) hold the four keys of four quads: element e is key g % 4 of quad e, which lane e draws.
    const int mine = lane / 4 % 4;
    uint32_t kept = dropout_mask_of_quad(philox, dropout_threshold, at.j(c, mine) / 4, at.i(c, mine), bh) << (4 * mine);
    kept |= dev::shfl_xor(kept, 4);
    kept |= dev::shfl_xor(kept, 8);
    kept >>= mine;
    return (kept & 1) | (kept >> 3 & 2) | (kept >> 6 & 4) | (kept >> 9 & 8);
  } else {
    // Two lanes share a quad in row g and one in row g + 8; the even lane draws the first and has its lower keys, the odd lane the second.
    const int odd = lane % 2;
    const uint32_t own = dropout_mask_of_quad(philox, dropout_threshold, at.j(c, 0) / 4, at.i(c, 2 * odd), bh);
    const uint32_t other = dev::shfl_xor(own, 1);
    const uint32_t first = odd ? other >> 2 : own & 3, second = odd ? own >> 2 : other & 3;
    return first | second << 2;
  }
}

}  // namespace foveate::cuda
