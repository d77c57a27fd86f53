// runtime/transport/transport.h: how the ranks of a run meet. One object per rank.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simulator/program/expansion.h"
#include "simulator/program/measurement.h"

namespace partita {

/// A peer died, hangs or gave up; `what()` names rank, instruction and cause. Not a bug of ours and
/// not the user's input: exit code 3.
class PeerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The same where another rank tells the user: this one ends with `code` and says nothing.
class ToldElsewhere : public PeerError {
 public:
  ToldElsewhere(int exit_code, const std::string& what) : PeerError(what), code(exit_code) {}
  int code;
};

/// Where a rank is; others may read it while it runs (board.h: other processes, too).
struct RankState {
  static constexpr std::int64_t kNobody = -1, kGroup = -2;
  std::atomic<std::int64_t> process{0};  ///< its id
  std::atomic<std::int64_t> task{-1};    ///< of a list of programs; -1: none
  std::atomic<std::int64_t> step{-1}, instruction{-1};
  std::atomic<std::int64_t> waits_for{kNobody};  ///< a rank, kNobody, or kGroup: a collective's
};

/// Puts a rank's instruction in words: "step 3, all_reduce of layers.0.w in block forward 0".
using Describe = std::function<std::string(int rank, std::int64_t step, std::int64_t instruction)>;

/// One collective as a member sees it. The values lie packed: chunk c of the payload at
/// [offsets[c], offsets[c + 1]) of `data`, in elements.
///
///   all-reduce, broadcast, reduce      in place, offsets {0, size}
///   reduce-scatter, scatter            in: all chunks of `data`; out: the own chunk of it
///   all-gather, gather                 in: the own chunk of `data`; out: all (gather: on the root)
///   shift                              in: `send`; out: `data`
///   all-to-all, halo exchange          in: `send` in chunks for each member; out: `data` by member
struct CollectiveCall {
  CollectiveKind kind = CollectiveKind::all_reduce;
  Reduction reduction = Reduction::sum;
  const std::vector<int>* group = nullptr;  ///< ranks, ascending; the root is the first
  int me = 0;                               ///< position in it
  std::size_t element_bytes = 4;
  ElementType type = ElementType::fp32;  ///< of what is reduced: fp32, bf16 or fp16
  std::byte* data = nullptr;
  std::vector<std::int64_t> offsets;
  const std::byte* send = nullptr;
  std::vector<std::int64_t> send_offsets;
  /// Of an all-to-all's chunk a * n + b, in elements: for algorithms in which others pass it on
  /// than who knows its size.
  std::vector<std::int64_t> sizes;
  std::int64_t tag = 0;  ///< the same on all members, different for calls that could be confused
};

/// The open set of ways to move bytes. All calls throw PeerError when a peer is gone or does not
/// answer within the time-out.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string name() const = 0;
  /// Buffered: the data may be reused at once. Messages of one pair and tag arrive in order.
  virtual void send(int to, std::int64_t tag, const void* data, std::size_t bytes) = 0;
  /// Waits for exactly `bytes` bytes.
  virtual void receive(int from, std::int64_t tag, void* data, std::size_t bytes) = 0;
  virtual void collective(const CollectiveCall& call) = 0;
  /// All ranks of the run, for start, clocks and ends of steps.
  virtual void barrier() = 0;
  /// This rank gives up: the others' waits end with `reason`, processes with exit code `code`.
  virtual void abort(const std::string& reason, int code) = 0;
  /// After a failure: is it this rank that tells the user?
  virtual bool speaks() { return true; }
  /// What this rank is doing, for a peer's message when it hangs.
  virtual void doing(const std::string& what) = 0;
  /// This rank comes to that instruction of its step, in program order.
  void at(std::int64_t step, std::int64_t instruction) {
    state_->step.store(step, std::memory_order_relaxed);
    state_->instruction.store(instruction, std::memory_order_relaxed);
  }
  /// This rank begins that program of a list that all ranks have; -1: it waits for the next.
  void work_on(std::int64_t task) {
    state_->task.store(task, std::memory_order_relaxed);
    at(-1, -1);
  }
  /// Do all ranks read one clock?
  virtual bool one_clock() const { return false; }
  /// The run is over on this rank: the others may end from now on.
  virtual void leave() {}

  const Traffic& traffic() const { return traffic_; }
  void reset_traffic() { traffic_ = {}; }

  /// What is sent while it lives is none of the program's traffic.
  class Uncounted {
   public:
    explicit Uncounted(Transport& t) : t_(t), before_(t.traffic_) {}
    ~Uncounted() { t_.traffic_ = before_; }
    Uncounted(const Uncounted&) = delete;
    Uncounted& operator=(const Uncounted&) = delete;

   private:
    Transport& t_;
    Traffic before_;
  };

 protected:
  Traffic traffic_;
  RankState own_state_;
  RankState* state_ = &own_state_;  ///< or a board's
};

/// Ranks as threads of this process. `algorithm`: which expansion a kind is executed by.
class ThreadHub;
std::shared_ptr<ThreadHub> make_thread_hub(
    int ranks, double timeout_s,
    std::function<Algorithm(CollectiveKind, int members)> algorithm = nullptr);
std::unique_ptr<Transport> thread_transport(std::shared_ptr<ThreadHub> hub, int rank);

/// Notes a collective that was made as one call; payload in the convention of docs/cost.md.
void count_call(const CollectiveCall& call, Traffic& traffic);

/// Executes `expansion`, on members alone (on_members), for one of them by sends and receives: what
/// the in-process transport does with a collective, and any transport without collectives of its
/// own could.
void execute_steps(Transport& transport, const CollectiveCall& call, const Expansion& expansion);

}  // namespace partita
