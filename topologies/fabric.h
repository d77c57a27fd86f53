// topologies/fabric.h: the networks between nodes: on which switch a card hangs, and how a route
// crosses from card to card. Private to this folder.
//
// Each fabric numbers its switches and links from 0; link 2c and 2c + 1 are the directions of cable
// c. Routes are computed, never stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "topologies/topology.h"

namespace partita {

/// What routes are compared by: fewest links, then the larger bottleneck, then the lower latency.
/// Joining two paths never makes a worse part win on links or bottleneck, so best paths are made of
/// best parts in these two; latency only decides between parts that are equal in both.
struct PathCost {
  std::int32_t links = 0;
  double bottleneck = std::numeric_limits<double>::infinity();
  std::int64_t latency = 0;  ///< Picoseconds: sums must not depend on their order.

  friend bool operator<(const PathCost& a, const PathCost& b) {
    return std::tuple(a.links, -a.bottleneck, a.latency) <
           std::tuple(b.links, -b.bottleneck, b.latency);
  }
  friend PathCost operator+(const PathCost& a, const PathCost& b) {
    return {a.links + b.links, std::min(a.bottleneck, b.bottleneck), a.latency + b.latency};
  }
};

inline constexpr std::int32_t kNoPath = std::numeric_limits<std::int32_t>::max();
inline constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

/// From card `out` of node `from` to card `in` of another node.
struct Crossing {
  std::size_t from = 0, out = 0;
  std::size_t to = 0, in = 0;
  std::uint64_t first = 0, last = 0;    ///< devices at its ends: what a spine is chosen by
  const ClusterState* state = nullptr;  ///< failed links, if any; by the cluster's numbers
  std::size_t first_link = 0;           ///< the cluster's number of the fabric's link 0
  bool around = false;                  ///< any way that is left, not the one of the fabric's rule
};

/// A way out of a router.
struct Port {
  std::size_t to = 0;    ///< router
  std::size_t link = 0;  ///< of the fabric
  bool sends = true;     ///< what the crossing's first card sends may leave by it
  bool delivers = true;  ///< what arrives over it gets to the crossing's last card
};

/// Two routers of which the second cannot be reached from the first any more.
struct CutOff {
  std::size_t from = 0, to = 0;
};

/// Leaves with nodes below and spines above. Where traffic is sprayed, one vertex stands for all
/// spines and a leaf's uplink is one link of the summed bandwidth.
class SwitchTree {
 public:
  std::size_t nodes_per_leaf = 1;
  std::size_t leaves_per_unit = 1;  ///< More than one: NIC i is on leaf i of its unit.
  std::size_t leaf_count = 0;
  bool core = false;
  std::vector<BytesPerSecond> uplink;  ///< By leaf of a unit: to all spines together.
  Seconds uplink_latency;
  std::size_t spines = 1;
  SpineRouting routing;

  std::size_t leaf_of(std::size_t node, std::size_t nic) const {
    return node / nodes_per_leaf * leaves_per_unit + (leaves_per_unit == 1 ? 0 : nic);
  }
  /// Vertices above the leaves.
  std::size_t tops() const { return !core ? 0 : routing.ecmp ? spines : 1; }

  std::size_t switch_of(std::size_t node, std::size_t nic) const { return leaf_of(node, nic); }
  std::size_t switch_count() const { return leaf_count + tops(); }
  std::size_t link_count() const { return 2 * leaf_count * tops(); }
  PathCost path_cost(const Crossing& c) const;
  void append_path(const Crossing& c, std::vector<LinkId>& out) const;
  Link link(std::size_t index) const;
  std::string switch_name(std::size_t index) const;
  std::uint64_t offset_of(std::size_t node, std::size_t origin) const;

 private:
  PathCost link_cost(std::size_t leaf) const;
  /// Spine of a message that crosses between leaves, among those that have both their links; kNone
  /// if there are none.
  std::size_t spine_of(const Crossing& c) const;
};

/// A router to a node, with a cable to the next in each dimension and round the ends. Node i has
/// coordinates i % sides[0], i / sides[0] % sides[1], ... Routes take one dimension after the
/// other, the first first, each the shorter way round; half way round goes up. Where a link of that
/// way has failed, the fewest hops over what is left, by the first ports that are as short.
class Torus {
 public:
  std::vector<std::size_t> sides;
  BytesPerSecond bandwidth;
  Seconds latency;
  bool by_direction = false;  ///< NIC 2d sends up in dimension d, 2d + 1 down.

  std::size_t nodes() const;
  std::size_t switch_of(std::size_t node, std::size_t) const { return node; }
  std::size_t switch_count() const { return nodes(); }
  std::size_t link_count() const { return 2 * first_cable(sides.size()); }
  PathCost path_cost(const Crossing& c) const;
  void append_path(const Crossing& c, std::vector<LinkId>& out) const;
  Link link(std::size_t index) const;
  std::string switch_name(std::size_t index) const;
  std::uint64_t offset_of(std::size_t node, std::size_t origin) const;
  PathCost hop(std::size_t) const { return {1, bandwidth.count, to_ticks(latency).count}; }
  /// Up and down in each dimension, the first first.
  std::vector<Port> ports(std::size_t router, const Crossing& c) const;

 private:
  std::size_t stride(std::size_t dimension) const;
  /// Cables of the dimensions before this one. A side of 2 has one cable, not two; of 1, none.
  std::size_t first_cable(std::size_t dimension) const;
  std::size_t next(std::size_t node, std::size_t dimension, bool up) const;
  std::size_t link_from(std::size_t node, std::size_t dimension, bool up) const;
  /// Steps from `from` to `to` in a dimension: positive up.
  std::int64_t steps(std::size_t from, std::size_t to, std::size_t dimension) const;
  /// The card that sends in a direction, and the one at the other end.
  std::size_t card(std::size_t dimension, bool up) const;
};

/// Pairs of n things, each with a number, laid out so that shifting all things by one shifts the
/// numbers too: pair (x, x + o) of offset o <= n / 2.
struct Pairs {
  std::size_t n = 0;
  std::size_t count() const { return n * (n - 1) / 2; }
  /// Its number; true if it lists `a` first.
  std::pair<std::size_t, bool> number(std::size_t a, std::size_t b) const;
  std::pair<std::size_t, std::size_t> at(std::size_t number) const;
};

/// Groups of routers that all know each other; global cables between groups. Port k of a group (of
/// its router k / global_links) leads to the group k % (groups - 1) + 1 further on. Routes: to the
/// router with the cable, over it, to the router of the node; where several cables would do, the
/// fewest hops, then the (router + router)-th modulo their number. If a link of that has failed,
/// the same among those without; if there are none, the fewest hops over any groups.
class Dragonfly {
 public:
  std::size_t groups = 1, routers = 1;  ///< routers of a group
  std::size_t nodes_per_router = 1;
  std::size_t global_links = 0;  ///< of a router
  BytesPerSecond local_bandwidth, global_bandwidth;
  Seconds local_latency, global_latency;

  std::size_t cables_between_groups() const {
    return groups < 2 ? 0 : routers * global_links / (groups - 1);
  }
  std::size_t switch_of(std::size_t node, std::size_t) const { return node / nodes_per_router; }
  std::size_t switch_count() const { return groups * routers; }
  std::size_t link_count() const;
  PathCost path_cost(const Crossing& c) const;
  void append_path(const Crossing& c, std::vector<LinkId>& out) const;
  Link link(std::size_t index) const;
  std::string switch_name(std::size_t index) const;
  std::uint64_t offset_of(std::size_t node, std::size_t origin) const;
  PathCost hop(std::size_t link) const;
  /// To the routers of its group in order, then by its global ports.
  std::vector<Port> ports(std::size_t router, const Crossing& c) const;

 private:
  /// Of cable `j` from `group` to `other`: the router in `group`.
  std::size_t gateway(std::size_t group, std::size_t other, std::size_t j) const;
  std::size_t local_link(std::size_t from, std::size_t to) const;
  std::size_t global_link(std::size_t group, std::size_t other, std::size_t j) const;
  /// The rule's way from router to router, over cable `j` between their groups if they have two.
  std::vector<std::size_t> way(std::size_t from, std::size_t to, std::size_t j) const;
  /// The rule's way, else what the rule picks among whole ones; false if there is none.
  bool whole_way(const Crossing& c, std::vector<std::size_t>& links) const;
};

/// One of them; a tree without leaves joins nothing.
class Fabric {
 public:
  std::variant<SwitchTree, Torus, Dragonfly> kind;

  const SwitchTree* tree() const { return std::get_if<SwitchTree>(&kind); }
  bool joins() const { return tree() == nullptr || tree()->leaf_count > 0; }
  std::size_t switch_of(std::size_t node, std::size_t nic) const {
    return std::visit([&](const auto& f) { return f.switch_of(node, nic); }, kind);
  }
  std::size_t switch_count() const {
    return std::visit([](const auto& f) { return f.switch_count(); }, kind);
  }
  std::size_t link_count() const {
    return std::visit([](const auto& f) { return f.link_count(); }, kind);
  }
  /// links == kNoPath where the two cards are not joined.
  PathCost path_cost(const Crossing& c) const {
    return std::visit([&](const auto& f) { return f.path_cost(c); }, kind);
  }
  void append_path(const Crossing& c, std::vector<LinkId>& out) const {
    std::visit([&](const auto& f) { f.append_path(c, out); }, kind);
  }
  /// Vertices of the result count from the fabric's first switch.
  Link link(std::size_t index) const {
    return std::visit([&](const auto& f) { return f.link(index); }, kind);
  }
  std::string switch_name(std::size_t index) const {
    return std::visit([&](const auto& f) { return f.switch_name(index); }, kind);
  }
  std::uint64_t offset_of(std::size_t node, std::size_t origin) const {
    return std::visit([&](const auto& f) { return f.offset_of(node, origin); }, kind);
  }
  /// Does it go around failed links over other routers?
  bool goes_around() const { return tree() == nullptr; }
  /// Is a crossing's way the same for all cards of its nodes?
  bool blind_to_cards() const {
    const auto* torus = std::get_if<Torus>(&kind);
    return tree() == nullptr && (torus == nullptr || !torus->by_direction);
  }
  /// A pair of the first `nodes` nodes' routers that failed links part, of a fabric that goes
  /// around them; `c` gives the state.
  std::optional<CutOff> cut_off(std::size_t nodes, const Crossing& c) const;
};

}  // namespace partita
