// cli/progress.h: how far something long is.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

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

}  // namespace partita::cli
