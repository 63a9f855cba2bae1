// The two products of decode attention on one tile of keys, for one KV head: scores = q . k, and out = out * correction + p . v.
//
// A row of K or V is converted to float vectors in chunks. A chunk of bfloat16 is 2n elements, split into its even and its odd elements
// by a shift and a mask: cheaper than widening. So q and out are kept "packed": chunk by chunk, the even elements before the odd.
// Where the CPU multiplies bfloat16 pairs (decode_dot.inl.h), q and p are rounded to bfloat16 and out has that file's order.
#pragma once

#include <utility>

#include "cpu/vec.h"

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
  // Few rows: the smaller the tile, the more of it is still in the L1 cache when it is used. Many rows: fewer updates of out.
  static constexpr int kFewRows = 16, kFewRowsTile = sizeof(T) == 1 ? kTile / 2 : kTile / 4;
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
      store(x + i, even_lanes(a, b, Lanes{})), store(x + i + n, odd_lanes(a, b, Lanes{}));
    }
}
// out from what value_block leaves to plain order.
template <class T>
FOVEATE_INLINE void unpack(float* x, int64_t size) {
  constexpr int n = kLanes<float>, kGroup = Chunk<T>::kDot ? 4 : 1;
  if constexpr (Chunk<T>::kVecs == 2)
    for (int64_t i = 0; i < size; i += 2 * n) {
      const VecF even = load<float>(x + i), odd = load<float>(x + i + n);
      store(x + i, zip_lanes<0, kGroup>(even, odd, Lanes{})), store(x + i + n, zip_lanes<n, kGroup>(even, odd, Lanes{}));
    }
}

// Lanes with the bit kStep take b, the others a; each becomes the sum of the two lanes that differ in that bit.
template <int kStep, int... kLane>
FOVEATE_INLINE VecF fold(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>;
  return __builtin_shufflevector(a, b, (kLane & kStep ? n + kLane - kStep : kLane)...) +
         __builtin_shufflevector(a, b, (kLane & kStep ? n + kLane : kLane + kStep)...);
}
// Lane i of the result is the sum over the lanes of acc[i]: a transposition and n horizontal sums in n - 1 steps.
template <int kStep = kLanes<float> / 2>
FOVEATE_INLINE VecF sum_each(VecF* acc) {
  if constexpr (kStep == 0) {
    return acc[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kStep; ++i) acc[i] = fold<kStep>(acc[i], acc[i + kStep], Lanes{});
    return sum_each<kStep / 2>(acc);
  }
}

// Asks for the tile that comes next, a few lines at a time, in the order of memory: all heads of a key before the next key. Rows of one
// head are far apart, which defeats the hardware prefetcher; in order it follows.
struct Ahead {
  const char* base;
  const int64_t* offset_bytes;
  int keys;
  int64_t span;  // bytes of a key
  int key = 0;
  int64_t byte = 0;

  [[gnu::always_inline]] void step(int lines) {
    for (int i = 0; i < lines && key < keys; ++i) {
      __builtin_prefetch(base + offset_bytes[key] + byte, 0, 3);
      byte += 64;
      if (byte >= span) byte = 0, ++key;
    }
  }
};

// Cache lines that hold so many chunks.
template <class T>
constexpr int lines_of(int chunks) {
  return ceil_div(chunks * Chunk<T>::kElements * static_cast<int>(sizeof(T)), 64);
}

// scores[r * kTile + j] = q[r] . key j for kRows rows and n / kRows keys. q: packed [kRows, q_stride], zero beyond dim.
template <int kRows, class T>
  requires(!Chunk<T>::kDot)
FOVEATE_INLINE void score_block(float* scores, const float* q, int64_t q_stride, const T* base, const int64_t* offset, int64_t dim,
                                Ahead* ahead) {
  constexpr int n = kLanes<float>, kKeys = n / kRows, kVecs = Chunk<T>::kVecs, kElements = Chunk<T>::kElements;
  VecF acc[n] = {};
  const auto step = [&](int64_t d, auto&& load_key) __attribute__((always_inline)) {
    if (ahead) ahead->step(lines_of<T>(kKeys));
    VecF rows[kRows][kVecs];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int e = 0; e < kVecs; ++e) rows[r][e] = load<float>(q + r * q_stride + d + e * n);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      VecF x[kVecs];
      load_key(x, base + offset[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int e = 0; e < kVecs; ++e) acc[r * kKeys + j] += rows[r][e] * x[e];
    }
  };
  int64_t d = 0;
  for (; d + kElements <= dim; d += kElements) step(d, [](VecF * x, const T* p) __attribute__((always_inline)) { load_chunk(x, p); });
  if (d < dim) step(d, [&](VecF * x, const T* p) __attribute__((always_inline)) { load_chunk_n(x, p, dim - d); });
  alignas(64) float sums[n];
  store(sums, sum_each(acc));
  for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kTile, sums + r * kKeys, kKeys * sizeof(float));
}

// out[r] = out[r] * correction[r] + sum over the keys of p[r * kTile + j] * value j, on kChunks chunks of the row from base on.
// ahead: may be null.
template <int kRows, int kChunks, class T>
  requires(!Chunk<T>::kDot)
FOVEATE_INLINE void value_block(float* out, int64_t out_stride, const float* correction, const float* p, const T* base,
                                const int64_t* offset, int keys, int64_t tail, Ahead* ahead) {
  constexpr int n = kLanes<float>, kVecs = Chunk<T>::kVecs, kElements = Chunk<T>::kElements, kCols = kChunks * kVecs;
  VecF acc[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) acc[r][c] = load<float>(out + r * out_stride + c * n) * correction[r];
  for (int j = 0; j < keys; ++j) {
    if (ahead) ahead->step(lines_of<T>(kChunks));
    VecF x[kCols];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
      if (kChunks == 1 && tail < kElements)
        load_chunk_n(x, base + offset[j], tail);
      else
        load_chunk(x + c * kVecs, base + offset[j] + c * kElements);
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

// f(constant count, first) over [0, rows) in blocks of 4, 2 and 1.
template <class F>
FOVEATE_INLINE void for_row_blocks(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  if (r + 2 <= rows) f(std::integral_constant<int, 2>{}, r), r += 2;
  if (r < rows) f(std::integral_constant<int, 1>{}, r);
}

}  // namespace foveate::cpu::FOVEATE_ISA
