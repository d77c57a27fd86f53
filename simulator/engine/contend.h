// simulator/engine/contend.h: tasks with precedences, on shared resources.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "simulator/engine/sharing.h"

namespace partita {

/// What tasks of one kind use while they run. Rates are of work: 1 is as fast as alone.
struct Usage {
  std::vector<Demand> demands;  ///< amounts per second of work at full speed
  double weight = 1;
  /// Parts of capacities that are theirs as long as they run, whatever their rate.
  std::vector<std::pair<ResourceId, double>> held;
};

/// `fixed` picoseconds, then `work` picoseconds of work at the rate it gets; not before `earliest`.
struct Task {
  std::int64_t fixed = 0, work = 0;
  std::int32_t usage = -1;  ///< -1: nothing that is shared
  std::int64_t earliest = 0;
  std::int32_t chain = -1;  ///< what it consists of instead of `fixed` and `work`
};

enum class Precedence : std::uint8_t {
  end_to_start,    ///< begins when the other has ended
  start_to_start,  ///< begins when the other has begun
  end_to_end       ///< does not end before the other
};

/// Why a task took longer than alone.
struct Loss {
  std::int32_t task = 0;
  std::int32_t part = 0;   ///< of its chain
  ResourceId resource;     ///< that bound it
  std::int64_t ticks = 0;  ///< of work that it could have done meanwhile
};

/// Tasks in the order of their numbers; precedences from any to any, without a cycle.
class Contention {
 public:
  std::int32_t add(const Task& task);
  /// A chain, for Task::chain: parts each of which begins when the one before has ended, not before
  /// its `earliest` after the task's. While nothing else uses what any of them does, a chain is one
  /// event, its end; what comes into its way finds the part that is running (docs/sharing.md, "In
  /// chains").
  std::int32_t add_chain(std::vector<Task> parts);
  void not_before(std::int32_t task, std::int64_t time);
  void order(std::int32_t first, std::int32_t then, Precedence precedence);
  std::size_t size() const { return tasks_.size(); }

  struct Result {
    std::vector<std::int64_t> start, end;  ///< picoseconds, by task
    std::vector<Loss> losses;              ///< by task, part and resource, in order
    struct Stretched {
      std::int32_t task = 0, part = 0;
      std::int64_t ticks = 0;
    };
    std::vector<Stretched> stretched;  ///< parts of chains that took longer than alone
    std::int64_t events = 0;
  };
  /// Plays them on `sharing`, which has the usages' resources. InternalError if some never begin
  /// (a cycle); InputError if some never end (a failed link) or end after 106 days.
  Result play(Sharing& sharing, const std::vector<Usage>& usages) const;

  struct Chain {
    std::vector<Task> parts;
    std::vector<std::int64_t> begins;  ///< of each part, alone, from the first's; then the end
    std::vector<std::int64_t> lead;    ///< what the parts from each on need before begins[]
    bool bounded = true;               ///< its numbers are exact, in ticks and as doubles
  };

 private:
  struct Edge {
    std::int32_t next = -1, to = 0;
    Precedence precedence = Precedence::end_to_start;
  };
  std::vector<Task> tasks_;
  std::vector<std::int32_t> first_edge_;
  std::vector<std::int32_t> starts_after_, ends_after_;  ///< how many it waits for
  std::vector<Edge> edges_;
  std::vector<Chain> chains_;
};

}  // namespace partita
