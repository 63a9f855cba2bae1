#include <algorithm>

#include "decoder/step.h"

namespace foveate {
namespace {

// KV heads [head, head + heads) of sequence b, with their query heads, as a call of its own.
KvCacheParams heads_of(KvCacheParams p, int64_t b, int64_t head, int64_t heads) {
  const int64_t group = p.heads_q / p.heads_kv;
  const auto move = [&](Rows& rows, int64_t batch, int64_t first, DType dtype) {
    rows.data = static_cast<char*>(rows.data) + (batch * rows.batch + first * rows.head) * size_of(dtype);
  };
  move(p.q, b, head * group, p.dtype);
  move(p.out, b, head * group, p.dtype);
  move(p.new_k, b, head, p.dtype);
  move(p.new_v, b, head, p.dtype);
  move(p.k, 0, head, p.kv_dtype);
  move(p.v, 0, head, p.kv_dtype);
  for (CacheScale* scale : {&p.k_scale, &p.v_scale})
    if (scale->data) scale->data += head * scale->head;
  if (p.alibi) p.alibi += head * group;
  if (p.sinks) p.sinks = static_cast<const float*>(p.sinks) + head * group;
  p.block_table += b * p.block_table_stride;
  p.kv_lens += b;
  p.batch = 1;
  p.heads_q = heads * group;
  p.heads_kv = heads;
  p.heads_per_task = std::min(p.heads_per_task, heads);
  return p;
}

// q and k of every token are normed, or rotated and normed, before any is attended to: norms over all heads need them together.
bool norms_first(const AttentionPart& a) { return a.norms_after_rotary || a.q_norm.joint || a.k_norm.joint; }

// Heads [first, first + heads) of `tokens` tokens, in place.
void norm_heads(const HeadNorm& n, const Rows& rows, int64_t tokens, int64_t first, int64_t heads, int64_t D, DType dtype, int threads) {
  if (!n.defined()) return;
  NormHeadsParams p{.x = rows.data, .tokens = tokens, .heads = heads, .cols = D, .x_stride = rows.seq, .norm = n.norm, .dtype = dtype};
  if (n.joint) {
    p.heads = 1;
    p.cols = heads * D;
  }
  if (n.own_weights) {
    p.weight_stride = D;
    p.norm.weight += first * D;
    if (p.norm.bias) p.norm.bias += first * D;
  }
  cpu::kernels().norm_heads(p, threads);
}

// All of q and k, one token after the other.
void rotate_and_norm(const Step& step, const AttentionPart& a, const KvCacheParams& p) {
  step.workers.divide(step.m.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.seq_q, i = token % p.seq_q;
      const int32_t position = p.kv_lens[b] + static_cast<int32_t>(i);
      const auto rotate = [&](const Rows& all, int64_t heads, const HeadNorm& norm) {
        Rows rows = all;
        rows.data = static_cast<char*>(all.data) + (b * all.batch + i * all.seq) * size_of(p.dtype);
        if (a.norms_after_rotary) {
          KvCacheParams one = p;
          one.batch = one.seq_q = 1;
          one.kv_lens = &position;
          one.q = rows;
          one.heads_q = heads;
          cpu::kernels().rotate_queries(one, rows.data, 1);
        }
        norm_heads(norm, rows, 1, 0, heads, p.head_dim, p.dtype, 1);
      };
      rotate(p.q, p.heads_q, a.q_norm);
      rotate(p.new_k, p.heads_kv, a.k_norm);
    }
  });
}

}  // namespace

void run_projections(const Step& step, const AttentionPart& a) {
  const StepMemory& m = step.m;
  const int64_t hidden = step.sizes.hidden, size = size_of(m.dtype);
  const int64_t q = step.sizes.heads_q * step.sizes.head_dim, kv = step.sizes.heads_kv * step.sizes.head_dim;
  LinearParams in{.x = m.x, .rows = m.tokens, .x_stride = hidden, .norm = a.norm, .clip = a.clip, .out_dtype = m.dtype};
  in.count = a.k.data ? 3 : 1;
  in.weight[0] = a.q;
  in.weight[1] = a.k;
  in.weight[2] = a.v;
  in.out[0] = m.qkv;
  in.out[1] = m.qkv + m.tokens * q * size;
  in.out[2] = m.qkv + m.tokens * (q + kv) * size;
  in.out_stride[0] = a.q.out;
  in.out_stride[1] = in.out_stride[2] = kv;
  step.linear(in, kQ);
}

void run_attention(const Step& step, const AttentionPart& a, KvCacheParams p) {
  const StepMemory& m = step.m;
  const cpu::Team* team = step.workers.team;
  const int64_t D = step.sizes.head_dim, q = p.heads_q * D, kv = p.heads_kv * D, size = size_of(m.dtype);
  // Separate weights fill separate buffers, a joint weight rows of q, k and v.
  const auto part = [&](int64_t column, int64_t width) -> Rows {
    const int64_t row = a.k.data ? width : q + 2 * kv;
    return {m.qkv + (a.k.data ? m.tokens * column : column) * size, p.seq_q * row, row, D};
  };
  p.q = part(0, q);
  p.new_k = part(q, kv);
  p.new_v = part(q + kv, kv);
  p.out = {m.attended, p.seq_q * q, q, D};
  p.scale = a.scale;
  p.window_left = a.window_left;
  p.rotary_interleaved = a.interleaved;
  p.alibi = a.alibi;
  p.alibi_head = 1;
  p.sinks = a.sinks;
  const bool first = norms_first(a);
  if (first) rotate_and_norm(step, a, p);
  if (a.norms_after_rotary) p.rotary_cos = p.rotary_sin = nullptr;
  if (!team) {
    if (!first) {
      norm_heads(a.q_norm, p.q, m.tokens, 0, p.heads_q, D, m.dtype, step.workers.threads);
      norm_heads(a.k_norm, p.new_k, m.tokens, 0, p.heads_kv, D, m.dtype, step.workers.threads);
    }
    return append_and_attend(p, step.blocked, m.rotated, step.workers.threads);
  }
  // A thread's share: KV heads of sequences, in order. It appends them itself, so nobody waits between the two.
  const int64_t items = p.batch * p.heads_kv, group = p.heads_q / p.heads_kv;
  for (int64_t item = team->begin(items), end = team->end(items); item < end;) {
    const int64_t b = item / p.heads_kv, head = item % p.heads_kv, heads = std::min(p.heads_kv - head, end - item);
    const KvCacheParams own = heads_of(p, b, head, heads);
    if (!first) {
      norm_heads(a.q_norm, own.q, p.seq_q, head * group, own.heads_q, D, m.dtype, 1);
      norm_heads(a.k_norm, own.new_k, p.seq_q, head, heads, D, m.dtype, 1);
    }
    append_and_attend(own, false, nullptr, 1);
    item += heads;
  }
  team->wait();
}

}  // namespace foveate
