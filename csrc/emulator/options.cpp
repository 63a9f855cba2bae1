#include "emulator/options.h"

#include <cstdlib>
#include <string>

#include "core/check.h"

namespace foveate::emulator {

namespace {
uint64_t number(const char* variable, uint64_t otherwise, uint64_t largest) {
  const char* text = std::getenv(variable);
  if (!text) return otherwise;
  char* end = nullptr;
  const unsigned long long value = std::strtoull(text, &end, 10);
  check(*text >= '0' && *text <= '9' && *end == 0 && value <= largest, variable, " is '", text, "', expected a whole number from 0 to ",
        largest);
  return value;
}
}  // namespace

Options options_from_environment() {
  Options options;
  if (const char* text = std::getenv("FOVEATE_EMULATOR_SCHEDULE")) {
    const std::string schedule = text;
    check(schedule == "round-robin" || schedule == "random" || schedule == "priority", "FOVEATE_EMULATOR_SCHEDULE is '", schedule,
          "', expected round-robin, random or priority");
    options.schedule = schedule == "random" ? Schedule::kRandom : schedule == "priority" ? Schedule::kPriority : Schedule::kRoundRobin;
  }
  options.seed = number("FOVEATE_EMULATOR_SEED", 0, UINT64_MAX);
  options.race = number("FOVEATE_EMULATOR_RACE", 1, 1) == 1;
  options.threads = static_cast<int>(number("FOVEATE_EMULATOR_THREADS", 1, 256));
  if (const char* path = std::getenv("FOVEATE_EMULATOR_COUNTERS")) options.counters = path;
  return options;
}

}  // namespace foveate::emulator
