// The kernels of one instruction set. csrc/cpu/*/*.cpp is compiled once per set, each time into its own namespace
// (FOVEATE_ISA, from CMake); table.cpp collects the functions.
#pragma once

#include "contract/attention.h"
#include "contract/glu.h"
#include "contract/kv_cache.h"
#include "contract/linear.h"
#include "contract/loss.h"
#include "contract/norm.h"
#include "contract/roofline.h"
#include "contract/rotary.h"
#include "contract/softmax.h"
#include "cpu/simd/team.h"

namespace foveate::cpu {

struct Kernels {
  void (*attention_forward)(const AttentionParams&, int threads);
  void (*attention_backward)(const AttentionParams&, const AttentionGrads&, int threads);
  void (*kv_append)(const KvCacheParams&, int threads);
  void (*decode)(const KvCacheParams&, int threads);
  void (*rotate_queries)(const KvCacheParams&, void* out, int threads);
  void (*linear)(const LinearParams&, int threads);
  // The part of one thread of a team, with its barrier inside; the caller waits after it. scratch: linear_scratch_bytes, shared.
  void (*linear_share)(const LinearParams&, const Team&, char* scratch);
  // The same for rows that meet weights of their own.
  void (*grouped_linear)(const GroupedLinearParams&, int threads);
  void (*grouped_linear_share)(const GroupedLinearParams&, const Team&, char* scratch);
  void (*packed_rows)(const PackedRowsParams&, int threads);
  void (*norm_rows)(const NormRowsParams&, int threads);
  void (*norm_heads)(const NormHeadsParams&, int threads);
  void (*glu_forward)(const GluParams&, int threads);
  void (*glu_backward)(const GluParams&, int threads);
  void (*rms_norm_forward)(const RmsNormParams&, int threads);
  void (*rms_norm_backward)(const RmsNormBackwardParams&, int threads);
  void (*softmax_forward)(const SoftmaxParams&, int threads);
  void (*softmax_backward)(const SoftmaxBackwardParams&, int threads);
  void (*softmax_columns_forward)(const SoftmaxColumnsParams&, int threads);
  void (*softmax_columns_backward)(const SoftmaxColumnsBackwardParams&, int threads);
  void (*cross_entropy_forward)(const CrossEntropyParams&, int threads);
  void (*cross_entropy_backward)(const CrossEntropyParams&, int threads);
  void (*rotary)(const RotaryParams&, int threads);
  int64_t (*multiply_add)(const MultiplyAddParams&, int threads);
  void (*read_memory)(const ReadParams&, int threads);
  void (*copy_memory)(const CopyParams&, int threads);
};

}  // namespace foveate::cpu
