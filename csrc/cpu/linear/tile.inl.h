// The product of a few rows with one panel of 32 features (layout: contract/linear.h), for each weight format, and how rows are prepared
// for it.
//
// Blocks: a row is rounded to int8 for each block of 32, x ~ dx q. VNNI multiplies 4 neighbours of 16 features at once (u8 times s8, sums
// in int32); elsewhere bytes are widened to pairs of int16. Both are exact, so that only the rounding of x and the fp32 sum over
// the blocks differ from the exact product. Weights are stored unsigned; what that adds to a dot product is taken from its start.
// Every row goes through the same operations however many share a tile: its bits do not depend on its neighbours.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "contract/linear.h"
#include "cpu/simd/gemm.h"

namespace foveate::cpu::FOVEATE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLinearRows = 4;
#else
constexpr int kLinearRows = 2;
#endif
// Float formats keep one accumulator where blocks keep two (integers and floats).
constexpr int kFloatRows = 2 * kLinearRows;
constexpr int kLinearVecs = 2;  // vectors of features at a time; a panel is one or more such steps
constexpr int kLinearStep = kLinearVecs * kLanes<float>;
static_assert(kWeightPanel % kLinearStep == 0);

// 4 neighbours of a rounded row as dot4 reads them.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(FOVEATE_TILE_SHIM)
constexpr int kQuadUnits = 1;  // 4 int8
#else
constexpr int kQuadUnits = 2;  // int16 pairs: elements 0 and 2, 1 and 3
#endif

// Prepared rows, `row_bytes` each. Blocks: int32 quads [in / 4 * kQuadUnits], then per block: float dx, float dx * sum(q), int32 sum(q),
// int32 sum(q) of its first half.
// bf16: units of MathBf16. The other float formats: floats.
struct PreparedRows {
  char* data;
  int64_t row_bytes, blocks;

  template <class T>
  FOVEATE_INLINE const T* at(const PreparedRows& a, int64_t row) {
    return reinterpret_cast<const T*>(a.data + row * a.row_bytes);
  }
};

FOVEATE_INLINE int64_t prepared_row_bytes(WeightFormat f, int64_t in) {
  if (is_blocks(f)) return round_up<int64_t>(in * kQuadUnits + in / kWeightBlock * 16, 64);
  return round_up<int64_t>(round_up<int64_t>(in, 2) * 4 / (f == WeightFormat::kBf16 ? MathBf16::kPair : 1), 64);
}

FOVEATE_INLINE VecI splat_int(int32_t x) { return x - VecI{}; }

// dot + the sum of the 4 products of unsigned bytes in each lane of w with the quad x.
FOVEATE_INLINE VecI dot4(VecI dot, VecI w, const int32_t* x) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)dot, (__m512i)w, (__m512i)splat_int(*x));
#elif defined(__AVXVNNI__)
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)dot, (__m256i)w, (__m256i)splat_int(*x));
#elif defined(FOVEATE_TILE_SHIM)
  for (int j = 0; j < 32; j += 8) dot += (w >> j & 0xff) * static_cast<int8_t>(*x >> j);
  return dot;
#else
  const auto madd = [](VecI a, int32_t b) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return (VecI)_mm512_madd_epi16((__m512i)a, (__m512i)splat_int(b));
#elif defined(__AVX2__)
    return (VecI)_mm256_madd_epi16((__m256i)a, (__m256i)splat_int(b));
#elif defined(__SSE2__)
    return (VecI)_mm_madd_epi16((__m128i)a, (__m128i)splat_int(b));
#else
    return (a & 0xffff) * static_cast<int16_t>(b) + (a >> 16) * (b >> 16);
#endif
  };
  return dot + madd(w & 0x00ff00ff, x[0]) + madd((w >> 8) & 0x00ff00ff, x[1]);
#endif
}

// What a stored unsigned integer is more than the one that it stands for.
constexpr int offset_of(WeightFormat f) {
  using enum WeightFormat;
  return f == kQ8_0 || f == kIq4Nl || f == kIq4Xs || f == kQ8K ? 128 : f == kQ4_0 ? 8 : f == kMxfp4 ? 12 : f == kQ6K ? 32 : 0;
}

// The integers, plus offset_of, that nibbles stand for: ggml-common.h's kvalues_iq4nl, and e2m1 doubled (OCP Microscaling Formats 1.0).
constexpr bool has_table(WeightFormat f) { return f == WeightFormat::kIq4Nl || f == WeightFormat::kIq4Xs || f == WeightFormat::kMxfp4; }
alignas(16) constexpr uint8_t kTableIq4Nl[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kTableMxfp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
template <WeightFormat kFormat>
constexpr const uint8_t* kTable = kFormat == WeightFormat::kMxfp4 ? kTableMxfp4 : kTableIq4Nl;

// Nibbles, one in each byte, as unsigned integers.
template <WeightFormat kFormat>
FOVEATE_INLINE VecI looked_up(VecI nibbles) {
  if constexpr (!has_table(kFormat)) {
    return nibbles;
  } else {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kTable<kFormat>)));
    return (VecI)_mm512_shuffle_epi8(table, (__m512i)nibbles);
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kTable<kFormat>)));
    return (VecI)_mm256_shuffle_epi8(table, (__m256i)nibbles);
#elif defined(__aarch64__)
    return (VecI)vqtbl1q_u8(vld1q_u8(kTable<kFormat>), (uint8x16_t)nibbles);
#else
    uint8_t bytes[kVecBytes];
    store_raw(bytes, nibbles);
    for (uint8_t& byte : bytes) byte = kTable<kFormat>[byte];
    return load_raw<VecI>(bytes);
#endif
  }
}

FOVEATE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
constexpr int64_t kLinearAhead = 4096;  // bytes

// What formats of blocks of 32 have: a byte for each integer; a minimum m, or a zero z, after the scale d, which is fp32 with kWideScale.
constexpr bool is_bytewise(WeightFormat f) { return f == WeightFormat::kQ8_0 || f == WeightFormat::kQ8Z || f == WeightFormat::kQ8M; }
constexpr bool has_minimum(WeightFormat f) { return f == WeightFormat::kQ4_1 || f == WeightFormat::kQ8M; }
constexpr bool has_zero(WeightFormat f) { return f == WeightFormat::kQ4Z || f == WeightFormat::kQ8Z; }
constexpr bool has_wide_scale(WeightFormat f) { return f == WeightFormat::kQ8Z; }

template <WeightFormat kFormat, int kRows>
FOVEATE_INLINE void block_tile(const uint8_t* panel, const PreparedRows& a, int64_t row, float* c) {
  constexpr int n = kLanes<float>;
  constexpr bool kNibbles = !is_bytewise(kFormat);
  constexpr int kOffset = offset_of(kFormat);
  constexpr int64_t kQuants = kWeightPanel * (kNibbles ? 16 : 32), kBytes = panel_bytes(kFormat, kWeightBlock);
  const int64_t units = a.blocks * 8 * kQuadUnits;
  for (int64_t col = 0; col < kWeightPanel; col += kLinearStep) {
    VecF acc[kRows][kLinearVecs] = {};
    const uint8_t* w = panel + col * 4;
    const int32_t* x = PreparedRows::at<int32_t>(a, row);
    const int64_t stride = a.row_bytes / 4;
    for (int64_t b = 0; b < a.blocks; ++b, w += kBytes, x += 8 * kQuadUnits) {
#pragma GCC unroll 20
      for (int64_t line = 0; line < kBytes; line += 64)
        if (col == 0) prefetch(w + kLinearAhead + line);
      const int32_t* scales = PreparedRows::at<int32_t>(a, row) + units + b;
      VecI dot[kRows][kLinearVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) dot[r][v] = kOffset ? splat_int(scales[r * stride + 2 * a.blocks] * -kOffset) : VecI{};
#pragma GCC unroll 8
      for (int p = 0; p < (kNibbles ? 4 : 8); ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) {
          const VecI q = load_raw<VecI>(w + p * kWeightPanel * 4 + v * kVecBytes);
          [[maybe_unused]] VecI low, high;
          if constexpr (kNibbles) {
            low = looked_up<kFormat>(q & 0x0f0f0f0f);
            high = looked_up<kFormat>((q >> 4) & 0x0f0f0f0f);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            if constexpr (kNibbles) {
              dot[r][v] = dot4(dot[r][v], low, x + r * stride + p * kQuadUnits);
              dot[r][v] = dot4(dot[r][v], high, x + r * stride + (p + 4) * kQuadUnits);
            } else {
              dot[r][v] = dot4(dot[r][v], q, x + r * stride + p * kQuadUnits);
            }
          }
        }
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) {
        using Scale = std::conditional_t<has_wide_scale(kFormat), float, f16>;
        const uint8_t* headers = w - col * 4 + kQuants;
        const VecF d = load<float>(reinterpret_cast<const Scale*>(headers) + col + v * n);
        [[maybe_unused]] VecF second;  // m or z
        if constexpr (has_minimum(kFormat) || has_zero(kFormat))
          second = load<float>(reinterpret_cast<const f16*>(headers + kWeightPanel * sizeof(Scale)) + col + v * n);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const float* s = reinterpret_cast<const float*>(scales + r * stride);
          VecF whole = __builtin_convertvector(dot[r][v], VecF);
          if constexpr (has_zero(kFormat)) whole -= second * static_cast<float>(scales[r * stride + 2 * a.blocks]);
          acc[r][v] += d * (whole * s[0]);
          if constexpr (has_minimum(kFormat)) acc[r][v] += second * s[a.blocks];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) store_raw(c + r * kWeightPanel + col + v * n, acc[r][v]);
  }
}

// f32, f16 and bf16: as the micro-kernel of gemm.h, in chains of kChain units. Without the dot instruction a pair is two floats.
template <WeightFormat kFormat, int kRows>
FOVEATE_INLINE void float_tile(const uint8_t* panel, const PreparedRows& a, int64_t row, int64_t in, float* c) {
  using M = std::conditional_t<kFormat == WeightFormat::kBf16, MathBf16, MathF32>;
  using Unit = typename M::Unit;
  constexpr bool kWiden = kFormat == WeightFormat::kBf16 && M::kPair == 1, kHalf = kFormat == WeightFormat::kF16;
  constexpr int64_t kStepBytes = kWeightPanel * (kHalf ? 2 : 4);
  constexpr int n = kLanes<float>;
  const int64_t steps = kFormat == WeightFormat::kBf16 ? ceil_div<int64_t>(in, 2) : in, stride = a.row_bytes / 4;
  for (int64_t col = 0; col < kWeightPanel; col += kLinearStep) {
    VecF sum[kRows][kLinearVecs] = {};
    for (int64_t begin = 0; begin < steps; begin += kChain) {
      const int64_t end = min<int64_t>(steps, begin + kChain);
      VecF acc[kRows][kLinearVecs] = {};
      const uint8_t* w = panel + begin * kStepBytes + col * (kHalf ? 2 : 4);
      const Unit* x = PreparedRows::at<Unit>(a, row) + begin * (kWiden ? 2 : 1);
      for (int64_t i = begin; i < end; ++i, w += kStepBytes, x += kWiden ? 2 : 1) {
        if (col == 0) {
          prefetch(w + kLinearAhead);
          if (!kHalf) prefetch(w + kLinearAhead + 64);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) {
          vec<Unit, n> b;
          if constexpr (kHalf)
            b = load<float>(reinterpret_cast<const f16*>(w) + v * n);
          else
            b = load_raw<vec<Unit, n>>(w + v * kVecBytes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            if constexpr (kWiden) {
              const auto pair = bit_cast<vec<uint32_t, n>>(b);
              acc[r][v] = M::mul_add(acc[r][v], x[r * stride], bit_cast<VecF>(pair << 16));
              acc[r][v] = M::mul_add(acc[r][v], x[r * stride + 1], bit_cast<VecF>(pair & 0xffff0000u));
            } else {
              acc[r][v] = M::mul_add(acc[r][v], x[r * stride], b);
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) sum[r][v] += acc[r][v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) store_raw(c + r * kWeightPanel + col + v * n, sum[r][v]);
  }
}

}  // namespace foveate::cpu::FOVEATE_ISA

#include "cpu/linear/k_tile.inl.h"
#include "cpu/linear/scaled_tile.inl.h"

namespace foveate::cpu::FOVEATE_ISA {

// c [rows, 32] = prepared rows [row, row + rows) times panel `panel` of w, rows <= kLinearRows for blocks. Without the bias.
template <int kRows>
inline void panel_product(const PackedWeight& w, int64_t panel, const PreparedRows& a, int64_t row, float* c) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w.format, w.in);
  using enum WeightFormat;
  if (w.format == kF32) return float_tile<kF32, kRows>(data, a, row, w.in, c);
  if (w.format == kBf16) return float_tile<kBf16, kRows>(data, a, row, w.in, c);
  if (w.format == kF16) return float_tile<kF16, kRows>(data, a, row, w.in, c);
  if (w.format == kF8) return scaled_tile<kF8, kRows>(data, a, row, w.in, c);
  if (w.format == kNf4) return scaled_tile<kNf4, kRows>(data, a, row, w.in, c);
  if (w.format == kFp4) return scaled_tile<kFp4, kRows>(data, a, row, w.in, c);
  if constexpr (kRows <= kLinearRows) {
    if (w.format == kQ8_0) return block_tile<kQ8_0, kRows>(data, a, row, c);
    if (w.format == kQ4_0) return block_tile<kQ4_0, kRows>(data, a, row, c);
    if (w.format == kQ4_1) return block_tile<kQ4_1, kRows>(data, a, row, c);
    if (w.format == kIq4Nl) return block_tile<kIq4Nl, kRows>(data, a, row, c);
    if (w.format == kMxfp4) return block_tile<kMxfp4, kRows>(data, a, row, c);
    if (w.format == kQ4Z) return block_tile<kQ4Z, kRows>(data, a, row, c);
    if (w.format == kQ8Z) return block_tile<kQ8Z, kRows>(data, a, row, c);
    if (w.format == kQ8M) return block_tile<kQ8M, kRows>(data, a, row, c);
    if (w.format == kQ2K) return k_tile<kQ2K, kRows>(data, a, row, c);
    if (w.format == kQ4K) return k_tile<kQ4K, kRows>(data, a, row, c);
    if (w.format == kQ5K) return k_tile<kQ5K, kRows>(data, a, row, c);
    if (w.format == kQ6K) return k_tile<kQ6K, kRows>(data, a, row, c);
    if (w.format == kIq4Xs) return k_tile<kIq4Xs, kRows>(data, a, row, c);
    if (w.format == kQ8K) return k_tile<kQ8K, kRows>(data, a, row, c);
  }
}

// Whole numbers nearest to x, halves to even. The product that x is must not be contracted into the rounding.
FOVEATE_INLINE VecI round_to_int(VecF x) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (VecI)_mm_cvtps_epi32((__m128)x);
#else
  VecI y;
  for (int i = 0; i < kLanes<float>; ++i) y[i] = static_cast<int32_t>(std::nearbyint(x[i]));
  return y;
#endif
}

// One row of floats to int8 blocks. A block with an element that is not finite gets dx NaN, so that it shows in every output.
FOVEATE_INLINE void prepare_blocks(const float* x, int64_t blocks, char* out) {
  constexpr int n = kLanes<float>, vecs = kWeightBlock / n;
  int32_t* quads = reinterpret_cast<int32_t*>(out);
  float* scales = reinterpret_cast<float*>(quads + blocks * 8 * kQuadUnits);
  for (int64_t b = 0; b < blocks; ++b, x += kWeightBlock, quads += 8 * kQuadUnits) {
    VecF top{}, zero{};
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      const VecF f = load<float>(x + v * n);
      top = vmax(top, vabs<float>(f));
      zero += f * 0.0f;
    }
    const float largest = hmax(top), inverse = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
    int8_t q[kWeightBlock];
    VecI sum{}, half{};  // half: of the first 16
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      // What is not finite becomes 0: dx says it.
      const VecF scaled = load<float>(x + v * n) * inverse;
      const VecI rounded = round_to_int(vabs<float>(scaled) <= 128.0f ? scaled : VecF{});
      sum += rounded;
      if (v < vecs / 2) half += rounded;
      store_raw(q + v * n, __builtin_convertvector(rounded, vec<int8_t, n>));
    }
    if constexpr (kQuadUnits == 1) {
      std::memcpy(quads, q, kWeightBlock);
    } else {
      for (int i = 0; i < 8; ++i)
        for (int odd = 0; odd < 2; ++odd)
          quads[2 * i + odd] =
              static_cast<int32_t>(static_cast<uint16_t>(q[4 * i + odd]) | static_cast<uint32_t>(q[4 * i + odd + 2]) << 16);
    }
    const float dx = largest / 127.0f + hsum(zero);
    const int32_t total = hsum(sum), first = hsum(half);
    scales[b] = dx, scales[blocks + b] = dx * static_cast<float>(total);
    std::memcpy(scales + 2 * blocks + b, &total, 4);
    std::memcpy(scales + 3 * blocks + b, &first, 4);
  }
}

// One row of floats to bf16 units, or to floats of bf16's values where there is no dot instruction. out has room for an even count.
FOVEATE_INLINE void prepare_bf16(const float* x, int64_t in, char* out) {
  const auto round = [&]<class T>(T * to) __attribute__((always_inline)) {
    for (int64_t i = 0; i < in; i += kLanes<float>) {
      bf16 rounded[kLanes<float>];
      store(rounded, load_n<float>(x + i, in - i));
      store_n(to + i, load<float>(rounded), in - i);
    }
    // The second half of a last unit; AMX reads whole lines.
    for (int64_t i = in; i < round_up<int64_t>(in, MathBf16::kPair == 2 ? 32 : 2); ++i) from_float(to + i, 0.0f);
  };
  if constexpr (MathBf16::kPair == 2)
    round(reinterpret_cast<bf16*>(out));
  else
    round(reinterpret_cast<float*>(out));
}

}  // namespace foveate::cpu::FOVEATE_ISA
