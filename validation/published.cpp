#include "validation/published.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "base/parallel.h"
#include "base/yaml.h"
#include "models/graph.h"
#include "validation/compare.h"
#include "validation/fit_rows.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

constexpr double kRatchet = 1.02;
/// Of a statistic that was achieved after a fit.
constexpr std::string_view kFitted = "fitted.";

bool any_matches(const std::vector<std::string>& patterns, const std::string& text) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const std::string& p) { return matches(lower(p), lower(text)); });
}

bool belongs(const PublishedGroup& group, const Configuration& row) {
  for (const auto& [column, patterns] : group.where) {
    if (!any_matches(patterns, row[column])) return false;
  }
  for (const auto& [column, least] : group.least) {
    if (number(row[column]).value_or(-1) < least) return false;
  }
  return true;
}

using Member = std::optional<double> ErrorStatistics::*;
constexpr std::array<std::pair<std::string_view, Member>, 9> kMembers{
    {{"mape", &ErrorStatistics::mape},
     {"bias", &ErrorStatistics::bias},
     {"max", &ErrorStatistics::max},
     {"median", &ErrorStatistics::median},
     {"percentile95", &ErrorStatistics::percentile95},
     {"kendall_tau", &ErrorStatistics::kendall_tau},
     {"kendall_tau_apart", &ErrorStatistics::kendall_tau_apart},
     {"regret", &ErrorStatistics::regret},
     {"baseline_mape", &ErrorStatistics::baseline_mape}}};

/// Does more of it mean better?
bool grows(const std::string& statistic) {
  return statistic == "coverage" || statistic.find("kendall") != std::string::npos;
}

double size_of(const std::string& statistic, double value) {
  return statistic.ends_with(".bias") ? std::abs(value) : value;
}

}  // namespace

std::vector<PublishedGroup> load_published(const std::string& file) {
  const YamlNode root = YamlNode::load_file(file, "partita.published/1");
  std::vector<PublishedGroup> all;
  for (const YamlNode& n : root.get("groups").items()) {
    PublishedGroup g;
    g.name = n.get("name").as_string();
    g.families = n.get("families").as_strings();
    if (const auto where = n.find("where")) {
      for (const auto& [column, patterns] : where->members())
        g.where[column] = patterns.as_strings();
    }
    if (const auto least = n.find("least")) {
      for (const auto& [column, value] : least->members()) g.least[column] = value.as_double();
    }
    if (const auto x = n.find("peers")) g.peers = x->as_string();
    g.target = n.get("target").as_string();
    if (const auto bounds = n.find("bounds")) {
      for (const YamlNode& b : bounds->items()) {
        Bound bound;
        const YamlNode which = b.get("statistic");
        bound.statistic = which.as_string();
        statistic({}, bound.statistic, which.place());
        const auto least = b.find("least"), most = b.find("most");
        if (least.has_value() == most.has_value())
          throw InputError(b.place(), "a bound has either most: or least:");
        bound.least = least.has_value();
        bound.value = (least ? least : most)->as_double();
        if (const auto x = b.find("fitted")) bound.fitted = x->as_bool();
        if (const auto x = b.find("rows")) {
          bound.rows = static_cast<std::size_t>(x->as_int(1, 1'000'000));
          bound.draws = static_cast<std::size_t>(b.get("draws").as_int(1, 10'000));
          if (!bound.fitted || bound.statistic != "time.mape")
            throw InputError(x->place(), "is of time.mape with fitted: true; leave it out here");
        }
        b.reject_unknown_keys();
        g.bounds.push_back(bound);
      }
    }
    if (const auto achieved = n.find("achieved")) {
      for (const auto& [key, value] : achieved->members()) {
        statistic({}, key.starts_with(kFitted) ? key.substr(kFitted.size()) : key, value.place());
        g.achieved[key] = value.as_double();
      }
    }
    n.reject_unknown_keys();
    all.push_back(std::move(g));
  }
  root.reject_unknown_keys();
  return all;
}

GroupResult result_of(const PublishedGroup& group, const std::vector<FamilyFigures>& families) {
  GroupResult r;
  r.group = &group;
  std::vector<Figure> figures;
  for (const FamilyFigures& f : families) {
    if (!any_matches(group.families, f.family)) continue;
    const Figure* last = nullptr;  // figures of one row follow each other
    for (const Figure& figure : f.figures) {
      if (!belongs(group, *figure.configuration)) continue;
      if (last == nullptr || figure.configuration != last->configuration) ++r.rows, ++r.covered;
      last = &figure;
      figures.push_back(figure);
    }
    for (const UncoveredRow& u : f.uncovered) r.rows += belongs(group, *u.configuration) ? 1 : 0;
  }
  r.statistics = statistics_of(figures);
  return r;
}

bool wants_fit(const PublishedGroup& group) {
  return std::any_of(group.bounds.begin(), group.bounds.end(),
                     [](const Bound& b) { return b.fitted; });
}

std::vector<std::string> families_of(const PublishedGroup& group,
                                     const std::vector<FamilyFigures>& families) {
  std::vector<std::string> all;
  for (const FamilyFigures& f : families) {
    if (any_matches(group.families, f.family)) all.push_back(f.family);
  }
  return all;
}

namespace {

/// Rows of a family whose interval comes from other models' rows.
struct FamilyIntervals {
  std::vector<double> sizes, halves;
  std::size_t held = 0;
};

IntervalStatistics statistics_of(const FamilyIntervals& f, std::vector<double>& ratios) {
  double error = 0;
  for (const double x : f.sizes) error += x / static_cast<double>(f.sizes.size());
  std::vector<double> mine;
  for (const double h : f.halves) mine.push_back(std::expm1(h) / error);
  ratios.insert(ratios.end(), mine.begin(), mine.end());
  const auto n = static_cast<double>(f.sizes.size());
  return {f.sizes.size(), static_cast<double>(f.held) / n, median(std::move(mine))};
}

void add_intervals(GroupResult& result, const std::map<std::string, FamilyIntervals>& families) {
  IntervalStatistics all;
  std::vector<double> ratios;
  std::size_t held = 0;
  for (const auto& [family, f] : families) {
    result.of_family[family] = statistics_of(f, ratios);
    all.rows += f.sizes.size(), held += f.held;
  }
  if (all.rows == 0) return;
  all.held = static_cast<double>(held) / static_cast<double>(all.rows);
  all.half_width = median(std::move(ratios));
  result.intervals = all;
}

/// Of all entries with more rows than are drawn: the mean error of those left out, pooled draw by
/// draw.
void add_drawn(GroupResult& result, const std::vector<RowsToFit>& entries, const Bound& bound,
               std::size_t workers) {
  std::vector<double> means(bound.draws);
  std::size_t left = 0;
  for (const RowsToFit& e : entries) {
    if (e.figures.size() > bound.rows) left += e.figures.size() - bound.rows;
  }
  if (left == 0) return;
  parallel_for(bound.draws, workers, [&](std::size_t, std::size_t d) {
    for (const RowsToFit& e : entries) {
      if (e.figures.size() <= bound.rows) continue;
      FitOptions one;
      one.quick = true;
      one.rows = bound.rows;
      one.seed = d + 1;
      const FittedEntry::Error error = *fit_entry(e, one, 1).left_out;
      means[d] += error.mean * static_cast<double>(error.rows) / static_cast<double>(left);
    }
  });
  result.drawn[{bound.rows, bound.draws}] = median(std::move(means));
}

}  // namespace

void add_fitted(GroupResult& result, const std::vector<FamilyFigures>& families,
                std::size_t workers) {
  std::vector<FamilyFigures> mine;
  for (const FamilyFigures& f : families) {
    if (!any_matches(result.group->families, f.family)) continue;
    mine.push_back(f);
    std::erase_if(mine.back().figures, [&](const Figure& x) {
      return x.kind != Figure::Kind::time || !belongs(*result.group, *x.configuration);
    });
  }
  FitOptions options;
  options.quick = true;
  result.fitted_rows = 0;
  std::vector<Figure> figures;
  std::vector<RowsToFit> entries = rows_to_fit(mine, false);
  for (const Bound& b : result.group->bounds) {
    if (b.rows > 0) add_drawn(result, entries, b, workers);
  }
  std::map<std::string, FamilyIntervals> intervals;
  for (RowsToFit& rows : entries) {
    if (rows.figures.size() >= options.least) {
      const FittedEntry e = fit_entry(rows, options, workers);
      for (std::size_t i = 0; i < e.held_out_times.size(); ++i) {
        Figure& f = rows.figures[i];
        f.predicted = e.held_out_times[i];
        FamilyIntervals& family = intervals[rows.families[i]];
        const double half = e.held_out_half_widths[i];
        family.sizes.push_back(std::abs(f.error()));
        family.halves.push_back(half);
        family.held += std::abs(std::log(f.predicted / f.measured)) <= half ? 1 : 0;
      }
      result.fitted_rows += static_cast<std::int64_t>(e.held_out_times.size());
    }
    figures.insert(figures.end(), rows.figures.begin(), rows.figures.end());
  }
  result.fitted = statistics_of(figures);
  add_intervals(result, intervals);
}

std::optional<double> statistic(const GroupResult& r, const std::string& name,
                                const std::string& place) {
  if (name == "coverage") {
    if (r.rows == 0) return std::nullopt;
    return static_cast<double>(r.covered) / static_cast<double>(r.rows);
  }
  if (name == "fits.false_fits") {
    const FitsCounts& f = r.statistics.fits;
    if (f.false_fits + f.true_oom == 0) return std::nullopt;
    return static_cast<double>(f.false_fits) / static_cast<double>(f.false_fits + f.true_oom);
  }
  if (name == "intervals.held" || name == "intervals.half_width") {
    if (!r.intervals) return std::nullopt;
    return name == "intervals.held" ? r.intervals->held : r.intervals->half_width;
  }
  const std::string kind = name.substr(0, name.find('.'));
  const ErrorStatistics* s = kind == "time"      ? &r.statistics.time
                             : kind == "memory"  ? &r.statistics.memory
                             : kind == "scaling" ? &r.statistics.scaling
                                                 : nullptr;
  if (s != nullptr && name.size() > kind.size()) {
    for (const auto& [key, member] : kMembers) {
      if (name.substr(kind.size() + 1) == key) return s->*member;
    }
  }
  throw InputError(place,
                   fmt::format("'{}' is no statistic; there are coverage, fits.false_fits, "
                               "intervals.held, intervals.half_width "
                               "and time., memory. or scaling. with mape, bias, max, median, "
                               "percentile95, kendall_tau, kendall_tau_apart, regret",
                               name));
}

std::vector<Verdict> against_targets(const GroupResult& result) {
  std::vector<Verdict> all;
  for (const Bound& b : result.group->bounds) {
    Verdict v;
    v.group = result.group;
    v.statistic = b.statistic + (b.rows > 0 ? fmt::format(" (on {} rows)", b.rows)
                                 : b.fitted ? " (fitted)"
                                            : "");
    v.bound = b.value;
    if (b.fitted && !result.fitted) {
      v.note = "not fitted";
    } else if (b.rows > 0) {
      const auto drawn = result.drawn.find({b.rows, b.draws});
      if (drawn != result.drawn.end()) v.value = drawn->second;
      if (!v.value) v.note = "no figures";
    } else if (b.fitted) {
      GroupResult after = result;
      after.statistics = *result.fitted;
      v.value = statistic(after, b.statistic, b.statistic);
      if (!v.value) v.note = "no figures";
    } else {
      v.value = statistic(result, b.statistic, b.statistic);
      if (!v.value) v.note = "no figures";
    }
    if (v.value) {
      const double x = size_of(b.statistic, *v.value);
      v.met = b.least ? x >= b.value : x <= b.value;
    }
    all.push_back(std::move(v));
  }
  return all;
}

std::vector<Verdict> against_achieved(const GroupResult& result) {
  std::vector<Verdict> all;
  for (const auto& [key, achieved] : result.group->achieved) {
    const bool after_fit = key.starts_with(kFitted);
    if ((after_fit && !result.fitted) || (key.starts_with("intervals.") && !result.intervals))
      continue;  // not asked for
    Verdict v;
    v.group = result.group;
    v.statistic = key;
    v.bound = achieved;
    if (after_fit) {
      GroupResult after = result;
      after.statistics = *result.fitted;
      v.value = statistic(after, key.substr(kFitted.size()), key);
    } else {
      v.value = statistic(result, key, key);
    }
    if (!v.value) {
      v.note = "no figures";
    } else {
      const double x = size_of(key, *v.value), a = size_of(key, achieved);
      v.met = grows(key) ? x >= a / kRatchet : x <= a * kRatchet;
    }
    all.push_back(std::move(v));
  }
  return all;
}

}  // namespace partita::validation
