// Every plan that lowers also runs, on real ranks: threads in this process.
#include "runtime/execute/threads.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita::execute {
namespace {

constexpr std::uint64_t kSeed = 7;
constexpr int kSteps = 3;

Plan single_precision(Plan p = base_plan()) {
  set_precision(p, "fp32", "");
  return p;
}

Options options_for(const Graph& graph, int steps) {
  Options o;
  o.steps = steps;
  o.input = [&graph](std::size_t input, std::int64_t step, std::int64_t sample, std::int64_t index) {
    return reference::input_value(graph, input, kSeed, step, sample, index);
  };
  o.initial = [&graph](std::size_t replica, std::size_t q, std::int64_t linear) {
    return reference::initial_value(graph.parameters[q], kSeed + replica, linear);
  };
  o.operator_seed = [](std::int32_t op) {
    return reference::operator_seed(kSeed, OpId{static_cast<std::size_t>(op)});
  };
  return o;
}

void expect_trains(const Graph& graph, const Program& program, int groups,
                   const ThreadOptions& threads = {}) {
  const auto results = run_threads(program, options_for(graph, kSteps), threads);
  EXPECT_EQ(results[0].values.copies_differ, 0) << "copies of one value differ between ranks";
  const auto exact = reference::options_for(graph, program, kSteps, kSeed);
  const auto serial = reference::train_serially(graph, program, exact, groups);
  expect_equal(reference::compare(
      graph, results[0].values, serial,
      reference::tolerance_of_rounding(graph, program, serial, exact)));
}

/// False if the plan is infeasible.
bool expect_good(const Graph& graph, const Plan& wanted, int groups = 1) {
  auto plan = complete(graph, wanted);
  if (!plan) return false;
  const auto program = lower(graph, *plan);
  if (!program) return false;
  SCOPED_TRACE(graph.name + "\n" + to_yaml(*plan));
  expect_trains(graph, *program, groups);
  return true;
}

TEST(Executor, OneRank) {
  EXPECT_TRUE(expect_good(gpt(), single_precision()));
  EXPECT_TRUE(expect_good(llama(), single_precision()));
  EXPECT_TRUE(expect_good(mixtral(), single_precision()));
  EXPECT_TRUE(expect_good(cnn(false), single_precision()));
}

TEST(Executor, DataParallel) {
  Plan p = single_precision();
  p.dp = 3;
  p.global_batch = 6;
  EXPECT_TRUE(expect_good(gpt(), p));
  p.strategy = "dataparallel";
  EXPECT_TRUE(expect_good(gpt(), p));
  p.strategy = "replicas";
  EXPECT_TRUE(expect_good(gpt(), p));
}

TEST(Executor, Spatial) {
  Plan p = single_precision();
  p.strategy = "spatial";
  p.tp = 2;
  p.micro_batch = 2;
  EXPECT_TRUE(expect_good(cnn(true), p));
  p.dp = 3;
  EXPECT_TRUE(expect_good(cnn(true), p));
}

TEST(Executor, RandomPlans) {
  std::mt19937 rng(20261124);
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int run = 0;
  for (int k = 0; k < 400 && run < 120; ++k) {
    const Plan p = single_precision(random_plan(rng));
    if (p.ranks() > 24) continue;
    run += expect_good(graphs[rng() % graphs.size()], p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 60);
}

TEST(Executor, RandomNetworks) {
  std::mt19937 rng(20261125);
  int run = 0;
  for (int k = 0; k < 800 && run < 120; ++k) {
    const Graph g = random_transformer(rng);
    const Plan p = single_precision(random_plan(rng));
    if (p.ranks() > 24) continue;
    run += expect_good(g, p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 60);
}

}  // namespace
}  // namespace partita::execute
