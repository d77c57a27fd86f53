#include "runtime/execute/process_links.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <map>
#include <thread>
#include <utility>

#include "base/error.h"
#include "runtime/cuda/nccl_plan.h"

namespace partita::execute {
namespace {

using cuda::NcclStep;
constexpr std::int64_t kTag = -2;  // and below: nobody else's

/// What a member brings to a call.
struct Brought {
  const std::byte *data = nullptr, *send = nullptr;
  std::vector<NcclStep> steps;
};
/// What lies in the sender's memory, until it is read.
struct Letter {
  std::byte* at = nullptr;
  std::int64_t bytes = 0;
  std::atomic<bool> unread = false;
};

/// Memory of a device that grows.
class Room {
 public:
  explicit Room(Device& device) : device_(device) {}
  ~Room() {
    if (at_ != nullptr) device_.release(at_);
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  bool holds(std::int64_t bytes) const { return bytes <= bytes_; }
  /// Where it does not hold so many, nothing that is queued uses it.
  std::byte* of(std::int64_t bytes) {
    if (holds(bytes)) return at_;
    if (at_ != nullptr) device_.release(std::exchange(at_, nullptr));
    bytes_ = 0;
    at_ = device_.allocate(bytes);
    if (at_ == nullptr)
      throw MachineError(
          fmt::format("{} has no {} bytes left for what ranks exchange", device_.name(), bytes));
    bytes_ = bytes;
    return at_;
  }

 private:
  Device& device_;
  std::byte* at_ = nullptr;
  std::int64_t bytes_ = 0;
};

class ProcessLinks : public Links {
 public:
  ProcessLinks(Device& device, double timeout_s)
      : device_(device), timeout_s_(timeout_s), scratch_(device), other_(device) {}
  ~ProcessLinks() override {
    // Others may be at what this rank has sent.
    const auto start = std::chrono::steady_clock::now();
    const auto unread = [&] {
      return std::any_of(letters_.begin(), letters_.end(),
                         [](const auto& l) { return l->unread.load(); });
    };
    while (std::uncaught_exceptions() == 0 && unread() &&
           std::chrono::steady_clock::now() - start < std::chrono::duration<double>(timeout_s_))
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    for (const auto& l : letters_) device_.release(l->at);
  }

  std::string name() const override { return "copies in the devices' memory"; }

  std::string open(Transport& control) override {
    rank_ = control.rank();
    const std::int64_t mine = ::getpid();
    std::int64_t first = mine;
    for (int r = 1; rank_ == 0 && r < control.size(); ++r)
      control.send(r, kTag, &mine, sizeof mine);
    if (rank_ > 0) control.receive(0, kTag, &first, sizeof first);
    return first == mine ? "" : "ranks are processes of their own";
  }
  void meet(Transport& control, const std::vector<Channel>& channels) override {
    control_ = &control;
    // All ranks find the same.
    for (const Channel& c : channels) tags_.emplace(c, kTag - 1 - 2 * std::ssize(tags_));
  }

  void collective(const Channel& channel, const CollectiveCall& call) override {
    const std::size_t n = channel.group.size(), me = static_cast<std::size_t>(call.me);
    const auto width = static_cast<std::int64_t>(call.element_bytes);
    const std::int64_t tag = tag_of(channel);
    come();
    const Brought mine{call.data, call.send, cuda::nccl_steps(call)};
    std::vector<Brought> all(n);
    all[me] = mine;
    const Brought* at = &mine;
    to_others(channel, tag, &at, sizeof at);
    of_others(channel, tag, [&](std::size_t m, const Brought* theirs) { all[m] = *theirs; });
    // Others may still read what this rank has: results wait beside it.
    const std::int64_t bytes = call.offsets.empty() ? 0 : call.offsets.back() * width;
    std::byte* results = scratch_.of(bytes);
    std::vector<std::pair<std::int64_t, std::int64_t>> written;  // in elements
    std::map<int, std::size_t> taken;
    const auto got = [&](std::int64_t to, const std::byte* from, std::int64_t count) {
      device_.copy(results + to * width, from, count * width);
    };
    for (std::size_t k = 0; k < all[me].steps.size(); ++k) {
      const NcclStep& s = all[me].steps[k];
      const auto done = [&](std::int64_t to, std::int64_t count) {
        written.emplace_back(to, count);
      };
      switch (s.kind) {
        case NcclStep::Kind::all_reduce:
          reduce(call, all, s.from, s.count, results + s.to * width);
          done(s.to, s.count);
          break;
        case NcclStep::Kind::reduce:
          if (s.peer != call.me) break;
          reduce(call, all, s.from, s.count, results + s.to * width);
          done(s.to, s.count);
          break;
        case NcclStep::Kind::reduce_scatter:
          reduce(call, all, s.from + call.me * s.count, s.count, results + s.to * width);
          done(s.to, s.count);
          break;
        case NcclStep::Kind::all_gather:
          for (std::size_t m = 0; m < n; ++m)
            got(s.to + static_cast<std::int64_t>(m) * s.count,
                all[m].data + all[m].steps.at(k).from * width, s.count);
          done(s.to, static_cast<std::int64_t>(n) * s.count);
          break;
        case NcclStep::Kind::broadcast: {
          const Brought& root = all[static_cast<std::size_t>(s.peer)];
          got(s.to, root.data + root.steps.at(k).from * width, s.count);
          done(s.to, s.count);
          break;
        }
        case NcclStep::Kind::send:
          break;
        case NcclStep::Kind::receive: {
          // The peer's sends to this one, in their order.
          const Brought& peer = all[static_cast<std::size_t>(s.peer)];
          std::size_t skip = taken[s.peer]++;
          const auto from = std::find_if(peer.steps.begin(), peer.steps.end(), [&](const auto& t) {
            return t.kind == NcclStep::Kind::send && t.peer == call.me && skip-- == 0;
          });
          PARTITA_ASSERT(from != peer.steps.end() && from->count == s.count,
                         std::string(partita::name(call.kind)));
          got(s.to, (from->from_send ? peer.send : peer.data) + from->from * width, s.count);
          done(s.to, s.count);
          break;
        }
      }
    }
    come();
    // When all have read, all may write.
    to_others(channel, tag - 1, &at, sizeof at);
    of_others(channel, tag - 1, [](std::size_t, const Brought*) {});
    for (const auto& [to, count] : written)
      device_.copy(call.data + to * width, results + to * width, count * width);
    // The next call's results come to the same place, on another stream.
    come();
    count_call(call, traffic_);
  }

  void send(const Channel& channel, int to, const std::byte* from, std::int64_t bytes) override {
    Letter* letter = room(bytes);
    device_.copy(letter->at, from, bytes);
    come();
    letter->unread = true;
    const Transport::Uncounted none(*control_);
    control_->send(to, tag_of(channel), &letter, sizeof letter);
    ++traffic_.sends;
    traffic_.send_bytes += bytes;
  }
  void receive(const Channel& channel, int from, std::byte* to, std::int64_t bytes) override {
    Letter* letter = nullptr;
    control_->receive(from, tag_of(channel), &letter, sizeof letter);
    PARTITA_ASSERT(letter->bytes == bytes, "a message of another size");
    device_.copy(to, letter->at, bytes);
    come();
    letter->unread = false;
  }

 private:
  /// All that its current stream has had so far is done.
  void come() { device_.host_waits(device_.record()); }

  std::int64_t tag_of(const Channel& channel) const {
    const auto it = tags_.find(channel);
    PARTITA_ASSERT(it != tags_.end(), "a channel that nobody announced");
    return it->second;
  }
  void to_others(const Channel& channel, std::int64_t tag, const void* word, std::size_t bytes) {
    const Transport::Uncounted none(*control_);
    for (const int r : channel.group) {
      if (r != rank_) control_->send(r, tag, word, bytes);
    }
  }
  template <class Take>
  void of_others(const Channel& channel, std::int64_t tag, Take take) {
    for (std::size_t m = 0; m < channel.group.size(); ++m) {
      if (channel.group[m] == rank_) continue;
      const Brought* theirs = nullptr;
      control_->receive(channel.group[m], tag, &theirs, sizeof theirs);
      take(m, theirs);
    }
  }

  /// All members' elements from `first` on.
  void reduce(const CollectiveCall& call, const std::vector<Brought>& all, std::int64_t first,
              std::int64_t count, std::byte* to) {
    const auto width = static_cast<std::int64_t>(call.element_bytes);
    const std::int64_t bytes = count * width;
    if (call.reduction == Reduction::max) {
      std::vector<float> most(static_cast<std::size_t>(count)), theirs(most.size());
      PARTITA_ASSERT(call.type == ElementType::fp32, "a maximum of narrow numbers");
      for (std::size_t m = 0; m < all.size(); ++m) {
        device_.to_host(m == 0 ? most.data() : theirs.data(), all[m].data + first * width, bytes);
        for (std::size_t k = 0; m > 0 && k < most.size(); ++k)
          most[k] = std::max(most[k], theirs[k]);
      }
      device_.to_device(to, most.data(), bytes);
      return;
    }
    device_.copy(to, all[0].data + first * width, bytes);
    const RunList whole(std::vector<Run>{{0, count}});
    if (!other_.holds(bytes)) come();
    for (std::size_t m = 1; m < all.size(); ++m) {
      // A kernel reads its own device's memory.
      std::byte* here = other_.of(bytes);
      device_.copy(here, all[m].data + first * width, bytes);
      device_.unpack_add(whole, call.type, here, to);
    }
  }

  Letter* room(std::int64_t bytes) {
    for (const auto& l : letters_) {
      if (l->bytes == bytes && !l->unread) return l.get();
    }
    auto letter = std::make_unique<Letter>();
    letter->at = device_.allocate(bytes);
    letter->bytes = bytes;
    if (letter->at == nullptr)
      throw MachineError(
          fmt::format("{} has no {} bytes left for a message", device_.name(), bytes));
    letters_.push_back(std::move(letter));
    return letters_.back().get();
  }

  Device& device_;
  double timeout_s_;
  int rank_ = 0;
  Transport* control_ = nullptr;
  Room scratch_, other_;
  std::vector<std::unique_ptr<Letter>> letters_;
  std::map<Channel, std::int64_t> tags_;
};

}  // namespace

std::unique_ptr<Links> process_links(Device& device, double timeout_s) {
  return std::make_unique<ProcessLinks>(device, timeout_s);
}

}  // namespace partita::execute
