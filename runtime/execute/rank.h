// runtime/execute/rank.h: one rank's executor (executor.h); its parts are this folder's other
// files.
#pragma once

#include <array>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/execute/clocks.h"
#include "runtime/execute/device.h"
#include "runtime/execute/executor.h"
#include "runtime/execute/memory.h"
#include "runtime/execute/pieces.h"
#include "runtime/execute/shard.h"

namespace partita::execute {

using cpu::Arguments;
using cpu::Row;
using cpu::Tensor;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kCollectiveTag = 0, kTieTag = 1, kResultTag = 2, kProgressTag = 3,
                       kClockTag = 4, kFirstMessageTag = 5, kLinksTag = 6;

/// What one buffer's instance holds.
struct Instance {
  std::byte* data = nullptr;
  std::int64_t bytes = 0;
  std::vector<Row> rows;  ///< of a routed buffer
};

/// One pair of a collective: what goes out of `from` and into `to`, by member.
struct Part {
  BufferId from, to;
  std::vector<RunList> out, in;
  bool adds_up = false;  ///< overlapping windows meet: what arrives is added
};

/// A collective of dense buffers, worked out once.
struct Prepared {
  std::vector<int> group;
  int me = 0;
  std::vector<Part> parts;
  std::vector<std::int64_t> offsets, send_offsets;  ///< in words
  std::int64_t word = 4;                            ///< bytes of what runs and offsets count
  ElementType type = ElementType::fp32;
  bool routed = false;
};

/// Memory of a device that is not counted: what a kernel needs for a moment.
struct Spare {
  std::byte* at = nullptr;
  Spare() = default;
  Spare(Memory& memory, std::int64_t bytes)
      : at(memory.take_spare(bytes)), memory_(&memory), bytes_(bytes) {}
  Spare(Spare&& other) noexcept { swap(other); }
  Spare& operator=(Spare&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Spare() {
    if (memory_ != nullptr) memory_->give_back_spare(at, bytes_);
  }

 private:
  void swap(Spare& other) {
    std::swap(at, other.at);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  Memory* memory_ = nullptr;
  std::int64_t bytes_ = 0;
};

inline Work work_of(Kernel k) {
  // In the same order.
  PARTITA_ASSERT(of_operator(k), std::string(name(k)));
  return static_cast<Work>(static_cast<int>(Work::forward_statistic) + static_cast<int>(k) -
                           static_cast<int>(Kernel::forward_statistic));
}

class Executor {
 public:
  Executor(const Program& p, Transport& transport, Device& device, const Options& o);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  RankResult run();

 private:
  std::string at_instruction(const std::string& why) const;
  RankResult run_steps();
  /// After the first step, which has done all that there is to do; once.
  void take_one_way();
  /// Is the next step launched as a graph? All ranks at once, after a step that was not.
  bool captures();
  std::string why_not_captured();
  void launch_captured();
  /// A step more, none of whose instructions is timed; seconds.
  double further_step();
  void time_plain_steps();
  void record_steps();
  static void add_traffic(const Traffic& from, Traffic& to);
  void come_to(std::int64_t instruction);

  // ---- what does not change between steps (prepare.cpp)
  const Box& box(BufferId id);
  void prepare();

  /// Places the buffer in memory: state now, others when their instruction says so.
  void prepare_buffer(BufferId id, std::vector<char>& seen);
  void zero(const Buffer& b, const Instance& instance);
  void take(BufferId id, Instance& instance, std::int64_t bytes);
  void initialise(BufferId id);
  /// A buffer where the host can follow it, once the instruction's stream has come here.
  std::byte* visit(Visits& visits, BufferId id, std::int64_t bytes, bool written);

  /// The same as fp32, whatever it is stored in.
  float* floats(Visits& visits, BufferId id, std::int64_t n, bool written);
  ElementType type_of(BufferId id) const;

  /// The same from storage, in as few reads as the piece has runs in the whole parameter.
  void read(BufferId id);

  /// f(position in memory, linear index in the whole tensor).
  template <class F>
  static void for_each_global(const Box& box, const Buffer& b, F f) {
    if (!box.held || box.dense() == 0) return;
    const std::size_t dims = box.index.size();
    std::vector<std::size_t> at(dims, 0);
    for (std::int64_t k = 0;; ++k) {
      if (k >= box.range.begin && k < box.range.end) {
        std::int64_t global = 0;
        for (std::size_t d = 0; d < dims; ++d)
          global = global * b.shape[d].extent + box.index[d][at[d]];
        f(k - box.range.begin, global);
      }
      std::size_t d = dims;
      while (d > 0 && ++at[d - 1] == box.index[d - 1].size()) at[--d] = 0;
      if (d == 0) return;
    }
  }
  std::size_t replica() const { return replica_of(rank_); }

  /// Where the device is the host both are its; they are counted apart.
  Memory& memory_of(BufferId id) { return p_.buffer(id).host ? host_memory_ : memory_; }

  /// Makes this step's inputs before its clock starts: what a data loader does ahead of time.
  void make_inputs();

  // ---- instances (step.cpp)
  Instance& slot(BufferId id);
  std::byte* data(BufferId id);
  /// Of 4 bytes, that the buffer takes: blocks are a multiple of 64.
  std::int64_t words(BufferId id) { return (box(id).elements() * p_.buffer(id).width() + 3) / 4; }
  float* values(BufferId id) { return reinterpret_cast<float*>(data(id)); }
  Instance& rows_of(BufferId id) { return slot(p_.memory_of(id)); }
  Tensor tensor(BufferId id);
  Clock::time_point now() const;

  /// Between steps: what every rank will still have if another fails.
  void tell_progress(double took);

  // ---- one step (step.cpp)
  void one_step();

  /// A host's times are known at once, a device's after finish().
  std::int64_t mark() { return device_.is_host() ? (now() - step_start_).count() : device_.mark(); }
  void resolve_marks();
  void finish();

  /// The instruction's stream waits for those that its memory comes from.
  void begin(const Instruction& i);
  void execute(const Block& block, BlockId id, std::size_t k, const Instruction& i);

  void give_back(BufferId id, Instance& instance);

  void load(const Instruction& i);

  // ---- messages (messages.cpp)
  std::int64_t message_tag(const Instruction& i) const;
  void message(const Block& block, const Instruction& i);
  void pass_on(const Instruction& i, BufferId b, int peer, std::int64_t bytes, bool sends);

  /// In place of what another rank would send: normal numbers, or 0 where they are indices.
  void draw_received(BufferId id, std::byte* to, std::int64_t n);

  /// A send of the links ends only when the other has come for it; ours must not wait for that, nor
  /// whoever uses the buffer next: ranks could wait for each other. So what is sent is a copy.
  void send_copy(const Instruction& i, const Channel& channel, int peer, BufferId b,
                 std::int64_t bytes);

  /// Its rows are told by the transport, their values pass as others'.
  void routed_message(const Instruction& i, BufferId b, int peer, bool sends);

  // ---- collectives (collectives.cpp)
  void collective(const Block& block, const Instruction& i, const Prepared& c);

  /// `on_device`: that is where the payload lies.
  void call(const Instruction& i, const Prepared& c, std::byte* payload, const std::byte* outgoing);
  /// By the links, or by the transport, on this device's memory.
  void carry_out(CollectiveCall call, const Instruction& i, std::int64_t bytes,
                 std::int64_t sent_bytes);
  Prepared prepare_collective(const Instruction& i);

  /// Runs in words of 4 bytes, whatever the elements (token ids have two), or of 16-bit numbers.
  void finish_part(Prepared& c, Part part) const;
  static void add_sizes(Prepared& c, const Part& part);

  // ---- rows routed to experts (routed.cpp)
  static bool holds(const std::vector<std::int64_t>& list, std::int64_t x);
  static bool wants(const Box& box, const Row& row);
  static bool before(const Row& a, const Row& b);

  /// A routed buffer's values where the host can follow them.
  float* row_values(Visits& visits, BufferId id, bool written);

  /// Memory for the rows that a routed buffer turns out to have.
  void put_rows(BufferId id, std::vector<Row> rows);

  // ---- rows that are given (routed.cpp)
  struct Given {
    std::int64_t tokens = 1, experts = 1, top_k = 1;  ///< tokens of a sample
    bool chooses(std::int64_t sample, std::int64_t position, std::int64_t expert) const {
      const std::int64_t first = (sample * tokens + position) * top_k % experts;
      return (expert - first + experts) % experts < top_k;
    }
  };
  Given given_by(std::int32_t op) const;
  /// A routed buffer's in a box, and in another, in their order.
  std::vector<Row> chosen_rows(BufferId id, const Box& box, const Box* also = nullptr);
  /// Before a Dispatch reads them, outside of its time; from where they are kept on the device.
  void give_gates(const Instruction& i);
  /// As many rows as the others would have sent, and the memory to pack them.
  void rows_alone(const Instruction& i, const Prepared& c);
  void routed_collective(const Instruction& i, const Prepared& c);
  /// Whose rows a box has, each in one look.
  struct RowsOfBox {
    std::array<std::vector<char>, 3> held;  ///< of samples, positions, experts, from the first on
    std::array<std::int64_t, 3> first{};
    explicit RowsOfBox(const Box& box) {
      for (std::size_t d = 0; d < 3; ++d) {
        if (box.index[d].empty()) continue;
        first[d] = box.index[d].front();
        held[d].resize(static_cast<std::size_t>(box.index[d].back() - first[d] + 1));
        for (const std::int64_t x : box.index[d])
          held[d][static_cast<std::size_t>(x - first[d])] = 1;
      }
    }
    bool has(std::size_t d, std::int64_t x) const {
      const auto at = static_cast<std::uint64_t>(x - first[d]);
      return at < held[d].size() && held[d][at] != 0;
    }
    bool has(const Row& r) const {
      return has(0, r.sample) && has(1, r.sequence) && has(2, r.expert);
    }
  };
  /// What a routed collective's members want of each other: the same at every step.
  struct Exchange {
    std::vector<RowsOfBox> wants;           ///< of a member
    std::vector<std::vector<Run>> out, in;  ///< columns for it in a row of mine, and of its here
  };
  const Exchange& exchange_of(const Instruction& i, const Prepared& c, BufferId from, BufferId to);
  /// Where in a row of columns `of` those lie that both lists have; both ascend.
  static std::vector<Run> shared_columns(const std::vector<std::int64_t>& a,
                                         const std::vector<std::int64_t>& b,
                                         const std::vector<std::int64_t>& of);
  /// Adds a row's columns; returns how many.
  static std::int64_t add_row(RunList& list, std::size_t row, std::size_t width,
                              const std::vector<Run>& columns);
  static CollectiveCall all_to_all(const Prepared& c, std::byte* to, const std::byte* from,
                                   const std::vector<std::int64_t>& bounds,
                                   const std::vector<std::int64_t>& send_bounds,
                                   std::int64_t element);

  // ---- kernels (kernels.cpp)
  void compute(const Instruction& i, OperatorKernel* kernel);

  // ---- products with one part of the sequence (kernels.cpp)
  bool of_sequence_part(const Instruction& i) const;
  /// What a part of the sequence is of a buffer: where it lies, and room for it by itself.
  struct Slice {
    Box box;
    RunList runs;  ///< empty: the buffer is the part
    std::int64_t word = 4;
    Spare values;
    float* at() const { return reinterpret_cast<float*>(values.at); }
  };
  Slice slice_of(const Instruction& i, BufferId id);
  void product_part(const Instruction& i, OperatorKernel& kernel, Arguments& a);

  // ---- plain buffers (kernels.cpp)
  void plain(const Instruction& i);

  // ---- results on rank 0 (results.cpp)
  /// A buffer whose values are asked for at the end: where a stage keeps a parameter, or what its
  /// optimizer reads as the gradient.
  struct Wanted {
    BufferId buffer;
    std::size_t parameter;
    bool gradient;
  };
  std::vector<Wanted> wanted_of(int stage) const;
  std::size_t replica_of(int rank) const;
  void collect();

  /// Every rank's measurement on rank 0, as a list of words.
  void collect_measurements();

  /// Rows of all ranks, counted on rank 0: several may have dispatched the same token.
  void collect_routing();

  /// What the optimizer sees is the gradient: kept for comparison.
  void keep_gradient(const Instruction& i);
  void note_loss(BufferId id);

  const Program& p_;
  Transport& transport_;
  Device& device_;
  const Options& o_;
  int rank_ = 0, first_timed_ = 0, stage_ = 0;
  Memory memory_, host_memory_;
  Memory inputs_memory_;  ///< counted nowhere: a data loader's
  Order order_;
  bool untimed_ = false;   ///< the timed steps are over
  std::int64_t tag_ = -1;  ///< of the next sample of a recorded step; -1: it is none
  Links* links_;           ///< null: collectives and messages pass through the host
  std::vector<std::vector<Instance>> slots_;  ///< [buffer][micro-batch + 1]
  std::vector<std::unique_ptr<Box>> boxes_;
  std::vector<std::int64_t> offset_;  ///< bytes into the memory that a buffer lives in
  std::vector<std::vector<std::unique_ptr<OperatorKernel>>> kernels_;  ///< [block][instruction]
  std::vector<std::vector<std::optional<Prepared>>> collectives_;      ///< [block][instruction]
  struct Input {
    std::vector<std::byte> values;
    Spare pinned;  ///< or there, for a device
    std::int64_t size = 0;
    const std::byte* data() const { return pinned.at != nullptr ? pinned.at : values.data(); }
    std::int64_t at = 0;  ///< or where they lie in this rank's shard
    std::size_t bytes = 0;
  };
  std::map<std::pair<BufferId, std::int32_t>, Input> inputs_;
  Shard shard_;
  std::map<const Instruction*, std::vector<Slice>> slices_;
  std::map<const Instruction*, Exchange> exchanges_;
  std::vector<std::int32_t> dispatch_;         ///< by buffer
  std::map<const Instruction*, Spare> gates_;  ///< that are given, of a Dispatch
  /// Of a routed collective alone: bytes that are packed for it, and the rows it gives.
  std::map<const Instruction*, std::pair<std::int64_t, std::vector<Row>>> alone_;
  /// What is on its way to other ranks' devices.
  struct Copy {
    Spare room;
    Device::Event sent = 0;
  };
  std::map<std::int64_t, std::vector<Copy>> copies_;  ///< by bytes
  std::vector<BufferId> to_draw_;
  std::int64_t drawn_ = 0, elements_to_draw_ = 0;
  std::vector<double> losses_;
  struct Loss {
    std::byte stored[4] = {};
    ElementType type = ElementType::fp32;
  };
  std::deque<Loss> step_losses_;  ///< on their way from the device
  /// Of the step that was captured: each launch writes them.
  std::deque<Loss> captured_losses_;
  bool captured_ = false;      ///< this step is one launch
  bool one_way_ = false;       ///< is taken
  std::string mid_step_wait_;  ///< Device::not_captured() of a step that made room in its midst
  double queued_ = 0;          ///< seconds until all of the last further step was
  std::map<BufferId, std::vector<float>> gradients_;
  /// Of every Dispatch: step, operator, micro-batch, rows; then each row's sample, position,
  /// expert.
  std::vector<std::int64_t> routed_;
  RankResult result_;
  std::int64_t step_ = 0, instruction_ = -1;
  bool last_step_ = false;
  std::int32_t micro_batch_ = -1;
  Clock::time_point step_start_;
};

}  // namespace partita::execute
