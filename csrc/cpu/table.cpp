#include "cpu/kernels.h"

namespace foveate::cpu::FOVEATE_ISA {

void rms_norm_forward(const RmsNormParams&, int threads);

extern const Kernels table;
const Kernels table{
    .rms_norm_forward = rms_norm_forward,
};

}  // namespace foveate::cpu::FOVEATE_ISA
