// The product of a few rows with one panel of a K-quant (layout: python/foveate/quantization/k_blocks.py), included by tile.inl.h. Rows are
// rounded as for the other block formats. A super-block is 8 blocks of 32 input features and the fp16 scales of their integer scales:
//
//   q4_k, q5_k   sum_b dx_b (d sc_b dot_b - dmin mn_b sum(x_b))
//   q2_k         the same with scales and minima of each half of a block
//   q6_k, q8_k   sum_b d dx_b (sc_b0 dot_b0 + sc_b1 dot_b1), dot_b0 of the first 16 features of a block, dot_b1 of the others
//   iq4_xs       sum_b d dx_b sc_b dot_b
#pragma once

namespace foveate::cpu::FOVEATE_ISA {

constexpr int64_t kNibbleBytes = kWeightPanel * 16;  // of a block: [4, 32, 4]

constexpr int64_t k_block_bytes(WeightFormat f) {
  using enum WeightFormat;
  return kWeightPanel * (f == kQ2K ? 10 : f == kQ4K ? 18 : f == kQ5K ? 22 : f == kIq4Xs ? 17 : f == kQ8K ? 34 : 26);
}

template <WeightFormat kFormat, int kRows>
FOVEATE_INLINE void k_tile(const uint8_t* panel, const PreparedRows& a, int64_t row, float* c) {
  using enum WeightFormat;
  constexpr int n = kLanes<float>;
  constexpr bool kBytewise = kFormat == kQ8K, kTwoBits = kFormat == kQ2K;
  constexpr bool kHalves = kFormat == kQ6K || kBytewise || kTwoBits;  // a scale for each half of a block
  constexpr bool kMinima = kFormat == kQ4K || kFormat == kQ5K;
  constexpr int kOffset = offset_of(kFormat);
  constexpr int64_t kBlockBytes = k_block_bytes(kFormat), kHeaders = 8 * kBlockBytes, kBytes = panel_bytes(kFormat, kSuperBlock);
  constexpr int64_t kScales = kBlockBytes - (kHalves || kMinima ? 2 : 1) * kWeightPanel;  // sc and mn, sc of the two halves, or sc
  const int64_t units = a.blocks * 8 * kQuadUnits, stride = a.row_bytes / 4;
  const auto bytes_to_floats = [](const uint8_t* p) __attribute__((always_inline)) {
    if constexpr (kMinima)
      return __builtin_convertvector(load_raw<vec<uint8_t, n>>(p), VecF);
    else
      return __builtin_convertvector(load_raw<vec<int8_t, n>>(p), VecF);
  };
  for (int64_t col = 0; col < kWeightPanel; col += kLinearStep) {
    VecF acc[kRows][kLinearVecs] = {};
    const int32_t* x = PreparedRows::at<int32_t>(a, row);
    for (int64_t b = 0; b < a.blocks; ++b, x += 8 * kQuadUnits) {
      const uint8_t* super = panel + b / 8 * kBytes;
      const uint8_t* w = super + b % 8 * kBlockBytes;
#pragma GCC unroll 20
      for (int64_t line = 0; line < kBlockBytes; line += 64)
        if (col == 0) prefetch(w + kLinearAhead + line);
      const int32_t* scales = PreparedRows::at<int32_t>(a, row) + units + b;

      // Sums of products, int32 [kRows, kLinearStep], of the whole block or of each half.
      VecI dot[kHalves ? 2 : 1][kRows][kLinearVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        [[maybe_unused]] const int32_t sum = scales[r * stride + 2 * a.blocks], first = scales[r * stride + 3 * a.blocks];
#pragma GCC unroll 2
        for (int v = 0; v < kLinearVecs; ++v) {
          dot[0][r][v] = kOffset ? splat_int((kHalves ? first : sum) * -kOffset) : VecI{};
          if constexpr (kHalves) dot[1][r][v] = splat_int((sum - first) * -kOffset);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) {
        const uint8_t* upper = w + (kTwoBits ? 0 : kNibbleBytes) + col * 4 + v * kVecBytes;
        [[maybe_unused]] VecI bits[2];
        if constexpr (kFormat == kQ5K) bits[0] = load_raw<VecI>(upper);
        if constexpr (kFormat == kQ6K || kTwoBits) {
          bits[0] = load_raw<VecI>(upper);
          bits[1] = load_raw<VecI>(upper + kWeightPanel * 4);
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          const VecI q = kTwoBits ? VecI{} : load_raw<VecI>(w + p * kWeightPanel * 4 + col * 4 + v * kVecBytes);
          VecI low = q & 0x0f0f0f0f, high = (q >> 4) & 0x0f0f0f0f;
          if constexpr (kTwoBits) {
            low = (bits[0] >> 2 * p) & 0x03030303;
            high = (bits[1] >> 2 * p) & 0x03030303;
          }
          if constexpr (kBytewise) {
            low = q;
            high = load_raw<VecI>(w + (p + 4) * kWeightPanel * 4 + col * 4 + v * kVecBytes);
          }
          if constexpr (has_table(kFormat)) {
            low = looked_up<kFormat>(low);
            high = looked_up<kFormat>(high);
          }
          if constexpr (kFormat == kQ5K) low |= ((bits[0] >> p) & 0x01010101) << 4, high |= (bits[0] >> p) & 0x10101010;
          if constexpr (kFormat == kQ6K) low |= ((bits[0] >> 2 * p) & 0x03030303) << 4, high |= ((bits[1] >> 2 * p) & 0x03030303) << 4;
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            dot[0][r][v] = dot4(dot[0][r][v], low, x + r * stride + p * kQuadUnits);
            VecI& second = dot[kHalves ? 1 : 0][r][v];
            second = dot4(second, high, x + r * stride + (p + 4) * kQuadUnits);
          }
        }
      }

      // Their scales, fp32.
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) {
        const int64_t at = col + v * n;
        using Header = std::conditional_t<kBytewise, float, f16>;
        const Header* header = reinterpret_cast<const Header*>(super + kHeaders) + at;
        const VecF d = load<float>(header);
        VecF first;
        [[maybe_unused]] VecF second, minimum, minimum_of_second;
        if constexpr (kTwoBits) {  // a scale and a minimum of 4 bits in each byte
          const VecI one = (VecI)widen<int32_t>(load_raw<vec<uint8_t, n>>(w + kScales + at));
          const VecI other = (VecI)widen<int32_t>(load_raw<vec<uint8_t, n>>(w + kScales + kWeightPanel + at));
          first = __builtin_convertvector(one & 15, VecF);
          second = __builtin_convertvector(other & 15, VecF);
          minimum = load<float>(header + kWeightPanel) * __builtin_convertvector(one >> 4, VecF);
          minimum_of_second = load<float>(header + kWeightPanel) * __builtin_convertvector(other >> 4, VecF);
        } else {
          first = bytes_to_floats(w + kScales + at);
          if constexpr (kHalves || kMinima) second = bytes_to_floats(w + kScales + kWeightPanel + at);
          if constexpr (kMinima) minimum = load<float>(header + kWeightPanel) * second;
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const float* s = reinterpret_cast<const float*>(scales + r * stride);
          const VecF whole = __builtin_convertvector(dot[0][r][v], VecF);
          if constexpr (kHalves) {
            acc[r][v] += (d * s[0]) * (whole * first + __builtin_convertvector(dot[1][r][v], VecF) * second);
            if constexpr (kTwoBits) {
              const int32_t sum = scales[r * stride + 2 * a.blocks], of_first = scales[r * stride + 3 * a.blocks];
              acc[r][v] -= (minimum * static_cast<float>(of_first) + minimum_of_second * static_cast<float>(sum - of_first)) * s[0];
            }
          } else {
            acc[r][v] += (d * first) * (whole * s[0]);
            if constexpr (kMinima) acc[r][v] -= minimum * s[a.blocks];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kLinearVecs; ++v) store_raw(c + r * kWeightPanel + col + v * n, acc[r][v]);
  }
}

// Element k of feature `lane` of a panel.
inline float k_value(WeightFormat f, const uint8_t* panel, int64_t k, int64_t lane) {
  const uint8_t* super = panel + k / kSuperBlock * panel_bytes(f, kSuperBlock);
  const uint8_t* w = super + k % kSuperBlock / kWeightBlock * k_block_bytes(f);
  const int64_t e = k % kWeightBlock, half = e / 16, p = e % 16 / 4, j = e % 4;
  const f16* header = reinterpret_cast<const f16*>(super + 8 * k_block_bytes(f)) + lane;
  const float d = to_float(load_raw<f16>(header));
  if (f == WeightFormat::kIq4Xs || f == WeightFormat::kQ8K) {
    const bool bytewise = f == WeightFormat::kQ8K;
    const uint8_t* scale = w + k_block_bytes(f) - (bytewise ? 2 - half : 1) * kWeightPanel + lane;
    const uint8_t stored = w[(bytewise ? e / 4 : p) * kWeightPanel * 4 + lane * 4 + j];
    const int q = (bytewise ? stored : kTableIq4Nl[stored >> 4 * half & 15]) - 128;
    const float unit = bytewise ? load_raw<float>(super + 8 * k_block_bytes(f) + 4 * lane) : d;
    return unit * static_cast<float>(static_cast<int8_t>(*scale)) * static_cast<float>(q);
  }
  const uint8_t* scales = w + k_block_bytes(f) - 2 * kWeightPanel + lane;
  if (f == WeightFormat::kQ2K) {
    const int two_bits = w[(half * kWeightPanel + lane) * 4 + j] >> 2 * p & 3, both = scales[half * kWeightPanel];
    return d * static_cast<float>(both & 15) * static_cast<float>(two_bits) -
           to_float(load_raw<f16>(header + kWeightPanel)) * static_cast<float>(both >> 4);
  }
  int q = w[(p * kWeightPanel + lane) * 4 + j] >> 4 * half & 15;
  if (f == WeightFormat::kQ6K) {
    q |= (w[kNibbleBytes + (half * kWeightPanel + lane) * 4 + j] >> 2 * p & 3) << 4;
    return d * static_cast<float>(static_cast<int8_t>(scales[half * kWeightPanel])) * static_cast<float>(q - 32);
  }
  if (f == WeightFormat::kQ5K) q |= (w[kNibbleBytes + lane * 4 + j] >> (p + 4 * half) & 1) << 4;
  const float minimum = to_float(load_raw<f16>(header + kWeightPanel)) * static_cast<float>(scales[kWeightPanel]);
  return d * static_cast<float>(scales[0]) * static_cast<float>(q) - minimum;
}

}  // namespace foveate::cpu::FOVEATE_ISA
