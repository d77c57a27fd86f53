#include "cli/progress.h"

#include <fmt/format.h>

#include <cstdio>
#include <utility>

namespace partita::cli {

SetupProgress::SetupProgress(std::string what, std::function<double()> seconds)
    : what_(std::move(what)), seconds_(std::move(seconds)) {
  if (!seconds_) {
    seconds_ = [] {
      const auto now = std::chrono::steady_clock::now().time_since_epoch();
      return std::chrono::duration<double>(now).count();
    };
  }
  start_ = seconds_();
  next_ = start_ + 2;
}

std::string SetupProgress::at(std::int64_t done, std::int64_t all) {
  const double now = seconds_();
  if (now < next_ || done <= 0 || done > all) return "";
  next_ = now + 5;
  const double share = static_cast<double>(done) / static_cast<double>(all);
  return fmt::format("progress: {}: {:.0f} %, about {:.0f} s left\n", what_, 100 * share,
                     (now - start_) * (1 - share) / share);
}

StillAtIt::StillAtIt(const std::string& why, Milliseconds first, Milliseconds then)
    : StillAtIt([why] { return why; }, first, then) {}

StillAtIt::StillAtIt(std::function<std::string()> why, Milliseconds first, Milliseconds then) {
  thread_ = std::thread([this, why = std::move(why), first, then] {
    const auto begin = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex_);
    for (Milliseconds next = first;; next += then) {
      if (over_.wait_until(lock, begin + next, [this] { return done_; })) return;
      fmt::print(stderr, "progress: still at it after {:g} s; {}\n",
                 std::chrono::duration<double>(next).count(), why());
      std::fflush(stderr);
    }
  });
}

StillAtIt::~StillAtIt() {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  over_.notify_all();
  thread_.join();
}

}  // namespace partita::cli
