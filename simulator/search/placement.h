// simulator/search/placement.h: which rank lies on which device.
#pragma once

#include <string>
#include <vector>

#include "simulator/search/predict.h"

namespace partita {

/// Axes of a mesh (what its atoms are named after), innermost first: neighbours along the first are
/// neighbours in the cluster.
std::vector<std::string> axis_order(const Mesh& mesh);

/// Device of every rank of the mesh when its axes are nested in this order, innermost first. Every
/// axis once; InputError{place} otherwise.
std::vector<std::int32_t> placement(const Mesh& mesh,
                                    const std::vector<std::string>& innermost_first,
                                    const std::string& place);

struct Placed {
  std::vector<std::string> order;  ///< innermost first
  Prediction prediction;
};

/// The plan under every order of its axes (n! for n axes), what runs at once sharing links; fastest
/// first, equal ones in lexicographic order. Infeasible as predict(); for plans with roles, whose
/// ranks lie behind the mesh's, too.
Feasible<std::vector<Placed>> place(const Graph& graph, const Plan& plan, const Topology& topology,
                                    const RoutingSource* routing = nullptr);

}  // namespace partita
