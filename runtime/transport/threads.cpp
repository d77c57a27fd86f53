// Ranks as threads of one process: a mailbox per pair of ranks and tag, guarded by one lock per
// receiver. Where they are more than cores, they take turns (turns.h).
#include <fmt/format.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <thread>

#include "base/error.h"
#include "runtime/transport/transport.h"
#include "runtime/transport/turns.h"

namespace partita {

class ThreadHub {
 public:
  ThreadHub(int ranks, double timeout_s, std::function<Algorithm(CollectiveKind, int)> algorithm)
      : boxes(static_cast<std::size_t>(ranks)),
        timeout(timeout_s),
        turns(ranks),
        algorithm_(std::move(algorithm)) {}

  using Letter = std::vector<std::byte>;
  struct Box {
    std::mutex guard;
    std::map<std::pair<int, std::int64_t>, std::deque<Letter>> letters;  // by sender and tag
    std::string doing = "starting";
    bool sleeps = false;                 ///< until the letter that `waits_for` and `tag` name
    int waits_for = -1;                  ///< the rank whose letter this one waits for
    std::int64_t tag = 0;                ///< of that letter
    std::atomic<std::uint64_t> came{0};  ///< letters so far: read without the lock
  };

  /// Looks for `done` for a moment before the thread sleeps: waking up costs a system call of the
  /// other and some ten microseconds, longer than most waits. Not when somebody else could use the
  /// core: it might be the one that is waited for.
  template <class F>
  void look(F done) const {
    constexpr auto kLooking = std::chrono::microseconds(50);
    const auto start = std::chrono::steady_clock::now();
    for (int k = 1; !done() && !turns.wanted(); ++k) {
      if (k % 64 == 0) ::sched_yield();  // whoever else uses this machine
      if (k % 16 == 0 && std::chrono::steady_clock::now() - start > kLooking) return;
    }
  }

  const Expansion& expansion(CollectiveKind kind, int n) {
    const std::lock_guard<std::mutex> lock(guard);
    const Algorithm a = algorithm_ ? algorithm_(kind, n) : default_algorithm(kind);
    auto& e = expansions_[{kind, a, n}];
    if (!e) e = std::make_unique<Expansion>(on_members(expand(kind, a, n)));
    return *e;
  }
  std::string what_is_doing(int rank) {
    Box& box = boxes[static_cast<std::size_t>(rank)];
    const std::lock_guard<std::mutex> lock(box.guard);
    return box.doing;
  }
  /// Who holds up `rank`: those that wait for others are followed to one that does not.
  int culprit(int rank) {
    std::set<int> seen;
    while (seen.insert(rank).second) {
      Box& box = boxes[static_cast<std::size_t>(rank)];
      const std::lock_guard<std::mutex> lock(box.guard);
      if (box.waits_for < 0) return rank;
      rank = box.waits_for;
    }
    return rank;
  }
  void stop(const std::string& reason) {
    {
      const std::lock_guard<std::mutex> lock(guard);
      if (failure.empty()) failure = reason;
    }
    turns.stop();
  }
  std::string failed() {
    const std::lock_guard<std::mutex> lock(guard);
    return failure;
  }

  std::vector<Box> boxes;
  std::chrono::duration<double> timeout;
  Turns turns;
  std::mutex guard;
  std::set<int> at_barrier, asleep;  ///< there
  std::atomic<std::int64_t> barriers{0};
  std::string failure;

 private:
  std::function<Algorithm(CollectiveKind, int)> algorithm_;
  std::map<std::tuple<CollectiveKind, Algorithm, int>, std::unique_ptr<Expansion>> expansions_;
};

namespace {

class ThreadTransport final : public Transport {
 public:
  ThreadTransport(std::shared_ptr<ThreadHub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~ThreadTransport() override { hub_->turns.leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(hub_->boxes.size()); }
  std::string name() const override { return "threads"; }
  bool one_clock() const override { return true; }

  void send(int to, std::int64_t tag, const void* data, std::size_t bytes) override {
    ThreadHub::Letter letter(bytes);
    if (bytes > 0) std::memcpy(letter.data(), data, bytes);
    traffic_.bytes_to[to] += static_cast<std::int64_t>(bytes);
    ++traffic_.messages;
    ThreadHub::Box& box = hub_->boxes[static_cast<std::size_t>(to)];
    const std::lock_guard<std::mutex> lock(box.guard);
    box.letters[{rank_, tag}].push_back(std::move(letter));
    box.came.fetch_add(1, std::memory_order_release);
    if (!box.sleeps || box.waits_for != rank_ || box.tag != tag) return;
    box.sleeps = false;
    hub_->turns.ready(to);
  }

  void receive(int from, std::int64_t tag, void* data, std::size_t bytes) override {
    ThreadHub::Box& box = hub_->boxes[static_cast<std::size_t>(rank_)];
    std::unique_lock<std::mutex> lock(box.guard);
    auto& queue = box.letters[{from, tag}];
    box.waits_for = from;
    box.tag = tag;
    while (queue.empty()) {
      const std::uint64_t before = box.came.load(std::memory_order_relaxed);
      lock.unlock();
      hub_->look([&] { return box.came.load(std::memory_order_acquire) != before; });
      lock.lock();
      if (box.came.load(std::memory_order_relaxed) == before) break;
    }
    while (queue.empty()) {
      box.sleeps = true;
      lock.unlock();
      const bool came = hub_->turns.wait(rank_, hub_->timeout);
      lock.lock();
      box.sleeps = false;
      if (came) continue;
      if (!queue.empty()) break;
      const std::string mine = box.doing;
      lock.unlock();
      if (const std::string failure = hub_->failed(); !failure.empty()) throw PeerError(failure);
      const int culprit = hub_->culprit(from);
      throw PeerError(fmt::format(
          "rank {} waits in {} for rank {}, {} has been in {} for {:.0f} s", rank_, mine, from,
          culprit == from ? std::string("which") : fmt::format("which waits too; rank {}", culprit),
          hub_->what_is_doing(culprit), hub_->timeout.count()));
    }
    box.waits_for = -1;
    const ThreadHub::Letter letter = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    PARTITA_ASSERT(letter.size() == bytes, fmt::format("rank {} wants {} bytes of rank {}, got {}",
                                                       rank_, bytes, from, letter.size()));
    if (bytes > 0) std::memcpy(data, letter.data(), bytes);
  }

  void collective(const CollectiveCall& call) override {
    execute_steps(*this, call, hub_->expansion(call.kind, static_cast<int>(call.group->size())));
  }

  void barrier() override {
    std::unique_lock<std::mutex> lock(hub_->guard);
    hub_->at_barrier.insert(rank_);
    if (hub_->at_barrier.size() == hub_->boxes.size()) {
      hub_->at_barrier.clear();
      ++hub_->barriers;
      hub_->turns.enter(rank_);
      for (const int r : hub_->asleep) hub_->turns.ready(r);
      hub_->asleep.clear();
      return;
    }
    const std::int64_t now = hub_->barriers;
    lock.unlock();
    hub_->look([&] { return hub_->barriers.load(std::memory_order_acquire) > now; });
    lock.lock();
    if (hub_->barriers > now) {
      hub_->turns.enter(rank_);
      return;
    }
    hub_->asleep.insert(rank_);
    lock.unlock();
    hub_->turns.wait(rank_, hub_->timeout);
    lock.lock();
    if (hub_->barriers > now) return;
    if (!hub_->failure.empty()) throw PeerError(hub_->failure);
    int missing = 0;
    while (hub_->at_barrier.count(missing) > 0) ++missing;
    lock.unlock();
    throw PeerError(
        fmt::format("rank {} waits for all ranks, and rank {} has been in {} for {:.0f} s", rank_,
                    missing, hub_->what_is_doing(missing), hub_->timeout.count()));
  }

  void abort(const std::string& reason, int) override { hub_->stop(reason); }
  void doing(const std::string& what) override {
    ThreadHub::Box& box = hub_->boxes[static_cast<std::size_t>(rank_)];
    const std::lock_guard<std::mutex> lock(box.guard);
    box.doing = what;
  }

 private:
  std::shared_ptr<ThreadHub> hub_;
  int rank_;
};

}  // namespace

std::shared_ptr<ThreadHub> make_thread_hub(
    int ranks, double timeout_s, std::function<Algorithm(CollectiveKind, int)> algorithm) {
  return std::make_shared<ThreadHub>(ranks, timeout_s, std::move(algorithm));
}
std::unique_ptr<Transport> thread_transport(std::shared_ptr<ThreadHub> hub, int rank) {
  return std::make_unique<ThreadTransport>(std::move(hub), rank);
}

}  // namespace partita
