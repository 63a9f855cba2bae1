#include "emulator/checks/site.h"

#include <cstring>
#include <mutex>
#include <string_view>
#include <vector>

namespace foveate::emulator {

namespace {
constexpr int kLineBits = 14, kFileBits = 10;

// initial-exec: looked at for each access that the race detector records.
constinit thread_local const char* last_file [[gnu::tls_model("initial-exec")]] = nullptr;
constinit thread_local uint32_t last_number [[gnu::tls_model("initial-exec")]] = 0;

std::mutex files_mutex;
std::vector<const char*>& files() {
  static std::vector<const char*> list{"an unknown file"};
  return list;
}
}  // namespace

std::string name(Site site) {
  const std::string_view path = site.file;
  constexpr std::string_view kSources = "/csrc/";
  const size_t sources = path.rfind(kSources), slash = path.rfind('/');
  const size_t begin = sources != path.npos ? sources + kSources.size() : slash != path.npos ? slash + 1 : 0;
  return std::string(path.substr(begin)) + ":" + std::to_string(site.line);
}

uint32_t site_number(Site site) {
  if (site.file != last_file) {
    const std::lock_guard lock(files_mutex);
    uint32_t i = 1;
    while (i < files().size() && std::strcmp(files()[i], site.file) != 0) ++i;
    if (i == files().size() && i < 1u << kFileBits) files().push_back(site.file);
    last_file = site.file;
    last_number = i < files().size() ? i : 0;
  }
  return last_number << kLineBits | (static_cast<uint32_t>(site.line) & ((1u << kLineBits) - 1));
}

Site site_of_number(uint32_t number) {
  const std::lock_guard lock(files_mutex);
  return {files()[number >> kLineBits], static_cast<int>(number & ((1u << kLineBits) - 1))};
}

}  // namespace foveate::emulator
