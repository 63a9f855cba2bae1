// What each spelling of an instruction means: a table from opcodes, all modifiers included, to handlers. A spelling that is not in it is not
// executed; there is no rule that would guess its meaning.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/ptx/lanes.h"
#include "emulator/ptx/program.h"

namespace foveate::emulator::ptx {

// What an operand may be. Integers and floats as constants fit k16, k32 and k64.
enum class Slot : uint8_t {
  kPredicate,
  k16,
  k32,
  k64,
  kData,  // a register for what an access reads or writes, at least as wide as that
  kAddress,  // [register + offset]
  kAddress32,  // [register] of 32 or 64 bits, of an instruction that has two addresses
  kAddress64,
};

struct Semantics {
  Handler run = nullptr;
  std::vector<Slot> results, sources;  // vectors taken apart: {a, b} are two operands
  Flow flow = Flow::kNext;
  uint8_t access_bytes = 0;  // of one element, for kData
  bool pure = false;  // computes registers from registers
};

class Table {
 public:
  // `Op` is a lambda without captures, of one lane's numbers; their types say how wide the registers are, bool is a predicate.
  template <class Op>
  void lanes(std::initializer_list<std::string> names, Op) {
    for (const std::string& name : names) LaneWise<Op, decltype(+std::declval<Op>())>::add(*this, name);
  }
  void add(const std::string& name, Semantics semantics) { entries_[name].push_back(std::move(semantics)); }
  // The readings of a spelling, which differ in their operands; nullptr if it is unknown.
  const std::pair<const std::string, std::vector<Semantics>>* find(std::string_view name) const {
    const auto found = entries_.find(name);
    return found == entries_.end() ? nullptr : &*found;
  }
  const std::map<std::string, std::vector<Semantics>, std::less<>>& entries() const { return entries_; }

 private:
  template <class T>
  static constexpr Slot slot() {
    if constexpr (std::is_same_v<T, bool>) return Slot::kPredicate;
    return sizeof(T) == 2 ? Slot::k16 : sizeof(T) == 4 ? Slot::k32 : Slot::k64;
  }
  template <class Op, class Function>
  struct LaneWise;
  template <class Op, class D, class... S>
  struct LaneWise<Op, D (*)(S...)> {
    static void add(Table& table, const std::string& name) {
      table.add(name, {each_lane<Op, D, S...>, {slot<D>()}, {slot<S>()...}, Flow::kNext, 0, true});
    }
  };

  std::map<std::string, std::vector<Semantics>, std::less<>> entries_;
};

const Table& instructions();

// Each in instructions/.
void add_integer(Table& table);
void add_bits(Table& table);
void add_float(Table& table);
void add_compare(Table& table);
void add_convert(Table& table);
void add_move(Table& table);
void add_memory(Table& table);
void add_async(Table& table);
void add_atomic(Table& table);
void add_warp(Table& table);
void add_matrix(Table& table);
void add_barrier(Table& table);

}  // namespace foveate::emulator::ptx
