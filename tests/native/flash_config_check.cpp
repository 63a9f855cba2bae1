// Prints what csrc/cuda/attention/config.h decides, for tests/cuda_kernels/test_cuda_config.py: one line of numbers after the name of each decision.
#include <cstdio>

#include "cuda/kv_cache/decode_layout.h"
#include "cuda/attention/config.h"

using namespace foveate::cuda;

namespace {

void print_tile(HeadDims dims, ForwardKind kind, int element_bytes) {
  const ForwardTile t = forward_tile(dims, kind, element_bytes);
  std::printf("tile %d %d %d %d %d %d %d %d %d\n", dims.d, dims.dv, static_cast<int>(kind), element_bytes, t.rows_per_warp, t.rows, t.keys,
              t.shared_bytes, t.blocks_per_sm);
}

void print_grid(int64_t heads, int64_t rows_per_head, int rows, int64_t bytes_per_head) {
  const ForwardGrid g = forward_grid(heads, rows_per_head, rows, bytes_per_head);
  std::printf("grid %lld %d %d", static_cast<long long>(heads), g.tiles, g.section);
  for (int block = 0; block < g.blocks(); ++block) std::printf(" %d %d", forward_block(g, block).head, forward_block(g, block).tile);
  std::printf("\n");
}

}  // namespace

int main() {
  for (const HeadDims& dims : kForwardDims) print_tile(dims, ForwardKind::kPlain, 2), print_tile(dims, ForwardKind::kPaged, 2);
  for (const HeadDims& dims : kGeneralForwardDims) print_tile(dims, ForwardKind::kGeneral, 2), print_tile(dims, ForwardKind::kGeneral, 4);
  for (const ForwardKind kind : {ForwardKind::kPlain, ForwardKind::kPaged, ForwardKind::kGeneral})
    for (int d = 0; d <= 256; d += 8)
      for (int dv = 0; dv <= 256; dv += 8) {
        const HeadDims dims = forward_dims(d, dv, kind);
        std::printf("dims %d %d %d %d %d\n", static_cast<int>(kind), d, dv, dims.d, dims.dv);
      }
  for (const int options : {0, 1})
    for (const int vector_loads : {0, 1})
      for (const int element_bytes : {2, 4})
        for (const int page_size : {0, 1, 7, 16, 48, 256})
          std::printf("kind %d %d %d %d %d\n", options, vector_loads, element_bytes, page_size,
                      static_cast<int>(forward_kind(options, vector_loads, element_bytes, page_size)));
  for (int group : {1, 2, 4, 8, 16})
    for (int seq_q : {0, 1, 3, 16, 64, 100, 128, 129, 1000, 4096})
      std::printf("pack %d %d %d\n", group, seq_q, packed_heads(seq_q, group, 128));
  for (int group : {2, 3, 7, 48, 71, 127, 128, 129, 250}) {
    const int most = packed_heads(1, group, 128) == 1 ? 0 : 512 * group;  // rows: packed tiles end before 4 tiles of queries
    bool exact = true;
    for (int64_t row = 0; row < most; ++row) exact &= static_cast<int>(row * inverse_of(group) >> 32) == row / group;
    std::printf("inverse %d %d %d\n", group, most, exact);
  }
  for (const int q_size : {2, 4})
    for (const int kv_size : {1, q_size})
      for (const auto& [dim, dim_v] : {HeadDims{64, 64}, {128, 128}, {192, 128}, {256, 256}, {576, 512}, {1024, 1024}}) {
        const DecodeLayout d = decode_layout(dim, dim_v, dim_v <= 128 ? 128 : 256, q_size, kv_size);
        std::printf("decode %d %d %d %d %d %d %d\n", q_size, kv_size, dim, dim_v, d.warps, d.stages, d.shared_bytes);
      }
  print_grid(6, 300, 128, 0);
  print_grid(7, 300, 128, kSectionBytes / 3);
  print_grid(5, 64, 64, kSectionBytes * 2);
  print_grid(3, 0, 128, 100);
  print_grid(1, 128, 128, kSectionBytes);
}
