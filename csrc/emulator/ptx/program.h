// An entry decoded: instructions whose operands are rows of a warp's registers, the same for all threads, blocks and launches.
//
// A row is what one register holds in all 32 lanes: 128 bytes for 16 and 32 bits, 256 for 64, a mask for a predicate. Constants and special
// registers are rows too, so that an instruction sees no difference.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/ptx/parser.h"

namespace foveate::emulator::ptx {

class Warp;
struct Instruction;
using Handler = void (*)(Warp& warp, const Instruction& instruction);

constexpr uint32_t kRowBytes = 128;
using Row = uint32_t;  // its number; 0: none
constexpr int32_t kNowhere = -1;

enum class Flow : uint8_t {
  kNext,  // computes, and goes on
  kTogether,  // the same, by all lanes of the warp that have not returned: warp operations and barriers
  kBranch,  // to `target`
  kExit,
};

struct Instruction {
  Handler run = nullptr;
  const Row* rows = nullptr;  // results, then sources
  int64_t offset = 0;  // of an address
  const char* name = "";  // the opcode
  Row guard = 0;
  int32_t target = kNowhere;  // of a branch
  int32_t join = kNowhere;  // where lanes that a branch parts are together again; kNowhere: where they return
  uint8_t results = 0, sources = 0;
  uint8_t data_bytes = 0;  // of each register that memory is read into or written from
  uint8_t address_bytes = 0;  // of the register that holds an address
  Flow flow = Flow::kNext;
  bool guard_negated = false;
  bool leads_out = false;  // a branch to where the lanes return
  bool pure = false;  // computes registers from registers: what nobody has written may go in, and then the result is no better
  bool selects = false;  // selp: the result is one of the first two sources
};

enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId
};

struct Constant {
  Row row;
  int bytes;  // of each lane's value; 0: a predicate
  uint64_t bits;
};

struct Program {
  Entry entry;
  std::vector<Instruction> code;
  std::vector<std::unique_ptr<Row[]>> operands;
  std::vector<Constant> constants;
  std::vector<std::pair<Special, Row>> specials;
  uint32_t rows = 1;  // how many, row 0 included

  // "line 120: add.s32 %r1, %r2, %r3 (softmax.cu:33)"
  std::string where(size_t instruction) const;
};

// Throws std::invalid_argument at an instruction that it does not know, with text and line.
std::unique_ptr<const Program> decode(Entry entry);

}  // namespace foveate::emulator::ptx
