// simulator/engine/simulate.h: (Program, Topology) -> Timeline.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/units.h"
#include "simulator/cost/cost.h"
#include "simulator/program/program.h"
#include "topologies/topology.h"

namespace partita {

/// Ranks that behave alike: same stage, device, local sizes and prices of all they take part in.
struct RankClass {
  int stage = 0;
  std::int64_t representative = 0;
  std::int64_t count = 0;
};

struct RankClasses {
  std::vector<RankClass> classes;
  std::vector<int> of_rank;
};

/// Coarsest stable partition: start from stage, device, local sizes and group prices; split while
/// two ranks of a class see different classes in a group they share. Renaming ranks renames nothing
/// else.
RankClasses classify(const Program& program, Communication& communication);

struct Entry {
  std::int32_t rank_class = 0;
  std::int32_t block = 0;
  std::int32_t instruction = 0;
  std::int32_t micro_batch = 0;
  Ticks start, end;
  Ticks lost{0};           ///< of its work, to what it shared with others
  std::int32_t over = -1;  ///< where it lost most: index into Timeline::resources
};

struct MemoryUse {
  std::array<Bytes, kCategoryCount> at_peak;  ///< by Category
  Bytes peak;
  Bytes saved;  ///< most activations between blocks: what forward passes keep for backward ones
  Bytes resident;       ///< of the peak: what the framework holds beside the program's buffers
  Bytes host_peak;      ///< in the host's memory, for this rank
  int peak_block = -1;  ///< block during which the peak occurs
  std::int32_t peak_micro_batch = -1;
};

/// Memory alive at a class's peak, summed over what belongs together.
struct Alive {
  Category category = Category::activations;
  std::string owner;  ///< "layers.3", or the buffer's name where no block owns it
  Bytes bytes;
  std::int64_t buffers = 0;
};
/// What was there when `use` peaked, largest first: state, and every micro-batch's buffers in
/// flight.
std::vector<Alive> alive_at_peak(const Program& program, const RankClass& rank_class,
                                 const MemoryUse& use);

/// Where one class's compute stream spends the step; every instant in exactly one entry.
struct Breakdown {
  std::map<std::string, Ticks> compute;  ///< by operator kind
  std::map<std::string, Ticks> exposed;  ///< waiting for communication, by axis
  Ticks bubble{0};                       ///< waiting for pipeline neighbours
  Ticks optimizer{0};
  Ticks other{0};
  Ticks total() const;
};

/// What instructions of a class lost to others that used the same at the same time: work they could
/// have done, summed over the step.
struct Contended {
  int rank_class = 0;
  std::string what;      ///< "exposed:dp", "compute:linear", ...
  std::string resource;  ///< "node0.nic0->rail0 and 63 like it", "multiprocessors", "memory"
  Ticks lost;
};

struct Timeline {
  Ticks step;
  std::vector<RankClass> classes;
  std::vector<Breakdown> breakdown;    ///< by class
  std::vector<MemoryUse> memory;       ///< by class
  std::vector<Flops> flops;            ///< by class: executed mathematics of one rank
  int last_class = 0;                  ///< the class that ends last
  std::int64_t instructions = 0;       ///< executed, folded
  std::vector<Entry> entries;          ///< if recorded
  std::vector<Contended> contended;    ///< with Network::flows, most lost first
  std::vector<std::string> resources;  ///< that entries lost work over
};

/// idle: every transfer has its links to itself. flows: what runs at once shares links, memory and
/// multiprocessors (docs/sharing.md).
enum class Network { idle, flows };

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
