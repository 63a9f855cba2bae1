// What the benches compare with: multiply-add chains that touch no memory, a sum over a buffer, a copy past the caches.
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/vec.h"
#if defined(FOVEATE_TILES)
#include "cpu/amx/tiles.h"
#endif

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// As many chains as the tile of the matrix product has accumulators: 2 units x latency of 4 to 5 cycles need 10 of them at least.
constexpr int kChains = kTileRows * kTileVecs;

// The compiler must take v for unknown here, and so can neither compute ahead nor merge steps. It costs no instruction.
template <class V>
FOVEATE_INLINE void hide(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));  // any of 32 registers
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));  // any of 16
#else
  asm volatile("" : "+w"(v));
#endif
}

// Sum of all chains after `steps` steps. M and its operands are those of gemm.h; `flops` counts one step.
template <class M>
float run_chains(int64_t steps, int64_t& flops) {
  using V = Vec<typename M::Acc>;
  constexpr bool kDot = M::kPair == 2;
  V acc[kChains] = {};
  V one = splat<typename M::Acc>(1);
  auto half = splat<typename M::Acc>(0.5);
  vec<typename M::Unit, kWidth<M>> pairs{};
  if constexpr (kDot) pairs += 0x3f803f80;  // two bf16 of 1
  for (int64_t i = 0; i < steps; ++i) {
    hide(one);
    hide(half);
    hide(pairs);
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) {
      if constexpr (kDot)
        acc[c] = M::mul_add(acc[c], 0x3f803f80, pairs);
      else
        acc[c] = one + half * acc[c];
      hide(acc[c]);
    }
  }
  V total{};
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) total += acc[c];
  flops = 2 * kChains * kWidth<M> * M::kPair;
  return static_cast<float>(hsum(total));
}

#if defined(FOVEATE_TILES)
// The same with AMX: four products of tiles of ones a step, each into its own sums.
float run_tiles(int64_t steps, int64_t& flops) {
  constexpr int kElements = 4 * kTileSide * kTileSide;
  alignas(64) uint16_t ones[kTileSide * 32];
  alignas(64) float sums[kElements];
  for (uint16_t& x : ones) x = 0x3f80;
  TileScope scope;
  scope.configure(0, [](TileConfig& c) {
    for (int t = 0; t < 8; ++t) TileConfig::set(c, t, kTileSide, 64);
  });
  Tiles::load<0>(ones, 64);
  Tiles::load<1>(ones, 64);
  Tiles::zero<4>();
  Tiles::zero<5>();
  Tiles::zero<6>();
  Tiles::zero<7>();
  for (int64_t i = 0; i < steps; ++i)
    Tiles::dot_bf16<4, 0, 1>(), Tiles::dot_bf16<5, 0, 1>(), Tiles::dot_bf16<6, 0, 1>(), Tiles::dot_bf16<7, 0, 1>();
  Tiles::store<4>(sums, 64);
  Tiles::store<5>(sums + 256, 64);
  Tiles::store<6>(sums + 512, 64);
  Tiles::store<7>(sums + 768, 64);
  float total = 0;
  for (float x : sums) total += x;
  flops = int64_t{2} * kElements * 32;
  return total;
}
#endif

}  // namespace

int64_t multiply_add(const MultiplyAddParams& p, int threads) {
#if !defined(__AVX512BF16__) && !defined(FOVEATE_TILES)
  if (p.dtype == DType::kBFloat16) return 0;
#endif
  int64_t flops = 0;
  parallel_tasks(threads, threads, [&](int64_t task, int) {
    int64_t per_step;
    if (p.dtype == DType::kFloat32)
      p.sums[task] = run_chains<MathF32>(p.steps, per_step);
    else if (p.dtype == DType::kFloat64)
      p.sums[task] = run_chains<MathF64>(p.steps, per_step);
    else
#if defined(FOVEATE_TILES)
      p.sums[task] = run_tiles(p.steps, per_step);
#else
      p.sums[task] = run_chains<MathBf16>(p.steps, per_step);
#endif
    if (task == 0) flops = per_step;
  });
  return flops * p.steps * threads;
}

void read_memory(const ReadParams& p, int threads) {
  constexpr int w = kLanes<float>, kAhead = 8;  // independent sums
  parallel_tasks(threads, threads, [&](int64_t task, int) {
    const int64_t begin = p.n * task / threads, end = p.n * (task + 1) / threads;
    VecF sums[kAhead] = {};
    int64_t i = begin;
    for (; i + kAhead * w <= end; i += kAhead * w)
#pragma GCC unroll 8
      for (int k = 0; k < kAhead; ++k) sums[k] += load_raw<VecF>(p.x + i + k * w);
    for (; i < end; i += w) sums[0] += load_n<float>(p.x + i, end - i);
    for (int k = 1; k < kAhead; ++k) sums[0] += sums[k];
    p.sums[task] = hsum(sums[0]);
  });
}

void copy_memory(const CopyParams& p, int threads) {
  constexpr int w = kLanes<float>;
  parallel_for(p.n, 1, threads, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i < end && reinterpret_cast<uintptr_t>(p.out + i) % kVecBytes; ++i) p.out[i] = p.x[i];  // streaming stores are aligned
    for (; i + w <= end; i += w) {
      const VecF v = load_raw<VecF>(p.x + i);
#if defined(__AVX512F__)
      _mm512_stream_ps(p.out + i, (__m512)v);
#elif defined(__AVX2__)
      _mm256_stream_ps(p.out + i, (__m256)v);
#elif defined(__x86_64__)
      _mm_stream_ps(p.out + i, (__m128)v);
#else
      store_raw(p.out + i, v);
#endif
    }
    for (; i < end; ++i) p.out[i] = p.x[i];
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
