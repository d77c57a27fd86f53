// validation/program_check.h: does a run execute the program that the simulator plays?
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "simulator/engine/simulate.h"
#include "simulator/program/measurement.h"

namespace partita::validation {

/// Counts of one measured step beside the simulated ones: equal or not, nothing in between.
struct ProgramCheck {
  bool instructions = true;     ///< of every kind, on every rank
  std::optional<bool> traffic;  ///< bytes on each link, or calls and payload; empty: not known
  bool memory = true;           ///< peak of every category, on every rank, and of the host
  std::string difference;       ///< the first one, in words; empty if there is none
  bool equal() const { return difference.empty(); }
};

/// `timeline`: of `program`, recorded and unfolded: a class for each rank. `step`: the last of the
/// run, from 0, whose traffic was kept. `by_steps`: the transport sent collectives step by step.
ProgramCheck check_program(const Program& program, const Timeline& timeline,
                           const std::vector<RankMeasurement>& ranks, std::int64_t step,
                           bool by_steps);

}  // namespace partita::validation
