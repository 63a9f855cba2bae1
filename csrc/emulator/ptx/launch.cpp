#include "emulator/ptx/launch.h"

#include <cxxabi.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <regex>

#include "core/check.h"
#include "emulator/ptx/machine.h"

namespace foveate::emulator::ptx {

namespace {

constexpr std::string_view kAnonymous = "(anonymous namespace)";

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  check(status == 0, "'", name, "' is not a mangled name");
  return text.get();
}

// "copy_pages_kernel<uint4>" of "copy_pages_kernel<FoveateVector4<unsigned int> >": the emulator's vectors under CUDA's names.
std::string with_cuda_vectors(const std::string& name) {
  static const std::regex vector("FoveateVector([24])<(unsigned|signed)? ?(char|short|int|float)(, [^>]*)?>( (?=>))?");
  std::string renamed;
  auto from = name.begin();
  for (std::sregex_iterator match(name.begin(), name.end(), vector), end; match != end; ++match) {
    renamed.append(from, (*match)[0].first);
    renamed += ((*match)[2] == "unsigned" ? "u" : "") + match->str(3) + match->str(1);
    from = (*match)[0].second;
  }
  return renamed.append(from, name.end());
}

// "foveate::cuda::softmax_kernel<float>" of "void foveate::cuda::softmax_kernel<float>(foveate::Params)"; of Symbol<&(...)> the same.
std::string without_type(std::string name) {
  name = with_cuda_vectors(name);
  const std::string_view wrapper = "emulator::Symbol<";
  if (const size_t at = name.find(wrapper); at != std::string::npos) {
    name.erase(0, at + wrapper.size());
    if (name.starts_with("&")) name.erase(0, 1);
    if (name.starts_with("(") && !name.starts_with(kAnonymous)) name.erase(0, 1);
  }
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;  // of template arguments; the parameters stand in the first parentheses outside them
  for (size_t k = 0; k < name.size(); ++k) {
    if (name[k] == '<') ++depth;
    if (name[k] == '>') --depth;
    if (depth < 0 || (depth == 0 && name[k] == '(' && !std::string_view(name).substr(k).starts_with(kAnonymous))) return name.substr(0, k);
  }
  return name;
}

// All entries of a folder by their names; each is decoded when it is launched first.
class Library {
 public:
  explicit Library(const std::string& folder) : folder_(folder) {
    std::vector<std::filesystem::path> files;
    for (const auto& file : std::filesystem::directory_iterator(folder))
      if (file.path().extension() == ".ptx") files.push_back(file.path());
    check(!files.empty(), "FOVEATE_EMULATOR_PTX: '", folder, "' has no .ptx file");
    std::sort(files.begin(), files.end());
    for (const auto& path : files) {
      sources_.push_back(std::make_unique<Source>(path.string()));
      for (const EntryText& text : sources_.back()->entries()) {
        const std::string name = without_type(demangled(std::string(text.name)));
        const bool added = kernels_.emplace(name, Compiled{sources_.back().get(), &text, nullptr}).second;
        check(added, "two entries of '", folder, "' are called ", name);
      }
    }
  }
  const Program& program(const std::string& name) {
    const std::lock_guard lock(mutex_);
    const auto found = kernels_.find(name);
    check(found != kernels_.end(), "no .ptx file of '", folder_, "' has an entry ", name);
    Compiled& kernel = found->second;
    if (!kernel.program) {
      kernel.program = decode(parse(*kernel.source, *kernel.text));
      if (const char* path = std::getenv("FOVEATE_EMULATOR_PTX_LAUNCHED")) {
        std::ofstream file(path, std::ios::app);
        file << name + "\n" << std::flush;
        check(file.good(), "FOVEATE_EMULATOR_PTX_LAUNCHED: cannot write to '", path, "'");
      }
    }
    return *kernel.program;
  }

 private:
  struct Compiled {
    const Source* source;
    const EntryText* text;
    std::unique_ptr<const Program> program;
  };
  std::string folder_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Source>> sources_;
  std::map<std::string, Compiled> kernels_;
};

Library& library(const std::string& folder) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Library>> libraries;
  const std::lock_guard lock(mutex);
  std::unique_ptr<Library>& found = libraries[folder];
  if (!found) found = std::make_unique<Library>(folder);
  return *found;
}

}  // namespace

std::string folder_from_environment() {
  const char* folder = std::getenv("FOVEATE_EMULATOR_PTX");
  return folder ? folder : "";
}

void run_grid(const std::string& folder, const Kernel& kernel, dim3 grid, dim3 block, size_t smem_bytes) {
  const std::string name = without_type(demangled(kernel.symbol));
  const Program& program = library(folder).program(name);
  run_program(program, kernel.params, kernel.params_bytes, grid, block, smem_bytes);
}

}  // namespace foveate::emulator::ptx
