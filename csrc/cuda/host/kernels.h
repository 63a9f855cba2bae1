// The CUDA kernels: one host function for each op, on device pointers. csrc/cuda/*/*.cu defines them, table.cpp collects them.
// None waits for the device, so lengths, tables and targets are clamped in the kernels where the CPU's ops check them.
#pragma once

#include <cstdint>

#include "contract/attention.h"
#include "contract/copy_pages.h"
#include "contract/kv_cache.h"
#include "contract/loss.h"
#include "contract/norm.h"
#include "contract/rotary.h"
#include "contract/softmax.h"
#include "cuda/host/stream.h"

namespace foveate::cuda {

struct Kernels {
  void (*attention_forward)(const AttentionParams&, Stream);
  // workspace: bytes of attention_backward_workspace, uninitialised
  void (*attention_backward)(const AttentionParams&, const AttentionGrads&, void* workspace, Stream);
  int64_t (*attention_backward_workspace)(const AttentionParams&, const AttentionGrads&);
  void (*kv_append)(const KvCacheParams&, Stream);
  void (*decode)(const KvCacheParams&, Stream);
  void (*rotate_queries)(const KvCacheParams&, void* out, Stream);
  void (*softmax_forward)(const SoftmaxParams&, Stream);
  void (*softmax_backward)(const SoftmaxBackwardParams&, Stream);
  void (*cross_entropy_forward)(const CrossEntropyParams&, Stream);
  void (*cross_entropy_backward)(const CrossEntropyParams&, Stream);
  void (*rms_norm_forward)(const RmsNormParams&, Stream);
  void (*rms_norm_backward)(const RmsNormBackwardParams&, Stream);
  void (*rotary)(const RotaryParams&, Stream);
  void (*copy_pages)(const CopyPagesParams&, Stream);
};

// attention/forward.cu
void attention_forward(const AttentionParams& p, Stream stream);
// attention/backward.cu
void attention_backward(const AttentionParams& p, const AttentionGrads& g, void* workspace, Stream stream);
int64_t attention_backward_workspace(const AttentionParams& p, const AttentionGrads& g);
// rows/softmax.cu
void softmax_forward(const SoftmaxParams& p, Stream stream);
void softmax_backward(const SoftmaxBackwardParams& p, Stream stream);
// rows/cross_entropy.cu
void cross_entropy_forward(const CrossEntropyParams& p, Stream stream);
void cross_entropy_backward(const CrossEntropyParams& p, Stream stream);
// rows/rms_norm.cu
void rms_norm_forward(const RmsNormParams& p, Stream stream);
void rms_norm_backward(const RmsNormBackwardParams& p, Stream stream);
// rows/rotary.cu
void rotary(const RotaryParams& p, Stream stream);
// kv_cache/kv_append.cu
void kv_append(const KvCacheParams& p, Stream stream);
void rotate_queries(const KvCacheParams& p, void* out, Stream stream);
// kv_cache/copy_pages.cu
void copy_pages(const CopyPagesParams& p, Stream stream);
// kv_cache/decode.cu
void decode(const KvCacheParams& p, Stream stream);

const Kernels& kernels();  // throws in a build without CUDA

}  // namespace foveate::cuda
