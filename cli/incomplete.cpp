#include "cli/incomplete.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/unit_text.h"
#include "report/report.h"
#include "validation/compare.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;

/// Median over steps, then over rounds: what the whole suite will show.
double seconds(const IncompleteSuite::Case& c) {
  std::vector<double> rounds;
  for (const auto* ranks : c.measured) {
    rounds.push_back(validation::median(validation::step_times(*ranks)));
  }
  return validation::median(rounds);
}

}  // namespace

std::string to_json(const IncompleteSuite& suite) {
  Json j;
  j["schema"] = "partita.validation/1";
  j["complete"] = false;
  j["reason"] = suite.reason;
  j["backend"] = suite.backend;
  j["transport"] = suite.transport;
  j["measurements"] = suite.measured;
  j["suite"]["cases"] = Json::array();
  for (const auto& c : suite.cases)
    j["suite"]["cases"].push_back(
        {{"name", c.name},
         {"ranks", c.ranks},
         {"equal_to_reference", c.checked ? Json(c.equal) : Json(nullptr)},
         {"measured_s", c.measured.empty() ? Json(nullptr) : Json(seconds(c))},
         {"rounds", c.measured.size()}});
  return j.dump(2) + "\n";
}

std::string to_text(const IncompleteSuite& suite) {
  std::string s = fmt::format("INCOMPLETE: {} measurement{}{}\n", suite.measured,
                              suite.measured == 1 ? "" : "s",
                              suite.goes_on ? "; the same command goes on from there" : "");
  std::vector<std::vector<std::string>> table{{"case", "ranks", "reference", "measured", "rounds"}};
  for (const auto& c : suite.cases) {
    if (!c.checked && c.measured.empty()) continue;
    table.push_back({c.name, std::to_string(c.ranks),
                     !c.checked ? "-"
                     : c.equal  ? "equal"
                                : "DIFFERS",
                     c.measured.empty() ? "-" : text(Seconds{seconds(c)}),
                     fmt::format("{} of {}", c.measured.size(), suite.rounds)});
  }
  return table.size() > 1 ? s + "\n" + align(table) : s;
}

}  // namespace partita::cli
