// simulator/engine/classes.h: ranks that behave alike.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/program/program.h"

namespace partita {

/// Ranks that behave alike: same stage, device, local sizes and prices of all they take part in.
struct RankClass {
  int stage = 0;
  std::int64_t representative = 0;
  std::int64_t count = 0;
};

struct RankClasses {
  std::vector<RankClass> classes;
  std::vector<int> of_rank;
};

/// Coarsest stable partition: start from stage, device, local sizes and group prices; split while
/// two ranks of a class see different classes in a group they share. Renaming ranks renames nothing
/// else.
RankClasses classify(const Program& program, Communication& communication);

}  // namespace partita
