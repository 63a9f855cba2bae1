// The templates of the device layer on the CPU; the rest is in emulator/instructions/device.cpp. What each function promises stands in cuda/device/device.cuh.
#pragma once

#include <array>
#include <bit>
#include <cstring>

#include "emulator/checks/global_access.h"

namespace foveate::emulator {

// Each checks the address; the result is where the bytes are. `what` names the operation in reports.
const void* shared_for_reading(uint32_t address, uint32_t bytes, const char* what, Site site);
void* shared_for_writing(uint32_t address, uint32_t bytes, const char* what, Site site);
void check_global(GlobalAccess kind, const void* p, size_t bytes, const char* what, Site site);

void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16, Site site);
void issue_copy(uint32_t to, const void* from, uint32_t bytes, bool valid, Site site);
void wait_for_copies(int pending_groups, Site site);
// The value of the lane that each lane names, 0..31.
uint64_t shuffle(const char* what, uint64_t value, int source, Site site);

float float_from_half(uint16_t bits);
uint16_t half_from_float(float x);  // to nearest even, NaN to 0x7fff
uint16_t bfloat_from_float(float x);

template <class T>
constexpr bool kIsAccess =
    std::is_trivially_copyable_v<T> && (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <class T>
T copy_from(const void* p) {
  static_assert(kIsAccess<T>, "an access has 1, 2, 4, 8 or 16 bytes");
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
T shuffle_as(const char* what, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(what, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T ld_shared(uint32_t address, Site site) {
  return emulator::copy_from<T>(emulator::shared_for_reading(address, sizeof(T), "ld_shared", site));
}
template <class T>
void st_shared(uint32_t address, T value, Site site) {
  static_assert(emulator::kIsAccess<T>);
  std::memcpy(emulator::shared_for_writing(address, sizeof(T), "st_shared", site), &value, sizeof(T));
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  emulator::mma_16x8x16(d, a, b0, b1, std::is_same_v<T, bf16>, site);
}

template <int kBytes>
void cp_async(uint32_t to, const void* from, bool valid, Site site) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::issue_copy(to, from, kBytes, valid, site);
}
template <int kPending>
void cp_async_wait(Site site) {
  emulator::wait_for_copies(kPending, site);
}

template <class T>
T shfl_xor(T value, int mask, Site site) {
  return emulator::shuffle_as("shfl_xor", value, (lane() ^ mask) & 31, site);
}
template <class T>
T shfl_idx(T value, int source, Site site) {
  return emulator::shuffle_as("shfl_idx", value, source & 31, site);
}
template <class T>
T shfl_down(T value, int delta, Site site) {
  return emulator::shuffle_as("shfl_down", value, lane() + delta < 32 ? lane() + delta : lane(), site);
}
template <class T>
T shfl_up(T value, int delta, Site site) {
  return emulator::shuffle_as("shfl_up", value, lane() >= delta ? lane() - delta : lane(), site);
}

inline float to_float(f16 x) { return emulator::float_from_half(x.bits); }
template <class T>
uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    return emulator::bfloat_from_float(low) | static_cast<uint32_t>(emulator::bfloat_from_float(high)) << 16;
  } else {
    return emulator::half_from_float(low) | static_cast<uint32_t>(emulator::half_from_float(high)) << 16;
  }
}

template <class T>
T ld_global(const void* p, Site site) {
  emulator::check_global(emulator::GlobalAccess::kRead, p, sizeof(T), "ld_global", site);
  return emulator::copy_from<T>(p);
}
template <class T>
T ld_global_nc(const void* p, Site site) {
  emulator::check_global(emulator::GlobalAccess::kReadOnly, p, sizeof(T), "ld_global_nc", site);
  return emulator::copy_from<T>(p);
}
template <class T>
T ld_global_stream(const void* p, Site site) {
  emulator::check_global(emulator::GlobalAccess::kReadOnly, p, sizeof(T), "ld_global_stream", site);
  return emulator::copy_from<T>(p);
}
template <class T>
void st_global(void* p, T value, Site site) {
  emulator::check_global(emulator::GlobalAccess::kWrite, p, sizeof(T), "st_global", site);
  static_assert(emulator::kIsAccess<T>);
  std::memcpy(p, &value, sizeof(T));
}
template <class T>
void st_global_stream(void* p, T value, Site site) {
  emulator::check_global(emulator::GlobalAccess::kWrite, p, sizeof(T), "st_global_stream", site);
  static_assert(emulator::kIsAccess<T>);
  std::memcpy(p, &value, sizeof(T));
}

}  // namespace foveate::cuda::dev
