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

}  // namespace
}  // namespace partita::nccl
