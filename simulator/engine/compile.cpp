#include "simulator/engine/compile.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>

#include "base/error.h"
#include "simulator/cost/measured.h"

namespace partita {
namespace {

class Compiler {
 public:
  Compiler(const Program& p, Communication& communication, const RankClasses& classes,
           Labels& labels)
      : p_(p), communication_(communication), classes_(classes), labels_(labels) {}

  Compiled run() {
    assign_slots();
    const std::size_t n = classes_.classes.size();
    result_.blocks.resize(n);
    result_.must_mark.resize(n);
    result_.flops.resize(n);
    for (std::size_t c = 0; c < n; ++c) compile(static_cast<int>(c));
    return std::move(result_);
  }

 private:
  /// Buffers through which two streams meet get a slot for the time they are ready.
  void assign_slots() {
    std::vector<std::uint64_t> writers(p_.buffers.size() * 4, 0), users(p_.buffers.size() * 4, 0);
    const auto set = [](std::vector<std::uint64_t>& v, BufferId b, Stream s) {
      v[b.index() * 4 + s / 64u] |= 1ull << (s % 64u);
    };
    std::vector<int> stage_of(p_.buffers.size(), 0);
    for (const Block& b : p_.blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind == Kind::allocate || i.kind == Kind::free) continue;
        for_each_write(i, [&](BufferId id) {
          set(writers, id, i.stream), set(users, id, i.stream);
          stage_of[id.index()] = b.stage;
        });
        for_each_read(i, [&](BufferId id) { set(users, id, i.stream); });
      }
    }
    result_.slots_on_stage.assign(p_.stages.size(), 0);
    slot_of_.assign(p_.buffers.size(), -1);
    for (std::size_t b = 0; b < p_.buffers.size(); ++b) {
      int streams = 0;
      bool written = false;
      for (std::size_t k = 0; k < 4; ++k) {
        streams += __builtin_popcountll(users[b * 4 + k]);
        written |= writers[b * 4 + k] != 0;
      }
      if (written && streams > 1) {
        slot_of_[b] = static_cast<std::int32_t>(
            result_.slots_on_stage[static_cast<std::size_t>(stage_of[b])]++);
      }
    }
  }

  std::int32_t meeting_of(std::vector<int> classes, int tie) {
    const auto [it, fresh] =
        meeting_of_.try_emplace({tie, classes}, static_cast<std::int32_t>(result_.meetings.size()));
    if (fresh) result_.meetings.push_back({std::move(classes), tie});
    return it->second;
  }

  /// "server 3" is a server.
  static std::string word(const std::string& name) { return name.substr(0, name.find(' ')); }

  /// Ranks of this one's host, itself included.
  std::int64_t ranks_beside(std::int64_t rank) const {
    const Topology& t = communication_.topology();
    const auto here = t.node_of(DeviceId{static_cast<std::size_t>(rank)});
    std::int64_t ranks = 0;
    for (std::int64_t r = 0; r < p_.ranks(); ++r)
      ranks += t.node_of(DeviceId{static_cast<std::size_t>(r)}) == here ? 1 : 0;
    return ranks;
  }
  const DeviceProfile& device_of(std::int64_t rank) const {
    return communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)});
  }
  /// Communication that was measured with more ranks at work than cores took as much longer as they
  /// shared these: of that time a rank's work is only its share.
  double share_of_core(const std::string& kind, std::size_t ranks, std::int64_t rank,
                       int one_of) const {
    const int cores = device_of(rank).host_cores;
    if (cores == 0) return 1;
    const int working = communication_.measured_at_work(kind, static_cast<int>(ranks));
    return working == 0 ? 1 : std::min(1.0, static_cast<double>(cores * one_of) / working);
  }
  /// What stretches a transfer among these ranks.
  Stretch stretch_of(const std::vector<std::int64_t>& ranks) const {
    const Topology& t = communication_.topology();
    const auto domain = [&](std::int64_t r) {
      return t.domain_of(t.node_of(DeviceId{static_cast<std::size_t>(r)}));
    };
    std::set<std::size_t> domains;
    for (const std::int64_t r : ranks) domains.insert(domain(r));
    return domains.size() == 1              ? Stretch::inside
           : domains.size() == ranks.size() ? Stretch::between
                                            : Stretch::across_cards;
  }

  static Stretch stretch_of(const Work& w, const Instruction& i) {
    if (w.matrix) return Stretch::products;
    return i.kind == Kind::compute && i.kernel == Kernel::optimizer ? Stretch::optimizer
                                                                    : Stretch::memory;
  }

  /// A kernel's time, measured where the device has been measured, and the host's time to start it.
  void price(const Instruction& i, std::int64_t rank, const DeviceProfile& device,
             Price& out) const {
    out.speed = communication_.topology().speed(DeviceId{static_cast<std::size_t>(rank)});
    if (from_storage(p_, i) && device.kernels.empty()) {
      out.time = communication_.storage_time(p_, i, rank);
      return;
    }
    if (!device.kernels.empty()) {
      const KernelShape shape = shape_of(p_, i, rank);
      if (shape.kernel.empty()) return;
      // Ranks of one host share its memory, and those of one core its caches.
      if (const auto t = measured_time(
              device.kernels, shape, static_cast<int>(ranks_beside(rank)),
              device.compute_capability > 0 ? std::max(1, device.multiprocessors) : 0)) {
        out.time = *t + dispatch_of(i, device);
        // Measured alone: what runs beside it stretches it as any other.
        if (device.compute_capability > 0) out.of_time = stretch_of(work_of(p_, i, rank), i);
        return;
      }
      if (from_storage(p_, i)) {
        out.time = communication_.storage_time(p_, i, rank);
        return;
      }
    }
    // A processor that is its own host copies in its own memory.
    if (on_host(p_, i) && device.compute_capability > 0) {
      out.time = communication_.host_time(p_, i, rank);
      if (const Bytes passes = gradient_passes(p_, i, rank); passes.count > 0) {
        Work w;
        w.bytes = passes;
        out.time += kernel_time(w, device, communication_.shapes(rank));
      }
      return;
    }
    const Work w = work_of(p_, i, rank);
    out.of_time = stretch_of(w, i);
    out.time = kernel_time(w, device, communication_.shapes(rank));
    out.then = dispatch_of(i, device);
  }

  /// torch.tensor(linear_offset, device=...) copies from memory that is not pinned
  /// (megatron/core/fusions/fused_bias_geglu.py).
  bool copies_limits(const Instruction& i) const {
    if (i.kind != Kind::compute || i.kernel != Kernel::forward || i.op < 0) return false;
    const auto* gated =
        std::get_if<GatedActivation>(&p_.operators[static_cast<std::size_t>(i.op)].operation);
    return gated != nullptr && gated->limited && p_.kernels.limit_forward > 0 &&
           !p_.kernels.fused_experts;
  }

  Seconds dispatch_of(const Instruction& i, const DeviceProfile& device) const {
    return device.dispatch_in_graph && of_graph(p_, i) ? *device.dispatch_in_graph
                                                       : device.dispatch;
  }

  /// What the host does before the device may begin a step. `captured`: an earlier one has started
  /// the block's graph.
  void launch(Step& s, Price& price, const Instruction& i, std::int64_t rank,
              const DeviceProfile& device, bool& captured) const {
    const Launches& l = p_.launches;
    // Our own runtime's, where a plan says nothing.
    const bool ours = !l.any() && device.launch.count > 0;
    if (!(l.any() || ours) || !device.concurrent_streams) return;
    s.host_waits = l.blocking || (ours && lists_rows(p_, i)) ||
                   (l.waits_for_counts && (brings_rows(p_, i) || copies_limits(i)));
    if (s.host_waits) captured = false;
    const Seconds loop = l.loop.count > 0 ? l.loop : l.kernel;
    const bool of_parts = i.part >= 0 && i.op < 0;  // the product's call passes them on and adds up
    Seconds time{0};
    switch (i.kind) {
      case Kind::compute: {
        if (of_parts) {
          time = loop;
          break;
        }
        const Work w = work_of(p_, i, rank);
        time = w.kernels * l.kernel + w.groups * loop;
        if (w.products.empty() || w.kernels == 0) break;
        // A layer is called once forward and once backward, whatever parts its product has.
        if (i.part > 0)
          time += loop - l.kernel;
        else if (l.product.count > 0 && i.kernel != Kernel::backward_weight)
          time += l.product - l.kernel;
        break;
      }
      case Kind::slice:
      case Kind::copy:
        time = work_of(p_, i, rank).kernels * l.kernel;
        break;
      case Kind::collective:
        if (p_.group(i, rank).size() > 1) time = of_parts ? loop : l.transfer;
        break;
      case Kind::send:
      case Kind::receive:
        time = l.transfer;
        break;
      case Kind::load:
      case Kind::allocate:
      case Kind::free:
        break;
    }
    if (ours && i.kind != Kind::allocate && i.kind != Kind::free) {
      time = device.launch;
      if (lists_rows(p_, i)) time += rows_listed(p_, i, rank) * device.list_row;
    }
    if (time.count == 0) return;
    const bool in_graph = of_graph(p_, i);
    if (in_graph) time = captured ? Seconds{0} : ours ? device.launch : l.kernel;
    captured = in_graph;
    const Topology& t = communication_.topology();
    price.launch = t.launch_time(t.node_of(DeviceId{static_cast<std::size_t>(rank)})) * time;
  }

  void compile(int c) {
    const RankClass& rc = classes_.classes[static_cast<std::size_t>(c)];
    const std::int64_t rank = rc.representative;
    const DeviceProfile& device =
        communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)});
    auto& mine = result_.blocks[static_cast<std::size_t>(c)];
    mine.resize(p_.blocks.size());
    std::vector<char> needed(p_.blocks.size(), 0);
    std::vector<std::int64_t> calls(p_.blocks.size(), 0);
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(rc.stage)])
      needed[call.block.index()] = 1, ++calls[call.block.index()];
    Flops total{0};
    struct Members {
      std::vector<std::int64_t> ranks;
      Stretch stretch = Stretch::nothing;
    };
    std::map<std::pair<AtomMask, int>, Members> groups;
    for (std::size_t b = 0; b < p_.blocks.size(); ++b) {
      if (!needed[b]) continue;
      CompiledBlock& out = mine[b];
      std::int64_t level = 0;
      bool captured = false;
      for (std::size_t k = 0; k < p_.blocks[b].instructions.size(); ++k) {
        const Instruction& i = p_.blocks[b].instructions[k];
        if (i.kind == Kind::allocate || i.kind == Kind::free) {
          for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
            const int sign = i.kind == Kind::allocate ? 1 : -1;
            const std::int64_t bytes = sign * device_bytes(p_, id, rank).count;
            level += bytes;
            if (p_.buffer(id).category == Category::activations) {
              out.net_saved += bytes;
              if (of_layers_[id.index()]) out.net_layers += bytes;
            }
            out.host_net += sign * host_bytes(p_, id, rank).count;
          }
          out.rise = std::max(out.rise, level);
          out.host_rise = std::max(out.host_rise, out.host_net);
          continue;
        }
        // Where one rank of a group has the buffer, only that one sends or receives it.
        if ((i.kind == Kind::send && !p_.holds(i.reads[0], rank)) ||
            (i.kind == Kind::receive && !p_.holds(i.writes[0], rank)))
          continue;
        Step s;
        Price priced;
        s.kind = i.kind;
        priced.every = i.every;
        // Without streams beside each other everything follows in program order.
        s.stream = device.concurrent_streams ? i.stream : kComputeStream;
        s.after_compute = i.after_compute;
        s.instruction = static_cast<std::int32_t>(k);
        s.at = static_cast<std::int32_t>(out.steps.size());
        out.rise = std::max(out.rise, level + transient_bytes(p_, i, rank).count);
        switch (i.kind) {
          case Kind::compute:
          case Kind::slice:
          case Kind::copy:
          case Kind::load: {
            price(i, rank, device, priced);
            if (i.kind == Kind::compute && i.kernel == Kernel::optimizer) {
              s.label = labels_.of("optimizer");
            } else if (i.kind == Kind::copy) {
              s.label = labels_.of("exposed:host");
            } else if (i.kind != Kind::compute || i.op < 0) {
              s.label = labels_.of("other");
            } else {
              s.label = labels_.of(
                  "compute:" +
                  std::string(kind_name(p_.operators[static_cast<std::size_t>(i.op)].operation)));
            }
            total += Flops{mathematical_flops(p_, i, rank).count * static_cast<double>(calls[b])};
            break;
          }
          case Kind::collective: {
            Members& members = groups[{i.tie >= 0 ? AtomMask{0} : i.atoms, i.tie}];
            const auto& group = members.ranks;
            if (group.empty()) {
              members.ranks = p_.group(i, rank);
              members.stretch = stretch_of(group);
            }
            // The largest member's payload decides: uneven parts are padded.
            Bytes bytes{0}, keys{0};
            std::set<int> seen;
            for (const std::int64_t m : group) {
              if (seen.insert(classes_.of_rank[static_cast<std::size_t>(m)]).second) {
                bytes = std::max(bytes, payload(p_, i, m));
                keys = std::max(keys, key_bytes(p_, i, m));
              }
            }
            bytes = communication_.travelling(p_, i, bytes, group);
            if (seen.size() > 1) s.meeting = meeting_of({seen.begin(), seen.end()}, i.tie);
            priced.time = i.multiprocessors > 0
                              ? communication_.peer_copy(bytes, group)
                              : communication_.collective(i.collective, bytes, group);
            priced.of_time = members.stretch;
            priced.beside = group.size() > 1 ? to_ticks(dispatch_of(i, device)).count : 0;
            if (keys.count > 0) {
              // Counts of 8 bytes for each member and keys go ahead of the values.
              const Bytes counts{8 * static_cast<std::int64_t>(group.size())};
              for (const Bytes ahead : {counts, keys})
                priced.beside +=
                    to_ticks(communication_.collective(CollectiveKind::all_to_all, ahead, group))
                        .count;
            }
            // Who waits for a sum over all stages that is no gradient waits for the pipeline.
            s.label = i.tie >= 0 && p_.buffer(i.reads[0]).category == Category::workspace
                          ? labels_.of("bubble")
                          : labels_.of("exposed:" + axis_name(p_, i));
            s.share_of_core = share_of_core(std::string(name(i.collective)), group.size(), rank, 1);
            break;
          }
          case Kind::send:
          case Kind::receive: {
            const std::int64_t peer = p_.peer_of(i, rank);
            s.message = i.index;
            s.of_step = p_.instance_of(i, 0) < 0;
            s.peer_class = classes_.of_rank[static_cast<std::size_t>(peer)];
            const bool sends = i.kind == Kind::send;
            const BufferId buffer = sends ? i.reads[0] : i.writes[0];
            const Bytes all = local_bytes(p_, buffer, rank), sent = message_bytes(p_, buffer, rank);
            const Seconds whole =
                communication_.point_to_point(sent, sends ? rank : peer, sends ? peer : rank);
            priced.time = whole;
            priced.of_time = stretch_of({rank, peer});
            if (sent != all && !sends) {
              const auto holders = p_.mesh.group(rank, p_.scattered_messages);
              priced.then = communication_.collective(CollectiveKind::all_gather, all, holders);
              priced.of_then = stretch_of(holders);
            }
            // On one stream each side is held for its part; without a figure for that, for what
            // does not hide behind work.
            if (!device.concurrent_streams) {
              const Seconds part = (1 - device.overlap) * whole;
              const Bytes bytes = local_bytes(p_, buffer, rank);
              const auto sender = communication_.held(bytes, true),
                         receiver = communication_.held(bytes, false);
              const bool known = sender && receiver;
              const Seconds taking = known ? *receiver : part;
              const Seconds held = !known ? part : sends ? *sender : *receiver;
              priced = Price{};
              priced.time = held;
              priced.every = i.every;
              s.beside = std::max<std::int64_t>(known ? to_ticks(held).count : 0,
                                                to_ticks(whole - taking).count);
              // Of two that exchange messages one is at work at a time.
              if (!known) s.share_of_core = share_of_core("send", 2, rank, 2);
            }
            // Waiting for a role is waiting for its service, not for a neighbour of the pipeline.
            const int role = std::max(i.stage, rc.stage) - p_.pipeline_stages();
            s.label =
                role < 0
                    ? labels_.of("bubble:messages")
                    : labels_.of("exposed:" + word(p_.roles[static_cast<std::size_t>(role)].name));
            break;
          }
          case Kind::allocate:
          case Kind::free:
            break;
        }
        launch(s, priced, i, rank, device, captured);
        s.host_may_join = p_.launches.waits_for_messages && i.kind == Kind::receive &&
                          i.stage < p_.pipeline_stages() && device.concurrent_streams;
        s.first_wait = static_cast<std::int32_t>(out.slots.size());
        const auto slot = [&](BufferId id) {
          const std::int32_t x = slot_of_[id.index()];
          if (x < 0) return;
          // Step-scoped buffers have one instance, others one per micro-batch: encoded in the sign.
          out.slots.push_back(p_.buffer(id).scope == Scope::step ? -1 - x : x);
        };
        for_each_read(i, slot);
        for_each_write(i, slot);  // never before what was there
        s.waits = static_cast<std::int32_t>(out.slots.size()) - s.first_wait;
        s.first_mark = static_cast<std::int32_t>(out.slots.size());
        for_each_write(i, slot);
        s.marks = static_cast<std::int32_t>(out.slots.size()) - s.first_mark;
        out.steps.push_back(s);
        out.prices.push_back(priced);
      }
      out.net = level;
      find_repetition(out);
    }
    result_.flops[static_cast<std::size_t>(c)] = total;
    if (p_.overlap_experts) run_in_twos(mine, rc, calls, device);
    // What other streams read without passing the compute stream must be marked in every replay.
    std::set<std::int32_t> must;
    for (const CompiledBlock& block : mine) {
      std::set<std::int32_t> made;
      for (const Step& step : block.steps) {
        for (std::int32_t w = 0; w < step.waits; ++w) {
          const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_wait + w)];
          if (step.stream != kComputeStream && made.count(x) == 0) must.insert(x);
        }
        for (std::int32_t m = 0; m < step.marks; ++m) {
          made.insert(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
        }
      }
    }
    result_.must_mark[static_cast<std::size_t>(c)].assign(must.begin(), must.end());
  }

  /// Exchanges of rows cost what does not run beside another micro-batch's blocks
  /// (Plan::overlap_experts).
  void run_in_twos(std::vector<CompiledBlock>& blocks, const RankClass& rc,
                   const std::vector<std::int64_t>& calls, const DeviceProfile& device) const {
    const auto exchanges = [&](std::size_t b, const Step& s) {
      const Instruction& i = p_.blocks[b].instructions[static_cast<std::size_t>(s.instruction)];
      return i.kind == Kind::collective && i.collective == CollectiveKind::all_to_all &&
             of_experts(p_, i);
    };
    const auto of_micro_batches = [&](std::size_t b) {
      const BlockKind k = p_.blocks[b].kind;
      return k == BlockKind::forward || k == BlockKind::backward || k == BlockKind::backward_weight;
    };
    Seconds compute{0}, exchanged{0};
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      if (calls[b] == 0 || !of_micro_batches(b)) continue;
      for (std::size_t k = 0; k < blocks[b].steps.size(); ++k) {
        const Step& s = blocks[b].steps[k];
        const Seconds t = static_cast<double>(calls[b]) * blocks[b].prices[k].time;
        if (s.stream == kComputeStream) compute += t;
        if (exchanges(b, s)) exchanged += t;
      }
    }
    // Forward blocks before the first backward one have none beside them, nor as many at the end.
    double forwards = 0, alone = 0;
    bool turned = false;
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(rc.stage)]) {
      const BlockKind k = p_.blocks[call.block.index()].kind;
      turned = turned || k == BlockKind::backward;
      if (k != BlockKind::forward) continue;
      ++forwards;
      if (!turned) ++alone;
    }
    const double paired = forwards > 0 ? (forwards - alone) / forwards : 0;
    const double taken = static_cast<double>(device.communication_multiprocessors) /
                         std::max(1, device.multiprocessors);
    const double exposed = exposed_in_twos(compute, exchanged, paired, taken);
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      if (!of_micro_batches(b)) continue;
      for (std::size_t k = 0; k < blocks[b].steps.size(); ++k) {
        if (exchanges(b, blocks[b].steps[k])) blocks[b].prices[k].time.count *= exposed;
      }
    }
  }

  /// A block repeats itself if nothing in it can start before the compute stream's position at its
  /// start: then only what is later than that position matters, and that is its key.
  void find_repetition(CompiledBlock& block) const {
    std::size_t k = 0;
    std::set<std::int32_t> made;
    for (; k < block.steps.size() && block.steps[k].kind == Kind::receive; ++k) {
      const Step& step = block.steps[k];
      for (std::int32_t m = 0; m < step.marks; ++m) {
        block.arrives.push_back(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
      }
    }
    block.receives = k;
    block.repeats = k < block.steps.size();
    std::set<Stream> ordered{kComputeStream}, used{kComputeStream};
    std::set<std::int32_t> external;
    for (; k < block.steps.size(); ++k) {
      const Step& step = block.steps[k];
      if (step.meeting >= 0 || step.kind == Kind::receive) block.repeats = false;
      bool after = step.after_compute || ordered.count(step.stream) > 0;
      for (std::int32_t w = 0; w < step.waits; ++w) {
        const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_wait + w)];
        if (made.count(x) > 0) {
          after = true;
        } else if (std::find(block.arrives.begin(), block.arrives.end(), x) ==
                   block.arrives.end()) {
          external.insert(x);
        }
      }
      if (!after) block.repeats = false;
      ordered.insert(step.stream);
      used.insert(step.stream);
      for (std::int32_t m = 0; m < step.marks; ++m) {
        made.insert(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
      }
    }
    for (std::size_t x = block.receives; x < block.steps.size(); ++x) {
      block.host_waits = block.host_waits || block.steps[x].host_waits;
    }
    block.streams.assign(used.begin(), used.end());
    block.external.assign(external.begin(), external.end());
  }

  const Program& p_;
  Communication& communication_;
  const RankClasses& classes_;
  Labels& labels_;
  std::map<std::pair<int, std::vector<int>>, std::int32_t> meeting_of_;  ///< by tie and classes
  const std::vector<bool> of_layers_ = read_by_layers(p_);
  Compiled result_;
  std::vector<std::int32_t> slot_of_;
};

}  // namespace

Compiled compile(const Program& program, Communication& communication, const RankClasses& classes,
                 Labels& labels) {
  return Compiler(program, communication, classes, labels).run();
}

namespace {

/// May what is beside the compute stream be played before this step? Only before kernels, so that
/// no rank comes to wait for another before it has sent what that one waits for; neither may see
/// what the other makes.
bool passes(const CompiledBlock& block, const Step& later, const Step& kernel) {
  if (kernel.stream != kComputeStream || kernel.host_waits || later.after_compute) return false;
  switch (kernel.kind) {
    case Kind::compute:
    case Kind::slice:
    case Kind::load:
      break;
    default:
      return false;
  }
  const auto meet = [&](const Step& makes, const Step& waits) {
    for (std::int32_t m = 0; m < makes.marks; ++m) {
      for (std::int32_t w = 0; w < waits.waits; ++w) {
        if (block.slots[static_cast<std::size_t>(makes.first_mark + m)] ==
            block.slots[static_cast<std::size_t>(waits.first_wait + w)])
          return true;
      }
    }
    return false;
  };
  // What a step makes it also waits for.
  return !meet(kernel, later) && !meet(later, kernel);
}

/// Steps are launched in the block's order, whatever order they are played in.
void keep_launch_order(CompiledBlock& block) {
  std::vector<std::int64_t> launched(block.steps.size());
  for (const Step& s : block.steps) launched[static_cast<std::size_t>(s.at)] = s.launch;
  std::partial_sum(launched.begin(), launched.end(), launched.begin());
  std::int64_t played = 0;
  for (Step& s : block.steps) {
    s.until_launched = launched[static_cast<std::size_t>(s.at)] - played;
    played += s.launch;
  }
}

}  // namespace

void play_transfers_first(Compiled& compiled) {
  for (auto& blocks : compiled.blocks) {
    for (CompiledBlock& block : blocks) {
      for (std::size_t k = block.receives; k < block.steps.size(); ++k) {
        if (block.steps[k].stream == kComputeStream || block.steps[k].host_waits) continue;
        for (std::size_t j = k;
             j > block.receives && passes(block, block.steps[j], block.steps[j - 1]); --j) {
          std::swap(block.steps[j], block.steps[j - 1]);
          std::swap(block.prices[j], block.prices[j - 1]);
        }
      }
    }
  }
}

void stretch(Compiled& compiled, const Program& program, const std::vector<double>& spreads,
             const Adjustment& a) {
  std::array<double, kStretches> by{};
  const auto set = [&](Stretch s, double x) { by[static_cast<std::size_t>(s)] = x; };
  set(Stretch::nothing, 1);
  set(Stretch::inside, a.inside_time);
  set(Stretch::between, a.between_time);
  set(Stretch::across_cards, a.between_time * a.across_cards_time);
  const double draws = expected_maximum(program.ranks());
  for (std::size_t c = 0; c < compiled.blocks.size(); ++c) {
    // Who meets waits for the slowest, relative to the mean.
    const double slowest = 1 + std::hypot(spreads[c], a.spread) * draws;
    set(Stretch::products, a.product_time * slowest);
    set(Stretch::memory, a.memory_time * slowest);
    set(Stretch::optimizer, a.optimizer_time * slowest);
    for (CompiledBlock& block : compiled.blocks[c]) {
      block.launch = 0;
      std::int64_t compute = 0;
      for (std::size_t k = 0; k < block.steps.size(); ++k) {
        const Price& x = block.prices[k];
        Step& s = block.steps[k];
        const Seconds taken = by[static_cast<std::size_t>(x.of_time)] * x.time +
                              by[static_cast<std::size_t>(x.of_then)] * x.then;
        s.ticks = ceil_div(to_ticks(Seconds{taken.count / x.speed}).count + x.beside, x.every);
        s.launch = ceil_div(to_ticks(a.launch_time * x.launch).count, x.every);
        if (k >= block.receives) block.launch += s.launch;
        if (s.stream == kComputeStream) compute += s.ticks;
      }
      // A host that has launched a block in a part of its time is ahead again before that matters.
      constexpr std::int64_t kPart = 4;
      for (Step& s : block.steps) s.host_joins = s.host_may_join && kPart * block.launch > compute;
      keep_launch_order(block);
    }
  }
}

std::vector<int> classes_in(const RankClasses& classes, const std::vector<std::int64_t>& group) {
  std::set<int> all;
  for (const std::int64_t m : group) all.insert(classes.of_rank[static_cast<std::size_t>(m)]);
  return {all.begin(), all.end()};
}

}  // namespace partita
