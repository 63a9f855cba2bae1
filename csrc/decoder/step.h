// One step of a decoder: its memory, and the parts of a layer as phases over it.
#pragma once

#include <memory>

#include "decoder/adapters.h"
#include "decoder/layer.h"
#include "decoder/workers.h"
#include "ops/kv_cache.h"

namespace foveate {

// Experts take tokens in chunks of so many rows, a row for each expert of a token: each expert's weights are read once a chunk.
constexpr int64_t kExpertRows = 4096;
inline int64_t expert_tokens(int64_t per_token, int64_t tokens) { return std::min(tokens, std::max<int64_t>(1, kExpertRows / per_token)); }
constexpr int64_t kGroupRows = 128;  // at most of one expert at once: they stay in L2 while its panels pass

// What the layers need memory for, at most.
struct StepNeeds {
  bool temp = false;
  int64_t inner = 0, widest = 0;  // of MLPs; of any product's input
  int64_t experts = 0, per_token = 0, expert_inner = 0, shared_inner = 0;

  void add(const DecoderLayer& layer, const DecoderSizes& sizes);
};

// Memory for one chunk of tokens; rows are those of all its tokens' experts, sorted by expert.
struct ExpertMemory {
  float *normed = nullptr, *logits = nullptr, *weights = nullptr;  // [tokens, hidden], [tokens, experts], [tokens, per_token]
  int32_t *chosen = nullptr, *row_of = nullptr, *token_of = nullptr;  // [tokens, per_token] twice, [rows]
  LinearGroup* groups = nullptr;  // [experts + rows / kGroupRows], twice: of up, of down
  int64_t* num_groups = nullptr;
  float *inner = nullptr, *out = nullptr;  // [rows, inner], [rows, hidden]
  float *shared = nullptr, *shared_inner = nullptr, *shared_score = nullptr;  // [tokens, hidden], [tokens, inner], [tokens]
};

// qkv and attended have the cache's dtype, or fp32 where that is quantised.
class StepMemory {
 public:
  // team: the threads that share one parallel region, 0 for a region in each kernel.
  StepMemory(const DecoderSizes& sizes, const StepNeeds& needs, const KvCacheParams& p, bool blocked, int team,
             const StepAdapters& adapters);

  int64_t tokens = 0;
  DType dtype = DType::kFloat32;
  float* x = nullptr;  // [tokens, hidden]
  char *qkv = nullptr, *attended = nullptr, *rotated = nullptr;  // [tokens, (Hq + 2 Hkv) D], [tokens, Hq D] twice
  float *inner = nullptr, *temp = nullptr;  // [tokens, inner], [tokens, hidden]
  char* scratch = nullptr;  // of a team, linear_scratch_bytes
  float *partial_out = nullptr, *partial_lse = nullptr;  // as in KvCacheParams
  float *low = nullptr, *delta[3] = {};  // of the adapters' tokens: 3 * rank each, and the updates of up to three products
  ExpertMemory experts;

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> memory_;
};

struct Step {
  const DecoderSizes& sizes;
  const StepMemory& m;
  Workers workers;
  bool blocked = false;
  const StepAdapters* adapters = nullptr;  // null: none
  size_t layer = 0;

  // p, with the adapters' updates of `product` and those that follow it, for p.weight[0] and those that follow it.
  void linear(LinearParams p, Adapted product) const;
  // x += scale y W, or x += norm(y W)
  void add_product(const void* y, DType dtype, const PackedWeight& w, Adapted product, const Norm& out_norm, float scale) const;
  // out = act(norm(x) Wgate) * norm(x) Wup, or act(norm(x) Wup)
  LinearParams inner_product(const MlpWeights& mlp, const float* x, int64_t rows, const Norm& norm, float* out) const;
};

// The phases of a layer. cache: of this layer, with k and v its pages.
void run_projections(const Step& step, const AttentionPart& part);
void run_attention(const Step& step, const AttentionPart& part, KvCacheParams cache);
// x += scale * the experts of norm(x), or += out_norm(them).
void run_experts(const Step& step, const DecoderLayer& layer);

// The experts of one token: `chosen` and their `weights`, [per_token] each, from the router's logits [experts], which are overwritten.
void choose_experts(const Router& router, float* logits, int32_t* chosen, float* weights);

}  // namespace foveate
