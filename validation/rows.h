// validation/rows.h: published measurements beside predictions (docs/published.md).
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/models.h"
#include "simulator/engine/simulate.h"
#include "validation/csv.h"
#include "validation/row_case.h"

namespace partita::validation {

/// What a fit holds for: names of the device's, framework's and cluster's files.
struct RowKey {
  std::string device, framework, cluster;
  friend auto operator<=>(const RowKey&, const RowKey&) = default;
};

/// A row's step, lowered once, to be priced again and again.
class RowStep {
 public:
  RowStep(std::unique_ptr<Communication> communication, Program program, Network network);
  /// What predict_rows() says with this adjustment, to the last digit. Of different rows at once
  /// on several threads.
  Seconds time(const Adjustment& adjustment) const;

 private:
  std::unique_ptr<Communication> communication_;
  std::unique_ptr<const Program> program_;
  Rehearsal rehearsal_;
};

/// One measured value of a row and its prediction, in SI units.
struct Figure {
  enum class Kind : std::uint8_t { time, memory, fits, scaling };
  std::string id;
  Kind kind = Kind::time;
  std::string quantity;                ///< the column, or what the row calls it
  double predicted = 0, measured = 0;  ///< s, byte, 1 fits / 0 does not, times one GPU's speed
  std::optional<double> lo, hi;        ///< 90 % interval; of times with a fitted profile
  std::vector<std::string> assumed;
  bool from_memory = false;  ///< in no statistic
  std::shared_ptr<const Configuration> configuration;

  /// Configurations of one model on one cluster, comparable in time per sample.
  std::string group;
  RowKey key;
  double samples = 1;                   ///< that the time is for
  std::string model;                    ///< held out together by the baseline
  double parameters = 0;                ///< of the network
  double ideal = 0;                     ///< model FLOPs at the devices' peak; 0: none
  std::shared_ptr<const RowStep> step;  ///< of a time, where the options keep steps
  /// Of the predicted time, by term: "linear", "attention", "exposed tp", "bubble", ...
  std::map<std::string, double> shares;
  double error() const { return (predicted - measured) / measured; }
};

struct UncoveredRow {
  std::string id, why;
  std::shared_ptr<const Configuration> configuration;
};

struct FamilyFigures {
  std::string family;
  std::string schema;
  std::int64_t rows = 0;     ///< with a measurement, or what should be one
  std::int64_t covered = 0;  ///< with a finite prediction; the rest is in `uncovered`
  std::int64_t repeats = 0;  ///< memory rows that repeat a training row: counted there
  std::vector<Figure> figures;
  std::vector<UncoveredRow> uncovered;
};

struct RowsOptions {
  Network network = Network::beside;
  std::size_t workers = 0;  ///< 0: one per core
  std::string family;       ///< only this one; "": all
  /// What measured steps say of prices, by device, framework and cluster; null: nothing.
  std::function<Adjustment(const RowKey&)> adjust;
  /// Of the 90 % interval of a step's time, in logarithms, of a network of so many parameters;
  /// nothing where there is none.
  std::function<std::optional<double>(const RowKey&, double parameters, const RowStep&)> half_width;
  bool keep_steps = false;  ///< in the figures of times
};

/// Every row of the tables, by family in order of appearance. The same for any number of workers.
/// InputError for a table of unknown columns or a family that none has.
std::vector<FamilyFigures> predict_rows(const std::vector<CsvTable>& tables,
                                        const Catalogue& catalogue, const RowsOptions& options);

/// A row's run, to be carried out, and what its table says of a step.
struct RowRun {
  std::string id, family, framework;  ///< as printed
  RowCase row_case;
  Seconds published, predicted;  ///< of a step; predicted as predict_rows() does
  std::string quantity;          ///< the column that says it
};
/// `text`: a row's id, or a part that no other row has. InputError{"--row"} with ids that are near
/// where there is none, or several; for a row that measured no step, or has no prediction.
RowRun run_of_row(const std::vector<CsvTable>& tables, const std::string& text,
                  const Catalogue& catalogue, const RowsOptions& options);
/// Its network, with adapters; of `layers` blocks where a number is given (--layers).
Graph graph_of(const RowCase& c, std::optional<std::int64_t> layers = std::nullopt);

}  // namespace partita::validation
