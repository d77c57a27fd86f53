// Collectives by algorithm: closed form against the flow network, cuts, sharing, the page's
// examples.
#include "simulator/engine/collectives.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <set>

#include "base/error.h"
#include "simulator/cost/closed_form.h"
#include "simulator/engine/flows.h"
#include "tests/simulator/random_collective.h"
#include "tests/simulator/traffic.h"

namespace partita {
namespace {

std::string label(const AlgorithmRow& row) {
  return std::string(name(row.kind)) + " by " + std::string(name(row.algorithm));
}

NetworkTraffic on_ports(const AlgorithmRow& row, Bytes payload,
                        const std::vector<PortLevel>& levels) {
  std::vector<std::int32_t> members;
  std::vector<double> rate;
  std::vector<Ticks> hop;
  std::int32_t n = 1;
  for (const PortLevel& l : levels) {
    members.push_back(l.members), rate.push_back(l.rate.count);
    hop.push_back(Ticks{l.latency.count / 2});
    n *= l.members;
  }
  const Rhythm r = rhythm(row.kind, row.algorithm, n,
                          levelled(row.algorithm) ? members : std::vector<std::int32_t>{});
  return on_switches(r, EvenCut(row.kind, r, payload), members, rate, hop);
}

const std::vector<PortLevel>& level_shapes(std::size_t k) {
  const auto level = [](std::int32_t members, std::int64_t latency, double rate) {
    return PortLevel{members, Ticks{latency}, BytesPerSecond{rate}};
  };
  static const std::vector<std::vector<PortLevel>> shapes{
      {level(4, 1'000'000, 450e9), level(2, 2'200'000, 50e9)},
      {level(8, 1'000'000, 450e9), level(4, 2'200'000, 50e9)},
      {level(8, 1'000'000, 300e9), level(3, 2'200'000, 12.3e9)},
      {level(1, 1'000'000, 300e9), level(6, 2'200'000, 25e9)},
      {level(6, 1'000'000, 300e9), level(1, 2'200'000, 25e9)},
      {level(2, 600'000, 300e9), level(3, 1'000'000, 70e9), level(4, 3'000'000, 12.5e9)},
      {level(4, 600'000, 300e9), level(2, 1'000'000, 70e9), level(2, 3'000'000, 12.5e9)}};
  return shapes.at(k);
}
constexpr std::size_t kShapes = 7;

TEST(Collectives, TheFlowNetworkTakesTheClosedForm) {
  std::vector<std::vector<PortLevel>> networks;
  for (const std::int32_t n : {1, 2, 3, 4, 5, 8, 12, 16, 64})
    networks.push_back({{n, Ticks{1'000'000}, BytesPerSecond{450e9}}});
  networks.push_back({{8, Ticks{700'002}, BytesPerSecond{23.7e9}}});
  for (std::size_t k = 0; k < kShapes; ++k) networks.push_back(level_shapes(k));
  int exact = 0, all = 0;
  for (const AlgorithmRow& row : kAlgorithms) {
    for (const auto& levels : networks) {
      std::int32_t n = 1;
      for (const PortLevel& l : levels) n *= l.members;
      for (const std::int64_t size :
           {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, std::int64_t{1024},
            std::int64_t{1'000'003}, std::int64_t{3 * 64 * 1024}, std::int64_t{1} << 30}) {
        SCOPED_TRACE(::testing::Message()
                     << label(row) << " of " << size << " B over " << n << ", " << levels.size()
                     << " levels of " << levels[0].members << "...");
        const ClosedForm form = closed_form(row.kind, row.algorithm, Bytes{size}, levels);
        const NetworkTraffic t = on_ports(row, Bytes{size}, levels);
        const Ticks end = play(t).end;
        EXPECT_GE(end.count, form.least.count);
        if (form.most) {
          EXPECT_LE(end.count, form.most->count);
        }
        if (n <= 16) {
          EXPECT_EQ(play(t, {false}).end, end);
        }
        ++all;
        exact += form.exact();
        const bool power = (n & (n - 1)) == 0;
        if (size % (2 * n) == 0 && power && (levels.size() == 1 || levelled(row.algorithm))) {
          if (row.algorithm != Algorithm::nvls_tree || levels.size() <= 2) {
            EXPECT_TRUE(form.exact());
          }
        }
      }
    }
  }
  EXPECT_GT(2 * exact, all);
}

/// On the catalogue's clusters, whoever takes part in whatever order: no time is below its bound,
/// and a formula that is said to be exact is.
TEST(Collectives, FormulasHoldOnTheCataloguesClusters) {
  std::mt19937 rng{17};
  int exact = 0, bounds = 0;
  for (const char* name : {"dgx1-v100:2", "dgx2-v100:2", "a100-pcie-8:2", "dgx-a100-80gb:3",
                           "dgx-h100:3", "h100-sxm-4:2", "gb200-nvl72:20", "cpu-host:4"}) {
    const Topology t = load_topology(name);
    for (int k = 0; k < 8; ++k) {
      std::vector<std::int64_t> ranks(std::min<std::size_t>(t.device_count(), 80));
      std::iota(ranks.begin(), ranks.end(), 0);
      if (k > 1) {
        std::shuffle(ranks.begin(), ranks.end(), rng);
        ranks.resize(2 + rng() % std::min<std::size_t>(ranks.size() - 1, 15));
      }
      const auto kind = kAlgorithms[rng() % kAlgorithms.size()].kind;
      const Bytes size{std::int64_t{840} << rng() % 20};
      for (const CollectiveTime& a : time_collective(kind, size, ranks, t).algorithms) {
        if (!a.why_not.empty()) continue;
        SCOPED_TRACE(fmt::format("{} by {} of {} on {}, case {}", partita::name(kind),
                                 partita::name(a.algorithm), size.count, name, k));
        EXPECT_GE(a.time.count, a.form.least.count);
        ++bounds;
        if (!a.form.exact()) continue;
        ++exact;
        EXPECT_LE(a.time.count, a.form.most->count);
      }
    }
  }
  EXPECT_GT(bounds, 100);
  EXPECT_GT(exact, 30);
}

/// A GPU with a link to each other one: 256 MiB to each of three at 150 GB/s take 1.79 ms, where a
/// formula of one port said three times as much.
TEST(Collectives, MembersOfSeveralPortsAreNotOnes) {
  const Topology t = load_topology("h100-sxm-4:1");
  for (const CollectiveKind kind : {CollectiveKind::all_to_all, CollectiveKind::gather}) {
    for (const CollectiveTime& a : time_collective(kind, 1_GiB, {0, 1, 2, 3}, t).algorithms) {
      if (!a.why_not.empty()) continue;
      SCOPED_TRACE(partita::name(a.algorithm));
      EXPECT_GE(a.time.count, a.form.least.count);
      if (a.form.most) {
        EXPECT_LE(a.time.count, a.form.most->count);
      }
    }
  }
}

/// Ways that leave a member by one link and part behind it: over four cards, or a torus'
/// directions.
TEST(Collectives, WaysThatPartBehindAPortAreNotOnes) {
  for (const std::string& name : {std::string("gb200-nvl72:36"), std::string("dgx-h100:2"),
                                  std::string(PARTITA_TEST_DATA "/cli/torus.yaml"),
                                  std::string(PARTITA_TEST_DATA "/cli/dragonfly.yaml")}) {
    const Topology t = load_topology(name);
    std::vector<std::int64_t> ranks(std::min<std::size_t>(t.device_count(), 144));
    std::iota(ranks.begin(), ranks.end(), 0);
    std::set<CollectiveKind> kinds;
    for (const AlgorithmRow& row : kAlgorithms) kinds.insert(row.kind);
    for (const CollectiveKind kind : kinds) {
      for (const Bytes size : {1_MiB, 1_GiB}) {
        for (const CollectiveTime& a : time_collective(kind, size, ranks, t).algorithms) {
          if (!a.why_not.empty()) continue;
          EXPECT_GE(a.time.count, a.form.least.count)
              << name << " " << partita::name(kind) << " " << partita::name(a.algorithm);
          if (a.form.most) {
            EXPECT_LE(a.time.count, a.form.most->count)
                << name << " " << partita::name(kind) << " " << partita::name(a.algorithm);
          }
        }
      }
    }
  }
}

/// What crosses every port, to the byte, is what the expansion's messages carry.
TEST(Collectives, BytesOnEveryLinkAreThoseOfTheExpansion) {
  const PortLevel in{4, Ticks{1000}, BytesPerSecond{1e9}}, out{3, Ticks{1000}, BytesPerSecond{1e9}};
  for (const AlgorithmRow& row : kAlgorithms) {
    for (const std::int64_t size : {0, 1, 1003, 12'000}) {
      SCOPED_TRACE(::testing::Message() << label(row) << " of " << size << " B");
      const NetworkTraffic t = on_ports(row, Bytes{size}, {in, out});
      const std::vector<std::int32_t> members =
          levelled(row.algorithm) ? std::vector{4, 3} : std::vector<std::int32_t>{};
      const EvenCut cut(row.kind, rhythm(row.kind, row.algorithm, 12, members), Bytes{size});
      std::vector<double> want(48, 0);
      for (const auto& step : expand(row.kind, row.algorithm, 12, members).steps) {
        for (const Message& m : step) {
          const std::size_t level = m.from < 12 && m.to < 12 && m.from / 4 != m.to / 4 ? 24 : 0;
          const auto bytes = static_cast<double>(cut.of(m).count);
          if (m.from < 12) want[level + static_cast<std::size_t>(m.from)] += bytes;
          if (m.to < 12) want[level + 12 + static_cast<std::size_t>(m.to)] += bytes;
        }
      }
      EXPECT_EQ(play(t).link_bytes, want);
    }
  }
}

/// Bytes that must leave a set of members for the rest whatever the algorithm, for `inside`(r).
std::int64_t must_cross(CollectiveKind kind, std::int32_t n, std::int64_t payload,
                        const std::vector<bool>& inside) {
  const auto bounds = even_chunks(payload, n);
  std::int64_t in = 0, inside_bytes = 0, pairs = 0;
  for (std::int32_t r = 0; r < n; ++r) {
    const auto at = static_cast<std::size_t>(r);
    if (inside[at]) ++in, inside_bytes += bounds[at + 1] - bounds[at];
    pairs += inside[at] && !inside[static_cast<std::size_t>((r + 1) % n)];
  }
  if (in == 0 || in == n) return 0;
  const std::int64_t outside_bytes = payload - inside_bytes;
  switch (kind) {
    case CollectiveKind::all_reduce:
      return payload;  // of sums one payload is enough
    case CollectiveKind::all_gather:
      return inside_bytes;
    case CollectiveKind::reduce_scatter:
      return outside_bytes;
    case CollectiveKind::all_to_all:
    case CollectiveKind::halo_exchange:
      return in * outside_bytes;
    case CollectiveKind::shift:
      return pairs * payload;
    case CollectiveKind::broadcast:
      return inside[0] ? payload : 0;
    case CollectiveKind::reduce:
      return inside[0] ? 0 : payload;
    case CollectiveKind::scatter:
      return inside[0] ? outside_bytes : 0;
    case CollectiveKind::gather:
      return inside[0] ? 0 : inside_bytes;
  }
  return 0;
}

TEST(Collectives, NoCutOfAClusterIsBeaten) {
  std::mt19937_64 rng{31};
  int met = 0;
  for (int k = 0; k < 300; ++k) {
    const RandomCollective c = random_collective(rng, k % 2 == 0);
    SCOPED_TRACE(::testing::Message() << k << ": " << label(c.row) << " of " << c.payload.count
                                      << " B over " << c.ranks.size());
    const double time = static_cast<double>(play(c.traffic()).end.count) * 1e-12;
    for (int cut = 0; cut < 20; ++cut) {
      // Any vertices; nodes, or nodes and single vertices: what is narrow.
      std::vector<bool> node(c.topology.node_count()), in(c.topology.vertex_count());
      for (std::size_t i = 0; i < node.size(); ++i) node[i] = rng() % 2 == 0;
      const std::uint64_t loose = std::array<std::uint64_t, 3>{0, 16, 2}[rng() % 3];
      for (std::size_t v = 0; v < in.size(); ++v) {
        const std::size_t at = c.topology.node_of_vertex(static_cast<std::int32_t>(v));
        in[v] = at < node.size() ? node[at] : rng() % 2 == 0;
        if (loose > 0 && rng() % loose == 0) in[v] = !in[v];
      }
      double capacity = 0;
      for (std::size_t l = 0; l < c.topology.link_count(); ++l) {
        const Link link = c.topology.link(LinkId{l});
        if (in[static_cast<std::size_t>(link.from)] && !in[static_cast<std::size_t>(link.to)])
          capacity += link.bandwidth.count;
      }
      std::vector<bool> inside;
      for (const std::int64_t r : c.ranks)
        inside.push_back(in[static_cast<std::size_t>(
            c.topology.vertex_of(DeviceId{static_cast<std::size_t>(r)}))]);
      const auto bytes = static_cast<double>(must_cross(
          c.row.kind, static_cast<std::int32_t>(c.ranks.size()), c.payload.count, inside));
      EXPECT_GE(time * (1 + 1e-9), bytes > 0 ? bytes / capacity : 0);
      met += bytes > 0 && bytes / capacity > 0.5 * time;
    }
  }
  EXPECT_GT(met, 20);  // some are close
}

/// A message moves its bytes while one of its links is full: in one beat it takes its latency and
/// at most what all bytes of its links take, one link after the other.
TEST(Collectives, NoLinkIdlesThatAMessageWaitsFor) {
  std::mt19937_64 rng{32};
  int beats = 0;
  for (int k = 0; k < 300; ++k) {
    const RandomCollective c = random_collective(rng, k % 3 == 0);
    SCOPED_TRACE(::testing::Message() << k << ": " << label(c.row));
    NetworkTraffic all = c.traffic();
    for (double& capacity : all.capacity) capacity *= 1 + static_cast<double>(rng() % 4);
    for (const TrafficBeat& beat : all.beats) {
      if (rng() % 4 != 0) continue;
      NetworkTraffic t = all;
      t.beats = {beat};
      t.beats[0].repeat = 1;
      const Played p = play(t);
      const auto busy = [&](const std::vector<std::int32_t>& links) {
        double s = 0;
        for (const std::int32_t l : links)
          s += p.link_bytes[static_cast<std::size_t>(l)] / t.capacity[static_cast<std::size_t>(l)];
        return s;
      };
      double longest = 0;
      for (const TrafficMessage& m : beat.messages) {
        const NetworkRoute& r = t.routes[static_cast<std::size_t>(m.route)];
        longest = std::max(longest, static_cast<double>(r.latency.count) * 1e-12 + busy(r.links));
      }
      for (const TrafficMeeting& m : beat.meetings)
        longest = std::max(longest, static_cast<double>(m.latency.count) * 1e-12 + busy(m.links));
      const double slack =
          1e-12 * static_cast<double>(beat.messages.size() + beat.meetings.size() + 1);
      EXPECT_LE(static_cast<double>(p.end.count) * 1e-12, longest * (1 + 1e-9) + slack);
      ++beats;
    }
  }
  EXPECT_GT(beats, 300);
}

/// Members of other numbers on the same devices' symmetric places: nodes renamed, places within
/// nodes turned.
TEST(Collectives, EqualPlacesTakeEqualTimes) {
  const Topology topology = load_topology("dgx-h100:4");
  for (const AlgorithmRow& row : kAlgorithms) {
    SCOPED_TRACE(label(row));
    const std::vector<std::int32_t> levels =
        levelled(row.algorithm) ? std::vector<std::int32_t>{8, 2} : std::vector<std::int32_t>{};
    const Rhythm r = rhythm(row.kind, row.algorithm, 16, levels);
    const EvenCut cut(row.kind, r, Bytes{1 << 24});
    std::vector<std::int64_t> ranks(16), other(16);
    for (std::int64_t k = 0; k < 16; ++k) {
      ranks[static_cast<std::size_t>(k)] = k;
      other[static_cast<std::size_t>(k)] = (k < 8 ? 24 : 8) + (k + 3) % 8;
    }
    EXPECT_EQ(play(traffic_of(r, cut, ranks, topology)).end,
              play(traffic_of(r, cut, other, topology)).end);
  }
}

/// docs/collectives.md, "In the switch".
TEST(Collectives, ASwitchThatAddsMovesAPayloadOnce) {
  const Topology node = load_topology("dgx-h100");
  std::vector<std::int64_t> ranks(8);
  std::iota(ranks.begin(), ranks.end(), 0);
  const auto played = [&](CollectiveKind kind, Algorithm algorithm) {
    const Rhythm r = rhythm(kind, algorithm, 8);
    return play(traffic_of(r, EvenCut(kind, r, 1_GiB), ranks, node));
  };
  const Played in_switch = played(CollectiveKind::all_reduce, Algorithm::nvls);
  const Played ring = played(CollectiveKind::all_reduce, Algorithm::ring);
  ASSERT_EQ(in_switch.link_bytes.size(), 16u);
  for (const double bytes : in_switch.link_bytes) EXPECT_EQ(bytes, 1 << 30);
  for (const double bytes : ring.link_bytes) EXPECT_EQ(bytes, 14.0 * (1 << 27));
  // 1 us + 2^30 / 450e9 s; ring 14 (1 us + 2^27 / 450e9 s).
  EXPECT_EQ(in_switch.end.count, 2'387'092'943);
  EXPECT_EQ(ring.end.count, 14 * 299'261'618ll);
  // Its parts: the payload up once and an eighth of it down, or the other way round.
  for (const auto kind : {CollectiveKind::reduce_scatter, CollectiveKind::all_gather}) {
    const Played p = played(kind, Algorithm::nvls);
    double all = 0;
    for (const double bytes : p.link_bytes) all += bytes;
    EXPECT_EQ(all, 8.0 * (1 << 30) + 8.0 * (1 << 27));
    EXPECT_EQ(p.end, in_switch.end);
  }
}

TEST(Collectives, NvlsSaysWhatItNeeds) {
  const auto message = [](const char* cluster, std::vector<std::int64_t> ranks,
                          const std::vector<std::int32_t>& levels) -> std::string {
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::nvls,
                            static_cast<std::int32_t>(ranks.size()), levels);
    try {
      traffic_of(r, EvenCut(CollectiveKind::all_reduce, r, 1_KiB), ranks, load_topology(cluster));
    } catch (const InputError& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message("dgx-h100:2", {0, 1, 8, 9}, {2, 2}), "");
  EXPECT_EQ(message("gb200-nvl72:18", {0, 4, 8, 71}, {4}), "");
  EXPECT_EQ(message("dgx-a100-80gb", {0, 1}, {2}),
            "algorithm: nvls needs switches that add, which came with compute capability 90; "
            "node0.gpu0 is a100-sxm-80gb of 80: use another algorithm");
  EXPECT_EQ(message("a100-pcie-8", {0, 1}, {2}),
            "algorithm: nvls needs an NVSwitch between node0.gpu0 and node0.gpu1, there is none; "
            "use another algorithm");
  EXPECT_EQ(message("dgx-h100:2", {0, 1, 8, 9}, {4}),
            "algorithm: nvls needs node0.nvswitch0 between node1.gpu0 and node0.gpu0, which do not "
            "meet there; give levels whose units share a switch, or use another algorithm");
}

std::vector<std::int64_t> first(std::int64_t n) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

/// docs/collectives.md, "Levels".
TEST(Collectives, TheLevelsOfThePage) {
  const Topology two = load_topology("dgx-h100:2");
  const CollectiveTimes all = time_collective(CollectiveKind::all_reduce, 1_GiB, first(16), two);
  EXPECT_EQ(all.levels, (std::vector<std::int32_t>{8, 2}));
  ASSERT_EQ(all.algorithms.size(), 7u);
  const CollectiveTime& t = all.algorithms[4];
  EXPECT_EQ(t.algorithm, Algorithm::hierarchical);
  EXPECT_EQ(t.steps, 16);
  EXPECT_EQ(t.sent.count, 14 * (1 << 27) + 2 * (1 << 26));
  // 14 (1 us + 2^27 / 450e9 s) in the nodes, 2 (2.2 us + 2^26 / 50e9 s) between them.
  EXPECT_EQ(t.time.count, 14 * 299'261'618ll + 2 * (2'200'000 + 1'342'177'280ll));
  EXPECT_EQ(t.time, t.form.least);
  EXPECT_TRUE(t.form.exact());
  EXPECT_NEAR(t.bus_bandwidth.count, 292.69e9, 0.01e9);
  EXPECT_EQ(two.link_name(t.busiest), "node0.gpu0->node0.nvswitch0");
  EXPECT_NEAR(t.busy, 14 * 298.2616 / 6878.42, 1e-4);
  // One ring of 16: from one node to the other over the NVSwitch to the card on the other's rail.
  EXPECT_EQ(all.algorithms[0].time.count, 30 * (3'200'000 + 1'342'177'280ll));
  EXPECT_FALSE(all.algorithms[0].form.exact());
}

/// docs/collectives.md, "Steps, bytes, time": what a rank sends; S a multiple of all that divides
/// it.
TEST(Collectives, RanksSendWhatThePageSays) {
  const Topology two = load_topology("dgx-h100:2");
  const std::int64_t s = 1 << 20, n = 16;
  const auto sent = [&](CollectiveKind kind, Algorithm algorithm, std::int64_t steps) {
    const auto all = time_collective(kind, Bytes{s}, first(n), two, algorithm);
    EXPECT_EQ(all.algorithms.at(0).steps, steps) << label({kind, algorithm});
    return all.algorithms[0].sent.count;
  };
  using Kind = CollectiveKind;
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::ring, 30), 30 * s / 16);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::tree, 8), 4 * s);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::halving, 8), 30 * s / 16);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::double_tree, 8), 2 * s);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::hierarchical, 16), 14 * s / 8 + 2 * s / 16);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::nvls, 4), s + s / 8 + 2 * s / 16);
  EXPECT_EQ(sent(Kind::all_reduce, Algorithm::nvls_tree, 4), s + s / 8 + s / 8);
  for (const auto kind : {Kind::all_gather, Kind::reduce_scatter}) {
    EXPECT_EQ(sent(kind, Algorithm::ring, 15), 15 * s / 16);
    EXPECT_EQ(sent(kind, Algorithm::halving, 4), 15 * s / 16);
    EXPECT_EQ(sent(kind, Algorithm::hierarchical, 8), 7 * s / 8 + s / 16);
    EXPECT_EQ(sent(kind, Algorithm::nvls, 2), (kind == Kind::all_gather ? s / 8 : s) + s / 16);
  }
  EXPECT_EQ(sent(Kind::all_to_all, Algorithm::pairwise, 15), 15 * s / 16);
  EXPECT_EQ(sent(Kind::all_to_all, Algorithm::direct, 1), 15 * s / 16);
  EXPECT_EQ(sent(Kind::all_to_all, Algorithm::hierarchical, 8), 7 * s / 8 + s / 2);
  EXPECT_EQ(sent(Kind::shift, Algorithm::direct, 1), s);
  EXPECT_EQ(sent(Kind::broadcast, Algorithm::tree, 4), 4 * s);
  EXPECT_EQ(sent(Kind::broadcast, Algorithm::ring, 15), s);
  EXPECT_EQ(sent(Kind::reduce, Algorithm::tree, 4), s);
  EXPECT_EQ(sent(Kind::reduce, Algorithm::ring, 15), s);
  EXPECT_EQ(sent(Kind::scatter, Algorithm::direct, 15), 15 * s / 16);
  EXPECT_EQ(sent(Kind::gather, Algorithm::direct, 15), s / 16);
  // Over 4 units the root of a tree between them, and over one there is none.
  const Topology four = load_topology("dgx-h100:4");
  const auto tree =
      time_collective(Kind::all_reduce, Bytes{s}, first(32), four, Algorithm::nvls_tree);
  EXPECT_EQ(tree.algorithms[0].steps, 2 + 4);
  EXPECT_EQ(tree.algorithms[0].sent.count, s + s / 8 + 2 * s / 8);
  EXPECT_TRUE(tree.algorithms[0].form.exact());
  EXPECT_EQ(tree.algorithms[0].form.least, tree.algorithms[0].time);
}

TEST(Collectives, OneMessageIsABroadcastOverTwo) {
  const Topology two = load_topology("dgx-h100:2");
  for (const std::int64_t to : {1, 8, 9}) {
    const CollectiveTimes all = time_collective(CollectiveKind::broadcast, 64_MiB, {0, to}, two);
    for (const CollectiveTime& t : all.algorithms) {
      EXPECT_EQ(t.steps, 1);
      EXPECT_TRUE(t.form.exact());
      EXPECT_EQ(t.form.least, t.time);
      EXPECT_EQ(t.busy > 0.99, true);
    }
  }
}

TEST(Collectives, LevelsFollowTheNvlinkNetworks) {
  const Topology three = load_topology("dgx-h100:3"), domain = load_topology("gb200-nvl72:19");
  const auto levels = [](const Topology& t, std::vector<std::int64_t> ranks) {
    return levels_of(ranks, t);
  };
  using Levels = std::vector<std::int32_t>;
  EXPECT_EQ(levels(three, first(24)), (Levels{8, 3}));
  EXPECT_EQ(levels(three, first(8)), (Levels{8}));
  EXPECT_EQ(levels(three, first(12)), (Levels{12}));  // 8 and 4
  EXPECT_EQ(levels(three, {0, 8, 16}), (Levels{1, 3}));
  EXPECT_EQ(levels(three, {0, 8, 1, 9}), (Levels{1, 4}));  // in this order no two neighbours share
  EXPECT_EQ(levels(domain, first(72)), (Levels{72}));
  EXPECT_EQ(levels(domain, {70, 71, 72, 73}), (Levels{2, 2}));
}

TEST(Collectives, WhatCannotBePlayedIsSaid) {
  const Topology a100 = load_topology("dgx-a100-80gb");
  const auto all = time_collective(CollectiveKind::all_reduce, 1_KiB, first(8), a100);
  EXPECT_EQ(all.algorithms[0].why_not, "");
  EXPECT_EQ(all.algorithms[5].why_not.substr(0, 30), "nvls needs switches that add, ");
  EXPECT_THROW(time_collective(CollectiveKind::all_reduce, 1_KiB, first(8), a100, Algorithm::nvls),
               InputError);
  const auto many = time_collective(CollectiveKind::all_to_all, 1_GiB, first(2304),
                                    load_topology("dgx-h100:288"));
  EXPECT_EQ(many.algorithms[0].why_not,
            "it has 5,306,112 messages, more than the 4,000,000 that are played; use fewer ranks, "
            "or a size that they divide");
  EXPECT_EQ(many.algorithms[2].why_not, "");
  const auto uneven = time_collective(CollectiveKind::all_reduce, Bytes{1001}, first(2000),
                                      load_topology("dgx-h100:250"), Algorithm::tree);
  EXPECT_GT(uneven.algorithms[0].time.count, 0);
}

/// nccl-tests, doc/PERFORMANCE.md.
TEST(Collectives, BusBandwidthIsNcclTests) {
  EXPECT_EQ(bus_factor(CollectiveKind::all_reduce, 8), 1.75);
  for (const auto kind :
       {CollectiveKind::all_gather, CollectiveKind::reduce_scatter, CollectiveKind::all_to_all,
        CollectiveKind::scatter, CollectiveKind::gather, CollectiveKind::halo_exchange})
    EXPECT_EQ(bus_factor(kind, 8), 0.875);
  for (const auto kind : {CollectiveKind::broadcast, CollectiveKind::reduce, CollectiveKind::shift})
    EXPECT_EQ(bus_factor(kind, 8), 1);
  EXPECT_EQ(bus_factor(CollectiveKind::all_reduce, 1), 0);
}

}  // namespace
}  // namespace partita
