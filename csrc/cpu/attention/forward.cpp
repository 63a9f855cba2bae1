// Attention forward: blocked, with online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
// docs/kernels/cpu_attention.md explains the numbers.
//
// Rows are the queries of all G = Hq / Hkv heads of one KV head, one head after the other; kRows of them are the unit of work.
// K and V of a few KV heads at a time are packed first (they stay in the last-level cache), then every (KV head, block of rows) is a task
// that walks over the blocks of keys its rows can see:  S = Q K^T -> options -> online softmax -> O = alpha O + P V. Many small heads are a
// task each.
#include "core/dispatch.h"
#include "cpu/attention/score.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/caches.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/scratch.h"
#if defined(FOVEATE_TILES)
#include "cpu/amx/attention_tiles.h"
namespace foveate::cpu::FOVEATE_BASE {
void attention_forward(const AttentionParams&, int threads);
}
#endif

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kMaxBlockRows = 192;  // a multiple of every kRows
constexpr int64_t kQueryStride =
    kMaxHeadDim + 16;  // fixed, so that rows of a tile are constant offsets; not a power of two, for the cache's sets
constexpr int64_t kPackedBytes = int64_t{8} << 20;  // K and V packed at a time; more stays in no cache

template <class M>
struct Forward {
  using Acc = typename M::Acc;
  using Unit = typename M::Unit;
  using V = Vec<Acc>;
  static constexpr int w = kWidth<M>;
  static constexpr bool kTiled = Tiled<M>;
  static constexpr int kRows = [] {
    if constexpr (kTiled) return M::kRows;
    return kTileRows;
  }();
  // A multiple of every kPanel; the scores of a tile fit L1.
  static constexpr int64_t kBlockKeys = kTiled ? 256 : 512 * M::kPair;
  static constexpr int64_t kStride =
      kBlockKeys + (kTiled ? 32 : 0);  // of rows of scores: 32 of them at a power of two would share cache sets
  static constexpr int64_t kAlign = kTiled ? 32 : kColumnAlign;  // ranges of keys start and end at multiples of it

  const AttentionParams& p;
  const int threads;
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t k_units = round_up<int64_t>(ceil_div<int64_t>(p.head_dim, M::kPair), kTiled ? 16 : 1);
  const int64_t v_width = round_up<int64_t>(p.head_dim_v, kTiled ? 16 : w);
  const int64_t rows = group * p.seq_q;  // per KV head, of the longest sequence
  const int64_t key_blocks = ceil_div(p.seq_kv, kBlockKeys);
  const int64_t packed_keys = p.seq_kv < kBlockKeys ? round_up<int64_t>(p.seq_kv, kKeyAlign<M>) : kBlockKeys;
  const int64_t packed_k = packed_keys * k_units, packed_v = packed_keys / M::kPair * v_width;  // units per block
  const Window<int64_t> window = FOVEATE_ISA::window(p);
  const bool options = changes_scores(p);
  const double factor = options ? 1 : p.scale;  // scores times this are logits
  const Dropout dropout = dropout_of(p);
  const Acc* relative = nullptr;

  // One thread's working set.
  struct Local {
    Unit* q;  // [block_rows][kQueryStride]
    Acc* o;  // [block_rows][v_width]
    Acc *max, *sum;  // [block_rows]; max of the scores before `factor`
    Unit* temp;  // staging of the packers
    Acc* s;  // [kRows][kStride]
    Unit* probs;  // [kRows][kStride / kPair]: s itself, unless units are pairs
  };

  int64_t temp_units() const { return max(k_units * w, v_width); }

  Local local(const Scratch& scratch, const Layout& layout, int64_t base, int64_t block_rows, int thread) const {
    Layout l = layout;
    const int64_t q = l.add<Unit>(block_rows * kQueryStride), o = l.add<Acc>(block_rows * v_width), max = l.add<Acc>(block_rows),
                  sum = l.add<Acc>(block_rows), temp = l.add<Unit>(temp_units()), s = l.add<Acc>(kRows * kStride),
                  probs = l.add<Unit>(M::kPair == 1 ? 0 : kRows * kStride / M::kPair);
    const int64_t at = base + thread * l.total();
    Local x{scratch.at<Unit>(at + q),    scratch.at<Acc>(at + o), scratch.at<Acc>(at + max),   scratch.at<Acc>(at + sum),
            scratch.at<Unit>(at + temp), scratch.at<Acc>(at + s), scratch.at<Unit>(at + probs)};
    if constexpr (M::kPair == 1) x.probs = x.s;
    return x;
  }
  int64_t local_bytes(int64_t block_rows) const {
    Layout l;
    l.add<Unit>(block_rows * kQueryStride);
    l.add<Acc>(block_rows * v_width);
    l.add<Acc>(block_rows);
    l.add<Acc>(block_rows);
    l.add<Unit>(temp_units());
    l.add<Acc>(kRows * kStride);
    l.add<Unit>(M::kPair == 1 ? 0 : kRows * kStride / M::kPair);
    return l.total();
  }

  // ---- division of the work ----

  // Enough blocks for the threads; few rows make small blocks.
  int64_t block_rows() const {
    const int64_t share = ceil_div(rows * p.batch * p.heads_kv, static_cast<int64_t>(threads) * 2);
    return min(round_up<int64_t>(max<int64_t>(min(share, rows), 1), kRows), kMaxBlockRows);
  }

  void run() {
    const int64_t block = block_rows(), row_blocks = ceil_div(rows, block), heads = p.batch * p.heads_kv;
    const int64_t bytes_per_head = key_blocks * (packed_k + packed_v) * static_cast<int64_t>(sizeof(Unit));
    // A head's packed K and V stay in one core's L2: that thread packs and attends. Else a wave of heads is packed by all threads first.
    const bool private_heads = bytes_per_head <= l2_bytes() / 2 && (heads % threads == 0 || heads >= 8 * threads);
    int64_t wave = private_heads ? threads : bytes_per_head > 0 ? kPackedBytes / bytes_per_head : heads;
    wave = max<int64_t>(min(wave, heads), 1);

    Scratch scratch;
    Layout layout;
    const int64_t packed_at = layout.add<Unit>(wave * key_blocks * (packed_k + packed_v));
    const int64_t relative_at = layout.add<Acc>(p.rel_table ? p.heads_q * (p.seq_q + p.seq_kv - 1) : 0);
    const int64_t locals_at = layout.total();
    scratch.allocate(locals_at + threads * local_bytes(block));
    if (p.rel_table) {
      Acc* expanded = scratch.at<Acc>(relative_at);
      expand_relative(p, expanded);
      relative = expanded;
    }
    Unit* packed = scratch.at<Unit>(packed_at);

    if (private_heads)
      return parallel_tasks(heads, threads, [&](int64_t head, int thread) {
        const Local x = local(scratch, {}, locals_at, block, thread);
        Unit* mine = packed + thread * key_blocks * (packed_k + packed_v);
        for (int64_t j = 0; j < key_blocks; ++j) pack(head, j, mine + j * (packed_k + packed_v), x.temp);
        for (int64_t r = 0; r < row_blocks; ++r) attend(head, r * block, block, mine, x);
      });
    for (int64_t first = 0; first < heads; first += wave) {
      const int64_t count = min(heads - first, wave);
      parallel_tasks(count * key_blocks, threads, [&](int64_t task, int thread) {
        const int64_t head = task / key_blocks, j = task % key_blocks;
        pack(first + head, j, packed + task * (packed_k + packed_v), local(scratch, {}, locals_at, block, thread).temp);
      });
      parallel_tasks(count * row_blocks, threads, [&](int64_t task, int thread) {
        // Last rows first: with a causal mask they see the most keys.
        const int64_t r = row_blocks - 1 - task / count, head = task % count;
        attend(first + head, r * block, block, packed + head * key_blocks * (packed_k + packed_v),
               local(scratch, {}, locals_at, block, thread));
      });
    }
  }

  // ---- pack: block j of K -> columns [k_units, keys], of V -> stacked [keys / kPair, v_width] ----

  void pack(int64_t head, int64_t j, Unit* dst, Unit* temp) const {
    const int64_t b = head / p.heads_kv, h = head % p.heads_kv;
    const Sequence s = sequence(p, b);
    const Range seen = visible_keys(window, s, int64_t{0}, max<int64_t>(s.q - 1, 0));
    const int64_t begin = j * kBlockKeys, end = min(s.k, begin + kBlockKeys);
    if (begin >= seen.end || end <= seen.begin) return;
    RowSource k = kv_source(p, p.k, b, h), v = kv_source(p, p.v, b, h);
    k.first = v.first = seen.begin;  // pages before the window may have been freed
    pack_columns<M>(k, begin, end, p.head_dim, k_units, dst, temp);
    pack_stacked<M>(v, begin, end, round_up(end - begin, kAlign), p.head_dim_v, v_width, dst + packed_k, temp);
  }

  // ---- attend: the rows [first, first + block) of one KV head against the blocks of keys that they see ----

  void attend(int64_t head, int64_t first, int64_t block, const Unit* packed, const Local& x) const {
    const int64_t b = head / p.heads_kv, hkv = head % p.heads_kv;
    const Sequence s = sequence(p, b);
    const int64_t total = group * s.q, count = min(total - first, block);
    if (count <= 0) return;
    // The keys that each tile of rows sees, and all of them together.
    const int64_t tiles = ceil_div<int64_t>(count, kRows);
    Range tile_seen[kMaxBlockRows / kRows], seen{s.k, 0};
    for (int64_t t = 0; t < tiles; ++t) {
      tile_seen[t] = {s.k, 0};
      for (int64_t r = t * kRows; r < (t + 1) * kRows && r < count; ++r) {
        const Range row = visible_keys(window, s, (first + r) % s.q);
        if (row.empty()) continue;
        tile_seen[t] = {min(row.begin, tile_seen[t].begin), max(row.end, tile_seen[t].end)};
      }
      if (tile_seen[t].empty()) continue;
      seen = {min(tile_seen[t].begin, seen.begin), max(tile_seen[t].end, seen.end)};
    }
    load_queries(b, hkv, s, first, count, tiles, x);
#if defined(FOVEATE_TILES)
    TileScope scope;
    M::configure(scope);
#endif
    // row_max = -inf, row_sum = 0, O [rows, v_width] = 0, and the walk over blocks of keys.
    for (int64_t i = 0; i < tiles * kRows; ++i) x.max[i] = -std::numeric_limits<Acc>::infinity(), x.sum[i] = 0;
    std::memset(static_cast<void*>(x.o), 0, tiles * kRows * v_width * sizeof(Acc));
    for (int64_t j = seen.empty() ? key_blocks : seen.begin / kBlockKeys; j * kBlockKeys < seen.end; ++j) {
      const Unit* block_at = packed + j * (packed_k + packed_v);
      for (int64_t t = 0; t < tiles; ++t) attend_tile(b, hkv, s, first, count, t, tile_seen[t], j * kBlockKeys, block_at, x);
    }
    for (int64_t r = 0; r < count; ++r) finish_row(b, hkv * group + (first + r) / s.q, (first + r) % s.q, r, x);
  }

  void load_queries(int64_t b, int64_t hkv, const Sequence& s, int64_t first, int64_t count, int64_t tiles, const Local& x) const {
    for (int64_t r = 0; r < tiles * kRows; ++r) {
      if (r < count)
        convert_row<M>(q_source(p, p.q, b, hkv * group + (first + r) / s.q), (first + r) % s.q, p.head_dim, x.q + r * kQueryStride,
                       k_units);
      else
        std::memset(static_cast<void*>(x.q + r * kQueryStride), 0, k_units * sizeof(Unit));
    }
  }

  // Tile t of the rows against the keys of one block.
  void attend_tile(int64_t b, int64_t hkv, const Sequence& s, int64_t first, int64_t count, int64_t t, const Range& seen, int64_t key0,
                   const Unit* block, const Local& x) const {
    const int64_t from = max<int64_t>(seen.begin - key0, 0), to = min(seen.end - key0, kBlockKeys);
    if (from >= to) return;
    const int64_t begin = from / kAlign * kAlign, end = round_up(to, kAlign);
    // S [tile_rows, end - begin] = Q K^T
    const Unit* q = x.q + t * kRows * kQueryStride;
    const int64_t tile_rows = min<int64_t>(count - t * kRows, kRows);
    if constexpr (kTiled)
      M::columns(tile_rows, begin, end, k_units, q, kQueryStride, block, x.s, kStride);
    else
      gemm_columns<M, kRows, kQueryStride, 1>(begin, end, k_units, q, block, x.s, kStride);
    // S -> logits: softcap, ALiBi, bias, mask; -inf where the key is not visible
    for (int64_t r = 0; r < tile_rows; ++r) {
      const int64_t row = first + t * kRows + r, i = row % s.q;
      Acc* scores = x.s + r * kStride;
      if (options) {
        const int64_t n = min(s.k - key0, end) - begin;
        score_row<Acc>(p, s, relative, b, hkv * group + row / s.q, i, key0 + begin, n, scores + begin, nullptr);
      }
      mask_row(scores, key0, begin, end, visible_keys(window, s, i));
    }
    // logits -> P, row_max, row_sum, alpha
    Acc alpha[kRows];
    softmax_tile(b, hkv, s, first + t * kRows, tile_rows, key0, begin, end, x, x.max + t * kRows, x.sum + t * kRows, alpha);
    // O [tile_rows, v_width] = alpha O + P V
    const Unit *probs = x.probs + begin / M::kPair, *values = block + packed_k + begin / M::kPair * v_width;
    Acc* out = x.o + t * kRows * v_width;
    if constexpr (kTiled) {
      for (int64_t r = 0; r < tile_rows; ++r)
        for (int64_t d = 0; alpha[r] != 1 && d < v_width; d += w)
          store_raw(out + r * v_width + d, load_raw<V>(out + r * v_width + d) * alpha[r]);
      M::rows(tile_rows, v_width, (end - begin) / M::kPair, probs, kStride / M::kPair, values, v_width, out, v_width);
    } else {
      gemm_rows<M, kRows, kTileVecs, kStride / M::kPair, 1, Update::kScaleAdd>(v_width, (end - begin) / M::kPair, probs, values, v_width,
                                                                               out, v_width, alpha);
    }
  }

  // ---- online softmax: logits [tile_rows, begin..end) -> P relative to the new row_max; alpha rescales what was summed under the old one
  // ----

  void softmax_tile(int64_t b, int64_t hkv, const Sequence& s, int64_t row0, int64_t tile_rows, int64_t key0, int64_t begin, int64_t end,
                    const Local& x, Acc* row_max, Acc* row_sum, Acc* alpha) const {
    constexpr Acc inf = std::numeric_limits<Acc>::infinity();
    constexpr int degree = M::kPair == 2 ? 4 : 5;
    const Acc scale = static_cast<Acc>(factor * kLog2e);
    for (int64_t r = 0; r < kRows; ++r) {
      Acc* scores = x.s + r * kStride;
      if (r >= tile_rows) {
        alpha[r] = 0;
        std::memset(static_cast<void*>(x.probs + r * kStride / M::kPair + begin / M::kPair), 0, (end - begin) / M::kPair * sizeof(Unit));
        continue;
      }
      // row_max
      V m4[4] = {splat(-inf), splat(-inf), splat(-inf), splat(-inf)};
      int64_t c = begin;
      for (; c + 4 * w <= end; c += 4 * w)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) m4[u] = vmax(m4[u], load_raw<V>(scores + c + u * w));
      for (; c < end; c += w) m4[0] = vmax(m4[0], load_raw<V>(scores + c));
      const Acc block_max = hmax(vmax(vmax(m4[0], m4[1]), vmax(m4[2], m4[3])));
      const Acc new_max = max(row_max[r], block_max);
      const Acc offset = new_max == -inf ? Acc{0} : new_max;  // -inf - -inf would be NaN: a row that has seen no key yet
      // P = exp(logits - row_max), and its sum
      V s4[4] = {};
      c = begin;
      const auto step = [&](int64_t at, V& total) {
        const V e = exp2v<degree>((load_raw<V>(scores + at) - offset) * scale);
        total += e;
        if constexpr (M::kPair == 2)
          store(reinterpret_cast<bf16*>(x.probs) + r * kStride + at, e);
        else
          store_raw(scores + at, e);
      };
      // A column always adds to the same of the four sums, wherever the range begins and ends: bits do not depend on how rows share tiles.
      const auto edge = [&](int64_t stop) {
        for (; c < stop; c += w)
          c / w % 4 == 0 ? step(c, s4[0]) : c / w % 4 == 1 ? step(c, s4[1]) : c / w % 4 == 2 ? step(c, s4[2]) : step(c, s4[3]);
      };
      edge(min(round_up<int64_t>(begin, 4 * w), end));
      for (; c + 4 * w <= end; c += 4 * w)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) step(c + u * w, s4[u]);
      edge(end);
      alpha[r] = static_cast<Acc>(std::exp2((row_max[r] - offset) * scale));
      row_sum[r] = row_sum[r] * alpha[r] + hsum((s4[0] + s4[1]) + (s4[2] + s4[3]));
      row_max[r] = new_max;
      // dropout acts on P after its sum
      if (p.dropout_p > 0) {
        const int64_t row = row0 + r, head_index = b * p.heads_q + hkv * group + row / s.q;
        if constexpr (M::kPair == 2) {
          bf16* probs = reinterpret_cast<bf16*>(x.probs) + r * kStride;
          for (c = begin; c < end; c += w) store_raw(scores + c, load<Acc>(probs + c));
          apply_dropout(p, dropout.threshold, head_index, row % s.q, key0 + begin, end - begin, scores + begin);
          for (c = begin; c < end; c += w) store(probs + c, load_raw<V>(scores + c));
        } else {
          apply_dropout(p, dropout.threshold, head_index, row % s.q, key0 + begin, end - begin, scores + begin);
        }
      }
    }
  }

  // ---- write: out [head_dim_v] = O / row_sum, with the sink as one more column; lse = row_max + log(row_sum) ----

  void finish_row(int64_t b, int64_t h, int64_t i, int64_t r, const Local& x) const {
    constexpr Acc inf = std::numeric_limits<Acc>::infinity();
    const Acc sum = x.sum[r];
    const double max = x.max[r] * factor;
    const bool any = sum > 0;
    if (p.lse.data) {
      const int64_t at = p.lse.batch * b + p.lse.head * h + (p.cu_q ? p.cu_q[b] : 0) + i;
      static_cast<Acc*>(p.lse.data)[at] = any ? static_cast<Acc>(max + std::log(static_cast<double>(sum))) : (sum == sum ? -inf : sum);
    }
    Acc share = any ? 1 / sum : (sum == sum ? Acc{0} : sum);
    if (p.sinks && any) {
      // The sink is one more column: bring both sums under the larger of the two maxima.
      const double sink = static_cast<const Acc*>(p.sinks)[h], top = sink > max ? sink : max, mine = std::exp(max - top);
      share = static_cast<Acc>(mine / (sum * mine + std::exp(sink - top)));
    }
    share *= static_cast<Acc>(dropout.scale);
    const Acc* o = x.o + r * v_width;
    char* out = q_row(p, p.out, b, h, i);
    visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
      for (int64_t d = 0; d < p.head_dim_v; d += w) store_n(reinterpret_cast<T*>(out) + d, load_raw<V>(o + d) * share, p.head_dim_v - d);
    });
  }
};

}  // namespace

void attention_forward(const AttentionParams& p, int threads) {
#if defined(FOVEATE_TILES)
  if (p.dtype != DType::kBFloat16) return FOVEATE_BASE::attention_forward(p, threads);
  Forward<MathTiles>{p, threads}.run();
#else
  if (p.dtype == DType::kFloat64) return Forward<MathF64>{p, threads}.run();
  if (p.dtype == DType::kBFloat16) return Forward<MathBf16>{p, threads}.run();
  Forward<MathF32>{p, threads}.run();
#endif
}

}  // namespace foveate::cpu::FOVEATE_ISA
