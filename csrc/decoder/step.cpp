#include "decoder/step.h"

#include <algorithm>
#include <new>
#include <utility>

namespace foveate {

void StepNeeds::add(const DecoderLayer& l, const DecoderSizes& sizes) {
  const auto most = [](int64_t& to, int64_t value) { to = std::max(to, value); };
  temp |= l.attention.out_norm.kind != NormKind::kNone || l.mlp_out_norm.kind != NormKind::kNone;
  if (l.mlp.defined()) most(inner, l.mlp.down.in);
  if (l.experts.defined()) {
    most(experts, static_cast<int64_t>(l.experts.experts.size()));
    most(per_token, l.experts.router.per_token);
    most(expert_inner, l.experts.experts[0].down.in);
    if (l.experts.shared.defined()) most(shared_inner, l.experts.shared.down.in);
  }
  most(widest, std::max({sizes.hidden, sizes.heads_q * sizes.head_dim, inner, expert_inner, shared_inner}));
}

StepMemory::StepMemory(const DecoderSizes& sizes, const StepNeeds& needs, const KvCacheParams& p, bool blocked, int team,
                       const StepAdapters& adapters)
    : tokens(p.batch * p.seq_q), dtype(p.dtype) {
  const int64_t q = sizes.heads_q * sizes.head_dim, kv = sizes.heads_kv * sizes.head_dim, size = size_of(dtype);
  const int64_t splits = p.num_splits > 1 ? p.num_splits : 0;
  // Twice: first the bytes are counted, then the places are told.
  int64_t bytes = 0;
  const auto place = [&]<class T>(T*& to, int64_t count) {
    const int64_t at = std::exchange(bytes, bytes + round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 64));
    to = memory_ ? reinterpret_cast<T*>(memory_.get() + at) : nullptr;
  };
  const auto place_all = [&] {
    bytes = 0;
    place(qkv, tokens * (q + 2 * kv) * size);
    place(attended, tokens * q * size);
    place(rotated, blocked ? tokens * q * size : 0);
    place(inner, tokens * needs.inner);
    place(temp, needs.temp ? tokens * sizes.hidden : 0);
    place(partial_out, splits * tokens * q);
    place(partial_lse, splits * tokens * p.heads_q);
    place(low, adapters.tokens * adapters.rank * 3);
    place(delta[0], adapters.tokens * std::max({q + 2 * kv, sizes.hidden, needs.inner}));
    place(delta[1], adapters.tokens * std::max(kv, needs.inner));
    place(delta[2], adapters.tokens * kv);
    int64_t rows = tokens;
    if (needs.experts > 0) {
      ExpertMemory& e = experts;
      const int64_t chunk = expert_tokens(needs.per_token, tokens), shared = needs.shared_inner > 0 ? chunk : 0;
      rows = std::max(rows, chunk * needs.per_token);
      place(e.normed, chunk * sizes.hidden);
      place(e.logits, chunk * needs.experts);
      place(e.weights, chunk * needs.per_token);
      place(e.chosen, chunk * needs.per_token);
      place(e.row_of, chunk * needs.per_token);
      place(e.token_of, chunk * needs.per_token);
      place(e.groups, 2 * (needs.experts + chunk * needs.per_token / kGroupRows));
      place(e.num_groups, 1);
      place(e.inner, chunk * needs.per_token * needs.expert_inner);
      place(e.out, chunk * needs.per_token * sizes.hidden);
      place(e.shared, shared * sizes.hidden);
      place(e.shared_inner, shared * needs.shared_inner);
      place(e.shared_score, shared);
    }
    place(scratch, team > 0 ? linear_scratch_bytes(rows, needs.widest, team) : 0);
  };
  place_all();
  memory_.reset(static_cast<char*>(::operator new(std::max<int64_t>(bytes, 1), std::align_val_t{64})));
  place_all();
}

void Step::add_product(const void* y, DType dtype, const PackedWeight& w, Adapted product, const Norm& out_norm, float scale) const {
  const bool normed = out_norm.kind != NormKind::kNone;
  LinearParams p{.x = y, .rows = m.tokens, .x_stride = w.in, .scale = normed ? 1.0f : scale, .accumulate = !normed, .dtype = dtype};
  p.weight[0] = w;
  p.out[0] = normed ? m.temp : m.x;
  p.out_stride[0] = sizes.hidden;
  linear(p, product);
  if (normed) workers.norm_rows({.x = m.temp, .out = m.x, .rows = m.tokens, .cols = sizes.hidden, .norm = out_norm, .accumulate = true});
}

LinearParams Step::inner_product(const MlpWeights& mlp, const float* x, int64_t rows, const Norm& norm, float* out) const {
  LinearParams p{.x = x, .rows = rows, .x_stride = sizes.hidden, .norm = norm, .activation = sizes.activation};
  p.gated = mlp.gate.data != nullptr;
  p.count = p.gated ? 2 : 1;
  p.limit = sizes.activation_limit;
  p.weight[0] = p.gated ? mlp.gate : mlp.up;
  p.weight[1] = mlp.up;
  p.out[0] = out;
  p.out_stride[0] = mlp.up.out;
  return p;
}

}  // namespace foveate
