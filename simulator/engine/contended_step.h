// simulator/engine/contended_step.h: how long each instruction takes with all that runs beside it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/breakdown.h"
#include "simulator/engine/compile.h"
#include "simulator/engine/contend.h"
#include "simulator/engine/links.h"
#include "simulator/engine/step_graph.h"
#include "simulator/program/program.h"

namespace partita {

/// What instructions of a class lost to others that used the same at the same time, or to a slow
/// part of the cluster: work they could have done, summed over the step.
struct Contended {
  int rank_class = 0;
  std::string what;      ///< "exposed:dp", "compute:linear", ...
  std::string resource;  ///< "node0.nic0->rail0 and 63 like it", "multiprocessors", "memory"
  Ticks lost;
  std::vector<std::string> beside{};  ///< who else uses it; none: others of the same kind
  bool worn = false;  ///< lost to a slow device, a worn or failed link, whatever runs beside
};

struct ContendedStep {
  std::vector<std::vector<StepGraph::Stretched>>
      stretched;                          ///< by class: what took another time than alone
  std::vector<std::vector<Loss>> losses;  ///< by class; `task` is the instance
  std::map<std::int32_t, std::string> resource_names;  ///< of those that something was lost to
  std::vector<Contended> contended;                    ///< most lost first
};

/// Plays the step's instructions as tasks that share what they use (docs/sharing.md, "A training
/// step"). `in_runs`: what follows one another as one task as long as nothing comes into its way;
/// off: instruction by instruction, for tests.
ContendedStep contend(const Program& program, Communication& communication,
                      const SharedLinks& links, const Compiled& compiled, const Labels& labels,
                      bool in_runs = true);

}  // namespace partita
