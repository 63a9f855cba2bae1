// Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions"). Results wrap around.
#include <algorithm>
#include <bit>
#include <limits>

#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

// The ISA leaves the result of a division by zero open: no kernel may depend on it.
template <class T>
void check_divisor(Warp& warp, const Instruction& i) {
  const LaneSource<T> divisor(warp, i.rows[2]);
  for (int l = 0; l < kWarpSize; ++l)
    if (warp.lanes >> l & 1 && divisor[l] == 0) kernel_error("division by zero in lane ", l);
}

template <class T, class Op>
void add_division(Table& table, const char* name, Op) {
  constexpr Slot slot = sizeof(T) == 2 ? Slot::k16 : sizeof(T) == 4 ? Slot::k32 : Slot::k64;
  const auto run = [](Warp& warp, const Instruction& i) {
    check_divisor<T>(warp, i);
    each_lane<Op, T, T, T>(warp, i);
  };
  table.add(name, {run, {slot}, {slot, slot}});
}

// Operands of lanes that do not take part may be anything. The smallest number divided by -1 wraps around.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return 0;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return 0;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}

template <class T>
void add_divisions(Table& table, const char* divide, const char* rest) {
  add_division<T>(table, divide, [](T a, T b) { return quotient<T>(a, b); });
  add_division<T>(table, rest, [](T a, T b) { return remainder<T>(a, b); });
}

using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;
using u128 = unsigned __int128;
using i128 = __int128;

}  // namespace

void add_integer(Table& table) {
  table.lanes({"add.s16", "add.u16"}, [](u16 a, u16 b) { return static_cast<u16>(a + b); });
  table.lanes({"add.s32", "add.u32"}, [](u32 a, u32 b) { return a + b; });
  table.lanes({"add.s64", "add.u64"}, [](u64 a, u64 b) { return a + b; });
  table.lanes({"sub.s16", "sub.u16"}, [](u16 a, u16 b) { return static_cast<u16>(a - b); });
  table.lanes({"sub.s32", "sub.u32"}, [](u32 a, u32 b) { return a - b; });
  table.lanes({"sub.s64", "sub.u64"}, [](u64 a, u64 b) { return a - b; });

  table.lanes({"mul.lo.s16", "mul.lo.u16"}, [](u16 a, u16 b) { return static_cast<u16>(static_cast<u32>(a) * b); });
  table.lanes({"mul.lo.s32", "mul.lo.u32"}, [](u32 a, u32 b) { return a * b; });
  table.lanes({"mul.lo.s64", "mul.lo.u64"}, [](u64 a, u64 b) { return a * b; });
  table.lanes({"mul.hi.u32"}, [](u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); });
  table.lanes({"mul.hi.s32"}, [](i32 a, i32 b) { return static_cast<i32>(static_cast<i64>(a) * b >> 32); });
  table.lanes({"mul.hi.u64"}, [](u64 a, u64 b) { return static_cast<u64>(static_cast<u128>(a) * b >> 64); });
  table.lanes({"mul.hi.s64"}, [](i64 a, i64 b) { return static_cast<i64>(static_cast<i128>(a) * b >> 64); });
  table.lanes({"mul.wide.u16"}, [](u16 a, u16 b) { return static_cast<u32>(a) * b; });
  table.lanes({"mul.wide.s16"}, [](i16 a, i16 b) { return static_cast<i32>(a) * b; });
  table.lanes({"mul.wide.u32"}, [](u32 a, u32 b) { return static_cast<u64>(a) * b; });
  table.lanes({"mul.wide.s32"}, [](i32 a, i32 b) { return static_cast<i64>(a) * b; });
  table.lanes({"mad.lo.s32", "mad.lo.u32"}, [](u32 a, u32 b, u32 c) { return a * b + c; });
  table.lanes({"mad.lo.s64", "mad.lo.u64"}, [](u64 a, u64 b, u64 c) { return a * b + c; });
  table.lanes({"mad.wide.u32"}, [](u32 a, u32 b, u64 c) { return static_cast<u64>(a) * b + c; });
  table.lanes({"mad.wide.s32"}, [](i32 a, i32 b, u64 c) { return static_cast<u64>(static_cast<i64>(a) * b) + c; });

  add_divisions<i32>(table, "div.s32", "rem.s32");
  add_divisions<u32>(table, "div.u32", "rem.u32");
  add_divisions<i64>(table, "div.s64", "rem.s64");
  add_divisions<u64>(table, "div.u64", "rem.u64");

  table.lanes({"min.s16"}, [](i16 a, i16 b) { return std::min(a, b); });
  table.lanes({"min.u16"}, [](u16 a, u16 b) { return std::min(a, b); });
  table.lanes({"min.s32"}, [](i32 a, i32 b) { return std::min(a, b); });
  table.lanes({"min.u32"}, [](u32 a, u32 b) { return std::min(a, b); });
  table.lanes({"min.s64"}, [](i64 a, i64 b) { return std::min(a, b); });
  table.lanes({"min.u64"}, [](u64 a, u64 b) { return std::min(a, b); });
  table.lanes({"max.s16"}, [](i16 a, i16 b) { return std::max(a, b); });
  table.lanes({"max.u16"}, [](u16 a, u16 b) { return std::max(a, b); });
  table.lanes({"max.s32"}, [](i32 a, i32 b) { return std::max(a, b); });
  table.lanes({"max.u32"}, [](u32 a, u32 b) { return std::max(a, b); });
  table.lanes({"max.s64"}, [](i64 a, i64 b) { return std::max(a, b); });
  table.lanes({"max.u64"}, [](u64 a, u64 b) { return std::max(a, b); });

  table.lanes({"neg.s16"}, [](u16 a) { return static_cast<u16>(0 - a); });
  table.lanes({"neg.s32"}, [](u32 a) { return 0 - a; });
  table.lanes({"neg.s64"}, [](u64 a) { return 0 - a; });
  table.lanes({"abs.s32"}, [](u32 a) { return a >> 31 ? 0 - a : a; });
  table.lanes({"abs.s64"}, [](u64 a) { return a >> 63 ? 0 - a : a; });
  table.lanes({"popc.b32"}, [](u32 a) { return static_cast<u32>(std::popcount(a)); });
  table.lanes({"clz.b32"}, [](u32 a) { return static_cast<u32>(std::countl_zero(a)); });
  table.lanes({"clz.b64"}, [](u64 a) { return static_cast<u32>(std::countl_zero(a)); });
}

}  // namespace foveate::emulator::ptx
