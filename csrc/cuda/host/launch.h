// The only way to launch a kernel:
//
//   template <class T> __global__ void __launch_bounds__(128) kernel(const __grid_constant__ Params p);
//   launch<kernel<bf16>>(grid, block, smem_bytes, stream, params);
//
// A grid without blocks launches nothing. Errors are thrown as std::runtime_error (RuntimeError in Python). No host synchronisation and no
// allocation, so a launch can be captured in a CUDA graph.
#pragma once

#include "cuda/host/stream.h"
#include "launch_impl.h"
