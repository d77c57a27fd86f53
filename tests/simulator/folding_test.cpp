// Ranks that behave alike are simulated once. Folded and unfolded runs agree to the picosecond, and
// neither the names of devices nor a second run change a byte.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "simulator/engine/links.h"
#include "simulator/engine/simulate.h"
#include "simulator/plan/placement.h"
#include "tests/simulator/clusters.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

/// Nodes of four devices on an internal switch with one card each, and unequal devices last.
constexpr const char* kMixed = R"(schema: partita.topology/1
name: mixed
source: made up
nodes:
  - count: 3
    host_memory_bandwidth: 200 GB/s
    storage_bandwidth: 4 GB/s
    vertices:
      gpu[0-3]: {kind: device, device: a100-sxm-40gb}
      switch0: {kind: nvswitch}
      nic0: {kind: nic, bandwidth: 200 Gb/s, latency: 1 us}
    links:
      - {from: "gpu[0-3]", to: switch0, kind: nvlink, bandwidth: 300 GB/s, latency: 0.5 us}
      - {from: "gpu[0-3]", to: nic0, kind: pcie, bandwidth: 31.5 GB/s, latency: 0.3 us}
  - count: 3
    host_memory_bandwidth: 100 GB/s
    storage_bandwidth: 2 GB/s
    vertices:
      gpu[0-3]: {kind: device, device: v100-sxm-16gb}
      nic0: {kind: nic, bandwidth: 100 Gb/s, latency: 1 us}
    links:
      - {between: "gpu[0-3]", kind: nvlink, bandwidth: 50 GB/s, latency: 0.7 us}
      - {from: "gpu[0-3]", to: nic0, kind: pcie, bandwidth: 15.75 GB/s, latency: 0.3 us}
fabric: {kind: single switch}
)";

void expect_equal(const Breakdown& a, const Breakdown& b) {
  EXPECT_EQ(a.compute, b.compute);
  EXPECT_EQ(a.exposed, b.exposed);
  EXPECT_EQ(a.bubble, b.bubble);
  EXPECT_EQ(a.optimizer, b.optimizer);
  EXPECT_EQ(a.other, b.other);
}
void expect_equal(const std::vector<Contended>& a, const std::vector<Contended>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t k = 0; k < b.size(); ++k) {
    EXPECT_EQ(a[k].rank_class, b[k].rank_class);
    EXPECT_EQ(a[k].what, b[k].what);
    EXPECT_EQ(a[k].resource, b[k].resource);
    EXPECT_EQ(a[k].lost, b[k].lost);
  }
}
void expect_equal(const Timeline& a, const Timeline& b) {
  EXPECT_EQ(a.step, b.step);
  EXPECT_EQ(a.instructions, b.instructions);
  EXPECT_EQ(a.last_class, b.last_class);
  ASSERT_EQ(a.classes.size(), b.classes.size());
  for (std::size_t c = 0; c < b.classes.size(); ++c) {
    expect_equal(a.breakdown[c], b.breakdown[c]);
    EXPECT_EQ(a.memory[c].peak, b.memory[c].peak);
  }
  expect_equal(a.contended, b.contended);
}

using Moment = std::pair<std::int64_t, std::int64_t>;
/// Start and end of everything one class does: by block, instruction and micro-batch.
std::vector<std::map<std::tuple<int, int, int>, Moment>> moments(const Timeline& t) {
  std::vector<std::map<std::tuple<int, int, int>, Moment>> all(t.classes.size());
  for (const Entry& e : t.entries) {
    all[static_cast<std::size_t>(e.rank_class)][{e.block, e.instruction, e.micro_batch}] = {
        e.start.count, e.end.count};
  }
  return all;
}

/// Every rank does in the folded run what it does when simulated by itself.
Timeline expect_folds(const Program& p, const Topology& topology, Network sharing = Network::idle) {
  Communication network(topology);
  const RankClasses classes =
      sharing == Network::flows ? share_links(p, network).ranks : classify(p, network);
  SimulateOptions options;
  options.network = sharing;
  options.record = true;
  const Timeline folded = simulate(p, network, options);
  options.unfolded = true;
  const Timeline unfolded = simulate(p, network, options);
  EXPECT_EQ(folded.step, unfolded.step);
  const auto few = moments(folded), all = moments(unfolded);
  std::int64_t ranks = 0;
  for (const RankClass& c : folded.classes) ranks += c.count;
  EXPECT_EQ(ranks, p.ranks());
  for (std::size_t r = 0; r < all.size(); ++r) {
    const auto c = static_cast<std::size_t>(classes.of_rank[r]);
    EXPECT_EQ(few[c], all[r]) << "rank " << r << " of class " << c;
    expect_equal(folded.breakdown[c], unfolded.breakdown[r]);
    EXPECT_EQ(folded.memory[c].peak, unfolded.memory[r].peak);
    EXPECT_EQ(folded.memory[c].at_peak, unfolded.memory[r].at_peak);
    EXPECT_EQ(folded.flops[c].count, unfolded.flops[r].count);
    if (::testing::Test::HasFailure()) break;
  }
  return folded;
}

/// Vocabularies that no axis divides.
Graph uneven(bool grouped) {
  TransformerConfig c = small_config();
  c.vocabulary = 13;
  c.kv_heads = grouped ? 2 : 4;
  c.tied = !grouped;
  return build_transformer(c);
}

/// A table of 5 rows; no biases, so that few tensors tell ranks apart.
Graph five_rows() {
  TransformerConfig c = small_config();
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = c.tied = false;
  c.ffn = 24;
  c.positions = 0;
  c.vocabulary = 5;
  return build_transformer(c);
}

TEST(Folding, RandomPlansOnUnequalClustersAgreeToThePicosecond) {
  std::mt19937 rng{20261124};
  const std::vector<Topology> topologies{
      load_topology("dgx-h100:3"), parse_topology(kMixed, "mixed.yaml"),
      load_topology("dgx1-v100:3"), load_topology("a100-pcie-8:3")};
  const std::vector<Graph> graphs{gpt(),         llama(),      mixtral(),
                                  uneven(false), uneven(true), five_rows()};
  int feasible = 0, contended = 0;
  for (int i = 0; i < 1500; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    const Topology& t = topologies[rng() % topologies.size()];
    Plan wanted = with_launches(random_plan(rng), rng);
    set_precision(wanted, "fp16", "");  // the type that all these devices multiply in
    if (wanted.ranks() > 24) continue;
    const auto plan = complete(g, wanted);
    if (!plan) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    SCOPED_TRACE(::testing::Message() << "case " << i << " on " << t.name() << "\n"
                                      << to_yaml(*plan));
    ++feasible;
    const Timeline idle = expect_folds(*program, t);
    // What runs at once shares: never faster, and folded all the same.
    const Timeline beside = expect_folds(*program, t, Network::beside);
    const Timeline shared = expect_folds(*program, t, Network::flows);
    EXPECT_GE(shared.step, idle.step);
    EXPECT_GE(beside.step, idle.step);
    contended += shared.step > idle.step;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 200);
  EXPECT_GE(contended, 60);
}

TEST(Folding, RanksThatShareDevicesAgreeToThePicosecond) {
  std::mt19937 rng{20261127};
  const std::vector<Topology> topologies{load_topology("dgx-h100:2"),
                                         parse_topology(kMixed, "mixed.yaml")};
  const std::vector<Graph> graphs{gpt(), mixtral(), uneven(false)};
  int feasible = 0, folded = 0;
  for (int i = 0; i < 600; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    ClusterState state;
    state.ranks_per_device = static_cast<int>(2 + rng() % 3);
    state.mps = rng() % 2 == 0;
    const Topology& whole = topologies[rng() % topologies.size()];
    const Topology t = whole.in_state(state);
    Plan wanted = with_launches(random_plan(rng), rng);
    set_precision(wanted, "fp16", "");
    if (wanted.ranks() > 16) continue;
    const auto plan = complete(g, wanted);
    if (!plan) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    SCOPED_TRACE(::testing::Message()
                 << "case " << i << " on " << t.name() << ", " << state.ranks_per_device
                 << " on a device, mps " << state.mps << "\n"
                 << to_yaml(*plan));
    ++feasible;
    const Timeline shared = expect_folds(*program, t, Network::flows);
    folded += static_cast<std::int64_t>(shared.classes.size()) < program->ranks();
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 60);
  EXPECT_GE(folded, 20);
}

constexpr const char* kHosts = R"(schema: partita.topology/1
name: hosts
source: made up
nodes:
  - count: 2
    storage_bandwidth: 1 GB/s
    host_memory_bandwidth: 100 GB/s
    vertices:
      cpu[0-3]: {kind: device, device: here.yaml}
      nic0: {kind: nic, bandwidth: 10 GB/s, latency: 1 us}
    links:
      - {from: "cpu[0-3]", to: nic0, kind: pcie, bandwidth: 63 GB/s, latency: 0.25 us}
fabric: {kind: single switch}
)";

// Fewer cores than ranks: their turns are the same whatever the network.
TEST(Folding, RanksThatShareCoresDoSoOnEveryNetwork) {
  std::mt19937 rng{20261128};
  int feasible = 0;
  for (const int cores : {1, 2, 4}) {
    const Topology t =
        cluster(kHosts, {"1 TFLOP/s", "1 TFLOP/s", "1 TB/s",
                         fmt::format("1 us\nconcurrent_streams: false\nhost_cores: {}", cores), 0});
    for (int i = 0; i < 100; ++i) {
      const Plan wanted = random_plan(rng);
      if (wanted.ranks() > 8) continue;
      const auto plan = complete(gpt(), wanted);
      if (!plan) continue;
      const auto program = lower(gpt(), *plan);
      if (!program) continue;
      SCOPED_TRACE(to_yaml(*plan));
      Communication c(t);
      SimulateOptions options;
      const Ticks idle = simulate(*program, c, options).step;
      options.network = Network::flows;
      const Ticks flows = simulate(*program, c, options).step;
      options.unfolded = true;
      EXPECT_EQ(simulate(*program, c, options).step, flows);
      // With a core for each the cards contend instead.
      if (cores < 4 && program->ranks() > 4)
        EXPECT_EQ(flows, idle);
      else
        EXPECT_GE(flows, idle);
      ++feasible;
    }
  }
  EXPECT_GE(feasible, 40);
}

TEST(Folding, RanksAnywhereAndRingsInAnyOrderAgreeToThePicosecond) {
  std::mt19937 rng{20261128};
  const std::vector<Topology> topologies{
      load_topology("dgx-h100:3"), parse_topology(kMixed, "mixed.yaml"),
      load_topology(std::string(PARTITA_TEST_DATA) + "/cli/dragonfly.yaml"),
      load_topology(std::string(PARTITA_TEST_DATA) + "/cli/torus.yaml")};
  int feasible = 0, strides = 0;
  for (int i = 0; i < 1500; ++i) {
    const Topology& t = topologies[rng() % topologies.size()];
    Plan wanted = random_plan(rng);
    set_precision(wanted, "fp16", "");
    // Of storage and hosts these clusters say nothing.
    wanted.sharded_storage = wanted.offload_optimizer = wanted.offload_activations = false;
    if (wanted.ranks() > 16) continue;
    const auto plan = complete(gpt(), wanted);
    if (!plan) continue;
    const auto program = lower(gpt(), *plan);
    if (!program || program->ranks() != plan->mesh_ranks()) continue;
    ClusterState state;
    for (std::size_t d = 0; d < t.device_count(); ++d)
      state.placement.push_back(static_cast<std::int32_t>(d));
    // All of them anywhere, or few of them, so that others still behave alike.
    if (rng() % 2 != 0) {
      std::shuffle(state.placement.begin(), state.placement.end(), rng);
    } else {
      std::swap(state.placement[rng() % t.device_count()], state.placement[0]);
    }
    RingStrides rings;
    for (const std::string& axis : axis_order(plan->mesh)) {
      const std::int64_t n = plan->mesh.size(axis_atoms(plan->mesh, axis));
      for (std::int64_t s = n - 1; n > 2 && s >= 1; s -= static_cast<std::int64_t>(1 + rng() % 3)) {
        if (std::gcd(s, n) == 1) rings[axis].push_back(s);
      }
    }
    ASSERT_EQ(rings_fault(plan->mesh, rings), "");
    state.ring_strides = strides_by_group(plan->mesh, rings);
    SCOPED_TRACE(::testing::Message() << "case " << i << " on " << t.name() << "\n"
                                      << to_yaml(*plan));
    ++feasible;
    strides += !state.ring_strides.empty();
    const Topology placed = t.in_state(state);
    expect_folds(*program, placed);
    expect_folds(*program, placed, Network::flows);
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 100);
  EXPECT_GE(strides, 15);
}

TEST(Folding, ReplayedBlocksAgreeWithThosePlayedStepByStep) {
  std::mt19937 rng{20261130};
  const std::vector<Topology> topologies{load_topology("dgx-h100:3"),
                                         parse_topology(kMixed, "mixed.yaml")};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral(), uneven(false)};
  int feasible = 0, contended = 0;
  for (int i = 0; i < 600; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    const Topology& t = topologies[rng() % topologies.size()];
    Plan wanted = with_launches(random_plan(rng), rng);
    set_precision(wanted, "fp16", "");
    wanted.global_batch *= static_cast<std::int64_t>(1 + rng() % 4);
    const auto plan = complete(g, wanted);
    if (!plan || plan->ranks() > 24) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    ++feasible;
    SCOPED_TRACE(::testing::Message() << "case " << i << " on " << t.name() << "\n"
                                      << to_yaml(*plan));
    for (const Network network : {Network::idle, Network::beside, Network::flows}) {
      Communication communication(t);
      SimulateOptions options;
      options.network = network;
      const Timeline replayed = simulate(*program, communication, options);
      options.replay = false;
      const Timeline played = simulate(*program, communication, options);
      expect_equal(replayed, played);
      contended += !played.contended.empty();
    }
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 100);
  EXPECT_GE(contended, 50);
}

// What adjustments do not change is worked out once; then each time is as if from the start.
TEST(Folding, RehearsedProgramsPlayAsThoseSimulatedAnew) {
  std::mt19937 rng{20261202};
  const std::vector<Topology> topologies{load_topology("dgx-h100:3"),
                                         parse_topology(kMixed, "mixed.yaml")};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral(), uneven(false)};
  std::uniform_real_distribution<double> factor(0.5, 3), small(0, 0.02);
  const auto drawn = [&] {
    Adjustment a;
    for (double* x : {&a.product_time, &a.memory_time, &a.optimizer_time, &a.launch_time,
                      &a.inside_time, &a.between_time, &a.across_cards_time})
      *x = factor(rng);
    a.step = Seconds{small(rng)};
    a.spread = rng() % 2 == 0 ? small(rng) : 0;
    return a;
  };
  int feasible = 0, stretched = 0, contended = 0;
  for (int i = 0; i < 800; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    const Topology& t = topologies[rng() % topologies.size()];
    Plan wanted = with_launches(random_plan(rng), rng);
    set_precision(wanted, "fp16", "");
    const auto plan = complete(g, wanted);
    if (!plan || plan->ranks() > 24) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    ++feasible;
    SCOPED_TRACE(::testing::Message() << "case " << i << " on " << t.name() << "\n"
                                      << to_yaml(*plan));
    SimulateOptions options;
    options.network = rng() % 3 == 0   ? Network::flows
                      : rng() % 2 == 0 ? Network::beside
                                       : Network::idle;
    Communication network(t), other(t);
    const Rehearsal rehearsal(*program, network, options);
    const Timeline plain = simulate(*program, other, options);
    for (int k = 0; k < 3; ++k) {
      const Adjustment a = k == 0 ? Adjustment{} : drawn();
      const Timeline again = rehearsal.play(a);
      other.set_adjustment(a);
      const Timeline anew = simulate(*program, other, options);
      expect_equal(again, anew);
      contended += !anew.contended.empty();
    }
    // Hosts, storage and what goes ahead of routed rows have no factor.
    bool all_stretched = options.network == Network::idle && program->roles.empty();
    for (const Block& b : program->blocks) {
      for (const Instruction& x : b.instructions)
        all_stretched = all_stretched && !on_host(*program, x) && !from_storage(*program, x) &&
                        (x.kind != Kind::collective || key_bytes(*program, x, 0).count == 0);
    }
    if (all_stretched) {
      ++stretched;
      // Everything twice as long, and half a second: GPUs need nothing beside these.
      const Timeline twice = rehearsal.play({2, 2, 2, 2, 2, 2, 1, Seconds{0.5}, 0});
      EXPECT_NEAR(static_cast<double>(twice.step.count - 500'000'000'000),
                  2 * static_cast<double>(plain.step.count),
                  2 * static_cast<double>(plain.instructions));
    }
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 60);
  EXPECT_GE(stretched, 10);
  EXPECT_GE(contended, 20);
}

// docs/simulation.md, "Speeds of equal devices", by hand: of 8 V100 the slowest is expected 1.4236
// standard deviations behind, and the variances of device and fit add up.
TEST(Adjustment, EqualDevicesDifferAndTheSlowestBinds) {
  const Graph g = gpt();
  const auto step = [&](const char* spread, double fitted, int dp) {
    const Topology t =
        load_topology(fmt::format("dgx1-v100:{} gpus", dp), {{}, {{"speed_spread", spread}}});
    Plan wanted;
    wanted.dp = dp;
    wanted.global_batch = 8;
    set_precision(wanted, "fp16", "");
    const auto plan = complete(g, wanted);
    EXPECT_TRUE(plan) << plan.reason();
    const auto program = lower(g, *plan);
    Communication network(t);
    Adjustment a;
    a.spread = fitted;
    network.set_adjustment(a);
    SimulateOptions options;
    options.network = Network::idle;
    const Timeline timeline = simulate(*program, network, options);
    std::int64_t compute = 0;
    for (const auto& [kind, ticks] : timeline.breakdown.at(0).compute) compute += ticks.count;
    return std::pair(static_cast<double>(compute), timeline.step.count);
  };
  const auto equal = step("0", 0, 8), differ = step("0.015", 0, 8);
  EXPECT_NEAR(differ.first / equal.first, 1 + 0.015 * 1.4236, 1e-5);
  EXPECT_GT(differ.second, equal.second);
  EXPECT_EQ(step("0.015", 0, 1), step("0", 0, 1));
  EXPECT_EQ(step("0", 0.015, 8), differ);
  EXPECT_EQ(step("0.009", 0.012, 8), differ);
  // The catalogue's cards are those of the paper.
  EXPECT_EQ(load_device("v100-sxm-16gb").speed_spread, 0.015);
  EXPECT_EQ(load_device("h100-sxm").speed_spread, 0);
  EXPECT_THROW(step("-0.1", 0, 8), InputError);
  EXPECT_THROW(step("0.3", 0, 8), InputError);
}

// docs/fit.md, "Rows": a factor of groups that have several members on a node and reach over the
// network, whatever the others take.
TEST(Adjustment, AcrossCardsIsOfGroupsWithSeveralMembersOnANode) {
  const auto slower = [&](int tp, int nodes, std::vector<int> devices = {}) {
    Plan plan = base_plan();
    plan.tp = tp, plan.dp = 4 * nodes / tp;
    plan.global_batch = 2 * plan.dp;
    ClusterState state;
    state.placement = std::move(devices);
    const Topology t = load_topology(fmt::format("h100-sxm-4:{}", nodes)).in_state(state);
    const Program p = lowered(gpt(), plan);
    Communication communication(t);
    SimulateOptions options;
    options.network = Network::idle;
    const Rehearsal rehearsal(p, communication, options);
    Adjustment between, across, both;
    between.between_time = both.between_time = 3;
    across.across_cards_time = both.across_cards_time = 3;
    struct {
      double between, across, both;
    } x{to_seconds(rehearsal.play(between).step).count,
        to_seconds(rehearsal.play(across).step).count, to_seconds(rehearsal.play(both).step).count};
    const double plain = to_seconds(rehearsal.play({}).step).count;
    x.between /= plain, x.across /= plain, x.both /= plain;
    return x;
  };
  // All eight, four on each node: both factors are of the same transfers and multiply.
  const auto all = slower(1, 2);
  EXPECT_GT(all.across, 1.01);
  EXPECT_EQ(all.across, all.between);
  EXPECT_GT(all.both, all.across);
  // Wherever members stand in their group: neighbours on different nodes, four on each.
  const auto in_turn = slower(1, 2, {0, 4, 1, 5, 2, 6, 3, 7});
  EXPECT_GT(in_turn.across, 1.01);
  EXPECT_EQ(in_turn.across, in_turn.between);
  // One member on each node.
  const auto alone = slower(4, 2);
  EXPECT_EQ(alone.across, 1);
  EXPECT_GT(alone.between, 1.01);
  EXPECT_EQ(alone.both, alone.between);
  // Within a node.
  const auto inside = slower(2, 1);
  EXPECT_EQ(inside.both, 1);
}

TEST(Folding, SpatialPlansAgreeBordersAndInteriorApart) {
  const Topology t = load_topology("dgx-h100:2");
  for (const std::int64_t tp : {2, 4}) {
    GraphBuilder b("plane");
    TensorId x =
        b.input("image", {{Dim::sample, 1}, {Dim::feature, 3}, {Dim::height, 13}, {Dim::width, 8}});
    const TensorId target =
        b.input("target", {{Dim::sample, 1}, {Dim::feature, 4}, {Dim::height, 7}, {Dim::width, 4}});
    Convolution c;
    c.out = 4;
    c.height = c.width = {3, 1, 1, 1, 1};
    x = b.add("conv1", c, {x});
    c.height.stride = c.width.stride = 2;
    x = b.add("conv2", c, {x});
    const Graph g = b.finish(b.add("loss", MeanSquaredError{}, {x, target}), 0, 0);
    Plan plan = base_plan();
    plan.strategy = "spatial";
    plan.tp = tp;
    plan.dp = 4;
    expect_folds(lowered(g, plan), t);
  }
}

TEST(Folding, OneRankWithAllStateIsAClassOfItsOwn) {
  Plan plan = base_plan();
  plan.strategy = "dataparallel";
  plan.dp = 4;
  plan.global_batch = 8;
  const Program p = lowered(llama(), plan);
  const Topology t = load_topology("dgx-h100:1");
  expect_folds(p, t);
  Communication network(t);
  EXPECT_EQ(classify(p, network).classes.size(), 2u);
}

TEST(Folding, ShardsOfUnevenPartsAgreeWhereTheFirstRanksPartIsEven) {
  // 5 rows of 8 over tp 2: 24 and 16 values; over dp 3 the first are 8 8 8, the others 6 5 5. All
  // other tensors have a multiple of 3 values, or 2 more: 3 3 2 tells dp's first two not apart.
  Plan plan = base_plan();
  plan.tp = 2;
  plan.dp = 3;
  for (const int zero : {1, 2, 3}) {
    plan.zero = zero;
    expect_folds(lowered(five_rows(), plan), load_topology("dgx-h100:1"));
  }
}

TEST(Folding, HybridShardingAndIndependentReplicasAgree) {
  const Topology t = load_topology("dgx-h100:2");
  Plan plan = base_plan();
  plan.dp = 16;
  plan.zero = 3;
  plan.zero_group = 8;
  expect_folds(lowered(llama(), plan), t);
  plan = base_plan();
  plan.strategy = "replicas";
  plan.dp = 12;
  expect_folds(lowered(gpt(), plan), t);
}

TEST(Folding, CausalSequencesCutWithoutZigzagAgreeLaterRanksAttendMore) {
  Plan plan = base_plan();
  plan.cp = 4;
  plan.dp = 2;
  // A rule of the user's comes before the strategy's zigzag.
  plan.user_rules = {{"*", Dim::sequence, "cp", false, false}};
  const Program p = lowered(gpt(), plan);
  const Topology t = load_topology("dgx-h100:1");
  expect_folds(p, t);
  Communication network(t);
  EXPECT_EQ(classify(p, network).classes.size(), 4u);  // by place in the sequence
}

TEST(Folding, HomogeneousPlansHaveOneClassAStage) {
  struct Case {
    std::int64_t tp, pp, dp;
  };
  for (const Case& c :
       {Case{1, 1, 8}, Case{2, 1, 4}, Case{1, 4, 4}, Case{2, 2, 4}, Case{4, 4, 2}}) {
    Plan plan = base_plan();
    plan.tp = c.tp;
    plan.pp = c.pp;
    plan.dp = c.dp;
    plan.sequence_parallel = c.tp > 1;
    plan.global_batch = 4 * c.dp;
    Communication network(load_topology("dgx-h100:4"));
    const Timeline t = simulate(lowered(gpt(), plan), network);
    EXPECT_EQ(t.classes.size(), static_cast<std::size_t>(c.pp))
        << c.tp << " " << c.pp << " " << c.dp;
  }
}

TEST(Folding, UnevenVocabulariesSplitTheirStagesOnly) {
  Plan plan = base_plan();
  plan.tp = 4;
  plan.pp = 4;
  plan.dp = 1;
  plan.global_batch = 4;
  // 13 rows on 4 ranks: 4 3 3 3. Which rank is longer is told by its coordinate, so that the first
  // and last stage have a class a rank; a stage in between has as many as its neighbours have.
  Communication network(load_topology("dgx-h100:2"));
  const Program p = lowered(uneven(false), plan);
  const RankClasses classes = classify(p, network);
  EXPECT_LE(classes.classes.size(), 16u);
  EXPECT_GE(classes.classes.size(), 8u);
}

/// Everything that a timeline says, as text.
std::string print(const Timeline& t) {
  std::string s = fmt::format("{} {} {}\n", t.step.count, t.last_class, t.instructions);
  for (std::size_t c = 0; c < t.classes.size(); ++c) {
    s += fmt::format("{} {} {} {} {}\n", t.classes[c].stage, t.classes[c].representative,
                     t.classes[c].count, t.memory[c].peak.count, t.flops[c].count);
    for (const auto& [kind, time] : t.breakdown[c].compute)
      s += fmt::format("{} {}\n", kind, time.count);
    for (const auto& [axis, time] : t.breakdown[c].exposed)
      s += fmt::format("{} {}\n", axis, time.count);
    s += fmt::format("{} {} {}\n", t.breakdown[c].bubble.count, t.breakdown[c].optimizer.count,
                     t.breakdown[c].other.count);
  }
  for (const Entry& e : t.entries) {
    s += fmt::format("{} {} {} {} {} {}\n", e.rank_class, e.block, e.instruction, e.micro_batch,
                     e.start.count, e.end.count);
  }
  return s;
}

std::string printed_run(const Graph& g, const Plan& plan, const Topology& topology) {
  Communication network(topology);
  SimulateOptions options;
  options.record = true;
  return print(simulate(lowered(g, plan), network, options));
}

Plan everything() {
  Plan plan = base_plan();
  plan.tp = 2;
  plan.pp = 2;
  plan.dp = 4;
  plan.zero = 1;
  plan.sequence_parallel = true;
  plan.global_batch = 16;
  return plan;
}

TEST(Folding, RenamedDevicesAndRegroupedNodesChangeNothing) {
  const auto text = [](const std::string& nodes) {
    return "schema: partita.topology/1\nname: same\nsource: made up\nnodes:\n" + nodes +
           "fabric: {kind: single switch}\n";
  };
  const auto node = [](int count, const std::string& gpu, bool card_first) {
    const std::string card =
        "      " + gpu + "nic: {kind: nic, bandwidth: 200 Gb/s, latency: 1 us}\n";
    const std::string devices = "      " + gpu + "[0-3]: {kind: device, device: a100-sxm-40gb}\n";
    return fmt::format(
        "  - count: {}\n    vertices:\n{}      {}switch: {{kind: nvswitch}}\n    links:\n"
        "      - {{from: \"{}[0-3]\", to: {}switch, kind: nvlink, bandwidth: 300 GB/s, latency: "
        "0.5 us}}\n"
        "      - {{from: \"{}[0-3]\", to: {}nic, kind: pcie, bandwidth: 31.5 GB/s, latency: 0.3 "
        "us}}\n",
        count, card_first ? card + devices : devices + card, gpu, gpu, gpu, gpu, gpu);
  };
  const std::string plain =
      printed_run(llama(), everything(), parse_topology(text(node(4, "gpu", false)), "a.yaml"));
  const std::string named =
      printed_run(llama(), everything(), parse_topology(text(node(4, "zeta", true)), "b.yaml"));
  const std::string grouped = printed_run(
      llama(), everything(),
      parse_topology(text(node(1, "x", true) + node(2, "gpu", false) + node(1, "a", false)),
                     "c.yaml"));
  EXPECT_EQ(plain, named);
  EXPECT_EQ(plain, grouped);
}

TEST(Folding, ASlowNodesPlaceMovesNothingWhenRanksMoveWithIt) {
  // Data parallel over four nodes, one of them slower: whichever it is, the step is the same.
  const auto at = [](int slow) {
    std::string nodes;
    for (int k = 0; k < 4; ++k) {
      nodes += fmt::format(
          "  - vertices:\n      gpu0: {{kind: device, device: {}}}\n"
          "      nic0: {{kind: nic, bandwidth: 200 Gb/s, latency: 1 us}}\n    links:\n"
          "      - {{from: gpu0, to: nic0, kind: pcie, bandwidth: 31.5 GB/s, latency: 0.3 us}}\n",
          k == slow ? "v100-sxm-16gb" : "a100-sxm-40gb");
    }
    return parse_topology("schema: partita.topology/1\nname: slow\nsource: made up\nnodes:\n" +
                              nodes + "fabric: {kind: single switch}\n",
                          "slow.yaml");
  };
  Plan plan = base_plan();
  set_precision(plan, "fp16", "");
  plan.dp = 4;
  const Program p = lowered(gpt(), plan);
  std::vector<std::int64_t> steps;
  for (int slow = 0; slow < 4; ++slow) {
    Communication network(at(slow));
    const Timeline t = simulate(p, network);
    EXPECT_EQ(t.classes.size(), 2u);
    steps.push_back(t.step.count);
  }
  EXPECT_EQ(steps, std::vector<std::int64_t>(4, steps[0]));
}

TEST(Folding, TheSameInputsGiveTheSameBytes) {
  for (const Graph& g : {gpt(), llama(), mixtral()}) {
    Plan plan = everything();
    if (g.layers < 4) plan.ep = 2;
    const Topology t = load_topology("dgx-h100:2");
    EXPECT_EQ(printed_run(g, plan, t), printed_run(g, plan, load_topology("dgx-h100:2")));
  }
}

}  // namespace
}  // namespace partita
