#include "cpu/kernels.h"

namespace foveate::cpu::FOVEATE_ISA {

void kv_append(const KvCacheParams&, int threads);
void decode(const KvCacheParams&, int threads);
void rms_norm_forward(const RmsNormParams&, int threads);

extern const Kernels table;
const Kernels table{
    .kv_append = kv_append,
    .decode = decode,
    .rms_norm_forward = rms_norm_forward,
};

}  // namespace foveate::cpu::FOVEATE_ISA
