#include "simulator/engine/contended_step.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "simulator/engine/progress.h"
#include "simulator/engine/step_graph.h"

namespace partita {
namespace {

class Contender {
 public:
  Contender(const Program& p, Communication& communication, const SharedLinks& links,
            const Compiled& compiled, const Labels& labels)
      : p_(p),
        communication_(communication),
        links_(links),
        classes_(links.ranks),
        compiled_(compiled),
        labels_(labels),
        keys_(p, links.ranks) {}

  ContendedStep run() {
    Usages usages(p_, communication_, links_);
    const std::size_t n = classes_.classes.size();
    std::vector<std::size_t> slots;
    std::vector<Slots> index;
    for (const RankClass& rc : classes_.classes) {
      index.push_back({compiled_.slots_on_stage[static_cast<std::size_t>(rc.stage)]});
      slots.push_back(index.back().width * static_cast<std::size_t>(p_.micro_batches + 1));
    }
    StepGraph graph(n, p_.streams.size(), slots);
    std::vector<std::vector<std::int32_t>> label_of(n);
    for (std::size_t c = 0; c < n; ++c) {
      const auto& blocks = compiled_.blocks[c];
      std::vector<std::vector<Task>> tasks(blocks.size());
      for (std::size_t b = 0; b < blocks.size(); ++b)
        tasks[b] = tasks_of(static_cast<int>(c), b, usages);
      std::vector<std::size_t> waits, marks;
      for (const BlockCall& call : p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)]) {
        const CompiledBlock& block = blocks[call.block.index()];
        for (std::size_t k = 0; k < block.steps.size(); ++k) {
          const Step& step = block.steps[k];
          waits.clear(), marks.clear();
          for (std::int32_t w = 0; w < step.waits; ++w)
            waits.push_back(index[c].at(block.slots[static_cast<std::size_t>(step.first_wait + w)],
                                        call.micro_batch));
          for (std::int32_t m = 0; m < step.marks; ++m)
            marks.push_back(index[c].at(block.slots[static_cast<std::size_t>(step.first_mark + m)],
                                        call.micro_batch));
          const StepGraph::Instance x{tasks[call.block.index()][k],
                                      step.stream,
                                      step.after_compute,
                                      waits,
                                      marks,
                                      step.launch,
                                      step.host_waits};
          label_of[c].push_back(step.label);
          const auto message = [&](int from, int to) {
            return keys_(step.message, step.of_step ? -1 : call.micro_batch, from, to);
          };
          const int me = static_cast<int>(c);
          if (step.kind == Kind::send) {
            graph.send(me, x, message(me, step.peer_class));
          } else if (step.kind == Kind::receive) {
            graph.receive(me, x, message(step.peer_class, me));
          } else if (step.kind == Kind::collective && step.meets) {
            const Instruction& i = p_.blocks[call.block.index()]
                                       .instructions[static_cast<std::size_t>(step.instruction)];
            const auto at = static_cast<std::size_t>(
                &call - p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)].data());
            std::vector<std::int64_t> key{i.tie, i.tie >= 0 ? 0 : static_cast<std::int64_t>(at),
                                          i.tie >= 0 ? 0 : step.instruction};
            const auto involved =
                classes_in(classes_, p_.group(i, classes_.classes[c].representative));
            key.insert(key.end(), involved.begin(), involved.end());
            graph.meet(me, x, key);
          } else {
            graph.step(me, x);
          }
        }
      }
    }
    auto played = graph.play(usages.sharing(), usages.all());
    ContendedStep step;
    for (const auto& list : played.losses) {
      for (const Loss& l : list)
        step.resource_names.try_emplace(l.resource.value, usages.resource_name(l.resource));
    }
    std::map<std::tuple<int, std::int32_t, std::int32_t>, std::int64_t> lost;
    for (std::size_t c = 0; c < n; ++c) {
      for (const Loss& l : played.losses[c])
        lost[{static_cast<int>(c), label_of[c][static_cast<std::size_t>(l.task)],
              l.resource.value}] += l.ticks;
    }
    for (const auto& [key, ticks] : lost) {
      const auto& [c, x, resource] = key;
      step.contended.push_back(
          {c, labels_.name(x), step.resource_names.at(resource), Ticks{ticks}});
    }
    std::stable_sort(step.contended.begin(), step.contended.end(),
                     [](const Contended& a, const Contended& b) { return b.lost < a.lost; });
    step.ticks = std::move(played.ticks);
    step.losses = std::move(played.losses);
    return step;
  }

 private:
  /// A block's instructions as tasks: what of their time is fixed, what sharing stretches, what
  /// they use.
  std::vector<Task> tasks_of(int c, std::size_t b, Usages& usages) {
    const CompiledBlock& block = compiled_.blocks[static_cast<std::size_t>(c)][b];
    const std::int64_t rank = classes_.classes[static_cast<std::size_t>(c)].representative;
    // Where nothing runs beside the compute stream, its kernels have the device to themselves.
    bool beside = false;
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
          t.usage = usages.kernel(i, c);
          if (t.usage >= 0) work = usages.work_of_kernel(i, rank);
          break;
        case Kind::copy:
          work = to_seconds(Ticks{s.ticks});
          t.usage = usages.copy(i, rank, local_bytes(p_, i.writes[0], rank), work);
          break;
        case Kind::collective: {
          const auto group = p_.group(i, rank);
          Bytes bytes{0};
          const auto involved = classes_in(classes_, group);
          for (const int m : involved)
            bytes = std::max(
                bytes,
                payload(p_, i, classes_.classes[static_cast<std::size_t>(m)].representative));
          t.usage = usages.collective(i, group, involved, bytes, work);
          break;
        }
        case Kind::send:
          t.usage =
              usages.send(i, rank, p_.peer_of(i, rank), local_bytes(p_, i.reads[0], rank), work);
          break;
        default:
          break;
      }
      if (t.usage >= 0) {
        // Compared as numbers first: all of a time may be far more than ticks can count.
        const double all = static_cast<double>(s.ticks),
                     share = work.count * 1e12 / static_cast<double>(i.every);
        t.work = share >= all ? s.ticks
                              : to_ticks(Seconds{work.count / static_cast<double>(i.every)}).count;
        t.work = std::min(t.work, s.ticks);
      }
      t.fixed = s.ticks - t.work;
      tasks.push_back(t);
    }
    return tasks;
  }

  const Program& p_;
  Communication& communication_;
  const SharedLinks& links_;
  const RankClasses& classes_;
  const Compiled& compiled_;
  const Labels& labels_;
  MessageKeys keys_;
};

}  // namespace

ContendedStep contend(const Program& program, Communication& communication,
                      const SharedLinks& links, const Compiled& compiled, const Labels& labels) {
  return Contender(program, communication, links, compiled, labels).run();
}

}  // namespace partita
