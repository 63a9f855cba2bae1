#include "ops/kv_cache.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/math.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

Rows rows_of(const TensorView& t, const char* what) {
  check_rank(t, what, 4);
  check_last_contiguous(t, what);
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

void check_shape(const TensorView& t, const char* what, std::initializer_list<int64_t> shape) {
  check_rank(t, what, static_cast<int>(shape.size()));
  int dim = 0;
  for (int64_t size : shape) check_size(t, what, dim++, size);
}

// scale: fp32 of the cache's shape without the last dimension, any strides (0 where one number serves all).
CacheOperand cache_of(const TensorView& cache, const TensorView& scale, bool per_token, const char* what, const char* scale_what) {
  CacheOperand c{.rows = rows_of(cache, what), .scale_per_token = per_token};
  const bool quantized = cache.dtype == DType::kInt8 || cache.dtype == DType::kFloat8E4M3;
  check(quantized == scale.defined(), what, " is ", name(cache.dtype), quantized ? ": it needs " : ": it takes no ", scale_what);
  if (scale.defined()) {
    check_dtype(scale, scale_what, DType::kFloat32);
    check_shape(scale, scale_what, {cache.shape[0], cache.shape[1], cache.shape[2]});
    c.scale = scale.as<float>();
    c.scale_batch = scale.stride[0], c.scale_seq = scale.stride[1], c.scale_head = scale.stride[2];
  }
  return c;
}

std::vector<int32_t> read_lens(const TensorView& lens, int64_t batch, int64_t capacity) {
  check_shape(lens, "kv_lens", {batch});
  check(lens.dtype == DType::kInt32 || lens.dtype == DType::kInt64, "kv_lens is ", name(lens.dtype), ", expected int32 or int64");
  std::vector<int32_t> values(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t value =
        lens.dtype == DType::kInt32 ? lens.as<const int32_t>()[b * lens.stride[0]] : lens.as<const int64_t>()[b * lens.stride[0]];
    check(value >= 0, "kv_lens[", b, "] = ", value, " is negative");
    check(value <= INT32_MAX, "kv_lens[", b, "] = ", value, " exceeds the cache's ", capacity, " keys");
    values[b] = static_cast<int32_t>(value);
  }
  return values;
}

// What the blocked kernel needs to attend to a cache that holds the new keys already.
AttentionParams blocked_params(const KvCacheParams& p) {
  AttentionParams a;
  a.q = p.q, a.k = p.k.rows, a.v = p.v.rows, a.out = p.out;
  a.lse = {p.lse, p.heads_q * p.seq_q, 1, p.seq_q};
  a.alibi = p.alibi, a.alibi_batch = p.alibi_batch, a.alibi_head = p.alibi_head, a.sinks = p.sinks;
  a.kv_lens = p.kv_lens, a.new_keys = p.seq_new, a.pages = p.pages;
  a.block_table = p.block_table, a.block_table_stride = p.block_table_stride, a.page_size = p.page_size;
  a.batch = p.batch, a.seq_q = p.seq_q, a.heads_q = p.heads_q, a.heads_kv = p.heads_kv, a.head_dim = p.head_dim,
  a.head_dim_v = p.head_dim_v;
  a.seq_kv = p.capacity;
  a.scale = p.scale, a.softcap = p.softcap, a.causal = p.causal, a.window_left = p.window_left, a.window_right = p.window_right;
  a.dtype = p.dtype, a.kv_dtype = p.kv_dtype;
  return a;
}

}  // namespace

// The values that would make a kernel read or write outside of the cache, the block table or the rotary tables.
void check_cache_values(const KvCacheParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t len = p.kv_lens[b], end = len + p.seq_new;
    check(len >= 0, "kv_lens[", b, "] = ", len, " is negative");
    check(end <= p.capacity, "kv_lens[", b, "] + Snew = ", len, " + ", p.seq_new, " = ", end, " exceeds the cache's ", p.capacity,
          " keys; use a larger cache or ", p.block_table ? "a block_table with more pages" : "shorter sequences");
    if (p.rotary_cos) {
      const int64_t first = p.new_k.data ? len : len - p.seq_q, last = std::max(end, first + p.seq_q);
      check(first >= 0, "kv_lens[", b, "] = ", len, " is less than the ", p.seq_q,
            " queries: without k, query i is rotated by position kv_lens - Sq + i, which must not be negative");
      check(last <= p.rotary_positions, "rotary_cos and rotary_sin have ", p.rotary_positions, " positions, sequence ", b, " needs ", last,
            "; build them for at least that many");
    }
    if (!p.block_table) continue;
    // Pages that lie wholly before the window of the first query are not read, and may have been freed.
    const int64_t first_key = p.window_left >= 0 ? std::clamp<int64_t>(end - p.seq_q - p.window_left, 0, len) : 0;
    for (int64_t i = first_key / p.page_size; i * p.page_size < end; ++i) {
      const int64_t page = p.block_table[b * p.block_table_stride + i];
      check(page >= 0 && page < p.pages, "block_table[", b, ", ", i, "] = ", page, " is not a page: the cache has ", p.pages,
            " pages and sequence ", b, " needs this entry for its ", end, " keys");
    }
  }
}

void set_division(KvCacheParams& p, const Division& d, int64_t capacity) {
  constexpr int64_t kMost = int64_t{1} << 31;
  check(d.num_splits >= 1 && d.keys_per_split >= 0 && d.rows_per_task >= 1 && d.heads_per_task >= 1 && d.num_splits <= kMost &&
            d.keys_per_split <= kMost,
        "num_splits = ", d.num_splits, ", keys_per_split = ", d.keys_per_split, ", rows_per_task = ", d.rows_per_task,
        " and heads_per_task = ", d.heads_per_task, " are not a division of the work");
  check(d.keys_per_split == 0 || d.num_splits * d.keys_per_split >= capacity, d.num_splits, " splits of ", d.keys_per_split,
        " keys do not cover the cache's ", capacity);
  p.num_splits = d.num_splits, p.keys_per_split = d.keys_per_split;
  const int64_t rows = p.heads_kv > 0 ? p.seq_q * (p.heads_q / p.heads_kv) : 0;
  p.rows_per_task = std::min(d.rows_per_task, std::max<int64_t>(1, rows));
  p.heads_per_task = std::min(d.heads_per_task, std::max<int64_t>(1, p.heads_kv));
}

void append_and_attend(KvCacheParams p, bool blocked, void* q_turned, int threads) {
  if (p.seq_new > 0) cpu::kernels().kv_append(p, threads);
  if (p.seq_q == 0 || p.heads_q == 0) return;
  if (!blocked) return cpu::kernels().decode(p, threads);
  if (p.rotary_cos) {
    cpu::kernels().rotate_queries(p, q_turned, threads);
    p.q = {q_turned, p.seq_q * p.heads_q * p.head_dim, p.heads_q * p.head_dim, p.head_dim};
  }
  AttentionParams a = blocked_params(p);
  a.seq_kv = 0;  // workspaces follow from it: the longest sequence, not what the cache could hold
  for (int64_t b = 0; b < p.batch; ++b) a.seq_kv = std::max<int64_t>(a.seq_kv, p.kv_lens[b] + p.seq_new);
  cpu::kernels().attention_forward(a, threads);
}

namespace {

void append_and_attend_on_gpu(KvCacheParams p, bool blocked, void* q_turned, cuda::Stream stream) {
  if (p.seq_new > 0) cuda::kernels().kv_append(p, stream);
  if (p.seq_q == 0 || p.heads_q == 0) return;
  if (!blocked) return cuda::kernels().decode(p, stream);
  if (p.rotary_cos) {
    cuda::kernels().rotate_queries(p, q_turned, stream);
    p.q = {q_turned, p.seq_q * p.heads_q * p.head_dim, p.heads_q * p.head_dim, p.head_dim};
  }
  cuda::kernels().attention_forward(blocked_params(p), stream);
}

}  // namespace

void attention_with_kv_cache(TensorView q, TensorView k_cache, TensorView v_cache, TensorView k, TensorView v, TensorView kv_lens,
                             TensorView out, TensorView lse, TensorView partial_out, TensorView partial_lse, TensorView q_turned,
                             const KvCacheOptions& o, Threads threads) {
  KvCacheParams p;
  p.q = rows_of(q, "q"), p.out = rows_of(out, "out");
  p.k = cache_of(k_cache, o.k_scale, o.k_scale_per_token, "k_cache", "k_scale");
  p.v = cache_of(v_cache, o.v_scale, o.v_scale_per_token, "v_cache", "v_scale");
  p.batch = q.shape[0], p.seq_q = q.shape[1], p.heads_q = q.shape[2], p.head_dim = q.shape[3];
  p.heads_kv = k_cache.shape[2], p.head_dim_v = v_cache.shape[3];
  p.dtype = q.dtype, p.kv_dtype = k_cache.dtype;
  check(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0, "q has ", p.heads_q, " heads, the cache has ", p.heads_kv,
        ", which must divide it");
  check_size(k_cache, "k_cache", 3, p.head_dim);
  check_shape(v_cache, "v_cache", {k_cache.shape[0], k_cache.shape[1], p.heads_kv, p.head_dim_v});
  check_dtype(v_cache, "v_cache", p.kv_dtype);
  check(p.kv_dtype == p.dtype || o.k_scale.defined(), "q is ", name(p.dtype), ", the cache is ", name(p.kv_dtype));
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, "q is ", name(p.dtype),
        ", expected float32, bfloat16 or float16");
  check_shape(out, "out", {p.batch, p.seq_q, p.heads_q, p.head_dim_v}), check_dtype(out, "out", p.dtype);
  check_shape(lse, "lse", {p.batch, p.heads_q, p.seq_q}), check_contiguous(lse, "lse"), check_dtype(lse, "lse", DType::kFloat32);
  p.lse = lse.as<float>();

  check(k.defined() == v.defined(), "k and v must be given together");
  if (k.defined()) {
    p.new_k = rows_of(k, "k"), p.new_v = rows_of(v, "v");
    p.seq_new = k.shape[1];
    check_shape(k, "k", {p.batch, p.seq_new, p.heads_kv, p.head_dim}), check_dtype(k, "k", p.dtype);
    check_shape(v, "v", {p.batch, p.seq_new, p.heads_kv, p.head_dim_v}), check_dtype(v, "v", p.dtype);
  }

  int64_t capacity = k_cache.shape[1];
  if (const TensorView& table = o.block_table; table.defined()) {
    check_rank(table, "block_table", 2), check_size(table, "block_table", 0, p.batch);
    check_dtype(table, "block_table", DType::kInt32), check_last_contiguous(table, "block_table");
    p.block_table = table.as<const int32_t>(), p.block_table_stride = table.stride[0], p.page_size = k_cache.shape[1];
    check(p.page_size >= 1, "the pages of k_cache hold no keys: page_size is ", p.page_size);
    capacity = table.shape[1] * p.page_size;
  } else {
    check_size(k_cache, "k_cache", 0, p.batch);
  }
  check(o.rotary_cos.defined() == o.rotary_sin.defined(), "rotary_cos and rotary_sin must be given together");
  if (const TensorView& cos = o.rotary_cos; cos.defined()) {
    check_rank(cos, "rotary_cos", 2), check_contiguous(cos, "rotary_cos");
    p.rotary_positions = cos.shape[0], p.rotary_pairs = cos.shape[1], p.rotary_dtype = cos.dtype;
    check(2 * p.rotary_pairs <= p.head_dim, "rotary_cos turns ", 2 * p.rotary_pairs, " elements, the head dim is ", p.head_dim);
    check(cos.dtype == DType::kFloat32 || cos.dtype == p.dtype, "rotary_cos is ", name(cos.dtype), ", expected float32 or ", name(p.dtype));
    check_shape(o.rotary_sin, "rotary_sin", {p.rotary_positions, p.rotary_pairs}), check_contiguous(o.rotary_sin, "rotary_sin");
    check_dtype(o.rotary_sin, "rotary_sin", cos.dtype);
    if (p.rotary_pairs > 0) p.rotary_cos = cos.data, p.rotary_sin = o.rotary_sin.data, p.rotary_interleaved = o.rotary_interleaved;
  }
  if (const TensorView& alibi = o.alibi; alibi.defined()) {
    check_rank(alibi, "alibi_slopes", 2), check_dtype(alibi, "alibi_slopes", DType::kFloat32),
        check_size(alibi, "alibi_slopes", 1, p.heads_q);
    check(alibi.shape[0] == 1 || alibi.shape[0] == p.batch, "alibi_slopes has ", alibi.shape[0], " rows for a batch of ", p.batch);
    p.alibi = alibi.as<const float>(), p.alibi_batch = alibi.broadcast_stride(0), p.alibi_head = alibi.stride[1];
  }
  if (o.sinks.defined()) {
    check_shape(o.sinks, "sinks", {p.heads_q}), check_dtype(o.sinks, "sinks", DType::kFloat32), check_contiguous(o.sinks, "sinks");
    p.sinks = o.sinks.as<const float>();
  }

  set_division(p, o.division, capacity);
  if (p.num_splits > 1) {
    check_shape(partial_out, "partial_out", {p.num_splits, p.batch, p.heads_q, p.seq_q, p.head_dim_v}),
        check_contiguous(partial_out, "partial_out");
    check_shape(partial_lse, "partial_lse", {p.num_splits, p.batch, p.heads_q, p.seq_q}), check_contiguous(partial_lse, "partial_lse");
    check_dtype(partial_out, "partial_out", DType::kFloat32), check_dtype(partial_lse, "partial_lse", DType::kFloat32);
    p.partial_out = partial_out.as<float>(), p.partial_lse = partial_lse.as<float>();
    if (o.counters.defined()) {
      const int64_t rows = p.heads_kv > 0 ? p.seq_q * (p.heads_q / p.heads_kv) : 0,
                    counted = p.batch * p.heads_kv * ceil_div(rows, p.rows_per_task);
      check_rank(o.counters, "counters", 1), check_dtype(o.counters, "counters", DType::kInt32), check_contiguous(o.counters, "counters");
      check(o.counters.shape[0] >= counted, "counters has ", o.counters.shape[0], " elements, the call needs ", counted);
      p.counters = o.counters.as<uint32_t>();
    }
  }
  p.causal = o.causal, p.window_left = usable_window(o.window_left), p.window_right = usable_window(o.window_right), p.scale = o.scale,
  p.softcap = o.softcap;

  if (o.blocked) {
    check(p.kv_dtype == p.dtype, "the blocked kernel takes no ", name(p.kv_dtype), " cache");
    check(capacity <= INT32_MAX, "the cache's ", capacity, " keys for a sequence do not fit int32");
    if (p.rotary_cos)
      check_shape(q_turned, "q_turned", {p.batch, p.seq_q, p.heads_q, p.head_dim}), check_contiguous(q_turned, "q_turned"),
          check_dtype(q_turned, "q_turned", p.dtype);
  }
  p.capacity = capacity, p.pages = k_cache.shape[0];
  const CallDevice device =
      device_of({&q, &k_cache, &v_cache, &k, &v, &kv_lens, &out, &lse, &partial_out, &partial_lse, &q_turned, &o.counters, &o.block_table,
                 &o.rotary_cos, &o.rotary_sin, &o.k_scale, &o.v_scale, &o.alibi, &o.sinks});
  std::vector<int32_t> lens;
  if (device.readable) {
    lens = read_lens(kv_lens, p.batch, capacity);
    p.kv_lens = kv_lens.dtype == DType::kInt32 && (p.batch <= 1 || kv_lens.stride[0] == 1) ? kv_lens.as<const int32_t>() : lens.data();
    check_cache_values(p);
  } else {
    check_shape(kv_lens, "kv_lens", {p.batch}), check_dtype(kv_lens, "kv_lens", DType::kInt32), check_contiguous(kv_lens, "kv_lens");
    p.kv_lens = kv_lens.as<const int32_t>();
  }
  if (p.batch == 0 || p.heads_kv == 0) return;
  if (device.cuda)
    append_and_attend_on_gpu(p, o.blocked, q_turned.data, current_stream(device));
  else
    append_and_attend(p, o.blocked, q_turned.data, threads);
}

}  // namespace foveate
