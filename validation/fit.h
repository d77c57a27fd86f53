// validation/fit.h: a few physical parameters from a few measured times (docs/fit.md).
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace partita::validation {

struct FitParameter {
  std::string name, unit;
  double prior = 1;
  double lowest = 0, highest = 0;  ///< bounds
  /// How far the prior is believed, of the logarithm where `positive`, else in the parameter's
  /// unit.
  double believed = 0.1;
  bool positive = true;  ///< fitted as its logarithm
};

struct FitProblem {
  std::vector<FitParameter> parameters;
  std::vector<double> measured;    ///< s, by row
  std::vector<std::size_t> group;  ///< rows held out together; by row
  /// Rows of one number measure the same configuration: for an interval they are one witness.
  /// Empty: each is its own.
  std::vector<std::size_t> witness;
  /// Times of the rows named, with these values of the parameters. Finite and positive.
  std::function<std::vector<double>(const std::vector<double>& values,
                                    const std::vector<std::size_t>& rows)>
      predict;
  /// A group may be off as a whole, by as much as the groups say: what its rows have in common is
  /// then little evidence on parameters. Of three groups and more with three rows in the mean.
  bool groups_off_together = false;
  double smallest_noise = 0.01;  ///< below which σ is never estimated
  double fixed_noise = 0;        ///< > 0: σ, not estimated
  /// Differences at the prior and at the solution only; between them the Jacobian follows from the
  /// steps taken (Broyden). Some 30 predictions of a row instead of 100 to 200.
  bool quick = false;
};

struct FittedParameter {
  double value = 0;
  double standard_error = 0;  ///< as `believed`
  bool determined = false;
  bool at_bound = false;
};

struct Fit {
  std::vector<FittedParameter> parameters;
  std::vector<double> unfitted, fitted;  ///< s, by row
  /// By row: fitted to the rows of other groups. Empty with fewer than two groups.
  std::vector<double> held_out;
  /// By row, as held_out: half of its 90 % interval in logarithms, of which its own group says
  /// nothing either: q is of the other groups' residuals, each held out in its turn.
  std::vector<double> held_out_half_width;
  std::vector<double> sensitivity;  ///< rows x parameters: of the logarithm of the time
  double noise = 0;                 ///< √(σ² + τ²): of a row of another group
  double noise_within = 0;          ///< σ
  double quantile = 0;              ///< of held-out residuals over what the linear model says; 90 %
  std::size_t predictions = 0;      ///< rows predicted in all
  /// Half-width of a row's 90 % interval in logarithms, from its sensitivities.
  double half_width(const std::vector<double>& row_sensitivity) const;

  std::vector<double> covariance;  ///< parameters x parameters, H⁻¹
};

/// The smallest that 90 % of what comes is expected to stay below, from what came: the
/// ⌈0.9 (n + 1)⌉-th of n sizes, or the largest; of fewer than nine witnesses no less than Student's
/// t of as many, which is for sizes in standard deviations.
double quantile_of_sizes(std::vector<double> sizes, std::size_t witnesses);

/// Of the logarithms of the first `rows` rows' times at these values of the parameters, by forward
/// differences: rows x parameters.
std::vector<double> sensitivities(const FitProblem& problem, const std::vector<double>& values,
                                  std::size_t rows);
/// quantile · √(σ² + jᵀ H⁻¹ j): half an interval, in logarithms.
double half_width(const std::vector<double>& sensitivity, double noise, double quantile,
                  const std::vector<double>& covariance);

/// InputError for a problem without rows or with times that are not positive.
Fit fit(const FitProblem& problem);

}  // namespace partita::validation
