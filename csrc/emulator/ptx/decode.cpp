// From statements to instructions: labels become places, names rows, opcodes handlers.
#include <algorithm>
#include <array>
#include <map>

#include "core/check.h"
#include "emulator/checks/shared_memory.h"
#include "emulator/ptx/control_flow.h"
#include "emulator/ptx/program.h"
#include "emulator/ptx/table.h"

namespace foveate::emulator::ptx {

namespace {

using Kind = TextOperand::Kind;

constexpr std::array<std::pair<std::string_view, Special>, 14> kSpecials{{
    {"%tid.x", Special::kTidX},
    {"%tid.y", Special::kTidY},
    {"%tid.z", Special::kTidZ},
    {"%ntid.x", Special::kNtidX},
    {"%ntid.y", Special::kNtidY},
    {"%ntid.z", Special::kNtidZ},
    {"%ctaid.x", Special::kCtaidX},
    {"%ctaid.y", Special::kCtaidY},
    {"%ctaid.z", Special::kCtaidZ},
    {"%nctaid.x", Special::kNctaidX},
    {"%nctaid.y", Special::kNctaidY},
    {"%nctaid.z", Special::kNctaidZ},
    {"%laneid", Special::kLaneId},
    {"%warpid", Special::kWarpId},
}};

int bytes_of_class(std::string_view type) {
  if (type == "pred") return 0;
  const std::string_view digits = type.substr(1);
  return digits == "8" || digits == "16" ? 2 : digits == "32" ? 4 : digits == "64" ? 8 : -1;
}

int bytes_of(Slot slot) { return slot == Slot::kPredicate ? 0 : slot == Slot::k16 ? 2 : slot == Slot::k32 ? 4 : 8; }

class Decoder {
 public:
  explicit Decoder(Entry entry) : program_(std::make_unique<Program>()) { program_->entry = std::move(entry); }

  std::unique_ptr<const Program> run() {
    const Entry& entry = program_->entry;
    for (size_t k = 0; k < entry.statements.size(); ++k)
      if (!entry.statements[k].label.empty()) labels_[entry.statements[k].label] = static_cast<int32_t>(k);
    if (!entry.last_label.empty()) labels_[entry.last_label] = static_cast<int32_t>(entry.statements.size());
    for (const Statement& statement : entry.statements) {
      statement_ = &statement;
      program_->code.push_back(instruction());
    }
    for (Instruction& i : program_->code) {
      const bool in_code = i.target != kNowhere && i.target < static_cast<int32_t>(program_->code.size());
      i.leads_out = in_code && program_->code[i.target].flow == Flow::kExit && !program_->code[i.target].guard;
    }
    find_joins(program_->code);
    return std::move(program_);
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(program_->entry.source->path(), ", line ", statement_->line, ": '", statement_->text, "': ", parts...);
  }

  Instruction instruction() {
    const Statement& statement = *statement_;
    Instruction i;
    if (!statement.guard.empty()) {
      i.guard = register_row(statement.guard).first;
      i.guard_negated = statement.guard_negated;
      if (register_row(statement.guard).second != 0) bad(statement.guard, " is no predicate");
    }
    if (statement.opcode == "bra" || statement.opcode == "bra.uni") {
      const auto target = statement.operands.size() == 1 ? labels_.find(statement.operands[0].name) : labels_.end();
      if (target == labels_.end()) bad("its label does not exist");
      i.flow = Flow::kBranch;
      i.target = target->second;
      i.name = "bra";
      return i;
    }
    if (statement.opcode == "ret" || statement.opcode == "exit") {
      i.flow = Flow::kExit;
      i.name = "ret";
      return i;
    }
    const auto* known = instructions().find(statement.opcode);
    if (!known) bad("the machine does not know ", statement.opcode);
    i.name = known->first.c_str();
    std::vector<TextOperand> operands;
    for (const TextOperand& operand : statement.operands) flatten(operand, operands);
    for (const Semantics& semantics : known->second)
      if (bind(semantics, operands, i)) return i;
    bad("its operands are not of the kinds that the machine knows for ", statement.opcode);
  }

  static void flatten(const TextOperand& operand, std::vector<TextOperand>& to) {
    for (const TextOperand& part : operand.parts) flatten(part, to);
    if (operand.kind == Kind::kVector) return;
    to.push_back(operand);
    to.back().second = {};
    if (!operand.second.empty()) {
      to.push_back({});
      to.back().kind = Kind::kRegister;
      to.back().name = operand.second;
    }
  }

  bool bind(const Semantics& semantics, const std::vector<TextOperand>& operands, Instruction& i) {
    if (operands.size() != semantics.results.size() + semantics.sources.size()) return false;
    i.data_bytes = i.address_bytes = 0;
    i.offset = 0;
    std::vector<Row> rows;
    for (size_t k = 0; k < operands.size(); ++k) {
      const bool result = k < semantics.results.size();
      const Slot slot = result ? semantics.results[k] : semantics.sources[k - semantics.results.size()];
      const Row row = row_of(operands[k], slot, semantics, result, i);
      if (row == 0) return false;
      rows.push_back(row);
    }
    program_->operands.push_back(std::make_unique<Row[]>(rows.size()));
    std::copy(rows.begin(), rows.end(), program_->operands.back().get());
    i.rows = program_->operands.back().get();
    i.run = semantics.run;
    i.flow = semantics.flow;
    i.pure = semantics.pure;
    i.selects = std::string_view(i.name).starts_with("selp.");
    i.results = static_cast<uint8_t>(semantics.results.size());
    i.sources = static_cast<uint8_t>(semantics.sources.size());
    return true;
  }

  // The row of an operand, 0 if it does not fit the slot.
  Row row_of(const TextOperand& operand, Slot slot, const Semantics& semantics, bool result, Instruction& i) {
    if (slot == Slot::kAddress) return operand.kind == Kind::kAddress ? address(operand, i) : 0;
    if (slot == Slot::kAddress32 || slot == Slot::kAddress64) {
      if (operand.kind != Kind::kAddress || operand.value != 0 || operand.name.empty() || operand.name[0] != '%') return 0;
      const auto [row, bytes] = register_row(operand.name);
      return bytes == (slot == Slot::kAddress32 ? 4 : 8) ? row : 0;
    }
    if (operand.kind == Kind::kAddress || operand.negated) return 0;
    if (operand.kind == Kind::kRegister) {
      if (operand.name == "_") bad("'_' as an operand is not known");
      const auto [row, bytes] = register_row(operand.name);
      if (slot != Slot::kData) return bytes == bytes_of(slot) ? row : 0;
      if (bytes == 0 || bytes < semantics.access_bytes || (i.data_bytes && i.data_bytes != bytes)) return 0;
      i.data_bytes = static_cast<uint8_t>(bytes);
      return row;
    }
    if (result) return 0;
    if (operand.kind == Kind::kName) {
      const auto [known, value] = variable(operand.name);
      return known ? constant(bytes_of(slot), value) : 0;
    }
    if (slot == Slot::kData) {
      if (!i.data_bytes) i.data_bytes = std::max<uint8_t>(semantics.access_bytes, 2);
      return constant(i.data_bytes, operand.value);
    }
    if (operand.kind == Kind::kFloat && slot != Slot::k32) return 0;
    if (operand.kind == Kind::kDouble && slot != Slot::k64) return 0;
    return constant(bytes_of(slot), operand.value);
  }

  Row address(const TextOperand& operand, Instruction& i) {
    i.offset = operand.value;
    i.address_bytes = 8;
    if (operand.name.empty()) return constant(8, 0);
    if (operand.name[0] == '%' || program_->entry.registers.contains(operand.name)) {
      const auto [row, bytes] = register_row(operand.name);
      if (bytes < 4) bad(operand.name, " holds no address");
      i.address_bytes = static_cast<uint8_t>(bytes);
      return row;
    }
    const auto [known, value] = variable(operand.name);
    if (!known) bad("'", operand.name, "' is not a variable that the machine knows");
    return constant(8, value);
  }

  // A parameter, or the dynamic shared memory.
  std::pair<bool, int64_t> variable(std::string_view name) const {
    const Entry& entry = program_->entry;
    if (const auto found = entry.params.find(name); found != entry.params.end()) return {true, found->second};
    const auto symbol = entry.source->symbols().find(name);
    if (symbol == entry.source->symbols().end() || symbol->second.space != "shared" || !symbol->second.external) return {false, 0};
    return {true, SharedMemory::kBase};
  }

  Row take(int bytes) {
    const Row row = program_->rows;
    program_->rows += bytes == 8 ? 2 : 1;
    return row;
  }

  // Row and bytes, 0 for a predicate.
  std::pair<Row, int> register_row(std::string_view name) {
    const auto known = registers_.find(name);
    if (known != registers_.end()) return known->second;
    for (const auto& [special_name, special] : kSpecials) {
      if (special_name != name) continue;
      program_->specials.emplace_back(special, take(4));
      return registers_[name] = {program_->specials.back().second, 4};
    }
    const auto& classes = program_->entry.registers;
    auto declared = classes.find(name);
    if (declared == classes.end()) declared = classes.find(name.substr(0, name.find_last_not_of("0123456789") + 1));
    if (declared == classes.end()) bad("the register ", name, " is not declared, or a special one that the machine does not know");
    const int bytes = bytes_of_class(declared->second);
    if (bytes < 0) bad("registers of .", declared->second, " are not known");
    return registers_[name] = {take(bytes), bytes};
  }

  Row constant(int bytes, int64_t value) {
    const uint64_t bits = bytes == 0 ? value != 0 : bytes == 8 ? value : value & ((uint64_t{1} << 8 * bytes) - 1);
    Row& row = constants_[{bytes, bits}];
    if (row == 0) {
      row = take(bytes);
      program_->constants.push_back({row, bytes, bits});
    }
    return row;
  }

  std::unique_ptr<Program> program_;
  const Statement* statement_ = nullptr;
  std::map<std::string_view, int32_t> labels_;
  std::map<std::string_view, std::pair<Row, int>> registers_;
  std::map<std::pair<int, uint64_t>, Row> constants_;
};

}  // namespace

std::unique_ptr<const Program> decode(Entry entry) { return Decoder(std::move(entry)).run(); }

std::string Program::where(size_t instruction) const {
  if (instruction >= entry.statements.size()) return "the end of the kernel";
  const Statement& statement = entry.statements[instruction];
  std::string text = "PTX line " + std::to_string(statement.line) + ": " + std::string(statement.text);
  if (statement.site.line > 0) text += " (" + name(statement.site) + ")";
  return text;
}

}  // namespace foveate::emulator::ptx
