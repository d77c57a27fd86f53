#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/unit_text.h"
#include "base/yaml.h"
#include "cli/cluster_flags.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"
#include "validation/fit_rows.h"
#include "validation/profiled.h"
#include "validation/row_text.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;
using validation::ProfiledStep;
using validation::TermRow;

struct Options {
  std::string model, topology, measured;
  PlanFlags flags;
  ClusterFlags cluster;
  std::optional<std::int64_t> device, rank;
  bool json = false;
};

struct Comparison {
  validation::ProfilerTrace trace;
  ProfiledStep measured;
  Prediction predicted;
  std::optional<std::int64_t> rank;  ///< whose terms stand beside; none: of one that ends last
  std::vector<TermRow> rows;
  std::vector<std::string> assumed;
  std::string device;  ///< of the topology
  /// The trace names a GPU of another generation: "a100-sxm-80gb" is none of "NVIDIA H100 ...".
  bool another_gpu() const {
    const std::string generation = device.substr(0, device.find('-'));
    const std::string gpu = " " + validation::lower(trace.gpu);  // a GB200 is no B200
    return !trace.gpu.empty() && gpu.find(" " + generation) == std::string::npos;
  }
  Seconds step() const { return Seconds{static_cast<double>(measured.ns) / 1e9}; }
  /// (predicted - measured) over the measured step.
  double part(std::optional<Seconds> predicted_, std::optional<Seconds> measured_) const {
    return (predicted_.value_or(Seconds{}).count - measured_.value_or(Seconds{}).count) /
           step().count;
  }
};

Json optional(const std::optional<Seconds>& t) { return t ? Json(t->count) : Json(nullptr); }

std::string json_of(const Graph& g, const Topology& t, const Comparison& c) {
  const auto seconds = [](std::int64_t ns) { return static_cast<double>(ns) / 1e9; };
  Json j;
  j["schema"] = "partita.comparison/1";
  j["model"] = g.name;
  j["topology"] = t.name();
  j["trace"] = c.trace.file;
  j["device"] = c.trace.device;
  j["gpu"] = c.trace.gpu.empty() ? Json(nullptr) : Json(c.trace.gpu);
  j["rank"] = c.rank ? Json(*c.rank) : Json(nullptr);
  j["steps"] = c.measured.steps;
  j["steps_of_gpu"] = c.trace.steps_of_gpu;
  j["later"] = c.measured.later;
  j["measured_s"] = c.step().count;
  j["measured_range_s"] = c.measured.steps > 0
                              ? Json{seconds(c.measured.low), seconds(c.measured.high)}
                              : Json(nullptr);
  j["predicted_s"] = c.predicted.step_time.count;
  j["interval_s"] = c.predicted.interval ? Json{c.predicted.interval->first.count,
                                                c.predicted.interval->second.count}
                                         : Json(nullptr);
  j["error"] = c.part(c.predicted.step_time, c.step());
  j["groups"] = Json::array();
  j["terms"] = Json::array();
  for (const TermRow& r : c.rows) {
    Json row;
    row["group"] = std::string(name(r.group));
    if (!r.kind.empty()) row["kind"] = r.kind;
    row["measured_s"] = optional(r.measured);
    row["predicted_s"] = optional(r.predicted);
    row["kernel_s"] = optional(r.kernels);
    row["of_step"] = c.part(r.predicted, r.measured);
    j[r.kind.empty() ? "groups" : "terms"].push_back(row);
  }
  j["unknown"] = Json::array();
  for (const auto& u : c.measured.unknown)
    j["unknown"].push_back({{"name", u.name}, {"kernels", u.count}, {"kernel_s", seconds(u.ns)}});
  j["assumed"] = c.assumed;
  return j.dump(2) + "\n";
}

std::string table(const Graph& g, const Topology& t, const Comparison& c) {
  const auto percent = [](double x) { return fmt::format("{:+.1f} %", 100 * x); };
  const auto time = [](const std::optional<Seconds>& x) { return x ? text(*x) : std::string("-"); };
  std::string out = fmt::format("{} on {} devices of {}, {}, {}, global batch {}\n{}\n", g.name,
                                c.predicted.devices, t.name(), c.predicted.plan.precision_name,
                                c.predicted.plan.framework, c.predicted.plan.global_batch,
                                plan_line(c.predicted.plan));
  if (!c.assumed.empty()) out += fmt::format("assumed: {}\n", fmt::join(c.assumed, ", "));
  out += fmt::format(
      "{}, device {}, {}: ", c.trace.file, c.trace.device,
      c.rank ? fmt::format("rank {}", *c.rank) : std::string("beside the rank that ends last"));
  out += c.measured.steps == 0
             ? std::string("no ProfilerStep marks: the whole trace\n\n")
             : fmt::format("the median of {} steps{}, {} to {}\n\n", c.measured.steps,
                           c.trace.steps_of_gpu ? " as the GPU ran them" : "",
                           text(Seconds{static_cast<double>(c.measured.low) / 1e9}),
                           text(Seconds{static_cast<double>(c.measured.high) / 1e9}));
  std::vector<std::vector<std::string>> rows{
      {"", "measured", "predicted", "of step", "kernels"},
      {"step", text(c.step()), text(c.predicted.step_time),
       percent(c.part(c.predicted.step_time, c.step())), ""}};
  for (const TermRow& r : c.rows) {
    if (r.kind == name(r.group)) continue;  // the optimizer is a group of its own
    rows.push_back({r.kind.empty() ? std::string(name(r.group)) : "  " + r.kind, time(r.measured),
                    time(r.predicted), percent(c.part(r.predicted, r.measured)),
                    r.group == validation::TermGroup::idle ? "" : time(r.kernels)});
  }
  out += align(rows);
  if (c.another_gpu())
    out += fmt::format("\nthe trace is of {}, the topology has {}: name the topology that ran\n",
                       c.trace.gpu, c.device);
  constexpr double kLate = 0.2;
  if (c.measured.later > kLate)
    out += fmt::format(
        "\n{:.0f} % of the kernels' time is after the last ProfilerStep ended: the "
        "host was ahead, and the step is its own; record more steps, or let each "
        "wait for its loss\n",
        100 * c.measured.later);
  if (!c.trace.groups.empty() && !c.rank)
    out += "\ncommunication by collective: the trace does not say whose it is; --rank gives axes\n";
  if (!c.measured.unknown.empty()) {
    constexpr std::size_t kShown = 10, kLength = 72;
    std::vector<std::vector<std::string>> unknown{{"kernels of no known kind", "time", "number"}};
    for (std::size_t k = 0; k < std::min(kShown, c.measured.unknown.size()); ++k) {
      const auto& u = c.measured.unknown[k];
      unknown.push_back(
          {"  " + (u.name.size() > kLength ? u.name.substr(0, kLength - 3) + "..." : u.name),
           text(Seconds{static_cast<double>(u.ns) / 1e9}), grouped(u.count)});
    }
    if (c.measured.unknown.size() > kShown)
      unknown.push_back({fmt::format("  {} more", c.measured.unknown.size() - kShown), "", ""});
    out += "\n" + align(unknown);
  }
  return out;
}

}  // namespace

void add_compare(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(
      "compare", "a job's own profiler trace beside its prediction, term by term");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  c->add_option("--measured", o->measured,
                "trace of torch.profiler, of one rank (docs/compare.md)");
  c->add_option("--device", o->device, "whose kernels, where the trace has those of several");
  c->add_option("--rank", o->rank,
                "whose trace it is (default: as the trace says; else one that ends last)");
  o->flags.add_to(*c);
  o->flags.add_framework_defaults(*c);
  o->flags.add_network(*c);
  o->flags.add_profile(*c);
  o->flags.add_routing(*c);
  o->cluster.add_to(*c);
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o] {
    if (o->measured.empty())
      throw InputError("--measured", "is missing; name a trace that torch.profiler wrote");
    Comparison x;
    x.trace = validation::parse_profiler_trace(read_file(o->measured), o->measured, o->device);
    const Topology t = o->cluster.in_state(load_cluster(o->topology));
    Plan plan = plan_from(o->flags, "megatron-core");
    settle_ranks(plan, static_cast<std::int64_t>(t.used_ranks()), t.name());
    auto defaults = framework_defaults(o->flags, plan, o->model, t);
    const Graph g = load_graph(o->model, o->flags, plan);
    const RoutingSource routing =
        routing_source(o->flags.routing.empty() ? "balanced" : o->flags.routing, "--routing");
    const auto fitted = fit_of(o->flags);
    const auto* entry = fitted ? fitted->find(t, plan.framework) : nullptr;
    Communication communication(t);
    if (entry != nullptr) communication.set_adjustment(validation::adjustment_of(*entry));
    Timeline timeline;
    Program program;
    auto prediction =
        predict(g, plan, communication, &timeline, &program, false, &routing, o->flags.sharing());
    if (!prediction) throw InputError("plan", prediction.reason());
    if (fitted) validation::rest_on_fit(*prediction, entry, g, t, &routing);
    x.predicted = std::move(*prediction);
    if (x.trace.ranks && *x.trace.ranks != x.predicted.devices)
      throw InputError(o->measured,
                       fmt::format("is of a job of {} ranks, the plan of {}; give that job's plan "
                                   "and as many devices",
                                   *x.trace.ranks, x.predicted.devices));
    x.rank = o->rank ? o->rank : x.trace.rank;
    if (x.rank) {
      const auto ranks = static_cast<std::int64_t>(timeline.class_of_rank.size());
      if (*x.rank < 0 || *x.rank >= ranks)
        throw InputError(o->rank ? "--rank" : o->measured,
                         fmt::format("rank {} is none of the plan's; 0 to {}", *x.rank, ranks - 1));
      x.predicted.breakdown = timeline.breakdown[static_cast<std::size_t>(
          timeline.class_of_rank[static_cast<std::size_t>(*x.rank)])];
    }
    std::vector<validation::GroupAxes> axes;
    if (x.rank) axes = validation::axes_of(program, *x.rank, x.trace.groups);
    x.measured = validation::profiled_step(
        x.trace, validation::load_kernel_kinds(data_folder("validation/kernel_kinds.yaml")), axes);
    x.device = t.device(DeviceId{0}).name;
    x.assumed = assumptions(o->flags, x.predicted.plan, g);
    for (std::string& a : defaults) x.assumed.push_back(std::move(a));
    for (std::string& a : state_assumptions(t, x.predicted.network))
      x.assumed.push_back(std::move(a));
    x.rows = validation::compare_terms(x.measured, x.predicted.breakdown);
    const std::string out = o->json ? json_of(g, t, x) : table(g, t, x);
    std::fwrite(out.data(), 1, out.size(), stdout);
  });
}

}  // namespace partita::cli
