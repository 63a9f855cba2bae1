// mma and ldmatrix (PTX ISA, "Matrix multiply-accumulate instructions"): with g = lane / 4 and t = lane % 4, groupID and threadID_in_group.
#include <array>
#include <bit>

#include "emulator/ptx/instructions/access.h"

namespace foveate::emulator::ptx {

namespace {

void check_whole_warp(const Warp& warp) {
  if (warp.lanes != kAllLanes) kernel_error("a lane of the warp has returned: the instruction needs all 32");
}

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float from_f16(uint32_t bits) { return float_from_half(static_cast<uint16_t>(bits)); }
float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }  // the last 13 bits are not looked at

// d = a @ b + c in fp32, added in the order of k. The hardware adds in an order of its own, with a few bits less.
template <int depth>
void multiply(Warp& warp, const Instruction& i, const float (&a)[16][depth], const float (&b)[depth][8]) {
  const Row* c = i.rows + 4 + 6;
  float sum[16][8];
  for (int k = 0; k < 4; ++k) {
    const float* values = warp.row<float>(c[k]);
    for (int l = 0; l < kWarpSize; ++l) sum[l / 4 + k / 2 * 8][2 * (l % 4) + k % 2] = values[l];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
  for (int k = 0; k < 4; ++k) {
    float* values = warp.row<float>(i.rows[k]);
    for (int l = 0; l < kWarpSize; ++l) values[l] = sum[l / 4 + k / 2 * 8][2 * (l % 4) + k % 2];
  }
}

template <float (*widen)(uint32_t)>
void mma_of_16_bits(Warp& warp, const Instruction& i) {
  check_whole_warp(warp);
  float a[16][16], b[16][8];
  for (int k = 0; k < 4; ++k) {
    const uint32_t* pairs = warp.row<uint32_t>(i.rows[4 + k]);
    for (int l = 0; l < kWarpSize; ++l) {
      float* at = &a[l / 4 + k % 2 * 8][2 * (l % 4) + k / 2 * 8];
      at[0] = widen(pairs[l] & 0xffff);
      at[1] = widen(pairs[l] >> 16);
    }
  }
  for (int k = 0; k < 2; ++k) {
    const uint32_t* pairs = warp.row<uint32_t>(i.rows[8 + k]);
    for (int l = 0; l < kWarpSize; ++l) {
      b[2 * (l % 4) + k * 8][l / 4] = widen(pairs[l] & 0xffff);
      b[2 * (l % 4) + k * 8 + 1][l / 4] = widen(pairs[l] >> 16);
    }
  }
  multiply<16>(warp, i, a, b);
}

void mma_of_tf32(Warp& warp, const Instruction& i) {
  check_whole_warp(warp);
  float a[16][8], b[8][8];
  for (int k = 0; k < 4; ++k) {
    const uint32_t* values = warp.row<uint32_t>(i.rows[4 + k]);
    for (int l = 0; l < kWarpSize; ++l) a[l / 4 + k % 2 * 8][l % 4 + k / 2 * 4] = from_tf32(values[l]);
  }
  for (int k = 0; k < 2; ++k) {
    const uint32_t* values = warp.row<uint32_t>(i.rows[8 + k]);
    for (int l = 0; l < kWarpSize; ++l) b[l % 4 + k * 4][l / 4] = from_tf32(values[l]);
  }
  multiply<8>(warp, i, a, b);
}

// Lane l gives the address of row l % 8 of matrix l / 8. All lanes read together, but the instruction is no barrier.
template <int count, bool transposed>
void load_matrices(Warp& warp, const Instruction& i) {
  check_whole_warp(warp);
  Block& memories = warp.block->memories;
  const Site site = warp.act_as(0);
  const Accessor who{static_cast<uint8_t>(warp.id), Accessor::kSeveralLanes};
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    std::array<uint32_t, 8> rows;
    for (int row = 0; row < 8; ++row) {
      rows[row] = memories.shared.offset(shared_address(warp, i, i.rows[count], m * 8 + row), 16, i.name, site);
      memories.race.access(Access::kRead, rows[row], 16, who, site);
      std::memcpy(matrix[row], memories.shared.at(rows[row]), 16);
    }
    if (memories.counters.enabled()) memories.counters.add_matrix(i.name, rows, site);
    uint32_t* d = warp.row<uint32_t>(i.rows[m]);
    for (int l = 0; l < kWarpSize; ++l) {
      const int g = l / 4, t = l % 4;
      const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t],
                     high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      d[l] = low | high << 16;
    }
  }
}

template <int count>
void add_ldmatrix(Table& table, const std::string& size) {
  const std::vector<Slot> results(count, Slot::k32);
  table.add("ldmatrix.sync.aligned.m8n8." + size + ".shared.b16",
            {load_matrices<count, false>, results, {Slot::kAddress}, Flow::kTogether});
  table.add("ldmatrix.sync.aligned.m8n8." + size + ".trans.shared.b16",
            {load_matrices<count, true>, results, {Slot::kAddress}, Flow::kTogether});
}

}  // namespace

void add_matrix(Table& table) {
  const std::vector<Slot> d(4, Slot::k32), abc(10, Slot::k32);
  table.add("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {mma_of_16_bits<from_bf16>, d, abc, Flow::kTogether});
  table.add("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", {mma_of_16_bits<from_f16>, d, abc, Flow::kTogether});
  table.add("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", {mma_of_tf32, d, abc, Flow::kTogether});
  add_ldmatrix<1>(table, "x1");
  add_ldmatrix<2>(table, "x2");
  add_ldmatrix<4>(table, "x4");
}

}  // namespace foveate::emulator::ptx
