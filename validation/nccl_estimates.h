// validation/nccl_estimates.h: what NCCL itself expects of collectives on a communicator
// (ncclGroupSimulateEnd) beside our model of it (docs/nccl.md, "Beside NCCL's own word").
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "simulator/cost/nccl.h"
#include "simulator/program/measurement.h"

namespace partita::validation {

struct EstimateRow {
  std::string collective;
  std::string algorithm, protocol;  ///< empty: NCCL's choice, whichever it is
  std::string ours;                 ///< of a choice, what our model takes: "ring LL"
  double bytes = 0, theirs_us = 0, ours_us = 0;
  double error() const { return (ours_us - theirs_us) / theirs_us; }
};
struct EstimateComparison {
  std::vector<EstimateRow> rows;
  std::size_t equal = 0;              ///< to four digits, of which NCCL's floats have seven
  double mean = 0, most = 0;          ///< of the errors' sizes
  std::vector<std::string> unpriced;  ///< pairs that NCCL has here and our model has not, and back
};
/// Sizes of one pair that our model has no price for are left out and named once.
EstimateComparison compare_estimates(const nccl::Communicator& communicator,
                                     const std::vector<LinkEstimate>& theirs);

}  // namespace partita::validation
