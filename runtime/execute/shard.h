// runtime/execute/shard.h: one rank's share of the training data, in a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/error.h"

namespace partita::execute {

/// A file without a name once it is open, so that nothing of it outlives the rank.
class Shard {
 public:
  Shard() = default;
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;
  ~Shard();

  /// Adds to the end of the file, which the first call makes in `folder` (empty: the system's for
  /// temporary files); returns where. InputError when the folder cannot be written, MachineError
  /// when the disk is full.
  std::int64_t append(const std::string& folder, int rank, const std::byte* data,
                      std::size_t bytes);
  void read(std::int64_t at, std::byte* to, std::size_t bytes) const;
  /// The next append begins a new file's worth.
  void rewind() { end_ = 0; }

 private:
  MachineError full(const std::string& what, int error) const;
  std::string place_;
  int file_ = -1;
  std::int64_t end_ = 0;
};

}  // namespace partita::execute
