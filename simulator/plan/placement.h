// simulator/plan/placement.h: which rank lies on which device.
#pragma once

#include <string>
#include <vector>

#include "simulator/program/mesh.h"

namespace partita {

/// Axes of a mesh (what its atoms are named after), innermost first: neighbours along the first are
/// neighbours in the cluster.
std::vector<std::string> axis_order(const Mesh& mesh);

/// Device of every rank of the mesh when its axes are nested in this order, innermost first. Every
/// axis once; InputError{place} otherwise.
std::vector<std::int32_t> placement(const Mesh& mesh,
                                    const std::vector<std::string>& innermost_first,
                                    const std::string& place);

}  // namespace partita
