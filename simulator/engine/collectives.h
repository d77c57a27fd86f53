// simulator/engine/collectives.h: a collective alone on a cluster, algorithm by algorithm.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/units.h"
#include "simulator/cost/closed_form.h"
#include "simulator/program/expansion.h"
#include "topologies/topology.h"

namespace partita {

/// Members of each NVLink network (or node), and how many there are, where the ranks lie in equal
/// consecutive groups on them; else all as one level.
std::vector<std::int32_t> levels_of(const std::vector<std::int64_t>& ranks,
                                    const Topology& topology);

/// Bus bandwidth is this times payload over time: what the busiest port of a ring, or of direct
/// exchanges, would carry (nccl-tests, doc/PERFORMANCE.md). 0 for one rank.
double bus_factor(CollectiveKind kind, std::int64_t ranks);

struct CollectiveTime {
  Algorithm algorithm = Algorithm::ring;
  std::string why_not;  ///< the reason where it cannot be played: then nothing below is set
  std::int64_t steps = 0;
  Bytes sent;       ///< by the member that sends most
  /// On CollectiveTimes::ports where that is exact, else what the busiest link takes at least.
  ClosedForm form;
  Ticks time{0};    ///< on the cluster's links
  BytesPerSecond bus_bandwidth;
  LinkId busiest;   ///< carries its bytes for the largest part of the time; invalid: none does
  double busy = 0;  ///< that part
};

struct CollectiveTimes {
  std::vector<std::int32_t> levels;
  /// What a member meets on each level: the shortest and the fastest of its members' ways.
  std::vector<PortLevel> ports;
  /// Are they all as short and fast, and does nobody share them? If not forms are no more than
  /// bounds.
  bool own_ports = true;
  std::vector<CollectiveTime> algorithms;  ///< in the order of kAlgorithms
};

/// Of `kind`, by every algorithm there is or by one. `levels` as rhythm() takes them; their product
/// is the number of ranks; empty: levels_of(). InputError where the one algorithm cannot be played.
CollectiveTimes time_collective(CollectiveKind kind, Bytes payload,
                                const std::vector<std::int64_t>& ranks, const Topology& topology,
                                std::optional<Algorithm> algorithm = std::nullopt,
                                std::vector<std::int32_t> levels = {});

}  // namespace partita
