// simulator/engine/turns.h: more ranks on a host than it has cores.
#pragma once

#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/compile.h"
#include "simulator/engine/progress.h"
#include "simulator/engine/simulate.h"

namespace partita {

/// Has a host more ranks than cores? Then every rank must be its own class.
bool share_cores(const Program& program, const Communication& communication);

/// Plays all ranks to their ends. Those of a host run in the order in which they could, as many as
/// it has cores; who waits for another, or has reached its end, gives its core to the next
/// (docs/simulation.md, "Shared cores").
void take_turns(const Program& program, const Communication& communication,
                const RankClasses& classes, const Compiled& compiled, Labels& labels, bool record,
                std::vector<Progress>& progress, Timeline& timeline);

}  // namespace partita
