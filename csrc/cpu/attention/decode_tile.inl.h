// The two products of decode attention on one tile of keys, for one KV head: scores = q . k, and out = out * correction + p . v.
//
// A row of K or V is converted to float vectors in chunks. A chunk of bfloat16 is 2n elements, split into its even and its odd elements
// by a shift and a mask: cheaper than widening. So q and out are kept "packed": chunk by chunk, the even elements before the odd.
// Where the CPU multiplies bfloat16 pairs (decode_dot.inl.h), q and p are rounded to bfloat16 and out has that file's order.
#pragma once

#include <utility>

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

constexpr int kTile = 64;  // keys, at most

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

template <class T>
struct Chunk {
  static constexpr bool kDot = kHasBf16Dot && std::is_same_v<T, bf16>;
  static constexpr int kVecs = std::is_same_v<T, bf16> ? 2 : 1;
  static constexpr int kElements = kVecs * kLanes<float>;
};

// An fp8 byte s eeee mmm becomes the fp16 number s 0eeee mmm0000000, which is 2^8 times smaller. |x| = 480 does not exist: it is fp8's NaN.
#if defined(__AVX512F__)
FOVEATE_INLINE VecF load_bytes(const int8_t* p) { return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(p))); }
FOVEATE_INLINE VecF load_bytes(const f8e4m3* p) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(load_raw<__m128i>(p)), 7), _mm256_set1_epi16(-0x4001));
  const __m512 x = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(448.0f), _CMP_GT_OQ);
  return (VecF)_mm512_mask_mov_ps(x, is_nan, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}
#elif defined(__AVX2__)
FOVEATE_INLINE VecF load_bytes(const int8_t* p) {
  return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
FOVEATE_INLINE VecF load_bytes(const f8e4m3* p) {
  const __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7), _mm_set1_epi16(-0x4001));
  const VecF x = (VecF)_mm256_cvtph_ps(half) * 256.0f;
  return vabs<float>(x) > 448.0f ? splat(std::numeric_limits<float>::quiet_NaN()) : x;
}
#else
template <class T>
FOVEATE_INLINE VecF load_bytes(const T* p) {
  return load<float>(p);
}
#endif

template <class T>
FOVEATE_INLINE void load_chunk(VecF* x, const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto pairs = load_raw<vec<uint32_t, kLanes<float>>>(p);
    x[0] = bit_cast<VecF>(pairs << 16);
    x[1] = bit_cast<VecF>(pairs & 0xffff0000u);
  } else if constexpr (sizeof(T) == 1) {
    x[0] = load_bytes(p);
  } else {
    x[0] = load<float>(p);
  }
}
// The first n elements, the rest 0; nothing behind them is read.
template <class T>
FOVEATE_INLINE void load_chunk_n(VecF* x, const T* p, int64_t n) {
  T copy[Chunk<T>::kElements] = {};
  std::memcpy(copy, p, n * sizeof(T));
  load_chunk(x, copy);
}

template <int... kLane>
FOVEATE_INLINE VecF even_lanes(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane)...);
}
template <int... kLane>
FOVEATE_INLINE VecF odd_lanes(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}
// Lane i of the two interleaved in groups of kGroup.
template <int kFirst, int kGroup, int... kLane>
FOVEATE_INLINE VecF zip_lanes(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kFirst + kLane) / (2 * kGroup) * kGroup + kLane % kGroup + kLane / kGroup % 2 * kLanes<float>)...);
}
using Lanes = std::make_integer_sequence<int, kLanes<float>>;

// q from plain order to what score_block takes, in place; size is a multiple of the chunk.
template <class T>
FOVEATE_INLINE void pack(float* x, int64_t size) {
  constexpr int n = kLanes<float>;
  if constexpr (Chunk<T>::kDot)
    for (int64_t i = 0; i < size; i += n) store(reinterpret_cast<bf16*>(x) + i, load<float>(x + i));
  else if constexpr (Chunk<T>::kVecs == 2)
    for (int64_t i = 0; i < size; i += 2 * n) {
      const VecF a = load<float>(x + i), b = load<float>(x + i + n);
      store(x + i, even_lanes(a, b, Lanes{}));
      store(x + i + n, odd_lanes(a, b, Lanes{}));
    }
}
// out from what value_block leaves to plain order.
template <class T>
FOVEATE_INLINE void unpack(float* x, int64_t size) {
  constexpr int n = kLanes<float>, kGroup = Chunk<T>::kDot ? 4 : 1;
  if constexpr (Chunk<T>::kVecs == 2)
    for (int64_t i = 0; i < size; i += 2 * n) {
      const VecF even = load<float>(x + i), odd = load<float>(x + i + n);
      store(x + i, zip_lanes<0, kGroup>(even, odd, Lanes{}));
      store(x + i + n, zip_lanes<n, kGroup>(even, odd, Lanes{}));
    }
}

// Lanes with the bit kStep take b, the others a; each becomes the sum of the two lanes that differ in that bit.
template <int kStep, int... kLane>
FOVEATE_INLINE VecF fold(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>;
  return __builtin_shufflevector(a, b, (kLane & kStep ? n + kLane - kStep : kLane)...) +
         __builtin_shufflevector(a, b, (kLane & kStep ? n + kLane : kLane + kStep)...);
}
// Lane i of the result is the sum over the lanes of acc[i], for kCount (a power of two, at most all) vectors: a transposition and the
// horizontal sums in one.
template <int kCount, int kStep = kLanes<float> / 2>
FOVEATE_INLINE VecF sum_each(VecF* acc) {
  if constexpr (kStep == 0) {
    return acc[0];
  } else {
    constexpr int kLeft = kCount > kStep ? kStep : kCount;
#pragma GCC unroll 16
    for (int i = 0; i < kLeft; ++i) acc[i] = fold<kStep>(acc[i], acc[kCount > kStep ? i + kStep : i], Lanes{});
    return sum_each<kLeft, kStep / 2>(acc);
  }
}

// Keys whose scores are computed together, and query rows: as many accumulators as the registers hold.
constexpr int kKeys = 4, kMaxRows = kLanes<float> == 16 ? 4 : 2;

// scores[r * kTile + j] = acc[r * kKeys + j], summed over its lanes.
template <int kRows>
FOVEATE_INLINE void store_scores(float* scores, VecF* acc) {
  constexpr int n = kLanes<float>, kAll = kRows * kKeys, kCount = kAll > n ? n : kAll == 12 ? 16 : kAll;
  alignas(64) float sums[kRows * kKeys + n];
#pragma GCC unroll 4
  for (int i = 0; i < kAll; i += kCount) store(sums + i, sum_each<kCount>(acc + i));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kTile, sums + r * kKeys, kKeys * sizeof(float));
}

// scores[r * kTile + j] = q[r] . key j for kRows rows and kKeys keys. q: packed [kRows, q_stride], zero beyond dim.
template <int kRows, class T>
  requires(!Chunk<T>::kDot)
FOVEATE_INLINE void score_block(float* scores, const float* q, int64_t q_stride, const T* base, const int64_t* offset, int64_t dim) {
  constexpr int n = kLanes<float>, kVecs = Chunk<T>::kVecs, kElements = Chunk<T>::kElements;
  VecF acc[kRows == 3 ? 16 : kRows * kKeys] = {};
  const T* keys[kKeys];
  for (int j = 0; j < kKeys; ++j) keys[j] = base + offset[j];
  const auto step = [&](int64_t d, auto&& load_key) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) {
      VecF x[kVecs];
      load_key(x, keys[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int e = 0; e < kVecs; ++e) acc[r * kKeys + j] += load<float>(q + r * q_stride + d + e * n) * x[e];
    }
  };
  int64_t d = 0;
  for (; d + kElements <= dim; d += kElements) step(d, [](VecF * x, const T* p) __attribute__((always_inline)) { load_chunk(x, p); });
  if (d < dim) step(d, [&](VecF * x, const T* p) __attribute__((always_inline)) { load_chunk_n(x, p, dim - d); });
  store_scores<kRows>(scores, acc);
}

// out[r] += sum over the keys of p[r * kTile + j] * value j, on kChunks chunks of the row from base on.
template <int kRows, int kChunks, class T>
  requires(!Chunk<T>::kDot)
FOVEATE_INLINE void value_block(float* out, int64_t out_stride, const float* p, const T* base, const int64_t* offset, int keys,
                                int64_t tail) {
  constexpr int n = kLanes<float>, kVecs = Chunk<T>::kVecs, kElements = Chunk<T>::kElements, kCols = kChunks * kVecs;
  VecF acc[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) acc[r][c] = load<float>(out + r * out_stride + c * n);
  for (int j = 0; j < keys; ++j) {
    const T* value = base + offset[j];
    VecF x[kCols];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
      if (kChunks == 1 && tail < kElements)
        load_chunk_n(x, value, tail);
      else
        load_chunk(x + c * kVecs, value + c * kElements);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const VecF weight = splat(p[r * kTile + j]);
#pragma GCC unroll 16
      for (int c = 0; c < kCols; ++c) acc[r][c] += weight * x[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) store(out + r * out_stride + c * n, acc[r][c]);
}

// f(constant count, first) over [0, rows) in blocks of kMaxRows and what is left.
template <class F>
FOVEATE_INLINE void for_row_blocks(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kMaxRows <= rows; r += kMaxRows) f(std::integral_constant<int, kMaxRows>{}, r);
  const int64_t left = rows - r;
  if constexpr (kMaxRows > 2) {
    if (left == 3) return f(std::integral_constant<int, 3>{}, r);
    if (left == 2) return f(std::integral_constant<int, 2>{}, r);
  }
  if (left == 1) f(std::integral_constant<int, 1>{}, r);
}

}  // namespace foveate::cpu::FOVEATE_ISA
