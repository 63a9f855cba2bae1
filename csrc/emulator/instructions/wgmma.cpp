#include "emulator/instructions/wgmma.h"

#include <algorithm>
#include <cmath>

#include "cuda/device/sm90/hopper.cuh"
#include "emulator/execution/block.h"

namespace foveate::emulator {

namespace {

constexpr int kDepth = 16;

// Offsets of the pieces of an operand; first: of m or n, where this warp's part begins. K-major: [extent][2], else [16][extent / 8].
std::vector<uint32_t> pieces_of(uint64_t descriptor, bool mn_major, int first, int extent, const char* what, Site site) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t address = field(0), leading = field(16), stride = field(32);
  const auto swizzle = static_cast<cuda::Swizzle>(descriptor >> 62);
  if (descriptor >> 49 & 7)
    kernel_error("wgmma at ", name(site), ": ", what, " has a base offset; patterns start at multiples of 1024 bytes here, where it is 0");
  if (swizzle == cuda::Swizzle::kNone)
    kernel_error("wgmma at ", name(site), ": ", what, " has no swizzle; kernels here use 128, 64 or 32 bytes");
  const uint32_t row_bytes = swizzle == cuda::Swizzle::k128 ? 128 : swizzle == cuda::Swizzle::k64 ? 64 : 32;
  std::vector<uint32_t> pieces;
  const auto add = [&](uint32_t linear) {
    const uint32_t offset = current_block->shared.offset(address + linear, 16, what, site);
    pieces.push_back(swizzled(offset, swizzle));
  };
  if (mn_major) {
    const uint32_t per_row = row_bytes / 2;
    for (uint32_t k = 0; k < kDepth; ++k) {
      for (uint32_t x = first; x < static_cast<uint32_t>(first + extent); x += 8)
        add(x / per_row * leading + x % per_row * 2 + k / 8 * stride + k % 8 * row_bytes);
    }
  } else {
    for (uint32_t x = first; x < static_cast<uint32_t>(first + extent); ++x) {
      for (uint32_t half = 0; half < 2; ++half) add(x / 8 * stride + x % 8 * row_bytes + half * 16);
    }
  }
  Block& block = *current_block;
  const Accessor who{static_cast<uint8_t>(current_thread->warp->id), Accessor::kWholeWarp};
  for (uint32_t piece : pieces) {
    block.race.access(Access::kAsyncRead, piece, 16, who, site);
    block.race.will_read(piece, site);
  }
  return pieces;
}

float widen(uint32_t code, bool bf16) { return bf16 ? std::bit_cast<float>(code << 16) : float_from_half(static_cast<uint16_t>(code)); }

// [extent][16] from the pieces.
std::vector<float> gather(const std::vector<uint32_t>& pieces, bool mn_major, int extent, bool bf16) {
  std::vector<float> x(extent * kDepth);
  for (size_t i = 0; i < pieces.size(); ++i) {
    uint16_t codes[8];
    std::memcpy(codes, current_block->shared.at(pieces[i]), 16);
    for (int j = 0; j < 8; ++j) {
      const int per_row = extent / 8, row = static_cast<int>(i);
      const int at = mn_major ? row % per_row * 8 + j : row / 2, k = mn_major ? row / per_row : row % 2 * 8 + j;
      x[at * kDepth + k] = widen(codes[j], bf16);
    }
  }
  return x;
}

// Element i of a lane's accumulators in the warp's [16][n].
int place(int lane, int i, int n) { return (lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2; }

}  // namespace

void WgmmaQueue::issue(const WgmmaShape& shape, const std::array<WgmmaLane*, 32>& lanes, Site site) {
  if (!fenced_) kernel_error("wgmma at ", name(site), ": wgmma_fence is missing before it");
  for (const WgmmaLane* lane : lanes)
    if (*lane->shape != shape)
      kernel_error("wgmma at ", name(site), ": the lanes of a warp have different descriptors or accumulate differently");
  issued_.emplace_back(shape, site);
  Product product{shape, &tile_of(shape, lanes), group_, site, {}, {}, {}};
  const bool a_in_registers = lanes[0]->a != nullptr;
  for (int l = 0; a_in_registers && l < kWarpSize; ++l) std::copy_n(lanes[l]->a, 4, product.a[l].begin());
  const int first_row = current_thread->warp->id % 4 * 16;
  if (!a_in_registers) product.a_pieces = pieces_of(shape.a, shape.a_m_major, first_row, 16, "wgmma's a", site);
  product.b_pieces = pieces_of(shape.b, shape.b_n_major, 0, shape.n, "wgmma's b", site);
  products_.push_back(std::move(product));
}

WgmmaQueue::Tile& WgmmaQueue::tile_of(const WgmmaShape& shape, const std::array<WgmmaLane*, 32>& lanes) {
  for (Tile& tile : tiles_) {
    if (tile.registers[0] == lanes[0]->d) {
      ++tile.users;
      return tile;
    }
  }
  Tile& tile = tiles_.emplace_back(Tile{shape.n, 1, {}, std::vector<float>(16 * shape.n)});
  for (int l = 0; l < kWarpSize; ++l) {
    tile.registers[l] = lanes[l]->d;
    for (int i = 0; i < shape.n / 2; ++i) {
      tile.d[place(l, i, shape.n)] = lanes[l]->d[i];
      lanes[l]->d[i] = NAN;
    }
  }
  return tile;
}

void WgmmaQueue::compute(const Product& product) {
  const int n = product.shape.n;
  const bool bf16 = product.shape.bf16;
  std::vector<float> a(16 * kDepth);
  if (product.a_pieces.empty()) {
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int at = (l / 4 + i % 2 * 8) * kDepth + l % 4 * 2 + i / 2 * 8;
        a[at] = widen(product.a[l][i] & 0xffff, bf16);
        a[at + 1] = widen(product.a[l][i] >> 16, bf16);
      }
    }
  } else {
    a = gather(product.a_pieces, product.shape.a_m_major, 16, bf16);
  }
  const std::vector<float> b = gather(product.b_pieces, product.shape.b_n_major, n, bf16);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = product.shape.accumulate ? product.tile->d[i * n + j] : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += a[i * kDepth + k] * b[j * kDepth + k];
      product.tile->d[i * n + j] = sum;
    }
  }
  // The operands are in use until now: a warp that has given them back before the wait races with whoever writes them next.
  const Accessor who{static_cast<uint8_t>(current_thread->warp->id), Accessor::kWholeWarp};
  for (const auto* pieces : {&product.a_pieces, &product.b_pieces}) {
    for (uint32_t piece : *pieces) {
      current_block->race.has_read(piece);
      current_block->race.access(Access::kAsyncRead, piece, 16, who, product.site);
    }
  }
}

void WgmmaQueue::hand_out(Tile& tile) {
  for (int l = 0; l < kWarpSize; ++l) {
    for (int i = 0; i < tile.n / 2; ++i) tile.registers[l][i] = tile.d[place(l, i, tile.n)];
  }
}

void WgmmaQueue::wait(int pending_groups) {
  while (!products_.empty() && products_.front().group < group_ - pending_groups) {
    const Product& product = products_.front();
    compute(product);
    if (--product.tile->users == 0) {
      hand_out(*product.tile);
      tiles_.remove_if([&](const Tile& tile) { return &tile == product.tile; });
    }
    products_.pop_front();
  }
  fenced_ = false;
}

void WgmmaQueue::check_done() const {
  if (!products_.empty()) kernel_error("it returns from the kernel with a wgmma under way, issued at ", name(products_.front().site));
}

void Hopper::check_warpgroups(int warps) const {
  for (int w = 0; w < warps; ++w) {
    const auto &first = wgmma[w / 4 * 4].issued(), &mine = wgmma[w].issued();
    const auto same = [](const auto& a, const auto& b) { return a.first == b.first && a.second == b.second; };
    if (!std::equal(first.begin(), first.end(), mine.begin(), mine.end(), same)) {
      kernel_error("warp ", w, " has executed ", mine.size(), " wgmma, and warp ", w / 4 * 4, " ", first.size(),
                   ", not all at the same lines with the same operands: a warpgroup's four warps come to each together");
    }
  }
}

}  // namespace foveate::emulator
