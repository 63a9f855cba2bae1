// Writes new keys (rotated) and values into the cache, quantised where it stores int8 or fp8. One task is one token.
// And rotates queries, where another kernel than decode attends.
#include <cstring>

#include "cpu/attention/kv_cache.inl.h"
#include "cpu/simd/parallel.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

FOVEATE_INLINE int8_t quantize(float x, int8_t) { return static_cast<int8_t>(std::nearbyint(x)); }

// Round to nearest even. |x| <= 448, or NaN.
FOVEATE_INLINE f8e4m3 quantize(float x, f8e4m3) {
  const uint32_t u = bit_cast<uint32_t>(x), magnitude = u & 0x7fffffff;
  const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80);
  if (magnitude > 0x7f800000) return {static_cast<uint8_t>(sign | 0x7f)};
  if (magnitude < 0x3c800000) {  // below 2^-6 steps are 2^-9: let float addition at 2^14 round to them
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
    return {static_cast<uint8_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0x7ffff + ((magnitude >> 20) & 1);
  return {static_cast<uint8_t>(sign | ((rounded >> 20) - (120 << 3)))};
}

FOVEATE_INLINE float largest(int8_t) { return 127.0f; }
FOVEATE_INLINE float largest(f8e4m3) { return 448.0f; }

template <class T>
void store_quantized(T* out, float* scale, bool write_scale, const float* x, int64_t n) {
  const float limit = largest(T{});
  if (write_scale) {
    float peak = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float magnitude = std::abs(x[i]);
      peak = magnitude > peak || magnitude != magnitude ? magnitude : peak;
    }
    *scale = peak / limit;
  }
  const float s = *scale;
  for (int64_t i = 0; i < n; ++i) {
    const float y = s == 0 ? 0.0f : x[i] / s;
    out[i] = quantize(y > limit ? limit : (y < -limit ? -limit : y), T{});
  }
}

template <class T>
void store_floats(T* out, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) store_n(out + i, load_n<float>(x + i, n - i), n - i);
}

// One head of one token. row: [n] as floats.
void store_row(DType kv_dtype, const Rows& cache, const CacheScale& scales, Slot slot, int64_t head, const float* row, int64_t n) {
  const int64_t at = slot.batch * cache.batch + slot.row * cache.seq + head * cache.head;
  float* scale = scales.data + slot.batch * scales.batch + slot.row * scales.seq + head * scales.head;
  switch (kv_dtype) {
    case DType::kFloat32: return store_floats(static_cast<float*>(cache.data) + at, row, n);
    case DType::kBFloat16: return store_floats(static_cast<bf16*>(cache.data) + at, row, n);
    case DType::kFloat16: return store_floats(static_cast<f16*>(cache.data) + at, row, n);
    case DType::kInt8: return store_quantized(static_cast<int8_t*>(cache.data) + at, scale, scales.per_token, row, n);
    case DType::kFloat8E4M3: return store_quantized(static_cast<f8e4m3*>(cache.data) + at, scale, scales.per_token, row, n);
    default: return;
  }
}

}  // namespace

void kv_append(const KvCacheParams& p, int threads) {
  const int64_t tokens = p.batch * p.new_keys, widest = max(p.head_dim, p.head_dim_v);
  const int64_t grain = 1 + 4096 / (1 + p.heads_kv * widest);
  const int64_t floats = round_up<int64_t>(widest + 2 * p.rotary_pairs, 16);
  const AlignedFloats memory = aligned_floats(threads * floats);
  // One thread may be any of a team that shares the work on another level (decoder/decoder.cpp).
  parallel_for(tokens, grain, threads, [&](int64_t begin, int64_t end) {
    float *row = memory.get() + (threads > 1 ? omp_get_thread_num() : 0) * floats, *cos = row + widest, *sin = cos + p.rotary_pairs;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.new_keys, i = token % p.new_keys, position = p.kv_lens[b] + i;
      const Slot slot = slot_of(p, b, position);
      if (p.rotary_cos) {
        load_floats(cos, p.rotary_cos, position * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
        load_floats(sin, p.rotary_sin, position * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
      }
      for (int64_t h = 0; h < p.heads_kv; ++h) {
        load_floats(row, p.new_k.data, b * p.new_k.batch + i * p.new_k.seq + h * p.new_k.head, p.head_dim, p.dtype);
        if (p.rotary_cos) rotate_row(row, cos, sin, p.rotary_pairs, p.rotary_interleaved);
        store_row(p.kv_dtype, p.k, p.k_scale, slot, h, row, p.head_dim);
        load_floats(row, p.new_v.data, b * p.new_v.batch + i * p.new_v.seq + h * p.new_v.head, p.head_dim_v, p.dtype);
        store_row(p.kv_dtype, p.v, p.v_scale, slot, h, row, p.head_dim_v);
      }
    }
  });
}

// q [B, Sq, Hq, D] rotated by the positions of its queries, to the contiguous out of the same shape and dtype.
void rotate_queries(const KvCacheParams& p, void* out, int threads) {
  const int64_t floats = round_up<int64_t>(p.head_dim + 2 * p.rotary_pairs, 16), grain = 1 + 4096 / (1 + p.heads_q * p.head_dim);
  const AlignedFloats memory = aligned_floats(threads * floats);
  parallel_for(p.batch * p.seq_q, grain, threads, [&](int64_t begin, int64_t end) {
    float *row = memory.get() + (threads > 1 ? omp_get_thread_num() : 0) * floats, *cos = row + p.head_dim, *sin = cos + p.rotary_pairs;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.seq_q, i = token % p.seq_q, position = p.kv_lens[b] - (p.new_k.data ? 0 : p.seq_q) + i;
      load_floats(cos, p.rotary_cos, position * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
      load_floats(sin, p.rotary_sin, position * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
      for (int64_t h = 0; h < p.heads_q; ++h) {
        load_floats(row, p.q.data, b * p.q.batch + i * p.q.seq + h * p.q.head, p.head_dim, p.dtype);
        rotate_row(row, cos, sin, p.rotary_pairs, p.rotary_interleaved);
        const int64_t at = (token * p.heads_q + h) * p.head_dim;
        if (p.dtype == DType::kFloat32)
          store_floats(static_cast<float*>(out) + at, row, p.head_dim);
        else if (p.dtype == DType::kBFloat16)
          store_floats(static_cast<bf16*>(out) + at, row, p.head_dim);
        else
          store_floats(static_cast<f16*>(out) + at, row, p.head_dim);
      }
    }
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
