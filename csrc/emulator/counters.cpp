#include "emulator/counters.h"

#include <algorithm>
#include <set>
#include <sstream>

namespace foveate::emulator {

namespace {

constexpr uint32_t kBanks = 32, kWordBytes = 4, kSectorBytes = 32;

// Passes that a set of accesses takes: the words of one bank come one after another, a word counts once whoever asks for it.
template <class Addresses>
uint64_t passes(const Addresses& addresses, uint32_t bytes) {
  std::array<std::set<uint64_t>, kBanks> words;
  for (uint64_t address : addresses)
    for (uint64_t word = address / kWordBytes; word <= (address + bytes - 1) / kWordBytes; ++word) words[word % kBanks].insert(word);
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return most;
}

}  // namespace

Counters::Count Counters::cost_of(const Key& key, const std::vector<Access>& lanes) {
  Count count{1, 0, 0};
  if (key.memory == Memory::kGlobal) {
    std::set<uint64_t> sectors, addresses;
    for (const Access& lane : lanes) {
      addresses.insert(lane.address);
      for (uint64_t s = lane.address / kSectorBytes; s <= (lane.address + key.bytes - 1) / kSectorBytes; ++s) sectors.insert(s);
    }
    count.cost = sectors.size();
    count.least = (addresses.size() * key.bytes + kSectorBytes - 1) / kSectorBytes;
  } else if (key.memory == Memory::kSharedAtomic) {
    std::array<uint64_t, kBanks> additions{};
    for (const Access& lane : lanes) ++additions[lane.address / kWordBytes % kBanks];
    count.cost = *std::max_element(additions.begin(), additions.end());
    count.least = 1;
  } else {
    // 128 bytes of neighbouring lanes at a time: a warp, its halves (8 bytes) or quarters (16 bytes).
    const uint32_t together = key.bytes <= kWordBytes ? 32 : 128 / key.bytes;
    std::map<uint32_t, std::vector<uint64_t>> parts;
    for (const Access& lane : lanes) parts[lane.lane / together].push_back(lane.address);
    for (const auto& [part, addresses] : parts) count.cost += passes(addresses, key.bytes), ++count.least;
  }
  return count;
}

void Counters::add(Memory memory, const char* what, uint64_t address, uint32_t bytes, Accessor who, Site site) {
  auto& times = pending_[who.warp][{memory, what, bytes, site_number(site)}];
  const auto not_yet = [&](const std::vector<Access>& time) {
    return std::none_of(time.begin(), time.end(), [&](const Access& other) { return other.lane == who.lane; });
  };
  // A lane is in the first times, as many as it has come: the next is where it is not.
  auto time = std::partition_point(times.begin(), times.end(), [&](const auto& t) { return !not_yet(t); });
  if (time == times.end()) time = times.emplace(times.end());
  time->push_back({address, who.lane});
}

void Counters::add_matrix(const char* what, const std::array<uint32_t, 8>& rows, Site site) {
  Count& count = counts_[{Memory::kShared, what, 16, site_number(site)}];
  ++count.requests, ++count.least;
  count.cost += passes(rows, 16);
}

void Counters::flush(int warp) {
  for (const auto& [key, times] : pending_[warp]) {
    Count& count = counts_[key];
    for (const auto& lanes : times) {
      const Count one = cost_of(key, lanes);
      count.requests += one.requests;
      count.cost += one.cost;
      count.least += one.least;
    }
  }
  pending_[warp].clear();
}

void Counters::merge(const Counters& other) {
  for (const auto& [key, count] : other.counts_) {
    Count& sum = counts_[key];
    sum.requests += count.requests;
    sum.cost += count.cost;
    sum.least += count.least;
  }
}

std::string Counters::json(std::string_view kernel, uint64_t blocks, unsigned threads) const {
  std::ostringstream text;
  text << "{\"kernel\": \"" << kernel << "\", \"blocks\": " << blocks << ", \"threads\": " << threads << ", \"accesses\": [";
  const char* separator = "";
  for (const auto& [key, count] : counts_) {
    text << separator << "{\"memory\": \"" << (key.memory == Memory::kGlobal ? "global" : "shared") << "\", \"operation\": \"" << key.what
         << "\", \"bytes\": " << key.bytes << ", \"at\": \"" << name(site_of_number(key.site)) << "\", \"requests\": " << count.requests
         << ", \"cost\": " << count.cost << ", \"least\": " << count.least << "}";
    separator = ", ";
  }
  text << "]}\n";
  return text.str();
}

}  // namespace foveate::emulator
