#include "simulator/engine/collectives.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>

#include "base/error.h"
#include "base/unit_text.h"
#include "simulator/engine/flows.h"

namespace partita {
namespace {

/// What an expansion may have before it is played: some seconds and 500 MB.
constexpr std::int64_t kMostMessages = 4'000'000;
/// Of all members together, 4 bytes each where no two are alike.
constexpr std::int64_t kMostSteps = 1'000'000'000;

/// Messages that are written out, at most: before a rhythm of n² of them is.
std::int64_t message_bound(const AlgorithmRow& row, std::int64_t n,
                           const std::vector<std::int32_t>& levels) {
  if (row.kind == CollectiveKind::all_to_all || row.kind == CollectiveKind::halo_exchange) {
    if (row.algorithm != Algorithm::hierarchical) return n * (n - 1);
    std::int64_t others = 0;
    for (const std::int32_t l : levels) others += l - 1;
    return n * others;
  }
  const bool in_switch = row.algorithm == Algorithm::nvls || row.algorithm == Algorithm::nvls_tree;
  return in_switch ? 2 * n * (levels[0] + 1) : n;
}

void refuse_many(std::int64_t messages) {
  if (messages <= kMostMessages) return;
  throw InputError("algorithm", fmt::format("it has {} messages, more than the {} that are played; "
                                            "use fewer ranks, or a size that they divide",
                                            grouped(messages), grouped(kMostMessages)));
}

/// Of the level whose units are `below` ranks: the fastest of its ways and the shortest, between
/// members of one place in their units. `own` is cleared where they differ, or where members share
/// a link that they would fill.
PortLevel port_of(const std::vector<std::int64_t>& ranks, std::size_t below, std::int32_t members,
                  const Topology& topology, bool& own) {
  PortLevel port{members, Ticks{0}, BytesPerSecond{std::numeric_limits<double>::infinity()}};
  if (members == 1) return port;
  const auto l = static_cast<std::size_t>(members);
  // All ways, or of many those over distances that double.
  const bool every = ranks.size() * l <= std::size_t{1} << 16;
  struct Users {
    std::set<std::int64_t> from, to;
  };
  std::map<LinkId, Users> users;
  // What leaves or enters a member by each of its links, and the narrowest links of those ways:
  // where there are several, a formula of one port is a bound at best, by all of them.
  std::vector<std::map<LinkId, std::set<LinkId>>> out(ranks.size()), in(ranks.size());
  std::map<std::int64_t, std::size_t> number;
  for (std::size_t i = 0; i < ranks.size(); ++i) number.emplace(ranks[i], i);
  bool first = true;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const std::size_t x = i / below % l;
    for (std::size_t d = 1; d < l; d = every ? d + 1 : 2 * d) {
      const std::int64_t from = ranks[i], to = ranks[i - x * below + (x + d) % l * below];
      Ticks latency{0};
      BytesPerSecond rate{std::numeric_limits<double>::infinity()};
      const auto route = topology.route(DeviceId{static_cast<std::size_t>(from)},
                                        DeviceId{static_cast<std::size_t>(to)});
      for (const LinkId id : route) {
        const Link link = topology.link(id);
        latency += to_ticks(link.latency);
        rate = std::min(rate, link.bandwidth);
        users[id].from.insert(from), users[id].to.insert(to);
      }
      if (!route.empty()) {
        const auto narrow = [&](LinkId id) { return topology.link(id).bandwidth == rate; };
        out[i][route.front()].insert(*std::find_if(route.begin(), route.end(), narrow));
        in[number.at(to)][route.back()].insert(*std::find_if(route.rbegin(), route.rend(), narrow));
      }
      own = own && (first || (latency == port.latency && rate == port.rate));
      port.latency = first ? latency : std::min(port.latency, latency);
      port.rate = first ? rate : std::max(port.rate, rate);
      first = false;
    }
  }
  for (const auto* side : {&out, &in}) {
    for (const auto& links : *side) {
      if (links.empty() || (links.size() == 1 && links.begin()->second.size() == 1)) continue;
      own = false;
      BytesPerSecond all;
      for (const auto& [id, narrowest] : links) {
        BytesPerSecond through;
        for (const LinkId n : narrowest) through.count += topology.link(n).bandwidth.count;
        all.count += std::min(through, topology.link(id).bandwidth).count;
      }
      port.rate = std::max(port.rate, all);
    }
  }
  for (const auto& [id, u] : users) {
    const auto at_once = static_cast<double>(std::min(u.from.size(), u.to.size()));
    own = own && topology.link(id).bandwidth.count >= at_once * port.rate.count * (1 - 1e-9);
  }
  return port;
}

CollectiveTime time_row(const AlgorithmRow& row, Bytes payload,
                        const std::vector<std::int64_t>& ranks, const Topology& topology,
                        const CollectiveTimes& all) {
  const auto n = static_cast<std::int32_t>(ranks.size());
  refuse_many(message_bound(row, n, all.levels));
  const Rhythm r =
      rhythm(row.kind, row.algorithm, n, levelled(row.algorithm) ? all.levels : std::vector{n});
  const EvenCut cut(row.kind, r, payload);
  CollectiveTime t;
  t.algorithm = row.algorithm;
  t.steps = r.steps();
  if (t.steps > kMostSteps / n) {
    throw InputError("algorithm", fmt::format("{} ranks pass through {} steps, too many to play; "
                                              "use fewer ranks or another algorithm",
                                              grouped(n), grouped(t.steps)));
  }
  std::int64_t messages = 0;
  for (const Beat& b : r.beats)
    messages += static_cast<std::int64_t>(b.messages.size()) * (cut.equal() ? 1 : b.repeat);
  refuse_many(messages);
  std::vector<std::int64_t> sent(ranks.size(), 0);
  for (const Beat& b : r.beats) {
    for (const Message& m : b.messages) {
      if (m.from >= n) continue;
      auto& bytes = sent[static_cast<std::size_t>(m.from)];
      if (cut.equal()) {
        bytes += b.repeat * cut.of(m).count;
      } else {
        for (std::int32_t k = 0; k < b.repeat; ++k) bytes += cut.of(b.at(m, k)).count;
      }
    }
  }
  t.sent = Bytes{*std::max_element(sent.begin(), sent.end())};
  const NetworkTraffic traffic = traffic_of(r, cut, ranks, topology);
  const Played p = play(traffic);
  t.form = closed_form(row.kind, row.algorithm, payload, all.ports);
  if (!all.own_ports) t.form.most.reset();
  if (!t.form.most) {
    // Ports of levels are no others' than those of members of one place in their units; what each
    // link carries holds for all.
    if (!levelled(row.algorithm) && all.levels.size() > 1) t.form.least = Ticks{0};
    for (std::size_t l = 0; l < p.link_bytes.size(); ++l) {
      const Seconds alone{p.link_bytes[l] / traffic.capacity[l]};
      t.form.least = std::max(t.form.least, to_ticks(alone) - Ticks{1});
    }
  }
  t.time = p.end;
  if (p.end.count == 0) return t;
  const Seconds time = to_seconds(p.end);
  t.bus_bandwidth = BytesPerSecond{bus_factor(row.kind, n) * (payload / time).count};
  for (std::size_t l = 0; l < p.link_bytes.size(); ++l) {
    // With what others send, who take no more than their share of it.
    const double others = traffic.background.empty() ? 0 : traffic.background[l];
    const double busy = std::min(
        1.0, p.link_bytes[l] / traffic.capacity[l] / time.count + others / traffic.capacity[l]);
    if (busy > t.busy) t.busy = busy, t.busiest = traffic.link_ids[l];
  }
  return t;
}

}  // namespace

std::vector<std::int32_t> levels_of(const std::vector<std::int64_t>& ranks,
                                    const Topology& topology) {
  const auto n = static_cast<std::int32_t>(ranks.size());
  std::vector<std::int32_t> sizes;
  std::size_t last = topology.node_count();
  for (const std::int64_t r : ranks) {
    const std::size_t domain =
        topology.domain_of(topology.node_of(DeviceId{static_cast<std::size_t>(r)}));
    if (sizes.empty() || domain != last) sizes.push_back(0);
    last = domain;
    ++sizes.back();
  }
  const bool equal =
      std::all_of(sizes.begin(), sizes.end(), [&](std::int32_t size) { return size == sizes[0]; });
  if (!equal || sizes.size() == 1) return {n};
  return {sizes[0], static_cast<std::int32_t>(sizes.size())};
}

double bus_factor(CollectiveKind kind, std::int64_t ranks) {
  if (ranks <= 1) return 0;
  const auto n = static_cast<double>(ranks);
  switch (kind) {
    case CollectiveKind::all_reduce:
      return 2 * (n - 1) / n;
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_to_all:
    case CollectiveKind::halo_exchange:
    case CollectiveKind::scatter:
    case CollectiveKind::gather:
      return (n - 1) / n;
    case CollectiveKind::shift:
    case CollectiveKind::broadcast:
    case CollectiveKind::reduce:
      return 1;
  }
  return 1;
}

CollectiveTimes time_collective(CollectiveKind kind, Bytes payload,
                                const std::vector<std::int64_t>& ranks, const Topology& topology,
                                std::optional<Algorithm> algorithm,
                                std::vector<std::int32_t> levels) {
  CollectiveTimes all;
  all.levels = levels.empty() ? levels_of(ranks, topology) : std::move(levels);
  std::size_t below = 1;
  for (const std::int32_t l : all.levels) {
    all.ports.push_back(port_of(ranks, below, l, topology, all.own_ports));
    below *= static_cast<std::size_t>(l);
  }
  PARTITA_ASSERT(below == ranks.size(), fmt::format("levels of {}", below));
  for (const AlgorithmRow& row : kAlgorithms) {
    if (row.kind != kind || (algorithm && row.algorithm != *algorithm)) continue;
    try {
      all.algorithms.push_back(time_row(row, payload, ranks, topology, all));
    } catch (const InputError& e) {
      if (algorithm) throw;
      CollectiveTime& none = all.algorithms.emplace_back();
      none.algorithm = row.algorithm;
      none.why_not = e.message();
    }
  }
  return all;
}

}  // namespace partita
