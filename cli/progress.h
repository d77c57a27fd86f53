// cli/progress.h: how far something long is.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace partita::cli {

/// Lines for stderr: none in the first two seconds, then one every five.
class SetupProgress {
 public:
  /// `seconds`: a clock; null: this machine's.
  explicit SetupProgress(std::string what, std::function<double()> seconds = nullptr);
  /// "progress: WHAT: 40 %, about 6 s left"; empty: it is not time for one.
  std::string at(std::int64_t done, std::int64_t all);

 private:
  std::string what_;
  std::function<double()> seconds_;
  double start_, next_;
};

/// Of what can't say how long it will take: while it lives, after `first` and every `then` from
/// there on, "progress: still at it after 10 s; WHY" on stderr.
class StillAtIt {
 public:
  using Milliseconds = std::chrono::milliseconds;
  explicit StillAtIt(const std::string& why, Milliseconds first = std::chrono::seconds(10),
                     Milliseconds then = std::chrono::seconds(60));
  /// `why`: asked for each line, by a thread of its own.
  StillAtIt(std::function<std::string()> why, Milliseconds first, Milliseconds then);
  ~StillAtIt();
  StillAtIt(const StillAtIt&) = delete;
  StillAtIt& operator=(const StillAtIt&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

}  // namespace partita::cli
