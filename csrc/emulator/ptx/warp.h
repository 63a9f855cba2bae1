// A warp of the PTX machine: its registers, and which of its lanes are where.
//
// Lanes that a branch parts come together again at the branch's immediate post-dominator, the first place that all of its paths pass; until
// then one side runs before the other. That is where ptxas brings lanes together too; nothing more is promised by the PTX ISA.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/execution/block.h"
#include "emulator/ptx/program.h"

namespace foveate::emulator::ptx {

constexpr uint32_t kAllLanes = 0xffffffffu;

class MachineBlock;

class Warp {
 public:
  enum class State : uint8_t { kReady, kWaits, kDone };

  void begin(const Program& program, MachineBlock& block, int id, uint32_t threads);
  // Executes at most `instructions`, until it waits at a barrier or has returned. Throws KernelError.
  void run(int64_t instructions);
  // The barrier has been passed; `predicate` is its result.
  void go_on(bool predicate);

  template <class T>
  T* row(Row row) {
    return reinterpret_cast<T*>(registers_.get() + static_cast<size_t>(row) * kRowBytes);
  }

  uint32_t lanes = 0;  // that execute the instruction under way
  uint32_t live = 0;  // lanes that have not returned
  int id = 0;
  State state = State::kReady;
  MachineBlock* block = nullptr;
  const Program* program = nullptr;
  bool rests = false;  // other warps run next
  Row result_row = 0;  // a predicate that the barrier will write
  int64_t executed = 0;  // instructions, in this block
  size_t pc() const { return pc_; }

  // The emulator's checks are told that this lane accesses; returns the site of the instruction.
  Site act_as(int lane);
  Site site() const { return program->entry.statements[pc_].site; }

 private:
  // Lanes that go on at `pc` until they come to `join`.
  struct Path {
    size_t pc;
    int32_t join;
    uint32_t lanes;
    bool waits = false;  // at an instruction that needs lanes that are elsewhere
  };
  struct Free {
    void operator()(unsigned char* p) const { operator delete[](p, std::align_val_t{64}); }
  };

  void fill_constants(uint32_t threads);
  void check_written(const Instruction& instruction);
  void compute_written(const Instruction& instruction);
  void branch(const Instruction& instruction);
  void leave();  // `lanes` return
  bool next_path();  // the lanes here wait, or have returned; false: none is left
  void gather(const Instruction& instruction);  // until all live lanes are here

  std::unique_ptr<unsigned char[], Free> registers_;
  std::vector<uint32_t> written_;  // lanes, of each row
  const Program* filled_ = nullptr;
  size_t pc_ = 0;
  int32_t join_ = kNowhere;
  uint32_t active_ = 0;
  std::vector<Path> others_;
};

}  // namespace foveate::emulator::ptx
