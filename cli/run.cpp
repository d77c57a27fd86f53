// `partita run`: trains under a plan on real ranks, beside its prediction and the serial network.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/temporary.h"
#include "base/unit_text.h"
#include "cli/backend.h"
#include "cli/commands.h"
#include "cli/device_memory.h"
#include "cli/fault.h"
#include "cli/launch.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "report/report.h"
#include "runtime/data/digits.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "runtime/transport/environment.h"
#include "runtime/transport/tcp.h"
#include "simulator/lower/lower.h"
#include "simulator/search/placement.h"
#include "validation/compare.h"
#include "validation/row_case.h"
#include "validation/traffic.h"
#ifdef PARTITA_MPI
#  include "runtime/transport/mpi.h"
#endif

namespace partita::cli {
namespace {

struct Options {
  std::string model, topology, backend = "cpu", transport, data, trace, optimizer, routing_out;
  PlanFlags flags;
  std::optional<std::int64_t> ranks;
  std::int64_t steps = 50, warm_up = 0, seed = 1;
  std::optional<double> learning_rate;
  double timeout_s = 10, rendezvous_s = 30;
  bool json = false, no_check = false, share_gpu = false;
};

BackendOptions backend_of(const Options& o, std::int64_t ranks, const std::string& transport,
                          ElementType compute = ElementType::fp32) {
  return {o.backend,   o.share_gpu, transport == "threads", static_cast<int>(ranks),
          o.timeout_s, compute};
}

/// Multiply-accumulates of all steps that the serial network is run for.
constexpr double kMostSerialWork = 1e9;
constexpr std::int64_t kMostRanks = 256;

#ifdef PARTITA_MPI
constexpr bool kMpi = true;
#else
constexpr bool kMpi = false;
#endif

const char* variable(const char* name) { return std::getenv(name); }

/// How this process takes part.
struct Mode {
  std::string transport;
  bool launches = false;  ///< it is no rank itself
  Launcher launcher;      ///< whose rank it is
  std::string note;       ///< where the user did not choose
};

Mode mode_of(const Options& o, std::int64_t ranks) {
  const std::string& wish = o.transport;
  if (!wish.empty() && wish != "threads" && wish != "mpi" && wish != "tcp")
    throw InputError("--transport", fmt::format("'{}' is unknown; use threads, mpi or tcp", wish));
  if (wish == "mpi" && !kMpi)
    throw InputError("--transport",
                     "this build has no MPI; install libopenmpi-dev and build again, "
                     "or use tcp or threads");
  if (wish == "threads") return {"threads", false, {}, ""};
  const Launcher l = launcher_of(variable, kMpi);
  if (l.kind == Launcher::Kind::mpi) {
    if (wish == "tcp")
      throw InputError("--transport",
                       fmt::format("is tcp, but {} is set, so an MPI launcher started this "
                                   "process; use mpi, or unset it",
                                   l.what));
    return {"mpi", false, l, ""};
  }
  if (l.kind == Launcher::Kind::tcp) {
    if (wish == "mpi")
      throw InputError("--transport",
                       fmt::format("is mpi, but by {} another launcher started this process; use "
                                   "tcp, or unset them",
                                   l.what));
    if (l.size != ranks)
      throw InputError("--ranks",
                       fmt::format("the plan has {}, but by {} {} were started; start as many, or "
                                   "change the plan",
                                   ranks, l.what, l.size));
    return {"tcp", false, l, ""};
  }
  if (wish == "tcp") return {"tcp", ranks > 1, {}, ""};
  if (kMpi && (wish == "mpi" || (ranks > 1 && on_path("mpirun")))) return {"mpi", true, {}, ""};
  // A node that was brought the command alone.
  if (kMpi && ranks > 1)
    return {"tcp", true, {}, "there is no mpirun on the PATH: ranks talk over sockets"};
  return {"threads", false, {}, ranks > 1 ? "this build has no MPI: ranks are threads" : ""};
}

/// What every rank needs to know of the run.
struct Job {
  Plan plan;
  Graph graph;
  Program program;
  execute::Options options;
  reference::RunOptions serial;
  std::optional<Topology> topology;  ///< that the prediction is for
  std::string predicted_for;         ///< what the user should know of it
  std::string no_graphs;    ///< of the plan's CUDA graphs; empty: they are asked for or not
  RoutingSource routing;    ///< that the prediction is for, unless fed back
  bool feeds_back = false;  ///< the prediction is for the last step's rows
  std::string data;
  int groups = 1;
  cuda::GpuState conditions;  ///< of the first rank's GPU, while it ran
};

/// The catalogue's cluster of this machine's GPUs; "", and `note` says so, where it has none.
std::string cluster_of_gpus(std::int64_t ranks, std::string& note) {
  const std::string gpu = backend_gpu_name();
  try {
    std::vector<std::string> assumed;
    return validation::cluster_of(validation::load_catalogue(), gpu, "", ranks, std::nullopt, "",
                                  "", assumed)
        .topology;
  } catch (const InputError&) {
    note = fmt::format(
        "predicted for cpu-host, as no cluster of the catalogue has {}; name one by --topology, or "
        "measure this one with partita calibrate --backend cuda",
        gpu);
    return "";
  }
}

/// How many share a GPU, if --share-gpu lets them.
std::int64_t ranks_of_a_gpu(const Options& o, std::int64_t ranks) {
  return o.share_gpu ? ceil_div(ranks, std::int64_t{std::max(1, backend_gpu_count())}) : 1;
}

Job job_of(const Options& o) {
  if (o.steps < 1 || o.steps > 1'000'000)
    throw InputError("--steps", fmt::format("{} is not in 1 to 1,000,000", o.steps));
  if (o.warm_up < 0 || o.warm_up > 1'000'000)
    throw InputError("--warm-up", fmt::format("{} is not in 0 to 1,000,000", o.warm_up));
  if (o.seed < 0) throw InputError("--seed", fmt::format("{} is negative; at least 0", o.seed));
  if (!(o.timeout_s >= 0.1 && o.timeout_s <= 1e6))
    throw InputError("--timeout",
                     fmt::format("{} is not a number of seconds in 0.1 to 1e6", o.timeout_s));
  if (!(o.rendezvous_s > 0 && o.rendezvous_s <= 1e6))
    throw InputError(
        "--rendezvous-timeout",
        fmt::format("{} is no number of seconds above 0 and up to 1e6", o.rendezvous_s));
  check_backend(backend_of(o, 1, ""));
  Job job;
  Plan plan = plan_from(o.flags, "partita");
  if (o.flags.precision.empty() && !in_plan(o.flags, "precision")) set_precision(plan, "fp32", "");
  if (!in_plan(o.flags, "optimizer")) plan.optimizer.kind = OptimizerKind::sgd;
  if (!o.optimizer.empty())
    set_key(plan, "optimizer", fmt::format("{{kind: {}}}", o.optimizer), "--optimizer");
  if (o.learning_rate) {
    if (!(*o.learning_rate >= 0 && *o.learning_rate <= 1e6))
      throw InputError("--learning-rate", fmt::format("{} is not in 0 to 1e6", *o.learning_rate));
    plan.optimizer.learning_rate = *o.learning_rate;
  }
  if (o.ranks) {
    if (*o.ranks < 1 || *o.ranks > kMostRanks)
      throw InputError("--ranks", fmt::format("{} is not in 1 to {}", *o.ranks, kMostRanks));
    settle_ranks(plan, *o.ranks, fmt::format("--ranks {}", *o.ranks));
  } else if (plan.dp == 0) {
    plan.dp = 1;
  }
  if (std::max({plan.tp, plan.pp, plan.cp, plan.dp}) > kMostRanks || plan.ranks() > kMostRanks)
    throw InputError(
        "--ranks",
        fmt::format("a run has at most {} ranks on one host; use smaller sizes", kMostRanks));
  job.graph = load_graph(o.model, o.flags, plan);
  const bool digits = job.graph.name == "mnist-linear";
  if (plan.global_batch == 0 && digits && 128 % plan.dp == 0 && !o.flags.micro_batch &&
      !in_plan(o.flags, "micro_batch")) {
    plan.micro_batch = 128 / plan.dp;  // the founding example's batch
  }
  if (!o.data.empty() && !digits)
    throw InputError("--data",
                     fmt::format("is for mnist-linear; {} trains on generated values: leave it "
                                 "out",
                                 job.graph.name));
  auto complete_plan = complete(job.graph, plan);
  if (!complete_plan) throw InputError("plan", complete_plan.reason());
  job.plan = as_executed(*complete_plan);
  if (const Launches& l = complete_plan->launches; l.graphs && o.backend == "cpu") {
    job.no_graphs = "CUDA graphs are of --backend cuda: launch.graphs says nothing here";
    job.plan.launches.graphs = false;
  } else if (l.graphs_beside_experts || !l.graphs_of.empty()) {
    job.no_graphs =
        "CUDA graphs of parts of a step are not captured, nor predicted here; launch.graphs has "
        "the "
        "whole";
  }
  auto program = lower(job.graph, job.plan);
  if (!program) throw InputError("plan", program.reason());
  job.program = std::move(*program);
  for (const auto& error : verify(job.program))
    throw InternalError("the lowered program is broken: " + error);
  // What could be wrong is found before the run, not after it.
  const std::int64_t ranks = job.plan.ranks();
  const std::int64_t each = ranks_of_a_gpu(o, ranks), devices = ceil_div(ranks, each);
  std::string cluster = o.topology;
  if (cluster.empty() && o.backend == "cuda") cluster = cluster_of_gpus(devices, job.predicted_for);
  job.topology = load_cluster(cluster.empty() ? fmt::format("cpu-host:{} gpus", devices) : cluster);
  if (each > 1) {
    ClusterState shared = job.topology->state();
    shared.ranks_per_device = static_cast<int>(each);
    // Threads are one process, whose kernels run beside each other.
    shared.mps = o.transport == "threads";
    job.topology = job.topology->in_state(std::move(shared));
  }
  if (static_cast<std::int64_t>(job.topology->rank_count()) >= ranks)
    job.topology = on_devices(*job.topology, job.plan);
  if (static_cast<std::int64_t>(job.topology->rank_count()) < ranks)
    throw InputError("--topology",
                     fmt::format("{} has {} devices for {} ranks; use a larger one",
                                 job.topology->name(), job.topology->rank_count(), ranks));
  if (!o.topology.empty()) refuse_foreign(*job.topology, o.topology, "--topology");
  const bool routed = std::any_of(job.program.buffers.begin(), job.program.buffers.end(),
                                  [](const Buffer& b) { return b.routed; });
  if (!routed && !o.routing_out.empty())
    throw InputError("--routing-out",
                     fmt::format("{} routes nothing to experts; leave it out", job.graph.name));
  job.feeds_back = routed && o.flags.routing.empty();
  if (!o.flags.routing.empty()) {
    job.routing = routing_source(o.flags.routing, "--routing");
    with_routing(job.program, job.routing);
  }
  job.groups = job.plan.strategy == "replicas" ? 1 : static_cast<int>(job.plan.dp);
  return job;
}

/// Steps that are launched as CUDA graphs, between warm-up and those whose instructions are timed.
std::int64_t captured_steps(const Options& o, const Job& job) {
  return o.backend == "cuda" && job.plan.launches.graphs ? o.steps : 0;
}
/// What is captured has run before.
std::int64_t warm_up_steps(const Options& o, const Job& job) {
  return std::max<std::int64_t>(o.warm_up, captured_steps(o, job) > 0 ? 1 : 0);
}
std::int64_t all_steps(const Options& o, const Job& job) {
  return warm_up_steps(o, job) + captured_steps(o, job) + o.steps;
}

void fill_options(const Options& o, Job& job) {
  const auto seed = static_cast<std::uint64_t>(o.seed);
  const Graph& g = job.graph;
  reference::InputValue input = [&g, seed](std::size_t i, std::int64_t step, std::int64_t sample,
                                           std::int64_t index) {
    return reference::input_value(g, i, seed, step, sample, index);
  };
  job.data = "generated values";
  if (g.name == "mnist-linear") {
    auto set = std::make_shared<Digits>(o.data.empty() ? generated_digits(4096, seed)
                                                       : load_mnist(o.data));
    job.data = set->source;
    const std::int64_t batch = job.program.samples * job.program.micro_batches;
    const std::int64_t classes = g.tensor(g.inputs[1]).shape[1].extent;
    input = [set, batch, classes](std::size_t i, std::int64_t step, std::int64_t sample,
                                  std::int64_t index) {
      const std::int64_t at = (step * batch + sample) % set->count();
      if (i == 0) return set->pixels[static_cast<std::size_t>(at * 784 + index)] / 255.0;
      return set->labels[static_cast<std::size_t>(at)] % classes == index ? 1.0 : 0.0;
    };
  }
  job.options.steps = static_cast<int>(o.steps);
  job.options.warm_up = static_cast<int>(warm_up_steps(o, job));
  job.options.seed = seed;
  job.options.input = input;
  job.options.initial = [&g, seed](std::size_t replica, std::size_t q, std::int64_t linear) {
    return reference::initial_value(g.parameters[q], seed + replica, linear);
  };
  job.options.operator_seed = [seed](std::int32_t op) {
    return reference::operator_seed(seed, OpId{static_cast<std::size_t>(op)});
  };
  job.options.record = true;
  if (o.backend == "cuda")
    job.options.plain_steps = static_cast<int>(std::min<std::int64_t>(o.steps, 3));
  job.options.captured_steps = static_cast<int>(captured_steps(o, job));
  job.options.drawing = [progress = std::make_shared<SetupProgress>("rank 0 draws its parameters")](
                            int rank, std::int64_t drawn, std::int64_t all) {
    if (rank == 0) std::fputs(progress->at(drawn, all).c_str(), stderr);
  };
  job.options.routing = job.feeds_back || !o.routing_out.empty();
  job.options.collect = !o.no_check;
  job.serial.steps = static_cast<int>(all_steps(o, job));
  job.serial.seed = seed;
  job.serial.input = input;
  job.serial.operator_seed = job.options.operator_seed;
}

/// What is left of a run that did not end well.
struct Kept {
  std::vector<std::vector<double>> losses;  ///< by step and replica
  std::vector<double> slowest_s;
};

/// Steps whose loss is shown: few, further and further apart.
std::vector<std::size_t> shown(std::size_t steps) {
  std::vector<std::size_t> list;
  for (const std::size_t k :
       std::initializer_list<std::size_t>{0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000}) {
    if (k + 1 < steps) list.push_back(k);
  }
  list.push_back(steps - 1);
  return list;
}

using Json = nlohmann::ordered_json;

Json traffic_json(const Traffic& t) {
  Json j;
  j["bytes_to"] = Json::object();
  for (const auto& [to, bytes] : t.bytes_to) {
    if (bytes > 0) j["bytes_to"][std::to_string(to)] = bytes;
  }
  j["sends"] = t.sends;
  j["send_bytes"] = t.send_bytes;
  j["collectives"] = Json::object();
  for (const auto& [kind, c] : t.collectives)
    j["collectives"][std::string(name(kind))] = {{"calls", c.calls},
                                                 {"payload_bytes", c.payload_bytes}};
  return j;
}

/// The steps that were completed before a rank failed.
void report_incomplete(const Options& o, const Job& job, const Kept& kept,
                       const std::string& transport, const std::string& reason) {
  const std::int64_t all = all_steps(o, job);
  if (o.json) {
    Json j;
    j["schema"] = "partita.run/1";
    j["complete"] = false;
    j["reason"] = reason;
    j["model"] = job.graph.name;
    j["ranks"] = job.plan.ranks();
    j["backend"] = o.backend;
    j["transport"] = transport;
    j["data"] = job.data;
    j["steps"] = all;
    j["loss"] = Json::array();
    for (const auto& l : kept.losses) j["loss"].push_back(l[0]);
    j["step_s"] = kept.slowest_s;
    fmt::print("{}\n", j.dump(2));
    return;
  }
  if (kept.losses.empty()) return;
  fmt::print("{} on {} ranks ({}, {}): {}\n", job.graph.name, job.plan.ranks(), o.backend,
             transport, plan_line(job.plan));
  fmt::print("INCOMPLETE: {} of {} steps\n\n", kept.losses.size(), all);
  std::vector<std::vector<std::string>> rows{{"step", "loss", "time"}};
  for (const std::size_t k : shown(kept.losses.size()))
    rows.push_back({std::to_string(k), fmt::format("{:.7g}", kept.losses[k][0]),
                    text(Seconds{kept.slowest_s[k]})});
  fmt::print("{}", align(rows));
}

/// A step that was not one graph.
Seconds kernel_by_kernel(std::vector<RankMeasurement> ranks) {
  for (RankMeasurement& r : ranks) r.captured_s.clear();
  return Seconds{validation::median(validation::step_times(ranks))};
}

/// Where rounding alone may change a value by as much as itself nothing is shown by a difference.
bool undecided(const reference::Comparison& c) { return c.equal && c.tolerance >= 1; }

void report(const Options& o, const Job& job, const execute::RankResult& first,
            const std::string& transport, const std::string& note, int& code) {
  // The serial network: what the run's loss must equal.
  std::optional<reference::Comparison> c;
  const double work = reference::serial_work(job.graph, job.program) *
                      static_cast<double>(job.serial.steps) *
                      static_cast<double>(job.program.mesh.size(job.program.replicas));
  if (!o.no_check && work <= kMostSerialWork) {
    reference::RunOptions serial = job.serial;
    for (std::int64_t r = 0; r < job.program.mesh.size(job.program.replicas); ++r)
      serial.parameters.push_back(reference::initial_parameters(
          job.graph, job.options.seed + static_cast<std::uint64_t>(r)));
    const auto expected = reference::train_serially(job.graph, job.program, serial, job.groups);
    c = reference::compare_in_own_types(job.graph, job.program, first.values, expected, serial);
    if (!c->equal) code = 1;
  }
  const auto ranks = static_cast<std::int64_t>(first.ranks.size());
  const Topology& topology = *job.topology;
  Communication communication(topology);
  SimulateOptions simulation;
  simulation.record = true;
  simulation.network = o.flags.sharing();
  Routing recorded = first.routing;
  recorded.model = job.graph.name;
  RoutingSource routing = job.routing;
  if (job.feeds_back) routing.recorded = recorded;
  // The original blocks keep their numbers in it, so measurements are looked up in it as well.
  const Program program = with_routing(job.program, routing);
  const Timeline predicted = simulate(program, communication, simulation);
  const auto step = validation::compare(program, predicted, first.ranks);
  if (!o.routing_out.empty()) write_text("--routing-out", o.routing_out, to_json(recorded));
  // After the figures: a disk that it fills must not cost them.
  const auto trace = [&] {
    std::fflush(stdout);
    if (!o.trace.empty())
      write_trace(o.trace, job.program, validation::measured_timeline(job.program, first.ranks));
  };

  std::vector<Bytes> peaks;
  for (const MemoryUse& use : predicted.memory) peaks.push_back(use.peak);
  const auto on_device =
      device_memory(program, communication, predicted.classes, peaks, first.ranks);

  const auto& losses = first.values.losses;
  if (o.json) {
    Json j;
    j["schema"] = "partita.run/1";
    j["complete"] = true;
    j["model"] = job.graph.name;
    j["ranks"] = ranks;
    j["backend"] = o.backend;
    j["transport"] = transport;
    j["data"] = job.data;
    j["loss"] = Json::array();
    for (const auto& l : losses) j["loss"].push_back(l[0]);
    j["serial_loss"] = c ? Json::array() : Json(nullptr);
    j["equal_to_serial"] = c && !undecided(*c) ? Json(c->equal) : Json(nullptr);
    if (c) {
      for (const auto& s : c->steps) j["serial_loss"].push_back(s.serial_loss);
      j["loss_error"] = c->loss_error;
      j["gradient_error"] = c->gradient_error;
      j["parameter_error"] = c->parameter_error;
      j["tolerance"] = c->tolerance;
    }
    j["measured_s"] = step.measured.count;
    j["measured_quartiles_s"] = {step.low.count, step.high.count};
    j["noise"] = step.noise;
    if (captured_steps(o, job) > 0) {
      j["graph"] = {{"steps", first.no_graph.empty() ? captured_steps(o, job) : 0},
                    {"kernel_by_kernel_s", kernel_by_kernel(first.ranks).count}};
      if (!first.no_graph.empty()) j["graph"]["why_not"] = first.no_graph;
    }
    j["predicted_s"] = step.predicted.count;
    double uncertainty = 0;
    for (const auto& r : first.ranks) uncertainty = std::max(uncertainty, r.clock_uncertainty_s);
    j["clock_uncertainty_s"] = uncertainty;
    if (!program.routings.empty() || !o.flags.routing.empty())
      j["routing"] = job.feeds_back ? "last step" : o.flags.routing;
    j["kinds"] = Json::array();
    for (const auto& k : step.kinds)
      j["kinds"].push_back({{"kind", k.kind},
                            {"count_per_rank", k.count},
                            {"measured_s", k.measured.count},
                            {"predicted_s", k.predicted.count}});
    for (int m = 0; m < kCategoryCount; ++m) {
      const auto at = static_cast<std::size_t>(m);
      j["memory_bytes"][std::string(name(static_cast<Category>(m)))] = {
          {"measured", step.measured_memory[at].count},
          {"predicted", step.predicted_memory[at].count}};
    }
    j["memory_bytes"]["total"] = {{"measured", step.measured_peak.count},
                                  {"predicted", step.predicted_peak.count}};
    const auto counted = validation::predicted_traffic(job.program, all_steps(o, job) - 1,
                                                       transport != "mpi" && o.backend == "cpu");
    if (o.backend != "cpu") {
      j["device"] = backend_version();
      j["conditions"] = Json::parse(conditions_json(job.conditions));
      j["memory_bytes"]["reserved"] = {{"measured", first.reserved.count}};
      if (first.beside.count > 0) j["memory_bytes"]["beside"] = {{"measured", first.beside.count}};
      for (const DeviceMemoryRow& row : on_device)
        j["device_memory_bytes"][row.part] = {{"measured", row.measured.count},
                                              {"predicted", row.predicted.count}};
      j["host_kernels"] = first.fallbacks;
      j["products"] = Json::parse(products_json(first.products));
      if (!first.no_links.empty()) j["no_links"] = first.no_links;
    }
    j["traffic"] = Json::array();
    for (std::size_t r = 0; r < first.ranks.size(); ++r)
      j["traffic"].push_back(
          {{"rank", r},
           {"measured", traffic_json(first.ranks[r].traffic)},
           {"predicted", counted ? traffic_json((*counted)[r]) : Json(nullptr)}});
    fmt::print("{}\n", j.dump(2));
    trace();
    return;
  }
  fmt::print("{} on {} ranks ({}, {}): {}\n", job.graph.name, ranks, o.backend, transport,
             plan_line(job.plan));
  if (!note.empty()) fmt::print("{}\n", note);
  fmt::print("data: {}\n\n", job.data);
  std::vector<std::vector<std::string>> rows{{"step", "loss"}};
  if (c) rows[0].insert(rows[0].end(), {"serial loss", "difference"});
  for (const std::size_t k : shown(losses.size())) {
    rows.push_back({std::to_string(k), fmt::format("{:.7g}", losses[k][0])});
    if (c) {
      rows.back().push_back(fmt::format("{:.7g}", c->steps[k].serial_loss));
      rows.back().push_back(fmt::format("{:.1e}", c->steps[k].plan_loss - c->steps[k].serial_loss));
    }
  }
  fmt::print("{}\n", align(rows));
  if (c && undecided(*c)) {
    fmt::print(
        "not decided whether equal to the serial network: rounding alone may change values by "
        "{:.1e} under this precision and plan; partita reference compares in double precision\n\n",
        c->tolerance);
  } else if (c) {
    fmt::print(
        "{} to the serial network: losses within {:.1e}, gradients {:.1e}, parameters {:.1e}; "
        "rounding "
        "allows {:.1e}\n\n",
        c->equal ? "equal" : "NOT EQUAL", c->loss_error, c->gradient_error, c->parameter_error,
        c->tolerance);
  } else {
    fmt::print(
        "not compared with the serial network: {}\n\n",
        o.no_check ? "--no-check" : "its steps would take too long; use fewer or smaller ones");
  }
  fmt::print("step time, measured   {} ({} to {}, noise {:.1f} %)\n", text(step.measured),
             text(step.low), text(step.high), 100 * step.noise);
  if (captured_steps(o, job) > 0)
    fmt::print("{}\n", first.no_graph.empty()
                           ? fmt::format("kernel by kernel      {}; as one CUDA graph above",
                                         text(kernel_by_kernel(first.ranks)))
                           : "not launched as a CUDA graph: " + first.no_graph);
  fmt::print("step time, predicted  {} for {} ({:+.0f} %)\n\n", text(step.predicted),
             topology.name(), 100 * step.error());
  if (job.feeds_back) fmt::print("predicted with the rows that experts got in the last step\n\n");
  rows = {{"per rank and step", "count", "measured", "predicted"}};
  for (const auto& k : step.kinds)
    rows.push_back({k.kind, fmt::format("{:.4g}", k.count), text(k.measured), text(k.predicted)});
  fmt::print("{}\n", align(rows));
  rows = {{"peak memory", "measured", "predicted"}};
  for (int m = 0; m < kCategoryCount; ++m) {
    const auto at = static_cast<std::size_t>(m);
    rows.push_back({std::string(name(static_cast<Category>(m))), text(step.measured_memory[at]),
                    text(step.predicted_memory[at])});
  }
  rows.push_back({"total", text(step.measured_peak), text(step.predicted_peak)});
  fmt::print("{}", align(rows));
  if (!on_device.empty()) {
    rows = {{"memory of the device", "measured", "predicted"}};
    for (const DeviceMemoryRow& row : on_device)
      rows.push_back({row.part, text(row.measured), text(row.predicted)});
    fmt::print("\n{}", align(rows));
  }
  if (const std::string at = conditions_line(job.conditions); !at.empty())
    fmt::print("\nthe first rank's GPU at {}\n", at);
  if (!first.no_links.empty()) note_no_links(first.no_links);
  if (!first.fallbacks.empty()) {
    rows = {{"the host's kernels, rank 0", "calls"}};
    for (const auto& [kernel, calls] : first.fallbacks)
      rows.push_back({kernel, std::to_string(calls)});
    fmt::print("\n{}", align(rows));
  }
  trace();
}

/// In words, what all ranks must agree on: a list of "name value;".
std::string key_of(const Options& o, const Job& job) {
  std::string key = fmt::format(
      "network {}; {} parameters; steps {}; warm-up {}; seed {}; data '{}'; check {}; {}; ",
      job.graph.name, job.graph.parameters.size(), o.steps, o.warm_up, o.seed, o.data, !o.no_check,
      plan_line(job.plan));
  for (const char c : to_yaml(job.plan)) key += c == '\n' ? std::string("; ") : std::string(1, c);
  std::size_t instructions = 0;
  for (const Block& b : job.program.blocks) instructions += b.instructions.size();
  return key + fmt::format("routing {}; instructions {};", job.options.routing, instructions);
}

/// All ranks are on this machine: what they will hold at once must fit, which is known before
/// anything is drawn or read.
void check_memory(const Options& o, const Job& job) {
  Communication communication(*job.topology);
  SimulateOptions memory_only;
  memory_only.memory_limit = Bytes{0};
  const Timeline t = simulate(job.program, communication, memory_only);
  if (o.backend == "cuda") {
    const Gpu gpu = backend_gpu();
    const std::int64_t ranks = job.plan.ranks(), each = (ranks + gpu.count - 1) / gpu.count;
    Bytes most{0};
    for (const MemoryUse& use : t.memory) most = std::max(most, use.peak);
    if (each * most.count <= gpu.free_bytes) return;
    throw InputError(
        "MODEL",
        fmt::format("{} under this plan needs {} on {}; it has {} left: use --layers, --seq, "
                    "--vocabulary, a smaller batch or more sharding",
                    job.graph.name, text(Bytes{each * most.count}),
                    each > 1 ? fmt::format("a GPU that {} ranks share", each) : "a GPU",
                    text(Bytes{gpu.free_bytes})));
  }
  Bytes needed{0};
  for (std::size_t c = 0; c < t.classes.size(); ++c)
    needed += Bytes{t.classes[c].count * (t.memory[c].peak + t.memory[c].host_peak).count};
  std::ifstream in("/proc/meminfo");
  std::int64_t kib = -1;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) kib = std::atoll(line.c_str() + 13);
  }
  if (kib < 0 || needed.count <= kib * 1024) return;
  throw InputError(
      "MODEL",
      fmt::format("{} under this plan needs {} on its {} ranks together; this machine "
                  "has {} left: use --layers, --seq, --vocabulary or a smaller batch",
                  job.graph.name, text(needed), job.plan.ranks(), text(Bytes{kib * 1024})));
}

/// Starts the ranks and waits for them. Each does for itself what took `prepared_s` here.
void launch(const Options& o, const Job& job, const Mode& mode, const Describe& describe,
            double prepared_s, int& code) {
  // Mistakes in files are found here once, not by every rank.
  if (!o.data.empty()) load_mnist(o.data);
  const auto replicas = static_cast<int>(job.program.mesh.size(job.program.replicas));
  const auto board = Board::create(static_cast<int>(job.plan.ranks()), all_steps(o, job), replicas);
  Patience patience;
  patience.longer = "--rendezvous-timeout";
  // All at once, on however few cores.
  patience.start_s = o.rendezvous_s + 4 * prepared_s * static_cast<double>(job.plan.ranks());
  patience.stopped_s = std::min(patience.stopped_s, o.timeout_s + 4);
  const Launched l = mode.transport == "mpi" ? launch_mpi(*board, describe, patience)
                                             : launch_tcp(*board, describe, patience);
  code = l.code;
  if (code == 0 || l.reason.empty()) return;
  if (code == 2) throw InputError("", l.reason);
  if (!l.output.empty()) {
    fmt::print("{}", l.output);
    std::fflush(stdout);
    std::fputs(("partita: " + l.reason + "\n").c_str(), stderr);
    return;
  }
  Kept kept;
  for (std::int64_t s = 0; s < board->steps_done(); ++s) {
    kept.losses.push_back(board->losses(s));
    kept.slowest_s.push_back(board->seconds(s));
  }
  report_incomplete(o, job, kept, mode.transport, l.reason);
  std::fputs(("partita: " + l.reason + "\n").c_str(), stderr);
}

void run(const Options& o, int& code) {
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::pair<std::string, std::string>> others{{"--plan", o.flags.file},
                                                          {"MODEL", o.model}};
  check_writable("--trace", o.trace, others);
  others.emplace_back("--trace", o.trace);
  check_writable("--routing-out", o.routing_out, others);
  Job job = job_of(o);
  const std::int64_t ranks = job.plan.ranks();
  const Mode mode = mode_of(o, ranks);
  const BackendOptions backend = backend_of(o, ranks, mode.transport, job.plan.precision.compute);
  // Ranks that another launcher started may be on several machines, or see one GPU each.
  const bool here = mode.launches || mode.transport == "threads";
  check_backend(here ? backend : backend_of(o, 1, mode.transport, job.plan.precision.compute));
  const Describe describe = [&job](int rank, std::int64_t step, std::int64_t instruction) {
    return execute::place(job.program, rank, step, instruction);
  };
  // Of GPUs by whoever uses them: to look takes a context, which a launcher would keep.
  if (mode.transport == "threads" || (mode.launches && o.backend == "cpu")) check_memory(o, job);
  // Of its own mistakes no rank needs to tell.
  if (job.program.sharded_storage) temporary_place();
  job.options.before = test_fault(0);
  if (mode.launches) {
    const std::chrono::duration<double> prepared = std::chrono::steady_clock::now() - begin;
    launch(o, job, mode, describe, prepared.count(), code);
    return;
  }
  fill_options(o, job);
  job.options.device = devices_of(backend);
  std::string notes = mode.note;
  if (!job.predicted_for.empty()) notes += (notes.empty() ? "" : "; ") + job.predicted_for;
  if (const std::string note = note_of(backend); !note.empty())
    notes += (notes.empty() ? "" : "; ") + note;
  if (!job.no_graphs.empty()) notes += (notes.empty() ? "" : "; ") + job.no_graphs;
  const char* board_path = variable(kBoardVariable);
  std::shared_ptr<Board> board;
  if (board_path != nullptr && mode.transport != "threads")
    board = Board::open(board_path, static_cast<int>(ranks));
  Kept kept;
  job.options.progress = [&](int rank, const std::vector<double>& losses, double slowest_s) {
    // The launcher of the board tells what is left.
    if (board && rank == 0) board->note_step(losses, slowest_s);
    if (board || (mode.transport == "threads" && rank > 0)) return;
    kept.losses.push_back(losses);
    kept.slowest_s.push_back(slowest_s);
  };
  const auto keep = [&](bool mine, const std::string& reason) {
    if (mine && !board) report_incomplete(o, job, kept, mode.transport, reason);
  };
  if (mode.transport == "threads") {
    execute::ThreadOptions threads;
    threads.timeout_s = o.timeout_s;
    std::vector<execute::RankResult> results;
    try {
      std::optional<StateWatch> watch;
      if (o.backend == "cuda") watch.emplace();
      results = execute::run_threads(job.program, job.options, threads);
      if (watch) job.conditions = watch->at_work();
    } catch (const PeerError& e) {
      keep(true, e.what());
      throw;
    } catch (const MachineError& e) {
      keep(true, e.what());
      throw;
    }
    report(o, job, results[0], mode.transport, notes, code);
    return;
  }
  std::unique_ptr<Transport> transport;
#ifdef PARTITA_MPI
  if (mode.transport == "mpi") {
    transport = mpi_transport({o.timeout_s, board, describe});
    if (transport->size() != ranks)
      transport->abort(
          fmt::format("--ranks: the launcher started {} ranks and the plan has {}; start as many, "
                      "or change the plan",
                      transport->size(), ranks),
          2);
  }
#endif
  if (mode.transport == "tcp") {
    TcpOptions t;
    t.rank = mode.launcher.rank;
    t.size = mode.launcher.size;
    t.host = mode.launcher.host;
    t.port = mode.launcher.port;
    if (const char* socket = variable(kListenerVariable)) t.listener = std::atoi(socket);
    t.key = key_of(o, job);
    t.timeout_s = o.timeout_s;
    t.rendezvous_s = o.rendezvous_s;
    t.board = board;
    t.describe = describe;
    t.own_process = true;
    transport = tcp_transport(t);
  }
  execute::RankResult result;
  // Whoever tells the user also shows the steps: with rank 0 gone, the next. Under another's mpirun
  // all would.
  const auto shows = [&] {
    return mode.transport == "mpi" ? transport->rank() == 0 : transport->speaks();
  };
  const auto give_up = [&](const std::string& reason, int exit_code) {
    if (mode.transport == "mpi") keep(shows(), reason);
    transport->abort(reason, exit_code);
    keep(shows(), reason);
    if (!transport->speaks()) throw ToldElsewhere(exit_code, reason);
  };
  try {
    std::optional<StateWatch> watch;
    if (o.backend == "cuda" && transport->rank() == 0) watch.emplace();
    result = execute::run_rank(job.program, *transport, job.options);
    if (watch) job.conditions = watch->at_work();
    transport->leave();
    if (transport->rank() == 0) report(o, job, result, mode.transport, notes, code);
  } catch (const ToldElsewhere&) {
    throw;
  } catch (const InputError& e) {
    give_up(e.what(), 2);
    throw;
  } catch (const std::exception& e) {
    give_up(e.what(), 3);
    throw;
  }
}

}  // namespace

void add_run(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c =
      app.add_subcommand("run", "train under a plan on real ranks, beside its prediction");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  o->flags.add_to(*c);
  o->flags.add_network(*c);
  c->add_option("--ranks", o->ranks,
                "processes or threads to start (default: what the plan needs)");
  c->add_option("--backend", o->backend, "cpu or cuda");
  c->add_flag("--share-gpu", o->share_gpu, "cuda: several ranks on one GPU");
  c->add_option("--transport", o->transport,
                "threads, mpi or tcp (default: of several ranks mpi, without mpirun tcp)");
  c->add_option("--topology", o->topology, "cluster to predict for (default: cpu-host)");
  c->add_option("--steps", o->steps, "training steps");
  c->add_option("--warm-up", o->warm_up, "steps before these, trained but not timed");
  c->add_option("--seed", o->seed, "of parameters and generated data");
  c->add_option("--data", o->data, "mnist-linear: folder with MNIST's IDX files");
  c->add_option("--optimizer", o->optimizer, "sgd or adam");
  c->add_option("--learning-rate", o->learning_rate, "learning rate");
  c->add_option("--timeout", o->timeout_s, "seconds without an answer after which a rank gives up");
  c->add_option("--rendezvous-timeout", o->rendezvous_s,
                "mpi, tcp: seconds within which all ranks must have come");
  c->add_option("--trace", o->trace, "write a Perfetto trace of the median step to this file");
  o->flags.add_routing(*c);
  c->add_option("--routing-out", o->routing_out,
                "write which experts the tokens of each timed step went to");
  c->add_flag("--no-check", o->no_check, "do not train the serial network beside it");
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o, &code] { run(*o, code); });
}

}  // namespace partita::cli
