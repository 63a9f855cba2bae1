// The instances of the forward kernel, one source file for each type so that they compile side by side.
#pragma once

#include "cuda/attention/forward_params.cuh"
#include "cuda/host/stream.h"

namespace foveate::cuda {

void attention_forward_bf16(const ForwardParams& f, ForwardKind kind, Stream stream);
void attention_forward_f16(const ForwardParams& f, ForwardKind kind, Stream stream);
void attention_forward_f32(const ForwardParams& f, Stream stream);

}  // namespace foveate::cuda
