#include "validation/fit_rows.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "base/yaml.h"
#include "simulator/search/placement.h"
#include "validation/compare.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

FittedEntry::Error error_of(const std::vector<double>& predicted,
                            const std::vector<double>& measured) {
  FittedEntry::Error e;
  std::vector<double> sizes;
  for (std::size_t i = 0; i < measured.size(); ++i) {
    const double x = (predicted[i] - measured[i]) / measured[i];
    sizes.push_back(std::abs(x));
    e.mean += std::abs(x) / static_cast<double>(measured.size());
    e.bias += x / static_cast<double>(measured.size());
  }
  e.median = median(sizes);
  e.rows = measured.size();
  return e;
}

/// Framework and cluster of an entry that pools a device's rows.
constexpr const char* kAny = "*";

std::string group_name(const Figure& f, const std::string& family, HeldOut by) {
  switch (by) {
    case HeldOut::family:
      return family;
    case HeldOut::model:
      return f.model + " " + (*f.configuration)["num_layers"] + " " +
             (*f.configuration)["hidden_size"];
    case HeldOut::cluster:
      return f.key.cluster + " " + (*f.configuration)["num_gpus"];
    case HeldOut::hidden_size:
      return (*f.configuration)["hidden_size"];
    case HeldOut::row:
      break;
  }
  return "";
}

/// Each row's configuration, numbered as they appear: rows that share a step measure the same.
std::vector<std::size_t> witnesses_of(const RowsToFit& rows,
                                      const std::vector<std::size_t>& which) {
  std::map<const RowStep*, std::size_t> known;
  std::vector<std::size_t> witnesses;
  for (const std::size_t i : which)
    witnesses.push_back(known.try_emplace(rows.figures[i].step.get(), known.size()).first->second);
  return witnesses;
}

/// Each row's group, numbered as they appear.
std::vector<std::size_t> groups_of(const RowsToFit& rows, const std::vector<std::size_t>& which,
                                   HeldOut by) {
  constexpr std::size_t kMost = 10;
  std::map<std::string, std::size_t> known;
  std::vector<std::size_t> groups;
  const auto witnesses = witnesses_of(rows, which);
  for (const std::size_t i : which) {
    const std::string name = by == HeldOut::row ? std::to_string(witnesses[groups.size()] % kMost)
                                                : group_name(rows.figures[i], rows.families[i], by);
    groups.push_back(known.try_emplace(name, known.size()).first->second);
  }
  return groups;
}

/// What a network that no row was of may be off as a whole, a standard deviation of its logarithm:
/// the median over the entries of several models that `partita fit --quick` makes of the published
/// language models' rows (docs/fit.md, "Intervals").
constexpr double kOtherNetworks = 0.055;

/// Half a 90 % interval of a network's steps and what another one may be off beside.
double of_another(double half, double sigma) {
  constexpr double kNormal = 1.645;
  return std::hypot(half, kNormal * sigma);
}

/// Rows that are more than four and a half times as far off as the median row is of a normal
/// distribution's spread (Huber's rule of 1.4826 medians), and by a factor of 1.5 at least.
std::vector<FittedEntry::Far> far_rows(const RowsToFit& rows, const std::vector<std::size_t>& which,
                                       const std::vector<double>& fitted) {
  constexpr double kFar = 4.5 * 1.4826, kLeast = 1.5;
  std::vector<double> off, sizes;
  for (std::size_t k = 0; k < which.size(); ++k) {
    off.push_back(std::log(rows.figures[which[k]].measured / fitted[k]));
    sizes.push_back(std::abs(off.back()));
  }
  const double limit = std::max(std::log(kLeast), kFar * median(std::move(sizes)));
  std::vector<FittedEntry::Far> far;
  for (std::size_t k = 0; k < which.size(); ++k)
    if (std::abs(off[k]) > limit) far.push_back({rows.figures[which[k]].id, std::exp(off[k])});
  return far;
}

/// Some of n rows, and the others, each ascending.
struct Drawn {
  std::vector<std::size_t> fitted, others;
};
Drawn draw(std::size_t n, std::size_t count, std::uint64_t seed) {
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  // By a hash of seed and row: the same rows with every standard library.
  if (count < n) {
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return mix(mix(1, seed), a) < mix(mix(1, seed), b);
    });
  }
  const auto middle = order.begin() + static_cast<std::ptrdiff_t>(count);
  Drawn d{{order.begin(), middle}, {middle, order.end()}};
  std::sort(d.fitted.begin(), d.fitted.end());
  std::sort(d.others.begin(), d.others.end());
  return d;
}

/// Times of the rows named; rows that share a step are priced once.
std::vector<double> times_of(const RowsToFit& rows, const std::vector<std::size_t>& which,
                             const Adjustment& adjustment, std::size_t workers) {
  std::vector<const RowStep*> steps;
  std::map<const RowStep*, std::size_t> at;
  for (const std::size_t i : which) {
    const RowStep* step = rows.figures[i].step.get();
    if (at.emplace(step, steps.size()).second) steps.push_back(step);
  }
  std::vector<double> priced(steps.size());
  parallel_for(steps.size(), workers,
               [&](std::size_t, std::size_t k) { priced[k] = steps[k]->time(adjustment).count; });
  std::vector<double> times;
  for (const std::size_t i : which) times.push_back(priced[at.at(rows.figures[i].step.get())]);
  return times;
}

FitProblem problem_of(const RowsToFit& rows, const std::vector<std::size_t>& which,
                      const FitOptions& options, HeldOut by, std::size_t workers) {
  FitProblem problem;
  for (const auto& p : adjustment_parameters()) problem.parameters.push_back(p.parameter);
  problem.quick = options.quick;
  problem.groups_off_together = by != HeldOut::row;
  for (const std::size_t i : which) problem.measured.push_back(rows.figures[i].measured);
  problem.group = groups_of(rows, which, by);
  problem.witness = witnesses_of(rows, which);
  problem.predict = [&rows, which, workers](const std::vector<double>& values,
                                            const std::vector<std::size_t>& some) {
    std::vector<std::size_t> chosen;
    for (const std::size_t i : some) chosen.push_back(which[i]);
    return times_of(rows, chosen, adjustment_of(values), workers);
  };
  return problem;
}

FittedEntry::Error error_left_out(const RowsToFit& rows, const std::vector<std::size_t>& others,
                                  const FittedEntry& entry, std::size_t workers) {
  std::vector<double> measured;
  for (const std::size_t i : others) measured.push_back(rows.figures[i].measured);
  return error_of(times_of(rows, others, adjustment_of(entry), workers), measured);
}

/// Errors of rows left out against the number of rows fitted: 3, 6, 12, 25, 50, ...
std::vector<FittedEntry::CurvePoint> learning_curve(const RowsToFit& rows,
                                                    const FitOptions& options,
                                                    const RowsOptions& rows_options) {
  std::vector<FittedEntry::CurvePoint> curve;
  for (const std::size_t size : {3u, 6u, 12u, 25u, 50u, 100u, 200u}) {
    if (size >= rows.figures.size()) break;
    std::vector<double> means(options.draws), medians(options.draws);
    parallel_for(options.draws, rows_options.workers, [&](std::size_t, std::size_t d) {
      FitOptions one = options;
      one.rows = size;
      one.seed = options.seed + d;
      one.quick = true;
      const FittedEntry e = fit_entry(rows, one, 1);
      means[d] = e.left_out->mean, medians[d] = e.left_out->median;
    });
    curve.push_back({size, options.draws, median(means),
                     *std::max_element(means.begin(), means.end()), median(medians)});
  }
  return curve;
}

}  // namespace

std::string_view name(HeldOut by) {
  constexpr std::array<std::string_view, 5> names{"model", "cluster", "hidden-size", "family",
                                                  "row"};
  return names[static_cast<std::size_t>(by)];
}

const std::vector<AdjustmentParameter>& adjustment_parameters() {
  // Believed: a data sheet's or a kernel table's factor on time to a fifth; a launch to a factor of
  // two, being assumed; links to three tenths. Steps have some milliseconds of their own. Speeds
  // spread by as much as those of the one device of which it is measured (V100, 0.015).
  static const std::vector<AdjustmentParameter> all{
      {{"product_time", "", 1, 0.5, 3, 0.2, true},
       [](Adjustment& a, double x) { a.product_time = x; }},
      {{"memory_time", "", 1, 0.4, 5, 0.3, true},
       [](Adjustment& a, double x) { a.memory_time = x; }},
      {{"optimizer_time", "", 1, 0.3, 5, 0.3, true},
       [](Adjustment& a, double x) { a.optimizer_time = x; }},
      {{"launch_time", "", 1, 0.1, 10, 0.7, true},
       [](Adjustment& a, double x) { a.launch_time = x; }},
      {{"inside_time", "", 1, 0.4, 5, 0.3, true},
       [](Adjustment& a, double x) { a.inside_time = x; }},
      {{"between_time", "", 1, 0.3, 10, 0.5, true},
       [](Adjustment& a, double x) { a.between_time = x; }},
      {{"across_cards_time", "", 1, 0.3, 10, 0.5, true},
       [](Adjustment& a, double x) { a.across_cards_time = x; }},
      {{"step", "s", 0, 0, 0.5, 0.02, false}, [](Adjustment& a, double x) { a.step = Seconds{x}; }},
      {{"spread", "", 0, 0, 0.05, 0.015, false}, [](Adjustment& a, double x) { a.spread = x; }},
  };
  return all;
}

Adjustment adjustment_of(const std::vector<double>& values) {
  Adjustment a;
  const auto& all = adjustment_parameters();
  PARTITA_ASSERT(values.size() == all.size(), fmt::format("{} values", values.size()));
  for (std::size_t k = 0; k < all.size(); ++k) all[k].set(a, values[k]);
  return a;
}

Adjustment adjustment_of(const FittedEntry& entry) {
  std::vector<double> values;
  for (const FittedParameter& p : entry.parameters) values.push_back(p.value);
  return adjustment_of(values);
}

double half_width(const FittedEntry& entry, double parameters,
                  const std::function<Seconds(const Adjustment&)>& time) {
  FitProblem problem;
  for (const auto& p : adjustment_parameters()) problem.parameters.push_back(p.parameter);
  std::vector<double> values;
  for (const FittedParameter& p : entry.parameters) values.push_back(p.value);
  problem.predict = [&](const std::vector<double>& v, const std::vector<std::size_t>& rows) {
    return std::vector<double>(rows.size(), time(adjustment_of(v)).count);
  };
  const double half = partita::validation::half_width(
      sensitivities(problem, values, 1), entry.noise, entry.quantile, entry.covariance);
  return entry.of_network(parameters) ? half : of_another(half, entry.other_networks);
}

bool FittedEntry::of_network(double count) const { return other_networks == 0 || count == network; }

std::vector<RowsToFit> rows_to_fit(const std::vector<FamilyFigures>& families, bool pool_device) {
  std::vector<RowsToFit> all;
  for (const FamilyFigures& family : families) {
    for (const Figure& f : family.figures) {
      if (f.kind != Figure::Kind::time || f.from_memory || f.step == nullptr) continue;
      const RowKey key = pool_device ? RowKey{f.key.device, kAny, kAny} : f.key;
      auto at =
          std::find_if(all.begin(), all.end(), [&](const RowsToFit& r) { return r.key == key; });
      if (at == all.end()) at = all.insert(at, {key, {}, {}});
      at->figures.push_back(f);
      at->families.push_back(family.family);
    }
  }
  return all;
}

FittedEntry fit_entry(const RowsToFit& rows, const FitOptions& options, std::size_t workers) {
  const std::size_t n = rows.figures.size();
  const std::size_t chosen = std::min(n, options.rows.value_or(n));
  const Drawn drawn = draw(n, chosen, options.seed);
  const auto groups = [&](HeldOut by) {
    const auto all = groups_of(rows, drawn.fitted, by);
    return std::set<std::size_t>(all.begin(), all.end()).size();
  };
  FittedEntry e;
  e.by = options.by;
  for (const HeldOut finer : {HeldOut::cluster, HeldOut::row})
    if (options.else_finer && groups(e.by) < 2) e.by = finer;
  const FitProblem problem = problem_of(rows, drawn.fitted, options, e.by, workers);
  const Fit f = fit(problem);
  e.key = rows.key;
  e.parameters = f.parameters;
  e.rows = chosen;
  e.groups = groups(e.by);
  e.far = far_rows(rows, drawn.fitted, f.fitted);
  e.noise = f.noise;
  e.quantile = f.quantile;
  e.covariance = f.covariance;
  e.predictions = f.predictions;
  const std::size_t k = f.parameters.size();
  std::vector<double> widths;
  for (std::size_t i = 0; i < chosen; ++i) {
    const auto from = f.sensitivity.begin() + static_cast<std::ptrdiff_t>(i * k);
    widths.push_back(f.half_width({from, from + static_cast<std::ptrdiff_t>(k)}));
  }
  e.half_width = median(std::move(widths));
  std::set<double> networks;
  for (const std::size_t i : drawn.fitted) networks.insert(rows.figures[i].parameters);
  if (networks.size() == 1) {
    e.network = *networks.begin(), e.other_networks = kOtherNetworks;
    e.half_width_of_others = of_another(e.half_width, e.other_networks);
  }
  e.held_out_times = f.held_out;
  e.held_out_half_widths = f.held_out_half_width;
  if (!f.held_out.empty()) e.held_out = error_of(f.held_out, problem.measured);
  e.unfitted = error_of(f.unfitted, problem.measured);
  e.fitted = error_of(f.fitted, problem.measured);
  if (chosen < n) e.left_out = error_left_out(rows, drawn.others, e, workers);
  return e;
}

std::vector<FittedEntry> fit_rows(const std::vector<CsvTable>& tables, const Catalogue& catalogue,
                                  const FitOptions& options, const RowsOptions& rows_options,
                                  NotFitted* not_fitted) {
  RowsOptions keep = rows_options;
  keep.keep_steps = true;
  std::vector<FittedEntry> entries;
  NotFitted none;
  std::string most;  // the key with the most rows, of those with too few
  std::size_t most_rows = 0;
  const auto families = predict_rows(tables, catalogue, keep);
  for (const FamilyFigures& f : families) none.uncovered += f.uncovered.size();
  for (const RowsToFit& rows : rows_to_fit(families, options.pool_device)) {
    const std::size_t n = rows.figures.size();
    if (n < options.least) {
      none.few += n;
      if (n > most_rows)
        most_rows = n, most = fmt::format("{} with {} on {}", rows.key.device, rows.key.framework,
                                          rows.key.cluster);
      continue;
    }
    entries.push_back(fit_entry(rows, options, rows_options.workers));
    if (options.draws > 0) entries.back().curve = learning_curve(rows, options, rows_options);
  }
  if (not_fitted != nullptr) *not_fitted = none;
  if (entries.empty() && most_rows > 0)
    throw InputError(
        tables[0].file,
        fmt::format("has {} step time{} of {}, and no more of any other; a fit needs {} "
                    "of one device, framework and cluster",
                    most_rows, most_rows == 1 ? "" : "s", most, options.least));
  if (entries.empty() && std::all_of(families.begin(), families.end(),
                                     [](const FamilyFigures& f) { return f.rows == 0; }))
    throw InputError(tables[0].file,
                     "none of its rows has a measured step; a column for it is iteration_time_s, "
                     "tokens_per_s_per_gpu, tflops_per_gpu or mfu_pct");
  if (entries.empty())
    throw InputError(tables[0].file,
                     fmt::format("there are no {} step times of one device, framework and cluster "
                                 "that can be predicted; partita validate rows {} --uncovered says "
                                 "why rows are not",
                                 options.least, tables[0].file));
  return entries;
}

std::string to_yaml(const std::vector<FittedEntry>& entries) {
  const auto quoted = [](const std::string& s) { return s == kAny ? "\"*\"" : s; };
  std::string s = "schema: partita.fit/1\nentries:\n";
  for (const FittedEntry& e : entries) {
    s += fmt::format(
        "  - device: {}\n    framework: {}\n    cluster: {}\n    rows: {}\n    noise: {:.4f}\n"
        "    half_width: {:.4f}\n    quantile: {:.4f}\n{}    parameters:\n",
        quoted(e.key.device), quoted(e.key.framework), quoted(e.key.cluster), e.rows, e.noise,
        e.half_width, e.quantile,
        e.other_networks > 0 ? fmt::format("    network: {:.0f}\n    other_networks: {:.4f}\n",
                                           e.network, e.other_networks)
                             : "");
    for (std::size_t k = 0; k < e.parameters.size(); ++k) {
      const FitParameter& p = adjustment_parameters()[k].parameter;
      const FittedParameter& x = e.parameters[k];
      s += fmt::format(
          "      {}: {{value: {:.6g}, unit: \"{}\", prior: {:.6g}, bounds: [{:.6g}, {:.6g}], "
          "standard_error: {:.4g}, determined: {}}}\n",
          p.name, x.value, p.unit, p.prior, p.lowest, p.highest, x.standard_error, x.determined);
    }
    const std::size_t n = e.parameters.size();
    s += "    covariance:\n";
    for (std::size_t a = 0; a < n; ++a) {
      const auto from = e.covariance.begin() + static_cast<std::ptrdiff_t>(a * n);
      s += fmt::format("      - [{:.6g}]\n",
                       fmt::join(from, from + static_cast<std::ptrdiff_t>(n), ", "));
    }
  }
  return s;
}

FitProfile::FitProfile(const std::string& file) {
  const YamlNode root = YamlNode::load_text(read_file(file), file, "partita.fit/1");
  for (const YamlNode& y : root.get("entries").items()) {
    FittedEntry e;
    e.key = {y.get("device").as_string(), y.get("framework").as_string(),
             y.get("cluster").as_string()};
    e.rows = static_cast<std::size_t>(y.get("rows").as_int(1, 1'000'000'000));
    e.noise = y.get("noise").as_double();
    e.half_width = y.get("half_width").as_double();
    e.quantile = y.get("quantile").as_double();
    if (const auto other = y.find("other_networks")) {
      e.other_networks = other->as_double();
      e.network = y.get("network").as_double();
      if (!(e.other_networks >= 0))
        throw InputError(other->place(), "is negative; write 0 or more");
    }
    const YamlNode parameters = y.get("parameters");
    for (const auto& p : adjustment_parameters()) {
      const YamlNode n = parameters.get(p.parameter.name);
      FittedParameter x;
      const YamlNode value = n.get("value");
      x.value = value.as_double();
      if (!(x.value >= p.parameter.lowest && x.value <= p.parameter.highest))
        throw InputError(value.place(), fmt::format("{} is outside its bounds, {} to {}", x.value,
                                                    p.parameter.lowest, p.parameter.highest));
      x.standard_error = n.get("standard_error").as_double();
      x.determined = n.get("determined").as_bool();
      for (const char* said : {"unit", "prior", "bounds"}) n.find(said);
      n.reject_unknown_keys();
      e.parameters.push_back(x);
    }
    parameters.reject_unknown_keys();
    const YamlNode covariance = y.get("covariance");
    const std::size_t n = e.parameters.size();
    for (const YamlNode& row : covariance.items()) {
      for (const YamlNode& x : row.items()) e.covariance.push_back(x.as_double());
      if (row.items().size() != n)
        throw InputError(row.place(), fmt::format("{} numbers of {} parameters; write one for each",
                                                  row.items().size(), n));
    }
    if (e.covariance.size() != n * n)
      throw InputError(covariance.place(),
                       fmt::format("{} rows of {} parameters; write one for each",
                                   covariance.items().size(), n));
    y.reject_unknown_keys();
    entries_.push_back(std::move(e));
  }
  root.reject_unknown_keys();
}

const FittedEntry* FitProfile::find(const RowKey& key) const {
  const FittedEntry* near = nullptr;
  const FittedEntry* pooled = nullptr;
  for (const FittedEntry& e : entries_) {
    if (e.key == key) return &e;
    if (e.key.device != key.device) continue;
    if (e.key.framework == key.framework && near == nullptr) near = &e;
    if (e.key.framework == kAny && pooled == nullptr) pooled = &e;
  }
  return near != nullptr ? near : pooled;
}

const FittedEntry* FitProfile::find(const Topology& topology, const std::string& framework) const {
  return find({topology.device(DeviceId{0}).name, framework, topology.name()});
}

void rest_on_fit(Prediction& p, const FittedEntry* entry, const Graph& graph,
                 const Topology& topology, const RoutingSource* routing) {
  if (entry == nullptr) {
    p.fit = fmt::format("no fit of {} with {}: prices of the catalogue",
                        topology.device(DeviceId{0}).name, p.plan.framework);
    return;
  }
  const RowKey& key = entry->key;
  p.fit = key.framework == kAny ? fmt::format("times adjusted to {} steps of {}, any framework",
                                              entry->rows, key.device)
                                : fmt::format("times adjusted to {} steps of {} with {} on {}",
                                              entry->rows, key.device, key.framework, key.cluster);
  Communication communication(topology);
  Program program;
  const auto again =
      predict(graph, p.plan, communication, nullptr, &program, false, routing, p.network);
  PARTITA_ASSERT(again, "what was predicted once is predicted again");
  std::optional<Communication> placed;
  if (!p.plan.as_ranked()) placed.emplace(on_devices(topology, p.plan));
  const Rehearsal rehearsal(program, placed ? *placed : communication, {.network = p.network});
  const double half =
      half_width(*entry, static_cast<double>(parameter_count(graph)),
                 [&](const Adjustment& a) { return to_seconds(rehearsal.play(a).step); });
  p.interval = {std::exp(-half) * p.step_time, std::exp(half) * p.step_time};
}

void FitProfile::apply(RowsOptions& options) const {
  options.adjust = [this](const RowKey& key) {
    const FittedEntry* e = find(key);
    return e == nullptr ? Adjustment{} : adjustment_of(*e);
  };
  options.half_width = [this](const RowKey& key, double parameters,
                              const RowStep& step) -> std::optional<double> {
    const FittedEntry* e = find(key);
    if (e == nullptr) return std::nullopt;
    return partita::validation::half_width(*e, parameters,
                                           [&](const Adjustment& a) { return step.time(a); });
  };
}

}  // namespace partita::validation
