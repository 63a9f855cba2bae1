#include "decoder/decoder.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {

// Memory of one step; qkv and attended have the cache's dtype, or fp32 where that is quantised.
struct Decoder::Buffers {
  // team: the threads that share one parallel region, 0 for a region in each kernel.
  Buffers(const DecoderSizes& sizes, const KvCacheParams& p, bool norms_outputs, bool blocked, int team);

  int64_t tokens = 0;
  DType dtype = DType::kFloat32;
  float* x = nullptr;     // [tokens, hidden]
  char *qkv = nullptr, *attended = nullptr, *rotated = nullptr;  // [tokens, (Hq + 2 Hkv) D], [tokens, Hq D] twice
  float *inner = nullptr, *temp = nullptr;                      // [tokens, inner], [tokens, hidden]
  char* scratch = nullptr;                                      // of a team, linear_scratch_bytes
  float *partial_out = nullptr, *partial_lse = nullptr;         // as in KvCacheParams

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> memory_;
};

Decoder::Buffers::Buffers(const DecoderSizes& sizes, const KvCacheParams& p, bool norms_outputs, bool blocked, int team)
    : tokens(p.batch * p.seq_q), dtype(p.dtype) {
  const int64_t q = sizes.heads_q * sizes.head_dim, kv = sizes.heads_kv * sizes.head_dim, size = size_of(dtype);
  const int64_t splits = p.num_splits > 1 ? p.num_splits : 0;
  int64_t bytes = 0;
  const auto add = [&](int64_t n) { return std::exchange(bytes, bytes + round_up<int64_t>(n, 64)); };
  const int64_t qkv_at = add(tokens * (q + 2 * kv) * size), attended_at = add(tokens * q * size);
  const int64_t rotated_at = add(blocked ? tokens * q * size : 0), inner_at = add(tokens * sizes.inner * 4);
  const int64_t temp_at = add(norms_outputs ? tokens * sizes.hidden * 4 : 0);
  const int64_t partial_out_at = add(splits * tokens * q * 4), partial_lse_at = add(splits * tokens * p.heads_q * 4);
  const int64_t scratch_at = add(team > 0 ? linear_scratch_bytes(tokens, std::max({sizes.hidden, sizes.inner, q}), team) : 0);
  memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(memory_.get() + at); };
  qkv = memory_.get() + qkv_at, attended = memory_.get() + attended_at, rotated = memory_.get() + rotated_at;
  scratch = memory_.get() + scratch_at;
  inner = floats(inner_at), temp = floats(temp_at), partial_out = floats(partial_out_at), partial_lse = floats(partial_lse_at);
}

namespace {

constexpr int64_t kTogether = 8;  // tokens that one parallel region carries through all layers

void check_layer_weight(const PackedWeight& w, const char* what, int64_t in, int64_t out) {
  check(w.data && w.in == in && w.out == out, what, " is [", w.out, ", ", w.in, "], expected [", out, ", ", in, "]");
}

void check_together(const PackedWeight& a, const PackedWeight& b, const char* what) {
  check(is_blocks(a.format) == is_blocks(b.format) && (is_blocks(a.format) || a.format == b.format), what,
        " have formats that round their input differently; they must all be blocks, or of one float format");
}

// Pages of one layer: [pages, page_size, Hkv, D].
Rows pages_of(const TensorView& pages, int64_t layer) {
  return {static_cast<char*>(pages.data) + layer * pages.stride[0] * size_of(pages.dtype), pages.stride[1], pages.stride[2],
          pages.stride[3]};
}
CacheScale scale_of(const TensorView& scale, int64_t layer) {
  if (!scale.defined()) return {};
  return {scale.as<float>() + layer * scale.stride[0], scale.stride[1], scale.stride[2], scale.stride[3], true};
}

void check_pages(const TensorView& pages, const char* what, const TensorView& scale, const char* scale_what, int64_t layers,
                 const DecoderSizes& s) {
  expect(pages, what).rank(5).last_contiguous().size(0, layers).size(3, s.heads_kv).size(4, s.head_dim);
  const bool quantized = pages.dtype == DType::kInt8 || pages.dtype == DType::kFloat8E4M3;
  check(quantized == scale.defined(), what, " is ", name(pages.dtype), quantized ? ": it needs " : ": it takes no ", scale_what);
  if (!quantized) return;
  expect(scale, scale_what).rank(4).dtype(DType::kFloat32);
  for (int dim = 0; dim < 4; ++dim) expect(scale, scale_what).size(dim, pages.shape[dim]);
}

// KV heads [head, head + heads) of sequence b, with their query heads, as a call of its own.
KvCacheParams heads_of(KvCacheParams p, int64_t b, int64_t head, int64_t heads) {
  const int64_t group = p.heads_q / p.heads_kv;
  const auto move = [&](Rows& rows, int64_t batch, int64_t first, DType dtype) {
    rows.data = static_cast<char*>(rows.data) + (batch * rows.batch + first * rows.head) * size_of(dtype);
  };
  move(p.q, b, head * group, p.dtype), move(p.out, b, head * group, p.dtype);
  move(p.new_k, b, head, p.dtype), move(p.new_v, b, head, p.dtype);
  move(p.k, 0, head, p.kv_dtype), move(p.v, 0, head, p.kv_dtype);
  for (CacheScale* scale : {&p.k_scale, &p.v_scale})
    if (scale->data) scale->data += head * scale->head;
  p.block_table += b * p.block_table_stride, p.kv_lens += b;
  p.batch = 1, p.heads_q = heads * group, p.heads_kv = heads, p.heads_per_task = std::min(p.heads_per_task, heads);
  return p;
}

void norm_all(NormRowsParams p, int threads, const cpu::Team* team) {
  if (!team) return cpu::kernels().norm_rows(p, threads);
  const int64_t begin = team->begin(p.rows), end = team->end(p.rows);
  p.x += begin * p.cols, p.out += begin * p.cols, p.rows = end - begin;
  cpu::kernels().norm_rows(p, 1);
  team->wait();
}

}  // namespace

Decoder::Decoder(const DecoderSizes& sizes, const Norm& final_norm, TensorView rotary_cos, TensorView rotary_sin)
    : sizes_(sizes), final_norm_(final_norm), rotary_cos_(rotary_cos), rotary_sin_(rotary_sin) {
  constexpr int64_t kMost = int64_t{1} << 24;  // products of three of them fit 64 bits, with room for bytes
  for (const auto& [size, what] : {std::pair{sizes.hidden, "hidden"},
                                   {sizes.inner, "inner"},
                                   {sizes.heads_q, "heads_q"},
                                   {sizes.heads_kv, "heads_kv"},
                                   {sizes.head_dim, "head_dim"}})
    check(size >= 1 && size <= kMost, what, " = ", size, " is outside 1..", kMost);
  check(sizes.heads_q % sizes.heads_kv == 0, sizes.heads_q, " query heads are not a multiple of ", sizes.heads_kv, " KV heads");
  check(rotary_cos.defined() == rotary_sin.defined(), "rotary_cos and rotary_sin must be given together");
  if (!rotary_cos.defined()) return;
  for (const TensorView* t : {&rotary_cos, &rotary_sin}) {
    expect(*t, "a rotary table").rank(2).contiguous().dtype(DType::kFloat32).size(0, rotary_cos.shape[0]).size(1, rotary_cos.shape[1]);
  }
  check(2 * rotary_cos.shape[1] <= sizes.head_dim, "rotary_cos turns ", 2 * rotary_cos.shape[1], " elements, the head dim is ",
        sizes.head_dim);
}

void Decoder::add_layer(const DecoderLayer& l) {
  const int64_t hidden = sizes_.hidden, q = sizes_.heads_q * sizes_.head_dim, kv = sizes_.heads_kv * sizes_.head_dim;
  if (l.k.data) {
    check_layer_weight(l.q, "q", hidden, q), check_layer_weight(l.k, "k", hidden, kv), check_layer_weight(l.v, "v", hidden, kv);
    check_together(l.q, l.k, "q and k"), check_together(l.q, l.v, "q and v");
  } else {
    check_layer_weight(l.q, "qkv", hidden, q + 2 * kv);
    check(!l.q_norm && !l.k_norm, "norms of q and k need separate weights");
  }
  check_layer_weight(l.o, "o", q, hidden), check_layer_weight(l.up, "up", hidden, sizes_.inner);
  check_layer_weight(l.down, "down", sizes_.inner, hidden);
  if (l.gate.data) check_layer_weight(l.gate, "gate", hidden, sizes_.inner), check_together(l.gate, l.up, "gate and up");
  layers_.push_back(l);
}

void Decoder::attend(const DecoderLayer& l, KvCacheParams p, const Buffers& m, bool blocked, int threads, const cpu::Team* team) const {
  const int64_t D = sizes_.head_dim, q = p.heads_q * D, kv = p.heads_kv * D, size = size_of(m.dtype);
  // Separate weights fill separate buffers, a joint weight rows of q, k and v.
  const auto part = [&](int64_t column, int64_t width) -> Rows {
    const int64_t row = l.k.data ? width : q + 2 * kv;
    return {m.qkv + (l.k.data ? m.tokens * column : column) * size, p.seq_q * row, row, D};
  };
  p.q = part(0, q), p.new_k = part(q, kv), p.new_v = part(q + kv, kv);
  p.out = {m.attended, p.seq_q * q, q, D};
  p.scale = l.scale, p.window_left = l.window_left;
  // RMS norm of `heads` neighbouring heads of `tokens` tokens, in place.
  const auto norm_heads = [&](const Rows& rows, const float* weight, int64_t tokens, int64_t heads) {
    if (!weight) return;
    for (int64_t t = 0; t < (team ? tokens : 1); ++t) {
      char* x = static_cast<char*>(rows.data) + t * rows.seq * size;
      cpu::kernels().rms_norm_forward({.x = x,
                                       .weight = weight,
                                       .out = x,
                                       .rstd = nullptr,
                                       .rows = team ? heads : tokens * heads,
                                       .cols = D,
                                       .x_stride = D,
                                       .eps = l.head_norm_eps,
                                       .dtype = m.dtype,
                                       .weight_dtype = DType::kFloat32},
                                      threads);
    }
  };
  if (!team) {
    norm_heads(p.q, l.q_norm, m.tokens, p.heads_q), norm_heads(p.new_k, l.k_norm, m.tokens, p.heads_kv);
    return append_and_attend(p, blocked, m.rotated, threads);
  }
  // A thread's share: KV heads of sequences, in order. It appends them itself, so nobody waits between the two.
  const int64_t items = p.batch * p.heads_kv;
  for (int64_t item = team->begin(items), end = team->end(items); item < end;) {
    const int64_t b = item / p.heads_kv, head = item % p.heads_kv, heads = std::min(p.heads_kv - head, end - item);
    const KvCacheParams own = heads_of(p, b, head, heads);
    norm_heads(own.q, l.q_norm, p.seq_q, own.heads_q), norm_heads(own.new_k, l.k_norm, p.seq_q, heads);
    append_and_attend(own, false, nullptr, 1);
    item += heads;
  }
  team->wait();
}

void Decoder::run_layer(const DecoderLayer& l, const KvCacheParams& cache, const Buffers& m, bool blocked, int threads,
                        const cpu::Team* team) const {
  const auto& kernels = cpu::kernels();
  const int64_t hidden = sizes_.hidden, q = sizes_.heads_q * sizes_.head_dim, kv = sizes_.heads_kv * sizes_.head_dim;
  const auto linear = [&](const LinearParams& p) {
    if (!team) return kernels.linear(p, threads);
    kernels.linear_share(p, *team, m.scratch);
    team->wait();
  };

  LinearParams in{.x = m.x, .rows = m.tokens, .x_stride = hidden, .norm = l.attention_norm, .out_dtype = m.dtype};
  in.count = l.k.data ? 3 : 1;
  in.weight[0] = l.q, in.weight[1] = l.k, in.weight[2] = l.v;
  const int64_t size = size_of(m.dtype);
  in.out[0] = m.qkv, in.out[1] = m.qkv + m.tokens * q * size, in.out[2] = m.qkv + m.tokens * (q + kv) * size;
  in.out_stride[0] = l.q.out, in.out_stride[1] = in.out_stride[2] = kv;
  linear(in);

  attend(l, cache, m, blocked, threads, team);

  // x += y W, or x += norm(y W)
  const auto back = [&](const void* y, DType dtype, const PackedWeight& w, const Norm& norm) {
    const bool normed = norm.kind != NormKind::kNone;
    LinearParams p{.x = y, .rows = m.tokens, .x_stride = w.in, .accumulate = !normed, .dtype = dtype};
    p.weight[0] = w, p.out[0] = normed ? m.temp : m.x, p.out_stride[0] = hidden;
    linear(p);
    if (normed) norm_all({.x = m.temp, .out = m.x, .rows = m.tokens, .cols = hidden, .norm = norm, .accumulate = true}, threads, team);
  };
  back(m.attended, m.dtype, l.o, l.attention_out_norm);

  LinearParams up{.x = m.x, .rows = m.tokens, .x_stride = hidden, .norm = l.mlp_norm, .activation = sizes_.activation};
  up.gated = l.gate.data != nullptr, up.count = up.gated ? 2 : 1;
  up.weight[0] = up.gated ? l.gate : l.up, up.weight[1] = l.up;
  up.out[0] = m.inner, up.out_stride[0] = sizes_.inner;
  linear(up);
  back(m.inner, DType::kFloat32, l.down, l.mlp_out_norm);
}

// ---- a step: checks, the cache's params, memory, layers ------------------------------------------------------------------------

void Decoder::check_step(const TensorView& x, const TensorView& lens, const TensorView& block_table, const CachePages& pages) const {
  const int64_t layers = static_cast<int64_t>(layers_.size());
  expect(x, "x").rank(3).contiguous().dtype(DType::kFloat32).size(2, sizes_.hidden);
  check_pages(pages.k, "k_pages", pages.k_scale, "k_scale", layers, sizes_);
  check_pages(pages.v, "v_pages", pages.v_scale, "v_scale", layers, sizes_);
  expect(pages.v, "v_pages").dtype(pages.k.dtype);
  for (int dim = 1; dim < 3; ++dim) expect(pages.v, "v_pages").size(dim, pages.k.shape[dim]);
  check(pages.k.shape[2] >= 1, "the pages of k_pages hold no keys: page_size is ", pages.k.shape[2]);
  device_of({&x, &lens, &block_table, &pages.k, &pages.v, &pages.k_scale, &pages.v_scale});
  check(x.device == DeviceType::kCPU, "x and the pages must be on the CPU");
  expect(block_table, "block_table").rank(2).size(0, x.shape[0]).dtype(DType::kInt32).last_contiguous();
  expect(lens, "lens").rank(1).size(0, x.shape[0]).dtype(DType::kInt32);
}

// What all layers have in common; kv_lens outlives it.
KvCacheParams Decoder::cache_params(const TensorView& x, const std::vector<int32_t>& kv_lens, const TensorView& block_table,
                                    const CachePages& pages, const DecodePlan& plan) const {
  KvCacheParams p;
  p.causal = true;
  p.batch = x.shape[0], p.seq_q = p.new_keys = x.shape[1];
  p.heads_q = sizes_.heads_q, p.heads_kv = sizes_.heads_kv, p.head_dim = p.head_dim_v = sizes_.head_dim;
  p.softcap = sizes_.softcap, p.kv_dtype = pages.k.dtype, p.dtype = pages.k_scale.defined() ? DType::kFloat32 : pages.k.dtype;
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, "the cache is ", name(p.dtype),
        ", expected float32, bfloat16, float16, int8 or float8_e4m3fn");
  p.block_table = block_table.as<const int32_t>(), p.block_table_stride = block_table.stride[0], p.page_size = pages.k.shape[2];
  p.kv_lens = kv_lens.data();
  p.seq_kv = block_table.shape[1] * p.page_size, p.pages = pages.k.shape[1];
  set_division(p, plan);
  check(p.num_splits <= p.seq_kv + 65536, p.num_splits, " splits are more than the cache's ", p.seq_kv, " keys");
  check(!plan.blocked || p.dtype == p.kv_dtype, "the blocked kernel takes no ", name(p.kv_dtype), " cache");
  if (rotary_cos_.defined())
    p.rotary_cos = rotary_cos_.data, p.rotary_sin = rotary_sin_.data, p.rotary_pairs = rotary_cos_.shape[1],
    p.rotary_positions = rotary_cos_.shape[0];
  // A layer without a window reads all pages, so all must be there.
  p.window_left = layers_.empty() ? -1 : layers_[0].window_left;
  for (const DecoderLayer& l : layers_)
    p.window_left = l.window_left < 0 || p.window_left < 0 ? -1 : std::max(p.window_left, l.window_left);
  p.new_k.data = x.data;  // there will be new keys
  check_cache_values(p);
  return p;
}

void Decoder::run_layers(const CachePages& pages, const KvCacheParams& p, const Buffers& m, bool blocked, int threads,
                         const cpu::Team* team) const {
  KvCacheParams cache = p;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int64_t layer = static_cast<int64_t>(i);
    cache.k = pages_of(pages.k, layer), cache.v = pages_of(pages.v, layer);
    cache.k_scale = scale_of(pages.k_scale, layer), cache.v_scale = scale_of(pages.v_scale, layer);
    run_layer(layers_[i], cache, m, blocked, threads, team);
  }
  norm_all({.x = m.x, .out = m.x, .rows = m.tokens, .cols = sizes_.hidden, .norm = final_norm_}, threads, team);
}

void Decoder::step(TensorView x, TensorView lens, TensorView block_table, const CachePages& pages, const DecodePlan& plan,
                   Threads threads) const {
  check_step(x, lens, block_table, pages);
  std::vector<int32_t> kv_lens(x.shape[0]);
  for (size_t b = 0; b < kv_lens.size(); ++b) kv_lens[b] = lens.as<const int32_t>()[static_cast<int64_t>(b) * lens.stride[0]];
  KvCacheParams p = cache_params(x, kv_lens, block_table, pages, plan);
  const int64_t tokens = p.batch * p.seq_q;
  if (tokens == 0) return;

  // One region where attention has little to divide; long contexts are divided by keys, many tokens have work enough for a region a phase.
  const bool together = tokens <= kTogether && p.num_splits == 1 && !plan.blocked;
  const bool norms_outputs = !layers_.empty() && layers_[0].attention_out_norm.kind != NormKind::kNone;
  Buffers m(sizes_, p, norms_outputs, plan.blocked, together ? static_cast<int>(threads) : 0);
  m.x = x.as<float>();
  p.partial_out = m.partial_out, p.partial_lse = m.partial_lse;

  if (!together) return run_layers(pages, p, m, plan.blocked, threads, nullptr);
  cpu::Barrier barrier;
  const int count = threads;
#pragma omp parallel num_threads(count)
  {
    const cpu::Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    run_layers(pages, p, m, plan.blocked, 1, &team);
  }
}

}  // namespace foveate
