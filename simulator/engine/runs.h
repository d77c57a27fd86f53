// simulator/engine/runs.h: instructions of a block each of which waits for the one before.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator/engine/compile.h"

namespace partita {

/// Steps [first, first + parts) of a block, played one after the other whatever else happens.
struct BlockRun {
  std::int32_t first = 0, parts = 0;
  Stream stream = 0;        ///< of the last
  std::int64_t launch = 0;  ///< of the host's time, all of them
  struct Link {
    std::int32_t part = 0;  ///< that waits, or the last one that makes it
    Stream stream = 0;
    bool buffer = false;    ///< a slot, not the stream
    std::int32_t slot = 0;  ///< encoded
  };
  std::vector<Link> waits;  ///< for what is outside, by part, each once
  std::vector<Link> makes;
};

/// By step: does it wait for the one before, and may both be in a run? What waits for other classes
/// or for its host may not.
std::vector<char> joined_to_last(const CompiledBlock& block);

BlockRun run_of(const CompiledBlock& block, std::int32_t first, std::int32_t parts);

}  // namespace partita
