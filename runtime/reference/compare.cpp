#include "runtime/reference/compare.h"

#include <algorithm>
#include <cmath>

#include "runtime/reference/interpreter.h"
#include "runtime/reference/serial.h"

namespace partita::reference {
namespace {

double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double x : values) largest = std::max(largest, std::abs(x));
  return largest;
}

/// Relative to the tensor's largest value, or to `floor`: a gradient that is zero in exact
/// arithmetic (a key's bias) is rounding noise on both sides.
double error_of(const std::vector<double>& got, const std::vector<double>& expected, double floor) {
  if (got.size() != expected.size()) return INFINITY;
  double worst = 0;
  const double largest = std::max(largest_of(expected), floor);
  for (std::size_t k = 0; k < got.size(); ++k) {
    const double d = std::abs(got[k] - expected[k]);
    worst = std::max(worst, std::isnan(d) ? INFINITY : d);
  }
  return worst / largest;
}

}  // namespace

double serial_work(const Graph& graph, const Program& program) {
  const NetworkFlops f = network_flops(graph);
  return (f.forward + f.backward_data + f.backward_weight).count / 2 *
         static_cast<double>(program.samples) * program.micro_batches;
}

Comparison compare_with_serial(const Graph& graph, const Program& program, int steps,
                               std::uint64_t seed, int batch_norm_groups) {
  Comparison c;
  // Doubles, sums in another order: a few thousand roundings per step, amplified by the steps
  // before.
  c.tolerance = 1e-9 * steps;
  const auto replicas = static_cast<std::size_t>(program.mesh.size(program.replicas));
  RunOptions options;
  options.steps = steps;
  options.seed = seed;
  options.input = [&](std::size_t input, std::int64_t step, std::int64_t sample,
                      std::int64_t index) {
    return input_value(graph, input, seed, step, sample, index);
  };
  options.operator_seed = [&](std::int32_t op) {
    return operator_seed(seed, OpId{static_cast<std::size_t>(op)});
  };
  for (std::size_t r = 0; r < replicas; ++r)
    options.parameters.push_back(initial_parameters(graph, seed + r));
  const RunResult run = interpret(program, options);

  const std::int64_t all = program.samples * program.micro_batches;
  std::vector<Piece> parameters = initial_parameters(graph, seed);
  std::vector<std::vector<std::vector<double>>> states(graph.parameters.size());
  for (int step = 0; step < steps; ++step) {
    const Inputs inputs = make_inputs(graph, all, seed, step);
    const SerialResult serial = serial_step(graph, parameters, inputs, program.micro_batches,
                                            program.samples, seed, step, batch_norm_groups);
    c.steps.push_back({run.losses[static_cast<std::size_t>(step)][0], serial.loss});
    double floor = 1e-300;
    for (const Piece& g : serial.parameter_gradients)
      floor = std::max(floor, 1e-6 * largest_of(g.values));
    for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
      if (!graph.parameters[q].trainable) continue;
      const auto& g = serial.parameter_gradients[q].values;
      if (step + 1 == steps) {
        const double e = error_of(run.gradients[0][q], g, floor);
        if (!(e <= c.gradient_error))
          c.gradient_error = e, c.worst_gradient = graph.parameters[q].name;
      }
      states[q].resize(2, std::vector<double>(g.size(), 0.0));
      optimizer_update(program.optimizer, step, parameters[q].values, g,
                       {&states[q][0], &states[q][1]});
    }
  }
  double floor = 1e-300;
  for (const Piece& p : parameters) floor = std::max(floor, 1e-6 * largest_of(p.values));
  for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
    const double e = error_of(run.parameters[0][q], parameters[q].values, floor);
    if (!(e <= c.parameter_error))
      c.parameter_error = e, c.worst_parameter = graph.parameters[q].name;
  }
  c.equal = c.gradient_error <= c.tolerance && c.parameter_error <= c.tolerance;
  for (const auto& s : c.steps)
    c.equal = c.equal && std::abs(s.plan_loss - s.serial_loss) <=
                             c.tolerance * std::max(1.0, std::abs(s.serial_loss));
  return c;
}

}  // namespace partita::reference
