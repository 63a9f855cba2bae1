// Vectors of float and double for one instruction set, on the compiler's vector types (so + - * / < ?: are the operators themselves).
// Everything is static and force-inlined: code compiled for AVX-512 must never be what the linker picks for an older CPU.
//   load<float>(const bf16*)   one vector, converted;   store(T*, v)   rounds to nearest even;   *_n: the first n lanes, rest 0
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/math.h"

#define FOVEATE_INLINE [[gnu::always_inline]] static inline

namespace foveate::cpu::FOVEATE_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T, int kLanes>
struct VecType {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T, int kLanes>
using vec = typename VecType<T, kLanes>::type;

// The vector of accumulator type A (float or double), its integer twin, its lane count.
template <class A>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(A));
template <class A>
using Vec = vec<A, kLanes<A>>;
template <class A>
using IntOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A>
using IVec = vec<IntOf<A>, kLanes<A>>;
using VecF = Vec<float>;
using VecI = IVec<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class V, class T>
FOVEATE_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
FOVEATE_INLINE void store_raw(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class A>
FOVEATE_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // x - 0: keeps -0 and NaN
}
template <class A>
FOVEATE_INLINE IVec<A> iota() {
  IVec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}
template <class To, class From>
FOVEATE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- scalar conversions ------------------------------------------------------------------------------------------------------

FOVEATE_INLINE float to_float(float x) { return x; }
FOVEATE_INLINE double to_float(double x) { return x; }
FOVEATE_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FOVEATE_INLINE float to_float(int8_t x) { return x; }
FOVEATE_INLINE float to_float(f8e4m3 x) {
  // The exponent and mantissa moved to float's place, then scaled by 2^120 (the difference of the biases): denormals come out right too.
  const uint32_t magnitude = x.bits & 0x7f, sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  if (magnitude == 0x7f) return bit_cast<float>(sign | 0x7fc00000u);
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude << 20) * 0x1p120f) | sign);
}
FOVEATE_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
#endif
}

FOVEATE_INLINE void from_float(float* p, float x) { *p = x; }
FOVEATE_INLINE void from_float(double* p, double x) { *p = x; }
FOVEATE_INLINE void from_float(bf16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FOVEATE_INLINE void from_float(f16* p, float x) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000;
  uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000)
    magnitude = 0x7e00;
  else if (magnitude >= 0x477ff000)
    magnitude = 0x7c00;  // rounds to more than 65504
  else if (magnitude < 0x38800000)                      // denormal: let float addition round at 2^-24
    magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  else
    magnitude = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  p->bits = static_cast<uint16_t>(sign | magnitude);
#endif
}

// ---- vector load and store, converting ---------------------------------------------------------------------------------------

// Integer lanes to 32 bits. __builtin_convertvector of GCC 12 splits and reassembles the vector, 6 instructions for one.
template <class To, class V>
FOVEATE_INLINE auto widen(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  using Wide = vec<To, n>;
#if defined(__AVX2__)
  using From = std::remove_cvref_t<decltype(v[0])>;
#endif
#if defined(__AVX512F__)
  if constexpr (n == 16 && std::is_same_v<From, uint16_t>)
    return (Wide)_mm512_cvtepu16_epi32((__m256i)v);
  else if constexpr (n == 16 && std::is_same_v<From, uint8_t>)
    return (Wide)_mm512_cvtepu8_epi32((__m128i)v);
  else if constexpr (n == 16 && std::is_same_v<From, int8_t>)
    return (Wide)_mm512_cvtepi8_epi32((__m128i)v);
  else
#elif defined(__AVX2__)
  if constexpr (n == 8 && std::is_same_v<From, uint16_t>)
    return (Wide)_mm256_cvtepu16_epi32((__m128i)v);
  else
#endif
    return __builtin_convertvector(v, Wide);
}

template <class A, class T>
FOVEATE_INLINE Vec<A> load(const T* p) {
  constexpr int n = kLanes<A>;
  if constexpr (std::is_same_v<A, T>) {
    return load_raw<Vec<A>>(p);
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, bf16>) {
    return bit_cast<Vec<float>>(widen<uint32_t>(load_raw<vec<uint16_t, n>>(p)) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, f16>) {
    return (Vec<float>)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, f16>) {
    return (Vec<float>)_mm256_cvtph_ps(load_raw<__m128i>(p));
#endif
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, int8_t>) {
    return __builtin_convertvector(widen<int32_t>(load_raw<vec<int8_t, n>>(p)), Vec<float>);
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, f8e4m3>) {
    const auto bits = widen<uint32_t>(load_raw<vec<uint8_t, n>>(p));
    const auto magnitude = bits & 0x7f;
    const auto value = bit_cast<vec<uint32_t, n>>(bit_cast<Vec<float>>(magnitude << 20) * 0x1p120f) | (bits & 0x80) << 24;
    return bit_cast<Vec<float>>(magnitude == 0x7f ? value | 0x7fc00000u : value);
  } else {
    Vec<A> v;
    for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
    return v;
  }
}

template <class T, class V>
FOVEATE_INLINE void store(T* p, V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  using A = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (std::is_same_v<A, T>) {
    store_raw(p, v);
#if defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<T, bf16> && n == 16) {
    store_raw(p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  } else if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, float>) {
    const auto u = bit_cast<vec<uint32_t, n>>(v);
    const auto rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    store_raw(p, __builtin_convertvector(v != v ? vec<uint32_t, n>{} + 0x7fc0 : rounded, vec<uint16_t, n>));
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, f16> && n == 16) {
    store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<T, f16> && n == 8) {
    store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
  }
}

template <class A, class T>
FOVEATE_INLINE Vec<A> load_n(const T* p, int64_t n, A rest = 0) {
  if (n >= kLanes<A>) return load<A>(p);
  Vec<A> v = splat<A>(rest);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T, class V>
FOVEATE_INLINE void store_n(T* p, V v, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if (n >= lanes) return store(p, v);
  for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
}

// ---- arithmetic --------------------------------------------------------------------------------------------------------------

template <class V>
FOVEATE_INLINE V vmax(V a, V b) {  // b where either is NaN
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<V, Vec<float>>) return (V)_mm_max_ps((__m128)a, (__m128)b);
#endif
  return a > b ? a : b;
}
template <class V>
FOVEATE_INLINE auto hsum(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  using A = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (n == 1) {
    return v[0];
  } else {
    vec<A, n / 2> lo, hi;
    std::memcpy(&lo, &v, sizeof(lo));
    std::memcpy(&hi, reinterpret_cast<const char*>(&v) + sizeof(lo), sizeof(hi));
    return hsum<vec<A, n / 2>>(lo + hi);
  }
}
template <class V>
FOVEATE_INLINE auto hmax(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  using A = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (n == 1) {
    return v[0];
  } else {
    vec<A, n / 2> lo, hi;
    std::memcpy(&lo, &v, sizeof(lo));
    std::memcpy(&hi, reinterpret_cast<const char*>(&v) + sizeof(lo), sizeof(hi));
    return hmax<vec<A, n / 2>>(lo > hi ? lo : hi);
  }
}
template <class A>
FOVEATE_INLINE Vec<A> vabs(Vec<A> v) {
  return v < 0 ? -v : v;
}

// 2^x for x <= 127. Below -126 the result is 0 (also for -inf); NaN stays NaN. kDegree 5: relative error 1e-7; 4: 3e-6, enough in front
// of a 16-bit rounding. The polynomial is the minimax fit of 2^f on |f| <= 1/2 with 2^0 = 1 exactly: online softmax
// multiplies by 2^0 once for each block, and that must not drift.
template <int kDegree = 5>
FOVEATE_INLINE VecF exp2v(VecF x) {
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves the nearest integer, biased as an exponent is, in the low mantissa bits
  const VecF clamped = vmax(splat(-127.0f), x);
  const VecF shifted = clamped + kRound;
  const VecF f = clamped - (shifted - kRound);
  VecF p;
  if constexpr (kDegree == 5) {
    p = f * 0.001326472712356f + 0.009671512644826f;
    p = p * f + 0.05550733743497f;
    p = p * f + 0.2402224208526f;
    p = p * f + 0.693146977599f;
  } else {
    p = f * 0.009582853038445f + 0.05590642467795f;
    p = p * f + 0.240240986116f;
    p = p * f + 0.6931241934031f;
  }
  p = p * f + 1.0f;
  // The scale 2^n is built in the exponent bits; n = -127 gives exponent 0, that is a factor of 0.
  return p * bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
}
template <int kDegree = 5>
FOVEATE_INLINE Vec<double> exp2v(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}
template <class A>
FOVEATE_INLINE Vec<A> expv(Vec<A> x) {
  return exp2v(x * static_cast<A>(kLog2e));
}

FOVEATE_INLINE VecF tanhv(VecF x) {
  // Near 0 the exponential form cancels: an odd polynomial (Cephes' tanhf range and order) keeps the relative error.
  const VecF z = x * x;
  VecF p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const VecF ax = vabs<float>(x), capped = ax > 9.0f ? splat(9.0f) : ax;
  const VecF big = 1.0f - 2.0f / (expv<float>(2.0f * capped) + 1.0f);
  return ax < 0.625f ? p : (x < 0 ? -big : big);
}
FOVEATE_INLINE Vec<double> tanhv(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

}  // namespace foveate::cpu::FOVEATE_ISA
