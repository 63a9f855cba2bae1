// The product of a few rows with one panel of codes for floats, f8, nf4 or fp4 (layout: contract/linear.h), included by tile.inl.h. Rows are
// fp32 and so is all arithmetic: the codes of 64 input features are widened and multiplied, and their sum is scaled, d sum t[q] x.
#pragma once

namespace foveate::cpu::FOVEATE_ISA {

// What the nibbles of nf4 and fp4 stand for in the files of bitsandbytes (QLoRA, Dettmers et al. 2023): quantiles of a normal distribution,
// and e2m1 with a smaller denormal, over its largest.
alignas(64) constexpr float kTableNf4[16] = {-1.0f,
                                             -0.6961928009986877f,
                                             -0.5250730514526367f,
                                             -0.39491748809814453f,
                                             -0.28444138169288635f,
                                             -0.18477343022823334f,
                                             -0.09105003625154495f,
                                             0.0f,
                                             0.07958029955625534f,
                                             0.16093020141124725f,
                                             0.24611230194568634f,
                                             0.33791524171829224f,
                                             0.44070982933044434f,
                                             0.5626170039176941f,
                                             0.7229568362236023f,
                                             1.0f};
alignas(64) constexpr float kTableFp4[16] = {0.0f,  0.005208333333f,  0.66666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
                                             -0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};
template <WeightFormat kFormat>
constexpr const float* kFloatTable = kFormat == WeightFormat::kNf4 ? kTableNf4 : kTableFp4;

// table[index] of indices 0..15
FOVEATE_INLINE VecF looked_up_floats(const float* table, VecI index) {
#if defined(__AVX512F__)
  return (VecF)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)index);
  return (VecF)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#elif defined(__aarch64__)
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x4_t all = {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)};
  return (VecF)vqtbl4q_u8(all, (uint8x16_t)(index * 0x04040404 + 0x03020100));
#else
  VecF found;
  for (int i = 0; i < kLanes<float>; ++i) found[i] = table[index[i]];
  return found;
#endif
}

// The values of features [feature, feature + lanes) in one input feature's codes.
template <WeightFormat kFormat>
FOVEATE_INLINE VecF decoded(const uint8_t* codes, int64_t feature) {
  if constexpr (kFormat == WeightFormat::kF8) {
    return load<float>(reinterpret_cast<const f8e4m3*>(codes) + feature);
  } else {
    constexpr int n = kLanes<float>;
    static_assert(n <= 16);
    const VecI bytes = (VecI)widen<int32_t>(load_raw<vec<uint8_t, n>>(codes + feature % 16));
    return looked_up_floats(kFloatTable<kFormat>, feature < 16 ? bytes & 15 : bytes >> 4);
  }
}

template <WeightFormat kFormat, int kRows>
FOVEATE_INLINE void scaled_tile(const uint8_t* panel, const PreparedRows& a, int64_t row, int64_t in, float* c) {
  constexpr int n = kLanes<float>;
  constexpr int64_t kStepBytes = kFormat == WeightFormat::kF8 ? kWeightPanel : kWeightPanel / 2;
  constexpr int64_t kBytes = panel_bytes(kFormat, kScaledBlock);
  const int64_t blocks = in / kScaledBlock, stride = a.row_bytes / 4;
  for (int64_t col = 0; col < kWeightPanel; col += kLinearStep) {
    VecF sum[kRows][kLinearVecs] = {};
    const float* x = PreparedRows::at<float>(a, row);
    for (int64_t b = 0; b < blocks; ++b, x += kScaledBlock) {
      const uint8_t* block = panel + b * kBytes;
      VecF acc[kRows][kLinearVecs] = {};
      for (int64_t k = 0; k < kScaledBlock; ++k) {
        if (col == 0 && k * kStepBytes % 64 == 0) prefetch(block + k * kStepBytes + kLinearAhead);
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) {
          const VecF w = decoded<kFormat>(block + k * kStepBytes, col + v * n);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) acc[r][v] = MathF32::mul_add(acc[r][v], x[r * stride + k], w);
        }
      }
      const float* d = reinterpret_cast<const float*>(block + kScaledBlock * kStepBytes) + col;
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) {
        const VecF scale = load<float>(d + v * n);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] += scale * acc[r][v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) store_raw(c + r * kWeightPanel + col + v * n, sum[r][v]);
  }
}

// Element k of feature `lane` of a panel.
inline float scaled_value(WeightFormat f, const uint8_t* panel, int64_t k, int64_t lane) {
  const bool bytewise = f == WeightFormat::kF8;
  const uint8_t* block = panel + k / kScaledBlock * panel_bytes(f, kScaledBlock);
  const int64_t step = bytewise ? kWeightPanel : kWeightPanel / 2;
  const uint8_t* codes = block + k % kScaledBlock * step;
  const float d = load_raw<float>(block + kScaledBlock * step + 4 * lane);
  if (bytewise) return d * to_float(f8e4m3{codes[lane]});
  return d * (f == WeightFormat::kNf4 ? kTableNf4 : kTableFp4)[codes[lane % 16] >> (lane < 16 ? 0 : 4) & 15];
}

}  // namespace foveate::cpu::FOVEATE_ISA
