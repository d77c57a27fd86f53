// tests/simulator/nccl_test.cpp: NCCL's model against vectors of an independent transcription, the
// worked numbers of docs/nccl.md, and laws.

#include "simulator/cost/nccl.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/yaml.h"
#include "simulator/cost/cost.h"
#include "simulator/cost/nccl_time.h"

namespace partita::nccl {
namespace {

std::vector<std::int64_t> first(std::int64_t n) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}
Communicator of(const std::string& cluster, std::int64_t ranks) {
  return communicator(load_topology(cluster), first(ranks));
}
constexpr auto kAll = Collective::all_reduce;

/// nccl-cost-vectors.jsonl, from $PARTITA_FACTS or beside the checkout.
std::filesystem::path vectors() {
  const char* facts = std::getenv("PARTITA_FACTS");
  return std::filesystem::path(facts != nullptr ? facts : PARTITA_TEST_FACTS) /
         "nccl-cost-vectors.jsonl";
}

TEST(Nccl, MeetsEveryVectorToThePrintedDigit) {
  if (!std::filesystem::exists(vectors()))
    GTEST_SKIP() << "no " << vectors() << "; set PARTITA_FACTS to its folder";
  const std::map<std::string, Algorithm> algorithms = {{"tree", Algorithm::tree},
                                                       {"ring", Algorithm::ring},
                                                       {"nvls", Algorithm::nvls},
                                                       {"nvls_tree", Algorithm::nvls_tree},
                                                       {"pat", Algorithm::pat}};
  const std::map<std::string, Protocol> protocols = {
      {"ll", Protocol::ll}, {"ll128", Protocol::ll128}, {"simple", Protocol::simple}};
  const std::map<std::string, Collective> collectives = {
      {"Broadcast", Collective::broadcast},
      {"Reduce", Collective::reduce},
      {"AllGather", Collective::all_gather},
      {"ReduceScatter", Collective::reduce_scatter},
      {"AllReduce", Collective::all_reduce}};
  std::ifstream file(vectors());
  int cases = 0, entries = 0;
  for (std::string line; std::getline(file, line); ++cases) {
    const auto v = nlohmann::json::parse(line);
    Communicator c;
    c.ranks = v["ranks"];
    c.nodes = v["nodes"];
    c.compute_capability = v["compute_capability"];
    c.cpu = v["cpu"] == "amd" ? Cpu::amd : Cpu::intel;
    c.plain_tree = v["plain_tree_pattern"];
    c.net_latency_us = v["net_latency_us"];
    for (const auto& [key, g] : v["graphs"].items())
      c.graph(algorithms.at(key)) = Graph{g["channels"], g["bw_intra_GBps"], g["bw_inter_GBps"],
                                          g["nvlink"], g["same_channels"]};
    std::size_t priced = 0;
    for (const auto& [w, what] : collectives) {
      for (const auto& [a, algorithm] : algorithms) {
        for (const auto& [p, protocol] : protocols)
          priced += price(c, what, algorithm, protocol).has_value();
      }
    }
    EXPECT_EQ(priced, v["expected"].size()) << "case " << cases;
    for (const auto& e : v["expected"]) {
      const auto one = price(c, collectives.at(e["collective"]), algorithms.at(e["algorithm"]),
                             protocols.at(e["protocol"]));
      ASSERT_TRUE(one) << "case " << cases << ": " << e;
      // Six digits after the point are printed.
      EXPECT_NEAR(one->latency_us, e["latency_us"].get<double>(), 5.1e-7) << cases << ": " << e;
      EXPECT_NEAR(one->bandwidth_GBps, e["bandwidth_GBps"].get<double>(), 5.1e-7)
          << cases << ": " << e;
      ++entries;
    }
  }
  EXPECT_EQ(cases, 84);
  EXPECT_GT(entries, 1600);
}

TEST(Nccl, PredictsWhatItPrintedFor8H100) {
  // NVIDIA/nccl#1595: "805306368 Bytes -> Algo 1 proto 2 time 3970.683594"; without NVLS then.
  const Communicator c = of("dgx-h100", 8);
  // NCCL computes in float, whose neighbours there are 2^-12 apart.
  EXPECT_NEAR(estimate_us(c, kAll, Algorithm::ring, Protocol::simple, 805306368), 3970.683594,
              0x1p-12);
  const Choice x = choose(c, kAll, 805306368, Algorithm::ring);
  EXPECT_EQ(x.protocol, Protocol::simple);
  EXPECT_EQ(x.channels, 24);
}

struct Worked {
  const char* cluster;
  std::int64_t ranks;
  int channels;
  double speed;
  int final_channels;
};
TEST(Nccl, FindsTheWorkedChannels) {
  for (const auto& [cluster, ranks, count, speed, last] :
       std::vector<Worked>{{"dgx-a100-80gb", 8, 12, 20, 24},
                           {"dgx-h100", 8, 12, 30, 24},
                           {"dgx-h200", 8, 12, 30, 24},
                           {"dgx-b200", 8, 16, 45, 32},
                           {"dgx1-v100", 8, 6, 20, 12},
                           {"dgx-h100:2", 16, 8, 48, 16},
                           {"dgx-a100-80gb:2", 16, 8, 24, 16}}) {
    SCOPED_TRACE(cluster);
    const Communicator c = of(cluster, ranks);
    EXPECT_EQ(c.graph(Algorithm::ring)->channels, count);
    EXPECT_EQ(c.graph(Algorithm::ring)->inter_GBps, speed);
    EXPECT_EQ(channels(c, Algorithm::ring, Protocol::simple, 1e9), last);
    EXPECT_TRUE(c.graph(Algorithm::ring)->nvlink);
    EXPECT_TRUE(c.ll128);
  }
}

TEST(Nccl, OneHopperNodeHasTheWorkedPrices) {
  const Communicator c = of("dgx-h100", 8);
  const auto expect = [&](Algorithm a, Protocol p, double latency, double bandwidth) {
    const Price x = price(c, kAll, a, p).value();
    EXPECT_NEAR(x.latency_us, latency, .05) << name(a) << " " << name(p);
    EXPECT_NEAR(x.bandwidth_GBps, bandwidth, .05) << name(a) << " " << name(p);
  };
  expect(Algorithm::ring, Protocol::ll, 15.0, 80.6);
  expect(Algorithm::ring, Protocol::ll128, 40.6, 189.3);
  expect(Algorithm::ring, Protocol::simple, 56.0, 205.7);
  expect(Algorithm::tree, Protocol::ll, 15.2, 43.6);
  expect(Algorithm::tree, Protocol::ll128, 31.5, 128.8);
  expect(Algorithm::tree, Protocol::simple, 64.4, 165.6);
  expect(Algorithm::nvls, Protocol::simple, 25.0, 272);
  EXPECT_EQ(c.graph(Algorithm::nvls)->intra_GBps, 40);
  EXPECT_EQ(c.graph(Algorithm::nvls)->inter_GBps, 60);
}

TEST(Nccl, NewerVersionsDifferWhereTheTablesSay) {
  const Topology t = load_topology("dgx-b200");
  const Communicator old = communicator(t, first(8)),
                     now = communicator(t, first(8), Version::v2_30_7);
  // 16 channels of 45: .92 of 720 are 662.4; 16 · 40 are 640.
  EXPECT_NEAR(price(old, kAll, Algorithm::ring, Protocol::ll128)->bandwidth_GBps, 662.4 * 8 / 14,
              1e-9);
  EXPECT_NEAR(price(now, kAll, Algorithm::ring, Protocol::ll128)->bandwidth_GBps, 640.0 * 8 / 14,
              1e-9);
  Communicator many = communicator(load_topology("dgx-b200:4"), first(32));
  many.graph(Algorithm::nvls_tree)->intra_GBps = many.graph(Algorithm::nvls_tree)->inter_GBps = 96;
  EXPECT_NEAR(price(many, kAll, Algorithm::nvls_tree, Protocol::simple)->bandwidth_GBps,
              8 * 43.8 * 32 / 62, 1e-9);
  many.version = Version::v2_30_7;
  EXPECT_NEAR(price(many, kAll, Algorithm::nvls_tree, Protocol::simple)->bandwidth_GBps,
              8 * 80.0 * 32 / 62, 1e-9);
  EXPECT_EQ(speeds(100, false, Version::v2_28_9).size() + 1,
            speeds(100, false, Version::v2_30_7).size());
  EXPECT_EQ(speeds(100, true, Version::v2_28_9).size() + 2,
            speeds(100, true, Version::v2_30_7).size());
}

TEST(Nccl, BoundariesAreNccls) {
  const Communicator c = of("dgx-h100", 8);
  // A tree's table ends with 64 · 2^23 bytes.
  const double end = 64.0 * (1 << 23);
  const Price tree = price(c, kAll, Algorithm::tree, Protocol::simple).value();
  EXPECT_EQ(estimate_us(c, kAll, Algorithm::tree, Protocol::simple, end), tree.time_us(end));
  EXPECT_NEAR(estimate_us(c, kAll, Algorithm::tree, Protocol::simple, end - 1),
              tree.latency_us + (end - 1) / (900 * tree.bandwidth_GBps), 1e-6);
  // ... and begins with 64.
  EXPECT_NEAR(estimate_us(c, kAll, Algorithm::tree, Protocol::simple, 64),
              tree.latency_us + 64 / (900 * tree.bandwidth_GBps), 1e-9);
  EXPECT_EQ(estimate_us(c, kAll, Algorithm::tree, Protocol::simple, 63), tree.time_us(63));
  // A ring between nodes waits longer from 64 B a channel and rank on: 16 · 16 · 64.
  const Communicator two = of("dgx-h100:2", 16);
  const Price ring = price(two, kAll, Algorithm::ring, Protocol::simple).value();
  const double plain = estimate_us(two, kAll, Algorithm::ring, Protocol::simple, 16383);
  EXPECT_EQ(plain, ring.time_us(16383));
  EXPECT_NEAR(estimate_us(two, kAll, Algorithm::ring, Protocol::simple, 16384),
              1.4 * ring.latency_us + 16384 / (1000 * ring.bandwidth_GBps), 1e-9);
  // Channels: 24 · 512 · 64 bytes fill all in Simple, 8 · 8 a thread in a ring's LL.
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::simple, 786432), 24);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::simple, 786431), 23);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::ll, 786432), 24);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::ll, 786431), 23);
  EXPECT_EQ(channels(c, Algorithm::tree, Protocol::ll, 98304), 24);
  EXPECT_EQ(channels(c, Algorithm::tree, Protocol::ll, 98303), 23);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::ll128, 122880), 24);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::ll128, 122879), 23);
  EXPECT_EQ(channels(c, Algorithm::ring, Protocol::simple, 1), 1);
  EXPECT_EQ(channels(c, Algorithm::nvls, Protocol::simple, 1), 16);
  // Generations.
  Communicator g = c;
  const auto ll = [&](int capability) {
    g.compute_capability = capability;
    return price(g, kAll, Algorithm::ring, Protocol::ll)->bandwidth_GBps * 14 / 8;
  };
  EXPECT_NEAR(ll(79), 39, 1e-9);
  EXPECT_NEAR(ll(80), 87.7, 1e-9);
  EXPECT_NEAR(ll(89), 87.7, 1e-9);
  EXPECT_NEAR(ll(90), 141, 1e-9);
  EXPECT_NEAR(ll(99), 141, 1e-9);
  EXPECT_NEAR(ll(100), 180, 1e-9) << "half the bus";
}

TEST(Nccl, SearchStopsAndSplitsWhereNcclDoes) {
  const auto search = [](std::vector<double> speeds, double total, int capability,
                         std::vector<int> fit) {
    return search_speeds(speeds, 1000, total, 32, capability, [&](double s) {
      for (std::size_t i = 0; i < speeds.size(); ++i)
        if (speeds[i] == s) return fit[i];
      return 0;
    });
  };
  const auto expect = [](Channels c, int count, double speed) {
    EXPECT_EQ(c.count, count);
    EXPECT_EQ(c.speed, speed);
  };
  // Half the speed is still tried, less is not.
  expect(search({20, 9.8}, 100, 70, {1, 3}), 3, 9.8);
  expect(search({20, 9.79}, 100, 70, {1, 3}), 1, 20);
  // As much is not better; full links stop.
  expect(search({20, 10}, 100, 70, {2, 4}), 2, 20);
  expect(search({20, 15}, 40, 70, {2, 3}), 2, 20);
  // A speed above a GPU's links is left out, one equal to them is not.
  expect(search({20, 10}, 19, 70, {1, 1}), 1, 10);
  expect(search({20, 10}, 20, 70, {1, 1}), 1, 20);
  // Split from 25 GB/s on; above 80 not if slower than 50 and more than 4.
  expect(search({25}, 1000, 70, {3}), 6, 12.5);
  expect(search({24}, 1000, 70, {3}), 3, 24);
  expect(search({48}, 1000, 80, {5}), 10, 24);
  expect(search({48}, 1000, 81, {5}), 5, 48);
  expect(search({48}, 1000, 81, {4}), 8, 24);
  expect(search({50}, 1000, 81, {5}), 10, 25);
  expect(search({25}, 1000, 70, {16}), 32, 12.5);
  expect(search({25}, 1000, 70, {17}), 17, 25);
}

TEST(Nccl, WhatIsOffByDefault) {
  EXPECT_FALSE(of("dgx-h100", 2).nvls);
  EXPECT_TRUE(of("dgx-h100", 3).nvls);
  EXPECT_FALSE(of("dgx-a100-80gb", 8).nvls);
  const Communicator pcie = of("a100-pcie-8", 8);
  EXPECT_FALSE(pcie.ll128);
  EXPECT_FALSE(pcie.graph(Algorithm::ring)->nvlink);
  EXPECT_EQ(pcie.graph(Algorithm::ring)->channels, 1);
  EXPECT_EQ(pcie.graph(Algorithm::ring)->intra_GBps, 15);
  const Communicator one = of("dgx-h100", 8);
  EXPECT_FALSE(enabled(one, kAll, Algorithm::nvls_tree, Protocol::simple));
  EXPECT_TRUE(enabled(one, kAll, Algorithm::nvls, Protocol::simple));
  const Communicator two = of("dgx-h100:2", 16);
  EXPECT_TRUE(enabled(two, kAll, Algorithm::nvls_tree, Protocol::simple));
  EXPECT_FALSE(enabled(two, kAll, Algorithm::nvls, Protocol::simple));
  EXPECT_FALSE(enabled(two, Collective::all_gather, Algorithm::pat, Protocol::simple));
  // One GPU a node.
  const Communicator thin = communicator(load_topology("dgx-h100:2"), {0, 8});
  EXPECT_TRUE(enabled(thin, Collective::all_gather, Algorithm::pat, Protocol::simple));
  EXPECT_TRUE(thin.plain_tree);
  // An NVLink domain is one node.
  EXPECT_EQ(of("gb200-nvl72:18", 72).nodes, 1);
  EXPECT_EQ(of("gb200-nvl72:36", 144).nodes, 2);
}

double us(const std::string& cluster, CollectiveKind kind, Bytes bytes, std::int64_t n) {
  Communication c(load_topology(cluster));
  return c.collective(kind, bytes, first(n)).count * 1e6;
}

// docs/nccl.md, "By hand": what the fabric sums enters it once.
TEST(Nccl, SharpSumsAllReducesInTheFabric) {
  const auto cluster = [](const std::string& name, bool sharp) {
    return load_topology(name, {{{"fabric.sharp", sharp ? "true" : "false"}}, {}});
  };
  const auto us = [&](const std::string& name, bool sharp, CollectiveKind kind, Bytes bytes) {
    Communication c(cluster(name, sharp));
    return c.collective(kind, bytes, first(32)).count * 1e6;
  };
  const Communicator c = communicator(cluster("dgx-h100:4", true), first(32));
  EXPECT_TRUE(c.collective_network);
  EXPECT_EQ(choose(c, kAll, 1 << 30).algorithm, Algorithm::nvls);
  EXPECT_FALSE(of("dgx-h100:4", 32).collective_network);
  // Within a node there is no fabric.
  EXPECT_FALSE(communicator(cluster("dgx-h100:4", true), first(8)).collective_network);
  EXPECT_NEAR(us("dgx-h100:4", true, CollectiveKind::all_reduce, 1_GiB), 4192.15, 5e-3);
  for (const char* name : {"dgx-h100:4", "dgx-b200:4", "dgx-a100-80gb:4"}) {
    for (const Bytes bytes : {64_KiB, 16_MiB, 4_GiB})
      EXPECT_LE(us(name, true, CollectiveKind::all_reduce, bytes),
                1.1 * us(name, false, CollectiveKind::all_reduce, bytes))
          << name << bytes.count;
    // A plugin gathers and scatters over it, which there is none of.
    for (const auto kind : {CollectiveKind::all_gather, CollectiveKind::reduce_scatter})
      EXPECT_EQ(us(name, true, kind, 16_MiB), us(name, false, kind, 16_MiB)) << name;
  }
  // Before Hopper switches of a node sum nothing: heads or a chain of its members do.
  const Communicator ampere = communicator(cluster("dgx-a100-80gb:4", true), first(32));
  EXPECT_TRUE(enabled(ampere, kAll, Algorithm::collnet_direct, Protocol::simple));
  EXPECT_TRUE(enabled(ampere, kAll, Algorithm::collnet_chain, Protocol::simple));
  EXPECT_FALSE(
      enabled(ampere, Collective::all_gather, Algorithm::collnet_direct, Protocol::simple));
}

TEST(NcclTime, TheExamplesOfThePage) {
  EXPECT_NEAR(us("dgx-h200", CollectiveKind::all_reduce, 64_MiB, 8), 331.956, 1e-3);
  EXPECT_NEAR(us("dgx-h100:2", CollectiveKind::all_reduce, 1_GiB, 16), 4215.95, 5e-3);
  Communication c(load_topology("dgx-h100"));
  EXPECT_NEAR(c.point_to_point(64_MiB, 0, 1).count * 1e6, 255.806, 1e-3);
  EXPECT_NEAR(us("v100-sxm-4:4", CollectiveKind::all_reduce, Bytes{4'000'000'000}, 16), 709e3, 500);
  EXPECT_NEAR(us("v100-sxm-4:16", CollectiveKind::all_reduce, Bytes{4'000'000'000}, 64), 750e3,
              5e3);
}

/// Ranks agree on the least that any node's search has found: the order of the file says nothing,
/// and no call is faster than among the slower nodes alone.
TEST(NcclTime, OfNodesThatDifferTheLeastCounts) {
  const std::string file = data_folder("topologies/catalogue/v100-sxm-4.yaml");
  const std::string text = read_file(file);
  const std::size_t at = text.find("  - count: 1"), end = text.find("\nfabric:");
  ASSERT_NE(at, std::string::npos);
  ASSERT_NE(end, std::string::npos);
  const std::string fast = text.substr(at, end - at);
  std::string slow = fast;
  const std::string said = "efficiency: 0.237, ";
  ASSERT_NE(slow.find(said), std::string::npos);
  slow.replace(slow.find(said), said.size(), "efficiency: 0.05, ");
  const auto of = [&](const std::string& nodes) {
    return parse_topology(text.substr(0, at) + nodes + text.substr(end), file);
  };
  const Topology a = of(fast + "\n" + slow), b = of(slow + "\n" + fast),
                 best = of(fast + "\n" + fast), worst = of(slow + "\n" + slow);
  for (const CollectiveKind kind : {CollectiveKind::all_reduce, CollectiveKind::all_gather}) {
    for (const Bytes bytes : {64_KiB, 64_MiB, 1_GiB}) {
      const auto time = [&](const Topology& t) {
        Communication c(t);
        return c.collective(kind, bytes, first(8)).count;
      };
      EXPECT_EQ(time(a), time(b));
      EXPECT_EQ(time(a), time(worst));
      EXPECT_GE(time(a), time(best));
    }
  }
  EXPECT_EQ(communicator(a, first(8)).network_share, 0.05);
  EXPECT_EQ(communicator(b, first(8)).network_share, 0.05);
}

/// A card tells its line rate, so channels and choices are as of a card that reaches it; times are
/// of what it reaches.
TEST(NcclTime, CardsBelowTheirLineRateChangeTimesNotChoices) {
  const std::string file = data_folder("topologies/catalogue/v100-sxm-4.yaml");
  std::string text = read_file(file);
  const std::string said = "efficiency: 0.237, ";
  const std::size_t at = text.find(said);
  ASSERT_NE(at, std::string::npos);
  const auto with = [&](const std::string& efficiency) {
    std::string t = text;
    t.replace(at, said.size(), efficiency);
    t.replace(t.find("count: 1"), 8, "count: 4");
    return parse_topology(t, file);
  };
  const Topology whole = with(""), half = with("efficiency: 0.5, ");
  const Communicator a = communicator(whole, first(16)), b = communicator(half, first(16));
  EXPECT_EQ(a.network_share, 1);
  EXPECT_EQ(b.network_share, 0.5);
  for (const auto what :
       {Collective::all_reduce, Collective::all_gather, Collective::reduce_scatter}) {
    for (const double bytes : {1e3, 1e6, 1e9, 1e11}) {
      EXPECT_EQ(choose(a, what, bytes), choose(b, what, bytes)) << bytes;
      const auto x = choose(a, what, bytes);
      const double ta = time_us(a, what, x, bytes), tb = time_us(b, what, x, bytes);
      EXPECT_GT(tb, ta);
      EXPECT_LT(tb, 2 * ta) << "latency and ramp stay";
      if (bytes > 1e10) {
        EXPECT_NEAR(tb / ta, 2, 0.01);
      }
    }
  }
  // A message takes what the card reaches.
  Communication fast(whole), slow(half);
  EXPECT_NEAR(slow.point_to_point(Bytes{10'000'000'000}, 0, 4).count /
                  fast.point_to_point(Bytes{10'000'000'000}, 0, 4).count,
              2, 0.01);
}

TEST(NcclTime, ChangesItsChoiceWhereNcclDoesAndNeverFalls) {
  for (const auto& [cluster, n] : std::vector<std::pair<std::string, std::int64_t>>{
           {"dgx-h100", 8}, {"dgx-h100:4", 32}, {"dgx1-v100", 8}, {"a100-pcie-8:2", 16}}) {
    const Communicator c = of(cluster, n);
    for (const Collective w : {Collective::broadcast, Collective::all_gather, kAll}) {
      SCOPED_TRACE(cluster);
      const Times times(c, w);
      double before = 0;
      for (double bytes = 1; bytes < 1e11; bytes = std::floor(bytes * 1.3 + 1)) {
        const double t = times.time_us(bytes);
        EXPECT_GE(t, before) << bytes;
        before = t;
        EXPECT_TRUE(times.choice(bytes) == choose(c, w, bytes)) << bytes;
        EXPECT_GE(t, time_us(c, w, choose(c, w, bytes), bytes)) << bytes;
      }
    }
  }
}

// Where NCCL changes to what takes less by its own estimate, and more or less by ours.
TEST(NcclTime, AByteMoreTakesNoLessWhereTheChoiceChanges) {
  int changes = 0, falls = 0;
  for (const auto& [cluster, n] :
       std::vector<std::pair<std::string, std::int64_t>>{{"dgx-h100", 8},
                                                         {"dgx-h100:4", 32},
                                                         {"dgx-a100-80gb:2", 16},
                                                         {"a100-pcie-8:2", 16},
                                                         {"dgx1-v100", 8},
                                                         {"gb200-nvl72", 72}}) {
    const Communicator c = of(cluster, n);
    for (const Collective w : {Collective::reduce_scatter, Collective::all_gather, kAll}) {
      const Times times(c, w);
      for (int power = 0; power < 36; ++power) {
        double below = std::exp2(power), above = std::exp2(power + 1);
        if (times.choice(below) == times.choice(above)) continue;
        // The first change after `below`, to the byte.
        const Choice old = times.choice(below);
        while (above - below > 1) {
          const double middle = std::floor((below + above) / 2);
          (times.choice(middle) == old ? below : above) = middle;
        }
        SCOPED_TRACE(::testing::Message() << cluster << " " << static_cast<int>(w) << " " << above);
        ++changes;
        EXPECT_GE(times.time_us(above), times.time_us(below));
        falls += time_us(c, w, times.choice(above), above) < time_us(c, w, old, below);
      }
    }
  }
  EXPECT_GT(changes, 20);
  EXPECT_GT(falls, 3);
}

TEST(NcclTime, MeasuredGroupsTakeTheirCurve) {
  // h100-sxm's file has 8 neighbours; 1 MiB was 28.56 us.
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, 1_MiB, 8), 28.56, 1e-9);
  EXPECT_NEAR(us("dgx-h100:2", CollectiveKind::all_reduce, 1_MiB, 8), 28.56, 1e-9);
  // Half-way in the logarithm: the mean of 28.56 and 43.45 there.
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, Bytes{1482910}, 8),
              std::sqrt(28.56 * 43.45), 1e-4);
  // 16 B took 12.88, 8 B 12.9: pooled.
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, Bytes{16}, 8), std::sqrt(12.88 * 12.9),
              1e-9);
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, Bytes{8}, 8), std::sqrt(12.88 * 12.9),
              1e-9);
  // Another group and another kind take the model.
  const Communicator c = of("dgx-h100", 4);
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, 1_MiB, 4), Times(c, kAll).time_us(1 << 20),
              1e-9);
  // Beyond 16 GiB: the model times what it is off there.
  const Times model(of("dgx-h100", 8), kAll);
  const double large = 17179869184;
  EXPECT_NEAR(us("dgx-h100", CollectiveKind::all_reduce, Bytes{34359738368}, 8),
              model.time_us(2 * large) * 62239 / model.time_us(large), 1e-3);
  // Two nodes of AWS: 64 KiB took 135.1 us, 128 KiB 108.9.
  EXPECT_NEAR(us("p5-48xlarge:2", CollectiveKind::all_reduce, 1_GiB, 16), 4607.6, 1e-6);
}

TEST(NcclTime, ChannelsAreTheMultiprocessorsHeld) {
  Communication c(load_topology("dgx-h100"));
  EXPECT_EQ(c.channels(CollectiveKind::all_reduce, 1_GiB, first(8)), 16);
  EXPECT_EQ(c.channels(CollectiveKind::all_gather, 1_GiB, first(8)), 24);
  EXPECT_EQ(c.channels(CollectiveKind::all_to_all, 1_GiB, first(8)), 0) << "the device's figure";
  Communication host(load_topology("cpu-host"));
  EXPECT_EQ(host.channels(CollectiveKind::all_reduce, 1_GiB, first(8)), 0);
}

}  // namespace
}  // namespace partita::nccl
