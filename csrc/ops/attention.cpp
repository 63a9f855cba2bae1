// Operands -> memory checks -> params. Python has checked the meaning (which options, which shapes broadcast); what is checked here is what
// could make a kernel touch memory that is not the tensors'.
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

// [B, S, H, D], or [total, H, D] with batch stride 0.
Rows rows_of(const TensorView& t, bool varlen) {
  if (varlen) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// As `other`, with rows of `last` elements.
void check_like(const TensorView& t, const char* what, const TensorView& other, int64_t last, DType dtype) {
  expect(t, what).rank(other.ndim);
  for (int i = 0; i + 1 < other.ndim; ++i) expect(t, what).size(i, other.shape[i]);
  expect(t, what).size(other.ndim - 1, last).dtype(dtype).last_contiguous();
}

ScoreOperand score_operand(const TensorView& t, const char* what, const AttentionParams& p) {
  if (!t.defined()) return {};
  expect(t, what).rank(4);
  const int64_t full[4] = {p.batch, p.heads_q, p.seq_q, p.seq_kv};
  ScoreOperand s{t.data, t.dtype, {}};
  for (int i = 0; i < 4; ++i) {
    check(t.shape[i] == full[i] || t.shape[i] == 1, what, " has size ", t.shape[i], " in dimension ", i, ", which does not broadcast to ",
          full[i]);
    s.stride[i] = t.broadcast_stride(i);
  }
  return s;
}

// Lengths come as int32 or int64. What fits int32 after `valid` has looked at it is kept for the life of the call. On a GPU they come as
// int32 and nobody looks at them.
class LengthReader {
 public:
  template <class Valid>
  const int32_t* read(const TensorView& t, const char* what, int64_t size, const CallDevice& device, const Valid& valid) {
    expect(t, what).rank(1).size(0, size).contiguous();
    if (!device.readable) expect(t, what).dtype(DType::kInt32);
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

const int32_t* read_cu_seqlens(LengthReader& lengths, const TensorView& t, const char* what, int64_t batch, int64_t total, int64_t longest,
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
class AttentionCall {
 public:
  AttentionCall(const AttentionOperands& o, const TensorView& rel_buckets, const TensorView& out, const TensorView& lse);

  CallDevice device;
  AttentionParams params;

 private:
  void read_sizes(const TensorView& out);
  void read_sequences();
  void read_lse(const TensorView& lse, int64_t queries);
  void read_score_operands();
  void read_relative_bias(const TensorView& buckets);
  void read_dropout();
  void read_scalars();

  const AttentionOperands& o_;
  bool varlen_;
  LengthReader kv_lens_, cu_q_, cu_k_;
};

AttentionCall::AttentionCall(const AttentionOperands& o, const TensorView& rel_buckets, const TensorView& out, const TensorView& lse)
    : o_(o), varlen_(o.cu_q.defined()) {
  device = device_of({&o.q, &o.k, &o.v, &out, &lse, &o.bias, &o.mask, &o.alibi, &o.rel_table, &rel_buckets, &o.sinks, &o.kv_lens, &o.cu_q,
                      &o.cu_k, &o.philox});
  read_sizes(out);
  read_sequences();
  if (lse.defined()) read_lse(lse, varlen_ ? o.q.shape[0] : params.seq_q);
  read_score_operands();
  if (o.rel_table.defined()) read_relative_bias(rel_buckets);
  if (o.sinks.defined()) {
    expect(o.sinks, "sinks").shape({params.heads_q}).dtype(accumulator_of(params.dtype)).contiguous();
    params.sinks = o.sinks.data;
  }
  if (o.kv_lens.defined())
    params.kv_lens = kv_lens_.read(o.kv_lens, "kv_lens", params.batch, device, [&](int64_t b, int64_t value) {
      check(value >= 0 && value <= params.seq_kv, "kv_lens[", b, "] = ", value, " is outside 0..", params.seq_kv,
            ", the number of keys in k");
    });
  read_dropout();
  read_scalars();
}

void AttentionCall::read_sizes(const TensorView& out) {
  AttentionParams& p = params;
  const TensorView &q = o_.q, &k = o_.k, &v = o_.v;
  const int ndim = varlen_ ? 3 : 4;
  for (const auto& [t, what] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}})
    expect(*t, what).rank(ndim).floating().last_contiguous().dtype(q.dtype);
  p.dtype = q.dtype;
  p.heads_q = q.shape[ndim - 2];
  p.heads_kv = k.shape[ndim - 2];
  p.head_dim = q.shape[ndim - 1];
  p.head_dim_v = v.shape[ndim - 1];
  check(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0, "q has ", p.heads_q, " heads, k has ", p.heads_kv,
        ", which does not divide them");
  const int64_t most = device.cuda ? kMaxCudaHeadDim : kMaxHeadDim;
  check(p.head_dim <= most && p.head_dim_v <= most, "head dims ", p.head_dim, " and ", p.head_dim_v, " exceed the limit of ", most);
  expect(k, "k").size(ndim - 1, p.head_dim);
  for (int i = 0; i + 1 < ndim; ++i) expect(v, "v").size(i, k.shape[i]);
  check_like(out, "out", q, p.head_dim_v, q.dtype);
  p.q = rows_of(q, varlen_);
  p.k = rows_of(k, varlen_);
  p.v = rows_of(v, varlen_);
  p.out = rows_of(out, varlen_);
}

void AttentionCall::read_sequences() {
  AttentionParams& p = params;
  const TensorView &q = o_.q, &k = o_.k;
  if (!varlen_) {
    p.batch = q.shape[0];
    p.seq_q = q.shape[1];
    p.seq_kv = k.shape[1];
    expect(k, "k").size(0, p.batch);
    return;
  }
  check(o_.cu_k.defined() && o_.cu_q.ndim == 1 && o_.cu_k.ndim == 1 && o_.cu_q.shape[0] >= 1 && o_.cu_k.shape[0] == o_.cu_q.shape[0],
        "cu_seqlens_q and cu_seqlens_k must both be [batch + 1]");
  p.batch = o_.cu_q.shape[0] - 1;
  p.seq_q = o_.max_q;
  p.seq_kv = o_.max_k;
  p.total_q = q.shape[0];
  p.total_k = k.shape[0];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.seq_q >= 0 && p.seq_kv >= 0 && p.seq_q <= kMost && p.seq_kv <= kMost, "max_seqlen_q = ", p.seq_q,
        " and max_seqlen_k = ", p.seq_kv, " must be within 0..", kMost);
  p.cu_q = read_cu_seqlens(cu_q_, o_.cu_q, "cu_seqlens_q", p.batch, p.total_q, p.seq_q, device);
  p.cu_k = read_cu_seqlens(cu_k_, o_.cu_k, "cu_seqlens_k", p.batch, p.total_k, p.seq_kv, device);
  if (!o_.rel_table.defined() && device.readable) {  // the table of buckets has max_seqlen's size
    p.seq_q = longest_of(p.cu_q, p.batch), p.seq_kv = longest_of(p.cu_k, p.batch);
  }
  check(!o_.bias.defined() && !o_.mask.defined() && !o_.kv_lens.defined(), "bias, mask and kv_lens have no meaning in a packed batch");
}

void AttentionCall::read_lse(const TensorView& lse, int64_t queries) {
  const int ndim = varlen_ ? 2 : 3;
  expect(lse, "lse").rank(ndim).dtype(accumulator_of(params.dtype)).last_contiguous();
  if (!varlen_) expect(lse, "lse").size(0, params.batch);
  expect(lse, "lse").size(ndim - 2, params.heads_q).size(ndim - 1, queries);
  params.lse = {lse.data, varlen_ ? 0 : lse.stride[0], 1, lse.stride[ndim - 2]};
}

void AttentionCall::read_score_operands() {
  AttentionParams& p = params;
  p.bias = score_operand(o_.bias, "bias", p);
  if (o_.bias.defined())
    check(static_cast<int>(o_.bias.dtype) <= static_cast<int>(DType::kBFloat16), "bias is ", name(o_.bias.dtype),
          ", expected a float type");
  p.mask = score_operand(o_.mask, "mask", p);
  if (o_.mask.defined()) expect(o_.mask, "mask").dtype(DType::kBool);
  if (!o_.alibi.defined()) return;
  expect(o_.alibi, "alibi_slopes").rank(2).dtype(DType::kFloat32).size(1, p.heads_q);
  check(o_.alibi.shape[0] == 1 || o_.alibi.shape[0] == p.batch, "alibi_slopes has ", o_.alibi.shape[0], " rows for a batch of ", p.batch);
  p.alibi = o_.alibi.as<const float>();
  p.alibi_batch = o_.alibi.broadcast_stride(0);
  p.alibi_head = o_.alibi.stride[1];
}

void AttentionCall::read_relative_bias(const TensorView& buckets) {
  AttentionParams& p = params;
  expect(o_.rel_table, "relative bias table").rank(2).dtype(accumulator_of(p.dtype)).contiguous().size(1, p.heads_q);
  p.rel_num_buckets = static_cast<int>(o_.rel_table.shape[0]);
  const int64_t distances = p.seq_q + p.seq_kv > 0 ? p.seq_q + p.seq_kv - 1 : 0;
  expect(buckets, "relative buckets").shape({distances}).dtype(DType::kInt32).contiguous();
  for (int64_t i = 0; i < distances && device.readable; ++i) {
    const int32_t bucket = buckets.as<int32_t>()[i];
    check(bucket >= 0 && bucket < p.rel_num_buckets, "relative bucket ", bucket, " is outside the table of ", p.rel_num_buckets);
  }
  p.rel_table = o_.rel_table.data;
  p.rel_buckets = buckets.as<int32_t>();
}

void AttentionCall::read_dropout() {
  AttentionParams& p = params;
  check(o_.dropout_p >= 0 && o_.dropout_p < 1, "dropout_p = ", o_.dropout_p, " is outside [0, 1)");
  if (o_.dropout_p == 0) return;
  check(o_.philox.defined(), "dropout needs its seed and offset");
  expect(o_.philox, "philox").shape({2}).dtype(DType::kInt64).contiguous();
  p.dropout_p = o_.dropout_p;
  p.philox = o_.philox.as<const int64_t>();
  if (device.readable) {
    p.philox_seed = static_cast<uint64_t>(p.philox[0]);
    p.philox_offset = static_cast<uint32_t>(p.philox[1]);
  }
}

void AttentionCall::read_scalars() {
  AttentionParams& p = params;
  check(std::isfinite(o_.scale) && std::isfinite(o_.softcap) && o_.softcap >= 0, "scale = ", o_.scale, " and softcap = ", o_.softcap,
        " must be finite, softcap not negative");
  p.scale = o_.scale;
  p.softcap = o_.softcap;
  p.causal = o_.causal;
  p.window_left = usable_window(o_.window_left);
  p.window_right = usable_window(o_.window_right);
}

// Few queries for each KV head and nothing but what the decode kernel knows, divided as ops/attention/plan.py says.
void decode_forward(const AttentionParams& p, const Division& division, int threads) {
  check(!p.cu_q && !p.rel_table && p.dropout_p == 0 && p.dtype != DType::kFloat64 && p.seq_kv <= std::numeric_limits<int32_t>::max(),
        "the plan asks for the decode kernel, which takes no cu_seqlens, relative bias, dropout or float64");
  KvCacheParams d;
  static_cast<AttentionProblem&>(d) = p;
  d.kv_dtype = p.dtype;
  set_division(d, division);
  check(d.num_splits == 1 || d.num_splits <= p.seq_kv, d.num_splits, " splits are more than the ", p.seq_kv, " keys");
  std::vector<float> partial;
  if (d.num_splits > 1) {
    const int64_t rows = d.num_splits * p.batch * p.heads_q * p.seq_q;
    partial.resize(rows * (p.head_dim_v + 1));
    d.partial_out = partial.data();
    d.partial_lse = partial.data() + rows * p.head_dim_v;
  }
  cpu::kernels().decode(d, threads);
}

// ---- gradients ---------------------------------------------------------------------------------------------------------------

AttentionGrads read_output_grads(const AttentionParams& p, const TensorView& dout, const TensorView& dlse, const TensorView& out,
                                 const TensorView& lse) {
  AttentionGrads g;
  check_like(dout, "dout", out, p.head_dim_v, p.dtype);
  g.dout = rows_of(dout, dout.ndim == 3);
  if (!dlse.defined()) return g;
  expect(dlse, "dlse").rank(lse.ndim).dtype(accumulator_of(p.dtype));
  for (int i = 0; i < lse.ndim; ++i)
    check(dlse.shape[i] == lse.shape[i] && (dlse.shape[i] <= 1 || dlse.stride[i] == lse.stride[i]),
          "dlse must have the sizes and strides of lse");
  g.dlse = dlse.data;
  return g;
}

// The gradient of q, k or v.
Rows read_grad(const TensorView& grad, const char* what, const TensorView& of, DType dtype) {
  check_like(grad, what, of, of.shape[of.ndim - 1], dtype);
  return rows_of(grad, grad.ndim == 3);
}

void read_option_grads(AttentionGrads& g, const AttentionParams& p, const AttentionGradOperands& grads, const AttentionOperands& o) {
  const DType acc = accumulator_of(p.dtype);
  const TensorView &dbias = grads.bias, &drel_table = grads.rel_table, &dsinks = grads.sinks;
  if (dbias.defined()) {
    check(o.bias.defined(), "dbias without bias");
    expect(dbias, "dbias").rank(4).dtype(acc).contiguous();
    for (int i = 0; i < 4; ++i) {
      expect(dbias, "dbias").size(i, o.bias.shape[i]);
      g.dbias_stride[i] = dbias.broadcast_stride(i);
    }
    g.dbias = dbias.data;
    g.dbias_numel = dbias.numel();
  }
  if (drel_table.defined()) {
    check(o.rel_table.defined(), "drel_table without a relative bias");
    expect(drel_table, "drel_table").rank(2).dtype(acc).contiguous().size(0, p.rel_num_buckets).size(1, p.heads_q);
    g.drel_table = drel_table.data;
  }
  if (dsinks.defined()) {
    check(p.sinks != nullptr, "dsinks without sinks");
    expect(dsinks, "dsinks").shape({p.heads_q}).dtype(acc).contiguous();
    g.dsinks = dsinks.data;
  }
}

// q, k and v are empty: what is broadcast over them has gradient 0.
void zero_option_grads(const AttentionGrads& g, const AttentionParams& p) {
  const size_t size = size_of(accumulator_of(p.dtype));
  if (g.dbias) std::memset(g.dbias, 0, g.dbias_numel * size);
  if (g.drel_table) std::memset(g.drel_table, 0, p.rel_num_buckets * p.heads_q * size);
  if (g.dsinks) std::memset(g.dsinks, 0, p.heads_q * size);
}

}  // namespace

void attention_forward(const AttentionOperands& operands, TensorView rel_buckets, TensorView out, TensorView lse, const DecodePlan& plan,
                       Threads threads) {
  const AttentionCall call(operands, rel_buckets, out, lse);
  const AttentionParams& p = call.params;
  if (out.numel() == 0 && (!lse.defined() || lse.numel() == 0)) return;
  if (call.device.cuda) return cuda::kernels().attention_forward(p, current_stream(call.device));
  if (plan.blocked) return cpu::kernels().attention_forward(p, threads);
  decode_forward(p, plan, threads);
}

void attention_backward(const AttentionOperands& operands, TensorView rel_buckets, TensorView dout, TensorView dlse, TensorView out,
                        TensorView lse, const AttentionGradOperands& grads, const Allocate& allocate, Threads threads) {
  check(lse.defined(), "the backward needs the lse of the forward");
  const AttentionCall call(operands, rel_buckets, out, lse);
  const AttentionParams& p = call.params;
  AttentionGrads g = read_output_grads(p, dout, dlse, out, lse);
  g.deterministic = operands.deterministic;
  if (grads.q.defined()) g.dq = read_grad(grads.q, "dq", operands.q, p.dtype);
  if (grads.k.defined()) g.dk = read_grad(grads.k, "dk", operands.k, p.dtype);
  if (grads.v.defined()) g.dv = read_grad(grads.v, "dv", operands.v, p.dtype);
  read_option_grads(g, p, grads, operands);
  device_of({&operands.q, &dout, &dlse, &grads.q, &grads.k, &grads.v, &grads.bias, &grads.rel_table, &grads.sinks});
  if (call.device.cuda) {
    const int64_t bytes = cuda::kernels().attention_backward_workspace(p, g);
    return cuda::kernels().attention_backward(p, g, bytes > 0 ? allocate(bytes) : nullptr, current_stream(call.device));
  }
  if (p.batch == 0 || p.heads_kv == 0) return zero_option_grads(g, p);
  cpu::kernels().attention_backward(p, g, threads);
}

}  // namespace foveate
