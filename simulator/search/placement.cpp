#include "simulator/search/placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "base/unit_text.h"

namespace partita {
namespace {

/// Device of every rank of a complete plan.
std::vector<std::int32_t> devices_of(const Plan& plan) {
  if (!plan.devices.empty()) return plan.devices;
  if (!plan.placement.empty()) return placement(plan.mesh, plan.placement, "placement");
  std::vector<std::int32_t> all(static_cast<std::size_t>(plan.ranks()));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

/// Where ranks lie, and how rings go: by ring of the StepLoad.
struct Mapping {
  std::vector<std::int32_t> device;
  std::vector<std::int64_t> strides;
};

/// Weighs mappings, each from what it has, until nothing weighs less or the limit is reached.
class Weigher {
 public:
  Weigher(StepLoad& load, const Plan& plan, const Topology& topology, const PlacementLimits& limits)
      : load_(load), plan_(plan), topology_(topology), limits_(limits) {}

  bool stopped() const { return stopped_; }
  Mapping now() const { return {load_.device(), load_.strides()}; }

  /// One axis in two parts, the outer one anywhere further out or in; `order` is what it has now.
  void part_axes(const std::vector<std::string>& order) {
    std::vector<std::vector<std::string>> all;
    for (std::size_t a = 0; a < order.size(); ++a) {
      const std::int64_t n = plan_.mesh.size(axis_atoms(plan_.mesh, order[a]));
      for (std::int64_t inner = 2; inner < n; ++inner) {
        if (n % inner != 0) continue;
        std::vector<std::string> others = order;
        others.erase(others.begin() + static_cast<std::ptrdiff_t>(a));
        const std::string sized = fmt::format("{}={}", order[a], inner);
        for (std::size_t i = 0; i <= others.size(); ++i) {
          for (std::size_t o = i + 1; o <= others.size(); ++o) {
            auto parts = others;
            parts.insert(parts.begin() + static_cast<std::ptrdiff_t>(o), order[a]);
            parts.insert(parts.begin() + static_cast<std::ptrdiff_t>(i), sized);
            all.push_back(std::move(parts));
          }
        }
      }
    }
    const Mapping start = now();
    Mapping best = start;
    StepLoad::Value least = load_.value();
    for (const auto& parts : all) {
      if (!may_go_on()) break;
      const Mapping m{placement(plan_.mesh, parts, "placement"), start.strides};
      if (weigh_whole(m).better_than(least)) least = load_.value(), best = m, parts_ = parts;
    }
    load_.set(best.device, best.strides);
  }
  /// What part_axes() chose; empty: the order it had.
  const std::vector<std::string>& parts() const { return parts_; }
  /// Of the orders of nodes, those that weigh little more than the one chosen.
  const std::vector<Mapping>& next_best() const { return next_best_; }

  /// Coordinates along one axis times a stride, or shifted by those along another.
  void stride_axes(const std::vector<std::string>& order) {
    constexpr std::int64_t kMost = 16;
    for (const std::string& axis : order) {
      const AtomList atoms = list_of(axis);
      const std::int64_t n = plan_.mesh.size(atoms);
      for (std::int64_t s = 2; s < std::min(n, kMost); ++s) {
        if (std::gcd(s, n) == 1) moved_along(atoms, s, {}, 0);
      }
      for (const std::string& by : order) {
        if (by == axis) continue;
        for (std::int64_t k = 1; k < std::min(n, kMost); ++k) moved_along(atoms, 1, list_of(by), k);
      }
    }
  }

  /// Strides of rings: the same for all of an axis, all in turn, then ring by ring.
  void stride_rings() {
    constexpr std::size_t kMost = 8;
    for (const auto& [axis, rings] : load_.ring_axes()) {
      std::vector<std::int64_t> possible;
      for (std::int64_t s = 1; s < rings.size && possible.size() < kMost; ++s) {
        if (std::gcd(s, rings.size) == 1) possible.push_back(s);
      }
      std::vector<std::vector<std::int64_t>> lists{possible};
      for (const std::int64_t s : possible) lists.push_back({s});
      for (const auto& list : lists) {
        StepLoad::Change change;
        for (std::size_t g = 0; g < rings.rings.size(); ++g) {
          if (rings.rings[g] >= 0)
            change.strides.emplace_back(rings.rings[g], list[g % list.size()]);
        }
        if (!try_out(change)) return;
      }
      for (bool better = true; better;) {
        better = false;
        for (const std::int32_t ring : rings.rings) {
          for (const std::int64_t s : possible) {
            bool kept = false;
            if (ring >= 0 && !try_out({{}, {{ring, s}}}, &kept)) return;
            better = better || kept;
          }
        }
      }
    }
  }

  /// Blocks of devices that change places, large ones first; of single devices in a large cluster
  /// only with those that are odd or have no rank.
  void swap_blocks() {
    const auto devices = static_cast<std::int64_t>(topology_.rank_count());
    if (orders_of_nodes()) {
      swap_blocks_of(1, devices);
      return;
    }
    std::set<std::int64_t, std::greater<>> sizes{1};
    std::int64_t domain = 0, unit = 0;  // of the first node
    for (std::size_t n = 0; n < topology_.node_count(); ++n) {
      const auto here = static_cast<std::int64_t>(topology_.rank_count(n));
      domain += topology_.domain_of(n) == topology_.domain_of(0) ? here : 0;
      unit += topology_.unit_of(n) == topology_.unit_of(0) ? here : 0;
    }
    sizes.insert({static_cast<std::int64_t>(topology_.rank_count(0)), domain, unit});
    std::int64_t inside = 1;
    for (std::size_t a = plan_.mesh.atoms.size(); a-- > 0;)
      sizes.insert(inside *= plan_.mesh.atoms[a].size);
    for (const std::int64_t size : sizes) {
      if (!swap_blocks_of(size, devices)) return;
    }
  }

 private:
  bool may_go_on() {
    stopped_ = stopped_ || load_.routes() >= limits_.routes;
    return !stopped_ && !load_.at_its_best();
  }
  /// Keeps the change if it weighs less. false: the limit is reached.
  bool try_out(const StepLoad::Change& change, bool* kept = nullptr) {
    if (!may_go_on()) return false;
    const bool better = load_.propose(change).better_than(load_.value());
    better ? load_.keep() : load_.take_back();
    if (kept != nullptr) *kept = better;
    return true;
  }
  StepLoad::Value weigh_whole(const Mapping& m) {
    load_.set(m.device, m.strides);
    return load_.value();
  }
  AtomList list_of(const std::string& axis) const {
    const AtomMask mask = axis_atoms(plan_.mesh, axis);
    AtomList list;
    for (std::size_t a = 0; a < plan_.mesh.atoms.size(); ++a) {
      if (has(mask, static_cast<AtomId>(a))) list.push_back(static_cast<AtomId>(a));
    }
    return list;
  }
  void moved_along(const AtomList& axis, std::int64_t stride, const AtomList& by, std::int64_t k) {
    const Mesh& mesh = plan_.mesh;
    const std::int64_t n = mesh.size(axis);
    const auto device = load_.device();
    StepLoad::Change change;
    for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
      const std::int64_t shift = by.empty() ? 0 : k * mesh.coordinate(r, by);
      std::int64_t c = (mesh.coordinate(r, axis) * stride + shift) % n;
      std::int64_t from = mesh.group_root(r, mask_of(axis));
      for (std::size_t i = axis.size(); i-- > 0;) {
        from += c % mesh.atoms[axis[i]].size * mesh.stride(axis[i]);
        c /= mesh.atoms[axis[i]].size;
      }
      if (device[static_cast<std::size_t>(from)] != device[static_cast<std::size_t>(r)])
        change.moves.emplace_back(r, device[static_cast<std::size_t>(from)]);
    }
    try_out(change);
  }

  std::vector<std::int64_t> ranks_on_devices() const {
    std::vector<std::int64_t> rank_on(topology_.rank_count(), -1);
    for (std::size_t r = 0; r < load_.device().size(); ++r)
      rank_on[static_cast<std::size_t>(load_.device()[r])] = static_cast<std::int64_t>(r);
    return rank_on;
  }

  /// Every order of a few equal nodes; false: they are not.
  bool orders_of_nodes() {
    const std::size_t nodes = topology_.node_count();
    if (nodes > limits_.all_orders_of) return false;
    for (std::size_t n = 1; n < nodes; ++n) {
      if (topology_.rank_count(n) != topology_.rank_count(0)) return false;
    }
    const auto per_node = static_cast<std::int32_t>(topology_.rank_count(0));
    const Mapping start = now();
    std::vector<std::int32_t> order(nodes);
    std::iota(order.begin(), order.end(), 0);
    Mapping next = start;
    std::vector<std::pair<StepLoad::Value, Mapping>> lightest{{load_.value(), start}};
    while (std::next_permutation(order.begin(), order.end()) && may_go_on()) {
      for (std::size_t r = 0; r < next.device.size(); ++r)
        next.device[r] = order[static_cast<std::size_t>(start.device[r] / per_node)] * per_node +
                         start.device[r] % per_node;
      const StepLoad::Value v = weigh_whole(next);
      // Of orders that weigh the same, mirror images mostly, the first.
      std::size_t at = 0;
      while (at < lightest.size() && lightest[at].first.better_than(v)) ++at;
      if (at == lightest.size() || v.better_than(lightest[at].first))
        lightest.insert(lightest.begin() + static_cast<std::ptrdiff_t>(at), {v, next});
      if (lightest.size() > limits_.few) lightest.pop_back();
    }
    const Mapping best = lightest[0].second;
    for (std::size_t k = 1; k < lightest.size(); ++k)
      if (lightest[k].second.device != start.device) next_best_.push_back(lightest[k].second);
    load_.set(best.device, best.strides);
    return true;
  }

  /// false: the limit is reached.
  bool swap_blocks_of(std::int64_t size, std::int64_t devices) {
    constexpr std::int64_t kAllPairs = 64;
    const std::int64_t blocks = devices / size;
    std::vector<std::int64_t> rank_on = ranks_on_devices();
    std::vector<char> some(static_cast<std::size_t>(blocks), blocks <= kAllPairs);
    for (std::int64_t d = 0; d < blocks * size; ++d) {
      if (load_.odd(static_cast<std::int32_t>(d)) || rank_on[static_cast<std::size_t>(d)] < 0)
        some[static_cast<std::size_t>(d / size)] = 1;
    }
    for (bool better = true; better;) {
      better = false;
      for (std::int64_t i = 0; i < blocks; ++i) {
        for (std::int64_t j = 0; j < blocks && some[static_cast<std::size_t>(i)]; ++j) {
          if (j == i || (j < i && some[static_cast<std::size_t>(j)])) continue;
          StepLoad::Change change;
          for (std::int64_t d = 0; d < size; ++d) {
            for (const auto& [from, to] :
                 {std::pair{i * size + d, j * size + d}, {j * size + d, i * size + d}}) {
              const std::int64_t rank = rank_on[static_cast<std::size_t>(from)];
              if (rank >= 0) change.moves.emplace_back(rank, static_cast<std::int32_t>(to));
            }
          }
          bool kept = false;
          if (!change.moves.empty() && !try_out(change, &kept)) return false;
          if (!kept) continue;
          better = true;
          for (std::int64_t d = 0; d < size; ++d)
            std::swap(rank_on[static_cast<std::size_t>(i * size + d)],
                      rank_on[static_cast<std::size_t>(j * size + d)]);
        }
      }
    }
    return true;
  }

  StepLoad& load_;
  const Plan& plan_;
  const Topology& topology_;
  const PlacementLimits& limits_;
  std::vector<std::string> parts_;
  std::vector<Mapping> next_best_;
  bool stopped_ = false;
};

/// Strides as a plan writes them: by axis, as few as repeat; none where all are 1.
RingStrides rings_of(const StepLoad& load, const std::vector<std::int64_t>& strides) {
  RingStrides all;
  for (const auto& [axis, rings] : load.ring_axes()) {
    std::vector<std::int64_t> list;
    for (const std::int32_t ring : rings.rings)
      list.push_back(ring < 0 ? 1 : strides[static_cast<std::size_t>(ring)]);
    if (std::all_of(list.begin(), list.end(), [](std::int64_t s) { return s == 1; })) continue;
    std::size_t period = 1;
    while (
        list.size() % period != 0 ||
        !std::equal(list.begin() + static_cast<std::ptrdiff_t>(period), list.end(), list.begin()))
      ++period;
    list.resize(period);
    all[axis] = std::move(list);
  }
  return all;
}

/// Strides of all rings that the plan gives.
std::vector<std::int64_t> strides_of(const StepLoad& load, const RingStrides& rings) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(load.ring_count()), 1);
  for (const auto& [axis, of_axis] : load.ring_axes()) {
    const auto it = rings.find(axis);
    if (it == rings.end()) continue;
    for (std::size_t g = 0; g < of_axis.rings.size(); ++g) {
      if (of_axis.rings[g] >= 0)
        all[static_cast<std::size_t>(of_axis.rings[g])] = it->second[g % it->second.size()];
    }
  }
  return all;
}

}  // namespace

void place_as(Plan& plan, const Plan& other) {
  plan.placement = other.placement, plan.devices = other.devices, plan.rings = other.rings;
}

std::string beyond(const Topology& topology, const Plan& plan) {
  for (std::size_t r = 0; r < plan.devices.size(); ++r) {
    if (static_cast<std::size_t>(plan.devices[r]) >= topology.rank_count())
      return fmt::format("placement puts rank {} on device {}; {} has {}, 0 to {}", r,
                         plan.devices[r], topology.name(), topology.rank_count(),
                         topology.rank_count() - 1);
  }
  return "";
}

Topology on_devices(const Topology& topology, const Plan& plan) {
  if (plan.as_ranked()) return topology;
  ClusterState state = topology.state();
  state.placement = devices_of(plan);
  // Ranks on spare devices: those take their places.
  if (!plan.devices.empty())
    state.placement =
        with_spares(std::move(state.placement), static_cast<std::int64_t>(topology.rank_count()));
  state.ring_strides = strides_by_group(plan.mesh, plan.rings);
  return topology.in_state(std::move(state));
}

Feasible<Placements> place(const Graph& graph, const Plan& wanted, const Topology& topology,
                           const RoutingSource* routing, const PlacementLimits& limits) {
  auto plan = complete(graph, wanted);
  if (!plan) return plan.why();
  const std::vector<std::string> as_ranked = axis_order(plan->mesh);
  if (plan->devices.empty() && plan->placement.empty()) plan->placement = as_ranked;
  const Plan given = *plan;
  Placements result;
  Communication communication(topology);
  const auto simulated = [&](const Plan& p) {
    return predict(graph, p, communication, nullptr, nullptr, false, routing, Network::flows);
  };
  auto first = simulated(given);
  if (!first) return first.why();
  result.tried.push_back(std::move(*first));

  // Ranks in order, then the other orders.
  std::vector<std::vector<std::string>> orders{as_ranked};
  auto order = as_ranked;
  std::sort(order.begin(), order.end());
  do {
    if (order != as_ranked) orders.push_back(order);
  } while (std::next_permutation(order.begin(), order.end()));
  std::size_t best = 0;
  const auto try_plan = [&](Plan p) {
    auto prediction = simulated(p);
    if (!prediction) return false;
    result.tried.push_back(std::move(*prediction));
    if (!(result.tried.back().step_time < result.tried[best].step_time)) return false;
    best = result.tried.size() - 1;
    return true;
  };
  for (const auto& axes : orders) {
    if (given.devices.empty() && axes == given.placement) continue;
    Plan p = given;
    p.placement = axes, p.devices.clear();
    try_plan(std::move(p));
  }

  auto program = lower_padded(graph, given);
  if (!program) return program.why();
  if (routing != nullptr) *program = with_routing(std::move(*program), *routing);
  const auto play = [&](const Plan& p) {
    Communication placed(on_devices(topology, p));
    return simulate(*program, placed, {Network::flows});
  };
  const Timeline played = play(given);
  StepLoad load(*program, topology, given.precision.compute, played, devices_of(given));
  const auto set = [&](const Plan& p) { load.set(devices_of(p), strides_of(load, p.rings)); };
  set(given);
  result.before = load.busiest();
  set(result.tried[best].plan);
  // Of a cluster where one look at all routes costs much of what may be spent, none is weighed.
  constexpr std::int64_t kLooks = 16;
  if (load.routes_of_all() * kLooks > limits.routes) {
    result.left_out =
        fmt::format("only orders of axes: weighing a mapping takes {} routes, and {} are allowed",
                    grouped(load.routes_of_all()), grouped(limits.routes));
  } else {
    Weigher weigher(load, given, topology, limits);
    std::int64_t too_many = 0;
    // Simulates what weighs less, and goes back to what was faster.
    const auto settle = [&](bool in_parts) {
      const Mapping m = weigher.now();
      Plan p = result.tried[best].plan;
      const bool same = m.device == devices_of(p) && m.strides == strides_of(load, p.rings);
      if (same) return;
      p.rings = rings_of(load, m.strides);
      if (m.device != devices_of(p)) {
        p.devices = m.device, p.placement.clear();
        if (in_parts && !weigher.parts().empty() &&
            placement(p.mesh, weigher.parts(), "placement") == m.device)
          p.placement = weigher.parts(), p.devices.clear();
      }
      Communication placed(on_devices(topology, p));
      const auto classes = share_links(*program, placed).ranks.classes.size();
      const std::int64_t instructions = played.instructions /
                                        static_cast<std::int64_t>(played.classes.size()) *
                                        static_cast<std::int64_t>(classes);
      if (instructions > std::max(limits.instructions, 2 * played.instructions)) {
        ++too_many;
        set(result.tried[best].plan);
      } else if (!try_plan(std::move(p))) {
        set(result.tried[best].plan);
      }
    };
    // No rank moves for a ring.
    weigher.stride_rings();
    settle(false);
    const Plan start = result.tried[best].plan;
    const bool whole =
        start.devices.empty() &&
        std::none_of(start.placement.begin(), start.placement.end(),
                     [](const std::string& word) { return word.find('=') != std::string::npos; });
    if (whole) {
      weigher.part_axes(start.placement);
      settle(true);
    }
    weigher.stride_axes(as_ranked);
    settle(false);
    weigher.swap_blocks();
    settle(false);
    for (const Mapping& m : weigher.next_best()) {
      load.set(m.device, m.strides);
      settle(false);
    }
    weigher.stride_rings();
    settle(false);
    if (weigher.stopped())
      result.left_out = fmt::format("stopped after {} routes", grouped(limits.routes));
    if (too_many > 0)
      result.left_out +=
          fmt::format("{}{} mapping{} under which too many ranks differ to simulate",
                      result.left_out.empty() ? "" : "; ", too_many, too_many == 1 ? "" : "s");
  }
  result.after = load.busiest();
  result.weighed = load.mappings();
  std::vector<std::size_t> by_time(result.tried.size());
  std::iota(by_time.begin(), by_time.end(), 0);
  std::stable_sort(by_time.begin(), by_time.end(), [&](std::size_t a, std::size_t b) {
    return result.tried[a].step_time < result.tried[b].step_time;
  });
  std::vector<Prediction> sorted;
  for (std::size_t k = 0; k < by_time.size(); ++k) {
    if (by_time[k] == 0) result.by_default = k;
    sorted.push_back(std::move(result.tried[by_time[k]]));
  }
  result.tried = std::move(sorted);
  return result;
}

void place_all(SearchResult& result, const Graph& graph, const Topology& topology) {
  for (Prediction& p : result.plans) {
    if (auto all = place(graph, p.plan, topology)) p = std::move(all->tried.front());
  }
  std::stable_sort(
      result.plans.begin(), result.plans.end(),
      [](const Prediction& a, const Prediction& b) { return a.step_time < b.step_time; });
}

}  // namespace partita
