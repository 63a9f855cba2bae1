// A whole step of a causal language model on the CPU: all layers (decoder/layer.h) for [B, S] tokens against a paged cache, between the
// embedding and the head. A layer is four calls of the linear kernel (csrc/cpu/linear/linear.cpp) around append_and_attend, or two for
// experts' products by groups.
//
// Steps of a few tokens run in one parallel region, whose threads meet at barriers between the phases; longer ones let each kernel divide
// its own work. x, the residual stream, is fp32.
#pragma once

#include <vector>

#include "decoder/step.h"

namespace foveate {

struct CachePages {
  TensorView k, v;              // [layers, pages, page_size, Hkv, D]
  TensorView k_scale, v_scale;  // of int8 and fp8 pages: fp32 [layers, pages, page_size, Hkv]
};

class Decoder {
 public:
  Decoder(const DecoderSizes& sizes, const Norm& final_norm, const std::vector<RotaryTable>& rotary);
  void add_layer(const DecoderLayer& layer);
  // In place of the last layer's MLP.
  void add_experts(const ExpertsPart& experts);
  const DecoderSizes& sizes() const { return sizes_; }

  // x: fp32 [B, S, hidden], the embeddings; becomes the hidden states after the final norm. lens: int32 [B], keys before the step.
  // adapters: of the last tokens, in order.
  void step(TensorView x, TensorView lens, TensorView block_table, const CachePages& pages, const DecodePlan& plan, Threads threads,
            const std::vector<AdapterTokens>& adapters = {}) const;

 private:
  void check_step(const TensorView& x, const TensorView& lens, const TensorView& block_table, const CachePages& pages) const;
  KvCacheParams cache_params(const TensorView& x, const std::vector<int32_t>& kv_lens, const TensorView& block_table,
                             const CachePages& pages, const DecodePlan& plan) const;
  void run_layers(const CachePages& pages, const KvCacheParams& cache, Step step) const;

  DecoderSizes sizes_;
  Norm final_norm_;
  std::vector<RotaryTable> rotary_;
  std::vector<DecoderLayer> layers_;
  StepNeeds needs_;
};

}  // namespace foveate
