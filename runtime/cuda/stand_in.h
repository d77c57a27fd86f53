// runtime/cuda/stand_in.h: a kernel that does to others what a transfer of NCCL's does, where there
// is none (docs/calibration.md, "Slowdown"). Over any lanes and clock, so that it is tested on the
// host.
#pragma once

#include "runtime/cuda/machine.h"

namespace partita::cuda {

/// Bytes that a block copies before it looks at the clock: at kStandInRate some 4 us.
inline constexpr std::int64_t kStandInChunk = 64 << 10;
/// Of a block: so much shared memory that no large product's fits beside it on a multiprocessor.
inline constexpr int kStandInThreads = 512, kStandInShared = 96 << 10;

/// Copies `bytes`, a multiple of 16, in chunks: block b of `blocks` those of number b, b + blocks,
/// ... Its k-th is over no sooner than k · `nanoseconds` after its start: until then it spins, as
/// NCCL's blocks do for their peers.
struct StandIn {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t bytes = 0, blocks = 1;
  double nanoseconds = 0;  ///< of a chunk

  /// Lane `lane` of `lanes`; `clock()`: nanoseconds.
  template <class Clock>
  PARTITA_LANE void operator()(std::int64_t block, std::int64_t lane, std::int64_t lanes,
                               Clock clock) const {
    const std::int64_t start = clock();
    std::int64_t done = 0;
    for (std::int64_t at = block * kStandInChunk; at < bytes; at += blocks * kStandInChunk) {
      const std::int64_t end = at + kStandInChunk < bytes ? at + kStandInChunk : bytes;
      for (std::int64_t i = at + 16 * lane; i < end; i += 16 * lanes)
        store_sixteen(to + i, load_sixteen(from + i));
      ++done;
      while (static_cast<double>(clock() - start) < static_cast<double>(done) * nanoseconds) {
      }
    }
  }
};

}  // namespace partita::cuda
