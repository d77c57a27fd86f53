// tests/simulator/reference_check.h: does a plan train the network that its reference semantics
// say?
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "models/graph.h"
#include "runtime/reference/interpreter.h"
#include "runtime/reference/serial.h"
#include "simulator/lower/lower.h"

namespace partita {

struct CheckResult {
  bool feasible = false;
  std::string reason;
};

/// Lowers, verifies, interprets two steps and compares loss, every gradient and every parameter
/// with the serial network. Values are doubles: sums are reordered, nothing else, so that
/// differences stay within a few thousand roundings of the largest value of each tensor.
inline CheckResult expect_equals_reference(const Graph& graph, const Plan& wanted,
                                           int batch_norm_groups = 1, Program* out = nullptr) {
  using namespace reference;
  constexpr double kTolerance = 4096 * 0x1p-52;
  constexpr std::uint64_t kSeed = 7;
  auto plan = complete(graph, wanted);
  if (!plan) return {false, plan.reason()};
  auto program = lower(graph, *plan);
  if (!program) return {false, program.reason()};
  for (const auto& error : verify(*program)) ADD_FAILURE() << error;
  if (out != nullptr) *out = *program;

  const int micro_batches = program->micro_batches;
  const std::int64_t samples = program->samples;
  const auto replicas = static_cast<std::size_t>(program->mesh.size(program->replicas));
  RunOptions options;
  options.steps = 2;
  options.seed = kSeed;
  options.input = [&](std::size_t input, std::int64_t step, std::int64_t sample,
                      std::int64_t index) {
    return input_value(graph, input, kSeed, step, sample, index);
  };
  options.operator_seed = [&](std::int32_t op) {
    return operator_seed(kSeed, OpId{static_cast<std::size_t>(op)});
  };
  for (std::size_t r = 0; r < replicas; ++r)
    options.parameters.push_back(initial_parameters(graph, kSeed + r));
  const RunResult run = interpret(*program, options);
  EXPECT_LT(run.copies_differ, 1e-7) << "copies of one value differ between ranks";

  for (std::size_t r = 0; r < replicas; ++r) {
    std::vector<Piece> parameters = initial_parameters(graph, kSeed + r);
    std::vector<std::vector<std::vector<double>>> states(graph.parameters.size());
    for (int step = 0; step < options.steps; ++step) {
      const std::int64_t all = samples * micro_batches;
      Inputs inputs = make_inputs(graph, static_cast<std::int64_t>(r + 1) * all, kSeed, step);
      if (r > 0) {
        for (auto& in : inputs.by_tensor) in = input_slice(in, static_cast<int>(r), all);
      }
      const SerialResult serial = serial_step(graph, parameters, inputs, micro_batches, samples,
                                              kSeed, step, batch_norm_groups);
      EXPECT_NEAR(run.losses[static_cast<std::size_t>(step)][r], serial.loss,
                  kTolerance * std::abs(serial.loss))
          << "loss of step " << step;
      for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
        const auto& expected = serial.parameter_gradients[q].values;
        if (!graph.parameters[q].trainable) {
          EXPECT_TRUE(run.gradients[r][q].empty()) << graph.parameters[q].name << " is frozen";
          continue;
        }
        double largest = 1e-6;
        for (const double g : expected) largest = std::max(largest, std::abs(g));
        if (step + 1 == options.steps) {
          const auto& got = run.gradients[r][q];
          if (got.size() != expected.size()) {
            ADD_FAILURE() << graph.parameters[q].name << ": " << got.size() << " gradients for "
                          << expected.size();
            return {true, ""};
          }
          for (std::size_t k = 0; k < got.size(); ++k) {
            if (std::abs(got[k] - expected[k]) > 1e-9 * largest) {
              ADD_FAILURE() << "gradient of " << graph.parameters[q].name << "[" << k << "] is "
                            << got[k] << ", serial " << expected[k];
              return {true, ""};
            }
          }
        }
        states[q].resize(2, std::vector<double>(expected.size(), 0.0));
        std::vector<std::vector<double>*> state{&states[q][0], &states[q][1]};
        optimizer_update(program->optimizer, step, parameters[q].values, expected, state);
      }
    }
    for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
      const auto& got = run.parameters[r][q];
      const auto& expected = parameters[q].values;
      if (got.size() != expected.size()) {
        ADD_FAILURE() << graph.parameters[q].name << " is on no rank";
        continue;
      }
      for (std::size_t k = 0; k < got.size(); ++k) {
        if (std::abs(got[k] - expected[k]) > 1e-7 * std::max(1e-3, std::abs(expected[k]))) {
          ADD_FAILURE() << graph.parameters[q].name << "[" << k << "] is " << got[k]
                        << " after two steps, serial " << expected[k];
          break;
        }
      }
    }
  }
  return {true, ""};
}

}  // namespace partita
