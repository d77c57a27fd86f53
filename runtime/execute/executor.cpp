#include "runtime/execute/executor.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <set>

#include "runtime/execute/clocks.h"
#include "runtime/execute/device.h"
#include "runtime/execute/memory.h"
#include "runtime/execute/pieces.h"
#include "runtime/execute/shard.h"
#include "runtime/transport/lone.h"
#include "runtime/transport/narrow.h"
#include "simulator/program/routing.h"

namespace partita::execute {
namespace {

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

Work work_of(Kernel k) {
  // In the same order.
  PARTITA_ASSERT(of_operator(k), std::string(name(k)));
  return static_cast<Work>(static_cast<int>(Work::forward_statistic) + static_cast<int>(k) -
                           static_cast<int>(Kernel::forward_statistic));
}

/// What rank 0 makes of what all ranks say; on all ranks.
std::string of_all(Transport& t, const std::string& mine,
                   const std::function<std::string(std::vector<std::string>)>& make) {
  const auto send = [&](int to, const std::string& text) {
    const std::uint64_t size = text.size();
    t.send(to, kLinksTag, &size, sizeof size);
    if (size > 0) t.send(to, kLinksTag, text.data(), size);
  };
  const auto receive = [&](int from) {
    std::uint64_t size = 0;
    t.receive(from, kLinksTag, &size, sizeof size);
    std::string text(size, ' ');
    if (size > 0) t.receive(from, kLinksTag, text.data(), size);
    return text;
  };
  if (t.rank() != 0) {
    send(0, mine);
    return receive(0);
  }
  std::vector<std::string> said{mine};
  for (int r = 1; r < t.size(); ++r) said.push_back(receive(r));
  const std::string made = make(std::move(said));
  for (int r = 1; r < t.size(); ++r) send(r, made);
  return made;
}

/// What the first rank that says anything says; on all ranks.
std::string first_said(Transport& t, const std::string& mine) {
  return of_all(t, mine, [](const std::vector<std::string>& said) {
    const auto it = std::find_if(said.begin(), said.end(), [](auto& s) { return !s.empty(); });
    return it != said.end() ? *it : std::string();
  });
}

class Executor {
 public:
  Executor(const Program& p, Transport& transport, Device& device, const Options& o)
      : p_(p),
        transport_(transport),
        device_(device),
        o_(o),
        rank_(transport.rank()),
        first_timed_(o.warm_up + o.captured_steps),
        memory_(device, false),
        host_memory_(device, true),
        inputs_memory_(device, true),
        order_(device),
        links_(o.alone ? nullptr : device.links()) {
    PARTITA_ASSERT(p.ranks() == transport.size(),
                   fmt::format("{} ranks for {}", transport.size(), p.ranks()));
    device_.make_room = [this] {
      device_.finish();
      if (!device_.not_captured().empty()) mid_step_wait_ = device_.not_captured();
      memory_.release_kept();
    };
    stage_ = p.stage_of(rank_);
    slots_.resize(p.buffers.size());
    boxes_.resize(p.buffers.size());
    offset_.assign(p.buffers.size(), 0);
    prepare();
    if (transport_.size() > 1 && links_ != nullptr) {
      transport_.doing("the meeting of devices");
      result_.no_links = first_said(transport_, links_->open(transport_));
      if (result_.no_links.empty()) {
        links_->meet(transport_, channels_of(p));
        if (o.estimates) result_.estimates = links_->estimates();
      } else {
        links_->leave();
        links_ = nullptr;
      }
    }
  }
  ~Executor() {
    device_.make_room = nullptr;
    for (std::size_t b = 0; b < slots_.size(); ++b) {
      for (Instance& i : slots_[b]) give_back(BufferId{b}, i);
    }
  }
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  RankResult run() {
    try {
      return run_steps();
    } catch (const PeerError&) {
      // Links know that a peer is gone, the transport which, where and why.
      if (links_ != nullptr) transport_.barrier();
      throw;
    } catch (const MachineError& e) {
      throw MachineError(at_instruction(e.what()));
    } catch (const std::bad_alloc&) {
      throw MachineError(at_instruction("out of memory; use a smaller network, batch or plan"));
    }
  }

 private:
  std::string at_instruction(const std::string& why) const {
    const std::string where = step_ == first_timed_ + o_.steps
                                  ? std::string("the end of the run")
                                  : place(p_, rank_, step_, instruction_);
    return fmt::format("rank {} in {}{}: {}", rank_, where, o_.name.empty() ? "" : " of " + o_.name,
                       why);
  }
  RankResult run_steps() {
    losses_.clear();
    const int all = first_timed_ + o_.steps;
    const auto clock = [this] { return now().time_since_epoch().count(); };
    ClockReading clock_before;
    std::vector<std::int64_t> starts;
    constexpr int kMostBefore = 1000;
    if (o_.warm_up_s > 0 && (transport_.size() == 1 || o_.alone) && !o_.collect) {
      auto start = now();
      for (int k = 0; k < kMostBefore; ++k) {
        further_step();
        if (k == 0) {
          // Its time went to what libraries build and load, beside which a device rests.
          start = now();
          continue;
        }
        if (std::chrono::duration<double>(now() - start).count() >= o_.warm_up_s) break;
      }
      take_one_way();  // at the clock that it has from now on
      untimed_ = false;
    }
    for (step_ = 0; step_ < all; ++step_) {
      last_step_ = step_ + 1 == all;
      transport_.doing("the start of a step");
      come_to(-1);
      make_inputs();
      come_to(-1);
      const bool captured = step_ >= o_.warm_up && step_ < first_timed_ && captures();
      if (o_.record && step_ == first_timed_)
        clock_before = read_clocks(transport_, kClockTag, clock);
      transport_.barrier();
      transport_.reset_traffic();
      if (links_ != nullptr) links_->reset_traffic();
      // Steps differ in the rows that experts get: each has its own peak.
      if (step_ >= first_timed_) memory_.forget_peak();
      if (step_ == first_timed_) host_memory_.forget_peak();
      const auto start = now();
      step_start_ = start;
      losses_.push_back(0);
      if (o_.record && step_ >= first_timed_) result_.measured.samples.emplace_back();
      if (captured) {
        launch_captured();
      } else {
        device_.begin_marks();
        one_step();
      }
      finish();
      if (o_.record && step_ >= first_timed_) resolve_marks();
      const std::chrono::duration<double> took = now() - start;
      RankMeasurement& m = result_.measured;
      m.traffic = transport_.traffic();
      if (links_ != nullptr) add_traffic(links_->traffic(), m.traffic);
      if (captured) m.captured_s.push_back(took.count());
      if (step_ >= first_timed_) {
        m.step_s.push_back(took.count());
        starts.push_back(start.time_since_epoch().count());
        m.last_peak = memory_.peak();
        m.last_at_peak = memory_.at_peak();
        if (m.last_peak > m.peak) m.peak = m.last_peak, m.at_peak = m.last_at_peak;
      }
      if (step_ == 0 && (!last_step_ || o_.plain_steps > 0)) take_one_way();
      if (o_.progress) tell_progress(took.count());
      // Making the next inputs is nobody's step: not that of a rank whose core it would take
      // either.
      if (o_.record) transport_.barrier();
    }
    result_.measured.rank = rank_;
    result_.measured.host_peak = host_memory_.peak();
    result_.reserved = memory_.reserved();
    result_.beside = Bytes{std::max<std::int64_t>(0, device_.taken() - memory_.reserved().count)};
    result_.measured.reserved = result_.reserved;
    OutsideMemory& outside = result_.measured.outside;
    outside = device_.outside();
    const Bytes named = outside.libraries + outside.workspace + outside.communicators;
    outside.kernels = std::max(Bytes{0}, result_.beside - named);
    result_.fallbacks = device_.fallbacks();
    result_.products = device_.products();
    if (o_.record) {
      transport_.doing("the reading of clocks");
      const ClockReading clock_after = read_clocks(transport_, kClockTag, clock);
      put_on_one_clock(transport_, kClockTag, {clock_before, clock_after}, starts,
                       result_.measured);
    }
    // Values and memory are those of the steps so far.
    if (!o_.alone) collect();
    if (o_.plain_steps > 0) time_plain_steps();
    if (o_.recorded_steps > 0) record_steps();
    if (o_.alone) return std::move(result_);
    collect_measurements();
    if (o_.routing) collect_routing();
    return std::move(result_);
  }
  /// After the first step, which has done all that there is to do; once.
  void take_one_way() {
    if (device_.is_host() || std::exchange(one_way_, true)) return;
    transport_.doing("the choice of algorithms");
    const Transport::Uncounted uncounted(transport_);
    // To find them may give kept memory back, which waits once more.
    const std::string waited = device_.not_captured(), mine = device_.found_best();
    const auto make = [this](const auto& of_ranks) { return device_.common(of_ranks); };
    device_.take_common(o_.alone ? make(std::vector<std::string>{mine})
                                 : of_all(transport_, mine, make));
    if (mid_step_wait_.empty() && device_.not_captured() != waited) mid_step_wait_ = waited;
  }
  /// Is the next step launched as a graph? All ranks at once, after a step that was not.
  bool captures() {
    if (step_ == o_.warm_up) result_.no_graph = why_not_captured();
    if (!result_.no_graph.empty()) return false;
    if (device_.has_capture()) return true;
    std::string why;
    try {
      device_.begin_capture();
      one_step();
      device_.end_capture();
    } catch (const MachineError& e) {
      why = e.what();
    }
    if (transport_.size() > 1 && !o_.alone) why = first_said(transport_, why);
    captured_losses_ = std::move(step_losses_);
    step_losses_.clear();
    come_to(-1);
    if (why.empty()) return true;
    // The next step begins as if that had not.
    device_.drop_capture();
    order_.forget();
    for (std::size_t b = 0; b < slots_.size(); ++b) {
      const Buffer& buffer = p_.buffers[b];
      if (buffer.scope == Scope::step && buffer.category != Category::workspace) continue;
      for (Instance& i : slots_[b]) {
        give_back(BufferId{b}, i);
        i = {};
      }
    }
    result_.no_graph = why;
    return false;
  }
  std::string why_not_captured() {
    const bool alone = transport_.size() == 1 || o_.alone;
    std::string why = step_ == 0                    ? "no step went before it"
                      : !alone && links_ == nullptr ? "messages pass through the host"
                                                    : "";
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
      if (!why.empty()) break;
      for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
        if (!alone && (i.kind == Kind::send || i.kind == Kind::receive))
          why =
              "messages of a pipeline wait for each other, and branches of a graph need not go on "
              "beside each other";
        if (i.every > 1) why = fmt::format("parameters are averaged every {} steps", i.every);
        if (i.kind == Kind::compute && i.kernel == Kernel::dequeue)
          why = "gradients wait in a queue, whose place is another one each step";
      }
    }
    if (why.empty()) why = device_.not_captured();
    if (why.empty()) why = mid_step_wait_;
    return alone ? why : first_said(transport_, why);
  }
  void launch_captured() {
    std::vector<const void*> brought;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
      for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
        if (i.kind == Kind::load && box(i.writes[0]).held)
          brought.push_back(inputs_.at({i.writes[0], call.micro_batch}).data());
      }
    }
    device_.launch_captured(step_, brought);
    captured_ = true;
  }
  /// A step more, none of whose instructions is timed; seconds.
  double further_step() {
    untimed_ = true;
    transport_.doing("the start of a step");
    come_to(-1);
    make_inputs();
    device_.finish();
    transport_.barrier();
    const auto start = now();
    step_start_ = start;
    losses_.push_back(0);
    one_step();
    queued_ = std::chrono::duration<double>(now() - start).count();
    finish();
    losses_.pop_back();
    ++step_;
    return std::chrono::duration<double>(now() - start).count();
  }
  void time_plain_steps() {
    RankMeasurement& m = result_.measured;
    for (int k = 0; k < o_.plain_steps; ++k) {
      m.plain_s.push_back(further_step());
      if (device_.not_captured().empty()) m.queued_s.push_back(queued_);
    }
  }
  void record_steps() {
    PARTITA_ASSERT((transport_.size() == 1 || o_.alone) && o_.record,
                   "recorded steps are one rank's");
    RankMeasurement& m = result_.measured;
    m.no_kernel_ns = device_.record_kernels(true);
    if (!m.no_kernel_ns.empty()) return;
    for (int k = 0; k < o_.recorded_steps; ++k) {
      tag_ = 0;
      m.recorded_s.push_back(further_step());
      auto& step = m.kernel_ns.emplace_back(static_cast<std::size_t>(tag_), 0);
      for (const auto& [tag, ns] : device_.recorded()) step.at(static_cast<std::size_t>(tag)) = ns;
      tag_ = -1;
    }
    static_cast<void>(device_.record_kernels(false));
  }
  static void add_traffic(const Traffic& from, Traffic& to) {
    for (const auto& [kind, c] : from.collectives) {
      to.collectives[kind].calls += c.calls;
      to.collectives[kind].payload_bytes += c.payload_bytes;
    }
    to.sends += from.sends;
    to.send_bytes += from.send_bytes;
  }
  void come_to(std::int64_t instruction) {
    instruction_ = instruction;
    transport_.at(step_, instruction);
  }

  // ---- what does not change between steps ------------------------------------------------------
  const Box& box(BufferId id) {
    auto& b = boxes_[id.index()];
    if (!b) b = std::make_unique<Box>(box_of(p_, id, rank_));
    return *b;
  }

  void prepare() {
    std::set<BlockId> blocks;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)])
      blocks.insert(call.block);
    kernels_.resize(p_.blocks.size());
    collectives_.resize(p_.blocks.size());
    std::vector<char> state(p_.buffers.size(), 0);
    for (const BlockId id : blocks) {
      const Block& block = p_.blocks[id.index()];
      kernels_[id.index()].resize(block.instructions.size());
      collectives_[id.index()].resize(block.instructions.size());
      for (std::size_t k = 0; k < block.instructions.size(); ++k) {
        const Instruction& i = block.instructions[k];
        const auto note = [&](BufferId b) { prepare_buffer(b, state); };
        for_each_read(i, note);
        for_each_write(i, note);
        if (i.kind == Kind::compute && i.op >= 0) {
          const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
          if (bits(op.compute) < 16 && op.compute != ElementType::fp8)
            throw InputError("precision",
                             fmt::format("{} computes in {}, which is predicted, not executed; use "
                                         "--precision fp8, bf16, fp16, tf32 or fp32",
                                         op.name, name(op.compute)));
          if (p_.mesh.group_root(rank_, op.root) == rank_) {
            auto context = reference::context_of(
                p_, i.op, o_.operator_seed ? o_.operator_seed(i.op) : o_.seed, rank_);
            if (of_sequence_part(i))
              context.indices[static_cast<std::size_t>(op.signature.find(Dim::sequence))] =
                  part_positions(p_, i, rank_);
            // As the interpreter rounds them: of products with weights alone.
            if (op.compute == ElementType::fp8 &&
                (std::holds_alternative<Linear>(op.operation) ||
                 std::holds_alternative<GroupedProduct>(op.operation)))
              context.compute = op.compute;
            kernels_[id.index()][k] = device_.kernel(std::move(context));
          }
        }
        if (i.kind == Kind::collective || i.kind == Kind::slice)
          collectives_[id.index()][k] = prepare_collective(i);
      }
    }
    for (const BufferId id : to_draw_) initialise(id);
    // Whatever stream comes first finds it done.
    device_.finish();
  }

  /// Places the buffer in memory: state now, others when their instruction says so.
  void prepare_buffer(BufferId id, std::vector<char>& seen) {
    if (seen[id.index()]) return;
    seen[id.index()] = 1;
    const Buffer& b = p_.buffer(id);
    if (b.element_bytes == 0 && b.type != ElementType::fp32 && b.type != ElementType::bf16 &&
        b.type != ElementType::fp16) {
      throw InputError("precision",
                       fmt::format("{} is stored as {}, which is predicted, not executed; use "
                                   "--precision bf16, fp16 or fp32",
                                   b.name, name(b.type)));
    }
    if (slots_[id.index()].empty()) {
      slots_[id.index()].resize(
          b.scope == Scope::step ? 1 : static_cast<std::size_t>(p_.micro_batches) + 1);
    }
    const BufferId root = p_.memory_of(id);
    if (root != id) {
      prepare_buffer(root, seen);
      // A shard lies where it belongs in the whole that it is a part of.
      if (!b.layout.flat.empty() && p_.buffer(root).layout.flat.empty() && box(id).held)
        offset_[id.index()] = box(id).range.begin * b.width();
      return;
    }
    if (b.scope == Scope::step && b.category != Category::workspace) {
      Instance& instance = slots_[id.index()][0];
      take(id, instance, box(id).elements() * b.width());
      zero(b, instance);
      if (b.category == Category::parameters && b.parameter >= 0 && !p_.startup) {
        to_draw_.push_back(id);
        if (box(id).held) elements_to_draw_ += box(id).elements();
      }
    }
  }

  void zero(const Buffer& b, const Instance& instance) {
    if (b.host) {
      std::fill_n(instance.data, instance.bytes, std::byte{0});
    } else {
      // Whole words; blocks are a multiple of 64 bytes.
      device_.fill(instance.data, (instance.bytes + 3) / 4, 0);
    }
  }
  void take(BufferId id, Instance& instance, std::int64_t bytes) {
    instance.data = memory_of(id).take(p_.buffer(id).category, bytes);
    instance.bytes = bytes;
  }

  void initialise(BufferId id) {
    const Buffer& b = p_.buffer(id);
    const Box& mine = box(id);
    if (!mine.held) return;
    if (slots_[id.index()][0].data == nullptr) return;
    if (o_.drawn && !b.host) {
      const ProgramParameter& parameter = p_.parameters[static_cast<std::size_t>(b.parameter)];
      device_.draw(data(id), type_of(id), mine.elements(),
                   static_cast<float>(parameter.initial_value),
                   static_cast<float>(parameter.initial_deviation), o_.seed + id.index());
      return;
    }
    Visits visits(device_);
    float* values = floats(visits, id, mine.elements(), true);
    for_each_global(mine, b, [&](std::int64_t k, std::int64_t global) {
      values[k] =
          static_cast<float>(o_.initial(replica(), static_cast<std::size_t>(b.parameter), global));
      if (o_.drawing && ++drawn_ % 65536 == 0) o_.drawing(rank_, drawn_, elements_to_draw_);
    });
    visits.give_back();
  }
  /// A buffer where the host can follow it, once the instruction's stream has come here.
  std::byte* visit(Visits& visits, BufferId id, std::int64_t bytes, bool written) {
    if (!p_.buffer(id).host) return visits.host(data(id), bytes, written);
    device_.host_waits(device_.record());
    return data(id);
  }

  /// The same as fp32, whatever it is stored in.
  float* floats(Visits& visits, BufferId id, std::int64_t n, bool written) {
    const bool host = p_.buffer(id).host;
    if (host) device_.host_waits(device_.record());
    return visits.floats(data(id), type_of(id), n, written, host);
  }
  ElementType type_of(BufferId id) const {
    const Buffer& b = p_.buffer(id);
    return b.element_bytes == 0 ? b.type : ElementType::fp32;
  }

  /// The same from storage, in as few reads as the piece has runs in the whole parameter.
  void read(BufferId id) {
    if (!o_.read) {
      initialise(id);
      return;
    }
    const Buffer& b = p_.buffer(id);
    if (!box(id).held) return;
    Visits visits(device_);
    float* to = floats(visits, id, box(id).elements(), true);
    std::int64_t at = 0, first = 0, count = 0;
    const auto flush = [&] {
      if (count > 0)
        o_.read(replica(), static_cast<std::size_t>(b.parameter), first, count, to + at);
    };
    for_each_global(box(id), b, [&](std::int64_t k, std::int64_t global) {
      if (count > 0 && global == first + count) {
        ++count;
        return;
      }
      flush();
      at = k, first = global, count = 1;
    });
    flush();
    visits.give_back();
  }

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

  Prepared prepare_collective(const Instruction& i) {
    Prepared c;
    std::vector<std::int64_t> members{rank_};
    if (i.kind == Kind::collective) members = p_.group(i, rank_);
    for (const std::int64_t m : members) {
      if (m == rank_) c.me = static_cast<int>(c.group.size());
      c.group.push_back(static_cast<int>(m));
    }
    c.routed = p_.buffer(i.reads[0]).routed;
    const std::size_t n = members.size();
    c.offsets.assign(n + 1, 0);
    c.send_offsets.assign(n + 1, 0);
    const bool tied = i.kind == Kind::collective && i.tie >= 0;
    for (std::size_t k = 0; k < i.reads.size(); ++k) {
      Part part;
      part.from = i.reads[k];
      part.to = i.writes[k];
      std::vector<Box> from, to;
      for (const std::int64_t m : members) {
        // On another stage the tied parameter is another buffer of equal layout.
        from.push_back(tied ? box(part.from) : box_of(p_, part.from, m));
        to.push_back(tied ? box(part.to) : box_of(p_, part.to, m));
      }
      const auto me = static_cast<std::size_t>(c.me);
      part.out.resize(n);
      part.in.resize(n);
      if (i.kind == Kind::slice) {
        part.out[0] = section(from[0], to[0]);
        part.in[0] = section(to[0], from[0]);
        finish(c, std::move(part));
        continue;
      }
      switch (i.collective) {
        case CollectiveKind::all_reduce:
          part.out[me] = section(from[me], to[me]);
          part.in[me] = section(to[me], from[me]);
          break;
        case CollectiveKind::broadcast:
          if (c.me == 0) part.out[0] = section(from[0], from[0]);
          part.in[me] = section(to[me], to[me]);
          break;
        case CollectiveKind::reduce:
          part.out[me] = section(from[me], from[me]);
          if (c.me == 0) part.in[0] = section(to[0], to[0]);
          break;
        case CollectiveKind::reduce_scatter:
          for (std::size_t m = 0; m < n; ++m) part.out[m] = section(from[me], to[m]);
          part.in[me] = section(to[me], from[me]);
          break;
        case CollectiveKind::scatter:
          for (std::size_t m = 0; m < n; ++m) part.out[m] = section(from[0], to[m]);
          part.in[me] = section(to[me], to[me]);
          break;
        case CollectiveKind::all_gather:
        case CollectiveKind::gather:
          part.out[me] = section(from[me], from[me]);
          for (std::size_t m = 0; m < n; ++m) {
            part.in[m] = i.collective == CollectiveKind::all_gather ? section(to[me], from[m])
                                                                    : section(from[m], from[m]);
            if (i.collective == CollectiveKind::gather && c.me == 0)
              part.in[m] = section(to[0], from[m]);
          }
          break;
        case CollectiveKind::all_to_all:
        case CollectiveKind::halo_exchange:
          for (std::size_t m = 0; m < n; ++m) {
            part.out[m] = section(from[me], to[m]);
            part.in[m] = section(to[me], from[m]);
          }
          for (std::size_t d = 0; d < p_.buffer(part.to).layout.dims.size(); ++d) {
            part.adds_up |= i.collective == CollectiveKind::halo_exchange &&
                            p_.buffer(part.from).layout.dims[d].kind == SplitKind::window &&
                            p_.buffer(part.to).layout.dims[d].kind == SplitKind::block;
          }
          break;
        case CollectiveKind::shift:
          part.out[me] = section(from[me], from[me]);
          part.in[me] = section(to[me], to[me]);
          break;
      }
      finish(c, std::move(part));
    }
    return c;
  }

  /// Runs in words of 4 bytes, whatever the elements (token ids have two), or of 16-bit numbers.
  void finish(Prepared& c, Part part) const {
    const Buffer& from = p_.buffer(part.from);
    if (from.width() == 2) c.word = 2, c.type = from.type;
    const std::int64_t words = from.width() / c.word;
    PARTITA_ASSERT(words >= 1 && words * c.word == from.width(),
                   from.name + " has elements that cannot travel in this call");
    for (auto* lists : {&part.out, &part.in}) {
      for (auto& runs : *lists) {
        for (Run& r : runs.runs) r.offset *= words, r.count *= words;
      }
    }
    add_sizes(c, part);
    c.parts.push_back(std::move(part));
  }

  static void add_sizes(Prepared& c, const Part& part) {
    for (std::size_t m = 0, out = 0, in = 0; m < part.out.size(); ++m) {
      out += static_cast<std::size_t>(count(part.out[m].runs));
      in += static_cast<std::size_t>(count(part.in[m].runs));
      c.send_offsets[m + 1] += static_cast<std::int64_t>(out);
      c.offsets[m + 1] += static_cast<std::int64_t>(in);
    }
  }

  /// Where the device is the host both are its; they are counted apart.
  Memory& memory_of(BufferId id) { return p_.buffer(id).host ? host_memory_ : memory_; }

  // ---- instances -------------------------------------------------------------------------------
  Instance& slot(BufferId id) {
    auto& all = slots_[id.index()];
    return all[p_.buffer(id).scope == Scope::step ? 0 : static_cast<std::size_t>(micro_batch_ + 1)];
  }
  std::byte* data(BufferId id) {
    Instance& instance = slot(p_.memory_of(id));
    return instance.data == nullptr ? nullptr : instance.data + offset_[id.index()];
  }
  /// Of 4 bytes, that the buffer takes: blocks are a multiple of 64.
  std::int64_t words(BufferId id) { return (box(id).elements() * p_.buffer(id).width() + 3) / 4; }
  float* values(BufferId id) { return reinterpret_cast<float*>(data(id)); }
  Instance& rows_of(BufferId id) { return slot(p_.memory_of(id)); }

  Tensor tensor(BufferId id) {
    Tensor t;
    if (!id.valid() || !box(id).held) return t;
    const Buffer& b = p_.buffer(id);
    t.index = &box(id).index;
    if (b.element_bytes == 8) {
      t.ids = reinterpret_cast<const std::int64_t*>(data(id));
    } else if (b.element_bytes != 0 && b.element_bytes != 4) {
      t.bytes = data(id);
    } else {
      t.values = values(id);
      t.type = type_of(id);
    }
    if (b.routed) t.rows = &rows_of(id).rows;
    return t;
  }

  Clock::time_point now() const {
    if (o_.clock) return Clock::time_point(std::chrono::nanoseconds(o_.clock(rank_)));
    const std::int64_t own = device_.own_time();
    return own >= 0 ? Clock::time_point(std::chrono::nanoseconds(own)) : Clock::now();
  }

  /// Between steps: what every rank will still have if another fails.
  void tell_progress(double took) {
    const double mine[] = {losses_.back(), took};
    std::vector<double> losses(static_cast<std::size_t>(p_.mesh.size(p_.replicas)), 0.0);
    double slowest = took;
    if (rank_ != 0) {
      transport_.send(0, kProgressTag, mine, sizeof mine);
      losses.push_back(0);
      transport_.receive(0, kProgressTag, losses.data(), losses.size() * sizeof(double));
      slowest = losses.back();
      losses.pop_back();
      o_.progress(rank_, losses, slowest);
      return;
    }
    losses[replica_of(0)] += mine[0];
    for (int from = 1; from < transport_.size(); ++from) {
      double its[2];
      transport_.receive(from, kProgressTag, its, sizeof its);
      losses[replica_of(from)] += its[0];
      slowest = std::max(slowest, its[1]);
    }
    losses.push_back(slowest);
    for (int to = 1; to < transport_.size(); ++to)
      transport_.send(to, kProgressTag, losses.data(), losses.size() * sizeof(double));
    losses.pop_back();
    o_.progress(rank_, losses, slowest);
  }

  // ---- one step --------------------------------------------------------------------------------
  void one_step() {
    std::size_t index = 0;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
      const Block& block = p_.blocks[call.block.index()];
      micro_batch_ = call.micro_batch;
      for (std::size_t k = 0; k < block.instructions.size(); ++k, ++index) {
        const Instruction& i = block.instructions[k];
        come_to(static_cast<std::int64_t>(index));
        if (o_.before) o_.before(rank_, step_, index);
        const bool rests = (step_ + 1) % i.every != 0;
        const bool works = i.kind != Kind::allocate && i.kind != Kind::free;
        const bool timed = o_.record && step_ >= first_timed_ && !untimed_ && works;
        begin(i);
        if (o_.balanced_rows) give_gates(i);
        if (tag_ >= 0 && works) device_.belongs_to(tag_++);
        const std::int64_t start = timed ? mark() : 0;
        if (!rests) execute(block, call.block, k, i);
        if (timed) {
          const std::int64_t end = mark();
          result_.measured.samples.back().push_back(
              {call.block.value, static_cast<std::int32_t>(k), call.micro_batch, start, end});
        }
        order_.end();
      }
    }
  }

  /// A host's times are known at once, a device's after finish().
  std::int64_t mark() { return device_.is_host() ? (now() - step_start_).count() : device_.mark(); }
  void resolve_marks() {
    if (device_.is_host()) return;
    for (Sample& s : result_.measured.samples.back()) {
      s.start = device_.nanoseconds(s.start);
      s.end = device_.nanoseconds(s.end);
    }
  }
  void finish() {
    device_.finish();
    order_.forget();
    for (const Loss& loss : captured_ ? captured_losses_ : step_losses_) {
      float value = 0;
      widen(loss.type, loss.stored, &value, 1);
      losses_.back() += static_cast<double>(value);
    }
    step_losses_.clear();
    captured_ = false;
  }

  /// The instruction's stream waits for those that its memory comes from.
  void begin(const Instruction& i) {
    // What is sent is first copied, on its program's stream.
    const bool copied = links_ != nullptr && i.kind == Kind::send;
    order_.begin(o_.alone ? kComputeStream : copied ? i.stream : stream_of(i), i.after_compute);
    if (device_.is_host() || i.kind == Kind::allocate || i.kind == Kind::free) return;
    const auto block = [&](BufferId id) { return slot(p_.memory_of(id)).data; };
    for_each_read(i, [&](BufferId id) { order_.read(block(id)); });
    for_each_write(i, [&](BufferId id) { order_.write(block(id)); });
    if (i.kind != Kind::compute) return;
    // State of kernels of plain buffers, and what a part of attention adds to.
    for (const auto* list : {&i.outputs, &i.extras}) {
      if (list == &i.outputs && of_operator(i.kernel)) continue;
      for (const BufferId id : *list) {
        if (id.valid()) order_.write(block(id));
      }
    }
  }

  void execute(const Block& block, BlockId id, std::size_t k, const Instruction& i) {
    switch (i.kind) {
      case Kind::allocate:
        for (const BufferId b : i.writes) {
          // How many rows a routed buffer has is known when it is written.
          if (!p_.buffer(b).routed) take(b, slot(b), box(b).elements() * p_.buffer(b).width());
        }
        return;
      case Kind::free:
        for (const BufferId b : i.reads) {
          Instance& instance = slot(b);
          give_back(b, instance);
          instance = {};
        }
        return;
      case Kind::load:
        load(i);
        return;
      case Kind::send:
      case Kind::receive:
        message(block, i);
        return;
      case Kind::copy:
        if (box(i.reads[0]).held) {
          const std::int64_t bytes = box(i.reads[0]).elements() * p_.buffer(i.reads[0]).width();
          if (i.multiprocessors > 0) {
            device_.stand_in(data(i.writes[0]), data(i.reads[0]), bytes, i.multiprocessors);
          } else {
            device_.copy(data(i.writes[0]), data(i.reads[0]), bytes);
          }
        }
        return;
      case Kind::slice:
      case Kind::collective:
        collective(block, i, *collectives_[id.index()][k]);
        return;
      case Kind::compute:
        compute(i, kernels_[id.index()][k].get());
        return;
    }
  }

  std::int64_t message_tag(const Instruction& i) const {
    return kFirstMessageTag + static_cast<std::int64_t>(i.index) * (p_.micro_batches + 1) +
           p_.instance_of(i, micro_batch_) + 1;
  }

  void message(const Block& block, const Instruction& i) {
    const bool sends = i.kind == Kind::send;
    const BufferId b = sends ? i.reads[0] : i.writes[0];
    if (!box(b).held) return;
    const auto peer = static_cast<int>(p_.peer_of(i, rank_));
    transport_.doing(
        fmt::format("{} of {} in block {}", name(i.kind), p_.buffer(b).name, block.name));
    if (o_.alone) {
      if (sends) return;
      std::int64_t n = box(b).elements();
      if (p_.buffer(b).routed) {
        put_rows(b, chosen_rows(b, box(b)));
        n = rows_of(b).bytes / p_.buffer(b).width();
      }
      draw_received(b, data(b), n);
      return;
    }
    if (p_.buffer(b).routed) {
      routed_message(i, b, peer, sends);
      return;
    }
    pass_on(i, b, peer, box(b).elements() * p_.buffer(b).width(), sends);
  }
  void pass_on(const Instruction& i, BufferId b, int peer, std::int64_t bytes, bool sends) {
    if (links_ != nullptr) {
      if (bytes == 0) return;  // no rows: both know it
      const Channel channel = channel_of(i, rank_, peer);
      if (sends) {
        send_copy(i, channel, peer, b, bytes);
      } else {
        links_->receive(channel, peer, data(b), bytes);
      }
      return;
    }
    Visits visits(device_);
    std::byte* at = visit(visits, b, bytes, !sends);
    if (sends) {
      transport_.send(peer, message_tag(i), at, static_cast<std::size_t>(bytes));
    } else {
      transport_.receive(peer, message_tag(i), at, static_cast<std::size_t>(bytes));
      visits.give_back();
    }
  }

  /// In place of what another rank would send: normal numbers, or 0 where they are indices.
  void draw_received(BufferId id, std::byte* to, std::int64_t n) {
    const Buffer& b = p_.buffer(id);
    if (b.whole_numbers || (b.element_bytes != 0 && b.element_bytes != 4)) {
      device_.fill(to, n * b.width() / 4, 0);
    } else {
      device_.draw(to, type_of(id), n, 0, 1, o_.seed + id.index());
    }
  }

  /// A send of the links ends only when the other has come for it; ours must not wait for that, nor
  /// whoever uses the buffer next: ranks could wait for each other. So what is sent is a copy.
  void send_copy(const Instruction& i, const Channel& channel, int peer, BufferId b,
                 std::int64_t bytes) {
    const std::int64_t room = p_.buffer(b).routed ? Memory::roomy(bytes) : bytes;
    auto& copies = copies_[room];
    auto free = std::find_if(copies.begin(), copies.end(),
                             [&](const Copy& c) { return device_.reached(c.sent); });
    if (free == copies.end()) {
      copies.push_back({Spare(memory_, room), 0});
      free = std::prev(copies.end());
      // Another buffer's memory may still be in use.
      order_.write(free->room.at);
    }
    device_.copy(free->room.at, data(b), bytes);
    const Device::Event copied = device_.record();
    device_.on(stream_of(i));
    device_.wait(copied);
    links_->send(channel, peer, free->room.at, bytes);
    free->sent = device_.record();
    device_.on(i.stream);
  }

  /// Its rows are told by the transport, their values pass as others'.
  void routed_message(const Instruction& i, BufferId b, int peer, bool sends) {
    const std::int64_t tag = message_tag(i);
    Instance& instance = rows_of(b);
    std::int64_t n = static_cast<std::int64_t>(instance.rows.size());
    if (sends) {
      transport_.send(peer, tag, &n, sizeof n);
      transport_.send(peer, tag, instance.rows.data(), instance.rows.size() * sizeof(Row));
    } else {
      transport_.receive(peer, tag, &n, sizeof n);
      std::vector<Row> rows(static_cast<std::size_t>(n));
      transport_.receive(peer, tag, rows.data(), rows.size() * sizeof(Row));
      put_rows(b, std::move(rows));
    }
    pass_on(i, b, peer, instance.bytes, sends);
  }
  /// A routed buffer's values where the host can follow them.
  float* row_values(Visits& visits, BufferId id, bool written) {
    return floats(visits, id, rows_of(id).bytes / p_.buffer(id).width(), written);
  }

  /// Memory for the rows that a routed buffer turns out to have.
  void put_rows(BufferId id, std::vector<Row> rows) {
    const BufferId root = p_.memory_of(id);
    Instance& instance = slot(root);
    const std::int64_t bytes =
        static_cast<std::int64_t>(rows.size() * box(id).index[3].size()) * p_.buffer(id).width();
    Memory& memory = memory_of(root);
    const std::int64_t had = Memory::roomy(instance.bytes), room = Memory::roomy(bytes);
    memory.count(p_.buffer(root).category, bytes - instance.bytes);
    instance.bytes = bytes;
    if (room != had || instance.data == nullptr) {
      memory.give_back_spare(instance.data, had);
      instance.data = memory.take_spare(room);
      if (instance.data != nullptr) order_.write(instance.data);
    }
    instance.rows = std::move(rows);
  }
  void give_back(BufferId id, Instance& instance) {
    if (instance.data == nullptr) return;
    Memory& memory = memory_of(id);
    const Buffer& b = p_.buffer(id);
    memory.count(b.category, -instance.bytes);
    memory.give_back_spare(instance.data,
                           b.routed ? Memory::roomy(instance.bytes) : instance.bytes);
  }

  /// Makes this step's inputs before its clock starts: what a data loader does ahead of time.
  void make_inputs() {
    if (o_.drawn && step_ > 0 && !p_.sharded_storage) return;
    inputs_.clear();
    shard_.rewind();
    std::int64_t index = -1;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
      for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
        ++index;
        if (i.kind != Kind::load || !box(i.writes[0]).held) continue;
        const Buffer& b = p_.buffer(i.writes[0]);
        std::int64_t per_sample = 1;
        for (std::size_t d = 1; d < b.shape.size(); ++d) per_sample *= b.shape[d].extent;
        const auto first = static_cast<std::int64_t>(replica()) * p_.micro_batches * p_.samples +
                           static_cast<std::int64_t>(call.micro_batch) * p_.samples;
        std::vector<std::byte> made(
            static_cast<std::size_t>(box(i.writes[0]).elements() * b.width()));
        for_each_global(box(i.writes[0]), b, [&](std::int64_t k, std::int64_t g) {
          const double v = o_.input(static_cast<std::size_t>(i.index), step_,
                                    first + g / per_sample, g % per_sample);
          if (b.element_bytes == 8) {
            reinterpret_cast<std::int64_t*>(made.data())[k] = std::llround(v);
          } else {
            const auto value = static_cast<float>(v);
            narrow(type_of(i.writes[0]), &value, made.data() + k * b.width(), 1);
          }
        });
        auto& input = inputs_[{i.writes[0], call.micro_batch}];
        if (p_.sharded_storage) {
          come_to(index);
          input.at = shard_.append(o_.storage, rank_, made.data(), made.size());
          input.bytes = made.size();
        } else {
          input.size = std::ssize(made);
          if (device_.is_host() || made.empty()) {
            input.values = std::move(made);
          } else {
            input.pinned = Spare(inputs_memory_, input.size);
            std::memcpy(input.pinned.at, made.data(), made.size());
          }
        }
      }
    }
  }
  void load(const Instruction& i) {
    if (!box(i.writes[0]).held) return;
    const auto& made = inputs_.at({i.writes[0], micro_batch_});
    if (p_.sharded_storage) {
      Visits visits(device_);
      shard_.read(made.at,
                  visits.host(data(i.writes[0]), static_cast<std::int64_t>(made.bytes), true),
                  made.bytes);
      visits.give_back();
    } else {
      device_.bring(data(i.writes[0]), made.data(), made.size);
    }
  }

  // ---- collectives -----------------------------------------------------------------------------
  void collective(const Block& block, const Instruction& i, const Prepared& c) {
    if (c.group.size() > 1) {
      transport_.doing(fmt::format("{} of {} in block {}", name(i.collective),
                                   p_.buffer(i.reads[0]).name, block.name));
    }
    if (c.routed) {
      routed_collective(i, c);
      return;
    }
    // One buffer that everyone has alike is reduced where it lies.
    if (i.kind == Kind::collective && i.collective == CollectiveKind::all_reduce &&
        c.parts.size() == 1 && data(c.parts[0].from) == data(c.parts[0].to)) {
      call(i, c, data(c.parts[0].from), nullptr);
      return;
    }
    const bool exchange = i.kind == Kind::slice || i.collective == CollectiveKind::all_to_all ||
                          i.collective == CollectiveKind::halo_exchange ||
                          i.collective == CollectiveKind::shift;
    const auto n = c.group.size();
    const auto me = static_cast<std::size_t>(c.me);
    // The payload in chunks; chunk m is the concatenation of all buffers' parts for m.
    const bool split_in =
        i.kind == Kind::collective &&
        (i.collective == CollectiveKind::reduce_scatter || i.collective == CollectiveKind::scatter);
    const std::vector<std::int64_t>& bounds = split_in ? c.send_offsets : c.offsets;
    const std::int64_t total = std::max(bounds.back(), exchange ? 0 : c.send_offsets.back());
    const std::int64_t staged = (total + (exchange ? c.send_offsets.back() : 0)) * c.word;
    // Given back too where a peer's failure ends the call.
    const auto give_back = [&](std::byte* p) { memory_.give_back(Category::workspace, p, staged); };
    const std::unique_ptr<std::byte, decltype(give_back)> held(
        memory_.take(Category::workspace, staged), give_back);
    std::byte* payload = held.get();
    order_.write(payload);
    std::byte* outgoing = exchange ? payload + total * c.word : payload;
    for (std::size_t m = 0; m < n; ++m) {
      const bool own_chunk = !exchange && !split_in;
      // All-gather: the own chunk lies where it will be; others send what they have from the start.
      std::byte* to = outgoing;
      if (exchange || split_in) {
        to += c.send_offsets[m] * c.word;
      } else if (i.collective == CollectiveKind::all_gather ||
                 i.collective == CollectiveKind::gather) {
        to += c.offsets[me] * c.word;
      }
      if (own_chunk && m != me) continue;
      if (i.kind == Kind::collective && i.collective == CollectiveKind::scatter && c.me != 0)
        continue;
      for (const Part& part : c.parts) {
        device_.pack(part.out[m], c.word, data(part.from), to);
        to += count(part.out[m].runs) * c.word;
      }
    }
    if (i.kind == Kind::collective) {
      if (exchange && i.collective != CollectiveKind::shift) {
        device_.copy(payload + c.offsets[me] * c.word, outgoing + c.send_offsets[me] * c.word,
                     (c.send_offsets[me + 1] - c.send_offsets[me]) * c.word);
      }
      call(i, c, payload, outgoing);
    } else {
      device_.copy(payload, outgoing, c.send_offsets[1] * c.word);
    }
    for (const Part& part : c.parts) {
      if (part.adds_up && !i.accumulate && box(part.to).held)
        device_.fill(data(part.to), words(part.to), 0);
    }
    const bool gathers =
        i.kind == Kind::collective &&
        (i.collective == CollectiveKind::all_gather || i.collective == CollectiveKind::gather);
    for (std::size_t m = 0; m < n; ++m) {
      if (!exchange && !gathers && m != me) continue;
      if (i.kind == Kind::collective && i.collective == CollectiveKind::gather && c.me != 0)
        continue;
      const std::byte* from = payload + (exchange || gathers ? c.offsets[m]
                                         : split_in          ? c.send_offsets[me]
                                                             : 0) *
                                            c.word;
      for (const Part& part : c.parts) {
        if (i.accumulate || part.adds_up) {
          device_.unpack_add(part.in[m], c.type, from, data(part.to));
        } else {
          device_.unpack(part.in[m], c.word, from, data(part.to));
        }
        from += count(part.in[m].runs) * c.word;
      }
    }
  }

  /// `on_device`: that is where the payload lies.
  void call(const Instruction& i, const Prepared& c, std::byte* payload,
            const std::byte* outgoing) {
    if (c.group.size() == 1) return;
    CollectiveCall call;
    call.kind = i.collective;
    call.reduction = p_.buffer(i.reads[0]).layout.reduction;
    call.group = &c.group;
    call.me = c.me;
    call.element_bytes = static_cast<std::size_t>(c.word);
    call.type = c.type;
    call.data = payload;
    call.send = outgoing;
    call.tag = i.tie >= 0 ? kTieTag : kCollectiveTag;
    call.send_offsets = c.send_offsets;
    switch (i.collective) {
      case CollectiveKind::all_reduce:
      case CollectiveKind::broadcast:
      case CollectiveKind::reduce:
        call.offsets = {0, std::max(c.offsets.back(), c.send_offsets.back())};
        break;
      case CollectiveKind::reduce_scatter:
      case CollectiveKind::scatter:
        call.offsets = c.send_offsets;
        break;
      case CollectiveKind::all_gather:
      case CollectiveKind::gather:
      case CollectiveKind::all_to_all:
      case CollectiveKind::halo_exchange:
      case CollectiveKind::shift:
        call.offsets = c.offsets;
        break;
    }
    if (o_.alone) {
      const bool sums = i.collective == CollectiveKind::all_reduce ||
                        i.collective == CollectiveKind::reduce ||
                        i.collective == CollectiveKind::reduce_scatter;
      // What is summed stays what it was; numbers of each buffer are packed together.
      if (!sums)
        draw_received(i.reads[0], payload,
                      call.offsets.back() * c.word / p_.buffer(i.reads[0]).width());
      return;
    }
    carry_out(call, i, call.offsets.back() * c.word, c.send_offsets.back() * c.word);
  }
  /// By the links, or by the transport, on this device's memory.
  void carry_out(CollectiveCall call, const Instruction& i, std::int64_t bytes,
                 std::int64_t sent_bytes) {
    if (device_.is_host()) {
      transport_.collective(call);
      return;
    }
    if (links_ != nullptr) {
      links_->collective({*call.group, stream_of(i)}, call);
      return;
    }
    Visits visits(device_);
    std::byte* const at = call.data;
    call.data = visits.host(at, bytes, true);
    if (call.send != nullptr && call.send != at)
      call.send = visits.host(const_cast<std::byte*>(call.send), sent_bytes, false);
    transport_.collective(call);
    visits.give_back();
  }

  // ---- rows routed to experts ------------------------------------------------------------------
  static bool holds(const std::vector<std::int64_t>& list, std::int64_t x) {
    return std::binary_search(list.begin(), list.end(), x);
  }
  static bool wants(const Box& box, const Row& row) {
    return holds(box.index[0], row.sample) && holds(box.index[1], row.sequence) &&
           holds(box.index[2], row.expert);
  }
  static bool before(const Row& a, const Row& b) {
    return std::tie(a.expert, a.sample, a.sequence) < std::tie(b.expert, b.sample, b.sequence);
  }

  // ---- rows that are given ---------------------------------------------------------------------
  struct Given {
    std::int64_t tokens = 1, experts = 1, top_k = 1;  ///< tokens of a sample
    bool chooses(std::int64_t sample, std::int64_t position, std::int64_t expert) const {
      const std::int64_t first = (sample * tokens + position) * top_k % experts;
      return (expert - first + experts) % experts < top_k;
    }
  };
  Given given_by(std::int32_t op) const {
    const ProgramOperator& o = p_.operators[static_cast<std::size_t>(op)];
    const Shape& rows = o.signature.outputs[0].shape;
    return {rows[1].extent, std::get<Dispatch>(o.operation).experts, rows[2].extent};
  }
  /// A routed buffer's in a box, and in another, in their order.
  std::vector<Row> chosen_rows(BufferId id, const Box& box, const Box* also = nullptr) {
    if (dispatch_.empty()) dispatch_ = dispatch_of_buffers(p_);
    const Given given = given_by(dispatch_[id.index()]);
    std::vector<Row> rows;
    for (const std::int64_t e : box.index[2]) {
      if (also != nullptr && !holds(also->index[2], e)) continue;
      for (const std::int64_t s : box.index[0]) {
        for (const std::int64_t t : box.index[1]) {
          const Row row{s, t, e};
          if (given.chooses(s, t, e) && (also == nullptr || wants(*also, row))) rows.push_back(row);
        }
      }
    }
    return rows;
  }
  /// Before a Dispatch reads them, outside of its time; from where they are kept on the device.
  void give_gates(const Instruction& i) {
    if (i.kind != Kind::compute || i.kernel != Kernel::forward || i.op < 0 ||
        !std::holds_alternative<Dispatch>(p_.operators[static_cast<std::size_t>(i.op)].operation))
      return;
    if (tag_ >= 0) device_.belongs_to(-1);
    const BufferId gates = i.reads[1];
    const Box& all = box(gates);
    const std::int64_t bytes = all.elements() * p_.buffer(gates).width();
    auto kept = gates_.find(&i);
    if (kept == gates_.end()) {
      const Given given = given_by(i.op);
      std::vector<float> values;
      for (const std::int64_t s : all.index[0]) {
        for (const std::int64_t t : all.index[1]) {
          for (const std::int64_t e : all.index[2])
            values.push_back(given.chooses(s, t, e) ? 1 / static_cast<float>(given.top_k) : 0);
        }
      }
      std::vector<std::byte> stored(static_cast<std::size_t>(bytes));
      narrow(type_of(gates), values.data(), stored.data(), std::ssize(values));
      kept = gates_.emplace(&i, Spare(memory_, bytes)).first;
      order_.write(kept->second.at);
      device_.to_device(kept->second.at, stored.data(), bytes);
    }
    order_.write(slot(p_.memory_of(gates)).data);
    device_.copy(data(gates), kept->second.at, bytes);
  }
  /// As many rows as the others would have sent, and the memory to pack them.
  void rows_alone(const Instruction& i, const Prepared& c) {
    const BufferId from = i.reads[0], to = i.writes[0];
    auto it = alone_.find(&i);
    if (it == alone_.end()) {
      const auto shared = [](const Box& a, const Box& b) {
        std::int64_t n = 0;
        for (const std::int64_t f : a.index[3]) n += holds(b.index[3], f) ? 1 : 0;
        return n;
      };
      std::int64_t packed = 0;
      const auto pack = [&](const Box& has, const Box& wants) {
        const std::int64_t columns = shared(has, wants);
        if (columns == 0) return;
        packed += std::ssize(chosen_rows(from, has, &wants)) *
                  (static_cast<std::int64_t>(sizeof(Row)) + columns * p_.buffer(from).width());
      };
      const bool reduces =
          i.kind == Kind::collective && i.collective == CollectiveKind::reduce_scatter;
      for (const int member : c.group) {
        pack(box(from), box_of(p_, to, member));
        if (!reduces) pack(box_of(p_, from, member), box(to));
      }
      it = alone_.emplace(&i, std::pair{packed, chosen_rows(to, box(to))}).first;
    }
    const auto& [packed, rows] = it->second;
    memory_.count(Category::workspace, packed);
    put_rows(to, std::vector<Row>(rows));
    draw_received(to, data(to), rows_of(to).bytes / p_.buffer(to).width());
    memory_.count(Category::workspace, -packed);
  }

  void routed_collective(const Instruction& i, const Prepared& c) {
    PARTITA_ASSERT(i.reads.size() == 1, "routed buffers travel alone");
    const BufferId from = i.reads[0], to = i.writes[0];
    const std::size_t n = c.group.size(), me = static_cast<std::size_t>(c.me);
    Instance& source = rows_of(from);
    if (i.kind == Kind::collective && i.collective == CollectiveKind::all_reduce) {
      if (rows_of(from).data != rows_of(to).data) {
        put_rows(to, std::vector<Row>(source.rows));
        device_.copy(data(to), data(from), rows_of(to).bytes);
      }
      Prepared whole;
      whole.group = c.group;
      whole.me = c.me;
      whole.type = type_of(to);
      whole.word = p_.buffer(to).width();
      whole.offsets = {0, rows_of(to).bytes / whole.word};
      whole.send_offsets = whole.offsets;
      call(i, whole, data(to), nullptr);
      return;
    }
    if (o_.alone && i.kind == Kind::collective) {
      rows_alone(i, c);
      return;
    }
    // What every member wants of mine: rows by key, and where their columns lie.
    const bool reduces =
        i.kind == Kind::collective && i.collective == CollectiveKind::reduce_scatter;
    const auto& mine = box(from).index[3];
    const std::int64_t element = p_.buffer(from).width();
    std::vector<std::int64_t> rows_to(n, 0), values_to(n + 1, 0);
    std::vector<Row> keys;
    RunList outgoing;
    outgoing.passing = true;
    const Exchange& plan = exchange_of(i, c, from, to);
    for (std::size_t m = 0; m < n; ++m) {
      const std::vector<Run>& columns = plan.out[m];
      values_to[m + 1] = values_to[m];
      for (std::size_t r = 0; r < source.rows.size() && !columns.empty(); ++r) {
        if (!plan.wants[m].has(source.rows[r])) continue;
        keys.push_back(source.rows[r]);
        ++rows_to[m];
        values_to[m + 1] += add_row(outgoing, r, mine.size(), columns);
      }
    }
    const std::int64_t sent_bytes = values_to[n] * element;
    const auto packed_keys = static_cast<std::int64_t>(keys.size() * sizeof(Row));
    if (reduces) {
      memory_.count(Category::workspace, packed_keys + sent_bytes);
      const Spare sums(memory_, Memory::roomy(sent_bytes));
      order_.write(sums.at);
      device_.pack(outgoing, element, data(from), sums.at);
      Prepared chunks;
      chunks.group = c.group;
      chunks.me = c.me;
      chunks.type = type_of(from);
      chunks.word = element;
      chunks.send_offsets = chunks.offsets = values_to;
      call(i, chunks, sums.at, nullptr);
      std::int64_t first = 0;
      for (std::size_t m = 0; m < me; ++m) first += rows_to[m];
      put_rows(to, {keys.begin() + first, keys.begin() + first + rows_to[me]});
      device_.copy(data(to), sums.at + values_to[me] * element,
                   (values_to[me + 1] - values_to[me]) * element);
      memory_.count(Category::workspace, -packed_keys - sent_bytes);
      return;
    }
    // Counts, keys, values: three exchanges of the same shape. The host knows who has which rows.
    std::vector<std::int64_t> rows_from(n, 0);
    const auto exchange = [&](const void* out, const std::vector<std::int64_t>& out_bounds,
                              void* in, const std::vector<std::int64_t>& in_bounds,
                              std::size_t bytes) {
      const auto* send = static_cast<const std::byte*>(out);
      auto* receive = static_cast<std::byte*>(in);
      const auto at = [&](const std::vector<std::int64_t>& list, std::size_t m) {
        return static_cast<std::size_t>(list[m]) * bytes;
      };
      if (at(out_bounds, me + 1) > at(out_bounds, me))
        std::memcpy(receive + at(in_bounds, me), send + at(out_bounds, me),
                    at(out_bounds, me + 1) - at(out_bounds, me));
      if (n > 1)
        transport_.collective(
            all_to_all(c, receive, send, in_bounds, out_bounds, static_cast<std::int64_t>(bytes)));
    };
    std::vector<std::int64_t> each(n + 1);
    for (std::size_t m = 0; m <= n; ++m) each[m] = static_cast<std::int64_t>(m);
    exchange(rows_to.data(), each, rows_from.data(), each, sizeof(std::int64_t));
    std::vector<std::int64_t> key_out(n + 1, 0), key_in(n + 1, 0), value_in(n + 1, 0);
    for (std::size_t m = 0; m < n; ++m) {
      key_out[m + 1] = key_out[m] + rows_to[m];
      key_in[m + 1] = key_in[m] + rows_from[m];
      value_in[m + 1] = value_in[m] + rows_from[m] * count(plan.in[m]);
    }
    std::vector<Row> keys_in(static_cast<std::size_t>(key_in[n]));
    exchange(keys.data(), key_out, keys_in.data(), key_in, sizeof(Row));
    const std::int64_t received_bytes = value_in[n] * element;
    const std::int64_t packed = packed_keys +
                                static_cast<std::int64_t>(keys_in.size() * sizeof(Row)) +
                                sent_bytes + received_bytes;
    memory_.count(Category::workspace, packed);
    const Spare sent(memory_, Memory::roomy(sent_bytes)),
        received(memory_, Memory::roomy(received_bytes));
    order_.write(sent.at);
    order_.write(received.at);
    device_.pack(outgoing, element, data(from), sent.at);
    device_.copy(received.at + value_in[me] * element, sent.at + values_to[me] * element,
                 (values_to[me + 1] - values_to[me]) * element);
    if (n > 1) {
      CollectiveCall values = all_to_all(c, received.at, sent.at, value_in, values_to, element);
      values.type = type_of(from);
      carry_out(values, i, received_bytes, sent_bytes);
    }
    std::vector<Row> rows = keys_in;
    std::sort(rows.begin(), rows.end(), before);
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    RunList incoming;
    incoming.passing = true;
    for (std::size_t m = 0; m < n; ++m) {
      for (std::int64_t r = key_in[m]; r < key_in[m + 1]; ++r) {
        const auto it = std::lower_bound(rows.begin(), rows.end(),
                                         keys_in[static_cast<std::size_t>(r)], before);
        add_row(incoming, static_cast<std::size_t>(it - rows.begin()), box(to).index[3].size(),
                plan.in[m]);
      }
    }
    put_rows(to, std::move(rows));
    device_.unpack(incoming, element, received.at, data(to));
    memory_.count(Category::workspace, -packed);
  }
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
  const Exchange& exchange_of(const Instruction& i, const Prepared& c, BufferId from, BufferId to) {
    const auto it = exchanges_.find(&i);
    if (it != exchanges_.end()) return it->second;
    Exchange e;
    const auto &mine = box(from).index[3], &here = box(to).index[3];
    for (const int member : c.group) {
      const Box theirs = box_of(p_, to, member);
      e.wants.emplace_back(theirs);
      e.out.push_back(shared_columns(mine, theirs.index[3], mine));
      e.in.push_back(shared_columns(box_of(p_, from, member).index[3], here, here));
    }
    return exchanges_.emplace(&i, std::move(e)).first->second;
  }
  /// Where in a row of columns `of` those lie that both lists have; both ascend.
  static std::vector<Run> shared_columns(const std::vector<std::int64_t>& a,
                                         const std::vector<std::int64_t>& b,
                                         const std::vector<std::int64_t>& of) {
    std::vector<Run> runs;
    for (std::size_t k = 0; k < of.size(); ++k) {
      if (!holds(a, of[k]) || !holds(b, of[k])) continue;
      const auto at = static_cast<std::int64_t>(k);
      if (!runs.empty() && runs.back().offset + runs.back().count == at) {
        ++runs.back().count;
      } else {
        runs.push_back({at, 1});
      }
    }
    return runs;
  }
  /// Adds a row's columns; returns how many.
  static std::int64_t add_row(RunList& list, std::size_t row, std::size_t width,
                              const std::vector<Run>& columns) {
    std::int64_t n = 0;
    for (const Run& r : columns) {
      list.runs.push_back({static_cast<std::int64_t>(row * width) + r.offset, r.count});
      n += r.count;
    }
    return n;
  }
  static CollectiveCall all_to_all(const Prepared& c, std::byte* to, const std::byte* from,
                                   const std::vector<std::int64_t>& bounds,
                                   const std::vector<std::int64_t>& send_bounds,
                                   std::int64_t element) {
    CollectiveCall one;
    one.kind = CollectiveKind::all_to_all;
    one.group = &c.group;
    one.me = c.me;
    one.element_bytes = static_cast<std::size_t>(element);
    one.data = to;
    one.send = from;
    one.offsets = bounds;
    one.send_offsets = send_bounds;
    one.tag = kCollectiveTag;
    return one;
  }

  // ---- kernels ---------------------------------------------------------------------------------
  void compute(const Instruction& i, OperatorKernel* kernel) {
    if (i.kernel == Kernel::initialise) {
      initialise(i.writes[0]);
      return;
    }
    if (i.kernel == Kernel::read) {
      read(i.writes[0]);
      return;
    }
    if (!of_operator(i.kernel)) {
      plain(i);
      return;
    }
    if (!kernel) return;
    kernel->set_step(step_, static_cast<std::int64_t>(micro_batch_) * p_.samples);
    Arguments a;
    const auto fill = [&](std::vector<Tensor>& to, const std::vector<BufferId>& from) {
      for (const BufferId id : from) to.push_back(tensor(id));
    };
    fill(a.inputs, i.reads);
    fill(a.parameters, i.parameters);
    fill(a.outputs, i.outputs);
    fill(a.output_gradients, i.gradients);
    fill(a.extras, i.extras);
    a.accumulate = i.accumulate;
    const Signature& s = *kernel->context().signature;
    const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
    a.whole_statistics = true;
    for (std::size_t d = 0; d < op.cuts.size(); ++d)
      a.whole_statistics &= s.dims[d].use != DimUse::statistic || op.cuts[d].atoms.empty();
    if (of_sequence_part(i)) {
      product_part(i, *kernel, a);
      return;
    }
    if (i.part >= 0) {
      fill(a.results, i.writes);
      const bool forward = i.kernel == Kernel::forward;
      if (!i.accumulate) {
        for (const BufferId id : i.writes) device_.fill(data(id), words(id), 0);
        // Log-sum-exps are fp32.
        if (forward)
          device_.fill(data(i.extras[0]), a.extras[0].size(),
                       -std::numeric_limits<float>::infinity());
      }
      kernel->run(forward ? Work::attend_part : Work::attend_part_backward, 0, a);
      return;
    }
    const bool own = i.inline_statistics && a.whole_statistics && kernel->makes_statistics();
    if (i.kernel == Kernel::forward && i.inline_statistics) {
      for (std::size_t k = 0; k < s.forward_statistics.size(); ++k) {
        a.results = {tensor(i.statistics[k])};
        a.accumulate = false;
        if (!own) kernel->run(Work::forward_statistic, k, a);
        a.statistics.push_back(a.results[0]);
      }
      a.accumulate = i.accumulate;
    } else {
      fill(a.statistics, i.statistics);
    }
    std::vector<std::vector<cpu::Indices>> inline_index;
    std::vector<Spare> inline_sums;
    if (i.kernel == Kernel::backward_data && i.inline_statistics) {
      inline_index.reserve(s.backward_statistics.size());
      for (std::size_t k = 0; k < s.backward_statistics.size(); ++k) {
        const Statistic& statistic = s.backward_statistics[k];
        inline_index.emplace_back();
        for (const int d : statistic.dims)
          inline_index.back().push_back(kernel->context().indices[static_cast<std::size_t>(d)]);
        inline_index.back().emplace_back();
        for (std::int64_t w = 0; w < statistic.width; ++w) inline_index.back().back().push_back(w);
        Tensor t;
        t.index = &inline_index.back();
        inline_sums.emplace_back(memory_, t.size() * 4);
        order_.write(inline_sums.back().at);
        t.values = reinterpret_cast<float*>(inline_sums.back().at);
        a.results = {t};
        if (!own) kernel->run(Work::backward_statistic, k, a);
        a.backward_statistics.push_back(t);
      }
    } else {
      fill(a.backward_statistics, i.backward_statistics);
    }
    a.own_statistics = own;
    a.results.clear();
    fill(a.results, i.writes);
    std::set<std::size_t> placed;
    a.place = [&](std::size_t k, const std::vector<Row>& rows) {
      placed.insert(k);
      if (i.accumulate) {
        PARTITA_ASSERT(rows_of(i.writes[k]).rows == rows, "rows to add to differ");
      } else {
        put_rows(i.writes[k], std::vector<Row>(rows));
      }
      return values(i.writes[k]);
    };
    kernel->run(work_of(i.kernel), static_cast<std::size_t>(i.index), a);
    for (std::size_t k = 0; k < i.writes.size(); ++k) {
      if (!i.writes[k].valid() || !p_.buffer(i.writes[k]).routed || placed.count(k) > 0) continue;
      auto& made = kernel->routed[k];
      if (i.accumulate) {
        PARTITA_ASSERT(rows_of(i.writes[k]).rows == made.rows, "rows to add to differ");
        Visits visits(device_);
        float* to = row_values(visits, i.writes[k], true);
        for (std::size_t x = 0; x < made.values.size(); ++x) to[x] += made.values[x];
        visits.give_back();
        continue;
      }
      put_rows(i.writes[k], std::move(made.rows));
      std::vector<std::byte> stored(made.values.size() *
                                    static_cast<std::size_t>(p_.buffer(i.writes[k]).width()));
      narrow(type_of(i.writes[k]), made.values.data(), stored.data(), std::ssize(made.values));
      device_.to_device(data(i.writes[k]), stored.data(), std::ssize(stored));
    }
    if (o_.routing && step_ >= first_timed_ && !untimed_ && i.kernel == Kernel::forward &&
        !i.recomputed && std::holds_alternative<Dispatch>(op.operation)) {
      const auto& rows = rows_of(i.writes[0]).rows;
      routed_.insert(routed_.end(),
                     {step_, i.op, micro_batch_, static_cast<std::int64_t>(rows.size())});
      for (const Row& r : rows) routed_.insert(routed_.end(), {r.sample, r.sequence, r.expert});
    }
    if (i.kernel == Kernel::forward && op.has_loss && !i.recomputed) note_loss(i.writes[0]);
  }

  // ---- products with one part of the sequence
  // ----------------------------------------------------
  bool of_sequence_part(const Instruction& i) const {
    return i.part >= 0 && !std::holds_alternative<Attention>(
                              p_.operators[static_cast<std::size_t>(i.op)].operation);
  }
  /// What a part of the sequence is of a buffer: where it lies, and room for it by itself.
  struct Slice {
    Box box;
    RunList runs;  ///< empty: the buffer is the part
    std::int64_t word = 4;
    Spare values;
    float* at() const { return reinterpret_cast<float*>(values.at); }
  };
  Slice slice_of(const Instruction& i, BufferId id) {
    Slice s;
    s.box = box(id);
    const int d = sequence_dim(p_.buffer(id));
    if (d < 0) return s;
    auto positions = part_positions(p_, i, rank_);
    if (s.box.index[static_cast<std::size_t>(d)] == positions) return s;
    s.box.index[static_cast<std::size_t>(d)] = std::move(positions);
    s.runs = section(box(id), s.box);
    s.word = p_.buffer(id).width();
    s.values = Spare(memory_, s.box.dense() * s.word);
    return s;
  }

  void product_part(const Instruction& i, OperatorKernel& kernel, Arguments& a) {
    auto& slices = slices_[&i];
    if (slices.empty()) {
      for (const auto* list : {&i.reads, &i.gradients, &i.writes}) {
        for (const BufferId id : *list) slices.push_back(id.valid() ? slice_of(i, id) : Slice{});
      }
    }
    std::size_t at = 0;
    const auto take = [&](Tensor& t) {
      Slice& s = slices[at++];
      if (!t || s.runs.runs.empty()) return;
      order_.write(s.values.at);
      device_.pack(s.runs, s.word, reinterpret_cast<const std::byte*>(t.values), s.values.at);
      t.index = &s.box.index;
      t.values = s.at();
    };
    for (Tensor& t : a.inputs) take(t);
    for (Tensor& t : a.output_gradients) take(t);
    const std::size_t first = at;
    for (const BufferId id : i.writes) {
      Tensor t = tensor(id);
      Slice& s = slices[at++];
      if (t && !s.runs.runs.empty()) {
        order_.write(s.values.at);
        t.index = &s.box.index;
        t.values = s.at();
        if (i.accumulate) device_.fill(s.values.at, (s.box.dense() * s.word + 3) / 4, 0);
      }
      a.results.push_back(t);
    }
    kernel.run(work_of(i.kernel), 0, a);
    for (std::size_t k = 0; k < i.writes.size(); ++k) {
      Slice& s = slices[first + k];
      if (s.runs.runs.empty() || !i.writes[k].valid()) continue;
      if (i.accumulate) {
        device_.unpack_add(s.runs, type_of(i.writes[k]), s.values.at, data(i.writes[k]));
      } else {
        device_.unpack(s.runs, s.word, s.values.at, data(i.writes[k]));
      }
    }
  }

  // ---- plain buffers ---------------------------------------------------------------------------
  void plain(const Instruction& i) {
    if (i.kernel == Kernel::add && p_.buffer(i.writes[0]).routed && box(i.writes[0]).held)
      put_rows(i.writes[0], std::vector<Row>(rows_of(i.reads[0]).rows));
    if (i.kernel == Kernel::optimizer && last_step_ && o_.collect) keep_gradient(i);
    PlainCall call;
    call.program = &p_;
    call.instruction = &i;
    call.step = step_;
    call.optimizer = p_.optimizer;
    if (o_.drawn) call.optimizer.learning_rate = 0;
    bool host = false;
    const auto fill = [&](std::vector<PlainCall::Operand>& to, const std::vector<BufferId>& from) {
      for (const BufferId id : from) {
        to.emplace_back();
        if (!id.valid() || !box(id).held) continue;
        const Buffer& b = p_.buffer(id);
        const std::int64_t n = b.routed ? rows_of(id).bytes / b.width() : box(id).elements();
        to.back() = {data(id), n, n * b.width(), &box(id), b.host, type_of(id)};
        host |= b.host;
      }
    };
    fill(call.reads, i.reads);
    fill(call.outputs, i.outputs);
    fill(call.statistics, i.statistics);
    fill(call.extras, i.extras);
    fill(call.writes, i.writes);
    // What compressed gradients travel as is the kernel's own business.
    if (i.kernel == Kernel::compress || i.kernel == Kernel::decompress) {
      for (auto& o : i.kernel == Kernel::compress ? call.writes : call.reads)
        o.type = ElementType::fp32;
    }
    if (host && !device_.is_host()) {
      device_.host_waits(device_.record());
      plain_by_visit(device_, call);
      return;
    }
    device_.plain(call);
  }

  /// What the optimizer sees is the gradient: kept for comparison.
  void keep_gradient(const Instruction& i) {
    const BufferId id = i.reads[0];
    if (!box(i.writes[0]).held) return;
    auto& kept = gradients_[id];
    kept.resize(static_cast<std::size_t>(box(i.writes[0]).elements()));
    Visits visits(device_);
    const float* from = floats(visits, id, std::ssize(kept), false);
    std::copy_n(from, kept.size(), kept.data());
  }

  void note_loss(BufferId id) {
    const Buffer& b = p_.buffer(id);
    if (!reference::counts_loss(p_, b, rank_)) return;
    if (device_.is_host()) {
      float value = 0;
      widen(type_of(id), data(id), &value, 1);
      losses_.back() += static_cast<double>(value);
      return;
    }
    // A deque: those before stay where they are.
    Loss& loss = step_losses_.emplace_back();
    loss.type = type_of(id);
    device_.to_host_later(loss.stored, data(id), b.width());
  }

  // ---- results on rank 0 -----------------------------------------------------------------------
  /// A buffer whose values are asked for at the end: where a stage keeps a parameter, or what its
  /// optimizer reads as the gradient.
  struct Wanted {
    BufferId buffer;
    std::size_t parameter;
    bool gradient;
  };
  std::vector<Wanted> wanted_of(int stage) const {
    std::vector<Wanted> all;
    if (!o_.collect) return all;
    std::set<BufferId> blocks_seen;
    const auto add = [&](BufferId id, std::int32_t parameter, bool gradient) {
      if (blocks_seen.insert(id).second)
        all.push_back({id, static_cast<std::size_t>(parameter), gradient});
    };
    std::set<BlockId> blocks;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage)])
      blocks.insert(call.block);
    for (const BlockId block : blocks) {
      for (const Instruction& i : p_.blocks[block.index()].instructions) {
        const auto note = [&](BufferId id) {
          const Buffer& b = p_.buffer(id);
          if (b.category == Category::parameters && b.parameter >= 0 && b.alias < 0 &&
              b.scope == Scope::step)
            add(id, b.parameter, false);
        };
        for_each_read(i, note);
        for_each_write(i, note);
        if (i.kind == Kind::compute && i.kernel == Kernel::optimizer)
          add(i.reads[0], p_.buffer(i.writes[0]).parameter, true);
      }
    }
    return all;
  }
  std::size_t replica_of(int rank) const {
    AtomList list;
    for (std::size_t i = 0; i < p_.mesh.atoms.size(); ++i) {
      if (has(p_.replicas, static_cast<AtomId>(i))) list.push_back(static_cast<AtomId>(i));
    }
    return static_cast<std::size_t>(p_.mesh.coordinate(p_.place_of(rank), list));
  }

  void collect() {
    transport_.doing("the collection of results");
    std::vector<float> all;
    for (const Wanted& w : wanted_of(stage_)) {
      if (!box(w.buffer).held) continue;
      const auto n = static_cast<std::size_t>(box(w.buffer).elements());
      if (w.gradient) {
        const auto& kept = gradients_.at(w.buffer);
        all.insert(all.end(), kept.begin(), kept.end());
        continue;
      }
      Visits visits(device_);
      const float* from = floats(visits, w.buffer, static_cast<std::int64_t>(n), false);
      all.insert(all.end(), from, from + n);
    }
    if (rank_ != 0) {
      transport_.send(0, kResultTag, losses_.data(), losses_.size() * sizeof(double));
      transport_.send(0, kResultTag, all.data(), all.size() * sizeof(float));
      transport_.barrier();
      return;
    }
    auto& result = result_.values;
    const auto replicas = static_cast<std::size_t>(p_.mesh.size(p_.replicas));
    result.losses.assign(losses_.size(), std::vector<double>(replicas, 0.0));
    result.gradients.assign(replicas, std::vector<std::vector<double>>(p_.parameters.size()));
    result.parameters = result.gradients;
    std::map<std::tuple<std::size_t, std::size_t, bool>, std::vector<char>> seen;
    for (int from = 0; from < transport_.size(); ++from) {
      const std::size_t r = replica_of(from);
      std::vector<std::pair<Wanted, Box>> pieces;
      std::size_t count = 0;
      for (const Wanted& w : wanted_of(p_.stage_of(from))) {
        Box b = box_of(p_, w.buffer, from);
        count += static_cast<std::size_t>(b.elements());
        if (b.held) pieces.emplace_back(w, std::move(b));
      }
      if (from != 0) {
        all.resize(count);
        transport_.receive(from, kResultTag, losses_.data(), losses_.size() * sizeof(double));
        transport_.receive(from, kResultTag, all.data(), all.size() * sizeof(float));
      }
      for (std::size_t s = 0; s < losses_.size(); ++s) result.losses[s][r] += losses_[s];
      std::size_t at = 0;
      for (const auto& [w, b] : pieces) {
        auto& to = (w.gradient ? result.gradients : result.parameters)[r][w.parameter];
        auto& have = seen[{r, w.parameter, w.gradient}];
        std::int64_t n = 1;
        for (const auto& d : p_.parameters[w.parameter].shape) n *= d.extent;
        to.resize(static_cast<std::size_t>(n));
        have.resize(to.size(), 0);
        for_each_global(b, p_.buffer(w.buffer), [&](std::int64_t k, std::int64_t g) {
          const auto v = static_cast<double>(all[at + static_cast<std::size_t>(k)]);
          auto& old = to[static_cast<std::size_t>(g)];
          if (have[static_cast<std::size_t>(g)] && old != v) {
            const double scale = std::max({std::abs(v), std::abs(old), 1e-12});
            result.copies_differ = std::max(result.copies_differ, std::abs(v - old) / scale);
          }
          old = v;
          have[static_cast<std::size_t>(g)] = 1;
        });
        at += static_cast<std::size_t>(b.elements());
      }
    }
    transport_.barrier();
  }

  /// Every rank's measurement on rank 0, as a list of words.
  void collect_measurements() {
    RankMeasurement& m = result_.measured;
    if (rank_ != 0) {
      std::vector<std::int64_t> words{m.peak.count, m.last_peak.count, m.host_peak.count,
                                      m.reserved.count};
      const OutsideMemory& o = m.outside;
      for (const Bytes b : {o.context, o.kernels, o.libraries, o.workspace, o.communicators})
        words.push_back(b.count);
      words.push_back(static_cast<std::int64_t>(o.by_ranks.size()));
      for (const auto& [n, bytes] : o.by_ranks) words.insert(words.end(), {n, bytes.count});
      for (const Bytes b : m.at_peak) words.push_back(b.count);
      for (const Bytes b : m.last_at_peak) words.push_back(b.count);
      const auto real = [](double v) {
        std::int64_t word;
        std::memcpy(&word, &v, sizeof word);
        return word;
      };
      words.push_back(real(m.clock_uncertainty_s));
      words.push_back(static_cast<std::int64_t>(m.step_s.size()));
      for (const double s : m.step_s) words.push_back(real(s));
      for (const auto* list : {&m.plain_s, &m.queued_s, &m.captured_s}) {
        words.push_back(static_cast<std::int64_t>(list->size()));
        for (const double s : *list) words.push_back(real(s));
      }
      words.push_back(static_cast<std::int64_t>(m.samples.size()));
      for (const auto& step : m.samples) {
        words.push_back(static_cast<std::int64_t>(step.size()));
        for (const Sample& s : step)
          words.insert(words.end(), {s.block, s.instruction, s.micro_batch, s.start, s.end});
      }
      const Traffic& t = m.traffic;
      words.insert(words.end(), {t.messages, t.sends, t.send_bytes,
                                 static_cast<std::int64_t>(t.bytes_to.size())});
      for (const auto& [to, bytes] : t.bytes_to) words.insert(words.end(), {to, bytes});
      words.push_back(static_cast<std::int64_t>(t.collectives.size()));
      for (const auto& [kind, c] : t.collectives)
        words.insert(words.end(), {static_cast<std::int64_t>(kind), c.calls, c.payload_bytes});
      const auto n = static_cast<std::int64_t>(words.size());
      transport_.send(0, kResultTag, &n, sizeof n);
      transport_.send(0, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
      transport_.barrier();
      return;
    }
    result_.ranks = {m};
    for (int from = 1; from < transport_.size(); ++from) {
      std::int64_t n = 0;
      transport_.receive(from, kResultTag, &n, sizeof n);
      std::vector<std::int64_t> words(static_cast<std::size_t>(n));
      transport_.receive(from, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
      std::size_t at = 0;
      const auto next = [&] { return words.at(at++); };
      RankMeasurement r;
      r.rank = from;
      r.peak = Bytes{next()};
      r.last_peak = Bytes{next()};
      r.host_peak = Bytes{next()};
      r.reserved = Bytes{next()};
      OutsideMemory& o = r.outside;
      for (Bytes* b : {&o.context, &o.kernels, &o.libraries, &o.workspace, &o.communicators})
        *b = Bytes{next()};
      for (std::int64_t k = next(); k > 0; --k) {
        const auto ranks = static_cast<int>(next());
        o.by_ranks[ranks] = Bytes{next()};
      }
      for (Bytes& b : r.at_peak) b = Bytes{next()};
      for (Bytes& b : r.last_at_peak) b = Bytes{next()};
      const std::int64_t uncertainty = next();
      std::memcpy(&r.clock_uncertainty_s, &uncertainty, sizeof uncertainty);
      for (auto* list : {&r.step_s, &r.plain_s, &r.queued_s, &r.captured_s}) {
        list->resize(static_cast<std::size_t>(next()));
        for (double& s : *list) {
          const std::int64_t word = next();
          std::memcpy(&s, &word, sizeof s);
        }
      }
      r.samples.resize(static_cast<std::size_t>(next()));
      for (auto& step : r.samples) {
        step.resize(static_cast<std::size_t>(next()));
        for (Sample& s : step) {
          s.block = static_cast<std::int32_t>(next());
          s.instruction = static_cast<std::int32_t>(next());
          s.micro_batch = static_cast<std::int32_t>(next());
          s.start = next();
          s.end = next();
        }
      }
      Traffic& t = r.traffic;
      t.messages = next(), t.sends = next(), t.send_bytes = next();
      for (std::int64_t k = next(); k > 0; --k) {
        const auto to = static_cast<int>(next());
        t.bytes_to[to] = next();
      }
      for (std::int64_t k = next(); k > 0; --k) {
        auto& c = t.collectives[static_cast<CollectiveKind>(next())];
        c.calls = next();
        c.payload_bytes = next();
      }
      result_.ranks.push_back(std::move(r));
    }
    transport_.barrier();
  }

  /// Rows of all ranks, counted on rank 0: several may have dispatched the same token.
  void collect_routing() {
    const auto n = static_cast<std::int64_t>(routed_.size());
    if (rank_ != 0) {
      transport_.send(0, kResultTag, &n, sizeof n);
      transport_.send(0, kResultTag, routed_.data(), routed_.size() * sizeof(std::int64_t));
      transport_.barrier();
      return;
    }
    Routing& r = result_.routing;
    const std::int64_t replicas = p_.mesh.size(p_.replicas), batch = p_.samples * p_.micro_batches;
    r.samples = replicas * batch;
    r.positions = routed_positions(p_);
    const auto pieces = static_cast<std::int64_t>(r.positions.size()) - 1;
    std::map<std::int64_t, std::size_t> layers;
    for (const std::int32_t op : dispatch_of_buffers(p_)) {
      if (op < 0 || !layers.emplace(op, r.layers.size()).second) continue;
      const ProgramOperator& o = p_.operators[static_cast<std::size_t>(op)];
      r.layers.push_back({o.name, std::get<Dispatch>(o.operation).experts,
                          o.signature.outputs[0].shape[2].extent});
    }
    for (int s = 0; s < o_.steps; ++s) {
      r.steps.push_back({first_timed_ + s, {}});
      for (const Routing::Layer& l : r.layers)
        r.steps.back().counts.emplace_back(static_cast<std::size_t>(r.samples * pieces * l.experts),
                                           0);
    }
    std::set<std::array<std::int64_t, 5>> seen;  // step, op, sample, position, expert
    for (int from = 0; from < transport_.size(); ++from) {
      std::vector<std::int64_t> words = routed_;
      if (from != 0) {
        std::int64_t count = 0;
        transport_.receive(from, kResultTag, &count, sizeof count);
        words.resize(static_cast<std::size_t>(count));
        transport_.receive(from, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
      }
      const auto first = static_cast<std::int64_t>(replica_of(from)) * batch;
      for (std::size_t at = 0; at < words.size();) {
        const std::int64_t step = words[at], op = words[at + 1], m = words[at + 2];
        const auto end = at + 4 + static_cast<std::size_t>(3 * words[at + 3]);
        const std::size_t layer = layers.at(op);
        for (at += 4; at < end; at += 3) {
          const std::int64_t sample = first + m * p_.samples + words[at];
          if (!seen.insert({step, op, sample, words[at + 1], words[at + 2]}).second) continue;
          const auto piece =
              std::upper_bound(r.positions.begin(), r.positions.end(), words[at + 1]) -
              r.positions.begin() - 1;
          ++r.steps[static_cast<std::size_t>(step - first_timed_)]
                .counts[layer][static_cast<std::size_t>(
                    (sample * pieces + piece) * r.layers[layer].experts + words[at + 2])];
        }
      }
    }
    transport_.barrier();
  }

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
  Links* links_;  ///< null: collectives and messages pass through the host
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
  bool captured_ = false;  ///< this step is one launch
  bool one_way_ = false;   ///< is taken
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

}  // namespace

RankResult run_rank(const Program& program, Transport& transport, const Options& options) {
  const auto device = options.device ? options.device(transport.rank()) : host_device();
  return Executor(program, transport, *device, options).run();
}

RankResult run_alone(const Program& program, int rank, Options options) {
  PARTITA_ASSERT(rank >= 0 && rank < program.ranks(), fmt::format("rank {}", rank));
  options.alone = options.drawn = options.balanced_rows = true;
  options.collect = options.routing = false;
  options.progress = nullptr;
  const auto transport = lone_transport(rank, static_cast<int>(program.ranks()));
  return run_rank(program, *transport, options);
}

}  // namespace partita::execute
