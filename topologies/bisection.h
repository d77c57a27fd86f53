// topologies/bisection.h: how much the halves of a cluster can tell each other.
#pragma once

#include "topologies/topology.h"

namespace partita {

/// Maximum flow from the first half of the devices to the other half, in rank order (of an odd
/// number the middle one belongs to the second): what all of them together can send at once,
/// whatever the routes. At most the sum of what the first half's links carry. 0 for one device.
/// Vertices that behave alike are one (colour refinement), which changes no maximum flow.
BytesPerSecond bisection(const Topology& topology);

}  // namespace partita
