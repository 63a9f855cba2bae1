#include "ops/rotary.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

// [S, pairs] or [B, S, pairs]; writes the strides of B and S.
void check_table(const TensorView& t, const char* what, const TensorView& x, int64_t pairs, int64_t stride[2]) {
  check(t.ndim == 2 || t.ndim == 3, what, " has ", t.ndim, " dimensions, expected 2 or 3");
  const int s = t.ndim - 2;
  if (s == 1) expect(t, what).size(0, x.shape[0]);
  expect(t, what).size(s, x.shape[1]).size(s + 1, pairs).last_contiguous();
  check(t.dtype == x.dtype || t.dtype == accumulator_of(x.dtype), what, " is ", name(t.dtype), ", expected ", name(x.dtype), " or ",
        name(accumulator_of(x.dtype)));
  stride[0] = s == 1 ? t.stride[0] : 0;
  stride[1] = t.stride[s];
}

}  // namespace

void rotary(TensorView x, TensorView cos, TensorView sin, TensorView out, bool interleaved, bool inverse, Threads threads) {
  expect(x, "x").rank(4).floating().last_contiguous();
  expect(out, "out").rank(4);
  for (int d = 0; d < 4; ++d) expect(out, "out").size(d, x.shape[d]);
  expect(out, "out").contiguous().dtype(x.dtype);
  check(cos.ndim >= 1, "cos has no dimensions, expected 2 or 3");
  const int64_t pairs = cos.shape[cos.ndim - 1];
  check(2 * pairs <= x.shape[3], "cos has ", pairs, " angles, which turn ", 2 * pairs, " elements; x has head dim ", x.shape[3]);
  RotaryParams p{};
  check_table(cos, "cos", x, pairs, p.cos_stride);
  check_table(sin, "sin", x, pairs, p.sin_stride);
  expect(sin, "sin").dtype(cos.dtype);
  if (x.numel() == 0) return;
  p.x = x.data;
  p.out = out.data;
  p.cos = cos.data;
  p.sin = sin.data;
  for (int d = 0; d < 3; ++d) p.x_stride[d] = x.stride[d];
  p.batch = x.shape[0];
  p.seq = x.shape[1];
  p.heads = x.shape[2];
  p.dim = x.shape[3];
  p.pairs = pairs;
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.dtype = x.dtype;
  p.table_dtype = cos.dtype;
  if (const CallDevice device = device_of({&x, &cos, &sin, &out}); device.cuda)
    cuda::kernels().rotary(p, current_stream(device));
  else
    cpu::kernels().rotary(p, threads);
}

}  // namespace foveate
