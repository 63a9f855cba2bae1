// The experts of a layer: each token's are chosen, the (token, expert) pairs are sorted by expert, each expert multiplies its rows in one
// product, and a token adds up its own experts' outputs in the order of its choices. So nothing depends on the other tokens of a step.
#include <algorithm>
#include <cmath>

#include "decoder/step.h"

namespace foveate {
namespace {

// Rows by expert, and the groups that the products take: an expert's rows, kGroupRows at most.
void sort_by_expert(const ExpertsPart& part, const ExpertMemory& e, int64_t tokens) {
  const int64_t per_token = part.router.per_token, count = static_cast<int64_t>(part.experts.size());
  std::vector<int64_t> next(count + 1);  // the next row of each expert
  for (int64_t i = 0; i < tokens * per_token; ++i) ++next[e.chosen[i] + 1];
  LinearGroup *up = e.groups, *down = e.groups + count + tokens * per_token / kGroupRows;
  int64_t groups = 0;
  for (int64_t expert = 0; expert < count; ++expert) {
    const int64_t first = next[expert], rows = next[expert + 1];
    const MlpWeights& w = part.experts[expert];
    for (int64_t at = 0; at < rows; at += kGroupRows, ++groups) {
      const int64_t some = std::min(rows - at, kGroupRows);
      up[groups] = w.gate.data ? LinearGroup{{&w.gate, &w.up}, first + at, some} : LinearGroup{{&w.up, nullptr}, first + at, some};
      down[groups] = {{&w.down, nullptr}, first + at, some};
    }
    next[expert + 1] += first;
  }
  *e.num_groups = groups;
  for (int64_t i = 0; i < tokens * per_token; ++i) {
    const int64_t row = next[e.chosen[i]]++;
    e.row_of[i] = static_cast<int32_t>(row);
    e.token_of[row] = static_cast<int32_t>(i / per_token);
  }
}

// Columns [begin, end) of out [hidden] += or = scale * (a token's experts by their weights, and the shared one).
void combine(const ExpertsPart& part, const ExpertMemory& e, int64_t token, int64_t hidden, int64_t begin, int64_t end, float scale,
             bool accumulate, float* out) {
  constexpr int64_t kColumns = 256;
  const int64_t per_token = part.router.per_token;
  const float shared = !part.shared.defined() ? 0.0f : part.shared_gate.data ? 1 / (1 + std::exp(-e.shared_score[token])) : 1.0f;
  for (int64_t at = begin; at < end; at += kColumns) {
    const int64_t n = std::min(end - at, kColumns);
    float sum[kColumns] = {};
    for (int64_t k = 0; k < per_token; ++k) {
      const float* y = e.out + e.row_of[token * per_token + k] * hidden + at;
      const float weight = e.weights[token * per_token + k];
      for (int64_t j = 0; j < n; ++j) sum[j] += weight * y[j];
    }
    if (part.shared.defined())
      for (int64_t j = 0; j < n; ++j) sum[j] += shared * e.shared[token * hidden + at + j];
    for (int64_t j = 0; j < n; ++j) out[at + j] = (accumulate ? out[at + j] : 0.0f) + scale * sum[j];
  }
}

void run_shared(const Step& step, const ExpertsPart& part, int64_t tokens) {
  const ExpertMemory& e = step.m.experts;
  const int64_t hidden = step.sizes.hidden;
  step.workers.linear(step.inner_product(part.shared, e.normed, tokens, {}, e.shared_inner));
  LinearParams down{.x = e.shared_inner, .rows = tokens, .x_stride = part.shared.down.in};
  down.weight[0] = part.shared.down;
  down.out[0] = e.shared;
  down.out_stride[0] = hidden;
  step.workers.linear(down);
  if (!part.shared_gate.data) return;
  LinearParams score{.x = e.normed, .rows = tokens, .x_stride = hidden};
  score.weight[0] = part.shared_gate;
  score.out[0] = e.shared_score;
  score.out_stride[0] = 1;
  step.workers.linear(score);
}

// Tokens [first, first + tokens): out += or = scale * their experts.
void run_chunk(const Step& step, const DecoderLayer& layer, int64_t first, int64_t tokens, bool accumulate, float* out) {
  const ExpertsPart& part = layer.experts;
  const ExpertMemory& e = step.m.experts;
  const Workers& workers = step.workers;
  const int64_t hidden = step.sizes.hidden, per_token = part.router.per_token, count = static_cast<int64_t>(part.experts.size());
  workers.norm_rows({.x = step.m.x + first * hidden, .out = e.normed, .rows = tokens, .cols = hidden, .norm = layer.mlp_norm});

  LinearParams route{.x = e.normed, .rows = tokens, .x_stride = hidden};
  route.weight[0] = part.router.weight;
  route.out[0] = e.logits;
  route.out_stride[0] = count;
  workers.linear(route);
  workers.divide(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      choose_experts(part.router, e.logits + t * count, e.chosen + t * per_token, e.weights + t * per_token);
  });
  workers.alone([&] { sort_by_expert(part, e, tokens); });

  const MlpWeights& any = part.experts[0];
  GroupedLinearParams up{.row_ids = e.token_of, .groups = e.groups, .num_groups = *e.num_groups};
  up.linear = step.inner_product(any, e.normed, tokens * per_token, {}, e.inner);
  workers.grouped_linear(up);
  GroupedLinearParams down{.groups = e.groups + count + tokens * per_token / kGroupRows, .num_groups = *e.num_groups};
  down.linear = LinearParams{.x = e.inner, .rows = tokens * per_token, .x_stride = any.down.in};
  down.linear.weight[0] = any.down;
  down.linear.out[0] = e.out;
  down.linear.out_stride[0] = hidden;
  workers.grouped_linear(down);
  if (part.shared.defined()) run_shared(step, part, tokens);

  constexpr int64_t kColumns = 256;  // of one token, the share of one thread
  const int64_t parts = ceil_div(hidden, kColumns);
  workers.divide(tokens * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      combine(part, e, i / parts, hidden, i % parts * kColumns, std::min(hidden, (i % parts + 1) * kColumns), layer.residual_scale,
              accumulate, out + i / parts * hidden);
  });
}

}  // namespace

void run_experts(const Step& step, const DecoderLayer& layer) {
  const int64_t hidden = step.sizes.hidden, tokens = step.m.tokens, chunk = expert_tokens(layer.experts.router.per_token, tokens);
  const bool normed = layer.mlp_out_norm.kind != NormKind::kNone;
  for (int64_t first = 0; first < tokens; first += chunk)
    run_chunk(step, layer, first, std::min(tokens - first, chunk), !normed, (normed ? step.m.temp : step.m.x) + first * hidden);
  if (normed)
    step.workers.norm_rows(
        {.x = step.m.temp, .out = step.m.x, .rows = tokens, .cols = hidden, .norm = layer.mlp_out_norm, .accumulate = true});
}

}  // namespace foveate
