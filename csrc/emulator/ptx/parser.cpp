#include "emulator/ptx/parser.h"

#include <algorithm>
#include <charconv>
#include <tuple>

#include "core/check.h"

namespace foveate::emulator::ptx {

namespace {

constexpr std::string_view kBlanks = " \t\r";

std::string_view trim(std::string_view text) {
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
}

bool in_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '$' || c == '%' || c == '.' ||
         c == ':';
}

// Walks through the characters of one statement.
class Cursor {
 public:
  Cursor(std::string_view text, const std::string& where) : rest_(text), whole_(text), where_(where) {}

  bool at_end() { return skip(), rest_.empty(); }
  bool take(char c) {
    skip();
    if (rest_.empty() || rest_[0] != c) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!take(c)) bad("expected '", c, "' before '", rest_, "'");
  }
  std::string_view name() {
    skip();
    size_t end = 0;
    while (end < rest_.size() && in_name(rest_[end])) ++end;
    if (end == 0) bad("expected a name before '", rest_, "'");
    const std::string_view found = rest_.substr(0, end);
    rest_.remove_prefix(end);
    return found;
  }
  // "12", "-0x1f", "0f3F800000"
  TextOperand number() {
    skip();
    TextOperand operand;
    const bool negative = take('-');
    const std::string_view digits = name();
    int base = 10;
    size_t prefix = 0;
    operand.kind = TextOperand::Kind::kInteger;
    if (digits.size() > 2 && digits[0] == '0' && !(digits[1] >= '0' && digits[1] <= '9')) {
      base = 16;
      prefix = 2;
      if (digits[1] == 'f' || digits[1] == 'F')
        operand.kind = TextOperand::Kind::kFloat;
      else if (digits[1] == 'd' || digits[1] == 'D')
        operand.kind = TextOperand::Kind::kDouble;
      else if (digits[1] != 'x' && digits[1] != 'X')
        bad("'", digits, "' is not a number");
    }
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data() + prefix, digits.data() + digits.size(), value, base);
    const std::string_view left(end, digits.data() + digits.size() - end);
    if (error != std::errc() || !(left.empty() || left == "U")) bad("'", digits, "' is not a number");
    operand.value = static_cast<int64_t>(negative ? -value : value);
    return operand;
  }
  TextOperand operand() {
    skip();
    if (rest_.empty()) bad("an operand is missing");
    if (take('{')) return vector();
    if (take('[')) return address();
    if (rest_[0] == '-' || (rest_[0] >= '0' && rest_[0] <= '9')) return number();
    TextOperand operand;
    operand.negated = take('!');
    operand.name = name();
    operand.kind = operand.name[0] == '%' ? TextOperand::Kind::kRegister : TextOperand::Kind::kName;
    if (take('|')) operand.second = name();
    return operand;
  }
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(where_, ": ", parts..., " in '", whole_, "'");
  }

 private:
  void skip() { rest_.remove_prefix(std::min(rest_.find_first_not_of(kBlanks), rest_.size())); }
  TextOperand vector() {
    TextOperand operand;
    operand.kind = TextOperand::Kind::kVector;
    do operand.parts.push_back(this->operand());
    while (take(','));
    expect('}');
    return operand;
  }
  TextOperand address() {
    TextOperand operand;
    skip();
    if (!rest_.empty() && rest_[0] >= '0' && rest_[0] <= '9') {
      operand.value = number().value;
    } else {
      operand.name = name();
      if (take('+')) operand.value = number().value;
    }
    operand.kind = TextOperand::Kind::kAddress;
    expect(']');
    return operand;
  }

  std::string_view rest_, whole_;
  const std::string& where_;
};

int64_t bytes_of(std::string_view type) {
  if (type == ".b8" || type == ".u8" || type == ".s8") return 1;
  if (type == ".b16" || type == ".u16" || type == ".s16" || type == ".f16") return 2;
  if (type == ".b32" || type == ".u32" || type == ".s32" || type == ".f32") return 4;
  if (type == ".b64" || type == ".u64" || type == ".s64" || type == ".f64") return 8;
  return 0;
}

// Lines of the source. A position inside an inlined function is that of the call, as long as it is in the device layer or in CUDA's headers.
class Lines {
 public:
  explicit Lines(const Source& source) : source_(source) {}
  const Site& site() const { return site_; }

  // "1 84 3, function_name $L__info_string0, inlined_at 2 49 12"
  void loc(Cursor cursor) {
    const Position here = position(cursor);
    Position caller{};
    while (cursor.take(',')) {
      const std::string_view what = cursor.name();
      if (what == "function_name") {
        cursor.name();
        if (cursor.take('+')) cursor.number();
      } else if (what == "inlined_at") {
        caller = position(cursor);
      } else {
        cursor.bad("'", what, "' is not known");
      }
    }
    callers_[here] = caller;
    if (std::get<1>(here) == 0) return;  // "no line": that before it stays
    Position shown = here;
    for (int depth = 0; depth < 64 && library(std::get<0>(shown)); ++depth) {
      const auto found = callers_.find(shown);
      if (found == callers_.end() || std::get<0>(found->second) == 0) break;
      shown = found->second;
    }
    site_ = {source_.file(std::get<0>(shown)), std::get<1>(shown)};
  }

 private:
  using Position = std::tuple<int, int, int>;  // file, line, column

  static Position position(Cursor& cursor) {
    const int file = static_cast<int>(cursor.number().value), line = static_cast<int>(cursor.number().value);
    return {file, line, static_cast<int>(cursor.number().value)};
  }
  bool library(int file) const {
    const std::string_view path = source_.file(file);
    return path.find("/device/nvidia/") != std::string_view::npos || path.find("/include/") != std::string_view::npos ||
           path.ends_with("/device/convert.cuh");
  }

  const Source& source_;
  std::map<Position, Position> callers_;
  Site site_;
};

void parse_parameter(Entry& entry, std::string_view line, const std::string& where) {
  Cursor cursor(line, where);
  if (cursor.name() != ".param") cursor.bad("expected .param");
  int64_t alignment = 0, size = 0;
  std::string_view word;
  while ((word = cursor.name())[0] == '.') {
    if (word == ".align") {
      const int64_t value = cursor.number().value;
      if (size == 0) alignment = value;  // behind .ptr it is that of the memory
    } else if (const int64_t bytes = bytes_of(word)) {
      size = bytes;
      alignment = std::max(alignment, bytes);
    } else if (word != ".ptr" && word != ".global") {
      cursor.bad("'", word, "' is not known");
    }
  }
  if (cursor.take('[')) size *= cursor.number().value, cursor.expect(']');
  if (size == 0) cursor.bad("a parameter without a size");
  entry.param_bytes = (entry.param_bytes + alignment - 1) / alignment * alignment;
  entry.params[word] = entry.param_bytes;
  entry.param_bytes += size;
}

// Registers declared inside braces hide those outside that have the same names: each gets a name of its own.
class Scopes {
 public:
  void open() { scopes_.emplace_back(); }
  void close() {
    if (!scopes_.empty()) scopes_.pop_back();  // the last brace is the body's
  }
  bool inside() const { return !scopes_.empty(); }
  std::string_view declare(Entry& entry, std::string_view name) {
    entry.scoped.push_back(std::string(name) + "@" + std::to_string(entry.scoped.size()));
    return scopes_.back()[name] = entry.scoped.back();
  }
  void rename(std::string_view& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found == scope->end()) continue;
      name = found->second;
      return;
    }
  }
  void rename(TextOperand& operand) const {
    const std::string_view before = operand.name;
    rename(operand.name);
    rename(operand.second);
    // These need not begin with %.
    if (operand.kind == TextOperand::Kind::kName && operand.name.data() != before.data()) operand.kind = TextOperand::Kind::kRegister;
    for (TextOperand& part : operand.parts) rename(part);
  }

 private:
  std::vector<std::map<std::string_view, std::string_view>> scopes_;
};

void parse_registers(Entry& entry, Scopes& scopes, std::string_view statement, const std::string& where) {
  Cursor cursor(statement, where);
  cursor.name();  // .reg
  const std::string_view type = cursor.name().substr(1);
  do {
    std::string_view name = cursor.name();
    if (cursor.take('<')) {
      if (scopes.inside()) cursor.bad("a range of registers inside braces is not known");
      cursor.number();
      cursor.expect('>');
    } else if (scopes.inside()) {
      name = scopes.declare(entry, name);
    }
    const auto [known, added] = entry.registers.emplace(name, type);
    if (!added && known->second != type) cursor.bad("'", name, "' was declared as ", known->second);
  } while (cursor.take(','));
}

// A directive of the body or of its head; true if it is one.
bool parse_directive(Entry& entry, Scopes& scopes, std::string_view statement, const std::string& where) {
  if (statement[0] != '.') return false;
  Cursor cursor(statement, where);
  const std::string_view directive = cursor.name();
  if (directive == ".reg") {
    parse_registers(entry, scopes, statement, where);
  } else if (directive == ".maxntid") {
    entry.most_threads = static_cast<uint32_t>(cursor.number().value);
  } else if (directive == ".reqntid") {
    entry.required_threads = static_cast<uint32_t>(cursor.number().value);
  } else if (directive != ".pragma" && directive != ".minnctapersm" && directive != ".maxnreg") {
    cursor.bad("the directive ", directive, " is not known");
  }
  return true;
}

Statement parse_statement(std::string_view text, const std::string& where) {
  Statement statement;
  statement.text = text;
  Cursor cursor(text, where);
  if (cursor.take('@')) {
    statement.guard_negated = cursor.take('!');
    statement.guard = cursor.name();
  }
  statement.opcode = cursor.name();
  if (!cursor.at_end()) {
    do statement.operands.push_back(cursor.operand());
    while (cursor.take(','));
  }
  if (!cursor.at_end()) cursor.bad("something is left behind the operands");
  return statement;
}

}  // namespace

Entry parse(const Source& source, const EntryText& text) {
  Entry entry;
  entry.source = &source;
  entry.name = text.name;
  Lines lines(source);
  Scopes scopes;
  std::string_view label;
  bool in_head = true;
  int number = text.line - 1;
  for (size_t start = 0; start < text.text.size();) {
    const size_t end = std::min(text.text.find('\n', start), text.text.size());
    std::string_view line = text.text.substr(start, end - start);
    start = end + 1, ++number;
    const std::string where = source.path() + ", line " + std::to_string(number);
    line = trim(line.substr(0, line.find("//")));
    if (in_head && line.find(".entry") != std::string_view::npos)
      line = trim(line.substr(line.find('(') == std::string_view::npos ? line.size() : line.find('(') + 1));
    while (!line.empty()) {
      if (line.starts_with(".loc")) {
        lines.loc(Cursor(line.substr(4), where));
        break;
      }
      if (in_head) {
        if (line.starts_with(".param"))
          parse_parameter(entry, line.substr(0, line.find_last_not_of(",)") + 1), where);
        else if (line[0] == '.')
          parse_directive(entry, scopes, line, where);
        else if (line == "{")
          in_head = false;
        else
          check(line == "(" || line == ")", where, ": '", line, "' in the head of an entry is not known");
        break;
      }
      if (line[0] == '{' || line[0] == '}') {
        if (line[0] == '{')
          scopes.open();
        else
          scopes.close();
        line = trim(line.substr(1));
        continue;
      }
      const size_t colon = line.find(':');
      if (colon != std::string_view::npos && colon + 1 == line.size() && line.find_first_of(" \t[") == std::string_view::npos) {
        check(label.empty(), where, ": two labels of one statement, '", label, "' and '", line, "'");
        label = line.substr(0, colon);
        break;
      }
      const size_t semicolon = line.find(';');
      check(semicolon != std::string_view::npos, where, ": '", line, "' does not end with a semicolon");
      const std::string_view statement = trim(line.substr(0, semicolon));
      line = trim(line.substr(semicolon + 1));
      if (statement.empty() || parse_directive(entry, scopes, statement, where)) continue;
      entry.statements.push_back(parse_statement(statement, where));
      Statement& last = entry.statements.back();
      scopes.rename(last.guard);
      for (TextOperand& operand : last.operands) scopes.rename(operand);
      last.label = label;
      last.line = number;
      last.site = lines.site();
      label = {};
    }
  }
  entry.last_label = label;
  return entry;
}

}  // namespace foveate::emulator::ptx
