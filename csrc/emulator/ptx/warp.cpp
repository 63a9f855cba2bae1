#include "emulator/ptx/warp.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "emulator/ptx/machine.h"

namespace foveate::emulator::ptx {

void Warp::begin(const Program& entry, MachineBlock& owner, int number, uint32_t threads) {
  block = &owner;
  id = number;
  if (filled_ != &entry) {  // else constants are still there from the last block
    filled_ = &entry, program = &entry;
    registers_.reset(static_cast<unsigned char*>(operator new[](static_cast<size_t>(entry.rows + 1) * kRowBytes, std::align_val_t{64})));
    std::memset(registers_.get(), 0xff, static_cast<size_t>(entry.rows + 1) * kRowBytes);  // NaN, where nobody has written
  }
  written_.assign(entry.rows + 1, 0);
  fill_constants(threads);
  live = active_ = threads >= 32 ? kAllLanes : (1u << threads) - 1;
  pc_ = 0;
  join_ = kNowhere;
  executed = 0;
  result_row = 0;
  others_.clear();
  state = State::kReady;
}

void Warp::fill_constants(uint32_t) {
  for (const Constant& constant : program->constants) {
    written_[constant.row] = kAllLanes;
    if (constant.bytes == 0) *row<uint32_t>(constant.row) = constant.bits ? kAllLanes : 0;
    if (constant.bytes == 2) std::fill_n(row<uint16_t>(constant.row), kWarpSize, static_cast<uint16_t>(constant.bits));
    if (constant.bytes == 4) std::fill_n(row<uint32_t>(constant.row), kWarpSize, static_cast<uint32_t>(constant.bits));
    if (constant.bytes == 8) std::fill_n(row<uint64_t>(constant.row), kWarpSize, constant.bits);
  }
  for (const auto& [special, number] : program->specials) {
    written_[number] = kAllLanes;
    uint32_t* values = row<uint32_t>(number);
    for (int l = 0; l < kWarpSize; ++l) values[l] = block->special(special, id * kWarpSize + l);
  }
}

Site Warp::act_as(int lane) {
  block->act_as(id * kWarpSize + lane);
  return site();
}

void Warp::check_written(const Instruction& i) {
  for (int k = i.results; k < i.results + i.sources; ++k) {
    const uint32_t missing = lanes & ~written_[i.rows[k]];
    if (!missing) continue;
    kernel_error("lane ", std::countr_zero(missing), " reads a register that nobody has written, or computed from one (operand ", k + 1,
                 ")");
  }
  for (int k = 0; k < i.results; ++k) written_[i.rows[k]] |= lanes;
}

void Warp::compute_written(const Instruction& i) {
  const Row* sources = i.rows + i.results;
  uint32_t known = kAllLanes;
  if (i.selects) {
    const uint32_t first = *row<uint32_t>(sources[2]);
    known = ((written_[sources[0]] & first) | (written_[sources[1]] & ~first)) & written_[sources[2]];
  } else {
    for (int k = 0; k < i.sources; ++k) known &= written_[sources[k]];
  }
  for (int k = 0; k < i.results; ++k) written_[i.rows[k]] = (written_[i.rows[k]] & ~lanes) | (known & lanes);
}

void Warp::run(int64_t instructions) {
  const Instruction* code = program->code.data();
  const size_t end = program->code.size();
  const int64_t last = executed + instructions;
  while (executed < last) {
    while (active_ == 0 || static_cast<int64_t>(pc_) == join_) {
      if (active_ != 0) active_ = 0;  // together again: those lanes stand below, with the others
      if (!next_path()) {
        state = State::kDone;
        return;
      }
    }
    if (pc_ >= end) kernel_error("execution runs off the end of the kernel");
    const Instruction& i = code[pc_];
    ++executed;
    lanes = active_;
    if (i.guard) {
      if (lanes & ~written_[i.guard]) kernel_error("its predicate has not been written");
      const uint32_t mask = *row<uint32_t>(i.guard);
      lanes &= i.guard_negated ? ~mask : mask;
    }
    switch (i.flow) {
      case Flow::kTogether:
        if (lanes != live) {
          gather(i);
          break;
        }
        [[fallthrough]];
      case Flow::kNext:
        if (lanes) {
          if (i.pure)
            compute_written(i);
          else
            check_written(i);
          i.run(*this, i);
        }
        ++pc_;
        if (state == State::kWaits || rests) {
          rests = false;
          return;
        }
        break;
      case Flow::kBranch: branch(i); break;
      case Flow::kExit:
        leave();
        ++pc_;
        break;
    }
  }
}

void Warp::go_on(bool predicate) {
  state = State::kReady;
  if (result_row) *row<uint32_t>(result_row) = (*row<uint32_t>(result_row) & ~live) | (predicate ? live : 0);
  result_row = 0;
}

void Warp::leave() {
  block->lanes_return(*this);
  live &= ~lanes;
  active_ &= ~lanes;
}

void Warp::branch(const Instruction& i) {
  const uint32_t taken = lanes, stay = active_ & ~taken;
  if (taken && i.leads_out) {
    leave();
    ++pc_;
    return;
  }
  if (!taken || !stay) {
    pc_ = taken ? i.target : pc_ + 1;
    return;
  }
  const size_t next = pc_ + 1, target = i.target;
  if (i.join != join_ && i.join != kNowhere) others_.push_back({static_cast<size_t>(i.join), join_, active_}), join_ = i.join;
  // A side that is at the meeting point already waits there.
  const bool taken_waits = i.join != kNowhere && static_cast<int32_t>(target) == i.join;
  const bool stay_waits = i.join != kNowhere && static_cast<int32_t>(next) == i.join;
  if (taken_waits) {
    pc_ = next;
    active_ = stay;
  } else if (stay_waits) {
    pc_ = target;
    active_ = taken;
  } else if (block->draws_side()) {
    others_.push_back({target, join_, taken});
    pc_ = next;
    active_ = stay;
  } else {
    others_.push_back({next, join_, stay});
    pc_ = target;
    active_ = taken;
  }
}

bool Warp::next_path() {
  while (!others_.empty()) {
    // A path that waits for others is looked at again when there is no other.
    auto chosen = std::find_if(others_.rbegin(), others_.rend(), [&](const Path& path) { return !path.waits; });
    if (chosen == others_.rend()) chosen = others_.rbegin();
    const Path path = *chosen;
    others_.erase(std::next(chosen).base());
    if (!(path.lanes & live)) continue;
    pc_ = path.pc;
    join_ = path.join;
    active_ = path.lanes & live;
    return true;
  }
  return false;
}

void Warp::gather(const Instruction& i) {
  if (i.guard && lanes != active_) kernel_error("divergence: its predicate differs among the lanes of the warp");
  // Paths that never meet, since one of them returns: the others go first. Lanes that come to the same instruction go on together.
  if (join_ == kNowhere) {
    for (auto path = others_.begin(); path != others_.end();) {
      if (path->pc == pc_ && path->join == kNowhere) {
        active_ |= path->lanes & live;
        path = others_.erase(path);
      } else {
        ++path;
      }
    }
    if (active_ == live) return;
    const bool others_can_run =
        std::any_of(others_.begin(), others_.end(), [&](const Path& path) { return !path.waits && (path.lanes & live); });
    if (others_can_run) {
      others_.insert(others_.begin(), {pc_, join_, active_, true});
      active_ = 0;
      return;
    }
  }
  kernel_error("divergence: lane ", std::countr_zero(active_), " comes here without lane ", std::countr_zero(live & ~active_));
}

}  // namespace foveate::emulator::ptx
