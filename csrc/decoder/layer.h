// What a layer of a decoder is: optional parts, which the families of models choose by their settings. Nothing here knows a family.
//
//   q, k, v = norm(x) Wq, Wk, Wv     [cut to -clip..clip]     [q, k normed, before or after RoPE]
//   a = attention(q, k, v)           [RoPE, ALiBi, a window, sinks]
//   x += scale (a Wo)                [or += out_norm(a Wo)]
//   h = act(norm(x) Wgate) * norm(x) Wup     [or act(norm(x) Wup)]     [or each token's experts]
//   x += scale (h Wdown)             [or += out_norm(h Wdown)]
//
// A parallel layer computes h of the x that attention reads.
// Weights and norms are borrowed: whoever builds a layer keeps their tensors alive.
#pragma once

#include <vector>

#include "contract/linear.h"
#include "core/tensor.h"

namespace foveate {

struct DecoderSizes {
  int64_t hidden = 0, heads_q = 0, heads_kv = 0, head_dim = 0;
  double softcap = 0;
  Activation activation = Activation::kSilu;
  float activation_limit = 0;  // of Activation::kClampedSilu
};

struct RotaryTable {
  TensorView cos, sin;  // fp32 [positions, pairs]
};

// The norm of the heads of q or k. joint: over all heads of a token together; own_weights: each head has weights, [heads, head_dim].
struct HeadNorm {
  Norm norm = {};  // kind kNone: none
  bool joint = false, own_weights = false;
  bool defined() const { return norm.kind != NormKind::kNone; }
};

struct AttentionPart {
  Norm norm, out_norm;  // in front of it and behind it; kind kNone: none
  PackedWeight q, k, v, o;  // k.data null: q makes q, k and v side by side
  float clip = 0;  // of q, k and v; 0: none
  HeadNorm q_norm, k_norm;
  bool norms_after_rotary = false;
  int64_t rotary = -1;  // which table; -1: no RoPE
  bool interleaved = false;
  double scale = 1;  // of q k^T
  int64_t window_left = -1;
  const float *alibi = nullptr, *sinks = nullptr;  // [heads_q]
};

// down(act(gate(x)) * up(x)), or down(act(up(x))) if gate.data is null.
struct MlpWeights {
  PackedWeight gate, up, down;
  bool defined() const { return up.data != nullptr; }
};

// How a token's experts are chosen, as models/experts.py: Router.
enum class RouterKind : uint8_t { kSoftmax, kTop, kSigmoid };
struct Router {
  PackedWeight weight;  // hidden -> experts
  RouterKind kind = RouterKind::kSoftmax;
  const float* choice_bias = nullptr;  // [experts], added to what the choice looks at, not to the weights; may be null
  int64_t per_token = 1, groups = 1, top_groups = 1;
  bool normalize = false;
  float scale = 1;
};

struct ExpertsPart {
  Router router;
  std::vector<MlpWeights> experts;  // all of one size
  MlpWeights shared;  // for every token; up.data null: none
  PackedWeight shared_gate;  // hidden -> 1: shared is multiplied by its sigmoid; data null: it is not
  bool defined() const { return !experts.empty(); }
};

struct DecoderLayer {
  AttentionPart attention;
  Norm mlp_norm, mlp_out_norm;
  MlpWeights mlp;  // or
  ExpertsPart experts;
  bool parallel = false;
  float residual_scale = 1;  // of what is added to x; norms behind have it in their weights
};

// A sentence for what cannot be run. `tables`: how many rotary tables there are.
void check_attention(const AttentionPart& part, const DecoderSizes& sizes, int64_t tables);
void check_mlp(const MlpWeights& mlp, const DecoderSizes& sizes, const char* whose);
void check_experts(const ExpertsPart& part, const DecoderSizes& sizes);

}  // namespace foveate
