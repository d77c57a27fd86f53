// Clusters in another state than their files say, and what their halves can tell each other.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <optional>
#include <queue>
#include <random>
#include <set>

#include "base/error.h"
#include "topologies/bisection.h"
#include "topologies/topology.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Edmonds-Karp on the whole cluster.
double max_flow(const Topology& t) {
  const int n = static_cast<int>(t.vertex_count()) + 2, source = n - 2, sink = n - 1;
  std::map<std::pair<int, int>, std::int64_t> room;
  std::vector<std::vector<int>> next(static_cast<std::size_t>(n));
  const auto add = [&](int a, int b, std::int64_t rate) {
    if (room.emplace(std::pair{a, b}, 0).second) next[static_cast<std::size_t>(a)].push_back(b);
    if (room.emplace(std::pair{b, a}, 0).second) next[static_cast<std::size_t>(b)].push_back(a);
    room[{a, b}] += rate;
  };
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const Link link = t.link(LinkId{l});
    add(link.from, link.to, std::llround(link.bandwidth.count));
  }
  for (std::size_t d = 0; d < t.device_count(); ++d) {
    const int v = t.vertex_of(DeviceId{d});
    if (d < t.device_count() / 2)
      add(source, v, std::int64_t{1} << 60);
    else
      add(v, sink, std::int64_t{1} << 60);
  }
  std::int64_t flow = 0;
  for (;;) {
    std::vector<int> from(static_cast<std::size_t>(n), -1);
    std::queue<int> queue;
    queue.push(source);
    from[static_cast<std::size_t>(source)] = source;
    while (!queue.empty() && from[static_cast<std::size_t>(sink)] < 0) {
      const int a = queue.front();
      queue.pop();
      for (const int b : next[static_cast<std::size_t>(a)]) {
        if (from[static_cast<std::size_t>(b)] >= 0 || room[{a, b}] <= 0) continue;
        from[static_cast<std::size_t>(b)] = a;
        queue.push(b);
      }
    }
    if (from[static_cast<std::size_t>(sink)] < 0) break;
    std::int64_t least = std::int64_t{1} << 60;
    for (int b = sink; b != source; b = from[static_cast<std::size_t>(b)])
      least = std::min(least, room[{from[static_cast<std::size_t>(b)], b}]);
    for (int b = sink; b != source; b = from[static_cast<std::size_t>(b)]) {
      room[{from[static_cast<std::size_t>(b)], b}] -= least;
      room[{b, from[static_cast<std::size_t>(b)]}] += least;
    }
    flow += least;
  }
  return static_cast<double>(flow);
}

TEST(Bisection, IsTheMaximumFlowOfTheWholeCluster) {
  for (const char* name :
       {"dgx-h100", "dgx-h100:3", "dgx-a100-40gb:2", "a100-pcie-8:2", "dgx1-v100:2",
        "gb200-nvl72:4", "gb200-nvl72:20", "cpu-host", "dgx-h100:34"}) {
    SCOPED_TRACE(name);
    const Topology t = load_topology(name);
    EXPECT_EQ(bisection(t).count, max_flow(t));
  }
}

TEST(Bisection, OfTwoDgxH100IsTheirCards) {
  // Eight cards of 50 GB/s; an NVSwitch brings every card within reach of every GPU.
  EXPECT_EQ(bisection(load_topology("dgx-h100:2")).count, 400e9);
  EXPECT_EQ(bisection(load_topology("dgx-h100:1 gpus")).count,
            bisection(load_topology("dgx-h100")).count);
}

TEST(ClusterState, FailedCardsAreGoneAround) {
  const Topology t = load_topology("dgx-h100:2");
  ClusterState state;
  state.link_speed[t.find_link("node0.nic0->rail0", "--fail")] = 0;
  const Topology failed = t.in_state(state);
  bool uses = false;
  for (const LinkId l : t.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{8}}))
    uses = uses || t.link_name(l) == "node0.nic0->rail0";
  EXPECT_TRUE(uses);
  for (const LinkId l : failed.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{8}}))
    EXPECT_GT(failed.link(l).bandwidth.count, 0) << failed.link_name(l);
  // So is one that receives no more.
  state.link_speed = {{t.find_link("rail0->node1.nic0", "--fail"), 0}};
  for (const LinkId l : t.in_state(state).route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{8}}))
    EXPECT_NE(t.link_name(l), "rail0->node1.nic0");
  // The way back still has it.
  EXPECT_EQ(bisection(failed).count, 350e9);
}

// Links inside nodes: their own nodes' routes avoid them, others' are as ever, and a later state
// has them again.
TEST(ClusterState, FailedLinksInsideNodesAreGoneAround) {
  std::mt19937 rng{20261127};
  for (const char* name : {"dgx1-v100:3", "dgx-h100:3"}) {
    const Topology t = load_topology(name);
    int around = 0, cut_off = 0;
    for (int k = 0; k < 60; ++k) {
      ClusterState state;
      std::set<std::size_t> nodes;
      const std::size_t per_node = t.links_of(DeviceId{std::size_t{0}}).size();
      for (std::size_t f = 0; f < 1 + rng() % 3; ++f) {
        const auto links = t.links_of(DeviceId{rng() % t.device_count()});
        const LinkId l = links[rng() % std::min(per_node, links.size())];
        state.link_speed[l] = 0;
        nodes.insert(t.node_of_link(l));
      }
      std::optional<Topology> failed;
      try {
        failed = t.in_state(state);
      } catch (const InputError& e) {
        EXPECT_THAT(e.what(), HasSubstr("cannot reach"));
        ++cut_off;
        continue;
      }
      ++around;
      for (std::size_t a = 0; a < t.device_count(); ++a) {
        for (std::size_t b = 0; b < t.device_count(); ++b) {
          const auto way = failed->route(DeviceId{a}, DeviceId{b});
          const bool touched =
              nodes.count(t.node_of(DeviceId{a})) > 0 || nodes.count(t.node_of(DeviceId{b})) > 0;
          if (!touched) {
            EXPECT_EQ(way, t.route(DeviceId{a}, DeviceId{b}));
          }
          std::int32_t at = failed->vertex_of(DeviceId{a});
          for (const LinkId l : way) {
            EXPECT_EQ(failed->link(l).from, at);
            at = failed->link(l).to;
            EXPECT_GT(failed->link(l).bandwidth.count, 0) << failed->link_name(l);
          }
          EXPECT_EQ(at, failed->vertex_of(DeviceId{b}));
        }
      }
      for (std::size_t l = 0; l < t.link_count(); ++l)
        EXPECT_EQ(failed->link_name(LinkId{l}), t.link_name(LinkId{l}));
      const Topology whole = failed->in_state({});
      for (std::size_t b = 0; b < t.device_count(); ++b) {
        EXPECT_EQ(whole.route(DeviceId{std::size_t{0}}, DeviceId{b}),
                  t.route(DeviceId{std::size_t{0}}, DeviceId{b}));
      }
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_GT(around, 10) << name << ", cut off " << cut_off;
  }
}

TEST(ClusterState, NamesWhatDoesNotExist) {
  const Topology t = load_topology("dgx-h100:2");
  EXPECT_THAT([&] { t.find_device("node2.gpu0", "--slow"); },
              ThrowsMessage<InputError>(HasSubstr("they are node0.gpu0 to node1.gpu7")));
  EXPECT_THAT([&] { t.find_link("node0.nic0->rail3", "--fail"); },
              ThrowsMessage<InputError>(
                  HasSubstr("from there: node0.nic0->node0.pcie0, node0.nic0->rail0")));
  ClusterState twice;
  twice.placement = {0, 0};
  EXPECT_THAT([&] { t.in_state(twice); },
              ThrowsMessage<InputError>(HasSubstr("rank 1 is placed on device 0")));
}

TEST(ClusterState, ALinkWithoutAWayAroundIsRefused) {
  const Topology t = load_topology("cpu-host:2");
  std::string card;
  for (const LinkId l : t.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{8}})) {
    if (t.link(l).kind == LinkKind::network && card.empty()) card = t.link_name(l);
  }
  ClusterState state;
  state.link_speed[t.find_link(card, "--fail")] = 0;
  EXPECT_THAT(
      [&] { t.in_state(state); },
      ThrowsMessage<InputError>(HasSubstr("without it node0.cpu0 cannot reach node1.cpu0")));
}

TEST(ClusterState, PlacedRanksKeepTheirRoutes) {
  const Topology t = load_topology("dgx-h100:2");
  ClusterState state;
  for (int r = 0; r < 16; ++r) state.placement.push_back(r / 2 + 8 * (r % 2));
  const Topology placed = t.in_state(state);
  for (std::size_t a = 0; a < 16; ++a) {
    EXPECT_EQ(placed.device_name(DeviceId{a}),
              t.device_name(DeviceId{static_cast<std::size_t>(state.placement[a])}));
    for (std::size_t b = 0; b < 16; ++b) {
      EXPECT_EQ(placed.route(DeviceId{a}, DeviceId{b}),
                t.route(DeviceId{static_cast<std::size_t>(state.placement[a])},
                        DeviceId{static_cast<std::size_t>(state.placement[b])}));
    }
  }
}

}  // namespace
}  // namespace partita
