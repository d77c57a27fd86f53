#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>

#include "base/error.h"
#include "tests/topologies/flat_graph.h"
#include "topologies/topology.h"

namespace partita {
namespace {

/// The engine's own bits: the distributions of <random> differ between standard libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(engine_() % n); }
  bool chance(std::size_t percent) { return below(100) < percent; }
  std::string rate() { return fmt::format("{} GB/s", 10 << below(4)); }
  std::string latency() { return fmt::format("{} us", 1 + below(5)); }

 private:
  std::mt19937_64 engine_;
};

std::string random_group(Random& random, bool domains) {
  const std::size_t devices = 1 + random.below(5);
  const std::size_t switches = 1 + random.below(4);
  const std::size_t nics = 1 + random.below(3);
  std::string text = fmt::format("  - count: {}\n    vertices:\n", 1 + random.below(7));
  text += fmt::format("      g[0-{}]: {{kind: device, device: cpu}}\n", devices - 1);
  text += fmt::format("      s[0-{}]: {{kind: pcie switch}}\n", switches - 1);
  for (std::size_t n = 0; n < nics; ++n)
    text += fmt::format("      n{}: {{kind: nic, bandwidth: {}, latency: {}}}\n", n, random.rate(),
                        random.latency());
  text += "    links:\n";
  const auto link = [&](const std::string& a, const std::string& b) {
    if (a != b)
      text += fmt::format("      - {{from: {}, to: {}, kind: pcie, bandwidth: {}, latency: {}}}\n",
                          a, b, random.rate(), random.latency());
  };
  const auto any = [&] {
    const std::size_t v = random.below(devices + switches + nics);
    return v < devices              ? fmt::format("g{}", v)
           : v < devices + switches ? fmt::format("s{}", v - devices)
                                    : fmt::format("n{}", v - devices - switches);
  };
  for (std::size_t s = 1; s < switches; ++s)
    link(fmt::format("s{}", s), fmt::format("s{}", random.below(s)));
  for (std::size_t d = 0; d < devices; ++d)
    link(fmt::format("g{}", d), fmt::format("s{}", random.below(switches)));
  for (std::size_t n = 0; n < nics; ++n)
    if (!random.chance(15)) link(fmt::format("n{}", n), fmt::format("s{}", random.below(switches)));
  link("g0", "n0");
  for (std::size_t extra = random.below(5); extra > 0; --extra) link(any(), any());
  if (domains && random.chance(50))
    text += fmt::format(
        "    domain: {{nodes: {}, kind: nvlink, ports: 'g[0-{}]', bandwidth: {}, "
        "latency: {}}}\n",
        1 + random.below(4), random.below(devices), random.rate(), random.latency());
  return text;
}

std::string random_cluster(Random& random, std::size_t groups, bool domains) {
  std::string text = "schema: partita.topology/1\nname: random\nsource: drawn\nnodes:\n";
  for (std::size_t g = 0; g < groups; ++g) text += random_group(random, domains);
  switch (random.below(3)) {
    case 0:
      return text + "fabric: {kind: single switch}\n";
    case 1:
      return text + fmt::format(
                        "fabric: {{kind: rails, nodes_per_leaf: {}, oversubscription: {}, "
                        "uplink_latency: 1 us}}\n",
                        1 + random.below(5), 1 + random.below(8));
    default:
      return text + fmt::format(
                        "fabric: {{kind: fat tree, nodes_per_leaf: {}, oversubscription: "
                        "{}, uplink_latency: 1 us}}\n",
                        1 + random.below(5), 1 + random.below(8));
  }
}

template <class Best>
void expect_all_routes(const Topology& topology, bool between_nodes_only, Best best) {
  for (std::size_t a = 0; a < topology.device_count(); ++a) {
    for (std::size_t b = 0; b < topology.device_count(); ++b) {
      const DeviceId from{a};
      const DeviceId to{b};
      if (between_nodes_only && topology.node_of(from) == topology.node_of(to)) continue;
      const FlatPath got = walk(topology, from, to);
      const std::optional<FlatPath> want = best(from, to);
      ASSERT_TRUE(want);
      ASSERT_EQ(got.links, want->links) << route_text(topology, a, b);
      ASSERT_EQ(got.bottleneck, want->bottleneck) << route_text(topology, a, b);
    }
  }
}

TEST(Route, ComposedEqualsTheSearchOfTheExpandedGraph) {
  Random random(20261123);
  for (int i = 0; i < 300; ++i) {
    const std::string text = random_cluster(random, 1 + random.below(3), true);
    SCOPED_TRACE(text);
    const Topology topology = parse_topology(text, "random.yaml");
    const FlatGraph flat(topology);
    expect_all_routes(topology, false, [&](DeviceId a, DeviceId b) { return flat.best(a, b); });
    if (HasFatalFailure()) return;
  }
}

// Without domains and with equal nodes, a third node would never help: the rule costs nothing.
TEST(Route, OfEqualNodesEqualsTheSearchWithEveryNodeAllowed) {
  Random random(7);
  for (int i = 0; i < 150; ++i) {
    const std::string text = random_cluster(random, 1, false);
    SCOPED_TRACE(text);
    const Topology topology = parse_topology(text, "random.yaml");
    const FlatGraph flat(topology);
    expect_all_routes(topology, true, [&](DeviceId a, DeviceId b) {
      return flat.best(a, b, [](std::int32_t) { return true; });
    });
    if (HasFatalFailure()) return;
  }
}

std::string with_pxn(std::string text) {
  const auto at = text.find("{kind: rails,");
  return at == std::string::npos ? text : text.insert(at + 13, " pxn: true,");
}

// Counting equal nodes together is counting pair by pair.
TEST(Route, AllPairsAreWhatEnumerationGives) {
  Random random(20261127);
  int large = 0;
  for (int i = 0; i < 300; ++i) {
    std::string text = random_cluster(random, 1 + random.below(3), true);
    if (random.chance(50)) text = with_pxn(text);
    SCOPED_TRACE(text);
    Topology topology = parse_topology(text, "random.yaml");
    ClusterState state;
    if (random.chance(30)) {
      state.link_speed[LinkId{random.below(topology.link_count())}] = 0.5;
      state.link_speed[LinkId{random.below(topology.link_count())}] = random.chance(70) ? 0 : 0.25;
      if (random.chance(50)) {
        for (std::size_t d = topology.device_count(); d-- > 0;)
          state.placement.push_back(static_cast<std::int32_t>(d));
      }
      try {
        topology = topology.in_state(state);
      } catch (const InputError&) {
        continue;  // cut off
      }
    }
    std::vector<DeviceId> devices;
    const std::size_t keep = 20 + random.below(90);
    for (std::size_t d = 0; d < topology.device_count(); ++d) {
      if (random.chance(keep)) devices.emplace_back(d);
    }
    for (std::size_t d = devices.size(); d-- > 1;) std::swap(devices[d], devices[random.below(d)]);
    std::map<LinkId, std::int64_t> count;
    double latency = 0;
    for (const DeviceId a : devices) {
      for (const DeviceId b : devices) {
        double sum = 0;
        for (const LinkId l : topology.route(a, b)) {
          ++count[l];
          sum += topology.link(l).latency.count;
        }
        latency = std::max(latency, sum);
      }
    }
    const auto got = topology.all_pairs(devices);
    ASSERT_EQ(got.links,
              (std::vector<std::pair<LinkId, std::int64_t>>(count.begin(), count.end())));
    ASSERT_EQ(got.latency.count, latency);
    large += devices.size() > 20;
  }
  EXPECT_GT(large, 60);
}

TEST(Route, AllPairsOfCatalogueClustersAreWhatEnumerationGives) {
  for (const char* name : {"dgx-h100:40", "dgx-a100-80gb:23", "gb200-nvl72:40", "a100-pcie-8:5",
                           "dgx1-v100:3", "dgx-h100:12 gpus"}) {
    SCOPED_TRACE(name);
    const Topology topology = load_topology(name);
    std::vector<DeviceId> devices;
    for (std::size_t d = 0; d < topology.used_devices(); d += 1 + d % 3) devices.emplace_back(d);
    std::map<LinkId, std::int64_t> count;
    for (const DeviceId a : devices) {
      for (const DeviceId b : devices) {
        for (const LinkId l : topology.route(a, b)) ++count[l];
      }
    }
    EXPECT_EQ(topology.all_pairs(devices).links,
              (std::vector<std::pair<LinkId, std::int64_t>>(count.begin(), count.end())));
  }
}

TEST(Route, EveryLinkHasAnOppositeOfEqualRate) {
  Random random(3);
  for (int i = 0; i < 30; ++i) {
    const Topology topology = parse_topology(random_cluster(random, 2, true), "random.yaml");
    for (std::size_t l = 0; l < topology.link_count(); ++l) {
      const Link link = topology.link(LinkId{l});
      const Link other = topology.link(LinkId{l ^ 1});
      EXPECT_EQ(link.from, other.to);
      EXPECT_EQ(link.to, other.from);
      EXPECT_EQ(link.bandwidth, other.bandwidth);
    }
  }
}

TEST(Route, RenamingVerticesChangesNothing) {
  Random random(11);
  for (int i = 0; i < 50; ++i) {
    const std::string text = random_cluster(random, 2, true);
    std::string renamed = text;
    // Only the stems g, s and n before a digit or a range are names.
    for (std::size_t at = 1; at + 1 < renamed.size(); ++at) {
      const bool stem = (renamed[at + 1] == '[' || std::isdigit(renamed[at + 1])) &&
                        (renamed[at - 1] == ' ' || renamed[at - 1] == '\'');
      if (!stem) continue;
      if (renamed[at] == 'g') renamed[at] = 'z';
      if (renamed[at] == 's') renamed[at] = 'b';
      if (renamed[at] == 'n') renamed[at] = 'a';
    }
    ASSERT_NE(text, renamed);
    const Topology before = parse_topology(text, "random.yaml");
    const Topology after = parse_topology(renamed, "random.yaml");
    ASSERT_EQ(before.device_count(), after.device_count());
    for (std::size_t a = 0; a < before.device_count(); ++a)
      for (std::size_t b = 0; b < before.device_count(); ++b)
        EXPECT_EQ(before.route(DeviceId{a}, DeviceId{b}), after.route(DeviceId{a}, DeviceId{b}));
  }
}

constexpr const char* kPrefix = R"(schema: partita.topology/1
name: small
source: test
nodes:
  - count: 4
    vertices:
      gpu[0-1]: {kind: device, device: cpu}
      nic[0-1]: {kind: nic, bandwidth: 10 GB/s, latency: 1 us}
    links:
      - {from: "gpu[0-1]", to: "nic[0-1]", kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
      - {from: gpu0, to: gpu1, kind: nvlink, bandwidth: 100 GB/s, latency: 1 us}
)";

TEST(Route, RailsWithoutSpinesCrossInsideANode) {
  const Topology topology =
      parse_topology(std::string(kPrefix) + "fabric: {kind: rails, spine: false}\n", "t.yaml");
  // By NVLink here or there, five links each; the sender takes its own NIC.
  EXPECT_EQ(route_text(topology, 0, 3),
            "node0.gpu0->node0.nic0 node0.nic0->rail0 rail0->node1.nic0 node1.nic0->node1.gpu0 "
            "node1.gpu0->node1.gpu1");
}

TEST(Route, OversubscriptionNarrowsTheUplinks) {
  const std::string fabric =
      "fabric: {kind: fat tree, nodes_per_leaf: 2, oversubscription: 4, uplink_latency: 2 us}\n";
  const Topology topology = parse_topology(kPrefix + fabric, "t.yaml");
  EXPECT_EQ(route_text(topology, 0, 7),
            "node0.gpu0->node0.nic0 node0.nic0->leaf0 leaf0->spine spine->leaf1 "
            "leaf1->node3.nic1 node3.nic1->node3.gpu1");
  const auto route = topology.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{7}});
  // Two nodes of two NICs of 10 GB/s below each leaf, over 4.
  EXPECT_EQ(topology.link(route[2]).bandwidth, 10.0_GBps);
  EXPECT_EQ(topology.link(route[2]).latency, 2.0_us);
}

TEST(Route, InsideANodeTheFabricIsTheLastResort) {
  // Six links inside, four over the switch.
  const Topology topology = parse_topology(R"(schema: partita.topology/1
name: deep
source: test
nodes:
  - vertices:
      gpu[0-1]: {kind: device, device: cpu}
      s[0-4]: {kind: pcie switch}
      nic[0-1]: {kind: nic, bandwidth: 10 GB/s, latency: 1 us}
    links:
      - {from: gpu0, to: s0, kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
      - {from: "s[0-3]", to: "s[1-4]", kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
      - {from: s4, to: gpu1, kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
      - {from: "gpu[0-1]", to: "nic[0-1]", kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
fabric: {kind: single switch}
)",
                                           "deep.yaml");
  EXPECT_EQ(topology.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{1}}).size(), 6u);
}

TEST(Route, OfEqualPathsTheLowerLatencyWins) {
  const Topology topology = parse_topology(R"(schema: partita.topology/1
name: two-ways
source: test
nodes:
  - vertices:
      gpu[0-1]: {kind: device, device: cpu}
      s[0-1]: {kind: pcie switch}
    links:
      - {from: "gpu[0-1]", to: s0, kind: pcie, bandwidth: 20 GB/s, latency: 2 us}
      - {from: "gpu[0-1]", to: s1, kind: pcie, bandwidth: 20 GB/s, latency: 1 us}
)",
                                           "two-ways.yaml");
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.s1 node0.s1->node0.gpu1");
}

TEST(Route, ToTheHostLeadsThroughSwitches) {
  const auto text = [](const Topology& t, int device, bool up) {
    std::string all;
    for (const LinkId l : t.host_route(DeviceId{static_cast<std::size_t>(device)}, up))
      all += (all.empty() ? "" : " ") + t.link_name(l);
    return all;
  };
  const Topology dgx = load_topology("dgx-a100-80gb:2");
  EXPECT_EQ(text(dgx, 1, true), "node0.gpu1->node0.pcie0 node0.pcie0->node0.cpu0");
  EXPECT_EQ(text(dgx, 15, false), "node1.cpu1->node1.pcie3 node1.pcie3->node1.gpu7");
  EXPECT_EQ(text(load_topology("gb200-nvl72:1"), 0, true).find("pcie"), std::string::npos);
  // No processor behind it: what there is. No such link: nothing.
  const Topology lone = parse_topology(R"(schema: partita.topology/1
name: lone
source: test
nodes:
  - vertices:
      gpu[0-1]: {kind: device, device: cpu}
      s0: {kind: pcie switch}
    links:
      - {from: "gpu[0-1]", to: s0, kind: pcie, bandwidth: 20 GB/s, latency: 2 us}
)",
                                       "lone.yaml");
  EXPECT_EQ(text(lone, 1, true), "node0.gpu1->node0.s0");
  EXPECT_EQ(text(lone, 1, false), "node0.s0->node0.gpu1");
}

TEST(Route, AnExplicitUplinkWins) {
  const std::string fabric =
      "fabric: {kind: fat tree, nodes_per_leaf: 1, uplink: 3 GB/s, uplink_latency: 2 us}\n";
  const Topology topology = parse_topology(kPrefix + fabric, "t.yaml");
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{7}}).bottleneck, 3e9);
}

}  // namespace
}  // namespace partita
