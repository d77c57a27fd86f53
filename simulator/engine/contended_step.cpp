#include "simulator/engine/contended_step.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "simulator/engine/progress.h"
#include "simulator/engine/runs.h"
#include "simulator/engine/step_graph.h"

namespace partita {
namespace {

class Contender {
 public:
  Contender(const Program& p, Communication& communication, const SharedLinks& links,
            const Compiled& compiled, const Labels& labels)
      : p_(p),
        classes_(links.ranks),
        compiled_(compiled),
        labels_(labels),
        keys_(p, links.ranks),
        usages_(p, communication, links),
        ranks_share_(communication.topology().state().ranks_per_device > 1) {}

  ContendedStep run(bool in_runs) {
    const std::size_t n = classes_.classes.size();
    for (std::size_t c = 0; c < n; ++c) {
      auto& parts = parts_.emplace_back();
      for (const CompiledBlock& block : compiled_.blocks[c]) {
        auto tasks = tasks_of(static_cast<int>(c), parts.size());
        parts.emplace_back().tasks = std::move(tasks);
        parts.back().joined =
            in_runs ? joined_to_last(block) : std::vector<char>(block.steps.size(), 0);
      }
      auto& firsts = first_.emplace_back();
      std::int32_t instances = 0;
      for (const BlockCall& call : calls_of(c)) {
        firsts.push_back(instances);
        instances +=
            static_cast<std::int32_t>(compiled_.blocks[c][call.block.index()].steps.size());
      }
    }
    // Until nothing waits for the inside of a run.
    for (int round = 0;; ++round) {
      StepGraph graph = build();
      if (!graph.cuts().empty()) {
        for (const StepGraph::Cut& cut : graph.cuts()) cut_after(cut, round >= kRounds);
        continue;
      }
      return named(graph.play(usages_.sharing(), usages_.all()));
    }
  }

 private:
  /// Of runs that are cut where others wait for their insides; then single instructions.
  static constexpr int kRounds = 16;

  struct Parts {
    std::vector<Task> tasks;   ///< by step
    std::vector<char> joined;  ///< by step: to the one before
    std::vector<std::int64_t> launched;  ///< by step: of those before it, once a run was asked for
    struct Known {
      BlockRun run;
      std::int32_t chain = -1;  ///< in the graph that is being built
    };
    std::map<std::pair<std::int32_t, std::int32_t>, Known> runs;  ///< by first step and length
  };

  const std::vector<BlockCall>& calls_of(std::size_t c) const {
    return p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)];
  }

  StepGraph build() {
    const std::size_t n = classes_.classes.size();
    std::vector<std::size_t> slots;
    for (const RankClass& rc : classes_.classes)
      slots.push_back(compiled_.slots_on_stage[static_cast<std::size_t>(rc.stage)] *
                      static_cast<std::size_t>(p_.micro_batches + 1));
    StepGraph graph(n, p_.streams.size(), slots);
    met_.clear();
    for (auto& blocks : parts_) {
      for (Parts& parts : blocks) {
        for (auto& [steps, known] : parts.runs) known.chain = -1;
      }
    }
    for (std::size_t c = 0; c < n; ++c) {
      const auto& calls = calls_of(c);
      for (std::size_t at = 0; at < calls.size(); ++at) {
        const std::size_t b = calls[at].block.index();
        const auto steps = static_cast<std::int32_t>(compiled_.blocks[c][b].steps.size());
        const auto& joined = parts_[c][b].joined;
        for (std::int32_t k = 0, end = 0; k < steps;) {
          if (end <= k) {
            end = k + 1;
            while (end < steps && joined[static_cast<std::size_t>(end)]) ++end;
          }
          k += end - k > 1 ? add_run(graph, c, calls[at], k, end - k) : 0;
          if (k < end) add_step(graph, c, at, static_cast<std::size_t>(k++));
        }
      }
    }
    return graph;
  }

  /// As many of the steps as one task can be; how many.
  std::int32_t add_run(StepGraph& graph, std::size_t c, const BlockCall& call, std::int32_t first,
                       std::int32_t steps) {
    Parts& parts = parts_[c][call.block.index()];
    const CompiledBlock& block = compiled_.blocks[c][call.block.index()];
    const Slots index{
        compiled_.slots_on_stage[static_cast<std::size_t>(classes_.classes[c].stage)]};
    const int me = static_cast<int>(c);
    if (parts.launched.empty()) {
      parts.launched.push_back(0);
      for (const Step& s : block.steps) parts.launched.push_back(parts.launched.back() + s.launch);
    }
    // Before the run, whose links take time to find, is looked at.
    if (!graph.joins(me, parts.launched[static_cast<std::size_t>(first + steps)] -
                             parts.launched[static_cast<std::size_t>(first)]))
      return 0;
    std::int32_t can = steps;
    for (bool asked = false; can > 1; asked = true) {
      Parts::Known& known = parts.runs[{first, can}];
      if (known.run.parts == 0) known.run = run_of(block, first, can);
      waits_.clear(), makes_.clear();
      const auto link = [&](const BlockRun::Link& l) {
        return StepGraph::Link{
            l.part, l.stream,
            l.buffer ? static_cast<std::int64_t>(index.at(l.slot, call.micro_batch)) : -1};
      };
      for (const auto& l : known.run.waits) waits_.push_back(link(l));
      StepGraph::Run run{known.chain, can, known.run.stream, known.run.launch, waits_, {}};
      if (!asked) {
        if (const std::int32_t free = graph.joinable(me, run); free < can) {
          can = free;
          continue;
        }
      }
      for (const auto& l : known.run.makes) makes_.push_back(link(l));
      if (known.chain < 0) known.chain = graph.add_chain(chain_of(block, parts.tasks, first, can));
      run.chain = known.chain;
      run.makes = makes_;
      graph.run(me, run);
      return can;
    }
    return 0;
  }
  static std::vector<Task> chain_of(const CompiledBlock& block, const std::vector<Task>& tasks,
                                    std::int32_t first, std::int32_t parts) {
    std::vector<Task> chain(tasks.begin() + first, tasks.begin() + first + parts);
    std::int64_t launched = 0;
    for (std::size_t k = 0; k < chain.size(); ++k) {
      launched += block.steps[static_cast<std::size_t>(first) + k].launch;
      chain[k].earliest = launched;
    }
    return chain;
  }

  void add_step(StepGraph& graph, std::size_t c, std::size_t at, std::size_t k) {
    const BlockCall& call = calls_of(c)[at];
    const CompiledBlock& block = compiled_.blocks[c][call.block.index()];
    const Slots index{
        compiled_.slots_on_stage[static_cast<std::size_t>(classes_.classes[c].stage)]};
    const Step& step = block.steps[k];
    step_waits_.clear(), step_marks_.clear();
    for (std::int32_t w = 0; w < step.waits; ++w)
      step_waits_.push_back(
          index.at(block.slots[static_cast<std::size_t>(step.first_wait + w)], call.micro_batch));
    for (std::int32_t m = 0; m < step.marks; ++m)
      step_marks_.push_back(
          index.at(block.slots[static_cast<std::size_t>(step.first_mark + m)], call.micro_batch));
    const StepGraph::Instance x{parts_[c][call.block.index()].tasks[k],
                                step.stream,
                                step.after_compute,
                                step_waits_,
                                step_marks_,
                                step.launch,
                                step.host_waits,
                                step.host_joins};
    const auto message = [&](int from, int to) {
      return keys_(step.message, step.of_step ? -1 : call.micro_batch, from, to);
    };
    const int me = static_cast<int>(c);
    if (step.kind == Kind::send) {
      graph.send(me, x, message(me, step.peer_class));
    } else if (step.kind == Kind::receive) {
      graph.receive(me, x, message(step.peer_class, me));
    } else if (step.meeting >= 0) {
      graph.meet(me, x, meeting_key(compiled_, step, at, met_[{me, step.meeting}]++));
    } else {
      graph.step(me, x);
    }
  }

  /// Block call and step of an instance.
  std::pair<std::size_t, std::size_t> place_of(std::size_t c, std::int32_t instance) const {
    const auto& firsts = first_[c];
    const auto call = static_cast<std::size_t>(
        std::upper_bound(firsts.begin(), firsts.end(), instance) - firsts.begin() - 1);
    return {calls_of(c)[call].block.index(), static_cast<std::size_t>(instance - firsts[call])};
  }
  void cut_after(const StepGraph::Cut& cut, bool everywhere) {
    const auto c = static_cast<std::size_t>(cut.rank_class);
    const auto [b, k] = place_of(c, cut.instance);
    auto& joined = parts_[c][b].joined;
    if (everywhere) {
      joined.assign(joined.size(), 0);
    } else {
      joined[k + 1] = 0;
    }
  }

  ContendedStep named(StepGraph::Played played) const {
    ContendedStep step;
    for (const auto& list : played.losses) {
      for (const Loss& l : list)
        step.resource_names.try_emplace(l.resource.value, usages_.resource_name(l.resource));
    }
    std::map<std::tuple<int, std::int32_t, std::int32_t>, std::int64_t> lost;
    for (std::size_t c = 0; c < played.losses.size(); ++c) {
      for (const Loss& l : played.losses[c]) {
        const auto [b, k] = place_of(c, l.task);
        lost[{static_cast<int>(c), compiled_.blocks[c][b].steps[k].label, l.resource.value}] +=
            l.ticks;
      }
    }
    const auto users = users_of_resources();
    for (const auto& [key, ticks] : lost) {
      const auto& [c, x, resource] = key;
      Contended one{c, labels_.name(x), step.resource_names.at(resource), Ticks{ticks}};
      // A rank's kernels follow each other.
      const auto& all = users.at(resource);
      const bool kernel = all.count({x, true}) > 0 && !ranks_share_;
      std::set<std::int32_t> others;
      for (const auto& [other, is_kernel] : all) {
        if (other != x && !(kernel && is_kernel)) others.insert(other);
      }
      for (const std::int32_t other : others) one.beside.push_back(labels_.name(other));
      step.contended.push_back(std::move(one));
    }
    std::stable_sort(step.contended.begin(), step.contended.end(),
                     [](const Contended& a, const Contended& b) { return b.lost < a.lost; });
    step.stretched = std::move(played.stretched);
    step.losses = std::move(played.losses);
    return step;
  }

  /// Labels of what uses each resource, or holds a part of it; is it on a compute stream?
  std::map<std::int32_t, std::set<std::pair<std::int32_t, bool>>> users_of_resources() const {
    std::map<std::int32_t, std::set<std::pair<std::int32_t, bool>>> users;
    for (std::size_t c = 0; c < parts_.size(); ++c) {
      for (std::size_t b = 0; b < parts_[c].size(); ++b) {
        const auto& tasks = parts_[c][b].tasks;
        for (std::size_t k = 0; k < tasks.size(); ++k) {
          if (tasks[k].usage < 0) continue;
          const Usage& u = usages_.all()[static_cast<std::size_t>(tasks[k].usage)];
          const Step& s = compiled_.blocks[c][b].steps[k];
          const std::pair label{s.label, s.stream == kComputeStream};
          for (const Demand& d : u.demands) users[d.resource.value].insert(label);
          for (const auto& [r, part] : u.held) users[r.value].insert(label);
        }
      }
    }
    return users;
  }

  /// A block's instructions as tasks: what of their time is fixed, what sharing stretches, what
  /// they use.
  std::vector<Task> tasks_of(int c, std::size_t b) {
    const CompiledBlock& block = compiled_.blocks[static_cast<std::size_t>(c)][b];
    const std::int64_t rank = classes_.classes[static_cast<std::size_t>(c)].representative;
    // Where nothing runs beside the compute stream, and no other rank on the device, its kernels
    // have the device to themselves.
    bool beside = ranks_share_;
    for (const CompiledBlock& any : compiled_.blocks[static_cast<std::size_t>(c)]) {
      for (const Step& s : any.steps) beside = beside || s.stream != kComputeStream;
    }
    std::vector<Task> tasks;
    for (const Step& s : block.steps) {
      const Instruction& i = p_.blocks[b].instructions[static_cast<std::size_t>(s.instruction)];
      Task t;
      Seconds work{0};
      switch (s.kind) {
        case Kind::compute:
        case Kind::slice:
          if (!beside || from_storage(p_, i) || on_host(p_, i)) break;
          t.usage = usages_.kernel(i, c, work);
          break;
        case Kind::copy:
          work = to_seconds(Ticks{s.ticks});
          t.usage = usages_.copy(i, rank, local_bytes(p_, i.writes[0], rank), work);
          break;
        case Kind::collective: {
          const auto group = p_.group(i, rank);
          Bytes bytes{0};
          const auto involved = classes_in(classes_, group);
          for (const int m : involved)
            bytes = std::max(
                bytes,
                payload(p_, i, classes_.classes[static_cast<std::size_t>(m)].representative));
          t.usage = usages_.collective(i, group, involved, bytes, work);
          break;
        }
        case Kind::send:
          t.usage =
              usages_.send(i, rank, p_.peer_of(i, rank), message_bytes(p_, i.reads[0], rank), work);
          break;
        default:
          break;
      }
      if (t.usage >= 0) t.work = work_ticks(work, s.ticks, i.every);
      t.fixed = s.ticks - t.work;
      tasks.push_back(t);
    }
    return tasks;
  }

  const Program& p_;
  const RankClasses& classes_;
  const Compiled& compiled_;
  const Labels& labels_;
  MessageKeys keys_;
  Usages usages_;
  bool ranks_share_;                              ///< their devices
  std::vector<std::vector<Parts>> parts_;         ///< [class][block]
  std::vector<std::vector<std::int32_t>> first_;  ///< [class][call]: instance it begins with
  /// By class and meeting, in the graph that is being built.
  std::map<std::pair<int, std::int32_t>, std::int32_t> met_;
  std::vector<StepGraph::Link> waits_, makes_;  // reused
  std::vector<std::size_t> step_waits_, step_marks_;
};

}  // namespace

ContendedStep contend(const Program& program, Communication& communication,
                      const SharedLinks& links, const Compiled& compiled, const Labels& labels,
                      bool in_runs) {
  return Contender(program, communication, links, compiled, labels).run(in_runs);
}

}  // namespace partita
