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
  expect(t, what).rank(4).last_contiguous();
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// scale: fp32, one number, [Hkv], or the cache's shape without the last dimension, any strides.
CacheScale scale_of(const TensorView& cache, const TensorView& scale, const char* what, const char* scale_what) {
  const bool quantized = cache.dtype == DType::kInt8 || cache.dtype == DType::kFloat8E4M3;
  check(quantized == scale.defined(), what, " is ", name(cache.dtype), quantized ? ": it needs " : ": it takes no ", scale_what);
  if (!scale.defined()) return {};
  expect(scale, scale_what).dtype(DType::kFloat32);
  if (scale.ndim == 0) return {.data = scale.as<float>()};
  if (scale.ndim == 1) {
    expect(scale, scale_what).shape({cache.shape[2]});
    return {.data = scale.as<float>(), .head = scale.stride[0]};
  }
  expect(scale, scale_what).shape({cache.shape[0], cache.shape[1], cache.shape[2]});
  return {scale.as<float>(), scale.stride[0], scale.stride[1], scale.stride[2], true};
}

std::vector<int32_t> read_lens(const TensorView& lens, int64_t batch, int64_t capacity) {
  expect(lens, "kv_lens").shape({batch});
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

}  // namespace

// The values that would make a kernel read or write outside of the cache, the block table or the rotary tables.
void check_cache_values(const KvCacheParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t len = p.kv_lens[b], end = len + p.new_keys;
    check(len >= 0, "kv_lens[", b, "] = ", len, " is negative");
    check(end <= p.seq_kv, "kv_lens[", b, "] + Snew = ", len, " + ", p.new_keys, " = ", end, " exceeds the cache's ", p.seq_kv,
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

void set_division(KvCacheParams& p, const Division& d) {
  constexpr int64_t kMost = int64_t{1} << 31;
  check(d.num_splits >= 1 && d.keys_per_split >= 0 && d.rows_per_task >= 1 && d.heads_per_task >= 1 && d.num_splits <= kMost &&
            d.keys_per_split <= kMost,
        "num_splits = ", d.num_splits, ", keys_per_split = ", d.keys_per_split, ", rows_per_task = ", d.rows_per_task,
        " and heads_per_task = ", d.heads_per_task, " are not a division of the work");
  check(d.keys_per_split == 0 || d.num_splits * d.keys_per_split >= p.seq_kv, d.num_splits, " splits of ", d.keys_per_split,
        " keys do not cover the cache's ", p.seq_kv);
  p.num_splits = d.num_splits;
  p.keys_per_split = d.keys_per_split;
  const int64_t rows = p.heads_kv > 0 ? p.seq_q * (p.heads_q / p.heads_kv) : 0;
  p.rows_per_task = std::min(d.rows_per_task, std::max<int64_t>(1, rows));
  p.heads_per_task = std::min(d.heads_per_task, std::max<int64_t>(1, p.heads_kv));
}

void append_and_attend(KvCacheParams p, bool blocked, void* q_rotated, int threads) {
  if (p.new_keys > 0) cpu::kernels().kv_append(p, threads);
  if (p.seq_q == 0 || p.heads_q == 0) return;
  if (!blocked) return cpu::kernels().decode(p, threads);
  if (p.rotary_cos) {
    cpu::kernels().rotate_queries(p, q_rotated, threads);
    p.q = {q_rotated, p.seq_q * p.heads_q * p.head_dim, p.heads_q * p.head_dim, p.head_dim};
  }
  AttentionParams a;
  static_cast<AttentionProblem&>(a) = p;
  a.seq_kv = 0;  // workspaces follow from it: the longest sequence, not what the cache could hold
  for (int64_t b = 0; b < p.batch; ++b) a.seq_kv = std::max<int64_t>(a.seq_kv, p.kv_lens[b] + p.new_keys);
  cpu::kernels().attention_forward(a, threads);
}

namespace {

void append_and_attend_on_gpu(KvCacheParams p, bool blocked, void* q_rotated, cuda::Stream stream) {
  if (p.new_keys > 0) cuda::kernels().kv_append(p, stream);
  if (p.seq_q == 0 || p.heads_q == 0) return;
  if (!blocked) return cuda::kernels().decode(p, stream);
  if (p.rotary_cos) {
    cuda::kernels().rotate_queries(p, q_rotated, stream);
    p.q = {q_rotated, p.seq_q * p.heads_q * p.head_dim, p.heads_q * p.head_dim, p.head_dim};
  }
  AttentionParams a;
  static_cast<AttentionProblem&>(a) = p;
  cuda::kernels().attention_forward(a, stream);
}

// ---- operands -> checks -> params: one function for each group of arguments -----------------------------------------------------

void read_queries_and_cache(KvCacheParams& p, const CacheOperands& o, const TensorView& out, const TensorView& lse) {
  const TensorView &q = o.q, &k_cache = o.k_cache, &v_cache = o.v_cache;
  p.q = rows_of(q, "q");
  p.out = rows_of(out, "out");
  p.k = rows_of(k_cache, "k_cache");
  p.k_scale = scale_of(k_cache, o.k_scale, "k_cache", "k_scale");
  p.v = rows_of(v_cache, "v_cache");
  p.v_scale = scale_of(v_cache, o.v_scale, "v_cache", "v_scale");
  p.batch = q.shape[0];
  p.seq_q = q.shape[1];
  p.heads_q = q.shape[2];
  p.head_dim = q.shape[3];
  p.heads_kv = k_cache.shape[2];
  p.head_dim_v = v_cache.shape[3];
  p.dtype = q.dtype;
  p.kv_dtype = k_cache.dtype;
  check(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0, "q has ", p.heads_q, " heads, the cache has ", p.heads_kv,
        ", which must divide it");
  expect(k_cache, "k_cache").size(3, p.head_dim);
  expect(v_cache, "v_cache").shape({k_cache.shape[0], k_cache.shape[1], p.heads_kv, p.head_dim_v}).dtype(p.kv_dtype);
  check(p.kv_dtype == p.dtype || o.k_scale.defined(), "q is ", name(p.dtype), ", the cache is ", name(p.kv_dtype));
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, "q is ", name(p.dtype),
        ", expected float32, bfloat16 or float16");
  expect(out, "out").shape({p.batch, p.seq_q, p.heads_q, p.head_dim_v}).dtype(p.dtype);
  expect(lse, "lse").shape({p.batch, p.heads_q, p.seq_q}).contiguous().dtype(DType::kFloat32);
  p.lse = {lse.data, p.heads_q * p.seq_q, 1, p.seq_q};
}

void read_new_keys(KvCacheParams& p, const TensorView& k, const TensorView& v) {
  check(k.defined() == v.defined(), "k and v must be given together");
  if (!k.defined()) return;
  p.new_k = rows_of(k, "k");
  p.new_v = rows_of(v, "v");
  p.new_keys = k.shape[1];
  expect(k, "k").shape({p.batch, p.new_keys, p.heads_kv, p.head_dim}).dtype(p.dtype);
  expect(v, "v").shape({p.batch, p.new_keys, p.heads_kv, p.head_dim_v}).dtype(p.dtype);
}

void read_pages(KvCacheParams& p, const TensorView& k_cache, const TensorView& table) {
  p.pages = k_cache.shape[0];
  p.seq_kv = k_cache.shape[1];
  if (!table.defined()) {
    expect(k_cache, "k_cache").size(0, p.batch);
    return;
  }
  expect(table, "block_table").rank(2).size(0, p.batch).dtype(DType::kInt32).last_contiguous();
  p.block_table = table.as<const int32_t>();
  p.block_table_stride = table.stride[0];
  p.page_size = k_cache.shape[1];
  check(p.page_size >= 1, "the pages of k_cache hold no keys: page_size is ", p.page_size);
  p.seq_kv = table.shape[1] * p.page_size;
}

void read_rotary(KvCacheParams& p, const TensorView& cos, const TensorView& sin, bool interleaved) {
  check(cos.defined() == sin.defined(), "rotary_cos and rotary_sin must be given together");
  if (!cos.defined()) return;
  expect(cos, "rotary_cos").rank(2).contiguous();
  p.rotary_positions = cos.shape[0];
  p.rotary_pairs = cos.shape[1];
  p.rotary_dtype = cos.dtype;
  check(2 * p.rotary_pairs <= p.head_dim, "rotary_cos rotates ", 2 * p.rotary_pairs, " elements, the head dim is ", p.head_dim);
  check(cos.dtype == DType::kFloat32 || cos.dtype == p.dtype, "rotary_cos is ", name(cos.dtype), ", expected float32 or ", name(p.dtype));
  expect(sin, "rotary_sin").shape({p.rotary_positions, p.rotary_pairs}).contiguous().dtype(cos.dtype);
  if (p.rotary_pairs > 0) {
    p.rotary_cos = cos.data;
    p.rotary_sin = sin.data;
    p.rotary_interleaved = interleaved;
  }
}

void read_score_options(KvCacheParams& p, const CacheOperands& o) {
  if (const TensorView& alibi = o.alibi_slopes; alibi.defined()) {
    expect(alibi, "alibi_slopes").rank(2).dtype(DType::kFloat32).size(1, p.heads_q);
    check(alibi.shape[0] == 1 || alibi.shape[0] == p.batch, "alibi_slopes has ", alibi.shape[0], " rows for a batch of ", p.batch);
    p.alibi = alibi.as<const float>();
    p.alibi_batch = alibi.broadcast_stride(0);
    p.alibi_head = alibi.stride[1];
  }
  if (o.sinks.defined()) {
    expect(o.sinks, "sinks").shape({p.heads_q}).dtype(DType::kFloat32).contiguous();
    p.sinks = o.sinks.data;
  }
  p.scale = o.scale;
  p.softcap = o.softcap;
  p.causal = o.causal;
  p.window_left = usable_window(o.window_left);
  p.window_right = usable_window(o.window_right);
}

void read_splits(KvCacheParams& p, const CacheWorkspace& workspace, const Division& division) {
  const TensorView &partial_out = workspace.partial_out, &partial_lse = workspace.partial_lse, &counters = workspace.counters;
  set_division(p, division);
  if (p.num_splits <= 1) return;
  expect(partial_out, "partial_out").shape({p.num_splits, p.batch, p.heads_q, p.seq_q, p.head_dim_v}).contiguous();
  expect(partial_lse, "partial_lse").shape({p.num_splits, p.batch, p.heads_q, p.seq_q}).contiguous();
  expect(partial_out, "partial_out").dtype(DType::kFloat32);
  expect(partial_lse, "partial_lse").dtype(DType::kFloat32);
  p.partial_out = partial_out.as<float>();
  p.partial_lse = partial_lse.as<float>();
  if (!counters.defined()) return;
  const int64_t rows = p.heads_kv > 0 ? p.seq_q * (p.heads_q / p.heads_kv) : 0;
  const int64_t needed = p.batch * p.heads_kv * ceil_div(rows, p.rows_per_task);
  expect(counters, "counters").rank(1).dtype(DType::kInt32).contiguous();
  check(counters.shape[0] >= needed, "counters has ", counters.shape[0], " elements, the call needs ", needed);
  p.counters = counters.as<uint32_t>();
}

void check_blocked(const KvCacheParams& p, const TensorView& q_rotated) {
  check(p.kv_dtype == p.dtype, "the blocked kernel takes no ", name(p.kv_dtype), " cache");
  check(p.seq_kv <= INT32_MAX, "the cache's ", p.seq_kv, " keys for a sequence do not fit int32");
  if (p.rotary_cos) expect(q_rotated, "q_rotated").shape({p.batch, p.seq_q, p.heads_q, p.head_dim}).contiguous().dtype(p.dtype);
}

}  // namespace

void attention_with_kv_cache(const CacheOperands& o, TensorView out, TensorView lse, const CacheWorkspace& workspace,
                             const DecodePlan& plan, Threads threads) {
  KvCacheParams p;
  read_queries_and_cache(p, o, out, lse);
  read_new_keys(p, o.k, o.v);
  read_pages(p, o.k_cache, o.block_table);
  read_rotary(p, o.rotary_cos, o.rotary_sin, o.rotary_interleaved);
  read_score_options(p, o);
  read_splits(p, workspace, plan);
  if (plan.blocked) check_blocked(p, workspace.q_rotated);

  const CallDevice device = device_of({&o.q, &o.k_cache, &o.v_cache, &o.k, &o.v, &o.kv_lens, &out, &lse, &workspace.partial_out,
                                       &workspace.partial_lse, &workspace.q_rotated, &workspace.counters, &o.block_table, &o.rotary_cos,
                                       &o.rotary_sin, &o.k_scale, &o.v_scale, &o.alibi_slopes, &o.sinks});
  const TensorView& kv_lens = o.kv_lens;
  std::vector<int32_t> lens;
  if (device.readable) {
    lens = read_lens(kv_lens, p.batch, p.seq_kv);
    p.kv_lens = kv_lens.dtype == DType::kInt32 && (p.batch <= 1 || kv_lens.stride[0] == 1) ? kv_lens.as<const int32_t>() : lens.data();
    check_cache_values(p);
  } else {
    expect(kv_lens, "kv_lens").shape({p.batch}).dtype(DType::kInt32).contiguous();
    p.kv_lens = kv_lens.as<const int32_t>();
  }
  if (p.batch == 0 || p.heads_kv == 0) return;
  if (device.cuda)
    append_and_attend_on_gpu(p, plan.blocked, workspace.q_rotated.data, current_stream(device));
  else
    append_and_attend(p, plan.blocked, workspace.q_rotated.data, threads);
}

}  // namespace foveate
