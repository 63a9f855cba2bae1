// Stands in for CUDA's header of this name when g++ compiles kernels: keywords, vector types, built-in variables and the intrinsics of plain
// arithmetic. `__shared__` is missing on purpose: kernels use dynamic shared memory through the device layer.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// NOLINTBEGIN: CUDA's own names
template <class T, int alignment>
struct alignas(alignment) FoveateVector2 {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) FoveateVector4 {
  T x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using char2 = FoveateVector2<signed char, 2 * sizeof(signed char)>;
using char4 = FoveateVector4<signed char>;
constexpr char2 make_char2(signed char x, signed char y) { return {x, y}; }
constexpr char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }
using uchar2 = FoveateVector2<unsigned char, 2 * sizeof(unsigned char)>;
using uchar4 = FoveateVector4<unsigned char>;
constexpr uchar2 make_uchar2(unsigned char x, unsigned char y) { return {x, y}; }
constexpr uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
using short2 = FoveateVector2<short, 2 * sizeof(short)>;
using short4 = FoveateVector4<short>;
constexpr short2 make_short2(short x, short y) { return {x, y}; }
constexpr short4 make_short4(short x, short y, short z, short w) { return {x, y, z, w}; }
using ushort2 = FoveateVector2<unsigned short, 2 * sizeof(unsigned short)>;
using ushort4 = FoveateVector4<unsigned short>;
constexpr ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
constexpr ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
using int2 = FoveateVector2<int, 2 * sizeof(int)>;
using int4 = FoveateVector4<int>;
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
using uint2 = FoveateVector2<unsigned, 2 * sizeof(unsigned)>;
using uint4 = FoveateVector4<unsigned>;
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using float2 = FoveateVector2<float, 2 * sizeof(float)>;
using float4 = FoveateVector4<float>;
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Indices of the thread that runs; set at each switch between threads and at each block.
// initial-exec: read often, and few enough bytes for the static part of thread-local storage.
extern constinit thread_local uint3 threadIdx [[gnu::tls_model("initial-exec")]];
extern constinit thread_local uint3 blockIdx [[gnu::tls_model("initial-exec")]];
extern constinit thread_local dim3 blockDim [[gnu::tls_model("initial-exec")]];
extern constinit thread_local dim3 gridDim [[gnu::tls_model("initial-exec")]];

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
// NOLINTEND
