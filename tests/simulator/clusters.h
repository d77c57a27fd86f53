// tests/simulator/clusters.h: clusters for laws that hold only where something costs nothing.
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "topologies/topology.h"

namespace partita {

struct DeviceSpeed {
  std::string matrix = "1 TFLOP/s";
  std::string vector = "1 TFLOP/s";
  std::string memory = "1 TB/s";
  std::string kernel_latency = "0 ps";
  /// 0: a processor that is its own host.
  int compute_capability = 0;
};

/// Cluster file `yaml`, in which devices are named "here" and are as fast as `speed`.
inline Topology cluster(const std::string& yaml, const DeviceSpeed& speed) {
  std::string pattern = (std::filesystem::temp_directory_path() / "partita-test-XXXXXX").string();
  const std::string folder = mkdtemp(pattern.data());
  std::ofstream(folder + "/here.yaml") << fmt::format(
      "schema: partita.device/1\nname: here\nsource: made up\nmemory: 80 GiB\n"
      "usable_memory: 80 GiB\nmemory_bandwidth: {}\n"
      "matrix_rates: {{bf16: {}, fp32: {}}}\nvector_rate: {}\nmatrix_efficiency: 1\n"
      "memory_efficiency: 1\nkernel_latency: {}\nmultiprocessors: 1\n{}",
      speed.memory, speed.matrix, speed.matrix, speed.vector, speed.kernel_latency,
      speed.compute_capability > 0
          ? fmt::format("compute_capability: {}\n", speed.compute_capability)
          : "");
  Topology t = parse_topology(yaml, folder + "/cluster.yaml");
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return t;
}

/// The cluster with devices that NCCL does not serve: its collectives take the closed forms.
inline TopologyEdits without_nccl() { return {{}, {{"compute_capability", "10"}}}; }
inline Topology without_nccl(const std::string& yaml) {
  std::string pattern = (std::filesystem::temp_directory_path() / "partita-test-XXXXXX").string();
  const std::string folder = mkdtemp(pattern.data());
  std::ofstream(folder + "/cluster.yaml") << yaml;
  Topology t = load_topology(folder + "/cluster.yaml", without_nccl());
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return t;
}

/// One node of `devices` behind a switch without latency whose links move 10²⁷ B/s.
inline Topology free_network(int devices, const DeviceSpeed& speed) {
  return cluster(fmt::format(R"(schema: partita.topology/1
name: free
source: made up
nodes:
  - vertices:
      gpu[0-{0}]: {{kind: device, device: here.yaml}}
      switch0: {{kind: nvswitch}}
    links:
      - {{from: "gpu[0-{0}]", to: switch0, kind: nvlink, bandwidth: 1000000000000000 TB/s, latency: 0 ps}}
)",
                             devices - 1),
                 speed);
}

}  // namespace partita
