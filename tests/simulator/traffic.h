// tests/simulator/traffic.h: traffic on networks that are written down by rule, for tests and
// benchmarks.
#pragma once

#include <algorithm>
#include <vector>

#include "simulator/engine/flows.h"

namespace partita {

/// n members on a ring of links, one each way between neighbours; messages go the shorter way
/// round.
inline Traffic on_ring(const Rhythm& rhythm, std::int32_t n, Bytes chunk, double rate,
                       Ticks latency) {
  Traffic t;
  t.members = n;
  t.capacity.assign(static_cast<std::size_t>(2 * n), rate);  // clockwise, then back
  for (const Beat& b : rhythm.beats) {
    TrafficBeat beat;
    beat.repeat = b.repeat;
    for (const Message& m : b.messages) {
      NetworkRoute r;
      const std::int32_t there = (m.to - m.from + n) % n;
      for (std::int32_t h = 0; h < std::min(there, n - there); ++h) {
        r.links.push_back(there <= n - there ? (m.from + h) % n : n + (m.from - h - 1 + n) % n);
        r.latency += latency;
      }
      beat.messages.push_back({m.from, m.to, static_cast<std::int32_t>(t.routes.size()),
                               Bytes{m.count * chunk.count}, m.reduces});
      t.routes.push_back(std::move(r));
    }
    t.beats.push_back(std::move(beat));
  }
  return t;
}

/// Members in units of levels[0], those in units of levels[1], ...: each member has a link to and
/// one from a switch of each level, of rate[level]; a message uses the first level whose unit holds
/// both ends. Two hops of `hop`.
inline Traffic on_switches(const Rhythm& rhythm, const std::vector<std::int32_t>& levels,
                           const std::vector<double>& rate, Bytes chunk, Ticks hop) {
  Traffic t;
  t.members = 1;
  for (const std::int32_t l : levels) t.members *= l;
  for (const double r : rate)
    t.capacity.insert(t.capacity.end(), static_cast<std::size_t>(2 * t.members), r);
  for (const Beat& b : rhythm.beats) {
    TrafficBeat beat;
    beat.repeat = b.repeat;
    beat.messages.reserve(b.messages.size());
    for (const Message& m : b.messages) {
      std::int32_t level = 0, unit = levels[0];
      while (m.from / unit != m.to / unit) unit *= levels[static_cast<std::size_t>(++level)];
      NetworkRoute r;
      r.latency = Ticks{2 * hop.count};
      r.links = {2 * t.members * level + m.from, t.members * (2 * level + 1) + m.to};
      beat.messages.push_back({m.from, m.to, static_cast<std::int32_t>(t.routes.size()),
                               Bytes{m.count * chunk.count}, m.reduces});
      t.routes.push_back(std::move(r));
    }
    t.beats.push_back(std::move(beat));
  }
  return t;
}

/// Halves every hundredth link, spread evenly by a multiplier.
inline void slow_some(Traffic& t, std::size_t one_in = 100) {
  for (std::size_t k = 0; k < t.capacity.size() / one_in; ++k)
    t.capacity[k * 2'654'435'761u % t.capacity.size()] *= 0.5;
}

}  // namespace partita
