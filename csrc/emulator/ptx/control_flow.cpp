#include "emulator/ptx/control_flow.h"

#include <algorithm>

namespace foveate::emulator::ptx {

namespace {

struct BasicBlock {
  size_t first, last;            // instructions
  std::vector<int> successors;   // the number of blocks: the exit
};

std::vector<BasicBlock> basic_blocks(const std::vector<Instruction>& code) {
  std::vector<char> leads(code.size() + 1, 0);
  leads[0] = 1;
  for (size_t i = 0; i < code.size(); ++i) {
    if (code[i].flow == Flow::kBranch) leads[code[i].target] = leads[i + 1] = 1;
    if (code[i].flow == Flow::kExit) leads[i + 1] = 1;
  }
  std::vector<BasicBlock> blocks;
  std::vector<int> block_of(code.size() + 1);
  for (size_t i = 0; i < code.size(); ++i) {
    if (leads[i]) blocks.push_back({i, i, {}});
    blocks.back().last = i;
    block_of[i] = static_cast<int>(blocks.size()) - 1;
  }
  const int exit = static_cast<int>(blocks.size());
  block_of[code.size()] = exit;
  for (BasicBlock& block : blocks) {
    const Instruction& last = code[block.last];
    const bool goes_on = last.flow != Flow::kExit && (last.flow != Flow::kBranch || last.guard);
    if (last.flow == Flow::kBranch) block.successors.push_back(last.leads_out ? exit : block_of[last.target]);
    if (last.flow == Flow::kExit) block.successors.push_back(exit);
    if (goes_on || (last.flow == Flow::kExit && last.guard)) block.successors.push_back(block_of[block.last + 1]);
  }
  return blocks;
}

// Blocks from the exit backwards, each after a block that it leads to.
std::vector<int> backwards(const std::vector<BasicBlock>& blocks) {
  const int exit = static_cast<int>(blocks.size());
  std::vector<std::vector<int>> predecessors(exit + 1);
  for (int b = 0; b < exit; ++b)
    for (const int s : blocks[b].successors) predecessors[s].push_back(b);
  std::vector<int> order;
  std::vector<char> seen(exit + 1, 0);
  std::vector<std::pair<int, size_t>> stack{{exit, 0}};
  seen[exit] = 1;
  while (!stack.empty()) {  // depth first; a block is listed when all that lead to it are
    auto& [block, next] = stack.back();
    if (next == predecessors[block].size()) {
      order.push_back(block);
      stack.pop_back();
      continue;
    }
    const int p = predecessors[block][next++];
    if (!seen[p]) seen[p] = 1, stack.push_back({p, 0});
  }
  std::reverse(order.begin(), order.end());
  return order;
}

}  // namespace

// Immediate dominators of the reversed graph by iteration: K. Cooper, T. Harvey, K. Kennedy, "A Simple, Fast Dominance Algorithm".
void find_joins(std::vector<Instruction>& code) {
  const std::vector<BasicBlock> blocks = basic_blocks(code);
  const int exit = static_cast<int>(blocks.size());
  const std::vector<int> order = backwards(blocks);
  std::vector<int> place(exit + 1, -1), dominator(exit + 1, -1);
  for (size_t k = 0; k < order.size(); ++k) place[order[k]] = static_cast<int>(k);
  dominator[exit] = exit;
  const auto common = [&](int a, int b) {
    while (a != b) {
      while (place[a] > place[b]) a = dominator[a];
      while (place[b] > place[a]) b = dominator[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (const int block : order) {
      if (block == exit) continue;
      int found = -1;
      for (const int s : blocks[block].successors)
        if (dominator[s] != -1) found = found == -1 ? s : common(found, s);
      if (found != dominator[block]) {
        dominator[block] = found;
        changed = true;
      }
    }
  }
  for (int b = 0; b < exit; ++b) {
    Instruction& last = code[blocks[b].last];
    if (last.flow == Flow::kBranch)
      last.join = dominator[b] < 0 || dominator[b] == exit ? kNowhere : static_cast<int32_t>(blocks[dominator[b]].first);
  }
}

}  // namespace foveate::emulator::ptx
