#include "runtime/execute/memory.h"

#include <fmt/format.h>

#include <bit>

#include "base/error.h"
#include "runtime/execute/device.h"

namespace partita::execute {
namespace {

constexpr std::int64_t kGrain = 64;
std::size_t rounded(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + kGrain - 1) / kGrain * kGrain);
}

}  // namespace

Memory::~Memory() { release_kept(); }

void Memory::release_kept() {
  for (auto& [size, blocks] : kept_) {
    for (std::byte* b : blocks) {
      on_host_ ? device_.release_on_host(b) : device_.release(b);
      reserved_ -= Bytes{static_cast<std::int64_t>(size)};
    }
  }
  kept_.clear();
}

std::byte* Memory::take(Category category, std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  count(category, bytes);
  return take_spare(bytes);
}

std::int64_t Memory::roomy(std::int64_t bytes) {
  if (bytes <= 4096) return bytes;
  const auto n = static_cast<std::uint64_t>(bytes);
  const auto step = static_cast<std::int64_t>(std::bit_floor(n) / 8);
  return (bytes + step - 1) / step * step;
}

std::byte* Memory::take_spare(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  const std::size_t size = rounded(bytes);
  auto& kept = kept_[size];
  if (!kept.empty()) {
    std::byte* block = kept.back();
    kept.pop_back();
    return block;
  }
  const auto ask = [&] {
    const auto n = static_cast<std::int64_t>(size);
    return on_host_ ? device_.allocate_on_host(n) : device_.allocate(n);
  };
  std::byte* block = ask();
  if (block == nullptr) {
    // Blocks of other sizes are kept for nothing.
    device_.finish();
    release_kept();
    block = ask();
  }
  if (block == nullptr) {
    throw MachineError(
        fmt::format("{} has no {} bytes left; use fewer ranks on it, a "
                    "smaller micro-batch or more sharding",
                    device_.is_host() || on_host_ ? "this machine" : device_.name(), bytes));
  }
  reserved_ += Bytes{static_cast<std::int64_t>(size)};
  return block;
}

void Memory::count(Category category, std::int64_t bytes) {
  live_[static_cast<std::size_t>(category)] += Bytes{bytes};
  total_ += Bytes{bytes};
  if (total_ > peak_) {
    peak_ = total_;
    at_peak_ = live_;
  }
}

void Memory::give_back(Category category, std::byte* block, std::int64_t bytes) {
  if (block == nullptr) return;
  count(category, -bytes);
  give_back_spare(block, bytes);
}

void Memory::give_back_spare(std::byte* block, std::int64_t bytes) {
  if (block != nullptr) kept_[rounded(bytes)].push_back(block);
}

void Memory::forget_peak() {
  peak_ = total_;
  at_peak_ = live_;
}

}  // namespace partita::execute
