// LoRA adapters of a decoder's layers (Hu et al. 2021, arXiv 2106.09685): y += B (A x) for the tokens of each adapter, in the same step as
// the tokens of others and of none. The updates are computed in fp32 in front of a product, which adds them where it adds its bias.
#pragma once

#include <vector>

#include "decoder/layer.h"

namespace foveate {

// a: in -> rank, b: rank -> out with the adapter's scale in it; both f32. a.data null: this product is not adapted.
struct LowRank {
  PackedWeight a, b;
  bool defined() const { return a.data != nullptr; }
};

// The products of a layer that may be adapted. kQ is also a joint weight of q, k and v; layers of experts have none of the MLP's.
enum Adapted { kQ, kK, kV, kO, kGate, kUp, kDown, kAdaptedProducts };
struct LayerUpdates {
  LowRank of[kAdaptedProducts];
};

struct Adapter {
  std::vector<LayerUpdates> layers;
  int64_t rank = 0;  // the largest
};

// Tokens [first, first + tokens) of a step.
struct AdapterTokens {
  const Adapter* adapter = nullptr;
  int64_t first = 0, tokens = 0;
};

// The adapters of a step, one after the other up to the last token; those in front have none.
struct StepAdapters {
  std::vector<AdapterTokens> parts;
  int64_t first = 0, tokens = 0, rank = 0;

  StepAdapters() = default;
  // `step_tokens`: all of the step.
  StepAdapters(std::vector<AdapterTokens> given, int64_t step_tokens);
};

// A sentence for adapters of other layers.
void check_adapter(const Adapter& adapter, const std::vector<DecoderLayer>& layers);

}  // namespace foveate
