// Logic, shifts and moves of bits (PTX ISA, "Logic and Shift Instructions", "bfe", "bfi", "brev", "prmt").
#include <algorithm>

#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// Shifts by the register's width and more are not C++'s: they leave zeros, or the sign.
template <class T>
T left(T a, u32 count) {
  return count >= 8 * sizeof(T) ? 0 : static_cast<T>(static_cast<u64>(a) << count);
}
template <class T>
T right(T a, u32 count) {
  const u32 most = 8 * sizeof(T) - 1;
  if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(count, most));
  return count > most ? 0 : static_cast<T>(a >> count);
}

// prmt without a mode: each nibble of c chooses one of the 8 bytes of {b, a}; its highest bit asks for the sign of that byte instead.
u32 permute(u32 a, u32 b, u32 c) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 selector = c >> 4 * k;
    u32 byte = bytes >> 8 * (selector & 7) & 0xff;
    if (selector & 8) byte = byte >> 7 ? 0xff : 0;
    result |= byte << 8 * k;
  }
  return result;
}

u32 insert(u32 from, u32 into, u32 position, u32 length) {
  position &= 0xff;
  length &= 0xff;
  const u32 mask = left<u32>(left<u32>(1, length) - 1, position);
  return (into & ~mask) | (left<u32>(from, position) & mask);
}

u32 extract(u32 a, u32 position, u32 length) {
  position &= 0xff;
  length &= 0xff;
  return right<u32>(a, position) & (left<u32>(1, length) - 1);
}

// The last operand is a table of 8 bits: what becomes of each combination.
u32 any_logic(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 k = 0; k < 8; ++k)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

}  // namespace

void add_bits(Table& table) {
  table.lanes({"and.pred"}, [](bool a, bool b) { return static_cast<bool>(a & b); });
  table.lanes({"and.b16"}, [](u16 a, u16 b) { return static_cast<u16>(a & b); });
  table.lanes({"and.b32"}, [](u32 a, u32 b) { return a & b; });
  table.lanes({"and.b64"}, [](u64 a, u64 b) { return a & b; });
  table.lanes({"or.pred"}, [](bool a, bool b) { return static_cast<bool>(a | b); });
  table.lanes({"or.b16"}, [](u16 a, u16 b) { return static_cast<u16>(a | b); });
  table.lanes({"or.b32"}, [](u32 a, u32 b) { return a | b; });
  table.lanes({"or.b64"}, [](u64 a, u64 b) { return a | b; });
  table.lanes({"xor.pred"}, [](bool a, bool b) { return a != b; });
  table.lanes({"xor.b16"}, [](u16 a, u16 b) { return static_cast<u16>(a ^ b); });
  table.lanes({"xor.b32"}, [](u32 a, u32 b) { return a ^ b; });
  table.lanes({"xor.b64"}, [](u64 a, u64 b) { return a ^ b; });
  table.lanes({"not.pred"}, [](bool a) { return !a; });
  table.lanes({"not.b16"}, [](u16 a) { return static_cast<u16>(~a); });
  table.lanes({"not.b32"}, [](u32 a) { return ~a; });
  table.lanes({"not.b64"}, [](u64 a) { return ~a; });

  table.lanes({"shl.b16"}, [](u16 a, u32 n) { return left<u16>(a, n); });
  table.lanes({"shl.b32"}, [](u32 a, u32 n) { return left<u32>(a, n); });
  table.lanes({"shl.b64"}, [](u64 a, u32 n) { return left<u64>(a, n); });
  table.lanes({"shr.u16", "shr.b16"}, [](u16 a, u32 n) { return right<u16>(a, n); });
  table.lanes({"shr.u32", "shr.b32"}, [](u32 a, u32 n) { return right<u32>(a, n); });
  table.lanes({"shr.u64", "shr.b64"}, [](u64 a, u32 n) { return right<u64>(a, n); });
  table.lanes({"shr.s16"}, [](int16_t a, u32 n) { return right<int16_t>(a, n); });
  table.lanes({"shr.s32"}, [](int32_t a, u32 n) { return right<int32_t>(a, n); });
  table.lanes({"shr.s64"}, [](int64_t a, u32 n) { return right<int64_t>(a, n); });
  // Funnel shifts of {b, a}.
  table.lanes({"shf.l.wrap.b32"}, [](u32 a, u32 b, u32 n) { return static_cast<u32>((static_cast<u64>(b) << 32 | a) << (n & 31) >> 32); });
  table.lanes({"shf.r.wrap.b32"}, [](u32 a, u32 b, u32 n) { return static_cast<u32>((static_cast<u64>(b) << 32 | a) >> (n & 31)); });

  table.lanes({"prmt.b32"}, [](u32 a, u32 b, u32 c) { return permute(a, b, c); });
  table.lanes({"bfi.b32"}, [](u32 a, u32 b, u32 position, u32 length) { return insert(a, b, position, length); });
  table.lanes({"bfe.u32"}, [](u32 a, u32 position, u32 length) { return extract(a, position, length); });
  table.lanes({"lop3.b32"}, [](u32 a, u32 b, u32 c, u32 bits) { return any_logic(a, b, c, bits); });
}

}  // namespace foveate::emulator::ptx
