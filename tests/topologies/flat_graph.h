// The oracle for routes: the whole cluster as one list of links that have not failed, searched
// level by level, without anything of topologies/ but link().
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "topologies/topology.h"

namespace partita {

struct FlatPath {
  std::size_t links = 0;
  double bottleneck = 0;
};

class FlatGraph {
 public:
  explicit FlatGraph(const Topology& topology)
      : topology_(topology), out_(topology.vertex_count()) {
    for (std::size_t l = 0; l < topology.link_count(); ++l) {
      const Link link = topology.link(LinkId{l});
      if (link.bandwidth.count > 0) out_.at(static_cast<std::size_t>(link.from)).push_back(link);
    }
  }

  /// Fewest links, then the largest bottleneck, over the vertices that `allowed` admits.
  std::optional<FlatPath> best(DeviceId a, DeviceId b,
                               const std::function<bool(std::int32_t)>& allowed) const {
    std::map<std::int32_t, double> level{{topology_.vertex_of(a), 1e300}};
    std::vector<bool> seen(out_.size());
    const std::int32_t goal = topology_.vertex_of(b);
    for (std::size_t links = 0; !level.empty(); ++links) {
      if (const auto found = level.find(goal); found != level.end())
        return FlatPath{links, found->second};
      for (const auto& [vertex, width] : level) seen[static_cast<std::size_t>(vertex)] = true;
      std::map<std::int32_t, double> next;
      for (const auto& [vertex, width] : level) {
        for (const Link& link : out_[static_cast<std::size_t>(vertex)]) {
          if (seen[static_cast<std::size_t>(link.to)] || !allowed(link.to)) continue;
          double& widest = next[link.to];
          widest = std::max(widest, std::min(width, link.bandwidth.count));
        }
      }
      level = std::move(next);
    }
    return std::nullopt;
  }

  /// By the documented rule: no third node, and inside one node no fabric unless it must.
  std::optional<FlatPath> best(DeviceId a, DeviceId b) const {
    const std::size_t from = topology_.node_of(a);
    const std::size_t to = topology_.node_of(b);
    const std::size_t outside = topology_.node_count();
    const auto two_nodes = [&](std::int32_t v) {
      const std::size_t node = topology_.node_of_vertex(v);
      return node == from || node == to || node == outside;
    };
    if (from == to) {
      const auto inside = best(a, b, [&](std::int32_t v) {
        return two_nodes(v) && !(topology_.node_of_vertex(v) == outside &&
                                 topology_.vertex_kind(v) == VertexKind::network_switch);
      });
      if (inside) return inside;
    }
    return best(a, b, two_nodes);
  }

 private:
  const Topology& topology_;
  std::vector<std::vector<Link>> out_;
};

/// Links and bottleneck of route(a, b); throws std::logic_error if it is no path from a to b.
inline FlatPath walk(const Topology& topology, DeviceId a, DeviceId b) {
  FlatPath path{0, 1e300};
  std::int32_t at = topology.vertex_of(a);
  for (const LinkId id : topology.route(a, b)) {
    const Link link = topology.link(id);
    if (link.from != at) throw std::logic_error("broken at " + topology.link_name(id));
    at = link.to;
    ++path.links;
    path.bottleneck = std::min(path.bottleneck, link.bandwidth.count);
  }
  if (at != topology.vertex_of(b)) throw std::logic_error("ends at " + topology.vertex_name(at));
  return path;
}

/// "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu1"
inline std::string route_text(const Topology& topology, std::size_t a, std::size_t b) {
  std::string text;
  for (const LinkId id : topology.route(DeviceId{a}, DeviceId{b}))
    text += (text.empty() ? "" : " ") + topology.link_name(id);
  return text;
}

}  // namespace partita
