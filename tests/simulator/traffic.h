// tests/simulator/traffic.h: traffic on networks that are written down by rule, for tests and
// benchmarks.
#pragma once

#include <algorithm>
#include <vector>

#include "simulator/engine/flows.h"

namespace partita {

/// n members on a ring of links, one each way between neighbours; messages go the shorter way
/// round.
inline NetworkTraffic on_ring(const Rhythm& rhythm, const EvenCut& cut, double rate,
                              Ticks latency) {
  const std::int32_t n = rhythm.members;
  TrafficNetwork network;
  network.capacity.assign(static_cast<std::size_t>(2 * n), rate);  // clockwise, then back
  network.route = [=](std::int32_t from, std::int32_t to) {
    NetworkRoute r;
    const std::int32_t there = (to - from + n) % n;
    for (std::int32_t h = 0; h < std::min(there, n - there); ++h) {
      r.links.push_back(there <= n - there ? (from + h) % n : n + (from - h - 1 + n) % n);
      r.latency += latency;
    }
    return r;
  };
  return lay(rhythm, cut, std::move(network));
}

/// Members in units of levels[0], those in units of levels[1], ...: each member has a link to and
/// one from a switch of each level, of rate[level]; a message uses the first level whose unit holds
/// both ends. Two hops of hop[level] each, in-switch sums one each way.
inline NetworkTraffic on_switches(const Rhythm& rhythm, const EvenCut& cut,
                                  const std::vector<std::int32_t>& levels,
                                  const std::vector<double>& rate, const std::vector<Ticks>& hop) {
  const std::int32_t n = rhythm.members;
  TrafficNetwork network;
  for (const double r : rate)
    network.capacity.insert(network.capacity.end(), static_cast<std::size_t>(2 * n), r);
  network.route = [&](std::int32_t from, std::int32_t to) {
    if (to >= n) return NetworkRoute{{from}, hop[0]};
    if (from >= n) return NetworkRoute{{n + to}, hop[0]};
    std::size_t level = 0;
    for (std::int32_t unit = levels[0]; from / unit != to / unit;) unit *= levels[++level];
    const auto at = static_cast<std::int32_t>(level);
    return NetworkRoute{{2 * n * at + from, n * (2 * at + 1) + to}, Ticks{2 * hop[level].count}};
  };
  return lay(rhythm, cut, std::move(network));
}

/// Halves every hundredth link, spread evenly by a multiplier.
inline void slow_some(NetworkTraffic& t, std::size_t one_in = 100) {
  for (std::size_t k = 0; k < t.capacity.size() / one_in; ++k)
    t.capacity[k * 2'654'435'761u % t.capacity.size()] *= 0.5;
}

}  // namespace partita
