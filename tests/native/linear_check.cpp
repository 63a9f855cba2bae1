// The packed linear kernel of one instruction set against plain loops, without Python: cross-compiled kernels run under emulation.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "contract/linear.h"

namespace foveate::cpu::FOVEATE_ISA {
void linear(const LinearParams&, int threads);
}

using namespace foveate;

namespace {

constexpr int64_t kIn = 128, kOut = 45, kRows = 7, kPanels = 2;
uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }
float uniform() { return static_cast<float>(next() >> 8) / (1 << 23) - 1.0f; }

// fp16 numbers that a shift of float's bits gives exactly.
uint16_t half_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u >> 16 & 0x8000) | ((u >> 13 & 0x3ffff) - (112 << 10)));
}

struct Weight {
  std::vector<uint8_t> packed;
  std::vector<float> values;  // [kOut padded, kIn]
};

// Elements [32 b, 32 b + 32) of feature f: codes of f8 or nf4 with the scale of the 64 that they belong to.
void scaled_block(Weight& w, WeightFormat format, int64_t f, int64_t b, float d) {
  constexpr float kNf4[16] = {-1.0f,       -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f, -0.09105004f, 0.0f,
                              0.07958030f, 0.16093020f,  0.24611230f,  0.33791524f,  0.44070983f,  0.56261700f,  0.72295684f,  1.0f};
  const int64_t lane = f % 32, step = format == WeightFormat::kF8 ? 32 : 16;
  uint8_t* at = w.packed.data() + f / 32 * panel_bytes(format, kIn) + b / 2 * panel_bytes(format, 64);
  float* scale = reinterpret_cast<float*>(at + 64 * step) + lane;
  if (b % 2 == 0) *scale = d;
  for (int64_t e = 0; e < 32; ++e) {
    uint8_t* codes = at + (b % 2 * 32 + e) * step;
    float& value = w.values[f * kIn + b * 32 + e];
    if (format == WeightFormat::kF8) {
      const uint32_t code = next() % 127 | (next() & 128);  // no NaN
      codes[lane] = static_cast<uint8_t>(code);
      const int exponent = static_cast<int>(code >> 3 & 15);
      const float magnitude = exponent ? std::ldexp(1.0f + (code & 7) / 8.0f, exponent - 7) : std::ldexp((code & 7) / 8.0f, -6);
      value = *scale * (code & 128 ? -magnitude : magnitude);
    } else {
      const uint32_t code = next() >> 8 & 15;
      codes[lane % 16] |= static_cast<uint8_t>(lane < 16 ? code : code << 4);
      value = *scale * kNf4[code];
    }
  }
}

Weight make(WeightFormat format) {
  Weight w{std::vector<uint8_t>(kPanels * panel_bytes(format, kIn)), std::vector<float>(kPanels * 32 * kIn)};
  const int64_t block = is_scaled(format) ? panel_bytes(format, 64) / 2 : panel_bytes(format, 32);
  for (int64_t f = 0; f < kPanels * 32; ++f)
    for (int64_t b = 0; b < kIn / 32; ++b) {
      uint8_t* panel = w.packed.data() + f / 32 * panel_bytes(format, kIn);
      uint8_t* at = panel + b * block;
      const int64_t lane = f % 32;
      const float d = static_cast<float>(1 + next() % 15) / 64.0f, m = -static_cast<float>(1 + next() % 15) / 32.0f;
      const bool nibbles = format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1 || format == WeightFormat::kQ4Z;
      const bool zero = format == WeightFormat::kQ4Z || format == WeightFormat::kQ8Z, wide = format == WeightFormat::kQ8Z;
      const float z = static_cast<float>(1 + next() % 15);
      if (is_scaled(format)) {
        scaled_block(w, format, f, b, d);
        continue;
      }
      for (int64_t e = 0; e < 32; ++e) {
        float& value = w.values[f * kIn + b * 32 + e];
        const int64_t k = b * 32 + e;
        if (format == WeightFormat::kF32) {
          value = uniform();
          std::memcpy(panel + (k * 32 + lane) * 4, &value, 4);
        } else if (format == WeightFormat::kBf16) {
          value = static_cast<float>(static_cast<int>(next() % 255) - 127) / 64.0f;
          uint32_t u;
          std::memcpy(&u, &value, 4);
          const uint16_t bits = static_cast<uint16_t>(u >> 16);
          std::memcpy(panel + ((k / 2 * 32 + lane) * 2 + k % 2) * 2, &bits, 2);
        } else if (nibbles) {
          const int q = static_cast<int>(next() % 16);
          uint8_t& byte = at[(e % 16 / 4 * 32 + lane) * 4 + e % 4];
          byte |= static_cast<uint8_t>(e < 16 ? q : q << 4);
          value = format == WeightFormat::kQ4_0 ? d * (q - 8) : zero ? d * (q - z) : d * q + m;
        } else {
          const int q = static_cast<int>(next() % 256);
          at[(e / 4 * 32 + lane) * 4 + e % 4] = static_cast<uint8_t>(q);
          value = zero ? d * (q - z) : format == WeightFormat::kQ8M ? d * q + m : d * (q - 128);
        }
      }
      if (!is_blocks(format)) continue;
      const uint16_t bits[2] = {half_bits(d), half_bits(zero ? z : m)};
      uint8_t* headers = at + 32 * (nibbles ? 16 : 32);
      if (wide)
        std::memcpy(headers + 4 * lane, &d, 4);
      else
        std::memcpy(headers + 2 * lane, bits, 2);
      if (zero || format == WeightFormat::kQ4_1 || format == WeightFormat::kQ8M)
        std::memcpy(headers + (wide ? 128 : 64) + 2 * lane, bits + 1, 2);
    }
  return w;
}

// x as the product sees it.
std::vector<float> rounded(const std::vector<float>& x, WeightFormat format) {
  std::vector<float> y = x;
  if (format == WeightFormat::kBf16)
    for (float& v : y) {
      uint32_t u;
      std::memcpy(&u, &v, 4);
      u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
      std::memcpy(&v, &u, 4);
    }
  if (is_blocks(format))
    for (size_t i = 0; i < y.size(); i += 32) {
      float largest = 0;
      for (int e = 0; e < 32; ++e) largest = std::fmax(largest, std::fabs(y[i + e]));
      for (int e = 0; e < 32; ++e) y[i + e] = std::nearbyint(y[i + e] * (127.0f / largest)) * (largest / 127.0f);
    }
  return y;
}

}  // namespace

int main() {
  int failures = 0;
  using enum WeightFormat;
  for (WeightFormat format : {kF32, kBf16, kQ8_0, kQ4_0, kQ4_1, kQ4Z, kQ8Z, kQ8M, kF8, kNf4}) {
    const Weight w = make(format);
    std::vector<float> x(kRows * kIn), bias(kOut), out(kRows * kOut, NAN);
    for (float& v : x) v = uniform();
    for (float& v : bias) v = uniform();
    LinearParams p;
    p.x = x.data(), p.rows = kRows, p.x_stride = kIn;
    p.weight[0] = {w.packed.data(), bias.data(), kIn, kOut, format};
    p.out[0] = out.data(), p.out_stride[0] = kOut;
    cpu::FOVEATE_ISA::linear(p, 2);
    const std::vector<float> seen = rounded(x, format);
    double worst = 0;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t f = 0; f < kOut; ++f) {
        double sum = bias[f], size = std::fabs(bias[f]);
        for (int64_t k = 0; k < kIn; ++k) {
          const double product = static_cast<double>(seen[r * kIn + k]) * w.values[f * kIn + k];
          sum += product, size += std::fabs(product);
        }
        const double error = std::fabs(out[r * kOut + f] - sum) / size;
        if (!(error <= worst)) worst = error;  // NaN counts
      }
    const bool ok = worst < 2e-6;
    std::printf("linear format %d: %.2e of the sum of magnitudes%s\n", static_cast<int>(format), worst, ok ? "" : "  WRONG");
    failures += !ok;
  }
  return failures;
}
