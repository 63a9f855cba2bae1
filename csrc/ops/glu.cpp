#include "ops/glu.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

GluParams params(const TensorView& gate, const TensorView& up, bool gelu) {
  expect(gate, "gate").rank(2).floating().last_contiguous();
  expect(up, "up").rank(2).last_contiguous().size(0, gate.shape[0]).size(1, gate.shape[1]).dtype(gate.dtype);
  GluParams p{};
  p.gate = gate.data;
  p.up = up.data;
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  p.gate_stride = gate.stride[0];
  p.up_stride = up.stride[0];
  p.gelu = gelu;
  p.dtype = gate.dtype;
  return p;
}

void check_rows(const TensorView& t, const char* what, const TensorView& x) {
  expect(t, what).rank(2).size(0, x.shape[0]).size(1, x.shape[1]).contiguous().dtype(x.dtype);
}

void check_on_cpu(const CallDevice& device) { check(!device.cuda, "glu has no CUDA kernel; its tensors must be on the CPU"); }

}  // namespace

void glu_forward(TensorView gate, TensorView up, TensorView out, bool gelu, Threads threads) {
  GluParams p = params(gate, up, gelu);
  check_rows(out, "out", gate);
  check_on_cpu(device_of({&gate, &up, &out}));
  if (gate.numel() == 0) return;
  p.out = out.data;
  cpu::kernels().glu_forward(p, threads);
}

void glu_backward(TensorView dout, TensorView gate, TensorView up, TensorView dgate, TensorView dup, bool gelu, Threads threads) {
  GluParams p = params(gate, up, gelu);
  check_rows(dout, "dout", gate);
  check_rows(dgate, "dgate", gate);
  check_rows(dup, "dup", gate);
  check_on_cpu(device_of({&dout, &gate, &up, &dgate, &dup}));
  if (gate.numel() == 0) return;
  p.dout = dout.data;
  p.dgate = dgate.data;
  p.dup = dup.data;
  cpu::kernels().glu_backward(p, threads);
}

}  // namespace foveate
