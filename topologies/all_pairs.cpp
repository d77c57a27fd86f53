// What all pairs of many devices load: nodes whose devices are alike are counted together.
#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <unordered_map>

#include "topologies/impl.h"

namespace partita {

namespace {

/// More kinds of nodes than these and pair by pair is no slower.
constexpr std::size_t kMostKinds = 32;

/// How a node lies to another.
enum Relation : std::size_t { same_unit_and_domain, same_unit, same_domain, apart, kRelations };

/// Nodes whose named devices are the same and that route alike.
struct Kind {
  std::size_t group = 0;
  std::vector<std::size_t> locals;  ///< of its devices
  std::size_t by_itself = kNone;    ///< the node, if a failed link makes it one of its own
  friend auto operator<=>(const Kind&, const Kind&) = default;
};

/// Routes from every device of one node to every device of another: how many cross each of their
/// own links, and each uplink by its leaf's place in a unit.
struct Between {
  bool known = false;
  std::vector<std::int64_t> out, in, up, down;
};

class Counter {
 public:
  Counter(const Topology& topology, const Topology::Impl& impl, const SwitchTree& tree)
      : topology_(topology), impl_(impl), tree_(tree) {}

  /// False where there are too many kinds.
  bool place(const std::vector<DeviceId>& devices, const std::set<std::size_t>& by_itself) {
    std::map<std::size_t, std::vector<DeviceId>> by_node;
    for (const DeviceId d : devices) by_node[topology_.node_of(d)].push_back(d);
    std::map<Kind, std::size_t> kinds;
    for (auto& [node, own] : by_node) {
      const auto n = impl_.node_at(node);
      Kind kind{static_cast<std::size_t>(n.group - impl_.groups.data()), {}, kNone};
      for (const DeviceId d : own) kind.locals.push_back(topology_.local_index(d));
      std::sort(kind.locals.begin(), kind.locals.end());
      if (by_itself.count(node) > 0) kind.by_itself = node;
      const std::size_t k = kinds.try_emplace(kind, kinds.size()).first->second;
      if (kinds.size() > kMostKinds) return false;
      nodes_.push_back(
          {node, k, topology_.unit_of(node), topology_.domain_of(node), std::move(own)});
    }
    kinds_ = kinds.size();
    for (std::size_t k = 0; k < nodes_.size(); ++k) {
      const Node& n = nodes_[k];
      ++all_[n.kind];
      ++unit_[{n.kind, n.unit}];
      ++domain_[{n.kind, n.domain}];
      ++both_[{n.kind, n.unit, n.domain}];
    }
    between_.resize(kinds_ * kinds_ * kRelations);
    inside_.resize(kinds_);
    return true;
  }

  Topology::PairLoads count() {
    Topology::PairLoads loads;
    std::map<std::size_t, std::int64_t> fabric;
    std::vector<std::int64_t> own;
    for (const Node& n : nodes_) {
      const auto at = impl_.node_at(n.index);
      own.assign(at.node().links().size(), 0);
      const auto add = [&](const std::vector<std::int64_t>& more, std::int64_t times) {
        for (std::size_t l = 0; l < more.size(); ++l) own[l] += times * more[l];
      };
      const auto climb = [&](const std::vector<std::int64_t>& leaves, bool up, std::int64_t times) {
        for (std::size_t p = 0; p < leaves.size(); ++p)
          fabric[2 * (n.unit * tree_.leaves_per_unit + p) + (up ? 0 : 1)] += times * leaves[p];
      };
      const Between& here = inside(n);
      add(here.out, 1);
      climb(here.up, true, 1);
      climb(here.down, false, 1);
      for (std::size_t other = 0; other < kinds_; ++other) {
        for (std::size_t r = 0; r < kRelations; ++r) {
          const std::int64_t times = others(n, other, static_cast<Relation>(r));
          if (times == 0) continue;
          const Between& there = between(n, other, static_cast<Relation>(r), false);
          add(there.out, times);
          climb(there.up, true, times);
          const Between& back = between(n, other, static_cast<Relation>(r), true);
          add(back.in, times);
          climb(back.down, false, times);
        }
      }
      for (std::size_t l = 0; l < own.size(); ++l) {
        if (own[l] > 0) loads.links.emplace_back(at.first_link() + l, own[l]);
      }
    }
    for (const auto& [l, n] : fabric) {
      if (n > 0) loads.links.emplace_back(impl_.node_links + l, n);
    }
    loads.latency = Seconds{latency_};
    return loads;
  }

 private:
  struct Node {
    std::size_t index, kind, unit, domain;
    std::vector<DeviceId> devices;
  };

  static Relation relation(const Node& a, const Node& b) {
    if (a.domain == b.domain) return a.unit == b.unit ? same_unit_and_domain : same_domain;
    return a.unit == b.unit ? same_unit : apart;
  }

  /// Other nodes of a kind that lie so to `n`.
  std::int64_t others(const Node& n, std::size_t kind, Relation r) const {
    const auto of = [](const auto& counts, const auto& key) {
      const auto it = counts.find(key);
      return it == counts.end() ? std::int64_t{0} : it->second;
    };
    const std::int64_t both = of(both_, std::array{kind, n.unit, n.domain});
    const std::int64_t unit = of(unit_, std::array{kind, n.unit});
    const std::int64_t domain = of(domain_, std::array{kind, n.domain});
    switch (r) {
      case same_unit_and_domain:
        return both - (kind == n.kind ? 1 : 0);
      case same_unit:
        return unit - both;
      case same_domain:
        return domain - both;
      default:
        return of(all_, kind) - unit - domain + both;
    }
  }

  /// Routes between `n` and one such node, which is to be the sender or not.
  const Between& between(const Node& n, std::size_t kind, Relation r, bool sends) {
    Between& b =
        between_[((sends ? kind : n.kind) * kinds_ + (sends ? n.kind : kind)) * kRelations +
                 static_cast<std::size_t>(r)];
    if (b.known) return b;
    for (const Node& other : nodes_) {
      if (other.index == n.index || other.kind != kind || relation(n, other) != r) continue;
      walk(sends ? other : n, sends ? n : other, b);
      return b;
    }
    PARTITA_ASSERT(false, "counted a node that is not there");
  }

  const Between& inside(const Node& n) {
    Between& b = inside_[n.kind];
    if (!b.known) walk(n, n, b);
    return b;
  }

  void walk(const Node& from, const Node& to, Between& b) {
    b.known = true;
    const auto a = impl_.node_at(from.index), z = impl_.node_at(to.index);
    b.out.assign(a.node().links().size(), 0);
    b.in.assign(z.node().links().size(), 0);
    if (tree_.core) b.up.assign(tree_.leaves_per_unit, 0), b.down = b.up;
    for (const DeviceId x : from.devices) {
      for (const DeviceId y : to.devices) {
        if (x == y) continue;
        double latency = 0;
        for (const LinkId l : topology_.route(x, y)) {
          latency += topology_.link(l).latency.count;
          if (l.index() >= impl_.node_links) {
            const std::size_t own = l.index() - impl_.node_links;
            ++(own % 2 == 0 ? b.up : b.down)[own / 2 % tree_.leaves_per_unit];
          } else if (l.index() - a.first_link() < b.out.size()) {
            ++b.out[l.index() - a.first_link()];
          } else {
            ++b.in.at(l.index() - z.first_link());
          }
        }
        latency_ = std::max(latency_, latency);
      }
    }
  }

  const Topology& topology_;
  const Topology::Impl& impl_;
  const SwitchTree& tree_;
  std::vector<Node> nodes_;
  std::size_t kinds_ = 0;
  std::map<std::size_t, std::int64_t> all_;
  std::map<std::array<std::size_t, 2>, std::int64_t> unit_, domain_;
  std::map<std::array<std::size_t, 3>, std::int64_t> both_;
  std::vector<Between> between_, inside_;
  double latency_ = 0;
};

}  // namespace

Topology::PairLoads Topology::all_pairs(const std::vector<DeviceId>& devices) const {
  const SwitchTree* tree = impl_->fabric.tree();
  bool regular = tree != nullptr && !tree->routing.ecmp && state().ranks_per_device == 1;
  std::set<std::size_t> by_itself;  // nodes that a failed card sends other ways
  for (const auto& [link, speed] : state().link_speed) {
    if (speed > 0) continue;
    for (const std::int32_t end : {as_built(link).from, as_built(link).to}) {
      if (const std::size_t node = node_of_vertex(end); node < node_count()) by_itself.insert(node);
    }
    regular = regular && link.index() < impl_->node_links;
  }
  if (regular) {
    Counter counter(*this, *impl_, *tree);
    if (counter.place(devices, by_itself)) return counter.count();
  }
  std::unordered_map<std::int32_t, std::int64_t> count;
  double longest = 0;
  for (const DeviceId a : devices) {
    for (const DeviceId b : devices) {
      double latency = 0;
      for (const LinkId l : route(a, b)) {
        ++count[l.value];
        latency += link(l).latency.count;
      }
      longest = std::max(longest, latency);
    }
  }
  PairLoads loads{{}, Seconds{longest}};
  for (const auto& [l, n] : count) loads.links.emplace_back(static_cast<std::size_t>(l), n);
  std::sort(loads.links.begin(), loads.links.end());
  return loads;
}

}  // namespace partita
