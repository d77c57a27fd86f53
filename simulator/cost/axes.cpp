#include "simulator/cost/axes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <unordered_map>

#include "base/error.h"

namespace partita {
namespace {

/// What `flows` equal flows over a link get together, beside what others send.
double left_for(double flows, const Topology& t, LinkId link) {
  const double all = t.link(link).bandwidth.count;
  const auto& busy = t.state().background;
  const auto it = busy.find(link);
  return it == busy.end() ? all : std::max(all - it->second.count, all * flows / (flows + 1));
}

}  // namespace

std::vector<AxisCrossing> axis_crossings(const Mesh& mesh, const Communication& communication) {
  const Topology& t = communication.topology();
  if (static_cast<std::size_t>(mesh.ranks()) > t.rank_count())
    throw InputError("mesh", fmt::format("it has {} ranks, {} has {} devices", mesh.ranks(),
                                         t.name(), t.device_count()));
  std::vector<AxisCrossing> all;
  for (std::size_t a = mesh.atoms.size(); a-- > 0;) {
    AxisCrossing x;
    x.name = mesh.atoms[a].name;
    x.size = mesh.atoms[a].size;
    const AtomMask mask = bit(static_cast<AtomId>(a));
    double alone = INFINITY;
    struct Load {
      double share = 0, flows = 0;
    };
    std::unordered_map<std::int32_t, Load> load;  // of all groups, per byte of a rank
    for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
      if (mesh.group_root(r, mask) != r) continue;
      const auto group = mesh.group(r, mask);
      std::set<std::size_t> nodes;
      for (const std::int64_t m : group)
        nodes.insert(t.node_of(DeviceId{static_cast<std::size_t>(m)}));
      x.nodes = std::max(x.nodes, nodes.size());
      const auto links = lay_out(t, Lay::rings, group);
      x.latency = std::max(x.latency, links.latency);
      for (const auto& [link, flows] : links.flows) {
        const double share = static_cast<double>(flows) * links.share;
        alone = std::min(alone, left_for(static_cast<double>(flows), t, link) / share);
        Load& all_groups = load[link.value];
        all_groups.share += share, all_groups.flows += static_cast<double>(flows);
      }
    }
    x.alone = BytesPerSecond{alone};
    double together = INFINITY;
    for (const auto& [id, of_link] : load) {
      const LinkId link{static_cast<std::size_t>(id)};
      const double rate = left_for(of_link.flows, t, link) / of_link.share;
      if (rate < together || (rate == together && link < x.binds)) together = rate, x.binds = link;
    }
    x.together = BytesPerSecond{together};
    all.push_back(x);
  }
  return all;
}

}  // namespace partita
