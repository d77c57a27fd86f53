// simulator/search/placement.h: plans on devices, and the order of axes that is fastest.
#pragma once

#include <vector>

#include "simulator/plan/placement.h"
#include "simulator/search/predict.h"

namespace partita {

/// The cluster with the ranks of a complete plan on the devices that its `placement` says.
Topology on_devices(const Topology& topology, const Plan& plan);

/// The plan under every order of its axes (n! for n axes), what runs at once sharing links; fastest
/// first, equal ones in lexicographic order; `plan.placement` of each says which. Infeasible as
/// predict(); for plans with roles, whose ranks lie behind the mesh's, too.
Feasible<std::vector<Prediction>> place(const Graph& graph, const Plan& plan,
                                        const Topology& topology,
                                        const RoutingSource* routing = nullptr);

/// The plans that a search returns, each under its fastest order, fastest first; those with roles
/// as they are.
void place_all(SearchResult& result, const Graph& graph, const Topology& topology);

}  // namespace partita
