// Copies of whole pages inside a paged KV cache, in every layer: what a forked sequence needs before it writes to a page that it shares.
#pragma once

#include "core/tensor.h"

namespace foveate {

constexpr int kMaxPageCopies =
    64;  // of one launch: the page numbers travel with its parameters, so that the host copies nothing to the GPU

struct CopyPagesParams {
  void* pool;  // [layers, pages, page_bytes]
  int64_t layers, pages, page_bytes;
  int copies;
  int32_t from[kMaxPageCopies], to[kMaxPageCopies];  // no page is in both
};

}  // namespace foveate
