// runtime/reference/interpreter.h: executes a Program on all ranks in lock step, one thread,
// doubles.
//
// This is the mathematics of a plan: no clock, no transport. Collectives are carried out from what
// their layouts mean - global indices - so a wrong layout, a missing sum or a short halo shows as a
// wrong number.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "runtime/reference/kernels.h"
#include "simulator/program/program.h"

namespace partita::reference {

/// Value of network input `input` of global sample `sample` at `index` (row-major within one
/// sample).
using InputValue = std::function<double(std::size_t input, std::int64_t step, std::int64_t sample,
                                        std::int64_t index)>;

struct RunOptions {
  int steps = 1;
  std::uint64_t seed = 1;
  InputValue input;
  /// Round every stored value to its buffer's type, and the operands of products to the type they
  /// are computed in: the plan's precision. Otherwise everything is a double.
  bool round = false;
  bool round_operands = true;  ///< false with `round`: stored values alone
  /// What is cast to be sent goes to the farther of the two values beside it, as it may where a
  /// run's own rounding has taken it past the middle.
  bool casts_past_ties = false;
  /// Key of an operator's random numbers; without it all operators use `seed`.
  std::function<std::uint64_t(std::int32_t op)> operator_seed;
  /// Whole initial parameters, by replica (one entry unless the program has independent replicas),
  /// then parameter.
  std::vector<std::vector<Piece>> parameters;
};

struct RunResult {
  /// losses[step][replica]: mean over the global batch.
  std::vector<std::vector<double>> losses;
  /// Of the last step, complete gradients by replica and parameter (empty values: frozen).
  std::vector<std::vector<std::vector<double>>> gradients;
  /// After the last step.
  std::vector<std::vector<std::vector<double>>> parameters;
  /// Largest relative difference between copies of one gradient or parameter on different ranks.
  double copies_differ = 0;
};

/// What `rank` works on of an operator, at the first step and micro-batch; shared by interpreter
/// and executor.
Context context_of(const Program& program, std::int32_t op, std::uint64_t seed, std::int64_t rank);

/// Each summand of the loss counts once: along atoms that are neither owed, nor replicas, nor the
/// pipeline's only coordinate 0.
bool counts_loss(const Program& program, const Buffer& loss, std::int64_t rank);

/// What gradients are multiplied by, given the sum of all their squares.
double clip_factor(const Optimizer& optimizer, double square_sum);

/// `state`: scale, good steps in a row, updates so far. After a step whose gradients overflowed (a
/// dynamic scale skips it) or did not.
template <class T>
void adapt_loss_scale(const LossScale& l, bool overflow, T* state) {
  if (!l.dynamic) {
    state[2] += 1;
    return;
  }
  if (overflow) {
    state[0] /= 2;
    state[1] = 0;
    return;
  }
  state[1] += 1;
  state[2] += 1;
  if (state[1] >= static_cast<T>(l.growth_interval)) state[0] *= 2, state[1] = 0;
}

/// Throws InternalError when the program does what verify() forbids or a value is not where its
/// layout says.
RunResult interpret(const Program& program, const RunOptions& options);

/// One update in place; `states`: momentum (sgd), first and second moment (adam), as PyTorch's SGD
/// and AdamW.
void optimizer_update(const Optimizer& optimizer, std::int64_t step, std::vector<double>& parameter,
                      const std::vector<double>& gradient,
                      const std::vector<std::vector<double>*>& states);

}  // namespace partita::reference
