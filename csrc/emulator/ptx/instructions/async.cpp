// cp.async and its groups (PTX ISA, "Non-bulk copy"): nothing arrives before it is waited for. Hints to L2 change no result.
#include "emulator/ptx/instructions/access.h"

namespace foveate::emulator::ptx {

namespace {

// cp.async [shared], [global], bytes, bytes to read: what is not read is zero. The last two are 16, 8 or 4, and as many or 0.
void copy(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) {
    const uint32_t bytes = warp.row<uint32_t>(i.rows[2])[lane], read = warp.row<uint32_t>(i.rows[3])[lane];
    if (read != 0 && read != bytes) kernel_error("a copy of ", bytes, " bytes that reads ", read, "; the machine knows all or none");
    const uint32_t to = warp.row<uint32_t>(i.rows[0])[lane];
    issue_copy(to, reinterpret_cast<const void*>(warp.row<uint64_t>(i.rows[1])[lane]), bytes, read != 0, site);
  });
}

void commit(Warp& warp, const Instruction&) {
  for_lanes(warp, [](int, Site) { cuda::dev::cp_async_commit(); });
}
void wait_group(Warp& warp, const Instruction& i) {
  for_lanes(warp, [&](int lane, Site site) { wait_for_copies(static_cast<int>(warp.row<uint32_t>(i.rows[0])[lane]), site); });
}
void wait_all(Warp& warp, const Instruction&) {
  for_lanes(warp, [](int, Site site) { cuda::dev::cp_async_wait_all(site); });
}

}  // namespace

void add_async(Table& table) {
  const std::vector<Slot> operands{Slot::kAddress32, Slot::kAddress64, Slot::k32, Slot::k32};
  for (const char* name : {"cp.async.ca.shared.global.L2::128B", "cp.async.cg.shared.global.L2::128B", "cp.async.ca.shared.global",
                           "cp.async.cg.shared.global"})
    table.add(name, {copy, {}, operands});
  table.add("cp.async.commit_group", {commit, {}, {}});
  table.add("cp.async.wait_group", {wait_group, {}, {Slot::k32}});
  table.add("cp.async.wait_all", {wait_all, {}, {}});
}

}  // namespace foveate::emulator::ptx
