#include "ops/softmax.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

// An operand that broadcasts to x by strides of 0.
void check_operand(const TensorView& t, const char* what, const TensorView& x) {
  expect(t, what).rank(x.ndim);
  for (int d = 0; d < x.ndim; ++d) expect(t, what).size(d, x.shape[d]);
  const int64_t last = t.stride[x.ndim - 1];
  check(last == 0 || last == 1 || x.shape[x.ndim - 1] <= 1, what, ": the last dimension must have stride 1 or 0, its stride is ", last);
}

void check_same_shape(const TensorView& t, const char* what, const TensorView& x) {
  expect(t, what).rank(x.ndim);
  for (int d = 0; d < x.ndim; ++d) expect(t, what).size(d, x.shape[d]);
  expect(t, what).contiguous();
}

void check_dx(const TensorView& dx, const TensorView& out) {
  check(dx.dtype == out.dtype || dx.dtype == accumulator_of(out.dtype), "dx is ", name(dx.dtype), ", expected ", name(out.dtype), " or ",
        name(accumulator_of(out.dtype)));
}

// Merges neighbouring leading dimensions that every operand walks evenly, so that finding a row's place is mostly one multiplication.
void merge_dimensions(SoftmaxParams& p) {
  int last = -1;
  for (int d = 0; d < p.ndim; ++d) {
    const auto even = [&](const int64_t* stride) { return stride[last] == stride[d] * p.shape[d]; };
    if (last >= 0 && even(p.x_stride) && even(p.bias_stride) && even(p.mask_stride)) {
      p.shape[last] *= p.shape[d];
    } else {
      p.shape[++last] = p.shape[d];
    }
    p.x_stride[last] = p.x_stride[d];
    p.bias_stride[last] = p.bias_stride[d];
    p.mask_stride[last] = p.mask_stride[d];
  }
  p.ndim = last + 1;
}

}  // namespace

void softmax_forward(TensorView x, TensorView bias, TensorView mask, TensorView out, double scale, bool causal, bool log, Threads threads) {
  check(x.ndim >= 1, "x has no dimension to take the softmax over");
  expect(x, "x").floating().last_contiguous();
  check_same_shape(out, "out", x);
  expect(out, "out").dtype(x.dtype);
  if (bias.defined()) {
    check_operand(bias, "bias", x);
    check(bias.dtype == x.dtype || bias.dtype == accumulator_of(x.dtype), "bias is ", name(bias.dtype), ", expected ", name(x.dtype),
          " or ", name(accumulator_of(x.dtype)));
  }
  if (mask.defined()) {
    check_operand(mask, "mask", x);
    expect(mask, "mask").dtype(DType::kBool);
  }
  check(!causal || x.ndim >= 2, "causal needs x with at least 2 dimensions, it has ", x.ndim);
  check(!log || !(bias.defined() || mask.defined() || causal), "log_softmax takes no bias, mask or causal");
  if (x.numel() == 0) return;

  SoftmaxParams p{};
  p.x = x.data;
  p.out = out.data;
  p.bias = bias.data;
  p.mask = mask.as<int8_t>();
  p.ndim = x.ndim - 1;
  p.cols = x.shape[p.ndim];
  p.rows = x.numel() / p.cols;
  p.causal_rows = causal ? x.shape[p.ndim - 1] : 0;
  for (int d = 0; d < p.ndim; ++d) {
    p.shape[d] = x.shape[d];
    p.x_stride[d] = x.stride[d];
    p.bias_stride[d] = bias.defined() ? bias.stride[d] : 0;
    p.mask_stride[d] = mask.defined() ? mask.stride[d] : 0;
  }
  p.bias_per_column = bias.defined() && bias.stride[p.ndim] != 0;
  p.mask_per_column = mask.defined() && mask.stride[p.ndim] != 0;
  p.scale = scale;
  p.log = log;
  p.dtype = x.dtype;
  p.bias_dtype = bias.dtype;
  merge_dimensions(p);
  if (const CallDevice device = device_of({&x, &bias, &mask, &out}); device.cuda)
    cuda::kernels().softmax_forward(p, current_stream(device));
  else
    cpu::kernels().softmax_forward(p, threads);
}

void softmax_backward(TensorView dout, TensorView out, TensorView dx, double scale, bool log, Threads threads) {
  check(out.ndim >= 1, "out has no dimension that a softmax could have been taken over");
  expect(out, "out").floating();
  check_same_shape(out, "out", out);
  check_same_shape(dout, "dout", out);
  check_same_shape(dx, "dx", out);
  expect(dout, "dout").dtype(out.dtype);
  check_dx(dx, out);
  if (out.numel() == 0) return;
  const int64_t cols = out.shape[out.ndim - 1];
  const SoftmaxBackwardParams p{.dout = dout.data,
                                .out = out.data,
                                .dx = dx.data,
                                .rows = out.numel() / cols,
                                .cols = cols,
                                .scale = scale,
                                .log = log,
                                .dx_wide = dx.dtype != out.dtype,
                                .dtype = out.dtype};
  if (const CallDevice device = device_of({&dout, &out, &dx}); device.cuda)
    cuda::kernels().softmax_backward(p, current_stream(device));
  else
    cpu::kernels().softmax_backward(p, threads);
}

namespace {

void check_columns(const TensorView& t, const char* what, const TensorView& x) {
  expect(t, what).rank(3);
  check_same_shape(t, what, x);
  check(t.device == DeviceType::kCPU, what, " must be on the CPU");
}

}  // namespace

void softmax_columns_forward(TensorView x, TensorView out, double scale, bool log, Threads threads) {
  expect(x, "x").floating();
  check_columns(x, "x", x);
  check_columns(out, "out", x);
  expect(out, "out").dtype(x.dtype);
  if (x.numel() == 0) return;
  cpu::kernels().softmax_columns_forward({x.data, out.data, x.shape[0], x.shape[1], x.shape[2], scale, log, x.dtype}, threads);
}

void softmax_columns_backward(TensorView dout, TensorView out, TensorView dx, double scale, bool log, Threads threads) {
  expect(out, "out").floating();
  check_columns(out, "out", out);
  check_columns(dout, "dout", out);
  check_columns(dx, "dx", out);
  expect(dout, "dout").dtype(out.dtype);
  check_dx(dx, out);
  if (out.numel() == 0) return;
  cpu::kernels().softmax_columns_backward(
      {dout.data, out.data, dx.data, out.shape[0], out.shape[1], out.shape[2], scale, log, dx.dtype != out.dtype, out.dtype}, threads);
}

}  // namespace foveate
