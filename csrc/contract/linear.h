// Products of few or many rows with packed weights, and what surrounds them in a decoder layer: the norm in front, bias, activation, gate
// and residual behind. python/foveate/ops/packed_linear.py defines the meaning of a product, quantization/panels.py makes the packed
// layout:
//
//   panels of 32 output features, the last one padded with zeros; a feature is a lane of a vector
//   f32         [panels, in, 32] floats
//   f16         [panels, in, 32] halves
//   bf16        [panels, in / 2 rounded up, 32] pairs of neighbours along `in`
//   q4_0, q4_1  [panels, in / 32] of: nibbles [4, 32, 4] bytes, d fp16 [32], q4_1 also m fp16 [32]
//               byte (p, feature, j) holds elements 4 p + j (low nibble) and 16 + 4 p + j (high) of the feature's block of 32
//   q8_0        [panels, in / 32] of: q + 128 as uint8 [8, 32, 4], d fp16 [32]
//   iq4_nl, mxfp4  as q4_0, each nibble an index into a table of integers
//   q4_z        [panels, in / 32] of: nibbles as q4_0's, d fp16 [32], z fp16 [32]: w = d (q - z)
//   q8_z        [panels, in / 32] of: q as uint8 [8, 32, 4], d fp32 [32], z fp16 [32]: w = d (q - z)
//   q8_m        [panels, in / 32] of: q as uint8 [8, 32, 4], d fp16 [32], m fp16 [32]: w = d q + m
//   f8          [panels, in / 64] of: e4m3 [64, 32], d fp32 [32]: w = d q
//   nf4, fp4    [panels, in / 64] of: [64, 16] bytes, whose low nibble is feature i's and whose high one is feature 16 + i's, an index
//               into a table of fp32 numbers, then d fp32 [32]: w = d t[q]
//   q2_k, q4_k, q5_k, q6_k, iq4_xs, q8_k  [panels, in / 256] of: 8 blocks of nibbles, upper bits, integer scales, and fp16 scales of
//               these: quantization/k_blocks.py
#pragma once

#include "core/math.h"
#include "core/tensor.h"

namespace foveate {

// Rows stay floats in front of formats up to kFp4, and are rounded to int8 for the others.
enum class WeightFormat : uint8_t {
  kF32,
  kBf16,
  kF16,
  kF8,
  kNf4,
  kFp4,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kIq4Nl,
  kMxfp4,
  kQ4Z,
  kQ8Z,
  kQ8M,
  kQ2K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Xs,
  kQ8K
};

constexpr int64_t kWeightPanel = 32, kWeightBlock = 32, kScaledBlock = 64, kSuperBlock = 256;

struct PackedWeight {
  const void* data = nullptr;
  const float* bias = nullptr;  // [out]; may be null
  int64_t in = 0, out = 0;
  WeightFormat format = WeightFormat::kF32;
};

// Formats of 32-element blocks round the rows that they meet to int8.
[[gnu::always_inline]] constexpr bool is_blocks(WeightFormat f) { return f >= WeightFormat::kQ8_0; }
// K-quants: super-blocks of 256 elements, which share the fp16 scales of their integer scales.
[[gnu::always_inline]] constexpr bool is_k_quant(WeightFormat f) { return f >= WeightFormat::kQ2K; }
// Codes of 4 or 8 bits for floats, with a scale for each 64.
[[gnu::always_inline]] constexpr bool is_scaled(WeightFormat f) { return f >= WeightFormat::kF8 && f <= WeightFormat::kFp4; }
// Whether rows are prepared for both alike: as int8 blocks, as bf16, or as fp32.
[[gnu::always_inline]] constexpr bool same_rows(WeightFormat a, WeightFormat b) {
  return is_blocks(a) == is_blocks(b) && (is_blocks(a) || (a == WeightFormat::kBf16) == (b == WeightFormat::kBf16));
}
// What the input features must be a multiple of.
[[gnu::always_inline]] constexpr int64_t block_of(WeightFormat f) {
  return is_k_quant(f) ? kSuperBlock : is_blocks(f) ? kWeightBlock : is_scaled(f) ? kScaledBlock : 1;
}

// Bytes of one panel of `in` elements.
[[gnu::always_inline]] constexpr int64_t panel_bytes(WeightFormat f, int64_t in) {
  switch (f) {
    case WeightFormat::kF32: return kWeightPanel * 4 * in;
    case WeightFormat::kBf16: return kWeightPanel * 4 * ceil_div<int64_t>(in, 2);
    case WeightFormat::kF16: return kWeightPanel * 2 * in;
    case WeightFormat::kF8: return kWeightPanel * 68 * (in / kScaledBlock);
    case WeightFormat::kNf4:
    case WeightFormat::kFp4: return kWeightPanel * 36 * (in / kScaledBlock);
    case WeightFormat::kQ8_0: return kWeightPanel * 34 * (in / kWeightBlock);
    case WeightFormat::kQ8M: return kWeightPanel * 36 * (in / kWeightBlock);
    case WeightFormat::kQ8Z: return kWeightPanel * 38 * (in / kWeightBlock);
    case WeightFormat::kIq4Nl:
    case WeightFormat::kMxfp4:
    case WeightFormat::kQ4_0: return kWeightPanel * 18 * (in / kWeightBlock);
    case WeightFormat::kQ4Z:
    case WeightFormat::kQ4_1: return kWeightPanel * 20 * (in / kWeightBlock);
    case WeightFormat::kQ2K: return kWeightPanel * 84 * (in / kSuperBlock);
    case WeightFormat::kQ4K: return kWeightPanel * 148 * (in / kSuperBlock);
    case WeightFormat::kQ5K: return kWeightPanel * 180 * (in / kSuperBlock);
    case WeightFormat::kQ6K: return kWeightPanel * 210 * (in / kSuperBlock);
    case WeightFormat::kIq4Xs: return kWeightPanel * 138 * (in / kSuperBlock);
    case WeightFormat::kQ8K: return kWeightPanel * 276 * (in / kSuperBlock);
  }
  return 0;
}

// At least what a row takes once it is prepared for a product, whatever the format and the instruction set.
[[gnu::always_inline]] constexpr int64_t linear_row_bytes(int64_t in) { return round_up<int64_t>(in * 4 + in / kWeightBlock * 16 + 8, 64); }
// The scratch of the kernel linear_share: prepared rows, and floats of one row for each thread.
[[gnu::always_inline]] constexpr int64_t linear_scratch_bytes(int64_t rows, int64_t in, int threads) {
  return rows * linear_row_bytes(in) + threads * round_up<int64_t>(in * 4, 64);
}

enum class NormKind : uint8_t { kNone, kRms, kLayer };
struct Norm {
  NormKind kind = NormKind::kNone;
  const float *weight = nullptr, *bias = nullptr;  // [cols]; may be null
  float eps = 0;
};

// kClampedSilu, with a gate only: (up + 1) gate sigmoid(1.702 gate), the gate cut to at most `limit`, up to -limit..limit (gpt-oss).
enum class Activation : uint8_t { kNone, kSilu, kGeluTanh, kRelu, kGelu, kRelu2, kTanh, kClampedSilu };

struct LinearParams {
  const void* x = nullptr;  // [rows, in], row stride x_stride
  int64_t rows = 0, x_stride = 0;
  Norm norm = {};  // of each row of x, before the product
  // Up to three weights that share x, of the same `in`, whose rows are prepared alike (same_rows).
  int count = 1;
  PackedWeight weight[3] = {};
  void* out[3] = {};  // [rows, out], row strides out_stride
  int64_t out_stride[3] = {};
  Activation activation = Activation::kNone;
  bool gated = false;  // out[0] = activation(x weight[0]) * (x weight[1]), out[1] is not used
  float limit = 0;  // of kClampedSilu
  // fp32 [rows - addend_from, out], row strides addend_stride: added to the products of the rows from addend_from on; may be null
  const float* addend[3] = {};
  int64_t addend_stride[3] = {}, addend_from = 0;
  float clip = 0;  // outputs are cut to -clip..clip; 0: they are not
  float scale = 1;  // of the outputs
  bool accumulate = false;  // out += instead of out =, fp32 only
  DType dtype = DType::kFloat32, out_dtype = DType::kFloat32;
};

// Rows [first, first + rows) of a product by groups, which meet weights of their own; weight[1] with a gate only.
struct LinearGroup {
  const PackedWeight* weight[2] = {};
  int64_t first = 0, rows = 0;
};

// A product whose rows are sorted by the weight that they meet: the experts of a mixture, or the heads of a token.
struct GroupedLinearParams {
  LinearParams linear = {};  // weight[0] is that of any group: all have its sizes and rows prepared alike
  const int32_t* row_ids = nullptr;  // [rows], the row of x that each row reads; null: its own
  const LinearGroup* groups = nullptr;
  int64_t num_groups = 0;
};

// The norm of `heads` neighbours of `cols` elements of each token, in place.
struct NormHeadsParams {
  void* x = nullptr;  // [tokens, heads, cols], token stride x_stride
  int64_t tokens = 0, heads = 0, cols = 0, x_stride = 0;
  Norm norm = {};
  int64_t weight_stride = 0;  // from a head's weight and bias to the next head's: 0 or cols
  DType dtype = DType::kFloat32;
};

// out = norm(x), or out += norm(x), fp32.
struct NormRowsParams {
  const float* x = nullptr;  // [rows, cols], contiguous
  float* out = nullptr;  // [rows, cols], contiguous
  int64_t rows = 0, cols = 0;
  Norm norm = {};
  bool accumulate = false;
};

// Rows `ids` of a weight as floats times `scale`: an embedding.
struct PackedRowsParams {
  PackedWeight weight = {};
  const int64_t* ids = nullptr;  // [rows]
  float* out = nullptr;  // [rows, in], contiguous
  int64_t rows = 0;
  float scale = 1;
};

}  // namespace foveate
