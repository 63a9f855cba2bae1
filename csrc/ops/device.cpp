#include "ops/device.h"

#include <cstdlib>
#include <string>

namespace foveate {
namespace {

StreamOfDevice stream_source = nullptr;

std::string describe(const TensorView& t) { return t.device == DeviceType::kCPU ? "the CPU" : "cuda:" + std::to_string(t.device_index); }

#ifdef FOVEATE_CUDA_EMULATED
constexpr bool kEmulated = true;  // a test build: tensors on the CPU stand for tensors on a GPU
// Tests of what kernels do with values that nobody has checked.
bool readable() {
  const char* setting = std::getenv("FOVEATE_EMULATOR_READABLE");
  return !setting || *setting != '0';
}
#else
constexpr bool kEmulated = false;
constexpr bool readable() { return true; }
#endif

}  // namespace

CallDevice device_of(std::initializer_list<const TensorView*> tensors) {
  const TensorView* first = nullptr;
  for (const TensorView* t : tensors) {
    if (!t->defined()) continue;
    if (!first) first = t;
    const bool together = t->device == first->device && (t->device == DeviceType::kCPU || t->device_index == first->device_index);
    check(together, "the tensors of a call must be on one device: one is on ", describe(*first), ", another on ", describe(*t));
  }
  if (!first || first->device == DeviceType::kCPU) return {.cuda = kEmulated, .readable = readable()};
  return {.cuda = true, .index = first->device_index, .readable = false};
}

cuda::Stream current_stream(const CallDevice& device) {
  return {device.index, stream_source && !kEmulated ? stream_source(device.index) : nullptr};
}

void set_stream_source(StreamOfDevice source) { stream_source = source; }

}  // namespace foveate
