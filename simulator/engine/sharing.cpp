#include "simulator/engine/sharing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace partita {
namespace {

/// Fixed point with 80 bits behind the point, 46 before it.
__extension__ typedef __int128 Exact;
constexpr double kExact = 0x1p80;

}  // namespace

ResourceId Sharing::add(double capacity) {
  PARTITA_ASSERT(capacity >= 0, fmt::format("capacity {}", capacity));
  resources_.emplace_back();
  resources_.back().capacity = capacity;
  return ResourceId{resources_.size() - 1};
}

void Sharing::set_capacity(ResourceId r, double capacity) {
  PARTITA_ASSERT(capacity >= 0, fmt::format("capacity {}", capacity));
  if (resources_[r.index()].capacity == capacity) return;
  resources_[r.index()].capacity = capacity;
  mark(r.value);
}

ActivityId Sharing::start(std::span<const Demand> demands, double weight, double cap) {
  PARTITA_ASSERT(weight > 0 && cap > 0 && (cap < kUnbound || !demands.empty()),
                 fmt::format("weight {}, cap {}, {} demands", weight, cap, demands.size()));
  if (unused_.empty()) {
    unused_.push_back(static_cast<std::int32_t>(activities_.size()));
    activities_.emplace_back();
  }
  const std::int32_t id = unused_.back();
  unused_.pop_back();
  Activity& a = activities_[static_cast<std::size_t>(id)];
  a.weight = weight;
  a.cap = cap;
  a.limit = cap / weight;
  a.before = -1;
  a.live = true;
  a.uses.resize(demands.size());
  for (std::size_t u = 0; u < demands.size(); ++u) {
    const Demand& d = demands[u];
    PARTITA_ASSERT(d.amount > 0 && d.count > 0,
                   fmt::format("amount {}, count {}", d.amount, d.count));
    auto& entries = resources_[d.resource.index()].entries;
    a.uses[u] = {d.resource.value, static_cast<std::int32_t>(entries.size()), d.amount * weight,
                 d.count};
    entries.push_back({id, static_cast<std::int32_t>(u), d.amount * weight, d.count});
    mark(d.resource.value);
  }
  // Its level is what its resources say now; they are evaluated with it in solve().
  find_limits(a);
  for (const Use& u : a.uses) take(resources_[static_cast<std::size_t>(u.resource)], u, 0, a.level);
  if (!a.touched) {
    a.touched = true;
    touched_.push_back(id);
  }
  return ActivityId{static_cast<std::size_t>(id)};
}

void Sharing::stop(ActivityId activity) {
  Activity& a = activities_[activity.index()];
  PARTITA_ASSERT(a.live, fmt::format("activity {} does not run", activity.value));
  for (const Use& u : a.uses) {
    Resource& r = resources_[static_cast<std::size_t>(u.resource)];
    const Entry moved = r.entries.back();
    r.entries[static_cast<std::size_t>(u.at)] = moved;
    activities_[static_cast<std::size_t>(moved.activity)]
        .uses[static_cast<std::size_t>(moved.use)]
        .at = u.at;
    r.entries.pop_back();
    take(r, u, a.level, 0);
    mark(u.resource);
  }
  a.uses.clear();
  a.live = false;
  unused_.push_back(activity.value);
}

void Sharing::set_cap(ActivityId activity, double cap) {
  Activity& a = activities_[activity.index()];
  PARTITA_ASSERT(a.live && cap > 0, fmt::format("activity {}, cap {}", activity.value, cap));
  a.cap = cap;
  a.limit = cap / a.weight;
  refresh(activity.value, -1);
  for (const Use& u : a.uses) mark(u.resource);
}

void Sharing::mark(std::int32_t resource) {
  Resource& r = resources_[static_cast<std::size_t>(resource)];
  if (r.dirty) return;
  r.dirty = true;
  dirty_.push_back(resource);
}

void Sharing::take(Resource& r, const Use& use, double was, double now) {
  const double change = (now - was) * (use.value * static_cast<double>(use.count));
  r.taken += change;
  // What is far more than there is would leave nothing of the rest but rounding.
  r.taken_known = r.taken_known && std::abs(change) < 1e3 * r.capacity;
}

void Sharing::find_limits(Activity& a) const {
  a.level = a.second = a.limit;
  a.lowest = -1;
  for (const Use& u : a.uses) {
    const double level = resources_[static_cast<std::size_t>(u.resource)].level;
    if (u.resource == a.lowest) continue;
    if (level < a.level) {
      a.second = a.level;
      a.level = level;
      a.lowest = u.resource;
    } else {
      a.second = std::min(a.second, level);
    }
  }
}

double Sharing::evaluate(std::int32_t resource) {
  ++evaluations_;
  Resource& r = resources_[static_cast<std::size_t>(resource)];
  if (r.entries.empty()) {
    r.taken = 0, r.taken_known = true;
    return kUnbound;
  }
  // Far from binding, whatever rounding has added up to.
  if (r.level == kUnbound && r.taken_known && r.taken < r.capacity * (1 - 1e-6)) return kUnbound;
  if (r.entries.size() == 1) {
    const Activity& a = activities_[static_cast<std::size_t>(r.entries[0].activity)];
    const Use& u = a.uses[static_cast<std::size_t>(r.entries[0].use)];
    const double amount = u.value * static_cast<double>(u.count), level = r.capacity / amount;
    const double limit = limit_elsewhere(a, resource);
    if (level <= limit) return level;
    r.taken = limit * amount, r.taken_known = true;
    return kUnbound;
  }
  terms_.clear();
  double wanted = 0, whole = 0;
  bool alike = true;
  std::int64_t count = 0;
  for (const Entry& e : r.entries) {
    const double limit =
        limit_elsewhere(activities_[static_cast<std::size_t>(e.activity)], resource);
    const double amount = e.value * static_cast<double>(e.count);
    terms_.push_back({limit, e.value, e.count});
    wanted += limit * amount, whole += amount;
    alike = alike && e.value == terms_[0].value;
    count += e.count;
  }
  r.taken = wanted, r.taken_known = wanted < 1e3 * r.capacity;
  if (wanted < r.capacity * (1 - 1e-9)) return kUnbound;  // far from binding
  // Nearly the level, from below: who is limited below it leaves more to the others.
  double about = r.capacity / whole;
  for (;;) {
    double left = r.capacity, rest = 0;
    for (const Term& t : terms_) {
      const double amount = t.value * static_cast<double>(t.count);
      t.limit < about ? left -= t.limit* amount : rest += amount;
    }
    if (!(rest > 0)) break;
    const double next = left / rest;
    if (!(next > about)) break;
    about = next;
  }
  // Those below it, in order, and who is so near that rounding decides; others need no order.
  const auto first_above = std::partition(
      terms_.begin(), terms_.end(), [&](const Term& t) { return t.limit <= about * (1 + 1e-9); });
  std::sort(terms_.begin(), first_above, [](const Term& x, const Term& y) {
    return x.limit != y.limit ? x.limit < y.limit : x.value < y.value;
  });
  const auto below = static_cast<std::size_t>(first_above - terms_.begin());
  // What the terms from k on take per level, exact before it is rounded once: sums must not depend
  // on the order that limits give.
  Exact sum = 0;
  if (!alike) {
    for (const Term& t : terms_) sum += static_cast<Exact>(t.value * kExact) * t.count;
  }
  double taken = 0;
  for (std::size_t k = 0; k < below;) {
    const double rest =
        alike ? terms_[0].value * static_cast<double>(count) : static_cast<double>(sum) / kExact;
    const double level = std::max(0.0, r.capacity - taken) / rest;
    const Term& t = terms_[k];
    if (level <= t.limit) return level;
    // Equal ones are one with the sum of their counts: the same bits however they were folded.
    std::int64_t n = 0;
    for (; k < below && terms_[k].limit == t.limit && terms_[k].value == t.value; ++k)
      n += terms_[k].count;
    taken += t.limit * (t.value * static_cast<double>(n));
    count -= n;
    if (!alike) sum -= static_cast<Exact>(t.value * kExact) * n;
  }
  if (below == terms_.size()) return kUnbound;
  const double rest =
      alike ? terms_.back().value * static_cast<double>(count) : static_cast<double>(sum) / kExact;
  return std::max(0.0, r.capacity - taken) / rest;
}

/// Takes the activity's level from its resources; where it changed, they are evaluated again, but
/// for the one that caused it.
void Sharing::refresh(std::int32_t activity, std::int32_t except) {
  Activity& a = activities_[static_cast<std::size_t>(activity)];
  const double was = a.level;
  find_limits(a);
  if (a.level == was) return;
  if (!a.touched) {
    a.touched = true;
    a.before = was;
    touched_.push_back(activity);
  }
  for (const Use& u : a.uses) {
    if (u.resource == except) continue;
    take(resources_[static_cast<std::size_t>(u.resource)], u, was, a.level);
    mark(u.resource);
  }
}

const std::vector<ActivityId>& Sharing::solve() {
  // A level once right is left alone: the smallest binding level of a component is right after one
  // evaluation, then the next. The bound is for rounding that would chase its own tail.
  const std::int64_t bound = evaluations_ + 64 * static_cast<std::int64_t>(dirty_.size() + 16) +
                             16 * static_cast<std::int64_t>(resources_.size());
  for (std::size_t k = 0; k < dirty_.size(); ++k) {
    if (from_scratch_ || evaluations_ > bound) {
      solve_component();
      break;
    }
    const std::int32_t id = dirty_[k];
    Resource& r = resources_[static_cast<std::size_t>(id)];
    r.dirty = false;
    const double level = evaluate(id);
    if (level == r.level) continue;
    r.level = level;
    for (const Entry& e : r.entries) refresh(e.activity, id);
  }
  dirty_.clear();
  changed_.clear();
  for (const std::int32_t id : touched_) {
    Activity& a = activities_[static_cast<std::size_t>(id)];
    a.touched = false;
    if (a.live && a.level != a.before) changed_.emplace_back(static_cast<std::size_t>(id));
  }
  touched_.clear();
  return changed_;
}

/// From scratch: every resource that is dirty or reached from one that is, lowest level first.
void Sharing::solve_component() {
  std::vector<std::int32_t> all;
  std::vector<char> in(resources_.size(), 0);
  for (const std::int32_t r : dirty_) {
    if (resources_[static_cast<std::size_t>(r)].dirty && !in[static_cast<std::size_t>(r)])
      in[static_cast<std::size_t>(r)] = 1, all.push_back(r);
  }
  for (std::size_t k = 0; k < all.size(); ++k) {
    for (const Entry& e : resources_[static_cast<std::size_t>(all[k])].entries) {
      Activity& a = activities_[static_cast<std::size_t>(e.activity)];
      if (!a.touched) {
        a.touched = true;
        a.before = a.level;
        touched_.push_back(e.activity);
      }
      for (const Use& u : activities_[static_cast<std::size_t>(e.activity)].uses) {
        if (!in[static_cast<std::size_t>(u.resource)])
          in[static_cast<std::size_t>(u.resource)] = 1, all.push_back(u.resource);
      }
    }
  }
  for (const std::int32_t r : all) {
    resources_[static_cast<std::size_t>(r)].dirty = false;
    resources_[static_cast<std::size_t>(r)].level = kUnbound;
    resources_[static_cast<std::size_t>(r)].taken_known = false;
  }
  const auto limits = [&](std::int32_t r) {
    for (const Entry& e : resources_[static_cast<std::size_t>(r)].entries)
      find_limits(activities_[static_cast<std::size_t>(e.activity)]);
  };
  for (const std::int32_t r : all) limits(r);
  std::vector<char> settled(resources_.size(), 0);
  for (std::size_t done = 0; done < all.size(); ++done) {
    double least = kUnbound;
    std::int32_t at = -1;
    for (const std::int32_t r : all) {
      if (settled[static_cast<std::size_t>(r)]) continue;
      const double level = evaluate(r);
      if (at < 0 || level < least) least = level, at = r;
    }
    PARTITA_ASSERT(at >= 0, "every resource is settled");
    settled[static_cast<std::size_t>(at)] = 1;
    resources_[static_cast<std::size_t>(at)].level = least;
    if (least == kUnbound) break;  // what is left has room for all
    limits(at);
  }
}

double Sharing::rate(ActivityId id) const {
  const Activity& a = activities_[id.index()];
  return a.level == a.limit ? a.cap : a.weight * a.level;  // a cap is reached, not nearly
}

ResourceId Sharing::bottleneck(ActivityId id) const {
  const Activity& a = activities_[id.index()];
  if (a.level == a.limit) return {};
  for (const Use& u : a.uses) {
    if (resources_[static_cast<std::size_t>(u.resource)].level == a.level)
      return ResourceId{static_cast<std::size_t>(u.resource)};
  }
  return {};
}

double Sharing::used(ResourceId id) const {
  double sum = 0;
  for (const Entry& e : resources_[id.index()].entries) {
    const Activity& a = activities_[static_cast<std::size_t>(e.activity)];
    const Use& u = a.uses[static_cast<std::size_t>(e.use)];
    sum += u.value * static_cast<double>(u.count) * a.level;
  }
  return sum;
}

}  // namespace partita
