// Attention backward (Dao et al. 2022, section 3.2 and appendix B), without atomics: equal calls give bitwise equal results.
//
// A task owns a chunk of keys of one KV head (more heads, if they share a bias gradient), so dK and dV are its own. It walks over its
// blocks of keys and, for each, over the blocks of queries that see it:
//   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   dV += P^T dO   dK += dS^T Q   dQ += dS K,   delta = rowsum(dO O) - dlse.
// dQ belongs to one task if there is one chunk; else every chunk has its own and they are summed in order at the end.
#include "core/dispatch.h"
#include "cpu/attention/pairs.h"
#include "cpu/attention/score.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/scratch.h"
#if defined(FOVEATE_TILES)
#include "cpu/amx/attention_tiles.h"
namespace foveate::cpu::FOVEATE_BASE {
void attention_backward(const AttentionParams&, const AttentionGrads&, int threads);
}
#endif

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kBlockKeys = 128;  // a multiple of every kPanel
constexpr int kKeyRows = 2 * kTileVecs, kKeyVecs = 2;  // the tile of dK and dV: its rows are keys, of which kColumnAlign are whole tiles
constexpr int64_t kMaxChunks = 8;  // of keys per head; each costs a dQ in accumulator precision

template <class M>
struct Backward {
  using Acc = typename M::Acc;
  using Unit = typename M::Unit;
  using V = Vec<Acc>;
  static constexpr int w = kWidth<M>;
  static constexpr int64_t kPair = M::kPair;
  static constexpr bool kTiled = Tiled<M>;
  static constexpr int kRows = [] {  // queries of a tile
    if constexpr (kTiled) return M::kRows;
    return kTileRows;
  }();
  static constexpr int64_t kBlockQueries = kTiled ? 64 : 48;  // a multiple of kRows
  static constexpr int64_t kAlign = kTiled ? 32 : kColumnAlign;  // ranges of keys start and end at multiples of it
  static constexpr int64_t kDotRows = kTiled ? 64 : kTileRows;  // queries of one row_dots
  static constexpr int64_t kDots = kTiled ? 64 : 8;  // and room for them: kTileRows and spare lanes

  const AttentionParams& p;
  const AttentionGrads& g;
  const int threads;
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t k_units = round_up<int64_t>(ceil_div<int64_t>(p.head_dim, kPair), kTiled ? 16 : 1);
  const int64_t v_units = round_up<int64_t>(ceil_div<int64_t>(p.head_dim_v, kPair), kTiled ? 16 : 1);
  const int64_t k_width = round_up<int64_t>(p.head_dim, kTiled ? 16 : w), v_width = round_up<int64_t>(p.head_dim_v, kTiled ? 16 : w);
  const int64_t padded_q = round_up(p.seq_q, kBlockQueries), key_blocks = ceil_div(p.seq_kv, kBlockKeys);
  const int64_t distances = p.rel_table && p.seq_q + p.seq_kv > 0 ? p.seq_q + p.seq_kv - 1 : 0;
  const Window<int64_t> window = FOVEATE_ISA::window(p);
  const bool options = changes_scores(p);
  const Dropout dropout = dropout_of(p);
  const Acc* relative = nullptr;
  int64_t groups_b = p.batch, groups_h = p.heads_kv, chunks = 1;
  Acc *dq_chunks = nullptr, *drelative = nullptr, *dsinks = nullptr;

  // One thread's working set. "panels": operand A in tiles of kRows queries; "stacked": operand B with queries or keys along k.
  struct Local {
    Unit *q_panels, *dout_panels, *q_stacked, *dout_stacked, *k_columns, *v_columns, *k_stacked, *temp;
    Acc *lse, *lse_rest, *delta, *dq, *dk, *dv;  // lse + lse_rest: with the sink; +inf for a row that sees nothing
    Acc *s, *dp, *slope, *dropout_factors;  // [kBlockQueries][kBlockKeys]; slope and dropout_factors one row
    Unit *p_pairs, *ds, *ds_pairs;  // operands of the products: s and dp themselves, unless units are pairs
  };

  template <class F>
  void pieces(Local& x, const F& piece) const {
    const int64_t temp = max(k_units, v_units), width = max(k_width, v_width);
    const int64_t staged = max<int64_t>(w, kTileRows);  // rows in temp
    const int64_t chunk_keys = ceil_div(key_blocks, chunks) * kBlockKeys, tile = kBlockQueries * kBlockKeys;
    piece(x.q_panels, padded_q * k_units);
    piece(x.dout_panels, padded_q * v_units + kDots);
    piece(x.q_stacked, padded_q / kPair * k_width);
    piece(x.dout_stacked, padded_q / kPair * v_width);
    piece(x.k_columns, kBlockKeys * k_units);
    piece(x.v_columns, kBlockKeys * v_units);
    piece(x.k_stacked, kBlockKeys / kPair * k_width);
    piece(x.temp, max(temp * staged, width));
    piece(x.lse, padded_q);
    piece(x.lse_rest, padded_q);
    piece(x.delta, padded_q);
    piece(x.dq, chunks == 1 ? padded_q * k_width : 0);
    piece(x.dk, chunk_keys * k_width);
    piece(x.dv, chunk_keys * v_width);
    piece(x.s, tile);
    piece(x.dp, tile);
    piece(x.slope, p.softcap > 0 ? kBlockKeys : 0);
    piece(x.dropout_factors, kBlockKeys);
    piece(x.p_pairs, kPair == 1 ? 0 : tile / kPair);
    piece(x.ds, kPair == 1 ? 0 : tile / kPair);
    piece(x.ds_pairs, kPair == 1 ? 0 : tile / kPair);
  }
  int64_t local_bytes() const {
    Layout l;
    Local x;
    pieces(x, [&]<class T>(T*&, int64_t count) { l.add<T>(count); });
    return l.total();
  }
  Local local(const Scratch& scratch, int64_t base) const {
    Layout l;
    Local x;
    pieces(x, [&]<class T>(T*& pointer, int64_t count) { pointer = scratch.at<T>(base + l.add<T>(count)); });
    if constexpr (kPair == 1) {
      x.p_pairs = x.s;
      x.ds = x.ds_pairs = x.dp;
    }
    if (!(p.softcap > 0)) x.slope = nullptr;
    return x;
  }

  // Heads that add to the same bias gradient are one task's; a chunk of keys is split off only while the threads want more tasks.
  void plan() {
    if (g.dbias && g.dbias_stride[0] == 0) groups_b = 1;
    if (g.dbias && g.dbias_stride[1] == 0) groups_h = 1;
    const int64_t groups = groups_b * groups_h, wanted = groups % threads == 0 ? groups : 4 * threads;  // also 0 groups
    chunks = groups >= wanted ? 1 : ceil_div(wanted, groups);
    chunks = min(chunks, min(kMaxChunks, max<int64_t>(key_blocks, 1)));
    if (g.dbias && g.dbias_stride[3] == 0) chunks = 1;  // all keys add to one element
  }

  void run() {
    plan();
    Scratch scratch;
    Layout layout;
    const int64_t heads = p.batch * p.heads_q;
    const int64_t dq_at = layout.add<Acc>(chunks > 1 ? chunks * heads * padded_q * k_width : 0);
    const int64_t relative_at = layout.add<Acc>(p.heads_q * distances);
    const int64_t drelative_at = layout.add<Acc>(g.drel_table ? chunks * heads * distances : 0), dsinks_at = layout.add<Acc>(heads);
    const int64_t locals_at = layout.total(), bytes = local_bytes();
    scratch.allocate(locals_at + threads * bytes);
    dq_chunks = scratch.at<Acc>(dq_at);
    dsinks = scratch.at<Acc>(dsinks_at);
    if (p.rel_table) expand_relative(p, scratch.at<Acc>(relative_at)), relative = scratch.at<Acc>(relative_at);
    if (g.drel_table)
      drelative = scratch.at<Acc>(drelative_at), std::memset(static_cast<void*>(drelative), 0, chunks * heads * distances * sizeof(Acc));
    if (g.dbias) std::memset(g.dbias, 0, g.dbias_numel * sizeof(Acc));

    const int64_t groups = groups_b * groups_h;
    parallel_tasks(groups * chunks, threads, [&](int64_t task, int thread) {
      const Local x = local(scratch, locals_at + thread * bytes);
      const int64_t chunk = task / groups, gb = task % groups / groups_h, gh = task % groups % groups_h;
      for (int64_t b = groups_b == 1 ? 0 : gb; b < (groups_b == 1 ? p.batch : gb + 1); ++b)
        for (int64_t h = groups_h == 1 ? 0 : gh; h < (groups_h == 1 ? p.heads_kv : gh + 1); ++h) chunk_of_head(b, h, chunk, x);
    });
    if (chunks > 1 && g.dq.data) parallel_tasks(heads, threads, [&](int64_t head, int) { sum_chunks(head); });
    if (g.drel_table) reduce_relative();
    if (g.dsinks) {
      Acc* out = static_cast<Acc*>(g.dsinks);
      for (int64_t h = 0; h < p.heads_q; ++h) {
        out[h] = 0;
        for (int64_t b = 0; b < p.batch; ++b) out[h] += dsinks[b * p.heads_q + h];
      }
    }
  }

  // ---- one chunk of keys of one KV head: dK [keys, D] and dV [keys, Dv] of the chunk, dQ of all queries of the head's group ----

  void chunk_of_head(int64_t b, int64_t hkv, int64_t chunk, const Local& x) const {
#if defined(FOVEATE_TILES)
    TileScope scope;
    M::configure(scope);
#endif
    const Sequence s = sequence(p, b);
    const int64_t first_block = key_blocks * chunk / chunks, last_block = key_blocks * (chunk + 1) / chunks,
                  first = first_block * kBlockKeys;
    // Keys beyond kv_lens have gradient 0; a packed batch has none.
    const int64_t stop = p.cu_k ? s.k : p.seq_kv, last = min(last_block * kBlockKeys, stop);
    const int64_t added = round_up(s.k, kAlign), end = max(stop, added) - first;
    const int64_t cleared = clamp<int64_t>(end, 0, (last_block - first_block) * kBlockKeys);
    std::memset(static_cast<void*>(x.dk), 0, cleared * k_width * sizeof(Acc));
    std::memset(static_cast<void*>(x.dv), 0, cleared * v_width * sizeof(Acc));
    // Each query head of the GQA group adds to the same dK and dV.
    for (int64_t i = 0; i < group; ++i) {
      const int64_t h = hkv * group + i;
      Local head = x;
      if (chunks > 1) head.dq = dq_chunks + ((chunk * p.batch + b) * p.heads_q + h) * padded_q * k_width;
      std::memset(static_cast<void*>(head.dq), 0, round_up<int64_t>(s.q, kRows) * k_width * sizeof(Acc));
      load_head(b, h, s, chunk, head);
      for (int64_t j = first_block; j < last_block && j * kBlockKeys < s.k; ++j) {
        Local block = head;
        block.dk += (j - first_block) * kBlockKeys * k_width;
        block.dv += (j - first_block) * kBlockKeys * v_width;
        key_block(b, hkv, h, s, chunk, j * kBlockKeys, block);
      }
      if (chunks == 1 && g.dq.data)
        for (int64_t r = 0; r < s.q; ++r) write_row(q_row(p, g.dq, b, h, r), x.dq + r * k_width, p.head_dim, p.scale);
    }
    // Write dK (times the scale) and dV.
    for (int64_t j = first; j < last; ++j) {
      const int64_t at = (p.cu_k ? p.cu_k[b] : 0) + j, size = size_of(p.dtype);
      if (g.dk.data)
        write_row(static_cast<char*>(g.dk.data) + (g.dk.batch * b + g.dk.head * hkv + g.dk.seq * at) * size, x.dk + (j - first) * k_width,
                  p.head_dim, p.scale);
      if (g.dv.data)
        write_row(static_cast<char*>(g.dv.data) + (g.dv.batch * b + g.dv.head * hkv + g.dv.seq * at) * size, x.dv + (j - first) * v_width,
                  p.head_dim_v, 1);
    }
  }

  void write_row(char* out, const Acc* row, int64_t n, double factor) const {
    visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
      for (int64_t d = 0; d < n; d += w) store_n(reinterpret_cast<T*>(out) + d, load_raw<V>(row + d) * static_cast<Acc>(factor), n - d);
    });
  }

  // All queries of one head: packed q and dout, lse and delta, and the gradient of the sink, which needs nothing else.
  void load_head(int64_t b, int64_t h, const Sequence& s, int64_t chunk, const Local& x) const {
    constexpr Acc inf = std::numeric_limits<Acc>::infinity();
    // Pack Q and dO: panels [queries / kRows, units, kRows] as operand A (rows as they are for AMX), stacked [queries / kPair, width] as
    // operand B.
    const RowSource q = q_source(p, p.q, b, h), dout = q_source(p, g.dout, b, h);
    const int64_t padded = round_up<int64_t>(s.q, kRows);
    panels(q, s.q, padded, p.head_dim, k_units, x.q_panels, x.temp);
    panels(dout, s.q, padded, p.head_dim_v, v_units, x.dout_panels, x.temp);
    pack_stacked<M>(q, 0, s.q, padded, p.head_dim, k_width, x.q_stacked, x.temp);
    pack_stacked<M>(dout, 0, s.q, padded, p.head_dim_v, v_width, x.dout_stacked, x.temp);
    // lse (with the sink) and delta of every query.
    const int64_t lse_at = p.lse.batch * b + p.lse.head * h + (p.cu_q ? p.cu_q[b] : 0);
    const Acc* lse = static_cast<const Acc*>(p.lse.data) + lse_at;
    const Acc* dlse = g.dlse ? static_cast<const Acc*>(g.dlse) + lse_at : nullptr;
    Acc dsink = 0, dots[kDots];
    missing_sums(b, h, s, lse, x);
    for (int64_t i = 0; i < s.q; ++i) {
      if (i % kDotRows == 0) row_dots(b, h, i, s.q - i, x, dots);
      Acc delta = dots[i % kDotRows], top = lse[i], rest = x.lse_rest[i];
      if (p.sinks) {
        const Acc sink = static_cast<const Acc*>(p.sinks)[h];
        top = max(lse[i], sink);
        rest = top == -inf ? 0 : std::log(std::exp(sink - top) + std::exp(lse[i] - top + x.lse_rest[i]));
        if (top > -inf) dsink -= std::exp(sink - top - rest) * delta;
      }
      if (dlse && lse[i] > -inf) delta -= dlse[i] * std::exp(top - lse[i] + (rest - x.lse_rest[i]));
      x.delta[i] = delta;
      x.lse[i] = lse[i] == -inf ? inf : top;
      x.lse_rest[i] = lse[i] == -inf ? 0 : rest * static_cast<Acc>(kLog2e);
    }
    if (chunk == 0) dsinks[b * p.heads_q + h] = dsink;
  }

  void panels(const RowSource& source, int64_t rows, int64_t padded, int64_t depth, int64_t units, Unit* dst, Unit* temp) const {
    for (int64_t r = 0; r < padded; ++r) {
      Unit* row = kTiled ? dst + r * units : temp;
      if (r < rows)
        convert_row<M>(source, r, depth, row, units);
      else
        std::memset(static_cast<void*>(row), 0, units * sizeof(Unit));
      if constexpr (kTiled) continue;
      Unit* out = dst + r / kTileRows * kTileRows * units + r % kTileRows;
      for (int64_t d = 0; d < units; ++d) out[d * kTileRows] = temp[d];
    }
  }

  // One value holds lse, and where scores are large its rounding hides the logarithm of the sum: -1e9 + log(9) is -1e9. For such rows the
  // sum of exp(s - lse), which should be 1, is taken again; its logarithm is what lse lacks.
  void missing_sums(int64_t b, int64_t h, const Sequence& s, const Acc* lse, const Local& x) const {
    constexpr Acc kLarge = std::is_same_v<Acc, double> ? Acc{1 << 30} : Acc{256};  // an error of 1.5e-5 in every weight
    const auto large = [&](int64_t i) { return std::abs(lse[i]) > kLarge && std::abs(lse[i]) <= std::numeric_limits<Acc>::max(); };
    bool any = false;
    for (int64_t i = 0; i < s.q; ++i) x.lse_rest[i] = 0, any = any || large(i);
    if (!any) return;
    const Acc scale = options ? Acc{1} : static_cast<Acc>(p.scale);
    for (int64_t key0 = 0; key0 < s.k; key0 += kBlockKeys) {
      const int64_t keys = min(s.k - key0, kBlockKeys), end = round_up(keys, kAlign);
      pack_columns<M>(kv_source(p, p.k, b, h / group), key0, key0 + keys, p.head_dim, k_units, x.k_columns, x.temp);
      for (int64_t r = 0; r < s.q; r += kRows) {
        const int64_t last = min(r + kRows, s.q);
        any = false;
        for (int64_t i = r; i < last; ++i) any = any || large(i);
        if (!any) continue;
        columns(last - r, 0, end, k_units, x.q_panels + r * k_units, x.k_columns, x.s);
        for (int64_t i = r; i < last; ++i) {
          if (!large(i)) continue;
          Acc* sc = x.s + (i - r) * kBlockKeys;
          if (options) score_row<Acc>(p, s, relative, b, h, i, key0, keys, sc, nullptr);
          mask_row(sc, key0, 0, end, visible_keys(window, s, i));
          V sum{};
          for (int64_t c = 0; c < end; c += w) sum += exp2v<5>((load_raw<V>(sc + c) * scale - lse[i]) * static_cast<Acc>(kLog2e));
          x.lse_rest[i] += hsum(sum);
        }
      }
    }
    for (int64_t i = 0; i < s.q; ++i)
      if (large(i)) x.lse_rest[i] = std::log(x.lse_rest[i]);
  }

  // C [rows, begin..end) = A [rows, units] times columns, rows <= kRows.
  void columns(int64_t rows, int64_t begin, int64_t end, int64_t units, const Unit* a, const Unit* columns, Acc* c) const {
    if constexpr (kTiled)
      M::columns(rows, begin, end, units, a, units, columns, c, kBlockKeys);
    else
      gemm_columns<M, kTileRows, 1, kTileRows>(begin, end, units, a, columns, c, kBlockKeys);
  }

  // out . dout of the kDotRows queries from r on, with the operations of `columns` in its order: where a query sees one key, out = v and
  // dP - delta is exactly 0.
  void row_dots(int64_t b, int64_t h, int64_t r, int64_t rows, const Local& x, Acc* dots) const {
    const RowSource out = q_source(p, p.out, b, h);
    if constexpr (kTiled) {  // the diagonal of dO O^T
      pack_columns<M>(out, r, r + min(rows, kDotRows), p.head_dim_v, v_units, x.v_columns, x.temp);
      for (int64_t i = 0; i < min(rows, kDotRows); i += kRows) {
        columns(min<int64_t>(rows - i, kRows), i, i + kRows, v_units, x.dout_panels + (r + i) * v_units, x.v_columns, x.s);
        for (int64_t d = i; d < i + kRows; ++d) dots[d] = x.s[(d - i) * kBlockKeys + d];
      }
    } else {
      lane_dots(out, r, rows, x.dout_panels + r * v_units, x.temp, dots);
    }
  }
  // temp: kTileRows * v_units.
  void lane_dots(const RowSource& out, int64_t r, int64_t rows, const Unit* dout_panel, Unit* temp, Acc* dots) const {
    using Accs = typename M::Accs;
    using Units = typename M::Units;
    for (int64_t i = 0; i < kTileRows; ++i) convert_row<M>(out, i < rows ? r + i : r, p.head_dim_v, temp + i * v_units, v_units);
    Accs total{};
    for (int64_t u0 = 0; u0 < v_units; u0 += kChain) {
      Accs chain{};
      for (int64_t u = u0; u < v_units && u < u0 + kChain; ++u) {
        Units column{};
        for (int i = 0; i < kTileRows; ++i) column[i] = temp[i * v_units + u];
        chain = M::mul_add_lanes(chain, load_raw<Units>(dout_panel + u * kTileRows), column);
      }
      total = u0 == 0 ? chain : chain + total;
    }
    store_raw(dots, total);
  }

  // The keys [key0, key0 + kBlockKeys) against all queries of head h that see any of them. x.dk and x.dv point at this block.
  void key_block(int64_t b, int64_t hkv, int64_t h, const Sequence& s, int64_t chunk, int64_t key0, const Local& x) const {
    const int64_t keys = min(s.k - key0, kBlockKeys);
    bool packed = false;
    for (int64_t q0 = 0; q0 < s.q; q0 += kBlockQueries) {
      const int64_t count = min(s.q - q0, kBlockQueries);
      const Range seen = visible_keys(window, s, q0, q0 + count - 1);
      const int64_t from = max<int64_t>(seen.begin - key0, 0), to = min(seen.end - key0, keys);
      if (from >= to) continue;
      if (!packed) {
        const RowSource k = kv_source(p, p.k, b, hkv), v = kv_source(p, p.v, b, hkv);
        pack_columns<M>(k, key0, key0 + keys, p.head_dim, k_units, x.k_columns, x.temp);
        pack_columns<M>(v, key0, key0 + keys, p.head_dim_v, v_units, x.v_columns, x.temp);
        pack_stacked<M>(k, key0, key0 + keys, round_up(keys, kAlign), p.head_dim, k_width, x.k_stacked, x.temp);
        packed = true;
      }
      tile(b, h, s, chunk, key0, q0, count, from / kAlign * kAlign, round_up(to, kAlign), x);
    }
  }

  void tile(int64_t b, int64_t h, const Sequence& s, int64_t chunk, int64_t key0, int64_t q0, int64_t count, int64_t begin, int64_t end,
            const Local& x) const {
    // S [count, keys] = Q K^T and dP [count, keys] = dO V^T, then row by row P and dS
    for (int64_t r = 0; r < count; r += kRows) {
      const int64_t rows = min<int64_t>(count - r, kRows);
      columns(rows, begin, end, k_units, x.q_panels + (q0 + r) * k_units, x.k_columns, x.s + r * kBlockKeys);
      columns(rows, begin, end, v_units, x.dout_panels + (q0 + r) * v_units, x.v_columns, x.dp + r * kBlockKeys);
      for (int64_t i = r; i < r + kRows; ++i) {
        if (i < r + rows)
          row(b, h, s, chunk, q0 + i, key0, begin, end, x, x.s + i * kBlockKeys, x.dp + i * kBlockKeys);
        else
          for (int64_t c = begin; c < end; ++c) x.s[i * kBlockKeys + c] = x.dp[i * kBlockKeys + c] = 0;
      }
    }
    // dV [keys, Dv] += P^T dO, dK [keys, D] += dS^T Q and dQ [count, D] += dS K
    const Unit *q = x.q_stacked + q0 / kPair * k_width, *dout = x.dout_stacked + q0 / kPair * v_width;
    const Unit* k = x.k_stacked + begin / kPair * k_width;
    Acc* dq = x.dq + q0 * k_width;
    if constexpr (kTiled) {
      constexpr int64_t pairs = kBlockQueries / 2;
      const int64_t padded = round_up<int64_t>(count, kRows), depth = padded / 2;
      pair_rows_of_columns(x.s, padded, begin, end, kBlockKeys, x.p_pairs, pairs);
      pair_rows_of_columns(x.dp, padded, begin, end, kBlockKeys, x.ds_pairs, pairs);
      pair_columns(x.dp, padded, begin, end, kBlockKeys, x.ds);
      for (int64_t j = begin; j < end; j += kRows) {
        if (g.dv.data) M::rows(kRows, v_width, depth, x.p_pairs + j * pairs, pairs, dout, v_width, x.dv + j * v_width, v_width);
        if (g.dk.data) M::rows(kRows, k_width, depth, x.ds_pairs + j * pairs, pairs, q, k_width, x.dk + j * k_width, k_width);
      }
      for (int64_t r = 0; r < count && g.dq.data; r += kRows)
        M::rows(min<int64_t>(count - r, kRows), k_width, (end - begin) / 2, x.ds + (r * kBlockKeys + begin) / 2, kBlockKeys / 2, k, k_width,
                dq + r * k_width, k_width);
    } else {
      if constexpr (kPair == 2) {
        const int64_t padded = round_up<int64_t>(count, kRows);
        pair_rows(x.s, padded, begin, end, kBlockKeys, x.p_pairs);
        pair_rows(x.dp, padded, begin, end, kBlockKeys, x.ds_pairs);
        pair_columns(x.dp, padded, begin, end, kBlockKeys, x.ds);
      }
      const int64_t depth = round_up<int64_t>(count, kPair) / kPair;
      for (int64_t j = begin; j < end; j += kKeyRows) {
        if (g.dv.data)
          gemm_rows<M, kKeyRows, kKeyVecs, 1, kBlockKeys, Update::kAdd>(v_width, depth, x.p_pairs + j, dout, v_width, x.dv + j * v_width,
                                                                        v_width);
        if (g.dk.data)
          gemm_rows<M, kKeyRows, kKeyVecs, 1, kBlockKeys, Update::kAdd>(k_width, depth, x.ds_pairs + j, q, k_width, x.dk + j * k_width,
                                                                        k_width);
      }
      for (int64_t r = 0; r < count && g.dq.data; r += kTileRows)
        gemm_rows<M, kTileRows, kTileVecs, kBlockKeys / kPair, 1, Update::kAdd>(
            k_width, (end - begin) / kPair, x.ds + (r * kBlockKeys + begin) / kPair, k, k_width, dq + r * k_width, k_width);
    }
  }

  // One query: scores -> probabilities (dropped and scaled, for dV) in sc, and dP -> dS in dp. Columns outside the visible range become 0.
  void row(int64_t b, int64_t h, const Sequence& s, int64_t chunk, int64_t i, int64_t key0, int64_t begin, int64_t end, const Local& x,
           Acc* sc, Acc* dp) const {
    constexpr int degree = kPair == 2 ? 4 : 5;
    // S -> logits
    const Range seen = visible_keys(window, s, i);
    const int64_t valid = min(s.k - key0, end);
    if (options) score_row<Acc>(p, s, relative, b, h, i, key0 + begin, valid - begin, sc + begin, x.slope ? x.slope + begin : nullptr);
    mask_row(sc, key0, begin, end, seen);
    // the dropout mask times its scale, [keys]
    const bool drops = p.dropout_p > 0;
    if (drops) {
      for (int64_t c = begin; c < end; ++c) x.dropout_factors[c] = static_cast<Acc>(dropout.scale);
      apply_dropout(p, dropout.threshold, b * p.heads_q + h, i, key0 + begin, end - begin, x.dropout_factors + begin);
    }
    // P = exp(logits - lse), dS = P (dP - delta)
    const Acc scale = options ? Acc{1} : static_cast<Acc>(p.scale), lse = x.lse[i], rest = x.lse_rest[i], delta = x.delta[i];
    for (int64_t c = begin; c < end; c += w) {
      const V prob = exp2v<degree>((load_raw<V>(sc + c) * scale - lse) * static_cast<Acc>(kLog2e) - rest);
      V dprob = load_raw<V>(dp + c);
      if (drops) {
        const V factor = load_raw<V>(x.dropout_factors + c);
        dprob *= factor;
        store_raw(sc + c, prob * factor);
      } else {
        store_raw(sc + c, prob);
      }
      store_raw(dp + c, prob * (dprob - delta));
    }
    // dS is the gradient of bias and relative bias; then through the softcap
    if (g.dbias) add_bias_gradient(b, h, i, key0, begin, valid, dp);
    if (g.drel_table) {
      Acc* out = drelative + ((chunk * p.batch + b) * p.heads_q + h) * distances + relative_origin(p, s, i) + key0;
      for (int64_t c = begin; c < valid; ++c) out[c] += dp[c];
    }
    if (x.slope)
      for (int64_t c = begin; c < end; ++c) dp[c] = dp[c] == 0 ? Acc{0} : dp[c] * x.slope[c];
  }

  void add_bias_gradient(int64_t b, int64_t h, int64_t i, int64_t key0, int64_t begin, int64_t valid, const Acc* ds) const {
    const int64_t* st = g.dbias_stride;
    Acc* out = static_cast<Acc*>(g.dbias) + b * st[0] + h * st[1] + i * st[2];
    if (st[3] == 0) {
      Acc sum = 0;
      for (int64_t c = begin; c < valid; ++c) sum += ds[c];
      *out += sum;
    } else {
      for (int64_t c = begin; c < valid; ++c) out[key0 + c] += ds[c];
    }
  }

  void sum_chunks(int64_t head) const {
    const int64_t b = head / p.heads_q, h = head % p.heads_q, stride = p.batch * p.heads_q * padded_q * k_width;
    const Sequence s = sequence(p, b);
    for (int64_t i = 0; i < s.q; ++i) {
      Acc* row = dq_chunks + (head * padded_q + i) * k_width;
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t d = 0; d < k_width; d += w) store_raw(row + d, load_raw<V>(row + d) + load_raw<V>(row + c * stride + d));
      write_row(q_row(p, g.dq, b, h, i), row, p.head_dim, p.scale);
    }
  }

  void reduce_relative() const {
    Acc* table = static_cast<Acc*>(g.drel_table);
    std::memset(static_cast<void*>(table), 0, p.rel_num_buckets * p.heads_q * sizeof(Acc));
    for (int64_t c = 0; c < chunks * p.batch; ++c)
      for (int64_t h = 0; h < p.heads_q; ++h)
        for (int64_t t = 0; t < distances; ++t) table[p.rel_buckets[t] * p.heads_q + h] += drelative[(c * p.heads_q + h) * distances + t];
  }
};

}  // namespace

void attention_backward(const AttentionParams& p, const AttentionGrads& g, int threads) {
#if defined(FOVEATE_TILES)
  if (p.dtype != DType::kBFloat16) return FOVEATE_BASE::attention_backward(p, g, threads);
  Backward<MathTiles>{p, g, threads}.run();
#else
  if (p.dtype == DType::kFloat64) return Backward<MathF64>{p, g, threads}.run();
  if (p.dtype == DType::kBFloat16) return Backward<MathBf16>{p, g, threads}.run();
  Backward<MathF32>{p, g, threads}.run();
#endif
}

}  // namespace foveate::cpu::FOVEATE_ISA
