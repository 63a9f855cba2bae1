// What the conformance programs share: a table of cases, and a main that runs one of them on words from stdin.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

struct Params {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* scratch;  // zeros
  int n;              // words of `in`
};

struct Case {
  const char* name;
  int out_words;  // 0: as many as came in
  int threads, blocks;
  void (*run)(dim3, dim3, size_t, const foveate::cuda::Stream&, const Params&);
  bool in_out = false;  // out begins as a copy of the input
};

// Memory that the kernel can reach.
#ifdef __CUDACC__
inline uint32_t* device_words(const std::vector<uint32_t>& words) {
  void* p = nullptr;
  foveate::cuda::check_cuda(cudaMalloc(&p, words.size() * 4), "cudaMalloc of ", words.size(), " words");
  foveate::cuda::check_cuda(cudaMemcpy(p, words.data(), words.size() * 4, cudaMemcpyHostToDevice), "the copy to the device");
  return static_cast<uint32_t*>(p);
}
inline void fetch(std::vector<uint32_t>& words, const uint32_t* p) {
  foveate::cuda::check_cuda(cudaMemcpy(words.data(), p, words.size() * 4, cudaMemcpyDeviceToHost),
                            "the kernel, or the copy from the device");
}
#else
// Aligned as device memory is.
inline uint32_t* device_words(const std::vector<uint32_t>& words) {
  auto* p = static_cast<uint32_t*>(std::aligned_alloc(256, (words.size() * 4 + 255) / 256 * 256));
  std::memcpy(p, words.data(), words.size() * 4);
  return p;
}
inline void fetch(std::vector<uint32_t>& words, const uint32_t* p) { std::memcpy(words.data(), p, words.size() * 4); }
#endif

inline void run_case(const Case& c, const std::vector<uint32_t>& in) {
  const int n = static_cast<int>(in.size());
  std::vector<uint32_t> out(c.out_words ? c.out_words : n, 0xdeadbeef);
  if (c.in_out) out.assign(in.begin(), in.begin() + c.out_words);
  const Params params{device_words(in), device_words(out), device_words(std::vector<uint32_t>(64, 0)), n};
  c.run(c.blocks ? c.blocks : (n + c.threads - 1) / c.threads, c.threads, 32768, foveate::cuda::Stream{0, nullptr}, params);
  fetch(out, params.out);
  std::fwrite(out.data(), 4, out.size(), stdout);
}

inline int conformance_main(const Case* cases, size_t count, int argc, char** argv) {
  try {
    std::vector<uint32_t> in;
    uint32_t word;
    while (std::fread(&word, 4, 1, stdin) == 1) in.push_back(word);
    for (const Case* c = cases; c < cases + count; ++c) {
      if (argc == 2 && std::string(argv[1]) == c->name) {
        run_case(*c, in);
        return 0;
      }
    }
    throw std::runtime_error("usage: conformance CASE < input > output");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
