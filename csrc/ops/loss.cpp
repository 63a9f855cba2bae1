#include "ops/loss.h"

#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/target.h"
#include "ops/device.h"

namespace foveate {
namespace {

void check_rows(const TensorView& logits, const TensorView& target, const TensorView& stats) {
  check_rank(logits, "logits", 2), check_float(logits, "logits");
  check_last_contiguous(logits, "logits");
  const int64_t rows = logits.shape[0];
  check_rank(target, "target", 1), check_size(target, "target", 0, rows);
  check_dtype(target, "target", DType::kInt64), check_contiguous(target, "target");
  check_rank(stats, "stats", 2), check_size(stats, "stats", 0, rows), check_size(stats, "stats", 1, 2);
  check_dtype(stats, "stats", accumulator_of(logits.dtype)), check_contiguous(stats, "stats");
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
  p.logits = logits.data, p.target = target.as<int64_t>(), p.stats = stats.data;
  p.rows = logits.shape[0], p.cols = logits.shape[1], p.logits_stride = logits.stride[0];
  p.options = options, p.dtype = logits.dtype;
  return p;
}

}  // namespace

void cross_entropy_forward(TensorView logits, TensorView target, TensorView loss, TensorView stats, CrossEntropyOptions options,
                           Threads threads) {
  check_rows(logits, target, stats);
  check_rank(loss, "loss", 1), check_size(loss, "loss", 0, logits.shape[0]);
  check_dtype(loss, "loss", accumulator_of(logits.dtype)), check_contiguous(loss, "loss");
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
  check_rank(dloss, "dloss", 1), check_size(dloss, "dloss", 0, logits.shape[0]), check_dtype(dloss, "dloss", accumulator_of(logits.dtype));
  check_rank(dlogits, "dlogits", 2), check_size(dlogits, "dlogits", 0, logits.shape[0]), check_size(dlogits, "dlogits", 1, logits.shape[1]);
  check_dtype(dlogits, "dlogits", logits.dtype), check_contiguous(dlogits, "dlogits");
  const CallDevice device = device_of({&dloss, &logits, &target, &stats, &dlogits});
  if (device.readable) check_target(target, logits.shape[1], options.ignore_index);
  if (logits.numel() == 0) return;
  CrossEntropyParams p = params(logits, target, stats, options);
  p.dloss = dloss.data, p.dloss_stride = dloss.stride[0];
  p.dlogits = dlogits.data;
  if (device.cuda)
    cuda::kernels().cross_entropy_backward(p, current_stream(device));
  else
    cpu::kernels().cross_entropy_backward(p, threads);
}

}  // namespace foveate
