#include "emulator/checks/global_memory.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>

#include "emulator/checks/error.h"

namespace foveate::emulator {

namespace {
std::mutex spans_mutex;
long next_id = 0;
}  // namespace

std::vector<GlobalMemory::Span>& GlobalMemory::registered() {
  static std::vector<Span> spans;
  return spans;
}

GlobalSpan::GlobalSpan(const void* data, size_t bytes, std::string name) {
  const std::lock_guard lock(spans_mutex);
  id_ = next_id++;
  GlobalMemory::registered().push_back({reinterpret_cast<uintptr_t>(data), bytes, std::move(name), id_});
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

std::string GlobalMemory::describe(uintptr_t address) const {
  for (const Span& span : spans_)
    if (span.contains(address, 1)) return "byte " + std::to_string(address - span.data) + " of " + span.name;
  std::ostringstream text;
  text << "the byte at 0x" << std::hex << address;
  return text.str();
}

void GlobalMemory::find(uintptr_t address, size_t bytes, const char* what, Site site) {
  for (size_t i = 0; i < spans_.size(); ++i) {
    if (spans_[i].contains(address, bytes)) {
      last_ = i;
      return;
    }
  }
  const Span* nearest = nullptr;
  int64_t least = INT64_MAX;
  for (const Span& span : spans_) {
    const int64_t offset = static_cast<int64_t>(address - span.data), beyond = offset - static_cast<int64_t>(span.bytes);
    const int64_t distance = offset < 0 ? -offset : std::max<int64_t>(beyond, 0);  // 0: its first bytes are inside
    if (distance < least) {
      nearest = &span;
      least = distance;
    }
  }
  kernel_error(what, " of ", bytes, " bytes at ", name(site), " is outside every tensor; the nearest is ", nearest->name, " of ",
               nearest->bytes, " bytes, and the access is at its byte ", static_cast<int64_t>(address - nearest->data));
}

}  // namespace foveate::emulator
