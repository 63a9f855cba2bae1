// Copies of whole pages inside a paged KV cache, in every layer: what a forked sequence needs before it writes to a page that it shares.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace foveate {

constexpr int kMaxPageCopies = 64;  // of one launch: the numbers travel with its parameters, so that the host copies nothing to the GPU

struct CopyPagesParams {
  void* pool;  // [layers, pages, page_bytes]
  int64_t layers, pages, page_bytes;
  int copies;
  int32_t from[kMaxPageCopies], to[kMaxPageCopies];  // no page is in both
};

// pool: [layers, pages, ...], contiguous. Page to[i] becomes a copy of page from[i].
void copy_pages(TensorView pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to);

}  // namespace foveate
