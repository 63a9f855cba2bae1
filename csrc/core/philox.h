// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Dropout's only source of randomness: counter
// (j / 4, i, b * Hq + h, offset), key = seed, lane j % 4; keep where the draw >= round(p * 2^32).
#pragma once

#include <cstdint>

namespace foveate {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53, kPhiloxMul1 = 0xCD9E8D57, kPhiloxKey0 = 0x9E3779B9, kPhiloxKey1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

}  // namespace foveate
