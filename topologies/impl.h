// topologies/impl.h: what a topology stores: distinct nodes with their paths, and the fabric.
// Private to this folder.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "topologies/cluster.h"
#include "topologies/fabric.h"

namespace partita {

/// A directed link inside a node, or between it and a switch outside.
struct LocalLink {
  std::size_t from = 0, to = 0;  ///< Local vertices; kNone: the fabric's switch.
  std::size_t nic = kNone;       ///< Which NIC's port, for links with an end in the fabric.
  LinkKind kind = LinkKind::other;
  BytesPerSecond bandwidth;
  Seconds latency;
  double efficiency = 1;

  PathCost cost() const { return {1, bandwidth.count, to_ticks(latency).count}; }
};

/// One distinct node, stored once. Local vertices are the spec's, in order, and then the switch of
/// the domain if there is one. Local links: both directions of each cable; then of each domain
/// port; then, where there is a fabric, of each NIC's port (out to it, and back).
class NodeTemplate {
 public:
  NodeTemplate(const NodeSpec& spec, bool has_fabric) : spec_(spec) {
    for (std::size_t v = 0; v < spec_.vertices.size(); ++v) {
      if (spec_.vertices[v].kind == VertexKind::device) devices_.push_back(v);
      if (spec_.vertices[v].kind == VertexKind::nic) nics_.push_back(v);
    }
    for (const auto& e : spec_.edges) add_cable(e.a, e.b, kNone, e.kind, e.bandwidth, e.latency);
    if (spec_.domain) {
      const auto& d = *spec_.domain;
      domain_switch_ = spec_.vertices.size();
      for (const std::size_t port : d.ports)
        add_cable(port, domain_switch_, kNone, d.kind, d.bandwidth, d.latency);
    }
    first_nic_link_ = links_.size();
    for (std::size_t n = 0; n < nics_.size() && has_fabric; ++n) {
      const auto& nic = spec_.vertices[nics_[n]];
      add_cable(nics_[n], kNone, n, LinkKind::network, nic.port_bandwidth, nic.port_latency,
                nic.port_efficiency);
    }
    find_paths();
  }

  const NodeSpec& spec() const { return spec_; }
  const std::vector<std::size_t>& devices() const { return devices_; }
  const std::vector<std::size_t>& nics() const { return nics_; }
  const std::vector<LocalLink>& links() const { return links_; }
  std::size_t vertex_count() const { return spec_.vertices.size(); }
  std::size_t domain_switch() const { return domain_switch_; }
  /// Devices dealt out evenly over the NICs, in order.
  std::size_t own_nic(std::size_t device) const {
    const auto at = std::lower_bound(devices_.begin(), devices_.end(), device);
    return static_cast<std::size_t>(at - devices_.begin()) * nics_.size() / devices_.size();
  }
  /// The device over which NCCL's PXN reaches a card from another device: the first of those whose
  /// own card it is, else of those that reach it without a processor; kNone if no device does that
  /// and is reached over NVLink alone, if `device` itself needs no help, or without find_relays().
  std::size_t relay(std::size_t device, std::size_t nic) const {
    if (relays_.empty()) return kNone;
    const auto at = std::lower_bound(devices_.begin(), devices_.end(), device) - devices_.begin();
    return relays_[static_cast<std::size_t>(at) * nics_.size() + nic];
  }
  void find_relays() {
    for (const std::size_t device : devices_) {
      for (std::size_t nic = 0; nic < nics_.size(); ++nic)
        relays_.push_back(found_relay(device, nic));
    }
  }
  /// Paths, relays with them, avoid these local links from now on.
  void fail(const std::vector<std::size_t>& links) {
    failed_.resize(links_.size(), 0);
    for (const std::size_t l : links) failed_[l] = 1;
    source_row_.clear(), paths_.clear();
    find_paths();
    if (relays_.empty()) return;
    relays_.clear();
    find_relays();
  }
  std::size_t link_out(std::size_t nic) const { return first_nic_link_ + 2 * nic; }
  std::size_t link_in(std::size_t nic) const { return first_nic_link_ + 2 * nic + 1; }
  std::size_t path_count() const { return paths_.size(); }

  /// From a device, a NIC or the domain's switch to any local vertex; links == kNoPath if none.
  const PathCost& cost(std::size_t from, std::size_t to) const { return step(from, to).cost; }
  bool reaches(std::size_t from, std::size_t to) const { return cost(from, to).links != kNoPath; }

  void append_path(std::size_t from, std::size_t to, std::size_t first_link,
                   std::vector<LinkId>& out) const {
    const std::size_t begin = out.size();
    for (std::size_t v = to; v != from; v = links_[step(from, v).last_link].from)
      out.emplace_back(first_link + step(from, v).last_link);
    std::reverse(out.begin() + static_cast<std::ptrdiff_t>(begin), out.end());
  }

 private:
  struct Step {
    PathCost cost;
    std::size_t last_link = kNone;
  };

  std::size_t found_relay(std::size_t device, std::size_t nic) const {
    const auto helped = [&](std::size_t d) { return near(d, nics_[nic]); };
    if (helped(device)) return kNone;
    std::size_t found = kNone;
    for (const std::size_t d : devices_) {
      if (d == device || !helped(d) || !joined_by_nvlink(device, d)) continue;
      if (own_nic(d) == nic) return d;
      if (found == kNone) found = d;
    }
    return found;
  }
  /// Is there a path on which no processor and no other device forwards?
  bool near(std::size_t device, std::size_t nic) const {
    if (!reaches(device, nic)) return false;
    for (std::size_t v = links_[step(device, nic).last_link].from; v != device;
         v = links_[step(device, v).last_link].from) {
      const VertexKind kind = vertex_kind(v);
      if (kind == VertexKind::cpu || kind == VertexKind::device) return false;
    }
    return true;
  }
  bool joined_by_nvlink(std::size_t from, std::size_t to) const {
    if (!reaches(from, to)) return false;
    for (std::size_t v = to; v != from; v = links_[step(from, v).last_link].from) {
      if (links_[step(from, v).last_link].kind != LinkKind::nvlink) return false;
      if (v != to && vertex_kind(v) == VertexKind::device) return false;
    }
    return true;
  }
  VertexKind vertex_kind(std::size_t v) const {
    return v == domain_switch_ ? VertexKind::nvswitch : spec_.vertices[v].kind;
  }

  void add_cable(std::size_t a, std::size_t b, std::size_t nic, LinkKind kind,
                 BytesPerSecond bandwidth, Seconds latency, double efficiency = 1) {
    links_.push_back({a, b, nic, kind, bandwidth, latency, efficiency});
    links_.push_back({b, a, nic, kind, bandwidth, latency, efficiency});
  }

  std::size_t graph_size() const {
    return spec_.vertices.size() + (domain_switch_ == kNone ? 0 : 1);
  }

  const Step& step(std::size_t from, std::size_t to) const {
    PARTITA_ASSERT(source_row_.at(from) != kNone, fmt::format("no paths from vertex {}", from));
    return paths_[source_row_[from] * graph_size() + to];
  }

  void find_paths();

  NodeSpec spec_;
  std::vector<std::size_t> devices_, nics_;
  std::vector<LocalLink> links_;
  std::vector<char> failed_;  ///< by link; empty: none has
  std::size_t domain_switch_ = kNone;
  std::size_t first_nic_link_ = 0;
  std::vector<std::size_t> source_row_;  ///< By vertex: its row in paths_, or kNone.
  std::vector<Step> paths_;              ///< By source row, then target.
  std::vector<std::size_t> relays_;      ///< By device, then NIC; empty without PXN.
};

/// A run of equal nodes: the first number of everything it contains.
struct Group {
  std::size_t first_node = 0, count = 0;
  std::size_t first_device = 0, first_vertex = 0, first_link = 0;
  std::size_t first_domain = 0;         ///< Number of its first domain.
  std::size_t first_domain_switch = 0;  ///< Counted from the first switch outside the nodes.
  NodeTemplate node;

  std::size_t nodes_per_domain() const {
    return node.spec().domain ? static_cast<std::size_t>(node.spec().domain->nodes) : 1;
  }
  std::size_t domain_count() const { return (count + nodes_per_domain() - 1) / nodes_per_domain(); }
};

/// The group that holds number `index` of what `first` counts.
inline std::size_t group_at(const std::vector<Group>& groups, std::size_t Group::*first,
                            std::size_t index) {
  const auto after =
      std::upper_bound(groups.begin(), groups.end(), index,
                       [&](std::size_t i, const Group& group) { return i < group.*first; });
  return static_cast<std::size_t>(after - groups.begin()) - 1;
}

struct Topology::Impl {
  std::string name, place;
  std::vector<DeviceProfile> profiles;
  std::vector<Group> groups;
  Fabric fabric;
  std::size_t nodes = 0, devices = 0, used_devices = 0;
  std::size_t node_vertices = 0, node_links = 0;  ///< Sums over the nodes.
  std::size_t domain_switches = 0;
  CollectiveTable collectives;
  std::shared_ptr<const Topology> measured_on;
  bool sharp = false;
  std::vector<std::string> notes, assumed;
  std::vector<std::pair<std::string, std::string>> sources;
  /// The cluster as built, where nodes of this one have failed links inside.
  std::shared_ptr<const Impl> whole;

  /// A node: its group, and its number in it.
  struct Node {
    const Group* group;
    std::size_t index;   ///< In the cluster.
    std::size_t offset;  ///< In its group.
    const NodeTemplate& node() const { return group->node; }
    std::size_t first_link() const { return group->first_link + offset * node().links().size(); }
    std::size_t first_vertex() const {
      return group->first_vertex + offset * node().vertex_count();
    }
    std::size_t domain() const { return group->first_domain + offset / group->nodes_per_domain(); }
  };
  /// A device: its node, and its local vertex.
  struct Place {
    Node node;
    std::size_t vertex;
  };

  Node node_at(std::size_t index) const {
    PARTITA_ASSERT(index < nodes, fmt::format("node {} of {}", index, nodes));
    const Group& group = groups[group_at(groups, &Group::first_node, index)];
    return {&group, index, index - group.first_node};
  }
  Place place_of(DeviceId device) const {
    PARTITA_ASSERT(device.valid() && device.index() < devices,
                   fmt::format("device {} of {}", device.value, devices));
    const Group& group = groups[group_at(groups, &Group::first_device, device.index())];
    const std::size_t per_node = group.node.devices().size();
    const std::size_t rest = device.index() - group.first_device;
    const std::size_t offset = rest / per_node;
    return {{&group, group.first_node + offset, offset}, group.node.devices()[rest % per_node]};
  }
  /// Each named node its own group, without the named links (by local number) in its paths.
  void fail_inside(const std::map<std::size_t, std::vector<std::size_t>>& links_of_node) {
    std::vector<Group> apart;
    for (const Group& group : groups) {
      // Runs of `group`: [from, to), counted from its first node.
      std::size_t from = 0;
      const auto take = [&](std::size_t to) {
        if (to == from) return;
        Group run = group;
        run.first_node += from, run.count = to - from;
        run.first_device += from * group.node.devices().size();
        run.first_vertex += from * group.node.vertex_count();
        run.first_link += from * group.node.links().size();
        run.first_domain += from;
        apart.push_back(std::move(run));
        from = to;
      };
      for (const auto& [node, links] : links_of_node) {
        if (node < group.first_node || node >= group.first_node + group.count) continue;
        take(node - group.first_node);
        take(node - group.first_node + 1);
        apart.back().node.fail(links);
      }
      take(group.count);
    }
    groups = std::move(apart);
  }
  std::size_t first_fabric_vertex() const { return node_vertices + domain_switches; }
  std::size_t vertex_count() const { return first_fabric_vertex() + fabric.switch_count(); }
  std::size_t domain_vertex(const Node& n) const {
    return node_vertices + n.group->first_domain_switch + n.offset / n.group->nodes_per_domain();
  }

  enum class Way { none, inside, domain, fabric };
  struct Choice {
    PathCost cost{kNoPath, 0, 0};
    Way way = Way::none;
    std::size_t out_nic = 0, in_nic = 0;
    std::size_t relay = kNone;  ///< PXN: the sender's device that passes it on
    bool around = false;        ///< over the fabric, not by its rule: Crossing::around

    void offer(const Choice& other) {
      if (other.cost < cost) *this = other;
    }
  };

  /// The best way from a to b. Traffic inside a node leaves it only where nothing inside joins the
  /// two, as a PCIe path may have more links than one over the fabric. Parts inside a node come
  /// from the template's paths, which know the domain's switch; the fabric joins the NICs of at
  /// most two nodes.
  /// With `any`, the first way found.
  Choice choose(const Place& a, const Place& b, bool any = false,
                const ClusterState* state = nullptr) const {
    const auto failed = [&](const Node& node, std::size_t link) {
      if (state == nullptr || state->link_speed.empty()) return false;
      const auto it = state->link_speed.find(LinkId{node.first_link() + link});
      return it != state->link_speed.end() && it->second == 0;
    };
    const NodeTemplate& from = a.node.node();
    const NodeTemplate& to = b.node.node();
    Choice best;
    if (a.node.index == b.node.index) {
      if (from.reaches(a.vertex, b.vertex)) return {from.cost(a.vertex, b.vertex), Way::inside};
    } else if (a.node.group == b.node.group && from.domain_switch() != kNone &&
               a.node.domain() == b.node.domain()) {
      const std::size_t hub = from.domain_switch();
      if (from.reaches(a.vertex, hub) && to.reaches(hub, b.vertex))
        best.offer({from.cost(a.vertex, hub) + to.cost(hub, b.vertex), Way::domain});
    }
    if (!fabric.joins() || (any && best.way != Way::none)) return best;
    Crossing crossing = crossing_of(a, b, state);
    cross(a, b, crossing, failed, any, best);
    if (best.way == Way::fabric && !any) relay(a, b, state, failed, best);
    // What failed links leave, where the rule's ways are all cut.
    if (best.way == Way::none && state != nullptr && fabric.goes_around()) {
      crossing.around = true;
      cross(a, b, crossing, failed, any, best);
    }
    return best;
  }

  /// Offers the ways over the fabric, card by card.
  template <class Failed>
  void cross(const Place& a, const Place& b, Crossing crossing, const Failed& failed, bool any,
             Choice& best) const {
    const NodeTemplate& from = a.node.node();
    const NodeTemplate& to = b.node.node();
    std::optional<PathCost> same;  // whatever the cards
    // Of equally good NICs, each device takes the one of its own number, so that the devices of a
    // node spread over its NICs: the first offer wins a tie, and the search starts there.
    const std::size_t first_p = from.own_nic(a.vertex);
    const std::size_t first_q = to.own_nic(b.vertex);
    for (std::size_t i = 0; i < from.nics().size(); ++i) {
      const std::size_t p = (first_p + i) % from.nics().size();
      if (!from.reaches(a.vertex, from.nics()[p]) || failed(a.node, from.link_out(p))) continue;
      const PathCost out =
          from.cost(a.vertex, from.nics()[p]) + from.links()[from.link_out(p)].cost();
      if (best.cost < out) continue;
      for (std::size_t j = 0; j < to.nics().size(); ++j) {
        const std::size_t q = (first_q + j) % to.nics().size();
        if (!to.reaches(to.nics()[q], b.vertex) || failed(b.node, to.link_in(q))) continue;
        const PathCost in = to.links()[to.link_in(q)].cost() + to.cost(to.nics()[q], b.vertex);
        // What lies between makes it no better.
        if (!(out + in < best.cost)) continue;
        crossing.out = p, crossing.in = q;
        const PathCost between = same ? *same : fabric.path_cost(crossing);
        if (fabric.blind_to_cards()) same = between;
        if (between.links == kNoPath) continue;
        best.offer({out + between + in, Way::fabric, p, q, kNone, crossing.around});
        if (any) return;
      }
    }
  }

  /// PXN: what another rail's device is to have leaves by that rail, over the device of the
  /// sender's node that lives on it.
  template <class Failed>
  void relay(const Place& a, const Place& b, const ClusterState* state, const Failed& failed,
             Choice& best) const {
    const NodeTemplate& from = a.node.node();
    const NodeTemplate& to = b.node.node();
    const std::size_t rail = to.own_nic(b.vertex);
    if (rail >= from.nics().size() || from.relay(a.vertex, rail) == kNone ||
        failed(a.node, from.link_out(rail)) || failed(b.node, to.link_in(rail)) ||
        !to.reaches(to.nics()[rail], b.vertex))
      return;
    const std::size_t over = from.relay(a.vertex, rail);
    Crossing crossing = crossing_of(a, b, state);
    crossing.out = crossing.in = rail;
    const PathCost between = fabric.path_cost(crossing);
    if (between.links == kNoPath) return;
    best = {from.cost(a.vertex, over) + from.cost(over, from.nics()[rail]) +
                from.links()[from.link_out(rail)].cost() + between +
                to.links()[to.link_in(rail)].cost() + to.cost(to.nics()[rail], b.vertex),
            Way::fabric, rail, rail, over};
  }

  /// Between two devices; its cards are still to be chosen.
  Crossing crossing_of(const Place& a, const Place& b, const ClusterState* state) const {
    Crossing c;
    c.from = a.node.index, c.to = b.node.index;
    c.first = number_of(a), c.last = number_of(b);
    c.state = state, c.first_link = node_links;
    return c;
  }
  /// The device's number in the cluster.
  std::size_t number_of(const Place& p) const {
    const auto& local = p.node.node().devices();
    const auto at = std::lower_bound(local.begin(), local.end(), p.vertex) - local.begin();
    return p.node.group->first_device + p.node.offset * local.size() + static_cast<std::size_t>(at);
  }

  void check_numbers() const {
    constexpr auto most = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max());
    const std::size_t links = node_links + fabric.link_count();
    if (links > most || vertex_count() > most)
      throw InputError(place, fmt::format("{} links in {} nodes are more than {} can number; "
                                          "describe fewer nodes",
                                          links, nodes, most));
  }

  /// By its own number, whatever the placement.
  std::string device_name(DeviceId device) const {
    const Place p = place_of(device);
    return vertex_name(p.node.first_vertex() + p.vertex);
  }
  std::string vertex_name(std::size_t vertex) const {
    if (vertex < node_vertices) {
      const Group& group = groups[group_at(groups, &Group::first_vertex, vertex)];
      const std::size_t rest = vertex - group.first_vertex;
      return fmt::format("node{}.{}", group.first_node + rest / group.node.vertex_count(),
                         group.node.spec().vertices[rest % group.node.vertex_count()].name);
    }
    if (vertex < first_fabric_vertex()) return fmt::format("domain{}", vertex - node_vertices);
    return fabric.switch_name(vertex - first_fabric_vertex());
  }
};

}  // namespace partita
