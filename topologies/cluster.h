// topologies/cluster.h: what every reader (YAML, NCCL XML, nvidia-smi) makes, and the one function
// that turns it into a Topology. Private to this folder.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "topologies/topology.h"

namespace partita {

class YamlNode;

struct VertexSpec {
  std::string name;
  VertexKind kind = VertexKind::cpu;
  std::size_t profile = 0;        ///< Devices: index into ClusterSpec::profiles.
  BytesPerSecond port_bandwidth;  ///< NICs: to the fabric, one direction, as transfers reach it.
  double port_efficiency = 1;     ///< ... over the line rate.
  Seconds port_latency;
  std::string place;
};

/// A cable: one link in each direction.
struct EdgeSpec {
  std::size_t a = 0, b = 0;  ///< Indices into NodeSpec::vertices.
  LinkKind kind = LinkKind::other;
  BytesPerSecond bandwidth;
  Seconds latency;
};

/// A switched network that joins consecutive nodes of one group, beside the fabric.
struct DomainSpec {
  std::int64_t nodes = 1;  ///< The last domain may have fewer.
  LinkKind kind = LinkKind::nvlink;
  std::vector<std::size_t> ports;  ///< Vertices with a link to the domain's switch.
  BytesPerSecond bandwidth;
  Seconds latency;
};

struct NodeSpec {
  std::string place;
  std::int64_t count = 1;
  std::string cpu_vendor;
  BytesPerSecond storage_bandwidth;      ///< at which one node reads; 0: not said
  BytesPerSecond host_memory_bandwidth;  ///< of all its processors together; 0: not said
  Bytes host_memory;                     ///< the same; 0: not said
  double launch_time = 1;                ///< Topology::launch_time
  std::vector<VertexSpec> vertices;
  std::vector<EdgeSpec> edges;
  std::optional<DomainSpec> domain;
};

/// From a leaf to the spines.
struct Uplinks {
  double oversubscription = 1;
  std::optional<BytesPerSecond> rate;  ///< Per leaf, to all spines; else ports / oversubscription.
  Seconds latency;
  std::int64_t spines = 1;
  SpineRouting routing;
};

/// The fabrics. A new one is one alternative here, one case in the YAML reader and one class in
/// fabric.h.
struct NoFabric {};
struct SingleSwitch {};
struct Rails {
  std::int64_t nodes_per_leaf = 0;  ///< 0: all of them.
  bool spine = true;
  bool pxn = false;
  Uplinks uplinks;
};
struct FatTree {
  std::int64_t nodes_per_leaf = 1;
  Uplinks uplinks;
};
struct TorusSpec {
  std::string place;  ///< of its size
  std::vector<std::int64_t> size;
  BytesPerSecond bandwidth;
  Seconds latency;
  bool by_direction = false;  ///< a NIC for each direction, not all on one router
};
struct DragonflySpec {
  std::string place;
  std::int64_t groups = 1, routers = 1, nodes_per_router = 1;
  std::int64_t global_links = 0;  ///< of a router
  BytesPerSecond local_bandwidth, global_bandwidth;
  Seconds local_latency, global_latency;
};
using FabricSpec = std::variant<NoFabric, SingleSwitch, Rails, FatTree, TorusSpec, DragonflySpec>;

struct ClusterSpec {
  std::string name;
  std::string place;  ///< The file, for messages.
  std::vector<DeviceProfile> profiles;
  std::vector<NodeSpec> groups;
  FabricSpec fabric;
  bool sharp = false;  ///< The fabric's switches sum what passes them (InfiniBand SHARP).
  CollectiveTable collectives;
  std::shared_ptr<const Topology> measured_on;  ///< Topology's
  std::size_t used_devices = 0;  ///< 0: all.
  bool imported = false;         ///< From a machine's own file, which knows no fabric.
  std::vector<std::string> notes;
  std::vector<std::string> assumed;  ///< What was left open and how it was filled.
  std::vector<std::pair<std::string, std::string>> sources;
};

/// Checks (counts, names, connectivity) and lays out the numbering. InputError on a bad cluster.
Topology build_topology(ClusterSpec spec);

ClusterSpec read_cluster_yaml(const std::string& text, const std::string& file,
                              const TopologyEdits& edits = {});
/// The same cluster as a file that read_cluster_yaml() takes: what a machine's own file said and
/// what was assumed, open to changes. One group of nodes, without fabric or domain.
std::string to_cluster_yaml(const ClusterSpec& spec);
ClusterSpec read_nccl_xml(const std::string& text, const std::string& file,
                          const std::string& device);
ClusterSpec read_nvidia_smi(const std::string& text, const std::string& file,
                            const std::string& device);

/// The `collectives` of a cluster or device file: points {ranks, bytes, time} or curves {ranks,
/// times: {64 KiB: 19 us, ...}}, each with `nodes`, `at_work`, `spread` and `source` where it has
/// them. A source of its own goes into `sources` by its place.
CollectiveTable read_collectives(const YamlNode& table, const std::string& source,
                                 std::map<std::string, std::string>& sources);
/// The `slowdown` of a device file: a list of {kernel, beside, ranks or multiprocessors, bytes,
/// of_kernel, of_transfer, spread}.
SlowdownTable read_slowdowns(const YamlNode& list);

/// Names of the .yaml files of a data folder, sorted, without the ending.
std::vector<std::string> data_names(const std::string& folder);

inline constexpr std::int64_t kMostNodes = 1'000'000;

}  // namespace partita
