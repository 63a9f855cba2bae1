// Copies pages of a KV cache: 16 bytes of a page for each thread and access, where the size of a page allows.
#include "cuda/host/kernels.h"
#include "cuda/rows/row.cuh"

namespace foveate::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;  // accesses that a thread has under way

// A block copies kThreads * kUnroll words of one page of one layer.
template <class Word>
__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const __grid_constant__ CopyPagesParams p) {
  const int64_t words = p.page_bytes / static_cast<int64_t>(sizeof(Word)), blocks = (words + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  const int64_t page = blockIdx.x / blocks, layer = page / p.copies, copy = page % p.copies;
  const int64_t first = blockIdx.x % blocks * (kThreads * kUnroll) + threadIdx.x;
  const auto at = [&](int32_t index) { return static_cast<char*>(p.pool) + (layer * p.pages + index) * p.page_bytes; };
  const char* from = at(p.from[copy]);
  char* to = at(p.to[copy]);
  Word word[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (const int64_t w = first + u * kThreads; w < words) word[u] = dev::ld_global<Word>(from + w * static_cast<int64_t>(sizeof(Word)));
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (const int64_t w = first + u * kThreads; w < words) dev::st_global(to + w * static_cast<int64_t>(sizeof(Word)), word[u]);
}

template <class Word>
void copy_words(const CopyPagesParams& p, Stream stream) {
  const int64_t blocks = ceil_div<int64_t>(p.page_bytes / static_cast<int64_t>(sizeof(Word)), kThreads * kUnroll) * p.layers * p.copies;
  check(blocks <= INT32_MAX, "copies of ", p.copies, " pages in ", p.layers, " layers take ", blocks, " blocks, a grid has at most ",
        INT32_MAX);
  launch<copy_pages_kernel<Word>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}

}  // namespace

void copy_pages(const CopyPagesParams& p, Stream stream) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.pool)) | p.page_bytes;
  if (bits % 16 == 0)
    copy_words<uint4>(p, stream);
  else if (bits % 4 == 0)
    copy_words<uint32_t>(p, stream);
  else
    copy_words<uint8_t>(p, stream);
}

}  // namespace foveate::cuda
