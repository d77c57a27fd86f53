// Where ranks lie and how rings go: placements as plans write them, and the search of the fastest.
#include "simulator/search/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "simulator/cost/axes.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

using ::testing::HasSubstr;

Topology data_cluster(const std::string& name) {
  return load_topology(std::string(PARTITA_TEST_DATA) + "/cli/" + name);
}

TEST(PlacementText, AxesInPartsNestAsWritten) {
  const Mesh mesh{{{"pp", 2}, {"dp", 3}, {"tp", 8}}};
  // tp = 4 inside, then dp, then what is left of tp, then pp.
  const auto device = placement(mesh, {"tp=4", "dp", "tp", "pp"}, "--placement");
  for (std::int32_t r = 0; r < 48; ++r) {
    const std::int32_t tp = r % 8, dp = r / 8 % 3, pp = r / 24;
    EXPECT_EQ(device[static_cast<std::size_t>(r)], tp % 4 + 4 * (dp + 3 * (tp / 4 + 2 * pp)));
  }
  EXPECT_EQ(placement(mesh, {"tp=2", "tp", "dp=3", "pp"}, ""),
            placement(mesh, {"tp", "dp", "pp"}, ""));
  EXPECT_EQ(
      placement_fault(mesh, {"tp=4", "dp", "pp"}),
      "the parts of tp in 'tp=4,dp,pp' are not 8; give sizes whose product is 8, or leave out "
      "one size");
  EXPECT_THAT(placement_fault(mesh, {"tp=3", "dp", "tp", "pp"}), HasSubstr("product is 8"));
  EXPECT_THAT(placement_fault(mesh, {"tp=8", "tp=2", "dp", "pp"}), HasSubstr("product is 8"));
  EXPECT_THAT(placement_fault(mesh, {"tp=4", "tp", "tp", "dp", "pp"}),
              HasSubstr("2 parts of tp have no size"));
  EXPECT_THAT(placement_fault(mesh, {"tp=0", "dp", "pp"}), HasSubstr("'tp=0' is no part"));
  EXPECT_THAT(placement_fault(mesh, {"tp", "dp"}), HasSubstr("tp,dp,pp in the order you want"));
  EXPECT_THAT(placement_fault(mesh, {"tp", "dp", "dp", "pp"}), HasSubstr("each axis"));
  // Of an axis of one rank there is nothing to place; another word is none.
  for (const char* word : {"cp", "cp=1"})
    EXPECT_EQ(placement(mesh, {"tp", word, "dp", "pp"}, ""),
              placement(mesh, {"tp", "dp", "pp"}, ""));
  EXPECT_THAT(placement_fault(mesh, {"tp", "cp=2", "dp", "pp"}), HasSubstr("each axis"));
  EXPECT_THAT(placement_fault(mesh, {"tp", "zp", "dp", "pp"}), HasSubstr("each axis"));
  // Atoms of one axis count as one.
  const Mesh atoms{{{"dp_outer", 2}, {"dp_ep", 3}, {"tp", 2}}};
  const auto split = placement(atoms, {"dp=2", "tp", "dp"}, "");
  for (std::int32_t r = 0; r < 12; ++r)
    EXPECT_EQ(split[static_cast<std::size_t>(r)], r / 2 % 2 + 2 * (r % 2 + 2 * (r / 4)));
}

TEST(PlacementText, DevicesAreReadAsTheyAreWritten) {
  EXPECT_EQ(parse_devices({"3", "8-10", "0"}, ""), (std::vector<std::int32_t>{3, 8, 9, 10, 0}));
  EXPECT_EQ(devices_text({3, 8, 9, 10, 0, 1}), "3, 8-10, 0, 1");
  for (const char* bad : {"", "-1", "1-", "3-2", "x", "1 2", "1000000", "99999999999999999999"})
    EXPECT_THROW(parse_devices({bad}, "here"), InputError) << bad;
  EXPECT_EQ(parse_devices({"999999"}, "").size(), 1u);
  EXPECT_EQ(parse_devices({"5-5"}, ""), std::vector<std::int32_t>{5});
  EXPECT_EQ(devices_fault({0, 1, 2}, 3), "");
  EXPECT_THAT(devices_fault({0, 1}, 3), HasSubstr("names 2 devices, the plan has 3 ranks"));
  EXPECT_THAT(devices_fault({4, 1, 4}, 3), HasSubstr("ranks 0 and 2 on device 4"));
  EXPECT_EQ(with_spares({5, 1}, 6), (std::vector<std::int32_t>{5, 1, 0, 2, 3, 4}));
  // Any permutation comes back.
  std::mt19937 rng{4};
  for (int i = 0; i < 200; ++i) {
    Plan p = base_plan(), read = base_plan();
    p.devices.resize(1 + rng() % 40);
    std::iota(p.devices.begin(), p.devices.end(), static_cast<std::int32_t>(rng() % 5));
    for (int swaps = static_cast<int>(rng() % 4); swaps > 0; --swaps)
      std::swap(p.devices[rng() % p.devices.size()], p.devices[rng() % p.devices.size()]);
    set(read, "placement", "[" + devices_text(p.devices) + "]", "");
    EXPECT_EQ(read.devices, p.devices);
    EXPECT_THAT(to_yaml(p), HasSubstr("placement: [" + devices_text(p.devices) + "]\n"));
  }
  Plan p = base_plan();
  set(p, "placement", "[tp, dp]", "");
  set(p, "placement", "0-1, 2,3", "");
  EXPECT_EQ(p.devices, (std::vector<std::int32_t>{0, 1, 2, 3}));
  EXPECT_TRUE(p.placement.empty());
  set(p, "placement", "[tp, dp]", "");
  EXPECT_TRUE(p.devices.empty());
}

TEST(Rings, VisitEveryMemberOnce) {
  EXPECT_EQ(in_ring_order({10, 11, 12, 13, 14}, 2),
            (std::vector<std::int64_t>{10, 12, 14, 11, 13}));
  const Mesh mesh{{{"dp", 5}, {"tp", 4}}};
  EXPECT_EQ(rings_fault(mesh, {{"dp", {1, 2, 3, 4}}}), "");
  EXPECT_THAT(rings_fault(mesh, {{"tp", {2}}}), HasSubstr("stride 2 does not visit all 4 ranks"));
  EXPECT_THAT(rings_fault(mesh, {{"dp", {5}}}), HasSubstr("use 1 to 4"));
  EXPECT_THAT(rings_fault(mesh, {{"dp", {0}}}), HasSubstr("stride 0"));
  EXPECT_THAT(rings_fault(mesh, {{"dp", {}}}), HasSubstr("no strides"));
  EXPECT_THAT(rings_fault(mesh, {{"pp", {1}}}), HasSubstr("no axis of the mesh"));
  EXPECT_EQ(rings_fault(mesh, {{"dp+tp", {3}}}), "");
  // Group k of dp is tp = k: ranks k, k + 4, ..., k + 16.
  const auto strides = strides_by_group(mesh, {{"dp", {1, 2, 3}}});
  EXPECT_EQ(strides.size(), 2u);
  EXPECT_EQ(strides.at({1, 17, 5}), 2);
  EXPECT_EQ(strides.at({2, 18, 5}), 3);
}

TEST(Rings, OfADragonflyUseAllItsCables) {
  // docs/topologies.md, "Rings".
  const Topology t = data_cluster("dragonfly.yaml");
  const Mesh mesh{{{"dp", 5}, {"tp", 8}}};
  const auto together = [&](const RingStrides& rings) {
    ClusterState state = t.state();
    state.ring_strides = strides_by_group(mesh, rings);
    return axis_crossings(mesh, Communication(t.in_state(std::move(state))))[1].together.count;
  };
  EXPECT_EQ(together({}), 12.5e9 / 8);
  EXPECT_EQ(together({{"dp", {1, 2, 3, 4}}}), 12.5e9 / 2);
  EXPECT_EQ(together({{"dp", {2}}}), 12.5e9 / 8);
}

Plan data_parallel(std::int64_t dp, std::int64_t tp = 1) {
  Plan p = base_plan();
  p.dp = dp, p.tp = tp;
  p.overlap_gradients = false;
  return p;
}

Seconds step(const Graph& g, const Plan& p, const Topology& t) {
  Communication communication(t);
  const auto r = predict(g, p, communication, nullptr, nullptr, false, nullptr, Network::flows);
  EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
  return r ? r->step_time : Seconds{0};
}

TEST(PlacementSearch, KeepsTheDefaultOnATie) {
  // One switch: whichever way ranks lie, the step is the same.
  Plan wanted = data_parallel(2, 2);
  const auto all = place(gpt(), wanted, load_topology("dgx-h100:4 gpus"));
  ASSERT_TRUE(all);
  EXPECT_EQ(all->by_default, 0u);
  EXPECT_EQ(all->best().plan.placement, (std::vector<std::string>{"tp", "dp"}));
  EXPECT_EQ(all->tried[1].step_time, all->best().step_time);
}

TEST(PlacementSearch, MovesWorkOffASlowDeviceToASpareOne) {
  ModelOptions two;
  two.layers = 2;
  const Graph g = load_model("gpt2", two);
  // On the larger one moving a node does not do it: its spare devices are not where the slow one
  // is.
  for (const std::int64_t ranks : {6, 66}) {
    const Topology whole = load_topology(fmt::format("dgx-h100:{} gpus", ranks));
    ClusterState state;
    state.device_speed[DeviceId{0}] = 0.5;
    const Topology t = whole.in_state(state);
    ASSERT_GT(t.device_count(), static_cast<std::size_t>(ranks));
    Plan wanted = data_parallel(ranks);
    set_precision(wanted, "bf16", "");
    const auto all = place(g, wanted, t);
    ASSERT_TRUE(all);
    const Plan& best = all->best().plan;
    ASSERT_EQ(static_cast<std::int64_t>(best.devices.size()), ranks) << to_yaml(best);
    EXPECT_EQ(std::count(best.devices.begin(), best.devices.end(), 0), 0) << to_yaml(best);
    EXPECT_LT(all->best().step_time, all->as_given().step_time);
    // Nothing is left of the slow one's computing.
    EXPECT_LE(all->best().step_time.count, 1.001 * step(g, wanted, whole).count);
    // What was found is a plan like any other.
    Plan read = wanted;
    set(read, "placement", "[" + devices_text(best.devices) + "]", "");
    EXPECT_EQ(step(g, read, t), all->best().step_time);
  }
}

/// Six nodes of one device on a ring of routers: neighbours have a cable.
std::string ring_of_nodes(int nodes) {
  return fmt::format(R"(schema: partita.topology/1
name: circle
source: made up
nodes:
  - count: {}
    vertices:
      gpu0: {{kind: device, device: a100-pcie-40gb}}
      nic0: {{kind: nic, bandwidth: 100 Gb/s, latency: 0.6 us}}
    links: [{{from: gpu0, to: nic0, kind: pcie, bandwidth: 31.5 GB/s, latency: 0.25 us}}]
fabric: {{kind: torus, size: [{}], bandwidth: 10 GB/s, latency: 0.4 us}}
)",
                     nodes, nodes);
}

/// All mappings of nodes, weighed one by one.
double least_of_all_orders(StepLoad& load) {
  auto order = load.device();
  const auto strides = load.strides();
  std::sort(order.begin(), order.end());
  double least = load.value().time;
  do {
    load.set(order, strides);
    least = std::min(least, load.value().time);
  } while (std::next_permutation(order.begin(), order.end()));
  return least;
}

TEST(PlacementSearch, OfFewNodesFindsWhatAllOrdersHold) {
  // Worn links and slow devices make the nodes of a circle differ. Every order of them is
  // simulated: the search, which simulates a handful, is never slower than by default and mostly as
  // good as the best of all.
  std::mt19937 rng{20261127};
  int moved = 0, faster = 0, cases = 0, as_good = 0;
  for (int i = 0; i < 40; ++i) {
    const int nodes = 4 + static_cast<int>(rng() % 3);
    Topology t = parse_topology(ring_of_nodes(nodes), "circle.yaml");
    ClusterState state;
    for (int k = static_cast<int>(rng() % 3); k >= 0; --k) {
      const std::size_t a = rng() % static_cast<std::size_t>(nodes);
      const auto route = t.route(DeviceId{a}, DeviceId{(a + 1) % static_cast<std::size_t>(nodes)});
      (rng() % 2 != 0 ? state.link_speed[route[2]] : state.link_speed[route[0]]) = 0.1;
    }
    if (rng() % 3 == 0) state.device_speed[DeviceId{rng() % 4}] = 0.5;
    t = t.in_state(state);
    Plan wanted = base_plan();
    const std::int64_t ranks = nodes - static_cast<std::int64_t>(rng() % 2);
    wanted.dp = ranks % 2 == 0 && rng() % 2 != 0 ? ranks / 2 : ranks;
    wanted.pp = ranks / wanted.dp;
    wanted.global_batch = wanted.dp * 2;
    SCOPED_TRACE(::testing::Message() << "case " << i << "\n" << to_yaml(wanted));
    const Graph g = gpt();
    const auto plan = complete(g, wanted);
    ASSERT_TRUE(plan) << plan.reason();
    const auto all = place(g, wanted, t);
    ASSERT_TRUE(all) << all.reason();
    EXPECT_LE(all->best().step_time, all->as_given().step_time);
    EXPECT_EQ(all->as_given().step_time, step(g, wanted, t));
    EXPECT_EQ(step(g, all->best().plan, t), all->best().step_time);
    faster += all->best().step_time < all->as_given().step_time;
    const Plan& best = all->best().plan;
    if (!best.devices.empty()) {
      EXPECT_EQ(devices_fault(best.devices, ranks), "");
      ++moved;
    }
    if (::testing::Test::HasFailure()) return;
    if (nodes > 5) continue;  // many orders
    Seconds least = all->as_given().step_time;
    std::vector<std::int32_t> order(static_cast<std::size_t>(nodes));
    std::iota(order.begin(), order.end(), 0);
    do {
      Plan p = wanted;
      p.devices.assign(order.begin(), order.begin() + ranks);
      least = std::min(least, step(g, p, t));
    } while (std::next_permutation(order.begin(), order.end()));
    ++cases;
    as_good += all->best().step_time.count <= least.count * 1.001;
  }
  EXPECT_GE(cases, 20);
  EXPECT_GE(as_good * 10, cases * 7) << as_good << " of " << cases;
  EXPECT_GE(faster, 10);
  EXPECT_GE(moved, 5);
}

TEST(PlacementSearch, IsNeverSlowerThanTheDefault) {
  std::mt19937 rng{20261129};
  const std::vector<Topology> topologies{load_topology("a100-pcie-8:2"),
                                         data_cluster("dragonfly.yaml"), data_cluster("torus.yaml"),
                                         load_topology("dgx-h100:12 gpus")};
  int feasible = 0, faster = 0, exchanges = 0;
  for (int i = 0; i < 800 && feasible < 90; ++i) {
    Topology t = topologies[rng() % topologies.size()];
    ClusterState state;
    if (rng() % 2 != 0) state.device_speed[DeviceId{rng() % 8}] = 0.7;
    if (rng() % 2 != 0)
      state.background[t.route(DeviceId{0}, DeviceId{t.device_count() - 1})[2]] =
          BytesPerSecond{3e9};
    t = t.in_state(state);
    const Graph g = rng() % 2 != 0 ? gpt() : mixtral();
    Plan wanted = random_plan(rng);
    set_precision(wanted, "bf16", "");
    wanted.sharded_storage = wanted.offload_optimizer = wanted.offload_activations = false;
    if (wanted.ranks() > 12 || wanted.ranks() != wanted.mesh_ranks()) continue;
    const auto plan = complete(g, wanted);
    if (!plan || !lower(g, *plan)) continue;
    SCOPED_TRACE(::testing::Message() << "case " << i << " on " << t.name() << "\n"
                                      << to_yaml(*plan));
    ++feasible;
    exchanges += plan->ep > 1;
    const auto all = place(g, wanted, t);
    ASSERT_TRUE(all) << all.reason();
    EXPECT_EQ(all->as_given().step_time, step(g, wanted, t));
    EXPECT_EQ(all->best().step_time, step(g, all->best().plan, t));
    EXPECT_LE(all->best().step_time, all->as_given().step_time);
    for (const Prediction& p : all->tried) EXPECT_GE(p.step_time, all->best().step_time);
    faster += all->best().step_time < all->as_given().step_time;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 30);
  EXPECT_GE(faster, 10);
  EXPECT_GE(exchanges, 3);
}

TEST(PlacementSearch, FindsAPlantedOrder) {
  // Six nodes whose cables were shuffled: nodes that a ring of dp visits in turn lie apart, and
  // only orders that go round the circle load each cable once.
  const Graph g = gpt();
  const Topology t = parse_topology(ring_of_nodes(6), "circle.yaml");
  std::mt19937 rng{7};
  for (int i = 0; i < 10; ++i) {
    Plan wanted = data_parallel(6);
    wanted.devices = {0, 1, 2, 3, 4, 5};
    std::shuffle(wanted.devices.begin(), wanted.devices.end(), rng);
    const auto all = place(g, wanted, t);
    ASSERT_TRUE(all);
    const Plan natural = data_parallel(6);
    EXPECT_EQ(all->best().step_time, step(g, natural, t));
    // From there on, no order of the six nodes weighs less.
    const auto plan = complete(g, natural);
    Communication communication(t);
    const auto program = lower(g, *plan);
    StepLoad load(*program, t, plan->precision.compute,
                  simulate(*program, communication, {Network::flows}), {0, 1, 2, 3, 4, 5});
    const double there = load.value().time;
    EXPECT_NEAR(least_of_all_orders(load), there, 1e-9 * there);
  }
}

TEST(PlacementSearch, WeighsAMoveAsItWeighsTheWhole) {
  // Changes, kept or taken back, leave the loads that a fresh count of the same mapping has.
  std::mt19937 rng{11};
  const Graph g = gpt();
  const Topology t = data_cluster("dragonfly.yaml");
  Plan wanted = data_parallel(5, 4);
  wanted.pp = 2, wanted.global_batch = 10;
  const auto plan = complete(g, wanted);
  ASSERT_TRUE(plan) << plan.reason();
  const auto program = lower(g, *plan);
  Communication communication(t);
  const Timeline played = simulate(*program, communication, {Network::flows});
  std::vector<std::int32_t> device(40);
  std::iota(device.begin(), device.end(), 0);
  StepLoad load(*program, t, plan->precision.compute, played, device);
  const StepLoad::Value first = load.value();
  for (int i = 0; i < 300; ++i) {
    StepLoad::Change change;
    const auto a = static_cast<std::int64_t>(rng() % 40), b = static_cast<std::int64_t>(rng() % 40);
    if (a != b)
      change.moves = {{a, load.device()[static_cast<std::size_t>(b)]},
                      {b, load.device()[static_cast<std::size_t>(a)]}};
    for (const auto& [axis, rings] : load.ring_axes()) {
      if (rings.size == 5 && rings.rings[0] >= 0)
        change.strides = {
            {rings.rings[rng() % rings.rings.size()], static_cast<std::int64_t>(1 + rng() % 4)}};
    }
    const StepLoad::Value before = load.value();
    const auto devices = load.device();
    const auto value = load.propose(change);
    if (rng() % 2 != 0) {
      load.keep();
      EXPECT_EQ(load.value().time, value.time);
    } else {
      load.take_back();
      EXPECT_EQ(load.value().time, before.time);
      EXPECT_EQ(load.device(), devices);
    }
  }
  load.set(device, std::vector<std::int64_t>(static_cast<std::size_t>(load.ring_count()), 1));
  EXPECT_NEAR(load.value().time, first.time, 1e-9 * first.time);
  EXPECT_NEAR(load.value().squares, first.squares, 1e-9 * first.squares);
}

TEST(PlacementSearch, LimitsSayWhatWasLeftOut) {
  const Graph g = gpt();
  const Topology t = data_cluster("dragonfly.yaml");
  PlacementLimits limits;
  limits.routes = 100;
  const Plan wanted = data_parallel(10, 4);
  auto all = place(g, wanted, t, nullptr, limits);
  ASSERT_TRUE(all) << all.reason();
  EXPECT_THAT(all->left_out, HasSubstr("only orders of axes"));
  EXPECT_LE(all->weighed, 2);
  limits.routes = 5000;
  all = place(g, wanted, t, nullptr, limits);
  ASSERT_TRUE(all);
  EXPECT_THAT(all->left_out, HasSubstr("stopped after 5,000 routes"));
  EXPECT_LE(all->best().step_time, all->as_given().step_time);
  // The same inputs give the same mapping.
  const auto again = place(g, wanted, t, nullptr, limits);
  ASSERT_TRUE(again);
  EXPECT_EQ(to_yaml(again->best().plan), to_yaml(all->best().plan));
  EXPECT_EQ(again->weighed, all->weighed);
}

}  // namespace
}  // namespace partita
