// runtime/execute/pieces.h: which elements of a buffer a rank holds, and which of them another rank
// wants.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator/program/program.h"

namespace partita::execute {

/// A rank's piece of a buffer: the product of ascending index lists, and of a ZeRO shard a range of
/// that product's row-major order.
struct Box {
  std::vector<std::vector<std::int64_t>> index;
  bool flat = false;
  Range range;       ///< of the row-major positions, where flat
  bool held = true;  ///< false: the layout's root excludes this rank

  std::int64_t dense() const;     ///< product of the list lengths
  std::int64_t elements() const;  ///< that are in memory; 0 where not held
};
Box box_of(const Program& program, BufferId buffer, std::int64_t rank);

/// Contiguous elements of a piece in memory.
struct Run {
  std::int64_t offset = 0, count = 0;
  friend bool operator==(const Run&, const Run&) = default;
};

/// Where in `piece` the elements lie that `wanted` holds too, in row-major order of the global
/// index. Shards are compared by position in what both would hold whole.
std::vector<Run> section(const Box& piece, const Box& wanted);
std::int64_t count(const std::vector<Run>& runs);

}  // namespace partita::execute
