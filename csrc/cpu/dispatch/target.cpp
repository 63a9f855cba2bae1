#include "cpu/dispatch/target.h"

#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/dispatch/runs_here.h"

namespace foveate::cpu {

// FOVEATE_CPU_TARGET_LIST is X(baseline) X(avx2) ..., written by CMake: each is a namespace with its own table.
#define X(isa)                \
  namespace isa {             \
  extern const Kernels table; \
  }
FOVEATE_CPU_TARGET_LIST
#undef X

namespace {

const Target& choose() {
  const auto& all = targets();
  if (const char* wanted = std::getenv("FOVEATE_CPU_TARGET"); wanted && *wanted) {
    std::string compiled;
    for (const Target& t : all) {
      if (std::strcmp(t.name, wanted) == 0) {
        check(t.runs_here, "FOVEATE_CPU_TARGET=", wanted, " is compiled, but this CPU does not have its instructions");
        return t;
      }
      compiled += std::string(compiled.empty() ? "" : ", ") + t.name;
    }
    fail("FOVEATE_CPU_TARGET=", wanted, " is not one of the compiled targets: ", compiled);
  }
  const Target* best = &all.front();
  for (const Target& t : all)
    if (t.runs_here) best = &t;
  return *best;
}

}  // namespace

const std::vector<Target>& targets() {
#define X(isa) Target{#isa, runs_here(#isa), &isa::table},
  static const std::vector<Target> all = {FOVEATE_CPU_TARGET_LIST};
#undef X
  return all;
}

const Target& active_target() {
  static const Target& chosen = choose();
  return chosen;
}

}  // namespace foveate::cpu
