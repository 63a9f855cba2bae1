// Packed linear layers: rows are normed and prepared once, then panels of 32 features times tiles of rows. A thread owns panels that are
// neighbours in memory; with one row the work is reading them once, with many rows a panel stays in the first cache while rows pass.
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/linear_tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/row.h"
#include "cpu/scratch.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

constexpr int64_t kRowChunk = 128;  // prepared rows that pass a panel: they stay in the second cache

// y = norm(x), or += it; in place is fine.
void norm_row(const Norm& norm, const float* x, float* y, int64_t cols, bool accumulate) {
  constexpr int n = kLanes<float>;
  float mean = 0;
  if (norm.kind == NormKind::kLayer)
    mean = sum_row<float>(cols, [&](int64_t j, int64_t rest) { return load_n<float>(x + j, rest); }) / static_cast<float>(cols);
  float scale = 1;
  if (norm.kind != NormKind::kNone) {
    const float squares = sum_row<float>(cols, [&](int64_t j, int64_t rest) {
      const VecF v = load_n<float>(x + j, rest, mean) - mean;
      return v * v;
    });
    scale = 1 / std::sqrt(squares / static_cast<float>(cols) + norm.eps);
  }
  for (int64_t j = 0; j < cols; j += n) {
    const int64_t rest = cols - j;
    VecF v = (load_n<float>(x + j, rest) - mean) * scale;
    if (norm.weight) v *= load_n<float>(norm.weight + j, rest);
    if (norm.bias) v += load_n<float>(norm.bias + j, rest);
    if (accumulate) v += load_n<float>(y + j, rest);
    store_n(y + j, v, rest);
  }
}

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

FOVEATE_INLINE VecF activate(Activation activation, VecF x) {
  if (activation == Activation::kSilu) return x / (1.0f + expv<float>(-x));
  if (activation == Activation::kGeluTanh) return 0.5f * x * (1.0f + tanhv((x + x * x * x * 0.044715f) * 0.7978845608f));
  if (activation == Activation::kRelu) return x < 0 ? VecF{} : x;
  return x;
}

// Bias, activation, gate and residual of one row of a panel, on its way to `out`. gate: the row of weight[1]'s product.
void finish_row(const LinearParams& p, int which, int64_t panel, int64_t row, const float* c, const float* gate) {
  constexpr int n = kLanes<float>;
  const PackedWeight& w = p.weight[which];
  const int64_t first = panel * kWeightPanel, count = w.out - first < kWeightPanel ? w.out - first : kWeightPanel;
  for (int64_t j = 0; j < count; j += n) {
    const int64_t rest = count - j;
    VecF y = load<float>(c + j);
    if (w.bias) y += load_n<float>(w.bias + first + j, rest);
    y = activate(p.activation, y);
    if (gate) {
      VecF g = load<float>(gate + j);
      if (p.weight[1].bias) g += load_n<float>(p.weight[1].bias + first + j, rest);
      y *= g;
    }
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

// Rows [first, first + rows), few enough that all of them are prepared at once.
void linear_rows(const LinearParams& p, int64_t first, int64_t rows, const PreparedRows& a, float* temp, int threads) {
  const int64_t in = p.weight[0].in, temp_stride = round_up<int64_t>(in, 16);
  int64_t ends[3], panels = 0, bytes = 0;
  const int used = p.gated ? 1 : p.count;
  for (int i = 0; i < used; ++i) ends[i] = panels += ceil_div<int64_t>(p.weight[i].out, kWeightPanel);
  for (int i = 0; i < p.count; ++i) bytes += panel_bytes(p.weight[i].format, in) * ceil_div<int64_t>(p.weight[i].out, kWeightPanel);
  const int64_t chunks = ceil_div(rows, kRowChunk), items = chunks * panels;
  // A thread is worth waking for about 2 us of reading or of arithmetic.
  const int64_t useful = 1 + bytes * ceil_div<int64_t>(rows, 4) / 65536, most = useful < items ? useful : items;
  const int team = static_cast<int>(most < threads ? most : threads);
  const auto prepare = [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) prepare_row(p, first + i, own, a.data + i * a.row_bytes);
  };
  const auto multiply = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item / panels, row = chunk * kRowChunk;
      int64_t panel = item % panels;
      int which = 0;
      while (panel >= ends[which]) ++which;
      if (which > 0) panel -= ends[which - 1];
      panel_rows(p, which, panel, a, first, row, rows - row < kRowChunk ? rows - row : kRowChunk);
    }
  };
  if (team <= 1) return prepare(0, rows, temp), multiply(0, items);
  const bool alone = rows * in < 4096;  // dividing the preparation would cost more than it saves
  if (alone) prepare(0, rows, temp);
#pragma omp parallel num_threads(team)
  {
    const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
    if (!alone) {
      prepare(rows * id / count, rows * (id + 1) / count, temp + id * temp_stride);
#pragma omp barrier
    }
    multiply(items * id / count, items * (id + 1) / count);
  }
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  const int64_t in = p.weight[0].in, most = 8 * kRowChunk;
  PreparedRows a{nullptr, prepared_row_bytes(p.weight[0].format, in), in / kWeightBlock};
  Layout layout;
  const int64_t at_rows = layout.add<char>(a.row_bytes * (p.rows < most ? p.rows : most));
  const int64_t at_temp = layout.add<float>(round_up<int64_t>(in, 16) * threads);
  Scratch scratch;
  scratch.allocate(layout.total());
  a.data = scratch.at<char>(at_rows);
  for (int64_t first = 0; first < p.rows; first += most)
    linear_rows(p, first, p.rows - first < most ? p.rows - first : most, a, scratch.at<float>(at_temp), threads);
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
        } else if (w.format == WeightFormat::kBf16) {
          out[k] = to_float(load_raw<bf16>(panel + ((k / 2 * kWeightPanel + lane) * 2 + k % 2) * 2));
        } else {
          const int64_t bytes = panel_bytes(w.format, kWeightBlock), e = k % kWeightBlock;
          const uint8_t* block = panel + k / kWeightBlock * bytes;
          if (w.format == WeightFormat::kQ8_0) {
            out[k] = half(block + kWeightPanel * 32) * static_cast<float>(block[(e / 4 * kWeightPanel + lane) * 4 + e % 4] - 128);
          } else {
            const uint8_t byte = block[(e % 16 / 4 * kWeightPanel + lane) * 4 + e % 4];
            const int q = (e < 16 ? byte & 15 : byte >> 4) - (w.format == WeightFormat::kQ4_0 ? 8 : 0);
            const float m = w.format == WeightFormat::kQ4_1 ? half(block + kWeightPanel * 18) : 0.0f;
            out[k] = half(block + kWeightPanel * 16) * static_cast<float>(q) + m;
          }
        }
        out[k] *= p.scale;
      }
    }
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
