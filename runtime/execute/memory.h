// runtime/execute/memory.h: one rank's memory, counted by category.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "simulator/program/program.h"

namespace partita::execute {

class Device;

/// Counts what is asked for, and keeps freed blocks for the next request of their size, so that a
/// step in the steady state asks the device for none. Not thread-safe: one per rank.
class Memory {
 public:
  /// The device's memory, or `on_host` what it copies to on the host.
  Memory(Device& device, bool on_host) : device_(device), on_host_(on_host) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  /// Aligned to 64 bytes; nullptr for 0 bytes. MachineError where the machine has no more.
  std::byte* take(Category category, std::int64_t bytes);
  void give_back(Category category, std::byte* block, std::int64_t bytes);
  /// Counts memory that the caller has from elsewhere; negative when it is gone.
  void count(Category category, std::int64_t bytes);

  /// What to ask for where sizes differ from step to step, so that blocks of one serve another: the
  /// next eighth of a power of two, from 4 KiB on.
  static std::int64_t roomy(std::int64_t bytes);

  /// The same without counting: what a kernel needs for a moment.
  std::byte* take_spare(std::int64_t bytes);
  void give_back_spare(std::byte* block, std::int64_t bytes);

  /// Of the device, kept blocks included.
  Bytes reserved() const { return reserved_; }
  Bytes now() const { return total_; }
  Bytes peak() const { return peak_; }
  const std::array<Bytes, kCategoryCount>& at_peak() const { return at_peak_; }
  void forget_peak();

  /// Gives blocks that are kept back to the device, when it is done with all that is queued.
  void release_kept();

 private:
  std::array<Bytes, kCategoryCount> live_{}, at_peak_{};
  Device& device_;
  bool on_host_;
  Bytes total_, peak_, reserved_;
  std::map<std::size_t, std::vector<std::byte*>> kept_;
};

}  // namespace partita::execute
