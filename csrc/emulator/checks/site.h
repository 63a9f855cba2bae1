// The place of a call in a kernel, for reports.
#pragma once

#include <cstdint>
#include <string>

namespace foveate::emulator {

struct Site {
  const char* file = "";
  int line = 0;

  // The builtins must stand in the default arguments: there they name the line of the outermost call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site&) const = default;
};

// "cuda/rows/softmax.cu:120": the path below csrc/; of other files the name alone.
std::string name(Site site);

// A site in 24 bits, for shadow memory.
uint32_t site_number(Site site);
Site site_of_number(uint32_t number);

}  // namespace foveate::emulator
