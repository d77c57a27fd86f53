// runtime/reference/compare.h: a plan's run beside the serial network.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/graph.h"
#include "runtime/reference/interpreter.h"
#include "simulator/program/program.h"

namespace partita::reference {

/// How a program's run gets its parameters, data and random numbers, so that the serial network has
/// the same.
RunOptions options_for(const Graph& graph, const Program& program, int steps, std::uint64_t seed);

/// The reference semantics of a synchronous lossless plan: the whole batch in one process, once per
/// independent replica, with the program's optimizer. `batch_norm_groups`: data-parallel ranks,
/// whose local batch norms are imitated.
RunResult train_serially(const Graph& graph, const Program& program, const RunOptions& options,
                         int batch_norm_groups);

struct Comparison {
  struct Step {
    double plan_loss = 0, serial_loss = 0;
  };
  std::vector<Step> steps;  ///< of the first replica
  /// Largest difference over all gradients of the last step and all final parameters, relative to
  /// the largest value of the tensor concerned; the tensor's name.
  double loss_error = 0, gradient_error = 0, parameter_error = 0;
  std::string worst_gradient, worst_parameter;
  /// Of all gradients as one vector, relative to its length; from the nearer of the serial run and
  /// of one that rounds alike, where there is one.
  double gradient_distance = 0;
  double tolerance = 0;
  bool equal = false;
};
/// What differences are relative to: the largest value of the tensor itself, or of all parameters
/// of its operator. Where terms cancel (a key's bias has no effect) a run in fp32 keeps rounding of
/// terms as large as the weight's; in doubles that is no excuse.
enum class RelativeTo { tensor, operators };
Comparison compare(const Graph& graph, const RunResult& run, const RunResult& serial,
                   double tolerance, RelativeTo scale = RelativeTo::operators);

/// More than this a loss may not be off by, nor the distance of all gradients.
constexpr double kMostApart = 0.9;
/// Roundings to 16 bits that a stored value of such a type has behind it: its own, on the other
/// side of a tie (2), its operands' that a kernel keeps in the type (flash attention's
/// probabilities and their slopes, a convolution's gradient: 2), and sums over ranks in the type
/// (4).
constexpr double kNarrowRoundings = 8;

/// Doubles, sums in another order: a few thousand roundings per step, amplified by the steps
/// before.
inline double tolerance_in_double(int steps) { return 1e-9 * steps; }

/// What one rounding of every stored value, whose effect is `d`, lets a run be off by: K + 8 of
/// them for the longest sum K; where values are stored in 16 bits (`half_spacing` of the coarsest
/// such type, relative; else 0) kNarrowRoundings of these and K + 8 of fp32's, if that is less.
double rounding_allows(double d, double longest, double half_spacing);

/// What a run in the plan's own types may differ from the serial network in doubles by: what
/// rounding_allows, its effect measured by interpreting the program with every stored value
/// rounded; of operands in fp8, which are rounded once, twice the effect of that, at least
/// error_of_products (docs/execution.md, "Rounding").
double tolerance_of_rounding(const Graph& graph, const Program& program, const RunResult& serial,
                             const RunOptions& options);

/// What a product of operands in these formats is off by at most, relative to the sum of its terms'
/// sizes: u_a + u_b + u_a u_b with u half a spacing.
inline double error_of_products(EightBits a, EightBits b) {
  const double of_a = spacing(a) / 2, of_b = spacing(b) / 2;
  return of_a + of_b + of_a * of_b;
}

/// What a run in the plan's own types is held to: tolerance_of_rounding, and what may not be
/// exceeded whatever it is. Where rounding itself moves all gradients by more (products in fp8 of a
/// small network), a run may be as far from the serial one, but then has to lie by the
/// interpreter's that rounds alike.
Comparison compare_in_own_types(const Graph& graph, const Program& program, const RunResult& run,
                                const RunResult& serial, const RunOptions& options);

/// Multiply-accumulates of one serial step: the interpreter is for small networks.
double serial_work(const Graph& graph, const Program& program);

}  // namespace partita::reference
