// Run-time values to compile-time constants, by templated lambdas:
//   visit_float(dtype, [&]<class T>(std::type_identity<T>) { run<T>(); });
#pragma once

#include <type_traits>
#include <utility>

#include "core/dtype.h"

namespace foveate {

template <class F>
[[gnu::always_inline]] inline void visit_bool(bool value, F&& f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// The dtypes of activations. The ops have refused every other one before.
template <class F>
[[gnu::always_inline]] inline void visit_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(std::type_identity<float>{});
    case DType::kFloat64: return f(std::type_identity<double>{});
    case DType::kFloat16: return f(std::type_identity<f16>{});
    case DType::kBFloat16: return f(std::type_identity<bf16>{});
    default: return;
  }
}

}  // namespace foveate
