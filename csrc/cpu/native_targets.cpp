// Prints those of its arguments that name a target this CPU can run: CMake asks it for FOVEATE_CPU_TARGETS=native.
#include <cstdio>

#include "cpu/dispatch/runs_here.h"

int main(int count, char** names) {
  for (int i = 1; i < count; ++i)
    if (foveate::cpu::runs_here(names[i])) std::printf("%s;", names[i]);
}
