// Copies of pages inside a paged KV cache: views -> checks -> CopyPagesParams -> kernels.
#pragma once

#include <vector>

#include "contract/copy_pages.h"
#include "core/tensor.h"

namespace foveate {

// pool: [layers, pages, ...], contiguous. Page to[i] becomes a copy of page from[i].
void copy_pages(TensorView pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to);

}  // namespace foveate
