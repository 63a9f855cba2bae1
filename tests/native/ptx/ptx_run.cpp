// The PTX machine on its own.
//   ptx_run decode FILE...: decodes every entry; prints the files' entries and how often they have each opcode.
//   ptx_run launch FILE ENTRY BLOCKS THREADS SMEM OUT_WORDS < input > output: runs an entry whose parameters are the addresses of input
//   and output, both 32-bit words. The output begins as 0xdeadbeef. The instructions executed and the seconds go to stderr.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/ptx/machine.h"

using namespace foveate::emulator;
using namespace foveate::emulator::ptx;

namespace {

void decode_files(int count, char** paths) {
  std::map<std::string, long> opcodes;
  long entries = 0;
  for (int k = 0; k < count; ++k) {
    const Source source{std::string(paths[k])};
    for (const EntryText& text : source.entries()) {
      const auto program = decode(parse(source, text));
      ++entries;
      for (const Statement& statement : program->entry.statements) ++opcodes[std::string(statement.opcode)];
    }
  }
  std::printf("entries %ld\n", entries);
  for (const auto& [opcode, times] : opcodes) std::printf("%s %ld\n", opcode.c_str(), times);
}

// Memory that kernels can reach, aligned as on a device.
struct Words {
  uint32_t* data;
  GlobalSpan span;
  Words(const std::vector<uint32_t>& words, const char* name)
      : data(static_cast<uint32_t*>(std::aligned_alloc(256, words.size() * 4 / 256 * 256 + 256))), span(data, words.size() * 4, name) {
    std::copy(words.begin(), words.end(), data);
  }
  ~Words() { std::free(data); }
  Words(const Words&) = delete;
};

void launch(char** arguments) {
  const Source source{std::string(arguments[0])};
  const EntryText* text = source.find(arguments[1]);
  if (!text) throw std::runtime_error(std::string(arguments[0]) + " has no entry " + arguments[1]);
  const auto program = decode(parse(source, *text));
  std::vector<uint32_t> in;
  uint32_t word;
  while (std::fread(&word, 4, 1, stdin) == 1) in.push_back(word);
  const size_t out_words = std::strtoul(arguments[5], nullptr, 10);
  const Words input(in, "in"), output(std::vector<uint32_t>(out_words, 0xdeadbeef), "out");
  const uint32_t* params[] = {input.data, output.data};
  const auto start = std::chrono::steady_clock::now();
  const int64_t executed = run_program(*program, params, sizeof(params), std::atoi(arguments[2]), std::atoi(arguments[3]),
                                       std::strtoul(arguments[4], nullptr, 10));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::fprintf(stderr, "%ld instructions, %.6f seconds\n", static_cast<long>(executed), seconds.count());
  std::fwrite(output.data, 4, out_words, stdout);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string command = argc > 1 ? argv[1] : "";
    if (command == "decode" && argc > 2) {
      decode_files(argc - 2, argv + 2);
    } else if (command == "launch" && argc == 8) {
      launch(argv + 2);
    } else {
      throw std::runtime_error("usage: ptx_run decode FILE..., or ptx_run launch FILE ENTRY BLOCKS THREADS SMEM OUT_WORDS");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
