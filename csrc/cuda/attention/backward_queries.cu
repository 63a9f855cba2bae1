// dQ: a block owns a tile of queries of one head and streams the keys that they see.
#include "cuda/attention/backward.cuh"

namespace foveate::cuda {
namespace {

template <class Tiles>
__device__ __forceinline__ void load_keys(const BackwardParams& a, const Sequence& s, int b, int hkv, int j, uint32_t stage) {
  using Streamed = typename Tiles::Streamed;
  load_rows<Streamed, Tiles::kThreads>(stage, a.attention.k, b, hkv, s.first_k, j, s.k, static_cast<int>(a.attention.head_dim), a.vectors);
  load_rows<Streamed, Tiles::kThreads>(stage + Streamed::kBytes, a.attention.v, b, hkv, s.first_k, j, s.k,
                                       static_cast<int>(a.attention.head_dim_v), a.vectors);
  dev::cp_async_commit();
}

// Blocks of an SM, which bound the registers: two at 128, where these suffice.
template <class Tiles, bool kOptions>
constexpr int kBlocks = !Tiles::kFloat && !kOptions && (Tiles::kHeadDim == 96 || Tiles::kHeadDim == 128) ? 2 : 1;

template <class Tiles, bool kOptions>
__global__ void __launch_bounds__(Tiles::kThreads, (kBlocks<Tiles, kOptions>)) query_gradient(const __grid_constant__ BackwardParams a) {
  using T = typename Tiles::T;
  using Stationary = typename Tiles::Stationary;
  using Streamed = typename Tiles::Streamed;
  const auto [b, h, reversed] = block_place(a.tiles, a.heads_q);
  const Sequence s = sequence(a.attention, b);
  const int query0 = (a.tiles - 1 - reversed) * Tiles::kStationary,
            hkv = h / a.group;  // with a causal mask the last queries see the most keys
  if (query0 >= s.q) return;
  const int columns = static_cast<int>(a.attention.head_dim), columns_v = static_cast<int>(a.attention.head_dim_v), row0 = 16 * dev::warp();
  const Range keys = visible_keys(a.score.window, s, query0, min(query0 + Tiles::kStationary, s.q) - 1);
  const int first = keys.begin / Tiles::kStreamed * Tiles::kStreamed,
            steps = keys.empty() ? 0 : (keys.end - first + Tiles::kStreamed - 1) / Tiles::kStreamed;
  const uint32_t base = dev::smem_base(), stages = base + Tiles::kStages;
  const Philox key = kOptions && a.attention.dropout_p > 0 ? philox(a.attention) : Philox{};
  float dq[Tiles::kColumns][4] = {};

  // Prologue: the stationary Q [kStationary, D] and dO [kStationary, Dv], and the first stage of K and V [kStreamed, ..].
  if (steps > 0) {
    load_rows<Stationary, Tiles::kThreads>(base, a.attention.q, b, h, s.first_q, query0, s.q, columns, a.vectors);
    load_rows<Stationary, Tiles::kThreads>(base + Tiles::kStationary1, a.grads.dout, b, h, s.first_q, query0, s.q, columns_v, a.vectors);
    load_keys<Tiles>(a, s, b, hkv, first, stages);
  }
  const RowStatistics statistics(a, b, h, query0 + row0);
  for (int step = 0; step < steps; ++step) {
    dev::cp_async_wait<0>();
    dev::sync_threads();  // this stage is here, and all warps are done with the other one
    const int key0 = first + step * Tiles::kStreamed;
    if (step + 1 < steps) load_keys<Tiles>(a, s, b, hkv, key0 + Tiles::kStreamed, stages + (step + 1) % 2 * Tiles::kStage);
    const uint32_t k_tile = stages + step % 2 * Tiles::kStage, v_tile = k_tile + Streamed::kBytes;
    const TileKind kind = tile_kind(a.score.window, s, query0 + row0, 16, key0, Tiles::kStreamed);
    if (kind == TileKind::kEmpty) continue;

    const FragmentCoords<false> at(query0 + row0, key0);
    ScoreTile<T, false, kOptions, Tiles::kBlocks> x;
    // S [16, kStreamed] = Q K^T -> P
    multiply_rows<Stationary, Streamed, kForwardChain>(x.s, base, row0, k_tile, columns);
    x.probabilities(a, s, b, h, at, kind == TileKind::kPartial, [&](int) { return statistics.lse; });
    if (kOptions && a.attention.dropout_p > 0) x.draw(a, key, b * a.heads_q + h, at);
    // dP [16, kStreamed] = dO V^T -> dS
    multiply_rows<Stationary, Streamed, kShortChain>(x.dp, base + Tiles::kStationary1, row0, v_tile, columns_v);
    x.gradients(a, [&](int) { return statistics.delta; });
    x.through_softcap(a);
    // dQ [16, D] += dS K
    accumulate<Streamed>(dq, x.dp, k_tile, columns);
  }
  store_gradient(HeadRows<T>(a.grads.dq, b, h, s.first_q), query0 + row0, s.q, s.q, columns, a.vectors, a.score.scale, dq);
}

}  // namespace

void backward_query_gradient(const BackwardParams& params, const Stream& stream) {
  BackwardParams a = params;
  visit_backward(a.attention, [&]<class Tiles, bool kOptions>(Tiles, std::bool_constant<kOptions>) {
    a.tiles = static_cast<int>(ceil_div<int64_t>(a.attention.seq_q, Tiles::kStationary));
    launch<query_gradient<Tiles, kOptions>>(one_dimensional(int64_t{a.batch} * a.heads_q * a.tiles), dim3(Tiles::kThreads),
                                            Tiles::kSharedBytes, stream, a);
  });
}

}  // namespace foveate::cuda
