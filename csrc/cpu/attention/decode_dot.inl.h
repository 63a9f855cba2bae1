// decode_tile.inl.h's two products for bfloat16 on CPUs that multiply pairs of it (AVX-512 BF16): half the instructions.
#pragma once

#include "cpu/attention/decode_tile.inl.h"

#if defined(__AVX512BF16__)

namespace foveate::cpu::FOVEATE_ISA {

FOVEATE_INLINE __m512i load_pairs(const bf16* p) { return load_raw<__m512i>(p); }
FOVEATE_INLINE __m512i load_pairs_n(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p); }
FOVEATE_INLINE VecF dot_pairs(VecF acc, __m512i a, __m512i b) { return (VecF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }

// q: bfloat16, its rows where those of the float version are.
template <int kRows>
FOVEATE_INLINE void score_block(float* scores, const float* q, int64_t q_stride, const bf16* base, const int64_t* offset, int64_t dim) {
  constexpr int kElements = Chunk<bf16>::kElements;
  VecF acc[kRows == 3 ? 16 : kRows * kKeys] = {};
  const bf16* keys[kKeys];
  for (int j = 0; j < kKeys; ++j) keys[j] = base + offset[j];
  const auto step = [&](int64_t d, auto&& load_key) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) {
      const __m512i x = load_key(keys[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        acc[r * kKeys + j] = dot_pairs(acc[r * kKeys + j], load_pairs(reinterpret_cast<const bf16*>(q + r * q_stride) + d), x);
    }
  };
  int64_t d = 0;
  for (; d + kElements <= dim; d += kElements) step(d, [](const bf16* p) __attribute__((always_inline)) { return load_pairs(p); });
  if (d < dim) step(d, [&](const bf16* p) __attribute__((always_inline)) { return load_pairs_n(p, dim - d); });
  store_scores<kRows>(scores, acc);
}

// p: bfloat16, its rows where those of the float version are; 0 for the key behind an odd number of keys. Two keys at a time: their rows
// are interleaved by unpack instructions, so the first vector of a chunk of out has elements 0-3, 8-11, 16-19, 24-27, the second the
// others.
template <int kRows, int kChunks>
FOVEATE_INLINE void value_block(float* out, int64_t out_stride, const float* p, const bf16* base, const int64_t* offset, int keys,
                                int64_t tail) {
  constexpr int n = kLanes<float>, kCols = 2 * kChunks, kElements = Chunk<bf16>::kElements;
  VecF acc[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) acc[r][c] = load<float>(out + r * out_stride + c * n);
  for (int j = 0; j < keys; j += 2) {
    const bf16 *even = base + offset[j], *odd = base + offset[j + 1];
    __m512i weights[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = _mm512_set1_epi32(load_raw<int32_t>(reinterpret_cast<const bf16*>(p + r * kTile) + j));
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
      const bool whole = kChunks > 1 || tail >= kElements;
      const __m512i a = whole ? load_pairs(even + c * kElements) : load_pairs_n(even, tail);
      const __m512i b = whole ? load_pairs(odd + c * kElements) : load_pairs_n(odd, tail);
      const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][2 * c] = dot_pairs(acc[r][2 * c], weights[r], low);
        acc[r][2 * c + 1] = dot_pairs(acc[r][2 * c + 1], weights[r], high);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kCols; ++c) store(out + r * out_stride + c * n, acc[r][c]);
}

}  // namespace foveate::cpu::FOVEATE_ISA

#endif
