// simulator/cost/nccl.h: NCCL's own model of its collectives (docs/nccl.md): what it expects each
// algorithm and protocol to take on a communicator, which pair it picks, on how many channels, and
// the search for channels on a topology that this rests on.
//
// In NCCL's units, microseconds and GB/s (1e9), so that its printed figures can be compared.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "simulator/program/program.h"
#include "topologies/topology.h"

namespace partita::nccl {

enum class Algorithm { tree, ring, collnet_direct, collnet_chain, nvls, nvls_tree, pat };
enum class Protocol { ll, ll128, simple };
enum class Collective { broadcast, reduce, all_gather, reduce_scatter, all_reduce };
enum class Cpu { intel, amd, other };
enum class Version { v2_28_9, v2_30_7 };
inline constexpr std::size_t kAlgorithms = 7, kProtocols = 3;

std::string_view name(Algorithm a);
std::string_view name(Protocol p);

/// What NCCL's search found for one algorithm; bandwidths of one channel.
struct Graph {
  int channels = 0;
  double intra_GBps = 0, inter_GBps = 0;
  bool nvlink = true;         ///< between the members of a node; else PCIe
  bool same_channels = true;  ///< of equal order on all nodes
};

struct Communicator {
  std::int64_t ranks = 1, nodes = 1;  ///< nodes as NCCL counts: an NVLink domain is one
  int compute_capability = 0;         ///< the least of the members'
  Cpu cpu = Cpu::intel;
  bool plain_tree = false;    ///< a tree whose nodes have one GPU on it
  double net_latency_us = 0;  ///< of the network plugin, which NCCL is told
  Version version = Version::v2_28_9;
  bool ll128 = true;                ///< paths allow it
  bool nvls = true;                 ///< multicast by the switches of a node
  bool collective_network = false;  ///< SHARP between nodes
  std::array<std::optional<Graph>, kAlgorithms> graphs;
  /// NVLinks of one member and its way to the network, as NCCL rates them; 0 where it has none.
  double nvlink_GBps = 0, network_GBps = 0;
  double network_share = 1;  ///< of its cards' rate that transfers reach
  /// Of a route into the network and out of it, beyond what NCCL's tables know.
  double route_latency_us = 0;

  double per_node() const { return static_cast<double>(ranks) / static_cast<double>(nodes); }
  const std::optional<Graph>& graph(Algorithm a) const {
    return graphs[static_cast<std::size_t>(a)];
  }
  std::optional<Graph>& graph(Algorithm a) { return graphs[static_cast<std::size_t>(a)]; }
};

/// time = latency + bytes / bandwidth. Bandwidth 0: this algorithm does not do it.
struct Price {
  double latency_us = 0, bandwidth_GBps = 0;
  double time_us(double bytes) const { return latency_us + bytes / (1000 * bandwidth_GBps); }
};
/// Before corrections by size and the rules of what is enabled. Empty where the pair does not exist
/// for this collective, or the communicator has no graph for it.
std::optional<Price> price(const Communicator& c, Collective what, Algorithm a, Protocol p);
/// Is the pair one that NCCL considers by default?
bool enabled(const Communicator& c, Collective what, Algorithm a, Protocol p);
/// NCCL's estimate for `bytes` (all-gather and reduce-scatter: of all ranks together), as
/// ncclGroupSimulateEnd returns it.
double estimate_us(const Communicator& c, Collective what, Algorithm a, Protocol p, double bytes);

struct Choice {
  Algorithm algorithm = Algorithm::ring;
  Protocol protocol = Protocol::simple;
  double time_us = 0;  ///< NCCL's estimate
  int channels = 1;    ///< each keeps a multiprocessor
  friend bool operator==(const Choice& a, const Choice& b) {
    return a.algorithm == b.algorithm && a.protocol == b.protocol;
  }
};
/// The pair with the least estimate. One rank: no time. `only` forces an algorithm (NCCL_ALGO).
Choice choose(const Communicator& c, Collective what, double bytes,
              std::optional<Algorithm> only = {});
/// Channels that a call of this size uses.
int channels(const Communicator& c, Algorithm a, Protocol p, double bytes);

/// Is this an NVIDIA GPU, whose collectives are NCCL's?
bool serves(const DeviceProfile& device);
/// Channels and their speeds as NCCL's search finds them for a group (docs/nccl.md says how far it
/// is followed).
Communicator communicator(const Topology& topology, const std::vector<std::int64_t>& ranks,
                          Version version = Version::v2_28_9);
/// Most channels of one speed, and the speed, between the members of a node that reach each other
/// over switches at `link_GBps` each, after duplication.
struct Channels {
  int count = 0;
  double speed = 0;
};
/// Tries NCCL's speeds from fast to slow; `fit(speed)` is how many channels of a speed there is
/// room for. `most_GBps`: of one channel; `total_GBps`: of a GPU.
template <class Fit>
Channels search_speeds(const std::vector<double>& speeds, double most_GBps, double total_GBps,
                       int most_channels, int compute_capability, const Fit& fit) {
  Channels best;
  for (const double s : speeds) {
    if (s > most_GBps || s > total_GBps) continue;
    // search.cc:1148: another speed is tried only while it could still be better.
    if (best.count > 0 && s < .49 * best.speed) break;
    const int n = std::min(fit(s), most_channels);
    if (n * s > best.count * best.speed) best = {n, s};
    if (best.count * best.speed >= total_GBps) break;
  }
  // search.cc:961
  const bool kept = compute_capability > 80 && best.speed < 50 && best.count > 4;
  if (best.speed >= 25 && !kept && best.count * 2 <= most_channels)
    best = {best.count * 2, best.speed / 2};
  return best;
}
const std::vector<double>& speeds(int compute_capability, bool between_nodes, Version version);

}  // namespace partita::nccl
