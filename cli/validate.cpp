// `partita calibrate` and `partita validate`: this machine measured, and predictions beside it.
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/utsname.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/unit_text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "simulator/lower/lower.h"
#include "validation/calibrate.h"
#include "validation/compare.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;
using validation::CalibrationRun;
using validation::Profile;
using validation::SuiteCase;
constexpr std::uint64_t kSeed = 1;

struct Options {
  std::string backend, out, only;
  std::vector<int> ranks{1, 2, 4};
  std::int64_t rounds = 3, steps = 9;
  double timeout_s = 30;
  bool json = false, no_reference = false;
};

void check(const Options& o) {
  if (o.backend.empty()) throw InputError("--backend", "is missing; there is cpu");
  if (o.backend != "cpu")
    throw InputError("--backend", fmt::format("'{}' is unknown; there is cpu", o.backend));
  if (o.rounds < 1 || o.rounds > 1000)
    throw InputError("--rounds", fmt::format("{} is not in 1 to 1,000", o.rounds));
  if (o.steps < 1 || o.steps > 100000)
    throw InputError("--steps", fmt::format("{} is not in 1 to 100,000", o.steps));
  for (const int r : o.ranks) {
    if (r < 1 || r > 64) throw InputError("--ranks", fmt::format("{} is not in 1 to 64", r));
  }
}

Program program_of(const Graph& graph, const Plan& plan, const std::string& name) {
  auto complete_plan = complete(graph, plan);
  if (!complete_plan) throw InternalError(name + ": " + complete_plan.reason());
  auto program = lower(graph, *complete_plan);
  if (!program) throw InternalError(name + ": " + program.reason());
  return std::move(*program);
}

execute::Options options_of(const Graph& graph) {
  execute::Options o;
  o.seed = kSeed;
  o.input = [&graph](std::size_t input, std::int64_t step, std::int64_t sample,
                     std::int64_t index) {
    return reference::input_value(graph, input, kSeed, step, sample, index);
  };
  o.initial = [&graph](std::size_t replica, std::size_t q, std::int64_t linear) {
    return reference::initial_value(graph.parameters[q], kSeed + replica, linear);
  };
  o.operator_seed = [](std::int32_t op) {
    return reference::operator_seed(kSeed, OpId{static_cast<std::size_t>(op)});
  };
  return o;
}

std::vector<RankMeasurement> measure(const Graph& graph, const Program& program, const Options& o) {
  execute::Options e = options_of(graph);
  e.warm_up = 3;
  e.steps = static_cast<int>(o.steps);
  e.record = true;
  e.collect = false;
  execute::ThreadOptions threads;
  threads.timeout_s = o.timeout_s;
  return execute::run_threads(program, e, threads)[0].ranks;
}

/// Says on stderr what is being done and how long the rest will take.
class Progress {
 public:
  explicit Progress(std::size_t total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  void next(const std::string& what) {
    const double spent =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    if (done_ > 0 && spent - said_ > 5) {
      said_ = spent;
      fmt::print(stderr, "{} of {}, about {:.0f} s left: {}\n", done_, total_,
                 spent / static_cast<double>(done_) * static_cast<double>(total_ - done_), what);
    }
    ++done_;
  }

 private:
  std::size_t total_, done_ = 0;
  double said_ = 0;
  std::chrono::steady_clock::time_point start_;
};

std::string provenance(const Options& o) {
  utsname host{};
  ::uname(&host);
  return fmt::format(
      "measured by partita calibrate 0.1.0, {:%Y-%m-%d}, {}, Linux {}, ranks as "
      "threads, "
      "{} rounds of {} steps, medians",
      fmt::localtime(std::time(nullptr)), this_machine(), host.release, o.rounds, o.steps);
}

/// One number of ranks on the host and what is run on it.
struct Level {
  int ranks;
  std::vector<CalibrationRun> runs;
  std::vector<Program> programs, collectives;
};

std::vector<Level> levels_of(const Options& o) {
  std::vector<Level> all;
  for (const int ranks : o.ranks) {
    Level l;
    l.ranks = ranks;
    l.runs = validation::calibration_runs(ranks);
    for (const auto& r : l.runs) l.programs.push_back(program_of(r.graph, r.plan, r.name));
    l.collectives = validation::collective_programs(ranks);
    all.push_back(std::move(l));
  }
  return all;
}

/// Points of the same shape from several rounds: the median, and how far the rounds are apart.
void join_rounds(Profile& p) {
  const auto join = [](auto& points, auto key) {
    std::map<decltype(key(points[0])),
             std::vector<typename std::decay_t<decltype(points)>::value_type>>
        by;
    for (const auto& x : points) by[key(x)].push_back(x);
    points.clear();
    for (auto& [k, list] : by) {
      std::sort(list.begin(), list.end(),
                [](const auto& a, const auto& b) { return a.time < b.time; });
      auto one = list[list.size() / 2];
      one.spread = std::max(
          one.spread, (list.back().time.count - list.front().time.count) / 2 / one.time.count);
      points.push_back(one);
    }
  };
  for (auto& [kernel, points] : p.kernels)
    join(points,
         [](const KernelPoint& x) { return std::tuple{x.ranks, x.m, x.n, x.k, x.count, x.bytes}; });
  for (auto& [kind, points] : p.collectives)
    join(points, [](const CollectivePoint& x) { return std::tuple{x.ranks, x.bytes.count}; });
}

/// One round of calibration on one level.
void calibrate_round(const Level& l, const Options& o, Profile& p, std::vector<double>& dispatch,
                     Progress& progress) {
  for (std::size_t k = 0; k < l.runs.size(); ++k) {
    progress.next(l.runs[k].name);
    const auto m = measure(l.runs[k].graph, l.programs[k], o);
    validation::harvest(l.programs[k], m, p.kernels);
    dispatch.push_back(validation::dispatch_of(m).count);
  }
  static const Graph nothing;
  for (const Program& c : l.collectives) {
    progress.next(fmt::format("collectives of {} ranks", l.ranks));
    validation::harvest_collectives(c, measure(nothing, c, o), p.collectives);
  }
}

void write(const std::string& file, const std::string& text) {
  std::ofstream out(file, std::ios::binary);
  out << text;
  if (!out.flush())
    throw InputError(
        "--out",
        fmt::format("cannot write {}; check its permissions and whether the disk is full", file));
}

/// Before the work, not after it.
void make_folder(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw InputError(
        "--out", fmt::format("cannot make {}: {}; name another folder", folder, error.message()));
  // Without touching a profile that is there: it stays until the new one is complete.
  const std::string probe = folder + "/device.yaml.new";
  write(probe, "");
  std::filesystem::remove(probe, error);
}

/// Device and cluster files; returns the cluster's path.
std::string save(const Profile& p, const std::string& folder, int devices) {
  const auto replace = [&](const std::string& name, const std::string& content) {
    write(folder + "/" + name + ".new", content);
    std::filesystem::rename(folder + "/" + name + ".new", folder + "/" + name);
  };
  replace("device.yaml", validation::device_yaml(p));
  replace("cluster.yaml", validation::cluster_yaml(p, "device.yaml", devices));
  return folder + "/cluster.yaml";
}

std::size_t points_of(const Profile& p) {
  std::size_t n = 0;
  for (const auto& [kernel, points] : p.kernels) n += points.size();
  for (const auto& [kind, points] : p.collectives) n += points.size();
  return n;
}

/// Figures whose rounds lie far apart.
std::vector<std::string> outliers(const Profile& p) {
  std::vector<std::pair<double, std::string>> all;
  for (const auto& [kernel, points] : p.kernels) {
    for (const auto& x : points)
      all.emplace_back(x.spread, fmt::format("{} on {} ranks, {} ± {:.0f} %", kernel, x.ranks,
                                             text(x.time), 100 * x.spread));
  }
  for (const auto& [kind, points] : p.collectives) {
    for (const auto& x : points)
      all.emplace_back(x.spread, fmt::format("{} of {} on {} ranks, {} ± {:.0f} %", kind,
                                             text(x.bytes), x.ranks, text(x.time), 100 * x.spread));
  }
  std::sort(all.rbegin(), all.rend());
  std::vector<std::string> worst;
  for (const auto& [spread, line] : all) {
    if (spread > 0.5 && worst.size() < 5) worst.push_back(line);
  }
  return worst;
}

void calibrate(const Options& o) {
  check(o);
  if (o.out.empty()) throw InputError("--out", "is missing; name a folder for the profile");
  make_folder(o.out);
  const auto levels = levels_of(o);
  std::size_t total = 0;
  for (const Level& l : levels) total += l.runs.size() + l.collectives.size();
  Progress progress(total * static_cast<std::size_t>(o.rounds));
  Profile p;
  p.provenance = provenance(o);
  p.cores = static_cast<int>(std::thread::hardware_concurrency());
  std::vector<double> dispatch;
  for (std::int64_t round = 0; round < o.rounds; ++round) {
    for (const Level& l : levels) calibrate_round(l, o, p, dispatch, progress);
  }
  join_rounds(p);
  p.dispatch = Seconds{validation::median(dispatch)};
  const std::string cluster = save(p, o.out, *std::max_element(o.ranks.begin(), o.ranks.end()));
  fmt::print("{} points in {} and {}/device.yaml\n", points_of(p), cluster, o.out);
  for (const auto& line : outliers(p)) fmt::print("rounds far apart: {}\n", line);
}

struct Outcome {
  SuiteCase* suite;
  Program program;
  reference::Comparison reference;
  std::vector<validation::StepComparison> rounds;  ///< predicted filled in at the end
  std::vector<std::vector<RankMeasurement>> measured;
};

void validate(const Options& o, int& code) {
  check(o);
  auto cases = validation::suite();
  std::vector<Outcome> outcomes;
  for (SuiteCase& c : cases) {
    if (std::find(o.ranks.begin(), o.ranks.end(), static_cast<int>(c.ranks)) == o.ranks.end())
      continue;
    if (!o.only.empty() && c.name.find(o.only) == std::string::npos) continue;
    outcomes.push_back({&c, program_of(c.graph, c.plan, c.name), {}, {}, {}});
  }
  if (outcomes.empty())
    throw InputError("--only", fmt::format("no case of the suite has '{}' in its name", o.only));
  const bool temporary = o.out.empty();
  const std::string folder =
      temporary ? (std::filesystem::temp_directory_path() / fmt::format("partita-{}", ::getpid()))
                      .string()
                : o.out;
  make_folder(folder);
  const auto levels = levels_of(o);
  std::size_t total = outcomes.size();
  for (const Level& l : levels) total += l.runs.size() + l.collectives.size();
  Progress progress(total * static_cast<std::size_t>(o.rounds) + outcomes.size());

  // Mathematics first: a wrong plan's time is of no interest.
  for (Outcome& c : outcomes) {
    progress.next("mathematics of " + c.suite->name);
    if (o.no_reference) continue;
    constexpr int kSteps = 2;
    execute::Options e = options_of(c.suite->graph);
    e.steps = kSteps;
    execute::ThreadOptions threads;
    threads.timeout_s = o.timeout_s;
    const auto results = execute::run_threads(c.program, e, threads);
    const auto exact = reference::options_for(c.suite->graph, c.program, kSteps, kSeed);
    const int groups = static_cast<int>(c.suite->plan.dp);
    const auto serial = reference::train_serially(c.suite->graph, c.program, exact, groups);
    c.reference = reference::compare(
        c.suite->graph, results[0].values, serial,
        reference::tolerance_of_rounding(c.suite->graph, c.program, serial, exact));
    if (!c.reference.equal) {
      const auto& r = c.reference;
      fmt::print(
          stderr,
          "{} differs from its reference: loss by {:.1e}, gradient of {} by {:.1e}, {} by {:.1e}; "
          "rounding allows {:.1e}\n",
          c.suite->name, r.loss_error, r.worst_gradient, r.gradient_error, r.worst_parameter,
          r.parameter_error, r.tolerance);
    }
  }
  // Calibration and suite take turns, so that a slow minute of the machine meets both.
  Profile p;
  p.provenance = provenance(o);
  p.cores = static_cast<int>(std::thread::hardware_concurrency());
  std::vector<double> dispatch;
  for (std::int64_t round = 0; round < o.rounds; ++round) {
    for (const Level& l : levels) {
      calibrate_round(l, o, p, dispatch, progress);
      for (Outcome& c : outcomes) {
        if (c.suite->ranks != l.ranks) continue;
        progress.next(c.suite->name);
        c.measured.push_back(measure(c.suite->graph, c.program, o));
      }
    }
  }
  join_rounds(p);
  p.dispatch = Seconds{validation::median(dispatch)};
  const int devices = *std::max_element(o.ranks.begin(), o.ranks.end());
  const std::string cluster = save(p, folder, devices);
  const Topology topology = load_topology(cluster);
  if (temporary) {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  }

  struct Row {
    std::string name;
    std::int64_t ranks;
    bool equal;
    double measured, noise, predicted, memory_error;
    double error() const { return (predicted - measured) / measured; }
  };
  std::vector<Row> rows;
  std::map<std::string, validation::KindRow> kinds;
  for (Outcome& c : outcomes) {
    Communication communication(topology);
    SimulateOptions simulation;
    simulation.record = true;
    const Timeline timeline = simulate(c.program, communication, simulation);
    std::vector<double> medians;
    validation::StepComparison step;
    for (const auto& m : c.measured) {
      step = validation::compare(c.program, timeline, m);
      medians.push_back(step.measured.count);
      for (const auto& k : step.kinds) {
        auto& sum = kinds[k.kind.substr(0, k.kind.find(' '))];
        sum.count += k.count;
        sum.measured += k.measured;
        sum.predicted += k.predicted;
      }
    }
    const double median = validation::median(medians);
    const auto [low, high] = std::minmax_element(medians.begin(), medians.end());
    const double memory =
        static_cast<double>(step.predicted_peak.count - step.measured_peak.count) /
        static_cast<double>(step.measured_peak.count);
    rows.push_back({c.suite->name, c.suite->ranks, c.reference.equal, median,
                    std::max(step.noise, (*high - *low) / 2 / median), step.predicted.count,
                    memory});
  }
  struct Group {
    std::string name;
    double mean_error = 0, bias = 0, noise = 0, bound = 0;
    int cases = 0;
  };
  std::vector<Group> groups;
  for (const auto& [low, high, base, factor] : {std::tuple{1, 2, 0.10, 2.0}, {3, 64, 0.25, 3.0}}) {
    Group g;
    g.name = low == 1 ? "1 and 2 ranks" : "more ranks";
    for (const Row& r : rows) {
      if (r.ranks < low || r.ranks > high) continue;
      ++g.cases;
      g.mean_error += std::abs(r.error());
      g.bias += r.error();
      g.noise += r.noise;
    }
    if (g.cases == 0) continue;
    g.mean_error /= g.cases, g.bias /= g.cases, g.noise /= g.cases;
    g.bound = std::max(base, factor * g.noise);
    if (g.mean_error > g.bound) code = 1;
    groups.push_back(g);
  }
  std::vector<double> predicted, measured, noise;
  for (const Row& r : rows) {
    predicted.push_back(r.predicted), measured.push_back(r.measured), noise.push_back(r.noise);
    if ((!r.equal && !o.no_reference) || std::abs(r.memory_error) > 0.01) code = 1;
  }
  const double tau = validation::kendall_tau(predicted, measured, noise);
  if (tau < 0.9) code = 1;

  if (o.json) {
    Json j;
    j["schema"] = "partita.validation/1";
    j["backend"] = o.backend;
    j["profile"] = p.provenance;
    j["suite"]["cases"] = Json::array();
    for (const Row& r : rows)
      j["suite"]["cases"].push_back(
          {{"name", r.name},
           {"ranks", r.ranks},
           {"equal_to_reference", o.no_reference ? Json(nullptr) : Json(r.equal)},
           {"predicted_s", r.predicted},
           {"measured_s", r.measured},
           {"noise", r.noise},
           {"memory_error", r.memory_error}});
    j["suite"]["kendall_tau"] = tau;
    j["suite"]["groups"] = Json::array();
    for (const Group& g : groups)
      j["suite"]["groups"].push_back({{"name", g.name},
                                      {"cases", g.cases},
                                      {"mean_error", g.mean_error},
                                      {"bias", g.bias},
                                      {"noise", g.noise},
                                      {"bound", g.bound}});
    j["suite"]["kinds"] = Json::array();
    for (const auto& [kind, k] : kinds)
      j["suite"]["kinds"].push_back(
          {{"kind", kind}, {"measured_s", k.measured.count}, {"predicted_s", k.predicted.count}});
    fmt::print("{}\n", j.dump(2));
    return;
  }
  fmt::print("{}\n\n", p.provenance);
  std::vector<std::vector<std::string>> table{
      {"case", "ranks", "reference", "measured", "predicted", "error", "noise", "memory"}};
  for (const Row& r : rows)
    table.push_back({r.name, std::to_string(r.ranks),
                     o.no_reference ? "-"
                     : r.equal      ? "equal"
                                    : "DIFFERS",
                     text(Seconds{r.measured}), text(Seconds{r.predicted}),
                     fmt::format("{:+.1f} %", 100 * r.error()),
                     fmt::format("{:.1f} %", 100 * r.noise),
                     fmt::format("{:+.1f} %", 100 * r.memory_error)});
  fmt::print("{}\n", align(table));
  table = {{"kind, all cases", "measured", "predicted", "error"}};
  std::vector<std::pair<std::string, validation::KindRow>> sorted(kinds.begin(), kinds.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return b.second.measured < a.second.measured; });
  for (const auto& [kind, k] : sorted)
    table.push_back({kind, text(k.measured), text(k.predicted),
                     fmt::format("{:+.1f} %", 100 * (k.predicted.count - k.measured.count) /
                                                  std::max(1e-12, k.measured.count))});
  fmt::print("{}\n", align(table));
  for (const Group& g : groups)
    fmt::print(
        "{}: {} cases, mean error {:.1f} %, bias {:+.1f} %, noise {:.1f} %, bound {:.1f} %{}\n",
        g.name, g.cases, 100 * g.mean_error, 100 * g.bias, 100 * g.noise, 100 * g.bound,
        g.mean_error > g.bound ? ": MISSED" : "");
  fmt::print("order of plans: Kendall's tau {:.3f}{}\n", tau,
             tau < 0.9 ? ": MISSED, 0.9 is asked for" : "");
  for (const auto& line : outliers(p)) fmt::print("rounds far apart: {}\n", line);
}

void add_common(CLI::App& c, Options& o) {
  c.add_option("--backend", o.backend, "cpu");
  c.add_option("--ranks", o.ranks, "numbers of ranks, like 1,2,4")->delimiter(',');
  c.add_option("--rounds", o.rounds, "how often everything is measured, in turns");
  c.add_option("--steps", o.steps, "timed steps of each run");
  c.add_option("--out", o.out, "folder for device.yaml and cluster.yaml");
  c.add_option("--timeout", o.timeout_s, "seconds without an answer after which a rank gives up");
}

}  // namespace

void add_validate(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("calibrate", "measure this machine: a device and link profile");
  add_common(*c, *o);
  c->callback([o] { calibrate(*o); });
  auto v = std::make_shared<Options>();
  c = app.add_subcommand("validate",
                         "run a suite of plans on this machine beside their predictions");
  add_common(*c, *v);
  c->add_option("--only", v->only, "cases with this text in their name");
  c->add_flag("--no-reference", v->no_reference, "do not check the mathematics");
  c->add_flag("--json", v->json, "print JSON");
  c->callback([v, &code] { validate(*v, code); });
}

}  // namespace partita::cli
