// dK and dV: a block owns a tile of keys of one KV head and streams the queries of all heads that share it.
//
// Where the bits of dQ may depend on the order in which blocks run, the same kernel adds its tile's part of dQ, dS K, to fp32 sums in
// global memory, and S and dP are computed once. dQ adds up over keys, which lie in different warps: dS goes through shared memory.
//
// Registers of a thread, in the plain bf16 instances: D 64: dK and dV 64, S^T and dP^T 64; D 128: 128 and 32; D 256: 128 and 16.
#include "cuda/attention/backward.cuh"

namespace foveate::cuda {
namespace {

enum class Part { kBoth, kKeys, kValues };

// The queries that the block's keys see, kStreamed at a time, of one head after the other.
struct Step {
  int head, query;  // of the heads that share the block's keys; the first of the queries
};
template <class Tiles>
struct Steps {
  int first, end, count;
  __device__ Steps(const Range& queries, int group) : first(queries.begin / Tiles::kStreamed * Tiles::kStreamed), end(queries.end) {
    count = queries.empty() ? 0 : (end - first + Tiles::kStreamed - 1) / Tiles::kStreamed * group;
  }
  __device__ Step after(const Step& step) const {
    const int query = step.query + Tiles::kStreamed;
    return query < end ? Step{step.head, query} : Step{step.head + 1, first};
  }
};

// Starts the loads of Q, dO, lse and delta of queries [i, i + kStreamed).
template <class Tiles>
__device__ __forceinline__ void load_queries(const BackwardParams& a, const Sequence& s, int b, int h, int i, uint32_t stage) {
  constexpr int kCopies = Tiles::kStreamed / 4;
  const int columns = static_cast<int>(a.attention.head_dim), columns_v = static_cast<int>(a.attention.head_dim_v);
  load_rows<typename Tiles::Streamed, Tiles::kThreads>(stage, a.attention.q, b, h, s.first_q, i, s.q, columns, a.vectors);
  load_rows<typename Tiles::Streamed, Tiles::kThreads>(stage + Tiles::Streamed::kBytes, a.grads.dout, b, h, s.first_q, i, s.q, columns_v,
                                                       a.vectors);
  const int copy = threadIdx.x;
  if (copy < 2 * kCopies) {
    const float* from = (copy < kCopies ? a.lse : a.delta) + (int64_t{b} * a.heads_q + h) * a.rows + i + copy % kCopies * 4;
    dev::cp_async<16>(stage + Tiles::kStatistics + copy * 16, from);
  }
  dev::cp_async_commit();
}

// dS^T [kStationary, kStreamed] of a step, rounded. With head dim 128 it takes the place of dO, for which everybody has to be done with dO
// first.
template <class Tiles>
struct ScorePlace {
  using Scores = Tile<typename Tiles::T, Tiles::kStationary, Tiles::kStreamed>;
  static constexpr bool kOverDout = Tiles::kHeadDim == 128;
  static constexpr uint32_t kSharedBytes = Tiles::kSharedBytes + (kOverDout ? 0 : Scores::kBytes);
  static_assert(kSharedBytes <= 99 * 1024 && (!kOverDout || Scores::kBytes <= Tiles::Streamed::kBytes));
};

// How the warps divide the 16 x 16 blocks of dS K: one's blocks share a column of K or a row of dS. With head dim 96 there are 2 x 6 blocks
// for 8 warps: the first 4 have a column each, the others one block.
template <class Tiles>
struct QueryGradientShare {
  static constexpr int kWarps = Tiles::kWarps, kDown = Tiles::kStreamed / 16, kAcross = Tiles::kHeadDim / 16;
  static constexpr int kCount = ceil_div(kDown * kAcross, kWarps);  // of a warp
  static constexpr bool kEven = kCount * kWarps == kDown * kAcross, kShareRow = kDown == 1, kShareColumn = !kShareRow;
  static constexpr int kFull = kDown * kAcross - kWarps;  // warps of two blocks, where it is not even
  static_assert(kEven ? kShareRow || kWarps % kAcross == 0 : kDown == 2 && kCount == 2);
  int warp = dev::warp();

  __device__ bool has(int u) const { return kEven || u == 0 || warp < kFull; }
  __device__ int row(int u) const {
    if (kShareRow) return 0;
    if (kEven) return warp / kAcross + u * (kWarps / kAcross);
    return warp < kFull ? u : (warp - kFull) % 2;
  }
  __device__ int column(int u) const {
    if (kShareRow) return warp + u * kWarps;
    if (kEven) return warp % kAcross;
    return warp < kFull ? warp : kFull + (warp - kFull) / 2;
  }
};

// to [kStreamed, kHeadDim] += dS K.
template <class Tiles>
__device__ __forceinline__ void add_query_gradient(float* to, uint32_t scores, uint32_t k_tile) {
  using Share = QueryGradientShare<Tiles>;
  const Fragments<typename ScorePlace<Tiles>::Scores, Operand::kATransposed> from_scores(scores);
  const Fragments<typename Tiles::Stationary, Operand::kBTransposed> from_k(k_tile);
  const Share share;
  float sum[Share::kCount][2][4] = {};
#pragma unroll
  for (int key = 0; key < Tiles::kStationary; key += 16) {
    uint32_t ds[4], k[4];
#pragma unroll
    for (int u = 0; u < Share::kCount; ++u) {
      if (!share.has(u)) continue;
      if (u == 0 || !Share::kShareRow) from_scores.load(ds, key, share.row(u) * 16);
      if (u == 0 || !Share::kShareColumn) from_k.load(k, key, share.column(u) * 16);
      dev::mma_m16n8k16<typename Tiles::T>(sum[u][0], ds, k[0], k[1]);
      dev::mma_m16n8k16<typename Tiles::T>(sum[u][1], ds, k[2], k[3]);
    }
  }
  float* corner = to + (fragment_row(0) * Tiles::kHeadDim + fragment_column(0));
#pragma unroll
  for (int u = 0; u < Share::kCount; ++u) {
    if (!share.has(u)) continue;
    float* block = corner + (share.row(u) * Tiles::kHeadDim + share.column(u)) * 16;
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) dev::atomic_add(block + (e / 2 * 8 * Tiles::kHeadDim + 8 * c + e % 2), sum[u][c][e]);
  }
}

template <class Tiles, bool kOptions, Part part, bool kFused>
__global__ void __launch_bounds__(Tiles::kThreads) key_gradients(const __grid_constant__ BackwardParams a) {
  using T = typename Tiles::T;
  using Stationary = typename Tiles::Stationary;
  using Streamed = typename Tiles::Streamed;
  constexpr bool kKeys = part != Part::kValues, kValues = part != Part::kKeys;
  const auto [b, hkv, tile] = block_place(a.tiles, a.heads_kv);
  const Sequence s = sequence(a.attention, b);
  const int key0 = tile * Tiles::kStationary,
            stop = a.attention.cu_k ? s.k : static_cast<int>(a.attention.seq_kv);  // keys beyond kv_lens have gradient 0
  if (key0 >= stop) return;
  const int columns = static_cast<int>(a.attention.head_dim), columns_v = static_cast<int>(a.attention.head_dim_v);
  const int last = min(key0 + Tiles::kStationary, s.k) - 1, row0 = 16 * dev::warp();
  const Steps<Tiles> steps(last < key0 ? Range{0, 0} : visible_queries(a.score.window, s, key0, last), a.group);
  const uint32_t base = dev::smem_base(), stages = base + Tiles::kStages;
  const Philox key = kOptions && a.attention.dropout_p > 0 ? philox(a.attention) : Philox{};
  float dk[kKeys ? Tiles::kColumns : 1][4] = {}, dv[kValues ? Tiles::kColumns : 1][4] = {};

  // Prologue: the stationary K [kStationary, D] and V [kStationary, Dv], and the first stage of Q and dO [kStreamed, ..].
  if (steps.count > 0) {
    load_rows<Stationary, Tiles::kThreads>(base, a.attention.k, b, hkv, s.first_k, key0, s.k, columns, a.vectors);
    load_rows<Stationary, Tiles::kThreads>(base + Tiles::kStationary1, a.attention.v, b, hkv, s.first_k, key0, s.k, columns_v, a.vectors);
    load_queries<Tiles>(a, s, b, hkv * a.group, steps.first, stages);
  }
  // Each step: one streamed tile of queries of one head of the GQA group. A warp has 16 keys.
  Step now, next{0, steps.first};
  for (int step = 0; step < steps.count; ++step) {
    dev::cp_async_wait<0>();
    dev::sync_threads();  // this stage is here, and all warps are done with the other one
    now = next, next = steps.after(now);
    if (step + 1 < steps.count)
      load_queries<Tiles>(a, s, b, hkv * a.group + next.head, next.query, stages + (step + 1) % 2 * Tiles::kStage);
    const uint32_t q_tile = stages + step % 2 * Tiles::kStage, dout_tile = q_tile + Streamed::kBytes,
                   statistics = q_tile + Tiles::kStatistics;
    const int h = hkv * a.group + now.head, query0 = now.query;
    const TileKind kind = tile_kind(a.score.window, s, query0, Tiles::kStreamed, key0 + row0, 16);
    if (!kFused && kind == TileKind::kEmpty) continue;

    const FragmentCoords<true> at(key0 + row0, query0);
    const auto of_query = [&](uint32_t array, int c) { return dev::ld_shared<float2>(array + (8 * c + fragment_column(0)) * 4); };
    ScoreTile<T, true, kOptions, Tiles::kBlocks> x;
    if (kind != TileKind::kEmpty) {
      // S^T [16, kStreamed] = K Q^T -> P^T
      multiply_rows<Stationary, Streamed, kForwardChain>(x.s, base, row0, q_tile, columns);
      x.probabilities(a, s, b, h, at, kind == TileKind::kPartial, [&](int c) { return of_query(statistics, c); });
      if (kOptions && a.attention.dropout_p > 0) x.draw(a, key, b * a.heads_q + h, at);
      // dP^T [16, kStreamed] = V dO^T -> dS^T; dK [16, D] += dS^T Q
      if constexpr (kKeys) {
        multiply_rows<Stationary, Streamed, kShortChain>(x.dp, base + Tiles::kStationary1, row0, dout_tile, columns_v);
        x.gradients(a, [&](int c) { return of_query(statistics + Tiles::kStreamed * 4, c); });
        x.through_softcap(a);
        accumulate<Streamed>(dk, x.dp, q_tile, columns);
      }
      // dV [16, Dv] += P^T dO
      if constexpr (kValues) {
        x.drop(a, x.s);
        accumulate<Streamed>(dv, x.s, dout_tile, columns_v);
      }
    }
    // dQ [kStreamed, D] += dS K by atomics: dS^T of all warps meets in shared memory first
    if constexpr (kFused) {
      using Place = ScorePlace<Tiles>;
      const uint32_t scores = Place::kOverDout ? dout_tile : base + Tiles::kSharedBytes;
      if (Place::kOverDout) dev::sync_threads();  // all warps are done with dO
      if (kind == TileKind::kEmpty) x.no_gradient();
      store_fragments<typename Place::Scores>(scores, row0, x.dp);
      dev::sync_threads();
      add_query_gradient<Tiles>(a.dq_sum + ((int64_t{b} * a.heads_q + h) * a.rows + query0) * Tiles::kHeadDim, scores, base);
    }
  }
  // Epilogue: dK times the scale, dV.
  const int row = key0 + row0;
  if (kKeys && a.grads.dk.data)
    store_gradient(HeadRows<T>(a.grads.dk, b, hkv, s.first_k), row, s.k, stop, columns, a.vectors, a.score.scale, dk);
  if (kValues && a.grads.dv.data)
    store_gradient(HeadRows<T>(a.grads.dv, b, hkv, s.first_k), row, s.k, stop, columns_v, a.vectors, 1.0f, dv);
}

}  // namespace

void backward_key_gradients(const BackwardParams& params, const Stream& stream) {
  BackwardParams a = params;
  visit_backward(a.attention, [&]<class Tiles, bool kOptions>(Tiles, std::bool_constant<kOptions>) {
    a.tiles = static_cast<int>(ceil_div<int64_t>(a.attention.seq_kv, Tiles::kStationary));
    const auto run = [&]<Part part, bool kFused>() {
      constexpr uint32_t kBytes = kFused ? ScorePlace<Tiles>::kSharedBytes : Tiles::kSharedBytes;
      launch<key_gradients<Tiles, kOptions, part, kFused>>(one_dimensional(int64_t{a.batch} * a.heads_kv * a.tiles), dim3(Tiles::kThreads),
                                                           kBytes, stream, a);
    };
    if constexpr (Tiles::kFloat && Tiles::kHeadDim >= 128) {
      if (a.grads.dk.data) run.template operator()<Part::kKeys, false>();
      if (a.grads.dv.data) run.template operator()<Part::kValues, false>();
    } else if constexpr (Tiles::kFloat) {
      run.template operator()<Part::kBoth, false>();
    } else if constexpr (Tiles::kHeadDim == 256) {
      if (a.dq_sum) run.template operator()<Part::kKeys, true>();
      if (a.grads.dk.data && !a.dq_sum) run.template operator()<Part::kKeys, false>();
      if (a.grads.dv.data) run.template operator()<Part::kValues, false>();
    } else {
      if (a.dq_sum) run.template operator()<Part::kBoth, true>();
      if (!a.dq_sum) run.template operator()<Part::kBoth, false>();
    }
  });
}

}  // namespace foveate::cuda
