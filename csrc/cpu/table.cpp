#include "cpu/kernels.h"

namespace foveate::cpu::FOVEATE_ISA {

void attention_forward(const AttentionParams&, int threads);
void attention_backward(const AttentionParams&, const AttentionGrads&, int threads);
void kv_append(const KvCacheParams&, int threads);
void decode(const KvCacheParams&, int threads);
void rotate_queries(const KvCacheParams&, void* out, int threads);
void linear(const LinearParams&, int threads);
void linear_share(const LinearParams&, const Team&, char* scratch);
void packed_rows(const PackedRowsParams&, int threads);
void norm_rows(const NormRowsParams&, int threads);
void rms_norm_forward(const RmsNormParams&, int threads);
void rms_norm_backward(const RmsNormBackwardParams&, int threads);
void softmax_forward(const SoftmaxParams&, int threads);
void softmax_backward(const SoftmaxBackwardParams&, int threads);
void cross_entropy_forward(const CrossEntropyParams&, int threads);
void cross_entropy_backward(const CrossEntropyParams&, int threads);
void rotary(const RotaryParams&, int threads);
int64_t multiply_add(const MultiplyAddParams&, int threads);
void read_memory(const ReadParams&, int threads);
void copy_memory(const CopyParams&, int threads);

extern const Kernels table;
const Kernels table{
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .kv_append = kv_append,
    .decode = decode,
    .rotate_queries = rotate_queries,
    .linear = linear,
    .linear_share = linear_share,
    .packed_rows = packed_rows,
    .norm_rows = norm_rows,
    .rms_norm_forward = rms_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .softmax_forward = softmax_forward,
    .softmax_backward = softmax_backward,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward,
    .rotary = rotary,
    .multiply_add = multiply_add,
    .read_memory = read_memory,
    .copy_memory = copy_memory,
};

}  // namespace foveate::cpu::FOVEATE_ISA
