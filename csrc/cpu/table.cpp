#include "cpu/kernels.h"

namespace foveate::cpu::FOVEATE_ISA {

void attention_forward(const AttentionParams&, int threads);
void attention_backward(const AttentionParams&, const AttentionGrads&, int threads);
void rms_norm_forward(const RmsNormParams&, int threads);

extern const Kernels table;
const Kernels table{
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .rms_norm_forward = rms_norm_forward,
};

}  // namespace foveate::cpu::FOVEATE_ISA
