// The simulated tiles against the instructions, bit for bit. Exits 77 where the CPU or the system has no AMX.
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#define FOVEATE_ISA check
#include "cpu/amx/tiles.h"
#include "cpu/amx/tiles_shim.h"

using namespace foveate::cpu::check;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

uint16_t random_bf16(int kind) {
  if (kind == 0) {  // near 1, both signs
    const float x = static_cast<float>(next() >> 8) / 0x1p23f - 1.0f;
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return static_cast<uint16_t>(u >> 16);
  }
  uint16_t bits = static_cast<uint16_t>(next() >> 16);
  if (kind == 1) {  // every exponent but infinities and NaN
    if ((bits & 0x7f80) == 0x7f80) bits ^= 0x4000;
  } else {  // tiny: products and sums around the smallest normal number, and denormal elements
    bits = static_cast<uint16_t>((bits & 0x807f) | (kind == 2 ? (next() >> 16) % 3 : 62 + (next() >> 16) % 3) << 7);
  }
  return bits;
}

struct Operands {
  uint8_t a[16][64], b[16][64], c[16][64];
};

template <class T>
void bf16_product(const Operands& o, const TileConfig& config, uint8_t (*out)[64]) {
  T::configure(config);
  T::template load<4>(o.c, 64), T::template load<0>(o.a, 64), T::template load<1>(o.b, 64);
  T::template dot_bf16<4, 0, 1>();
  T::template store<4>(out, 64);
  T::release();
}
template <class T>
void int8_product(const Operands& o, const TileConfig& config, uint8_t (*out)[64]) {
  T::configure(config);
  T::template zero<4>();
  T::template load<0>(o.a, 64), T::template load<1>(o.b, 64);
  T::template dot_int8<4, 0, 1>();
  T::template dot_int8<4, 0, 1>();
  T::template store<4>(out, 64);
  T::release();
}

}  // namespace

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 77;
  const int shapes[][3] = {{16, 64, 64}, {16, 32, 64}, {1, 64, 64}, {5, 4, 12}, {11, 60, 64}};  // rows, bytes of A, bytes of C
  int wrong = 0, products = 0;
  for (int round = 0; round < 400; ++round) {
    const auto& [rows, a_bytes, c_bytes] = shapes[round % 5];
    const int kind = round / 5 % 5;
    TileConfig config;
    TileConfig::set(config, 0, rows, a_bytes);
    TileConfig::set(config, 1, a_bytes / 4, c_bytes);
    TileConfig::set(config, 4, rows, c_bytes);
    Operands o;
    for (uint8_t& x : reinterpret_cast<uint8_t(&)[sizeof(o)]>(o)) x = static_cast<uint8_t>(next() >> 24);
    alignas(64) uint8_t real[16][64] = {}, simulated[16][64] = {};
    int8_product<HardwareTiles>(o, config, real);
    int8_product<ShimTiles>(o, config, simulated);
    wrong += std::memcmp(real, simulated, sizeof(real)) != 0;
    for (auto* tile : {o.a, o.b})
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 32; ++j) {
          const uint16_t bits = random_bf16(kind == 4 ? 0 : kind);
          std::memcpy(tile[i] + 2 * j, &bits, 2);
        }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        const uint32_t bits = static_cast<uint32_t>(random_bf16(kind)) << 16 | next() >> 16;
        std::memcpy(o.c[i] + 4 * j, &bits, 4);
      }
    if (kind == 4) {  // infinities and NaN: which elements are NaN, not which NaN
      const uint16_t inf = 0x7f80, nan = 0x7fc0;
      std::memcpy(o.a[0] + 2, &inf, 2), std::memcpy(o.b[0] + 6, &nan, 2);
    }
    std::memset(real, 0, sizeof(real)), std::memset(simulated, 0, sizeof(simulated));
    bf16_product<HardwareTiles>(o, config, real);
    bf16_product<ShimTiles>(o, config, simulated);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float x, y;
        std::memcpy(&x, real[i] + 4 * j, 4), std::memcpy(&y, simulated[i] + 4 * j, 4);
        const bool same = std::isnan(x) ? std::isnan(y) : std::memcmp(&x, &y, 4) == 0;
        if (!same && wrong < 5) std::printf("kind %d, element %d %d: %a on the CPU, %a simulated\n", kind, i, j, x, y);
        wrong += !same, ++products;
      }
  }
  std::printf("%d elements of bf16 products and 400 int8 products compared, %d differ\n", products, wrong);
  return wrong != 0;
}
