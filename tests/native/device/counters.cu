// Accesses whose cost is known by the rules of docs/kernels/emulator.md, one pattern a line. tests/cuda_kernels/test_emulator_counters.py runs it with
// FOVEATE_EMULATOR_COUNTERS and looks the lines up by the pattern's name, which stands in a comment after each.
#include <cstdio>
#include <exception>
#include <vector>

#include "cuda/device/device.cuh"
#include "cuda/host/launch.h"
#include "emulator/checks/global_memory.h"

using namespace foveate::cuda;

namespace {

struct Params {
  char* data;  // aligned to 128 bytes
};

__global__ void patterns(const __grid_constant__ Params p) {
  const int lane = dev::lane();
  const uint32_t base = dev::smem_base();
  uint32_t d[4];
  dev::st_shared<uint32_t>(base + 4 * lane, 0);                                  // words in a row
  dev::st_shared<uint32_t>(base + 8 * lane, 0);                                  // every second word
  dev::st_shared<uint32_t>(base + 128 * lane, 0);                                // one bank
  dev::st_shared<uint16_t>(base + 2 * lane, 0);                                  // halves of words
  dev::st_shared(base + 8 * lane, make_uint2(0, 0));                             // 8 bytes in a row
  dev::st_shared(base + 16 * lane, make_uint4(0, 0, 0, 0));                      // 16 bytes in a row
  dev::st_shared(base + 32 * lane, make_uint4(0, 0, 0, 0));                      // 16 bytes of every 32
  dev::st_shared(base + lane / 4 * 128 + lane % 4 * 8, make_uint2(0, 0));        // fragments in rows of 128 bytes
  dev::st_shared(base + lane / 4 * 160 + lane % 4 * 8, make_uint2(0, 0));        // fragments in rows of 160 bytes
  dev::sync_warp();
  dev::ld_shared<uint32_t>(base);                                                // one word for all
  dev::ld_shared<uint4>(base);                                                   // 16 bytes for all
  for (int i = lane; i < 40; i += 32) dev::ld_shared<uint32_t>(base + 4 * i);    // a loop with a rest
  if (lane < 8) dev::ld_shared<uint32_t>(base + 4 * lane);                       // some lanes
  dev::ldmatrix_x4(d, base + lane * 128);                                        // matrix rows of 128 bytes
  dev::ldmatrix_x4(d, base + lane * 144);                                        // matrix rows of 144 bytes
  dev::ldmatrix_x2(*reinterpret_cast<uint32_t(*)[2]>(d), base + lane * 64);      // matrix rows of 64 bytes
  dev::ldmatrix_x4_trans(d, base + lane / 8 * 1024 + lane % 8 * (128 + 16));     // transposed, 144 bytes
  dev::atomic_add_shared(base + 4 * lane, 0.0f);                                 // atomics in a row
  dev::atomic_add_shared(base, 0.0f);                                            // atomics to one word
  dev::sync_warp();
  dev::cp_async<16>(base + 16 * lane, p.data + 16 * lane);                       // copies in a row
  dev::cp_async<16>(base + 512 + 16 * lane, p.data, false);                      // copies of zeros
  dev::cp_async<4>(base + 2048 + 128 * (lane % 16), p.data + 4 * lane, lane < 16);  // copies to one bank
  dev::cp_async_wait_all();
  dev::ld_global<uint32_t>(p.data + 4 * lane);                                   // global words in a row
  dev::ld_global<uint32_t>(p.data + 8 * lane);                                   // every second global word
  dev::ld_global_nc<uint32_t>(p.data + 4 + 4 * lane);                            // global words from byte 4
  dev::ld_global<uint32_t>(p.data);                                              // one global word for all
  dev::ld_global<uint4>(p.data + 16 * lane);                                     // 16 global bytes in a row
  dev::ld_global_stream<uint4>(p.data + 32 * lane);                              // 16 of every 32 global bytes
  dev::ld_global<uint32_t>(p.data + 64 * lane);                                  // a global word of every 64 bytes
  dev::st_global<uint16_t>(p.data + 4096 + 2 * lane, 0);                         // global halves of words
  dev::atomic_add(reinterpret_cast<float*>(p.data + 4096 + 128 + 4 * lane), 0);  // global atomics in a row
}

}  // namespace

int main() {
  struct alignas(128) Line {
    char bytes[128];
  };
  std::vector<Line> memory(64);
  const foveate::emulator::GlobalSpan span(memory.data(), memory.size() * sizeof(Line), "data");
  try {
    launch<patterns, Params>(2, 64, 8192, Stream{0, nullptr}, Params{memory.data()->bytes});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
