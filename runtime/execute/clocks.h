// runtime/execute/clocks.h: all ranks' samples on rank 0's clock (docs/transports.md, "One clock").
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "runtime/transport/transport.h"
#include "simulator/program/measurement.h"

namespace partita::execute {

/// One estimate of rank 0's clock against the own one; all in nanoseconds.
struct ClockReading {
  std::int64_t at = 0;  ///< by the own clock
  /// Rank 0's time is `at` + this, off by at most `uncertainty`.
  std::int64_t offset = 0;
  std::int64_t uncertainty = 0;
};

/// Asked at `asked`, read at `read` by the own clock; the answer was rank 0's time.
ClockReading reading_of(std::int64_t asked, std::int64_t answer, std::int64_t read);

/// Two readings, and a straight line between them.
struct ClockLine {
  ClockReading before, after;
  std::int64_t to_rank_0(std::int64_t own) const;
  std::int64_t uncertainty() const { return std::max(before.uncertainty, after.uncertainty); }
};

/// All ranks at once: each asks rank 0 for its time several times and keeps the quickest answer.
/// Rank 0, and all where the ranks share a clock, get zeros.
ClockReading read_clocks(Transport& transport, std::int64_t tag,
                         const std::function<std::int64_t()>& clock);

/// All ranks at once: samples since this rank's start of the step become samples since rank 0's.
/// `starts`: of the timed steps, by the own clock.
void put_on_one_clock(Transport& transport, std::int64_t tag, const ClockLine& line,
                      const std::vector<std::int64_t>& starts, RankMeasurement& measured);

}  // namespace partita::execute
