// runtime/execute/threads.h: all ranks of a run as threads of this process.
#pragma once

#include <functional>
#include <vector>

#include "runtime/execute/executor.h"

namespace partita::execute {

struct ThreadOptions {
  double timeout_s = 10;                                            ///< without progress of a peer
  std::function<Algorithm(CollectiveKind, int members)> algorithm;  ///< null: the defaults
};

/// By rank. If one rank fails all end, and the first failure is thrown.
std::vector<RankResult> run_threads(const Program& program, const Options& options,
                                    const ThreadOptions& threads = {});

}  // namespace partita::execute
