// dK and dV: a block owns a tile of keys of one KV head and streams the queries of all heads that share it.
//
// Registers of a thread, in the plain bf16 instances: D 64: dK and dV 64, S^T and dP^T 64; D 128: 128 and 32; D 256: 128 and 16.
#include "cuda/attention_backward.cuh"

namespace foveate::cuda {
namespace {

enum class Part { kBoth, kKeys, kValues };

// The queries that the block's keys see, of one head after the other: step -> head, first query.
template <class Tiles>
struct Steps {
  int first, per_head, count;
  __device__ Steps(const Range& queries, int group)
      : first(queries.begin / Tiles::kOther * Tiles::kOther),
        per_head(queries.empty() ? 0 : (queries.end - first + Tiles::kOther - 1) / Tiles::kOther),
        count(per_head * group) {}
  __device__ int head(int step) const { return step / per_head; }
  __device__ int query(int step) const { return first + step % per_head * Tiles::kOther; }
};

// Starts the loads of Q, dO, lse and delta of queries [i, i + kOther).
template <class Tiles>
__device__ __forceinline__ void load_queries(const BackwardParams& a, const Sequence& s, int b, int h, int i, uint32_t stage) {
  using T = typename Tiles::T;
  constexpr int kCopies = Tiles::kOther / 4;
  const int columns = static_cast<int>(a.p.head_dim), columns_v = static_cast<int>(a.p.head_dim_v);
  load_rows<typename Tiles::Other, Tiles::kThreads>(stage, HeadRows<T>(a.p.q, b, h, s.first_q), i, s.q, columns, a.vectors);
  load_rows<typename Tiles::Other, Tiles::kThreads>(stage + Tiles::Other::kBytes, HeadRows<T>(a.g.dout, b, h, s.first_q), i, s.q, columns_v,
                                                    a.vectors);
  const int copy = threadIdx.x;
  if (copy < 2 * kCopies) {
    const float* from = (copy < kCopies ? a.lse : a.delta) + (int64_t{b} * a.heads_q + h) * a.rows + i + copy % kCopies * 4;
    dev::cp_async<16>(stage + Tiles::kStatistics + copy * 16, from);
  }
  dev::cp_async_commit();
}

template <class Tiles, bool kOptions, Part part>
__global__ void __launch_bounds__(Tiles::kThreads) key_gradients(const __grid_constant__ BackwardParams a) {
  using T = typename Tiles::T;
  using Own = typename Tiles::Own;
  using Other = typename Tiles::Other;
  constexpr bool kKeys = part != Part::kValues, kValues = part != Part::kKeys;
  const auto [b, hkv, tile] = block_place(a.tiles, a.heads_kv);
  const Sequence s = sequence(a.p, b);
  const int key0 = tile * Tiles::kOwn, stop = a.p.cu_k ? s.k : static_cast<int>(a.p.seq_kv);  // keys beyond kv_lens have gradient 0
  if (key0 >= stop) return;
  const int columns = static_cast<int>(a.p.head_dim), columns_v = static_cast<int>(a.p.head_dim_v);
  const int last = min(key0 + Tiles::kOwn, s.k) - 1, row0 = 16 * dev::warp();
  const Steps<Tiles> steps(last < key0 ? Range{0, 0} : visible_queries(a.o, s, key0, last), a.group);
  const uint32_t base = dev::smem_base(), stages = base + Tiles::kStages;
  const Philox key = kOptions && a.p.dropout_p > 0 ? philox(a.p) : Philox{};
  float dk[kKeys ? Tiles::kColumns : 1][4] = {}, dv[kValues ? Tiles::kColumns : 1][4] = {};

  if (steps.count > 0) {
    load_rows<Own, Tiles::kThreads>(base, HeadRows<T>(a.p.k, b, hkv, s.first_k), key0, s.k, columns, a.vectors);
    load_rows<Own, Tiles::kThreads>(base + Tiles::kOwn1, HeadRows<T>(a.p.v, b, hkv, s.first_k), key0, s.k, columns_v, a.vectors);
    load_queries<Tiles>(a, s, b, hkv * a.group, steps.query(0), stages);
  }
  for (int step = 0; step < steps.count; ++step) {
    dev::cp_async_wait<0>();
    dev::sync_threads();  // this stage is here, and nobody reads the other one any more
    if (step + 1 < steps.count)
      load_queries<Tiles>(a, s, b, hkv * a.group + steps.head(step + 1), steps.query(step + 1), stages + (step + 1) % 2 * Tiles::kStage);
    const uint32_t q_tile = stages + step % 2 * Tiles::kStage, dout_tile = q_tile + Other::kBytes, statistics = q_tile + Tiles::kStatistics;
    const int h = hkv * a.group + steps.head(step), query0 = steps.query(step);
    const TileKind kind = tile_kind(a.o, s, query0, Tiles::kOther, key0 + row0, 16);
    if (kind == TileKind::kEmpty) continue;

    const Places<true> at(key0 + row0, query0);
    const auto of_query = [&](uint32_t array, int c) { return dev::ld_shared<float2>(array + (8 * c + fragment_column(0)) * 4); };
    ScoreTile<T, true, kOptions, Tiles::kBlocks> x;
    multiply_rows<Own, Other, Order::kForward>(x.s, base, row0, q_tile, columns);
    x.probabilities(a, s, b, h, at, kind == TileKind::kPartial, [&](int c) { return of_query(statistics, c); });
    if (kOptions && a.p.dropout_p > 0) x.draw(a, key, b * a.heads_q + h, at);
    if constexpr (kKeys) {
      multiply_rows<Own, Other, Order::kEights>(x.dp, base + Tiles::kOwn1, row0, dout_tile, columns_v);
      x.gradients(a, [&](int c) { return of_query(statistics + Tiles::kOther * 4, c); });
      x.through_softcap(a);
      accumulate<Other>(dk, x.dp, q_tile, columns);
    }
    if constexpr (kValues) {
      x.drop(a, x.s);
      accumulate<Other>(dv, x.s, dout_tile, columns_v);
    }
  }
  const int row = key0 + row0;
  if (kKeys && a.g.dk.data) store_gradient(HeadRows<T>(a.g.dk, b, hkv, s.first_k), row, s.k, stop, columns, a.vectors, a.o.scale, dk);
  if (kValues && a.g.dv.data) store_gradient(HeadRows<T>(a.g.dv, b, hkv, s.first_k), row, s.k, stop, columns_v, a.vectors, 1.0f, dv);
}

}  // namespace

void backward_key_gradients(const BackwardParams& params, const Stream& stream) {
  BackwardParams a = params;
  visit_backward(a.p, [&]<class Tiles, bool kOptions>(Tiles, std::bool_constant<kOptions>) {
    a.tiles = static_cast<int>(ceil_div<int64_t>(a.p.seq_kv, Tiles::kOwn));
    const dim3 grid = one_dimensional(int64_t{a.batch} * a.heads_kv * a.tiles), block(Tiles::kThreads);
    if constexpr (Tiles::kHeadDim == 256 || (Tiles::kFloat && Tiles::kHeadDim == 128)) {
      if (a.g.dk.data) launch<key_gradients<Tiles, kOptions, Part::kKeys>>(grid, block, Tiles::kSharedBytes, stream, a);
      if (a.g.dv.data) launch<key_gradients<Tiles, kOptions, Part::kValues>>(grid, block, Tiles::kSharedBytes, stream, a);
    } else {
      launch<key_gradients<Tiles, kOptions, Part::kBoth>>(grid, block, Tiles::kSharedBytes, stream, a);
    }
  });
}

}  // namespace foveate::cuda
