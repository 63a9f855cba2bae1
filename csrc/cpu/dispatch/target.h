// Which compiled instruction set runs: detected once, forced by FOVEATE_CPU_TARGET=name.
#pragma once

#include <string>
#include <vector>

namespace foveate::cpu {

struct Kernels;

struct Target {
  const char* name;
  bool runs_here;  // this machine has the instructions
  const Kernels* kernels;
};

const std::vector<Target>& targets();  // weakest first
const Target& active_target();         // throws if FOVEATE_CPU_TARGET names one that is not compiled or cannot run here
inline const Kernels& kernels() { return *active_target().kernels; }

}  // namespace foveate::cpu
