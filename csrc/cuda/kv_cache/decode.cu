// Attention of few queries to a long KV cache, dense or paged (flash decoding; Dao et al. 2023).
//
// The query rows that share a KV head, i * group + g for query i and head g of the group = Hq / Hkv, are the 16 rows of a tile; a block
// takes one such tile, one KV head, one sequence and one split of its keys. Every warp of the block reads keys of its own, 16 at a time: it
// copies them to shared memory (two stages, cp.async; one where two do not fit), multiplies, and keeps private row_max, row_sum and
// accumulator in registers; the warps synchronise only at the final merge. So the only traffic is K and V, once, and there is no barrier in
// the loop. Tile t of a sequence, keys 16t.., belongs to warp t % warps: the order of every sum is fixed by the shapes.
//
// int8 and fp8 keys are copied as they are and widened to the dtype of q in shared memory. Where Dv exceeds 256, as in MLA, the columns of
// V are divided among blocks, which compute the scores again. Splits write partial results; the last block of a tile of rows to finish
// merges them by their log-sum-exp, in the order of the splits, so that a call is one launch and its bits do not depend on who was last.
#include "cuda/host/kernels.h"
#include "cuda/kv_cache/decode_work.cuh"

namespace foveate::cuda {
namespace {

// Two rows of the tile, those that a lane holds: g and g + 8.
struct RowState {
  float row_max[2] = {-kInfinity, -kInfinity}, row_sum[2] = {0, 0};  // row_sum: of this lane's keys
  float slope[2];
  int64_t position[2], begin[2], end[2];

  __device__ RowState(const KvCacheParams& p, const DecodeTask& task, const Lengths<int64_t>& s) {
    const int64_t group = p.heads_q / p.heads_kv;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = task.row0 + dev::lane() / 4 + 8 * r;
      const Span<int64_t> visible = visible_to(p, s, row / group, row / group);
      const bool used = row < p.seq_q * group;
      begin[r] = visible.begin < task.begin ? task.begin : visible.begin;
      end[r] = used ? min(visible.end, task.end) : 0;
      position[r] = row / group + s.shift;
      slope[r] = p.alibi && used
                     ? dev::ld_global_nc<float>(p.alibi + task.b * p.alibi_batch + (task.head * group + row % group) * p.alibi_head)
                     : 0.0f;
    }
  }
};

// Online softmax: scores [16, 16] of keys first.. become weights; row_max, row_sum and out [16, columns] are brought up to date.
template <int kOut>
__device__ __forceinline__ void softmax_tile(const KvCacheParams& p, RowState& rows, int64_t first, float (&scores)[2][4],
                                             float (&out)[kOut][4]) {
  const float softcap = static_cast<float>(p.softcap), scale = static_cast<float>(p.softcap > 0 ? p.scale / p.softcap : p.scale);
  float alpha[2];  // rescales what was summed under the old maximum
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto in_tile = [&](int64_t key) { return static_cast<int>(min(max(key - first, int64_t{0}), int64_t{kTileKeys})); };
    const int begin = in_tile(rows.begin[r]), end = in_tile(rows.end[r]);
    const float distance = static_cast<float>(first - rows.position[r]);
    float new_max = rows.row_max[r];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = 8 * n + dev::lane() % 4 * 2 + c;
        float x = scores[n][2 * r + c] * scale;
        if (softcap > 0) x = tanhf(x) * softcap;
        if (p.alibi) x -= fabsf(distance + static_cast<float>(key)) * rows.slope[r];
        x = key >= begin && key < end ? x : -kInfinity;
        scores[n][2 * r + c] = x;
        new_max = fmaxf(new_max, x);
      }
    new_max = fmaxf(new_max, dev::shfl_xor(new_max, 1));
    new_max = fmaxf(new_max, dev::shfl_xor(new_max, 2));
    const float shift = new_max == -kInfinity ? 0.0f : new_max;
    alpha[r] = dev::exp2_approx((rows.row_max[r] - shift) * kLog2eF);
    if (rows.row_max[r] == new_max) alpha[r] = 1;
    float tile_sum = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) tile_sum += scores[n][2 * r + c] = dev::exp2_approx((scores[n][2 * r + c] - shift) * kLog2eF);
    rows.row_max[r] = new_max;
    rows.row_sum[r] = rows.row_sum[r] * alpha[r] + tile_sum;
  }
  if (!dev::any(alpha[0] != 1 || alpha[1] != 1)) return;
#pragma unroll
  for (int n = 0; n < kOut; ++n) {
    out[n][0] *= alpha[0];
    out[n][1] *= alpha[0];
    out[n][2] *= alpha[1];
    out[n][3] *= alpha[1];
  }
}

// The result of one row: column d, normalised. lse: natural log, without the sink.
__device__ __forceinline__ void write_out(const KvCacheParams& p, int64_t b, int64_t head, int64_t i, int64_t d, float value, float lse) {
  if (p.sinks && lse != -kInfinity)
    value *= 1.0f / (1.0f + expf(dev::ld_global_nc<float>(static_cast<const float*>(p.sinks) + head) - lse));
  const int64_t at = b * p.out.batch + i * p.out.seq + head * p.out.head + d;
  if (p.dtype == DType::kFloat32)
    dev::st_global(static_cast<float*>(p.out.data) + at, value);
  else if (p.dtype == DType::kBFloat16)
    dev::st_global(static_cast<bf16*>(p.out.data) + at, dev::from_float<bf16>(value));
  else
    dev::st_global(static_cast<f16*>(p.out.data) + at, dev::from_float<f16>(value));
  if (p.lse.data && d == 0) dev::st_global(static_cast<float*>(p.lse.data) + b * p.lse.batch + head * p.lse.head + i, lse);
}

// ---- attention of one block --------------------------------------------------------------------------------------------------
// T: of q, S: of the cache. kColumns: of V, at most, of one block.

// The shared memory of a warp: the block's queries [16, dim], then for each warp `stages` times K [16, D], V [16, columns] and their scales
// as they are stored, and for int8 and fp8 one tile widened to T.
struct WarpTiles {
  const DecodeWork& work;
  uint32_t q, first, wide;

  __device__ explicit WarpTiles(const DecodeWork& work)
      : work(work),
        q(dev::smem_base()),
        first(q + kTileRows * work.q_row_bytes + dev::warp() * work.warp_bytes),
        wide(first + work.stages * work.stage_bytes) {}
  __device__ uint32_t k(int stage) const { return first + stage * work.stage_bytes; }
  __device__ uint32_t v(int stage) const { return k(stage) + kTileKeys * work.k_row_bytes; }
  __device__ uint32_t scales(int stage) const { return v(stage) + kTileKeys * work.v_row_bytes; }

  // What no copy reaches must be zero: columns between the head dims and a multiple of 16.
  __device__ void clear_padding(int columns) const {
    if (work.params.head_dim % 16 == 0 && columns % 16 == 0) return;
    for (int at = 16 * dev::lane(); at < work.warp_bytes; at += 16 * 32) dev::st_shared(first + at, make_uint4(0, 0, 0, 0));
    dev::sync_warp();
  }
};

// Starts the copy of one tile of K [16, D] and V [16, columns] to `stage`: one group of cp.async, empty where there is no tile.
template <class S>
__device__ __forceinline__ void fetch_tile(const WarpTiles& tiles, const KeyAddress& at, bool exists, int stage, int columns) {
  const DecodeWork& work = tiles.work;
  const KvCacheParams& p = work.params;
  if (exists) {
    copy_rows<S>(tiles.k(stage), work.k_row_bytes, p.k.data, at.bytes, 0, static_cast<int>(p.head_dim * sizeof(S)), work.k_copy_bytes);
    copy_rows<S>(tiles.v(stage), work.v_row_bytes, p.v.data, at.bytes, kTileKeys, static_cast<int>(columns * sizeof(S)), work.v_copy_bytes);
    if (sizeof(S) == 1) dev::st_shared<float>(tiles.scales(stage) + 4 * dev::lane(), at.scale);
  }
  dev::cp_async_commit();
}

// The block's rows of q, rotated: [16, dim], zeros beyond the rows that are there. All warps; a barrier follows.
template <class T>
__device__ __forceinline__ void store_queries(const DecodeWork& work, const DecodeTask& task, uint32_t q) {
  const KvCacheParams& p = work.params;
  const int64_t group = p.heads_q / p.heads_kv, rows = p.seq_q * group;
  for (int item = static_cast<int>(threadIdx.x); item < kTileRows * work.dim / kVec<T>; item += 32 * work.warps) {
    const int r = item / (work.dim / kVec<T>), j = item % (work.dim / kVec<T>)*kVec<T>;
    const int64_t row = task.row0 + r;
    float x[kVec<T>] = {};
    if (row < rows) load_query<T>(p, task.b, row / group, task.head * group + row % group, j, x);
    dev::st_shared(q + r * work.q_row_bytes + j * static_cast<int>(sizeof(T)), pack_chunk<T, kVec<T>>(x));
  }
}

// One tile: S [16, 16] = q K^T -> online softmax -> out [16, columns] += P V. First key: `key`.
template <class T, class S, int kColumns>
__device__ __forceinline__ void attend_tile(const WarpTiles& tiles, int stage, int64_t key, RowState& state,
                                            float (&out)[kColumns / 8][4]) {
  const DecodeWork& work = tiles.work;
  float scores[2][4];
  if constexpr (sizeof(S) == 1) {
    widen_tile<T, S>(tiles.wide, work.wide_row_bytes, tiles.k(stage), work.k_row_bytes, tiles.scales(stage), work.dim);
    dev::sync_warp();
    score_tile<T>(scores, tiles.q, work.q_row_bytes, tiles.wide, work.wide_row_bytes, work.dim);
  } else {
    score_tile<T>(scores, tiles.q, work.q_row_bytes, tiles.k(stage), work.k_row_bytes, work.dim);
  }
  softmax_tile(work.params, state, key, scores, out);
  if constexpr (sizeof(S) == 1) {
    dev::sync_warp();
    widen_tile<T, S>(tiles.wide, work.wide_row_bytes, tiles.v(stage), work.v_row_bytes, tiles.scales(stage) + 4 * kTileKeys,
                     work.slice_columns);
    dev::sync_warp();
    value_tile<T, kColumns>(out, scores, tiles.wide, work.wide_row_bytes, work.slice_columns);
  } else {
    value_tile<T, kColumns>(out, scores, tiles.v(stage), work.v_row_bytes, work.slice_columns);
  }
  dev::sync_warp();
}

// The warps' partial results [warp][16][columns] and their row_max and row_sum [warp][16], in shared memory over everything else; then the
// rows merged by their log-sum-exp and written, or left to merge_splits.
template <int kColumns>
__device__ __forceinline__ void merge_warps(const DecodeWork& work, const DecodeTask& task, const RowState& state,
                                            const float (&out)[kColumns / 8][4], int columns) {
  const KvCacheParams& p = work.params;
  const int64_t group = p.heads_q / p.heads_kv, rows = p.seq_q * group;
  const int lane = dev::lane(), warp = dev::warp();
  const uint32_t base = dev::smem_base();
  const auto out_at = [&](int w, int r, int d) { return base + 4 * ((w * kTileRows + r) * (work.slice_columns + kMergePadding) + d); };
  const auto stats_at = [&](int w, int r) { return out_at(work.warps, 0, 0) + 8 * (w * kTileRows + r); };
  dev::sync_threads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    float sum = state.row_sum[r];
    sum += dev::shfl_xor(sum, 1);
    sum += dev::shfl_xor(sum, 2);
    if (lane % 4 == 0) dev::st_shared(stats_at(warp, row), make_float2(state.row_max[r], sum));
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      if (8 * n < work.slice_columns)
        dev::st_shared(out_at(warp, row, 8 * n + lane % 4 * 2), make_float2(out[n][2 * r], out[n][2 * r + 1]));
  }
  dev::sync_threads();
  for (int item = static_cast<int>(threadIdx.x); item < kTileRows * columns; item += 32 * work.warps) {
    const int r = item / columns, d = item % columns;
    const int64_t row = task.row0 + r;
    if (row >= rows) break;
    float row_max = -kInfinity, row_sum = 0, value = 0;
    for (int w = 0; w < work.warps; ++w) row_max = fmaxf(row_max, dev::ld_shared<float2>(stats_at(w, r)).x);
    const float shift = row_max == -kInfinity ? 0.0f : row_max;
    for (int w = 0; w < work.warps; ++w) {
      const float2 stats = dev::ld_shared<float2>(stats_at(w, r));
      const float weight = dev::exp2_approx((stats.x - shift) * kLog2eF);
      row_sum += stats.y * weight;
      value += dev::ld_shared<float>(out_at(w, r, d)) * weight;
    }
    const float lse = row_sum == 0 ? -kInfinity : row_max + logf(row_sum);
    value = row_sum == 0 ? 0.0f : value / row_sum;
    const int64_t i = row / group, head = task.head * group + row % group;
    if (p.num_splits == 1) {
      write_out(p, task.b, head, i, task.first_column + d, value, lse);
    } else {
      const int64_t at = ((task.split * p.batch + task.b) * p.heads_q + head) * p.seq_q + i;
      dev::st_global(p.partial_out + at * p.head_dim_v + task.first_column + d, value);
      if (task.first_column + d == 0) dev::st_global(p.partial_lse + at, lse);
    }
  }
}

template <class T, class S, int kColumns>
__device__ __forceinline__ void attend(const DecodeWork& work, const DecodeTask& task, const Lengths<int64_t>& s) {
  const KvCacheParams& p = work.params;
  const int columns = min(kColumns, static_cast<int>(p.head_dim_v) - task.first_column);  // that are there
  const int warp = dev::warp();
  const WarpTiles tiles(work);
  tiles.clear_padding(columns);

  // This warp's tiles are first_tile, first_tile + warps, ...: the first of them are on their way while the queries are loaded.
  const int64_t begin_tile = task.begin / kTileKeys, end_tile = task.end > task.begin ? (task.end + kTileKeys - 1) / kTileKeys : begin_tile;
  const int64_t first_tile = begin_tile + (warp - begin_tile % work.warps + work.warps) % work.warps;
  for (int stage = 0; stage < work.stages; ++stage) {
    const int64_t tile = first_tile + stage * work.warps;
    fetch_tile<S>(tiles, locate<S>(p, task, tile), tile < end_tile, stage, columns);
  }
  store_queries<T>(work, task, tiles.q);
  dev::sync_threads();

  // The loop over keys: without a barrier of the block. The addresses of a later tile are looked up while this one arrives.
  RowState state(p, task, s);
  float out[kColumns / 8][4] = {};  // C fragments [16, columns]
  int stage = 0;
  for (int64_t tile = first_tile; tile < end_tile; tile += work.warps, stage ^= work.stages - 1) {
    const int64_t later_tile = tile + work.stages * work.warps;
    const KeyAddress later = locate<S>(p, task, later_tile);
    if (work.stages == kMaxStages)
      dev::cp_async_wait<kMaxStages - 1>();
    else
      dev::cp_async_wait<0>();
    dev::sync_warp();
    attend_tile<T, S, kColumns>(tiles, stage, tile * kTileKeys, state, out);
    fetch_tile<S>(tiles, later, later_tile < end_tile, stage, columns);
  }
  dev::cp_async_wait_all();
  merge_warps<kColumns>(work, task, state, out, columns);
}

// ---- the splits of a sequence ------------------------------------------------------------------------------------------------

constexpr int kMergeColumns = 4, kMergeAhead = 8;  // columns of a thread; splits that it asks for at a time

// A warp merges 128 columns of one row.
__device__ __forceinline__ void merge_splits(const KvCacheParams& p, int64_t b, int64_t head, int64_t i, int64_t first_column) {
  const int64_t rows = p.batch * p.heads_q * p.seq_q, row = (b * p.heads_q + head) * p.seq_q + i, dim = p.head_dim_v,
                d = first_column + kMergeColumns * dev::lane();
  const auto lse_of = [&](int64_t split) {
    return split < p.num_splits ? dev::ld_global<float>(p.partial_lse + split * rows + row) : -kInfinity;
  };
  float row_max = -kInfinity;
  for (int64_t split = dev::lane(); split < p.num_splits; split += 32) row_max = fmaxf(row_max, lse_of(split));
  for (int mask = 16; mask > 0; mask /= 2) row_max = fmaxf(row_max, dev::shfl_xor(row_max, mask));
  const float shift = row_max == -kInfinity ? 0.0f : row_max;
  float merged[kMergeColumns] = {}, sum = 0;
  for (int64_t first = 0; first < p.num_splits; first += 32) {
    const float weight = dev::exp2_approx((lse_of(first + dev::lane()) - shift) * kLog2eF);
    sum += weight;
    for (int s = 0; s < 32 && first + s < p.num_splits; s += kMergeAhead) {
      float part[kMergeAhead][kMergeColumns], weights[kMergeAhead];
#pragma unroll
      for (int k = 0; k < kMergeAhead; ++k) {
        weights[k] = dev::shfl_idx(weight, s + k);  // 0 beyond the last split; a split without keys has written nothing
        load_chunk<Read::kInPlace>(p.partial_out + ((first + s + k) * rows + row) * dim, d, weights[k] == 0 ? 0 : dim, 0.0f, part[k]);
      }
#pragma unroll
      for (int k = 0; k < kMergeAhead; ++k)
#pragma unroll
        for (int c = 0; c < kMergeColumns; ++c) merged[c] += weights[k] * part[k][c];
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += dev::shfl_xor(sum, mask);
  const float lse = sum == 0 ? -kInfinity : row_max + logf(sum), factor = sum == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int c = 0; c < kMergeColumns; ++c)
    if (d + c < dim) write_out(p, row / (p.heads_q * p.seq_q), row / p.seq_q % p.heads_q, row % p.seq_q, d + c, merged[c] * factor, lse);
}

// Blocks of an SM, which bound the registers: as many as its shared memory holds in the common case, 16 bits and 128 columns.
template <class T, int kColumns>
constexpr int kBlocks = sizeof(T) == 2 && kColumns == 128 ? 3 : 2;

template <class T, class S, int kColumns>
__global__ void __launch_bounds__(32 * kMaxWarps, (kBlocks<T, kColumns>)) decode_kernel(const __grid_constant__ DecodeWork work) {
  const KvCacheParams& p = work.params;
  DecodeTask task;
  int64_t block = blockIdx.x;
  const auto next = [&](int64_t n) {
    const int64_t index = block % n;
    block /= n;
    return index;
  };
  task.first_column = static_cast<int>(next(work.slices)) * kColumns;
  task.row0 = next(work.row_blocks) * kTileRows;
  task.head = next(p.heads_kv);
  task.split = next(p.num_splits);
  task.b = block;
  const Lengths<int64_t> s = sequence(p, task.b);
  task = task_of(work, s, task);
  const bool empty = p.num_splits > 1 && task.begin >= task.end;
  if (!empty) attend<T, S, kColumns>(work, task, s);
  if (p.num_splits == 1) return;

  const int64_t group = p.heads_q / p.heads_kv, used = min(int64_t{kTileRows}, p.seq_q * group - task.row0);
  if (empty && threadIdx.x < used && task.first_column == 0) {  // the merge skips this split
    const int64_t row = task.row0 + threadIdx.x, head = task.head * group + row % group;
    dev::st_global(p.partial_lse + ((task.split * p.batch + task.b) * p.heads_q + head) * p.seq_q + row / group, -kInfinity);
  }
  dev::fence_gpu();
  dev::sync_threads();
  uint32_t* counter = p.counters + (task.b * p.heads_kv + task.head) * work.row_blocks + task.row0 / kTileRows;
  const auto last = static_cast<uint32_t>(p.num_splits * work.slices - 1);
  if (!dev::sync_threads_or(threadIdx.x == 0 && dev::atomic_add_acq_rel(counter, 1) == last)) return;
  dev::fence_gpu();
  if (threadIdx.x == 0) dev::st_global<uint32_t>(counter, 0);  // as the next call expects it
  const int64_t column_blocks = chunks_of(p.head_dim_v, kMergeColumns * 32);
  for (int64_t item = dev::warp(); item < used * column_blocks; item += work.warps) {
    const int64_t row = task.row0 + item / column_blocks;
    merge_splits(p, task.b, task.head * group + row % group, row / group, item % column_blocks * (kMergeColumns * 32));
  }
}

// How many bytes may be copied at a time from every row of the cache.
int copy_bytes(const foveate::Rows& rows, int64_t elements, int64_t size) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) | (rows.batch | rows.seq | rows.head | elements) * size;
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : static_cast<int>(size);
}

template <class T, class S, int kColumns>
void decode_columns(const KvCacheParams& p, Stream stream) {
  DecodeWork work{decode_layout(p.head_dim, p.head_dim_v, kColumns, sizeof(T), sizeof(S))};
  work.params = p;
  const int64_t rows = p.seq_q * (p.heads_q / p.heads_kv);
  work.row_blocks = static_cast<int>(ceil_div<int64_t>(rows, kTileRows));
  work.slices = static_cast<int>(ceil_div<int64_t>(p.head_dim_v, kColumns));
  work.k_copy_bytes = copy_bytes(p.k, p.head_dim, sizeof(S));
  work.v_copy_bytes = copy_bytes(p.v, p.head_dim_v, sizeof(S));

  check(work.shared_bytes <= kMostSharedMemory, "decode on a GPU needs ", work.shared_bytes, " bytes of shared memory for head dims ",
        p.head_dim, " and ", p.head_dim_v, " in ", name(p.dtype), ", more than ", kMostSharedMemory,
        ": use a 16-bit dtype or backend='triton'");
  check(p.num_splits == 1 || (p.counters && p.rows_per_task == std::min<int64_t>(rows, kTileRows)), "decode on a GPU takes tiles of ",
        kTileRows, " rows and a counter for each, the call has rows_per_task = ", p.rows_per_task);
  const int64_t blocks = p.batch * p.num_splits * p.heads_kv * work.row_blocks * work.slices;
  check(blocks <= INT32_MAX, "num_splits = ", p.num_splits, " divides the work into ", blocks, " blocks, a grid has at most ", INT32_MAX,
        ": use fewer splits");
  launch<decode_kernel<T, S, kColumns>>(static_cast<unsigned>(blocks), 32 * work.warps, work.shared_bytes, stream, work);
}

template <class T, class S>
void decode_stored_as(const KvCacheParams& p, Stream stream) {
  if (p.head_dim_v <= 128)
    decode_columns<T, S, 128>(p, stream);
  else
    decode_columns<T, S, 256>(p, stream);
}

}  // namespace

void decode(const KvCacheParams& p, Stream stream) {
  visit_activation(p.dtype, [&]<class T>(std::type_identity<T>) {
    switch (p.kv_dtype) {
      case DType::kInt8: return decode_stored_as<T, int8_t>(p, stream);
      case DType::kFloat8E4M3: return decode_stored_as<T, f8e4m3>(p, stream);
      default: return decode_stored_as<T, T>(p, stream);
    }
  });
}

}  // namespace foveate::cuda
