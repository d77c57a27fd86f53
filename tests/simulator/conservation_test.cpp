// What is neither made nor lost: work, bytes, memory and time.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <map>
#include <random>
#include <set>

#include "simulator/engine/simulate.h"
#include "simulator/plan/framework.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

/// Fraction of query-key pairs that a causal attention over n tokens computes: (n + 1) / 2n.
double attended(const Operator& op, const Signature& s) {
  const auto* a = std::get_if<Attention>(&op.operation);
  if (a == nullptr || !a->causal) return 1;
  const auto n =
      static_cast<double>(s.dims[static_cast<std::size_t>(s.find(Dim::sequence))].extent);
  return (n + 1) / (2 * n);
}

struct Work {
  double forward = 0, backward = 0;
  double total() const { return forward + backward; }
};

/// One operator on `samples` samples, uncut. The network's first operators have no gradient to
/// compute by data.
Work work_of(const Graph& g, OpId id, std::int64_t samples) {
  const Operator& op = g.op(id);
  const Signature s = signature(g, id, samples);
  std::vector<std::int64_t> extents;
  for (const IterationDim& d : s.dims) extents.push_back(d.extent);
  const auto needed = needs_gradient(g);
  bool data = false, weight = false;
  for (std::size_t k = 0; k < op.inputs.size(); ++k)
    data |= s.inputs[k].differentiable && needed[op.inputs[k].index()] != 0;
  for (const ParameterId q : op.parameters) weight |= g.parameter(q).trainable;
  const auto of = [&](Pass pass) {
    return flops(op.operation, s, extents, pass, attended(op, s)).count;
  };
  Work w;
  w.forward = of(Pass::forward);
  if (data) w.backward += of(Pass::backward_data);
  if (weight) w.backward += of(Pass::backward_weight);
  return w;
}

using Chosen = std::function<bool(const Operator&)>;

double serial_work(const Graph& g, std::int64_t samples, const Chosen& recomputed) {
  double sum = 0;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Work w = work_of(g, OpId{i}, samples);
    sum += w.total() + (recomputed(g.operators[i]) ? w.forward : 0);
  }
  return sum;
}

/// On how many ranks of a stage the same part of an operator's work is done: over axes that cut
/// none of its dimensions. A cut of the vocabulary spreads an embedding's table, but every rank
/// walks all tokens.
double copies(const Program& p, std::size_t op) {
  const ProgramOperator& o = p.operators[op];
  std::int64_t parts = 1;
  for (std::size_t d = 0; d < o.cuts.size(); ++d) {
    if (std::holds_alternative<Embedding>(o.operation) &&
        o.signature.dims[d].dim == Dim::vocabulary)
      continue;
    parts *= p.mesh.size(o.cuts[d].atoms);
  }
  return static_cast<double>(p.mesh.ranks()) / static_cast<double>(p.pipeline_stages() * parts);
}

double executed_work(const Timeline& t) {
  double sum = 0;
  for (std::size_t c = 0; c < t.classes.size(); ++c)
    sum += static_cast<double>(t.classes[c].count) * t.flops[c].count;
  return sum;
}

Chosen nothing() {
  return [](const Operator&) { return false; };
}

Timeline run(const Program& p, bool record = false) {
  Communication network(load_topology("dgx-h100:4"));
  SimulateOptions options;
  options.record = record;
  return simulate(p, network, options);
}

TEST(Conservation, PlansThatCutEveryOperatorDoTheSerialNetworksWork) {
  struct Case {
    std::int64_t dp, pp, cp, ep;
    int zero;
    Plan::ContextExchange context;
  };
  using X = Plan::ContextExchange;
  for (const Case& c : {Case{4, 1, 1, 1, 0, X::all_gather}, Case{2, 2, 1, 1, 1, X::all_gather},
                        Case{2, 1, 2, 1, 3, X::all_gather}, Case{1, 4, 2, 1, 0, X::all_to_all},
                        Case{2, 1, 4, 1, 0, X::ring}, Case{1, 2, 2, 1, 1, X::ring},
                        Case{4, 1, 1, 4, 0, X::all_gather}, Case{4, 1, 1, 2, 2, X::all_gather}}) {
    const Graph g = c.ep > 1 ? mixtral() : llama();
    Plan plan = base_plan();
    plan.dp = c.dp;
    plan.pp = c.pp;
    plan.cp = c.cp;
    plan.ep = c.ep;
    plan.zero = c.zero;
    plan.global_batch = 8;
    plan.context = c.context;
    const double serial = serial_work(g, 8, nothing());
    // Whole numbers, but for the attended fraction.
    EXPECT_NEAR(executed_work(run(lowered(g, plan))), serial, 1e-12 * serial);
  }
}

TEST(Conservation, TheSerialWorkIsThatOfTheModel) {
  // network_flops counts whole squares of attention; those here are causal: 9 of 16 pairs.
  const Graph g = llama();
  const NetworkFlops f = network_flops(g);
  double squares = 0, triangles = 0;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    if (!std::holds_alternative<Attention>(g.operators[i].operation)) continue;
    const Work w = work_of(g, OpId{i}, 1);
    triangles += w.total();
    squares += w.total() * 16 / 9;
  }
  const double model = f.forward.count + f.backward_data.count + f.backward_weight.count;
  EXPECT_DOUBLE_EQ(serial_work(g, 1, nothing()), model - squares + triangles);
}

TEST(Conservation, RecomputedWorkIsExactlyTheChosenForwards) {
  struct Case {
    const char* set;
    Chosen chosen;
  };
  const int layers = llama().layers;
  const auto inside = [layers](const Operator& op) { return op.layer >= 0 && op.layer < layers; };
  const std::vector<Case> cases{
      {"full", inside},
      {"selective",
       [](const Operator& op) { return std::holds_alternative<Attention>(op.operation); }},
      {"first:2", [](const Operator& op) { return op.layer >= 0 && op.layer < 2; }},
      {"*.mlp.activation",
       [](const Operator& op) { return matches("*.mlp.activation", op.name); }}};
  for (const Case& c : cases) {
    for (const std::int64_t pp : {1, 2}) {
      Plan plan = base_plan();
      plan.dp = 2;
      plan.pp = pp;
      plan.global_batch = 4;
      plan.recompute = parse_recompute(c.set, "");
      const double expected = serial_work(llama(), 4, c.chosen);
      EXPECT_GT(expected, serial_work(llama(), 4, nothing()));
      EXPECT_NEAR(executed_work(run(lowered(llama(), plan))), expected, 1e-12 * expected) << c.set;
    }
  }
}

TEST(Conservation, RecomputationMayEndWhereNothingMoreIsNeeded) {
  // docs/plan.md: all but the product after the activation and the sum behind it.
  const int layers = llama().layers;
  const auto ends_early = [layers](const Operator& op) {
    return op.layer >= 0 && op.layer < layers && !matches("*.mlp.down", op.name) &&
           !matches("*.mlp.residual", op.name);
  };
  Plan plan = base_plan();
  plan.recompute_stops_early = true;
  plan.recompute = parse_recompute("full", "");
  const double expected = serial_work(llama(), 1, ends_early);
  EXPECT_NEAR(executed_work(run(lowered(llama(), plan))), expected, 1e-12 * expected);
  // A mask or statistics that a backward needs are made again.
  TransformerConfig c = small_config();
  c.dropout = 0.1;
  const Graph dropped = build_transformer(c);
  const auto again = [&](const char* pattern) {
    const Program p = lowered(dropped, plan);
    int n = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions)
        n += i.recomputed && i.op >= 0 &&
             matches(pattern, p.operators[static_cast<std::size_t>(i.op)].name);
    }
    return n;
  };
  EXPECT_GT(again("*.mlp.dropout"), 0);
  EXPECT_GT(again("*.mlp.down"), 0);
  EXPECT_EQ(again("*.mlp.residual"), 0);
}

TEST(Conservation, ATorchtitanBlockMakesEveryOtherProductAgain) {
  // docs/plan.md: key, output and up of the 7 products of Llama-3-8B's block, 79.7 M of 218 M
  // multiplications a token; attention, whose result is kept, is not run again.
  const FrameworkProfile f = load_framework("torchtitan", "");
  TransformerConfig c;
  c.layers = 2, c.hidden = 4096, c.heads = 32, c.kv_heads = 8, c.ffn = 14336;
  c.vocabulary = 128, c.sequence = 16, c.gated = true, c.rotary_dim = 128;
  Plan plan = base_plan();
  set_framework(plan, f.name, "");
  plan.recompute = parse_recompute(f.selective, "");
  ASSERT_TRUE(plan.recompute_stops_early);
  const Program p = lowered(build_transformer(c), plan);
  std::map<std::string, double> work[2];  // blocks of a first and of later micro-batches are alike
  std::set<std::string> made_again;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::compute || i.kernel != Kernel::forward || i.op < 0) continue;
      const auto& op = p.operators[static_cast<std::size_t>(i.op)];
      if (i.recomputed) made_again.insert(op.name.substr(op.name.find('.', 7) + 1));
      if (!matches("layers.*", op.name) || !std::holds_alternative<Linear>(op.operation)) continue;
      work[i.recomputed][op.name] = work_of(p, i, 0).flops.count;
    }
  }
  double forward = 0, again = 0;
  for (const auto& [name, flops] : work[0]) forward += flops;
  for (const auto& [name, flops] : work[1]) again += flops;
  EXPECT_NEAR(again / forward, 79'691'776. / 218'103'808, 1e-12);
  EXPECT_EQ(made_again,
            (std::set<std::string>{"attention_norm", "attention.key", "attention.key_rotary",
                                   "attention.query_rotary", "attention.output",
                                   "attention.residual", "mlp_norm", "mlp.up", "mlp.activation"}));
}

TEST(Conservation, ReplicatedWorkIsExactlyThatOfOperatorsWhichAnAxisDoesNotCut) {
  // Tensor parallelism replicates norms, residuals, dropout, biases after row products, router and
  // positions; with sequence parallelism only the embedding's lookups remain.
  std::set<std::string_view> without, with;
  for (const bool sequence_parallel : {false, true}) {
    Plan plan = base_plan();
    plan.tp = 2;
    plan.sequence_parallel = sequence_parallel;
    const Program p = lowered(gpt(), plan);
    for (std::size_t i = 0; i < p.operators.size(); ++i) {
      if (copies(p, i) > 1)
        (sequence_parallel ? with : without).insert(kind_name(p.operators[i].operation));
    }
  }
  EXPECT_EQ(without, (std::set<std::string_view>{"add", "add_bias", "embedding", "normalize",
                                                 "position_embedding"}));
  EXPECT_EQ(with, (std::set<std::string_view>{"embedding"}));
  // The excess, on random plans.
  std::mt19937 rng{20261126};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int feasible = 0;
  for (int i = 0; i < 400; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    Plan wanted = random_plan(rng);
    wanted.recompute = parse_recompute(rng() % 2 == 0 ? "none" : "full", "");
    wanted.recompute_stops_early = false;
    const auto plan = complete(g, wanted);
    if (!plan || plan->ranks() > 24) continue;
    const auto p = lower(g, *plan);
    if (!p) continue;
    ++feasible;
    double expected = 0;
    for (std::size_t k = 0; k < g.operators.size(); ++k) {
      const Work w = work_of(g, OpId{k}, plan->global_batch);
      const bool again = plan->recompute.kind == Recompute::full && g.operators[k].layer >= 0 &&
                         g.operators[k].layer < g.layers;
      expected += (w.total() + (again ? w.forward : 0)) * copies(*p, k);
    }
    ASSERT_NEAR(executed_work(run(*p)), expected, 1e-12 * expected) << to_yaml(*plan);
  }
  EXPECT_GE(feasible, 80);
}

TEST(Conservation, AZigzagGivesEveryRankTheSameShareOfCausalAttention) {
  Plan plan = base_plan();
  plan.cp = 4;
  const Program p = lowered(llama(), plan);
  Communication network(load_topology("dgx-h100:1"));
  SimulateOptions options;
  options.unfolded = true;
  const Timeline t = simulate(p, network, options);
  // 8 tokens in 8 chunks: rank c has tokens c and 7 - c, which attend (c + 1) + (8 - c) = 9 pairs.
  for (std::size_t r = 0; r < 4; ++r) EXPECT_EQ(t.flops[r].count, t.flops[0].count);
  for (const ProgramOperator& op : p.operators) {
    if (!std::holds_alternative<Attention>(op.operation)) continue;
    for (std::int64_t r = 0; r < 4; ++r)
      EXPECT_DOUBLE_EQ(attended_fraction(p, op, r), 9.0 / (2 * 8));
  }
}

/// Whatever the window, the ranks of a ring attend as many pairs as one rank does: pairs by hand.
TEST(Conservation, RanksOfARingAttendEveryPairOnce) {
  for (const std::int64_t window : {0, 1, 3, 5, 16}) {
    TransformerConfig c = small_config();
    c.sequence = c.positions = 16;
    c.window = window;
    const Graph g = build_transformer(c);
    double pairs = 0;
    for (std::int64_t q = 0; q < 16; ++q) {
      for (std::int64_t k = 0; k <= q; ++k) pairs += window == 0 || k > q - window ? 1 : 0;
    }
    for (const std::int64_t cp : {1, 2, 4}) {
      Plan plan = base_plan();
      plan.cp = cp;
      plan.context = Plan::ContextExchange::ring;
      plan.context_given = true;
      const Program p = lowered(g, plan);
      double work = 0, whole = 0;
      for (const Block& b : p.blocks) {
        for (const Instruction& i : b.instructions) {
          if (i.kind != Kind::compute || i.kernel != Kernel::forward || i.op < 0) continue;
          const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
          const auto* a = std::get_if<Attention>(&op.operation);
          if (a == nullptr) continue;
          for (std::int64_t r = 0; r < p.ranks(); ++r) work += mathematical_flops(p, i, r).count;
          // Two products of 2 · width operations for every pair of each head and sample.
          if (i.part <= 0) {
            const auto& d = op.signature;
            const std::int64_t heads =
                d.dims[static_cast<std::size_t>(d.find(Dim::head))].extent * a->queries_per_head;
            whole += pairs * 2 * static_cast<double>(a->qk_dim + a->v_dim) *
                     static_cast<double>(heads * d.dims[0].extent);
          }
        }
      }
      EXPECT_GT(whole, 0);
      EXPECT_NEAR(work, whole, 1e-9 * whole) << "window " << window << ", cp " << cp;
    }
  }
}

TEST(Conservation, FrozenLayersSkipExactlyTheirBackward) {
  Graph g = llama();
  freeze(g, {"embedding*", "layers.0.*", "layers.1.*"});
  Plan plan = base_plan();
  plan.dp = 2;
  const double serial = serial_work(g, 2, nothing());
  EXPECT_LT(serial, serial_work(llama(), 2, nothing()));
  EXPECT_NEAR(executed_work(run(lowered(g, plan))), serial, 1e-12 * serial);
}

/// Calls f(block, instruction) for all that a stage does.
template <class F>
void for_each_call(const Program& p, int stage, F f) {
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) f(call, i);
  }
}

std::vector<Program> random_programs(unsigned seed, int count) {
  std::mt19937 rng{seed};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  std::vector<Program> all;
  while (static_cast<int>(all.size()) < count) {
    const Graph& g = graphs[rng() % graphs.size()];
    const auto plan = complete(g, random_plan(rng));
    if (!plan || plan->ranks() > 24) continue;
    if (auto p = lower(g, *plan)) all.push_back(std::move(*p));
  }
  return all;
}

TEST(Conservation, BytesSentAreBytesReceived) {
  for (const Program& p : random_programs(20261127, 60)) {
    // Point to point: per message, micro-batch and pair of ranks.
    std::map<std::array<std::int64_t, 4>, std::int64_t> sent, received;
    for (std::int64_t r = 0; r < p.ranks(); ++r) {
      for_each_call(p, p.stage_of(r), [&](const BlockCall& call, const Instruction& i) {
        if (i.kind != Kind::send && i.kind != Kind::receive) return;
        const std::int64_t peer = p.peer_of(i, r);
        const bool sends = i.kind == Kind::send;
        if (!p.holds(sends ? i.reads[0] : i.writes[0], r)) return;
        auto& to = sends ? sent : received;
        to[{i.index, p.instance_of(i, call.micro_batch), sends ? r : peer, sends ? peer : r}] +=
            local_bytes(p, sends ? i.reads[0] : i.writes[0], r).count;
      });
    }
    EXPECT_EQ(sent, received);
    // Collectives: what the members hold before, they hold after.
    for (const Block& b : p.blocks) {
      const std::int64_t rank = p.rank_on_stage(0, b.stage);
      for (const Instruction& i : b.instructions) {
        if (i.kind != Kind::collective || i.tie >= 0) continue;
        const auto group = p.group(i, rank);
        for (std::size_t k = 0; k < i.reads.size(); ++k) {
          std::int64_t before = 0, after = 0;
          for (const std::int64_t m : group) {
            before += local_elements(p, i.reads[k], m);
            after += local_elements(p, i.writes[k], m);
          }
          const auto n = static_cast<std::int64_t>(group.size());
          switch (i.collective) {
            case CollectiveKind::all_gather:  // each ends with what all had
              EXPECT_EQ(after, n * before);
              break;
            case CollectiveKind::reduce_scatter:  // n summands become one sum
              EXPECT_EQ(before, n * after);
              break;
            case CollectiveKind::all_reduce:
            case CollectiveKind::all_to_all:
              EXPECT_EQ(before, after);
              break;
            default:
              break;
          }
        }
      }
    }
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Conservation, MemoryIsStatePlusWhatIsAllocatedAndNotYetFreed) {
  for (const Program& p : random_programs(20261128, 60)) {
    ASSERT_TRUE(verify(p).empty());
    const Timeline t = run(p);
    for (std::size_t c = 0; c < t.classes.size(); ++c) {
      const std::int64_t rank = t.classes[c].representative;
      std::array<std::int64_t, kCategoryCount> now{}, at_peak{};
      std::set<BufferId> state;
      for_each_call(p, t.classes[c].stage, [&](const BlockCall&, const Instruction& i) {
        const auto note = [&](BufferId id) {
          const Buffer& b = p.buffer(p.memory_of(id));
          if (b.scope != Scope::step || b.category == Category::workspace) return;
          if (state.insert(p.memory_of(id)).second)
            now[static_cast<std::size_t>(b.category)] +=
                device_bytes(p, p.memory_of(id), rank).count;
        };
        for_each_read(i, note);
        for_each_write(i, note);
      });
      const auto sum = [](const auto& a) {
        std::int64_t n = 0;
        for (const std::int64_t x : a) n += x;
        return n;
      };
      const std::int64_t base = sum(now);
      std::int64_t peak = base;
      at_peak = now;
      for_each_call(p, t.classes[c].stage, [&](const BlockCall&, const Instruction& i) {
        // A collective's packed payload is there while it runs.
        if (const std::int64_t packed = transient_bytes(p, i, rank).count;
            sum(now) + packed > peak) {
          peak = sum(now) + packed;
          at_peak = now;
          at_peak[static_cast<std::size_t>(Category::workspace)] += packed;
        }
        if (i.kind != Kind::allocate && i.kind != Kind::free) return;
        for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
          now[static_cast<std::size_t>(p.buffer(id).category)] +=
              (i.kind == Kind::allocate ? 1 : -1) * device_bytes(p, id, rank).count;
          if (sum(now) > peak) peak = sum(now), at_peak = now;
        }
      });
      EXPECT_EQ(sum(now), base) << "all that was allocated is freed";
      EXPECT_EQ(t.memory[c].peak.count, peak);
      std::int64_t categories = 0;
      for (std::size_t k = 0; k < kCategoryCount; ++k) {
        categories += t.memory[c].at_peak[k].count;
        EXPECT_EQ(t.memory[c].at_peak[k].count, at_peak[k]) << name(static_cast<Category>(k));
      }
      EXPECT_EQ(categories, peak);
    }
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Conservation, EveryInstantOfTheStepIsInOneClass) {
  for (const Program& p : random_programs(20261129, 60)) {
    const Timeline t = run(p, true);
    for (std::size_t c = 0; c < t.classes.size(); ++c)
      EXPECT_EQ(t.breakdown[c].total(), t.step) << "class " << c;
    // No stream does two things at once, so that the step is no shorter than the busiest one.
    std::map<std::pair<int, int>, std::vector<std::pair<std::int64_t, std::int64_t>>> streams;
    for (const Entry& e : t.entries) {
      const Block& b = p.blocks[static_cast<std::size_t>(e.block)];
      const Stream s = b.instructions[static_cast<std::size_t>(e.instruction)].stream;
      streams[{e.rank_class, s}].emplace_back(e.start.count, e.end.count);
    }
    for (auto& [key, busy] : streams) {
      std::sort(busy.begin(), busy.end());
      std::int64_t sum = 0, end = 0;
      for (const auto& [from, to] : busy) {
        EXPECT_GE(from, end);
        sum += to - from;
        end = to;
      }
      EXPECT_LE(sum, t.step.count);
      EXPECT_LE(end, t.step.count);
      if (key.second != kComputeStream) continue;
      // The compute stream's own entries are what the breakdown calls compute, optimizer, other.
      const Breakdown& b = t.breakdown[static_cast<std::size_t>(key.first)];
      std::int64_t named = b.optimizer.count + b.other.count;
      for (const auto& [kind, time] : b.compute) named += time.count;
      EXPECT_EQ(named, sum);
    }
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Memory, WhatIsAliveAtThePeakSumsToThePeak) {
  std::mt19937 rng{20261128};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  Communication communication(load_topology("dgx-h100:4"));
  int checked = 0;
  while (checked < 40) {
    const Graph& g = graphs[rng() % graphs.size()];
    const auto plan = complete(g, random_plan(rng));
    if (!plan || plan->ranks() > 32) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    ++checked;
    const Timeline t = simulate(*program, communication);
    for (std::size_t c = 0; c < t.classes.size(); ++c) {
      std::array<Bytes, kCategoryCount> sum{};
      for (const Alive& a : alive_at_peak(*program, t.classes[c], t.memory[c])) {
        sum[static_cast<std::size_t>(a.category)] += a.bytes;
        EXPECT_GT(a.buffers, 0) << a.owner;
      }
      EXPECT_EQ(sum, t.memory[c].at_peak);
    }
  }
}

}  // namespace
}  // namespace partita
