#include "simulator/engine/turns.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <queue>
#include <tuple>
#include <unordered_map>

#include "base/error.h"

namespace partita {
namespace {

class Turns {
 public:
  Turns(const Program& p, const Communication& communication, const RankClasses& classes,
        const Compiled& compiled, Labels& labels, bool record, std::vector<Progress>& progress,
        Timeline& timeline)
      : p_(p),
        communication_(communication),
        classes_(classes),
        compiled_(compiled),
        labels_(labels),
        record_(record),
        progress_(progress),
        timeline_(timeline),
        keys_(p, classes) {}

  void play() {
    const std::size_t n = classes_.classes.size();
    const Topology& t = communication_.topology();
    turn_.assign(n, {});
    node_of_.resize(n);
    for (std::size_t c = 0; c < n; ++c) {
      const std::int64_t rank = classes_.classes[c].representative;
      node_of_[c] = t.node_of(DeviceId{static_cast<std::size_t>(rank)});
      const int cores = t.device(DeviceId{static_cast<std::size_t>(rank)}).host_cores;
      hosts_.try_emplace(node_of_[c], Host{cores > 0 ? cores : static_cast<int>(n), {}});
    }
    for (std::size_t c = 0; c < n; ++c) ready(static_cast<int>(c), 0);
    while (!events_.empty()) {
      const Event e = events_.top();
      events_.pop();
      if (e.becomes_ready) {
        ready(e.rank, e.time);
      } else {
        end_of_work(e.rank, e.time);
      }
    }
  }

 private:
  struct Waiter {
    bool came = false, works = false;
    std::int64_t start = 0;  ///< when it first had a core for its step
    std::size_t meeting = 0;
  };
  struct Gathering {
    std::vector<int> members;  ///< there
    std::size_t wanted = 0, done = 0;
  };

  struct Event {
    std::int64_t time = 0, order = 0;
    int rank = 0;
    bool becomes_ready = false;
    bool operator<(const Event& o) const {
      return std::tie(o.time, o.order) < std::tie(time, order);
    }
  };
  struct Host {
    int idle = 0;
    std::deque<int> queue;
  };

  void ready(int c, std::int64_t now) {
    Host& h = hosts_.at(node_of_[static_cast<std::size_t>(c)]);
    if (h.idle == 0) {
      h.queue.push_back(c);
      return;
    }
    --h.idle;
    go_on(c, now);
  }
  void give_up_core(int c, std::int64_t now) {
    Host& h = hosts_.at(node_of_[static_cast<std::size_t>(c)]);
    if (h.queue.empty()) {
      ++h.idle;
      return;
    }
    const int next = h.queue.front();
    h.queue.pop_front();
    go_on(next, now);
  }
  void event(int c, std::int64_t time, bool becomes_ready) {
    events_.push({time, static_cast<std::int64_t>(event_count_++), c, becomes_ready});
  }

  /// The step that a rank is at; null at its end.
  const Step* current(int c, BlockCall& call) {
    Progress& s = progress_[static_cast<std::size_t>(c)];
    const auto& calls =
        p_.stages[static_cast<std::size_t>(classes_.classes[static_cast<std::size_t>(c)].stage)];
    for (; s.call < calls.size(); ++s.call, s.step = 0) {
      call = calls[s.call];
      const CompiledBlock& block =
          compiled_.blocks[static_cast<std::size_t>(c)][call.block.index()];
      if (s.step < block.steps.size()) return &block.steps[s.step];
    }
    return nullptr;
  }

  /// A rank that has a core: begins its next step, or goes on with the one it waited in.
  void go_on(int c, std::int64_t now) {
    BlockCall call;
    const Step* step = current(c, call);
    if (step == nullptr) {
      give_up_core(c, now);
      return;
    }
    Waiter& w = turn_[static_cast<std::size_t>(c)];
    Progress& s = progress_[static_cast<std::size_t>(c)];
    if (!w.came) w.start = now, w.came = true;
    if (!w.works) {
      if (step->kind == Kind::receive) {
        const auto key =
            keys_(step->message, step->of_step ? -1 : call.micro_batch, step->peer_class, c);
        const auto it = messages_.find(key);
        if (it == messages_.end()) {
          waits_for_[key] = c;
          give_up_core(c, now);
          return;
        }
        if (it->second > now) {
          event(c, it->second, true);
          give_up_core(c, now);
          return;
        }
      } else if (step->meeting >= 0) {
        if (!gathered(c, s, *step)) {
          give_up_core(c, now);
          return;
        }
        for (const int m : gatherings_[w.meeting].members) {
          turn_[static_cast<std::size_t>(m)].works = true;
          if (m != c) event(m, now, true);
        }
      }
      w.works = true;
    } else if (step->meeting >= 0 && gatherings_[w.meeting].done == gatherings_[w.meeting].wanted) {
      end_step(c, s, call, *step, now);
      return;
    }
    if (step->kind == Kind::send) {
      const auto key =
          keys_(step->message, step->of_step ? -1 : call.micro_batch, c, step->peer_class);
      messages_[key] = now + step->beside;
      if (const auto it = waits_for_.find(key); it != waits_for_.end()) {
        event(it->second, now + step->beside, true);
        waits_for_.erase(it);
      }
    }
    const auto work = static_cast<std::int64_t>(
        std::ceil(static_cast<double>(step->ticks) * step->share_of_core));
    if (now > kLastTick - work) {
      throw InputError("time",
                       "the step would take longer than the 106 days of event time; use fewer "
                       "micro-batches or a faster device");
    }
    event(c, now + work, false);
  }

  /// Notes that rank `c` is at a collective; true for the last one.
  bool gathered(int c, Progress& s, const Step& step) {
    const auto& meeting = compiled_.meetings[static_cast<std::size_t>(step.meeting)];
    const auto key = meeting_key(compiled_, step, s.call, s.met[step.meeting]++);
    const auto [it, fresh] = gathering_of_.emplace(key, gatherings_.size());
    if (fresh) gatherings_.push_back({{}, meeting.classes.size(), 0});
    Gathering& g = gatherings_[it->second];
    turn_[static_cast<std::size_t>(c)].meeting = it->second;
    g.members.push_back(c);
    return g.members.size() == g.wanted;
  }

  void end_of_work(int c, std::int64_t now) {
    BlockCall call;
    const Step* step = current(c, call);
    Progress& s = progress_[static_cast<std::size_t>(c)];
    if (step->meeting >= 0) {
      // It ends for all at once.
      Gathering& g = gatherings_[turn_[static_cast<std::size_t>(c)].meeting];
      if (++g.done < g.wanted) {
        give_up_core(c, now);
        return;
      }
      for (const int m : g.members) {
        if (m != c) event(m, now, true);
      }
    }
    end_step(c, s, call, *step, now);
  }

  void end_step(int c, Progress& s, const BlockCall& call, const Step& step, std::int64_t now) {
    Waiter& w = turn_[static_cast<std::size_t>(c)];
    // Until it had a core it was neither at work nor waiting for another rank.
    spend(c, s, labels_.of("other"), s.free[kComputeStream], w.start);
    spend(c, s, step.label, w.start, now);
    s.free[kComputeStream] = now;
    s.label[kComputeStream] = step.label;
    ++timeline_.instructions;
    if (record_)
      timeline_.entries.push_back(
          {c, call.block.value, step.instruction, call.micro_batch, Ticks{w.start}, Ticks{now}});
    w = {};
    ++s.step;
    go_on(c, now);
  }

  void spend(int c, Progress& s, std::int32_t label, std::int64_t from, std::int64_t to) {
    s.spent.add(label, to - from);
    if (record_ && to > from) timeline_.spans.push_back({c, label, Ticks{from}, Ticks{to}});
  }

  const Program& p_;
  const Communication& communication_;
  const RankClasses& classes_;
  const Compiled& compiled_;
  Labels& labels_;
  bool record_;
  std::vector<Progress>& progress_;
  Timeline& timeline_;
  MessageKeys keys_;
  Messages messages_;
  std::vector<Waiter> turn_;
  std::vector<std::size_t> node_of_;
  std::map<std::size_t, Host> hosts_;
  std::priority_queue<Event> events_;
  std::size_t event_count_ = 0;
  std::vector<Gathering> gatherings_;
  std::unordered_map<MeetingKey, std::size_t, MeetingKey::Hash> gathering_of_;
  std::unordered_map<std::uint64_t, int> waits_for_;
};

}  // namespace

bool share_cores(const Program& p, const Communication& communication) {
  const Topology& t = communication.topology();
  std::map<std::size_t, std::int64_t> ranks;
  bool crowded = false;
  for (std::int64_t r = 0; r < p.ranks(); ++r) {
    const DeviceId id{static_cast<std::size_t>(r)};
    const DeviceProfile& d = t.device(id);
    if (d.concurrent_streams) return false;
    crowded |= ++ranks[t.node_of(id)] > d.host_cores && d.host_cores > 0;
  }
  return crowded;
}

void take_turns(const Program& program, const Communication& communication,
                const RankClasses& classes, const Compiled& compiled, Labels& labels, bool record,
                std::vector<Progress>& progress, Timeline& timeline) {
  Turns(program, communication, classes, compiled, labels, record, progress, timeline).play();
}

}  // namespace partita
