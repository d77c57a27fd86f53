#include "simulator/plan/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

#include "base/unit_text.h"
#include "base/yaml.h"
#include "simulator/plan/placement.h"

namespace partita {
namespace {

struct ScheduleName {
  Schedule schedule;
  std::string_view name;
};
constexpr std::array kSchedules{ScheduleName{Schedule::naive, "naive"},
                                ScheduleName{Schedule::gpipe, "gpipe"},
                                ScheduleName{Schedule::one_f_one_b, "1f1b"},
                                ScheduleName{Schedule::interleaved, "interleaved"},
                                ScheduleName{Schedule::zero_bubble_h1, "zb-h1"},
                                ScheduleName{Schedule::dualpipe, "dualpipe"}};

Infeasible no(std::string reason) { return Infeasible{std::move(reason)}; }

/// Cuts one atom list of total size n into (outer, inner) with inner of size `inner`; the list
/// gains at most one atom. Sizes are those of the mesh being built.
struct AxisBuilder {
  Mesh mesh;
  AtomList add(const std::string& name, std::int64_t size) {
    if (size <= 1) return {};
    mesh.atoms.push_back({name, size});
    return {static_cast<AtomId>(mesh.atoms.size() - 1)};
  }
};

AtomList joined(AtomList a, const AtomList& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

bool has_dim(const Graph& graph, Dim dim) {
  for (const auto& t : graph.tensors) {
    for (const auto& d : t.shape) {
      if (d.dim == dim) return true;
    }
  }
  return false;
}

bool has_experts(const Graph& graph) {
  return std::any_of(graph.operators.begin(), graph.operators.end(), [](const Operator& op) {
    return std::holds_alternative<GroupedProduct>(op.operation);
  });
}

/// Does the loss see positions picked from the sequence (BERT's masked ones)?
bool picks_positions(const Graph& graph) {
  return std::any_of(graph.operators.begin(), graph.operators.end(), [&](const Operator& op) {
    if (!std::holds_alternative<CrossEntropy>(op.operation)) return false;
    const Shape& logits = graph.tensor(op.inputs[0]).shape;
    return std::any_of(logits.begin(), logits.end(),
                       [](const auto& d) { return d.dim == Dim::key_sequence; });
  });
}

}  // namespace

bool rule_matches(const ShardingRule& rule, const Operator& op) {
  constexpr std::string_view kKind = "kind:";
  const std::string_view p = rule.pattern;
  if (p == "*") return true;
  if (p.substr(0, kKind.size()) == kKind) return p.substr(kKind.size()) == kind_name(op.operation);
  return matches(p, op.name);
}

std::string_view name(Schedule s) {
  for (const auto& entry : kSchedules) {
    if (entry.schedule == s) return entry.name;
  }
  return "?";
}

Plan::ContextExchange parse_context_exchange(std::string_view word, const std::string& place) {
  if (word == "all_gather") return Plan::ContextExchange::all_gather;
  if (word == "all_to_all") return Plan::ContextExchange::all_to_all;
  if (word == "ring") return Plan::ContextExchange::ring;
  throw InputError(
      place, fmt::format("'{}' is no context exchange; use all_gather, all_to_all or ring", word));
}

Schedule parse_schedule(std::string_view word, const std::string& place) {
  std::vector<std::string> known;
  for (const auto& entry : kSchedules) {
    if (entry.name == word) return entry.schedule;
    known.emplace_back(entry.name);
  }
  throw InputError(place, fmt::format("'{}' is no schedule{}; there are {}", word,
                                      did_you_mean(word, known), fmt::join(known, ", ")));
}

Plan executable(Plan plan) {
  Allocations& a = plan.allocations;
  a.weighted_activations = a.narrow_inputs = a.gate_apart = a.attention_copied = false;
  plan.kernels.mamba_gates_in_scan = false;
  return plan;
}

Plan as_executed(Plan plan) {
  Plan ours;
  set_framework(ours, "partita", "");
  plan.framework = ours.framework;
  plan.allocations = ours.allocations;
  plan.kernels = ours.kernels;
  // A step is captured as a whole, or not.
  ours.launches.graphs = plan.launches.graphs;
  plan.launches = ours.launches;
  plan.fuses_normalise = ours.fuses_normalise;
  plan.joins_projections = ours.joins_projections;
  plan.score_passes_forward = ours.score_passes_forward;
  plan.score_passes_backward = ours.score_passes_backward;
  plan.expert_bias_apart = ours.expert_bias_apart;
  return executable(std::move(plan));
}

std::string divisors_text(std::int64_t n) {
  std::vector<std::int64_t> all;
  for (std::int64_t d = 1; d * d <= n; ++d) {
    if (n % d != 0) continue;
    all.push_back(d);
    if (d != n / d) all.push_back(n / d);
  }
  std::sort(all.begin(), all.end());
  if (all.size() > 12) all.resize(12);
  std::string s;
  for (std::size_t i = 0; i < all.size(); ++i) {
    s += (i == 0 ? "" : i + 1 == all.size() ? " or " : ", ") + std::to_string(all[i]);
  }
  return s;
}

std::int64_t Plan::micro_batches() const {
  return global_batch == 0 ? 1 : global_batch / (micro_batch * dp);
}

std::vector<std::int64_t> blocks_per_chunk(std::int64_t layers, std::int64_t chunks) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(chunks), layers / chunks);
  std::int64_t extra = layers % chunks;
  if (extra == 0) return counts;
  // The chunks that stay small, by priority: last, first, last but one, second, ...
  std::vector<std::size_t> small;
  for (std::size_t low = 0, high = counts.size(); low < high;) {
    small.push_back(--high);
    if (low < high) small.push_back(low++);
  }
  for (auto& n : counts) ++n;
  for (std::int64_t i = 0; i < chunks - extra; ++i) --counts[small[static_cast<std::size_t>(i)]];
  return counts;
}

Feasible<std::vector<int>> chunk_of_operators(const Graph& graph, const Plan& plan) {
  const std::int64_t chunks = plan.chunks();
  if (plan.cuts.empty() && chunks > std::max(graph.layers, 1)) {
    return no(fmt::format(
        "{} pipeline chunks (pp {} x virtual stages {}) need as many blocks, {} has {}; use "
        "at most {}",
        chunks, plan.pp, plan.virtual_stages, graph.name, graph.layers, std::max(graph.layers, 1)));
  }
  std::vector<std::int64_t> counts = plan.cuts;
  if (counts.empty()) counts = blocks_per_chunk(graph.layers, chunks);
  if (static_cast<std::int64_t>(counts.size()) != chunks) {
    return no(fmt::format("{} cuts for {} pipeline chunks; give the number of blocks of each chunk",
                          counts.size(), chunks));
  }
  if (std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) != graph.layers ||
      *std::min_element(counts.begin(), counts.end()) < 0) {
    return no(fmt::format("cuts [{}] must be >= 0 and sum to the {} blocks of {}",
                          fmt::join(counts, ", "), graph.layers, graph.name));
  }
  std::vector<int> of_layer;
  for (std::size_t c = 0; c < counts.size(); ++c) {
    of_layer.insert(of_layer.end(), static_cast<std::size_t>(counts[c]), static_cast<int>(c));
  }
  std::vector<int> of_op;
  for (const Operator& op : graph.operators) {
    of_op.push_back(op.layer < 0               ? 0
                    : op.layer >= graph.layers ? static_cast<int>(chunks) - 1
                                               : of_layer[static_cast<std::size_t>(op.layer)]);
  }
  return of_op;
}

std::vector<std::string> strategies() {
  return {"megatron", "spatial", "replicas", "dataparallel"};
}

Feasible<Plan> complete(const Graph& graph, Plan plan) {
  const auto positive = [](std::int64_t v) { return v >= 1; };
  for (const auto& [axis, size] : {std::pair{"tensor parallel", plan.tp},
                                   {"pipeline parallel", plan.pp},
                                   {"data parallel", plan.dp},
                                   {"context parallel", plan.cp},
                                   {"expert parallel", plan.ep},
                                   {"virtual stages", plan.virtual_stages},
                                   {"micro-batch", plan.micro_batch}}) {
    if (!positive(size)) return no(fmt::format("{} must be at least 1, got {}", axis, size));
  }
  if (plan.global_batch == 0) plan.global_batch = plan.micro_batch * plan.dp;
  if (plan.global_batch % (plan.micro_batch * plan.dp) != 0) {
    const std::int64_t step = plan.micro_batch * plan.dp, below = plan.global_batch / step * step;
    return no(fmt::format(
        "global batch {} is not a multiple of micro-batch {} x data parallel {} = {}; use {}{}",
        plan.global_batch, plan.micro_batch, plan.dp, step,
        below > 0 ? fmt::format("{} or ", below) : "", below + step));
  }
  if (plan.zero < 0 || plan.zero > 3)
    return no(fmt::format("ZeRO stage {} is not 0, 1, 2 or 3", plan.zero));
  if (plan.zero < 2 && plan.precision_roles &&
      plan.precision.gradient_communication != plan.precision.gradients)
    return no(fmt::format(
        "precision.gradient_communication is {}, but under ZeRO {} gradients are summed over "
        "micro-batches, in {}, before they travel; leave it out, use gradients: {}, compression: "
        "{{kind: cast, type: {}}} or ZeRO 2 or 3",
        name(plan.precision.gradient_communication), plan.zero, name(plan.precision.gradients),
        name(plan.precision.gradient_communication), name(plan.precision.gradient_communication)));
  if (plan.cp > 1 && !has_dim(graph, Dim::sequence)) {
    return no(fmt::format("context parallel {} cuts sequences; {} has none", plan.cp, graph.name));
  }
  if (plan.sequence_parallel && plan.tp == 1) plan.sequence_parallel = false;
  // Of its framework's selection a network may lack some, not all.
  if (const auto& set = plan.selective.patterns;
      plan.recompute.kind == Recompute::selective && !set.empty() &&
      std::none_of(graph.operators.begin(), graph.operators.end(), [&](const Operator& op) {
        return std::any_of(set.begin(), set.end(), [&](const std::string& pattern) {
          return matches(pattern.substr(pattern[0] == '~' ? 1 : 0), op.name);
        });
      }))
    return no(fmt::format(
        "{} has nothing that {} recomputes where it is selective; use none, attention, full or "
        "operator patterns",
        graph.name, plan.framework));
  // Who pushes gradients as they are does not clip.
  if (!plan.clip_given && plan.optimizer.clip == 0 && plan.servers == 0 &&
      plan.strategy != "dataparallel")
    plan.optimizer.clip = plan.framework_clip;
  if (plan.overlap_tensor_parallel && !plan.sequence_parallel)
    return no(
        "overlap_tensor_parallel hides the gathers and scatters of sequence parallelism; use "
        "tp 2 or more and sequence_parallel true");
  if (plan.overlap_tensor_parallel && plan.tensor_parallel_in_turn)
    return no(
        "overlap_tensor_parallel runs transfers over tp beside products, tensor_parallel_in_turn "
        "beside none; use one of them");
  if (plan.zero == 3 && plan.pp > 1 && plan.micro_batches() > 1 && !plan.reshard_after_forward)
    return no(
        "beside a pipeline what ZeRO-3 leaves gathered would be there once for each micro-batch in "
        "flight; use zero 1, which has parameters whole once, or reshard_after_forward true");
  // A ring that nobody has asked for is none where attention knows none, nor, as
  // in Transformer Engine (context_parallel.py), where it has a window.
  if (plan.context == Plan::ContextExchange::ring && !plan.context_given &&
      std::any_of(graph.operators.begin(), graph.operators.end(), [](const Operator& op) {
        const auto* a = std::get_if<Attention>(&op.operation);
        return a != nullptr && (a->materialised || a->sinks || a->window > 0);
      }))
    plan.context = Plan::ContextExchange::all_gather;
  if (plan.virtual_stages > 1) {
    if (plan.pp == 1) {
      return no(fmt::format("virtual stages {} need pipeline parallel > 1", plan.virtual_stages));
    }
    if (!plan.schedule_given) plan.schedule = Schedule::interleaved;
    if (plan.schedule != Schedule::interleaved) {
      return no(
          fmt::format("schedule {} has no virtual stages; use interleaved", name(plan.schedule)));
    }
  }
  if (plan.schedule != Schedule::interleaved) {
    if (plan.micro_batch_group > 0)
      return no(fmt::format("micro_batch_group is of the interleaved schedule, this one is {}",
                            name(plan.schedule)));
  } else {
    const std::int64_t m = plan.micro_batches();
    // Megatron-Core's rule: a last group that is smaller still fills the pipeline.
    const auto walks = [&](std::int64_t group) {
      return group >= plan.pp && group <= m && (m % group == 0 || m % group >= plan.pp);
    };
    if (m < plan.pp)
      return no(fmt::format(
          "the interleaved schedule needs at least as many micro-batches ({}) as pipeline stages "
          "({}); use a global batch of {}",
          m, plan.pp, plan.pp * plan.micro_batch * plan.dp));
    if (plan.micro_batch_group == 0) {
      plan.micro_batch_group = plan.pp;
      while (!walks(plan.micro_batch_group)) ++plan.micro_batch_group;
    } else if (!walks(plan.micro_batch_group)) {
      return no(fmt::format(
          "micro-batches in groups of {}: of {} the last group has {}, a group needs {}, the "
          "stages, to {}; leave micro_batch_group out",
          plan.micro_batch_group, m, plan.micro_batch_group > m ? m : m % plan.micro_batch_group,
          plan.pp, m));
    }
  }
  if (plan.schedule == Schedule::dualpipe) {
    if (plan.pp % 2 != 0) {
      return no(fmt::format(
          "schedule dualpipe feeds the pipeline from both ends and needs an even number of stages, "
          "got pipeline parallel {}; use {} or {}",
          plan.pp, plan.pp > 1 ? plan.pp - 1 : 2, plan.pp > 1 ? plan.pp + 1 : 4));
    }
    if (plan.micro_batches() % 2 != 0 || plan.micro_batches() < 2 * plan.pp) {
      return no(
          fmt::format("schedule dualpipe needs an even number of micro-batches, at least two for "
                      "each of the {} "
                      "stages, got {}; use a global batch of {}",
                      plan.pp, plan.micro_batches(),
                      std::max(2 * plan.pp, ceil_div(plan.micro_batches(), std::int64_t{2}) * 2) *
                          plan.micro_batch * plan.dp));
    }
  }
  if (plan.ep > 1 && !has_experts(graph)) {
    return no(fmt::format("expert parallel {} needs experts; {} has none: use --ep 1", plan.ep,
                          graph.name));
  }
  if (plan.cp > 1 && plan.zero > 0 && picks_positions(graph))
    return no(
        fmt::format("the head of {} sees the same picked positions on all {} context parallel "
                    "ranks, over which ZeRO would share its state; use cp 1 or zero 0",
                    graph.name, plan.cp));
  if (plan.etp == 0) plan.etp = plan.tp;
  if (plan.etp < 1 || plan.tp % plan.etp != 0) {
    return no(fmt::format("expert tensor parallel {} must divide tensor parallel {}; use {}",
                          plan.etp, plan.tp, divisors_text(plan.tp)));
  }
  if (plan.etp < plan.tp && has_experts(graph) && !plan.sequence_parallel)
    return no(fmt::format(
        "expert tensor parallel {} below tensor parallel {} leaves ranks that have the "
        "same tokens without sequence parallelism; use --sequence-parallel, or --etp {}",
        plan.etp, plan.tp, plan.tp));
  // Experts live on the ranks (dp x cp) or, where etp leaves some of tp, (dp x cp x tp / etp) of a
  // stage; ep is the inner part.
  std::int64_t ep_left = plan.ep;
  std::int64_t ep_tp = 1;
  if (plan.sequence_parallel) {
    ep_tp = std::gcd(ep_left, plan.tp / plan.etp);
    ep_left /= ep_tp;
  }
  const std::int64_t ep_cp = std::gcd(ep_left, plan.cp);
  ep_left /= ep_cp;
  if (plan.dp % ep_left != 0) {
    return no(
        fmt::format("expert parallel {} does not divide the {} ranks that share a stage's experts; "
                    "data parallel {} must be a multiple of {}",
                    plan.ep, plan.dp * plan.cp, plan.dp, ep_left));
  }
  if (plan.zero_group > 0 && plan.zero == 0)
    return no(
        fmt::format("a sharding group of {} shares sharded state, and ZeRO 0 shards none; use "
                    "zero 1, 2 or 3, or no zero_group",
                    plan.zero_group));
  const std::int64_t zero_all = plan.dp;
  if (plan.zero_group != 0 && (plan.zero_group < 1 || zero_all % plan.zero_group != 0)) {
    return no(fmt::format("a sharding group of {} does not divide data parallel {}; use {}",
                          plan.zero_group, zero_all, divisors_text(zero_all)));
  }

  if (plan.compression.kind != CompressionKind::none) {
    const std::string what(name(plan.compression.kind));
    if (plan.zero > 0)
      return no(
          fmt::format("compression {} is of gradients that every rank has whole; use zero 0, "
                      "got {}",
                      what, plan.zero));
    if (plan.strategy == "replicas" || plan.strategy == "dataparallel")
      return no(fmt::format("compression {} is of all-reduced gradients, which strategy {} has not",
                            what, plan.strategy));
    if (plan.loss_scale.dynamic)
      return no(
          fmt::format("compression {} keeps what it does not send in the scale of its step, "
                      "which a dynamic loss scale changes; use a fixed loss_scale",
                      what));
    if (std::any_of(graph.operators.begin(), graph.operators.end(), [](const Operator& op) {
          const auto* n = std::get_if<Normalize>(&op.operation);
          return n != nullptr && n->kind == Normalize::Kind::batch && n->synchronised;
        })) {
      return no(fmt::format(
          "compression {} treats each rank's gradient by itself; {} has synchronised batch norm, "
          "whose gradients are not any one rank's: use local batch norm",
          what, graph.name));
    }
  }
  if (plan.optimizer.kind == OptimizerKind::sgd && plan.optimizer.weight_decay != 0)
    return no(
        fmt::format("weight_decay {} is adam's (AdamW); sgd here has none: use 0, or kind adam",
                    plan.optimizer.weight_decay));
  if (plan.staleness > 0 && plan.servers == 0)
    return no(fmt::format("staleness {} is of a parameter server; give servers, or use staleness 0",
                          plan.staleness));
  if (plan.servers > 0) {
    if (plan.strategy == "replicas" || plan.strategy == "dataparallel")
      return no(fmt::format("strategy {} has no use for parameter servers; use servers 0",
                            plan.strategy));
    if (plan.dp < 2)
      return no(fmt::format("parameter servers serve data-parallel ranks; use dp 2 or more, got {}",
                            plan.dp));
    if (plan.cp * plan.ep != 1)
      return no(
          fmt::format("parameter servers know data, tensor and pipeline parallel ranks; use cp "
                      "and ep 1, got {} and {}",
                      plan.cp, plan.ep));
    if (plan.zero > 0)
      return no(fmt::format("parameter servers hold the state that zero {} would shard; use zero 0",
                            plan.zero));
    if (plan.compression.kind != CompressionKind::none || plan.loss_scale.initial > 0 ||
        plan.optimizer.clip > 0)
      return no(
          "parameter servers get gradients as they are; use compression none, loss_scale 0 and "
          "clip "
          "0");
  }
  if (plan.message_queue && plan.pp == 1)
    return no("message_queue is between pipeline stages; use pp 2 or more, or message_queue false");
  if (plan.offload_optimizer && plan.servers > 0)
    return no("parameter servers hold the optimizer state; use offload.optimizer false");
  if (plan.loss_scale.initial > 0 && plan.strategy == "dataparallel")
    return no("strategy dataparallel does not scale losses; use loss_scale 0, or another strategy");

  AxisBuilder b;
  auto& axes = plan.axes;
  axes.clear();
  plan.rules.clear();
  // Slowest first: pp, dp, cp, tp (Megatron's order tp-cp-ep-dp-pp read backwards).
  axes["pp"] = b.add("pp", plan.pp);
  // dp = replica groups x sharded (outside ep) x ep; an HSDP group must then hold whole ep groups
  // or vice versa.
  const std::int64_t group = plan.zero_group == 0 ? plan.dp : plan.zero_group;
  AtomList dp;
  if (plan.zero > 0 && group < plan.dp) {
    if (ep_left > 1 && group % ep_left != 0) {
      return no(fmt::format("a sharding group of {} must hold whole expert groups of {}", group,
                            ep_left));
    }
    dp = b.add("dp_replica", plan.dp / group);
    const auto shard = b.add("dp_shard", group / ep_left);
    const auto expert = b.add("dp_ep", ep_left);
    plan.zero_atoms = joined(shard, expert);
    dp = joined(dp, plan.zero_atoms);
    axes["ep"] = expert;
  } else {
    dp = b.add(ep_left > 1 ? "dp_outer" : "dp", plan.dp / ep_left);
    const auto expert = b.add("dp_ep", ep_left);
    dp = joined(dp, expert);
    plan.zero_atoms = dp;
    axes["ep"] = expert;
  }
  axes["dp"] = dp;
  const auto cp_outer = b.add(ep_cp > 1 ? "cp_outer" : "cp", plan.cp / ep_cp);
  const auto cp_ep = b.add("cp_ep", ep_cp);
  axes["cp"] = joined(cp_outer, cp_ep);
  axes["ep"] = joined(axes["ep"], cp_ep);
  // Innermost what cuts experts themselves, where that is a part of tp.
  const std::int64_t tp_inner = plan.etp < plan.tp ? plan.etp : 1;
  const auto tp_outer = b.add(ep_tp * tp_inner > 1 ? "tp_outer" : "tp", plan.tp / ep_tp / tp_inner);
  const auto tp_ep = b.add("tp_ep", ep_tp);
  const auto tp_etp = b.add("tp_etp", tp_inner);
  plan.zero_atoms = joined(plan.zero_atoms, axes["cp"]);
  axes["tp"] = joined(joined(tp_outer, tp_ep), tp_etp);
  axes["ep"] = joined(axes["ep"], tp_ep);
  axes["etp"] = plan.etp == plan.tp ? axes["tp"] : tp_etp;
  const bool outer_tokens = plan.sequence_parallel && plan.etp < plan.tp;
  axes["etp_outer"] = outer_tokens ? tp_outer : AtomList{};
  plan.mesh = b.mesh;
  plan.pipeline = axes["pp"];
  if (plan.mesh.atoms.size() > 16) return no("the mesh has more than 16 atoms");
  if (!plan.placement.empty()) {
    if (plan.ranks() != plan.mesh_ranks())
      return no(
          "placement nests the axes of the mesh, and the ranks of roles lie behind it; leave out "
          "the loader, the servers and the message queue, or placement");
    if (const auto fault = placement_fault(plan.mesh, plan.placement); !fault.empty())
      return no(fault);
  }
  if (!plan.devices.empty()) {
    if (const auto fault = devices_fault(plan.devices, plan.ranks()); !fault.empty())
      return no(fault);
  }
  if (const auto fault = rings_fault(plan.mesh, plan.rings); !fault.empty()) return no(fault);

  if (plan.average_every > 0 && plan.strategy != "replicas")
    return no(
        "average_every is for strategy replicas; others keep their replicas alike in every step");
  if (plan.strategy == "replicas") {
    plan.replicas = mask_of(dp);
    plan.zero_atoms.clear();
    return plan;
  }
  plan.root_state = 0;
  const std::string& captured = plan.launches.graphs_of;
  if (!captured.empty() &&
      std::none_of(graph.operators.begin(), graph.operators.end(),
                   [&](const Operator& op) { return matches(captured, op.name); })) {
    return no(
        fmt::format("graphs_of of launch: pattern '{}' matches no operator of {}; partita model "
                    "MODEL --operators lists them",
                    captured, graph.name));
  }
  plan.root_operators.clear();
  if (plan.strategy == "dataparallel") {
    // torch.nn.DataParallel: in every step one rank scatters the batch, broadcasts its parameters,
    // gathers the outputs for the loss and collects the gradients.
    if (plan.tp * plan.pp * plan.cp * plan.ep != 1) {
      return no("strategy dataparallel knows data parallelism only; use tp, pp, cp and ep 1");
    }
    if (plan.optimizer.clip > 0)
      return no("strategy dataparallel does not clip gradients; use clip 0, or another strategy");
    plan.root_state = mask_of(dp);
    plan.root_operators = {"kind:cross_entropy", "kind:mean_squared_error"};
    plan.zero = plan.root_state != 0 ? 3 : 0;
    plan.reshard_after_forward = false;
    plan.rules.push_back({"*", Dim::sample, "dp", false, false});
    return plan;
  }
  auto& rules = plan.rules;
  for (const ShardingRule& r : plan.user_rules) {
    if (axes.count(r.axis) == 0 || r.axis == "etp_outer") {
      return no(
          fmt::format("sharding of {} names axis '{}'; the mesh has pp, dp, cp, tp, ep and etp",
                      r.pattern, r.axis));
    }
    if (std::none_of(graph.operators.begin(), graph.operators.end(),
                     [&](const Operator& op) { return rule_matches(r, op); })) {
      return no(
          fmt::format("sharding of {} matches no operator of {}; partita model MODEL "
                      "--operators lists them",
                      r.pattern, graph.name));
    }
    rules.push_back(r);
  }
  const bool zigzag =
      plan.cp > 1 &&
      std::any_of(graph.operators.begin(), graph.operators.end(), [](const auto& op) {
        const auto* a = std::get_if<Attention>(&op.operation);
        return a != nullptr && a->causal;
      });
  const auto rule = [&](std::string pattern, Dim dim, std::string axis, bool zig = false,
                        bool unused = false) {
    rules.push_back({std::move(pattern), dim, std::move(axis), zig, unused});
  };
  if (plan.strategy == "spatial") {
    bool planes = false;
    for (std::size_t k = 0; k < graph.operators.size() && !planes; ++k)
      planes = signature(graph, OpId{k}, 1).find(Dim::height) >= 0;
    if (plan.tp > 1 && !planes)
      return no(
          fmt::format("strategy spatial cuts images over tp; {} has none; use tp 1 or another "
                      "strategy, like megatron",
                      graph.name));
    if (plan.cp * plan.ep != 1) {
      return no(fmt::format("strategy spatial cuts images over tp; use cp and ep 1, got {} and {}",
                            plan.cp, plan.ep));
    }
    // Dryden et al., IPDPS 2019: the image's height is cut; everything after the plane is data
    // parallel.
    rule("*", Dim::height, "tp");
    rule("*", Dim::sample, "dp");
    return plan;
  }
  rule("kind:grouped_product", Dim::expert, "ep");
  rule("kind:grouped_product", Dim::ffn, "etp");
  rule("*moe*activation", Dim::expert, "ep");
  rule("*moe*activation", Dim::ffn, "etp");
  for (const char* routed : {"kind:grouped_product", "*moe.activation"}) {
    // What neither ep nor etp takes of tp has tokens of its own there too.
    if (axes["etp_outer"].empty()) break;
    rule(routed, Dim::sequence, "cp", zigzag);
    rule(routed, Dim::sequence, "etp_outer");
  }
  if (plan.context == Plan::ContextExchange::all_to_all) {
    // Ulysses: inside attention the heads are cut over cp and every rank sees the whole sequence.
    rule("kind:attention", Dim::head, "tp");
    rule("kind:attention", Dim::head, "cp");
  }
  // A scan needs the whole sequence: over cp it has some of the groups (Megatron-Core,
  // megatron/core/ssm/mamba_context_parallel.py).
  for (const char* whole : {"kind:causal_convolution", "kind:state_space"}) {
    rule(whole, Dim::head, "tp");
    rule(whole, Dim::head, "cp");
  }
  rule("*", Dim::head, "tp");
  if (plan.strategy == "megatron") {
    rule("*", Dim::ffn, "tp");
    rule("*", Dim::vocabulary, "tp");
    if (!has_dim(graph, Dim::ffn) && !has_dim(graph, Dim::head) && plan.tp > 1) {
      // A network without heads and feed-forward widths (a CNN): channels. Filters are cut, inputs
      // gathered.
      rule("kind:convolution", Dim::feature, "tp");
      rule("kind:linear", Dim::feature, "tp");
    }
  }
  rule("*", Dim::sample, "dp");
  rule("*", Dim::sequence, "cp", zigzag);
  if (plan.sequence_parallel) rule("*", Dim::sequence, "tp", false, true);
  return plan;
}

namespace {

/// One stage's turns of DualPipe, in the eight steps of https://arxiv.org/abs/2412.19437, section
/// 3.2.1, and the schedule published with it. Stage s of p has chunk s of the copy fed from the
/// first stage and chunk p + (p - 1 - s) of the copy fed from the last. `near` is the copy whose
/// start is nearer; micro-batches [0, m / 2) are the first copy's.
std::vector<Turn> dualpipe_turns(int s, int p, int m) {
  std::vector<Turn> order;
  const bool second_half = s >= p / 2;
  const int depth = second_half ? p - 1 - s : s;  // from the nearer end
  const int half = p / 2;
  enum Side { near = 0, far = 1 };
  const auto chunk = [&](Side side) {
    const bool second = (side == far) != second_half;
    return second ? 2 * p - 1 - s : s;
  };
  const auto first = [&](Side side) { return (side == far) != second_half ? m / 2 : 0; };
  int forwards[2] = {0, 0}, backwards[2] = {0, 0};
  std::vector<Turn> waiting;
  std::size_t next = 0;
  const auto forward = [&](Side side) {
    order.push_back({BlockKind::forward, chunk(side), first(side) + forwards[side]++});
  };
  const auto backward = [&](Side side, bool weight_waits) {
    const int mb = first(side) + backwards[side]++;
    order.push_back({BlockKind::backward, chunk(side), mb});
    const Turn weight{BlockKind::backward_weight, chunk(side), mb};
    (weight_waits ? waiting : order).push_back(weight);
  };
  const auto weight = [&] { order.push_back(waiting.at(next++)); };
  const auto both = [&](Side f, Side b) { forward(f), backward(b, false); };
  for (int i = 0; i < 2 * (half - depth - 1); ++i) forward(near);
  for (int i = 0; i < depth + 1; ++i) forward(near), forward(far);
  for (int i = 0; i < half - depth - 1; ++i) backward(far, true), weight(), forward(far);
  for (int i = 0; i < m / 2 - p + depth + 1; ++i) both(near, far), both(far, near);
  for (int i = 0; i < half - depth - 1; ++i) backward(far, false), both(far, near);
  bool waits = false;
  for (int i = 0; i < depth + 1; ++i) {
    waits |= i == (depth + 1) / 2 && depth % 2 == 1;
    backward(far, waits);
    waits |= i == (depth + 1) / 2 && depth % 2 == 0;
    backward(near, waits);
  }
  for (int i = 0; i < half - depth - 1; ++i) weight(), backward(near, true);
  while (next < waiting.size()) weight();
  return order;
}

}  // namespace

std::vector<std::vector<Turn>> turns(Schedule schedule, int stages, int v, int m, int group) {
  std::vector<std::vector<Turn>> all(static_cast<std::size_t>(stages));
  const auto forward = [](int chunk, int mb) { return Turn{BlockKind::forward, chunk, mb}; };
  const auto backward = [](int chunk, int mb) { return Turn{BlockKind::backward, chunk, mb}; };
  for (int s = 0; s < stages; ++s) {
    auto& order = all[static_cast<std::size_t>(s)];
    switch (schedule) {
      case Schedule::naive:
        // One micro-batch after the other; only one stage works at a time.
        for (int i = 0; i < m; ++i) order.push_back(forward(s, i)), order.push_back(backward(s, i));
        break;
      case Schedule::gpipe:
        // https://arxiv.org/abs/1811.06965: all forwards, then all backwards in reverse.
        for (int i = 0; i < m; ++i) order.push_back(forward(s, i));
        for (int i = m; i-- > 0;) order.push_back(backward(s, i));
        break;
      case Schedule::one_f_one_b: {
        // https://arxiv.org/abs/2006.09503 (PipeDream-Flush).
        const int warm = std::min(stages - 1 - s, m);
        for (int i = 0; i < warm; ++i) order.push_back(forward(s, i));
        for (int i = warm; i < m; ++i)
          order.push_back(forward(s, i)), order.push_back(backward(s, i - warm));
        for (int i = m - warm; i < m; ++i) order.push_back(backward(s, i));
        break;
      }
      case Schedule::zero_bubble_h1: {
        // https://arxiv.org/abs/2401.10241, section 2.2: 1F1B whose gradients of weights wait.
        // Stage s lets s of them wait, so it holds p - s micro-batches' activations and s
        // micro-batches' inputs: no more than the first stage of 1F1B.
        const int ahead = std::min(stages - 1 - s, m);
        const auto weight = [&](int mb) {
          if (mb >= 0) order.push_back({BlockKind::backward_weight, s, mb});
        };
        for (int i = 0; i < ahead; ++i) order.push_back(forward(s, i));
        for (int i = ahead; i < m; ++i)
          order.push_back(forward(s, i)), order.push_back(backward(s, i - ahead)),
              weight(i - ahead - s);
        for (int i = m - ahead; i < m; ++i) order.push_back(backward(s, i)), weight(i - s);
        for (int i = std::max(0, m - s); i < m; ++i) weight(i);
        break;
      }
      case Schedule::dualpipe:
        order = dualpipe_turns(s, stages, m);
        break;
      case Schedule::interleaved: {
        // https://arxiv.org/abs/2104.04473, section 2.2: groups of micro-batches walk the v chunks.
        const int total = m * v, size = group > 0 ? group : stages;
        const auto step = [&](int k, bool ahead) {
          const int first = k / (size * v) * size, in_group = k - first * v;
          const int here = std::min(size, m - first);  // the last group may be smaller
          const int local = in_group / here;
          const int chunk = (ahead ? local : v - 1 - local) * stages + s;
          const int mb = first + in_group % here;
          return ahead ? forward(chunk, mb) : backward(chunk, mb);
        };
        const int warm = std::min((stages - s - 1) * 2 + (v - 1) * size, total);
        for (int k = 0; k < warm; ++k) order.push_back(step(k, true));
        for (int k = warm; k < total; ++k)
          order.push_back(step(k, true)), order.push_back(step(k - warm, false));
        for (int k = total - warm; k < total; ++k) order.push_back(step(k, false));
        break;
      }
    }
  }
  return all;
}

void set_precision(Plan& plan, std::string_view word, const std::string& place) {
  constexpr std::array kTrained{ElementType::fp32, ElementType::tf32, ElementType::bf16,
                                ElementType::fp16, ElementType::fp8,  ElementType::mxfp8,
                                ElementType::nvfp4};
  Precision p;
  const ElementType type = parse_element_type(word, place, kTrained);
  plan.precision_name = std::string(name(type));
  plan.precision_roles = false;
  switch (type) {
    case ElementType::fp32:
    case ElementType::tf32:
      p = {ElementType::fp32, ElementType::fp32, type, ElementType::fp32,
           ElementType::fp32, ElementType::fp32, false};
      break;
    case ElementType::bf16:
    case ElementType::fp16:
      p.parameters = p.activations = p.compute = type;
      break;
    case ElementType::fp8:
    case ElementType::mxfp8:
    case ElementType::nvfp4:
      // Products in the narrow type; stored parameters and activations stay bf16 (Transformer
      // Engine).
      p.compute = type;
      break;
    case ElementType::int8:
      throw InputError(place,
                       "int8 is no training precision; use fp32, bf16, fp16, fp8, mxfp8 or nvfp4");
  }
  // A framework's gradients of the parameters' type are of the new one.
  const auto follow = [&](ElementType gradients) {
    const bool same = plan.precision.master_copy && gradients == plan.precision.parameters;
    return same ? p.parameters : gradients;
  };
  p.gradients = follow(plan.precision.gradients);
  p.gradient_communication = follow(plan.precision.gradient_communication);
  if (!p.master_copy) p.gradients = p.gradient_communication = ElementType::fp32;
  plan.precision = p;
}

RecomputeSet parse_recompute(std::string_view word, const std::string& place) {
  RecomputeSet set;
  if (word == "none") {
    set.kind = Recompute::none;
  } else if (word == "attention") {
    set.kind = Recompute::attention;
  } else if (word == "selective") {
    set.kind = Recompute::selective;
  } else if (word == "full") {
    set.kind = Recompute::full;
  } else if (word.substr(0, 6) == "first:") {
    set.kind = Recompute::first;
    std::int64_t n = -1;
    const std::string_view digits = word.substr(6);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
    if (error != std::errc{} || end != digits.data() + digits.size()) n = -1;
    if (n < 0)
      throw InputError(place, fmt::format("'{}' needs a number of blocks, like first:4", word));
    set.first = n;
  } else if (word.find('*') != std::string_view::npos || word.find('.') != std::string_view::npos) {
    set.kind = Recompute::patterns;
    std::string rest(word);
    for (std::size_t at = 0; at != std::string::npos;) {
      const auto comma = rest.find(',', at);
      set.patterns.push_back(rest.substr(at, comma == std::string::npos ? comma : comma - at));
      at = comma == std::string::npos ? comma : comma + 1;
    }
  } else {
    throw InputError(
        place, fmt::format("'{}' is no recompute set; use none, attention, selective, full, "
                           "first:N or operator patterns like '*.attention.core,*.mlp.activation'",
                           word));
  }
  return set;
}

std::string text(const RecomputeSet& set) {
  switch (set.kind) {
    case Recompute::none:
      break;
    case Recompute::attention:
      return "attention";
    case Recompute::selective:
      return "selective";
    case Recompute::full:
      return "full";
    case Recompute::first:
      return fmt::format("first:{}", set.first);
    case Recompute::patterns:
      return fmt::format("{}", fmt::join(set.patterns, ","));
  }
  return "none";
}

void set_framework(Plan& plan, std::string_view word, const std::string& place) {
  const FrameworkProfile f = load_framework(word, place);
  plan.framework = f.name;
  plan.pad_vocabulary = f.pad_vocabulary;
  plan.precision.gradients = plan.precision.gradient_communication =
      f.fp32_gradients ? ElementType::fp32 : plan.precision.parameters;
  plan.bucket = f.bucket;
  plan.overlap_gradients = f.overlap_gradients;
  plan.selective = parse_recompute(f.selective, place);
  plan.launches = f.launches;
  plan.kernels = f.kernels;
  plan.send_wait = f.send_wait;
  plan.scatter_messages = f.scatter_messages;
  plan.sums_in_turn = f.sums_in_turn;
  plan.sums_copies_last = f.sums_copies_last;
  plan.overlap_multiprocessors = f.overlap_multiprocessors;
  plan.scatter_multiprocessors = f.scatter_multiprocessors;
  plan.allocations = f.allocations;
  plan.context = f.ring_context ? Plan::ContextExchange::ring : Plan::ContextExchange::all_gather;
  plan.context_given = false;
  plan.save_gathered = f.save_gathered;
  plan.regathers_recomputed = f.regathers_recomputed;
  plan.reduces_units = f.reduces_units;
  plan.rows_once = f.rows_once;
  plan.narrow_gathers = f.narrow_gathers;
  plan.framework_clip = f.clip;
  plan.fp8_format = f.fp8_format;
  plan.expert_bias_apart = f.expert_bias_apart;
  plan.channels_first = f.channels_first && plan.precision.activations == ElementType::fp32;
  plan.fuses_normalise = f.fuses_normalise;
  plan.joins_projections = f.joins_projections;
  plan.recompute_stops_early = f.recompute_stops_early;
  plan.stays_gathered = f.stays_gathered;
  plan.score_passes_forward = f.score_passes_forward;
  plan.score_passes_backward = f.score_passes_backward;
}

bool concerns(const Workload& w, const Occasion& where, const Plan& plan) {
  const auto any = [](const std::vector<std::string>& patterns, const std::string& word) {
    return patterns.empty() || std::any_of(patterns.begin(), patterns.end(),
                                           [&](const auto& p) { return matches(p, word); });
  };
  return any(w.frameworks, where.framework) && any(w.networks, where.network) &&
         any(w.rows, where.row) && any(w.between_nodes, where.between_nodes) &&
         any(w.devices, where.device) && any(w.precisions, where.precision) &&
         (w.gpus == 0 || w.gpus == where.gpus) && (!w.zero || plan.zero == *w.zero);
}

std::vector<std::string> apply(const Workload& w, Plan& p,
                               const std::function<bool(const char* key)>& open, bool& overlaps) {
  std::vector<std::string> said;
  const auto set = [&](const char* what, std::optional<bool> to, bool& in) {
    if (!to || *to == in) return;
    in = *to;
    said.push_back(fmt::format("{} {}", what, *to ? "on" : "off"));
  };
  if (open("recompute") && !w.recompute.empty()) {
    p.recompute = parse_recompute(w.recompute, "recompute");
    said.push_back("recompute " + w.recompute);
  }
  if (open("zero_group") && w.zero_group > 0 && p.zero > 0 && p.zero_group == 0 &&
      p.dp % w.zero_group == 0) {
    p.zero_group = w.zero_group;
    said.push_back(fmt::format("{} ranks share a copy of the state", w.zero_group));
  }
  if (open("offload") && w.offload_blocks > 0) {
    p.offload_activations = true;
    p.offload_blocks = w.offload_blocks;
    said.push_back(fmt::format("activations of {} blocks on the host", w.offload_blocks));
  }
  if (open("overlap_tensor_parallel"))
    set("tensor-parallel overlap", w.overlaps_tensor_parallel, overlaps);
  if (open("rows_once")) set("rows once", w.rows_once, p.rows_once);
  if (open("launch")) {
    set("graphs", w.graphs, p.launches.graphs);
    // What is captured as a whole counts rows on the device.
    if (p.launches.graphs) p.launches.waits_for_counts = false;
    set("graphs beside experts", w.graphs_beside_experts, p.launches.graphs_beside_experts);
    if (!w.graphs_of.empty()) {
      p.launches.graphs_of = w.graphs_of;
      said.push_back("graphs of " + w.graphs_of);
    }
    set("blocking launches", w.blocking, p.launches.blocking);
  }
  set("fused experts", w.fused_experts, p.kernels.fused_experts);
  if (p.kernels.fused_experts) p.expert_bias_apart = false;
  if (w.activation_passes_forward > 0) {
    p.kernels.activation_passes_forward = w.activation_passes_forward;
    p.kernels.activation_passes_backward = w.activation_passes_backward;
    said.push_back("activations of separate kernels");
  }
  if (open("overlap_experts") && w.overlaps_experts) {
    bool beside = p.exchanges_beside_blocks();
    set("overlap of experts", w.overlaps_experts, beside);
    p.overlap_experts = beside;
  }
  set("early end of what runs again", w.recompute_stops_early, p.recompute_stops_early);
  if (open("precision")) {
    bool narrow = false;
    set("gradients in the parameters' type", w.narrow_gradients, narrow);
    if (narrow) p.precision.gradients = p.precision.gradient_communication = p.precision.parameters;
  }
  return said;
}

namespace {

struct Role {
  const char* key;
  ElementType Precision::*type;
};
constexpr std::array kRoles{Role{"parameters", &Precision::parameters},
                            Role{"activations", &Precision::activations},
                            Role{"compute", &Precision::compute},
                            Role{"gradients", &Precision::gradients},
                            Role{"gradient_communication", &Precision::gradient_communication},
                            Role{"optimizer", &Precision::optimizer}};

/// `precision: {base: bf16, compute: fp8, ...}`: a named precision with roles changed.
void set_precision_roles(Plan& p, const YamlNode& n) {
  if (const auto base = n.find("base")) set_precision(p, base->as_string(), base->place());
  for (const Role& r : kRoles) {
    if (const auto x = n.find(r.key)) {
      p.precision.*r.type = parse_element_type(x->as_string(), x->place());
      p.precision_roles = true;
    }
  }
  // They travel as they are, unless it is said.
  if (n.find("gradients") && !n.find("gradient_communication"))
    p.precision.gradient_communication = p.precision.gradients;
  if (const auto x = n.find("master_copy")) {
    p.precision.master_copy = x->as_bool();
    p.precision_roles = true;
  }
  n.reject_unknown_keys();
}

}  // namespace

namespace {

void set_compression(Compression& c, const YamlNode& n) {
  const auto kind = [&](const YamlNode& x) {
    const std::string word = x.as_string();
    std::vector<std::string> known;
    for (const auto k : {CompressionKind::none, CompressionKind::cast, CompressionKind::top_k,
                         CompressionKind::power_sgd, CompressionKind::one_bit}) {
      known.emplace_back(name(k));
      if (word == known.back()) c.kind = k;
    }
    if (std::find(known.begin(), known.end(), word) == known.end())
      throw InputError(x.place(), fmt::format("'{}' is no compression{}; there are {}", word,
                                              did_you_mean(word, known), fmt::join(known, ", ")));
  };
  if (!n.is_map()) {
    kind(n);
    return;
  }
  if (const auto x = n.find("kind")) kind(*x);
  if (const auto x = n.find("type")) {
    c.type = parse_element_type(x->as_string(), x->place());
    if (c.type != ElementType::bf16 && c.type != ElementType::fp16)
      throw InputError(x->place(),
                       fmt::format("gradients are cast to bf16 or fp16, not {}", name(c.type)));
  }
  if (const auto x = n.find("ratio")) {
    c.ratio = x->as_double();
    if (!(c.ratio > 0 && c.ratio <= 1))
      throw InputError(x->place(), fmt::format("{} is not in (0, 1]", c.ratio));
  }
  if (const auto x = n.find("rank")) c.rank = x->as_int(1, 65536);
  if (const auto x = n.find("error_feedback")) c.error_feedback = x->as_bool();
  n.reject_unknown_keys();
}

void set_launches(Launches& l, const YamlNode& n) {
  const auto time = [](const YamlNode& x, Seconds& t) {
    t = x.as_seconds();
    if (!(t.count >= 0 && t.count <= 1))
      throw InputError(x.place(), fmt::format("{} is no time of a launch; 0 s to 1 s", text(t)));
  };
  if (const auto x = n.find("kernel")) time(*x, l.kernel);
  if (const auto x = n.find("product")) time(*x, l.product);
  if (const auto x = n.find("loop")) time(*x, l.loop);
  if (const auto x = n.find("transfer")) time(*x, l.transfer);
  if (const auto x = n.find("step")) time(*x, l.step);
  if (const auto x = n.find("graphs")) l.graphs = x->as_bool();
  if (const auto x = n.find("graphs_beside_experts")) l.graphs_beside_experts = x->as_bool();
  if (const auto x = n.find("graphs_of")) l.graphs_of = x->as_string();
  if (const auto x = n.find("waits_for_counts")) l.waits_for_counts = x->as_bool();
  if (const auto x = n.find("waits_for_messages")) l.waits_for_messages = x->as_bool();
  if (const auto x = n.find("blocking")) l.blocking = x->as_bool();
  n.reject_unknown_keys();
}

}  // namespace

void apply(Plan& p, const YamlNode& y, bool with_framework = true) {
  y.reject_empty_keys();
  if (const auto n = y.find("framework"); n && with_framework)
    set_framework(p, n->as_string(), n->place());
  if (const auto n = y.find("strategy")) {
    p.strategy = n->as_string();
    const auto known = strategies();
    if (std::find(known.begin(), known.end(), p.strategy) == known.end()) {
      throw InputError(n->place(),
                       fmt::format("'{}' is no strategy{}; there are {}", p.strategy,
                                   did_you_mean(p.strategy, known), fmt::join(known, ", ")));
    }
  }
  const auto integer = [&](const char* key, std::int64_t& to, std::int64_t lowest = 1) {
    if (const auto n = y.find(key)) to = n->as_int(lowest, 1'000'000'000);
  };
  integer("tp", p.tp);
  integer("pp", p.pp);
  integer("dp", p.dp);
  integer("cp", p.cp);
  integer("ep", p.ep);
  integer("etp", p.etp, 0);
  integer("virtual_stages", p.virtual_stages);
  integer("micro_batch", p.micro_batch);
  integer("global_batch", p.global_batch, 0);
  integer("zero_group", p.zero_group, 0);
  integer("micro_batch_group", p.micro_batch_group, 0);
  integer("average_every", p.average_every, 0);
  integer("servers", p.servers, 0);
  integer("staleness", p.staleness, 0);
  if (const auto n = y.find("zero")) p.zero = static_cast<int>(n->as_int(0, 3));
  if (const auto n = y.find("sequence_parallel")) p.sequence_parallel = n->as_bool();
  if (const auto n = y.find("reshard_after_forward")) p.reshard_after_forward = n->as_bool();
  if (const auto n = y.find("stays_gathered"))
    p.stays_gathered = parse_stays_gathered(n->as_string(), n->place());
  if (const auto n = y.find("save_gathered")) p.save_gathered = n->as_bool();
  if (const auto n = y.find("reduces_units")) p.reduces_units = n->as_bool();
  if (const auto n = y.find("regathers_recomputed")) p.regathers_recomputed = n->as_bool();
  if (const auto n = y.find("overlap_gradients")) p.overlap_gradients = n->as_bool();
  if (const auto n = y.find("rows_once")) p.rows_once = n->as_bool();
  if (const auto n = y.find("overlap_experts")) p.overlap_experts = n->as_bool();
  if (const auto n = y.find("narrow_gathers")) p.narrow_gathers = n->as_bool();
  if (const auto n = y.find("fp8_format"))
    p.fp8_format = parse_fp8_format(n->as_string(), n->place());
  if (const auto n = y.find("channels_first")) p.channels_first = n->as_bool();
  if (const auto n = y.find("fuses_normalise")) p.fuses_normalise = n->as_bool();
  if (const auto n = y.find("joins_projections")) p.joins_projections = n->as_bool();
  if (const auto n = y.find("recompute_stops_early")) p.recompute_stops_early = n->as_bool();
  if (const auto n = y.find("score_passes_forward"))
    p.score_passes_forward = static_cast<int>(n->as_int(1, 100));
  if (const auto n = y.find("score_passes_backward"))
    p.score_passes_backward = static_cast<int>(n->as_int(1, 100));
  if (const auto n = y.find("overlap_tensor_parallel")) p.overlap_tensor_parallel = n->as_bool();
  if (const auto n = y.find("tensor_parallel_in_turn")) p.tensor_parallel_in_turn = n->as_bool();
  if (const auto n = y.find("sharded_storage")) p.sharded_storage = n->as_bool();
  if (const auto n = y.find("loader")) p.loader = n->as_bool();
  if (const auto n = y.find("bucket")) p.bucket = n->as_bytes();
  if (const auto n = y.find("context_exchange"))
    p.context = parse_context_exchange(n->as_string(), n->place()), p.context_given = true;
  if (const auto n = y.find("schedule")) {
    p.schedule = parse_schedule(n->as_string(), n->place());
    p.schedule_given = true;
  }
  if (const auto n = y.find("precision")) {
    if (n->is_map()) {
      set_precision_roles(p, *n);
    } else {
      set_precision(p, n->as_string(), n->place());
    }
  }
  if (const auto n = y.find("recompute")) p.recompute = parse_recompute(n->as_string(), n->place());
  if (const auto n = y.find("cuts")) p.cuts = n->as_ints();
  const auto none = [](const YamlNode& n) { return n.is_scalar() && n.as_string() == "none"; };
  if (const auto n = y.find("freeze"))
    p.freeze = none(*n) ? std::vector<std::string>{} : n->as_strings();
  if (const auto n = y.find("lora")) {
    if (none(*n)) {
      p.lora.clear(), p.lora_rank = 0;
    } else {
      // One of the two may change alone.
      if (const auto x = n->find("patterns")) p.lora = x->as_strings();
      if (const auto x = n->find("rank")) p.lora_rank = x->as_int(1, 65536);
      n->reject_unknown_keys();
    }
  }
  if (const auto n = y.find("optimizer")) {
    if (const auto x = n->find("kind")) {
      const std::string kind = x->as_string();
      if (kind != "sgd" && kind != "adam") {
        throw InputError(n->place(), fmt::format("'{}' is no optimizer; use sgd or adam", kind));
      }
      p.optimizer.kind = kind == "sgd" ? OptimizerKind::sgd : OptimizerKind::adam;
    }
    const auto read = [&](const char* key, double& value, double below) {
      const auto x = n->find(key);
      if (!x) return;
      value = x->as_double();
      if (!(value >= 0 && value < below))
        throw InputError(x->place(), fmt::format("{} must be at least 0{}", value,
                                                 below > 1 ? "" : " and below 1"));
    };
    constexpr double kAny = std::numeric_limits<double>::infinity();
    read("learning_rate", p.optimizer.learning_rate, kAny);
    read("momentum", p.optimizer.momentum, 1);
    read("beta1", p.optimizer.beta1, 1);
    read("beta2", p.optimizer.beta2, 1);
    read("epsilon", p.optimizer.epsilon, kAny);
    read("weight_decay", p.optimizer.weight_decay, kAny);
    if (const auto x = n->find("clip")) {
      p.optimizer.clip = x->as_double();
      p.clip_given = true;
      if (!(p.optimizer.clip >= 0))
        throw InputError(
            x->place(), fmt::format("{} is no norm to clip to; use a number above 0, or 0 for none",
                                    p.optimizer.clip));
    }
    n->reject_unknown_keys();
  }
  if (const auto n = y.find("loss_scale")) {
    LossScale& l = p.loss_scale;
    if (n->is_map()) {
      if (const auto x = n->find("initial")) l.initial = x->as_double();
      if (const auto x = n->find("dynamic")) l.dynamic = x->as_bool();
      if (const auto x = n->find("growth_interval"))
        l.growth_interval = static_cast<int>(x->as_int(1, 1'000'000'000));
      if (l.dynamic && l.initial == 0) l.initial = 65536;
      n->reject_unknown_keys();
    } else {
      l = LossScale{n->as_double(), false, l.growth_interval};
    }
    int exponent = 0;
    if (!(l.initial >= 0) || (l.initial > 0 && std::frexp(l.initial, &exponent) != 0.5)) {
      throw InputError(n->place(),
                       fmt::format("{} is no loss scale; use a power of two, which keeps "
                                   "every bit, or 0 for none",
                                   l.initial));
    }
  }
  if (const auto n = y.find("message_queue")) p.message_queue = n->as_bool();
  if (const auto n = y.find("offload")) {
    if (const auto x = n->find("optimizer")) p.offload_optimizer = x->as_bool();
    if (const auto x = n->find("activations")) p.offload_activations = x->as_bool();
    if (const auto x = n->find("blocks")) p.offload_blocks = x->as_int(0, 1'000'000);
    n->reject_unknown_keys();
  }
  if (const auto n = y.find("compression")) set_compression(p.compression, *n);
  if (const auto n = y.find("launch")) set_launches(p.launches, *n);
  if (const auto n = y.find("placement")) {
    std::vector<std::string> words;
    if (n->is_map() || n->is_list()) {
      for (const YamlNode& word : n->items()) words.push_back(word.as_string());
    } else {
      std::string all = n->as_string();
      all.erase(std::remove(all.begin(), all.end(), ' '), all.end());
      std::istringstream list(all);
      for (std::string word; std::getline(list, word, ',');) words.push_back(word);
    }
    const bool numbers = !words.empty() && !words[0].empty() &&
                         (std::isdigit(static_cast<unsigned char>(words[0][0])) != 0);
    p.devices = numbers ? parse_devices(words, n->place()) : std::vector<std::int32_t>{};
    p.placement = numbers ? std::vector<std::string>{} : std::move(words);
  }
  if (const auto n = y.find("rings")) {
    for (const auto& [axes, strides] : n->members()) p.rings[axes] = strides.as_ints();
  }
  if (const auto n = y.find("shard")) {
    for (const YamlNode& item : n->items()) {
      ShardingRule r;
      r.pattern = item.get("operators").as_string();
      r.dim = parse_dim(item.get("dim").as_string(), item.get("dim").place());
      r.axis = item.get("axis").as_string();
      item.reject_unknown_keys();
      p.user_rules.push_back(r);
    }
  }
  y.reject_unknown_keys();
}

Plan load_plan(const std::string& file, std::string_view unless_said, std::string_view instead,
               const std::string& place) {
  Plan p;
  p.dp = 0;
  const YamlNode y = YamlNode::load_file(file, "partita.plan/1");
  if (const std::string_view name = instead.empty() ? unless_said : instead; !name.empty())
    set_framework(p, name, instead.empty() ? "" : place);
  // A change of one key may leave the other as it is; a file has both.
  if (const auto n = y.find("lora"); n && n->is_map()) n->get("patterns"), n->get("rank");
  apply(p, y, instead.empty());
  return p;
}

namespace {

constexpr const char* kPlanSchema = "partita.plan/1";

/// A key's parts: "optimizer.kind" is a key inside a key.
std::vector<std::string> parts_of(const std::string& key) {
  std::vector<std::string> parts;
  for (std::size_t at = 0, dot; at != std::string::npos;
       at = dot == std::string::npos ? dot : dot + 1) {
    dot = key.find('.', at);
    parts.push_back(key.substr(at, dot == std::string::npos ? dot : dot - at));
  }
  return parts;
}

/// What the plan's file would say of a key; "": nothing, or no single value.
std::string said_of(const Plan& plan, const std::string& key, const std::string& place) {
  std::optional<YamlNode> n = YamlNode::load_text(to_yaml(plan), place, kPlanSchema);
  for (const std::string& part : parts_of(key)) {
    if (n && n->is_map())
      n = n->find(part);
    else
      return "";
  }
  return n && n->is_scalar() ? n->as_string() : "";
}

/// Quotes around words that begin with *, which YAML takes for aliases: "[*.query, *.key]".
std::string with_patterns_quoted(const std::string& value) {
  std::string s;
  char quote = 0, before = 0;  // the last that is no space
  for (std::size_t i = 0; i < value.size(); ++i) {
    const char c = value[i];
    const bool begins = before == 0 || std::string_view("[,{:").find(before) != std::string::npos;
    if (quote == 0 && c == '*' && begins) {
      // Outside of brackets a comma is the word's own.
      const std::size_t end =
          before == 0 ? value.size() : std::min(value.find_first_of(",]}", i), value.size());
      s += '\'' + value.substr(i, end - i) + '\'';
      i = end - 1;
      before = '\'';
      continue;
    }
    if (quote == 0 && (c == '\'' || c == '"'))
      quote = c;
    else if (c == quote)
      quote = 0;
    if (c != ' ') before = c;
    s += c;
  }
  return s;
}

}  // namespace

void set(Plan& plan, const std::string& key, const std::string& value, const std::string& place) {
  // Through the file's own reader, so that keys, types and messages are the same.
  const auto apply_as = [&](Plan& to, const std::string& text) {
    std::string body = fmt::format("schema: {}\n", kPlanSchema), indent;
    const auto parts = parts_of(key);
    for (std::size_t k = 0; k < parts.size(); ++k) {
      body += indent + parts[k] + ":" + (k + 1 == parts.size() ? " " + text : "") + "\n";
      indent += "  ";
    }
    apply(to, YamlNode::load_text(body, place, kPlanSchema));
  };
  if (!multiplies(value)) return apply_as(plan, with_patterns_quoted(value));
  const std::string there = said_of(plan, key, place);
  if (there.empty() || there == "0") {
    Plan probe = plan;
    apply_as(probe, "1");  // a key that there is none of has its own message
    throw InputError(place, fmt::format("{} multiplies what is there, and the plan says no {}; "
                                        "give a number",
                                        value, key));
  }
  apply_as(plan, multiplied(there, value, place));
}

namespace {

std::string precision_text(const Plan& p) {
  if (!p.precision_roles) return p.precision_name;
  std::string s = "{base: " + p.precision_name;
  for (const Role& r : kRoles) s += fmt::format(", {}: {}", r.key, name(p.precision.*r.type));
  return s + fmt::format(", master_copy: {}}}", p.precision.master_copy);
}

}  // namespace

std::string to_yaml(const Plan& p) {
  std::string recompute = text(p.recompute);
  if (p.recompute.kind == Recompute::patterns) recompute = "'" + recompute + "'";
  std::string s = fmt::format(
      "schema: partita.plan/1\nframework: {}\nstrategy: {}\ntp: {}\npp: {}\ndp: {}\ncp: {}\nep: "
      "{}\n"
      "virtual_stages: {}\nmicro_batch: {}\nglobal_batch: {}\nsequence_parallel: {}\nschedule: "
      "{}\nzero: {}\n"
      "recompute: {}\nprecision: {}\n",
      p.framework, p.strategy, p.tp, p.pp, p.dp, p.cp, p.ep, p.virtual_stages, p.micro_batch,
      p.global_batch, p.sequence_parallel, name(p.schedule), p.zero, recompute, precision_text(p));
  if (p.overlap_tensor_parallel) s += "overlap_tensor_parallel: true\n";
  if (p.tensor_parallel_in_turn) s += "tensor_parallel_in_turn: true\n";
  if (p.loader) s += "loader: true\n";
  if (p.sharded_storage) s += "sharded_storage: true\n";
  if (p.average_every > 0) s += fmt::format("average_every: {}\n", p.average_every);
  if (p.message_queue) s += "message_queue: true\n";
  if (p.offload_optimizer || p.offload_activations)
    s += fmt::format("offload: {{optimizer: {}, activations: {}{}}}\n", p.offload_optimizer,
                     p.offload_activations,
                     p.offload_blocks > 0 ? fmt::format(", blocks: {}", p.offload_blocks) : "");
  if (p.servers > 0) s += fmt::format("servers: {}\nstaleness: {}\n", p.servers, p.staleness);
  if (p.loss_scale.initial > 0)
    s += fmt::format("loss_scale: {{initial: {}, dynamic: {}, growth_interval: {}}}\n",
                     p.loss_scale.initial, p.loss_scale.dynamic, p.loss_scale.growth_interval);
  if (!p.placement.empty() && p.devices.empty())
    s += fmt::format("placement: [{}]\n", fmt::join(p.placement, ", "));
  if (!p.devices.empty()) s += fmt::format("placement: [{}]\n", devices_text(p.devices));
  if (!p.rings.empty()) {
    std::vector<std::string> axes;
    for (const auto& [name, strides] : p.rings)
      axes.push_back(fmt::format("{}: [{}]", name, fmt::join(strides, ", ")));
    s += fmt::format("rings: {{{}}}\n", fmt::join(axes, ", "));
  }
  // Whatever a framework says otherwise is written, on or off: a plan is read on top of its own.
  const Launches& l = p.launches;
  s += fmt::format(
      "launch: {{kernel: {} s, product: {} s, loop: {} s, transfer: {} s, step: {} s, graphs: {}, "
      "graphs_beside_experts: {}, graphs_of: \"{}\", waits_for_counts: {}, waits_for_messages: {}, "
      "blocking: {}}}\n",
      l.kernel.count, l.product.count, l.loop.count, l.transfer.count, l.step.count, l.graphs,
      l.graphs_beside_experts, l.graphs_of, l.waits_for_counts, l.waits_for_messages, l.blocking);
  if (const Compression& c = p.compression; c.kind != CompressionKind::none)
    s += fmt::format(
        "compression: {{kind: {}, type: {}, ratio: {}, rank: {}, error_feedback: {}}}\n",
        name(c.kind), name(c.type), c.ratio, c.rank, c.error_feedback);
  if (p.zero_group > 0) s += fmt::format("zero_group: {}\n", p.zero_group);
  if (p.micro_batch_group > 0 && p.micro_batch_group != p.pp)
    s += fmt::format("micro_batch_group: {}\n", p.micro_batch_group);
  if (!p.cuts.empty()) s += fmt::format("cuts: [{}]\n", fmt::join(p.cuts, ", "));
  if (p.etp > 0) s += fmt::format("etp: {}\n", p.etp);
  s += fmt::format(
      "bucket: {}\noverlap_gradients: {}\nreshard_after_forward: {}\nsave_gathered: {}\n"
      "regathers_recomputed: {}\nreduces_units: {}\n",
      exact_text(p.bucket), p.overlap_gradients, p.reshard_after_forward, p.save_gathered,
      p.regathers_recomputed, p.reduces_units);
  s += fmt::format("stays_gathered: {}\n", name(p.stays_gathered));
  s += fmt::format("rows_once: {}\n", p.rows_once);
  if (p.overlap_experts) s += fmt::format("overlap_experts: {}\n", *p.overlap_experts);
  s += fmt::format("narrow_gathers: {}\n", p.narrow_gathers);
  if (p.precision.compute == ElementType::fp8)
    s += fmt::format("fp8_format: {}\n", name(p.fp8_format));
  s += fmt::format("channels_first: {}\n", p.channels_first);
  s += fmt::format("fuses_normalise: {}\n", p.fuses_normalise);
  s += fmt::format("joins_projections: {}\n", p.joins_projections);
  s += fmt::format("recompute_stops_early: {}\n", p.recompute_stops_early);
  s += fmt::format("score_passes_forward: {}\nscore_passes_backward: {}\n", p.score_passes_forward,
                   p.score_passes_backward);
  s += fmt::format("context_exchange: {}\n",
                   p.context == Plan::ContextExchange::all_gather   ? "all_gather"
                   : p.context == Plan::ContextExchange::all_to_all ? "all_to_all"
                                                                    : "ring");
  const auto quoted = [](const std::vector<std::string>& list) {
    std::string all;
    for (const auto& item : list) all += fmt::format("{}'{}'", all.empty() ? "" : ", ", item);
    return all;
  };
  if (!p.freeze.empty()) s += fmt::format("freeze: [{}]\n", quoted(p.freeze));
  if (!p.lora.empty())
    s += fmt::format("lora: {{patterns: [{}], rank: {}}}\n", quoted(p.lora), p.lora_rank);
  const Optimizer& o = p.optimizer;
  s += o.kind == OptimizerKind::sgd
           ? fmt::format("optimizer: {{kind: sgd, learning_rate: {}, momentum: {}}}\n",
                         o.learning_rate, o.momentum)
           : fmt::format(
                 "optimizer: {{kind: adam, learning_rate: {}, beta1: {}, beta2: {}, epsilon: {}, "
                 "weight_decay: {}}}\n",
                 o.learning_rate, o.beta1, o.beta2, o.epsilon, o.weight_decay);
  if (o.clip > 0 || p.clip_given) s.insert(s.size() - 2, fmt::format(", clip: {}", o.clip));
  if (!p.user_rules.empty()) {
    s += "shard:\n";
    for (const ShardingRule& r : p.user_rules) {
      s += fmt::format("  - {{operators: '{}', dim: {}, axis: {}}}\n", r.pattern, name(r.dim),
                       r.axis);
    }
  }
  return s;
}

}  // namespace partita
