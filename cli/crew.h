// cli/crew.h: who carries a list of programs out, one after the other: threads of this process, or
// the ranks of one run over MPI or sockets.
#pragma once

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "models/graph.h"
#include "runtime/execute/threads.h"
#include "runtime/transport/board.h"

namespace partita::cli {

/// Parameters and inputs of the network from the seed, no steps yet.
execute::Options generated(const Graph& graph, std::uint64_t seed);

/// A program that a crew may be asked to run. The order of a crew's list is the same on all ranks.
struct Task {
  const Graph* graph = nullptr;
  const Program* program = nullptr;
  execute::Options options;
  std::string name;  ///< for messages
};

struct CrewOptions {
  std::string transport = "threads";  ///< threads, mpi or tcp; of the last two every rank makes one
  int ranks = 1;                      ///< of the largest task
  double timeout_s = 30;
  std::string key;  ///< tcp: in words, what all ranks must agree on
};

/// What a rank does on its board, in words: "step 3, all_reduce of w in block forward 0 of gpt dp
/// 2".
std::string place_of_task(const RankState& rank, int r, const std::vector<Task>& tasks);

class Crew {
 public:
  Crew(const CrewOptions& options, std::vector<Task> tasks);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  /// Rank 0 leads: it alone calls run(). The others serve() until the leader's crew ends.
  bool leads() const;
  void serve();
  /// Results of all ranks, on the leader.
  execute::RankResult run(std::size_t task);
  /// This rank gives up: all end with `why`, code 2 for the user's mistakes, else 3. Under MPI it
  /// does not return; over sockets it throws ToldElsewhere where another rank tells the user.
  void abort(const std::exception& why);
  /// May this rank, having failed, still show what was measured?
  bool speaks() const { return !world_ || world_->speaks(); }

 private:
  Transport& part(int ranks);
  execute::RankResult work(std::int64_t task, std::int64_t turn);
  CrewOptions o_;
  std::vector<Task> tasks_;
  std::atomic<std::int64_t> at_work_{-1};            ///< a task
  std::shared_ptr<Board> board_;                     ///< of an own launch
  std::unique_ptr<Transport> world_;                 ///< none for threads
  std::map<int, std::unique_ptr<Transport>> parts_;  ///< its first so many ranks
  std::int64_t last_ranks_ = 0, turn_ = 0;
  bool said_no_links_ = false;
};

}  // namespace partita::cli
