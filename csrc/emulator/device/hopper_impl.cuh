// The templates of sm90/hopper.cuh on the CPU; the rest is in emulator/instructions/device_hopper.cpp.
#pragma once

namespace foveate::emulator {

void tma_load(uint32_t to, const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t barrier, Site site);
void tma_store(const cuda::TensorMap& map, const int32_t* at, int rank, uint32_t from, bool add, Site site);
void tma_store_wait(int pending_groups);
void wgmma(float* d, int n, bool bf16, const uint32_t* a_registers, uint64_t a, uint64_t b, bool a_m_major, bool b_n_major, bool accumulate,
           Site site);
void wgmma_wait(int pending_groups, Site site);
void rendezvous(const char* what, Site site);  // all lanes come, nothing else happens

}  // namespace foveate::emulator

namespace foveate::cuda::dev {

template <int kRank>
void tma_load(uint32_t to, const TensorMap& map, const int32_t (&at)[kRank], uint32_t barrier, Site site) {
  emulator::tma_load(to, map, at, kRank, barrier, site);
}
template <int kRank>
void tma_store(const TensorMap& map, const int32_t (&at)[kRank], uint32_t from, Site site) {
  emulator::tma_store(map, at, kRank, from, false, site);
}
template <int kRank>
void tma_add(const TensorMap& map, const int32_t (&at)[kRank], uint32_t from, Site site) {
  emulator::tma_store(map, at, kRank, from, true, site);
}
template <int kPending>
void tma_store_wait(Site) {
  emulator::tma_store_wait(kPending);
}

template <class T, int kN, bool a_m_major, bool b_n_major>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate, Site site) {
  static_assert(kN % 8 == 0 && kN <= 256);
  emulator::wgmma(d, kN, std::is_same_v<T, bf16>, nullptr, a, b, a_m_major, b_n_major, accumulate, site);
}
template <class T, int kN, bool b_n_major>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site) {
  static_assert(kN % 8 == 0 && kN <= 256);
  emulator::wgmma(d, kN, std::is_same_v<T, bf16>, a, 0, b, false, b_n_major, accumulate, site);
}
template <int kPending>
void wgmma_wait(Site site) {
  emulator::wgmma_wait(kPending, site);
}
template <int n>
void wgmma_keep(float (&)[n]) {}

template <int count>
void more_registers(Site site) {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  emulator::rendezvous("more_registers", site);
}
template <int count>
void fewer_registers(Site site) {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  emulator::rendezvous("fewer_registers", site);
}

}  // namespace foveate::cuda::dev
