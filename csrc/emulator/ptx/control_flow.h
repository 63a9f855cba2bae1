// Where lanes that a branch parts come together again.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/ptx/program.h"

namespace foveate::emulator::ptx {

// For each instruction that is a branch, the first instruction of its immediate post-dominator, or kNowhere; sets `join`.
void find_joins(std::vector<Instruction>& code);

}  // namespace foveate::emulator::ptx
