// runtime/transport/turns.h: which threads run where they are more than cores.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace partita {

/// At most as many ranks run as there are cores, in the order in which they could; who waits for
/// another gives its core to the next. The operating system would let all run in slices of some
/// milliseconds, longer than most steps: whom the others wait for might be the last of them. It
/// also leaves a thread that is woken behind one that works, for as long, while the core of the one
/// that woke it has nothing to do: so a turn of more
/// ranks than cores is on a core of its own.
///
/// A rank that starts holds no core and runs all the same: turns begin when it first waits. Who
/// could run and gets no core for `kPatience` runs without one: a rank may compute for long, or
/// hang.
class Turns {
 public:
  static constexpr std::chrono::milliseconds kPatience{100};

  /// `cores`: numbers of those to take turns on; empty: all that this process may use.
  explicit Turns(int ranks, std::vector<int> cores = {});
  /// `rank` waits until ready() has been called for it and it is its turn; its core is the next
  /// one's. False when nobody called ready() in time, or after stop().
  bool wait(int rank, std::chrono::duration<double> timeout);
  /// What `rank` waits for, or is about to, is there: once for each wait(). Called by another one.
  void ready(int rank);
  /// `rank` need not wait: takes a core if one is free.
  void enter(int rank);
  /// `rank` ends; on its own thread.
  void leave(int rank);
  /// Nobody waits any more.
  void stop();
  /// Does somebody wait for a core only?
  bool wanted() const { return queued_.load(std::memory_order_relaxed) > 0; }
  /// How many wait, for others or for a core.
  int waiting();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kNone = -1;
  struct Place {
    std::condition_variable turn;
    bool waits = false, may_run = false, queues = false;
    int core = kNone, bound = kNone;  ///< the one it has; where its thread must run
    std::thread::native_handle_type thread{};
    bool known = false;       ///< `thread` is
    Clock::time_point since;  ///< it queues
  };
  void give(Place& to, int core);
  void pass_on(Place& from);
  void leave_queue(int rank);
  void bind(Place& place, int core) const;

  std::mutex guard_;
  std::deque<Place> places_;
  std::deque<int> queue_;
  std::atomic<int> queued_{0};
  std::vector<int> idle_;  ///< cores
  std::vector<int> all_;   ///< that this process may use
  bool binds_ = false;     ///< more ranks than cores
  bool stopped_ = false;
};

}  // namespace partita
