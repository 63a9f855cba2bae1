// What a kernel did wrong: a RuntimeError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace foveate::emulator {

struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void kernel_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw KernelError(text.str());
}

}  // namespace foveate::emulator
