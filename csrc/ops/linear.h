// Products with packed weights: views -> checks -> LinearParams -> kernels.
#pragma once

#include <string>

#include "contract/linear.h"
#include "core/tensor.h"

namespace foveate {

// The bytes of `data` as a weight; checks its size. bias may be undefined.
PackedWeight packed_weight(TensorView data, TensorView bias, const std::string& format, int64_t in, int64_t out);

void packed_linear(TensorView x, TensorView data, const std::string& format, TensorView bias, TensorView out, Threads threads);
void packed_rows(TensorView data, const std::string& format, int64_t in, int64_t out_features, TensorView ids, TensorView out,
                 Threads threads);

}  // namespace foveate
