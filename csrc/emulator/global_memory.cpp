#include "emulator/global_memory.h"

#include <cstdint>
#include <mutex>

#include "emulator/error.h"

namespace foveate::emulator {

namespace {
std::mutex spans_mutex;
long next_id = 0;
}  // namespace

std::vector<GlobalMemory::Span>& GlobalMemory::registered() {
  static std::vector<Span> spans;
  return spans;
}

GlobalSpan::GlobalSpan(const void* data, size_t bytes, const char* name) {
  const std::lock_guard lock(spans_mutex);
  id_ = next_id++;
  GlobalMemory::registered().push_back({reinterpret_cast<uintptr_t>(data), bytes, name, id_});
}

GlobalSpan::GlobalSpan(GlobalSpan&& other) noexcept : id_(other.id_) { other.id_ = -1; }

GlobalSpan::~GlobalSpan() {
  const std::lock_guard lock(spans_mutex);
  std::erase_if(GlobalMemory::registered(), [this](const auto& span) { return span.id == id_; });
}

void GlobalMemory::begin() {
  const std::lock_guard lock(spans_mutex);
  spans_ = registered();
  last_ = 0;
}

void GlobalMemory::find(uintptr_t address, size_t bytes, const char* what, Site site) {
  if (address % bytes != 0) kernel_error(what, " of ", bytes, " bytes at ", name(site), ": the address is not a multiple of ", bytes);
  for (size_t i = 0; i < spans_.size(); ++i) {
    if (spans_[i].contains(address, bytes)) {
      last_ = i;
      return;
    }
  }
  // The span that the access misses by least.
  const Span* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Span& span : spans_) {
    const uintptr_t distance = address < span.data ? span.data - address : address - span.data - span.bytes;
    if (address + bytes > span.data + span.bytes && address < span.data + span.bytes) {
      nearest = &span;
      break;
    }
    if (distance < least) nearest = &span, least = distance;
  }
  kernel_error(what, " of ", bytes, " bytes at ", name(site), " is outside every tensor; the nearest is ", nearest->name, " of ", nearest->bytes,
               " bytes, and the access is at its byte ", static_cast<int64_t>(address - nearest->data));
}

}  // namespace foveate::emulator
