#include "decoder/layer.h"

namespace foveate {
namespace {

void check_weight(const PackedWeight& w, const char* what, int64_t in, int64_t out) {
  check(w.data && w.in == in && w.out == out, what, " is [", w.out, ", ", w.in, "], expected [", out, ", ", in, "]");
}

// Checks two weights that share prepared rows.
void check_together(const PackedWeight& a, const PackedWeight& b, const char* what) {
  check(same_rows(a.format, b.format), what,
        " have formats that round their input differently; they must all be blocks, all bf16, or neither");
}

}  // namespace

void check_attention(const AttentionPart& a, const DecoderSizes& sizes, int64_t tables) {
  const int64_t hidden = sizes.hidden, q = sizes.heads_q * sizes.head_dim, kv = sizes.heads_kv * sizes.head_dim;
  if (a.k.data) {
    check_weight(a.q, "q", hidden, q), check_weight(a.k, "k", hidden, kv), check_weight(a.v, "v", hidden, kv);
    check_together(a.q, a.k, "q and k"), check_together(a.q, a.v, "q and v");
  } else {
    check_weight(a.q, "qkv", hidden, q + 2 * kv);
    check(!a.q_norm.defined() && !a.k_norm.defined(), "norms of q and k need separate weights");
  }
  check_weight(a.o, "o", q, hidden);
  check(a.rotary >= -1 && a.rotary < tables, "rotary = ", a.rotary, " is none of the ", tables, " tables");
  check(!a.norms_after_rotary || (a.rotary >= 0 && a.k.data), "norms after RoPE need a rotary table and separate weights of q, k and v");
}

void check_mlp(const MlpWeights& mlp, const DecoderSizes& sizes, const char* whose) {
  check(mlp.up.data, "up of ", whose, " is missing");
  check(mlp.up.in == sizes.hidden && mlp.down.data && mlp.down.in == mlp.up.out && mlp.down.out == sizes.hidden, "up and down of ", whose,
        " are [", mlp.up.out, ", ", mlp.up.in, "] and [", mlp.down.out, ", ", mlp.down.in, "], expected [inner, ", sizes.hidden, "] and [",
        sizes.hidden, ", inner]");
  if (!mlp.gate.data) {
    check(sizes.activation != Activation::kClampedSilu, "the clamped activation needs a gate, which ", whose, " has not");
    return;
  }
  check_weight(mlp.gate, "gate", sizes.hidden, mlp.up.out), check_together(mlp.gate, mlp.up, "gate and up");
}

void check_experts(const ExpertsPart& part, const DecoderSizes& sizes) {
  const Router& r = part.router;
  const int64_t count = static_cast<int64_t>(part.experts.size());
  check(count >= 1 && count <= 65536, count, " experts are outside 1..65536");
  check_weight(r.weight, "router", sizes.hidden, count);
  check(r.per_token >= 1 && r.per_token <= count, r.per_token, " experts a token are outside 1..", count);
  check(r.groups >= 1 && count % r.groups == 0 && r.top_groups >= 1 && r.top_groups <= r.groups &&
            r.per_token <= count / r.groups * r.top_groups,
        count, " experts in ", r.groups, " groups, of which ", r.top_groups, " are chosen, cannot be, or are fewer than the ", r.per_token,
        " of a token");
  const MlpWeights& first = part.experts[0];
  for (const MlpWeights& e : part.experts) {
    check_mlp(e, sizes, "an expert");
    check(e.up.out == first.up.out && (e.gate.data != nullptr) == (first.gate.data != nullptr), "the experts are of several shapes");
    check_together(e.up, first.up, "the experts"), check_together(e.down, first.down, "the experts");
  }
  if (part.shared.defined()) check_mlp(part.shared, sizes, "the shared expert");
  if (part.shared_gate.data) check_weight(part.shared_gate, "the shared expert's gate", sizes.hidden, 1);
}

}  // namespace foveate
