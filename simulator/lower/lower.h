// simulator/lower/lower.h: (graph, plan) -> Program.
#pragma once

#include "simulator/derive/derive.h"
#include "simulator/plan/plan.h"
#include "simulator/program/program.h"

namespace partita {

/// Lowers a completed plan (see complete()). The passes, in order: assign chunks, derive layouts,
/// forward blocks, backward blocks, gradient synchronisation and optimizer, order of blocks,
/// memory. Infeasible when the plan's shardings do not suit the network; the reason names operator
/// and choices.
Feasible<Program> lower(const Graph& graph, const Plan& plan);

}  // namespace partita
