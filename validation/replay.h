// validation/replay.h: one rank's kernels, measured alone, in a whole step's prediction
// (docs/replay.md).
#pragma once

#include <array>
#include <string>
#include <vector>

#include "simulator/engine/simulate.h"
#include "simulator/program/measurement.h"
#include "topologies/topology.h"

namespace partita::validation {

/// All kernels of one kind in a step of one rank.
struct ReplayKind {
  std::string kind;
  std::int64_t count = 0;
  Seconds measured, predicted;
};

struct Replayed {
  Seconds
      between;  ///< of each kernel's time as measured: its share of what a plain step has beside
  Seconds compute_measured, compute_predicted;  ///< of the rank's kernels, one after the other
  Seconds step_predicted;                       ///< all of it predicted
  Seconds step_replayed;                        ///< its kernels as measured, the network's times
  std::vector<ReplayKind> kinds;                ///< most measured first
  Bytes peak_measured, peak_predicted;          ///< of what was run
  std::array<Bytes, kCategoryCount> at_peak_measured{}, at_peak_predicted{};
  std::int64_t kernels = 0, recorded = 0;  ///< of a step; of them timed by the device's own records
  std::int64_t ranks_alike = 0;  ///< of the rank's class, itself included
  /// Kinds of kernels that the rank has in the whole network and had not in what was run:
  /// predicted.
  std::vector<std::string> not_run;
};

/// `run`: what was carried out alone, of the program `part` (as `whole`, or of fewer layers: equal
/// shapes have equal times). Ranks whose kernels have shapes that this one has not are predicted
/// from `topology` as before.
Replayed replayed(const Program& whole, const Program& part, const Topology& topology,
                  const RankMeasurement& run, const SimulateOptions& options);

/// Memory that `rank` needs at its peak, on its device.
MemoryUse memory_of_rank(const Program& program, const Topology& topology, std::int64_t rank);

}  // namespace partita::validation
