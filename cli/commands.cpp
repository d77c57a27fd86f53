#include "cli/commands.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <sstream>

#include "base/unit_text.h"
#include "cli/cluster_flags.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/rows.h"
#include "report/report.h"
#include "simulator/search/placement.h"
#include "validation/fit_rows.h"

namespace partita::cli {
namespace {

void print(const std::string& s) { std::fwrite(s.data(), 1, s.size(), stdout); }

std::string lines_of(const std::vector<std::string>& names) {
  return fmt::format("{}\n", fmt::join(names, "\n"));
}

void add_model(CLI::App& app) {
  struct Options {
    std::string model;
    PlanFlags flags;
    bool json = false, operators = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("model", "show a network: parameters, work, operators");
  c->add_option("MODEL", o->model, "catalogue name or file; without it the catalogue is listed");
  c->add_option("--seq,--sequence-length", o->flags.sequence, "tokens per sample");
  c->add_option("--layers", o->flags.layers,
                "this many blocks: its first ones, or more of the same");
  c->add_option("--vocabulary", o->flags.vocabulary, "size of the vocabulary");
  c->add_option("--freeze", o->flags.freeze,
                "parameters (a pattern) that are not trained; repeatable")
      ->allow_extra_args(false);
  c->add_option("--lora", o->flags.lora,
                "linear operators (a pattern) that get adapters; repeatable")
      ->allow_extra_args(false);
  c->add_option("--lora-rank", o->flags.lora_rank, "rank of the adapters (default: 16)");
  c->add_flag("--operators", o->operators, "list every operator");
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o] {
    if (o->model.empty()) {
      if (o->operators) throw InputError("--operators", "needs a MODEL");
      print(o->json ? catalogue_json("models", model_catalogue()) : lines_of(model_catalogue()));
      return;
    }
    Plan p;
    set_trained(p, o->flags);
    const Graph g = load_graph(o->model, o->flags, p);
    print(o->json ? model_json(g, o->operators) : model_table(g, o->operators));
  });
}

/// "tp=8,dp=4": axes, innermost first.
Mesh parse_mesh(const std::string& words, const std::string& place) {
  Mesh mesh;
  std::istringstream all(words);
  double ranks = 1;
  for (std::string word; std::getline(all, word, ',');) {
    const auto at = word.find('=');
    char* end = nullptr;
    const long long size =
        at == std::string::npos ? 0 : std::strtoll(word.c_str() + at + 1, &end, 10);
    if (at == std::string::npos || at == 0 || end == word.c_str() + at + 1 || *end != 0 || size < 1)
      throw InputError(place,
                       fmt::format("'{}' is no axis; write NAME=SIZE, like tp=8,dp=4", word));
    ranks *= static_cast<double>(size);
    const std::string axis = word.substr(0, at);
    if (std::any_of(mesh.atoms.begin(), mesh.atoms.end(),
                    [&](const Mesh::Atom& a) { return a.name == axis; }))
      throw InputError(place, fmt::format("{} is there twice; give each axis once", axis));
    mesh.atoms.insert(mesh.atoms.begin(), {word.substr(0, at), size});
  }
  if (mesh.atoms.empty() || mesh.atoms.size() > 16 || ranks > 1e6)
    throw InputError(place, fmt::format("a mesh has 1 to 16 axes and up to 1,000,000 ranks; '{}' "
                                        "has {} axes and {:.7g} ranks",
                                        words, mesh.atoms.size(), ranks));
  return mesh;
}

void add_topo(CLI::App& app) {
  struct Options {
    std::string topology, mesh, links;
    std::vector<std::string> route;
    ClusterFlags cluster;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("topo", "show a cluster: devices, links, routes");
  c->add_option("TOPOLOGY", o->topology,
                "catalogue name or file; without it the catalogue is listed");
  c->add_option("--mesh", o->mesh,
                "axes and their sizes, innermost first, like tp=8,dp=4: what each crosses");
  c->add_option("--route", o->route,
                "two devices, like node0.gpu0 node3.gpu1: the links between them")
      ->expected(2);
  c->add_option("--links", o->links,
                "a vertex, or the first part of its name, like node0 or node0.gpu1 or leaf0: its "
                "links, by the names that --degrade, --fail and --background take");
  o->cluster.add_to(*c);
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o] {
    if (o->topology.empty()) {
      for (const auto& [flag, given] : {std::pair{"--mesh", !o->mesh.empty()},
                                        {"--route", !o->route.empty()},
                                        {"--links", !o->links.empty()}}) {
        if (given) throw InputError(flag, "needs a TOPOLOGY");
      }
      print(o->json ? catalogue_json("topologies", topology_catalogue())
                    : lines_of(topology_catalogue()));
      return;
    }
    const Topology t = o->cluster.in_state(load_cluster(o->topology));
    TopologyViews views;
    if (!o->mesh.empty())
      views.axes = axis_crossings(parse_mesh(o->mesh, "--mesh"), Communication(t));
    if (!o->route.empty()) {
      const DeviceId a = t.find_device(o->route[0], "--route"),
                     b = t.find_device(o->route[1], "--route");
      if (a == b)
        throw InputError("--route", fmt::format("{} is both ends; give two devices", o->route[0]));
      views.routes = {{a, b}};
    }
    if (!o->links.empty()) views.links = links_of(t, o->links, "--links");
    print(o->json ? topology_json(t, views) : topology_table(t, views));
  });
}

struct Common {
  std::string model, topology, trace;
  PlanFlags flags;
  bool json = false;
  std::int64_t top = 5;
};

/// Files that a command reads, by what names them.
std::vector<std::pair<std::string, std::string>> read_by(const Common& o) {
  return {{"--plan", o.flags.file}, {"MODEL", o.model}, {"TOPOLOGY", o.topology}};
}

/// Longer traces no viewer opens; what is recorded for `flag` is as long.
void refuse_long_trace(std::int64_t instructions, const std::string& flag = "--trace") {
  constexpr std::int64_t kMostEvents = 4'000'000;
  if (instructions > kMostEvents) {
    throw InputError(flag, fmt::format("the step has {} instructions; {} takes up to {}: "
                                       "use a smaller --global-batch or a larger "
                                       "--micro-batch",
                                       grouped(instructions), flag == "--trace" ? "a trace" : "it",
                                       grouped(kMostEvents)));
  }
}

/// Simulates once more with every event recorded.
void trace(const std::string& file, const Graph& g, const Prediction& p,
           Communication& communication, const RoutingSource* routing = nullptr) {
  refuse_long_trace(p.instructions);
  Timeline timeline;
  Program program;
  predict(g, p.plan, communication, &timeline, &program, false, routing, p.network);
  write_trace(file, program, timeline);
}

/// The plan that needs least memory where the search has dropped all for their state alone: one of
/// those that shard and recompute everything.
std::optional<Prediction> smallest(const Graph& g, const Topology& t, std::int64_t ranks,
                                   const Plan& base, const SearchSpace& space) {
  Communication communication(t);
  std::optional<Prediction> least;
  for (const std::int64_t tp : space.tp) {
    for (const std::int64_t pp : space.pp) {
      for (const std::int64_t ep : space.ep) {
        Plan p = base;
        p.tp = tp, p.pp = pp, p.ep = ep, p.cp = space.cp.front();
        const std::int64_t each = p.ranks_of_replica(), left = ranks - p.servers * tp;
        if (left < each || left % each != 0) continue;
        p.dp = left / each;
        // Of what may be chosen, what needs least: the spaces ascend.
        p.zero = space.zero.front();
        for (const int zero : space.zero) {
          if (p.dp * p.cp > 1 && (pp == 1 || zero <= space.zero_pipelined)) p.zero = zero;
        }
        p.recompute = space.recompute.back(), p.micro_batch = space.micro_batch.front();
        p.sequence_parallel = space.sequence_parallel.empty() ? tp > 1 && g.sequence > 0
                                                              : space.sequence_parallel.back() != 0;
        auto prediction = predict(g, p, communication);
        if (prediction && (!least || prediction->peak_device < least->peak_device))
          least = std::move(*prediction);
      }
    }
  }
  return least;
}

void add_simulate(CLI::App& app) {
  auto o = std::make_shared<Common>();
  CLI::App* c =
      app.add_subcommand("simulate", "predict one plan's step: time, memory, where both go");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  o->flags.add_to(*c);
  o->flags.add_framework_defaults(*c);
  o->flags.add_network(*c);
  o->flags.add_profile(*c);
  o->flags.add_routing(*c);
  auto cluster = std::make_shared<ClusterFlags>();
  o->flags.add_placement(*c);
  cluster->add_to(*c);
  c->add_flag("--json", o->json, "print JSON");
  c->add_option("--trace", o->trace, "write a Perfetto trace to this file");
  auto slices = std::make_shared<int>(0);
  c->add_option("--over-time", *slices,
                "what the step does, waits for and loses in this many parts of its time")
      ->check(CLI::Range(1, 1000));
  c->callback([o, cluster, slices] {
    check_writable("--trace", o->trace, read_by(*o));
    const StillAtIt lines(
        "long programs and ranks that all differ, as with hashed spines or a placement without "
        "order, take time; fewer micro-batches, layers or devices are faster");
    const Topology t = cluster->in_state(load_cluster(o->topology));
    Plan plan = plan_from(o->flags, "megatron-core");
    settle_ranks(plan, static_cast<std::int64_t>(t.used_ranks()), t.name());
    auto defaults = framework_defaults(o->flags, plan, o->model, t);
    const Graph g = load_graph(o->model, o->flags, plan);
    const RoutingSource routing =
        routing_source(o->flags.routing.empty() ? "balanced" : o->flags.routing, "--routing");
    const bool search_placement = o->flags.placement == "search";
    const auto fitted = fit_of(o->flags);
    const auto* entry = fitted ? fitted->find(t, plan.framework) : nullptr;
    std::optional<Placements> placed;
    if (search_placement) {
      auto all = place(g, plan, t, &routing);
      if (!all) throw InputError("--placement", all.reason());
      placed = std::move(*all);
      place_as(plan, placed->best().plan);
    }
    Communication communication(t);
    if (entry != nullptr) communication.set_adjustment(validation::adjustment_of(*entry));
    const bool records = *slices > 0;
    if (!o->trace.empty() || records) {
      // Before half a billion events are played to find that out.
      if (const auto complete_plan = complete(g, plan)) {
        if (const auto program = lower(g, *complete_plan))
          refuse_long_trace(timed_instructions(*program), records ? "--over-time" : "--trace");
      }
    }
    Timeline recorded;
    auto prediction = predict(g, plan, communication, records ? &recorded : nullptr, nullptr, false,
                              &routing, o->flags.sharing());
    if (!prediction) throw InputError("plan", prediction.reason());
    if (records) prediction->over_time = over_time(recorded, *slices);
    if (fitted) validation::rest_on_fit(*prediction, entry, g, t, &routing);
    auto assumed = assumptions(o->flags, prediction->plan, g);
    for (std::string& a : defaults) assumed.push_back(std::move(a));
    for (std::string& a : state_assumptions(t, o->flags.sharing())) assumed.push_back(std::move(a));
    if (prediction->plan.framework.starts_with("pytorch") &&
        prediction->plan.precision.compute == ElementType::fp32 &&
        t.profile(0).matrix_rates.contains(ElementType::tf32) &&
        std::any_of(g.operators.begin(), g.operators.end(), [](const Operator& op) {
          return std::holds_alternative<Convolution>(op.operation);
        }))
      assumed.emplace_back(
          "convolutions in fp32 (PyTorch's are in TF32 unless torch.backends.cudnn.allow_tf32 is "
          "off: --precision tf32)");
    print(o->json ? prediction_json(g, t, *prediction, assumed, placed ? &*placed : nullptr)
                  : prediction_table(g, t, *prediction, assumed, placed ? &*placed : nullptr));
    std::fflush(stdout);
    if (!o->trace.empty()) trace(o->trace, g, *prediction, communication, &routing);
  });
}

/// "1,234 of 8,310 plans done, the fastest that fits so far takes 1.2 s before transfers share
/// links": a search shares them among the fastest alone.
std::string search_state(const SearchProgress& p) {
  const std::int64_t space = p.space, done = p.done, again = p.again;
  const double fastest = p.fastest;
  if (space == 0) return "the plans are not counted yet";
  if (p.refining)
    return fmt::format("{} plans done; the fastest is refined beyond the space (--no-refine: not)",
                       grouped(space));
  return fmt::format(
      "{} of {} plans done, {}{}", grouped(done), grouped(space),
      fastest > 0
          ? fmt::format("the fastest that fits so far takes {} before transfers share links",
                        text(Seconds{fastest}))
          : "none that fits so far",
      again > 0 ? fmt::format("; {} of the fastest once more as they are shown", again) : "");
}

void add_plan(CLI::App& app, int& code) {
  auto o = std::make_shared<Common>();
  CLI::App* c = app.add_subcommand("plan", "search all plans; show the fastest that fit");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  o->flags.add_to(*c);
  o->flags.add_framework_defaults(*c);
  o->flags.add_network(*c);
  o->flags.add_profile(*c);
  o->flags.add_placement(*c);
  auto cluster = std::make_shared<ClusterFlags>();
  cluster->add_to(*c);
  c->add_flag("--json", o->json, "print JSON");
  c->add_option("--top", o->top, "how many plans to show");
  c->add_option("--trace", o->trace, "write a Perfetto trace of the best plan to this file");
  auto save = std::make_shared<std::string>();
  c->add_option("--save", *save, "write the best plan to this file");
  auto no_refine = std::make_shared<bool>(false);
  c->add_flag("--no-refine", *no_refine,
              "show the space's plans alone, nothing finer and no switches");
  c->callback([o, save, no_refine, cluster, &code] {
    if (o->top < 1) throw InputError("--top", fmt::format("{} must be at least 1", o->top));
    auto others = read_by(*o);
    check_writable("--trace", o->trace, others);
    others.emplace_back("--trace", o->trace);
    check_writable("--save", *save, others);
    const Topology t = cluster->in_state(load_cluster(o->topology));
    Plan base = plan_from(o->flags, "megatron-core");
    if (!base.as_ranked())
      throw InputError("--placement",
                       "plan searches meshes, whose axes differ; use search, which finds the "
                       "fastest placement for the plans shown");
    const Plan given = base;
    base.dp = 1;
    SearchProgress progress;
    const StillAtIt lines([&] { return search_state(progress); }, std::chrono::seconds(10),
                          std::chrono::seconds(10));
    const auto ranks = static_cast<std::int64_t>(t.used_ranks());
    if (base.global_batch == 0) base.global_batch = 4 * ranks;
    // The search has its own word on these.
    auto defaults =
        framework_defaults(o->flags, base, o->model, t, {"zero", "recompute", "sequence_parallel"});
    const Graph g = load_graph(o->model, o->flags, base);
    SearchSpace space = full_space(g, t, ranks, base);
    restrict_space(space, o->flags, given);
    const auto fitted = fit_of(o->flags);
    const auto* entry = fitted ? fitted->find(t, base.framework) : nullptr;
    const Adjustment adjustment =
        entry != nullptr ? validation::adjustment_of(*entry) : Adjustment{};
    SearchResult r = search(g, t, ranks, base, space, static_cast<std::size_t>(o->top), 0,
                            o->flags.sharing(), adjustment, &progress);
    if (o->flags.placement == "search") place_all(r, g, t);
    Beyond beyond;
    RefineLimits limits;
    limits.recompute = space.recompute.size() > 1;
    limits.cuts = given.cuts.empty();
    for (const char* key : {"overlap_tensor_parallel", "overlap_experts", "rows_once",
                            "reshard_after_forward", "context_exchange", "launch", "offload"}) {
      if (in_plan(o->flags, key)) limits.given.insert(key);
    }
    if (!o->flags.context_exchange.empty()) limits.given.insert("context_exchange");
    if (space.schedules.size() == 1) limits.given.insert("schedule");
    progress.refining = true;
    if (!*no_refine && !r.plans.empty()) {
      beyond.refined =
          refine(g, t, r.plans[0], o->flags.sharing(), adjustment, limits, r.to_refine);
      if (!beyond.refined->taken.empty()) {
        r.plans.insert(r.plans.begin(), beyond.refined->taken.back().prediction);
        if (r.plans.size() > static_cast<std::size_t>(o->top)) r.plans.pop_back();
      }
    }
    if (fitted) {
      for (Prediction& p : r.plans) validation::rest_on_fit(p, entry, g, t);
    }
    if (r.space == 0) {
      for (const auto& [flag, size] : {std::pair{"--tp", given.tp},
                                       {"--pp", given.pp},
                                       {"--cp", given.cp},
                                       {"--dp", given.dp}}) {
        if (size > 0 && ranks % size != 0 && !base.loader && base.servers == 0)
          throw InputError(flag, fmt::format("{} does not divide {} devices; use {}", size, ranks,
                                             divisors_text(ranks)));
      }
      throw InputError("plan",
                       fmt::format("no plan of {} devices and a global batch of {} has the sizes "
                                   "given; leave one of them open",
                                   ranks, base.global_batch));
    }
    if (r.plans.empty() && !r.smallest) r.smallest = smallest(g, t, ranks, base, space);
    if (!*no_refine && r.plans.empty() && r.smallest)
      beyond.would_fit = fitting(g, t, *r.smallest, o->flags.sharing(), adjustment, limits);
    if (!r.plans.empty() && !o->trace.empty()) {
      Communication communication(t);
      if (entry != nullptr) communication.set_adjustment(validation::adjustment_of(*entry));
      trace(o->trace, g, r.plans[0], communication);
    }
    if (!r.plans.empty() && !save->empty()) {
      const std::string yaml = to_yaml(r.plans[0].plan);
      std::FILE* f = std::fopen(save->c_str(), "w");
      bool good = f != nullptr && std::fwrite(yaml.data(), 1, yaml.size(), f) == yaml.size();
      // The last bytes reach the disk only here.
      if (f != nullptr) good = std::fclose(f) == 0 && good;
      if (!good)
        throw InputError("--save", fmt::format("cannot write {}; check its permissions and whether "
                                               "the disk is full",
                                               *save));
    }
    auto assumed = assumptions(o->flags, base, g, {"micro_batch", "zero"});
    for (std::string& a : defaults) assumed.push_back(std::move(a));
    for (std::string& a : state_assumptions(t, o->flags.sharing())) assumed.push_back(std::move(a));
    print(o->json ? search_json(g, t, r, assumed, beyond) : search_table(g, t, r, assumed, beyond));
    if (r.plans.empty()) code = 1;
  });
}

}  // namespace

void add_commands(CLI::App& app, int& code) {
  add_model(app);
  add_topo(app);
  add_collective(app);
  add_simulate(app);
  add_plan(app, code);
  add_whatif(app, code);
  add_compare(app);
  add_reference(app, code);
  add_startup(app, code);
  add_run(app, code);
  add_replay(app);
  add_validate(app, code);
  add_fit(app);
}

}  // namespace partita::cli
