#include "topologies/bisection.h"

#include <algorithm>
#include <boost/graph/adjacency_list.hpp>
#include <boost/graph/push_relabel_max_flow.hpp>
#include <cmath>
#include <map>

#include "base/hash.h"

namespace partita {

BytesPerSecond bisection(const Topology& t) {
  if (t.device_count() < 2) return BytesPerSecond{0};
  const std::size_t n = t.vertex_count();
  std::vector<std::uint64_t> colour(n, 0);
  for (std::size_t v = 0; v < n; ++v)
    colour[v] = mix(1, static_cast<std::uint64_t>(t.vertex_kind(static_cast<std::int32_t>(v))));
  const std::size_t half = t.device_count() / 2;
  for (std::size_t d = 0; d < t.device_count(); ++d)
    colour[static_cast<std::size_t>(t.vertex_of(DeviceId{d}))] = d < half ? 2 : 3;
  std::vector<std::int32_t> of(n, 0);
  std::size_t classes = number_densely(colour, of);
  for (;;) {
    for (std::size_t v = 0; v < n; ++v) colour[v] = mix(4, static_cast<std::uint64_t>(of[v]));
    std::vector<std::uint64_t> sum(n, 0);
    for (std::size_t l = 0; l < t.link_count(); ++l) {
      const Link link = t.link(LinkId{l});
      const auto rate = static_cast<std::uint64_t>(std::llround(link.bandwidth.count));
      const auto from = static_cast<std::size_t>(link.from), to = static_cast<std::size_t>(link.to);
      sum[from] += mix(mix(5, static_cast<std::uint64_t>(of[to])), rate);
      sum[to] += mix(mix(6, static_cast<std::uint64_t>(of[from])), rate);
    }
    for (std::size_t v = 0; v < n; ++v) colour[v] = mix(colour[v], sum[v]);
    const std::size_t finer = number_densely(colour, of);
    if (finer == classes) break;
    classes = finer;
  }
  std::map<std::pair<std::int32_t, std::int32_t>, std::int64_t> capacity;
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const Link link = t.link(LinkId{l});
    capacity[{of[static_cast<std::size_t>(link.from)], of[static_cast<std::size_t>(link.to)]}] +=
        std::llround(link.bandwidth.count);
  }
  using Traits = boost::adjacency_list_traits<boost::vecS, boost::vecS, boost::directedS>;
  using Graph = boost::adjacency_list<
      boost::vecS, boost::vecS, boost::directedS, boost::no_property,
      boost::property<
          boost::edge_capacity_t, std::int64_t,
          boost::property<boost::edge_residual_capacity_t, std::int64_t,
                          boost::property<boost::edge_reverse_t, Traits::edge_descriptor>>>>;
  Graph graph(classes + 2);
  const auto add = [&](std::size_t from, std::size_t to, std::int64_t rate) {
    const auto there = boost::add_edge(from, to, graph).first;
    const auto back = boost::add_edge(to, from, graph).first;
    boost::put(boost::edge_capacity, graph, there, rate);
    boost::put(boost::edge_capacity, graph, back, 0);
    boost::put(boost::edge_reverse, graph, there, back);
    boost::put(boost::edge_reverse, graph, back, there);
  };
  for (const auto& [ends, rate] : capacity) {
    if (ends.first != ends.second)
      add(static_cast<std::size_t>(ends.first), static_cast<std::size_t>(ends.second), rate);
  }
  // Devices of a half may be of several classes: one source and one sink for all.
  constexpr std::int64_t kAll = std::int64_t{1} << 60;
  std::map<std::int32_t, bool> first;
  for (std::size_t d = 0; d < t.device_count(); ++d)
    first[of[static_cast<std::size_t>(t.vertex_of(DeviceId{d}))]] = d < half;
  for (const auto& [c, source] : first) {
    if (source)
      add(classes, static_cast<std::size_t>(c), kAll);
    else
      add(static_cast<std::size_t>(c), classes + 1, kAll);
  }
  return BytesPerSecond{
      static_cast<double>(boost::push_relabel_max_flow(graph, classes, classes + 1))};
}

}  // namespace partita
