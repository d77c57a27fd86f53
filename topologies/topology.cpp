#include "topologies/topology.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/graph/adjacency_list.hpp>
#include <boost/graph/dijkstra_shortest_paths.hpp>
#include <boost/property_map/function_property_map.hpp>
#include <cstdio>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <tuple>

#include "base/error.h"
#include "base/hash.h"
#include "base/unit_text.h"
#include "topologies/cluster.h"
#include "topologies/impl.h"

namespace partita {

std::string_view name(VertexKind kind) {
  switch (kind) {
    case VertexKind::device:
      return "device";
    case VertexKind::cpu:
      return "cpu";
    case VertexKind::pcie_switch:
      return "pcie switch";
    case VertexKind::nvswitch:
      return "nvswitch";
    case VertexKind::nic:
      return "nic";
    case VertexKind::network_switch:
      return "network switch";
  }
  PARTITA_ASSERT(false, fmt::format("vertex kind {}", static_cast<int>(kind)));
}

std::string_view name(LinkKind kind) {
  switch (kind) {
    case LinkKind::nvlink:
      return "nvlink";
    case LinkKind::pcie:
      return "pcie";
    case LinkKind::c2c:
      return "c2c";
    case LinkKind::cpu_interconnect:
      return "cpu interconnect";
    case LinkKind::network:
      return "network";
    case LinkKind::other:
      return "other";
  }
  PARTITA_ASSERT(false, fmt::format("link kind {}", static_cast<int>(kind)));
}

void NodeTemplate::find_paths() {
  using Graph = boost::adjacency_list<boost::vecS, boost::vecS, boost::directedS,
                                      boost::no_property, std::size_t>;
  Graph graph(graph_size());
  for (std::size_t l = 0; l < first_nic_link_; ++l) {
    if (failed_.empty() || !failed_[l]) boost::add_edge(links_[l].from, links_[l].to, l, graph);
  }

  struct Recorder : boost::default_dijkstra_visitor {
    explicit Recorder(std::vector<std::size_t>* last) : last_link(last) {}
    void edge_relaxed(const Graph::edge_descriptor& e, const Graph& g) {
      (*last_link)[boost::target(e, g)] = g[e];
    }
    std::vector<std::size_t>* last_link;
  };

  std::vector<std::size_t> sources = devices_;
  sources.insert(sources.end(), nics_.begin(), nics_.end());
  if (domain_switch_ != kNone) sources.push_back(domain_switch_);
  source_row_.assign(graph_size(), kNone);
  paths_.reserve(sources.size() * graph_size());
  for (std::size_t row = 0; row < sources.size(); ++row) {
    source_row_[sources[row]] = row;
    std::vector<PathCost> cost(graph_size());
    std::vector<std::size_t> last_link(graph_size(), kNone);
    const auto weight = boost::make_function_property_map<Graph::edge_descriptor>(
        [&](const Graph::edge_descriptor& e) { return links_[graph[e]].cost(); });
    boost::dijkstra_shortest_paths(
        graph, sources[row],
        boost::distance_map(
            boost::make_iterator_property_map(cost.begin(), get(boost::vertex_index, graph)))
            .weight_map(weight)
            .distance_compare(std::less<PathCost>{})
            .distance_combine(std::plus<PathCost>{})
            .distance_inf(PathCost{kNoPath, 0, 0})
            .distance_zero(PathCost{})
            .visitor(Recorder(&last_link)));
    for (std::size_t v = 0; v < graph_size(); ++v) paths_.push_back({cost[v], last_link[v]});
  }
}

Topology::Topology(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

const ClusterState& Topology::state() const {
  static const ClusterState as_filed;
  return state_ == nullptr ? as_filed : *state_;
}

DeviceId Topology::physical(DeviceId device) const {
  if (state_ == nullptr || (state_->placement.empty() && state_->ranks_per_device == 1))
    return device;
  PARTITA_ASSERT(device.valid(), "no device");
  std::size_t seat = device.index();
  if (seat < state_->placement.size()) seat = static_cast<std::size_t>(state_->placement[seat]);
  return DeviceId{seat / static_cast<std::size_t>(state_->ranks_per_device)};
}

Topology Topology::in_state(ClusterState state) const {
  std::vector<char> taken(state.placement.size(), 0);
  for (std::size_t r = 0; r < state.placement.size(); ++r) {
    const std::int32_t d = state.placement[r];
    if (d < 0 || static_cast<std::size_t>(d) >= taken.size() || taken[static_cast<std::size_t>(d)])
      throw InputError("placement",
                       fmt::format("rank {} is placed on device {}; a placement of {} ranks names "
                                   "each of the first {} devices once",
                                   r, d, taken.size(), taken.size()));
    taken[static_cast<std::size_t>(d)] = 1;
  }
  PARTITA_ASSERT(state.ranks_per_device >= 1, "a device without ranks");
  const std::size_t seats = device_count() * static_cast<std::size_t>(state.ranks_per_device);
  if (state.placement.size() > seats)
    throw InputError("placement", fmt::format("{} ranks are placed on {} devices",
                                              state.placement.size(), device_count()));
  Topology changed(impl_->whole ? impl_->whole : impl_);
  changed.state_ = std::make_shared<const ClusterState>(std::move(state));
  changed.leave_out_failed();
  changed.check_joined();
  return changed;
}

/// Nodes with failed links inside get paths of their own.
void Topology::leave_out_failed() {
  std::map<std::size_t, std::vector<std::size_t>> links_of_node;
  for (const auto& [link, speed] : state_->link_speed) {
    if (speed > 0 || link.index() >= impl_->node_links) continue;
    const Link built = as_built(link);
    if (std::max(built.from, built.to) >= static_cast<std::int32_t>(impl_->first_fabric_vertex()))
      continue;
    const auto n = impl_->node_at(node_of_vertex(std::min(built.from, built.to)));
    if (n.node().domain_switch() != kNone)
      throw InputError("link " + link_name(link),
                       "routes inside a node of a domain don't go around a failed link; --degrade "
                       "makes it slow");
    links_of_node[n.index].push_back(link.index() - n.first_link());
  }
  if (links_of_node.empty()) return;
  auto without = std::make_shared<Impl>(*impl_);
  without->whole = impl_;
  without->fail_inside(links_of_node);
  impl_ = std::move(without);
  for (const auto& [node, links] : links_of_node) {
    const LinkId link{impl_->node_at(node).first_link() + links.front()};
    for (std::size_t a = 0; a < device_count(node); ++a) {
      for (std::size_t b = 0; b < device_count(node); ++b) {
        const std::size_t first = first_device(node).index();
        if (a != b) check_pair(DeviceId{first + a}, DeviceId{first + b}, link);
      }
    }
    if (node_count() > 1) check_from(node, link);
  }
}

/// InputError where failed links leave a device without a way to others.
void Topology::check_joined() const {
  if (impl_->nodes < 2) return;
  const Fabric& fabric = impl_->fabric;
  std::vector<LinkId> between;  // switches
  for (const auto& [link, speed] : state_->link_speed) {
    if (speed == 0 && link.index() >= impl_->node_links) between.push_back(link);
  }
  if (fabric.goes_around() && !between.empty()) {
    Crossing crossing;
    crossing.state = state_.get(), crossing.first_link = impl_->node_links;
    if (const auto cut = fabric.cut_off(impl_->nodes, crossing)) {
      constexpr std::size_t kNamed = 4;
      std::vector<std::string> names;
      for (std::size_t k = 0; k < std::min(kNamed, between.size()); ++k)
        names.push_back(link_name(between[k]));
      if (between.size() > kNamed) names.push_back(fmt::format("{} more", between.size() - kNamed));
      throw InputError(
          fmt::format("{} {}", between.size() == 1 ? "link" : "links", fmt::join(names, ", ")),
          fmt::format("without {} {} cannot reach {}", between.size() == 1 ? "it" : "them",
                      impl_->device_name(first_device(cut->from)),
                      impl_->device_name(first_device(cut->to))));
    }
  }
  for (const auto& [link, speed] : state_->link_speed) {
    if (speed > 0) continue;
    const Link built = as_built(link);
    if (link.index() < impl_->node_links) {
      check_from(std::min(node_of_vertex(built.from), node_of_vertex(built.to)), link);
    } else if (!fabric.goes_around()) {
      check_around(link);
    } else if (!fabric.blind_to_cards()) {
      // A router to a node, and a card sends in one direction only.
      for (const std::int32_t router : {built.from, built.to})
        check_from(static_cast<std::size_t>(router) - impl_->first_fabric_vertex(), link);
    }
  }
}

/// Has each device of this node still a way out of it, and back? One other node speaks for all,
/// but where cards send in one direction only.
void Topology::check_from(std::size_t node, LinkId link) const {
  const bool each = impl_->fabric.goes_around() && !impl_->fabric.blind_to_cards();
  for (std::size_t d = 0; d < device_count(node); ++d) {
    const DeviceId here{first_device(node).index() + d};
    for (std::size_t other = 0; other < (each ? node_count() : std::size_t{2}); ++other) {
      if (other == node) continue;
      check_pair(here, first_device(other), link);
      if (!each) break;
    }
  }
}

/// InputError if one of two devices, by their own numbers, cannot reach the other.
void Topology::check_pair(DeviceId here, DeviceId there, LinkId link) const {
  for (const auto& [a, b] : {std::pair{here, there}, std::pair{there, here}}) {
    if (impl_->choose(impl_->place_of(a), impl_->place_of(b), true, state_.get()).way ==
        Impl::Way::none)
      throw InputError("link " + link_name(link),
                       fmt::format("without it {} cannot reach {}", impl_->device_name(a),
                                   impl_->device_name(b)));
  }
}

/// A link between leaf and spine has failed: is there another way for every pair that may have used
/// it?
void Topology::check_around(LinkId link) const {
  const SwitchTree& tree = *impl_->fabric.tree();
  const std::size_t leaf = (link.index() - impl_->node_links) / 2 / tree.tops();
  const std::size_t unit = leaf / tree.leaves_per_unit, per_leaf = tree.nodes_per_leaf;
  for (std::size_t d = 0; d < device_count(unit * per_leaf); ++d) {
    const DeviceId here{first_device(unit * per_leaf).index() + d};
    for (std::size_t first = 0; first < node_count(); first += per_leaf) {
      const std::size_t node = first == unit * per_leaf ? first + 1 : first;
      for (std::size_t e = 0; node < node_count() && e < device_count(node); ++e)
        check_pair(here, DeviceId{first_device(node).index() + e}, link);
    }
  }
}

std::size_t Topology::local_index(DeviceId device) const {
  const DeviceId d = physical(device);
  return d.index() - first_device(impl_->place_of(d).node.index).index();
}

bool Topology::goes_around() const {
  if (!impl_->fabric.goes_around()) return false;
  return std::any_of(state().link_speed.begin(), state().link_speed.end(), [&](const auto& link) {
    return link.second == 0 && link.first.index() >= impl_->node_links;
  });
}

double Topology::speed(DeviceId device) const {
  if (state_ == nullptr) return 1;
  const auto it = state_->device_speed.find(physical(device));
  return it == state_->device_speed.end() ? 1 : it->second;
}

DeviceId Topology::find_device(const std::string& name, const std::string& place) const {
  std::size_t node = 0;
  char dot = 0;
  if (std::sscanf(name.c_str(), "node%zu%c", &node, &dot) == 2 && dot == '.' &&
      node < node_count()) {
    const std::size_t first = first_device(node).index();
    for (std::size_t d = first; d < first + device_count(node); ++d) {
      const auto built = impl_->place_of(DeviceId{d});
      if (impl_->vertex_name(built.node.first_vertex() + built.vertex) == name) return DeviceId{d};
    }
  }
  const auto last = impl_->place_of(DeviceId{device_count() - 1});
  throw InputError(
      place,
      fmt::format("'{}' is no device of {}; they are {} to {}", name, this->name(),
                  impl_->vertex_name(impl_->place_of(DeviceId{std::size_t{0}}).node.first_vertex() +
                                     impl_->place_of(DeviceId{std::size_t{0}}).vertex),
                  impl_->vertex_name(last.node.first_vertex() + last.vertex)));
}

LinkId Topology::find_link(const std::string& name, const std::string& place) const {
  // Links of a node lie together; the others are the fabric's.
  std::size_t begin = impl_->node_links, end = link_count(), node = 0;
  char dot = 0;
  const auto arrow = name.find("->");
  for (const std::string& part :
       {name, arrow == std::string::npos ? std::string{} : name.substr(arrow + 2)}) {
    if (std::sscanf(part.c_str(), "node%zu%c", &node, &dot) != 2 || dot != '.' ||
        node >= node_count())
      continue;
    const auto n = impl_->node_at(node);
    begin = n.first_link(), end = begin + n.node().links().size();
    break;
  }
  std::string some;
  for (std::size_t l = begin; l < end; ++l) {
    const std::string one = link_name(LinkId{l});
    if (one == name) return LinkId{l};
    // Those that share an end with the name are what was meant, perhaps.
    const bool shares = arrow != std::string::npos && one.compare(0, arrow, name, 0, arrow) == 0;
    if (shares && some.size() < 120) some += (some.empty() ? "" : ", ") + one;
  }
  throw InputError(
      place,
      fmt::format("'{}' is no link of {}; {}", name, this->name(),
                  some.empty() ? "links are named like " + link_name(LinkId{std::size_t{0}}) +
                                     " (partita topo --route A B lists a route's)"
                               : "from there: " + some));
}

const std::string& Topology::name() const { return impl_->name; }
std::size_t Topology::device_count() const { return impl_->devices; }
std::size_t Topology::used_devices() const { return impl_->used_devices; }
std::size_t Topology::rank_count() const {
  return device_count() * static_cast<std::size_t>(state().ranks_per_device);
}
std::size_t Topology::used_ranks() const {
  return used_devices() * static_cast<std::size_t>(state().ranks_per_device);
}
std::size_t Topology::rank_count(std::size_t node) const {
  return device_count(node) * static_cast<std::size_t>(state().ranks_per_device);
}
bool Topology::same_device(DeviceId a, DeviceId b) const { return physical(a) == physical(b); }
bool Topology::in_turns() const { return state().ranks_per_device > 1 && !state().mps; }
std::size_t Topology::node_count() const { return impl_->nodes; }
std::size_t Topology::node_of(DeviceId device) const {
  return impl_->place_of(physical(device)).node.index;
}

std::size_t Topology::profile_index(DeviceId device) const {
  const auto place = impl_->place_of(physical(device));
  return place.node.node().spec().vertices[place.vertex].profile;
}
const DeviceProfile& Topology::device(DeviceId device) const {
  return impl_->profiles[profile_index(device)];
}
std::size_t Topology::profile_count() const { return impl_->profiles.size(); }
const DeviceProfile& Topology::profile(std::size_t index) const {
  return impl_->profiles.at(index);
}

DeviceId Topology::first_device(std::size_t node) const {
  const auto n = impl_->node_at(node);
  return DeviceId{n.group->first_device + n.offset * n.node().devices().size()};
}
std::size_t Topology::device_count(std::size_t node) const {
  return impl_->node_at(node).node().devices().size();
}
const std::string& Topology::cpu_vendor(std::size_t node) const {
  return impl_->node_at(node).node().spec().cpu_vendor;
}
Bytes Topology::host_memory(std::size_t node) const {
  return impl_->node_at(node).node().spec().host_memory;
}

BytesPerSecond Topology::host_memory_bandwidth(std::size_t node) const {
  return impl_->node_at(node).node().spec().host_memory_bandwidth;
}
double Topology::launch_time(std::size_t node) const {
  return impl_->node_at(node).node().spec().launch_time;
}
BytesPerSecond Topology::storage_bandwidth(std::size_t node) const {
  return impl_->node_at(node).node().spec().storage_bandwidth;
}
std::size_t Topology::nic_count(std::size_t node) const {
  return impl_->node_at(node).node().nics().size();
}
std::size_t Topology::domain_of(std::size_t node) const { return impl_->node_at(node).domain(); }
std::size_t Topology::group_of(std::size_t node) const {
  return static_cast<std::size_t>(impl_->node_at(node).group - impl_->groups.data());
}
std::size_t Topology::unit_of(std::size_t node) const {
  const SwitchTree* tree = impl_->fabric.tree();
  return tree == nullptr || !impl_->fabric.joins() ? 0 : node / tree->nodes_per_leaf;
}
std::uint64_t Topology::offset_of(std::size_t node, std::size_t origin) const {
  return mix(static_cast<std::uint64_t>(group_of(node)), impl_->fabric.offset_of(node, origin));
}
std::size_t Topology::spines() const {
  const SwitchTree* tree = impl_->fabric.tree();
  return tree == nullptr || !tree->core ? 0 : tree->spines;
}
SpineRouting Topology::routing() const {
  const SwitchTree* tree = impl_->fabric.tree();
  return tree == nullptr ? SpineRouting{} : tree->routing;
}

Topology Topology::with_routing(SpineRouting routing, const std::string& place) const {
  PARTITA_ASSERT(state_ == nullptr, "links have other numbers afterwards: routing comes first");
  auto impl = std::make_shared<Impl>(*impl_);
  auto* tree = std::get_if<SwitchTree>(&impl->fabric.kind);
  if (routing.ecmp && (tree == nullptr || tree->spines < 2))
    throw InputError(place, fmt::format("the fabric of {} has no spines to choose from; ecmp needs "
                                        "kind: rails or fat tree with spines: 2 or more",
                                        name()));
  if (tree != nullptr) tree->routing = routing;
  impl->check_numbers();
  return Topology(std::move(impl));
}

Topology Topology::with_kernels(const KernelTable& kernels) const {
  auto impl = std::make_shared<Impl>(*impl_);
  for (DeviceProfile& d : impl->profiles) {
    for (const auto& [kernel, points] : kernels) d.kernels[kernel] = points;
  }
  Topology t(std::move(impl));
  t.state_ = state_;
  return t;
}

std::vector<LinkId> Topology::route(DeviceId a, DeviceId b) const {
  std::vector<LinkId> out;
  if (a == b) return out;
  if (same_device(a, b)) {
    const LinkId up = host_link(a, true), down = host_link(a, false);
    if (up.valid() && down.valid()) out = {up, down};
    return out;
  }
  const auto from = impl_->place_of(physical(a));
  const auto to = impl_->place_of(physical(b));
  const auto choice = impl_->choose(from, to, false, state_.get());
  if (choice.way == Impl::Way::none && state_ != nullptr)
    throw InputError("links", fmt::format("without those that have failed {} cannot reach {}",
                                          device_name(a), device_name(b)));
  PARTITA_ASSERT(choice.way != Impl::Way::none, "no route: connectivity was checked on loading");
  out.reserve(static_cast<std::size_t>(choice.cost.links));
  const NodeTemplate& here = from.node.node();
  const NodeTemplate& there = to.node.node();
  switch (choice.way) {
    case Impl::Way::none:
    case Impl::Way::inside:
      here.append_path(from.vertex, to.vertex, from.node.first_link(), out);
      break;
    case Impl::Way::domain:
      here.append_path(from.vertex, here.domain_switch(), from.node.first_link(), out);
      there.append_path(there.domain_switch(), to.vertex, to.node.first_link(), out);
      break;
    case Impl::Way::fabric: {
      const std::size_t p = choice.out_nic;
      const std::size_t q = choice.in_nic;
      std::size_t sender = from.vertex;
      if (choice.relay != kNone) {
        here.append_path(sender, choice.relay, from.node.first_link(), out);
        sender = choice.relay;
      }
      here.append_path(sender, here.nics()[p], from.node.first_link(), out);
      out.emplace_back(from.node.first_link() + here.link_out(p));
      Crossing crossing = impl_->crossing_of(from, to, state_.get());
      crossing.out = p, crossing.in = q, crossing.around = choice.around;
      impl_->fabric.append_path(crossing, out);
      out.emplace_back(to.node.first_link() + there.link_in(q));
      there.append_path(there.nics()[q], to.vertex, to.node.first_link(), out);
      break;
    }
  }
  return out;
}

std::size_t Topology::link_count() const { return impl_->node_links + impl_->fabric.link_count(); }

std::vector<LinkId> Topology::links_of(DeviceId device) const {
  const auto place = impl_->place_of(physical(device));
  const auto& links = place.node.node().links();
  std::vector<LinkId> all;
  for (std::size_t l = 0; l < links.size(); ++l) {
    if (links[l].from == place.vertex || links[l].to == place.vertex)
      all.emplace_back(place.node.first_link() + l);
  }
  return all;
}

std::size_t Topology::node_of_link(LinkId id) const {
  const Link l = as_built(id);
  return std::min(node_of_vertex(l.from), node_of_vertex(l.to));
}

LinkId Topology::host_link(DeviceId device, bool towards_host) const {
  LinkId best;
  for (const LinkId l : links_of(device)) {
    const Link one = link(l);
    if (one.kind != LinkKind::pcie && one.kind != LinkKind::c2c) continue;
    if ((one.from == vertex_of(device)) != towards_host) continue;
    if (!best.valid() || one.bandwidth > link(best).bandwidth) best = l;
  }
  return best;
}

std::vector<LinkId> Topology::host_route(DeviceId device, bool towards_host) const {
  std::vector<LinkId> route;
  const LinkId first = host_link(device, towards_host);
  if (!first.valid()) return route;
  route.push_back(first);
  const auto place = impl_->place_of(physical(device));
  const auto& links = place.node.node().links();
  // Behind each link the fastest one that leads on, by the fewest of them to a processor.
  const auto far_end = [&](const Link& l) { return towards_host ? l.to : l.from; };
  std::map<std::int32_t, std::pair<std::size_t, std::int32_t>>
      came;  // vertex: by link, from vertex
  std::deque<std::int32_t> open{far_end(as_built(first))};
  const std::int32_t begin = open.front();
  const auto is_cpu = [&](std::int32_t v) { return vertex_kind(v) == VertexKind::cpu; };
  std::int32_t end = is_cpu(begin) ? begin : -1;
  while (end < 0 && !open.empty()) {
    const std::int32_t v = open.front();
    open.pop_front();
    for (std::size_t l = 0; l < links.size(); ++l) {
      const Link one = as_built(LinkId{place.node.first_link() + l});
      if (one.kind != LinkKind::pcie && one.kind != LinkKind::c2c) continue;
      const std::int32_t near = towards_host ? one.from : one.to, to = far_end(one);
      if (near != v || to == begin || came.contains(to)) continue;
      const VertexKind kind = vertex_kind(to);
      if (kind != VertexKind::cpu && kind != VertexKind::pcie_switch) continue;
      came[to] = {place.node.first_link() + l, v};
      if (kind == VertexKind::cpu) {
        end = to;
        break;
      }
      open.push_back(to);
    }
  }
  std::vector<LinkId> rest;
  for (std::int32_t v = end; v >= 0 && v != begin; v = came.at(v).second)
    rest.emplace_back(came.at(v).first);
  route.insert(route.end(), rest.rbegin(), rest.rend());
  if (!towards_host) std::reverse(route.begin(), route.end());
  return route;
}

std::pair<BytesPerSecond, Seconds> Topology::host_way(DeviceId device, bool towards_host) const {
  std::pair<BytesPerSecond, Seconds> way;
  for (const LinkId l : host_route(device, towards_host)) {
    const Link one = link(l);
    if (!(way.first.count > 0) || one.bandwidth < way.first) way.first = one.bandwidth;
    way.second += one.latency;
  }
  return way;
}

Link Topology::link(LinkId id) const {
  Link found = as_built(id);
  if (state_ != nullptr) {
    if (const auto it = state_->link_speed.find(id); it != state_->link_speed.end())
      found.bandwidth.count *= it->second;
  }
  return found;
}

Link Topology::as_built(LinkId link) const {
  PARTITA_ASSERT(link.valid() && link.index() < link_count(),
                 fmt::format("link {} of {}", link.value, link_count()));
  if (link.index() >= impl_->node_links) {
    Link found = impl_->fabric.link(link.index() - impl_->node_links);
    const auto first = static_cast<std::int32_t>(impl_->first_fabric_vertex());
    found.from += first;
    found.to += first;
    return found;
  }
  const Group& group = impl_->groups[group_at(impl_->groups, &Group::first_link, link.index())];
  const std::size_t per_node = group.node.links().size();
  const std::size_t rest = link.index() - group.first_link;
  const Impl::Node node{&group, group.first_node + rest / per_node, rest / per_node};
  const LocalLink& local = group.node.links()[rest % per_node];
  const auto global = [&](std::size_t vertex) {
    std::size_t found = node.first_vertex() + vertex;
    if (vertex == kNone)
      found = impl_->first_fabric_vertex() + impl_->fabric.switch_of(node.index, local.nic);
    else if (vertex == group.node.domain_switch())
      found = impl_->domain_vertex(node);
    return static_cast<std::int32_t>(found);
  };
  return {global(local.from), global(local.to), local.kind,
          local.bandwidth,    local.latency,    local.efficiency};
}

std::string Topology::link_name(LinkId id) const {
  const Link found = link(id);
  return vertex_name(found.from) + "->" + vertex_name(found.to);
}

std::size_t Topology::vertex_count() const { return impl_->vertex_count(); }

VertexKind Topology::vertex_kind(std::int32_t vertex) const {
  const auto v = static_cast<std::size_t>(vertex);
  PARTITA_ASSERT(vertex >= 0 && v < vertex_count(), fmt::format("vertex {}", vertex));
  if (v >= impl_->first_fabric_vertex()) return VertexKind::network_switch;
  if (v >= impl_->node_vertices) return VertexKind::nvswitch;
  const Group& group = impl_->groups[group_at(impl_->groups, &Group::first_vertex, v)];
  return group.node.spec().vertices[(v - group.first_vertex) % group.node.vertex_count()].kind;
}

std::string Topology::vertex_name(std::int32_t vertex) const {
  const auto v = static_cast<std::size_t>(vertex);
  PARTITA_ASSERT(vertex >= 0 && v < vertex_count(), fmt::format("vertex {}", vertex));
  return impl_->vertex_name(v);
}

std::int32_t Topology::vertex_of(DeviceId device) const {
  const auto place = impl_->place_of(physical(device));
  return static_cast<std::int32_t>(place.node.first_vertex() + place.vertex);
}
std::string Topology::device_name(DeviceId device) const { return vertex_name(vertex_of(device)); }

std::size_t Topology::node_of_vertex(std::int32_t vertex) const {
  const auto v = static_cast<std::size_t>(vertex);
  if (v >= impl_->node_vertices) return node_count();
  const Group& group = impl_->groups[group_at(impl_->groups, &Group::first_vertex, v)];
  return group.first_node + (v - group.first_vertex) / group.node.vertex_count();
}

const CollectiveTable& Topology::collectives() const { return impl_->collectives; }
const Topology* Topology::measured_on() const { return impl_->measured_on.get(); }
bool Topology::sharp() const { return impl_->sharp; }
const std::vector<std::string>& Topology::notes() const { return impl_->notes; }

const std::vector<std::string>& Topology::assumed() const { return impl_->assumed; }
const std::vector<std::pair<std::string, std::string>>& Topology::sources() const {
  return impl_->sources;
}

std::size_t Topology::stored_vertices() const {
  const SwitchTree* tree = impl_->fabric.tree();
  std::size_t total = tree == nullptr ? 0 : tree->uplink.size();
  for (const auto& group : impl_->groups)
    total += group.node.vertex_count() + group.node.links().size() + group.node.path_count();
  return total;
}

namespace {

void check_groups(const ClusterSpec& spec) {
  if (spec.groups.empty())
    throw InputError(spec.place, "a cluster needs at least one group of nodes; none is given");
  std::int64_t nodes = 0;
  for (const auto& group : spec.groups) {
    if (group.count < 1 || group.count > kMostNodes)
      throw InputError(group.place, fmt::format("a group needs 1 to {} nodes; {} are given",
                                                grouped(kMostNodes), group.count));
    nodes += group.count;
    const bool has_device =
        std::any_of(group.vertices.begin(), group.vertices.end(),
                    [](const VertexSpec& v) { return v.kind == VertexKind::device; });
    if (!has_device)
      throw InputError(group.place,
                       "a node needs at least one device; add a vertex with kind: device");
    if (group.domain && group.domain->nodes < 1)
      throw InputError(group.place, fmt::format("a domain needs at least 1 node; {} are given",
                                                group.domain->nodes));
  }
  if (nodes > kMostNodes)
    throw InputError(spec.place, fmt::format("a cluster has at most {} nodes; {} are given",
                                             grouped(kMostNodes), grouped(nodes)));
}

/// The bandwidth that one full leaf offers its nodes: the widest group's NICs on leaf `position` of
/// a unit, for each node under it. Full, so that a half-empty leaf keeps its cabling.
BytesPerSecond ports_below(const std::vector<Group>& groups, const SwitchTree& tree,
                           std::size_t position) {
  BytesPerSecond widest;
  for (const auto& group : groups) {
    BytesPerSecond sum;
    for (std::size_t nic = 0; nic < group.node.nics().size(); ++nic)
      if (tree.leaves_per_unit == 1 || nic == position)
        sum += group.node.spec().vertices[group.node.nics()[nic]].port_bandwidth;
    widest = std::max(widest, sum);
  }
  return static_cast<double>(tree.nodes_per_leaf) * widest;
}

SwitchTree tree_of(const FabricSpec& spec, const std::vector<Group>& groups, std::size_t nodes,
                   std::size_t most_nics) {
  SwitchTree tree;
  const auto above = [&](const Uplinks& up) {
    tree.uplink_latency = up.latency;
    tree.spines = static_cast<std::size_t>(up.spines);
    tree.routing = up.routing;
    for (std::size_t leaf = 0; leaf < tree.leaves_per_unit; ++leaf)
      tree.uplink.push_back(up.rate ? *up.rate
                                    : (1 / up.oversubscription) * ports_below(groups, tree, leaf));
  };
  if (const auto* fat = std::get_if<FatTree>(&spec)) {
    tree.nodes_per_leaf = static_cast<std::size_t>(fat->nodes_per_leaf);
    tree.core = true;
    above(fat->uplinks);
  } else if (const auto* rails = std::get_if<Rails>(&spec)) {
    tree.nodes_per_leaf =
        rails->nodes_per_leaf == 0 ? nodes : static_cast<std::size_t>(rails->nodes_per_leaf);
    tree.leaves_per_unit = most_nics;
    tree.core = rails->spine;
    if (tree.core) above(rails->uplinks);
  } else {
    tree.nodes_per_leaf = nodes;
  }
  tree.leaf_count = (nodes + tree.nodes_per_leaf - 1) / tree.nodes_per_leaf * tree.leaves_per_unit;
  tree.core = tree.core && tree.leaf_count > 1;
  return tree;
}

Torus torus_of(const TorusSpec& spec, const std::vector<Group>& groups, std::size_t nodes) {
  Torus torus;
  for (const std::int64_t side : spec.size) torus.sides.push_back(static_cast<std::size_t>(side));
  torus.bandwidth = spec.bandwidth;
  torus.latency = spec.latency;
  torus.by_direction = spec.by_direction;
  if (torus.nodes() != nodes)
    throw InputError(spec.place,
                     fmt::format("a torus of {} has {} nodes, {} are described; every place needs "
                                 "one: change size, or the nodes' count",
                                 fmt::join(spec.size, " x "), torus.nodes(), nodes));
  for (const Group& group : groups) {
    if (!spec.by_direction || group.node.nics().size() == 2 * spec.size.size()) continue;
    throw InputError(group.node.spec().place,
                     fmt::format("nics: direction needs {} NICs on a node, two for each dimension "
                                 "of the torus; this one has {}",
                                 2 * spec.size.size(), group.node.nics().size()));
  }
  return torus;
}

Dragonfly dragonfly_of(const DragonflySpec& spec, std::size_t nodes) {
  Dragonfly fly;
  fly.groups = static_cast<std::size_t>(spec.groups);
  fly.routers = static_cast<std::size_t>(spec.routers);
  fly.nodes_per_router = static_cast<std::size_t>(spec.nodes_per_router);
  fly.global_links = static_cast<std::size_t>(spec.global_links);
  fly.local_bandwidth = spec.local_bandwidth;
  fly.global_bandwidth = spec.global_bandwidth;
  fly.local_latency = spec.local_latency;
  fly.global_latency = spec.global_latency;
  if (const std::size_t places = fly.switch_count() * fly.nodes_per_router; nodes > places)
    throw InputError(
        spec.place,
        fmt::format("{} groups of {} routers with {} nodes each have room for {} nodes; {} are "
                    "described: change groups, or the nodes' count",
                    spec.groups, spec.routers, spec.nodes_per_router, places, nodes));
  return fly;
}

Fabric build_fabric(const FabricSpec& spec, const std::vector<Group>& groups, std::size_t nodes,
                    const std::string& place) {
  std::size_t most_nics = 0;
  for (const auto& group : groups) most_nics = std::max(most_nics, group.node.nics().size());
  if (std::holds_alternative<NoFabric>(spec)) return {};
  if (most_nics == 0) {
    if (nodes == 1) return {};
    throw InputError(place,
                     "a fabric joins NICs, and no node has one; add vertices with kind: nic");
  }
  if (const auto* torus = std::get_if<TorusSpec>(&spec)) return {torus_of(*torus, groups, nodes)};
  if (const auto* fly = std::get_if<DragonflySpec>(&spec)) return {dragonfly_of(*fly, nodes)};
  return {tree_of(spec, groups, nodes, most_nics)};
}

/// Devices of the first, second and last nodes of the groups, one of each part of a node that is
/// joined inside. Fabrics and domains are regular, so what joins these joins all.
void check_connected(const Topology& topology, const Topology::Impl& impl) {
  std::vector<DeviceId> devices;
  for (const auto& group : impl.groups) {
    const auto& local = group.node.devices();
    std::vector<std::size_t> parts;
    for (std::size_t d = 0; d < local.size(); ++d)
      if (std::none_of(parts.begin(), parts.end(), [&](std::size_t other) {
            return group.node.reaches(local[other], local[d]);
          }))
        parts.push_back(d);
    for (const std::size_t offset :
         std::set<std::size_t>{0, std::min<std::size_t>(1, group.count - 1), group.count - 1})
      for (const std::size_t part : parts)
        devices.emplace_back(group.first_device + offset * local.size() + part);
  }
  for (const DeviceId a : devices) {
    for (const DeviceId b : devices) {
      if (b <= a) continue;
      if (impl.choose(impl.place_of(a), impl.place_of(b), true).way != Topology::Impl::Way::none)
        continue;
      throw InputError(
          impl.place,
          fmt::format("no route joins {} and {}; link them inside the node, or give both nodes "
                      "NICs and the cluster a fabric",
                      topology.device_name(a), topology.device_name(b)));
    }
  }
}

}  // namespace

Topology build_topology(ClusterSpec spec) {
  check_groups(spec);
  auto impl = std::make_shared<Topology::Impl>();
  impl->name = spec.name;
  impl->place = spec.place;
  impl->profiles = std::move(spec.profiles);
  impl->collectives = std::move(spec.collectives);
  impl->measured_on = std::move(spec.measured_on);
  impl->sharp = spec.sharp;
  impl->notes = std::move(spec.notes);
  impl->assumed = std::move(spec.assumed);
  impl->sources = std::move(spec.sources);
  std::size_t domains = 0;
  for (const auto& group_spec : spec.groups) {
    const bool has_fabric = !std::holds_alternative<NoFabric>(spec.fabric);
    Group group{.node = NodeTemplate(group_spec, has_fabric)};
    group.count = static_cast<std::size_t>(group_spec.count);
    group.first_node = impl->nodes;
    group.first_device = impl->devices;
    group.first_vertex = impl->node_vertices;
    group.first_link = impl->node_links;
    group.first_domain = domains;
    group.first_domain_switch = impl->domain_switches;
    impl->nodes += group.count;
    impl->devices += group.count * group.node.devices().size();
    impl->node_vertices += group.count * group.node.vertex_count();
    impl->node_links += group.count * group.node.links().size();
    domains += group.domain_count();
    if (group_spec.domain) impl->domain_switches += group.domain_count();
    impl->groups.push_back(std::move(group));
  }
  impl->fabric = build_fabric(spec.fabric, impl->groups, impl->nodes, spec.place);
  if (const auto* rails = std::get_if<Rails>(&spec.fabric); rails != nullptr && rails->pxn) {
    for (Group& group : impl->groups) group.node.find_relays();
  }
  impl->check_numbers();
  impl->used_devices = spec.used_devices == 0 ? impl->devices : spec.used_devices;
  Topology topology(impl);
  check_connected(topology, *impl);
  return topology;
}

}  // namespace partita
