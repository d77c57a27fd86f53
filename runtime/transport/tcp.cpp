// Ranks over sockets: one reader thread of each rank moves all bytes in, and out where the sender
// would have had to wait.
#include "runtime/transport/tcp.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "base/error.h"
#include "runtime/transport/rendezvous.h"

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;
using Time = SocketTime;
using Letter = std::vector<std::byte>;

enum class Frame : std::uint32_t { data, ask, answer, abort, bye };

struct Header {
  Frame kind = Frame::data;
  std::uint32_t unused = 0;
  std::int64_t tag = 0;  ///< of an answer: whom the sender waits for
  std::int64_t bytes = 0;
  std::int64_t step = -1, instruction = -1;
};

struct Abort {
  std::int32_t code = 3, culprit = 0, gave_up = 0, died = 0;
  std::int64_t step = -1, instruction = -1;  ///< where the culprit was last seen
};

struct Failure {
  std::string reason;
  int code = 3, culprit = 0;
  bool gave_up = false;  ///< the culprit itself says so, so it can speak
  bool died = false;     ///< the reason is worded when it is told: others may know more
  bool speaks = false;   ///< it is this rank that tells it
};

struct Peer {
  File file;
  std::mutex guard;  ///< of what goes out
  std::deque<Letter> out;
  std::size_t out_at = 0;
  // The reader's own.
  Header header;
  Letter body;
  std::size_t have = 0;  ///< bytes of header and body
  // Read by both.
  std::atomic<bool> open{true}, bye{false};
  std::atomic<std::int64_t> step{-1}, instruction{-1}, waits_for{RankState::kNobody}, answers{0};
};

constexpr std::int64_t kBarrier = -1;

class TcpTransport final : public Transport {
 public:
  TcpTransport(const TcpOptions& o, std::vector<File> files)
      : o_(o), wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (o.board) state_ = &o.board->rank(o.rank);
    state_->process = ::getpid();
    for (File& f : files) {
      peers_.push_back(std::make_unique<Peer>());
      peers_.back()->open = f.good();
      peers_.back()->file = std::move(f);
    }
    reader_ = std::thread([this] { read_guarded(); });
  }
  ~TcpTransport() override {
    leave();
    stop_ = true;
    wake();
    reader_.join();
  }

  int rank() const override { return o_.rank; }
  int size() const override { return o_.size; }
  std::string name() const override { return "tcp"; }

  void send(int to, std::int64_t tag, const void* data, std::size_t bytes) override {
    traffic_.bytes_to[to] += static_cast<std::int64_t>(bytes);
    ++traffic_.messages;
    put(to, tag, data, bytes);
  }
  void receive(int from, std::int64_t tag, void* data, std::size_t bytes) override {
    receive_within(o_.timeout_s, from, tag, data, bytes);
  }
  void receive_within(double timeout_s, int from, std::int64_t tag, void* data, std::size_t bytes) {
    const Letter letter = take(timeout_s, from, tag);
    PARTITA_ASSERT(letter.size() == bytes, fmt::format("rank {} wants {} bytes of rank {}, got {}",
                                                       o_.rank, bytes, from, letter.size()));
    if (bytes > 0) std::memcpy(data, letter.data(), bytes);
  }
  void collective(const CollectiveCall& call) override {
    execute_steps(*this, call, expansion(call.kind, static_cast<int>(call.group->size())));
  }
  const Expansion& expansion(CollectiveKind kind, int members) {
    const Algorithm a = o_.algorithm ? o_.algorithm(kind, members) : default_algorithm(kind);
    auto& e = expansions_[{kind, a, members}];
    if (!e) e = std::make_unique<Expansion>(on_members(expand(kind, a, members)));
    return *e;
  }
  void barrier() override { barrier_within(o_.timeout_s, o_.size); }
  void barrier_within(double timeout_s, int ranks) {
    if (o_.rank != 0) {
      put(0, kBarrier, nullptr, 0);
      take(timeout_s, 0, kBarrier);
      return;
    }
    for (int r = 1; r < ranks; ++r) take(timeout_s, r, kBarrier);
    for (int r = 1; r < ranks; ++r) put(r, kBarrier, nullptr, 0);
  }
  RankState* state() { return state_; }
  /// Does not count, nor wait.
  void put(int to, std::int64_t tag, const void* data, std::size_t bytes) {
    PARTITA_ASSERT(to != o_.rank && to >= 0 && to < o_.size, fmt::format("a message to {}", to));
    frame(to, Frame::data, tag, data, bytes);
  }
  void abort(const std::string& reason, int code) override {
    Failure f{reason, code, o_.rank, true};
    {
      const std::lock_guard<std::mutex> lock(guard_);
      if (failure_) return;  // the others know
      fail_locked(f);
      thrown_ = true;
    }
    // What a rank says of itself may name it.
    if (reason.rfind(fmt::format("rank {} ", o_.rank), 0) != 0)
      f.reason = fmt::format("rank {}: {}", o_.rank, reason);
    tell(f);
  }
  void doing(const std::string& what) override { doing_ = what; }
  bool speaks() override {
    const std::lock_guard<std::mutex> lock(guard_);
    return !failure_ || failure_->speaks;
  }
  void leave() override {
    if (left_.exchange(true)) return;
    bool failed;
    {
      const std::lock_guard<std::mutex> lock(guard_);
      failed = failure_.has_value();
    }
    for (int r = 0; r < o_.size; ++r) {
      // After a failure a closed socket says enough; and it must not look like a good end.
      if (r != o_.rank && !failed) frame(r, Frame::bye, 0, nullptr, 0);
    }
  }

 private:
  Peer& peer(int r) { return *peers_[static_cast<std::size_t>(r)]; }
  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_.get(), &one, sizeof one);
  }

  // ---- out -----
  /// Never waits: what the socket does not take now the reader sends later.
  void frame(int to, Frame kind, std::int64_t tag, const void* data, std::size_t bytes) {
    Header h;
    h.kind = kind;
    h.tag = tag;
    h.bytes = static_cast<std::int64_t>(bytes);
    h.step = state_->step.load(std::memory_order_relaxed);
    h.instruction = state_->instruction.load(std::memory_order_relaxed);
    Peer& p = peer(to);
    if (!p.open) return;  // the reader has noted why
    std::size_t sent = 0;
    const std::lock_guard<std::mutex> lock(p.guard);
    if (p.out.empty()) {
      iovec parts[2] = {{&h, sizeof h}, {const_cast<void*>(data), bytes}};
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = bytes > 0 ? 2 : 1;
      const ssize_t n = ::sendmsg(p.file.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno != EAGAIN && errno != EINTR) return;  // the reader will see it
      sent = n < 0 ? 0 : static_cast<std::size_t>(n);
      if (sent == sizeof h + bytes) return;
    }
    Letter rest(sizeof h + bytes - sent);
    const auto* body = static_cast<const std::byte*>(data);
    if (sent < sizeof h) {
      std::memcpy(rest.data(), reinterpret_cast<const std::byte*>(&h) + sent, sizeof h - sent);
      if (bytes > 0) std::memcpy(rest.data() + (sizeof h - sent), body, bytes);
    } else {
      std::memcpy(rest.data(), body + (sent - sizeof h), rest.size());
    }
    p.out.push_back(std::move(rest));
    wake();
  }
  /// Sends what waits; false when the socket is gone.
  static bool flush(Peer& p) {
    const std::lock_guard<std::mutex> lock(p.guard);
    while (!p.out.empty()) {
      const Letter& l = p.out.front();
      const ssize_t n = ::send(p.file.get(), l.data() + p.out_at, l.size() - p.out_at,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) return errno == EAGAIN || errno == EINTR;
      p.out_at += static_cast<std::size_t>(n);
      if (p.out_at < l.size()) return true;
      p.out.pop_front();
      p.out_at = 0;
    }
    return true;
  }
  static bool waits_to_send(Peer& p) {
    const std::lock_guard<std::mutex> lock(p.guard);
    return !p.out.empty();
  }

  // ---- in: the reader thread -----
  void read_guarded() {
    try {
      read_loop();
    } catch (const std::exception& e) {
      note({fmt::format("rank {} cannot read any more: {}", o_.rank, e.what()), 3, o_.rank, true});
    }
  }
  void read_loop() {
    std::optional<Time> end;
    std::vector<pollfd> polls;
    std::vector<int> who;
    for (;;) {
      polls.assign(1, {wake_.get(), POLLIN, 0});
      who.assign(1, -1);
      bool full = false;
      for (int r = 0; r < o_.size; ++r) {
        if (r == o_.rank || !peer(r).open) continue;
        const bool more = waits_to_send(peer(r));
        full = full || more;
        polls.push_back({peer(r).file.get(), static_cast<short>(POLLIN | (more ? POLLOUT : 0)), 0});
        who.push_back(r);
      }
      if (stop_) {
        if (!end) end = after(2);
        if (!full || Clock::now() >= *end) return;
      }
      ::poll(polls.data(), polls.size(), 100);
      if (polls[0].revents != 0) {
        std::uint64_t n;
        [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &n, sizeof n);
      }
      for (std::size_t k = 1; k < polls.size(); ++k) {
        Peer& p = peer(who[k]);
        if ((polls[k].revents & POLLOUT) != 0) flush(p);
        if ((polls[k].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !read_some(who[k], p))
          closed(who[k], p);
      }
      watch();
    }
  }
  /// False when the peer has closed.
  bool read_some(int r, Peer& p) {
    for (;;) {
      std::byte* to;
      std::size_t want;
      if (p.have < sizeof p.header) {
        to = reinterpret_cast<std::byte*>(&p.header) + p.have;
        want = sizeof p.header - p.have;
      } else {
        to = p.body.data() + (p.have - sizeof p.header);
        want = p.body.size() - (p.have - sizeof p.header);
      }
      if (want > 0) {
        const ssize_t n = ::recv(p.file.get(), to, want, MSG_DONTWAIT);
        if (n == 0) return false;
        if (n < 0) return errno == EAGAIN || errno == EINTR;
        p.have += static_cast<std::size_t>(n);
        if (p.have == sizeof p.header) p.body.resize(static_cast<std::size_t>(p.header.bytes));
      }
      if (p.have == sizeof p.header + p.body.size() && p.have >= sizeof p.header) {
        arrived(r, p);
        p.have = 0;
        p.body = {};
      }
    }
  }
  void arrived(int r, Peer& p) {
    p.step = p.header.step;
    p.instruction = p.header.instruction;
    switch (p.header.kind) {
      case Frame::data: {
        const std::lock_guard<std::mutex> lock(guard_);
        letters_[{r, p.header.tag}].push_back(std::move(p.body));
        break;
      }
      case Frame::ask:
        frame(r, Frame::answer, state_->waits_for, nullptr, 0);
        return;
      case Frame::answer: {
        const std::lock_guard<std::mutex> lock(guard_);
        p.waits_for = p.header.tag;
        ++p.answers;
        break;
      }
      case Frame::abort: {
        Abort a;
        PARTITA_ASSERT(p.body.size() >= sizeof a, "a short frame");
        std::memcpy(&a, p.body.data(), sizeof a);
        if (a.culprit != o_.rank && a.culprit >= 0 && a.culprit < o_.size) {
          Peer& c = peer(a.culprit);
          if (std::pair(a.step, a.instruction) > std::pair(c.step.load(), c.instruction.load()))
            c.step = a.step, c.instruction = a.instruction;
        }
        note({std::string(reinterpret_cast<const char*>(p.body.data()) + sizeof a,
                          p.body.size() - sizeof a),
              a.code, a.culprit, a.gave_up != 0, a.died != 0});
        return;
      }
      case Frame::bye:
        p.bye = true;
        return;
    }
    came_.notify_all();
  }
  void closed(int r, Peer& p) {
    p.open = false;
    if (!p.bye) note({died(r), 3, r, false, true});
    came_.notify_all();
  }
  void note(const Failure& f) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      if (left_ || failure_) return;
      fail_locked(f);
    }
    came_.notify_all();
  }
  /// A main thread that never comes back to the transport must not outlive the others.
  void watch() {
    if (!o_.own_process || left_) return;
    const std::lock_guard<std::mutex> lock(guard_);
    if (!failure_ || thrown_ || Clock::now() < failed_at_ + std::chrono::seconds(5)) return;
    if (failure_->speaks) std::fprintf(stderr, "partita: %s\n", failure_->reason.c_str());
    ::_exit(failure_->code);
  }

  // ---- waiting -----
  Letter take(double timeout_s, int from, std::int64_t tag) {
    std::unique_lock<std::mutex> lock(guard_);
    auto& queue = letters_[{from, tag}];
    state_->waits_for.store(from, std::memory_order_relaxed);
    const auto ready = [&] { return !queue.empty() || failure_ || !peer(from).open; };
    if (!came_.wait_for(lock, std::chrono::duration<double>(timeout_s), ready)) {
      lock.unlock();
      ask_all(timeout_s, from, tag);
      lock.lock();
    }
    if (queue.empty()) {
      if (!failure_ && !peer(from).open && peer(from).bye)
        fail_locked({fmt::format("rank {} ended its run while rank {} waits for it in {}", from,
                                 o_.rank, place()),
                     3, from});
      // Closed, and the reader is about to say so.
      came_.wait_for(lock, std::chrono::seconds(1), [&] { return failure_.has_value(); });
      if (!failure_) fail_locked({died(from), 3, from, false, true});
      if (failure_->died && failure_->culprit != o_.rank)
        failure_->reason = died(failure_->culprit);
      const Failure f = *failure_;
      thrown_ = true;
      lock.unlock();
      tell(f);
      // The user's mistake that another has found stays one.
      if (f.speaks && f.code == 2) throw InputError("", f.reason);
      if (f.speaks) throw PeerError(f.reason);
      throw ToldElsewhere(f.code, f.reason);
    }
    state_->waits_for.store(RankState::kNobody, std::memory_order_relaxed);
    Letter letter = std::move(queue.front());
    queue.pop_front();
    return letter;
  }

  /// After a time-out: everyone says whom it waits for, and the failure names who holds up all.
  void ask_all(double timeout_s, int from, std::int64_t tag) {
    std::vector<std::int64_t> before;
    for (const auto& p : peers_) before.push_back(p->answers);
    for (int r = 0; r < o_.size; ++r) {
      if (r != o_.rank) frame(r, Frame::ask, 0, nullptr, 0);
    }
    std::unique_lock<std::mutex> lock(guard_);
    const auto answered = [&](int r) {
      return peer(r).answers > before[static_cast<std::size_t>(r)];
    };
    const auto& queue = letters_[{from, tag}];
    came_.wait_for(lock, std::chrono::seconds(2), [&] {
      if (!queue.empty() || failure_) return true;
      for (int r = 0; r < o_.size; ++r) {
        if (r != o_.rank && peer(r).open && !answered(r)) return false;
      }
      return true;
    });
    if (!queue.empty() || failure_) return;
    int culprit = from;
    std::set<int> seen{o_.rank};
    while (seen.insert(culprit).second && answered(culprit) && peer(culprit).waits_for >= 0)
      culprit = static_cast<int>(peer(culprit).waits_for);
    // A ring of waiting ranks: the one furthest behind.
    if (culprit == o_.rank || (answered(culprit) && peer(culprit).waits_for >= 0)) {
      culprit = from;
      for (const int r : seen) {
        if (r != o_.rank &&
            std::pair(peer(r).step.load(), peer(r).instruction.load()) <
                std::pair(peer(culprit).step.load(), peer(culprit).instruction.load()))
          culprit = r;
      }
    }
    const std::string link = culprit == from
                                 ? fmt::format("rank {}, which", from)
                                 : fmt::format("rank {}, which waits too; rank {}", from, culprit);
    const std::string what =
        answered(culprit)
            ? fmt::format("has been in {} for {:.3g} s", place_of(culprit), timeout_s)
            : fmt::format(
                  "does not answer for {:.3g} s and was last in {}: it is stopped, or its "
                  "machine cannot be reached",
                  timeout_s, place_of(culprit));
    fail_locked(
        {fmt::format("rank {} waits in {} for {} {}", o_.rank, place(), link, what), 3, culprit});
  }

  void tell(const Failure& f) {
    Abort a{f.code, f.culprit, f.gave_up, f.died};
    if (f.culprit != o_.rank)
      a.step = peer(f.culprit).step, a.instruction = peer(f.culprit).instruction;
    const std::string body = std::string(reinterpret_cast<const char*>(&a), sizeof a) + f.reason;
    for (int r = 0; r < o_.size; ++r) {
      if (r != o_.rank) frame(r, Frame::abort, 0, body.data(), body.size());
    }
  }
  /// The lowest rank that can tells a failure. Settled when it is noted: later others are gone, and
  /// have said it.
  void fail_locked(Failure f) {
    f.speaks = f.culprit != o_.rank || f.gave_up;
    for (int r = 0; r < o_.rank; ++r) {
      const bool culprit = f.culprit == r && !f.gave_up;
      const bool gone = !peer(r).open && !peer(r).bye;
      if (!culprit && !gone) f.speaks = false;
    }
    failure_ = std::move(f);
    failed_at_ = Clock::now();
  }

  std::string in_words(int r, std::int64_t step, std::int64_t instruction) const {
    if (o_.describe) return o_.describe(r, step, instruction);
    return step < 0 ? std::string("the start")
                    : fmt::format("instruction {} of step {}", instruction, step);
  }
  std::string place() const {
    return o_.describe ? in_words(o_.rank, state_->step, state_->instruction) : doing_;
  }
  bool on_board(int r) const { return o_.board && o_.board->rank(r).process != 0; }
  std::string died(int r) {
    return fmt::format("rank {} died{} in {}: its connection closed", r,
                       on_board(r) ? "" : ", last heard of", place_of(r));
  }
  std::string place_of(int r) {
    if (on_board(r)) return in_words(r, o_.board->rank(r).step, o_.board->rank(r).instruction);
    return in_words(r, peer(r).step, peer(r).instruction);
  }

  const TcpOptions o_;
  File wake_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::mutex guard_;  ///< of all below
  std::condition_variable came_;
  std::map<std::pair<int, std::int64_t>, std::deque<Letter>> letters_;  // by sender and tag
  std::optional<Failure> failure_;
  bool thrown_ = false;
  Time failed_at_;
  std::atomic<bool> left_{false}, stop_{false};
  std::string doing_ = "the start";
  std::map<std::tuple<CollectiveKind, Algorithm, int>, std::unique_ptr<Expansion>> expansions_;
  std::thread reader_;
};

/// Some of the ranks of another transport, over its sockets.
class TcpPart final : public Transport {
 public:
  TcpPart(TcpTransport& world, double timeout_s, int ranks)
      : world_(world), timeout_s_(timeout_s), ranks_(ranks) {
    state_ = world.state();
  }
  int rank() const override { return world_.rank(); }
  int size() const override { return ranks_; }
  std::string name() const override { return world_.name(); }
  void send(int to, std::int64_t tag, const void* data, std::size_t bytes) override {
    traffic_.bytes_to[to] += static_cast<std::int64_t>(bytes);
    ++traffic_.messages;
    world_.put(to, tag, data, bytes);
  }
  void receive(int from, std::int64_t tag, void* data, std::size_t bytes) override {
    world_.receive_within(timeout_s_, from, tag, data, bytes);
  }
  void collective(const CollectiveCall& c) override {
    execute_steps(*this, c, world_.expansion(c.kind, static_cast<int>(c.group->size())));
  }
  void barrier() override { world_.barrier_within(timeout_s_, ranks_); }
  void abort(const std::string& reason, int code) override { world_.abort(reason, code); }
  bool speaks() override { return world_.speaks(); }
  void doing(const std::string& what) override { world_.doing(what); }

 private:
  TcpTransport& world_;
  double timeout_s_;
  int ranks_;
};

}  // namespace

std::unique_ptr<Transport> tcp_part(Transport& world, double timeout_s, int ranks) {
  return std::make_unique<TcpPart>(dynamic_cast<TcpTransport&>(world), timeout_s, ranks);
}

std::unique_ptr<Transport> tcp_transport(const TcpOptions& options) {
  Met met = meet(options);
  TcpOptions all = options;
  all.board = met.board;
  return std::make_unique<TcpTransport>(all, std::move(met.sockets));
}

}  // namespace partita
