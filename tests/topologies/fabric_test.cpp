// Tori, dragonflies, spines by hash and PXN: the page's examples by hand, and laws over random
// ones.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

#include "base/error.h"
#include "base/hash.h"
#include "tests/topologies/flat_graph.h"
#include "topologies/bisection.h"
#include "topologies/topology.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// `nodes` nodes of one device and `nics` cards of 10 GB/s and 1 us each.
Topology with_fabric(std::size_t nodes, const std::string& fabric, std::size_t nics = 1) {
  return parse_topology(fmt::format(R"(schema: partita.topology/1
name: small
source: test
nodes:
  - count: {}
    vertices:
      gpu: {{kind: device, device: cpu}}
      nic[0-{}]: {{kind: nic, bandwidth: 10 GB/s, latency: 1 us}}
    links:
      - {{from: gpu, to: "nic[0-{}]", kind: pcie, bandwidth: 20 GB/s, latency: 1 us}}
fabric: {}
)",
                                    nodes, nics - 1, nics - 1, fabric),
                        "small.yaml");
}

std::string torus_text(const std::vector<std::size_t>& size, const std::string& more = "") {
  return fmt::format("{{kind: torus, size: [{}], bandwidth: 5 GB/s, latency: 0.5 us{}}}",
                     fmt::join(size, ", "), more);
}

/// The switches that a route between the only devices of two nodes passes.
std::vector<std::string> hops(const Topology& t, std::size_t a, std::size_t b) {
  std::vector<std::string> names;
  for (const LinkId l : t.route(DeviceId{a}, DeviceId{b})) {
    const std::int32_t to = t.link(l).to;
    if (t.vertex_kind(to) == VertexKind::network_switch) names.push_back(t.vertex_name(to));
  }
  return names;
}

void expect_opposites(const Topology& t) {
  std::set<std::pair<std::int32_t, std::int32_t>> seen;
  std::map<std::string, std::size_t> names;
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const Link link = t.link(LinkId{l}), other = t.link(LinkId{l ^ 1});
    ASSERT_NE(link.from, link.to) << t.link_name(LinkId{l});
    ASSERT_EQ(link.from, other.to) << t.link_name(LinkId{l});
    ASSERT_EQ(link.to, other.from) << t.link_name(LinkId{l});
    ASSERT_EQ(link.bandwidth, other.bandwidth);
  }
}

// docs/topologies.md, "Torus by hand".
TEST(Torus, ThePagesExample) {
  const Topology t = with_fabric(16, torus_text({4, 4}));
  // Node 0 is (0, 0), node 11 is (3, 2): one step down in the first dimension, two up in the
  // second.
  EXPECT_EQ(route_text(t, 0, 11),
            "node0.gpu->node0.nic0 node0.nic0->router0.0 router0.0->router3.0 "
            "router3.0->router3.1 router3.1->router3.2 router3.2->node11.nic0 "
            "node11.nic0->node11.gpu");
  // And back: half way round goes up again, not the way it came.
  EXPECT_THAT(hops(t, 11, 0),
              ::testing::ElementsAre("router3.2", "router0.2", "router0.3", "router0.0"));
  EXPECT_EQ(walk(t, DeviceId{std::size_t{0}}, DeviceId{std::size_t{11}}).bottleneck, 5e9);
  // 16 nodes with a cable up in each of two dimensions, a card and a PCIe link.
  EXPECT_EQ(t.link_count(), 2u * (16 * 2 + 16 + 16));
  // The first half are the rows 0 and 1 of the second dimension: each column crosses twice.
  EXPECT_EQ(bisection(t).count, 2 * 4 * 5e9);
}

TEST(Torus, RoutesAreShortestAndTakeDimensionsInOrder) {
  std::mt19937 rng{1};
  for (int i = 0; i < 20; ++i) {
    std::vector<std::size_t> size;
    std::size_t nodes = 1;
    for (std::size_t d = 1 + rng() % 4; d > 0; --d) {
      size.push_back(1 + rng() % (nodes > 30 ? 2 : 7));
      nodes *= size.back();
    }
    if (nodes < 2) continue;
    SCOPED_TRACE(torus_text(size));
    const Topology t = with_fabric(nodes, torus_text(size));
    expect_opposites(t);
    const FlatGraph flat(t);
    std::map<std::vector<std::int64_t>, std::string> by_offset;
    for (std::size_t a = 0; a < nodes; ++a) {
      for (std::size_t b = 0; b < nodes; ++b) {
        if (a == b) continue;
        const FlatPath got = walk(t, DeviceId{a}, DeviceId{b});
        ASSERT_EQ(got.links, flat.best(DeviceId{a}, DeviceId{b})->links) << a << " to " << b;
        // Every hop changes one coordinate, and never an earlier one than the hop before.
        const auto names = hops(t, a, b);
        std::size_t last = 0;
        for (std::size_t h = 1; h < names.size(); ++h) {
          std::vector<std::size_t> x, y;
          for (const auto& [name, to] : {std::pair{names[h - 1], &x}, std::pair{names[h], &y}}) {
            std::string rest = name.substr(6) + ".";
            for (std::size_t at; (at = rest.find('.')) != std::string::npos; rest.erase(0, at + 1))
              to->push_back(std::stoul(rest.substr(0, at)));
          }
          std::vector<std::size_t> changed;
          for (std::size_t d = 0; d < x.size(); ++d) {
            if (x[d] != y[d]) changed.push_back(d);
          }
          ASSERT_EQ(changed.size(), 1u) << names[h - 1] << " to " << names[h];
          ASSERT_GE(changed[0], last);
          last = changed[0];
          // The shorter way round, up where both are as long: never more than half way.
          const std::size_t n = size[last];
          const bool up = (x[last] + 1) % n == y[last];
          std::size_t left = 0;  // steps from x to the goal's coordinate, up
          std::size_t goal = b;
          for (std::size_t d = 0; d < last; ++d) goal /= size[d];
          left = (goal % n + n - x[last]) % n;
          ASSERT_EQ(up, 2 * left <= n) << names[h - 1] << " to " << names[h] << " for " << b;
        }
      }
    }
  }
}

TEST(Torus, PairsWithTheSameOffsetAreJoinedAlike) {
  const Topology t = with_fabric(24, torus_text({4, 3, 2}));
  std::map<std::uint64_t, std::pair<std::size_t, double>> seen;
  for (std::size_t a = 0; a < 24; ++a) {
    for (std::size_t b = 0; b < 24; ++b) {
      if (a == b) continue;
      const FlatPath p = walk(t, DeviceId{a}, DeviceId{b});
      const auto [it, fresh] = seen.emplace(t.offset_of(b, a), std::pair{p.links, p.bottleneck});
      EXPECT_EQ(it->second.first, p.links);
    }
  }
  EXPECT_EQ(seen.size(), 23u);
}

TEST(Torus, ACardForEachDirectionSendsThatWayOnly) {
  const Topology t = with_fabric(16, torus_text({4, 4}, ", nics: direction"), 4);
  // Down in the first dimension, so out by card 1; it arrives going up in the second: by card 3,
  // the one that looks down.
  EXPECT_EQ(route_text(t, 0, 11),
            "node0.gpu->node0.nic1 node0.nic1->router0.0 router0.0->router3.0 "
            "router3.0->router3.1 router3.1->router3.2 router3.2->node11.nic3 "
            "node11.nic3->node11.gpu");
  EXPECT_EQ(route_text(t, 0, 1),
            "node0.gpu->node0.nic0 node0.nic0->router0.0 router0.0->router1.0 "
            "router1.0->node1.nic1 node1.nic1->node1.gpu");
}

// docs/topologies.md, "Dragonfly by hand".
constexpr const char* kFly =
    "{kind: dragonfly, groups: 5, routers_per_group: 4, nodes_per_router: 2, "
    "global_links_per_router: 1, local_bandwidth: 10 GB/s, local_latency: 0.3 us, "
    "global_bandwidth: 5 GB/s, global_latency: 1 us}";

TEST(Dragonfly, ThePagesExample) {
  const Topology t = with_fabric(40, kFly);
  // Group 0's way to group 2 is its port 1, of router 1; there it is port 2, of router 2. Node 0 is
  // on router 0 of group 0, node 19 on router 1 of group 2.
  EXPECT_EQ(route_text(t, 0, 19),
            "node0.gpu->node0.nic0 node0.nic0->group0.router0 group0.router0->group0.router1 "
            "group0.router1->group2.router2 group2.router2->group2.router1 "
            "group2.router1->node19.nic0 node19.nic0->node19.gpu");
  // Both at the ends of the cable: no local hop. In one group: one local hop. On one router: none.
  EXPECT_THAT(hops(t, 2, 20), ::testing::ElementsAre("group0.router1", "group2.router2"));
  EXPECT_THAT(hops(t, 0, 6), ::testing::ElementsAre("group0.router0", "group0.router3"));
  EXPECT_THAT(hops(t, 0, 1), ::testing::ElementsAre("group0.router0"));
  // 5 groups of 6 local cables, 10 pairs of groups, and a card and a PCIe link a node.
  EXPECT_EQ(t.link_count(), 2u * (5 * 6 + 10 + 40 + 40));
}

TEST(Dragonfly, RoutesAreLocalGlobalLocalAndMinimal) {
  std::mt19937 rng{2};
  int several = 0;
  for (int i = 0; i < 80; ++i) {
    const std::size_t groups = 1 + rng() % 6, routers = 1 + rng() % 4, below = 1 + rng() % 2;
    std::size_t ports = groups == 1 ? 0 : (groups - 1) * (1 + rng() % 4);
    while (ports % routers != 0) ports += groups - 1;
    const std::string text = fmt::format(
        "{{kind: dragonfly, groups: {}, routers_per_group: {}, nodes_per_router: {}{}{}}}", groups,
        routers, below, routers > 1 ? ", local_bandwidth: 10 GB/s, local_latency: 0.3 us" : "",
        groups > 1 ? fmt::format(", global_links_per_router: {}, global_bandwidth: 5 GB/s, "
                                 "global_latency: 1 us",
                                 ports / routers)
                   : "");
    SCOPED_TRACE(text);
    const std::size_t nodes = groups * routers * below;
    const Topology t = with_fabric(nodes, text);
    expect_opposites(t);
    // Global cables by router and by pair of groups.
    std::map<std::string, std::size_t> of_router;
    std::map<std::pair<std::string, std::string>, std::size_t> of_pair;
    std::set<std::pair<std::string, std::string>> cable;
    const auto group = [](const std::string& s) { return s.substr(0, s.find('.')); };
    for (std::size_t l = 0; l < t.link_count(); ++l) {
      const Link link = t.link(LinkId{l});
      if (t.vertex_kind(link.from) != VertexKind::network_switch ||
          t.vertex_kind(link.to) != VertexKind::network_switch)
        continue;
      const std::string from = t.vertex_name(link.from), to = t.vertex_name(link.to);
      cable.emplace(from, to);
      if (group(from) == group(to)) continue;
      ++of_router[from];
      ++of_pair[{group(from), group(to)}];
    }
    EXPECT_EQ(of_pair.size(), groups * (groups - 1));
    for (const auto& [pair, n] : of_pair) EXPECT_EQ(n, ports / (groups - 1));
    for (const auto& [router, n] : of_router) EXPECT_EQ(n, ports / routers);
    several += groups > 1 && ports / (groups - 1) > 1;
    for (std::size_t a = 0; a < nodes; ++a) {
      for (std::size_t b = 0; b < nodes; ++b) {
        if (a == b) continue;
        walk(t, DeviceId{a}, DeviceId{b});
        const auto names = hops(t, a, b);
        std::size_t global = 0;
        for (std::size_t h = 1; h < names.size(); ++h)
          global += group(names[h - 1]) != group(names[h]);
        const std::string from = names.front(), to = names.back();
        if (group(from) == group(to)) {
          ASSERT_EQ(names.size(), from == to ? 1u : 2u);
          continue;
        }
        ASSERT_EQ(global, 1u);
        // No cable between the two groups would need fewer hops.
        std::size_t fewest = 9;
        for (const auto& [x, y] : cable) {
          if (group(x) == group(from) && group(y) == group(to))
            fewest = std::min<std::size_t>(fewest, 1 + (x != from) + (y != to));
        }
        ASSERT_EQ(names.size() - 1, fewest) << route_text(t, a, b);
      }
    }
  }
  EXPECT_GT(several, 20);
}

TEST(Dragonfly, EqualCablesShareTheRoutersOfTwoGroups) {
  // Two groups of 4 routers with 2 cables each between them: 8, of which 4 are as short for a pair
  // of routers that have none in common with a cable.
  const Topology t = with_fabric(8,
                                 "{kind: dragonfly, groups: 2, routers_per_group: 4, "
                                 "nodes_per_router: 1, global_links_per_router: 2, "
                                 "local_bandwidth: 10 GB/s, local_latency: 0.3 us, "
                                 "global_bandwidth: 5 GB/s, global_latency: 1 us}");
  std::set<std::string> used;
  for (std::size_t a = 0; a < 4; ++a) {
    for (std::size_t b = 4; b < 8; ++b) {
      for (const LinkId l : t.route(DeviceId{a}, DeviceId{b})) {
        if (t.link(l).latency == 1.0_us && t.link(l).bandwidth == 5.0_GBps)
          used.insert(fmt::format("{}", l.value));
      }
    }
  }
  EXPECT_GE(used.size(), 6u);
}

TEST(Dragonfly, PairsWithTheSameOffsetsAreJoinedAlike) {
  const Topology t = with_fabric(40, kFly);
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::size_t> seen;
  for (std::size_t a = 0; a < 40; ++a) {
    for (std::size_t b = 0; b < 40; ++b) {
      if (a == b) continue;
      const std::size_t links = walk(t, DeviceId{a}, DeviceId{b}).links;
      const auto [it, fresh] = seen.emplace(std::pair{t.offset_of(a, a), t.offset_of(b, a)}, links);
      // Nodes of one router look alike from afar; the pair of them is nearer than itself.
      EXPECT_EQ(it->second, links);
    }
  }
}

std::string tree_text(const std::string& more) {
  return "{kind: fat tree, nodes_per_leaf: 4, uplink_latency: 1 us, " + more + "}";
}

// docs/sharing.md, "Spines".
TEST(Spines, HashPutsEachPairOfDevicesOnOne) {
  for (const std::uint64_t seed : {0ull, 1ull, 12345ull}) {
    const Topology t =
        with_fabric(16, tree_text(fmt::format("spines: 4, routing: ecmp, seed: {}", seed)));
    std::map<std::string, int> used;
    for (std::size_t a = 0; a < 16; ++a) {
      for (std::size_t b = 0; b < 16; ++b) {
        if (a / 4 == b / 4) continue;
        const auto names = hops(t, a, b);
        ASSERT_EQ(names.size(), 3u);
        EXPECT_EQ(names[1], fmt::format("spine{}", mix(mix(mix(seed, a), b), 0) % 4));
        ++used[names[1]];
      }
    }
    EXPECT_EQ(used.size(), 4u);
    // 40 GB/s below a leaf of four cards; a quarter of it to each spine.
    EXPECT_EQ(t.link(t.find_link("leaf2->spine3", "")).bandwidth, 10.0_GBps);
    EXPECT_EQ(t.link(t.find_link("spine0->leaf1", "")).bandwidth, 10.0_GBps);
    expect_opposites(t);
  }
}

TEST(Spines, NeighboursCollideAsOftenAsChanceHasIt) {
  for (const std::size_t spines : {2u, 4u, 8u}) {
    const Topology t = with_fabric(
        256, fmt::format("{{kind: fat tree, nodes_per_leaf: 128, uplink_latency: 1 us, spines: {}, "
                         "routing: ecmp}}",
                         spines));
    int collide = 0;
    for (std::size_t a = 0; a < 128; ++a) {
      for (std::size_t b = 128; b < 136; ++b) collide += hops(t, a, b)[1] == hops(t, a, b + 1)[1];
    }
    // 1,024 trials of 1 / spines: five standard deviations.
    const double p = 1.0 / static_cast<double>(spines);
    EXPECT_NEAR(collide, 1024 * p, 5 * std::sqrt(1024 * p * (1 - p)));
  }
}

TEST(Fabric, MaySum) {
  EXPECT_FALSE(with_fabric(4, "{kind: single switch}").sharp());
  EXPECT_TRUE(with_fabric(4, "{kind: single switch, sharp: true}").sharp());
  EXPECT_TRUE(with_fabric(16, tree_text("sharp: true")).sharp());
  EXPECT_THAT(
      [] {
        with_fabric(16,
                    "{kind: torus, size: [4, 4], bandwidth: 1 GB/s, "
                    "latency: 1 us, sharp: true}");
      },
      ::testing::ThrowsMessage<InputError>(::testing::HasSubstr("sharp")));
}

TEST(Spines, SprayedOverTheyAreOneAndWhatTheySumTo) {
  const Topology plain = with_fabric(16, tree_text("oversubscription: 2")),
                 many = with_fabric(16, tree_text("oversubscription: 2, spines: 4"));
  EXPECT_EQ(plain.link_count(), many.link_count());
  for (std::size_t l = 0; l < plain.link_count(); ++l) {
    EXPECT_EQ(plain.link_name(LinkId{l}), many.link_name(LinkId{l}));
    EXPECT_EQ(plain.link(LinkId{l}).bandwidth, many.link(LinkId{l}).bandwidth);
  }
  const Topology hashed = many.with_routing({true, 3}, "here");
  EXPECT_EQ(bisection(hashed).count, bisection(many).count);
  EXPECT_EQ(hashed.with_routing({}, "here").link_count(), many.link_count());
  EXPECT_THAT(
      [&] {
        plain.with_routing({true, 0}, "--spines");
      },
      ThrowsMessage<InputError>(
          AllOf(HasSubstr("--spines: "), HasSubstr("no spines to choose from"))));
  EXPECT_THAT(
      [&] {
        with_fabric(2, "{kind: single switch}").with_routing({true, 0}, "--spines");
      },
      ThrowsMessage<InputError>(HasSubstr("no spines to choose from")));
}

TEST(Spines, HashGoesAroundAFailedUplink) {
  const Topology t = with_fabric(16, tree_text("spines: 2, routing: ecmp"));
  ClusterState state;
  state.link_speed[t.find_link("leaf0->spine1", "")] = 0;
  const Topology failed = t.in_state(state);
  for (std::size_t a = 0; a < 16; ++a) {
    for (std::size_t b = 0; b < 16; ++b) {
      if (a / 4 == b / 4) continue;
      // Only what left by it goes elsewhere.
      EXPECT_EQ(hops(failed, a, b)[1], a / 4 == 0 ? "spine0" : hops(t, a, b)[1]);
    }
  }
  state.link_speed[t.find_link("spine0->leaf2", "")] = 0;
  EXPECT_THAT([&] { t.in_state(state); },
              ThrowsMessage<InputError>(HasSubstr("cannot reach node8.gpu")));
  EXPECT_THAT(
      [&] {
        ClusterState one;
        one.link_speed[t.find_link("leaf0->spine0", "")] = 0;
        one.link_speed[t.find_link("leaf0->spine1", "")] = 0;
        t.in_state(one);
      },
      ThrowsMessage<InputError>(HasSubstr("cannot reach")));
}

TEST(Spines, AFailedSpineOfOneRailIsGoneAroundInsideANode) {
  const Topology t = load_topology("dgx-h100:40");
  ClusterState state;
  state.link_speed[t.find_link("unit0.rail0->spine", "")] = 0;
  const Topology failed = t.in_state(state);
  // To the other unit, whose rail 0 it no longer reaches from its own.
  for (const LinkId l : failed.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{39 * 8}}))
    EXPECT_GT(failed.link(l).bandwidth.count, 0) << failed.link_name(l);
}

Topology without(const Topology& t, const std::vector<std::string>& links) {
  ClusterState state;
  for (const std::string& name : links) state.link_speed[t.find_link(name, "--fail")] = 0;
  return t.in_state(state);
}

// docs/topologies.md, "Around failed links".
TEST(Around, ThePagesExamples) {
  const Topology torus = with_fabric(16, torus_text({4, 4}));
  using ::testing::ElementsAre;
  // Node 0 to 11 goes down over the end and then up: without its first hop, up first.
  EXPECT_THAT(hops(torus, 0, 11), ElementsAre("router0.0", "router3.0", "router3.1", "router3.2"));
  const Topology torn = without(torus, {"router0.0->router3.0"});
  EXPECT_THAT(hops(torn, 0, 11), ElementsAre("router0.0", "router0.1", "router3.1", "router3.2"));
  // Next door two hops more; the other direction of the cable still works.
  EXPECT_THAT(hops(torn, 0, 3), ElementsAre("router0.0", "router1.0", "router2.0", "router3.0"));
  EXPECT_THAT(hops(torn, 3, 0), ElementsAre("router3.0", "router0.0"));
  EXPECT_EQ(bisection(torn).count, bisection(torus).count);
  EXPECT_EQ(bisection(without(torus, {"router0.0->router0.3"})).count, 2 * 4 * 5e9 - 5e9);

  const Topology fly = with_fabric(40, kFly);
  // The only cable from group 0 to group 2 is gone: 4 hops over group 4, the first found.
  EXPECT_THAT(hops(fly, 0, 19),
              ElementsAre("group0.router0", "group0.router1", "group2.router2", "group2.router1"));
  const Topology cut = without(fly, {"group0.router1->group2.router2"});
  EXPECT_THAT(hops(cut, 0, 19), ElementsAre("group0.router0", "group0.router3", "group4.router0",
                                            "group4.router2", "group2.router1"));
  // A local cable: over the next router.
  EXPECT_THAT(hops(without(fly, {"group0.router0->group0.router3"}), 0, 6),
              ElementsAre("group0.router0", "group0.router1", "group0.router3"));
}

/// A torus or a dragonfly drawn at random, and how many nodes it has.
std::pair<std::size_t, std::string> random_fabric(std::mt19937& rng, bool& torus, bool& by_card) {
  torus = rng() % 2 == 0;
  by_card = torus && rng() % 3 == 0;
  if (torus) {
    std::vector<std::size_t> size;
    std::size_t nodes = 1;
    for (std::size_t d = 1 + rng() % 3; d > 0; --d) {
      size.push_back(1 + rng() % 4);
      nodes *= size.back();
    }
    if (nodes == 1) size[0] = nodes = 3;
    return {nodes, torus_text(size, by_card ? ", nics: direction" : "")};
  }
  const std::size_t groups = 2 + rng() % 4, routers = 1 + rng() % 4, below = 1 + rng() % 2;
  std::size_t ports = (groups - 1) * (1 + rng() % 3);
  while (ports % routers != 0) ports += groups - 1;
  return {groups * routers * below - rng() % below,
          fmt::format("{{kind: dragonfly, groups: {}, routers_per_group: {}, nodes_per_router: {}, "
                      "local_bandwidth: {} GB/s, local_latency: 0.3 us, global_links_per_router: "
                      "{}, global_bandwidth: 5 GB/s, global_latency: 1 us}}",
                      groups, routers, below, 3 + rng() % 5, ports / routers)};
}

TEST(Around, RoutesAreTheRulesWhereWholeElseTheShortestLeft) {
  std::mt19937 rng{20261128};
  int detours = 0, parted = 0, kinds[3] = {};
  for (int i = 0; i < 600; ++i) {
    bool torus = false, by_card = false;
    const auto [nodes, text] = random_fabric(rng, torus, by_card);
    const auto sides = std::count(text.begin(), text.end(), ',') - 3;  // of a torus by cards
    const std::size_t cards = by_card ? 2 * static_cast<std::size_t>(sides) : 1 + rng() % 2;
    const Topology t = with_fabric(nodes, text, cards);
    ClusterState state;
    for (std::size_t k = 1 + rng() % 6; k > 0; --k) {
      const LinkId l{rng() % t.link_count()};
      // Links inside nodes stay.
      if (t.link(l).kind == LinkKind::network) state.link_speed[l] = rng() % 5 == 0 ? 0.5 : 0;
    }
    SCOPED_TRACE(text);
    Topology failed = t;
    const auto whole = [&](std::size_t a, std::size_t b) {
      const auto links = t.route(DeviceId{a}, DeviceId{b});
      return std::none_of(links.begin(), links.end(), [&](LinkId l) {
        return state.link_speed.count(l) > 0 && state.link_speed[l] == 0;
      });
    };
    try {
      failed = t.in_state(state);
    } catch (const InputError& e) {
      EXPECT_THAT(e.what(), HasSubstr("cannot reach"));
      if (by_card) continue;
      // Nothing less than a pair without any way is refused.
      std::string rest = e.what();
      const auto at = rest.find("node", rest.find("without"));
      const auto node = [&](std::size_t from) { return std::stoul(rest.substr(from + 4)); };
      const std::size_t a = node(at), b = node(rest.find("node", at + 4));
      // in_state gives no topology to search: the links one by one.
      std::set<std::int32_t> seen{t.vertex_of(DeviceId{a})};
      for (bool more = true; more;) {
        more = false;
        for (std::size_t l = 0; l < t.link_count(); ++l) {
          const Link link = t.link(LinkId{l});
          const auto it = state.link_speed.find(LinkId{l});
          if (it != state.link_speed.end() && it->second == 0) continue;
          if (t.node_of_vertex(link.from) < nodes && t.node_of_vertex(link.from) != a) continue;
          more = (seen.count(link.from) > 0 && seen.insert(link.to).second) || more;
        }
      }
      EXPECT_EQ(seen.count(t.vertex_of(DeviceId{b})), 0u) << e.what();
      ++parted;
      continue;
    }
    ++kinds[by_card ? 2 : torus ? 1 : 0];
    const FlatGraph flat(failed);
    for (std::size_t a = 0; a < nodes; ++a) {
      for (std::size_t b = 0; b < nodes; ++b) {
        if (a == b) continue;
        const FlatPath got = walk(failed, DeviceId{a}, DeviceId{b});
        ASSERT_GT(got.bottleneck, 0) << route_text(failed, a, b);
        if (whole(a, b)) {
          ASSERT_EQ(route_text(failed, a, b), route_text(t, a, b));
          continue;
        }
        ++detours;
        const auto best = flat.best(DeviceId{a}, DeviceId{b});
        ASSERT_TRUE(best);
        ASSERT_GE(got.links, best->links);
        if (torus && !by_card) {
          ASSERT_EQ(got.links, best->links) << route_text(failed, a, b);
        }
        if (!torus) {
          // The fewest hops of one cable between the groups, else of any way.
          const auto names = hops(failed, a, b);
          std::set<std::string> groups;
          for (const std::string& n : names) groups.insert(n.substr(0, n.find('.')));
          if (groups.size() > 2 || (groups.size() == 1 && names.size() > 2)) {
            ASSERT_EQ(got.links, best->links) << route_text(failed, a, b);
          } else {
            ASSERT_LE(got.links, best->links + 1) << route_text(failed, a, b);
          }
        }
      }
    }
  }
  EXPECT_GT(detours, 3000);
  EXPECT_GT(parted, 20);
  for (const int k : kinds) EXPECT_GT(k, 40);
}

TEST(Around, ACardForEachDirectionStillSendsThatWayOnly) {
  const Topology t = with_fabric(16, torus_text({4, 4}, ", nics: direction"), 4);
  // Down is gone: up by card 0, or any other; what arrives comes in by the card that looks there.
  const Topology torn = without(t, {"router0.0->router3.0"});
  for (std::size_t b = 1; b < 16; ++b) {
    SCOPED_TRACE(route_text(torn, 0, b));
    const auto names = hops(torn, 0, b);
    const std::map<std::string, std::string> by{
        {"router1.0", "nic0"}, {"router0.1", "nic2"}, {"router0.3", "nic3"}};
    ASSERT_TRUE(by.count(names[1]) > 0);
    EXPECT_THAT(route_text(torn, 0, b), HasSubstr("gpu->node0." + by.at(names[1])));
  }
  // So is a card.
  EXPECT_THAT(hops(without(t, {"node0.nic1->router0.0"}), 0, 3),
              ::testing::ElementsAre("router0.0", "router1.0", "router2.0", "router3.0"));
}

TEST(Around, WhatPartsDevicesIsRefused) {
  const auto refusing = [](const Topology& t, const std::vector<std::string>& links) {
    return [=] { without(t, links); };
  };
  const Topology ring = with_fabric(5, torus_text({5}));
  EXPECT_NO_THROW(refusing(ring, {"router1->router2"})());
  EXPECT_THAT(refusing(ring, {"router1->router2", "router1->router0"}),
              ThrowsMessage<InputError>(
                  HasSubstr("links router1->router0, router1->router2: without them node1.gpu "
                            "cannot reach node0.gpu")));
  EXPECT_THAT(refusing(with_fabric(2, torus_text({2})), {"router1->router0"}),
              ThrowsMessage<InputError>(
                  HasSubstr("link router1->router0: without it node1.gpu cannot reach node0.gpu")));
  // Card 1 of a ring by directions sends down and nothing else leaves.
  const Topology cards = with_fabric(5, torus_text({5}, ", nics: direction"), 2);
  EXPECT_NO_THROW(refusing(cards, {"node2.nic0->router2"})());
  EXPECT_THAT(refusing(cards, {"node2.nic0->router2", "router2->router1"}),
              ThrowsMessage<InputError>(HasSubstr("node2.gpu cannot reach node0.gpu")));
  // A spare router forwards what its nodes do not send.
  const Topology fly = with_fabric(3,
                                   "{kind: dragonfly, groups: 1, routers_per_group: 4, "
                                   "nodes_per_router: 1, local_bandwidth: 10 GB/s, "
                                   "local_latency: 0.3 us}");
  EXPECT_THAT(
      hops(without(fly, {"group0.router0->group0.router1", "group0.router0->group0.router2"}), 0,
           1),
      ::testing::ElementsAre("group0.router0", "group0.router3", "group0.router1"));
}

/// Nodes of four GPUs on an NVSwitch, each with its card on a PCIe switch of its own.
Topology railed(const std::string& more, std::size_t nodes = 4,
                const std::string& inside = "nvlink") {
  return parse_topology(fmt::format(R"(schema: partita.topology/1
name: railed
source: test
nodes:
  - count: {}
    vertices:
      gpu[0-3]: {{kind: device, device: cpu}}
      nvswitch0: {{kind: nvswitch}}
      pcie[0-3]: {{kind: pcie switch}}
      cpu0: {{kind: cpu}}
      nic[0-3]: {{kind: nic, bandwidth: 50 GB/s, latency: 1 us}}
    links:
      - {{from: "gpu[0-3]", to: nvswitch0, kind: {}, bandwidth: 450 GB/s, latency: 1 us}}
      - {{from: "gpu[0-3]", to: "pcie[0-3]", kind: pcie, bandwidth: 60 GB/s, latency: 1 us}}
      - {{from: "nic[0-3]", to: "pcie[0-3]", kind: pcie, bandwidth: 60 GB/s, latency: 1 us}}
      - {{from: "pcie[0-3]", to: cpu0, kind: pcie, bandwidth: 60 GB/s, latency: 1 us}}
fabric: {{kind: rails, nodes_per_leaf: 2{}}}
)",
                                    nodes, inside, more),
                        "railed.yaml");
}

// docs/topologies.md, "The rule for the route".
TEST(Pxn, GoesOverNvlinkToTheGpuOnTheOtherRail) {
  const Topology with = railed(", uplink_latency: 1 us, pxn: true"),
                 without = railed(", uplink_latency: 1 us");
  EXPECT_EQ(route_text(without, 0, 5),
            "node0.gpu0->node0.pcie0 node0.pcie0->node0.nic0 node0.nic0->unit0.rail0 "
            "unit0.rail0->spine spine->unit0.rail1 unit0.rail1->node1.nic1 "
            "node1.nic1->node1.pcie1 node1.pcie1->node1.gpu1");
  EXPECT_EQ(route_text(with, 0, 5),
            "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu1 node0.gpu1->node0.pcie1 "
            "node0.pcie1->node0.nic1 node0.nic1->unit0.rail1 unit0.rail1->node1.nic1 "
            "node1.nic1->node1.pcie1 node1.pcie1->node1.gpu1");
  // On its own rail nothing changes, nor inside a node.
  EXPECT_EQ(route_text(with, 0, 4), route_text(without, 0, 4));
  EXPECT_EQ(route_text(with, 0, 1), route_text(without, 0, 1));
  // To another unit it crosses the spine on the destination's rail.
  EXPECT_THAT(route_text(with, 0, 13),
              HasSubstr("unit0.rail1->spine spine->unit1.rail1 unit1.rail1->node3.nic1"));
  // Never through another node, and only the sender's GPU forwards.
  for (std::size_t a = 0; a < 16; ++a) {
    for (std::size_t b = 0; b < 16; ++b) {
      walk(with, DeviceId{a}, DeviceId{b});
      std::vector<std::size_t> forwards;
      for (const LinkId l : with.route(DeviceId{a}, DeviceId{b})) {
        const std::int32_t to = with.link(l).to;
        if (with.vertex_kind(to) == VertexKind::device && to != with.vertex_of(DeviceId{b}))
          forwards.push_back(with.node_of_vertex(to));
      }
      const bool changes = a / 4 != b / 4 && a % 4 != b % 4;
      EXPECT_EQ(forwards.size(), changes ? 1u : 0u);
      for (const std::size_t node : forwards) EXPECT_EQ(node, a / 4);
    }
  }
}

TEST(Pxn, NeedsNvlinkAndACardWithoutAProcessorBetween) {
  // Without spines it is the sender that forwards, not the receiver.
  const Topology t = railed(", spine: false, pxn: true", 2);
  EXPECT_THAT(route_text(t, 0, 5), HasSubstr("node0.gpu1->node0.pcie1 node0.pcie1->node0.nic1"));
  EXPECT_THAT(route_text(railed(", spine: false", 2), 0, 5),
              HasSubstr("node1.nvswitch0->node1.gpu1"));
  // A card that both reach over one PCIe switch needs no help.
  const Topology a100 = load_topology("dgx-a100-80gb:2");
  EXPECT_THAT(route_text(a100, 0, 9), ::testing::Not(HasSubstr("nvswitch")));
  // Joined by something else, nobody helps.
  EXPECT_EQ(route_text(railed(", uplink_latency: 1 us, pxn: true", 4, "other"), 0, 5),
            route_text(railed(", uplink_latency: 1 us"), 0, 5));
  // A failed card of the relay: back to the spine.
  const Topology with = railed(", uplink_latency: 1 us, pxn: true");
  ClusterState state;
  state.link_speed[with.find_link("node0.nic1->unit0.rail1", "")] = 0;
  EXPECT_EQ(route_text(with.in_state(state), 0, 5),
            route_text(railed(", uplink_latency: 1 us"), 0, 5));
}

/// A rack of `trays` trays of four GPUs to an NVLink domain.
Topology racks(std::size_t trays, std::size_t nodes) {
  return parse_topology(fmt::format(R"(schema: partita.topology/1
name: racks
source: test
nodes:
  - count: {}
    vertices:
      gpu[0-3]: {{kind: device, device: gb200}}
      cpu[0-1]: {{kind: cpu}}
      nic[0-3]: {{kind: nic, bandwidth: 50 GB/s, latency: 1 us}}
    links:
      - {{from: "gpu[0-3]", to: "cpu[0-1]", kind: c2c, bandwidth: 225 GB/s, latency: 1 us}}
      - {{from: "nic[0-3]", to: "cpu[0-1]", kind: pcie, bandwidth: 63 GB/s, latency: 1 us}}
    domain: {{nodes: {}, kind: nvlink, ports: "gpu[0-3]", bandwidth: 900 GB/s, latency: 1 us}}
fabric: {{kind: single switch}}
)",
                                    nodes, trays),
                        "racks.yaml");
}

TEST(Domain, OfEightThirtySixAndSeventyTwoJoinsItsOwnAndNoMore) {
  for (const std::size_t trays : {2u, 9u, 18u}) {
    for (const std::size_t nodes : {trays - 1, trays, trays + 1, 2 * trays + trays / 2}) {
      SCOPED_TRACE(fmt::format("{} of {} trays", nodes, trays));
      const Topology t = racks(trays, nodes);
      for (std::size_t a = 0; a < t.device_count(); ++a) {
        for (std::size_t b = a % 3; b < t.device_count(); b += 7) {
          if (a == b) continue;
          const bool one = a / 4 / trays == b / 4 / trays;
          EXPECT_EQ(t.domain_of(a / 4) == t.domain_of(b / 4), one);
          const FlatPath p = walk(t, DeviceId{a}, DeviceId{b});
          // Two NVLinks, or C2C, PCIe and the card, twice.
          EXPECT_EQ(p.links, one ? 2u : 6u);
          EXPECT_EQ(p.bottleneck, one ? 900e9 : 50e9);
        }
      }
      // What crosses the middle: NVLink where a domain does, else cards.
      EXPECT_GE(bisection(t).count, 4 * static_cast<double>(nodes / 2) * 50e9);
    }
  }
}

TEST(Fabric, ImpossibleFiguresSayWhatIsWrong) {
  const auto making = [](std::size_t nodes, const std::string& text, std::size_t nics = 1) {
    return [=] { with_fabric(nodes, text, nics); };
  };
  EXPECT_THAT(making(15, torus_text({4, 4})),
              ThrowsMessage<InputError>(AllOf(HasSubstr("small.yaml:11: fabric.size"),
                                              HasSubstr("4 x 4 has 16 nodes, 15 are described"))));
  EXPECT_THAT(making(17, torus_text({4, 4})), ThrowsMessage<InputError>(HasSubstr("17 are")));
  EXPECT_THAT(making(1, torus_text({})), ThrowsMessage<InputError>(HasSubstr("1 to 8 dimensions")));
  EXPECT_THAT(making(1, torus_text({1, 1, 1, 1, 1, 1, 1, 1, 1})),
              ThrowsMessage<InputError>(HasSubstr("9 are given")));
  EXPECT_NO_THROW(making(1, torus_text({1, 1, 1, 1, 1, 1, 1, 1}))());
  EXPECT_THAT(making(1, torus_text({0})), ThrowsMessage<InputError>(HasSubstr("fabric.size[0]")));
  EXPECT_THAT(making(1, torus_text({1000, 1001})),
              ThrowsMessage<InputError>(HasSubstr("a torus of 1000 x 1001 has more")));
  EXPECT_THAT(making(16, torus_text({4, 4}, ", nics: direction"), 3),
              ThrowsMessage<InputError>(HasSubstr("needs 4 NICs on a node")));
  EXPECT_THAT(making(16, torus_text({4, 4}, ", nics: both")),
              ThrowsMessage<InputError>(HasSubstr("unknown kind 'both'; use one of router, dir")));
  EXPECT_THAT(making(41, kFly),
              ThrowsMessage<InputError>(HasSubstr("have room for 40 nodes; 41 are described")));
  EXPECT_NO_THROW(making(39, kFly)());
  std::string bad = kFly;
  bad.replace(bad.find("groups: 5"), 9, "groups: 6");
  EXPECT_THAT(making(40, bad),
              ThrowsMessage<InputError>(AllOf(HasSubstr("fabric.global_links_per_router"),
                                              HasSubstr("have 4 for 5 other groups"))));
  EXPECT_THAT(making(40, "{kind: dragonfly, groups: 5, routers_per_group: 4}"),
              ThrowsMessage<InputError>(HasSubstr("nodes_per_router")));
  EXPECT_THAT(making(16, tree_text("routing: ecmp")),
              ThrowsMessage<InputError>(
                  AllOf(HasSubstr("fabric.routing"), HasSubstr("add spines: 2 or more"))));
  EXPECT_THAT(making(16, tree_text("spines: 4, seed: 1")),
              ThrowsMessage<InputError>(HasSubstr("a seed is of routing: ecmp")));
  EXPECT_THAT(making(16, tree_text("spines: 0")), ThrowsMessage<InputError>(HasSubstr("spines")));
  EXPECT_THAT(making(16, tree_text("spines: 2, routing: adaptive")),
              ThrowsMessage<InputError>(HasSubstr("use one of spray, ecmp")));
  EXPECT_THAT(making(16, "{kind: single switch, pxn: true}"),
              ThrowsMessage<InputError>(HasSubstr("pxn")));
}

}  // namespace
}  // namespace partita
