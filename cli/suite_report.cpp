#include "cli/suite_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "base/unit_text.h"
#include "report/report.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;
constexpr double kTau = 0.9, kMemory = 0.01;
constexpr std::size_t kWorst = 8;  // pairs that are listed

std::vector<validation::CaseFigures> figures_of(const SuiteReport& r) {
  std::vector<validation::CaseFigures> all;
  for (const SuiteRow& row : r.rows) {
    if (row.timed) all.push_back(row.figures);
  }
  return all;
}

std::string percent(double x) { return fmt::format("{:.1f} %", 100 * x); }
std::string signed_percent(double x) { return fmt::format("{:+.1f} %", 100 * x); }

}  // namespace

int exit_code(const SuiteReport& r) {
  for (const SuiteRow& row : r.rows) {
    if (row.checked && !row.equal) return 1;
    // Memory of rows that are not those that ran says nothing of the executor.
    if (row.program && (!row.program->equal() || std::abs(row.memory_error) > kMemory)) return 1;
  }
  // What was to be shown is not.
  if (!r.no_figures.empty()) return 1;
  const auto figures = figures_of(r);
  for (const auto& g : validation::groups_of(figures, r.gpu())) {
    if (g.missed()) return 1;
  }
  if (validation::missed(r.held_out)) return 1;
  // NCCL's own word is a law, not a measurement: what differs from it is a model of another NCCL.
  if (r.estimates &&
      (r.estimates->equal < r.estimates->rows.size() || !r.estimates->unpriced.empty()))
    return 1;
  const auto all = validation::orders_of(figures).back();
  return all.pairs > 0 && all.tau < kTau ? 1 : 0;
}

void print_json(const SuiteReport& r) {
  Json j;
  j["schema"] = "partita.validation/1";
  j["complete"] = true;
  j["backend"] = r.backend;
  j["transport"] = r.transport;
  j["profile"] = r.provenance;
  j["suite"]["cases"] = Json::array();
  const auto figures = figures_of(r);
  for (const SuiteRow& row : r.rows) {
    const auto& f = row.figures;
    const auto timed = [&](double x) { return row.timed ? Json(x) : Json(nullptr); };
    Json c{{"name", f.name},
           {"ranks", f.ranks},
           {"equal_to_reference", row.checked ? Json(row.equal) : Json(nullptr)},
           {"predicted_s", timed(f.predicted)},
           {"measured_s", timed(f.measured)},
           {"noise", timed(f.noise)},
           {"memory_error", timed(row.memory_error)}};
    if (row.strayed > 0) c["left_out_for_clock"] = row.strayed;
    for (std::size_t k = 0; row.timed && k < kCategoryCount; ++k) {
      if (row.memory_measured[k].count == 0 && row.memory_predicted[k].count == 0) continue;
      c["memory_at_peak_bytes"][std::string(name(static_cast<Category>(k)))] = {
          {"measured", row.memory_measured[k].count}, {"predicted", row.memory_predicted[k].count}};
    }
    c["same_program"] = nullptr;
    if (row.program)
      c["same_program"] = {
          {"instructions", row.program->instructions},
          {"traffic", row.program->traffic ? Json(*row.program->traffic) : Json(nullptr)},
          {"memory", row.program->memory}};
    if (f.compute_measured > 0)
      c["compute"] = {{"predicted_s", f.compute_predicted},
                      {"measured_s", f.compute_measured},
                      {"noise", f.compute_noise}};
    for (const DeviceMemoryRow& m : row.device_memory)
      c["device_memory_bytes"][m.part] = {{"measured", m.measured.count},
                                          {"predicted", m.predicted.count}};
    j["suite"]["cases"].push_back(std::move(c));
  }
  const auto orders = validation::orders_of(figures);
  const auto tau = [](const validation::OrderFigures& o) {
    return o.pairs > 0 ? Json(o.tau) : Json(nullptr);
  };
  j["suite"]["kendall_tau"] = tau(orders.back());
  j["suite"]["orders"] = Json::array();
  for (const auto& o : orders) {
    if (o.network.empty()) continue;
    j["suite"]["orders"].push_back(
        {{"network", o.network}, {"cases", o.cases}, {"pairs", o.pairs}, {"kendall_tau", tau(o)}});
  }
  j["suite"]["discordant"] = Json::array();
  for (const auto& [fast, slow] : validation::discordant(figures))
    j["suite"]["discordant"].push_back({figures[fast].name, figures[slow].name});
  j["suite"]["groups"] = Json::array();
  for (const auto& g : validation::groups_of(figures, r.gpu())) {
    Json one{{"name", g.name},   {"cases", g.cases}, {"mean_error", g.mean_error}, {"bias", g.bias},
             {"noise", g.noise}, {"bound", g.bound}, {"baseline", g.baseline}};
    if (g.bias_bound > 0) one["bias_bound"] = g.bias_bound;
    one["missed"] = g.missed();
    j["suite"]["groups"].push_back(std::move(one));
  }
  if (r.gpu()) {
    j["left_out_for_clock"] = {{"calibration", r.strayed}, {"suite", r.strayed_of_suite}};
    if (!r.no_figures.empty()) j["no_figures"] = r.no_figures;
  }
  j["suite"]["kinds"] = Json::array();
  for (const auto& k : r.kinds)
    j["suite"]["kinds"].push_back({{"kind", k.sum.kind},
                                   {"measured_s", k.sum.measured.count},
                                   {"predicted_s", k.sum.predicted.count},
                                   {"noise", k.noise()}});
  if (!r.no_estimates.empty()) j["no_nccl_estimates"] = r.no_estimates;
  if (r.estimates) {
    Json& e = j["nccl_estimates"];
    e = {{"equal", r.estimates->equal},
         {"mape", r.estimates->mean},
         {"max", r.estimates->most},
         {"unpriced", r.estimates->unpriced},
         {"rows", Json::array()}};
    for (const auto& row : r.estimates->rows)
      e["rows"].push_back({{"collective", row.collective},
                           {"algorithm", row.algorithm},
                           {"protocol", row.protocol},
                           {"ours", row.ours},
                           {"bytes", row.bytes},
                           {"nccl_us", row.theirs_us},
                           {"partita_us", row.ours_us}});
  }
  if (!r.held_out.empty()) {
    j["held_out"] = Json::array();
    for (const auto& h : r.held_out)
      j["held_out"].push_back({{"kernel", h.kernel},
                               {"points", h.points},
                               {"mape", h.mean},
                               {"bias", h.bias},
                               {"max", h.most}});
    j["held_out_bound"] = validation::kHeldOutBound;
  }
  fmt::print("{}\n", j.dump(2));
}

std::string estimate_table(const validation::EstimateComparison& c) {
  struct Sum {
    std::size_t n = 0;
    double mean = 0, most = 0, at = 0, theirs = 0, ours = 0;
  };
  std::map<std::tuple<std::string, std::string, std::string>, Sum> sums;
  for (const validation::EstimateRow& r : c.rows) {
    Sum& s = sums[{r.collective, r.algorithm, r.protocol}];
    ++s.n;
    s.mean += std::abs(r.error());
    if (s.n > 1 && std::abs(r.error()) <= s.most) continue;
    s.most = std::abs(r.error());
    s.at = r.bytes, s.theirs = r.theirs_us, s.ours = r.ours_us;
  }
  std::vector<std::vector<std::string>> table{
      {"NCCL's own estimate", "sizes", "mean error", "largest", "at", "its", "ours"}};
  for (const auto& [key, s] : sums) {
    const auto& [collective, algorithm, protocol] = key;
    table.push_back({algorithm.empty() ? collective + ", its choice"
                                       : fmt::format("{}, {} {}", collective, algorithm, protocol),
                     std::to_string(s.n),
                     fmt::format("{:.2f} %", 100 * s.mean / static_cast<double>(s.n)),
                     fmt::format("{:.2f} %", 100 * s.most), fmt::format("{:.0f} B", s.at),
                     fmt::format("{:.2f} us", s.theirs), fmt::format("{:.2f} us", s.ours)});
  }
  std::string text = align(table);
  text += fmt::format("{} of {} equal to four digits\n", c.equal, c.rows.size());
  for (const std::string& pair : c.unpriced) text += fmt::format("no price of ours: {}\n", pair);
  return text;
}

std::string held_out_table(const std::vector<validation::Judged>& held) {
  std::vector<std::vector<std::string>> table{
      {"points that were not fitted", "points", "mean error", "bias", "largest", "bound", ""}};
  for (const auto& h : held)
    table.push_back({h.kernel, std::to_string(h.points), percent(h.mean), signed_percent(h.bias),
                     percent(h.most), "", h.mean > validation::kHeldOutBound ? "over it" : ""});
  if (held.back().points > 0) {
    table.back()[5] = percent(validation::kHeldOutBound);
    if (validation::missed(held)) table.back()[6] = "MISSED";
  }
  return align(table);
}

void print(const SuiteReport& r) {
  fmt::print("{}\n\n", r.provenance);
  std::vector<std::vector<std::string>> table{{"case", "ranks", "reference", "program", "measured",
                                               "predicted", "error", "noise", "memory"}};
  for (const SuiteRow& row : r.rows) {
    const auto& f = row.figures;
    table.push_back(
        {f.name, std::to_string(f.ranks),
         !row.checked ? "-"
         : row.equal  ? "equal"
                      : "DIFFERS",
         !row.program           ? "-"
         : row.program->equal() ? "same"
                                : "DIFFERS",
         row.timed ? text(Seconds{f.measured}) : "-", row.timed ? text(Seconds{f.predicted}) : "-",
         row.timed ? signed_percent(f.error()) : "-", row.timed ? percent(f.noise) : "-",
         row.timed ? signed_percent(row.memory_error) : "-"});
  }
  fmt::print("{}\n", align(table));
  for (const SuiteRow& row : r.rows) {
    if (row.program && !row.program->equal())
      fmt::print("{}: another program than the simulated one: {}\n", row.figures.name,
                 row.program->difference);
  }
  for (const SuiteRow& row : r.rows) {
    if (!row.timed || std::abs(row.memory_error) <= kMemory) continue;
    std::string parts;
    for (std::size_t k = 0; k < kCategoryCount; ++k) {
      if (row.memory_measured[k] == row.memory_predicted[k]) continue;
      parts += fmt::format("{}{} {} measured, {} predicted", parts.empty() ? "" : "; ",
                           name(static_cast<Category>(k)), text(row.memory_measured[k]),
                           text(row.memory_predicted[k]));
    }
    fmt::print("{}: at its peak {}\n", row.figures.name, parts);
  }
  table = {{"memory of the device"}};
  for (const SuiteRow& row : r.rows) {
    if (row.device_memory.empty()) continue;
    if (table.size() == 1) {
      for (const DeviceMemoryRow& m : row.device_memory)
        table[0].insert(table[0].end(), {m.part, "predicted"});
    }
    table.push_back({row.figures.name});
    for (const DeviceMemoryRow& m : row.device_memory)
      table.back().insert(table.back().end(), {text(m.measured), text(m.predicted)});
  }
  if (table.size() > 1) fmt::print("{}\n", align(table));
  table = {{"kind, all cases", "measured", "predicted", "error", "noise"}};
  auto sorted = r.kinds;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return b.sum.measured < a.sum.measured; });
  for (const auto& k : sorted)
    table.push_back({k.sum.kind, text(k.sum.measured), text(k.sum.predicted),
                     signed_percent((k.sum.predicted.count - k.sum.measured.count) /
                                    std::max(1e-12, k.sum.measured.count)),
                     percent(k.noise())});
  fmt::print("{}\n", align(table));

  const auto figures = figures_of(r);
  table = {{"", "cases", "mean error", "bias", "noise", "bound", "FLOPs at one rate", ""}};
  for (const auto& g : validation::groups_of(figures, r.gpu()))
    table.push_back({g.name, std::to_string(g.cases), percent(g.mean_error), signed_percent(g.bias),
                     percent(g.noise),
                     g.bias_bound > 0
                         ? fmt::format("{}, bias {}", percent(g.bound), percent(g.bias_bound))
                         : percent(g.bound),
                     percent(g.baseline), g.missed() ? "MISSED" : ""});
  fmt::print("{}\n", align(table));
  table = {{"order of plans", "cases", "pairs", "Kendall's tau", ""}};
  for (const auto& o : validation::orders_of(figures)) {
    const bool all = o.network.empty();
    table.push_back({all ? "all" : o.network, std::to_string(o.cases), std::to_string(o.pairs),
                     o.pairs > 0 ? fmt::format("{:.3f}", o.tau) : "-",
                     all && o.pairs > 0 && o.tau < kTau ? "MISSED, 0.9 is asked for" : ""});
  }
  fmt::print("{}\n", align(table));
  const auto wrong = validation::discordant(figures);
  for (std::size_t k = 0; k < std::min(kWorst, wrong.size()); ++k) {
    const auto &fast = figures[wrong[k].first], &slow = figures[wrong[k].second];
    fmt::print("wrong order: {} {} before {} {}, predicted {} and {}\n", fast.name,
               text(Seconds{fast.measured}), slow.name, text(Seconds{slow.measured}),
               text(Seconds{fast.predicted}), text(Seconds{slow.predicted}));
  }
  if (wrong.size() > kWorst) fmt::print("wrong order: {} more pairs\n", wrong.size() - kWorst);
  if (!r.held_out.empty()) fmt::print("{}\n", held_out_table(r.held_out));
  if (r.strayed + r.strayed_of_suite > 0)
    fmt::print(
        "left out, as their clock was more than 1 % off their other rounds' or was held down: {} "
        "of calibration's runs, {} of the suite's\n",
        r.strayed, r.strayed_of_suite);
  for (const auto& name : r.no_figures)
    fmt::print("{}: all its runs were, so that it has no figures\n", name);
  if (r.estimates) fmt::print("{}\n", estimate_table(*r.estimates));
  if (!r.no_estimates.empty())
    fmt::print("NCCL's own estimates are not compared: {}\n", r.no_estimates);
  for (const auto& line : r.outliers) fmt::print("rounds far apart: {}\n", line);
}

}  // namespace partita::cli
