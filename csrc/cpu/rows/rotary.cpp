// Rotary embedding. The angles of one token are converted (and for interleaved pairs spread) once per tile and used for all heads.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/row.h"
#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kTile = 64;  // pairs

// cos and signed sin of one tile of pairs; for interleaved pairs once per element.
template <class A>
struct Angles {
  A cos[2 * kTile], sin[2 * kTile];
};

template <class A, class R>
void load_angles(Angles<A>& angles, const R* cos, const R* sin, int64_t pairs, bool interleaved, A sign) {
  for (int64_t c = 0; c < pairs; ++c) {
    const A cosine = static_cast<A>(to_float(cos[c])), sine = sign * static_cast<A>(to_float(sin[c]));
    if (interleaved) {
      angles.cos[2 * c] = angles.cos[2 * c + 1] = cosine;
      angles.sin[2 * c] = -sine, angles.sin[2 * c + 1] = sine;
    } else {
      angles.cos[c] = cosine;
      angles.sin[c] = sine;
    }
  }
}

template <class A>
FOVEATE_INLINE Vec<A> swap_neighbours(Vec<A> v) {
  return __builtin_shuffle(v, iota<A>() ^ 1);
}

template <class A, class T>
FOVEATE_INLINE void turn_interleaved(const T* x, T* out, const Angles<A>& angles, int64_t elements) {
  for (int64_t d = 0; d < elements; d += kLanes<A>) {
    const Vec<A> v = load_n<A>(x + d, elements - d);
    store_n(out + d, v * load<A>(angles.cos + d) + swap_neighbours<A>(v) * load<A>(angles.sin + d), elements - d);
  }
}

template <class A, class T>
FOVEATE_INLINE void turn_halves(const T* x, T* out, const Angles<A>& angles, int64_t pairs, int64_t distance) {
  for (int64_t c = 0; c < pairs; c += kLanes<A>) {
    const int64_t rest = pairs - c;
    const Vec<A> a = load_n<A>(x + c, rest), b = load_n<A>(x + c + distance, rest);
    const Vec<A> cos = load<A>(angles.cos + c), sin = load<A>(angles.sin + c);
    store_n(out + c, a * cos - b * sin, rest);
    store_n(out + c + distance, b * cos + a * sin, rest);
  }
}

template <class T, class R>
void rotary_token(const RotaryParams& p, int64_t b, int64_t s) {
  using A = AccumulatorOf<T>;
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + s * p.x_stride[1];
  T* out = static_cast<T*>(p.out) + (b * p.seq + s) * p.heads * p.dim;
  const R* cos = static_cast<const R*>(p.cos) + b * p.cos_stride[0] + s * p.cos_stride[1];
  const R* sin = static_cast<const R*>(p.sin) + b * p.sin_stride[0] + s * p.sin_stride[1];
  Angles<A> angles{};
  for (int64_t c = 0; c < p.pairs; c += kTile) {
    const int64_t pairs = min<int64_t>(p.pairs - c, kTile);
    load_angles(angles, cos + c, sin + c, pairs, p.interleaved, static_cast<A>(p.inverse ? -1 : 1));
    for (int64_t h = 0; h < p.heads; ++h) {
      if (p.interleaved)
        turn_interleaved(x + h * p.x_stride[2] + 2 * c, out + h * p.dim + 2 * c, angles, 2 * pairs);
      else
        turn_halves(x + h * p.x_stride[2] + c, out + h * p.dim + c, angles, pairs, p.pairs);
    }
  }
  const int64_t rot = 2 * p.pairs;
  if (rot < p.dim)
    for (int64_t h = 0; h < p.heads; ++h)
      std::memcpy(static_cast<void*>(out + h * p.dim + rot), x + h * p.x_stride[2] + rot, static_cast<size_t>(p.dim - rot) * sizeof(T));
}

}  // namespace

void rotary(const RotaryParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    using A = AccumulatorOf<T>;
    const bool same = p.table_dtype == p.dtype;
    parallel_for(p.batch * p.seq, 1 + 16384 / (p.heads * p.dim), threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        if (same)
          rotary_token<T, T>(p, token / p.seq, token % p.seq);
        else
          rotary_token<T, A>(p, token / p.seq, token % p.seq);
      }
    });
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
