// Errors are sentences with the values in them; std::invalid_argument arrives in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace foveate {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(parts...);
}

}  // namespace foveate
