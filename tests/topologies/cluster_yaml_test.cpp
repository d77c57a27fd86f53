#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "tests/topologies/flat_graph.h"
#include "topologies/topology.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr const char* kGood = R"(schema: partita.topology/1
name: lab
source: measured
nodes:
  - count: 2
    cpu_vendor: amd
    vertices:
      gpu[0-3]: {kind: device, device: a100-pcie-40gb}
      pcie[0-1]: {kind: pcie switch}
      nic0: {kind: nic, bandwidth: 100 Gb/s, latency: 1 us}
    links:
      - {from: "gpu[0-3]", to: "pcie[0-1]", kind: pcie, bandwidth: 31.5 GB/s, latency: 0.3 us}
      - {from: pcie0, to: pcie1, kind: pcie, bandwidth: 31.5 GB/s, latency: 0.3 us}
      - {from: nic0, to: pcie0, kind: pcie, bandwidth: 15.75 GB/s, latency: 0.3 us}
      - {between: "gpu[0,2]", kind: nvlink, lanes: 12, bandwidth: 25 GB/s, latency: 0.5 us}
  - vertices:
      gpu[0-1]: {kind: device, device: v100-sxm-16gb}
      nic0: {kind: nic, bandwidth: 50 Gb/s, latency: 1 us}
    links:
      - {from: "gpu[0-1]", to: nic0, kind: pcie, bandwidth: 15.75 GB/s, latency: 0.3 us, source: book}
fabric: {kind: single switch}
)";

Topology good() { return parse_topology(kGood, "lab.yaml"); }

std::string with(const std::string& from, const std::string& to) {
  std::string text = kGood;
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

auto parsing(const std::string& text) {
  return [text] { parse_topology(text, "lab.yaml"); };
}

TEST(ClusterYaml, GroupsAreNumberedInOrder) {
  const Topology topology = good();
  EXPECT_EQ(topology.node_count(), 3u);
  EXPECT_EQ(topology.device_count(), 10u);
  EXPECT_EQ(topology.first_device(2), DeviceId{std::size_t{8}});
  EXPECT_EQ(topology.device_count(2), 2u);
  EXPECT_EQ(topology.cpu_vendor(1), "amd");
  EXPECT_EQ(topology.cpu_vendor(2), "");
  EXPECT_EQ(topology.profile_count(), 2u);
  EXPECT_EQ(topology.profile_index(DeviceId{std::size_t{7}}), 0u);
  EXPECT_EQ(topology.device(DeviceId{std::size_t{8}}).name, "v100-sxm-16gb");
  EXPECT_EQ(topology.device_name(DeviceId{std::size_t{9}}), "node2.gpu1");
}

// One node with cards that lead nowhere: what importers of a node's own word make.
TEST(ClusterYaml, CardsWithoutAFabricHaveNoPorts) {
  std::string text = with("count: 2", "count: 1");
  text.replace(text.find("  - vertices:"), std::string::npos, "fabric: {kind: none}\n");
  const Topology t = parse_topology(text, "lab.yaml");
  ASSERT_EQ(t.node_count(), 1u);
  // By hand: 4 + 1 + 1 + 1 cables, both ways each.
  EXPECT_EQ(t.link_count(), 14u);
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const LinkId id(l);
    EXPECT_LT(static_cast<std::size_t>(t.link(id).from), t.vertex_count());
    EXPECT_LT(static_cast<std::size_t>(t.link(id).to), t.vertex_count());
    EXPECT_NE(t.link_name(id).find("node0."), std::string::npos);
  }
  text.replace(text.find("none"), 4, "single switch");
  EXPECT_EQ(parse_topology(text, "lab.yaml").link_count(), 16u);
}

TEST(ClusterYaml, RangesPairUpBlocksAreDealtOutAndBetweenIsAMesh) {
  const Topology topology = good();
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.pcie0 node0.pcie0->node0.gpu1");
  EXPECT_EQ(route_text(topology, 0, 2), "node0.gpu0->node0.gpu2");
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{2}}).bottleneck, 300e9);
  // 50 Gb/s at the older node.
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{9}}).bottleneck, 6.25e9);
}

TEST(ClusterYaml, AnAliasSharesTheProfileOfItsName) {
  const Topology topology =
      parse_topology(with("device: v100-sxm-16gb", "device: a100-pcie4-40gb"), "lab.yaml");
  EXPECT_EQ(topology.profile_count(), 1u);
  EXPECT_EQ(topology.profile_index(DeviceId{std::size_t{9}}), 0u);
}

TEST(ClusterYaml, AFigureTakesTheNearestSource) {
  const auto sources = good().sources();
  EXPECT_EQ(sources.front().second, "measured");
  EXPECT_THAT(sources, ::testing::Contains(::testing::Pair("nodes[1].links[0]", "book")));
}

TEST(ClusterYaml, AFileBesideTheClusterDescribesItsDevice) {
  const std::string folder = ::testing::TempDir() + "partita-topologies";
  std::filesystem::create_directories(folder);
  std::ofstream(folder + "/mine.yaml") << R"(schema: partita.device/1
name: mine
source: test
memory: 8 GiB
usable_memory: 7 GiB
memory_bandwidth: 100 GB/s
matrix_rates: {bf16: 10 TFLOP/s}
vector_rate: 1 TFLOP/s
matrix_efficiency: 0.8
memory_efficiency: 0.9
kernel_latency: 3 us
multiprocessors: 4
)";
  std::ofstream(folder + "/one.yaml") << R"(schema: partita.topology/1
name: one
nodes: [{vertices: {gpu: {kind: device, device: ./mine.yaml}}}]
)";
  const Topology topology = load_topology(folder + "/one.yaml");
  EXPECT_EQ(topology.device_count(), 1u);
  EXPECT_EQ(topology.device(DeviceId{std::size_t{0}}).memory, 8_GiB);
}

TEST(ClusterYaml, ANodesProcessorsLaunchAsFastAsItsGroupSays) {
  const Topology t =
      parse_topology(with("cpu_vendor: amd", "cpu_vendor: amd\n    launch_time: 1.4"), "lab.yaml");
  EXPECT_EQ(t.launch_time(1), 1.4);
  EXPECT_EQ(t.launch_time(2), 1);
}

TEST(ClusterYaml, BadClustersSayWhatIsWrong) {
  for (const char* factor : {"0", "-1", "101"})
    EXPECT_THAT(parsing(with("cpu_vendor: amd", fmt::format("launch_time: {}", factor))),
                ThrowsMessage<InputError>(AllOf(HasSubstr("lab.yaml:6: nodes[0].launch_time"),
                                                HasSubstr("write more than 0 and at most 100"))));
  EXPECT_THAT(
      parsing(with("count: 2", "count: 0")),
      ThrowsMessage<InputError>(HasSubstr("nodes[0]: a group needs 1 to 1,000,000 nodes; 0")));
  EXPECT_THAT(parsing(with("count: 2", "count: 1000001")),
              ThrowsMessage<InputError>(HasSubstr("1000001")));
  EXPECT_THAT(parsing(with("count: 2", "count: 1000000")),
              ThrowsMessage<InputError>(HasSubstr("at most 1,000,000 nodes; 1,000,001 are given")));
  EXPECT_THAT(parsing(with("pcie[0-1]: {", "gpu2: {")),
              ThrowsMessage<InputError>(HasSubstr("vertex 'gpu2' is named twice")));
  EXPECT_THAT(parsing(with("from: pcie0,", "from: pcie2,")),
              ThrowsMessage<InputError>(AllOf(HasSubstr("lab.yaml:13: nodes[0].links[1].from"),
                                              HasSubstr("no vertex 'pcie2' in this node"),
                                              HasSubstr("did you mean 'pcie"))));
  EXPECT_THAT(parsing(with("device: a100-pcie-40gb", "device: a100-pci-40gb")),
              ThrowsMessage<InputError>(AllOf(HasSubstr("lab.yaml:8:"),
                                              HasSubstr("unknown device 'a100-pci-40gb'"),
                                              HasSubstr("did you mean 'a100-pcie-40gb'?"))));
  EXPECT_THAT(parsing(with("fabric: {kind: single switch}", "")),
              ThrowsMessage<InputError>(HasSubstr("no route joins node0.gpu0 and node1.gpu0")));
  EXPECT_THAT(parsing(with("single switch", "hypercube")),
              ThrowsMessage<InputError>(
                  HasSubstr("use one of none, single switch, rails, fat tree, torus, dragonfly")));
  EXPECT_THAT(parsing(with("source: measured\n", "")),
              ThrowsMessage<InputError>(HasSubstr("every hardware figure needs a source")));
  EXPECT_THAT(parsing(with("bandwidth: 100 Gb/s", "bandwidth: 100")),
              ThrowsMessage<InputError>(HasSubstr("bandwidth")));
  EXPECT_THAT(
      parsing(with("bandwidth: 100 Gb/s, latency: 1 us", "bandwidth: 1 Gb/s, latency: 1e9 s")),
      ThrowsMessage<InputError>(HasSubstr("latency is at most 10 s")));
  for (const char* wrong : {"0", "1.5", "-1", "nan"})
    EXPECT_THAT(
        parsing(with("100 Gb/s, latency", fmt::format("100 Gb/s, efficiency: {}, latency", wrong))),
        ThrowsMessage<InputError>(HasSubstr("efficiency")))
        << wrong;
  EXPECT_THAT(parsing(with("100 Gb/s, latency", "100 Gb/s, efficiency: 2, latency")),
              ThrowsMessage<InputError>(
                  HasSubstr("efficiency 2 is no share; use a number above 0, at most 1")));
  EXPECT_THAT(parsing(with("gpu[0-3]\", to", "gpu[0-2]\", to")),
              ThrowsMessage<InputError>(HasSubstr("3 vertices can't be linked to 2")));
  EXPECT_THAT(parsing(with("to: pcie1", "to: pcie0")),
              ThrowsMessage<InputError>(HasSubstr("vertex 'pcie0' is linked to itself")));
  EXPECT_THAT(parsing(with("gpu[0,2]", "gpu[0,]")),
              ThrowsMessage<InputError>(HasSubstr("'gpu[0,]' is no name or range")));
  EXPECT_THAT(parsing(with("gpu[0,2]", "gpu[2-0]")),
              ThrowsMessage<InputError>(HasSubstr("is no name or range")));
  EXPECT_THAT(parsing(with("kind: pcie switch", "kind: pcie-switch")),
              ThrowsMessage<InputError>(HasSubstr("did you mean 'pcie switch'?")));
  EXPECT_THAT(parsing(with("cpu_vendor", "cpu_maker")),
              ThrowsMessage<InputError>(HasSubstr("cpu_maker")));
  EXPECT_THAT(parsing("schema: partita.topology/1\nname: x\nnodes: []\n"),
              ThrowsMessage<InputError>(HasSubstr("at least one group of nodes")));
  EXPECT_THAT(
      parsing("schema: partita.topology/1\nname: x\nnodes: [{vertices: {c: {kind: cpu}}}]\n"),
      ThrowsMessage<InputError>(HasSubstr("a node needs at least one device")));
  EXPECT_THAT(
      parsing("schema: partita.topology/1\nname: x\nsource: t\nnodes: [{count: 2, vertices: "
              "{g: {kind: device, device: cpu}}}]\nfabric: {kind: single switch}\n"),
      ThrowsMessage<InputError>(HasSubstr("a fabric joins NICs, and no node has one")));
}

TEST(ClusterYaml, ANumberNeedsOneGroup) {
  const std::string file = ::testing::TempDir() + "partita-two-groups.yaml";
  std::ofstream(file) << kGood;
  EXPECT_THAT([&] { load_topology(file + ":4"); },
              ThrowsMessage<InputError>(HasSubstr("this one has 2: change count:")));
}

TEST(ClusterYaml, CollectivesArePointsOrCurves) {
  const std::string table = R"(collectives:
  all_reduce:
    - {ranks: 4, at_work: 8, bytes: 64 B, time: 20 us, spread: 0.1}
    - {ranks: 8, nodes: 2, source: a log, times: {64 KiB: 30 us, 1 MiB: 90 us}}
)";
  const Topology t = parse_topology(kGood + table, "lab.yaml");
  const auto& points = t.collectives().at("all_reduce");
  ASSERT_EQ(points.size(), 3u);
  EXPECT_EQ(points[0].working(), 8);
  EXPECT_EQ(points[0].nodes, 0);
  EXPECT_EQ(points[2].ranks, 8);
  EXPECT_EQ(points[2].nodes, 2);
  EXPECT_EQ(points[2].bytes, Bytes{1048576});
  EXPECT_NEAR(points[2].time.count, 90e-6, 1e-15);
  const auto cited = std::find_if(t.sources().begin(), t.sources().end(),
                                  [](const auto& s) { return s.second == "a log"; });
  ASSERT_NE(cited, t.sources().end());
  EXPECT_EQ(cited->first, "collectives.all_reduce[1]");
  const auto bad = [&](const std::string& item) {
    return parsing(std::string(kGood) + "collectives:\n  all_reduce:\n    - " + item + "\n");
  };
  EXPECT_THAT(bad("{ranks: 8, bytes: 1 B, times: {1 B: 1 us}}"),
              ThrowsMessage<InputError>(HasSubstr("either bytes and time")));
  EXPECT_THAT(bad("{ranks: 8, times: {1 B: 0 us}}"),
              ThrowsMessage<InputError>(HasSubstr("above 0")));
  EXPECT_THAT(bad("{ranks: 8, times: {fast: 1 us}}"), ThrowsMessage<InputError>(HasSubstr("fast")));
  EXPECT_THAT(bad("{ranks: 8, nods: 1, times: {1 B: 1 us}}"),
              ThrowsMessage<InputError>(HasSubstr("nods")));
}

}  // namespace
}  // namespace partita
