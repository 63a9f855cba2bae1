// A file of PTX: where its entries (kernels) stand, without looking into them.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace foveate::emulator::ptx {

struct EntryText {
  std::string_view name;  // mangled
  std::string_view text;  // from ".entry" to the brace that closes the body
  int line = 0;           // of the file, of the first character of `text`
};

struct ModuleSymbol {
  std::string_view space;  // "shared", "global" or "const"
  bool external = false;
};

class Source {
 public:
  explicit Source(std::string path);                              // reads the file
  Source(std::string path, std::string text);
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<EntryText>& entries() const { return entries_; }
  const EntryText* find(std::string_view name) const;
  // The path of `.file number "path"`, "" if there is none. Lives as long as the process.
  const char* file(int number) const;
  // Variables of the module, by name.
  const std::map<std::string_view, ModuleSymbol>& symbols() const { return symbols_; }

 private:
  void index();

  std::string path_, text_;
  std::vector<EntryText> entries_;
  std::map<int, const char*> files_;
  std::map<std::string_view, ModuleSymbol> symbols_;
};

}  // namespace foveate::emulator::ptx
