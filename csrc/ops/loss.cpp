#include "ops/loss.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

void check_rows(const TensorView& logits, const TensorView& target, const TensorView& stats) {
  expect(logits, "logits").rank(2).floating().last_contiguous();
  const int64_t rows = logits.shape[0];
  expect(target, "target").rank(1).size(0, rows).dtype(DType::kInt64).contiguous();
  expect(stats, "stats").rank(2).size(0, rows).size(1, 2).dtype(accumulator_of(logits.dtype)).contiguous();
}

// On the CPU; a GPU is not waited for, its kernels give a loss of NaN.
void check_target(const TensorView& target, int64_t classes, int64_t ignore_index) {
  const int64_t* values = target.as<int64_t>();
  for (int64_t i = 0; i < target.shape[0]; ++i)
    check((values[i] >= 0 && values[i] < classes) || values[i] == ignore_index, "target[", i, "] = ", values[i], " is outside 0..",
          classes - 1, " and is not ignore_index = ", ignore_index);
}

CrossEntropyParams params(const TensorView& logits, const TensorView& target, const TensorView& stats, const CrossEntropyOptions& options) {
  CrossEntropyParams p{};
  p.logits = logits.data;
  p.target = target.as<int64_t>();
  p.stats = stats.data;
  p.rows = logits.shape[0];
  p.cols = logits.shape[1];
  p.logits_stride = logits.stride[0];
  p.options = options;
  p.dtype = logits.dtype;
  return p;
}

}  // namespace

void cross_entropy_forward(TensorView logits, TensorView target, TensorView loss, TensorView stats, CrossEntropyOptions options,
                           Threads threads) {
  check_rows(logits, target, stats);
  expect(loss, "loss").rank(1).size(0, logits.shape[0]).dtype(accumulator_of(logits.dtype)).contiguous();
  const CallDevice device = device_of({&logits, &target, &loss, &stats});
  if (device.readable) check_target(target, logits.shape[1], options.ignore_index);
  if (logits.shape[0] == 0) return;
  check(logits.shape[1] > 0, "logits has no classes: its last dimension is 0");
  CrossEntropyParams p = params(logits, target, stats, options);
  p.loss = loss.data;
  if (device.cuda)
    cuda::kernels().cross_entropy_forward(p, current_stream(device));
  else
    cpu::kernels().cross_entropy_forward(p, threads);
}

void cross_entropy_backward(TensorView dloss, TensorView logits, TensorView target, TensorView stats, TensorView dlogits,
                            CrossEntropyOptions options, Threads threads) {
  check_rows(logits, target, stats);
  expect(dloss, "dloss").rank(1).size(0, logits.shape[0]).dtype(accumulator_of(logits.dtype));
  expect(dlogits, "dlogits").rank(2).size(0, logits.shape[0]).size(1, logits.shape[1]).dtype(logits.dtype).contiguous();
  const CallDevice device = device_of({&dloss, &logits, &target, &stats, &dlogits});
  if (device.readable) check_target(target, logits.shape[1], options.ignore_index);
  if (logits.numel() == 0) return;
  CrossEntropyParams p = params(logits, target, stats, options);
  p.dloss = dloss.data;
  p.dloss_stride = dloss.stride[0];
  p.dlogits = dlogits.data;
  if (device.cuda)
    cuda::kernels().cross_entropy_backward(p, current_stream(device));
  else
    cpu::kernels().cross_entropy_backward(p, threads);
}

}  // namespace foveate
