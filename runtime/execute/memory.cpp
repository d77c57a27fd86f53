#include "runtime/execute/memory.h"

#include <fmt/format.h>

#include <cstdlib>

#include "base/error.h"

namespace partita::execute {
namespace {

constexpr std::size_t kGrain = 64;
std::size_t rounded(std::int64_t bytes) {
  return (static_cast<std::size_t>(bytes) + kGrain - 1) / kGrain * kGrain;
}

}  // namespace

Memory::~Memory() {
  for (auto& [size, blocks] : kept_) {
    for (std::byte* b : blocks) std::free(b);
  }
}

std::byte* Memory::take(Category category, std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  count(category, bytes);
  auto& kept = kept_[rounded(bytes)];
  if (!kept.empty()) {
    std::byte* block = kept.back();
    kept.pop_back();
    return block;
  }
  void* block = std::aligned_alloc(kGrain, rounded(bytes));
  if (block == nullptr) {
    throw MachineError(
        fmt::format("this machine has no {} bytes left; use fewer ranks on it, a "
                    "smaller micro-batch or more sharding",
                    bytes));
  }
  return static_cast<std::byte*>(block);
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
  kept_[rounded(bytes)].push_back(block);
}

void Memory::forget_peak() {
  peak_ = total_;
  at_peak_ = live_;
}

}  // namespace partita::execute
