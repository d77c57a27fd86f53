// simulator/cost/axes.h: what each axis of a mesh crosses in a cluster.
#pragma once

#include <string>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/program/mesh.h"

namespace partita {

/// Rings of all groups along one atom of a mesh, rank r on the topology's device r.
struct AxisCrossing {
  std::string name;
  std::int64_t size = 0;
  std::size_t nodes = 0;    ///< most nodes that one group lies on
  BytesPerSecond alone;     ///< of a rank, in the slowest group, when no other communicates
  BytesPerSecond together;  ///< when all groups of the axis do at once
  LinkId binds;             ///< the link that then binds
  Seconds latency;          ///< of the slowest hop
};

/// Innermost atom first. InputError if the mesh has more ranks than the cluster devices.
std::vector<AxisCrossing> axis_crossings(const Mesh& mesh, const Communication& communication);

}  // namespace partita
