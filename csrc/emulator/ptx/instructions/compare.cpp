// Comparisons and selections (PTX ISA, "Comparison and Selection Instructions").
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

template <class T>
void add_ordered(Table& table, const std::string& type) {
  table.lanes({"setp.eq." + type}, [](T a, T b) { return a == b; });
  table.lanes({"setp.lt." + type}, [](T a, T b) { return a < b; });
  table.lanes({"setp.le." + type}, [](T a, T b) { return a <= b; });
  table.lanes({"setp.gt." + type}, [](T a, T b) { return a > b; });
  table.lanes({"setp.ge." + type}, [](T a, T b) { return a >= b; });
}

template <class T>
void add_integers(Table& table, const std::string& type) {
  add_ordered<T>(table, type);
  table.lanes({"setp.ne." + type}, [](T a, T b) { return a != b; });
}

// Every comparison of a NaN is false, but those with u are true; ne, unlike C++'s, is false too.
template <class T>
void add_floats(Table& table, const std::string& type) {
  add_ordered<T>(table, type);
  table.lanes({"setp.ne." + type}, [](T a, T b) { return a < b || a > b; });
  table.lanes({"setp.equ." + type}, [](T a, T b) { return !(a < b || a > b); });
  table.lanes({"setp.neu." + type}, [](T a, T b) { return a != b; });
  table.lanes({"setp.ltu." + type}, [](T a, T b) { return !(a >= b); });
  table.lanes({"setp.leu." + type}, [](T a, T b) { return !(a > b); });
  table.lanes({"setp.gtu." + type}, [](T a, T b) { return !(a <= b); });
  table.lanes({"setp.geu." + type}, [](T a, T b) { return !(a < b); });
  table.lanes({"setp.num." + type}, [](T a, T b) { return a == a && b == b; });
  table.lanes({"setp.nan." + type}, [](T a, T b) { return a != a || b != b; });
}

template <class T>
void add_bits_only(Table& table, const std::string& type) {
  table.lanes({"setp.eq." + type}, [](T a, T b) { return a == b; });
  table.lanes({"setp.ne." + type}, [](T a, T b) { return a != b; });
}

}  // namespace

void add_compare(Table& table) {
  add_integers<int16_t>(table, "s16");
  add_integers<uint16_t>(table, "u16");
  add_integers<int32_t>(table, "s32");
  add_integers<uint32_t>(table, "u32");
  add_integers<int64_t>(table, "s64");
  add_integers<uint64_t>(table, "u64");
  add_bits_only<uint16_t>(table, "b16");
  add_bits_only<uint32_t>(table, "b32");
  add_bits_only<uint64_t>(table, "b64");
  add_floats<float>(table, "f32");
  add_floats<double>(table, "f64");

  table.lanes({"selp.b16", "selp.u16", "selp.s16"}, [](uint16_t a, uint16_t b, bool p) { return p ? a : b; });
  table.lanes({"selp.b32", "selp.u32", "selp.s32", "selp.f32"}, [](uint32_t a, uint32_t b, bool p) { return p ? a : b; });
  table.lanes({"selp.b64", "selp.u64", "selp.s64", "selp.f64"}, [](uint64_t a, uint64_t b, bool p) { return p ? a : b; });
}

}  // namespace foveate::emulator::ptx
