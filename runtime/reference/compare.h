// runtime/reference/compare.h: a plan's run beside the serial network.
#pragma once

#include <cstdint>
#include <vector>

#include "models/graph.h"
#include "simulator/program/program.h"

namespace partita::reference {

struct Comparison {
  struct Step {
    double plan_loss = 0, serial_loss = 0;
  };
  std::vector<Step> steps;
  /// Largest difference over all gradients of the last step and all final parameters, relative to
  /// the largest value of the tensor concerned; the tensor's name.
  double gradient_error = 0, parameter_error = 0;
  std::string worst_gradient, worst_parameter;
  double tolerance = 0;
  bool equal = false;
};

/// Trains `steps` steps of synthetic data under the program and serially, with the program's
/// optimizer. `batch_norm_groups`: data-parallel ranks, whose local batch norms the serial run
/// imitates.
Comparison compare_with_serial(const Graph& graph, const Program& program, int steps,
                               std::uint64_t seed, int batch_norm_groups);

/// Multiply-accumulates of one serial step: the interpreter is for small networks.
double serial_work(const Graph& graph, const Program& program);

}  // namespace partita::reference
