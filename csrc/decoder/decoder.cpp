#include "decoder/decoder.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "ops/device.h"

namespace foveate {
namespace {

constexpr int64_t kTogether = 8;  // tokens that one parallel region carries through all layers

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

}  // namespace

Decoder::Decoder(const DecoderSizes& sizes, const Norm& final_norm, const std::vector<RotaryTable>& rotary)
    : sizes_(sizes), final_norm_(final_norm), rotary_(rotary) {
  constexpr int64_t kMost = int64_t{1} << 24;  // products of three of them fit 64 bits, with room for bytes
  for (const auto& [size, what] :
       {std::pair{sizes.hidden, "hidden"}, {sizes.heads_q, "heads_q"}, {sizes.heads_kv, "heads_kv"}, {sizes.head_dim, "head_dim"}})
    check(size >= 1 && size <= kMost, what, " = ", size, " is outside 1..", kMost);
  check(sizes.heads_q % sizes.heads_kv == 0, sizes.heads_q, " query heads are not a multiple of ", sizes.heads_kv, " KV heads");
  for (const RotaryTable& table : rotary) {
    const int64_t positions = table.cos.defined() ? table.cos.shape[0] : 0, pairs = table.cos.defined() ? table.cos.shape[1] : 0;
    for (const TensorView* t : {&table.cos, &table.sin})
      expect(*t, "a rotary table").rank(2).contiguous().dtype(DType::kFloat32).size(0, positions).size(1, pairs);
    check(pairs >= 1 && 2 * pairs <= sizes.head_dim, "a rotary table rotates ", 2 * pairs, " elements, the head dim is ", sizes.head_dim);
  }
}

void Decoder::add_layer(const DecoderLayer& l) {
  check_attention(l.attention, sizes_, static_cast<int64_t>(rotary_.size()));
  if (l.mlp.defined()) check_mlp(l.mlp, sizes_, "the MLP");
  layers_.push_back(l);
  needs_.add(l, sizes_);
}

void Decoder::add_experts(const ExpertsPart& experts) {
  check(!layers_.empty() && !layers_.back().mlp.defined() && !layers_.back().parallel,
        "experts come after their layer, which has no MLP and is not parallel");
  check_experts(experts, sizes_);
  layers_.back().experts = experts;
  needs_.add(layers_.back(), sizes_);
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
  p.batch = x.shape[0];
  p.seq_q = p.new_keys = x.shape[1];
  p.heads_q = sizes_.heads_q;
  p.heads_kv = sizes_.heads_kv;
  p.head_dim = p.head_dim_v = sizes_.head_dim;
  p.softcap = sizes_.softcap;
  p.kv_dtype = pages.k.dtype;
  p.dtype = pages.k_scale.defined() ? DType::kFloat32 : pages.k.dtype;
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, "the cache is ", name(p.dtype),
        ", expected float32, bfloat16, float16, int8 or float8_e4m3fn");
  p.block_table = block_table.as<const int32_t>();
  p.block_table_stride = block_table.stride[0];
  p.page_size = pages.k.shape[2];
  p.kv_lens = kv_lens.data();
  p.seq_kv = block_table.shape[1] * p.page_size;
  p.pages = pages.k.shape[1];
  set_division(p, plan);
  check(p.num_splits <= p.seq_kv + 65536, p.num_splits, " splits are more than the cache's ", p.seq_kv, " keys");
  check(!plan.blocked || p.dtype == p.kv_dtype, "the blocked kernel takes no ", name(p.kv_dtype), " cache");
  for (const RotaryTable& table : rotary_) {  // the shortest
    if (p.rotary_cos && p.rotary_positions <= table.cos.shape[0]) continue;
    p.rotary_cos = table.cos.data;
    p.rotary_positions = table.cos.shape[0];
  }
  // A layer without a window reads all pages, so all must be there.
  p.window_left = layers_.empty() ? -1 : layers_[0].attention.window_left;
  for (const DecoderLayer& l : layers_) {
    const int64_t window = l.attention.window_left;
    p.window_left = window < 0 || p.window_left < 0 ? -1 : std::max(p.window_left, window);
  }
  p.new_k.data = x.data;  // there will be new keys
  check_cache_values(p);
  return p;
}

void Decoder::run_layers(const CachePages& pages, const KvCacheParams& p, Step step) const {
  const StepMemory& m = step.m;
  KvCacheParams cache = p;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const DecoderLayer& l = layers_[i];
    const int64_t layer = static_cast<int64_t>(i);
    step.layer = i;
    cache.k = pages_of(pages.k, layer);
    cache.v = pages_of(pages.v, layer);
    cache.k_scale = scale_of(pages.k_scale, layer);
    cache.v_scale = scale_of(pages.v_scale, layer);
    cache.rotary_cos = cache.rotary_sin = nullptr;
    if (l.attention.rotary >= 0) {
      const RotaryTable& table = rotary_[l.attention.rotary];
      cache.rotary_cos = table.cos.data;
      cache.rotary_sin = table.sin.data;
      cache.rotary_pairs = table.cos.shape[1];
    }

    run_projections(step, l.attention);
    run_attention(step, l.attention, cache);
    const auto mlp_in = [&] { step.linear(step.inner_product(l.mlp, m.x, m.tokens, l.mlp_norm, m.inner), l.mlp.gate.data ? kGate : kUp); };
    if (l.parallel) mlp_in();
    step.add_product(m.attended, m.dtype, l.attention.o, kO, l.attention.out_norm, l.residual_scale);
    if (l.experts.defined()) {
      run_experts(step, l);
      continue;
    }
    if (!l.parallel) mlp_in();
    step.add_product(m.inner, DType::kFloat32, l.mlp.down, kDown, l.mlp_out_norm, l.residual_scale);
  }
  step.workers.norm_rows({.x = m.x, .out = m.x, .rows = m.tokens, .cols = sizes_.hidden, .norm = final_norm_});
}

void Decoder::step(TensorView x, TensorView lens, TensorView block_table, const CachePages& pages, const DecodePlan& plan, Threads threads,
                   const std::vector<AdapterTokens>& adapters) const {
  for (const DecoderLayer& l : layers_) check(l.mlp.defined() || l.experts.defined(), "a layer has neither an MLP nor experts");
  check_step(x, lens, block_table, pages);
  std::vector<int32_t> kv_lens(x.shape[0]);
  for (size_t b = 0; b < kv_lens.size(); ++b) kv_lens[b] = lens.as<const int32_t>()[static_cast<int64_t>(b) * lens.stride[0]];
  KvCacheParams p = cache_params(x, kv_lens, block_table, pages, plan);
  const int64_t tokens = p.batch * p.seq_q;
  if (tokens == 0) return;
  for (const AdapterTokens& part : adapters) check_adapter(*part.adapter, layers_);
  const StepAdapters step_adapters(adapters, tokens);

  // One region where attention has little to divide; long contexts are divided by keys, many tokens have work enough for a region a phase.
  const bool together = tokens <= kTogether && p.num_splits == 1 && !plan.blocked;
  StepMemory m(sizes_, needs_, p, plan.blocked, together ? static_cast<int>(threads) : 0, step_adapters);
  m.x = x.as<float>();
  p.partial_out = m.partial_out;
  p.partial_lse = m.partial_lse;

  if (!together) return run_layers(pages, p, {sizes_, m, {.threads = threads}, plan.blocked, &step_adapters});
  cpu::Barrier barrier;
  const int count = threads;
#pragma omp parallel num_threads(count)
  {
    const cpu::Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    run_layers(pages, p, {sizes_, m, {1, &team, m.scratch}, false, &step_adapters});
  }
}

}  // namespace foveate
