// What one core's second cache holds, asked of the system once: blocks of work are sized by it.
#pragma once

#include <unistd.h>

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

FOVEATE_INLINE int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return static_cast<int64_t>(size);
#endif
    return int64_t{1} << 20;  // the system does not say
  }();
  return bytes;
}

}  // namespace foveate::cpu::FOVEATE_ISA
