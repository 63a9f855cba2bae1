#include "cpu/dispatch/kernels.h"

// A target that differs from another one (FOVEATE_BASE) in few kernels compiles only these and takes the rest from there: what it declares
// itself hides what it sees through the using-directive.
#if defined(FOVEATE_BASE)
namespace foveate::cpu::FOVEATE_BASE {
#include "cpu/dispatch/functions.inl.h"
}
#endif

namespace foveate::cpu::FOVEATE_ISA {

#if defined(FOVEATE_BASE)
using namespace FOVEATE_BASE;
void linear(const LinearParams&, int threads);
void linear_share(const LinearParams&, const Team&, char* scratch);
void grouped_linear(const GroupedLinearParams&, int threads);
void grouped_linear_share(const GroupedLinearParams&, const Team&, char* scratch);
void packed_rows(const PackedRowsParams&, int threads);
void norm_rows(const NormRowsParams&, int threads);
#if defined(FOVEATE_TILES)
void attention_forward(const AttentionParams&, int threads);
void attention_backward(const AttentionParams&, const AttentionGrads&, int threads);
int64_t multiply_add(const MultiplyAddParams&, int threads);
void read_memory(const ReadParams&, int threads);
void copy_memory(const CopyParams&, int threads);
#endif
#else
#include "cpu/dispatch/functions.inl.h"
#endif

extern const Kernels table;
const Kernels table{
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .kv_append = kv_append,
    .decode = decode,
    .rotate_queries = rotate_queries,
    .linear = linear,
    .linear_share = linear_share,
    .grouped_linear = grouped_linear,
    .grouped_linear_share = grouped_linear_share,
    .packed_rows = packed_rows,
    .norm_rows = norm_rows,
    .norm_heads = norm_heads,
    .glu_forward = glu_forward,
    .glu_backward = glu_backward,
    .rms_norm_forward = rms_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .softmax_forward = softmax_forward,
    .softmax_backward = softmax_backward,
    .softmax_columns_forward = softmax_columns_forward,
    .softmax_columns_backward = softmax_columns_backward,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward,
    .rotary = rotary,
    .multiply_add = multiply_add,
    .read_memory = read_memory,
    .copy_memory = copy_memory,
};

}  // namespace foveate::cpu::FOVEATE_ISA
