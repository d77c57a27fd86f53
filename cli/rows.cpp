#include "cli/rows.h"

#include <fmt/format.h>
#include <malloc.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/yaml.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "report/report.h"
#include "validation/fit_rows.h"
#include "validation/published.h"
#include "validation/rows.h"
#include "validation/statistics.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;
using validation::CsvTable;
using validation::ErrorStatistics;
using validation::FamilyFigures;
using validation::FamilyStatistics;
using validation::Figure;
using validation::GroupResult;
using validation::PublishedGroup;
using validation::Verdict;

struct Options {
  std::string file, data, family, against = "target", network = "beside", profile;
  std::size_t workers = 0;
  bool json = false, uncovered = false, fitted = false;
};

constexpr const char* kTables[] = {"llm_training.csv", "memory.csv", "cnn_training.csv",
                                   "collectives.csv", "gemm.csv"};

Json optional(const std::optional<double>& x) { return x ? Json(*x) : Json(nullptr); }

Json to_json(const ErrorStatistics& s) {
  return {{"count", s.count},
          {"mape", optional(s.mape)},
          {"bias", optional(s.bias)},
          {"max", optional(s.max)},
          {"median", optional(s.median)},
          {"percentile95", optional(s.percentile95)},
          {"kendall_tau", optional(s.kendall_tau)},
          {"kendall_tau_apart", optional(s.kendall_tau_apart)},
          {"regret", optional(s.regret)},
          {"baseline_mape", optional(s.baseline_mape)}};
}

const char* kind_name(Figure::Kind k) {
  switch (k) {
    case Figure::Kind::time:
      return "time";
    case Figure::Kind::memory:
      return "memory";
    case Figure::Kind::fits:
      return "fits";
    case Figure::Kind::scaling:
      return "scaling";
  }
  return "";
}

Json to_json(const FamilyFigures& f) {
  const FamilyStatistics s = validation::statistics_of(f.figures);
  Json j;
  j["family"] = f.family;
  j["schema"] = f.schema;
  j["rows"] = f.rows;
  j["covered"] = f.covered;
  j["repeats"] = f.repeats;
  j["time"] = to_json(s.time);
  j["memory"] = to_json(s.memory);
  j["scaling"] = to_json(s.scaling);
  j["fits"] = {{"true_fits", s.fits.true_fits},
               {"false_fits", s.fits.false_fits},
               {"true_oom", s.fits.true_oom},
               {"false_oom", s.fits.false_oom}};
  j["residual"] = Json::array();
  for (const auto& r : s.residual)
    j["residual"].push_back({{"term", r.term}, {"share", r.share}, {"correlation", r.correlation}});
  j["uncovered"] = Json::array();
  for (const auto& u : f.uncovered) j["uncovered"].push_back({{"id", u.id}, {"why", u.why}});
  j["predictions"] = Json::array();
  for (const Figure& x : f.figures) {
    Json p{{"id", x.id},
           {"kind", kind_name(x.kind)},
           {"quantity", x.quantity},
           {"predicted", x.predicted},
           {"measured", x.measured},
           {"lo", optional(x.lo)},
           {"hi", optional(x.hi)},
           {"assumed", x.assumed}};
    if (x.from_memory) p["from_memory"] = true;
    if (!x.shares.empty()) {
      p["share"] = Json::object();
      for (const auto& [term, share] : x.shares) p["share"][term] = share;
    }
    j["predictions"].push_back(std::move(p));
  }
  return j;
}

Json to_json(const Verdict& v) {
  Json j{
      {"statistic", v.statistic}, {"value", optional(v.value)}, {"bound", v.bound}, {"met", v.met}};
  if (!v.note.empty()) j["note"] = v.note;
  return j;
}

void print(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

std::string percent(const std::optional<double>& x, bool sign = false) {
  if (!x) return "-";
  return sign ? fmt::format("{:+.1f}", 100 * *x) : fmt::format("{:.1f}", 100 * *x);
}
std::string ratio(const std::optional<double>& x) { return x ? fmt::format("{:.2f}", *x) : "-"; }

constexpr const char* kHead =
    "{:<44} {:>5} {:>7}  {:>6} {:>7} {:>7} {:>6} {:>6}  {:>8}  {:>7} {:>7}\n";

void print_head() {
  print(fmt::format(fmt::runtime(kHead), "", "rows", "covered", "time %", "bias %", "max %", "tau",
                    "regret", "dullest", "mem %", "bias %"));
}

void print_line(const std::string& name, std::int64_t rows, std::int64_t covered,
                const FamilyStatistics& s) {
  print(fmt::format(fmt::runtime(kHead), name.substr(0, 44), rows, covered, percent(s.time.mape),
                    percent(s.time.bias, true), percent(s.time.max), ratio(s.time.kendall_tau),
                    percent(s.time.regret), percent(s.time.baseline_mape), percent(s.memory.mape),
                    percent(s.memory.bias, true)));
}

void print_families(const std::vector<FamilyFigures>& families, bool uncovered) {
  print_head();
  for (const FamilyFigures& f : families) {
    const FamilyStatistics s = validation::statistics_of(f.figures);
    print_line(f.family, f.rows, f.covered, s);
    std::string more;
    if (s.scaling.mape)
      more += fmt::format("  scaling: {} % off, bias {} %\n", percent(s.scaling.mape),
                          percent(s.scaling.bias, true));
    if (s.fits.false_fits + s.fits.true_oom + s.fits.false_oom > 0)
      more += fmt::format("  fits: {} right, {} wrong; out of memory: {} right, {} missed\n",
                          s.fits.true_fits, s.fits.false_oom, s.fits.true_oom, s.fits.false_fits);
    if (f.repeats > 0)
      more += fmt::format("  {} rows repeat a training row and count there\n", f.repeats);
    print(more);
  }
  // The commonest reasons first: rows of a kind fail alike.
  for (const FamilyFigures& f : families) {
    if (f.uncovered.empty()) continue;
    print(fmt::format("\nnot covered of {}:\n", f.family));
    if (uncovered) {
      for (const auto& u : f.uncovered) print(fmt::format("  {}: {}\n", u.id, u.why));
      continue;
    }
    std::vector<std::pair<std::string, int>> reasons;
    for (const auto& u : f.uncovered) {
      const auto same = std::find_if(reasons.begin(), reasons.end(),
                                     [&](const auto& r) { return r.first == u.why; });
      same == reasons.end() ? reasons.emplace_back(u.why, 1) : (++same->second, *same);
    }
    std::stable_sort(reasons.begin(), reasons.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    constexpr std::size_t kShown = 5;
    for (std::size_t i = 0; i < std::min(reasons.size(), kShown); ++i)
      print(fmt::format("  {:>4}  {}\n", reasons[i].second, reasons[i].first));
    if (reasons.size() > kShown)
      print(fmt::format("        and {} other reasons; --uncovered lists every row\n",
                        reasons.size() - kShown));
  }
}

/// InputError for one without rows, and for two rows of one id: what is said of a row, and what a
/// settings file or --row means, would be of both.
CsvTable load_table(const std::string& file) {
  CsvTable table = validation::parse_csv(read_file(file), file);
  if (table.records.empty())
    throw InputError(file, "has column names and no rows below them; add rows");
  const auto id = std::find(table.header.begin(), table.header.end(), "id");
  if (id == table.header.end()) return table;  // not of a known kind, as is said later
  const auto column = static_cast<std::size_t>(id - table.header.begin());
  std::map<std::string, int> line_of;
  for (const CsvTable::Record& r : table.records) {
    const std::string& name = r.fields[column];
    if (const auto [first, fresh] = line_of.try_emplace(name, r.line); !fresh && !name.empty())
      throw InputError(fmt::format("{}:{}", file, r.line),
                       fmt::format("id '{}' is that of line {} too; give each row its own", name,
                                   first->second));
  }
  return table;
}

/// A row without what a column says is another row: the reader learns which columns nothing reads.
void name_unread_columns(const CsvTable& table) {
  std::vector<std::string> names;
  for (const auto& u : validation::unread_columns(table))
    names.push_back(u.meant.empty() ? fmt::format("'{}'", u.column)
                                    : fmt::format("'{}' (name it '{}'?)", u.column, u.meant));
  if (!names.empty())
    fmt::print(stderr, "{}:1: column{} not read: {}\n", table.file, names.size() == 1 ? "" : "s",
               fmt::join(names, ", "));
}

/// Whose measured times took an entry of a fitted profile, and whose did not.
struct ProfileUse {
  std::size_t with = 0, without = 0;
  std::string lacking;  ///< the first that has none: "h100-sxm with pytorch-fsdp"
};

std::vector<FamilyFigures> predict(const std::vector<CsvTable>& tables, const Options& o,
                                   ProfileUse* use = nullptr) {
  validation::RowsOptions r;
  const auto network = network_named(o.network);
  if (!network)
    throw InputError("--network",
                     fmt::format("'{}' is unknown; use idle, beside or flows", o.network));
  r.network = *network;
  r.workers = o.workers;
  r.family = o.family;
  std::optional<validation::FitProfile> profile;
  if (!o.profile.empty()) {
    profile.emplace(o.profile);
    profile->apply(r);
  }
  auto families = predict_rows(tables, validation::load_catalogue(), r);
  if (!profile || use == nullptr) return families;
  for (const FamilyFigures& f : families) {
    for (const Figure& x : f.figures) {
      if (x.kind != Figure::Kind::time || x.key.device.empty()) continue;
      const bool found = profile->find(x.key) != nullptr;
      ++(found ? use->with : use->without);
      if (!found && use->lacking.empty())
        use->lacking = fmt::format("{} with {}", x.key.device, x.key.framework);
    }
  }
  return families;
}

/// The time goes to the reader, never into the results.
class Clock {
 public:
  void say(std::size_t families) const {
    const double s =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
    fmt::print(stderr, "progress: {} families predicted in {:.1f} s\n", families, s);
  }

 private:
  std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

void rows(const Options& o) {
  ProfileUse use;
  const CsvTable table = load_table(o.file);
  const auto families = predict({table}, o, &use);
  name_unread_columns(table);
  if (!o.json) {
    print_families(families, o.uncovered);
    if (!o.profile.empty())
      print(fmt::format(
          "\n{}: {} of {} times by its entries{}\n", o.profile, use.with, use.with + use.without,
          use.without > 0
              ? fmt::format("; none for {}, there prices are the catalogue's", use.lacking)
              : ""));
    return;
  }
  Json j;
  j["schema"] = "partita.rows/1";
  j["file"] = o.file;
  const auto unread = validation::unread_columns(table);
  if (!unread.empty()) j["unread_columns"] = Json::array();
  for (const auto& u : unread)
    j["unread_columns"].push_back(
        {{"column", u.column}, {"meant", u.meant.empty() ? Json(nullptr) : Json(u.meant)}});
  if (!o.profile.empty())
    j["profile"] = {{"file", o.profile}, {"fitted", use.with}, {"not_fitted", use.without}};
  j["families"] = Json::array();
  for (const auto& f : families) j["families"].push_back(to_json(f));
  print(j.dump(2) + "\n");
}

struct FitFlags {
  std::vector<std::string> files;
  std::string out, by, pool, family;
  std::size_t workers = 0, draws = 15;
  std::optional<std::size_t> rows;
  std::uint64_t seed = 1;
  bool quick = false, curve = false, json = false;
};

validation::FitOptions fit_options(const FitFlags& o) {
  using validation::HeldOut;
  validation::FitOptions f;
  if (!o.pool.empty() && o.pool != "device")
    throw InputError("--pool", fmt::format("'{}' is unknown; use device", o.pool));
  f.pool_device = !o.pool.empty();
  f.by = f.pool_device ? HeldOut::family : HeldOut::model;
  f.else_finer = o.by.empty();
  if (!o.by.empty()) {
    const auto known = {HeldOut::model, HeldOut::cluster, HeldOut::hidden_size, HeldOut::family,
                        HeldOut::row};
    const auto* at =
        std::find_if(known.begin(), known.end(), [&](HeldOut h) { return name(h) == o.by; });
    if (at == known.end())
      throw InputError(
          "--by",
          fmt::format("'{}' is unknown; use model, cluster, hidden-size, family or row", o.by));
    f.by = *at;
  }
  if (o.rows && *o.rows < f.least)
    throw InputError("--rows",
                     fmt::format("{} rows are too few to fit; use {} or more", *o.rows, f.least));
  if (o.draws < 1) throw InputError("--draws", "0 draws make no curve; use 1 or more");
  f.rows = o.rows;
  f.seed = o.seed;
  f.quick = o.quick;
  if (o.curve) f.draws = o.draws;
  return f;
}

Json to_json(const validation::FittedEntry::Error& e) {
  return {{"rows", e.rows}, {"mean", e.mean}, {"median", e.median}, {"bias", e.bias}};
}

Json to_json(const validation::FittedEntry& e) {
  const auto error = [](const auto& x) { return x ? to_json(*x) : Json(nullptr); };
  Json j{{"device", e.key.device}, {"framework", e.key.framework}, {"cluster", e.key.cluster},
         {"rows", e.rows},         {"groups", e.groups},           {"by", std::string(name(e.by))},
         {"noise", e.noise},       {"half_width", e.half_width},   {"predictions", e.predictions}};
  j["half_width_of_other_networks"] = e.other_networks > 0 ? e.half_width_of_others : e.half_width;
  j["parameters"] = Json::array();
  for (std::size_t k = 0; k < e.parameters.size(); ++k) {
    const auto& p = validation::adjustment_parameters()[k].parameter;
    const auto& x = e.parameters[k];
    j["parameters"].push_back({{"name", p.name},
                               {"unit", p.unit},
                               {"value", x.value},
                               {"prior", p.prior},
                               {"bounds", {p.lowest, p.highest}},
                               {"standard_error", x.standard_error},
                               {"determined", x.determined},
                               {"at_bound", x.at_bound}});
  }
  j["unfitted"] = to_json(e.unfitted);
  j["fitted"] = to_json(e.fitted);
  j["held_out"] = error(e.held_out);
  j["left_out"] = error(e.left_out);
  j["far"] = Json::array();
  for (const auto& x : e.far) j["far"].push_back({{"id", x.id}, {"factor", x.factor}});
  j["learning_curve"] = Json::array();
  for (const auto& p : e.curve)
    j["learning_curve"].push_back({{"rows", p.rows},
                                   {"draws", p.draws},
                                   {"mean", p.mean},
                                   {"median", p.median},
                                   {"worst", p.worst}});
  return j;
}

/// Median error of fitted rows above which something else than a parameter is wrong.
constexpr double kFarOff = 0.3;

std::string rows_text(std::size_t n) { return fmt::format("{} row{}", n, n == 1 ? "" : "s"); }

/// Rows far from the others, the farthest first, and what a factor of a thousand looks like.
std::string far_text(std::vector<validation::FittedEntry::Far> far) {
  constexpr std::size_t kShown = 5;
  std::sort(far.begin(), far.end(), [](const auto& a, const auto& b) {
    return std::abs(std::log(a.factor)) > std::abs(std::log(b.factor));
  });
  std::string s;
  for (std::size_t k = 0; k < std::min(kShown, far.size()); ++k) {
    const double f = far[k].factor;
    const bool thousand = (f > 500 && f < 2000) || (f > 1 / 2000.0 && f < 1 / 500.0);
    s += fmt::format("far from the others: {}, measured {:.3g} times what is fitted{}\n", far[k].id,
                     f, thousand ? ": is its figure in the unit that the column names?" : "");
  }
  if (far.size() > kShown) s += fmt::format("and {} more\n", far.size() - kShown);
  if (!far.empty()) s += "without them the interval is narrower\n";
  return s;
}

std::string to_text(const validation::FittedEntry& e) {
  const std::string by(name(e.by));
  std::string s =
      e.key.framework == "*"
          ? fmt::format("{} rows of {}, {} groups by {}\n", e.rows, e.key.device, e.groups, by)
          : fmt::format("{} rows of {} with {} on {}, {} groups by {}\n", e.rows, e.key.device,
                        e.key.framework, e.key.cluster, e.groups, by);
  std::vector<std::vector<std::string>> table{
      {"parameter", "prior", "fitted", "standard error", ""}};
  for (std::size_t k = 0; k < e.parameters.size(); ++k) {
    const auto& p = validation::adjustment_parameters()[k].parameter;
    const auto& x = e.parameters[k];
    table.push_back({p.name + (p.unit.empty() ? "" : ", " + p.unit), fmt::format("{:.4g}", p.prior),
                     fmt::format("{:.4g}", x.value), fmt::format("{:.3g}", x.standard_error),
                     !x.determined ? "not determined by these rows"
                     : x.at_bound  ? "at its bound"
                                   : ""});
  }
  s += align(table);
  table = {{"error", "mean", "median", "bias"}};
  const auto line = [&](const std::string& what, const validation::FittedEntry::Error& x) {
    table.push_back({what, fmt::format("{:.1f} %", 100 * x.mean),
                     fmt::format("{:.1f} %", 100 * x.median),
                     fmt::format("{:+.1f} %", 100 * x.bias)});
  };
  line("unfitted", e.unfitted);
  line("fitted to these rows", e.fitted);
  if (e.held_out) line("one group left out", *e.held_out);
  if (e.left_out) line(fmt::format("{} rows not drawn", e.left_out->rows), *e.left_out);
  s += align(table) +
       fmt::format("90 % interval of the median row: x / {:.3f}\n", std::exp(e.half_width));
  if (e.other_networks > 0)
    s += fmt::format("all rows are of one network: of another x / {:.3f}\n",
                     std::exp(e.half_width_of_others));
  if (!e.held_out)
    s += fmt::format(
        "one {} only: none could be left out, and the interval is of the rows fitted\n", by);
  s += far_text(e.far);
  if (e.fitted.median > kFarOff)
    s += fmt::format(
        "these steps are far from what any parameters give (median error {:.0f} %): "
        "are the figures in the units that the columns name?\n",
        100 * e.fitted.median);
  if (!e.curve.empty()) {
    table = {{"rows fitted", "draws", "error of the others: mean", "worst draw", "median"}};
    for (const auto& p : e.curve)
      table.push_back(
          {std::to_string(p.rows), std::to_string(p.draws), fmt::format("{:.1f} %", 100 * p.mean),
           fmt::format("{:.1f} %", 100 * p.worst), fmt::format("{:.1f} %", 100 * p.median)});
    s += align(table);
  }
  return s + "\n";
}

/// Each evaluation of a fit needs what the last one freed: given back, it would be faulted in
/// again.
void keep_memory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

void fit(const FitFlags& o) {
  const validation::FitOptions f = fit_options(o);
  keep_memory();
  if (o.out.empty()) throw InputError("--out", "is missing; name a file for the fitted profile");
  std::vector<std::pair<std::string, std::string>> read;
  for (const std::string& file : o.files) read.emplace_back("FILE", file);
  check_writable("--out", o.out, read);
  validation::RowsOptions r;
  r.workers = o.workers;
  r.family = o.family;
  std::vector<CsvTable> tables;
  reject_repeats("FILE", o.files);
  for (const std::string& file : o.files) {
    tables.push_back(load_table(file));
    name_unread_columns(tables.back());
  }
  const StillAtIt lines(
      "each entry takes hundreds of predictions of its rows; --quick, --workers or --family take "
      "less time");
  validation::NotFitted not_fitted;
  const auto entries =
      validation::fit_rows(tables, validation::load_catalogue(), f, r, &not_fitted);
  Json j{
      {"schema", "partita.fitting/1"}, {"by", std::string(name(f.by))}, {"entries", Json::array()}};
  for (const validation::FittedEntry& e : entries) {
    if (o.json)
      j["entries"].push_back(to_json(e));
    else
      print(to_text(e));
  }
  j["not_fitted"] = {{"uncovered", not_fitted.uncovered}, {"few", not_fitted.few}};
  if (o.json) {
    print(j.dump(2) + "\n");
  } else {
    if (not_fitted.uncovered > 0)
      print(
          fmt::format("not fitted: {} that cannot be predicted; partita validate rows {} "
                      "--uncovered says why\n",
                      rows_text(not_fitted.uncovered), fmt::join(o.files, " ")));
    if (not_fitted.few > 0)
      print(fmt::format("not fitted: {} of a device, framework and cluster with fewer than {}\n",
                        rows_text(not_fitted.few), f.least));
  }
  write_text("--out", o.out, validation::to_yaml(entries));
}

std::string folder_of(const std::string& data) {
  const auto folder = [](const std::string& text) {
    std::error_code ignored;
    return std::filesystem::is_directory(text, ignored);
  };
  if (!data.empty()) {
    if (!folder(data))
      throw InputError(
          "--data", fmt::format("'{}' {}", data,
                                std::filesystem::exists(data) ? "is no folder" : "does not exist"));
    return data;
  }
  if (const char* chosen = std::getenv("PARTITA_REFERENCE"); chosen != nullptr && *chosen != '\0') {
    if (!folder(chosen))
      throw InputError("PARTITA_REFERENCE", fmt::format("'{}' is no folder", chosen));
    return chosen;
  }
  const std::string beside = data_folder("../shared/reference");
  if (!folder(beside))
    throw InputError("--data",
                     "is missing: no folder of published tables; give --data DIR or set "
                     "PARTITA_REFERENCE");
  return beside;
}

/// Fits the group's rows: its families once more, with steps kept.
void add_fitted(GroupResult& r, const std::vector<CsvTable>& tables,
                const std::vector<FamilyFigures>& families, const Options& o) {
  keep_memory();
  std::vector<FamilyFigures> kept;
  for (const std::string& family : validation::families_of(*r.group, families)) {
    validation::RowsOptions options;
    options.workers = o.workers;
    options.family = family;
    options.keep_steps = true;
    for (FamilyFigures& f : predict_rows(tables, validation::load_catalogue(), options))
      kept.push_back(std::move(f));
  }
  validation::add_fitted(r, kept, o.workers);
}

void published(const Options& o, int& code) {
  if (o.against != "target" && o.against != "achieved")
    throw InputError("--against",
                     fmt::format("'{}' is unknown; use target or achieved", o.against));
  const Clock clock;
  const std::vector<CsvTable> tables = tables_of(folder_of(o.data));
  const auto families = predict(tables, o);
  const auto groups = validation::load_published(data_folder("validation/published.yaml"));
  bool missed = false;
  Json j_groups = Json::array();
  std::vector<std::pair<GroupResult, std::vector<Verdict>>> results;
  for (const PublishedGroup& g : groups) {
    GroupResult r = validation::result_of(g, families);
    if (r.rows == 0) continue;  // its family was not asked for, or is not in the data
    if (o.fitted && validation::wants_fit(g)) add_fitted(r, tables, families, o);
    auto verdicts =
        o.against == "achieved" ? validation::against_achieved(r) : validation::against_targets(r);
    for (const Verdict& v : verdicts) missed |= !v.met;
    results.emplace_back(std::move(r), std::move(verdicts));
  }
  if (o.json) {
    Json j;
    j["schema"] = "partita.published/1";
    j["against"] = o.against;
    j["met"] = !missed;
    for (const auto& [r, verdicts] : results) {
      Json g{{"group", r.group->name},
             {"peers", r.group->peers},
             {"target", r.group->target},
             {"rows", r.rows},
             {"covered", r.covered},
             {"time", to_json(r.statistics.time)},
             {"memory", to_json(r.statistics.memory)},
             {"scaling", to_json(r.statistics.scaling)}};
      if (r.fitted) g["fitted"] = {{"rows", r.fitted_rows}, {"time", to_json(r.fitted->time)}};
      const auto add = [](Json& to, const std::string& name, const auto& x) {
        to[name] = {{"rows", x.rows}, {"held", x.held}, {"half_width", x.half_width}};
      };
      if (r.intervals) add(g, "intervals", *r.intervals);
      for (const auto& [family, x] : r.of_family) add(g["intervals"]["families"], family, x);
      g["verdicts"] = Json::array();
      for (const Verdict& v : verdicts) g["verdicts"].push_back(to_json(v));
      j_groups.push_back(std::move(g));
    }
    j["groups"] = std::move(j_groups);
    j["families"] = Json::array();
    for (const auto& f : families) j["families"].push_back(to_json(f));
    print(j.dump(2) + "\n");
  } else {
    print_families(families, o.uncovered);
    print("\n");
    print_head();
    for (const auto& [r, verdicts] : results) {
      print_line(r.group->name, r.rows, r.covered, r.statistics);
      if (r.fitted)
        print_line("  fitted, model left out", r.fitted->time.count, r.fitted_rows, *r.fitted);
      for (const auto& [family, x] : r.of_family)
        print(
            fmt::format("  90 % intervals of {} rows left out hold {:.0f} %, {:.1f} times the "
                        "mean error to either side: {}\n",
                        x.rows, 100 * x.held, x.half_width, family));
      if (!r.group->peers.empty()) print(fmt::format("  peers: {}\n", r.group->peers));
      print(fmt::format("  target: {}\n", r.group->target));
      for (const Verdict& v : verdicts)
        print(fmt::format("    {:<28} {:>9}  {} {:.4g}: {}\n", v.statistic,
                          v.value ? fmt::format("{:.4g}", *v.value) : v.note,
                          o.against == "achieved" ? "achieved" : "bound", v.bound,
                          v.met ? "met" : "missed"));
      std::string terms;
      for (std::size_t i = 0; i < std::min<std::size_t>(6, r.statistics.residual.size()); ++i) {
        const auto& t = r.statistics.residual[i];
        terms += fmt::format("{}{} {:.0f} % ({:+.2f})", terms.empty() ? "" : ", ", t.term,
                             100 * t.share, t.correlation);
      }
      if (!terms.empty())
        print(fmt::format("  share of the step (correlation with the error): {}\n", terms));
    }
  }
  clock.say(families.size());
  code = missed ? 1 : 0;
}

void add_common(CLI::App& c, Options& o) {
  c.add_option("--family", o.family, "only rows of this family");
  c.add_option(
      "--network", o.network,
      "beside (default): transfers alone on their links, kernels get what they leave of the "
      "device; idle: all alone; flows: links shared too");
  c.add_option("--workers", o.workers, "threads (default: one per core)")
      ->check(CLI::Range(1, 4096));
  c.add_flag("--uncovered", o.uncovered, "list every row without a prediction, and why");
  c.add_flag("--json", o.json, "print JSON");
}

}  // namespace

std::vector<CsvTable> tables_of(const std::string& data) {
  std::error_code ignored;
  if (!data.empty() && std::filesystem::is_regular_file(data, ignored)) return {load_table(data)};
  const std::string folder = folder_of(data);
  std::vector<CsvTable> tables;
  for (const char* name : kTables) {
    const std::string file = folder + "/" + name;
    if (std::filesystem::exists(file)) tables.push_back(load_table(file));
  }
  if (tables.empty())
    throw InputError("--data",
                     fmt::format("'{}' has none of {}", folder,
                                 fmt::join(std::begin(kTables), std::end(kTables), ", ")));
  return tables;
}

void add_rows(CLI::App& validate, int& code) {
  auto r = std::make_shared<Options>();
  CLI::App* c =
      validate.add_subcommand("rows", "a table of published measurements beside predictions");
  c->add_option("FILE", r->file, "CSV: training, memory, CNN, collective or product rows")
      ->required();
  add_common(*c, *r);
  c->add_option("--profile", r->profile, "a fit of partita fit");
  c->callback([r] { rows(*r); });
  auto p = std::make_shared<Options>();
  c = validate.add_subcommand("published", "all published tables beside predictions and targets");
  c->add_option("--data", p->data,
                "folder of the tables (default: PARTITA_REFERENCE, else ../shared/reference)");
  c->add_option("--against", p->against, "target (default) or achieved: what exit code 1 is about");
  c->add_flag("--fitted", p->fitted,
              "fit where a target asks for it: each model's rows by the others'");
  add_common(*c, *p);
  c->callback([p, &code] { published(*p, code); });
}

void add_fit(CLI::App& app) {
  auto o = std::make_shared<FitFlags>();
  CLI::App* c = app.add_subcommand(
      "fit", "a few physical parameters from measured steps, by device, framework and cluster");
  c->add_option("FILE", o->files, "CSV of measured steps, one or more (docs/published.md)")
      ->required();
  c->add_option("--out", o->out, "file for the fitted profile (partita.fit/1)");
  c->add_option(
      "--by", o->by,
      "held out together: model (default; with one of them clusters, else rows), cluster, "
      "hidden-size, family or row");
  c->add_option("--pool", o->pool,
                "device: one set of parameters a device, over all frameworks and clusters; held "
                "out by family unless --by says otherwise");
  c->add_option("--family", o->family, "only rows of this family");
  c->add_option("--rows", o->rows, "fit to so many rows of each, drawn; the others are left out");
  c->add_option("--seed", o->seed, "of the draws (default 1)")->check(CLI::NonNegativeNumber);
  c->add_flag("--learning-curve", o->curve,
              "error of rows left out by the number of rows fitted: 3, 6, 12, 25, 50, ...");
  c->add_option("--draws", o->draws, "of each point of the curve (default 15)");
  c->add_flag("--quick", o->quick, "a fifth of the predictions, for hundreds of rows");
  c->add_option("--workers", o->workers, "threads (default: one per core)")
      ->check(CLI::Range(1, 4096));
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o] { fit(*o); });
}

}  // namespace partita::cli
