// cli/patience.h: says on stderr that a long computation goes on.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace partita::cli {

/// While it lives: after 10 seconds, and every minute then, a line that says how long it has been
/// and `why` that may be. Nothing of what takes less.
class Patience {
 public:
  explicit Patience(std::string why);
  ~Patience();
  Patience(const Patience&) = delete;
  Patience& operator=(const Patience&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

/// Of a simulation.
inline constexpr const char* kSimulates =
    "ranks that all differ, as with hashed spines or a placement without order, are played one by "
    "one; fewer micro-batches, layers or devices are faster";

}  // namespace partita::cli
