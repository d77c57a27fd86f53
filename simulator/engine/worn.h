// simulator/engine/worn.h: what slow devices and worn or failed links cost, by name.
#pragma once

#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/breakdown.h"
#include "simulator/engine/classes.h"
#include "simulator/engine/compile.h"
#include "simulator/engine/contended_step.h"
#include "simulator/program/program.h"

namespace partita {

/// By class and label: how much longer instructions take, each alone, than in a cluster as built;
/// most lost first. Of a transfer the link that carries its bytes longest is named. Empty where
/// nothing is slow.
std::vector<Contended> worn_parts(const Program& program, Communication& communication,
                                  const RankClasses& classes, const Compiled& compiled,
                                  const Labels& labels);

}  // namespace partita
