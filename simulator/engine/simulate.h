// simulator/engine/simulate.h: (Program, Topology) -> Timeline.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.h"
#include "simulator/cost/cost.h"
#include "simulator/engine/breakdown.h"
#include "simulator/engine/classes.h"
#include "simulator/engine/contended_step.h"
#include "simulator/engine/memory.h"
#include "simulator/program/program.h"

namespace partita {

struct Entry {
  std::int32_t rank_class = 0;
  std::int32_t block = 0;
  std::int32_t instruction = 0;
  std::int32_t micro_batch = 0;
  Ticks start, end;
  Ticks lost{0};           ///< of its work, to what it shared with others
  std::int32_t over = -1;  ///< where it lost most: index into Timeline::resources
};

/// What a class's compute stream did or waited for, one after the other without gaps.
struct Span {
  std::int32_t rank_class = 0;
  std::int32_t label = 0;  ///< index into Timeline::labels
  Ticks start, end;
};

struct Timeline {
  Ticks step;
  std::vector<RankClass> classes;
  std::vector<int> class_of_rank;
  std::vector<Breakdown> breakdown;  ///< by class
  std::vector<MemoryUse> memory;     ///< by class
  std::vector<Flops> flops;          ///< by class: executed mathematics of one rank
  int last_class = 0;                ///< the class that ends last
  std::int64_t instructions = 0;     ///< executed, folded
  std::vector<Entry> entries;        ///< if recorded
  /// To slow parts of the cluster; with Network::flows to others, too. Each most lost first.
  std::vector<Contended> contended;
  std::vector<std::string> resources;  ///< that entries lost work over
  std::vector<Span> spans;             ///< if recorded; a class's in order
  std::vector<std::string> labels;     ///< of spans, if recorded: as Contended::what
};

/// A part of a step: what the class that ends last did or waited for, and what its instructions
/// lost over which resource (an instruction's loss lies evenly over its time).
struct TimeSlice {
  Ticks start, end;
  std::map<std::string, Ticks> spent;  ///< by label, as Contended::what; sums to end - start
  std::map<std::string, Ticks> lost;   ///< by resource
};
/// Of a recorded step; what comes after the last instruction (Launches::step) is "other".
std::vector<TimeSlice> over_time(const Timeline& recorded, int slices);

/// idle: every transfer has its links to itself, every kernel its device. beside: kernels get what
/// their own rank's transfers leave of its multiprocessors and memory. flows: what runs at once
/// shares links too (docs/sharing.md).
enum class Network : std::uint8_t { idle, beside, flows };
std::string_view name(Network network);
/// std::nullopt: there is none of that name.
std::optional<Network> network_named(std::string_view name);

struct SimulateOptions {
  Network network = Network::idle;
  bool record = false;
  /// Block calls that begin alike are played once and repeated; off: step by step, for tests.
  bool replay = true;
  /// When a class needs more memory than this, the step is not played: its time stays 0.
  Bytes memory_limit{INT64_MAX};
  /// Every rank its own class: for tests of folding.
  bool unfolded = false;
};

/// Plays the program: instructions of a stream in order, streams ordered by the
/// buffers they share, a collective when all its members are there, a transfer when its sender is.
/// Throws InternalError on a program that cannot finish.
Timeline simulate(const Program& program, Communication& communication,
                  const SimulateOptions& options = {});

/// A program made ready once, to be played under one adjustment after the other. Program and
/// prices must outlive it; with Network::flows nobody else may use the latter while it plays.
class Rehearsal {
 public:
  Rehearsal(const Program& program, Communication& communication,
            const SimulateOptions& options = {});
  Rehearsal(Rehearsal&&) noexcept;
  Rehearsal& operator=(Rehearsal&&) noexcept;
  ~Rehearsal();
  /// What simulate() returns with this adjustment, to the last digit.
  Timeline play(const Adjustment& adjustment) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace partita
