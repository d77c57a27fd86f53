// simulator/engine/memory.h: what a class of ranks holds, and when most of it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"
#include "simulator/engine/classes.h"
#include "simulator/engine/compile.h"
#include "simulator/program/program.h"

namespace partita {

struct MemoryUse {
  std::array<Bytes, kCategoryCount> at_peak;  ///< by Category
  Bytes peak;
  Bytes saved;  ///< most activations between blocks: what forward passes keep for backward ones
  Bytes saved_by_layers;  ///< the same, of what the backward passes of layers read
  Bytes resident;         ///< of the peak: what the framework holds beside the program's buffers
  Bytes host_peak;        ///< in the host's memory, for this rank
  int peak_block = -1;    ///< block during which the peak occurs
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

/// Along the class's calls, in program order. `compiled`: as compiled for it.
MemoryUse memory_use(const Program& program, const RankClass& rank_class,
                     const std::vector<CompiledBlock>& compiled, int compute_capability);

}  // namespace partita
