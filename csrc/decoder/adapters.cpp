#include "decoder/adapters.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "decoder/step.h"

namespace foveate {

StepAdapters::StepAdapters(std::vector<AdapterTokens> given, int64_t step_tokens) : parts(std::move(given)) {
  first = parts.empty() ? step_tokens : parts[0].first;
  tokens = step_tokens - first;
  check(first >= 0 && tokens >= 0, "the first adapter begins at token ", first, " of ", step_tokens);
  int64_t next = first;
  for (const AdapterTokens& part : parts) {
    check(part.first == next && part.tokens > 0 && part.tokens <= step_tokens - next, "an adapter has ", part.tokens, " tokens from ",
          part.first, " on; they must follow each other from ", next, " to ", step_tokens);
    next += part.tokens;
    rank = std::max(rank, part.adapter->rank);
  }
  check(next == step_tokens, "the adapters end at token ", next, " of ", step_tokens, "; tokens without one come first");
}

void check_adapter(const Adapter& adapter, const std::vector<DecoderLayer>& layers) {
  check(adapter.layers.size() == layers.size(), "an adapter is of ", adapter.layers.size(), " layers, the model has ", layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const AttentionPart& a = layers[i].attention;
    const MlpWeights& mlp = layers[i].mlp;
    const PackedWeight* weights[kAdaptedProducts] = {&a.q, &a.k, &a.v, &a.o, &mlp.gate, &mlp.up, &mlp.down};
    for (int which = 0; which < kAdaptedProducts; ++which) {
      const LowRank& update = adapter.layers[i].of[which];
      if (!update.defined()) continue;
      const PackedWeight& w = *weights[which];
      check(w.data, "an adapter updates product ", which, " of layer ", i, ", which that layer has not");
      check(update.a.in == w.in && update.b.out == w.out && update.a.out == update.b.in, "an adapter's A and B are [", update.a.out, ", ",
            update.a.in, "] and [", update.b.out, ", ", update.b.in, "] for a product of [", w.out, ", ", w.in, "] in layer ", i);
      check(update.a.format == WeightFormat::kF32 && update.b.format == WeightFormat::kF32, "an adapter's A and B must be f32");
    }
  }
}

namespace {

// The updates of p's products, of tokens [first, first + tokens) of one adapter, to p.addend's rows, or zeros.
void update(const Step& step, const LinearParams& p, Adapted product, const LayerUpdates& updates, int64_t first, int64_t tokens) {
  const int64_t row = first - step.adapters->first;
  float* low = step.m.low + row * step.adapters->rank * 3;
  LinearParams down{.x = static_cast<const char*>(p.x) + first * p.x_stride * size_of(p.dtype),
                    .rows = tokens,
                    .x_stride = p.x_stride,
                    .norm = p.norm,
                    .count = 0,
                    .dtype = p.dtype};
  LinearParams up[3];
  for (int i = 0; i < p.count; ++i) {
    const LowRank& of = updates.of[product + i];
    float* to = step.m.delta[i] + row * p.addend_stride[i];
    if (!of.defined()) {
      std::memset(to, 0, static_cast<size_t>(tokens * p.addend_stride[i]) * sizeof(float));
      continue;
    }
    const int n = down.count++;
    down.weight[n] = of.a;
    down.out[n] = low;
    down.out_stride[n] = of.a.out;
    up[n].x = low;
    up[n].rows = tokens;
    up[n].x_stride = of.a.out;
    up[n].weight[0] = of.b;
    up[n].out[0] = to;
    up[n].out_stride[0] = p.addend_stride[i];
    low += tokens * of.a.out;
  }
  if (down.count == 0) return;
  const int count = down.count;
  cpu::kernels().linear(down, 1);
  for (int n = 0; n < count; ++n) cpu::kernels().linear(up[n], 1);
}

}  // namespace

void Step::linear(LinearParams p, Adapted product) const {
  if (!adapters || adapters->tokens == 0) return workers.linear(p);
  const auto adapts = [&](const AdapterTokens& part) {
    const LowRank* of = part.adapter->layers[layer].of + product;
    return std::any_of(of, of + p.count, [](const LowRank& update) { return update.defined(); });
  };
  if (std::none_of(adapters->parts.begin(), adapters->parts.end(), adapts)) return workers.linear(p);
  p.addend_from = adapters->first;
  for (int i = 0; i < p.count; ++i) p.addend[i] = m.delta[i], p.addend_stride[i] = p.weight[i].out;
  // An item: a share of the tokens of one adapter, which one thread takes through both products.
  const int64_t shares = workers.team ? workers.team->count : workers.threads, parts = static_cast<int64_t>(adapters->parts.size());
  workers.divide(parts * shares, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const AdapterTokens& part = adapters->parts[item / shares];
      const int64_t from = part.tokens * (item % shares) / shares, to = part.tokens * (item % shares + 1) / shares;
      if (from < to) update(*this, p, product, part.adapter->layers[layer], part.first + from, to - from);
    }
  });
  workers.linear(p);
}

}  // namespace foveate
