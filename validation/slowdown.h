// validation/slowdown.h: kernels and a transfer at once, measured (docs/calibration.md,
// "Slowdown").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simulator/program/measurement.h"
#include "topologies/measured.h"

namespace partita::validation {

/// A transfer among all ranks that kernels are measured beside.
struct TransferBeside {
  std::string kind;  ///< a collective's, or kStandIn
  int ranks = 1;
  int multiprocessors = 0;  ///< that a stand-in holds
  Bytes bytes;
  std::string name() const;  ///< "all_reduce of 8 MiB", "stand-in of 24 multiprocessors"
};
/// Stand-ins for one rank on a GPU, collectives for more, and for two ranks of a host.
std::vector<TransferBeside> transfers_to_measure(int ranks, bool gpu);

enum class AtOnce : std::uint8_t { both, kernels, transfer };
/// Kernels of one family and shape back to back, the transfer on a stream of its own, or both. Its
/// operands are drawn as parameters are. `gpu`: large, in bf16; else small, in fp32.
Program at_once_program(KernelFamily family, const TransferBeside& transfer, AtOnce part, bool gpu);

/// What the three measured programs say:
///
///     of_kernel   = Σ O_k / Σ (t - (t'_k - O_k))     over kernels k that meet the transfer
///     of_transfer = Σ O_k / (T - (T' - Σ O_k))       of the rank that waited for nobody
///
/// t and T alone, t' and T' at once, O_k what kernel and transfer share of time; medians over
/// steps, at least 1 and at most kMostSlowdown. `serial`: ranks do one thing after the other; all
/// of t' over t, and T' over T. No point where less than a tenth of T' is shared.
void harvest_slowdown(KernelFamily family, const TransferBeside& transfer,
                      const std::vector<RankMeasurement>& both,
                      const std::vector<RankMeasurement>& kernels,
                      const std::vector<RankMeasurement>& alone, bool serial, SlowdownTable& into);

}  // namespace partita::validation
