#include "ops/linear.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"

namespace foveate {
namespace {

constexpr std::pair<const char*, WeightFormat> kFormats[] = {
    {"f32", WeightFormat::kF32},   {"bf16", WeightFormat::kBf16},    {"f16", WeightFormat::kF16},      {"f8", WeightFormat::kF8},
    {"nf4", WeightFormat::kNf4},   {"fp4", WeightFormat::kFp4},      {"q8_0", WeightFormat::kQ8_0},    {"q4_0", WeightFormat::kQ4_0},
    {"q4_1", WeightFormat::kQ4_1}, {"iq4_nl", WeightFormat::kIq4Nl}, {"q4_z", WeightFormat::kQ4Z},     {"q8_z", WeightFormat::kQ8Z},
    {"q8_m", WeightFormat::kQ8M},  {"mxfp4", WeightFormat::kMxfp4},  {"q2_k", WeightFormat::kQ2K},     {"q4_k", WeightFormat::kQ4K},
    {"q5_k", WeightFormat::kQ5K},  {"q6_k", WeightFormat::kQ6K},     {"iq4_xs", WeightFormat::kIq4Xs}, {"q8_k", WeightFormat::kQ8K},
};

WeightFormat format_of(const std::string& text) {
  std::string known;
  for (const auto& [name, format] : kFormats) {
    if (text == name) return format;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  fail("format ", text, " is not one of ", known);
}

}  // namespace

PackedWeight packed_weight(TensorView data, TensorView bias, const std::string& format, int64_t in, int64_t out) {
  PackedWeight w{.data = data.data, .bias = bias.as<const float>(), .in = in, .out = out, .format = format_of(format)};
  check(in >= 1 && out >= 1, "a weight of ", out, " rows of ", in, " elements is empty");
  constexpr int64_t kMost = int64_t{1} << 40;  // products of the sizes below fit 64 bits
  check(in <= kMost && out <= kMost, "a weight of ", out, " rows of ", in, " elements is larger than any memory");
  const int64_t block = block_of(w.format);
  check(in % block == 0, format, " needs a multiple of ", block, " input features, got ", in);
  expect(data, "data").rank(1).dtype(DType::kInt8).contiguous();
  const int64_t panels = ceil_div(out, kWeightPanel), bytes = panel_bytes(w.format, in);
  check(data.shape[0] / bytes == panels && data.shape[0] % bytes == 0, "data has ", data.shape[0], " bytes; ", panels, " panels of ", bytes,
        " are ", out, " rows of ", in, " elements as ", format);
  check(data.device == DeviceType::kCPU, "data must be on the CPU");
  if (bias.defined())
    expect(bias, "bias").rank(1).size(0, out).dtype(DType::kFloat32).contiguous(),
        check(bias.device == DeviceType::kCPU, "bias must be on the CPU");
  return w;
}

void packed_linear(TensorView x, TensorView data, const std::string& format, TensorView bias, TensorView out, Threads threads) {
  expect(x, "x").rank(2).last_contiguous();
  expect(out, "out").rank(2).contiguous().dtype(x.dtype).size(0, x.shape[0]);
  check(x.dtype == DType::kFloat32 || x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16, "x is ", name(x.dtype),
        ", expected float32, bfloat16 or float16");
  check(x.device == DeviceType::kCPU && out.device == DeviceType::kCPU, "x and out must be on the CPU");
  if (out.numel() == 0) return;
  LinearParams p;
  p.weight[0] = packed_weight(data, bias, format, x.shape[1], out.shape[1]);
  p.x = x.data;
  p.rows = x.shape[0];
  p.x_stride = x.stride[0];
  p.dtype = x.dtype;
  p.out[0] = out.data;
  p.out_stride[0] = out.shape[1];
  p.out_dtype = out.dtype;
  cpu::kernels().linear(p, threads);
}

void packed_rows(TensorView data, const std::string& format, int64_t in, int64_t out_features, TensorView ids, TensorView out,
                 Threads threads) {
  const PackedWeight w = packed_weight(data, {}, format, in, out_features);
  expect(ids, "ids").rank(1).contiguous().dtype(DType::kInt64);
  expect(out, "out").rank(2).contiguous().dtype(DType::kFloat32).size(0, ids.shape[0]).size(1, in);
  check(ids.device == DeviceType::kCPU && out.device == DeviceType::kCPU, "ids and out must be on the CPU");
  const int64_t* id = ids.as<const int64_t>();
  for (int64_t i = 0; i < ids.shape[0]; ++i)
    check(id[i] >= 0 && id[i] < out_features, "ids[", i, "] = ", id[i], " is not a row: there are ", out_features);
  cpu::kernels().packed_rows({.weight = w, .ids = id, .out = out.as<float>(), .rows = ids.shape[0]}, threads);
}

}  // namespace foveate
