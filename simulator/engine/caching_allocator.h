// simulator/engine/caching_allocator.h: what PyTorch's caching allocator reserves for a program.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "base/units.h"
#include "simulator/engine/classes.h"
#include "simulator/program/program.h"

namespace partita {

/// The allocator of PyTorch's c10/cuda/CUDACachingAllocator.cpp with its default settings, on one
/// stream. A request is rounded up to 512 B. Those of at most 1 MiB are cut from segments of 2 MiB,
/// larger ones below 10 MiB from segments of 20 MiB, others get a segment of their own, rounded up
/// to 2 MiB. Freed blocks merge with free neighbours of their segment and are used again, the
/// smallest that is large enough first; what is left of it is split off where it has 512 B, of
/// large blocks more than 1 MiB. Segments go back to the device only when a new one would not fit:
/// then all that are wholly free do.
class CachingAllocator {
 public:
  /// `limit`: what the device has for segments.
  explicit CachingAllocator(Bytes limit = Bytes{INT64_MAX}) : limit_{limit} {}

  using Handle = std::int32_t;
  /// Requires n > 0. Reserves past the limit where nothing can be returned: see fits().
  Handle allocate(Bytes n);
  void free(Handle block);

  Bytes allocated() const { return allocated_; }  ///< rounded requests in use
  Bytes reserved() const { return reserved_; }
  Bytes peak_reserved() const { return peak_reserved_; }
  bool fits() const { return peak_reserved_ <= limit_; }

 private:
  struct Block {
    std::int64_t size = 0;
    Handle before = -1, after = -1;  ///< neighbours of its segment
    bool small = false, free = false;
  };
  using Free = std::set<std::tuple<std::int64_t, Handle>>;

  Handle make(Block block);
  void enter(Handle h) { free_[blocks_[index(h)].small].insert({blocks_[index(h)].size, h}); }
  void leave(Handle h) { free_[blocks_[index(h)].small].erase({blocks_[index(h)].size, h}); }
  static std::size_t index(Handle h) { return static_cast<std::size_t>(h); }
  void absorb(Handle into, Handle other);
  void return_segments();

  std::vector<Block> blocks_;
  std::vector<Handle> unused_;
  std::array<Free, 2> free_;  ///< large, small
  Bytes limit_, allocated_, reserved_, peak_reserved_;
};

/// Our executor's (runtime/execute/memory.h): a request is rounded up to 64 B, and a freed block is
/// kept for the next request of its size.
class BlocksBySize {
 public:
  using Handle = std::int64_t;  ///< a block's size
  /// Requires n > 0.
  Handle allocate(Bytes n);
  void free(Handle block) { ++kept_[block]; }
  Bytes peak_reserved() const { return reserved_; }

 private:
  std::map<std::int64_t, std::int64_t> kept_;  ///< free blocks, by size
  Bytes reserved_;
};
/// What it reserves on a rank of this class, collectives' packing left out.
Bytes reserved_by_us(const Program& program, const RankClass& rank_class);

/// Most that the allocator reserves on a rank of this class, whose device has this compute
/// capability and `limit` for it: the state, then every allocation of a step in the program's
/// order.
Bytes reserved_by(const Program& program, const RankClass& rank_class, int compute_capability,
                  Bytes limit);

}  // namespace partita
