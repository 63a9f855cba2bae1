// AttentionParams -> the instance and the grid of the forward kernel.
#include <bit>
#include <limits>

#include "core/check.h"
#include "cuda/attention/alignment.h"
#include "cuda/attention/forward.h"
#include "cuda/host/kernels.h"

namespace foveate::cuda {
void attention_forward(const AttentionParams& p, Stream stream) {
  check(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
        "the CUDA attention kernel takes float32, bfloat16 and float16, not ", name(p.dtype));
  check(p.head_dim <= kMaxCudaHeadDim && p.head_dim_v <= kMaxCudaHeadDim, "head dims ", p.head_dim, " and ", p.head_dim_v,
        " exceed the limit of ", kMaxCudaHeadDim);
  if (p.batch == 0 || p.heads_q == 0 || p.seq_q == 0) return;
  ForwardParams f{};
  f.attention = p;
  if (p.block_table && p.pages == 0) f.attention.seq_kv = 0;  // whatever kv_lens says
  f.score = score_params(p);
  const bool varlen = p.cu_q != nullptr;
  const RowShape q{p.batch, varlen ? p.total_q : p.seq_q, p.heads_q, p.head_dim};
  const RowShape k{p.block_table ? p.pages : p.batch, varlen ? p.total_k : p.block_table ? p.page_size : p.seq_kv, p.heads_kv, p.head_dim};
  const RowShape v{k.batch, k.seq, k.heads, p.head_dim_v}, out{q.batch, q.seq, q.heads, p.head_dim_v};
  f.vector_loads = suits_vectors(p.q, q, p.dtype) && suits_vectors(p.k, k, p.dtype) && suits_vectors(p.v, v, p.dtype);
  f.vector_stores = suits_vectors(p.out, out, p.dtype);

  const int size = static_cast<int>(size_of(p.dtype));
  const ForwardKind kind = forward_kind(needs_general_kernel(p), f.vector_loads, size, p.block_table ? p.page_size : 0);
  f.page_shift = kind == ForwardKind::kPaged ? std::countr_zero(static_cast<uint32_t>(p.page_size)) : 0;
  f.score_options = needs_general_kernel(p);
  f.logit = f.score_options ? 1.0f : f.score.scale;
  f.factor = f.score_options ? static_cast<float>(kLog2e) : f.score.scale_log2;

  const int64_t group = p.heads_q / p.heads_kv;
  const HeadDims dims = forward_dims(p.head_dim, p.head_dim_v, kind);
  const int rows = forward_tile(dims, kind, size).rows;
  f.group = static_cast<int>(group);
  f.packed = kind == ForwardKind::kGeneral ? 1 : packed_heads(p.seq_q, group, rows);
  f.packed_inverse = inverse_of(f.packed);
  const int64_t bytes = p.seq_kv * (p.head_dim + p.head_dim_v) * size;
  f.grid = forward_grid(p.batch * p.heads_q / f.packed, p.seq_q * f.packed, rows, bytes * f.packed / group);
  check(f.grid.blocks() <= std::numeric_limits<int32_t>::max(), "attention of ", p.batch, " x ", p.heads_q, " heads with ", p.seq_q,
        " queries each takes ", f.grid.blocks(), " blocks, more than a CUDA grid has; split the batch");

  if (p.dtype == DType::kBFloat16) return attention_forward_bf16(f, kind, stream);
  if (p.dtype == DType::kFloat16) return attention_forward_f16(f, kind, stream);
  attention_forward_f32(f, stream);
}

}  // namespace foveate::cuda
