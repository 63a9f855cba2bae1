#include "ops/copy_pages.h"

#include <algorithm>
#include <cstring>

#include "ops/device.h"

namespace foveate {
namespace {

void copy_on_cpu(const CopyPagesParams& p) {
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    char* pages = static_cast<char*>(p.pool) + layer * p.pages * p.page_bytes;
    for (int i = 0; i < p.copies; ++i)
      std::memcpy(pages + p.to[i] * p.page_bytes, pages + p.from[i] * p.page_bytes, static_cast<size_t>(p.page_bytes));
  }
}

}  // namespace

void copy_pages(TensorView pool, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
  check(pool.ndim >= 2, "pool has ", pool.ndim, " dimensions, expected [layers, pages, ...]");
  expect(pool, "pool").contiguous();
  check(from.size() == to.size(), from.size(), " pages to read and ", to.size(), " to write");
  for (const int64_t page : from) check(page >= 0 && page < pool.shape[1], "page ", page, " is outside 0..", pool.shape[1] - 1);
  for (const int64_t page : to) {
    check(page >= 0 && page < pool.shape[1], "page ", page, " is outside 0..", pool.shape[1] - 1);
    check(std::find(from.begin(), from.end(), page) == from.end(), "page ", page, " would be read and written");
  }
  if (pool.numel() == 0) return;
  CopyPagesParams p{};
  p.pool = pool.data;
  p.layers = pool.shape[0];
  p.pages = pool.shape[1];
  p.page_bytes = pool.numel() / (p.layers * p.pages) * size_of(pool.dtype);
  const CallDevice device = device_of({&pool});
  for (size_t first = 0; first < from.size(); first += kMaxPageCopies) {
    p.copies = static_cast<int>(std::min<size_t>(kMaxPageCopies, from.size() - first));
    std::copy_n(from.begin() + static_cast<int64_t>(first), p.copies, p.from);
    std::copy_n(to.begin() + static_cast<int64_t>(first), p.copies, p.to);
    if (device.cuda)
      cuda::kernels().copy_pages(p, current_stream(device));
    else
      copy_on_cpu(p);
  }
}

}  // namespace foveate
