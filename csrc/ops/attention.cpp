// Views -> memory checks -> params. Python has checked the meaning (which options, which shapes broadcast); what is checked here is what could
// make a kernel touch memory that is not the tensors'.
#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"
#include "ops/kv_cache.h"

namespace foveate {
namespace {

void check_activation(const TensorView& t, const char* what) { check_float(t, what), check_last_contiguous(t, what); }

// [B, S, H, D], or [total, H, D] with batch stride 0.
Rows rows_of(const TensorView& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

void check_like(const TensorView& t, const char* what, const TensorView& other, int64_t last, DType dtype) {
  check_rank(t, what, other.ndim);
  for (int i = 0; i + 1 < other.ndim; ++i) check_size(t, what, i, other.shape[i]);
  check_size(t, what, other.ndim - 1, last);
  check_dtype(t, what, dtype);
  check_last_contiguous(t, what);
}

void check_vector(const TensorView& t, const char* what, int64_t size, DType dtype) {
  check_rank(t, what, 1), check_size(t, what, 0, size), check_dtype(t, what, dtype), check_contiguous(t, what);
}

ScoreOperand score_operand(const TensorView& t, const char* what, const AttentionParams& p) {
  if (!t.defined()) return {};
  check_rank(t, what, 4);
  const int64_t full[4] = {p.batch, p.heads_q, p.seq_q, p.seq_kv};
  ScoreOperand s{t.data, t.dtype, {}};
  for (int i = 0; i < 4; ++i) {
    check(t.shape[i] == full[i] || t.shape[i] == 1, what, " has size ", t.shape[i], " in dimension ", i, ", which does not broadcast to ",
          full[i]);
    s.stride[i] = t.broadcast_stride(i);
  }
  return s;
}

// Lengths come as int32 or int64. What fits int32 after `valid` has looked at it is kept for the life of the call. On a GPU they come as int32
// and nobody looks at them.
class Lengths {
 public:
  template <class Valid>
  const int32_t* read(const TensorView& t, const char* what, int64_t size, const CallDevice& device, const Valid& valid) {
    check_rank(t, what, 1), check_size(t, what, 0, size), check_contiguous(t, what);
    if (!device.readable) check_dtype(t, what, DType::kInt32);
    if (!device.readable) return t.as<int32_t>();
    check(t.dtype == DType::kInt32 || t.dtype == DType::kInt64, what, " is ", name(t.dtype), ", expected int32 or int64");
    for (int64_t i = 0; i < size; ++i) {
      const int64_t value = t.dtype == DType::kInt32 ? t.as<int32_t>()[i] : t.as<int64_t>()[i];
      valid(i, value);
      if (t.dtype == DType::kInt64) kept_.push_back(static_cast<int32_t>(value));
    }
    return t.dtype == DType::kInt32 ? t.as<int32_t>() : kept_.data();
  }

 private:
  std::vector<int32_t> kept_;
};

const int32_t* read_cu_seqlens(Lengths& lengths, const TensorView& t, const char* what, int64_t batch, int64_t total, int64_t longest,
                               const CallDevice& device) {
  int64_t previous = 0;
  check(total <= std::numeric_limits<int32_t>::max(), what, ": ", total,
        " tokens in all are more than a packed batch may have, 2147483647");
  return lengths.read(t, what, batch + 1, device, [&](int64_t i, int64_t value) {
    const bool ok = (i > 0 || value == 0) && value >= previous && (i < batch || value == total);
    check(ok, what, " must start at 0, never decrease and end at ", total, "; entry ", i, " is ", value);
    check(i == 0 || value - previous <= longest, what, " has a sequence of length ", value - previous, " at ", i - 1,
          ", longer than max_seqlen", what + 10, " = ", longest);
    previous = value;
  });
}

// max_seqlen may be generous; workspaces should not be.
int64_t longest_of(const int32_t* cu, int64_t batch) {
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) longest = std::max<int64_t>(longest, cu[b + 1] - cu[b]);
  return longest;
}

// AttentionParams and what it points to beside the tensors.
struct AttentionCall {
  Lengths kv_lens, cu_q, cu_k;
  CallDevice device;
  AttentionParams params;

  AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, const TensorView& lse,
                const AttentionOptions& o);
};

AttentionCall::AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, const TensorView& lse,
                             const AttentionOptions& o) {
  AttentionParams& p = params;
  device = device_of({&q, &k, &v, &out, &lse, &o.bias, &o.mask, &o.alibi, &o.rel_table, &o.rel_buckets, &o.sinks, &o.kv_lens, &o.cu_q,
                      &o.cu_k, &o.philox});
  const bool varlen = o.cu_q.defined();
  const int ndim = varlen ? 3 : 4;
  for (const auto& [t, what] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}})
    check_rank(*t, what, ndim), check_activation(*t, what), check_dtype(*t, what, q.dtype);
  p.dtype = p.kv_dtype = q.dtype;
  const DType acc = accumulator_of(q.dtype);
  p.heads_q = q.shape[ndim - 2], p.heads_kv = k.shape[ndim - 2], p.head_dim = q.shape[ndim - 1], p.head_dim_v = v.shape[ndim - 1];
  check(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0, "q has ", p.heads_q, " heads, k has ", p.heads_kv,
        ", which does not divide them");
  const int64_t most = device.cuda ? kMaxCudaHeadDim : kMaxHeadDim;
  check(p.head_dim <= most && p.head_dim_v <= most, "head dims ", p.head_dim, " and ", p.head_dim_v, " exceed the limit of ", most);
  check_size(k, "k", ndim - 1, p.head_dim);
  for (int i = 0; i + 1 < ndim; ++i) check_size(v, "v", i, k.shape[i]);
  check_like(out, "out", q, p.head_dim_v, q.dtype);
  p.q = rows_of(q, varlen), p.k = rows_of(k, varlen), p.v = rows_of(v, varlen), p.out = rows_of(out, varlen);
  if (varlen) {
    check(o.cu_k.defined() && o.cu_q.ndim == 1 && o.cu_k.ndim == 1 && o.cu_q.shape[0] >= 1 && o.cu_k.shape[0] == o.cu_q.shape[0],
          "cu_seqlens_q and cu_seqlens_k must both be [batch + 1]");
    p.batch = o.cu_q.shape[0] - 1, p.seq_q = o.max_q, p.seq_kv = o.max_k, p.total_q = q.shape[0], p.total_k = k.shape[0];
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    check(p.seq_q >= 0 && p.seq_kv >= 0 && p.seq_q <= kMost && p.seq_kv <= kMost, "max_seqlen_q = ", p.seq_q,
          " and max_seqlen_k = ", p.seq_kv, " must be within 0..", kMost);
    p.cu_q = read_cu_seqlens(cu_q, o.cu_q, "cu_seqlens_q", p.batch, q.shape[0], p.seq_q, device);
    p.cu_k = read_cu_seqlens(cu_k, o.cu_k, "cu_seqlens_k", p.batch, k.shape[0], p.seq_kv, device);
    if (!o.rel_table.defined() && device.readable) {  // whose table of buckets has max_seqlen's size
      p.seq_q = longest_of(p.cu_q, p.batch), p.seq_kv = longest_of(p.cu_k, p.batch);
    }
    check(!o.bias.defined() && !o.mask.defined() && !o.kv_lens.defined(), "bias, mask and kv_lens have no meaning in a packed batch");
  } else {
    p.batch = q.shape[0], p.seq_q = q.shape[1], p.seq_kv = k.shape[1];
    check_size(k, "k", 0, p.batch);
  }
  if (lse.defined()) {
    check_rank(lse, "lse", ndim - 1), check_dtype(lse, "lse", acc), check_last_contiguous(lse, "lse");
    if (!varlen) check_size(lse, "lse", 0, p.batch);
    check_size(lse, "lse", ndim - 3, p.heads_q), check_size(lse, "lse", ndim - 2, varlen ? q.shape[0] : p.seq_q);
    p.lse = {lse.data, varlen ? 0 : lse.stride[0], 1, lse.stride[ndim - 3]};
  }
  p.bias = score_operand(o.bias, "bias", p);
  if (o.bias.defined())
    check(static_cast<int>(o.bias.dtype) <= static_cast<int>(DType::kBFloat16), "bias is ", name(o.bias.dtype), ", expected a float type");
  p.mask = score_operand(o.mask, "mask", p);
  if (o.mask.defined()) check_dtype(o.mask, "mask", DType::kBool);
  if (o.alibi.defined()) {
    check_rank(o.alibi, "alibi_slopes", 2), check_dtype(o.alibi, "alibi_slopes", DType::kFloat32),
        check_size(o.alibi, "alibi_slopes", 1, p.heads_q);
    check(o.alibi.shape[0] == 1 || o.alibi.shape[0] == p.batch, "alibi_slopes has ", o.alibi.shape[0], " rows for a batch of ", p.batch);
    p.alibi = o.alibi.as<const float>(), p.alibi_batch = o.alibi.broadcast_stride(0), p.alibi_head = o.alibi.stride[1];
  }
  if (o.rel_table.defined()) {
    check_rank(o.rel_table, "relative bias table", 2), check_dtype(o.rel_table, "relative bias table", acc),
        check_contiguous(o.rel_table, "relative bias table");
    check_size(o.rel_table, "relative bias table", 1, p.heads_q);
    p.rel_num_buckets = static_cast<int>(o.rel_table.shape[0]);
    const int64_t distances = p.seq_q + p.seq_kv > 0 ? p.seq_q + p.seq_kv - 1 : 0;
    check_vector(o.rel_buckets, "relative buckets", distances, DType::kInt32);
    for (int64_t i = 0; i < distances && device.readable; ++i) {
      const int32_t bucket = o.rel_buckets.as<int32_t>()[i];
      check(bucket >= 0 && bucket < p.rel_num_buckets, "relative bucket ", bucket, " is outside the table of ", p.rel_num_buckets);
    }
    p.rel_table = o.rel_table.data, p.rel_buckets = o.rel_buckets.as<int32_t>();
  }
  if (o.sinks.defined()) check_vector(o.sinks, "sinks", p.heads_q, acc), p.sinks = o.sinks.data;
  if (o.kv_lens.defined())
    p.kv_lens = kv_lens.read(o.kv_lens, "kv_lens", p.batch, device, [&](int64_t b, int64_t value) {
      check(value >= 0 && value <= p.seq_kv, "kv_lens[", b, "] = ", value, " is outside 0..", p.seq_kv, ", the number of keys in k");
    });
  check(o.dropout_p >= 0 && o.dropout_p < 1, "dropout_p = ", o.dropout_p, " is outside [0, 1)");
  if (o.dropout_p > 0) {
    check(o.philox.defined(), "dropout needs its seed and offset");
    check_vector(o.philox, "philox", 2, DType::kInt64);
    p.dropout_p = o.dropout_p;
    p.philox = o.philox.as<const int64_t>();
    if (device.readable) p.philox_seed = static_cast<uint64_t>(p.philox[0]), p.philox_offset = static_cast<uint32_t>(p.philox[1]);
  }
  check(std::isfinite(o.scale) && std::isfinite(o.softcap) && o.softcap >= 0, "scale = ", o.scale, " and softcap = ", o.softcap,
        " must be finite, softcap not negative");
  p.scale = o.scale, p.softcap = o.softcap, p.causal = o.causal;
  p.window_left = usable_window(o.window_left), p.window_right = usable_window(o.window_right);
}

// Few queries per KV head and nothing but what the decode kernel knows: it reads K and V once, in place, where the blocked kernel copies them first.
constexpr int64_t kDecodeRows = 16;

bool suits_decode(const AttentionParams& p, const TensorView& lse) {
  const bool plain = !p.cu_q && p.seq_kv <= std::numeric_limits<int32_t>::max() && !p.rel_table && p.dropout_p == 0;
  const bool lse_fits =
      !lse.defined() || (lse.stride[2] == 1 && lse.stride[1] == p.seq_q && lse.stride[0] == p.heads_q * p.seq_q) || lse.numel() == 1;
  return plain && lse_fits && p.dtype != DType::kFloat64 && p.seq_q * (p.heads_q / p.heads_kv) <= kDecodeRows;
}

void decode_forward(const AttentionParams& p, int threads) {
  KvCacheParams d;
  d.q = p.q, d.out = p.out, d.k.rows = p.k, d.v.rows = p.v;
  d.batch = p.batch, d.seq_q = p.seq_q, d.heads_q = p.heads_q, d.heads_kv = p.heads_kv, d.head_dim = p.head_dim,
  d.head_dim_v = p.head_dim_v;
  d.alibi = p.alibi, d.alibi_batch = p.alibi_batch, d.alibi_head = p.alibi_head, d.sinks = static_cast<const float*>(p.sinks);
  d.scale = p.scale, d.softcap = p.softcap, d.causal = p.causal, d.window_left = p.window_left, d.window_right = p.window_right;
  d.bias = p.bias, d.mask = p.mask;
  d.dtype = d.kv_dtype = p.dtype;
  const std::vector<int32_t> lens =
      p.kv_lens ? std::vector<int32_t>(p.kv_lens, p.kv_lens + p.batch) : std::vector<int32_t>(p.batch, static_cast<int32_t>(p.seq_kv));
  d.kv_lens = lens.data();
  d.lse = static_cast<float*>(p.lse.data);

  // All heads of a sequence in one task read [B, S, H, D] in order; heads and then keys are divided where that makes too few tasks.
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  d.rows_per_task = p.seq_q * (p.heads_q / p.heads_kv);
  const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, p.batch), 1, p.heads_kv);
  d.heads_per_task = ceil_div(p.heads_kv, parts);
  const int64_t tasks = p.batch * ceil_div(p.heads_kv, d.heads_per_task);
  d.num_splits = std::clamp<int64_t>(ceil_div(wanted, tasks), 1, std::max<int64_t>(1, p.seq_kv / 256));
  std::vector<float> partial;
  if (d.num_splits > 1) {
    const int64_t rows = d.num_splits * p.batch * p.heads_q * p.seq_q;
    partial.resize(rows * (p.head_dim_v + 1));
    d.partial_out = partial.data(), d.partial_lse = partial.data() + rows * p.head_dim_v;
  }
  cpu::kernels().decode(d, threads);
}

}  // namespace

void attention_forward(TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse, const AttentionOptions& options,
                       Threads threads) {
  const AttentionCall call(q, k, v, out, lse, options);
  const AttentionParams& p = call.params;
  if (out.numel() == 0 && (!lse.defined() || lse.numel() == 0)) return;
  if (call.device.cuda) return cuda::kernels().attention_forward(p, current_stream(call.device));
  // Starting the threads costs microseconds: less than that of work stays on this one.
  const int64_t products = p.batch * p.heads_q * p.seq_q * p.seq_kv * (p.head_dim + p.head_dim_v);
  const int team = products < (int64_t{1} << 17) ? 1 : static_cast<int>(threads);
  if (suits_decode(p, lse))
    decode_forward(p, team);
  else
    cpu::kernels().attention_forward(p, team);
}

void attention_backward(TensorView dout, TensorView dlse, TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse,
                        TensorView dq, TensorView dk, TensorView dv, TensorView dbias, TensorView drel_table, TensorView dsinks,
                        const Allocate& allocate, const AttentionOptions& options, Threads threads) {
  check(lse.defined(), "the backward needs the lse of the forward");
  const AttentionCall call(q, k, v, out, lse, options);
  const AttentionParams& p = call.params;
  const bool varlen = options.cu_q.defined();
  const DType acc = accumulator_of(q.dtype);
  AttentionGrads g;
  g.deterministic = options.deterministic;
  check_like(dout, "dout", out, p.head_dim_v, q.dtype);
  g.dout = rows_of(dout, varlen);
  if (dlse.defined()) {
    check_rank(dlse, "dlse", lse.ndim), check_dtype(dlse, "dlse", acc);
    for (int i = 0; i < lse.ndim; ++i)
      check(dlse.shape[i] == lse.shape[i] && (dlse.shape[i] <= 1 || dlse.stride[i] == lse.stride[i]),
            "dlse must have the sizes and strides of lse");
    g.dlse = dlse.data;
  }
  if (dq.defined()) check_like(dq, "dq", q, p.head_dim, q.dtype), g.dq = rows_of(dq, varlen);
  if (dk.defined()) check_like(dk, "dk", k, p.head_dim, q.dtype), g.dk = rows_of(dk, varlen);
  if (dv.defined()) check_like(dv, "dv", v, p.head_dim_v, q.dtype), g.dv = rows_of(dv, varlen);
  if (dbias.defined()) {
    check(options.bias.defined(), "dbias without bias");
    check_rank(dbias, "dbias", 4), check_dtype(dbias, "dbias", acc), check_contiguous(dbias, "dbias");
    for (int i = 0; i < 4; ++i) check_size(dbias, "dbias", i, options.bias.shape[i]), g.dbias_stride[i] = dbias.broadcast_stride(i);
    g.dbias = dbias.data, g.dbias_numel = dbias.numel();
  }
  if (drel_table.defined()) {
    check(options.rel_table.defined(), "drel_table without a relative bias");
    check_rank(drel_table, "drel_table", 2), check_dtype(drel_table, "drel_table", acc), check_contiguous(drel_table, "drel_table");
    check_size(drel_table, "drel_table", 0, p.rel_num_buckets), check_size(drel_table, "drel_table", 1, p.heads_q);
    g.drel_table = drel_table.data;
  }
  if (dsinks.defined())
    check(p.sinks != nullptr, "dsinks without sinks"), check_vector(dsinks, "dsinks", p.heads_q, acc), g.dsinks = dsinks.data;
  device_of({&q, &dout, &dlse, &dq, &dk, &dv, &dbias, &drel_table, &dsinks});
  if (call.device.cuda) {
    const int64_t bytes = cuda::kernels().attention_backward_workspace(p, g);
    return cuda::kernels().attention_backward(p, g, bytes > 0 ? allocate(bytes) : nullptr, current_stream(call.device));
  }
  if (p.batch == 0 || p.heads_kv == 0) {  // q, k and v are empty; what is broadcast over them has gradient 0
    const size_t size = size_of(acc);
    if (g.dbias) std::memset(g.dbias, 0, g.dbias_numel * size);
    if (g.drel_table) std::memset(g.drel_table, 0, drel_table.numel() * size);
    if (g.dsinks) std::memset(g.dsinks, 0, dsinks.numel() * size);
    return;
  }
  cpu::kernels().attention_backward(p, g, threads);
}

}  // namespace foveate
