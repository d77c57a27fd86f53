// simulator/cost/link_flows.h: which links a transfer uses, and how much of each (docs/cost.md,
// "What a collective lays on links").
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "base/units.h"
#include "simulator/program/program.h"
#include "topologies/topology.h"

namespace partita {

/// How a collective lies on links.
enum class Lay : std::uint8_t {
  rings,
  pairs,            ///< all pairs at once
  trees,            ///< two binary trees over NVLink domains, a chain in each
  switches,         ///< an all-reduce in the domain's NVSwitches
  switches_gather,  ///< an all-gather there: each sends once, the switches to all
  switches_sum,     ///< a reduce-scatter there: the switches sum what all send
  switch_trees,     ///< in the switches of each domain, trees between domains
  near_trees,       ///< an all-gather by a binomial tree from each member, far ones first (PAT)
  near_sums         ///< a reduce-scatter, the other way
};
std::string_view name(Lay lay);

/// Links that a transfer uses. It is made of equal flows: `share` of the bytes that one rank
/// sends in a ring (wire_count) is what one flow carries; by link, how many cross it. Sorted by
/// link.
struct LinkFlows {
  double share = 1;
  std::vector<std::pair<LinkId, std::int64_t>> flows;
  Seconds latency;  ///< of the slowest flow's route
};

/// Of ranks on devices of these numbers. Rings and trees: as many as the smallest node, or domain,
/// has members, so that all network cards work. The lays in switches are for members of one domain
/// that reach each other over them; else rings.
LinkFlows lay_out(const Topology& topology, Lay lay, const std::vector<std::int64_t>& ranks);
LinkFlows message_flows(const Topology& topology, std::int64_t from, std::int64_t to);

/// Of the group, as the cluster's state has it (ClusterState::ring_strides).
std::int64_t ring_stride(const Topology& topology, const std::vector<std::int64_t>& ranks);
/// Members of a group as a ring with this stride visits them: k * stride modulo their number, which
/// has no factor in common with it.
std::vector<std::int64_t> in_ring_order(const std::vector<std::int64_t>& members,
                                        std::int64_t stride);

}  // namespace partita
