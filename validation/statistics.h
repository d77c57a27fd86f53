// validation/statistics.h: how far predictions are off, in the figures that docs/published.md
// defines.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "validation/rows.h"

namespace partita::validation {

/// Of errors e = (predicted - measured) / measured. Empty optionals: too few figures.
struct ErrorStatistics {
  std::int64_t count = 0;
  std::optional<double> mape, bias, max, median, percentile95;
  /// Of pairs within a group that differ in measured value, ordered alike less ordered otherwise;
  /// `apart`: of pairs that differ by more than 5 %.
  std::optional<double> kendall_tau, kendall_tau_apart;
  /// How much slower than its group's fastest the one is that is predicted fastest: the mean over
  /// groups of at least two.
  std::optional<double> regret;
  /// Mean absolute error of model FLOPs / (devices' peak x one efficiency), the efficiency being
  /// the geometric mean of all other models of the family: the dullest prediction there is.
  std::optional<double> baseline_mape;
};

struct FitsCounts {
  std::int64_t true_fits = 0, false_fits = 0, true_oom = 0, false_oom = 0;
};

/// Where an error may come from: how a term's share of the predicted time goes with it.
struct TermResidual {
  std::string term;
  double share = 0;        ///< mean over the figures
  double correlation = 0;  ///< Pearson's, of share and signed error
};

struct FamilyStatistics {
  ErrorStatistics time, memory, scaling;
  FitsCounts fits;
  std::vector<TermResidual> residual;  ///< of time, largest share first
};

FamilyStatistics statistics_of(const std::vector<Figure>& figures);

}  // namespace partita::validation
