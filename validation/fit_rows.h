// validation/fit_rows.h: adjustments from measured steps, by device, framework and cluster
// (docs/fit.md, "Rows").
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "simulator/cost/adjustment.h"
#include "validation/fit.h"
#include "validation/rows.h"

namespace partita::validation {

/// What may be fitted, with priors and bounds; `field` of an Adjustment.
struct AdjustmentParameter {
  FitParameter parameter;
  void (*set)(Adjustment&, double);
};
const std::vector<AdjustmentParameter>& adjustment_parameters();
Adjustment adjustment_of(const std::vector<double>& values);

/// What is held out together.
enum class HeldOut { model, cluster, hidden_size };

struct FittedEntry {
  RowKey key;
  std::vector<FittedParameter> parameters;  ///< in the order of adjustment_parameters()
  std::size_t rows = 0, groups = 0;
  double noise = 0;       ///< σ, in logarithms
  double half_width = 0;  ///< of a 90 % interval, in logarithms
  /// Mean and median of |predicted − measured| / measured.
  struct Error {
    double mean = 0, median = 0, bias = 0;
  } unfitted, fitted;
  std::optional<Error> held_out;  ///< with two groups or more
};

/// One entry for each device, framework and cluster that the step times of `table` are of, in order
/// of appearance. Rows recalled from memory and keys with fewer than `least` rows are left out.
/// InputError where none is left.
std::vector<FittedEntry> fit_rows(const CsvTable& table, const Catalogue& catalogue, HeldOut by,
                                  const RowsOptions& options, std::size_t least = 3);

/// YAML, schema partita.fit/1.
std::string to_yaml(const std::vector<FittedEntry>& entries);

/// Entries of a file; InputError names file and line.
class FitProfile {
 public:
  explicit FitProfile(const std::string& file);
  /// The entry of this key; else of equal device and framework; null: none.
  const FittedEntry* find(const RowKey& key) const;

 private:
  std::vector<FittedEntry> entries_;
};

}  // namespace partita::validation
