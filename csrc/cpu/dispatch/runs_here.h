// Whether this CPU has the instructions of a target: asked once by the module (target.cpp), and by the build (native_targets.cpp).
#pragma once

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foveate::cpu {

#if defined(__x86_64__)
// Registers eax, ebx, ecx, edx of one leaf; zeros where the CPU does not have it.
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned part) {
    if (!__get_cpuid_count(leaf, part, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

// AMX: the instructions, tiles that the system saves (XCR0), and its permission for this process (once for all its threads; a refusal,
// for instance because a thread has too small a signal stack, leaves the process as it was).
inline bool tiles_run_here() {
  const unsigned features = Leaf(7, 0).d;
  if (!(features >> 22 & 1) || !(features >> 24 & 1) || !(features >> 25 & 1)) return false;  // bf16, tile, int8
  if (!(Leaf(1, 0).c >> 27 & 1)) return false;                                                // no xgetbv
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
#if defined(__linux__)
  constexpr long kRequestState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return true;
#endif
}
#endif

inline bool runs_here(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is("avx2")) return avx2;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni"), bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (is("avx2_vnni")) return avx2 && Leaf(7, 1).a >> 4 & 1;
  if (is("avx512")) return avx512;
  if (is("avx512_vnni")) return vnni;
  if (is("avx512_bf16")) return bf16;
  if (is("amx")) return bf16 && tiles_run_here();
  if (is("amx_shim")) return avx2;  // test builds only
#endif
#if defined(__aarch64__)
  if (is("neon")) return true;  // every AArch64 CPU has it
#endif
  return is("baseline");
}

}  // namespace foveate::cpu
