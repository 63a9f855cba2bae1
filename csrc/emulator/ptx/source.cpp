#include "emulator/ptx/source.h"

#include <algorithm>
#include <fstream>
#include <mutex>
#include <set>
#include <sstream>

#include "core/check.h"

namespace foveate::emulator::ptx {

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  check(file.good(), "the PTX file '", path, "' cannot be read");
  return std::move(text).str();
}

// Sites hold plain pointers to file names.
const char* kept_forever(std::string name) {
  static std::mutex mutex;
  static std::set<std::string> names;
  const std::lock_guard lock(mutex);
  return names.insert(std::move(name)).first->c_str();
}

std::string_view word(std::string_view& line) {
  const size_t start = line.find_first_not_of(" \t");
  if (start == std::string_view::npos) return line = {};
  const size_t end = std::min(line.find_first_of(" \t(", start), line.size());
  const std::string_view found = line.substr(start, end - start);
  line.remove_prefix(end);
  return found;
}

}  // namespace

Source::Source(std::string path) : path_(std::move(path)), text_(read(path_)) { index(); }
Source::Source(std::string path, std::string text) : path_(std::move(path)), text_(std::move(text)) { index(); }

// nvcc and Triton begin each directive of the module on a line of its own, and close a body by a brace in the first column.
void Source::index() {
  int number = 0, entry_line = 0;
  size_t entry_start = 0;
  std::string_view entry_name;
  for (size_t start = 0; start < text_.size();) {
    const size_t end = std::min(text_.find('\n', start), text_.size());
    const std::string_view line(text_.data() + start, end - start);
    ++number;
    std::string_view rest = line;
    std::string_view first = entry_name.empty() || line.starts_with("}") ? word(rest) : std::string_view();
    const bool external = first == ".extern";
    if (first == ".visible" || first == ".extern" || first == ".weak") first = word(rest);
    if (first == ".entry") {
      entry_name = word(rest);
      entry_start = start;
      entry_line = number;
    } else if (first == ".func") {
      check(false, path_, ", line ", number, ": a device function that was not inlined; the machine knows entries only");
    } else if (line.starts_with("}") && !entry_name.empty()) {
      entries_.push_back({entry_name, std::string_view(text_).substr(entry_start, end - entry_start), entry_line});
      entry_name = {};
    } else if (first == ".file") {
      const int index = std::stoi(std::string(word(rest)));
      const size_t open = rest.find('"'), close = rest.find('"', open + 1);
      check(close != std::string_view::npos, path_, ", line ", number, ": '", line, "' names no file");
      files_[index] = kept_forever(std::string(rest.substr(open + 1, close - open - 1)));
    } else if (first == ".shared" || first == ".global" || first == ".const") {
      const size_t name_end = line.find_last_of('['), name_start = line.find_last_of(" \t", name_end) + 1;
      check(name_end != std::string_view::npos, path_, ", line ", number, ": '", line, "' is not an array");
      symbols_[line.substr(name_start, name_end - name_start)] = {first.substr(1), external};
    }
    start = end + 1;
  }
  check(entry_name.empty(), path_, ": the body of ", entry_name, " has no end");
}

const EntryText* Source::find(std::string_view name) const {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const EntryText& entry) { return entry.name == name; });
  return found == entries_.end() ? nullptr : &*found;
}

const char* Source::file(int number) const {
  const auto found = files_.find(number);
  return found == files_.end() ? "" : found->second;
}

}  // namespace foveate::emulator::ptx
