// runtime/execute/executor.h: one rank's walk over its instructions, for real.
//
// The third interpreter of a Program (docs/execution.md). A run's ranks meet through a Transport;
// nothing else is shared, so the same executor runs as a thread or as a process.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/reference/interpreter.h"
#include "runtime/transport/transport.h"
#include "simulator/program/program.h"

namespace partita::execute {

struct Options {
  int steps = 1;
  int warm_up = 0;  ///< steps before these, trained but not timed
  std::uint64_t seed = 1;
  reference::InputValue input;
  /// Element of a parameter before the first step; `linear` row-major over its whole shape.
  std::function<double(std::size_t replica, std::size_t parameter, std::int64_t linear)> initial;
  std::function<std::uint64_t(std::int32_t op)> operator_seed;
  bool record = false;  ///< start and end of every instruction of every timed step
  /// Called before each instruction; tests stop a rank here.
  std::function<void(int rank, std::int64_t step, std::size_t instruction)> before;
};

/// One instruction of one timed step; nanoseconds since the step's common start.
struct Sample {
  std::int32_t block = 0, instruction = 0, micro_batch = 0;
  std::int64_t start = 0, end = 0;
};

/// What one rank measured.
struct RankMeasurement {
  int rank = 0;
  std::vector<double> step_s;                ///< by timed step
  std::vector<std::vector<Sample>> samples;  ///< by timed step, in program order, if recorded
  Bytes peak;
  std::array<Bytes, kCategoryCount> at_peak{};
  Traffic traffic;  ///< of one step, the last
};

struct RankResult {
  RankMeasurement measured;
  /// On rank 0, of all ranks: losses by step, gradients of the last step, parameters after it.
  reference::RunResult values;
};

/// Trains on this rank. Throws PeerError when another rank fails, InputError when the program needs
/// what this backend has not.
RankResult run_rank(const Program& program, Transport& transport, const Options& options);

}  // namespace partita::execute
