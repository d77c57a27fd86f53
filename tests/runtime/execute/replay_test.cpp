// One rank alone: the memory of the whole run, kernels on ordinary numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "runtime/execute/executor.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/serial.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/runtime/execute/far_device.h"
#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita::execute {
namespace {

constexpr std::uint64_t kSeed = 7;

Options options_for(const Graph& graph) {
  Options o;
  o.steps = 2;
  o.warm_up = 1;
  o.record = true;
  o.collect = false;
  o.balanced_rows = true;
  draw(o, graph, kSeed);
  return o;
}

/// Every rank of the plan, alone and among the others. False if the plan is infeasible.
bool expect_same_memory(const Graph& graph, const Plan& wanted, std::uint64_t seed) {
  auto plan = complete(graph, wanted);
  if (!plan) return false;
  const auto program = lower(graph, *plan);
  if (!program) return false;
  SCOPED_TRACE(graph.name + "\n" + to_yaml(*plan));
  const Options options = options_for(graph);
  const auto together = run_threads(*program, options)[0].ranks;
  for (int rank = 0; rank < program->ranks(); ++rank) {
    SCOPED_TRACE(rank);
    const auto& want = together[static_cast<std::size_t>(rank)];
    FarOptions far;
    far.seed = seed + static_cast<std::uint64_t>(rank);
    for (const Options& o : {options, on_far_devices(options, far)}) {
      const RankMeasurement alone = run_alone(*program, rank, o).measured;
      EXPECT_EQ(alone.rank, rank);
      EXPECT_EQ(alone.last_peak, want.last_peak);
      EXPECT_EQ(alone.last_at_peak, want.last_at_peak);
      EXPECT_EQ(alone.host_peak, want.host_peak);
      EXPECT_EQ(alone.traffic.bytes_to.size(), 0u);
      // The same instructions, in the same order.
      EXPECT_EQ(alone.samples.size(), 2u);
      EXPECT_EQ(alone.samples[0].size(), want.samples[0].size());
      for (std::size_t k = 0; k < alone.samples[0].size(); ++k) {
        EXPECT_EQ(alone.samples[0][k].block, want.samples[0][k].block);
        EXPECT_EQ(alone.samples[0][k].instruction, want.samples[0][k].instruction);
        // One stream: one after the other.
        EXPECT_LE(alone.samples[0][k].start, alone.samples[0][k].end);
        if (k > 0) {
          EXPECT_LE(alone.samples[0][k - 1].end, alone.samples[0][k].start);
        }
      }
    }
  }
  return true;
}

/// What is drawn is not trained: every step of one batch has the first one's loss.
TEST(Replay, DrawnValuesStayAsTheyAre) {
  for (const bool drawn : {false, true}) {
    Plan plan = base_plan();
    set_precision(plan, "fp32", "");
    plan.optimizer.kind = OptimizerKind::adam;
    const Graph g = gpt();
    Options o = options_for(g);
    o.steps = 3;
    o.collect = true;
    o.drawn = drawn;
    const auto losses = run_threads(lowered(g, plan), o)[0].values.losses;
    ASSERT_GE(losses.size(), 3u);
    for (std::size_t s = 1; s < losses.size(); ++s)
      EXPECT_EQ(losses[s][0] == losses[0][0], drawn) << s;
  }
}

TEST(Replay, ARankAloneHasItsMemoryOfTheWholeRun) {
  std::mt19937 rng{20261129};
  const std::vector<Graph> graphs{gpt(), llama(), cnn(false)};
  int run = 0;
  for (int k = 0; k < 300 && run < 25; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() > 8) continue;
    const char* types[] = {"fp32", "bf16", "fp16"};
    set_precision(p, types[rng() % 3], "");
    run += expect_same_memory(graphs[rng() % graphs.size()], p, rng()) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 15);
}

/// Rows of experts are given, so that all ranks together have as many as each alone.
TEST(Replay, ARankAloneHasTheRowsThatOthersWouldSend) {
  std::mt19937 rng{20261130};
  int run = 0;
  for (int k = 0; k < 400 && run < 25; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() > 8 || (p.ep == 1 && rng() % 4 != 0)) continue;
    const char* types[] = {"fp32", "bf16"};
    set_precision(p, types[rng() % 2], "");
    run += expect_same_memory(mixtral(), p, rng()) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 15);
}

/// docs/replay.md: of a sample's tokens each of 4 experts gets half, 2 of 4 being chosen.
TEST(Replay, ItsExpertsAreBalanced) {
  const Graph g = mixtral();
  Plan p = base_plan();
  p.dp = p.ep = 2;
  p.global_batch = 2;
  const Program program = lowered(g, p);
  Options o = options_for(g);
  o.routing = true;
  const Routing routing = run_threads(program, o)[0].routing;
  for (const auto& step : routing.steps) {
    for (const auto& layer : step.counts) {
      for (const std::int64_t n : layer) EXPECT_EQ(n, routing.positions.back() / 2);
      EXPECT_EQ(layer.size(), 2u * 4u) << "samples times experts";
    }
  }
}

TEST(DrawnNumbers, AreNormal) {
  const auto host = host_device();
  for (const ElementType type : {ElementType::fp32, ElementType::bf16, ElementType::fp16}) {
    constexpr std::int64_t n = 20000;
    std::vector<std::byte> stored(4 * n + 64);
    host->draw(stored.data(), type, n, 0.5f, 2, 3);
    Visits visits(*host);
    const float* v = visits.floats(stored.data(), type, n, false);
    double sum = 0, square = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += static_cast<double>(v[i]);
      square += static_cast<double>(v[i]) * static_cast<double>(v[i]);
    }
    // Five standard errors.
    EXPECT_NEAR(sum / n, 0.5, 5 * 2 / std::sqrt(n));
    EXPECT_NEAR(square / n - 0.25, 4, 5 * 4 * std::sqrt(2.0 / n) + 0.05);
  }
}

}  // namespace
}  // namespace partita::execute
