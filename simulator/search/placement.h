// simulator/search/placement.h: plans on devices, and the mapping that is fastest.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simulator/plan/placement.h"
#include "simulator/search/predict.h"
#include "simulator/search/step_load.h"

namespace partita {

/// Makes the plan lie as another does.
void place_as(Plan& plan, const Plan& other);

/// Why the devices that a complete plan names are none of the cluster's; "" where they are.
std::string beyond(const Topology& topology, const Plan& plan);

/// The cluster with the ranks of a complete plan on the devices that its `placement` says, and
/// rings through them as `rings` says.
Topology on_devices(const Topology& topology, const Plan& plan);

/// What a search of placements found.
struct Placements {
  std::vector<Prediction> tried;  ///< simulated, fastest first; of equal ones the default first
  std::size_t by_default = 0;     ///< of them, the plan as it is without a search
  std::int64_t weighed = 0;       ///< mappings, by the load on links (step_load.h)
  std::string left_out;           ///< what was not searched, and why; "" nothing
  std::vector<AxisBusy> before, after;  ///< by default; as found
  const Prediction& best() const { return tried.front(); }
  const Prediction& as_given() const { return tried[by_default]; }
};

struct PlacementLimits {
  std::int64_t routes = 2'000'000;        ///< asked for in weighing
  std::int64_t instructions = 1'500'000;  ///< of a step that is simulated after ranks have differed
  std::size_t few = 8;                    ///< orders of nodes that are simulated
  std::size_t all_orders_of = 6;          ///< nodes up to which every order of them is weighed
};

/// Every order of the plan's axes (n! for n axes) is simulated, what runs at once sharing links.
/// From the fastest on, mappings are weighed by the load on links: axes in parts, strides and
/// shifts along axes, strides of rings, blocks and single devices that change places, spare ones
/// among them. What weighs less is kept where its simulation is faster. Infeasible as predict();
/// for plans with roles, whose ranks lie behind the mesh's, too.
Feasible<Placements> place(const Graph& graph, const Plan& plan, const Topology& topology,
                           const RoutingSource* routing = nullptr,
                           const PlacementLimits& limits = {});

/// The plans that a search returns, each under its fastest placement, fastest first; those with
/// roles as they are.
void place_all(SearchResult& result, const Graph& graph, const Topology& topology);

}  // namespace partita
