// What a block has on sm_90a beyond sm_80.
#pragma once

#include <array>

#include "emulator/mbarrier.h"
#include "emulator/tma.h"
#include "emulator/wgmma.h"

namespace foveate::emulator {

struct Hopper {
  MBarriers barriers;
  Tma tma;
  std::array<WgmmaQueue, kMaxWarps> wgmma;

  void clear() {
    barriers.clear(), tma.clear();
    for (WgmmaQueue& queue : wgmma) queue.clear();
  }
};

}  // namespace foveate::emulator
