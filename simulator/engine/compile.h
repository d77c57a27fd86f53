// simulator/engine/compile.h: a program's blocks as the engine plays them, priced for each class.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/breakdown.h"
#include "simulator/engine/classes.h"
#include "simulator/program/program.h"

namespace partita {

/// What of an adjustment stretches a time.
enum class Stretch : std::uint8_t {
  nothing,
  products,
  memory,
  optimizer,
  inside,
  between,
  across_cards
};
constexpr std::size_t kStretches = 7;

/// What a step takes as the profiles have it: stretched, `time` and `then` one after the other at
/// the device's `speed`, and `beside`.
struct Price {
  Stretch of_time = Stretch::nothing, of_then = Stretch::nothing;
  Seconds time{0}, then{0};
  double speed = 1;
  std::int64_t beside = 0;  ///< ticks
  std::int64_t every = 1;   ///< its share of each step, of what runs in one of so many
  Seconds launch{0};        ///< of the host's time
};

/// An instruction as the engine needs it: few numbers, no vectors.
struct Step {
  Kind kind = Kind::compute;
  Stream stream = 0;
  bool after_compute = false;
  bool host_waits = false;  ///< for the compute stream and what this reads, before it launches it
  /// Of a receive: the host waits until it is there, where that is modelled; it is.
  bool host_may_join = false, host_joins = false;
  std::int32_t instruction = 0;
  std::int64_t ticks = 0;   ///< as stretched
  std::int64_t launch = 0;  ///< of the host's time, as stretched
  /// From the launch of what was played before until its own: `launch`, but for steps that are
  /// played out of the order in which the host launches them.
  std::int64_t until_launched = 0;
  std::int32_t at = 0;                     ///< place in that order, in its block
  std::int32_t first_wait = 0, waits = 0;  ///< into Compiled::slots: buffers made on other streams
  std::int32_t first_mark = 0, marks = 0;  ///< slots this makes
  std::int32_t label = 0;                  ///< for the breakdown
  std::int32_t message = -1;
  bool of_step = false;  ///< the message goes once a step, not once a micro-batch
  std::int32_t peer_class = -1;
  std::int32_t meeting = -1;  ///< of several classes: into Compiled::meetings
  std::int64_t beside = 0;    ///< from a send's start until its receiver may take the message
  double share_of_core = 1;   ///< of `ticks`, where ranks share cores
};

/// A block for one class of ranks.
struct CompiledBlock {
  std::vector<Step> steps;
  std::vector<Price> prices;  ///< of steps
  std::vector<std::int32_t> slots;
  std::int64_t host_net = 0, host_rise = 0;
  std::int64_t net = 0, rise = 0;  ///< memory: change over the block, highest point above its start
  std::int64_t net_saved = 0;      ///< of `net`: activations
  std::int64_t net_layers = 0;     ///< of `net_saved`: what the backward passes of layers read
  // Blocks repeat once per micro-batch, mostly from the same relative state: then so does what they
  // do.
  bool repeats = false;  ///< every step is ordered after the compute stream's position at the start
  std::size_t receives = 0;            ///< leading steps, played each time
  std::int64_t launch = 0;             ///< of all steps after the receives, as stretched
  bool host_waits = false;             ///< in one of them
  std::vector<Stream> streams;         ///< used after the receives, compute first
  std::vector<std::int32_t> arrives;   ///< slots that the receives make
  std::vector<std::int32_t> external;  ///< other slots read before the block makes them, sorted
};

struct Compiled {
  /// Classes whose ranks are members of one collective.
  struct Meeting {
    std::vector<int> classes;  ///< ascending
    int tie = -1;              ///< they meet in different blocks
  };
  std::vector<std::vector<CompiledBlock>> blocks;  ///< [class][block]; empty where it has no calls
  std::vector<std::vector<std::int32_t>> must_mark;  ///< by class, encoded slots, sorted
  std::vector<Flops> flops;                          ///< by class: of one rank, in one step
  std::vector<std::size_t> slots_on_stage;
  std::vector<Meeting> meetings;
};

/// Prices every instruction once for each class. What steps take is 0 until it is stretched.
Compiled compile(const Program& program, Communication& communication, const RankClasses& classes,
                 Labels& labels);

/// Puts transfers, and what else is not on the compute stream, before kernels of their block that
/// they don't wait for, so that a kernel meets all transfers that run beside it. No time depends on
/// that order, but for what gives way to transfers.
void play_transfers_first(Compiled& compiled);

/// What steps take and the host needs to launch them, as `adjustment` says.
void stretch(Compiled& compiled, const Program& program, const std::vector<double>& spreads,
             const Adjustment& adjustment);

/// Classes of the group's ranks, ascending.
std::vector<int> classes_in(const RankClasses& classes, const std::vector<std::int64_t>& group);

}  // namespace partita
