#include "simulator/search/predict.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "base/parallel.h"
#include "base/unit_text.h"
#include "simulator/engine/caching_allocator.h"
#include "simulator/search/placement.h"

namespace partita {
namespace {

/// CUDA context and libraries of one process (assumed; measured per device by calibration later).
constexpr Bytes kContext = 512_MiB;

std::vector<std::int64_t> full_extents(const Signature& s) {
  std::vector<std::int64_t> all;
  for (const auto& d : s.dims) all.push_back(d.extent);
  return all;
}

/// Matrix FLOPs of one sample, forward and backward, attention over the whole square: PaLM's model
/// FLOPs (arXiv 2204.02311, appendix B), from the graph instead of 6 N.
double model_flops(const Graph& graph) {
  const auto needed = needs_gradient(graph);
  double total = 0;
  for (std::size_t i = 0; i < graph.operators.size(); ++i) {
    const Operator& op = graph.operators[i];
    if (!is_product(op.operation)) continue;
    const Signature s = signature(graph, OpId{i}, 1);
    const auto extents = full_extents(s);
    total += flops(op.operation, s, extents, Pass::forward).count;
    bool data = false, weight = false;
    for (const TensorId t : op.inputs) data |= needed[t.index()] != 0;
    for (const ParameterId q : op.parameters) weight |= graph.parameter(q).trainable;
    if (data) total += flops(op.operation, s, extents, Pass::backward_data).count;
    if (weight) total += flops(op.operation, s, extents, Pass::backward_weight).count;
  }
  return total;
}

/// Matrix FLOPs that all ranks execute in a step: recomputation and flash attention's second q·k
/// count, masked pairs that no kernel visits do not, of convolutions by Winograd's tiles theirs.
double executed_flops(const Program& p, const std::vector<RankClass>& classes) {
  double total = 0;
  for (const RankClass& c : classes) {
    std::map<BlockId, std::int64_t> calls;
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(c.stage)]) ++calls[call.block];
    for (const auto& [b, n] : calls) {
      for (const Instruction& i : p.blocks[b.index()].instructions) {
        if (i.kind != Kind::compute || i.op < 0) continue;
        const Work work = work_of(p, i, c.representative);
        if (!work.matrix) continue;
        double flops = work.flops.count;
        if (std::holds_alternative<Convolution>(
                p.operators[static_cast<std::size_t>(i.op)].operation)) {
          // Winograd's products are fewer than the direct ones.
          flops = 0;
          for (const Product& x : work.products) flops += x.flops().count;
        }
        total += static_cast<double>(c.count * n) * flops;
      }
    }
  }
  return total;
}

/// Groups of one rank that its collectives run in.
std::set<std::vector<std::int64_t>> groups_of(const Program& p, const RankClass& c) {
  std::set<std::vector<std::int64_t>> groups;
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(c.stage)])
    blocks.insert(call.block);
  std::set<std::pair<std::int32_t, AtomMask>> seen;  // ties and atoms
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind == Kind::collective && seen.insert({i.tie, i.atoms}).second)
        groups.insert(p.group(i, c.representative));
    }
  }
  return groups;
}

/// Of the measured number of ranks that is nearest by its ratio, the larger of two.
Bytes nearest(const std::map<int, Bytes>& by_ranks, std::size_t ranks) {
  const auto distance = [&](int n) {
    return std::abs(std::log(static_cast<double>(n) / static_cast<double>(ranks)));
  };
  auto best = by_ranks.begin();
  for (auto it = by_ranks.begin(); it != by_ranks.end(); ++it) {
    if (distance(it->first) <= distance(best->first)) best = it;
  }
  return best->second;
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return ceil_div(n, to) * to; }

/// The same step with only as many micro-batches as fill and drain the pipeline and repeat between:
/// what is allocated when repeats from there. Empty: it has no more.
std::optional<Program> with_few_micro_batches(const Graph& graph, const Plan& plan) {
  const std::int64_t few = 3 * plan.pp * directions(plan.schedule);
  if (plan.micro_batches() <= few || plan.schedule == Schedule::gpipe) return std::nullopt;
  Plan short_plan = plan;
  short_plan.global_batch = plan.global_batch / plan.micro_batches() * few;
  auto completed = complete(graph, short_plan);
  if (!completed) return std::nullopt;
  auto program = lower_padded(graph, *completed);
  if (!program) return std::nullopt;
  return std::move(*program);
}

}  // namespace

OutsideMemory outside_memory(const Program& p, const RankClass& c, Communication& communication,
                             const DeviceProfile& device) {
  OutsideMemory m;
  m.context = p.allocations.context;
  const bool measured = device.outside.has_value();
  if (measured) {
    m = *device.outside;
    m.by_ranks.clear();
    m.communicators = Bytes{0};
    // A foreign framework's has others in its allocator, and says if its context is another.
    if (!p.packs_collectives) m.workspace = Bytes{0};
    if (p.allocations.context != Allocations{}.context) {
      m.context = p.allocations.context;
      m.kernels = m.libraries = Bytes{0};
    }
  }
  for (const auto& g : groups_of(p, c)) {
    if (g.size() < 2) continue;
    m.communicators += measured && !device.outside->by_ranks.empty()
                           ? nearest(device.outside->by_ranks, g.size())
                           : communication.communicator_memory(g);
  }
  return m;
}

/// Of the device that has most: what needs more fits on none.
Bytes most_usable(const Topology& t) {
  Bytes most{0};
  for (std::size_t k = 0; k < t.profile_count(); ++k)
    most = std::max(most, t.profile(k).usable_memory);
  return most;
}
/// What a plan that does not fit lacks, on the device that has least left.
Bytes missing(const Prediction& p) { return p.peak_device - p.usable; }

Feasible<Program> lower_padded(const Graph& graph, const Plan& plan) {
  return plan.pad_vocabulary > 0 && graph.sequence > 0
             ? lower(with_padded_vocabulary(graph, plan.pad_vocabulary * plan.tp), plan)
             : lower(graph, plan);
}

Feasible<Prediction> predict(const Graph& graph, const Plan& wanted, Communication& communication,
                             Timeline* recorded, Program* out_program, bool only_if_fits,
                             const RoutingSource* routing, Network network) {
  auto plan = complete(graph, wanted);
  if (!plan) return plan.why();
  auto program = lower_padded(graph, *plan);
  if (!program) return program.why();
  if (routing != nullptr) *program = with_routing(std::move(*program), *routing);
  SimulateOptions options;
  options.record = recorded != nullptr;
  options.network = network;
  if (only_if_fits) options.memory_limit = most_usable(communication.topology());
  if (static_cast<std::size_t>(program->ranks()) > communication.topology().rank_count())
    return Infeasible{
        fmt::format("the plan has {} ranks with its loaders, the cluster {} devices; use a "
                    "larger one or no loader",
                    program->ranks(), communication.topology().rank_count())};
  std::optional<Communication> elsewhere;
  if (!plan->as_ranked()) {
    if (const auto fault = beyond(communication.topology(), *plan); !fault.empty())
      return Infeasible{fault};
    elsewhere.emplace(on_devices(communication.topology(), *plan));
    elsewhere->set_adjustment(communication.adjustment());
  }
  const Topology& placed = elsewhere ? elsewhere->topology() : communication.topology();
  Timeline t = simulate(*program, elsewhere ? *elsewhere : communication, options);

  Prediction r;
  r.plan = *plan;
  r.network = network;
  for (const Contended& c : t.contended) {
    // All wait for who is slow, whichever class that is; of equal ones the first lost most.
    const auto same = [&](const Contended& o) {
      return o.worn && o.what == c.what && o.resource == c.resource;
    };
    if (c.worn ? std::none_of(r.contended.begin(), r.contended.end(), same)
               : c.rank_class == t.last_class)
      r.contended.push_back(c);
  }
  std::stable_sort(r.contended.begin(), r.contended.end(),
                   [](const Contended& a, const Contended& b) { return b.lost < a.lost; });
  const std::int64_t per_device = communication.topology().state().ranks_per_device;
  r.devices = (plan->ranks() + per_device - 1) / per_device;
  r.step_time = to_seconds(t.step);
  const double samples = static_cast<double>(plan->global_batch);
  const bool timed = t.step.count > 0;
  r.samples_per_second = timed ? samples / r.step_time.count : 0;
  if (graph.sequence > 0) {
    r.tokens_per_second_per_device =
        r.samples_per_second * static_cast<double>(graph.sequence) / static_cast<double>(r.devices);
  }
  double peak_rate = 0;
  for (const RankClass& c : t.classes) {
    if (c.stage >= program->pipeline_stages()) continue;  // roles compute nothing of the network
    const auto& device = placed.device(DeviceId{static_cast<std::size_t>(c.representative)});
    peak_rate += static_cast<double>(c.count) * device.matrix_rate(plan->precision.compute).count /
                 static_cast<double>(per_device);
  }
  r.mfu = timed ? model_flops(graph) * samples / r.step_time.count / peak_rate : 0;
  r.hfu = timed ? executed_flops(*program, t.classes) / r.step_time.count / peak_rate : 0;
  std::map<int, StageMemory> by_stage;
  // Devices may differ: what counts is who has least left.
  std::size_t fullest = 0;
  std::int64_t least_left = INT64_MAX;
  for (std::size_t c = 0; c < t.classes.size(); ++c) {
    const MemoryUse& use = t.memory[c];
    StageMemory& stage = by_stage[t.classes[c].stage];
    stage.stage = t.classes[c].stage;
    r.peak_host = std::max(r.peak_host, use.host_peak);
    if (use.peak > stage.total) {
      stage.total = use.peak, stage.resident = use.resident, stage.by_category = use.at_peak;
      stage.kept_inputs = kept_inputs(*program, stage.stage, t.classes[c].representative);
      stage.reserved = Bytes{round_up(use.peak.count, 2 << 20)};
    }
    stage.saved = std::max(stage.saved, use.saved);
    stage.saved_by_layers = std::max(stage.saved_by_layers, use.saved_by_layers);
    // Device files give usable memory after the context.
    const auto& device =
        placed.device(DeviceId{static_cast<std::size_t>(t.classes[c].representative)});
    const Bytes usable =
        device.usable_memory + (device.outside ? device.outside->context : kContext);
    if ((usable - use.peak).count < least_left) {
      least_left = (usable - use.peak).count, fullest = c;
      r.peak_allocated = use.peak, r.usable = usable;
      const Block& b = program->blocks[static_cast<std::size_t>(use.peak_block)];
      r.peak_at = fmt::format(
          "stage {}, {}{}", t.classes[c].stage, b.name,
          use.peak_micro_batch >= 0 ? fmt::format(", micro-batch {}", use.peak_micro_batch) : "");
    }
  }
  for (const auto& [s, m] : by_stage) r.memory_by_stage.push_back(m);
  if (!only_if_fits) r.alive = alive_at_peak(*program, t.classes[fullest], t.memory[fullest]);
  for (const RankClass& c : t.classes) {
    if (c.stage >= program->pipeline_stages()) continue;
    const OutsideMemory m =
        outside_memory(*program, c, elsewhere ? *elsewhere : communication,
                       placed.device(DeviceId{static_cast<std::size_t>(c.representative)}));
    if (m.total() > r.outside.total()) r.outside = m;
  }
  const Bytes outside = r.outside.total();
  // A search only weighs: rounding stands for what the allocator leaves between blocks.
  r.peak_reserved = Bytes{round_up(r.peak_allocated.count, 2 << 20)};
  if (!only_if_fits && !program->allocations.expandable_segments &&
      r.peak_allocated + outside <= r.usable) {
    const Bytes limit = r.usable - outside;
    const RankClass& least = t.classes[fullest];
    const auto few = routing == nullptr ? with_few_micro_batches(graph, *plan) : std::nullopt;
    r.peak_reserved =
        program->packs_collectives
            ? reserved_by_us(*program, least)
            : reserved_by(few ? *few : *program, least,
                          placed.device(DeviceId{static_cast<std::size_t>(least.representative)})
                              .compute_capability,
                          limit);
    for (StageMemory& s : r.memory_by_stage) {
      if (s.stage == least.stage) s.reserved = r.peak_reserved;
    }
  }
  r.peak_device = r.peak_reserved + outside;
  const Topology& where = (elsewhere ? *elsewhere : communication).topology();
  if (where.state().ranks_per_device > 1) {
    // The ranks of a device, each with what it needs at its own peak.
    std::unordered_map<std::int32_t, Bytes> of_device;
    for (std::size_t rank = 0; rank < t.class_of_rank.size(); ++rank) {
      const Bytes peak = t.memory[static_cast<std::size_t>(t.class_of_rank[rank])].peak;
      Bytes& all = of_device[where.vertex_of(DeviceId{rank})];
      all += outside +
             (peak == r.peak_allocated ? r.peak_reserved : Bytes{round_up(peak.count, 2 << 20)});
      r.peak_device = std::max(r.peak_device, all);
    }
  }
  // Of the node whose ranks keep most on their host.
  if (r.peak_host.count > 0) {
    std::unordered_map<std::size_t, Bytes> of_node;
    for (std::size_t rank = 0; rank < t.class_of_rank.size(); ++rank) {
      const std::size_t node = where.node_of(DeviceId{rank});
      Bytes& all = of_node[node];
      all += t.memory[static_cast<std::size_t>(t.class_of_rank[rank])].host_peak;
      const Bytes memory = where.host_memory(node);
      if (r.peak_host_node < all) r.peak_host_node = all, r.host_memory = memory;
      r.host_fits = r.host_fits && (memory.count == 0 || all <= memory);
    }
  }
  r.fits = r.peak_device <= r.usable && r.host_fits;
  r.breakdown = t.breakdown[static_cast<std::size_t>(t.last_class)];
  double waited = 0;
  for (const Breakdown& b : t.breakdown) {
    double waits = 0, works = 0;
    for (const auto& [axis, time] : b.exposed) {
      // Of tp alone or with others: "cp+tp", of experts' rows.
      if (axis == "launch" || ("+" + axis + "+").find("+tp+") != std::string::npos)
        waits += static_cast<double>(time.count);
    }
    for (const auto& [kind, time] : b.compute) works += static_cast<double>(time.count);
    if (waits > 0) waited = std::max(waited, waits / (works + waits));
  }
  // A tenth more, as the longest way may go where more than the mean is waited.
  constexpr double kMargin = 1.1;
  r.least_without_sequences = Seconds{r.step_time.count * std::max(0.0, 1 - kMargin * waited)};
  r.classes = t.classes.size();
  r.instructions = t.instructions;
  const double total = static_cast<double>(std::max<std::int64_t>(1, r.breakdown.total().count));
  std::int64_t matrix = 0, memory_bound = 0, exposed = 0;
  const std::set<std::string> products{"linear", "attention", "batched_product", "convolution",
                                       "grouped_product"};
  for (const auto& [kind, time] : r.breakdown.compute)
    (products.count(kind) ? matrix : memory_bound) += time.count;
  std::int64_t launches = 0;
  for (const auto& [axis, time] : r.breakdown.exposed)
    (axis == "launch" ? launches : exposed) += time.count;
  memory_bound += r.breakdown.optimizer.count + r.breakdown.other.count;
  const auto share = [&](std::int64_t n) { return static_cast<double>(n) / total; };
  const bool nccl = communication.uses_nccl();
  // Points of products stand for all of them; elsewhere their model takes the data sheet's rates.
  const auto& first = placed.device(DeviceId{0});
  const bool measured = !first.products.empty() || first.like != nullptr;
  r.rests_on = {
      measured ? RestsOn{"products and attention by shape, near measured points", "measured",
                         share(matrix)}
               : RestsOn{"products and attention by shape: peak rate x sustained fraction",
                         "specified", share(matrix)},
      {"memory-bound kernels: bandwidth x assumed fraction, launch", "assumed",
       share(memory_bound)},
      {nccl ? "exposed communication: NCCL's choice, times of published curves"
            : "exposed communication: link rates, assumed latencies",
       nccl ? "fitted" : "specified", share(exposed)},
      {"pipeline bubble: follows from the above", "derived", share(r.breakdown.bubble.count)}};
  if (program->launches.any() || launches > 0)
    r.rests_on.push_back(
        program->launches.any()
            ? RestsOn{"waiting for the host's launches: times of the plan", "assumed",
                      share(launches)}
            : RestsOn{"waiting for the host's launches: times of the device's profile", "measured",
                      share(launches)});
  if (recorded != nullptr) *recorded = std::move(t);
  if (out_program != nullptr) *out_program = std::move(*program);
  return r;
}

SearchSpace full_space(const Graph& graph, const Topology& topology, std::int64_t ranks,
                       const Plan& base) {
  SearchSpace s;
  std::int64_t domain = 0;  // devices that share an NVLink network, or a node
  for (std::size_t n = 0; n < topology.node_count(); ++n) {
    if (topology.domain_of(n) == topology.domain_of(0))
      domain += static_cast<std::int64_t>(topology.device_count(n));
  }
  bool heads = false, experts = false, sequences = graph.sequence > 0;
  std::int64_t expert_count = 1;
  for (const auto& op : graph.operators) {
    heads |= std::holds_alternative<Attention>(op.operation) ||
             std::holds_alternative<StateSpace>(op.operation);
    if (const auto* g = std::get_if<GroupedProduct>(&op.operation))
      experts = true, expert_count = g->experts;
  }
  for (std::int64_t d = 1; d <= ranks; ++d) {
    if (ranks % d != 0) continue;
    // Tensor parallelism across NVLink domains is legal, but never fastest while a domain's own
    // links are free.
    if (d == 1 || (heads && d <= std::max<std::int64_t>(domain, 1))) s.tp.push_back(d);
    if (d <= std::max(graph.layers, 1)) s.pp.push_back(d);
    // Ranks with fewer than 4,096 tokens only move more for less work.
    if (d == 1 || (sequences && d <= 16 && (graph.sequence >= 16384 || 4096 * d <= graph.sequence)))
      s.cp.push_back(d);
    if (d == 1 || (experts && expert_count % d == 0)) s.ep.push_back(d);
  }
  const std::int64_t batch = std::max<std::int64_t>(1, base.global_batch);
  for (std::int64_t m = 1; m <= batch; ++m) {
    if (batch % m == 0) s.micro_batch.push_back(m);
  }
  s.virtual_stages = {1};
  for (std::int64_t v = 2; v <= std::min<std::int64_t>(8, graph.layers); ++v)
    s.virtual_stages.push_back(v);
  const FrameworkProfile framework = load_framework(base.framework, "framework");
  for (int zero = 0; zero <= framework.zero_highest; ++zero) s.zero.push_back(zero);
  s.zero_pipelined = framework.zero_pipelined;
  s.recompute = {{Recompute::none}};
  if (heads && base.selective.kind != Recompute::full)
    s.recompute.push_back({Recompute::selective});
  s.recompute.push_back({Recompute::full});
  if (experts) s.etp = {0, 1};
  s.schedules = {Schedule::one_f_one_b, Schedule::interleaved};
  return s;
}

namespace {

/// Can `layers` blocks be chunks of an interleaved schedule that are equal to a twentieth? The
/// largest chunk is the pace of all.
bool even_chunks(std::int64_t layers, std::int64_t chunks) {
  return chunks <= layers && 20 * ceil_div(layers, chunks) * chunks <= 21 * layers;
}

/// Candidates that differ in their micro-batch only, ascending. A larger one needs no less memory
/// (to 1 %): as many samples are in flight, and buffers within a block grow with it. But for gpipe,
/// and one micro-batch whose gradients need no place beside those that they are added to.
using Chain = std::vector<Plan>;

/// Of plans that differ in what is recomputed alone.
struct Recomputations {
  const Prediction* all = nullptr;   ///< every block; fits
  const Prediction* none = nullptr;  ///< does not fit, or hardly
};

/// What the plan would take with as many blocks recomputed as memory asks for: of a block's work a
/// quarter is its second forward.
double with_part_recomputed(const Recomputations& r) {
  const auto most = static_cast<double>(r.none->peak_device.count),
             least = static_cast<double>(r.all->peak_device.count),
             room = static_cast<double>(r.all->usable.count);
  const double spared = most > least ? std::clamp((room - least) / (most - least), 0.0, 1.0) : 0;
  return r.all->step_time.count * (1 - spared / 4);
}

/// A plan of one micro-batch needs no gradients beside others.
bool needs_less_as_one(const Plan& p) {
  return p.allocations.weight_gradients != Allocations::WeightGradients::in_place &&
         p.global_batch == p.micro_batch * p.dp;
}

std::vector<Chain> chains_of(const Graph& graph, std::int64_t ranks, const Plan& base,
                             const SearchSpace& space) {
  std::vector<Chain> all;
  std::vector<char> sequence_parallel = space.sequence_parallel;
  if (sequence_parallel.empty()) sequence_parallel = {graph.sequence > 0 ? char{1} : char{0}};
  const auto add = [&](Plan p) {
    Chain chain;
    for (const auto mb : space.micro_batch) {
      // Of micro-batches that do not come out none is a plan.
      if (p.global_batch > 0 && p.global_batch % (mb * p.dp) != 0) continue;
      p.micro_batch = mb;
      chain.push_back(p);
    }
    if (chain.empty()) {  // complete() says why
      p.micro_batch = space.micro_batch.front();
      chain.push_back(std::move(p));
    }
    all.push_back(std::move(chain));
  };
  for (const auto tp : space.tp) {
    for (const auto pp : space.pp) {
      for (const auto cp : space.cp) {
        // Loaders, brokers and servers are ranks of their own.
        Plan sizes = base;
        sizes.tp = tp, sizes.pp = pp, sizes.cp = cp;
        const std::int64_t each = sizes.ranks_of_replica(), left = ranks - sizes.servers * tp;
        if (left < each || left % each != 0) continue;
        const std::int64_t dp = left / each;
        if (!space.dp.empty() && std::find(space.dp.begin(), space.dp.end(), dp) == space.dp.end())
          continue;
        for (const auto ep : space.ep) {
          for (const auto v : space.virtual_stages) {
            for (const auto zero : space.zero) {
              if (zero > 0 && dp * cp == 1 && space.zero.size() > 1) continue;
              if (zero > space.zero_pipelined && pp > 1) continue;
              for (const RecomputeSet& recompute : space.recompute) {
                for (const auto schedule : space.schedules) {
                  // One spelling for what would be the same plan.
                  if (space.schedules.size() > 1 &&
                      ((v > 1) != (schedule == Schedule::interleaved) || (v > 1 && pp == 1)))
                    continue;
                  if (v > 1 && space.virtual_stages.size() > 1 &&
                      !even_chunks(graph.layers, pp * v))
                    continue;
                  for (const auto etp : space.etp) {
                    if (space.etp.size() > 1 && etp != 0 && (tp == 1 || ep == 1)) continue;
                    for (const char sp : sequence_parallel) {
                      Plan p = base;
                      p.tp = tp, p.pp = pp, p.cp = cp, p.ep = ep, p.dp = dp, p.etp = etp;
                      p.virtual_stages = v, p.zero = zero, p.recompute = recompute;
                      p.schedule = schedule, p.schedule_given = true;
                      p.sequence_parallel = sp != 0 && tp > 1;
                      add(std::move(p));
                    }
                  }
                }
              }
            }
          }
        }
      }
    }
  }
  return all;
}

}  // namespace

SearchResult search(const Graph& graph, const Topology& topology, std::int64_t ranks,
                    const Plan& base, const SearchSpace& space, std::size_t keep,
                    std::size_t workers, Network network, const Adjustment& adjustment,
                    SearchProgress* progress) {
  const auto began = std::chrono::steady_clock::now();
  SearchProgress unwatched;
  SearchProgress& watched = progress != nullptr ? *progress : unwatched;
  SearchResult result;
  const std::vector<Chain> chains = chains_of(graph, ranks, base, space);
  std::vector<std::size_t> first;  // outcome of each chain's first plan
  for (const Chain& c : chains) {
    first.push_back(static_cast<std::size_t>(result.space));
    result.space += static_cast<std::int64_t>(c.size());
  }

  // Each with tensor parallelism has a twin that does not cut sequences beside it. That moves as
  // much, in fewer transfers, needs more memory, and has no less to compute: it is at least as slow
  // as the plan would be that waits for none of them.
  const auto twin_of = [&](const Plan& p) -> std::optional<Plan> {
    if (!space.sequence_parallel.empty() || !p.sequence_parallel || p.overlap_tensor_parallel)
      return std::nullopt;
    Plan twin = p;
    twin.sequence_parallel = false;
    return twin;
  };
  for (const Chain& c : chains) {
    for (const Plan& p : c) result.space += twin_of(p) ? 1 : 0;
  }
  watched.space = result.space;

  enum : char { illegal, too_large, evaluated };
  struct Outcome {
    char what = illegal;
    std::string reason;
    std::optional<Prediction> prediction;
  };
  std::size_t plans = 0;
  for (const Chain& c : chains) plans += c.size();
  std::vector<Outcome> outcomes(plans);
  if (workers == 0) workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::unique_ptr<Communication>> communications;
  for (std::size_t w = 0; w < workers; ++w) {
    communications.push_back(std::make_unique<Communication>(topology));
    communications.back()->set_adjustment(adjustment);
  }
  const auto watch = [&](double step) {
    for (double seen = watched.fastest; seen == 0 || step < seen;)
      if (watched.fastest.compare_exchange_weak(seen, step)) break;
  };
  const Bytes usable = most_usable(topology);
  const double parameters = static_cast<double>(parameter_count(graph));
  const bool all_trained = trainable_parameter_count(graph) == parameter_count(graph);
  parallel_for(chains.size(), workers, [&](std::size_t w, std::size_t c) {
    bool full = false, peaked = false;  // a smaller micro-batch's state, or peak, did not fit
    for (std::size_t k = 0; k < chains[c].size(); ++k, ++watched.done) {
      Outcome& o = outcomes[first[c] + k];
      auto plan = complete(graph, chains[c][k]);
      if (!plan) {
        o.reason = plan.reason();
        continue;
      }
      // State of the average rank, counted low: whatever the schedule does, it must be there.
      // Experts may be cut by ep as well, so only the finest cut counts.
      const double ways = static_cast<double>(plan->tp * plan->pp * plan->ep);
      const double shards = plan->zero > 0 ? static_cast<double>(plan->dp * plan->cp) : 1;
      const Precision& in = plan->precision;
      // A shard that is the master copy has no other beside it; the host's and servers' state is
      // not here.
      const bool shard_is_master =
          plan->allocations.fp32_shards && plan->zero == 3 && in.master_copy;
      const double held = shard_is_master ? 0.0
                                          : static_cast<double>(bits(in.parameters)) / 8 /
                                                (plan->zero == 3 ? shards : 1);
      const double kept = static_cast<double>(optimizer_states(plan->optimizer)) *
                              static_cast<double>(bits(in.optimizer)) / 8 +
                          (in.master_copy ? 4.0 : 0.0);
      const bool elsewhere = plan->offload_optimizer || plan->servers > 0;
      const double state = held + (elsewhere ? 0.0 : kept / shards);
      full |= parameters / ways * state > static_cast<double>(usable.count) && all_trained;
      if (full || (peaked && !needs_less_as_one(*plan))) {
        o.what = too_large;
        continue;
      }
      auto prediction = predict(graph, *plan, *communications[w], nullptr, nullptr, true);
      if (!prediction) {
        o.reason = prediction.reason();
        continue;
      }
      o.what = evaluated;
      // Scalars of every micro-batch (its loss) are all that a larger one saves: far below 1 %.
      // Under gpipe all samples are there, and of a larger micro-batch more has gone by the peak in
      // its backward (the head's).
      peaked = plan->schedule != Schedule::gpipe &&
               prediction->peak_allocated.count > usable.count + usable.count / 100;
      if (prediction->fits) watch(prediction->step_time.count);
      o.prediction = std::move(*prediction);
    }
  });
  const auto smaller = [&](Prediction&& p) {
    if (!result.smallest || missing(p) < missing(*result.smallest)) result.smallest = std::move(p);
  };
  const auto not_legal = [&](const std::string& reason) {
    ++result.illegal;
    if (result.example_illegal.empty()) result.example_illegal = reason;
  };
  {
    using Sizes = std::array<std::int64_t, 11>;
    std::map<Sizes, Recomputations> alike;
    for (const Outcome& o : outcomes) {
      if (o.what != evaluated) continue;
      const Prediction& p = *o.prediction;
      const Plan& x = p.plan;
      const Sizes sizes{x.tp,
                        x.pp,
                        x.cp,
                        x.ep,
                        x.etp,
                        x.dp,
                        x.virtual_stages,
                        x.zero,
                        static_cast<std::int64_t>(x.schedule),
                        x.sequence_parallel,
                        x.micro_batch};
      if (x.recompute.kind == Recompute::full && p.fits) alike[sizes].all = &p;
      // What nearly fills its device as weighed may not fit with what its allocator keeps.
      const bool full = p.peak_device.count > p.usable.count - p.usable.count / 20;
      if (x.recompute.kind == Recompute::none && (!p.fits || full)) alike[sizes].none = &p;
    }
    std::vector<std::pair<double, const Prediction*>> promising;
    for (const auto& [sizes, r] : alike) {
      if (r.all != nullptr && r.none != nullptr)
        promising.emplace_back(with_part_recomputed(r), r.all);
    }
    std::stable_sort(promising.begin(), promising.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    constexpr std::size_t kFew = 3;
    constexpr double kNear = 1.03;  // it is an estimate
    for (const auto& [time, p] : promising) {
      const double best = watched.fastest;
      if (result.to_refine.size() == kFew || (best > 0 && time > kNear * best)) break;
      result.to_refine.push_back(*p);
    }
  }
  /// What may be among the fastest: at least so slow, as far as is known.
  struct Candidate {
    Seconds least;
    bool simulated = false;  ///< without contention: `least` is its time
    Prediction prediction;   ///< else of its plan alone
  };
  std::vector<Candidate> candidates;
  for (std::size_t c = 0; c < chains.size(); ++c) {
    for (std::size_t k = 0; k < chains[c].size(); ++k) {
      Outcome& o = outcomes[first[c] + k];
      std::optional<Candidate> twin;
      if (auto plan = twin_of(chains[c][k])) {
        twin.emplace();
        twin->prediction.plan = std::move(*plan);
      }
      switch (o.what) {
        case illegal:
          not_legal(o.reason);
          break;
        case too_large:
          ++result.pruned_memory;
          if (twin) ++result.pruned_memory;
          twin.reset();
          break;
        default:
          ++result.evaluated;
          if (!o.prediction->fits) {
            // With sequences cut there are more communicators, whose buffers may be what is too
            // much.
            if (twin && o.prediction->peak_allocated > o.prediction->usable) {
              ++result.pruned_memory;
              twin.reset();
            }
            smaller(std::move(*o.prediction));
            break;
          }
          if (twin) twin->least = o.prediction->least_without_sequences;
          candidates.push_back({o.prediction->step_time, true, std::move(*o.prediction)});
      }
      if (twin) candidates.push_back(std::move(*twin));
    }
  }
  const auto fastest_first = [&] {
    std::stable_sort(
        result.plans.begin(), result.plans.end(),
        [](const Prediction& a, const Prediction& b) { return a.step_time < b.step_time; });
  };
  // What is shown gets the details that the ranking did not need; with the blocks that its
  // allocator leaves a plan may not fit after all. The ranking is by times without contention,
  // which only adds to them: whoever is slower there than the slowest of those that are kept is
  // with it.
  struct Twin {
    Seconds least;
    char what = illegal;
    std::string reason;
  };
  std::vector<Twin> twins;  // that were simulated
  while (!candidates.empty()) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) { return a.least < b.least; });
    if (result.plans.size() >= keep) {
      fastest_first();
      result.plans.resize(keep);
      if (keep == 0 || !(candidates.front().least < result.plans.back().step_time)) break;
    }
    const std::size_t end = std::min(candidates.size(), std::max(workers, keep));
    std::vector<Feasible<Prediction>> found(end, Infeasible{});
    parallel_for(end, workers, [&](std::size_t w, std::size_t k) {
      const Candidate& c = candidates[k];
      found[k] = c.simulated ? predict(graph, c.prediction.plan, *communications[w], nullptr,
                                       nullptr, false, nullptr, network)
                             : predict(graph, c.prediction.plan, *communications[w], nullptr,
                                       nullptr, true);
      ++(c.simulated ? watched.again : watched.done);
    });
    std::vector<Candidate> next;
    for (std::size_t k = 0; k < end; ++k) {
      Candidate& c = candidates[k];
      if (!c.simulated) {
        twins.push_back({c.least, found[k] ? char{evaluated} : char{illegal},
                         found[k] ? std::string() : found[k].reason()});
        if (!found[k]) continue;
        if (!found[k]->fits) {
          smaller(std::move(*found[k]));
        } else {
          watch(found[k]->step_time.count);
          next.push_back({found[k]->step_time, true, std::move(*found[k])});
        }
        continue;
      }
      Prediction& p = found[k] ? *found[k] : c.prediction;
      if (p.fits) {
        result.plans.push_back(std::move(p));
      } else {
        ++result.pruned_memory, --result.evaluated;
        smaller(std::move(p));
      }
    }
    candidates.erase(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(end));
    for (Candidate& c : next) candidates.push_back(std::move(c));
  }
  for (const Candidate& c : candidates) result.pruned_bound += c.simulated ? 0 : 1;
  // Those that were simulated with others, though they could not be as fast, count as what they
  // are: how many are simulated at once is not to be seen.
  fastest_first();
  const bool all_shown = result.plans.size() >= keep && !result.plans.empty();
  for (const Twin& w : twins) {
    if (all_shown && !(w.least < result.plans[std::min(keep, result.plans.size()) - 1].step_time)) {
      ++result.pruned_bound;
    } else if (w.what == illegal) {
      not_legal(w.reason);
    } else {
      ++result.evaluated;
    }
  }
  watched.done = result.space;
  fastest_first();
  if (result.plans.size() > keep) result.plans.resize(keep);
  if (result.plans.empty() && result.smallest) {
    // It was only weighed; people want to know its time as well.
    if (auto whole = predict(graph, result.smallest->plan, *communications[0], nullptr, nullptr,
                             false, nullptr, network))
      result.smallest = std::move(*whole);
  }
  result.search_time =
      Seconds{std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count()};
  return result;
}

}  // namespace partita
