#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/unit_text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"
#include "runtime/reference/compare.h"
#include "simulator/lower/lower.h"

namespace partita::cli {
namespace {

/// Multiply-accumulates per step that the interpreter does in about ten seconds.
constexpr double kMostWork = 2e8;

struct Options {
  std::string model, topology;
  PlanFlags flags;
  std::int64_t steps = 3, seed = 1;
  std::string optimizer;
  std::optional<double> learning_rate;
  bool json = false;
};

void run(const Options& o, int& code) {
  if (o.steps < 1 || o.steps > 100000)
    throw InputError("--steps", fmt::format("{} is not in 1 to 100,000", o.steps));
  if (o.seed < 0) throw InputError("--seed", fmt::format("{} is negative; at least 0", o.seed));
  Plan plan = plan_from(o.flags, "partita");
  if (o.flags.precision.empty() && !in_plan(o.flags, "precision")) set_precision(plan, "fp32", "");
  // The founding example trains by SGD with learning rate 0.01 and momentum 0.9.
  if (!in_plan(o.flags, "optimizer")) plan.optimizer.kind = OptimizerKind::sgd;
  if (!o.optimizer.empty())
    set_key(plan, "optimizer", fmt::format("{{kind: {}}}", o.optimizer), "--optimizer");
  if (o.learning_rate) {
    if (!(*o.learning_rate >= 0 && *o.learning_rate <= 1e6))  // also refuses nan
      throw InputError("--learning-rate", fmt::format("{} is not in 0 to 1e6", *o.learning_rate));
    plan.optimizer.learning_rate = *o.learning_rate;
  }
  if (!o.topology.empty()) {
    const Topology t = load_cluster(o.topology);
    settle_ranks(plan, static_cast<std::int64_t>(t.used_ranks()), t.name());
  } else if (plan.dp == 0) {
    plan.dp = 1;
  }
  // One by one first: the product of huge numbers would not fit its type.
  constexpr std::int64_t kMostRanks = 256;
  if (std::max({plan.tp, plan.pp, plan.cp, plan.dp}) > kMostRanks || plan.ranks() > kMostRanks) {
    throw InputError("--dp, --tp, --pp, --cp",
                     fmt::format("dp {} x tp {} x pp {} x cp {} is more than the {} ranks that the "
                                 "reference interpreter takes; use smaller sizes",
                                 plan.dp, plan.tp, plan.pp, plan.cp, kMostRanks));
  }
  const Graph g = load_graph(o.model, o.flags, plan);
  if (plan.global_batch == 0 && g.name == "mnist-linear" && 128 % plan.dp == 0 &&
      !o.flags.micro_batch && !in_plan(o.flags, "micro_batch")) {
    plan.micro_batch = 128 / plan.dp;  // its batch is 128
  }
  auto complete_plan = complete(g, plan);
  if (!complete_plan) throw InputError("plan", complete_plan.reason());
  auto program = lower(g, executable(*complete_plan));
  if (!program) throw InputError("plan", program.reason());
  const double work = reference::serial_work(g, *program);
  if (work > kMostWork) {
    throw InputError(
        "MODEL",
        fmt::format("a step of {} at this batch is {:.2g} multiply-accumulates; the reference "
                    "interpreter is for networks up to {:.0g}: use --layers, --seq, "
                    "--vocabulary or a smaller batch",
                    g.name, work, kMostWork));
  }
  for (const auto& error : verify(*program))
    throw InternalError("the lowered program is broken: " + error);
  const int groups = plan.strategy == "replicas" ? 1 : static_cast<int>(plan.dp);
  const int steps = static_cast<int>(o.steps);
  const auto seed = static_cast<std::uint64_t>(o.seed);
  auto options = reference::options_for(g, *program, steps, seed);
  const auto serial = reference::train_serially(g, *program, options, groups);
  const auto c =
      reference::compare(g, reference::interpret(*program, options), serial,
                         reference::tolerance_in_double(steps), reference::RelativeTo::tensor);
  if (!c.equal) code = 1;
  // The same once more with every value rounded to its type: what the plan's precision costs.
  options.round = true;
  const auto rounded = reference::compare(g, reference::interpret(*program, options), serial, 0);
  if (o.json) {
    nlohmann::ordered_json j;
    j["schema"] = "partita.reference/1";
    j["model"] = g.name;
    j["ranks"] = complete_plan->ranks();
    j["equal_to_reference"] = c.equal;
    j["loss"] = nlohmann::ordered_json::array();
    j["serial_loss"] = nlohmann::ordered_json::array();
    for (const auto& s : c.steps)
      j["loss"].push_back(s.plan_loss), j["serial_loss"].push_back(s.serial_loss);
    j["gradient_error"] = c.gradient_error;
    j["parameter_error"] = c.parameter_error;
    j["tolerance"] = c.tolerance;
    auto& in = j["in_precision"];
    in["precision"] = plan.precision_name;
    in["loss"] = nlohmann::ordered_json::array();
    for (const auto& s : rounded.steps) in["loss"].push_back(s.plan_loss);
    in["gradient_error"] = rounded.gradient_error;
    in["parameter_error"] = rounded.parameter_error;
    fmt::print("{}\n", j.dump(2));
    return;
  }
  fmt::print("{} on {} ranks: {}\n\n", g.name, complete_plan->ranks(), plan_line(*complete_plan));
  std::vector<std::vector<std::string>> rows{{"step", "loss", "serial loss", "difference"}};
  for (std::size_t k = 0; k < c.steps.size(); ++k) {
    const auto& s = c.steps[k];
    rows.push_back({std::to_string(k), fmt::format("{:.12g}", s.plan_loss),
                    fmt::format("{:.12g}", s.serial_loss),
                    fmt::format("{:.1e}", s.plan_loss - s.serial_loss)});
  }
  fmt::print("{}\n", align(rows));
  fmt::print("largest relative difference of a gradient   {:.1e}  ({})\n", c.gradient_error,
             c.worst_gradient);
  fmt::print("largest relative difference of a parameter  {:.1e}  ({})\n", c.parameter_error,
             c.worst_parameter);
  fmt::print("{} to the serial network within {:.0e}\n", c.equal ? "equal" : "NOT EQUAL",
             c.tolerance);
  fmt::print("rounded to {}: last loss {:.7g}, gradients within {:.1e}, parameters within {:.1e}\n",
             plan.precision_name, rounded.steps.back().plan_loss, rounded.gradient_error,
             rounded.parameter_error);
}

}  // namespace

void add_reference(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("reference",
                                   "train a small network under a plan beside the serial network");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology,
                "takes the number of ranks from it; without it the plan says");
  o->flags.add_to(*c);
  c->add_option("--steps", o->steps, "training steps");
  c->add_option("--seed", o->seed, "of parameters and data");
  c->add_option("--optimizer", o->optimizer, "sgd or adam");
  c->add_option("--learning-rate", o->learning_rate, "learning rate");
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o, &code] { run(*o, code); });
}

}  // namespace partita::cli
