// What the programs of seeded bugs share: each runs one bug on every schedule.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

// run(bug) says what happened: "ok", "wrong: ..." or the emulator's report. Prints a line for each schedule and seed.
template <class Run>
int seeded_bugs_main(int argc, char** argv, int bugs, Run run) {
  const int bug = argc >= 2 ? std::atoi(argv[1]) : -1;
  if (bug < 0 || bug >= bugs) return 2;
  const std::pair<const char*, int> schedules[] = {{"round-robin", 1}, {"random", 5}, {"priority", 5}};
  for (const auto& [schedule, seeds] : schedules) {
    for (int seed = 0; seed < seeds; ++seed) {
      setenv("FOVEATE_EMULATOR_SCHEDULE", schedule, 1);
      setenv("FOVEATE_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
      std::printf("%s %d: %s\n", schedule, seed, run(bug).c_str());
    }
  }
  return 0;
}

// The launchers of kernel<0>, kernel<1>, ... by number.
template <class Launch, template <int> class Of, int... bugs>
Launch launcher(int bug, std::integer_sequence<int, bugs...>) {
  constexpr Launch all[] = {Of<bugs>::value...};
  return all[bug];
}
