// The text of a PTX entry as statements: what stands there, without its meaning.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "emulator/checks/site.h"
#include "emulator/ptx/source.h"

namespace foveate::emulator::ptx {

struct TextOperand {
  enum class Kind : uint8_t {
    kRegister,   // %r1, also a special one, %tid.x
    kInteger,    // 12, -1, 0x1f
    kFloat,      // 0f3F800000: its bits in `value`
    kDouble,     // 0d3FF0000000000000
    kName,       // a label or a variable
    kAddress,    // [name + value], also [value]
    kVector,     // {a, b}
  };
  Kind kind = Kind::kName;
  std::string_view name;
  std::string_view second;  // %p of "%r|%p"
  int64_t value = 0;
  bool negated = false;  // "!%p"
  std::vector<TextOperand> parts;
};

struct Statement {
  std::string_view label;   // "$L__BB0_1:" before it
  std::string_view text;    // without label and semicolon
  std::string_view guard;   // "%p1" of "@%p1"
  bool guard_negated = false;
  std::string_view opcode;  // "add.s32"
  std::vector<TextOperand> operands;
  int line = 0;  // of the file
  Site site;     // the line of the source, outside the device layer
};

struct Entry {
  const Source* source = nullptr;
  std::string_view name;
  std::map<std::string_view, int64_t> params;  // offsets in the parameter block
  int64_t param_bytes = 0;
  // Register classes, "%r" -> "b32".
  std::map<std::string_view, std::string_view> registers;
  std::deque<std::string> scoped;  // names of registers declared inside braces, each made unique
  std::vector<Statement> statements;
  std::string_view last_label;  // one behind the last statement
  uint32_t required_threads = 0, most_threads = 0;  // .reqntid, .maxntid; 0: none
};

// Throws std::invalid_argument with line and text where the text is not PTX that it knows.
Entry parse(const Source& source, const EntryText& text);

}  // namespace foveate::emulator::ptx
