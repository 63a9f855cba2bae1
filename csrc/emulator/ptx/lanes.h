// Instructions that compute each lane from that lane's operands alone: a loop over 32 lanes, which the compiler turns into vectors.
#pragma once

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator/ptx/warp.h"

namespace foveate::emulator::ptx {

template <class T>
struct LaneSource {
  const T* values;
  LaneSource(Warp& warp, Row row) : values(warp.row<T>(row)) {}
  T operator[](int lane) const { return values[lane]; }
};
template <>
struct LaneSource<bool> {
  uint32_t mask;
  LaneSource(Warp& warp, Row row) : mask(*warp.row<uint32_t>(row)) {}
  bool operator[](int lane) const { return mask >> lane & 1; }
};

template <class T>
inline void store_lanes(Warp& warp, Row row, const T (&values)[kWarpSize]) {
  T* to = warp.row<T>(row);
  if (warp.lanes == kAllLanes) {
    std::memcpy(to, values, sizeof(values));
  } else {
    for (int l = 0; l < kWarpSize; ++l) to[l] = warp.lanes >> l & 1 ? values[l] : to[l];
  }
}

inline void store_mask(Warp& warp, Row row, uint32_t mask) {
  uint32_t& to = *warp.row<uint32_t>(row);
  to = (to & ~warp.lanes) | (mask & warp.lanes);
}

template <class Op, class D, class... S>
void each_lane(Warp& warp, const Instruction& i) {
  [&]<size_t... k>(std::index_sequence<k...>) {
    const std::tuple<LaneSource<S>...> sources{LaneSource<S>(warp, i.rows[1 + k])...};
    if constexpr (std::is_same_v<D, bool>) {
      uint32_t mask = 0;
      for (int l = 0; l < kWarpSize; ++l) mask |= static_cast<uint32_t>(Op{}(std::get<k>(sources)[l]...)) << l;
      store_mask(warp, i.rows[0], mask);
    } else {
      D values[kWarpSize];
      for (int l = 0; l < kWarpSize; ++l) values[l] = Op{}(std::get<k>(sources)[l]...);
      store_lanes(warp, i.rows[0], values);
    }
  }(std::make_index_sequence<sizeof...(S)>());
}

}  // namespace foveate::emulator::ptx
