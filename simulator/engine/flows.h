// simulator/engine/flows.h: messages on a network, each with its own start and end.
//
// A message takes the latency of its route, then moves its bytes at the rate that sharing.h gives
// it on every link of the route. NetworkTraffic is a collective's rhythm laid on a network: members
// pass from step to step; a member's messages of a step go when it has sent and received all of its
// step before.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "base/units.h"
#include "simulator/engine/sharing.h"
#include "simulator/program/expansion.h"
#include "topologies/topology.h"

namespace partita {

struct NetworkRoute {
  std::vector<std::int32_t> links;  ///< into NetworkTraffic::capacity, in order
  Ticks latency{0};
  double weight = 1;  ///< of a message on it, for weighted sharing
};

struct TrafficMessage {
  std::int32_t from = 0, to = 0;  ///< members
  std::int32_t route = 0;
  Bytes bytes;
  bool reduces = false;
};

/// Messages that meet in a switch, which passes on their sum as it comes: one flow over all their
/// links, once all that send have come to the step.
struct TrafficMeeting {
  std::vector<std::int32_t> from, to;  ///< members
  std::vector<std::int32_t> links;     ///< no link twice
  Ticks latency{0};                    ///< of the slowest way in and the slowest way out
  Bytes bytes;
};

/// The same messages `repeat` times, one after the other.
struct TrafficBeat {
  std::vector<TrafficMessage> messages;
  std::int64_t repeat = 1;
  std::vector<TrafficMeeting> meetings;
};

struct NetworkTraffic {
  std::int32_t members = 0;
  std::vector<double> capacity;    ///< of links, bytes per second
  std::vector<double> background;  ///< by link, what others send over it; empty: nothing
  std::vector<NetworkRoute> routes;
  std::vector<TrafficBeat> beats;
  /// What a receiver spends on a message before it counts as there: local + bytes * per_byte, if
  /// the message reduces; for comparison with simulators that price it. Seconds.
  double reduce_latency = 0, reduce_per_byte = 0;
  std::vector<LinkId> link_ids;  ///< by link, the topology's; empty on another network
};

/// Links of `capacity`, and the way from one member or switch (Rhythm::switches) to another, asked
/// for once each.
struct TrafficNetwork {
  std::vector<double> capacity;
  std::function<NetworkRoute(std::int32_t from, std::int32_t to)> route;
};
/// A rhythm laid on it, with exact sizes of chunks. Messages without bytes are not sent.
NetworkTraffic lay(const Rhythm& rhythm, const EvenCut& cut, TrafficNetwork network);

/// A collective between `ranks` of the topology, each on the device of its number. InputError where
/// a switch is to add that not all members of its unit reach, or that cannot.
NetworkTraffic traffic_of(const Rhythm& rhythm, const EvenCut& cut,
                          const std::vector<std::int64_t>& ranks, const Topology& topology);

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
Played play(const NetworkTraffic& traffic, const PlayOptions& options = {});

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
