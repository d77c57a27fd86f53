#include "simulator/search/placement.h"

#include <algorithm>

namespace partita {

Topology on_devices(const Topology& topology, const Plan& plan) {
  if (plan.placement.empty()) return topology;
  ClusterState state = topology.state();
  state.placement = placement(plan.mesh, plan.placement, "placement");
  return topology.in_state(std::move(state));
}

Feasible<std::vector<Prediction>> place(const Graph& graph, const Plan& wanted,
                                        const Topology& topology, const RoutingSource* routing) {
  auto plan = complete(graph, wanted);
  if (!plan) return plan.why();
  std::vector<std::string> order = axis_order(plan->mesh);
  std::sort(order.begin(), order.end());
  std::vector<Prediction> all;
  Communication communication(topology);
  do {
    plan->placement = order;
    auto prediction =
        predict(graph, *plan, communication, nullptr, nullptr, false, routing, Network::flows);
    if (!prediction) return prediction.why();
    all.push_back(std::move(*prediction));
  } while (std::next_permutation(order.begin(), order.end()));
  std::stable_sort(all.begin(), all.end(), [](const Prediction& a, const Prediction& b) {
    return a.step_time < b.step_time;
  });
  return all;
}

void place_all(SearchResult& result, const Graph& graph, const Topology& topology) {
  for (Prediction& p : result.plans) {
    if (auto all = place(graph, p.plan, topology)) p = std::move(all->front());
  }
  std::stable_sort(
      result.plans.begin(), result.plans.end(),
      [](const Prediction& a, const Prediction& b) { return a.step_time < b.step_time; });
}

}  // namespace partita
