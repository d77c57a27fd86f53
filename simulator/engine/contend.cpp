#include "simulator/engine/contend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.h"
#include "base/units.h"
#include "simulator/engine/agenda.h"

namespace partita {

std::int32_t Contention::add(const Task& task) {
  tasks_.push_back(task);
  first_edge_.push_back(-1);
  starts_after_.push_back(0);
  ends_after_.push_back(0);
  return static_cast<std::int32_t>(tasks_.size()) - 1;
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

constexpr std::int64_t kLastTick = 9'200'000'000'000'000'000;

/// Held parts in fixed point, so that what is taken and given back is nothing in sum.
constexpr double kHeld = 0x1p40;

class Player {
 public:
  Player(Sharing& sharing, const std::vector<Usage>& usages, const std::vector<Task>& tasks,
         Contention::Result& result)
      : sharing_(sharing), usages_(usages), tasks_(tasks), result_(result) {
    whole_.resize(sharing.resource_count());
    held_.assign(sharing.resource_count(), 0);
    for (std::size_t r = 0; r < whole_.size(); ++r) whole_[r] = sharing.capacity(ResourceId{r});
    running_.resize(tasks.size());
  }

  struct Event {
    std::int32_t task = 0, stamp = 0;
  };
  enum class Phase : std::uint8_t { waiting, early, fixed, working, done };
  struct Running {
    ActivityId activity;
    double left = 0, rate = 1, lost = 0;
    std::int64_t since = 0;
    std::int32_t stamp = 0;
    Phase phase = Phase::waiting;
    ResourceId bound;
  };

  void begin(std::int32_t id, std::int64_t now) {
    const Task& t = tasks_[static_cast<std::size_t>(id)];
    Running& r = running_[static_cast<std::size_t>(id)];
    const bool shares =
        t.usage >= 0 && t.work > 0 && !usages_[static_cast<std::size_t>(t.usage)].demands.empty();
    if (t.usage >= 0) hold(usages_[static_cast<std::size_t>(t.usage)], 1);
    if (now > kLastTick - t.fixed - t.work) {
      throw InputError("time",
                       "the step would take longer than the 106 days of event time; use fewer "
                       "micro-batches or a faster device");
    }
    r.phase = shares ? Phase::fixed : Phase::working;
    agenda_.add(now + t.fixed + (shares ? 0 : t.work), {id, r.stamp});
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
    const Task& t = tasks_[static_cast<std::size_t>(e.task)];
    if (r.phase == Phase::fixed) {
      const Usage& u = usages_[static_cast<std::size_t>(t.usage)];
      r.activity = sharing_.start(u.demands, u.weight, 1);
      if (owner_.size() <= r.activity.index()) owner_.resize(r.activity.index() + 1, -1);
      owner_[r.activity.index()] = e.task;
      r.left = static_cast<double>(t.work);
      r.since = now;
      r.phase = Phase::working;
      return false;
    }
    if (r.activity.valid()) {
      lose(e.task, now);
      sharing_.stop(r.activity);
      r.activity = {};
    }
    if (t.usage >= 0) hold(usages_[static_cast<std::size_t>(t.usage)], -1);
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
      if (more > static_cast<double>(kLastTick - now)) {
        throw InputError("time",
                         "the step would take longer than the 106 days of event time; use fewer "
                         "micro-batches or a faster device");
      }
      agenda_.add(now + static_cast<std::int64_t>(more), {id, r.stamp});
    }
  }

  Agenda<Event>& agenda() { return agenda_; }
  Phase phase(std::int32_t id) const { return running_[static_cast<std::size_t>(id)].phase; }

  std::vector<Loss> losses() const {
    std::vector<Loss> all;
    for (const auto& [key, ticks] : lost_) {
      if (const auto n = static_cast<std::int64_t>(std::llround(ticks)); n > 0)
        all.push_back({key.first, ResourceId{static_cast<std::size_t>(key.second)}, n});
    }
    return all;
  }

 private:
  void hold(const Usage& u, int sign) {
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
      lost_[{id, r.bound.value}] += (1 - r.rate) * static_cast<double>(now - r.since);
  }

  Sharing& sharing_;
  const std::vector<Usage>& usages_;
  const std::vector<Task>& tasks_;
  Contention::Result& result_;
  Agenda<Event> agenda_;
  std::vector<Running> running_;
  std::vector<std::int32_t> owner_;
  std::vector<double> whole_;
  std::vector<std::int64_t> held_;
  std::map<std::pair<std::int32_t, std::int32_t>, double> lost_;
};

}  // namespace

Contention::Result Contention::play(Sharing& sharing, const std::vector<Usage>& usages) const {
  Result result;
  result.start.assign(tasks_.size(), -1);
  result.end.assign(tasks_.size(), -1);
  Player player(sharing, usages, tasks_, result);
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
