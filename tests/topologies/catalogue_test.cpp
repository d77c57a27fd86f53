#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <sstream>

#include "base/error.h"
#include "base/yaml.h"
#include "tests/topologies/flat_graph.h"
#include "topologies/topology.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;

TEST(Catalogue, HasTheNamesThatOthersRelyOn) {
  const auto names = topology_catalogue();
  for (const char* name : {"dgx-a100-40gb", "dgx-a100-80gb", "dgx-h100", "dgx-h200", "dgx-b200",
                           "gb200-nvl72", "a100-pcie-8", "dgx1-v100", "cpu-host"})
    EXPECT_THAT(names, Contains(name));
}

/// docs/topologies.md lists every cluster and every device, these with their figures.
TEST(Catalogue, ThePagesTablesAreTheFiles) {
  const std::string page = read_file(PARTITA_TEST_DATA "/../../docs/topologies.md");
  for (const std::string& name : topology_catalogue())
    EXPECT_THAT(page, HasSubstr("`" + name + "`"));
  const auto cells = [](const std::string& line) {
    std::vector<std::string> all;
    for (std::size_t at = 1, end; (end = line.find(" | ", at)) != std::string::npos; at = end + 2)
      all.push_back(line.substr(at + 1, end - at - 1));
    return all;
  };
  // "0.9 TB/s", "1.555, 2.039 TB/s", "0.803 (H100's)": the number for the n-th name, or for all.
  const auto number = [](const std::string& cell, std::size_t n) {
    std::istringstream in(cell);
    double x = 0, more = 0;
    char comma = 0;
    in >> x;
    for (std::size_t k = 0; k < n && in >> comma && comma == ',' && in >> more; ++k) x = more;
    return x;
  };
  const std::size_t begin = page.find("| device | bf16 dense |");
  ASSERT_NE(begin, std::string::npos);
  std::istringstream table(page.substr(begin, page.find("\n\n", begin) - begin));
  std::set<std::string> listed;
  for (std::string line; std::getline(table, line);) {
    const auto row = cells(line);
    if (row.empty() || row[0].find('`') == std::string::npos) continue;
    std::size_t n = 0;
    for (std::size_t at = 0; (at = row[0].find('`', at)) != std::string::npos; ++n) {
      const std::size_t end = row[0].find('`', at + 1);
      const std::string name = row[0].substr(at + 1, end - at - 1);
      at = end + 1;
      SCOPED_TRACE(name);
      listed.insert(name);
      const DeviceProfile d = load_device(name);
      EXPECT_DOUBLE_EQ(number(row[2], n), static_cast<double>(d.memory.count) / std::pow(2, 30));
      EXPECT_DOUBLE_EQ(number(row[3], n), d.memory_bandwidth.count / 1e12);
      EXPECT_DOUBLE_EQ(number(row[4], n), d.matrix_efficiency);
    }
  }
  EXPECT_EQ(listed.size(), device_catalogue().size());
}

TEST(Catalogue, EveryEntryLoadsRoutesAllPairsAndCitesEveryFigure) {
  for (const auto& name : topology_catalogue()) {
    for (const char* count : {"", ":1", ":3", ":37"}) {
      SCOPED_TRACE(name + count);
      const Topology topology = load_topology(name + count);
      EXPECT_EQ(topology.name(), name);
      EXPECT_THAT(topology.notes(), IsEmpty());
      EXPECT_FALSE(topology.sources().empty());
      for (const auto& [figure, source] : topology.sources())
        EXPECT_FALSE(source.empty()) << figure;
      const FlatGraph flat(topology);
      for (std::size_t a = 0; a < topology.device_count(); a += 3) {
        for (std::size_t b = 0; b < topology.device_count(); b += 5) {
          const FlatPath got = walk(topology, DeviceId{a}, DeviceId{b});
          const auto want = flat.best(DeviceId{a}, DeviceId{b});
          ASSERT_TRUE(want);
          // PXN changes rails inside the node, even where the spine is crossed all the same.
          const DeviceId from{a}, to{b};
          const bool pxn = topology.node_of(from) != topology.node_of(to) &&
                           topology.local_index(from) != topology.local_index(to) &&
                           topology.node_count() > 20 && topology.spines() > 0;
          if (pxn)
            EXPECT_LE(got.links, want->links + 2) << a << " to " << b;
          else
            EXPECT_EQ(got.links, want->links) << a << " to " << b;
          EXPECT_EQ(got.bottleneck, want->bottleneck) << a << " to " << b;
        }
      }
    }
  }
}

TEST(Catalogue, DgxH100ReachesItsNeighbourByNvlinkAndTheNextNodeByItsOwnNic) {
  const Topology topology = load_topology("dgx-h100:2");
  EXPECT_EQ(topology.device_count(), 16u);
  EXPECT_EQ(topology.node_of(DeviceId{std::size_t{8}}), 1u);
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu1");
  // 18 links of 25 GB/s per direction.
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{1}}).bottleneck, 450e9);
  EXPECT_EQ(route_text(topology, 0, 8),
            "node0.gpu0->node0.pcie0 node0.pcie0->node0.nic0 node0.nic0->rail0 rail0->node1.nic0 "
            "node1.nic0->node1.pcie0 node1.pcie0->node1.gpu0");
  // 400 Gb/s.
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{8}}).bottleneck, 50e9);
  // Another rail: over the GPU that is on it.
  EXPECT_EQ(route_text(topology, 0, 9),
            "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu1 node0.gpu1->node0.pcie1 "
            "node0.pcie1->node0.nic1 node0.nic1->rail1 rail1->node1.nic1 node1.nic1->node1.pcie1 "
            "node1.pcie1->node1.gpu1");
  // The uplink of a rail of 32 nodes is 32 x 50 GB/s.
  const Link uplink = topology.link(topology.find_link("rail0->spine", ""));
  EXPECT_EQ(uplink.bandwidth, 1600.0_GBps);
  EXPECT_EQ(uplink.kind, LinkKind::network);
  EXPECT_THAT(topology.route(DeviceId{std::size_t{3}}, DeviceId{std::size_t{3}}), IsEmpty());
}

TEST(Catalogue, DevicesThatShareAPcieSwitchSpreadOverItsNics) {
  const Topology topology = load_topology("dgx-a100-80gb:2");
  EXPECT_THAT(route_text(topology, 0, 8), HasSubstr("nic0->rail0"));
  EXPECT_THAT(route_text(topology, 1, 9), HasSubstr("nic1->rail1"));
}

TEST(Catalogue, Nvl72JoinsEighteenTraysByNvlinkAndTheRestByNics) {
  const Topology topology = load_topology("gb200-nvl72:41");  // No equal parts of 9 to 18.
  EXPECT_EQ(topology.device_count(), 164u);
  EXPECT_THAT(topology.assumed(), IsEmpty());
  EXPECT_EQ(topology.domain_of(0), topology.domain_of(17));
  EXPECT_NE(topology.domain_of(17), topology.domain_of(18));
  EXPECT_EQ(topology.domain_of(36), topology.domain_of(40));  // The last has 5 trays.
  EXPECT_EQ(route_text(topology, 0, 71), "node0.gpu0->domain0 domain0->node17.gpu3");
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{0}}, DeviceId{std::size_t{71}}).bottleneck, 900e9);
  EXPECT_EQ(route_text(topology, 144, 159), "node36.gpu0->domain2 domain2->node39.gpu3");
  EXPECT_EQ(walk(topology, DeviceId{std::size_t{1}}, DeviceId{std::size_t{73}}).bottleneck, 50e9);
}

TEST(Catalogue, JobsOnSeveralDomainsGetEqualPartsOfThem) {
  // docs/topologies.md: the most trays that divide the job's, 9 at least.
  const std::map<std::int64_t, std::int64_t> each = {{1, 18},  {17, 18}, {18, 18}, {19, 18},
                                                     {20, 10}, {27, 9},  {32, 16}, {36, 18},
                                                     {38, 18}, {64, 16}, {128, 16}};
  for (const auto& [nodes, trays] : each) {
    const Topology t = load_topology(fmt::format("gb200-nvl72:{} gpus", 4 * nodes));
    std::size_t first = 0;
    while (first < t.node_count() && t.domain_of(first) == t.domain_of(0)) ++first;
    EXPECT_EQ(static_cast<std::int64_t>(first), std::min(nodes, trays)) << nodes;
    if (trays == 18)
      EXPECT_THAT(t.assumed(), IsEmpty()) << nodes;
    else
      EXPECT_THAT(t.assumed(), ElementsAre(fmt::format("{} nodes of each NVLink domain", trays)));
  }
  // Domains that were asked for stay as they are, and so do those of a file without a number.
  TopologyEdits edits;
  edits.cluster.push_back({"nodes[0].domain.nodes", "18"});
  const Topology asked = load_topology("gb200-nvl72:64", edits);
  EXPECT_EQ(asked.domain_of(17), asked.domain_of(0));
  EXPECT_NE(asked.domain_of(18), asked.domain_of(0));
  EXPECT_THAT(asked.assumed(), IsEmpty());
}

TEST(Catalogue, Dgx1HasSixBricksAtEveryGpuAndRoutesAroundThePcie) {
  const Topology topology = load_topology("dgx1-v100");
  std::vector<double> bricks(8);
  for (std::size_t l = 0; l < topology.link_count(); ++l) {
    const Link link = topology.link(LinkId{l});
    if (link.kind == LinkKind::nvlink)
      bricks[static_cast<std::size_t>(link.from)] += link.bandwidth.count / 25e9;
  }
  for (const double count : bricks) EXPECT_EQ(count, 6);
  EXPECT_EQ(route_text(topology, 0, 3), "node0.gpu0->node0.gpu3");
  // No direct link: two bricks' hops over a GPU that has both, rather than five over PCIe.
  EXPECT_EQ(topology.route(DeviceId{std::size_t{0}}, DeviceId{std::size_t{7}}).size(), 2u);
}

TEST(Catalogue, CountsMeanNodesOrDevices) {
  EXPECT_EQ(load_topology("dgx-h100").node_count(), 1u);
  EXPECT_EQ(load_topology("dgx-h100:16 nodes").node_count(), 16u);
  EXPECT_EQ(load_topology("dgx-h100:16 nodes").used_devices(), 128u);
  for (const char* text : {"dgx-h100:12gpus", "dgx-h100:12 gpus", "dgx-h100:12 devices"}) {
    EXPECT_EQ(load_topology(text).node_count(), 2u);
    EXPECT_EQ(load_topology(text).device_count(), 16u);
    EXPECT_EQ(load_topology(text).used_devices(), 12u);
  }
  EXPECT_EQ(load_topology("cpu-host").device_count(), 8u);
  EXPECT_EQ(load_topology("cpu-host:4").device_count(), 32u);
  EXPECT_EQ(load_topology("gb200-nvl72:72 gpus").node_count(), 18u);
}

TEST(Catalogue, ACentreOf131072DevicesStoresOneNode) {
  const Topology small = load_topology("dgx-h100:1");
  const Topology large = load_topology("dgx-h100:16384");
  EXPECT_EQ(large.device_count(), 131072u);
  // 16384 x (66 links in the node + 16 of NICs), and 2 for each of 512 x 8 leaves.
  EXPECT_EQ(large.link_count(), 16384u * 82 + 2 * 512 * 8);
  EXPECT_LE(large.stored_vertices(), small.stored_vertices() + 8);
  EXPECT_EQ(route_text(large, 0, 131071),
            "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu7 node0.gpu7->node0.pcie7 "
            "node0.pcie7->node0.nic7 node0.nic7->unit0.rail7 "
            "unit0.rail7->spine spine->unit511.rail7 unit511.rail7->node16383.nic7 "
            "node16383.nic7->node16383.pcie7 node16383.pcie7->node16383.gpu7");
}

TEST(Catalogue, NodesOfWhichSomeDevicesRun) {
  const Topology few = load_topology("dgx-h100:3 nodes of 2"), whole = load_topology("dgx-h100:3");
  EXPECT_EQ(few.node_count(), 3u);
  EXPECT_EQ(few.device_count(), 6u);
  EXPECT_EQ(few.used_devices(), 6u);
  EXPECT_EQ(few.node_of(DeviceId{2}), 1u);
  // The rest of a node is there: its cards too.
  const auto cards = [](const Topology& t) {
    std::size_t n = 0;
    for (std::size_t l = 0; l < t.link_count(); ++l) {
      const Link x = t.link(LinkId{l});
      n += t.vertex_kind(x.from) == VertexKind::nic && x.kind == LinkKind::network ? 1 : 0;
    }
    return n;
  };
  EXPECT_EQ(cards(few), cards(whole));
  EXPECT_EQ(load_topology("gb200-nvl72:2 nodes of 1").device_count(), 2u);
  EXPECT_EQ(load_topology("dgx-h100:2 nodes of 8").device_count(), 16u);
}

TEST(Catalogue, BadTextsSayWhatIsWrong) {
  const auto loading = [](const char* text) { return [text] { load_topology(text); }; };
  EXPECT_THAT(loading("dgx-h10"),
              ThrowsMessage<InputError>(AllOf(HasSubstr("unknown topology 'dgx-h10'"),
                                              HasSubstr("gb200-nvl72"),
                                              HasSubstr("did you mean 'dgx-h100'?"))));
  EXPECT_THAT(loading("dgx-h100:"), ThrowsMessage<InputError>(HasSubstr("'' is no number of")));
  EXPECT_THAT(loading("dgx-h100:0"),
              ThrowsMessage<InputError>(HasSubstr("must be 1 to 1,000,000; '0' is given")));
  EXPECT_THAT(loading("dgx-h100:-2"), ThrowsMessage<InputError>(HasSubstr("'-2' is given")));
  EXPECT_THAT(loading("dgx-h100:1000001"),
              ThrowsMessage<InputError>(HasSubstr("at most 1,000,000 nodes; 1,000,001")));
  EXPECT_THAT(loading("dgx-h100:99999999999999999999"),
              ThrowsMessage<InputError>(HasSubstr("99999999999999999999")));
  EXPECT_THAT(loading("dgx-h100:4 racks"),
              ThrowsMessage<InputError>(HasSubstr("'4 racks' is no number of nodes or devices")));
  EXPECT_THAT(loading("dgx-h100:2 nodes of 9"),
              ThrowsMessage<InputError>(HasSubstr("a node has 8 devices; 9 are asked for")));
  for (const char* few : {"dgx-h100:2 nodes of", "dgx-h100:2 nodes of x", "dgx-h100:2 nodes of 0",
                          "dgx-h100:2 gpus of 1"})
    EXPECT_THAT(loading(few), ThrowsMessage<InputError>(HasSubstr("is no number of"))) << few;
  EXPECT_THAT(loading("dgx-h100?device=b200"),
              ThrowsMessage<InputError>(HasSubstr("a catalogue entry does")));
  EXPECT_THAT(loading("dgx-h100?gpu=b200"),
              ThrowsMessage<InputError>(HasSubstr("unknown option '?gpu=b200'")));
  EXPECT_THAT(loading("no/such.yaml"), ThrowsMessage<InputError>(HasSubstr("no/such.yaml")));
}

}  // namespace
}  // namespace partita
