// AttentionParams -> the instance and the grid of the forward kernel.
#include <limits>

#include "core/check.h"
#include "cuda/attention_forward.h"
#include "cuda/kernels.h"

namespace foveate::cuda {
namespace {

struct Shape {
  int64_t batch, seq, heads, dim;
};

// Every row begins at a multiple of 16 bytes and fills its last 16, and 32 bits can count the 16-byte units of the whole.
bool suits_vectors(const Rows& x, const Shape& shape, DType dtype) {
  const int64_t unit = 16 / size_of(dtype);
  int64_t last = 0;
  for (const auto& [size, stride] : {std::pair{shape.batch, x.batch}, {shape.seq, x.seq}, {shape.heads, x.head}}) {
    if (size <= 1) continue;
    if (stride % unit != 0) return false;
    last += (size - 1) * stride;
  }
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && shape.dim % unit == 0 && last / unit < std::numeric_limits<uint32_t>::max();
}

// What only the general instance can do; fp32 has no other. Options on scores include a scale <= 0, since the maximum is taken before the
// scale.
bool is_general(const AttentionParams& p, bool vector_loads) {
  return has_score_options(p) || p.block_table || !vector_loads || p.dtype == DType::kFloat32;
}

}  // namespace

void attention_forward(const AttentionParams& p, Stream stream) {
  check(p.kv_dtype == p.dtype, "the CUDA attention kernel takes keys of the queries' type ", name(p.dtype), ", not ", name(p.kv_dtype));
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
        "the CUDA attention kernel takes float32, bfloat16 and float16, not ", name(p.dtype));
  check(p.head_dim <= kMaxHeadDim && p.head_dim_v <= kMaxHeadDim, "head dims ", p.head_dim, " and ", p.head_dim_v, " exceed the limit of ",
        kMaxHeadDim);
  if (p.batch == 0 || p.heads_q == 0 || p.seq_q == 0) return;
  ForwardParams f{};
  f.attention = p;
  if (p.block_table && p.pages == 0) f.attention.seq_kv = 0;  // whatever kv_lens says
  f.score = score_params(p);
  const bool varlen = p.cu_q != nullptr;
  const Shape q{p.batch, varlen ? p.total_q : p.seq_q, p.heads_q, p.head_dim};
  const Shape k{p.block_table ? p.pages : p.batch, varlen ? p.total_k : p.block_table ? p.page_size : p.seq_kv, p.heads_kv, p.head_dim};
  const Shape v{k.batch, k.seq, k.heads, p.head_dim_v}, out{q.batch, q.seq, q.heads, p.head_dim_v};
  f.vector_loads = suits_vectors(p.q, q, p.dtype) && suits_vectors(p.k, k, p.dtype) && suits_vectors(p.v, v, p.dtype);
  f.vector_stores = suits_vectors(p.out, out, p.dtype);

  const bool general = is_general(p, f.vector_loads);
  f.score_options = has_score_options(p);
  f.logit = f.score_options ? 1.0f : f.score.scale;
  f.factor = f.score_options ? static_cast<float>(kLog2e) : f.score.scale_log2;

  const int64_t group = p.heads_q / p.heads_kv;
  const HeadDims dims = forward_dims(p.head_dim, p.head_dim_v, general);
  const int rows = forward_tile(dims, general, static_cast<int>(size_of(p.dtype))).rows;
  f.packed = general ? 1 : packed_heads(p.seq_q, group, rows);
  f.packed_inverse = inverse_of(f.packed);
  const int64_t bytes = p.seq_kv * (p.head_dim + p.head_dim_v) * size_of(p.dtype);
  f.grid = forward_grid(p.batch * p.heads_q / f.packed, p.seq_q * f.packed, rows, bytes * f.packed / group);
  check(f.grid.blocks() <= std::numeric_limits<int32_t>::max(), "attention of ", p.batch, " x ", p.heads_q, " heads with ", p.seq_q,
        " queries each takes ", f.grid.blocks(), " blocks, more than a CUDA grid has; split the batch");

  if (p.dtype == DType::kBFloat16) return attention_forward_bf16(f, general, stream);
  if (p.dtype == DType::kFloat16) return attention_forward_f16(f, general, stream);
  attention_forward_f32(f, stream);
}

}  // namespace foveate::cuda
