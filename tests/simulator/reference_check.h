// tests/simulator/reference_check.h: does a plan train the network that its reference semantics
// say?
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "models/graph.h"
#include "runtime/reference/compare.h"
#include "simulator/lower/lower.h"

namespace partita {

struct CheckResult {
  bool feasible = false;
  std::string reason;
};

inline void expect_equal(const reference::Comparison& c) {
  EXPECT_TRUE(c.equal) << "loss off by " << c.loss_error << ", gradient of " << c.worst_gradient
                       << " by " << c.gradient_error << ", " << c.worst_parameter << " by "
                       << c.parameter_error << "; tolerance " << c.tolerance;
}

/// Lowers, verifies, interprets a few steps and compares loss, every gradient and every parameter
/// with the serial network's.
inline CheckResult expect_equals_reference(const Graph& graph, const Plan& wanted,
                                           int batch_norm_groups = 1, Program* out = nullptr,
                                           int steps = 2) {
  constexpr std::uint64_t kSeed = 7;
  auto plan = complete(graph, wanted);
  if (!plan) return {false, plan.reason()};
  auto program = lower(graph, *plan);
  if (!program) return {false, program.reason()};
  for (const auto& error : verify(*program)) ADD_FAILURE() << error;
  if (out != nullptr) *out = *program;
  const auto options = reference::options_for(graph, *program, steps, kSeed);
  const auto run = reference::interpret(*program, options);
  EXPECT_LT(run.copies_differ, 1e-7) << "copies of one value differ between ranks";
  for (const auto& of_replica : run.gradients) {
    for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
      EXPECT_EQ(of_replica[q].empty(), !graph.parameters[q].trainable) << graph.parameters[q].name;
    }
  }
  const auto c = reference::compare(
      graph, run, reference::train_serially(graph, *program, options, batch_norm_groups), 1e-9,
      reference::RelativeTo::tensor);
  expect_equal(c);
  // A loss is one sum: a few thousand roundings.
  for (const auto& step : c.steps)
    EXPECT_NEAR(step.plan_loss, step.serial_loss, 4096 * 0x1p-52 * std::abs(step.serial_loss));
  return {true, ""};
}

}  // namespace partita
