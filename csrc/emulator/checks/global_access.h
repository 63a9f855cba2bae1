// How global memory is accessed.
#pragma once

#include <cstdint>

namespace foveate::emulator {

// kReadOnly: by way of a cache that does not see writes of this launch.
enum class GlobalAccess : uint8_t { kRead, kReadOnly, kWrite, kAtomic };

}  // namespace foveate::emulator
