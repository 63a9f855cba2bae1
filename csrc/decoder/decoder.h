// A whole step of a causal language model on the CPU: all layers for [B, S] tokens against a paged cache, between the embedding and the
// head. Each layer is four calls of the linear kernel (csrc/cpu/linear/linear.cpp) around append_and_attend:
//
//   q, k, v = norm(x) Wq, Wk, Wv      [q, k normed by head]      a = attention(q, k, v)      x += a Wo        [or += norm(a Wo)]
//   h = act(norm(x) Wgate) * norm(x) Wup     [or act(norm(x) Wup)]      x += h Wdown        [or += norm(h Wdown)]
//
// Steps of a few tokens run in one parallel region, whose threads meet at barriers between the phases; longer ones let each kernel divide
// its own work. x, the residual stream, is fp32. Weights and norms are borrowed: whoever builds a Decoder keeps their tensors alive.
#pragma once

#include <vector>

#include "cpu/simd/team.h"
#include "ops/kv_cache.h"
#include "ops/linear.h"

namespace foveate {

struct DecoderLayer {
  Norm attention_norm, mlp_norm;  // in front
  Norm attention_out_norm, mlp_out_norm;  // behind (Gemma 2); kind kNone: none
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim], RMS by head; may be null
  float head_norm_eps = 0;
  PackedWeight q, k, v, o;  // k.data null: q makes q, k and v side by side
  PackedWeight gate, up, down;  // gate.data null: no gate
  double scale = 1;
  int64_t window_left = -1;
};

struct DecoderSizes {
  int64_t hidden = 0, inner = 0, heads_q = 0, heads_kv = 0, head_dim = 0;
  double softcap = 0;
  Activation activation = Activation::kSilu;
};

struct CachePages {
  TensorView k, v;              // [layers, pages, page_size, Hkv, D]
  TensorView k_scale, v_scale;  // of int8 and fp8 pages: fp32 [layers, pages, page_size, Hkv]
};

class Decoder {
 public:
  // rotary_cos, rotary_sin: fp32 [positions, head_dim / 2], or undefined.
  Decoder(const DecoderSizes& sizes, const Norm& final_norm, TensorView rotary_cos, TensorView rotary_sin);
  void add_layer(const DecoderLayer& layer);
  const DecoderSizes& sizes() const { return sizes_; }

  // x: fp32 [B, S, hidden], the embeddings; becomes the hidden states after the final norm. lens: int32 [B], keys before the step.
  void step(TensorView x, TensorView lens, TensorView block_table, const CachePages& pages, const DecodePlan& plan, Threads threads) const;

 private:
  struct Buffers;
  void check_step(const TensorView& x, const TensorView& lens, const TensorView& block_table, const CachePages& pages) const;
  KvCacheParams cache_params(const TensorView& x, const std::vector<int32_t>& kv_lens, const TensorView& block_table,
                             const CachePages& pages, const DecodePlan& plan) const;
  void run_layers(const CachePages& pages, const KvCacheParams& cache, const Buffers& buffers, bool blocked, int threads,
                  const cpu::Team* team) const;
  // team null: each kernel divides its own work among `threads`. Else this thread does its share of every phase.
  void attend(const DecoderLayer& layer, KvCacheParams p, const Buffers& buffers, bool blocked, int threads, const cpu::Team* team) const;
  void run_layer(const DecoderLayer& layer, const KvCacheParams& cache, const Buffers& buffers, bool blocked, int threads,
                 const cpu::Team* team) const;

  DecoderSizes sizes_;
  Norm final_norm_;
  TensorView rotary_cos_, rotary_sin_;
  std::vector<DecoderLayer> layers_;
};

}  // namespace foveate
