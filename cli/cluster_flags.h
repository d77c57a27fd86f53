// cli/cluster_flags.h: flags that say in which state a cluster is, and how its spines are used.
#pragma once

#include <string>
#include <vector>

#include "simulator/engine/simulate.h"
#include "topologies/topology.h"

namespace CLI {
class App;
}

namespace partita::cli {

struct ClusterFlags {
  std::vector<std::string> slow, degrade, fail, background;
  int ranks_per_device = 1;
  bool mps = false;
  std::string spines;  ///< "spray", "ecmp", "ecmp:SEED", or "": as the file says

  void add_to(CLI::App& app);
  /// The cluster with its spines used as asked, with slow devices, slow or failed links and others'
  /// traffic.
  /// InputError names flag, value and remedy.
  Topology in_state(const Topology& topology) const;
};

/// How the cluster lies and routes are taken where the user left it open: nodes of NVLink domains,
/// over several spines, around failed links.
/// What `network` does not count of the cluster's state too.
std::vector<std::string> state_assumptions(const Topology& topology, Network network);

}  // namespace partita::cli
