// simulator/engine/sharing.h: rates of what runs at once on shared resources.
//
// Weighted max-min fairness (docs/sharing.md):
//
//     x_i = w_i min(u_i / w_i, min_r L_r)        rate of activity i: cap u, levels L of its
//     resources sum_i n_i a_ir w_i min(m_i, L_r) = C_r     level of resource r: m_i what limits i
//     elsewhere
//
// Example: links A of 10 and B of 4 GB/s; flow 1 on A, 2 on A and B, 3 on B. L_B = 2, L_A = 8: the
// rates are 8, 2, 2.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "base/ids.h"

namespace partita {

using ResourceId = Id<struct ResourceTag>;
using ActivityId = Id<struct ActivityTag>;

/// What one unit of an activity's work takes of a resource. An activity may name a resource twice:
/// both count.
struct Demand {
  ResourceId resource;
  double amount = 1;       ///< > 0: resource units per unit of work
  std::int64_t count = 1;  ///< >= 1: equal activities that this one stands for on the resource
};

/// The solver. Not thread-safe. Levels depend on what runs, not on the order in which it came, up
/// to the last bit; equal activities may be joined into one with a count without changing a bit.
class Sharing {
 public:
  static constexpr double kUnbound = std::numeric_limits<double>::infinity();

  /// `from_scratch`: solve whole components, lowest level first, instead of what changed; for
  /// tests.
  explicit Sharing(bool from_scratch = false) : from_scratch_(from_scratch) {}

  /// Capacity >= 0 in its own unit per second; 0: a failed link, whatever needs it stands still.
  ResourceId add(double capacity);
  void set_capacity(ResourceId resource, double capacity);

  /// weight > 0, cap > 0 (kUnbound: none, then at least one demand). Its rate is known after
  /// solve(). Ids of stopped activities are used again.
  ActivityId start(std::span<const Demand> demands, double weight = 1, double cap = kUnbound);
  void stop(ActivityId activity);
  void set_cap(ActivityId activity, double cap);

  /// Rates after all changes since the last call; those that changed, new ones included, in no
  /// particular order. Valid until the next call.
  const std::vector<ActivityId>& solve();

  double rate(ActivityId a) const;
  /// What binds it; invalid: its own cap. Of several the first demand's.
  ResourceId bottleneck(ActivityId a) const;
  /// kUnbound where the resource has room left.
  double level(ResourceId r) const { return resources_[r.index()].level; }
  double capacity(ResourceId r) const { return resources_[r.index()].capacity; }
  double used(ResourceId r) const;
  bool in_use(ResourceId r) const { return !resources_[r.index()].entries.empty(); }
  std::size_t resource_count() const { return resources_.size(); }
  /// Evaluations of a resource's equation so far: the work done, for benchmarks.
  std::int64_t evaluations() const { return evaluations_; }

 private:
  struct Use {
    std::int32_t resource = 0;
    std::int32_t at = 0;  ///< where in the resource's list
    double value = 0;     ///< amount * weight
    std::int64_t count = 1;
  };
  struct Activity {
    double weight = 1, cap = kUnbound, limit = kUnbound, before = -1;
    double level = 0, second = 0;  ///< lowest limit; lowest but for what resource `lowest` says
    std::int32_t lowest = -1;
    std::vector<Use> uses;
    bool live = false, touched = false;
  };
  struct Entry {
    std::int32_t activity = 0, use = 0;
    double value = 0;  ///< of the use, as its count
    std::int64_t count = 1;
  };
  struct Resource {
    double capacity = 0, level = kUnbound;
    /// Of one that does not bind: nearly the sum of what its activities take; known until it binds.
    double taken = 0;
    bool taken_known = true;
    std::vector<Entry> entries;
    bool dirty = false;
  };
  struct Term {
    double limit, value;
    std::int64_t count;
  };

  void mark(std::int32_t resource);
  /// An activity on it has another level now.
  void take(Resource& r, const Use& use, double was, double now);
  static double limit_elsewhere(const Activity& a, std::int32_t resource) {
    return resource == a.lowest ? a.second : a.level;
  }
  void find_limits(Activity& a) const;
  double evaluate(std::int32_t resource);
  void refresh(std::int32_t activity, std::int32_t except);
  void solve_component();

  std::vector<Resource> resources_;
  std::vector<Activity> activities_;
  std::vector<std::int32_t> unused_, touched_, dirty_;
  std::vector<ActivityId> changed_;
  std::vector<Term> terms_;
  std::int64_t evaluations_ = 0;
  bool from_scratch_ = false;
};

}  // namespace partita
