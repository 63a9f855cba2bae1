// Packed linear layers: rows are normed and prepared once, then panels of 32 features times tiles of rows. A thread owns panels that are
// neighbours in memory; with one row the work is reading them once, with many rows a panel stays in L1 while rows pass.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/linear/tile.inl.h"
#include "cpu/rows/norm.inl.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/scratch.h"
#include "cpu/simd/team.h"
#if defined(FOVEATE_TILES)
#include "cpu/amx/linear_tiles.inl.h"
#endif

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kRowChunk = 128;  // prepared rows that pass a panel: they stay in L2

// temp: [in] floats.
void prepare_row(const LinearParams& p, int64_t row, float* temp, char* out) {
  const int64_t in = p.weight[0].in;
  const float* x = temp;
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    const T* from = static_cast<const T*>(p.x) + row * p.x_stride;
    if constexpr (std::is_same_v<T, float>) {
      x = from;
    } else if constexpr (!std::is_same_v<T, double>) {
      for (int64_t j = 0; j < in; j += kLanes<float>) store_n(temp + j, load_n<float>(from + j, in - j), in - j);
    }
  });
  if (p.norm.kind != NormKind::kNone) norm_row(p.norm, x, temp, in, false), x = temp;
  if (is_blocks(p.weight[0].format))
    prepare_blocks(x, in / kWeightBlock, out);
  else if (p.weight[0].format == WeightFormat::kBf16)
    prepare_bf16(x, in, out);
  else
    std::memcpy(out, x, static_cast<size_t>(in) * sizeof(float));
}

// x times the part of a normal distribution below x. erfc(|z|), z = x / sqrt(2), is computed itself, so that nothing cancels below 0.
FOVEATE_INLINE VecF gelu(VecF x) {
  const VecF z = vabs<float>(x) * 0.70710678118f, square = z * z;
  VecF p = square * -0.0005631420734f + 0.004917551053f;  // erf(z) / z on 0..1
  p = p * square - 0.02671131098f;
  p = p * square + 0.112801801f;
  p = p * square - 0.3761232619f;
  p = p * square + 1.128379122f;
  const VecF t = 1.0f / (1.0f + 0.4f * z);
  VecF q = t * -0.1163304107f + 0.2436456334f;  // erfc(z) exp(z^2) beyond
  q = q * t + 0.008450771043f;
  q = q * t + 0.2127435877f;
  q = q * t + 0.1989812837f;
  q = q * t + 0.2266274682f;
  q = q * t + 0.2256376634f;
  q = q * t - 6.89082764e-07f;
  const VecF half = 0.5f * (z < 1 ? 1.0f - p * z : q * expv<float>(-square));
  return x * (x < 0 ? half : 1.0f - half);
}

// ---- epilogue of one row of a panel: c [32] -> bias, addend, activation, gate, residual -> out -----------------------------------------

FOVEATE_INLINE VecF activate(Activation activation, VecF x) {
  if (activation == Activation::kSilu) return x / (1.0f + expv<float>(-x));
  if (activation == Activation::kGeluTanh) return 0.5f * x * (1.0f + tanhv((x + x * x * x * 0.044715f) * 0.7978845608f));
  if (activation == Activation::kRelu) return x < 0 ? VecF{} : x;
  if (activation == Activation::kGelu) return gelu(x);
  if (activation == Activation::kRelu2) return x < 0 ? VecF{} : x * x;
  if (activation == Activation::kTanh) return tanhv(x);
  return x;
}

FOVEATE_INLINE VecF clamp(VecF x, float low, float high) { return x < low ? splat(low) : x > high ? splat(high) : x; }

FOVEATE_INLINE VecF gate_of(const LinearParams& p, VecF gate, VecF up) {
  if (p.activation != Activation::kClampedSilu) return activate(p.activation, gate) * up;
  gate = gate > p.limit ? splat(p.limit) : gate;
  return (clamp(up, -p.limit, p.limit) + 1.0f) * (gate / (1.0f + expv<float>(gate * -1.702f)));
}

// Bias, addend, activation, gate and residual of one row of a panel, on its way to `out`. gate: the row of weight[1]'s product.
void finish_row(const LinearParams& p, int which, int64_t panel, int64_t row, const float* c, const float* gate) {
  constexpr int n = kLanes<float>;
  const PackedWeight& w = p.weight[which];
  const int64_t first = panel * kWeightPanel, count = min(w.out - first, kWeightPanel);
  // Zeros in place of no addend: every row takes the same instructions, so that its bits do not depend on the others' addends.
  alignas(64) static constexpr float kZeros[kWeightPanel] = {};
  const auto addend = [&](int i) {
    const int64_t added = row - p.addend_from;
    return p.addend[i] && added >= 0 ? p.addend[i] + added * p.addend_stride[i] + first : kZeros;
  };
  const float* addends[2] = {addend(which), gate ? addend(1) : kZeros};
  for (int64_t j = 0; j < count; j += n) {
    const int64_t rest = count - j;
    VecF y = load<float>(c + j) + load_n<float>(addends[0] + j, rest);
    if (w.bias) y += load_n<float>(w.bias + first + j, rest);
    if (gate) {
      VecF up = load<float>(gate + j) + load_n<float>(addends[1] + j, rest);
      if (p.weight[1].bias) up += load_n<float>(p.weight[1].bias + first + j, rest);
      y = gate_of(p, y, up);
    } else {
      y = activate(p.activation, y);
    }
    if (p.clip > 0) y = clamp(y, -p.clip, p.clip);
    y *= p.scale;
    const int64_t at = row * p.out_stride[which] + first + j;
    if (p.out_dtype == DType::kFloat32) {
      float* out = static_cast<float*>(p.out[which]) + at;
      if (p.accumulate) y += load_n<float>(out, rest);
      store_n(out, y, rest);
    } else if (p.out_dtype == DType::kBFloat16) {
      store_n(static_cast<bf16*>(p.out[which]) + at, y, rest);
    } else {
      store_n(static_cast<f16*>(p.out[which]) + at, y, rest);
    }
  }
}

// ---- products: prepared rows [rows, in] times one panel [in, 32] ----------------------------------------------------------------

template <int kRows>
void tile(const LinearParams& p, int which, int64_t panel, const PreparedRows& a, int64_t first, int64_t row) {
  alignas(64) float c[kRows * kWeightPanel], gate[kRows * kWeightPanel];
  panel_product<kRows>(p.weight[which], panel, a, row, c);
  if (p.gated) panel_product<kRows>(p.weight[1], panel, a, row, gate);
  for (int r = 0; r < kRows; ++r)
    finish_row(p, which, panel, first + row + r, c + r * kWeightPanel, p.gated ? gate + r * kWeightPanel : nullptr);
}

// Prepared rows [row, row + rows) times one panel; prepared row 0 is row `first` of p.
void panel_rows(const LinearParams& p, int which, int64_t panel, const PreparedRows& a, int64_t first, int64_t row, int64_t rows) {
  const int64_t end = row + rows;
  if (!is_blocks(p.weight[which].format))
    for (; row + kFloatRows <= end; row += kFloatRows) tile<kFloatRows>(p, which, panel, a, first, row);
  for (; row + kLinearRows <= end; row += kLinearRows) tile<kLinearRows>(p, which, panel, a, first, row);
  if constexpr (kLinearRows > 2) {
    if (end - row == 3) return tile<3>(p, which, panel, a, first, row);
    if (end - row == 2) return tile<2>(p, which, panel, a, first, row);
  }
  if (row < end) tile<1>(p, which, panel, a, first, row);
}

#if defined(FOVEATE_TILES)
// The same with AMX, whose tiles take more rows; only bf16 and some block formats use them. `expanded`: room for the bytes of two panels;
// null: only bf16.
class TileRows {
 public:
  TileRows(const LinearParams& p, int8_t* expanded)
      : p_(p), expanded_{expanded, expanded ? expanded + expanded_bytes(p.weight[0].in) : nullptr} {}

  void panel_rows(int which, int64_t panel, const PreparedRows& a, int64_t first, int64_t row, int64_t rows) {
    const auto has_tiles = [&](int i) { return has_int8_tiles(p_.weight[i].format); };
    const bool blocks = has_tiles(which) && (!p_.gated || has_tiles(1)), bf16 = p_.weight[which].format == WeightFormat::kBf16;
    if (!bf16 && (!expanded_[0] || !blocks || rows < kTileRowsLeast)) return FOVEATE_ISA::panel_rows(p_, which, panel, a, first, row, rows);
    const int count = p_.gated ? 2 : 1;
    if (blocks)
      for (int i = 0; i < count; ++i) expand(p_.gated ? i : which, panel, a.blocks, expanded_[i]);
    const int64_t step = blocks ? kTileSide : 2 * kTileSide, end = row + rows;
    alignas(64) float c[2][2 * kTileSide * kWeightPanel];
    for (; row < end; row += step) {
      const int64_t some = min<int64_t>(end - row, step);
      if (blocks && some < kTileRowsLeast) return FOVEATE_ISA::panel_rows(p_, which, panel, a, first, row, some);
      for (int i = 0; i < count; ++i) product(p_.weight[p_.gated ? i : which], panel, a, row, some, expanded_[i], c[i]);
      for (int64_t r = 0; r < some; ++r)
        finish_row(p_, which, panel, first + row + r, c[0] + r * kWeightPanel, p_.gated ? c[1] + r * kWeightPanel : nullptr);
    }
  }

 private:
  void expand(int which, int64_t panel, int64_t blocks, int8_t* out) const {
    const PackedWeight& w = p_.weight[which];
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w.format, w.in);
    using enum WeightFormat;
    if (w.format == kQ8_0) return expand_panel<kQ8_0>(data, blocks, out);
    if (w.format == kQ4_0) return expand_panel<kQ4_0>(data, blocks, out);
    if (w.format == kIq4Nl) return expand_panel<kIq4Nl>(data, blocks, out);
    if (w.format == kMxfp4) return expand_panel<kMxfp4>(data, blocks, out);
    if (w.format == kQ4Z) return expand_panel<kQ4Z>(data, blocks, out);
    expand_panel<kQ4_1>(data, blocks, out);
  }
  void product(const PackedWeight& w, int64_t panel, const PreparedRows& a, int64_t row, int64_t rows, const int8_t* expanded, float* c) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w.format, w.in);
    using enum WeightFormat;
    if (w.format == kBf16) return bf16_tile(tiles_, data, a, row, rows, w.in, c);
    if (w.format == kQ8_0) return int8_tile<kQ8_0>(tiles_, data, expanded, a, row, rows, c);
    if (w.format == kQ4_0) return int8_tile<kQ4_0>(tiles_, data, expanded, a, row, rows, c);
    if (w.format == kIq4Nl) return int8_tile<kIq4Nl>(tiles_, data, expanded, a, row, rows, c);
    if (w.format == kMxfp4) return int8_tile<kMxfp4>(tiles_, data, expanded, a, row, rows, c);
    if (w.format == kQ4Z) return int8_tile<kQ4Z>(tiles_, data, expanded, a, row, rows, c);
    int8_tile<kQ4_1>(tiles_, data, expanded, a, row, rows, c);
  }

  const LinearParams& p_;
  int8_t* expanded_[2];
  TileScope tiles_;
};
#else
struct TileRows {
  TileRows(const LinearParams& params, int8_t*) : p(params) {}
  void panel_rows(int which, int64_t panel, const PreparedRows& a, int64_t first, int64_t row, int64_t rows) {
    FOVEATE_ISA::panel_rows(p, which, panel, a, first, row, rows);
  }
  const LinearParams& p;
};
FOVEATE_INLINE int64_t expanded_bytes(int64_t) { return 0; }
#endif

// ---- division of the work: first all rows are prepared, then (chunk of rows, panel) are the items --------------------------------

// The work on rows [first, first + rows), few enough that all of them are prepared at once.
struct Work {
  const LinearParams& p;
  int64_t first, rows;
  PreparedRows prepared;
  float* temp;  // [threads, in rounded up to 16]
  int8_t* expanded;  // [threads, 2 panels of blocks]; null for few rows, which expand nothing
  int64_t ends[3] = {}, panels = 0, bytes = 0;

  Work(const LinearParams& params, int64_t first_row, int64_t count, PreparedRows a, float* memory, int8_t* panels_memory)
      : p(params), first(first_row), rows(count), prepared(a), temp(memory), expanded(panels_memory) {
    const int used = p.gated ? 1 : p.count;
    for (int i = 0; i < used; ++i) ends[i] = panels += ceil_div<int64_t>(p.weight[i].out, kWeightPanel);
    for (int i = 0; i < p.count; ++i)
      bytes += panel_bytes(p.weight[i].format, p.weight[i].in) * ceil_div<int64_t>(p.weight[i].out, kWeightPanel);
  }
  int64_t items() const { return ceil_div(rows, kRowChunk) * panels; }  // chunks of rows times panels

  // x [rows, in] -> norm -> rounded to int8 blocks, or to the weight's float type
  void prepare(const Team& team) const {
    float* own = temp + team.id * round_up<int64_t>(p.weight[0].in, 16);
    for (int64_t i = team.begin(rows); i < team.end(rows); ++i) prepare_row(p, first + i, own, prepared.data + i * prepared.row_bytes);
  }
  // The weight that panel `panel` of all belongs to; `panel` becomes its index there.
  int locate(int64_t& panel) const {
    int which = 0;
    while (panel >= ends[which]) ++which;
    if (which > 0) panel -= ends[which - 1];
    return which;
  }
  // out [rows, out] = prepared x W, by panels of 32 output features
  void multiply(const Team& team) const {
    TileRows tiles(p, expanded ? expanded + team.id * 2 * expanded_bytes(p.weight[0].in) : nullptr);
    for (int64_t item = team.begin(items()); item < team.end(items()); ++item) {
      const int64_t row = item / panels * kRowChunk;
      int64_t panel = item % panels;
      const int which = locate(panel);
      tiles.panel_rows(which, panel, prepared, first, row, min<int64_t>(rows - row, kRowChunk));
    }
  }
  // The first weights that a thread will read, while it waits for the rows.
  void prefetch_share(const Team& team) const {
    int64_t panel = team.begin(panels);
    if (panel == team.end(panels)) return;
    const PackedWeight& w = p.weight[locate(panel)];
    const char* data = static_cast<const char*>(w.data) + panel * panel_bytes(w.format, w.in);
    for (int64_t line = 0; line < kLinearAhead; line += 64) prefetch(data + line);
  }
};

PreparedRows prepared_rows(const LinearParams& p, char* data) {
  const int64_t in = p.weight[0].in;
  return {data, prepared_row_bytes(p.weight[0].format, in), in / kWeightBlock};
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  constexpr int64_t most = 8 * kRowChunk;
  PreparedRows a = prepared_rows(p, nullptr);
  Layout layout;
  const int64_t at_rows = layout.add<char>(a.row_bytes * (min<int64_t>(p.rows, most)));
  const int64_t at_temp = layout.add<float>(round_up<int64_t>(p.weight[0].in, 16) * threads);
  const int64_t at_expanded = layout.add<int8_t>(is_blocks(p.weight[0].format) ? 2 * expanded_bytes(p.weight[0].in) * threads : 0);
  Scratch scratch;
  scratch.allocate(layout.total());
  a.data = scratch.at<char>(at_rows);
  for (int64_t first = 0; first < p.rows; first += most) {
    const Work work(p, first, min<int64_t>(p.rows - first, most), a, scratch.at<float>(at_temp), scratch.at<int8_t>(at_expanded));
    // A thread is worth waking for about 2 us of reading or of arithmetic.
    const int64_t useful = 1 + work.bytes * ceil_div<int64_t>(work.rows, 4) / 65536;
    const int64_t wanted = min<int64_t>(useful, work.items());
    const int count = static_cast<int>(min<int64_t>(wanted, threads));
    if (count <= 1) {
      work.prepare({});
      work.multiply({});
      continue;
    }
    const bool alone = work.rows * p.weight[0].in < 4096;  // dividing the preparation would cost more than it saves
    if (alone) work.prepare({});
#pragma omp parallel num_threads(count)
    {
      const Team team{omp_get_thread_num(), omp_get_num_threads(), nullptr};
      if (!alone) {
        work.prepare(team);
#pragma omp barrier
      }
      work.multiply(team);
    }
  }
}

void linear_share(const LinearParams& p, const Team& team, char* scratch) {
  float* temp = reinterpret_cast<float*>(scratch + p.rows * linear_row_bytes(p.weight[0].in));
  const Work work(p, 0, p.rows, prepared_rows(p, scratch), temp, nullptr);
  work.prefetch_share(team);
  work.prepare(team);
  team.wait();
  work.multiply(team);
}

// ---- products by groups -----------------------------------------------------------------------------------------------------------

namespace {

struct GroupedWork {
  const GroupedLinearParams& p;
  PreparedRows prepared;
  float* temp;  // as Work's
  int8_t* expanded;

  void prepare(const Team& team) const {
    float* own = temp + team.id * round_up<int64_t>(p.linear.weight[0].in, 16);
    for (int64_t i = team.begin(p.linear.rows); i < team.end(p.linear.rows); ++i)
      prepare_row(p.linear, p.row_ids ? p.row_ids[i] : i, own, prepared.data + i * prepared.row_bytes);
  }
  // What a panel of a group costs: reading it as much as some rows.
  static int64_t cost(const LinearGroup& g) { return max<int64_t>(g.rows, 4); }
  // The panels of all groups, one after the other, divided by their cost.
  void multiply(const Team& team) const {
    const int64_t panels = ceil_div<int64_t>(p.linear.weight[0].out, kWeightPanel);
    int64_t total = 0;
    for (int64_t i = 0; i < p.num_groups; ++i) total += panels * cost(p.groups[i]);
    const int64_t begin = team.begin(total), end = team.end(total);
    LinearParams one = p.linear;
    for (int64_t i = 0, at = 0; i < p.num_groups; at += panels * cost(p.groups[i]), ++i) {
      const LinearGroup& g = p.groups[i];
      // A panel belongs to the share that its beginning lies in.
      const int64_t first = begin <= at ? 0 : ceil_div(begin - at, cost(g)), last = end <= at ? 0 : ceil_div(end - at, cost(g));
      if (first >= min(last, panels)) continue;
      one.weight[0] = *g.weight[0];
      if (one.gated) one.weight[1] = *g.weight[1];
      TileRows tiles(one, expanded ? expanded + team.id * 2 * expanded_bytes(one.weight[0].in) : nullptr);
      for (int64_t panel = first; panel < min(last, panels); ++panel) tiles.panel_rows(0, panel, prepared, 0, g.first, g.rows);
    }
  }
};

}  // namespace

void grouped_linear(const GroupedLinearParams& p, int threads) {
  const PackedWeight& w = p.linear.weight[0];
  PreparedRows a = prepared_rows(p.linear, nullptr);
  Layout layout;
  const int64_t at_rows = layout.add<char>(a.row_bytes * p.linear.rows);
  const int64_t at_temp = layout.add<float>(round_up<int64_t>(w.in, 16) * threads);
  const int64_t at_expanded = layout.add<int8_t>(is_blocks(w.format) ? 2 * expanded_bytes(w.in) * threads : 0);
  Scratch scratch;
  scratch.allocate(layout.total());
  a.data = scratch.at<char>(at_rows);
  const GroupedWork work{p, a, scratch.at<float>(at_temp), scratch.at<int8_t>(at_expanded)};
#pragma omp parallel num_threads(threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads(), nullptr};
    work.prepare(team);
#pragma omp barrier
    work.multiply(team);
  }
}

void grouped_linear_share(const GroupedLinearParams& p, const Team& team, char* scratch) {
  float* temp = reinterpret_cast<float*>(scratch + p.linear.rows * linear_row_bytes(p.linear.weight[0].in));
  const GroupedWork work{p, prepared_rows(p.linear, scratch), temp, nullptr};
  work.prepare(team);
  team.wait();
  work.multiply(team);
}

void norm_rows(const NormRowsParams& p, int threads) {
  parallel_for(p.rows, 1 + 16384 / p.cols, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) norm_row(p.norm, p.x + i * p.cols, p.out + i * p.cols, p.cols, p.accumulate);
  });
}

void packed_rows(const PackedRowsParams& p, int threads) {
  const PackedWeight& w = p.weight;
  parallel_for(p.rows, 1 + 16384 / w.in, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = p.ids[i], lane = id % kWeightPanel;
      const uint8_t* panel = static_cast<const uint8_t*>(w.data) + id / kWeightPanel * panel_bytes(w.format, w.in);
      float* out = p.out + i * w.in;
      const auto half = [&](const uint8_t* at) { return to_float(load_raw<f16>(at + 2 * lane)); };
      for (int64_t k = 0; k < w.in; ++k) {
        if (w.format == WeightFormat::kF32) {
          out[k] = load_raw<float>(panel + (k * kWeightPanel + lane) * 4);
        } else if (w.format == WeightFormat::kF16) {
          out[k] = to_float(load_raw<f16>(panel + (k * kWeightPanel + lane) * 2));
        } else if (w.format == WeightFormat::kBf16) {
          out[k] = to_float(load_raw<bf16>(panel + ((k / 2 * kWeightPanel + lane) * 2 + k % 2) * 2));
        } else if (is_k_quant(w.format)) {
          out[k] = k_value(w.format, panel, k, lane);
        } else if (is_scaled(w.format)) {
          out[k] = scaled_value(w.format, panel, k, lane);
        } else {
          const int64_t bytes = panel_bytes(w.format, kWeightBlock), e = k % kWeightBlock;
          const uint8_t* block = panel + k / kWeightBlock * bytes;
          if (is_bytewise(w.format)) {
            const uint8_t* headers = block + kWeightPanel * 32;
            const auto q = static_cast<float>(block[(e / 4 * kWeightPanel + lane) * 4 + e % 4]);
            if (w.format == WeightFormat::kQ8_0)
              out[k] = half(headers) * (q - 128.0f);
            else if (w.format == WeightFormat::kQ8M)
              out[k] = half(headers) * q + half(headers + kWeightPanel * 2);
            else
              out[k] = load_raw<float>(headers + 4 * lane) * (q - half(headers + kWeightPanel * 4));
          } else {
            const uint8_t byte = block[(e % 16 / 4 * kWeightPanel + lane) * 4 + e % 4];
            int q = e < 16 ? byte & 15 : byte >> 4;
            if (has_table(w.format)) q = (w.format == WeightFormat::kMxfp4 ? kTableMxfp4 : kTableIq4Nl)[q];
            q -= offset_of(w.format);
            const float d = half(block + kWeightPanel * 16);
            const bool two = has_minimum(w.format) || has_zero(w.format);
            const float second = two ? half(block + kWeightPanel * 18) : 0.0f;  // m or z
            out[k] = has_zero(w.format) ? d * (static_cast<float>(q) - second) : d * static_cast<float>(q) + second;
          }
        }
        out[k] *= p.scale;
      }
    }
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
