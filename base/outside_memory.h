// base/outside_memory.h: a device's memory that its allocator does not give out.
#pragma once

#include <map>

#include "base/units.h"

namespace partita {

/// By what has it; 0: nothing, or not known. How each is measured: docs/calibration.md, "Memory".
struct OutsideMemory {
  Bytes context;        ///< of a process, as it starts
  Bytes kernels;        ///< loaded when first called, and whatever the others do not name
  Bytes libraries;      ///< handles of cuBLASLt and cuDNN
  Bytes workspace;      ///< of streams, for libraries and kernels
  Bytes communicators;  ///< a rank's, all together
  /// Of one communicator, once a collective has run in it, by its ranks.
  std::map<int, Bytes> by_ranks;

  Bytes total() const { return context + kernels + libraries + workspace + communicators; }
  friend bool operator==(const OutsideMemory&, const OutsideMemory&) = default;
};

}  // namespace partita
