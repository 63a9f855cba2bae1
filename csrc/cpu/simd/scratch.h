// Aligned scratch memory of one call. Not std::vector: its functions would be compiled with this file's instruction set and shared.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/simd/vec.h"

namespace foveate::cpu::FOVEATE_ISA {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Throws std::bad_alloc (MemoryError in Python). Must be called outside a parallel region.
  void allocate(int64_t bytes) {
    const int64_t size = round_up<int64_t>(max<int64_t>(bytes, 1), 64);
    data_ = std::aligned_alloc(64, static_cast<size_t>(size));
    if (!data_) throw std::bad_alloc();
  }
  template <class T>
  T* at(int64_t byte_offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_ = nullptr;
};

// Cuts one allocation into aligned pieces: ask for each piece's offset, then allocate total().
class Layout {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t offset = total_;
    total_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 64);
    return offset;
  }
  int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
};

}  // namespace foveate::cpu::FOVEATE_ISA
