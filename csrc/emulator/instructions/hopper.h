// What a block has on sm_90a beyond sm_80.
#pragma once

#include <array>

#include "emulator/instructions/mbarrier.h"
#include "emulator/instructions/tma.h"
#include "emulator/instructions/wgmma.h"

namespace foveate::emulator {

struct Hopper {
  MBarriers barriers;
  Tma tma;
  std::array<WgmmaQueue, kMaxWarps> wgmma;

  void clear() {
    barriers.clear();
    tma.clear();
    for (WgmmaQueue& queue : wgmma) queue.clear();
  }
  // Throws if the four warps of a warpgroup have not multiplied the same; when the block's `warps` warps have ended.
  void check_warpgroups(int warps) const;
};

}  // namespace foveate::emulator
