#include "simulator/cost/link_flows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <unordered_map>

#include "base/error.h"
#include "simulator/program/expansion.h"

namespace partita {
namespace {

DeviceId device(std::int64_t rank) { return DeviceId{static_cast<std::size_t>(rank)}; }

/// Until a peer on the same device has it, where its ranks have it in turns.
Seconds turn_taking(const Topology& t, DeviceId a, DeviceId b) {
  const ClusterState& state = t.state();
  if (state.ranks_per_device == 1 || state.mps || a == b || !t.same_device(a, b)) return {};
  return Seconds{(state.ranks_per_device - 1) * t.device(a).time_slice.count};
}

/// Members about one switch: the links of each to it and from it.
struct Star {
  std::vector<LinkId> out, in;
  double latency = 0;  ///< from one to another
};
std::optional<Star> star_of(const Topology& t, const std::vector<std::int64_t>& members) {
  const std::size_t n = members.size();
  if (n < 2) return std::nullopt;
  Star star{std::vector<LinkId>(n), std::vector<LinkId>(n), 0};
  for (std::size_t k = 0; k < n; ++k) {
    const auto way = t.route(device(members[k]), device(members[(k + 1) % n]));
    if (way.size() != 2) return std::nullopt;
    star.out[k] = way[0], star.in[(k + 1) % n] = way[1];
    const double latency = t.link(way[0]).latency.count + t.link(way[1]).latency.count;
    if (k > 0 && latency != star.latency) return std::nullopt;
    star.latency = latency;
  }
  return star;
}
/// Counts the flows of a transfer link by link.
struct Flows {
  const Topology& topology;
  std::vector<std::pair<LinkId, std::int64_t>> crossed;
  double latency = 0;

  explicit Flows(const Topology& t) : topology(t) {}
  void add(std::int64_t from, std::int64_t to, std::int64_t flows = 1) {
    const DeviceId a = device(from), b = device(to);
    double hops = turn_taking(topology, a, b).count;
    for (const LinkId l : topology.route(a, b)) {
      crossed.emplace_back(l, flows);
      hops += topology.link(l).latency.count;
    }
    latency = std::max(latency, hops);
  }
  /// Of each of a star's members, to the switch and from it.
  void add(const Star& star, std::int64_t out, std::int64_t in) {
    for (const LinkId l : star.out) crossed.emplace_back(l, out);
    for (const LinkId l : star.in) crossed.emplace_back(l, in);
    latency = std::max(latency, star.latency);
  }
  /// From and to the switch that a member reaches a neighbour over.
  void add_to_switch(std::int64_t member, std::int64_t neighbour, std::int64_t out,
                     std::int64_t in) {
    crossed.emplace_back(topology.route(device(member), device(neighbour)).front(), out);
    crossed.emplace_back(topology.route(device(neighbour), device(member)).back(), in);
  }
  LinkFlows sorted(double share) {
    LinkFlows all{share, {}, Seconds{latency}};
    std::sort(crossed.begin(), crossed.end());
    for (const auto& [l, n] : crossed) {
      if (all.flows.empty() || all.flows.back().first != l) all.flows.emplace_back(l, 0);
      all.flows.back().second += n;
    }
    return all;
  }
};

using Parts = std::vector<std::vector<std::int64_t>>;

std::size_t smallest(const Parts& parts) {
  std::size_t least = parts[0].size();
  for (const auto& p : parts) least = std::min(least, p.size());
  return least;
}

/// Do a node's members reach each other equally well, so that their order in a ring is free?
bool reach_alike(const Topology& t, const std::vector<std::int64_t>& members) {
  const auto way_to = [&](std::int64_t to) {
    std::pair<double, double> way{INFINITY, 0};
    for (const LinkId l : t.route(device(members[0]), device(to))) {
      way.first = std::min(way.first, t.link(l).bandwidth.count);
      way.second += t.link(l).latency.count;
    }
    return way;
  };
  const auto first = way_to(members[1]);
  return std::all_of(members.begin() + 2, members.end(),
                     [&](std::int64_t m) { return way_to(m) == first; });
}

/// Of all domains, or none where one has no switch of its own.
std::vector<Star> stars_of(const Topology& t, const Parts& domains) {
  std::vector<Star> all;
  // Ranks that share a device wait for each other on the way.
  if (t.state().ranks_per_device > 1) return all;
  for (const auto& d : domains) {
    auto star = star_of(t, d);
    if (!star) return {};
    all.push_back(std::move(*star));
  }
  return all;
}

/// The k-th of n members in ring j, which enters at j and leaves from its neighbour, with which it
/// may share a PCIe switch and so a card, as NCCL's rings do: over the others of its parity, and
/// back over the rest. All members are alike in all rings together.
std::size_t paired(std::size_t j, std::size_t k, std::size_t n) {
  const bool there = k < n / 2;
  const std::size_t half = (j / 2 + (there ? k : n - 1 - k)) % (n / 2);
  return 2 * half + (there ? j % 2 : 1 - j % 2);
}

/// Members by NVLink domain, a node where it is none of several, both in the order of first
/// appearance.
Parts domains_of(const Topology& t, const std::vector<std::int64_t>& members) {
  Parts parts;
  std::unordered_map<std::size_t, std::size_t> known;
  for (const std::int64_t r : members) {
    const std::size_t domain = t.domain_of(t.node_of(device(r)));
    const std::size_t at = known.try_emplace(domain, parts.size()).first->second;
    if (at == parts.size()) parts.emplace_back();
    parts[at].push_back(r);
  }
  return parts;
}

LinkFlows rings_of(const Topology& t, const std::vector<std::int64_t>& ranks) {
  Flows flows(t);
  const Parts nodes = domains_of(t, in_ring_order(ranks, ring_stride(t, ranks)));
  const std::size_t rings = nodes.size() == 1 ? 1 : smallest(nodes);
  const bool even =
      rings > 1 && rings % 2 == 0 &&
      std::all_of(nodes.begin(), nodes.end(), [&](const auto& n) { return n.size() == rings; });
  if (even) {
    if (const auto stars = stars_of(t, nodes); !stars.empty()) {
      // In all rings but the one that it is last in a member sends on; in all but the one that it
      // is first in it gets.
      const auto others = static_cast<std::int64_t>(rings) - 1;
      for (const Star& s : stars) flows.add(s, others, others);
      for (std::size_t j = 0; j < rings; ++j) {
        for (std::size_t k = 0; k < nodes.size(); ++k)
          flows.add(nodes[k][paired(j, rings - 1, rings)], nodes[(k + 1) % nodes.size()][j]);
      }
      return flows.sorted(1.0 / static_cast<double>(rings));
    }
  }
  const bool in_pairs = even && std::all_of(nodes.begin(), nodes.end(),
                                            [&](const auto& n) { return reach_alike(t, n); });
  std::vector<std::int64_t> order;
  for (std::size_t j = 0; j < rings; ++j) {
    order.clear();
    for (const auto& n : nodes) {
      for (std::size_t k = 0; k < n.size(); ++k)
        order.push_back(n[in_pairs ? paired(j, k, n.size()) : (j + k) % n.size()]);
    }
    for (std::size_t k = 0; k < order.size(); ++k)
      flows.add(order[k], order[(k + 1) % order.size()]);
  }
  return flows.sorted(1.0 / static_cast<double>(rings));
}

LinkFlows pairs_of(const Topology& t, const std::vector<std::int64_t>& ranks) {
  std::vector<DeviceId> devices;
  for (const std::int64_t r : ranks) devices.push_back(device(r));
  auto loads = t.all_pairs(devices);
  if (t.state().ranks_per_device > 1) {
    for (const DeviceId a : devices) {
      for (const DeviceId b : devices)
        loads.latency = std::max(loads.latency, turn_taking(t, a, b));
    }
  }
  return {1.0 / static_cast<double>(std::max<std::size_t>(1, ranks.size() - 1)),
          std::move(loads.links), loads.latency};
}

/// Is there a switch between the members of each domain?
bool over_switches(const Topology& t, const Parts& domains) {
  return std::all_of(domains.begin(), domains.end(), [&](const auto& d) {
    return d.size() > 1 && t.route(device(d[0]), device(d[1])).size() > 1;
  });
}

/// An all-reduce by trees. S bytes: every tree carries S / 2m, m the members of the smallest
/// domain; a flow is that, both ways of each edge.
LinkFlows trees_of(const Topology& t, const std::vector<std::int64_t>& ranks, bool in_switches) {
  Parts domains = domains_of(t, ranks);
  const auto place = [&](std::int64_t r) { return t.local_index(device(r)); };
  for (auto& d : domains) {
    std::sort(d.begin(), d.end(),
              [&](std::int64_t a, std::int64_t b) { return place(a) < place(b); });
  }
  const auto m = static_cast<std::int64_t>(smallest(domains));
  const auto n = static_cast<std::int32_t>(domains.size());
  Flows flows(t);
  // On the rail of the one below, where the one above has a member there.
  const auto edges = [&](std::int32_t below, std::int32_t above) {
    const auto &from = domains[static_cast<std::size_t>(below)],
               &to = domains[static_cast<std::size_t>(above)];
    for (std::size_t j = 0; j < static_cast<std::size_t>(m); ++j) {
      std::int64_t peer = to[j];
      if (place(peer) != place(from[j])) {
        const auto same = std::find_if(to.begin(), to.end(),
                                       [&](std::int64_t r) { return place(r) == place(from[j]); });
        if (same != to.end()) peer = *same;
      }
      flows.add(from[j], peer);
      flows.add(peer, from[j]);
    }
  };
  const auto parent = binary_tree_parents(n);
  for (std::int32_t r = 0; r < n; ++r) {
    const std::int32_t up = parent[static_cast<std::size_t>(r)];
    if (up < 0) continue;
    edges(r, up);
    edges(in_other_tree(r, n), in_other_tree(up, n));
  }
  // Chains one way and back, each member at each place of them once.
  const bool alike = std::all_of(domains.begin(), domains.end(), [&](const auto& d) {
    return static_cast<std::int64_t>(d.size()) == m;
  });
  const auto stars = alike ? stars_of(t, domains) : std::vector<Star>{};
  const std::int64_t each = in_switches ? 2 * (m + 1) : 4 * (m - 1);
  for (const Star& s : stars) flows.add(s, each, each);
  for (const auto& d : domains) {
    if (!stars.empty()) break;
    for (std::size_t k = 0; in_switches && k < d.size(); ++k) {
      // All of S for the others' sums and its own part, summed, for all.
      flows.add_to_switch(d[k], d[(k + 1) % d.size()], 2 * (m + 1), 2 * (m + 1));
    }
    for (std::size_t j = 0; !in_switches && d.size() > 1 && j < static_cast<std::size_t>(m); ++j) {
      for (std::size_t k = 0; k + 1 < d.size(); ++k) {
        flows.add(d[(j + k) % d.size()], d[(j + k + 1) % d.size()], 2);
        flows.add(d[(j + k + 1) % d.size()], d[(j + k) % d.size()], 2);
      }
    }
  }
  const auto ranks_n = static_cast<double>(ranks.size());
  return flows.sorted(ranks_n / (4 * static_cast<double>(m) * (ranks_n - 1)));
}

LinkFlows switches_of(const Topology& t, const std::vector<std::int64_t>& ranks, Lay lay) {
  Flows flows(t);
  const auto n = static_cast<std::int64_t>(ranks.size());
  for (std::size_t k = 0; k < ranks.size(); ++k) {
    flows.add_to_switch(ranks[k], ranks[(k + 1) % ranks.size()], lay == Lay::switches_sum ? n : 1,
                        lay == Lay::switches_gather ? n : 1);
  }
  const auto of = static_cast<double>(n);
  return flows.sorted(lay == Lay::switches ? (of + 1) / (2 * (of - 1)) : 1 / (of - 1));
}

/// The parts of members at a multiple of 2d in each one's tree go on to who is d further.
LinkFlows near_trees_of(const Topology& t, const std::vector<std::int64_t>& ranks, bool sums) {
  Flows flows(t);
  const std::size_t n = ranks.size();
  for (std::size_t d = 1; d < n; d *= 2) {
    const auto parts = static_cast<std::int64_t>((n - 1 - d) / (2 * d) + 1);
    for (std::size_t k = 0; k < n; ++k) {
      const std::int64_t near = ranks[k], far = ranks[(k + d) % n];
      flows.add(sums ? far : near, sums ? near : far, parts);
    }
  }
  return flows.sorted(1.0 / static_cast<double>(n - 1));
}

}  // namespace

std::string_view name(Lay lay) {
  constexpr std::array<std::string_view, 9> names{"rings",
                                                  "pairs",
                                                  "trees",
                                                  "switches",
                                                  "switches, gather",
                                                  "switches, sum",
                                                  "switches and trees",
                                                  "near trees",
                                                  "near sums"};
  return names[static_cast<std::size_t>(lay)];
}

std::int64_t ring_stride(const Topology& t, const std::vector<std::int64_t>& ranks) {
  const auto& strides = t.state().ring_strides;
  if (strides.empty()) return 1;
  const auto it =
      strides.find({ranks.front(), ranks.back(), static_cast<std::int64_t>(ranks.size())});
  return it == strides.end() ? 1 : it->second;
}

std::vector<std::int64_t> in_ring_order(const std::vector<std::int64_t>& members,
                                        std::int64_t stride) {
  const auto n = static_cast<std::int64_t>(members.size());
  PARTITA_ASSERT(stride > 0 && std::gcd(stride, n) == 1,
                 fmt::format("a ring of {} with stride {}", n, stride));
  std::vector<std::int64_t> order;
  order.reserve(members.size());
  for (std::int64_t k = 0; k < n; ++k)
    order.push_back(members[static_cast<std::size_t>(k * (stride % n) % n)]);
  return order;
}

LinkFlows lay_out(const Topology& t, Lay lay, const std::vector<std::int64_t>& ranks) {
  if (ranks.size() < 2) return {};
  switch (lay) {
    case Lay::rings:
      break;
    case Lay::pairs:
      return pairs_of(t, ranks);
    case Lay::trees:
      return trees_of(t, ranks, false);
    case Lay::switches:
    case Lay::switches_gather:
    case Lay::switches_sum: {
      const Parts domains = domains_of(t, ranks);
      if (domains.size() == 1 && over_switches(t, domains)) return switches_of(t, ranks, lay);
      break;
    }
    case Lay::switch_trees:
      if (over_switches(t, domains_of(t, ranks))) return trees_of(t, ranks, true);
      break;
    case Lay::near_trees:
    case Lay::near_sums:
      // So many routes for a lay that NCCL takes for small payloads only: a ring sends as much.
      if (ranks.size() > 1024) break;
      return near_trees_of(t, ranks, lay == Lay::near_sums);
  }
  return rings_of(t, ranks);
}

LinkFlows message_flows(const Topology& t, std::int64_t from, std::int64_t to) {
  Flows flows(t);
  flows.add(from, to);
  return flows.sorted(1);
}

}  // namespace partita
