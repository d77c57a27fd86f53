// simulator/engine/flows.h: messages on a network, each with its own start and end.
//
// A message takes the latency of its route, then moves its bytes at the rate that sharing.h gives
// it on every link of the route. Traffic is a collective's rhythm laid on a network: members pass
// from step to step; a member's messages of a step go when it has sent and received all of its step
// before.
#pragma once

#include <cstdint>
#include <vector>

#include "base/units.h"
#include "simulator/engine/sharing.h"
#include "simulator/program/expansion.h"
#include "topologies/topology.h"

namespace partita {

struct NetworkRoute {
  std::vector<std::int32_t> links;  ///< into TrafficNetwork::capacity, in order
  Ticks latency{0};
  double weight = 1;  ///< of a message on it, for weighted sharing
};

struct TrafficMessage {
  std::int32_t from = 0, to = 0;  ///< members
  std::int32_t route = 0;
  Bytes bytes;
  bool reduces = false;
};

/// The same messages `repeat` times, one after the other.
struct TrafficBeat {
  std::vector<TrafficMessage> messages;
  std::int64_t repeat = 1;
};

struct Traffic {
  std::int32_t members = 0;
  std::vector<double> capacity;  ///< of links, bytes per second
  std::vector<NetworkRoute> routes;
  std::vector<TrafficBeat> beats;
  /// What a receiver spends on a message before it counts as there: local + bytes * per_byte, if
  /// the message reduces; for comparison with simulators that price it. Seconds.
  double reduce_latency = 0, reduce_per_byte = 0;
};

/// A collective's rhythm between `ranks` of the topology, each on the device of its number; all its
/// chunks are of `chunk` bytes.
Traffic traffic_of(const Rhythm& rhythm, Bytes chunk, const std::vector<std::int64_t>& ranks,
                   const Topology& topology);

struct Played {
  Ticks end{0};
  std::vector<Ticks> member_end;   ///< by member
  std::int64_t messages = 0;       ///< that were moved, each once: folded ones as one
  std::int64_t classes = 0;        ///< of members; members when unfolded
  std::vector<double> link_bytes;  ///< by link, that crossed it
};

struct PlayOptions {
  /// Members, links and messages that behave alike are played once, with a count: the coarsest
  /// stable partition.
  bool folded = true;
};

/// InputError where a message needs a link of capacity 0.
Played play(const Traffic& traffic, const PlayOptions& options = {});

/// Independent messages, each from its start: for tests against other simulators.
struct TimedMessage {
  Ticks start{0};
  std::int32_t route = 0;
  Bytes bytes;
};
std::vector<Ticks> ends_of(const std::vector<double>& capacity,
                           const std::vector<NetworkRoute>& routes,
                           const std::vector<TimedMessage>& messages);

}  // namespace partita
