// What the conformance programs share: a table of cases, and a main that runs one of them on words from stdin.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/host/launch.h"

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
class DeviceWords {
 public:
  explicit DeviceWords(const std::vector<uint32_t>& words) : bytes_(words.size() * 4) {
#ifdef __CUDACC__
    foveate::cuda::check_cuda(cudaMalloc(&data_, bytes_), "cudaMalloc of ", bytes_, " bytes");
    foveate::cuda::check_cuda(cudaMemcpy(data_, words.data(), bytes_, cudaMemcpyHostToDevice), "the copy to the device");
#else
    data_ = std::aligned_alloc(256, (bytes_ + 255) / 256 * 256);  // as device memory is aligned
    std::memcpy(data_, words.data(), bytes_);
#endif
  }
  ~DeviceWords() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;

  uint32_t* data() { return static_cast<uint32_t*>(data_); }
  void fetch(std::vector<uint32_t>& words) {
#ifdef __CUDACC__
    foveate::cuda::check_cuda(cudaMemcpy(words.data(), data_, bytes_, cudaMemcpyDeviceToHost), "the kernel, or the copy from the device");
#else
    std::memcpy(words.data(), data_, bytes_);
#endif
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

inline void run_case(const Case& c, const std::vector<uint32_t>& in) {
  const int n = static_cast<int>(in.size());
  std::vector<uint32_t> out(c.out_words ? c.out_words : n, 0xdeadbeef);
  if (c.in_out) out.assign(in.begin(), in.begin() + c.out_words);
  DeviceWords device_in(in), device_out(out), scratch(std::vector<uint32_t>(64, 0));
  const Params params{device_in.data(), device_out.data(), scratch.data(), n};
  c.run(c.blocks ? c.blocks : (n + c.threads - 1) / c.threads, c.threads, 32768, foveate::cuda::Stream{0, nullptr}, params);
  device_out.fetch(out);
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
