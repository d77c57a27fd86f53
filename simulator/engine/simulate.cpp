#include "simulator/engine/simulate.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "simulator/engine/compile.h"
#include "simulator/engine/device_use.h"
#include "simulator/engine/progress.h"
#include "simulator/engine/turns.h"
#include "simulator/engine/worn.h"

namespace partita {
namespace {

/// What a block call does when started with the compute stream at time 0 and everything else as its
/// key says.
struct Replay {
  std::vector<std::int64_t> free;  ///< of the block's streams, at its end
  std::int64_t host = 0;  ///< at its end; where it is ahead, how much later than at the start
  std::vector<std::int32_t> stream_labels;
  std::vector<std::pair<std::int32_t, std::int64_t>> spent;  ///< label, ticks
  struct Made {
    std::int32_t slot;
    std::int64_t ready, begin;
    std::int32_t label, before;
  };
  std::vector<Made> marks;
  std::vector<std::tuple<std::int32_t, std::int32_t, bool, std::int64_t>>
      messages;                  ///< id, to class, once a step?, start
  std::vector<Running> running;  ///< at its end
};

struct Meeting {
  std::size_t arrived = 0;
  std::int64_t start = 0;
};

class Engine {
 public:
  Engine(const Program& p, Communication& communication, const SimulateOptions& options)
      : p_(p), communication_(communication), options_(options) {}

  /// All that prices do not decide; what steps take as profiles have it.
  void prepare() {
    const Topology& t = communication_.topology();
    std::int64_t at_work = 0;
    for (std::int64_t r = 0; r < p_.ranks(); ++r)
      at_work += t.node_of(DeviceId{static_cast<std::size_t>(r)}) == 0 ? 1 : 0;
    communication_.set_at_work(at_work);
    crowded_ = share_cores(p_, communication_);
    // Whose turn it is depends on every rank of a host.
    if (options_.unfolded || crowded_) {
      for (std::int64_t r = 0; r < p_.ranks(); ++r) {
        classes_.classes.push_back({p_.stage_of(r), r, 1});
        classes_.of_rank.push_back(static_cast<int>(r));
      }
    } else if (options_.network != Network::flows) {
      classes_ = classify(p_, communication_);
    }
    if (options_.network == Network::flows) {
      links_ = share_links(p_, communication_, options_.unfolded || crowded_);
      classes_ = links_.ranks;
      refuse_too_many();
    }
    compiled_ = compile(p_, communication_, classes_, labels_);
    beside_ =
        options_.network == Network::beside && !crowded_ && !communication_.measured_together();
    if (beside_) {
      play_transfers_first(compiled_);
      find_uses();
    }
    const std::size_t n = classes_.classes.size();
    timeline_.classes = classes_.classes;
    timeline_.class_of_rank = classes_.of_rank;
    timeline_.flops = compiled_.flops;
    for (std::size_t c = 0; c < n; ++c) {
      const RankClass& rc = classes_.classes[c];
      timeline_.memory.push_back(
          memory_use(p_, rc, compiled_.blocks[c], device_of(rc.representative).compute_capability));
    }
    timeline_.breakdown.resize(n);
  }

  /// Once, of a prepared engine or a copy of one.
  Timeline play(const Adjustment& adjustment) {
    for (const MemoryUse& use : timeline_.memory) {
      if (use.peak > options_.memory_limit) return std::move(timeline_);
    }
    std::vector<double> spreads;
    for (const RankClass& rc : classes_.classes)
      spreads.push_back(device_of(rc.representative).speed_spread);
    stretch(compiled_, p_, spreads, adjustment);
    timeline_.contended = worn_parts(p_, communication_, classes_, compiled_, labels_);
    start();
    const std::size_t n = classes_.classes.size();
    if (options_.network == Network::flows && !crowded_ && !communication_.measured_together()) {
      contended_ = contend(p_, communication_, links_, compiled_, labels_, options_.replay);
      timeline_.contended.insert(timeline_.contended.end(), contended_.contended.begin(),
                                 contended_.contended.end());
      next_loss_.assign(n, 0);
    }
    if (crowded_) {
      take_turns(p_, communication_, classes_, compiled_, labels_, options_.record, progress_,
                 timeline_);
    } else {
      for (bool moved = true; moved;) {
        moved = false;
        for (std::size_t c = 0; c < n; ++c) moved |= advance(static_cast<int>(c));
      }
    }
    std::int64_t end = 0;
    for (std::size_t c = 0; c < n; ++c) {
      const Progress& s = progress_[c];
      const auto& calls = p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)];
      PARTITA_ASSERT(s.call == calls.size(),
                     fmt::format("rank {} waits forever", classes_.classes[c].representative));
      for (const std::int64_t f : s.free) {
        if (f > end) end = f, timeline_.last_class = static_cast<int>(c);
      }
    }
    const std::int64_t beside = to_ticks(adjustment.step).count + to_ticks(p_.launches.step).count;
    timeline_.step = Ticks{end + beside};
    for (std::size_t c = 0; c < n; ++c) {
      timeline_.breakdown[c] = finished(static_cast<int>(c), progress_[c], end);
      timeline_.breakdown[c].other += Ticks{beside};
    }
    if (options_.record) {
      for (std::size_t x = 0; x < labels_.size(); ++x)
        timeline_.labels.push_back(labels_.name(static_cast<std::int32_t>(x)));
    }
    return std::move(timeline_);
  }

 private:
  const DeviceProfile& device_of(std::int64_t rank) const {
    return communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)});
  }

  /// Where ranks differ, as with hashed spines, a step may be more than memory holds.
  void refuse_too_many() const {
    constexpr std::int64_t kMost = 50'000'000, kBytesOfEach = 400;  // by bench/, gpt3_175b_ecmp
    std::vector<std::int64_t> of_stage;
    for (const auto& calls : p_.stages) {
      std::int64_t& all = of_stage.emplace_back(0);
      for (const BlockCall& call : calls) {
        const auto& list = p_.blocks[call.block.index()].instructions;
        all += std::count_if(list.begin(), list.end(), [](const Instruction& i) {
          return i.kind != Kind::allocate && i.kind != Kind::free;
        });
      }
    }
    std::int64_t all = 0;
    for (const RankClass& c : classes_.classes) all += of_stage[static_cast<std::size_t>(c.stage)];
    if (all <= kMost) return;
    const std::string size =
        fmt::format("the step has {} million instructions, which take about {} GB", all / 1'000'000,
                    all * kBytesOfEach / 1'000'000'000);
    if (classes_.classes.size() <= p_.stages.size())
      throw InputError("--network flows",
                       fmt::format("{} micro-batches: {}; use a smaller global batch, larger "
                                   "micro-batches or --network idle",
                                   p_.micro_batches, size));
    throw InputError("--network flows",
                     fmt::format("{} of {} ranks differ in what they share: {}; use sprayed "
                                 "spines, larger micro-batches or --network idle",
                                 classes_.classes.size(), p_.ranks(), size));
  }

  /// Everything at its start.
  void start() {
    const std::size_t n = classes_.classes.size();
    progress_.resize(n);
    for (std::size_t c = 0; c < n; ++c) {
      Progress& s = progress_[c];
      s.free.assign(p_.streams.size(), 0);
      s.label.assign(p_.streams.size(), -1);
      s.index.width = compiled_.slots_on_stage[static_cast<std::size_t>(classes_.classes[c].stage)];
      s.slots.assign(s.index.width * static_cast<std::size_t>(p_.micro_batches + 1), Slot{});
    }
    replays_.assign(n, std::vector<Replays>(p_.blocks.size()));
    keys_.emplace(p_, classes_);
  }

  bool advance(int c) {
    Progress& s = progress_[static_cast<std::size_t>(c)];
    const RankClass& rc = classes_.classes[static_cast<std::size_t>(c)];
    const auto& calls = p_.stages[static_cast<std::size_t>(rc.stage)];
    bool moved = false;
    while (s.call < calls.size()) {
      const BlockCall call = calls[s.call];
      const CompiledBlock& block =
          compiled_.blocks[static_cast<std::size_t>(c)][call.block.index()];
      while (s.step < block.steps.size()) {
        if (s.step == block.receives && block.repeats && !options_.record && options_.replay &&
            contended_.stretched.empty()) {
          play_rest(c, s, block, call);
          moved = true;
          break;
        }
        if (!run_step(c, s, block, block.steps[s.step], call, nullptr)) return moved;
        ++s.step;
        moved = true;
      }
      s.step = 0;
      ++s.call;
    }
    return moved;
  }

  /// The rest of a block call: from an earlier call that began alike, or step by step.
  void play_rest(int c, Progress& s, const CompiledBlock& block, const BlockCall& call) {
    const std::int64_t now = s.free[kComputeStream];
    s.late.erase(
        std::remove_if(s.late.begin(), s.late.end(), [&](const Mark& m) { return m.ready <= now; }),
        s.late.end());
    bool plain = true;  // nothing late that this call reads, but what its receives brought
    for (const Mark& m : s.late) {
      if (m.slot >= 0 && m.micro_batch != call.micro_batch) continue;
      plain &= !std::binary_search(block.external.begin(), block.external.end(), m.slot);
    }
    const auto run_all = [&](std::vector<Replay::Made>* marks) {
      for (; s.step < block.steps.size(); ++s.step) {
        const bool done = run_step(c, s, block, block.steps[s.step], call, marks);
        PARTITA_ASSERT(done, "a step of a repeating block waited");
      }
    };
    if (!plain) {
      run_all(nullptr);
      return;
    }
    std::vector<std::int64_t> key;
    for (const Stream x : block.streams) key.push_back(std::max<std::int64_t>(0, s.free[x] - now));
    for (const std::int32_t x : block.arrives) {
      key.push_back(std::max<std::int64_t>(0, s.slot(x, call.micro_batch).ready - now));
    }
    // A host that is further ahead than the whole block takes to launch is in nobody's way.
    const bool ahead = s.host - now <= -block.launch;
    key.push_back(std::max(s.host - now, -block.launch));
    forget(s);
    for (const Running& r : s.running) {
      for (const std::int64_t x : {std::max<std::int64_t>(r.from - now, 0),
                                   std::max<std::int64_t>(r.moves - now, 0), r.to - now, r.code})
        key.push_back(x);
    }
    const std::int64_t host_from = ahead && !block.host_waits ? s.host : now;
    auto& replays = replays_[static_cast<std::size_t>(c)][call.block.index()];
    const auto known = replays.find(key);
    if (known != replays.end()) {
      const Replay& r = known->second;
      s.host = host_from + r.host;
      for (std::size_t k = 0; k < block.streams.size(); ++k) {
        s.free[block.streams[k]] = now + r.free[k];
        s.label[block.streams[k]] = r.stream_labels[k];
      }
      for (const auto& [x, ticks] : r.spent) s.spent.add(x, ticks);
      for (const auto& m : r.marks) {
        s.slot(m.slot, call.micro_batch) = {now + m.ready, m.label, m.before, now + m.begin};
        if (m.ready > r.free[0]) s.late.push_back({m.slot, call.micro_batch, now + m.ready});
      }
      for (const auto& [id, to, of_step, start] : r.messages) {
        messages_[(*keys_)(id, of_step ? -1 : call.micro_batch, c, to)] = now + start;
      }
      s.running = r.running;
      for (Running& x : s.running) x.from += now, x.moves += now, x.to += now;
      timeline_.instructions += static_cast<std::int64_t>(block.steps.size() - block.receives);
      return;
    }
    const std::vector<std::int64_t> before = s.spent.by_label();
    std::vector<Replay::Made> marks;
    run_all(&marks);
    Replay r;
    r.host = s.host - host_from;
    for (const Stream x : block.streams) {
      r.free.push_back(s.free[x] - now);
      r.stream_labels.push_back(s.label[x]);
    }
    const auto& spent = s.spent.by_label();
    for (std::size_t x = 0; x < spent.size(); ++x) {
      const std::int64_t was = x < before.size() ? before[x] : 0;
      if (spent[x] != was) r.spent.emplace_back(static_cast<std::int32_t>(x), spent[x] - was);
    }
    const auto& must = compiled_.must_mark[static_cast<std::size_t>(c)];
    for (Replay::Made& m : marks) {
      const bool late = m.ready > s.free[kComputeStream];
      if (late) s.late.push_back({m.slot, call.micro_batch, m.ready});
      if (!late && m.slot >= 0 && !std::binary_search(must.begin(), must.end(), m.slot))
        continue;  // nobody can still wait for it
      m.ready -= now;
      m.begin -= now;
      r.marks.push_back(m);
    }
    for (std::size_t k = block.receives; k < block.steps.size(); ++k) {
      const Step& step = block.steps[k];
      if (step.kind != Kind::send) continue;
      r.messages.emplace_back(
          step.message, step.peer_class, step.of_step,
          messages_.at(
              (*keys_)(step.message, step.of_step ? -1 : call.micro_batch, c, step.peer_class)) -
              now);
    }
    forget(s);
    r.running = s.running;
    for (Running& x : r.running) x.from -= now, x.moves -= now, x.to -= now;
    replays.emplace(std::move(key), std::move(r));
  }

  /// Plays one step; false if it must wait for another class.
  bool run_step(int c, Progress& s, const CompiledBlock& block, const Step& step,
                const BlockCall& call, std::vector<Replay::Made>* marks) {
    std::int64_t ticks = step.ticks;
    bool stretched = false;
    if (!contended_.stretched.empty()) {
      const auto& list = contended_.stretched[static_cast<std::size_t>(c)];
      stretched = s.stretched < list.size() &&
                  static_cast<std::size_t>(list[s.stretched].instance) == s.instance;
      if (stretched) ticks = list[s.stretched].ticks;
    }
    std::int64_t start = s.free[step.stream];
    const Slot* cause = nullptr;
    std::int32_t waited_for = step.label;
    if (step.after_compute) start = std::max(start, s.free[kComputeStream]);
    if (step.host_waits) {
      s.host = std::max(s.host, s.free[kComputeStream]);
      for (std::int32_t w = 0; w < step.waits; ++w) {
        const auto slot = block.slots[static_cast<std::size_t>(step.first_wait + w)];
        s.host = std::max(s.host, s.slot(slot, call.micro_batch).ready);
      }
    }
    const std::int64_t launched = s.host + step.until_launched;
    Slot host;
    if (launched > start) {
      const std::int32_t x = labels_.of("exposed:launch");
      host = {launched, x, x, 0};
      start = launched, cause = &host;
    }
    for (std::int32_t w = 0; w < step.waits; ++w) {
      const Slot& ready =
          s.slot(block.slots[static_cast<std::size_t>(step.first_wait + w)], call.micro_batch);
      if (ready.ready > start) start = ready.ready, cause = &ready;
    }
    if (step.kind == Kind::receive) {
      const auto it = messages_.find(
          (*keys_)(step.message, step.of_step ? -1 : call.micro_batch, step.peer_class, c));
      if (it == messages_.end()) return false;
      // Waiting for others is this step's own wait, not its last operand's.
      if (it->second > start) {
        start = it->second, cause = nullptr;
        // Until it is sent its neighbour computes.
        if (step.label == on_its_way_) waited_for = bubble_;
      }
    } else if (step.meeting >= 0) {
      const Meeting* m = meet(s, step, start);
      if (m == nullptr) return false;
      if (m->start > start) start = m->start, cause = nullptr;
    } else if (step.kind == Kind::send) {
      messages_[(*keys_)(step.message, step.of_step ? -1 : call.micro_batch, c, step.peer_class)] =
          start + step.beside;
    }
    if (start > kLastTick - ticks) {
      throw InputError("time",
                       "the step would take longer than the 106 days of event time; use fewer "
                       "micro-batches or a faster device");
    }
    s.host += step.launch;
    const std::int64_t end = beside_ ? end_of(c, s, block, step, call, start) : start + ticks;
    if (step.stream == kComputeStream) {
      std::int64_t from = s.free[kComputeStream];
      // Until the host's message is there, that is what is waited for.
      if (cause == &host && s.joined.ready > from) {
        charge(c, s, &s.joined, from, s.joined.ready);
        from = s.joined.ready;
      }
      if (start > from) charge(c, s, cause, from, start);
      spend(c, s, step.label, start, end);
    }
    const Slot made{end, step.label, cause != nullptr ? cause->label : waited_for, start};
    if (step.host_joins) {
      s.host = std::max({s.host, s.free[kComputeStream], end});
      s.joined = made;
    }
    s.free[step.stream] = end;
    s.label[step.stream] = step.label;
    for (std::int32_t m = 0; m < step.marks; ++m) {
      const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_mark + m)];
      s.slot(x, call.micro_batch) = made;
      if (marks != nullptr) marks->push_back({x, made.ready, made.begin, made.label, made.before});
    }
    if (marks == nullptr && step.marks > 0 && step.stream != kComputeStream) {
      for (std::int32_t m = 0; m < step.marks; ++m) {
        s.late.push_back(
            {block.slots[static_cast<std::size_t>(step.first_mark + m)], call.micro_batch, end});
      }
    }
    ++s.instance;
    s.stretched += stretched ? 1 : 0;
    ++timeline_.instructions;
    if (options_.record) {
      Entry e{c, call.block.value, step.instruction, call.micro_batch, Ticks{start}, Ticks{end}};
      if (!contended_.losses.empty()) note_loss(c, static_cast<std::int32_t>(s.instance) - 1, e);
      timeline_.entries.push_back(e);
    }
    return true;
  }

  /// Of the instruction's time, and of its device, what it uses.
  DeviceUse use_of(std::size_t c, std::size_t b, const Step& step) {
    const Instruction& i = p_.blocks[b].instructions[static_cast<std::size_t>(step.instruction)];
    const std::int64_t rank = classes_.classes[c].representative;
    switch (step.kind) {
      case Kind::compute:
      case Kind::slice:
        if (from_storage(p_, i) || on_host(p_, i)) return {};
        return kernel_use(p_, i, rank, communication_);
      case Kind::collective: {
        const auto group = p_.group(i, rank);
        Bytes bytes{0};
        for (const int m : classes_in(classes_, group))
          bytes = std::max(
              bytes, payload(p_, i, classes_.classes[static_cast<std::size_t>(m)].representative));
        bytes = communication_.travelling(p_, i, bytes, group);
        return collective_use(i, group, bytes, rank, communication_);
      }
      case Kind::send:
        return message_use(rank, p_.peer_of(i, rank), message_bytes(p_, i.reads[0], rank), rank,
                           communication_);
      case Kind::receive:
        return message_use(p_.peer_of(i, rank), rank, message_bytes(p_, i.writes[0], rank), rank,
                           communication_);
      default:
        return {};
    }
  }
  /// Of blocks in which something is beside the compute stream, and of all where a transfer of
  /// another block may still run: every instruction's.
  void find_uses() {
    uses_.resize(compiled_.blocks.size());
    for (std::size_t c = 0; c < uses_.size(); ++c) {
      const auto& blocks = compiled_.blocks[c];
      uses_[c].resize(blocks.size());
      const bool any = std::any_of(blocks.begin(), blocks.end(), [](const CompiledBlock& b) {
        return std::any_of(b.steps.begin(), b.steps.end(),
                           [](const Step& s) { return s.stream != kComputeStream; });
      });
      if (!any) continue;
      for (std::size_t b = 0; b < blocks.size(); ++b) {
        for (const Step& s : blocks[b].steps) uses_[c][b].push_back(use_of(c, b, s));
      }
    }
  }

  /// When the step ends that starts at `start`: a kernel among its rank's transfers that have
  /// begun. Transfers end as alone, and are remembered.
  std::int64_t end_of(int c, Progress& s, const CompiledBlock& block, const Step& step,
                      const BlockCall& call, std::int64_t start) {
    const bool kernel = step.kind == Kind::compute || step.kind == Kind::slice;
    const std::int64_t alone = start + step.ticks;
    if (step.ticks == 0 || kernel != (step.stream == kComputeStream)) return alone;
    forget(s);
    if (kernel && s.running.empty()) return alone;
    const auto at = static_cast<std::size_t>(&step - block.steps.data());
    const DeviceUse& use = uses_[static_cast<std::size_t>(c)][call.block.index()][at];
    if (!(use.work.count > 0)) return alone;
    const std::int64_t work = work_ticks(use.work, step.ticks, block.prices[at].every);
    if (kernel) return end_beside(start, step.ticks - work, work, use, s.running);
    const bool slowed = std::any_of(use.slows.begin(), use.slows.end(),
                                    [](const Slowdown& x) { return x.of_transfer > 1; });
    const std::int64_t end =
        slowed ? end_among_kernels(c, s, block, at, call, start, work, use) : alone;
    s.running.push_back({start, alone - work, end, use.units, use.memory,
                         static_cast<std::int64_t>(call.block.value) << 32 | step.instruction,
                         use.slows});
    return end;
  }
  /// When a transfer, step `at` of its block, ends among the kernels that are still to come there
  /// and wait for nothing that it or a step beside the compute stream after it makes.
  std::int64_t end_among_kernels(int c, Progress& s, const CompiledBlock& block, std::size_t at,
                                 const BlockCall& call, std::int64_t start, std::int64_t work,
                                 const DeviceUse& use) const {
    const auto& uses = uses_[static_cast<std::size_t>(c)][call.block.index()];
    const auto slot = [&](std::int32_t k) { return block.slots[static_cast<std::size_t>(k)]; };
    std::set<std::int32_t> made;
    const auto makes = [&](const Step& step) {
      for (std::int32_t m = 0; m < step.marks; ++m) made.insert(slot(step.first_mark + m));
    };
    makes(block.steps[at]);
    std::size_t k = at;
    const auto next = [&](std::int64_t free) -> std::optional<Coming> {
      while (++k < block.steps.size()) {
        const Step& step = block.steps[k];
        if (step.stream != kComputeStream) {
          makes(step);
          continue;
        }
        if (step.kind != Kind::compute && step.kind != Kind::slice) return {};
        Coming kernel;
        kernel.start = free;
        for (std::int32_t w = 0; w < step.waits; ++w) {
          const std::int32_t x = slot(step.first_wait + w);
          if (made.count(x) > 0) return {};
          kernel.start = std::max(kernel.start, s.slot(x, call.micro_batch).ready);
        }
        if (step.ticks == 0) continue;
        kernel.work = work_ticks(uses[k].work, step.ticks, block.prices[k].every);
        kernel.fixed = step.ticks - kernel.work;
        kernel.use = &uses[k];
        return kernel;
      }
      return {};
    };
    return end_beside_kernels(start, block.steps[at].ticks - work, work, use,
                              s.free[kComputeStream], next, s.running);
  }
  /// Transfers that no later kernel can meet.
  static void forget(Progress& s) {
    const std::int64_t now = s.free[kComputeStream];
    s.running.erase(std::remove_if(s.running.begin(), s.running.end(),
                                   [&](const Running& r) { return r.to <= now; }),
                    s.running.end());
  }

  /// What an instance lost, and over what most of it.
  void note_loss(int c, std::int32_t instance, Entry& e) {
    auto& list = contended_.losses[static_cast<std::size_t>(c)];
    auto& at = next_loss_[static_cast<std::size_t>(c)];
    std::int64_t most = 0;
    for (; at < list.size() && list[at].task <= instance; ++at) {
      if (list[at].task < instance) continue;
      e.lost += Ticks{list[at].ticks};
      if (list[at].ticks <= most) continue;
      most = list[at].ticks;
      const auto [it, fresh] =
          resource_of_.try_emplace(contended_.resource_names.at(list[at].resource.value),
                                   static_cast<std::int32_t>(timeline_.resources.size()));
      if (fresh) timeline_.resources.push_back(it->first);
      e.over = it->second;
    }
  }

  static std::int64_t last_end_of(const Progress& s) {
    return *std::max_element(s.free.begin(), s.free.end());
  }

  /// The compute stream stood still from `from` to `to` for what `cause` made: while the maker
  /// worked it is the maker's, before that it belongs to what the maker waited for.
  void charge(int c, Progress& s, const Slot* cause, std::int64_t from, std::int64_t to) {
    if (cause == nullptr) {
      spend(c, s, labels_.of("other"), from, to);
      return;
    }
    const std::int64_t begin = std::clamp(cause->begin, from, to);
    spend(c, s, cause->before, from, begin);
    spend(c, s, cause->label, begin, to);
  }
  void spend(int c, Progress& s, std::int32_t label, std::int64_t from, std::int64_t to) {
    s.spent.add(label, to - from);
    if (options_.record && to > from) timeline_.spans.push_back({c, label, Ticks{from}, Ticks{to}});
  }

  /// Joins a collective whose members are of several classes; null until all are there.
  const Meeting* meet(Progress& s, const Step& step, std::int64_t ready) {
    std::int32_t& met = s.met[step.meeting];
    const auto& m = compiled_.meetings[static_cast<std::size_t>(step.meeting)];
    Meeting& now = meetings_[meeting_key(compiled_, step, s.call, met)];
    if (!s.at_meeting) {
      s.at_meeting = true;
      ++now.arrived;
      now.start = std::max(now.start, ready);
    }
    if (now.arrived < m.classes.size()) return nullptr;
    s.at_meeting = false;
    ++met;
    return &now;
  }

  Breakdown finished(int c, Progress& s, std::int64_t end) {
    // After the last kernel: its own trailing communication, then the wait for others.
    const std::int64_t own = last_end_of(s);
    if (own > s.free[kComputeStream]) {
      const auto last =
          static_cast<std::size_t>(std::max_element(s.free.begin(), s.free.end()) - s.free.begin());
      spend(c, s, s.label[last], s.free[kComputeStream], own);
    }
    if (options_.record && end > own)
      timeline_.spans.push_back({c, labels_.of("bubble"), Ticks{own}, Ticks{end}});
    return s.spent.breakdown(labels_, Ticks{end - own});
  }

  const Program& p_;
  Communication& communication_;
  SimulateOptions options_;
  Timeline timeline_;
  RankClasses classes_;
  bool crowded_ = false;  ///< a host has more ranks than cores
  SharedLinks links_;
  Labels labels_;
  std::int32_t bubble_ = labels_.of("bubble"), on_its_way_ = labels_.of("bubble:messages");
  Compiled compiled_;
  bool beside_ = false;                                    ///< kernels give way to transfers
  std::vector<std::vector<std::vector<DeviceUse>>> uses_;  ///< then: [class][block][step]
  ContendedStep contended_;                                ///< with Network::flows
  std::vector<std::size_t> next_loss_;  ///< by class: of contended_.losses, if recorded
  std::map<std::string, std::int32_t> resource_of_;
  std::vector<Progress> progress_;  ///< by class
  using Replays = std::map<std::vector<std::int64_t>, Replay>;
  std::vector<std::vector<Replays>> replays_;  ///< [class][block], by what the call began with
  std::optional<MessageKeys> keys_;
  Messages messages_;
  std::unordered_map<MeetingKey, Meeting, MeetingKey::Hash> meetings_;
};

}  // namespace

std::vector<TimeSlice> over_time(const Timeline& t, int slices) {
  PARTITA_ASSERT(slices > 0, "no slices");
  std::vector<TimeSlice> all(static_cast<std::size_t>(slices));
  const auto cut = [&](int k) {
    return static_cast<std::int64_t>(static_cast<double>(t.step.count) * k / slices);
  };
  for (int k = 0; k < slices; ++k)
    all[static_cast<std::size_t>(k)].start = Ticks{cut(k)},
    all[static_cast<std::size_t>(k)].end = Ticks{cut(k + 1)};
  // Calls f(slice, ticks of [start, end) in it).
  const auto spread = [&](Ticks start, Ticks end, auto f) {
    for (TimeSlice& slice : all) {
      const auto both = std::min(end, slice.end).count - std::max(start, slice.start).count;
      if (both > 0) f(slice, both);
    }
  };
  for (const Span& s : t.spans) {
    if (s.rank_class != t.last_class) continue;
    spread(s.start, s.end, [&](TimeSlice& slice, std::int64_t ticks) {
      slice.spent[t.labels[static_cast<std::size_t>(s.label)]] += Ticks{ticks};
    });
  }
  for (const Entry& e : t.entries) {
    if (e.rank_class != t.last_class || e.over < 0) continue;
    const auto whole = static_cast<double>((e.end - e.start).count);
    spread(e.start, e.end, [&](TimeSlice& slice, std::int64_t ticks) {
      slice.lost[t.resources[static_cast<std::size_t>(e.over)]] += Ticks{static_cast<std::int64_t>(
          static_cast<double>(e.lost.count) * static_cast<double>(ticks) / whole)};
    });
  }
  for (TimeSlice& slice : all) {
    Ticks rest = slice.end - slice.start;
    for (const auto& [label, ticks] : slice.spent) rest = rest - ticks;
    if (rest.count > 0) slice.spent["other"] += rest;
  }
  return all;
}

std::string_view name(Network network) {
  return network == Network::idle ? "idle" : network == Network::beside ? "beside" : "flows";
}

std::optional<Network> network_named(std::string_view text) {
  for (const Network n : {Network::idle, Network::beside, Network::flows}) {
    if (name(n) == text) return n;
  }
  return std::nullopt;
}

Timeline simulate(const Program& program, Communication& communication,
                  const SimulateOptions& options) {
  Engine engine(program, communication, options);
  engine.prepare();
  return engine.play(communication.adjustment());
}

struct Rehearsal::State {
  Engine prepared;
};

Rehearsal::Rehearsal(const Program& program, Communication& communication,
                     const SimulateOptions& options)
    : state_(new State{Engine(program, communication, options)}) {
  state_->prepared.prepare();
}
Rehearsal::Rehearsal(Rehearsal&&) noexcept = default;
Rehearsal& Rehearsal::operator=(Rehearsal&&) noexcept = default;
Rehearsal::~Rehearsal() = default;

Timeline Rehearsal::play(const Adjustment& adjustment) const {
  Engine copy = state_->prepared;
  return copy.play(adjustment);
}

}  // namespace partita
