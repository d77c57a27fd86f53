// cli/startup.cpp: what it takes until every rank has its parameters, predicted and measured.
#include "simulator/lower/startup.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/temporary.h"
#include "base/unit_text.h"
#include "cli/checkpoint.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/serial.h"
#include "simulator/engine/simulate.h"
#include "simulator/lower/lower.h"
#include "validation/compare.h"
#include "validation/program_check.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::uint64_t kSeed = 1;
constexpr std::int64_t kMostThreads = 64;

struct Options {
  PlanFlags flags;
  std::string model, topology;
  std::optional<std::int64_t> repeats;  ///< 5
  bool measure = false, json = false;
};

struct Row {
  std::string plan;
  std::int64_t ranks = 0;
  Startup form = Startup::each;
  Ticks predicted;
  std::int64_t sent = 0;  ///< bytes on all links
  Bytes peak;
  bool fits = true;
  bool measured = false, equal = false;
  std::string difference;  ///< of what ran from what was simulated
  double median_s = 0, low_s = 0, high_s = 0;
};

/// The plan that is asked for; without one, data beside model parallelism on all devices.
std::vector<Plan> plans_of(const Options& o, const Plan& base, const Topology& t) {
  const auto ranks = static_cast<std::int64_t>(t.used_devices());
  const PlanFlags& f = o.flags;
  if (f.tp || f.pp || f.dp || f.cp || f.ep || f.zero || !f.file.empty() || !f.set.empty() ||
      !f.strategy.empty() || ranks == 1) {
    Plan p = base;
    settle_ranks(p, ranks, t.name());
    return {p};
  }
  std::vector<Plan> all(4, base);
  all[0].dp = ranks;
  all[1].dp = ranks, all[1].zero = 3;
  all[2].dp = 1, all[2].tp = ranks;
  all[3].dp = 1, all[3].pp = ranks;
  return all;
}

std::string shape(const Plan& p) {
  std::string s = fmt::format("dp {} tp {} pp {}", p.dp, p.tp, p.pp);
  if (p.cp > 1) s += fmt::format(" cp {}", p.cp);
  if (p.ep > 1) s += fmt::format(" ep {}", p.ep);
  if (p.zero > 0) s += fmt::format(" zero {}", p.zero);
  return s;
}

void measure(const Options& o, const Graph& g, const Program& program, const Checkpoint& file,
             Communication& network, Row& row) {
  execute::Options run;
  run.warm_up = 1;
  run.steps = static_cast<int>(o.repeats.value_or(5));
  run.seed = kSeed;
  run.input = [](std::size_t, std::int64_t, std::int64_t, std::int64_t) { return 0.0; };
  run.initial = [&g](std::size_t, std::size_t q, std::int64_t linear) {
    return reference::initial_value(g.parameters[q], kSeed, linear);
  };
  run.read = [&file](std::size_t, std::size_t q, std::int64_t first, std::int64_t count,
                     float* to) { file.read(q, first, count, to); };
  const auto results = execute::run_threads(program, run, {60, nullptr});
  const auto& values = results[0].values;
  row.equal = values.copies_differ == 0;
  for (const auto& replica : values.parameters) {
    for (std::size_t q = 0; q < g.parameters.size(); ++q) {
      for (std::size_t k = 0; k < replica[q].size() && row.equal; ++k) {
        row.equal = static_cast<float>(replica[q][k]) ==
                    static_cast<float>(reference::initial_value(g.parameters[q], kSeed,
                                                                static_cast<std::int64_t>(k)));
      }
    }
  }
  SimulateOptions counts;
  counts.record = true;
  counts.unfolded = true;
  row.difference = validation::check_program(program, simulate(program, network, counts),
                                             results[0].ranks, run.warm_up + run.steps - 1, true)
                       .difference;
  std::vector<double> steps = validation::step_times(results[0].ranks);
  std::sort(steps.begin(), steps.end());
  row.measured = true;
  row.median_s = validation::median(steps);
  row.low_s = steps.front();
  row.high_s = steps.back();
}

void show(const Options& o, const Graph& g, const Topology& t, const std::vector<Row>& rows,
          const std::vector<std::string>& left_out) {
  if (o.json) {
    Json j;
    j["schema"] = "partita.startup/1";
    j["model"] = g.name;
    j["topology"] = t.name();
    j["rows"] = Json::array();
    for (const Row& r : rows) {
      Json x{{"plan", r.plan},
             {"ranks", r.ranks},
             {"form", std::string(name(r.form))},
             {"predicted_s", to_seconds(r.predicted).count},
             {"sent_bytes", r.sent},
             {"peak_memory_bytes", r.peak.count},
             {"fits", r.fits}};
      if (r.measured) {
        x["measured_s"] = r.median_s;
        x["measured_interval_s"] = {r.low_s, r.high_s};
        x["equal"] = r.equal;
        x["same_program"] = r.difference.empty();
      }
      j["rows"].push_back(std::move(x));
    }
    j["left_out"] = left_out;
    fmt::print("{}\n", j.dump(2));
    return;
  }
  fmt::print("start-up of {} on {}\n\n", g.name, t.name());
  std::vector<std::vector<std::string>> table{
      {"plan", "form", "predicted", "sent", "peak memory", "fits"}};
  if (o.measure)
    table[0].insert(table[0].end(), {"measured", "fastest", "slowest", "parameters", "program"});
  for (const Row& r : rows) {
    table.push_back({r.plan, std::string(name(r.form)), text(to_seconds(r.predicted)),
                     text(Bytes{r.sent}), text(r.peak), r.fits ? "yes" : "NO"});
    if (o.measure)
      table.back().insert(
          table.back().end(),
          {text(Seconds{r.median_s}), text(Seconds{r.low_s}), text(Seconds{r.high_s}),
           r.equal ? "equal" : "DIFFER", r.difference.empty() ? "same" : "DIFFERS"});
  }
  fmt::print("{}\n", align(table));
  for (const Row& r : rows) {
    if (!r.difference.empty())
      fmt::print("{}, {}: another program than the simulated one: {}\n", r.plan, name(r.form),
                 r.difference);
  }
  for (const auto& why : left_out) fmt::print("left out: {}\n", why);
}

void run(const Options& o, int& code) {
  if (o.repeats && !o.measure)
    throw InputError("--repeats", "counts measured runs: give --measure too");
  if (o.repeats && (*o.repeats < 1 || *o.repeats > 1000))
    throw InputError("--repeats", fmt::format("{} is not in 1 to 1,000", *o.repeats));
  Plan base = plan_from(o.flags, o.measure ? "partita" : "megatron-core");
  if (o.measure) {
    if (!o.flags.precision.empty() && o.flags.precision != "fp32")
      throw InputError("--precision", fmt::format("{} is not what --measure executes; use fp32",
                                                  o.flags.precision));
    set_precision(base, "fp32", "");
  }
  const Topology t = load_cluster(o.topology);
  if (o.measure && static_cast<std::int64_t>(t.used_devices()) > kMostThreads) {
    throw InputError("TOPOLOGY", fmt::format("{} has {} devices; --measure runs up to {} ranks as "
                                             "threads: use fewer, like cpu-host:4 devices",
                                             t.name(), t.used_devices(), kMostThreads));
  }
  if (o.measure) {
    refuse_foreign(t, o.topology, "TOPOLOGY");
    for (std::size_t k = 0; k < t.profile_count(); ++k) {
      if (t.profile(k).compute_capability > 0)
        throw InputError(
            "TOPOLOGY",
            fmt::format("{} has {} devices, --measure runs ranks as threads of this "
                        "machine: predict for what is measured, like cpu-host:4 devices "
                        "or a profile calibrated here",
                        t.name(), t.profile(k).name));
    }
  }
  const Graph g = load_graph(o.model, o.flags, base);
  std::unique_ptr<Checkpoint> file;
  if (o.measure) file = std::make_unique<Checkpoint>(g, kSeed);
  Communication network(t);
  std::vector<Row> rows;
  std::vector<std::string> left_out;
  const auto plans = plans_of(o, base, t);
  for (const Plan& wanted : plans) {
    const auto plan = complete(g, wanted);
    const auto training = plan ? lower(g, executable(*plan)) : Feasible<Program>(Infeasible{plan.reason()});
    if (!training) {
      if (plans.size() == 1) throw InputError("plan", training.reason());
      left_out.push_back(fmt::format("{}: {}", shape(wanted), training.reason()));
      continue;
    }
    for (const Startup form : {Startup::each, Startup::broadcast, Startup::sharded_read}) {
      const Program program = startup_program(*training, form);
      for (const auto& error : verify(program))
        throw InternalError("the start-up program is broken: " + error);
      SimulateOptions options;
      options.network = o.flags.sharing();
      Timeline timeline;
      try {
        timeline = simulate(program, network, options);
      } catch (const InputError& e) {
        if (e.place() != kStorage) throw;
        // An imported file says nothing of storage, and the other forms read none.
        if (std::find(left_out.begin(), left_out.end(), e.message()) == left_out.end())
          left_out.push_back(e.message());
        continue;
      }
      Row row;
      row.plan = shape(*plan);
      row.ranks = plan->ranks();
      row.form = form;
      row.predicted = timeline.step;
      for (const auto& [pair, bytes] : step_traffic(program, 0)) row.sent += bytes;
      for (const MemoryUse& use : timeline.memory) row.peak = std::max(row.peak, use.peak);
      for (std::size_t k = 0; k < t.profile_count(); ++k)
        row.fits = row.fits && row.peak <= t.profile(k).usable_memory;
      if (o.measure) {
        try {
          measure(o, g, program, *file, network, row);
        } catch (...) {  // what was measured is shown all the same
          if (!rows.empty()) show(o, g, t, rows, left_out);
          throw;
        }
        if (!row.equal || !row.difference.empty()) code = 1;
      }
      rows.push_back(std::move(row));
    }
  }
  show(o, g, t, rows, left_out);
}

}  // namespace

void add_startup(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(
      "startup", "time until every rank has its parameters: each, broadcast, sharded-read");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  o->flags.add_to(*c);
  o->flags.add_network(*c);
  c->add_flag("--measure", o->measure, "run it too, ranks as threads of this machine, in fp32");
  c->add_option("--repeats", o->repeats, "measured runs (default: 5); the median counts");
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o, &code] { run(*o, code); });
}

}  // namespace partita::cli
