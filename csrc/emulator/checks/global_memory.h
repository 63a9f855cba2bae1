// Global memory is the process's memory. While spans are registered, the device layer's accesses must lie inside one of them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "emulator/checks/error.h"
#include "emulator/checks/site.h"

namespace foveate::emulator {

// Memory that kernels may touch as long as this object lives: a tensor's, from its first to its last element.
class GlobalSpan {
 public:
  GlobalSpan(const void* data, size_t bytes, std::string name);
  ~GlobalSpan();
  GlobalSpan(const GlobalSpan&) = delete;
  GlobalSpan& operator=(const GlobalSpan&) = delete;
  GlobalSpan(GlobalSpan&& other) noexcept;

 private:
  long id_;
};

// The registered spans as they were when a launch began.
class GlobalMemory {
 public:
  void begin();
  // Throws KernelError unless an aligned access of `bytes` bytes at p is inside a span.
  void check(const void* p, size_t bytes, const char* what, Site site) {
    if ((reinterpret_cast<uintptr_t>(p) & (bytes - 1)) != 0) [[unlikely]]
      kernel_error(what, " of ", bytes, " bytes at ", emulator::name(site), ": the address is not a multiple of ", bytes);
    check_range(p, bytes, what, site);
  }
  // The same without alignment.
  void check_range(const void* p, size_t bytes, const char* what, Site site) {
    if (!spans_.empty() && !spans_[last_].contains(reinterpret_cast<uintptr_t>(p), bytes))
      find(reinterpret_cast<uintptr_t>(p), bytes, what, site);
  }
  // "byte 12 of k"
  std::string describe(uintptr_t address) const;

 private:
  struct Span {
    uintptr_t data;
    size_t bytes;
    std::string name;
    long id;
    bool contains(uintptr_t address, size_t count) const { return address - data <= bytes && count <= bytes - (address - data); }
  };
  friend class GlobalSpan;
  static std::vector<Span>& registered();

  void find(uintptr_t address, size_t bytes, const char* what, Site site);

  std::vector<Span> spans_;
  size_t last_ = 0;  // the span of the last access
};

}  // namespace foveate::emulator
