// cli/cluster_flags.h: flags that say in which state a cluster is.
#pragma once

#include <string>
#include <vector>

#include "topologies/topology.h"

namespace CLI {
class App;
}

namespace partita::cli {

struct ClusterFlags {
  std::vector<std::string> slow, degrade, fail, background;

  void add_to(CLI::App& app);
  /// The cluster with slow devices, slow or failed links and others' traffic.
  /// InputError names flag, value and remedy.
  Topology in_state(const Topology& topology) const;
};

}  // namespace partita::cli
