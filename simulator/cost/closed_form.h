// simulator/cost/closed_form.h: the time of a collective by algorithm, as a formula.
//
// On the network that a formula assumes it is what the flow network (simulator/engine/flows.h)
// plays, to the picosecond: docs/collectives.md has the formulas.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "base/units.h"
#include "simulator/program/expansion.h"

namespace partita {

/// A level of a network, innermost first: `members` units of the level below. Every member has a
/// port of its own, `rate` each way, to a switch that blocks nothing; a message between two units
/// of the level waits `latency`.
struct PortLevel {
  std::int32_t members = 1;
  Ticks latency{0};
  BytesPerSecond rate;
};

/// The time is `least` or more and, where there is a formula, `most` or less: exact where the two
/// are equal.
struct ClosedForm {
  Ticks least{0};
  std::optional<Ticks> most;
  bool exact() const { return most == least; }
};

/// Of a payload in even parts (EvenCut). Exact wherever n divides it (double trees: 2 n), a
/// picosecond for each rounding wide where parts that differ by a byte share a port. Without
/// formula are steps in which members that are ahead share ports with those that are behind: trees
/// and halving of numbers of members that are no power of two, uneven parts of all-to-alls and of
/// NVLS on several levels, and algorithms without levels on several of them; of these `least` is
/// what the busiest port takes. InternalError for a pair that is no row of kAlgorithms.
ClosedForm closed_form(CollectiveKind kind, Algorithm algorithm, Bytes payload,
                       const std::vector<PortLevel>& levels);

}  // namespace partita
