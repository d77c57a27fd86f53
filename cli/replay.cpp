// `partita replay`: one rank of a large plan alone on one device, and the step it makes likely.
#include "validation/replay.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/unit_text.h"
#include "cli/backend.h"
#include "cli/commands.h"
#include "cli/crew.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/rows.h"
#include "report/report.h"
#include "runtime/execute/executor.h"
#include "simulator/lower/lower.h"
#include "simulator/search/placement.h"
#include "validation/compare.h"
#include "validation/rows.h"

namespace partita::cli {
namespace {

using Json = nlohmann::ordered_json;
constexpr std::uint64_t kSeed = 1;

struct Options {
  std::string model, topology, backend = "cpu", row, data;
  PlanFlags flags;
  std::int64_t rank = 0, steps = 5, warm_up = 2;
  std::optional<std::int64_t> micro_batches;
  bool json = false;
};
/// The plan and network: of the row, else of the flags.
using PublishedRow = std::optional<validation::RowRun>;

struct Lowered {
  Graph graph;
  Plan plan;
  Program program;
};

/// `layers`, `micro_batches`: of a part of it.
Lowered lowered(const Options& o, const PublishedRow& row, const Topology& topology,
                std::optional<std::int64_t> layers, std::optional<std::int64_t> micro_batches) {
  PlanFlags flags = o.flags;
  flags.layers = layers;
  Lowered l;
  Plan plan;
  if (row) {
    plan = row->row_case.plan;
    l.graph = validation::graph_of(row->row_case, layers);
  } else {
    plan = plan_from(flags, "partita");
    settle_ranks(plan, static_cast<std::int64_t>(topology.used_ranks()), topology.name());
    if (layers) plan.recompute.first = std::min(plan.recompute.first, *layers);
    l.graph = load_graph(o.model, flags, plan);
  }
  if (micro_batches) {
    if (auto whole = complete(l.graph, plan); whole && *micro_batches > whole->micro_batches())
      throw InputError("--micro-batches", fmt::format("{} is more than the {} of the plan",
                                                      *micro_batches, whole->micro_batches()));
    plan.global_batch = *micro_batches * plan.micro_batch * plan.dp;
  }
  auto complete_plan = complete(l.graph, plan);
  if (!complete_plan && micro_batches)
    throw InputError("--micro-batches",
                     fmt::format("{}: {}", *micro_batches, complete_plan.reason()));
  if (!complete_plan) throw InputError("plan", complete_plan.reason());
  l.plan = as_executed(*complete_plan);
  auto program = lower(l.graph, l.plan);
  if (!program) throw InputError("plan", program.reason());
  l.program = std::move(*program);
  return l;
}

/// Bytes that this machine or its GPU has left.
std::int64_t available(const Options& o) {
  if (o.backend != "cpu") return backend_gpu().free_bytes;
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) return std::atoll(line.c_str() + 13) * 1024;
  }
  return INT64_MAX;
}

/// The same without what kernels and libraries take and what lies between blocks: of a GPU 1 GiB
/// and a hundredth, of a machine, on which others work, a tenth.
std::int64_t room_of(const Options& o) {
  const std::int64_t all = available(o);
  if (o.backend == "cpu") return all / 10 * 9;
  return std::max<std::int64_t>(0, all - (std::int64_t{1} << 30) - all / 100);
}

/// The most layers below `layers` whose rank fits into `room`; 0: none.
std::int64_t layers_that_fit(const Options& o, const PublishedRow& row, const Topology& topology,
                             std::int64_t layers, std::int64_t room) {
  for (std::int64_t n = layers - 1; n >= 1; --n) {
    try {
      const Lowered l = lowered(o, row, topology, n, o.micro_batches);
      if (validation::memory_of_rank(l.program, topology, o.rank).peak.count <= room) return n;
    } catch (const InputError&) {  // stages that this number cannot be cut into
    }
  }
  return 0;
}

/// MODEL and TOPOLOGY with the flags of a plan, or a row that has all of them.
void check_source(const Options& o, const CLI::App& command) {
  if (o.row.empty()) {
    if (!o.data.empty()) throw InputError("--data", "is the table of a row; name it by --row");
    if (o.model.empty() || o.topology.empty())
      throw InputError(o.model.empty() ? "MODEL" : "TOPOLOGY",
                       "is required: a catalogue name or file; or a published row by --row");
    return;
  }
  for (const CLI::Option* option : command.get_options()) {
    static const std::set<std::string> own{"--help",    "--rank",          "--backend", "--steps",
                                           "--warm-up", "--row",           "--data",    "--json",
                                           "--layers",  "--micro-batches", "--network"};
    const std::string name = option->get_name();
    if (option->count() > 0 && own.count(name) == 0)
      throw InputError(name, "is the row's own; leave it out, or leave out --row");
  }
}

/// How its kernels were timed, and what that costs of a step.
std::string kernel_times_line(const RankMeasurement& m, std::int64_t recorded, std::int64_t all) {
  const auto more = [&](const std::vector<double>& steps) {
    return 100 * (validation::median(steps) / validation::median(m.plain_s) - 1);
  };
  const std::string marks = fmt::format("{:+.1f} % of a plain step", more(m.step_s));
  if (m.recorded_s.empty())
    return fmt::format("kernels timed between CUDA events ({}), as there are no records: {}", marks,
                       m.no_kernel_ns);
  return fmt::format(
      "{} of {} kernels timed by the GPU's own records ({:+.1f} %), the others between events ({})",
      recorded, all, more(m.recorded_s), marks);
}

void replay(const Options& o) {
  if (o.steps < 1 || o.steps > 100000)
    throw InputError("--steps", fmt::format("{} is not in 1 to 100,000", o.steps));
  if (o.warm_up < 0 || o.warm_up > 100000)
    throw InputError("--warm-up", fmt::format("{} is not in 0 to 100,000", o.warm_up));
  if (o.micro_batches && *o.micro_batches < 1)
    throw InputError("--micro-batches",
                     fmt::format("{} is too small; at least 1", *o.micro_batches));
  check_backend({o.backend});
  PublishedRow row;
  if (!o.row.empty()) {
    validation::RowsOptions rows;
    rows.workers = 1;
    row = validation::run_of_row(tables_of(o.data), o.row, validation::load_catalogue(), rows);
  }
  Topology topology =
      row ? load_topology(row->row_case.cluster.topology, row->row_case.cluster.edits)
          : load_cluster(o.topology);
  const Lowered whole = lowered(o, row, topology, std::nullopt, std::nullopt);
  const std::int64_t ranks = whole.program.ranks();
  if (o.rank < 0 || o.rank >= ranks)
    throw InputError("--rank", fmt::format("{} is not in 0 to {}: the plan has {} ranks", o.rank,
                                           ranks - 1, ranks));
  const bool routed = std::any_of(whole.program.buffers.begin(), whole.program.buffers.end(),
                                  [](const Buffer& b) { return b.routed; });
  topology = on_devices(topology, whole.plan);
  const std::int64_t all_layers = whole.graph.layers;
  std::optional<Lowered> fewer;
  if (o.flags.layers && *o.flags.layers > all_layers)
    throw InputError("--layers", fmt::format("{} is more than the {} layers of {}", *o.flags.layers,
                                             all_layers, whole.graph.name));
  const std::int64_t all_micro_batches = whole.plan.micro_batches();
  if ((o.flags.layers && *o.flags.layers != all_layers) ||
      (o.micro_batches && *o.micro_batches != all_micro_batches))
    fewer = lowered(o, row, topology, o.flags.layers, o.micro_batches);
  const Lowered& part = fewer ? *fewer : whole;
  const std::int64_t layers = part.graph.layers;
  const std::int64_t room = room_of(o);
  const Bytes needed = validation::memory_of_rank(part.program, topology, o.rank).peak;
  const Bytes whole_needs =
      fewer ? validation::memory_of_rank(whole.program, topology, o.rank).peak : needed;
  if (needed.count > room) {
    const std::int64_t fits = layers_that_fit(o, row, topology, layers, room);
    throw InputError(
        "--layers",
        fmt::format("rank {} needs {} for {} layers, {} more than this device has to give; {}",
                    o.rank, text(needed), layers, text(Bytes{needed.count - room}),
                    fits > 0 ? fmt::format("--layers {} fits", fits)
                    : row    ? "not even one layer fits: it takes a device with more memory"
                             : "not even one layer fits: use a smaller micro-batch or sequence"));
  }

  execute::Options run = generated(part.graph, kSeed);
  run.steps = static_cast<int>(o.steps);
  run.warm_up = static_cast<int>(o.warm_up);
  run.record = true;
  run.plain_steps = o.backend == "cuda" ? static_cast<int>(std::min<std::int64_t>(o.steps, 3)) : 0;
  run.recorded_steps = run.plain_steps;
  if (part.plan.launches.graphs && o.backend == "cuda") {
    run.captured_steps = std::max(1, run.plain_steps);
    run.warm_up = std::max(1, run.warm_up);
  }
  if (o.backend == "cuda") run.warm_up_s = 0.3;
  run.device = devices_of({o.backend, false, true, 1, 30, part.plan.precision.compute});
  std::optional<StateWatch> watch;
  if (o.backend == "cuda") watch.emplace();
  const auto result = execute::run_alone(part.program, static_cast<int>(o.rank), run);
  const cuda::GpuState conditions = watch ? watch->at_work() : cuda::GpuState{};
  SimulateOptions simulation;
  simulation.network = o.flags.sharing();
  const validation::Replayed r =
      validation::replayed(whole.program, part.program, topology, result.measured, simulation);
  const std::string model = row ? row->id : whole.graph.name;
  const std::string device = o.backend == "cpu" ? this_machine() : backend_version();
  if (o.json) {
    Json j;
    j["schema"] = "partita.replay/1";
    j["model"] = model;
    j["topology"] = topology.name();
    j["backend"] = o.backend;
    j["device"] = device;
    if (o.backend == "cuda") j["conditions"] = Json::parse(conditions_json(conditions));
    j["rank"] = o.rank;
    j["ranks"] = ranks;
    j["ranks_alike"] = r.ranks_alike;
    j["layers"] = layers;
    j["layers_of_model"] = all_layers;
    j["micro_batches"] = part.plan.micro_batches();
    j["micro_batches_of_plan"] = all_micro_batches;
    j["compute_s"] = {{"measured", r.compute_measured.count},
                      {"predicted", r.compute_predicted.count}};
    j["between_kernels_s"] = r.between.count;
    if (routed) j["routing"] = "balanced";
    j["not_run"] = r.not_run;
    j["kernels"] = r.kernels;
    j["kernels_recorded"] = r.recorded;
    if (!result.measured.no_kernel_ns.empty()) j["no_kernel_times"] = result.measured.no_kernel_ns;
    if (!result.measured.plain_s.empty())
      j["steps_s"] = {{"plain", validation::median(result.measured.plain_s)},
                      {"between_marks", validation::median(result.measured.step_s)}};
    if (!result.measured.captured_s.empty())
      j["steps_s"]["graph"] = validation::median(result.measured.captured_s);
    if (!result.no_graph.empty()) j["no_graph"] = result.no_graph;
    if (!result.measured.recorded_s.empty())
      j["steps_s"]["recorded"] = validation::median(result.measured.recorded_s);
    j["step_time_s"] = {{"replayed", r.step_replayed.count}, {"predicted", r.step_predicted.count}};
    if (row)
      j["published"] = {{"row", row->id},
                        {"family", row->family},
                        {"framework", row->framework},
                        {"device", topology.device(DeviceId{0}).name},
                        {"quantity", row->quantity},
                        {"step_s", row->published.count},
                        {"predicted_s", row->predicted.count},
                        {"assumed", row->row_case.assumed}};
    j["kinds"] = Json::array();
    for (const auto& k : r.kinds)
      j["kinds"].push_back({{"kind", k.kind},
                            {"count", k.count},
                            {"measured_s", k.measured.count},
                            {"predicted_s", k.predicted.count}});
    for (int m = 0; m < kCategoryCount; ++m) {
      const auto at = static_cast<std::size_t>(m);
      j["memory_bytes"][std::string(name(static_cast<Category>(m)))] = {
          {"measured", r.at_peak_measured[at].count}, {"predicted", r.at_peak_predicted[at].count}};
    }
    j["memory_bytes"]["total"] = {{"measured", r.peak_measured.count},
                                  {"predicted", r.peak_predicted.count}};
    j["memory_bytes"]["reserved"] = {{"measured", result.reserved.count}};
    if (result.beside.count > 0) j["memory_bytes"]["beside"] = {{"measured", result.beside.count}};
    j["whole_rank_bytes"] = {{"predicted", whole_needs.count}, {"room", room}};
    j["host_kernels"] = result.fallbacks;
    j["products"] = Json::parse(products_json(result.products));
    fmt::print("{}\n", j.dump(2));
    return;
  }
  fmt::print("rank {} of {} ({} alike) of {} on {}: {}\n", o.rank, ranks, r.ranks_alike, model,
             topology.name(), plan_line(whole.plan));
  fmt::print("alone on {}, {} steps\n", device, o.steps);
  if (const std::string at = conditions_line(conditions); !at.empty()) fmt::print("at {}\n", at);
  if (routed) fmt::print("experts get the same number of rows each, whatever routers choose\n");
  if (o.backend == "cuda")
    fmt::print("{}\n", kernel_times_line(result.measured, r.recorded, r.kernels));
  if (run.captured_steps > 0)
    fmt::print("{}\n",
               result.no_graph.empty()
                   ? fmt::format("a step as one CUDA graph: {}; kernel by kernel: {}",
                                 text(Seconds{validation::median(result.measured.captured_s)}),
                                 text(Seconds{validation::median(result.measured.plain_s)}))
                   : "a step is no CUDA graph: " + result.no_graph);
  if (layers != all_layers)
    fmt::print("of {} of {} layers: kernels' times are those, memory is theirs\n", layers,
               all_layers);
  if (part.plan.micro_batches() != all_micro_batches)
    fmt::print("of {} of {} micro-batches: kernels' times are those, memory is theirs\n",
               part.plan.micro_batches(), all_micro_batches);
  if (fewer)
    fmt::print("the whole rank needs {} (predicted), this device has {} to give: {}\n",
               text(whole_needs), text(Bytes{room}),
               whole_needs.count > room ? text(Bytes{whole_needs.count - room}) + " too little"
                                        : "it fits");
  if (!r.not_run.empty())
    fmt::print(
        "the rank's {} were not among them: the step has their predicted times; run more layers\n",
        fmt::join(r.not_run, ", "));
  const auto error = [](Seconds measured, Seconds predicted) {
    return 100 * (predicted.count - measured.count) / measured.count;
  };
  fmt::print("\nits kernels, measured    {}{}\n", text(r.compute_measured),
             r.between.count > 0
                 ? fmt::format(", {} of each between it and the next", text(r.between))
                 : "");
  fmt::print("its kernels, predicted   {} ({:+.1f} %)\n", text(r.compute_predicted),
             error(r.compute_measured, r.compute_predicted));
  fmt::print("step, replayed           {} ({} network)\n", text(r.step_replayed), o.flags.network);
  fmt::print("step, predicted          {} ({:+.1f} %)\n", text(r.step_predicted),
             error(r.step_replayed, r.step_predicted));
  if (row) {
    fmt::print("step, published          {} on {} ({}, {}: {})\n", text(row->published),
               topology.device(DeviceId{0}).name, row->framework, row->id, row->quantity);
    fmt::print("  replayed {:+.1f} % of it, predicted as its framework's {} ({:+.1f} %)\n",
               error(row->published, r.step_replayed), text(row->predicted),
               error(row->published, row->predicted));
  }
  fmt::print("\n");
  std::vector<std::vector<std::string>> rows{
      {"kernels of a step", "count", "measured", "predicted"}};
  for (const auto& k : r.kinds)
    rows.push_back({k.kind, std::to_string(k.count), text(k.measured), text(k.predicted)});
  fmt::print("{}\n", align(rows));
  rows = {{"peak memory", "measured", "predicted"}};
  for (int m = 0; m < kCategoryCount; ++m) {
    const auto at = static_cast<std::size_t>(m);
    rows.push_back({std::string(name(static_cast<Category>(m))), text(r.at_peak_measured[at]),
                    text(r.at_peak_predicted[at])});
  }
  rows.push_back({"total", text(r.peak_measured), text(r.peak_predicted)});
  if (result.beside.count > 0)
    rows.push_back({"libraries and workspaces beside", text(result.beside), "-"});
  fmt::print("{}", align(rows));
  if (!result.fallbacks.empty()) {
    rows = {{"the host's kernels", "calls"}};
    for (const auto& [kernel, calls] : result.fallbacks)
      rows.push_back({kernel, std::to_string(calls)});
    fmt::print("\n{}", align(rows));
  }
}

}  // namespace

void add_replay(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(
      "replay", "run one rank of a large plan alone on one device; its kernels' times, and memory");
  c->add_option("MODEL", o->model, "catalogue name or file");
  c->add_option("TOPOLOGY", o->topology, "cluster that the plan is for");
  o->flags.add_to(*c);
  o->flags.add_network(*c);
  c->add_option("--rank", o->rank, "which rank (default: 0)");
  c->add_option("--backend", o->backend, "cpu or cuda");
  c->add_option("--steps", o->steps, "timed steps");
  c->add_option("--warm-up", o->warm_up, "steps before these");
  c->add_option("--micro-batches", o->micro_batches,
                "run only so many of a step's micro-batches; their kernels' times are the others'");
  c->add_option("--row", o->row,
                "instead of MODEL, TOPOLOGY and plan: those of a published row, by its id; its "
                "step beside");
  c->add_option("--data", o->data,
                "its table, or their folder (default: PARTITA_REFERENCE, else "
                "../shared/reference)");
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o, c] {
    check_source(*o, *c);
    const StillAtIt lines(
        "a rank's program runs at its true shapes; fewer --layers, --micro-batches or --steps take "
        "less time");
    replay(*o);
  });
}

}  // namespace partita::cli
