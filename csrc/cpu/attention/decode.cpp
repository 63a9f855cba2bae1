// Attention of few queries to a long KV cache (flash decoding). All the query rows that share a KV head are handled together, so that K and
// V are read once; a task walks over tiles of keys and KV heads with an online softmax, and the keys of a sequence may be divided into
// splits whose partial results are merged by their log-sum-exp. decode_tile.inl.h has the arithmetic of a tile.
//
// The query rows of a KV head are numbered i * group + g: query i, head g of the group. group = Hq / Hkv.
#include <algorithm>
#include <utility>

#include "core/dispatch.h"
#include "cpu/attention/decode_dot.inl.h"
#include "cpu/attention/decode_tile.inl.h"
#include "cpu/attention/kv_cache.inl.h"
#include "cpu/attention/score.h"
#include "cpu/simd/parallel.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// Where the keys of a tile and of the one behind it lie, in elements from the cache's start, head 0. Beyond `keys` the last key is
// repeated, so that blocks of keys may be read whole without touching what lies behind the sequence.
struct Tile {
  int64_t begin = 0;
  int keys = 0, next_keys = 0;
  int64_t k[2 * kTile], v[2 * kTile];  // the next tile's from kTile on
};

struct Task {
  int64_t b, row0, rows, head0, heads, split;
  int64_t begin, end;  // keys
};

// Keys whose values are added together. Like the scores, this goes over all heads of some keys before the next keys where they are
// neighbours: in the order of memory.
constexpr int kValueKeys = 8;

// What comes kAheadBytes later in the same cache is asked for, in the order of memory. With some multiply-adds to each line, a core waits
// for memory rather than run far enough ahead by itself.
constexpr int64_t kAheadBytes = 8192;

// The rows of one cache that a tile of some heads needs: [keys, bytes], and the part that is asked for with a share of the work.
struct Ahead {
  const char* base;
  int64_t bytes;
  int keys;  // ahead, a multiple of kValueKeys

  Ahead(const void* head0, int64_t row_bytes) : base(static_cast<const char*>(head0)), bytes(row_bytes) {
    const int64_t groups =
        row_bytes > 0 ? ceil_div<int64_t>(kAheadBytes, row_bytes * kValueKeys) : kTile;  // a head dim of 0: nothing to ask for
    keys = static_cast<int>(min<int64_t>(groups * kValueKeys, kTile));
  }
  // Share `part` of `parts` of the rows at `offset` (elements of T).
  template <class T, int kCount>
  [[gnu::always_inline]] void ask(const int64_t* offset, int64_t part, int64_t parts) const {
    const int64_t all = kCount * bytes, begin = all * part / parts, end = all * (part + 1) / parts;
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / bytes, first = at - row * bytes, last = min(bytes, first + end - at);
      const char* line = base + offset[row] * static_cast<int64_t>(sizeof(T));
      for (int64_t byte = first; byte < last; byte += 64) __builtin_prefetch(line + byte, 0, 3);
      at += last - first;
    }
  }
};

// Per-thread memory of a task. The state of (head, row) is at index head * rows_per_task + row.
struct Scratch {
  int64_t dim, dim_v;  // padded to chunks
  float *q, *out;  // [heads, rows, dim], [heads, rows, dim_v], packed
  float *row_max, *row_sum;  // [heads, rows]: of the scores
  float *scores, *row;  // [heads, rows, kTile], [the longest row]
  float *k_scale, *v_scale;  // [kTile]
  Tile tile;
};

template <class T>
int64_t scratch_floats(const KvCacheParams& p) {
  const int64_t dim = round_up<int64_t>(p.head_dim, Chunk<T>::kElements), dim_v = round_up<int64_t>(p.head_dim_v, Chunk<T>::kElements);
  const int64_t states = p.heads_per_task * p.rows_per_task;
  return round_up<int64_t>(states * (dim + dim_v + 2 + kTile) + max(dim, dim_v) + 2 * p.rotary_pairs + 2 * kTile + 64, 16);
}

template <class T>
void carve(Scratch& s, const KvCacheParams& p, float* memory) {
  s.dim = round_up<int64_t>(p.head_dim, Chunk<T>::kElements);
  s.dim_v = round_up<int64_t>(p.head_dim_v, Chunk<T>::kElements);
  const int64_t states = p.heads_per_task * p.rows_per_task;
  const auto take = [&](int64_t n) { return std::exchange(memory, memory + n); };
  s.q = take(states * s.dim);
  s.out = take(states * s.dim_v);
  s.scores = take(states * kTile);
  s.k_scale = take(kTile);
  s.v_scale = take(kTile);
  s.row_max = take(states);
  s.row_sum = take(states);
  s.row = take(max(s.dim, s.dim_v) + 2 * p.rotary_pairs);
}

void choose_keys(const KvCacheParams& p, Task& task) {
  const int64_t group = p.heads_q / p.heads_kv;
  const Range seen = visible_keys(window(p), sequence(p, task.b), task.row0 / group, (task.row0 + task.rows - 1) / group);
  task.begin = seen.begin;
  task.end = seen.end;
  const int64_t first = p.keys_per_split ? 0 : task.begin / kTile * kTile;
  const int64_t part =
      p.keys_per_split ? p.keys_per_split : round_up<int64_t>(ceil_div(max<int64_t>(0, task.end - first), p.num_splits), kTile);
  task.begin = max(task.begin, first + task.split * part);
  task.end = min(task.end, first + (task.split + 1) * part);
}

template <class T>
void load_queries(const KvCacheParams& p, const Task& task, Scratch& s) {
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t first = p.rotary_cos ? p.kv_lens[task.b] - (p.new_k.data ? 0 : p.seq_q) : 0;  // position of the first query
  float *cos = s.row, *sin = cos + p.rotary_pairs;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t i = (task.row0 + r) / group, g = (task.row0 + r) % group;
    if (p.rotary_cos) {
      load_floats(cos, p.rotary_cos, (first + i) * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
      load_floats(sin, p.rotary_sin, (first + i) * p.rotary_pairs, p.rotary_pairs, p.rotary_dtype);
    }
    for (int64_t h = 0; h < task.heads; ++h) {
      float* q = s.q + (h * p.rows_per_task + r) * s.dim;
      std::fill(q + p.head_dim, q + s.dim, 0.0f);
      load_floats(q, p.q.data, task.b * p.q.batch + i * p.q.seq + ((task.head0 + h) * group + g) * p.q.head, p.head_dim, p.dtype);
      if (p.rotary_cos) rotate_row(q, cos, sin, p.rotary_pairs, p.rotary_interleaved);
      pack<T>(q, s.dim);
    }
  }
}

// Moves on to the tile at `begin`, and fills in the one behind it.
void advance(const KvCacheParams& p, const Task& task, int64_t begin, Tile& tile) {
  // Tiles end at multiples of their size, so that the arithmetic does not depend on where the visible keys begin.
  const auto end_of = [&](int64_t first) { return min(task.end, (first / kTile + 1) * kTile); };
  const auto fill = [&](int64_t first, int at) {
    const int keys = static_cast<int>(end_of(first) - first);
    for (int j = 0; j < keys; ++j) {
      const Slot slot = slot_of(p, task.b, first + j);
      tile.k[at + j] = slot.batch * p.k.batch + slot.row * p.k.seq;
      tile.v[at + j] = slot.batch * p.v.batch + slot.row * p.v.seq;
    }
    for (int j = keys; j < kTile; ++j) tile.k[at + j] = tile.k[at + keys - 1], tile.v[at + j] = tile.v[at + keys - 1];
    return keys;
  };
  tile.begin = begin;
  if (tile.next_keys > 0) {
    std::copy_n(tile.k + kTile, kTile, tile.k);
    std::copy_n(tile.v + kTile, kTile, tile.v);
    tile.keys = tile.next_keys;
  } else {
    tile.keys = fill(begin, 0);
  }
  if (begin + tile.keys < task.end) {
    tile.next_keys = fill(begin + tile.keys, kTile);
  } else {
    tile.next_keys = 0;
    std::fill_n(tile.k + kTile, kTile, tile.k[kTile - 1]);
    std::fill_n(tile.v + kTile, kTile, tile.v[kTile - 1]);
  }
}

void load_scales(const KvCacheParams& p, const CacheScale& scale, const Task& task, const Tile& tile, int64_t head, float* out) {
  for (int j = 0; j < kTile; ++j) {
    const Slot slot = slot_of(p, task.b, tile.begin + min(j, tile.keys - 1));
    out[j] = scale.data[slot.batch * scale.batch + slot.row * scale.seq + head * scale.head];
  }
}

// Where softmax_row leaves the weights from key j on: floats, or bfloat16 at the row's beginning for decode_dot.inl.h.
template <class T>
FOVEATE_INLINE const float* weights_of(const float* row, int j) {
  return row + (Chunk<T>::kDot ? j / 2 : j);
}

// Adds the bias and hides what the mask hides, for the logits of the tile's keys.
void add_operands(const KvCacheParams& p, const Tile& tile, int64_t b, int64_t head, int64_t query, float* scores) {
  constexpr int n = kLanes<float>;
  if (p.bias.defined())
    visit_float(p.bias.dtype, [&]<class B>(std::type_identity<B>) {
      add_typed(scores, reinterpret_cast<const B*>(operand_at(p.bias, b, head, query, tile.begin)), p.bias.stride[3], tile.keys);
    });
  if (!p.mask.defined()) return;
  const int8_t* keep = reinterpret_cast<const int8_t*>(operand_at(p.mask, b, head, query, tile.begin));
  if (p.mask.stride[3] == 1) {
    for (int j = 0; j < tile.keys; j += n)
      store(scores + j, load_n<float>(keep + j, tile.keys - j) != 0 ? load<float>(scores + j) : splat(-kInf));
  } else {
    for (int j = 0; j < tile.keys; ++j) scores[j] = keep[j * p.mask.stride[3]] ? scores[j] : -kInf;
  }
}

// Scores of one row become weights; row_max and row_sum are brought up to date. Returns alpha, the factor for what was accumulated before.
template <class T>
float softmax_row(const KvCacheParams& p, const Tile& tile, int64_t b, int64_t head, int64_t query, int64_t position, const Range& visible,
                  float slope, const float* k_scale, const float* v_scale, float* scores, float& row_max, float& row_sum) {
  constexpr int n = kLanes<float>;
  const float scale = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
  const float cap = static_cast<float>(p.softcap);
  const int vecs = ceil_div(tile.keys, n);
  const int32_t lo = static_cast<int32_t>(clamp<int64_t>(visible.begin - tile.begin, 0, kTile));
  const int32_t hi = static_cast<int32_t>(clamp<int64_t>(visible.end - tile.begin, 0, tile.keys));
  // scores -> logits: scale, softcap, ALiBi; -inf where the key is not visible
  VecF tile_max = splat(-kInf);
  for (int c = 0; c < vecs; ++c) {
    const VecI j = iota<float>() + c * n;
    VecF x = load<float>(scores + c * n) * scale;
    if (k_scale) x *= load<float>(k_scale + c * n);
    if (p.softcap > 0) x = tanhv(x) * cap;
    if (slope != 0) x -= vabs<float>(__builtin_convertvector(j, VecF) - static_cast<float>(position - tile.begin)) * slope;
    x = (j >= lo) & (j < hi) ? x : splat(-kInf);
    tile_max = vmax(tile_max, x);
    store(scores + c * n, x);
  }
  if (p.bias.defined() || p.mask.defined()) {
    add_operands(p, tile, b, head, query, scores);
    tile_max = splat(-kInf);
    for (int c = 0; c < vecs; ++c) {
      const VecF x = iota<float>() + c * n < tile.keys ? load<float>(scores + c * n) : splat(-kInf);
      tile_max = vmax(tile_max, x);
      store(scores + c * n, x);
    }
  }
  // logits -> weights relative to the new maximum
  const float before = row_max, after = max(before, hmax(tile_max)), shift = after == -kInf ? 0.0f : after;
  const float alpha = before == after ? 1.0f : std::exp(before - shift);
  VecF tile_sum{};
  for (int c = 0; c < vecs; ++c) {
    VecF w = expv<float>(load<float>(scores + c * n) - shift);
    tile_sum += w;
    if (v_scale) w *= load<float>(v_scale + c * n);
    if constexpr (Chunk<T>::kDot)
      store(reinterpret_cast<bf16*>(scores) + c * n, w);
    else
      store(scores + c * n, w);
  }
  row_max = after;
  row_sum = row_sum * alpha + hsum(tile_sum);
  return alpha;
}

// The tile s.tile for `heads` heads of the task from h0 on.
template <class T>
void attend_tile(const KvCacheParams& p, const Task& task, Scratch& s, int64_t h0, int64_t heads) {
  constexpr int n = kLanes<float>, kElements = Chunk<T>::kElements, kVecs = Chunk<T>::kVecs;
  const Tile& tile = s.tile;
  const int64_t group = p.heads_q / p.heads_kv;
  const Sequence lengths = sequence(p, task.b);
  const Window<int64_t> window = FOVEATE_ISA::window(p);
  const T* k = static_cast<const T*>(p.k.data) + (task.head0 + h0) * p.k.head;
  const T* v = static_cast<const T*>(p.v.data) + (task.head0 + h0) * p.v.head;

  // S [heads, rows, keys] = q . k, kKeys keys of all heads at a time
  const Ahead k_ahead(k, ((heads - 1) * p.k.head + p.head_dim) * sizeof(T));
  for (int j = 0; j < tile.keys; j += kKeys)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t state = (h0 + h) * p.rows_per_task;
      k_ahead.ask<T, kKeys>(tile.k + j + k_ahead.keys, h, heads);
      for_row_blocks(
          task.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
            score_block<rows>(s.scores + (state + r) * kTile + j, s.q + (state + r) * s.dim, s.dim, k + h * p.k.head, tile.k + j,
                              p.head_dim);
          });
    }

  // Online softmax of every (head, row): S -> weights, row_max, row_sum; out [dim_v] is rescaled where the maximum grew
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head = task.head0 + h0 + h, state = (h0 + h) * p.rows_per_task;
    if (p.k_scale.data) load_scales(p, p.k_scale, task, tile, head, s.k_scale);
    if (p.v_scale.data) load_scales(p, p.v_scale, task, tile, head, s.v_scale);
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t i = (task.row0 + r) / group, g = (task.row0 + r) % group;
      const float slope = p.alibi ? p.alibi[task.b * p.alibi_batch + (head * group + g) * p.alibi_head] : 0.0f;
      const float alpha = softmax_row<T>(p, tile, task.b, head * group + g, i, i + lengths.shift, visible_keys(window, lengths, i), slope,
                                         p.k_scale.data ? s.k_scale : nullptr, p.v_scale.data ? s.v_scale : nullptr,
                                         s.scores + (state + r) * kTile, s.row_max[state + r], s.row_sum[state + r]);
      float* out = s.out + (state + r) * s.dim_v;
      if (alpha != 1)
        for (int64_t d = 0; d < s.dim_v; d += n) store(out + d, load<float>(out + d) * alpha);
    }
  }

  // out [heads, rows, dim_v] += weights . v, kValueKeys keys of all heads at a time
  const Ahead v_ahead(v, ((heads - 1) * p.v.head + p.head_dim_v) * sizeof(T));
  for (int j = 0; j < tile.keys; j += kValueKeys)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t state = (h0 + h) * p.rows_per_task;
      v_ahead.ask<T, kValueKeys>(tile.v + j + v_ahead.keys, h, heads);
      for_row_blocks(
          task.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
            constexpr int kAccumulators = n == 16 ? 16 : 8;
            constexpr int kChunks = (rows == 1 ? 8 : kAccumulators / (rows == 3 ? 4 : rows)) / kVecs;
            const auto block = [&](auto chunks, int64_t d, int64_t tail) __attribute__((always_inline)) {
              value_block<rows, chunks>(s.out + (state + r) * s.dim_v + d, s.dim_v, weights_of<T>(s.scores + (state + r) * kTile, j),
                                        v + h * p.v.head + d, tile.v + j, min(kValueKeys, tile.keys - j), tail);
            };
            int64_t d = 0;
            for (; d + kChunks * kElements <= p.head_dim_v; d += kChunks * kElements)
              block(std::integral_constant<int, kChunks>{}, d, kElements);
            for (; d < p.head_dim_v; d += kElements) block(std::integral_constant<int, 1>{}, d, min<int64_t>(kElements, p.head_dim_v - d));
          });
    }
}

// lse: natural log, without the sink.
FOVEATE_INLINE float sink_share(const KvCacheParams& p, int64_t head, float lse) {
  return p.sinks && lse != -kInf ? 1.0f / (1.0f + std::exp(static_cast<const float*>(p.sinks)[head] - lse)) : 1.0f;
}

FOVEATE_INLINE void write_row(const KvCacheParams& p, int64_t b, int64_t head, int64_t i, float* row, float factor, float lse) {
  constexpr int n = kLanes<float>;
  factor *= sink_share(p, head, lse);
  const int64_t at = b * p.out.batch + i * p.out.seq + head * p.out.head;
  const auto write = [&](auto* out) {
    for (int64_t d = 0; d < p.head_dim_v; d += n) store_n(out + d, load_n<float>(row + d, p.head_dim_v - d) * factor, p.head_dim_v - d);
  };
  if (p.dtype == DType::kFloat32)
    write(static_cast<float*>(p.out.data) + at);
  else if (p.dtype == DType::kBFloat16)
    write(static_cast<bf16*>(p.out.data) + at);
  else
    write(static_cast<f16*>(p.out.data) + at);
  if (p.lse.data) static_cast<float*>(p.lse.data)[b * p.lse.batch + head * p.lse.head + i] = lse;
}

template <class T>
void write_task(const KvCacheParams& p, const Task& task, Scratch& s) {
  const int64_t group = p.heads_q / p.heads_kv;
  for (int64_t h = 0; h < task.heads; ++h)
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t state = h * p.rows_per_task + r, i = (task.row0 + r) / group, head = (task.head0 + h) * group + (task.row0 + r) % group;
      const float sum = s.row_sum[state], factor = sum == 0 ? 0.0f : 1.0f / sum;
      const float lse = sum == 0 ? -kInf : s.row_max[state] + std::log(sum);
      float* row = s.out + state * s.dim_v;
      unpack<T>(row, s.dim_v);
      if (p.num_splits == 1) {
        write_row(p, task.b, head, i, row, factor, lse);
        continue;
      }
      const int64_t at = ((task.split * p.batch + task.b) * p.heads_q + head) * p.seq_q + i;
      p.partial_lse[at] = lse;
      for (int64_t d = 0; d < p.head_dim_v; ++d) p.partial_out[at * p.head_dim_v + d] = row[d] * factor;
    }
}

template <class T>
void run(const KvCacheParams& p, Task task, Scratch& s) {
  choose_keys(p, task);
  load_queries<T>(p, task, s);
  const int64_t states = task.heads * p.rows_per_task;
  std::fill(s.out, s.out + states * s.dim_v, 0.0f);
  std::fill(s.row_max, s.row_max + states, -kInf);
  std::fill(s.row_sum, s.row_sum + states, 0.0f);
  if (task.begin < task.end) {
    // The order of (tile, head) follows memory: where a key's heads are neighbours, all heads of a tile come before the next tile.
    const bool heads_inside = p.k.head <= p.k.seq;
    const int64_t outer = heads_inside ? 1 : task.heads, inner = heads_inside ? task.heads : 1;
    for (int64_t h = 0; h < outer; ++h)
      for (int64_t begin = task.begin; begin < task.end; begin += s.tile.keys) {
        advance(p, task, begin, s.tile);
        attend_tile<T>(p, task, s, h, inner);
      }
  }
  write_task<T>(p, task, s);
}

void merge_splits(const KvCacheParams& p, int threads) {
  const int64_t rows = p.batch * p.heads_q * p.seq_q, dim = p.head_dim_v;
  parallel_for(rows, 1 + 16384 / (1 + p.num_splits * dim), threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      float row_max = -kInf, row_sum = 0;
      for (int64_t split = 0; split < p.num_splits; ++split) row_max = max(row_max, p.partial_lse[split * rows + at]);
      const float shift = row_max == -kInf ? 0.0f : row_max;
      float* merged = p.partial_out + at * dim;  // of split 0
      for (int64_t split = 0; split < p.num_splits; ++split) {
        const float lse = p.partial_lse[split * rows + at], weight = std::exp(lse - shift);
        const float* part = p.partial_out + (split * rows + at) * dim;
        if (split == 0)
          for (int64_t d = 0; d < dim; ++d) merged[d] *= weight;
        else if (weight != 0)
          for (int64_t d = 0; d < dim; ++d) merged[d] += part[d] * weight;
        row_sum += weight;
      }
      const float lse = row_sum == 0 ? -kInf : row_max + std::log(row_sum), factor = row_sum == 0 ? 0.0f : 1.0f / row_sum;
      write_row(p, at / (p.heads_q * p.seq_q), at / p.seq_q % p.heads_q, at % p.seq_q, merged, factor, lse);
    }
  });
}

template <class T>
void decode_stored_as(const KvCacheParams& p, int threads) {
  const int64_t rows = p.seq_q * (p.heads_q / p.heads_kv), row_blocks = ceil_div(rows, p.rows_per_task);
  const int64_t head_blocks = ceil_div(p.heads_kv, p.heads_per_task);
  const int64_t tasks = p.batch * p.num_splits * row_blocks * head_blocks;
  const int team = static_cast<int>(min<int64_t>(tasks, threads));
  const int64_t floats = scratch_floats<T>(p);
  const AlignedFloats memory = aligned_floats(team * floats);
  parallel_tasks(tasks, team, [&](int64_t index, int thread) {
    Scratch s;
    carve<T>(s, p, memory.get() + thread * floats);
    Task task;
    // The last queries see the most keys: their blocks come first.
    task.row0 = (row_blocks - 1 - index / (p.batch * p.num_splits * head_blocks)) * p.rows_per_task;
    task.rows = min(p.rows_per_task, rows - task.row0);
    task.b = index / (p.num_splits * head_blocks) % p.batch;
    task.split = index / head_blocks % p.num_splits;
    task.head0 = index % head_blocks * p.heads_per_task;
    task.heads = min(p.heads_per_task, p.heads_kv - task.head0);
    run<T>(p, task, s);
  });
  if (p.num_splits > 1) merge_splits(p, threads);
}

}  // namespace

void decode(const KvCacheParams& p, int threads) {
  switch (p.kv_dtype) {
    case DType::kFloat32: return decode_stored_as<float>(p, threads);
    case DType::kBFloat16: return decode_stored_as<bf16>(p, threads);
    case DType::kFloat16: return decode_stored_as<f16>(p, threads);
    case DType::kInt8: return decode_stored_as<int8_t>(p, threads);
    case DType::kFloat8E4M3: return decode_stored_as<f8e4m3>(p, threads);
    default: return;
  }
}

}  // namespace foveate::cpu::FOVEATE_ISA
