// Routing is data (docs/routing.md): fed back, a recording predicts a run's memory and bytes
// exactly.
#include "simulator/program/routing.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <random>

#include "runtime/execute/threads.h"
#include "runtime/reference/serial.h"
#include "simulator/engine/simulate.h"
#include "simulator/program/expansion.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/runtime/execute/far_device.h"
#include "tests/simulator/networks.h"
#include "topologies/topology.h"

namespace partita {
namespace {

constexpr std::uint64_t kSeed = 11;

execute::Options options_for(const Graph& graph) {
  execute::Options o;
  o.warm_up = 1;
  o.steps = 2;
  o.collect = false;
  o.routing = true;
  execute::draw(o, graph, kSeed);
  return o;
}

/// The page's example: 4 experts, top 1, 2 samples of 4 tokens, 8 features, dp 2 x ep 2.
Program example() {
  Program p;
  p.mesh.atoms = {{"dp_ep", 2}};
  p.samples = 2;
  p.packs_collectives = true;
  p.routings.push_back({4, {0, 4}, {3, 1, 0, 0, 1, 0, 2, 1}, 0, 2});
  for (const std::size_t cut : {0u, 2u}) {
    Buffer b;
    b.name = cut == 0 ? "dispatched" : "exchanged";
    b.shape = {{Dim::sample, 2}, {Dim::sequence, 4}, {Dim::expert, 1}, {Dim::feature, 8}};
    b.layout.dims.resize(4);
    b.layout.dims[cut].atoms = {0};
    b.routed = true;
    b.experts = 4;
    b.routing = 0;
    p.buffers.push_back(std::move(b));
  }
  Instruction i;
  i.kind = Kind::collective;
  i.collective = CollectiveKind::all_to_all;
  i.atoms = 1;
  i.reads = {BufferId{0}};
  i.writes = {BufferId{1}};
  p.blocks.resize(1);
  p.blocks[0].instructions = {i};
  p.stages = {{{BlockId{0}, 0}}};
  return p;
}

TEST(Routing, TheExampleByHand) {
  const Program p = example();
  EXPECT_EQ(routed_rows(p, BufferId{0}, 0), 4);
  EXPECT_EQ(routed_rows(p, BufferId{0}, 1), 4);
  EXPECT_EQ(routed_rows(p, BufferId{1}, 0), 5);
  EXPECT_EQ(routed_rows(p, BufferId{1}, 1), 3);
  EXPECT_EQ(local_bytes(p, BufferId{1}, 0), Bytes{160});
  EXPECT_EQ(local_bytes(p, BufferId{1}, 1), Bytes{96});
  EXPECT_EQ(transient_bytes(p, p.blocks[0].instructions[0], 0), Bytes{504});
  const auto bytes = step_traffic(p, 0);
  EXPECT_EQ(bytes.at({0, 1}), 8);
  EXPECT_EQ(bytes.at({1, 0}), 64);
}

TransformerConfig mixture(std::int64_t sequence, std::int64_t top_k) {
  TransformerConfig c = small_config();
  c.layers = 2;
  c.sequence = sequence;
  c.positions = sequence;
  c.moe.experts = 4;
  c.moe.top_k = top_k;
  c.moe.ffn = 8;
  return c;
}

TEST(Routing, ZipfByHand) {
  Plan plan = base_plan();
  plan.dp = plan.ep = 4;
  plan.global_batch = 4;
  for (const auto& [top_k, rows] :
       {std::pair{1, std::vector<std::int64_t>{12, 6, 4, 3}}, {2, {24, 12, 8, 6}}}) {
    const Program p = with_routing(lowered(build_transformer(mixture(25, top_k)), plan),
                                   routing_source("zipf:1", ""));
    int found = 0;
    for (std::size_t b = 0; b < p.buffers.size(); ++b) {
      const Buffer& buffer = p.buffers[b];
      if (!buffer.routed || buffer.layout.dims[2].atoms.empty()) continue;
      ++found;
      for (std::int64_t rank = 0; rank < 4; ++rank)
        EXPECT_EQ(routed_rows(p, BufferId{b}, rank), 4 * rows[static_cast<std::size_t>(rank)]);
    }
    EXPECT_GT(found, 0);
  }
  // Steeper: an expert gets a token once, so its share of two choices is at most a half.
  const Program p =
      with_routing(lowered(build_transformer(mixture(25, 2)), plan), routing_source("zipf:3", ""));
  EXPECT_EQ(std::vector<std::int64_t>(p.routings.at(0).counts.begin(),
                                      p.routings.at(0).counts.begin() + 2),
            (std::vector<std::int64_t>{25, 18}));
}

/// Runs, feeds the last step's rows back, and compares every rank's memory by category and the
/// bytes on every pair of ranks. False if the plan is infeasible.
bool expect_exact(const Graph& graph, const Plan& wanted, int& differs) {
  Plan single = wanted;
  set_precision(single, "fp32", "");
  const auto plan = complete(graph, single);
  if (!plan) return false;
  const auto program = lower(graph, *plan);
  if (!program) return false;
  SCOPED_TRACE(graph.name + "\n" + to_yaml(*plan));
  const auto results = execute::run_on_both(*program, options_for(graph));
  // By way of the file.
  const std::string file = fmt::format("{}/routing-{}.json", ::testing::TempDir(), ::getpid());
  std::FILE* out = std::fopen(file.c_str(), "w");
  const std::string text = to_json(results[0].routing);
  std::fwrite(text.data(), 1, text.size(), out);
  std::fclose(out);
  const Program routed = with_routing(*program, routing_source(file, "--routing"));
  std::remove(file.c_str());

  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> counted;
  for (const RankMeasurement& r : results[0].ranks) {
    for (const auto& [to, bytes] : r.traffic.bytes_to) {
      if (bytes > 0) counted[{r.rank, to}] += bytes;
    }
  }
  EXPECT_EQ(counted, step_traffic(routed, 2));

  Communication communication(
      load_topology(fmt::format("cpu-host:{} gpus", std::max<std::int64_t>(2, routed.ranks()))));
  SimulateOptions unfolded;
  unfolded.unfolded = true;
  const Timeline t = simulate(routed, communication, unfolded);
  for (std::size_t r = 0; r < results[0].ranks.size(); ++r) {
    const RankMeasurement& m = results[0].ranks[r];
    EXPECT_EQ(t.memory[r].peak, m.last_peak) << "rank " << r;
    for (std::size_t c = 0; c < kCategoryCount; ++c)
      EXPECT_EQ(t.memory[r].at_peak[c], m.last_at_peak[c])
          << "rank " << r << ", " << name(static_cast<Category>(c));
  }
  const Timeline folded = simulate(routed, communication);
  EXPECT_EQ(folded.step, t.step);
  const RankClasses classes = classify(routed, communication);
  for (std::size_t r = 0; r < results[0].ranks.size(); ++r)
    EXPECT_EQ(folded.memory[static_cast<std::size_t>(classes.of_rank[r])].peak, t.memory[r].peak);
  // What a recording is for: balanced experts would give other figures.
  const Timeline balanced = simulate(*program, communication, unfolded);
  for (std::size_t r = 0; r < results[0].ranks.size(); ++r)
    differs += balanced.memory[r].peak != t.memory[r].peak ? 1 : 0;
  return true;
}

TEST(Routing, ARecordingPredictsMemoryAndBytesExactly) {
  const Graph g = mixtral();
  int differs = 0;
  Plan p = base_plan();
  p.global_batch = 4;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.dp = p.ep = 2;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.tp = 2;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.sequence_parallel = true;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.etp = 1;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.pp = 2;
  EXPECT_TRUE(expect_exact(g, p, differs));
  p.strategy = "replicas";
  p = base_plan();
  p.strategy = "replicas";
  p.dp = 3;
  p.global_batch = 6;
  EXPECT_TRUE(expect_exact(g, p, differs));
}

/// Experts with as many rows each, wherever their tokens come from: memory is what is predicted
/// without a recording.
TEST(Routing, BalancedRowsHaveThePredictedMemory) {
  const Graph g = mixtral();
  for (const bool sequence_parallel : {false, true}) {
    for (const int etp : {1, 2}) {
      for (const int cp : {1, 2}) {
        Plan p = base_plan();
        p.global_batch = 4;
        p.tp = p.dp = p.ep = 2;
        p.cp = cp, p.etp = etp;
        p.sequence_parallel = sequence_parallel;
        set_precision(p, "fp32", "");
        const auto plan = complete(g, p);
        if (!plan) continue;
        SCOPED_TRACE(to_yaml(*plan));
        const auto program = lower(g, *plan);
        ASSERT_TRUE(static_cast<bool>(program)) << program.reason();
        execute::Options o = options_for(g);
        o.balanced_rows = true;
        const auto results = execute::run_on_both(*program, o);
        Communication communication(load_topology("cpu-host:8 gpus"));
        SimulateOptions unfolded;
        unfolded.unfolded = true;
        const Timeline t = simulate(*program, communication, unfolded);
        for (std::size_t r = 0; r < results[0].ranks.size(); ++r) {
          EXPECT_EQ(t.memory[r].peak, results[0].ranks[r].peak) << "rank " << r;
          EXPECT_EQ(t.memory[r].at_peak, results[0].ranks[r].at_peak) << "rank " << r;
        }
      }
    }
  }
}

TEST(Routing, RandomPlans) {
  std::mt19937 rng(20261126);
  int run = 0, spread = 0;
  for (int k = 0; k < 1500 && run < 60; ++k) {
    Graph g = random_transformer(rng);
    const Plan p = random_plan(rng);
    const auto routes = [](const Operator& op) {
      return std::holds_alternative<Router>(op.operation);
    };
    if (p.ranks() > 16 || g.name.find("experts 4") == std::string::npos) continue;
    // Of a hybrid's blocks none may have experts.
    if (std::none_of(g.operators.begin(), g.operators.end(), routes)) continue;
    int differs = 0;
    if (!expect_exact(g, p, differs)) continue;
    if (HasFailure()) return;
    ++run;
    // Where one rank has all experts, it has all rows, whoever gets them.
    if (p.ep == 1) continue;
    ++spread;
    EXPECT_GT(differs, 0) << to_yaml(p);
  }
  EXPECT_EQ(run, 60);
  EXPECT_GE(spread, 10);
}

TEST(Routing, WhatDoesNotFitIsSaid) {
  const Graph g = mixtral();
  Plan p = base_plan();
  set_precision(p, "fp32", "");
  p.dp = p.ep = 2;
  p.global_batch = 2;
  const Program program = lowered(g, p);
  RoutingSource s;
  s.recorded = execute::run_on_both(program, options_for(g))[0].routing;
  const auto message = [&](const Program& q, const RoutingSource& from) {
    try {
      with_routing(q, from);
    } catch (const InputError& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message(program, s), "no error");
  Plan more = p;
  more.global_batch = 4;
  EXPECT_THAT(message(lowered(g, more), s),
              ::testing::HasSubstr("of 2 samples a step and the plan has 4; use --global-batch 2"));
  Plan finer = p;
  finer.cp = 2;
  EXPECT_THAT(message(lowered(g, finer), s), ::testing::HasSubstr("cuts sequences at"));
  RoutingSource other = s;
  other.recorded->layers[0].name = "elsewhere";
  EXPECT_THAT(message(program, other), ::testing::HasSubstr("has no layer"));
  other = s;
  other.recorded->layers[0].experts = 8;
  EXPECT_THAT(message(program, other), ::testing::HasSubstr("8 experts in the recording and 4"));
}

}  // namespace
}  // namespace partita
