// runtime/execute/executor.h: one rank's walk over its instructions, for real.
//
// The third interpreter of a Program (docs/execution.md). A run's ranks meet through a Transport;
// nothing else is shared, so the same executor runs as a thread or as a process.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/execute/device.h"
#include "runtime/reference/interpreter.h"
#include "runtime/transport/transport.h"
#include "simulator/program/measurement.h"
#include "simulator/program/program.h"
#include "simulator/program/routing.h"

namespace partita::execute {

struct Options {
  int steps = 1;
  int warm_up = 0;  ///< steps before these, trained but not timed
  std::uint64_t seed = 1;
  std::string name;  ///< of the program, for messages; empty: it is the only one
  reference::InputValue input;
  /// Element of a parameter before the first step; `linear` row-major over its whole shape.
  std::function<double(std::size_t replica, std::size_t parameter, std::int64_t linear)> initial;
  /// `count` elements of a parameter from `first` on, from storage: what Kernel::read does. Null:
  /// drawn as `initial`.
  std::function<void(std::size_t replica, std::size_t parameter, std::int64_t first,
                     std::int64_t count, float* to)>
      read;
  /// Folder for the shards that Program::sharded_storage reads batches from: each rank writes its
  /// own before a step's clock starts.
  std::string storage;
  std::function<std::uint64_t(std::int32_t op)> operator_seed;
  bool collect = true;     ///< gradients and parameters of all ranks on rank 0
  bool record = false;     ///< start and end of every instruction of every timed step
  /// Of one rank: before all others, a step in which libraries get ready, and steps until this time
  /// is over; a GPU that has idled takes some to get its clock up. Without `collect`: what they
  /// train is not undone.
  double warm_up_s = 0;
  /// After the timed steps so many more of which only the whole is timed: on a device the marks
  /// between instructions take time of their own. Values and memory are those of the steps before.
  int plain_steps = 0;
  /// Between warm-up, of at least a step, and the timed steps so many that the device launches as
  /// one graph, or, where it cannot, as others.
  int captured_steps = 0;
  /// After these so many more of which the device itself writes down what its kernels
  /// took: that costs time, so nothing else is timed of them. Of one rank.
  int recorded_steps = 0;
  bool estimates = false;  ///< what the links expect of collectives, in the result of every rank
  bool routing = false;    ///< rows that went to experts in every timed step, on rank 0
  /// On every rank after each step that all have done: losses by replica, as in `values`, and the
  /// slowest rank's time. Set on all ranks or none: they tell each other between the steps.
  std::function<void(int rank, const std::vector<double>& losses, double slowest_s)> progress;
  /// While a rank draws its parameters: how many elements it has, of how many.
  std::function<void(int rank, std::int64_t drawn, std::int64_t all)> drawing;
  /// Values do not matter, only that they are as dense as a network's at its start: the device
  /// draws parameters from a normal distribution, every step has the first one's inputs, and
  /// updates have a rate of 0, as what learns one batch by heart soon multiplies zeros, at another
  /// clock.
  bool drawn = false;
  /// Of run_alone: nothing is exchanged; what the rank would receive is drawn, too.
  bool alone = false;
  /// What routers choose is put aside: token t of a sample, its number from sample 0 on, has
  /// experts t · k, ..., t · k + k - 1 of E, counted round, and gates of 1 / k. Each expert gets as
  /// many rows as all others where E divides tokens · k.
  bool balanced_rows = false;
  /// Where a rank's tensors lie and who computes on them; null: the host.
  std::function<std::unique_ptr<Device>(int rank)> device;
  /// Nanoseconds of a rank's steady clock; null: this machine's. Tests skew it.
  std::function<std::int64_t(int rank)> clock;
  /// Called before each instruction; tests stop a rank here.
  std::function<void(int rank, std::int64_t step, std::size_t instruction)> before;
};

struct RankResult {
  RankMeasurement measured;
  /// On rank 0, of all ranks: losses by step, gradients of the last step, parameters after it.
  reference::RunResult values;
  std::vector<RankMeasurement> ranks;  ///< on rank 0, by rank
  Routing routing;                     ///< on rank 0, if asked for
  /// This rank's kernels that its device has not, by name: calls.
  std::map<std::string, std::int64_t> fallbacks;
  std::vector<ProductAlgorithm> products;  ///< of this rank's device
  std::vector<LinkEstimate> estimates;
  /// Why the devices' links were left, so that messages passed through the host; empty: they were
  /// not.
  std::string no_links;
  std::string no_graph;  ///< why steps were not launched as graphs; empty: they were, if asked for
  /// Of its device beside that: what libraries, communicators and kernels work in. Other processes
  /// on the device count, too.
  Bytes beside;
  Bytes reserved;  ///< of this rank's device memory: kept for the next request, or in use
};

/// Where a rank is, in words: "step 3, linear forward of mlp.up in block forward 0, micro-batch 1".
/// Instructions are counted from 0 in program order; -1 is the start of a step.
std::string place(const Program& program, int rank, std::int64_t step, std::int64_t instruction);

/// Trains on this rank. Throws PeerError when another rank fails, InputError when the program needs
/// what this backend has not, MachineError, with rank and instruction, when disk or memory are
/// full.
RankResult run_rank(const Program& program, Transport& transport, const Options& options);

/// One rank's program without the others, at its true local shapes: kernels, packing and memory are
/// those of the whole run; all is on one stream, and a collective's or message's time is that of
/// its packing. Rows of experts are `balanced_rows`, since what others would send only they know.
RankResult run_alone(const Program& program, int rank, Options options);

}  // namespace partita::execute
