// The search for channels (NCCL 2.28.9, src/graph/search.cc), as far as it decides their number and
// speed on the topologies that we have: docs/nccl.md, "Channels".
#include <cmath>
#include <map>
#include <set>

#include "simulator/cost/nccl.h"

namespace partita::nccl {
namespace {

// search.cc:1013-1040
const std::vector<double> kInside = {40, 30, 20, 18, 15, 12, 10, 9, 7, 6, 5, 4, 3};
const std::vector<double> kInside90 = {60, 50, 40, 30, 24, 20, 15, 12, 11, 6, 3};
const std::vector<double> kInside100 = {90, 80, 70, 60, 50, 40, 30, 24, 20, 19, 18};
const std::vector<double> kBetween = {48, 30, 28, 24, 20, 18,  15,  12,  10, 9,
                                      7,  6,  5,  4,  3,  2.4, 1.2, .24, .12};
const std::vector<double> kBetween90 = {48, 45, 42, 40, 30,  24,  22,  20, 17.5,
                                        15, 12, 6,  3,  2.4, 1.2, .24, .12};
const std::vector<double> kBetween100 = {96,   48, 45.1, 42, 40, 30,  24,  22,  20,
                                         17.5, 15, 12,   6,  3,  2.4, 1.2, .24, .12};
// 2.30.7 adds some for Blackwell.
const std::vector<double> kInside100_2_30 = {90, 80, 70, 60, 50, 45, 40, 30, 24, 20, 19, 18};
const std::vector<double> kBetween100_2_30 = {96, 86,   80, 48, 45.1, 42, 40,  30,  24,  22,
                                              20, 17.5, 15, 12, 6,    3,  2.4, 1.2, .24, .12};

constexpr int kMostChannels = 32;  // MAXCHANNELS / 2, for rings

/// NCCL's GB/s of a link over the nominal one (topo.h; topo.cc:423-427, 480-492).
double rating(const Link& link, int capability, Cpu cpu) {
  const double nominal = link.bandwidth.count * 1e-9;
  switch (link.kind) {
    case LinkKind::nvlink:
      if (capability >= 100) return nominal * 40.1 / 50;
      if (capability >= 90) return nominal * 20.6 / 25;
      if (capability == 86) return nominal * 12 / 14.0625;
      return capability >= 70 ? nominal * 20 / 25 : nominal * 18 / 20;
    case LinkKind::pcie:
      return nominal * 12 / 15.75;
    case LinkKind::cpu_interconnect:
      // Intel: NCCL asks for the model, which topologies don't have; Hopper's hosts are Sapphire
      // Rapids, older ones Skylake or later.
      if (cpu == Cpu::amd) return 16;
      return cpu == Cpu::intel ? (capability >= 90 ? 22 : 10) : 6;
    case LinkKind::network:
      return nominal / link.efficiency;  // NCCL asks the card, which tells its line rate
    case LinkKind::c2c:
    case LinkKind::other:
      return nominal;
  }
  return nominal;
}

/// Directed channels of one speed that visit all members over direct NVLinks: depth-first, as many
/// as found within a budget.
class Rings {
 public:
  explicit Rings(std::vector<std::vector<int>> room) : room_(std::move(room)) {
    most_ = kMostChannels;
    for (std::size_t v = 0; v < room_.size(); ++v) {
      int out = 0, in = 0;
      for (std::size_t u = 0; u < room_.size(); ++u) out += room_[v][u], in += room_[u][v];
      most_ = std::min({most_, out, in});
    }
    used_.assign(room_.size(), false);
  }
  int count() {
    if (room_.size() > 1 && most_ > 0) next(0, 0, 1);
    return best_;
  }

 private:
  void next(int found, std::size_t at, std::size_t visited) {
    if (best_ >= most_ || --budget_ < 0) return;
    used_[at] = true;
    if (visited == room_.size()) {
      if (room_[at][0] > 0) {
        --room_[at][0];
        best_ = std::max(best_, found + 1);
        const auto before = used_;
        used_.assign(room_.size(), false);
        next(found + 1, 0, 1);
        used_ = before;
        ++room_[at][0];
      }
    } else {
      // The widest first: what is left stays even.
      std::vector<std::pair<int, std::size_t>> ways;
      for (std::size_t u = 0; u < room_.size(); ++u)
        if (!used_[u] && room_[at][u] > 0) ways.emplace_back(-room_[at][u], u);
      std::sort(ways.begin(), ways.end());
      for (const auto& [width, u] : ways) {
        --room_[at][u];
        next(found, u, visited + 1);
        ++room_[at][u];
      }
    }
    used_[at] = false;
  }
  std::vector<std::vector<int>> room_;
  std::vector<bool> used_;
  int most_ = 0, best_ = 0, budget_ = 200'000;
};

/// One node's members, as the search sees them.
struct Node {
  std::vector<std::int64_t> ranks;
  bool nvlink = false, switched = false;
  double total = 0;        ///< of one member's links
  double most = INFINITY;  ///< of the best path between members
  double pair = 0;
  std::vector<std::vector<double>> direct;           ///< GB/s between members without a switch
  std::vector<std::pair<double, double>> hop_rooms;  ///< PCIe: rating and load per channel
  std::vector<double> cards;                         ///< of each network card and the way to it
  double network_share = 1;                          ///< of a card's line rate that it reaches
  bool cards_over_cpu = false;
  double latency_us = 0;

  /// How many channels of a speed fit between the members.
  int fit(double speed, bool between) const {
    const auto n = static_cast<double>(ranks.size());
    constexpr double kSlack = 1e-9;
    if (ranks.size() == 1) return kMostChannels;
    if (switched) {
      // Where a channel enters and leaves over the network, it has one hop less.
      const double hops = between ? (n - 1) / n : 1;
      return static_cast<int>(total / (speed * hops) + kSlack);
    }
    if (nvlink) {
      std::vector<std::vector<int>> room(ranks.size(), std::vector<int>(ranks.size()));
      for (std::size_t i = 0; i < ranks.size(); ++i)
        for (std::size_t j = 0; j < ranks.size(); ++j)
          room[i][j] = static_cast<int>(direct[i][j] / speed + kSlack);
      return Rings(std::move(room)).count();
    }
    double least = kMostChannels;
    for (const auto& [rate, load] : hop_rooms) least = std::min(least, rate / (load * speed));
    return static_cast<int>(least + kSlack);
  }
  int fit_cards(double speed) const {
    int n = 0;
    for (const double c : cards) n += static_cast<int>(c / speed + 1e-9);
    return n;
  }
};

/// `elsewhere`: members of another node, each of which a member meets over its own way (a channel
/// leaves and enters by cards of one number); empty: there is none.
Node look(const Topology& t, const std::vector<std::int64_t>& ranks,
          const std::vector<std::int64_t>& elsewhere, int capability, Cpu cpu) {
  Node node;
  node.ranks = ranks;
  const auto device = [](std::int64_t r) { return DeviceId{static_cast<std::size_t>(r)}; };
  const auto rate = [&](LinkId l) { return rating(t.link(l), capability, cpu); };
  std::map<std::int32_t, std::size_t> place;
  for (std::size_t i = 0; i < ranks.size(); ++i) place[t.vertex_of(device(ranks[i]))] = i;
  node.direct.assign(ranks.size(), std::vector<double>(ranks.size()));
  node.total = INFINITY;
  bool all_direct = true;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    double pcie = 0, nvlinks = 0;
    bool neighbour = false;
    for (const LinkId id : t.links_of(device(ranks[i]))) {
      const Link l = t.link(id);
      if (l.from != t.vertex_of(device(ranks[i]))) continue;
      if (l.bandwidth.count == 0) continue;  // failed
      if (l.kind == LinkKind::nvlink) nvlinks += rate(id);
      if (l.kind == LinkKind::pcie) pcie = std::max(pcie, rate(id));
      if (const auto to = place.find(l.to); l.kind == LinkKind::nvlink && to != place.end()) {
        node.direct[i][to->second] += rate(id);
        neighbour = true;
      }
    }
    all_direct = all_direct && neighbour;
    node.total = std::min(node.total, std::max(pcie, nvlinks));
  }
  std::map<std::int32_t, double> loads;
  if (ranks.size() > 1) {
    node.switched = node.nvlink = true;
    node.most = 0;
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      const auto route = t.route(device(ranks[i]), device(ranks[(i + 1) % ranks.size()]));
      double least = INFINITY;
      bool nvlink = true, over_cpu = false;
      for (const LinkId id : route) {
        nvlink = nvlink && t.link(id).kind == LinkKind::nvlink;
        over_cpu = over_cpu || t.vertex_kind(t.link(id).from) == VertexKind::cpu;
        least = std::min(least, rate(id));
      }
      // An Intel root complex forwards between GPUs at 5/6 (search.cc:79).
      for (const LinkId id : route) loads[id.value] += over_cpu && cpu == Cpu::intel ? 1.2 : 1;
      const bool over_switch =
          route.size() > 1 && t.vertex_kind(t.link(route[0]).to) != VertexKind::device;
      node.nvlink = node.nvlink && nvlink;
      node.switched = node.switched && nvlink && over_switch;
      node.most = std::max(node.most, least);
    }
    if (!node.switched && all_direct) {
      // A mesh: only if a ring of some speed goes round.
      node.nvlink = true;
      node.most = 0;
      for (const auto& row : node.direct)
        for (const double d : row) node.most = std::max(node.most, d);
      if (node.fit(3, false) == 0) node.nvlink = false;
    } else if (!node.switched) {
      node.nvlink = false;
    }
  }
  if (!elsewhere.empty()) {
    std::map<std::int32_t, double> cards;
    double way = 0;
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      double least = INFINITY, latency = 0;
      bool over_cpu = false, c2c = false;
      for (const LinkId id : t.route(device(ranks[i]), device(elsewhere[i % elsewhere.size()]))) {
        const Link l = t.link(id);
        if (l.kind == LinkKind::network) {
          latency += l.latency.count * 1e6;
          if (t.vertex_kind(l.from) == VertexKind::nic) {
            const double card = std::min(least, rate(id));
            node.network_share = std::min(node.network_share, l.efficiency);
            cards[l.from] = std::max(cards[l.from], card);
            way = std::max(way, card);
          }
        } else if (latency == 0) {
          // PHB or SYS; over C2C it is P2C, which Hopper's and later rules allow.
          c2c = c2c || l.kind == LinkKind::c2c;
          if (l.kind == LinkKind::cpu_interconnect ||
              (t.vertex_kind(l.from) == VertexKind::cpu && !(c2c && capability >= 90)))
            over_cpu = true;
          least = std::min(least, rate(id));
        }
      }
      node.cards_over_cpu = node.cards_over_cpu || over_cpu;
      node.latency_us = std::max(node.latency_us, latency);
    }
    for (const auto& [id, rate_of] : cards) node.cards.push_back(rate_of);
    node.most = way;
  }
  for (const auto& [id, load] : loads)
    node.hop_rooms.emplace_back(
        rating(t.link(LinkId{static_cast<std::size_t>(id)}), capability, cpu), load);
  return node;
}

}  // namespace

const std::vector<double>& speeds(int capability, bool between, Version version) {
  if (capability >= 100) {
    if (version == Version::v2_30_7) return between ? kBetween100_2_30 : kInside100_2_30;
    return between ? kBetween100 : kInside100;
  }
  if (capability >= 90) return between ? kBetween90 : kInside90;
  return between ? kBetween : kInside;
}

bool serves(const DeviceProfile& device) {
  constexpr int kPascal = 60;  // the oldest that NCCL's NVLink figures know
  return device.compute_capability >= kPascal;
}

namespace {

/// What a search finds whose nodes are all like this one.
void search(Communicator& c, const Node& node, bool sharp) {
  const bool between = c.nodes > 1;
  const auto members = static_cast<int>(node.ranks.size());
  const bool alone = members == 1;
  const bool nvlink = alone || node.nvlink;
  const auto& tried = speeds(c.compute_capability, between, c.version);
  const auto fit = [&](double s) {
    return between ? std::min(node.fit(s, true), node.fit_cards(s)) : node.fit(s, false);
  };
  const double total = alone ? node.most : node.total;
  Channels ring = search_speeds(tried, node.most, std::max(total, between ? node.most : 0),
                                kMostChannels, c.compute_capability, fit);
  // "Could not find a path": one channel in rank order (search.cc:1146).
  if (ring.count == 0) ring = {1, .1};
  c.graph(Algorithm::ring) = Graph{ring.count, ring.speed, ring.speed, nvlink, true};
  // Pass 2: inside a node a tree may be faster than its way out.
  double tree = ring.speed;
  if (between) {
    for (const double s : tried) {
      if (s <= 2 * ring.speed + 1e-9 && (alone || node.fit(s, true) >= ring.count)) {
        tree = std::max(tree, s);
        break;
      }
    }
  }
  c.graph(Algorithm::tree) = Graph{ring.count, tree, ring.speed, nvlink, true};
  c.plain_tree = between && alone;
  if (c.ranks == c.nodes) c.graph(Algorithm::pat) = c.graph(Algorithm::tree);
  c.nvls = c.compute_capability >= 90 && node.switched && members > 2;
  if (c.nvls) {
    // Each head's own GPU carries its channel twice.
    int heads = std::min(members, kMostChannels);
    if (between) {
      while (heads > 1 && node.fit_cards(tried.back()) < heads) --heads;
      heads = std::min(heads, std::max(1, static_cast<int>(node.cards.size())));
    }
    double speed = 0, inter = 0;
    for (const double s : tried) {
      if (s * (heads + 1) <= node.total && (!between || node.fit_cards(s) >= heads)) {
        speed = s;
        break;
      }
    }
    inter = speed;
    for (const double s : tried) {
      if (s <= 2 * speed && (!between || node.fit_cards(s) >= heads)) {
        inter = s;
        break;
      }
    }
    if (speed > 0) {
      c.graph(Algorithm::nvls) = Graph{heads, speed, inter, true, true};
      c.graph(Algorithm::nvls_tree) = c.graph(Algorithm::nvls);
    } else {
      c.nvls = false;
    }
  }
  // What the fabric sums enters it once: over a chain of each node's members, or by heads that
  // switches join, one a card.
  if (between && sharp) {
    c.collective_network = true;
    c.graph(Algorithm::collnet_chain) = Graph{ring.count, ring.speed, ring.speed, nvlink, true};
    const int heads = std::min(members, static_cast<int>(node.cards.size()));
    const auto speed = std::find_if(tried.begin(), tried.end(), [&](double s) {
      return s * (heads + 1) <= node.total && node.fit_cards(s) >= heads;
    });
    if (node.switched && heads > 0 && speed != tried.end())
      c.graph(Algorithm::collnet_direct) = Graph{heads, *speed, *speed, true, true};
  }
  c.ll128 = nvlink && !node.cards_over_cpu;
  c.nvlink_GBps = node.nvlink ? node.total : 0;
  c.network_GBps = 0;
  for (const double card : node.cards) c.network_GBps += card;
  c.network_share = node.network_share;
  c.route_latency_us = node.latency_us;
}

/// What two kinds of nodes have in common.
Communicator least(Communicator a, const Communicator& b) {
  for (std::size_t k = 0; k < a.graphs.size(); ++k) {
    auto& to = a.graphs[k];
    const auto& of = b.graphs[k];
    if (!to || !of) {
      to.reset();
      continue;
    }
    *to = {std::min(to->channels, of->channels), std::min(to->intra_GBps, of->intra_GBps),
           std::min(to->inter_GBps, of->inter_GBps), to->nvlink && of->nvlink,
           to->same_channels && of->same_channels};
  }
  a.plain_tree = a.plain_tree || b.plain_tree;
  a.nvls = a.nvls && b.nvls;
  a.ll128 = a.ll128 && b.ll128;
  a.collective_network = a.collective_network && b.collective_network;
  a.nvlink_GBps = std::min(a.nvlink_GBps, b.nvlink_GBps);
  a.network_GBps = std::min(a.network_GBps, b.network_GBps);
  a.network_share = std::min(a.network_share, b.network_share);
  a.route_latency_us = std::max(a.route_latency_us, b.route_latency_us);
  return a;
}

Cpu cpu_of(const Topology& t, std::size_t node) {
  const std::string& vendor = t.cpu_vendor(node);
  return vendor == "amd" ? Cpu::amd : vendor == "arm" ? Cpu::other : Cpu::intel;
}

}  // namespace

Communicator communicator(const Topology& t, const std::vector<std::int64_t>& ranks,
                          Version version) {
  Communicator c;
  c.version = version;
  c.ranks = static_cast<std::int64_t>(ranks.size());
  int most_capability = 0;
  // NCCL's nodes: an NVLink domain of several hosts is one. In the order of the members: groups
  // that lie alike, wherever in the cluster, are seen alike.
  std::vector<std::vector<std::int64_t>> by_node;
  std::map<std::size_t, std::size_t> number;
  c.compute_capability = INT32_MAX;
  for (const std::int64_t r : ranks) {
    const DeviceId d{static_cast<std::size_t>(r)};
    const auto [it, fresh] = number.try_emplace(t.domain_of(t.node_of(d)), by_node.size());
    if (fresh) by_node.emplace_back();
    by_node[it->second].push_back(r);
    c.compute_capability = std::min(c.compute_capability, t.device(d).compute_capability);
    most_capability = std::max(most_capability, t.device(d).compute_capability);
  }
  c.cpu = cpu_of(t, t.node_of(DeviceId{static_cast<std::size_t>(ranks[0])}));
  c.nodes = static_cast<std::int64_t>(by_node.size());
  if (c.ranks <= 1) return c;
  // The least over ranks counts (init.cc, initTransportsRank): of each kind of node the one with
  // the fewest members.
  using Members = std::vector<std::int64_t>;
  const bool between = c.nodes > 1;
  std::map<std::size_t, const Members*> few;
  const auto node_of = [&](const Members& members) {
    return t.node_of(DeviceId{static_cast<std::size_t>(members.front())});
  };
  for (const Members& members : by_node) {
    const Members*& of_kind = few[t.group_of(node_of(members))];
    if (of_kind == nullptr || members.size() < of_kind->size()) of_kind = &members;
  }
  // A node that has lost links has the least of its kind to offer.
  std::map<std::size_t, int> lost;
  for (const auto& [link, speed] : t.state().link_speed) {
    const std::size_t node = t.node_of_link(link);
    if (speed == 0 && node < t.node_count()) ++lost[t.domain_of(node)];
  }
  std::map<std::size_t, int> most_lost;
  for (auto it = by_node.begin(); !lost.empty() && it != by_node.end(); ++it) {
    const std::size_t node = node_of(*it), kind = t.group_of(node);
    const auto found = lost.find(t.domain_of(node));
    if (found == lost.end() || found->second <= most_lost[kind]) continue;
    most_lost[kind] = found->second, few[kind] = &*it;
  }
  const Communicator base = c;
  bool first = true;
  for (const auto& [kind, members] : few) {
    const Members& other = members == &by_node.front() && between ? by_node[1] : by_node.front();
    const Node node = look(t, *members, between ? other : Members{}, c.compute_capability,
                           cpu_of(t, node_of(*members)));
    Communicator one = base;
    search(one, node, t.sharp());
    c = first ? one : least(c, one);
    first = false;
  }
  const bool uniform = c.compute_capability == most_capability ||
                       (version == Version::v2_30_7 && c.compute_capability >= 90);
  c.ll128 = c.ll128 && uniform && c.compute_capability >= 70;
  return c;
}

}  // namespace partita::nccl
