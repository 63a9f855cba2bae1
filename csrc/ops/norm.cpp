#include "ops/norm.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

void check_rows(const TensorView& t, const char* what, const TensorView& x) {
  expect(t, what).rank(2).size(0, x.shape[0]).size(1, x.shape[1]).contiguous().dtype(x.dtype);
}

void check_x_and_weight(const TensorView& x, const TensorView& weight) {
  expect(x, "x").rank(2).floating().last_contiguous();
  if (!weight.defined()) return;
  expect(weight, "weight").rank(1).size(0, x.shape[1]).contiguous();
  check(weight.dtype == x.dtype || weight.dtype == accumulator_of(x.dtype), "weight is ", name(weight.dtype), ", expected ", name(x.dtype),
        " or ", name(accumulator_of(x.dtype)));
}

void check_rstd(const TensorView& rstd, const TensorView& x) {
  expect(rstd, "rstd").rank(1).size(0, x.shape[0]).contiguous().dtype(accumulator_of(x.dtype));
}

}  // namespace

void rms_norm_forward(TensorView x, TensorView residual, TensorView weight, TensorView out, TensorView sum, TensorView rstd, double eps,
                      Threads threads) {
  check_x_and_weight(x, weight);
  check_rows(out, "out", x);
  if (rstd.defined()) check_rstd(rstd, x);
  check(residual.defined() == sum.defined(), "residual and sum belong together: give both or neither");
  if (residual.defined()) {
    expect(residual, "residual").rank(2).size(0, x.shape[0]).size(1, x.shape[1]).last_contiguous().dtype(x.dtype);
    check_rows(sum, "sum", x);
  }
  if (x.numel() == 0) return;
  const RmsNormParams p{.x = x.data,
                        .weight = weight.data,
                        .residual = residual.data,
                        .sum = sum.data,
                        .out = out.data,
                        .rstd = rstd.data,
                        .rows = x.shape[0],
                        .cols = x.shape[1],
                        .x_stride = x.stride[0],
                        .residual_stride = residual.defined() ? residual.stride[0] : 0,
                        .eps = eps,
                        .dtype = x.dtype,
                        .weight_dtype = weight.defined() ? weight.dtype : x.dtype};
  if (const CallDevice device = device_of({&x, &residual, &weight, &out, &sum, &rstd}); device.cuda)
    cuda::kernels().rms_norm_forward(p, current_stream(device));
  else
    cpu::kernels().rms_norm_forward(p, threads);
}

void rms_norm_backward(TensorView dout, TensorView x, TensorView weight, TensorView rstd, TensorView dsum, TensorView dx,
                       TensorView dweight_parts, Threads threads) {
  check_x_and_weight(x, weight);
  check_rows(dout, "dout", x);
  check_rows(dx, "dx", x);
  check_rstd(rstd, x);
  if (dsum.defined()) check_rows(dsum, "dsum", x);
  int64_t parts = threads;
  if (dweight_parts.defined()) {
    expect(dweight_parts, "dweight_parts").rank(2).size(1, x.shape[1]).contiguous().dtype(accumulator_of(x.dtype));
    parts = dweight_parts.shape[0];
    check(parts > 0, "dweight_parts has no rows; it needs one for each thread");
  }
  if (x.shape[1] == 0) return;
  const RmsNormBackwardParams p{.dout = dout.data,
                                .x = x.data,
                                .weight = weight.data,
                                .rstd = rstd.data,
                                .dsum = dsum.data,
                                .dx = dx.data,
                                .dweight_parts = dweight_parts.data,
                                .rows = x.shape[0],
                                .cols = x.shape[1],
                                .x_stride = x.stride[0],
                                .parts = parts,
                                .dtype = x.dtype,
                                .weight_dtype = weight.defined() ? weight.dtype : x.dtype};
  if (const CallDevice device = device_of({&dout, &x, &weight, &rstd, &dsum, &dx, &dweight_parts}); device.cuda)
    cuda::kernels().rms_norm_backward(p, current_stream(device));
  else
    cpu::kernels().rms_norm_backward(p, threads);
}

}  // namespace foveate
