// Steps and collectives on tori, dragonflies and spines: folded as unfolded, spraying against
// hashing, the pages' examples.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>

#include "base/error.h"
#include "base/hash.h"
#include "simulator/engine/flows.h"
#include "simulator/engine/links.h"
#include "simulator/engine/simulate.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

/// `nodes` nodes of `devices` devices on a switch, with `nics` cards of 10 GB/s.
Topology with_fabric(int nodes, int devices, int nics, const std::string& fabric) {
  return parse_topology(
      fmt::format(R"(schema: partita.topology/1
name: small
source: test
nodes:
  - count: {}
    host_memory_bandwidth: 200 GB/s
    storage_bandwidth: 4 GB/s
    vertices:
      gpu[0-{}]: {{kind: device, device: h100-sxm}}
      switch0: {{kind: nvswitch}}
      nic[0-{}]: {{kind: nic, bandwidth: 10 GB/s, latency: 1 us}}
    links:
      - {{from: "gpu[0-{}]", to: switch0, kind: nvlink, bandwidth: 450 GB/s, latency: 0.5 us}}
      - {{from: "gpu[0-{}]", to: "nic[0-{}]", kind: pcie, bandwidth: 63 GB/s, latency: 0.25 us}}
fabric: {}
)",
                  nodes, devices - 1, nics - 1, devices - 1, devices - 1, nics - 1, fabric),
      "small.yaml");
}

constexpr const char* kFly =
    "{kind: dragonfly, groups: 3, routers_per_group: 2, nodes_per_router: 1, "
    "global_links_per_router: 2, local_bandwidth: 8 GB/s, local_latency: 0.3 us, "
    "global_bandwidth: 6 GB/s, global_latency: 1 us}";

std::vector<Topology> fabrics() {
  return {
      with_fabric(6, 2, 1, "{kind: torus, size: [3, 2], bandwidth: 7 GB/s, latency: 0.5 us}"),
      with_fabric(8, 2, 2, "{kind: torus, size: [2, 2, 2], bandwidth: 7 GB/s, latency: 0.5 us}"),
      with_fabric(6, 2, 1, kFly),
      with_fabric(6, 4, 2,
                  "{kind: fat tree, nodes_per_leaf: 2, spines: 2, routing: ecmp, seed: 5, "
                  "uplink_latency: 1 us}"),
      with_fabric(6, 4, 4,
                  "{kind: rails, nodes_per_leaf: 2, spines: 3, routing: ecmp, "
                  "uplink_latency: 1 us, pxn: true}"),
      with_fabric(6, 4, 4,
                  "{kind: rails, nodes_per_leaf: 2, spines: 3, uplink_latency: 1 us, "
                  "pxn: true}")};
}

TEST(Fabrics, StepsFoldToThePicosecond) {
  std::mt19937 rng{20261127};
  const std::vector<Topology> topologies = fabrics();
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  std::vector<int> feasible(topologies.size());
  int folds = 0, around = 0;
  for (int i = 0; i < 1600; ++i) {
    const Graph& g = graphs[rng() % graphs.size()];
    const std::size_t which = rng() % topologies.size();
    Topology t = topologies[which];
    if (rng() % 3 == 0) {
      // One direction of a few links.
      ClusterState state;
      for (int k = 0; k < 3; ++k)
        state.link_speed[LinkId{rng() % t.link_count()}] =
            0.25 * static_cast<double>(1 + rng() % 3);
      t = t.in_state(std::move(state));
    } else if (which < 3 && rng() % 2 == 0) {
      // Links between routers that have failed: the last of a torus and a dragonfly.
      ClusterState state;
      for (int k = 0; k < 3; ++k) {
        const LinkId l{t.link_count() - 1 - rng() % 12};
        if (t.link(l).kind == LinkKind::network) state.link_speed[l] = 0;
      }
      try {
        t = t.in_state(std::move(state));
      } catch (const InputError&) {
        continue;  // parted
      }
    }
    const Plan wanted = random_plan(rng);
    if (wanted.ranks() > static_cast<std::int64_t>(t.device_count())) continue;
    const auto plan = complete(g, wanted);
    if (!plan) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    SCOPED_TRACE(::testing::Message() << "case " << i << " on fabric " << which << "\n"
                                      << to_yaml(*plan));
    ++feasible[which];
    for (const Network network : {Network::idle, Network::flows}) {
      Communication communication(t);
      SimulateOptions options;
      options.network = network;
      const Timeline folded = simulate(*program, communication, options);
      options.unfolded = true;
      // Prices of a group are not those that another group of its pattern left behind.
      Communication fresh(t);
      const Timeline unfolded = simulate(*program, fresh, options);
      ASSERT_EQ(folded.step, unfolded.step);
      folds += folded.classes.size() < unfolded.classes.size();
    }
    around += t.goes_around();
  }
  EXPECT_GT(around, 50);
  for (const int n : feasible) EXPECT_GE(n, 15);
  EXPECT_GT(folds, 100);
}

// A pair is slow one way, another the other way: not two of one class.
TEST(Fabrics, LinksThatAreSlowInOppositeDirectionsAreTwoKinds) {
  const Topology built = with_fabric(4, 1, 1, "{kind: single switch}");
  ClusterState state;
  state.link_speed[built.find_link("node0.nic0->switch", "")] = 0.25;
  state.link_speed[built.find_link("switch->node1.nic0", "")] = 0.25;
  const Topology t = built.in_state(state);
  Communication communication(t);
  EXPECT_NE(communication.price_class({0, 2}, false), communication.price_class({1, 3}, false));
  EXPECT_EQ(communication.price_class({2, 3}, false), communication.price_class({3, 2}, false));
  Plan wanted = base_plan();
  wanted.pp = 2;
  wanted.dp = 2;
  wanted.global_batch = 8;
  const Program program = lowered(gpt(), wanted);
  SimulateOptions options;
  const Timeline folded = simulate(program, communication, options);
  options.unfolded = true;
  EXPECT_EQ(folded.step, simulate(program, communication, options).step);
}

/// Every group priced by itself, without what was cached for others.
TEST(Fabrics, GroupsOfOnePatternCostTheSame) {
  std::mt19937 rng{3};
  auto topologies = fabrics();
  for (const char* name : {"dgx-h100:34", "gb200-nvl72:20", "dgx-a100-80gb:22"})
    topologies.push_back(load_topology(name));
  // Equal devices behind unequal cards.
  topologies.push_back(parse_topology(R"(schema: partita.topology/1
name: two-kinds
source: test
nodes:
  - count: 3
    vertices:
      gpu[0-1]: {kind: device, device: h100-sxm}
      nic0: {kind: nic, bandwidth: 10 GB/s, latency: 1 us}
    links: [{from: "gpu[0-1]", to: nic0, kind: pcie, bandwidth: 63 GB/s, latency: 1 us}]
  - count: 3
    vertices:
      gpu[0-1]: {kind: device, device: h100-sxm}
      nic0: {kind: nic, bandwidth: 20 GB/s, latency: 1 us}
    links: [{from: "gpu[0-1]", to: nic0, kind: pcie, bandwidth: 63 GB/s, latency: 1 us}]
fabric: {kind: single switch}
)",
                                      "two-kinds.yaml"));
  for (const Topology& t : topologies) {
    SCOPED_TRACE(t.name());
    Communication shared(t);
    const auto n = static_cast<std::int64_t>(t.device_count());
    for (int k = 0; k < 150; ++k) {
      const std::int64_t size = 2 + static_cast<std::int64_t>(rng() % 7);
      const std::int64_t stride = 1 + static_cast<std::int64_t>(rng() % 5);
      std::vector<std::int64_t> group;
      const std::int64_t first = static_cast<std::int64_t>(rng()) % n;
      for (std::int64_t m = 0; m < size && m * stride < n; ++m)
        group.push_back((first + m * stride) % n);
      if (rng() % 3 == 0) std::shuffle(group.begin(), group.end(), rng);
      Communication own(t);
      for (const CollectiveKind kind : {CollectiveKind::all_reduce, CollectiveKind::all_to_all})
        ASSERT_EQ(shared.collective(kind, Bytes{1 << 20}, group).count,
                  own.collective(kind, Bytes{1 << 20}, group).count)
            << fmt::format("{}", fmt::join(group, " "));
    }
  }
}

// Whatever the failures: folded as unfolded, and no cut is beaten.
TEST(Fabrics, NoCutOfWhatIsLeftIsBeaten) {
  std::mt19937 rng{5};
  int around = 0, tight = 0;
  for (int i = 0; i < 300; ++i) {
    Topology t = fabrics()[rng() % 3];
    ClusterState state;
    for (int k = 0; k < 4; ++k) {
      const LinkId l{t.link_count() - 1 - rng() % 16};
      if (t.link(l).kind == LinkKind::network) state.link_speed[l] = rng() % 4 == 0 ? 0.5 : 0;
    }
    try {
      t = t.in_state(std::move(state));
    } catch (const InputError&) {
      continue;  // parted
    }
    around += t.goes_around();
    const AlgorithmRow row = kAlgorithms[rng() % kAlgorithms.size()];
    if (row.algorithm == Algorithm::nvls || row.algorithm == Algorithm::nvls_tree) continue;
    std::vector<std::int64_t> ranks(t.device_count());
    std::iota(ranks.begin(), ranks.end(), 0);
    std::shuffle(ranks.begin(), ranks.end(), rng);
    ranks.resize(2 + rng() % (ranks.size() - 1));
    const Rhythm r = rhythm(row.kind, row.algorithm, static_cast<std::int32_t>(ranks.size()));
    const EvenCut cut(row.kind, r, Bytes{1 + static_cast<std::int64_t>(rng() % 50'000'000)});
    const NetworkTraffic traffic = traffic_of(r, cut, ranks, t);
    const Played folded = play(traffic, {true}), unfolded = play(traffic, {false});
    ASSERT_EQ(folded.end, unfolded.end);
    ASSERT_EQ(folded.member_end, unfolded.member_end);
    for (int k = 0; k < 30; ++k) {
      // Any set of vertices.
      std::vector<char> inside(t.vertex_count());
      const bool by_node = rng() % 2 == 0;
      std::vector<char> of_node(t.node_count() + 1);
      for (char& x : of_node) x = rng() % 2 == 0;
      for (std::size_t v = 0; v < inside.size(); ++v) {
        const std::size_t node = t.node_of_vertex(static_cast<std::int32_t>(v));
        inside[v] = by_node && node < t.node_count() ? of_node[node] : rng() % 2 == 0;
      }
      double room = 0, bytes = 0;
      for (std::size_t l = 0; l < t.link_count(); ++l) {
        const Link link = t.link(LinkId{l});
        if (inside[static_cast<std::size_t>(link.from)] &&
            !inside[static_cast<std::size_t>(link.to)])
          room += link.bandwidth.count;
      }
      const auto is_inside = [&](std::int32_t member) {
        const auto rank = static_cast<std::size_t>(ranks[static_cast<std::size_t>(member)]);
        return inside[static_cast<std::size_t>(t.vertex_of(DeviceId{rank}))] != 0;
      };
      for (const TrafficBeat& b : traffic.beats) {
        for (const TrafficMessage& m : b.messages) {
          if (is_inside(m.from) && !is_inside(m.to))
            bytes += static_cast<double>(b.repeat) * static_cast<double>(m.bytes.count);
        }
      }
      const double end = 1e-12 * static_cast<double>(folded.end.count);
      ASSERT_GE(end * (1 + 1e-9) * room, bytes);
      tight += bytes > 0.2 * end * room;
    }
  }
  EXPECT_GT(around, 100);
  EXPECT_GT(tight, 30);
}

constexpr CollectiveKind kPriced[] = {CollectiveKind::all_reduce, CollectiveKind::all_gather,
                                      CollectiveKind::reduce_scatter, CollectiveKind::all_to_all,
                                      CollectiveKind::broadcast};

std::string leaves(int of_nodes, const std::string& oversubscription) {
  return fmt::format(
      "{{kind: fat tree, nodes_per_leaf: {}, spines: 2, oversubscription: {}, uplink_latency: 1 "
      "us}}",
      of_nodes, oversubscription);
}

/// Every link between switches at 1 / `times` of its rate.
Topology with_slow_uplinks(const Topology& t, double times) {
  ClusterState state;
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    if (t.node_of_link(LinkId{l}) == t.node_count()) state.link_speed[LinkId{l}] = 1 / times;
  }
  return t.in_state(std::move(state));
}

// One cluster, written as oversubscribed or with all its uplinks slow; and no price beats what must
// cross from one leaf's nodes to the others.
TEST(Fabrics, OversubscriptionIsPricedAsSlowUplinksAndNoCutIsBeaten) {
  std::mt19937 rng{11};
  int slower = 0, tight = 0;
  for (int i = 0; i < 300; ++i) {
    const int of_leaf = 1 + static_cast<int>(rng() % 2),
              nodes = of_leaf * (2 + static_cast<int>(rng() % 2));
    const int devices = 1 << rng() % 4, nics = devices > 1 && rng() % 2 == 0 ? devices : 1;
    const int times = 1 << rng() % 4;
    const Topology full = with_fabric(nodes, devices, nics, leaves(of_leaf, "1"));
    const Topology over = with_fabric(nodes, devices, nics, leaves(of_leaf, std::to_string(times)));
    Communication plain(full), priced(over), worn(with_slow_uplinks(full, times));
    // As many of each node, so that groups are of a kind that NCCL has graphs for.
    const int of_node = 1 + static_cast<int>(rng() % static_cast<unsigned>(devices));
    std::vector<std::int64_t> ranks;
    for (int k = 0; k < nodes * devices; ++k) {
      if (k % devices < of_node) ranks.push_back(k);
    }
    const CollectiveKind kind = kPriced[rng() % std::size(kPriced)];
    const Bytes bytes{std::int64_t{1} << (10 + rng() % 22)};
    const double t = priced.collective(kind, bytes, ranks).count;
    ASSERT_NEAR(t, worn.collective(kind, bytes, ranks).count, 1e-9 * t) << name(kind) << " " << i;
    ASSERT_GE(t, plain.collective(kind, bytes, ranks).count * (1 - 1e-9));
    slower += t > 1.01 * plain.collective(kind, bytes, ranks).count;
    double room = 0;  // up from the first leaf
    for (std::size_t l = 0; l < over.link_count(); ++l) {
      const Link link = over.link(LinkId{l});
      if (over.node_of_link(LinkId{l}) == over.node_count() &&
          over.link_name(LinkId{l}).starts_with("leaf0->"))
        room += link.bandwidth.count;
    }
    const double n = static_cast<double>(ranks.size()),
                 inside = static_cast<double>(of_leaf * of_node);
    double must = 1;  // of the payload, leaves it
    if (kind == CollectiveKind::all_gather) must = inside / n;
    if (kind == CollectiveKind::reduce_scatter) must = (n - inside) / n;
    if (kind == CollectiveKind::all_to_all) must = inside * (n - inside) / n;
    const double least = must * static_cast<double>(bytes.count) / room;
    ASSERT_GE(t * (1 + 1e-9), least) << name(kind) << " " << i;
    tight += t < 3 * least;
    const auto moving = priced.moving(kind, bytes, ranks);
    ASSERT_LE(moving.rate.count,
              priced.way(priced.lay(kind, bytes, ranks), ranks).bandwidth.count * (1 + 1e-9));
  }
  EXPECT_GT(slower, 50);
  EXPECT_GT(tight, 50);
}

// What lies on links is what the page says; every lay sends what its algorithm must.
TEST(Fabrics, LaysAreThoseOfThePage) {
  Communication two(load_topology("dgx-h100:2"));
  std::vector<std::int64_t> all(16);
  std::iota(all.begin(), all.end(), 0);
  const Bytes bytes{2'100'000'000};
  EXPECT_EQ(two.lay(CollectiveKind::all_reduce, bytes, all), Lay::switch_trees);
  EXPECT_NEAR(two.way(Lay::switch_trees, all).bandwidth.count, 750e9, 1);
  EXPECT_NEAR(two.way(Lay::rings, all).bandwidth.count, 400e9, 1);
  // Seven of eight rings go on over a member's NVLink, one to the device on whose card it leaves.
  int links = 0;
  for (const auto& [link, count] : lay_out(two.topology(), Lay::rings, all).flows) {
    const bool nvlink = two.topology().link(link).kind == LinkKind::nvlink;
    EXPECT_EQ(count, nvlink ? 8 : 1) << two.topology().link_name(link);
    links += nvlink;
  }
  EXPECT_EQ(links, 32);
  // Eight chains of S / 8 in each node, up and down over 7 of its members' 8 NVLinks each way.
  EXPECT_NEAR(two.way(Lay::trees, all).bandwidth.count, 450e9 * (15.0 / 8) / (2 * 7.0 / 8), 1);
  const auto at = [&](double speed) {
    ClusterState state;
    state.link_speed[two.topology().find_link("node1.nic2->rail2", "")] = speed;
    Communication worn(two.topology().in_state(state));
    const double fixed = worn.collective(CollectiveKind::all_reduce, Bytes{1}, all).count;
    return worn.collective(CollectiveKind::all_reduce, bytes, all).count - fixed;
  };
  const double built = at(0.9999);
  EXPECT_EQ(at(0.9), built);
  const double rate = 2.1e9 * 15 / 8 / built;
  EXPECT_NEAR(rate, 499e9, 1e9);
  EXPECT_NEAR(at(0.5), built * rate / 375e9, 1e-9);
  const Topology one = with_fabric(2, 8, 8, leaves(1, "8"));
  EXPECT_NEAR(Communication(one).way(Lay::switch_trees, all).bandwidth.count, 10e9 * 15 / 8, 1);
  std::vector<std::int64_t> node(all.begin(), all.begin() + 8);
  EXPECT_NEAR(two.way(Lay::switches, node).bandwidth.count, 450e9 * (14.0 / 8) / (9.0 / 8), 1);
  EXPECT_NEAR(two.way(Lay::switches_gather, node).bandwidth.count, 450e9 * 7 / 8, 1);
  EXPECT_NEAR(two.way(Lay::switches_sum, node).bandwidth.count, 450e9 * 7 / 8, 1);
  // PAT: of every rank n - 1 parts; of 8 one over distance 4, two over 2, four over 1.
  const Topology flat = with_fabric(8, 1, 1, "{kind: single switch}");
  for (const Lay lay : {Lay::near_trees, Lay::near_sums}) {
    for (int n = 2; n <= 8; ++n) {
      std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
      std::iota(ranks.begin(), ranks.end(), 0);
      const LinkFlows flows = lay_out(flat, lay, ranks);
      for (const auto& [link, count] : flows.flows) EXPECT_EQ(count, n - 1);
      EXPECT_DOUBLE_EQ(flows.share, 1.0 / (n - 1));
    }
  }
  // Trees: an all-reduce sends every domain's sum up and down once in each half.
  for (int n = 2; n <= 8; ++n) {
    std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
    std::iota(ranks.begin(), ranks.end(), 0);
    const LinkFlows flows = lay_out(flat, Lay::trees, ranks);
    std::int64_t out = 0;
    for (const auto& [link, count] : flows.flows) {
      out += flat.link_name(link).ends_with("->switch") ? count : 0;
      EXPECT_LE(count, 4);  // an inner member's two children and parent, and a leaf's parent
    }
    EXPECT_EQ(out, 4 * (n - 1));
  }
}

// docs/sharing.md, "Spines".
TEST(Fabrics, TwoFlowsOfOneHashShareASpine) {
  const auto tree = [](const std::string& routing) {
    return with_fabric(
        4, 1, 1,
        "{kind: fat tree, nodes_per_leaf: 2, spines: 2, uplink_latency: 1 us" + routing + "}");
  };
  const auto ends = [&](const Topology& t) {
    Rhythm shift;
    shift.members = 4;
    shift.beats.emplace_back();
    shift.beats[0].messages = {{0, 2, 0, 1, false}, {1, 3, 0, 1, false}};
    const EvenCut cut(CollectiveKind::shift, shift, Bytes{100'000'000});
    return play(traffic_of(shift, cut, {0, 1, 2, 3}, t)).end.count;
  };
  // 0.25 + 1 + 1 + 1 + 1 + 0.25 us of latency; 100 MB at 10 GB/s, or at 5.
  EXPECT_EQ(ends(tree("")), 4'500'000 + 10'000'000'000);
  std::map<std::int64_t, int> times;
  for (std::uint64_t seed = 0; seed < 64; ++seed) {
    const bool collide = mix(mix(mix(seed, 0), 2), 0) % 2 == mix(mix(mix(seed, 1), 3), 0) % 2;
    const std::int64_t end = ends(tree(fmt::format(", routing: ecmp, seed: {}", seed)));
    EXPECT_EQ(end, 4'500'000 + (collide ? 20'000'000'000 : 10'000'000'000)) << seed;
    ++times[end];
  }
  EXPECT_EQ(times.size(), 2u);
  EXPECT_EQ(ends(tree(", routing: ecmp, seed: 0")), 4'500'000 + 10'000'000'000);
  EXPECT_EQ(ends(tree(", routing: ecmp, seed: 1")), 4'500'000 + 20'000'000'000);
}

/// All send at once, everyone as much and as far: a shift by `by` nodes, or to all others.
TEST(Fabrics, SprayingIsNeverSlowerThanHashingSymmetricTraffic) {
  std::mt19937 rng{4};
  int slower = 0;
  for (int k = 0; k < 120; ++k) {
    const int leaves = 2 + static_cast<int>(rng() % 3), below = 1 + static_cast<int>(rng() % 4);
    const int devices = 1 + static_cast<int>(rng() % 3), nodes = leaves * below;
    const std::string text = fmt::format(
        "{{kind: fat tree, nodes_per_leaf: {}, spines: {}, oversubscription: {}, "
        "uplink_latency: 1 us}}",
        below, 2 + rng() % 3, 1 + rng() % 2);
    SCOPED_TRACE(text);
    const Topology spray = with_fabric(nodes, devices, devices, text);
    const Topology ecmp = spray.with_routing({true, rng()}, "");
    const std::int32_t n = nodes * devices;
    Rhythm rhythm;
    rhythm.members = n;
    rhythm.beats.emplace_back();
    const bool all = rng() % 2 == 0;
    // By whole leaves, so that every message climbs, or everyone to everyone.
    const int up = 1 + static_cast<int>(rng() % static_cast<unsigned>(leaves - 1));
    const std::int32_t by = below * devices * up;
    for (std::int32_t m = 0; m < n; ++m) {
      for (std::int32_t to = 0; to < n; ++to) {
        if (to != m && (all || to == (m + by) % n))
          rhythm.beats[0].messages.push_back({m, to, 0, 1, false});
      }
    }
    std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
    std::iota(ranks.begin(), ranks.end(), 0);
    const auto end = [&](const Topology& t) {
      const EvenCut cut(CollectiveKind::shift, rhythm, Bytes{10'000'000});
      const NetworkTraffic traffic = traffic_of(rhythm, cut, ranks, t);
      const Played folded = play(traffic, {true}), unfolded = play(traffic, {false});
      EXPECT_EQ(folded.end, unfolded.end);
      return folded.end;
    };
    const Ticks even = end(spray), hashed = end(ecmp);
    EXPECT_LE(even, hashed);
    slower += even < hashed;
  }
  EXPECT_GT(slower, 40);
}

TEST(Fabrics, TheContendedResourceNamesItsSpine) {
  const Topology t = with_fabric(
      4, 1, 1,
      "{kind: fat tree, nodes_per_leaf: 2, spines: 2, routing: ecmp, uplink_latency: 1 us}");
  Communication communication(t);
  const auto flows = lay_out(communication.topology(), Lay::pairs, {0, 1, 2, 3});
  std::map<std::string, std::int64_t> count;
  for (const auto& [link, n] : flows.flows) count[t.link_name(link)] = n;
  std::map<std::string, std::int64_t> want;
  for (std::uint64_t a = 0; a < 4; ++a) {
    for (std::uint64_t b = 0; b < 4; ++b) {
      if (a / 2 != b / 2)
        ++want[fmt::format("leaf{}->spine{}", a / 2, mix(mix(mix(0, a), b), 0) % 2)];
    }
  }
  for (const auto& [name, n] : want) EXPECT_EQ(count[name], n) << name;
}

}  // namespace
}  // namespace partita
