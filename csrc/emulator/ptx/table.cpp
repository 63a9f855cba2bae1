#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

const Table& instructions() {
  static const Table all = [] {
    Table table;
    for (const auto add : {add_integer, add_bits, add_float, add_compare, add_convert, add_move, add_memory, add_async, add_atomic,
                           add_warp, add_matrix, add_barrier})
      add(table);
    return table;
  }();
  return all;
}

}  // namespace foveate::emulator::ptx
