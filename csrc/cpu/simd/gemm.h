// The register-blocked micro-kernel under attention: C[MR x NV vectors] (+)= A[MR x k] B[k x NV vectors].
//
// A is read one unit at a time and broadcast, B one vector at a time, C stays in registers. A "unit" is what one lane multiplies in one
// instruction: a float, a double, or a pair of bf16 that are neighbours along k (AVX512-BF16's dot product). So the packed operands of all
// three look alike and only mul_add differs.
#pragma once

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

struct MathF32 {
  using Acc = float;
  using Unit = float;
  static constexpr int kPair = 1;  // elements of k in a unit
  FOVEATE_INLINE Vec<float> mul_add(Vec<float> c, float a, Vec<float> b) { return c + a * b; }
  // The same of kTileRows lanes (and two spare ones), each with its own a: bitwise identical results.
  using Accs = vec<float, 8>;
  using Units = vec<float, 8>;
  FOVEATE_INLINE Accs mul_add_lanes(Accs c, Units a, Units b) { return c + a * b; }
};

struct MathF64 {
  using Acc = double;
  using Unit = double;
  static constexpr int kPair = 1;
  FOVEATE_INLINE Vec<double> mul_add(Vec<double> c, double a, Vec<double> b) { return c + a * b; }
  using Accs = vec<double, 8>;
  using Units = vec<double, 8>;
  FOVEATE_INLINE Accs mul_add_lanes(Accs c, Units a, Units b) { return c + a * b; }
};

#if defined(__AVX512BF16__)
struct MathBf16 {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kPair = 2;
  FOVEATE_INLINE Vec<float> mul_add(Vec<float> c, uint32_t a, vec<uint32_t, 16> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  using Accs = vec<float, 8>;
  using Units = vec<uint32_t, 8>;
  FOVEATE_INLINE Accs mul_add_lanes(Accs c, Units a, Units b) { return (Accs)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b); }
};
#elif defined(FOVEATE_TILE_SHIM)
struct MathBf16 {  // a test build: the layout of the dot instruction on a CPU without it
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kPair = 2;
  FOVEATE_INLINE Vec<float> mul_add(Vec<float> c, uint32_t a, vec<uint32_t, kLanes<float>> b) {
    const auto value = [](auto bits) { return bit_cast<Vec<float>>(bits); };
    const vec<uint32_t, kLanes<float>> pair = a - vec<uint32_t, kLanes<float>>{};
    return c + value(pair << 16) * value(b << 16) + value(pair & 0xffff0000u) * value(b & 0xffff0000u);
  }
};
#else
using MathBf16 = MathF32;  // converted to float when packed
#endif

// Tile shape: the accumulators plus one row of B must fit the register file (32 vectors with AVX-512 and NEON, 16 before).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;
#endif
constexpr int kTileRows = 6;

template <class M>
concept Tiled = requires { M::kTiled; };  // products by AMX (amx/attention_tiles.h)

template <class M>
constexpr int kWidth = kLanes<typename M::Acc>;  // lanes
template <class M>
constexpr int kPanel = kTileVecs * kWidth<M>;  // columns of one tile

// Ranges of keys start and end at multiples of it: whole vectors, whole Philox groups. Packed keys are padded to it, even where a panel is
// smaller.
constexpr int64_t kColumnAlign = 16;
template <class M>
constexpr int64_t kKeyAlign = max<int64_t>(max<int64_t>(kPanel<M>, kColumnAlign), Tiled<M> ? 32 : 0);

constexpr int64_t kChain = 128;  // units along the head dim that are summed in one chain

enum class Update { kSet, kAdd, kScaleAdd };  // C = AB, C += AB, C = scale[row] * C + AB

// Keeps a vector in a register that several instructions read: GCC else loads it once for each of them, and then the loads bind.
template <class U>
FOVEATE_INLINE U in_register(U v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// A function of its own: inlined, GCC 12 gives registers of the accumulators to what surrounds the loop and stores two of them in each step.
// a[row * kRow + step * kStep], b[step * b_stride + column], c[row * c_stride + column]; k counts units.
template <class M, int kRows, int kVecs, int kRow, int kStep, Update kUpdate>
[[gnu::noinline]] static void gemm_tile(int64_t k, const typename M::Unit* a, const typename M::Unit* b, int64_t b_stride,
                                        typename M::Acc* c, int64_t c_stride, const typename M::Acc* scale) {
  using Acc = typename M::Acc;
  using V = Vec<Acc>;
  using U = vec<typename M::Unit, kWidth<M>>;
  constexpr int w = kWidth<M>;
  V acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = V{};
  for (int64_t i = 0; i < k; ++i) {
    U bv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) bv[v] = in_register(load_raw<U>(b + v * w));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = M::mul_add(acc[r][v], a[r * kRow], bv[v]);
    a += kStep;
    b += b_stride;
  }
  // The sum of this call meets C only here: blocks of sums lose less to rounding than one long chain.
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Acc* at = c + r * c_stride + v * w;
      if constexpr (kUpdate == Update::kAdd) acc[r][v] += load_raw<V>(at);
      if constexpr (kUpdate == Update::kScaleAdd) acc[r][v] += load_raw<V>(at) * scale[r];
      store_raw(at, acc[r][v]);
    }
}

// S = Q K^T for columns [begin, end) of a block packed by pack_columns: one tile row against panels of kPanel keys. Where a panel is needed
// only in part, narrower tiles are used. a as in gemm_tile; c is the row of scores.
template <class M, int kRows, int kRow, int kStep>
FOVEATE_INLINE void gemm_columns(int64_t begin, int64_t end, int64_t units, const typename M::Unit* a, const typename M::Unit* columns,
                                 typename M::Acc* c, int64_t c_stride) {
  constexpr int w = kWidth<M>, panel = kPanel<M>;
  for (int64_t p = begin / panel * panel; p < end; p += panel) {
    const typename M::Unit* b = columns + p * units;
    int64_t v = begin > p ? (begin - p) / w : 0;
    const int64_t last = end - p < panel ? ceil_div<int64_t>(end - p, w) : kTileVecs;
    const auto tile = [&]<int kVecs>(std::integral_constant<int, kVecs>) {
      gemm_tile<M, kRows, kVecs, kRow, kStep, Update::kSet>(min<int64_t>(units, kChain), a, b + v * w, panel, c + p + v * w, c_stride,
                                                            nullptr);
      for (int64_t u = kChain; u < units; u += kChain)
        gemm_tile<M, kRows, kVecs, kRow, kStep, Update::kAdd>(min<int64_t>(units - u, kChain), a + u * kStep, b + u * panel + v * w, panel,
                                                              c + p + v * w, c_stride, nullptr);
      v += kVecs;
    };
    while (v < last) {
      if (last - v >= kTileVecs)
        tile(std::integral_constant<int, kTileVecs>{});
      else if (last - v >= 2)
        tile(std::integral_constant<int, 2>{});
      else
        tile(std::integral_constant<int, 1>{});
    }
  }
}

// One row of tiles: all `columns` (a multiple of the lanes) of C, kVecs vectors at a time.
template <class M, int kRows, int kVecs, int kRow, int kStep, Update kUpdate>
FOVEATE_INLINE void gemm_rows(int64_t columns, int64_t k, const typename M::Unit* a, const typename M::Unit* b, int64_t b_stride,
                              typename M::Acc* c, int64_t c_stride, const typename M::Acc* scale = nullptr) {
  constexpr int w = kWidth<M>;
  int64_t col = 0;
  for (; col + kVecs * w <= columns; col += kVecs * w)
    gemm_tile<M, kRows, kVecs, kRow, kStep, kUpdate>(k, a, b + col, b_stride, c + col, c_stride, scale);
  if constexpr (kVecs > 2)
    if (col + 2 * w <= columns) {
      gemm_tile<M, kRows, 2, kRow, kStep, kUpdate>(k, a, b + col, b_stride, c + col, c_stride, scale);
      col += 2 * w;
    }
  if (col < columns) gemm_tile<M, kRows, 1, kRow, kStep, kUpdate>(k, a, b + col, b_stride, c + col, c_stride, scale);
}

}  // namespace foveate::cpu::FOVEATE_ISA
