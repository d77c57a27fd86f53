// cli/crew.h: who carries a list of programs out, one after the other: threads of this process, or
// the ranks of one MPI run.
#pragma once

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "models/graph.h"
#include "runtime/execute/threads.h"

namespace partita::cli {

/// Parameters and inputs of the network from the seed, no steps yet.
execute::Options generated(const Graph& graph, std::uint64_t seed);

/// A program that a crew may be asked to run. The order of a crew's list is the same on all ranks.
struct Task {
  const Graph* graph = nullptr;
  const Program* program = nullptr;
  execute::Options options;
};

class Crew {
 public:
  /// `transport`: "threads" or "mpi"; under MPI every rank of the run makes one. `ranks`: of the
  /// largest task.
  Crew(const std::string& transport, int ranks, double timeout_s, std::vector<Task> tasks);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  /// Rank 0 leads: it alone calls run(). The others serve() until the leader's crew ends.
  bool leads() const;
  void serve();
  /// Results of all ranks, on the leader.
  execute::RankResult run(std::size_t task);
  /// This rank gives up: all end with `why`, code 2 for the user's mistakes, else 3. Returns for
  /// threads only.
  void abort(const std::exception& why);

 private:
  Transport& part(int ranks);
  double timeout_s_;
  std::vector<Task> tasks_;
  std::unique_ptr<Transport> world_;                 ///< MPI only
  std::map<int, std::unique_ptr<Transport>> parts_;  ///< its first so many ranks
  std::int64_t last_ranks_ = 0;
};

}  // namespace partita::cli
