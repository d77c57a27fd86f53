// validation/published.h: groups of families with their targets, and what was achieved.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "validation/rows.h"
#include "validation/statistics.h"

namespace partita::validation {

/// "time.mape": kind and name of a statistic, and the value that it may have at most or must have
/// at least.
struct Bound {
  std::string statistic;
  double value = 0;
  bool least = false;   ///< at least; else at most (of "bias": its absolute value)
  bool fitted = false;  ///< of predictions after `fit` on other rows of the family
  /// > 0: after `fit` on so many rows of each entry, drawn; the median over so many draws of the
  /// mean error of the rows left out.
  std::size_t rows = 0, draws = 0;
};

/// Families that one row of the table speaks of.
struct PublishedGroup {
  std::string name;                   ///< "simumax-b200"
  std::vector<std::string> families;  ///< patterns
  /// Only rows whose cell of that column fits one of the patterns, letters of any case; "?*": one
  /// that is not empty.
  std::map<std::string, std::vector<std::string>> where;
  std::map<std::string, double> least;  ///< only rows with at least this number in that column
  std::string peers;                    ///< what others reach, with the source
  std::string target;                   ///< the issue's words
  std::vector<Bound> bounds;
  std::map<std::string, double> achieved;  ///< by statistic
};

/// validation/published.yaml, schema partita.published/1.
std::vector<PublishedGroup> load_published(const std::string& file);

/// 90 % intervals of rows whose models were left out.
struct IntervalStatistics {
  std::size_t rows = 0;
  double held = 0;  ///< share of rows that lie in theirs
  /// The median row's half interval, e^h - 1, over its family's mean error (of the same rows).
  double half_width = 0;
};

/// A group's figures and what they come to.
struct GroupResult {
  const PublishedGroup* group = nullptr;
  std::int64_t rows = 0, covered = 0;
  FamilyStatistics statistics;
  /// Of the same rows' times, where a group's bounds speak of fitted ones and these were asked for.
  std::optional<FamilyStatistics> fitted;
  std::int64_t fitted_rows = 0;  ///< of them; the others have too few beside them and stay unfitted
  std::optional<IntervalStatistics> intervals;          ///< of fitted_rows
  std::map<std::string, IntervalStatistics> of_family;  ///< the same, family by family
  std::map<std::pair<std::size_t, std::size_t>, double> drawn;  ///< by rows and draws of a bound
};
/// Does a bound speak of predictions after a fit?
bool wants_fit(const PublishedGroup& group);
/// Fills in what bounds on fitted predictions ask for; `fitted`: the rows of one device, framework and cluster, model by model, each predicted
/// by parameters that were fitted to the other models' rows, quickly. `families` as in result_of(),
/// with steps kept.
void add_fitted(GroupResult& result, const std::vector<FamilyFigures>& families,
                std::size_t workers);
/// Which of a table's families the group's patterns name.
std::vector<std::string> families_of(const PublishedGroup& group,
                                     const std::vector<FamilyFigures>& families);
GroupResult result_of(const PublishedGroup& group, const std::vector<FamilyFigures>& families);

/// "time.mape", "time.bias", "time.max", "time.median", "time.percentile95", "time.kendall_tau",
/// "time.kendall_tau_apart", "time.regret", "time.baseline_mape", the same of memory and scaling,
/// "fits.false_fits" (share of out-of-memory facts), "coverage", "intervals.held",
/// "intervals.half_width". Empty: too few figures. Throws
/// InputError{place} for another name.
std::optional<double> statistic(const GroupResult& result, const std::string& name,
                                const std::string& place);

struct Verdict {
  const PublishedGroup* group = nullptr;
  std::string statistic;
  std::optional<double> value;
  double bound = 0;
  bool met = false;
  std::string note;  ///< why there is no value
};
/// Against targets.
std::vector<Verdict> against_targets(const GroupResult& result);
/// Against 1.02 x achieved (of what grows with skill: over 1.02); "fitted.time.mape" and
/// "intervals.half_width" only where add_fitted() was asked.
std::vector<Verdict> against_achieved(const GroupResult& result);

}  // namespace partita::validation
