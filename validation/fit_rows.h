// validation/fit_rows.h: adjustments from measured steps, by device, framework and cluster
// (docs/fit.md, "Rows").
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "simulator/cost/adjustment.h"
#include "simulator/search/predict.h"
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

/// What is held out together; row: each alone, or of more than ten a tenth of them.
enum class HeldOut : std::uint8_t { model, cluster, hidden_size, family, row };
std::string_view name(HeldOut by);

struct FitOptions {
  HeldOut by = HeldOut::model;
  bool else_finer = false;   ///< where `by` makes one group of an entry: by cluster, else by row
  bool pool_device = false;  ///< one entry a device, over all its frameworks and clusters
  bool quick = false;        ///< FitProblem::quick
  std::size_t least = 3;     ///< rows of an entry
  /// Fit each entry to so many of its rows, drawn by `seed`; the others are left out.
  std::optional<std::size_t> rows = std::nullopt;
  std::uint64_t seed = 1;
  std::size_t draws = 0;  ///< of each size of the learning curve; 0: none
};

/// Step times that one set of parameters is fitted to.
struct RowsToFit {
  RowKey key;  ///< of a pooled device: framework and cluster "*"
  std::vector<Figure> figures;
  std::vector<std::string> families;  ///< of figures
};
/// By key, in order of appearance: times with a step that is kept, none recalled from memory.
std::vector<RowsToFit> rows_to_fit(const std::vector<FamilyFigures>& families, bool pool_device);

struct FittedEntry {
  RowKey key;
  std::vector<FittedParameter> parameters;  ///< in the order of adjustment_parameters()
  std::size_t rows = 0, groups = 0;
  HeldOut by = HeldOut::model;     ///< of the groups
  double noise = 0;                ///< σ, in logarithms
  double quantile = 0;             ///< of a 90 % interval, over what the linear model says
  std::vector<double> covariance;  ///< parameters x parameters
  double half_width = 0;           ///< the median row's, in logarithms
  /// Parameters of the one network that all rows are of, and how far another one may be off as a
  /// whole: a standard deviation, in logarithms. 0: rows are of several.
  double network = 0, other_networks = 0;
  double half_width_of_others = 0;  ///< the median row's, were it of another network
  /// Is its interval that of the rows, with nothing beside for being another network?
  bool of_network(double count) const;
  std::size_t predictions = 0;     ///< that the fit took
  /// Mean, median and bias of (predicted − measured) / measured.
  struct Error {
    double mean = 0, median = 0, bias = 0;
    std::size_t rows = 0;
  } unfitted, fitted;
  /// A fitted row that is far from the others.
  struct Far {
    std::string id;
    double factor = 1;  ///< measured over fitted
  };
  std::vector<Far> far;
  std::optional<Error> held_out;  ///< with two groups or more
  std::optional<Error> left_out;  ///< of rows that were not drawn
  /// s, of the rows that were fitted: each from a fit to the other groups. Empty with one group.
  std::vector<double> held_out_times;
  std::vector<double> held_out_half_widths;  ///< of their 90 % intervals, in logarithms
  struct CurvePoint {
    std::size_t rows = 0, draws = 0;
    /// Over the draws, of the mean error of rows left out: median and largest.
    double mean = 0, worst = 0;
    double median = 0;  ///< median over the draws of their median error
  };
  std::vector<CurvePoint> curve;
};

/// Of a time under an entry's adjustment, in logarithms, from its sensitivities: of a 90 %
/// interval. `parameters`: of the network.
double half_width(const FittedEntry& entry, double parameters,
                  const std::function<Seconds(const Adjustment&)>& time);
Adjustment adjustment_of(const FittedEntry& entry);

/// Parameters of one entry; more rows than options.rows are left out and predicted.
FittedEntry fit_entry(const RowsToFit& rows, const FitOptions& options, std::size_t workers = 0);

/// Rows with a measured step that no entry was fitted to.
struct NotFitted {
  std::size_t uncovered = 0;  ///< that cannot be predicted
  std::size_t few = 0;        ///< of entries with fewer than FitOptions::least rows
};

/// One entry for each device, framework and cluster (or device) that the step times of `tables` are
/// of, in order of appearance. Rows recalled from memory and keys with fewer than options.least
/// rows are left out. InputError where none is left.
std::vector<FittedEntry> fit_rows(const std::vector<CsvTable>& tables, const Catalogue& catalogue,
                                  const FitOptions& options, const RowsOptions& rows,
                                  NotFitted* not_fitted = nullptr);

/// YAML, schema partita.fit/1.
std::string to_yaml(const std::vector<FittedEntry>& entries);

/// Entries of a file; InputError names file and line.
class FitProfile {
 public:
  explicit FitProfile(const std::string& file);
  /// The entry of a plan's framework on a topology, by device and name; null: none.
  const FittedEntry* find(const Topology& topology, const std::string& framework) const;
  /// Adjustments and intervals for rows. The profile must outlive the options.
  void apply(RowsOptions& options) const;
  /// The entry of this key; else of equal device and framework; else of the device's, pooled;
  /// null: none.
  const FittedEntry* find(const RowKey& key) const;

 private:
  std::vector<FittedEntry> entries_;
};

/// Notes in a prediction that was made with the entry's adjustment (null: without one) what it
/// rests on, and its interval.
void rest_on_fit(Prediction& prediction, const FittedEntry* entry, const Graph& graph,
                 const Topology& topology, const RoutingSource* routing = nullptr);

}  // namespace partita::validation
