// dQ: a block owns a tile of queries of one head and streams the keys that they see.
#include "cuda/attention/backward.cuh"

namespace foveate::cuda {
namespace {

template <class Tiles>
__device__ __forceinline__ void load_keys(const BackwardParams& a, const Sequence& s, int b, int hkv, int j, uint32_t stage) {
  using Other = typename Tiles::Other;
  load_rows<Other, Tiles::kThreads>(stage, a.p.k, b, hkv, s.first_k, j, s.k, static_cast<int>(a.p.head_dim), a.vectors);
  load_rows<Other, Tiles::kThreads>(stage + Other::kBytes, a.p.v, b, hkv, s.first_k, j, s.k, static_cast<int>(a.p.head_dim_v), a.vectors);
  dev::cp_async_commit();
}

// Blocks of a multiprocessor, which bound the registers: two at 128, where these suffice.
template <class Tiles, bool kOptions>
constexpr int kBlocks = !Tiles::kFloat && !kOptions && (Tiles::kHeadDim == 96 || Tiles::kHeadDim == 128) ? 2 : 1;

template <class Tiles, bool kOptions>
__global__ void __launch_bounds__(Tiles::kThreads, (kBlocks<Tiles, kOptions>)) query_gradient(const __grid_constant__ BackwardParams a) {
  using T = typename Tiles::T;
  using Own = typename Tiles::Own;
  using Other = typename Tiles::Other;
  const auto [b, h, reversed] = block_place(a.tiles, a.heads_q);
  const Sequence s = sequence(a.p, b);
  const int query0 = (a.tiles - 1 - reversed) * Tiles::kOwn, hkv = h / a.group;  // with a causal mask the last queries see the most keys
  if (query0 >= s.q) return;
  const int columns = static_cast<int>(a.p.head_dim), columns_v = static_cast<int>(a.p.head_dim_v), row0 = 16 * dev::warp();
  const Range keys = visible_keys(a.o.window, s, query0, min(query0 + Tiles::kOwn, s.q) - 1);
  const int first = keys.begin / Tiles::kOther * Tiles::kOther,
            steps = keys.empty() ? 0 : (keys.end - first + Tiles::kOther - 1) / Tiles::kOther;
  const uint32_t base = dev::smem_base(), stages = base + Tiles::kStages;
  const Philox key = kOptions && a.p.dropout_p > 0 ? philox(a.p) : Philox{};
  float dq[Tiles::kColumns][4] = {};

  if (steps > 0) {
    load_rows<Own, Tiles::kThreads>(base, a.p.q, b, h, s.first_q, query0, s.q, columns, a.vectors);
    load_rows<Own, Tiles::kThreads>(base + Tiles::kOwn1, a.g.dout, b, h, s.first_q, query0, s.q, columns_v, a.vectors);
    load_keys<Tiles>(a, s, b, hkv, first, stages);
  }
  const RowStatistics statistics(a, b, h, query0 + row0);
  for (int step = 0; step < steps; ++step) {
    dev::cp_async_wait<0>();
    dev::sync_threads();  // this stage is here, and nobody reads the other one any more
    const int key0 = first + step * Tiles::kOther;
    if (step + 1 < steps) load_keys<Tiles>(a, s, b, hkv, key0 + Tiles::kOther, stages + (step + 1) % 2 * Tiles::kStage);
    const uint32_t k_tile = stages + step % 2 * Tiles::kStage, v_tile = k_tile + Other::kBytes;
    const TileKind kind = tile_kind(a.o.window, s, query0 + row0, 16, key0, Tiles::kOther);
    if (kind == TileKind::kEmpty) continue;

    const Places<false> at(query0 + row0, key0);
    ScoreTile<T, false, kOptions, Tiles::kBlocks> x;
    multiply_rows<Own, Other, kForwardChain>(x.s, base, row0, k_tile, columns);
    x.probabilities(a, s, b, h, at, kind == TileKind::kPartial, [&](int) { return statistics.lse; });
    if (kOptions && a.p.dropout_p > 0) x.draw(a, key, b * a.heads_q + h, at);
    multiply_rows<Own, Other, kShortChain>(x.dp, base + Tiles::kOwn1, row0, v_tile, columns_v);
    x.gradients(a, [&](int) { return statistics.delta; });
    x.through_softcap(a);
    accumulate<Other>(dq, x.dp, k_tile, columns);
  }
  store_gradient(HeadRows<T>(a.g.dq, b, h, s.first_q), query0 + row0, s.q, s.q, columns, a.vectors, a.o.scale, dq);
}

}  // namespace

void backward_query_gradient(const BackwardParams& params, const Stream& stream) {
  BackwardParams a = params;
  visit_backward(a.p, [&]<class Tiles, bool kOptions>(Tiles, std::bool_constant<kOptions>) {
    a.tiles = static_cast<int>(ceil_div<int64_t>(a.p.seq_q, Tiles::kOwn));
    launch<query_gradient<Tiles, kOptions>>(one_dimensional(int64_t{a.batch} * a.heads_q * a.tiles), dim3(Tiles::kThreads),
                                            Tiles::kSharedBytes, stream, a);
  });
}

}  // namespace foveate::cuda
