// The kernels of one instruction set. csrc/cpu/kernels/*.cpp is compiled once per set, each time into its own namespace
// (FOVEATE_ISA, from CMake); table.cpp collects the functions.
#pragma once

#include "ops/kv_cache.h"
#include "ops/norm.h"

namespace foveate::cpu {

struct Kernels {
  void (*kv_append)(const KvCacheParams&, int threads);
  void (*decode)(const KvCacheParams&, int threads);
  void (*rms_norm_forward)(const RmsNormParams&, int threads);
};

}  // namespace foveate::cpu
