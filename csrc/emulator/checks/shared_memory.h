// A block's dynamic shared memory: bytes of 0xff (NaN as bf16, fp16, fp32 and fp8) before the block starts, every access checked for bounds and
// alignment. Addresses start at kBase, not at 0, so that an address without smem_base() is caught.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "emulator/checks/error.h"
#include "emulator/checks/site.h"

namespace foveate::emulator {

class SharedMemory {
 public:
  static constexpr uint32_t kBase = 1024;
  static constexpr size_t kMost = 227 * 1024;  // a block's on sm_90

  void begin(size_t bytes) {
    size_ = static_cast<uint32_t>(bytes);
    if (bytes > memory_.size()) memory_.resize(bytes);
    poison(0, size_);
  }
  uint32_t size() const { return size_; }
  // The offset of `bytes` bytes at `address`, checked; alignments are powers of 2.
  uint32_t offset(uint32_t address, uint32_t bytes, const char* what, Site site) const { return offset(address, bytes, bytes, what, site); }
  uint32_t offset(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Site site) const {
    const uint32_t offset = address - kBase;
    if (address < kBase || offset > size_ || bytes > size_ - offset || (address & (alignment - 1)) != 0) [[unlikely]]
      bad_address(address, bytes, alignment, what, site);
    return offset;
  }
  unsigned char* at(uint32_t offset) { return memory_.data() + offset; }
  void poison(uint32_t offset, uint32_t bytes) { std::fill_n(memory_.begin() + offset, bytes, static_cast<unsigned char>(0xff)); }

 private:
  [[noreturn]] void bad_address(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Site site) const {
    const int64_t offset = static_cast<int64_t>(address) - kBase;
    if (address % alignment != 0)
      kernel_error(what, " of ", bytes, " bytes at ", name(site), ": the address, smem_base() + ", offset, ", is not a multiple of ",
                   alignment);
    kernel_error(what, " of ", bytes, " bytes at ", name(site), ": the address, smem_base() + ", offset, ", is outside the block's ", size_,
                 " bytes of shared memory");
  }

  std::vector<unsigned char> memory_;
  uint32_t size_ = 0;
};

}  // namespace foveate::emulator
