// Attention of few queries to a long KV cache (flash decoding). All the query rows that share a KV head are handled together, so that K and
// V are read once; a task walks over tiles of keys and KV heads with an online softmax, and the keys of a sequence may be divided into
// splits whose partial results are merged by their log-sum-exp. csrc/cpu/decode_tile.inl.h has the arithmetic of a tile.
//
// The query rows of a KV head are numbered i * group + g: query i, head g of the group. group = Hq / Hkv.
#include <algorithm>
#include <utility>

#include "cpu/decode_dot.inl.h"
#include "cpu/decode_tile.inl.h"
#include "cpu/kv_cache.inl.h"
#include "cpu/parallel.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// Where the keys of a tile lie, in elements from the cache's start, head 0. Beyond `keys` the last key is repeated, so that blocks of
// keys may be read whole without touching what lies behind the sequence.
struct Tile {
  int64_t begin;
  int keys;
  int64_t k[kTile], v[kTile];
  int64_t k_bytes[kTile], v_bytes[kTile];  // the same, to be prefetched
};

struct Task {
  int64_t b, row0, rows, head0, heads, split;
  int64_t begin, end;  // keys
};

// Per-thread memory of a task. The state of (head, row) is at index head * rows_per_task + row.
struct Scratch {
  int64_t dim, dim_v;  // padded to chunks
  int64_t tile_keys;
  float *q, *out;  // [heads, rows, dim], [heads, rows, dim_v], packed
  float *max, *sum;  // [heads, rows]: of the scores
  float *scores, *correction, *row;  // [rows, kTile], [rows], [the longest row]
  float *k_scale, *v_scale;  // [kTile]
  Tile tiles[2];
};

template <class T>
int64_t scratch_floats(const KvCacheParams& p) {
  const int64_t dim = round_up<int64_t>(p.head_dim, Chunk<T>::kElements), dim_v = round_up<int64_t>(p.head_dim_v, Chunk<T>::kElements);
  const int64_t states = p.heads_per_task * p.rows_per_task;
  return round_up<int64_t>(
      states * (dim + dim_v + 2) + p.rows_per_task * (kTile + 1) + std::max(dim, dim_v) + 2 * p.rotary_pairs + 2 * kTile + 64, 16);
}

template <class T>
void carve(Scratch& s, const KvCacheParams& p, float* memory) {
  s.dim = round_up<int64_t>(p.head_dim, Chunk<T>::kElements), s.dim_v = round_up<int64_t>(p.head_dim_v, Chunk<T>::kElements);
  s.tile_keys = p.rows_per_task <= Chunk<T>::kFewRows ? Chunk<T>::kFewRowsTile : kTile;
  const int64_t states = p.heads_per_task * p.rows_per_task;
  const auto take = [&](int64_t n) { return std::exchange(memory, memory + n); };
  s.q = take(states * s.dim), s.out = take(states * s.dim_v);
  s.scores = take(p.rows_per_task * kTile), s.k_scale = take(kTile), s.v_scale = take(kTile);
  s.max = take(states), s.sum = take(states), s.correction = take(p.rows_per_task);
  s.row = take(std::max(s.dim, s.dim_v) + 2 * p.rotary_pairs);
}

// The keys that one query may see.
struct Visible {
  int64_t position, begin, end;
};
FOVEATE_INLINE Visible visible_to(const KvCacheParams& p, int64_t len, int64_t query) {
  const int64_t position = len - p.seq_q + query;
  int64_t begin = 0, end = len;
  if (p.causal) end = std::min(end, position + 1);
  if (p.window_right >= 0) end = std::min(end, position + p.window_right + 1);
  if (p.window_left >= 0) begin = std::max<int64_t>(0, position - p.window_left);
  return {position, begin, end};
}

void choose_keys(const KvCacheParams& p, int64_t tile, Task& task) {
  const int64_t group = p.heads_q / p.heads_kv, len = p.kv_lens[task.b] + p.seq_new;
  task.begin = visible_to(p, len, task.row0 / group).begin;
  task.end = visible_to(p, len, (task.row0 + task.rows - 1) / group).end;
  const int64_t first = p.keys_per_split ? 0 : task.begin / tile * tile;
  const int64_t part =
      p.keys_per_split ? p.keys_per_split : round_up<int64_t>(ceil_div(std::max<int64_t>(0, task.end - first), p.num_splits), tile);
  task.begin = std::max(task.begin, first + task.split * part);
  task.end = std::min(task.end, first + (task.split + 1) * part);
}

template <class T>
void load_queries(const KvCacheParams& p, const Task& task, Scratch& s) {
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t first = p.kv_lens[task.b] - (p.new_k.data ? 0 : p.seq_q);
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

template <class T>
void locate(const KvCacheParams& p, const Task& task, int64_t most, int64_t begin, Tile& tile) {
  tile.begin = begin;
  // Tiles end at multiples of their size, so that the arithmetic does not depend on where the visible keys begin.
  tile.keys = static_cast<int>(std::min(task.end, (begin / most + 1) * most) - begin);
  for (int j = 0; j < tile.keys; ++j) {
    const Slot slot = slot_of(p, task.b, begin + j);
    tile.k[j] = slot.batch * p.k.rows.batch + slot.row * p.k.rows.seq;
    tile.v[j] = slot.batch * p.v.rows.batch + slot.row * p.v.rows.seq;
    tile.k_bytes[j] = tile.k[j] * sizeof(T), tile.v_bytes[j] = tile.v[j] * sizeof(T);
  }
  for (int j = tile.keys; j < most; ++j) tile.k[j] = tile.k[tile.keys - 1], tile.v[j] = tile.v[tile.keys - 1];
}

void load_scales(const KvCacheParams& p, const CacheOperand& cache, const Task& task, const Tile& tile, int64_t head, float* out) {
  for (int j = 0; j < kTile; ++j) {
    const Slot slot = slot_of(p, task.b, tile.begin + std::min(j, tile.keys - 1));
    out[j] = cache.scale[slot.batch * cache.scale_batch + slot.row * cache.scale_seq + head * cache.scale_head];
  }
}

// Scores of one row become weights (bfloat16 ones at the row's beginning, for decode_dot.inl.h); max, sum and the correction of what was
// accumulated before are brought up to date.
template <class T>
void softmax_row(const KvCacheParams& p, const Tile& tile, const Visible& visible, float slope, const float* k_scale, const float* v_scale,
                 float* scores, float& max, float& sum, float& correction) {
  constexpr int n = kLanes<float>;
  const float scale = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
  const float cap = static_cast<float>(p.softcap);
  const int vecs = ceil_div(tile.keys, n);
  const int32_t lo = static_cast<int32_t>(std::clamp<int64_t>(visible.begin - tile.begin, 0, kTile));
  const int32_t hi = static_cast<int32_t>(std::clamp<int64_t>(visible.end - tile.begin, 0, tile.keys));
  VecF top = splat(-kInf);
  for (int c = 0; c < vecs; ++c) {
    const VecI j = iota<float>() + c * n;
    VecF x = load<float>(scores + c * n) * scale;
    if (k_scale) x *= load<float>(k_scale + c * n);
    if (p.softcap > 0) x = tanhv(x) * cap;
    if (slope != 0) x -= vabs<float>(__builtin_convertvector(j, VecF) - static_cast<float>(visible.position - tile.begin)) * slope;
    x = (j >= lo) & (j < hi) ? x : splat(-kInf);
    top = vmax(top, x);
    store(scores + c * n, x);
  }
  const float before = max, after = std::max(before, hmax(top)), shift = after == -kInf ? 0.0f : after;
  correction = before == after ? 1.0f : std::exp(before - shift);
  VecF total{};
  for (int c = 0; c < vecs; ++c) {
    VecF w = expv<float>(load<float>(scores + c * n) - shift);
    total += w;
    if (v_scale) w *= load<float>(v_scale + c * n);
    if constexpr (Chunk<T>::kDot)
      store(reinterpret_cast<bf16*>(scores) + c * n, w);
    else
      store(scores + c * n, w);
  }
  max = after;
  sum = sum * correction + hsum(total);
}

template <class T>
void attend_tile(const KvCacheParams& p, const Task& task, Scratch& s, const Tile& tile, int64_t h, Ahead& k_ahead, Ahead& v_ahead) {
  constexpr int n = kLanes<float>, kElements = Chunk<T>::kElements, kVecs = Chunk<T>::kVecs;
  const int64_t head = task.head0 + h, group = p.heads_q / p.heads_kv, state = h * p.rows_per_task, len = p.kv_lens[task.b] + p.seq_new;
  const T* k = static_cast<const T*>(p.k.rows.data) + head * p.k.rows.head;
  const T* v = static_cast<const T*>(p.v.rows.data) + head * p.v.rows.head;

  for (int j = 0; j < tile.keys; j += n) {
    for_row_blocks(
        task.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
          for (int i = j; i < j + n; i += n / rows)
            score_block<rows>(s.scores + r * kTile + i, s.q + (state + r) * s.dim, s.dim, k, tile.k + i, p.head_dim,
                              r == 0 ? &k_ahead : nullptr);
        });
  }

  if (p.k.scale) load_scales(p, p.k, task, tile, head, s.k_scale);
  if (p.v.scale) load_scales(p, p.v, task, tile, head, s.v_scale);
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t i = (task.row0 + r) / group, g = (task.row0 + r) % group;
    const float slope = p.alibi ? p.alibi[task.b * p.alibi_batch + (head * group + g) * p.alibi_head] : 0.0f;
    softmax_row<T>(p, tile, visible_to(p, len, i), slope, p.k.scale ? s.k_scale : nullptr, p.v.scale ? s.v_scale : nullptr,
                   s.scores + r * kTile, s.max[state + r], s.sum[state + r], s.correction[r]);
  }

  for_row_blocks(
      task.rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
        constexpr int kAccumulators = n == 16 ? 16 : 8;
        constexpr int kChunks = std::min(8, std::max(1, kAccumulators / rows)) / kVecs;
        const auto block = [&](auto chunks, int64_t d, int64_t tail) __attribute__((always_inline)) {
          value_block<rows, chunks>(s.out + (state + r) * s.dim_v + d, s.dim_v, s.correction + r, s.scores + r * kTile, v + d, tile.v,
                                    tile.keys, tail, r == 0 ? &v_ahead : nullptr);
        };
        int64_t d = 0;
        for (; d + kChunks * kElements <= p.head_dim_v; d += kChunks * kElements)
          block(std::integral_constant<int, kChunks>{}, d, kElements);
        for (; d < p.head_dim_v; d += kElements) block(std::integral_constant<int, 1>{}, d, std::min<int64_t>(kElements, p.head_dim_v - d));
      });
}

// lse: natural log, without the sink.
FOVEATE_INLINE float sink_share(const KvCacheParams& p, int64_t head, float lse) {
  return p.sinks && lse != -kInf ? 1.0f / (1.0f + std::exp(p.sinks[head] - lse)) : 1.0f;
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
  if (p.lse) p.lse[(b * p.heads_q + head) * p.seq_q + i] = lse;
}

template <class T>
void write_task(const KvCacheParams& p, const Task& task, Scratch& s) {
  const int64_t group = p.heads_q / p.heads_kv;
  for (int64_t h = 0; h < task.heads; ++h)
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t state = h * p.rows_per_task + r, i = (task.row0 + r) / group, head = (task.head0 + h) * group + (task.row0 + r) % group;
      const float sum = s.sum[state], factor = sum == 0 ? 0.0f : 1.0f / sum;
      const float lse = sum == 0 ? -kInf : s.max[state] + std::log(sum);
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
  choose_keys(p, s.tile_keys, task);
  load_queries<T>(p, task, s);
  const int64_t states = task.heads * p.rows_per_task;
  std::fill(s.out, s.out + states * s.dim_v, 0.0f);
  std::fill(s.max, s.max + states, -kInf), std::fill(s.sum, s.sum + states, 0.0f);
  if (task.begin < task.end) {
    // The order of (tile, head) follows memory: where a key's heads are neighbours, all heads of a tile come before the next tile.
    const bool heads_inside = p.k.rows.head <= p.k.rows.seq;
    const int64_t size = s.tile_keys;
    const int64_t first = task.begin / size, tiles = ceil_div<int64_t>(task.end, size) - first;
    const auto fill = [&](int64_t t, Tile& tile) { locate<T>(p, task, size, std::max(task.begin, (first + t) * size), tile); };
    const auto ahead = [&](const CacheOperand& cache, const int64_t* offset_bytes, int keys, int64_t h, int64_t heads, int64_t dim) {
      const int64_t head_bytes = cache.rows.head * sizeof(T);
      return Ahead{static_cast<const char*>(cache.rows.data) + (task.head0 + h) * head_bytes, offset_bytes, keys,
                   (heads - 1) * head_bytes + dim * static_cast<int64_t>(sizeof(T))};
    };
    const int64_t outer = heads_inside ? 1 : task.heads, inner = heads_inside ? task.heads : 1;
    for (int64_t h0 = 0; h0 < outer; ++h0) {
      int current = 0;
      fill(0, s.tiles[0]);
      for (int64_t t = 0; t < tiles; ++t, current = 1 - current) {
        Tile& next = s.tiles[1 - current];
        next.keys = 0;
        if (t + 1 < tiles) fill(t + 1, next);
        Ahead k_ahead = ahead(p.k, next.k_bytes, next.keys, h0, inner, p.head_dim);
        Ahead v_ahead = ahead(p.v, next.v_bytes, next.keys, h0, inner, p.head_dim_v);
        for (int64_t h = h0; h < h0 + inner; ++h) attend_tile<T>(p, task, s, s.tiles[current], h, k_ahead, v_ahead);
      }
    }
  }
  write_task<T>(p, task, s);
}

void merge_splits(const KvCacheParams& p, int threads) {
  const int64_t rows = p.batch * p.heads_q * p.seq_q, dim = p.head_dim_v;
  parallel_for(rows, 1 + 16384 / (1 + p.num_splits * dim), threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      float top = -kInf, sum = 0;
      for (int64_t split = 0; split < p.num_splits; ++split) top = std::max(top, p.partial_lse[split * rows + at]);
      const float shift = top == -kInf ? 0.0f : top;
      float* merged = p.partial_out + at * dim;  // of split 0
      for (int64_t split = 0; split < p.num_splits; ++split) {
        const float lse = p.partial_lse[split * rows + at], weight = std::exp(lse - shift);
        const float* part = p.partial_out + (split * rows + at) * dim;
        if (split == 0)
          for (int64_t d = 0; d < dim; ++d) merged[d] *= weight;
        else if (weight != 0)
          for (int64_t d = 0; d < dim; ++d) merged[d] += part[d] * weight;
        sum += weight;
      }
      const float lse = sum == 0 ? -kInf : top + std::log(sum), factor = sum == 0 ? 0.0f : 1.0f / sum;
      write_row(p, at / (p.heads_q * p.seq_q), at / p.seq_q % p.heads_q, at % p.seq_q, merged, factor, lse);
    }
  });
}

template <class T>
void decode_stored_as(const KvCacheParams& p, int threads) {
  const int64_t rows = p.seq_q * (p.heads_q / p.heads_kv), row_blocks = ceil_div(rows, p.rows_per_task);
  const int64_t head_blocks = ceil_div(p.heads_kv, p.heads_per_task);
  const int64_t tasks = p.batch * p.num_splits * row_blocks * head_blocks;
  const int team = static_cast<int>(std::min<int64_t>(tasks, threads));
  const int64_t floats = scratch_floats<T>(p);
  const AlignedFloats memory = aligned_floats(team * floats);
  parallel_tasks(tasks, team, [&](int64_t index, int thread) {
    Scratch s;
    carve<T>(s, p, memory.get() + thread * floats);
    Task task;
    // The last queries see the most keys: their blocks come first.
    task.row0 = (row_blocks - 1 - index / (p.batch * p.num_splits * head_blocks)) * p.rows_per_task;
    task.rows = std::min(p.rows_per_task, rows - task.row0);
    task.b = index / (p.num_splits * head_blocks) % p.batch;
    task.split = index / head_blocks % p.num_splits;
    task.head0 = index % head_blocks * p.heads_per_task;
    task.heads = std::min(p.heads_per_task, p.heads_kv - task.head0);
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
