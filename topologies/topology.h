// topologies/topology.h: the cluster graph.
//
// A cluster is groups of equal nodes, an optional NVLink domain that spans nodes, and a fabric
// between their NICs. Only the distinct nodes are stored; vertices, links and routes of a node are
// found by arithmetic, so that 131,072 devices cost no more memory than eight.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "base/units.h"
#include "topologies/device.h"

namespace partita {

using DeviceId = Id<struct DeviceTag>;
using LinkId = Id<struct LinkTag>;

enum class VertexKind { device, cpu, pcie_switch, nvswitch, nic, network_switch };
enum class LinkKind { nvlink, pcie, c2c, cpu_interconnect, network, other };

std::string_view name(VertexKind kind);
std::string_view name(LinkKind kind);

/// One direction. `from` and `to` number the vertices of the whole cluster (vertex_name).
struct Link {
  std::int32_t from = 0;
  std::int32_t to = 0;
  LinkKind kind = LinkKind::other;
  BytesPerSecond bandwidth;
  Seconds latency;
  double efficiency = 1;  ///< of a network card: `bandwidth` over the line rate that it reports
};

/// What differs from the files: parts that are slow, failed or busy, and which device each rank
/// has. Links and devices by their own numbers, whatever the placement.
struct ClusterState {
  std::map<LinkId, double> link_speed;          ///< fraction of its bandwidth; 0: failed
  std::map<LinkId, BytesPerSecond> background;  ///< what others send over it
  std::map<DeviceId, double> device_speed;      ///< fraction of its kernels' speed
  std::vector<std::int32_t> placement;          ///< device of rank r; empty: r
  /// Ranks of each device; with more than one `placement` names seats, seat s of device s / this.
  int ranks_per_device = 1;
  /// They run beside each other under a server of NVIDIA's; false: in turns, by time slices.
  bool mps = false;
  /// How many places apart rings visit the members of a group, by its lowest and highest rank and
  /// their number; of groups that are not here: 1, neighbour after neighbour.
  std::map<std::array<std::int64_t, 3>, std::int64_t> ring_strides;
};

/// How traffic spreads over the spines of a switch tree: evenly, byte by byte, or each pair of
/// devices on one: number mix(mix(mix(seed, from), to), 0) modulo their number (base/hash.h;
/// devices by their numbers in the cluster), of those alone that no failed link cuts off.
struct SpineRouting {
  bool ecmp = false;
  std::uint64_t seed = 0;
};

/// Immutable; copies share their storage; safe to read from any number of threads.
class Topology {
 public:
  const std::string& name() const;
  std::size_t device_count() const;  ///< Numbered node by node: rank order.
  /// What the text asked for: 12 of "dgx-h100:12 gpus" (2 nodes, 16 devices); else all. Callers may
  /// use any first N devices.
  std::size_t used_devices() const;
  /// The same in ranks: as many, or ClusterState::ranks_per_device times as many. A rank's DeviceId
  /// below is its own number.
  std::size_t rank_count() const;
  std::size_t used_ranks() const;
  std::size_t rank_count(std::size_t node) const;
  bool same_device(DeviceId a, DeviceId b) const;
  bool in_turns() const;  ///< Do ranks have their device by time slices?
  std::size_t node_count() const;
  std::size_t node_of(DeviceId device) const;  ///< Which host.
  const DeviceProfile& device(DeviceId device) const;
  std::size_t profile_index(DeviceId device) const;  ///< Dense index of distinct profiles.
  std::size_t profile_count() const;
  const DeviceProfile& profile(std::size_t profile_index) const;

  /// Devices of `node` are first_device(node) .. first_device(node) + device_count(node) - 1.
  DeviceId first_device(std::size_t node) const;
  std::size_t device_count(std::size_t node) const;
  /// "intel", "amd", "arm", or "" where the file does not say.
  const std::string& cpu_vendor(std::size_t node) const;
  /// Of a node's processors together; 0 where the file does not say.
  BytesPerSecond host_memory_bandwidth(std::size_t node) const;
  /// Of its processors together; 0: not said.
  Bytes host_memory(std::size_t node) const;
  /// What a framework's launches take on a node's processors, over what they take on those of a
  /// DGX H100 (Xeon Platinum 8480C).
  double launch_time(std::size_t node) const;
  /// At which one node reads from storage; 0 where the file does not say.
  BytesPerSecond storage_bandwidth(std::size_t node) const;
  std::size_t nic_count(std::size_t node) const;
  /// Nodes of one domain share a switched NVLink network; a node without one is its own domain.
  std::size_t domain_of(std::size_t node) const;
  /// Nodes of one number are equal: the entry of the cluster's file that they stem from.
  std::size_t group_of(std::size_t node) const;
  /// Nodes of one unit hang on the same leaf switches; 0 where there is one unit only.
  std::size_t unit_of(std::size_t node) const;
  /// Where `node` lies as seen from `origin`: groups of nodes that agree in this for all members,
  /// and in domains and units, route alike.
  std::uint64_t offset_of(std::size_t node, std::size_t origin) const;
  /// Spines above the leaves, whether sprayed over or chosen by hash; 0 where there are none.
  std::size_t spines() const;
  SpineRouting routing() const;
  /// The same cluster as built, with this routing. InputError{place} where there are no spines to
  /// choose from.
  Topology with_routing(SpineRouting routing, const std::string& place) const;

  /// The same cluster, whose devices' kernels were measured: before what their files say of them.
  Topology with_kernels(const KernelTable& kernels) const;

  /// Links of the best path, in order; empty if a == b; between ranks of one device its link to the
  /// host and back, if there is one. Best: fewest links, then the larger
  /// bottleneck, then the lower latency, then the NIC of the device's own number. A route between
  /// devices of one node stays inside it if it can; no route passes through a third node.
  std::vector<LinkId> route(DeviceId a, DeviceId b) const;
  /// How many of the routes between all ordered pairs of `devices`, each named once, cross each
  /// link; the latency of the longest. What enumerating route() gives; where one vertex stands for
  /// the spines, equal nodes are counted together, not pair by pair.
  struct PairLoads {
    std::vector<std::pair<LinkId, std::int64_t>> links;  ///< ascending
    Seconds latency;
  };
  PairLoads all_pairs(const std::vector<DeviceId>& devices) const;
  Link link(LinkId link) const;
  std::size_t link_count() const;
  /// Links of `device`'s node that start or end at it.
  std::vector<LinkId> links_of(DeviceId device) const;
  /// The fastest PCIe or C2C link between a device and its host; invalid without one.
  LinkId host_link(DeviceId device, bool towards_host) const;
  /// From a device to its host's processor or back: host_link and the PCIe or C2C links beyond it,
  /// through switches, that others share. Empty without one.
  std::vector<LinkId> host_route(DeviceId device, bool towards_host) const;
  /// Of it the narrowest link's bandwidth, 0 without one, and all latencies.
  std::pair<BytesPerSecond, Seconds> host_way(DeviceId device, bool towards_host) const;
  std::string link_name(LinkId link) const;  ///< "node3.gpu1->node3.nvswitch0"

  std::size_t vertex_count() const;
  VertexKind vertex_kind(std::int32_t vertex) const;
  std::string vertex_name(std::int32_t vertex) const;  ///< "node3.gpu1"
  std::string device_name(DeviceId device) const;
  std::int32_t vertex_of(DeviceId device) const;
  /// The node a vertex belongs to; node_count() for switches between nodes.
  std::size_t node_of_vertex(std::int32_t vertex) const;
  /// Of a link inside it or between it and what lies outside; node_count() for those between
  /// switches.
  std::size_t node_of_link(LinkId link) const;

  /// Measured times of collectives; empty where nothing was measured.
  const CollectiveTable& collectives() const;
  /// The cluster as its file has it, with whose links collectives were measured, where edits have
  /// changed this one; else null.
  const Topology* measured_on() const;
  /// Do the fabric's switches sum what passes them (InfiniBand SHARP)?
  bool sharp() const;
  /// What was assumed because the input does not say; empty for the catalogue.
  const std::vector<std::string>& notes() const;
  /// What the cluster's name left open and how it was filled, a line each.
  const std::vector<std::string>& assumed() const;
  /// Source of each hardware figure: "nodes[0].links[2].bandwidth" -> "... datasheet".
  const std::vector<std::pair<std::string, std::string>>& sources() const;
  /// Vertices and links held in memory, whatever the number of nodes.
  std::size_t stored_vertices() const;

  struct Impl;
  explicit Topology(std::shared_ptr<const Impl> impl);

  /// The same cluster in another state. Routes avoid network cards whose link to the fabric has
  /// failed, failed links between switches and, but in a domain of several nodes, inside nodes.
  /// InputError where the placement is no permutation of the first devices, or a device is left
  /// without a way to the others.
  Topology in_state(ClusterState state) const;
  const ClusterState& state() const;
  /// Do routes of a torus or a dragonfly leave their rule for failed links?
  bool goes_around() const;
  /// Devices as ranks see them: place of a device on its node; its speed.
  std::size_t local_index(DeviceId device) const;
  double speed(DeviceId device) const;
  /// By name: "node3.gpu1", "node3.nic0->rail0". InputError{place} with names like it.
  DeviceId find_device(const std::string& name, const std::string& place) const;
  LinkId find_link(const std::string& name, const std::string& place) const;

 private:
  DeviceId physical(DeviceId device) const;
  Link as_built(LinkId link) const;
  void leave_out_failed();
  void check_joined() const;
  void check_from(std::size_t node, LinkId link) const;
  void check_pair(DeviceId here, DeviceId there, LinkId link) const;
  void check_around(LinkId link) const;
  std::shared_ptr<const Impl> impl_;
  std::shared_ptr<const ClusterState> state_;
};

/// One of
///   NAME, NAME:16, NAME:16 nodes, NAME:12 gpus    a catalogue entry: nodes, or devices rounded up
///   FILE.yaml[:...]                               a cluster (schema partita.topology/1)
///   FILE.xml[?device=NAME]                        an NCCL topology file: one node
///   FILE.txt[?device=NAME]                        the output of nvidia-smi topo -m: one node
/// Throws InputError: place, value, remedy.
Topology load_topology(const std::string& text);

/// What-if changes to the files behind a topology: its own and those of its devices (base/yaml.h
/// says how a path reads: "memory_bandwidth" of a device, "nodes[*].links[kind=nvlink].bandwidth"
/// of a cluster).
struct TopologyEdits {
  std::vector<YamlEdit> cluster, device;
};
/// The topology with the edits done; files other than YAML are turned into YAML for them.
Topology load_topology(const std::string& text, const TopologyEdits& edits);

/// What load_topology takes, with so many nodes: "dgx-h100:4 nodes of 2" with "16" or "x4" is
/// "dgx-h100:16 nodes of 2". InputError{topology.nodes} where the text counts devices.
std::string with_nodes(const std::string& text, const std::string& nodes);

/// From the text of a cluster file; `file` is used in messages and to find device files beside it.
Topology parse_topology(const std::string& text, const std::string& file);

/// The nodes of each NVLink domain that a job of `nodes` gets where one has `per_domain`: equal
/// parts, the largest that divide the job, as Slurm's --segment gives and launchers of NVL72 ask
/// for (Megatron-Bridge, scripts/performance/utils/executors.py); domains filled in order where
/// such parts would be under half a domain.
std::int64_t nodes_of_each_domain(std::int64_t nodes, std::int64_t per_domain);

/// Names of the catalogue, sorted.
std::vector<std::string> topology_catalogue();

}  // namespace partita
