#include "simulator/engine/contend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "base/units.h"
#include "simulator/engine/agenda.h"

namespace partita {
namespace {

constexpr std::int64_t kLastTick = 9'200'000'000'000'000'000;

/// Ticks that a double counts exactly.
constexpr std::int64_t kExactWork = std::int64_t{1} << 53;

}  // namespace

std::int32_t Contention::add(const Task& task) {
  tasks_.push_back(task);
  first_edge_.push_back(-1);
  starts_after_.push_back(0);
  ends_after_.push_back(0);
  return static_cast<std::int32_t>(tasks_.size()) - 1;
}

std::int32_t Contention::add_chain(std::vector<Task> parts) {
  Chain chain;
  std::int64_t at = 0;
  for (const Task& t : parts) {
    chain.begins.push_back(at);
    chain.bounded = chain.bounded && t.work <= kExactWork && t.fixed <= kLastTick - t.work - at;
    if (chain.bounded) at += t.fixed + t.work;
  }
  chain.begins.push_back(at);
  std::int64_t lead = 0;
  for (std::size_t k = parts.size(); k-- > 0;) {
    lead = std::max(lead, parts[k].earliest - chain.begins[k]);
    chain.lead.push_back(lead);
  }
  std::reverse(chain.lead.begin(), chain.lead.end());
  chain.parts = std::move(parts);
  chains_.push_back(std::move(chain));
  return static_cast<std::int32_t>(chains_.size()) - 1;
}

void Contention::not_before(std::int32_t task, std::int64_t time) {
  std::int64_t& earliest = tasks_[static_cast<std::size_t>(task)].earliest;
  earliest = std::max(earliest, time);
}

void Contention::order(std::int32_t first, std::int32_t then, Precedence precedence) {
  Edge e{first_edge_[static_cast<std::size_t>(first)], then, precedence};
  first_edge_[static_cast<std::size_t>(first)] = static_cast<std::int32_t>(edges_.size());
  edges_.push_back(e);
  ++(precedence == Precedence::end_to_end ? ends_after_
                                          : starts_after_)[static_cast<std::size_t>(then)];
}

namespace {

/// Held parts in fixed point, so that what is taken and given back is nothing in sum.
constexpr double kHeld = 0x1p40;

class Player {
 public:
  using Chain = Contention::Chain;

  Player(Sharing& sharing, const std::vector<Usage>& usages, const std::vector<Task>& tasks,
         const std::vector<Chain>& chains, Contention::Result& result)
      : sharing_(sharing), usages_(usages), tasks_(tasks), chains_(chains), result_(result) {
    whole_.resize(sharing.resource_count());
    held_.assign(sharing.resource_count(), 0);
    users_.assign(sharing.resource_count(), 0);
    guard_.assign(sharing.resource_count(), -1);
    for (std::size_t r = 0; r < whole_.size(); ++r) {
      whole_[r] = sharing.capacity(ResourceId{r});
      users_[r] = sharing.in_use(ResourceId{r}) ? 1 : 0;  // others' traffic
    }
    running_.resize(tasks.size());
    for (const Chain& chain : chains) touches_.push_back(touched_by(chain));
  }

  struct Event {
    std::int32_t task = 0, stamp = 0;
  };
  enum class Phase : std::uint8_t {
    waiting,
    early,
    pausing,  ///< between two parts
    whole,    ///< a chain's parts from `part` on, undisturbed
    fixed,
    working,
    done
  };
  struct Running {
    ActivityId activity;
    double left = 0, rate = 1;
    std::int64_t since = 0;
    std::int64_t began = 0;  ///< the part, or the first of a whole rest
    std::int32_t stamp = 0, part = 0;
    Phase phase = Phase::waiting;
    ResourceId bound;
  };

  void begin(std::int32_t id, std::int64_t now) {
    if (tasks_[static_cast<std::size_t>(id)].chain < 0) {
      begin_part(id, now, now);
    } else {
      enter(id, now);
    }
  }

  /// It could begin, but for its earliest time.
  void postpone(std::int32_t id) {
    running_[static_cast<std::size_t>(id)].phase = Phase::early;
    agenda_.add(tasks_[static_cast<std::size_t>(id)].earliest, {id, 0});
  }

  /// True when the event is the end of the task's own work.
  bool happens(const Event& e, std::int64_t now) {
    Running& r = running_[static_cast<std::size_t>(e.task)];
    if (r.stamp != e.stamp) return false;
    switch (r.phase) {
      case Phase::pausing:
        enter(e.task, now);
        return false;
      case Phase::fixed:
        begin_work(e.task, now, now);
        return false;
      case Phase::whole:
        stop_guarding(e.task);
        break;
      case Phase::working:
        if (!end_part(e.task, now)) return false;
        break;
      case Phase::waiting:
      case Phase::early:
      case Phase::done:
        PARTITA_ASSERT(false, fmt::format("task {} does not run", e.task));
    }
    ++r.stamp;
    r.phase = Phase::done;
    return true;
  }

  void settle(std::int64_t now) {
    for (const ActivityId a : sharing_.solve()) {
      if (a.index() >= owner_.size() || owner_[a.index()] < 0) continue;  // others' traffic
      const std::int32_t id = owner_[a.index()];
      Running& r = running_[static_cast<std::size_t>(id)];
      lose(id, now);
      r.left = std::max(0.0, r.left - r.rate * static_cast<double>(now - r.since));
      r.since = now;
      r.rate = sharing_.rate(a);
      r.bound = sharing_.bottleneck(a);
      ++r.stamp;
      if (!(r.rate > 0)) continue;
      const double more = std::ceil(r.left / r.rate);
      if (more > static_cast<double>(kLastTick - now)) too_long();
      agenda_.add(now + static_cast<std::int64_t>(more), {id, r.stamp});
    }
  }

  Agenda<Event>& agenda() { return agenda_; }
  Phase phase(std::int32_t id) const { return running_[static_cast<std::size_t>(id)].phase; }

  std::vector<Loss> losses() const {
    // Of one part and resource in the order of time, as they are summed.
    const auto key = [](const Lost& l) { return std::tie(l.task, l.part, l.resource); };
    auto lost = lost_;
    std::stable_sort(lost.begin(), lost.end(),
                     [&](const Lost& a, const Lost& b) { return key(a) < key(b); });
    std::vector<Loss> all;
    for (std::size_t k = 0; k < lost.size();) {
      const Lost& l = lost[k];
      double ticks = 0;
      for (; k < lost.size() && key(lost[k]) == key(l); ++k) ticks += lost[k].ticks;
      if (const auto n = static_cast<std::int64_t>(std::llround(ticks)); n > 0)
        all.push_back({l.task, l.part, ResourceId{static_cast<std::size_t>(l.resource)}, n});
    }
    return all;
  }

 private:
  [[noreturn]] static void too_long() {
    throw InputError("time",
                     "the step would take longer than the 106 days of event time; use fewer "
                     "micro-batches or a faster device");
  }
  const Chain& chain_of(std::int32_t id) const {
    return chains_[static_cast<std::size_t>(tasks_[static_cast<std::size_t>(id)].chain)];
  }
  const std::vector<ResourceId>& touches_of(std::int32_t id) const {
    return touches_[static_cast<std::size_t>(tasks_[static_cast<std::size_t>(id)].chain)];
  }
  /// The task, or the part of its chain that is running.
  const Task& part_of(std::int32_t id) const {
    const Task& t = tasks_[static_cast<std::size_t>(id)];
    return t.chain < 0
               ? t
               : chain_of(id)
                     .parts[static_cast<std::size_t>(running_[static_cast<std::size_t>(id)].part)];
  }

  /// What a chain's parts use; nothing where one of them is not as fast as it could be even alone.
  std::vector<ResourceId> touched_by(const Chain& chain) {
    std::vector<ResourceId> all;
    alone_.resize(usages_.size(), -1);
    whole_chain_.push_back(chain.bounded);
    for (const Task& t : chain.parts) {
      if (t.usage < 0) continue;
      const Usage& u = usages_[static_cast<std::size_t>(t.usage)];
      signed char& alone = alone_[static_cast<std::size_t>(t.usage)];
      if (alone < 0) alone = at_full_speed(u) ? 1 : 0;
      whole_chain_.back() = whole_chain_.back() && alone == 1;
      for (const Demand& d : u.demands) all.push_back(d.resource);
      for (const auto& [r, part] : u.held) all.push_back(r);
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }
  bool at_full_speed(const Usage& u) {
    if (u.demands.empty()) return true;
    take(u, 1);
    const ActivityId a = sharing_.start(u.demands, u.weight, 1);
    sharing_.solve();
    const bool full = sharing_.rate(a) == 1;
    sharing_.stop(a);
    take(u, -1);
    sharing_.solve();
    return full;
  }

  /// Begins the part that a chain is at: with all that follow where nothing else uses what they do.
  void enter(std::int32_t id, std::int64_t now) {
    const Task& t = tasks_[static_cast<std::size_t>(id)];
    const Chain& chain = chain_of(id);
    Running& r = running_[static_cast<std::size_t>(id)];
    const auto part = static_cast<std::size_t>(r.part);
    if (const std::int64_t earliest = t.earliest + chain.parts[part].earliest; now < earliest) {
      r.phase = Phase::pausing;
      agenda_.add(earliest, {id, r.stamp});
      return;
    }
    const auto& touches = touches_of(id);
    const bool whole = whole_chain_[static_cast<std::size_t>(t.chain)] &&
                       t.earliest + chain.lead[part] + chain.begins[part] <= now &&
                       std::all_of(touches.begin(), touches.end(), [&](ResourceId x) {
                         return users_[x.index()] == 0 && guard_[x.index()] < 0;
                       });
    if (!whole) {
      begin_part(id, now, now);
      return;
    }
    const std::int64_t rest = chain.begins.back() - chain.begins[part];
    if (now > kLastTick - rest) too_long();
    for (const ResourceId x : touches) guard_[x.index()] = id;
    r.phase = Phase::whole;
    r.began = now;
    agenda_.add(now + rest, {id, r.stamp});
  }
  void stop_guarding(std::int32_t id) {
    for (const ResourceId x : touches_of(id)) {
      if (guard_[x.index()] == id) guard_[x.index()] = -1;
    }
  }
  /// Something else comes to use what a whole chain does: on with the part it is at, as if it had
  /// been played one by one.
  void interrupt(std::int32_t id, std::int64_t now) {
    stop_guarding(id);
    Running& r = running_[static_cast<std::size_t>(id)];
    const auto& begins = chain_of(id).begins;
    const std::int64_t from = r.began - begins[static_cast<std::size_t>(r.part)];
    const auto at = std::upper_bound(begins.begin(), begins.end(), now - from) - begins.begin() - 1;
    if (static_cast<std::size_t>(at) + 1 == begins.size()) return;  // it ends at this instant
    r.part = static_cast<std::int32_t>(at);
    ++r.stamp;
    begin_part(id, from + begins[static_cast<std::size_t>(at)], now);
  }
  void disturb(ResourceId x, std::int64_t now) {
    if (const std::int32_t id = guard_[x.index()]; id >= 0) interrupt(id, now);
    ++users_[x.index()];
  }

  /// A task, or a part of a chain, that began at `start`.
  void begin_part(std::int32_t id, std::int64_t start, std::int64_t now) {
    const Task& t = part_of(id);
    Running& r = running_[static_cast<std::size_t>(id)];
    const bool shares =
        t.usage >= 0 && t.work > 0 && !usages_[static_cast<std::size_t>(t.usage)].demands.empty();
    if (t.usage >= 0) {
      const Usage& u = usages_[static_cast<std::size_t>(t.usage)];
      for (const auto& [x, part] : u.held) disturb(x, now);
      take(u, 1);
    }
    if (start > kLastTick - t.fixed - t.work) too_long();
    r.began = start;
    if (shares && start + t.fixed < now) {
      begin_work(id, start + t.fixed, now);
      return;
    }
    r.phase = shares ? Phase::fixed : Phase::working;
    agenda_.add(start + t.fixed + (shares ? 0 : t.work), {id, r.stamp});
  }
  void begin_work(std::int32_t id, std::int64_t since, std::int64_t now) {
    const Task& t = part_of(id);
    const Usage& u = usages_[static_cast<std::size_t>(t.usage)];
    Running& r = running_[static_cast<std::size_t>(id)];
    for (const Demand& d : u.demands) disturb(d.resource, now);
    r.activity = sharing_.start(u.demands, u.weight, 1);
    if (owner_.size() <= r.activity.index()) owner_.resize(r.activity.index() + 1, -1);
    owner_[r.activity.index()] = id;
    r.left = static_cast<double>(t.work);
    r.since = since;
    r.rate = 1;
    r.bound = {};
    r.phase = Phase::working;
  }
  /// True for the last one.
  bool end_part(std::int32_t id, std::int64_t now) {
    const Task& t = part_of(id);
    Running& r = running_[static_cast<std::size_t>(id)];
    if (r.activity.valid()) {
      lose(id, now);
      sharing_.stop(r.activity);
      r.activity = {};
      for (const Demand& d : usages_[static_cast<std::size_t>(t.usage)].demands)
        --users_[d.resource.index()];
    }
    if (t.usage >= 0) {
      const Usage& u = usages_[static_cast<std::size_t>(t.usage)];
      take(u, -1);
      for (const auto& [x, part] : u.held) --users_[x.index()];
    }
    if (tasks_[static_cast<std::size_t>(id)].chain < 0) return true;
    if (now - r.began != t.fixed + t.work) result_.stretched.push_back({id, r.part, now - r.began});
    if (static_cast<std::size_t>(r.part) + 1 == chain_of(id).parts.size()) return true;
    ++r.part;
    ++r.stamp;
    enter(id, now);
    return false;
  }

  /// Takes the parts of capacities that are held, or gives them back.
  void take(const Usage& u, int sign) {
    for (const auto& [r, part] : u.held) {
      std::int64_t& held = held_[r.index()];
      held += sign * std::llround(part * kHeld);
      // Never all of it: what waits for the last multiprocessor still gets a turn.
      sharing_.set_capacity(r, std::max(whole_[r.index()] - static_cast<double>(held) / kHeld,
                                        whole_[r.index()] * 0.05));
    }
  }
  void lose(std::int32_t id, std::int64_t now) {
    const Running& r = running_[static_cast<std::size_t>(id)];
    if (r.rate < 1 && r.bound.valid() && now > r.since)
      lost_.push_back(
          {id, r.part, r.bound.value, (1 - r.rate) * static_cast<double>(now - r.since)});
  }

  Sharing& sharing_;
  const std::vector<Usage>& usages_;
  const std::vector<Task>& tasks_;
  const std::vector<Chain>& chains_;
  Contention::Result& result_;
  Agenda<Event> agenda_;
  std::vector<Running> running_;
  std::vector<std::int32_t> owner_;
  std::vector<double> whole_;
  std::vector<std::int64_t> held_;
  std::vector<std::int32_t> users_;  ///< by resource: what works on it or holds some, not whole
  std::vector<std::int32_t> guard_;  ///< by resource: the whole chain that has it to itself
  std::vector<signed char> alone_;   ///< by usage: full speed alone? -1: not known yet
  std::vector<char> whole_chain_;    ///< by chain: may it be one event?
  std::vector<std::vector<ResourceId>> touches_;  ///< by chain
  struct Lost {
    std::int32_t task = 0, part = 0, resource = 0;
    double ticks = 0;
  };
  std::vector<Lost> lost_;  ///< as time goes
};

}  // namespace

Contention::Result Contention::play(Sharing& sharing, const std::vector<Usage>& usages) const {
  Result result;
  result.start.assign(tasks_.size(), -1);
  result.end.assign(tasks_.size(), -1);
  Player player(sharing, usages, tasks_, chains_, result);
  std::vector<std::int32_t> starts = starts_after_, ends = ends_after_;
  std::vector<std::int32_t> ready;
  std::vector<std::int32_t> over;
  std::size_t ended = 0;
  const auto advance = [&](std::int64_t now) {
    // Beginnings and ends that follow from each other at one instant.
    while (!ready.empty() || !over.empty()) {
      if (!ready.empty()) {
        const std::int32_t id = ready.back();
        ready.pop_back();
        if (now < tasks_[static_cast<std::size_t>(id)].earliest) {
          player.postpone(id);
          continue;
        }
        result.start[static_cast<std::size_t>(id)] = now;
        player.begin(id, now);
        for (std::int32_t e = first_edge_[static_cast<std::size_t>(id)]; e >= 0;
             e = edges_[static_cast<std::size_t>(e)].next) {
          const Edge& edge = edges_[static_cast<std::size_t>(e)];
          if (edge.precedence == Precedence::start_to_start &&
              --starts[static_cast<std::size_t>(edge.to)] == 0)
            ready.push_back(edge.to);
        }
        continue;
      }
      const std::int32_t id = over.back();
      over.pop_back();
      result.end[static_cast<std::size_t>(id)] = now;
      ++ended;
      for (std::int32_t e = first_edge_[static_cast<std::size_t>(id)]; e >= 0;
           e = edges_[static_cast<std::size_t>(e)].next) {
        const Edge& edge = edges_[static_cast<std::size_t>(e)];
        const auto to = static_cast<std::size_t>(edge.to);
        if (edge.precedence == Precedence::end_to_start && --starts[to] == 0)
          ready.push_back(edge.to);
        if (edge.precedence == Precedence::end_to_end && --ends[to] == 0 &&
            player.phase(edge.to) == Player::Phase::done)
          over.push_back(edge.to);
      }
    }
  };
  for (std::size_t t = 0; t < tasks_.size(); ++t) {
    if (starts[t] == 0) ready.push_back(static_cast<std::int32_t>(t));
  }
  advance(0);
  player.settle(0);
  std::vector<Player::Event> events;
  while (!player.agenda().empty()) {
    const std::int64_t now = player.agenda().next();
    while (!player.agenda().empty() && player.agenda().next() == now) {
      player.agenda().take(events);
      for (const Player::Event& e : events) {
        ++result.events;
        if (player.phase(e.task) == Player::Phase::early) {
          ready.push_back(e.task);
        } else if (player.happens(e, now) && ends[static_cast<std::size_t>(e.task)] == 0)
          over.push_back(e.task);
      }
      advance(now);
    }
    player.settle(now);
  }
  if (ended < tasks_.size()) {
    for (std::size_t t = 0; t < tasks_.size(); ++t) {
      if (player.phase(static_cast<std::int32_t>(t)) == Player::Phase::working)
        throw InputError("network",
                         "a transfer needs a failed link (capacity 0) and never ends; "
                         "give the link a capacity or route around it");
    }
    PARTITA_ASSERT(false,
                   fmt::format("{} of {} tasks never end", tasks_.size() - ended, tasks_.size()));
  }
  result.losses = player.losses();
  return result;
}

}  // namespace partita
