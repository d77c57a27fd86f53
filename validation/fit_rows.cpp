#include "validation/fit_rows.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/yaml.h"
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
  return e;
}

std::string group_name(const Figure& f, HeldOut by) {
  switch (by) {
    case HeldOut::model:
      return f.model + " " + (*f.configuration)["num_layers"] + " " +
             (*f.configuration)["hidden_size"];
    case HeldOut::cluster:
      return f.key.cluster + " " + (*f.configuration)["num_gpus"];
    case HeldOut::hidden_size:
      return (*f.configuration)["hidden_size"];
  }
  return "";
}

}  // namespace

const std::vector<AdjustmentParameter>& adjustment_parameters() {
  // Believed: a data sheet's or a kernel table's factor on time to a fifth; a launch to a factor of
  // two, being assumed; links to three tenths. Steps have some milliseconds of their own.
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
      {{"step", "s", 0, 0, 0.5, 0.02, false}, [](Adjustment& a, double x) { a.step = Seconds{x}; }},
      {{"spread", "", 0, 0, 0.05, 0.01, false}, [](Adjustment& a, double x) { a.spread = x; }},
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

std::vector<FittedEntry> fit_rows(const CsvTable& table, const Catalogue& catalogue, HeldOut by,
                                  const RowsOptions& options, std::size_t least) {
  const std::vector<CsvTable> tables{table};
  // Which rows there are: step times, by key.
  struct Rows {
    std::vector<std::string> ids;
    std::vector<double> measured;
    std::vector<std::string> groups;
  };
  std::vector<RowKey> order;
  std::map<RowKey, Rows> by_key;
  for (const FamilyFigures& family : predict_rows(tables, catalogue, options)) {
    for (const Figure& f : family.figures) {
      if (f.kind != Figure::Kind::time || f.from_memory || f.key.framework.empty()) continue;
      Rows& r = by_key[f.key];
      if (r.ids.empty()) order.push_back(f.key);
      r.ids.push_back(f.id);
      r.measured.push_back(f.measured);
      r.groups.push_back(group_name(f, by));
    }
  }
  const auto id_column =
      std::find(table.header.begin(), table.header.end(), "id") - table.header.begin();
  std::vector<FittedEntry> entries;
  for (const RowKey& key : order) {
    const Rows& r = by_key.at(key);
    if (r.ids.size() < least) continue;
    FitProblem problem;
    for (const auto& p : adjustment_parameters()) problem.parameters.push_back(p.parameter);
    problem.measured = r.measured;
    std::map<std::string, std::size_t> groups;
    for (const auto& g : r.groups)
      problem.group.push_back(groups.try_emplace(g, groups.size()).first->second);
    problem.predict = [&](const std::vector<double>& values, const std::vector<std::size_t>& rows) {
      RowsOptions with = options;
      const Adjustment a = adjustment_of(values);
      with.adjust = [&a](const RowKey&) { return a; };
      std::map<std::string, std::size_t> at;
      for (std::size_t i = 0; i < rows.size(); ++i) at[r.ids[rows[i]]] = i;
      std::vector<CsvTable> some{table};
      some[0].records.clear();
      for (const auto& record : table.records) {
        if (at.count(record.fields[static_cast<std::size_t>(id_column)]) > 0)
          some[0].records.push_back(record);
      }
      std::vector<double> times(rows.size(), 0);
      for (const FamilyFigures& family : predict_rows(some, catalogue, with)) {
        for (const Figure& f : family.figures) {
          if (f.kind == Figure::Kind::time) times[at.at(f.id)] = f.predicted;
        }
      }
      return times;
    };
    const Fit f = fit(problem);
    FittedEntry e;
    e.key = key;
    e.parameters = f.parameters;
    e.rows = r.ids.size();
    e.groups = groups.size();
    e.noise = f.noise;
    // Of a row like those fitted: its own part of what the parameters leave open is small beside σ.
    e.half_width = f.quantile * f.noise;
    if (!f.held_out.empty()) {
      std::vector<double> sizes;
      for (std::size_t i = 0; i < r.measured.size(); ++i)
        sizes.push_back(std::abs(std::log(f.held_out[i] / r.measured[i])));
      e.half_width = quantile_of_sizes(std::move(sizes));
      e.held_out = error_of(f.held_out, r.measured);
    }
    e.unfitted = error_of(f.unfitted, r.measured);
    e.fitted = error_of(f.fitted, r.measured);
    entries.push_back(std::move(e));
  }
  if (entries.empty())
    throw InputError(table.file,
                     fmt::format("there are no {} step times of one device, framework and cluster "
                                 "that can be predicted; partita validate rows {} --uncovered says "
                                 "why rows are not",
                                 least, table.file));
  return entries;
}

std::string to_yaml(const std::vector<FittedEntry>& entries) {
  std::string s = "schema: partita.fit/1\nentries:\n";
  for (const FittedEntry& e : entries) {
    s += fmt::format(
        "  - device: {}\n    framework: {}\n    cluster: {}\n    rows: {}\n    noise: {:.4f}\n"
        "    half_width: {:.4f}\n    parameters:\n",
        e.key.device, e.key.framework, e.key.cluster, e.rows, e.noise, e.half_width);
    for (std::size_t k = 0; k < e.parameters.size(); ++k) {
      const FitParameter& p = adjustment_parameters()[k].parameter;
      const FittedParameter& x = e.parameters[k];
      s += fmt::format(
          "      {}: {{value: {:.6g}, unit: \"{}\", prior: {:.6g}, bounds: [{:.6g}, {:.6g}], "
          "standard_error: {:.4g}, determined: {}}}\n",
          p.name, x.value, p.unit, p.prior, p.lowest, p.highest, x.standard_error, x.determined);
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
    y.reject_unknown_keys();
    entries_.push_back(std::move(e));
  }
  root.reject_unknown_keys();
}

const FittedEntry* FitProfile::find(const RowKey& key) const {
  const FittedEntry* near = nullptr;
  for (const FittedEntry& e : entries_) {
    if (e.key == key) return &e;
    if (e.key.device == key.device && e.key.framework == key.framework && near == nullptr)
      near = &e;
  }
  return near;
}

}  // namespace partita::validation
