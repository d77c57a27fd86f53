#include "cli/patience.h"

#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <utility>

namespace partita::cli {

Patience::Patience(std::string why) {
  thread_ = std::thread([this, why = std::move(why)] {
    const auto begin = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex_);
    for (auto next = std::chrono::seconds(10);; next += std::chrono::seconds(60)) {
      if (over_.wait_until(lock, begin + next, [this] { return done_; })) return;
      fmt::print(stderr, "partita: still at it after {} s: {}\n", next.count(), why);
      std::fflush(stderr);
    }
  });
}

Patience::~Patience() {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  over_.notify_all();
  thread_.join();
}

}  // namespace partita::cli
