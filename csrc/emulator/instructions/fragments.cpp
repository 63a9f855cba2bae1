// mma and ldmatrix on the CPU: the last lane of a warp to come computes for all. Layouts as in the PTX ISA, "Matrix multiply-accumulate
// instructions": g = lane / 4 and t = lane % 4 there are groupID and threadID_in_group.
#include "cuda/device/device.cuh"
#include "emulator/execution/block.h"

// Compiled for AVX2 too, chosen at run time.
#if defined(__x86_64__)
#define FOVEATE_CLONES [[gnu::target_clones("arch=x86-64-v3", "default")]]
#else
#define FOVEATE_CLONES
#endif

namespace foveate::emulator {

namespace {

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float from_f16(uint32_t bits) { return float_from_half(static_cast<uint16_t>(bits)); }
float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }  // the last 13 bits are not looked at

struct MmaLane {
  float* d;           // 4
  const uint32_t* a;  // 4
  uint32_t b[2];
};
using MmaLanes = std::array<MmaLane*, kWarpSize>;

// d[16][8] += a[16][depth] @ b[depth][8], one row of d at a time so that it stays in vector registers.
template <int depth>
[[gnu::always_inline]] inline void multiply(float (&d)[16][8], const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
}

template <int depth>
[[gnu::always_inline]] inline void multiply_and_hand_out(const MmaLanes& lanes, const float (&a)[16][depth], const float (&b)[depth][8]) {
  float d[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = lanes[l]->d[i];
  }
  multiply(d, a, b);
  for (int l = 0; l < kWarpSize; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) lanes[l]->d[i] = d[g + i / 2 * 8][2 * t + i % 2];
  }
}

template <float (*widen)(uint32_t)>
[[gnu::always_inline]] inline void mma_of_16_bits(const MmaLanes& lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = lanes[l]->a[i];
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = widen(pair & 0xffff);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = widen(pair >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = lanes[l]->b[i];
      b[2 * t + i * 8][g] = widen(pair & 0xffff);
      b[2 * t + i * 8 + 1][g] = widen(pair >> 16);
    }
  }
  multiply_and_hand_out<16>(lanes, a, b);
}

FOVEATE_CLONES void mma_bf16(const MmaLanes& lanes) { mma_of_16_bits<from_bf16>(lanes); }
FOVEATE_CLONES void mma_f16(const MmaLanes& lanes) { mma_of_16_bits<from_f16>(lanes); }
FOVEATE_CLONES void mma_tf32(const MmaLanes& lanes) {
  float a[16][8], b[8][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = from_tf32(lanes[l]->a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = from_tf32(lanes[l]->b[i]);
  }
  multiply_and_hand_out<8>(lanes, a, b);
}

struct LdmatrixLane {
  uint32_t address;
  uint32_t* d;
};

void load_matrices(const char* what, uint32_t address, uint32_t* d, int count, bool transposed, Site site) {
  LdmatrixLane mine{address, d};
  current_block->warp_operation(what, site, mine, [=](auto& lanes) {
    Block& block = *current_block;
    // All lanes read together, but the instruction is no barrier: who writes next must wait for the others by sync_warp.
    const Accessor who{static_cast<uint8_t>(current_thread->warp->id), Accessor::kSeveralLanes};
    for (int m = 0; m < count; ++m) {
      uint16_t matrix[8][8];
      std::array<uint32_t, 8> rows;
      for (int row = 0; row < 8; ++row) {
        const uint32_t offset = block.shared.offset(lanes[m * 8 + row]->address, 16, what, site);
        block.race.access(Access::kRead, offset, 16, who, site);
        std::memcpy(matrix[row], block.shared.at(offset), 16);
        rows[row] = offset;
      }
      if (block.counters.enabled()) block.counters.add_matrix(what, rows, site);
      for (int l = 0; l < kWarpSize; ++l) {
        const int g = l / 4, t = l % 4;
        const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        lanes[l]->d[m] = low | high << 16;
      }
    }
  });
}

}  // namespace

void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16, Site site) {
  MmaLane mine{d, a, {b0, b1}};
  current_block->warp_operation("mma_m16n8k16", site, mine, bf16 ? mma_bf16 : mma_f16);
}

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

using namespace emulator;

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  MmaLane mine{d, a, {b0, b1}};
  current_block->warp_operation("mma_m16n8k8_tf32", site, mine, mma_tf32);
}

void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address, Site site) { load_matrices("ldmatrix_x4", row_address, d, 4, false, site); }
void ldmatrix_x2(uint32_t (&d)[2], uint32_t row_address, Site site) { load_matrices("ldmatrix_x2", row_address, d, 2, false, site); }
void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_address, Site site) {
  load_matrices("ldmatrix_x4_trans", row_address, d, 4, true, site);
}
void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row_address, Site site) {
  load_matrices("ldmatrix_x2_trans", row_address, d, 2, true, site);
}

}  // namespace foveate::cuda::dev
