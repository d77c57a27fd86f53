#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "base/yaml.h"
#include "tests/topologies/flat_graph.h"
#include "topologies/topology.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const std::string kFolder = std::string(PARTITA_TEST_DATA) + "/topologies/";

/// A copy of a fixture with one text replaced, loaded.
auto loading(const std::string& fixture, const std::string& from, const std::string& to,
             const std::string& suffix = "") {
  std::string text = read_file(kFolder + fixture);
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  const std::string file = ::testing::TempDir() + "partita-" + fixture;
  std::ofstream(file) << text;
  return [=] {
    std::ofstream(file) << text;
    return load_topology(file + suffix);
  };
}

double bandwidth(const Topology& topology, const std::string& link) {
  for (std::size_t l = 0; l < topology.link_count(); ++l)
    if (topology.link_name(LinkId{l}) == link) return topology.link(LinkId{l}).bandwidth.count;
  ADD_FAILURE() << "no link " << link;
  return 0;
}

TEST(NcclXml, ReadsNvswitchNicsAndSockets) {
  const Topology topology = load_topology(kFolder + "nvswitch.xml");
  EXPECT_EQ(topology.device_count(), 2u);
  EXPECT_EQ(topology.device(DeviceId{std::size_t{0}}).name, "h100-sxm");
  EXPECT_EQ(topology.cpu_vendor(0), "intel");
  EXPECT_EQ(topology.nic_count(0), 2u);
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu1");
  EXPECT_EQ(bandwidth(topology, "node0.gpu0->node0.nvswitch0"), 450e9);  // (10 + 8) x 25
  EXPECT_NEAR(bandwidth(topology, "node0.gpu0->node0.pcie0"), 63e9, 0.02e9);
  EXPECT_EQ(bandwidth(topology, "node0.cpu0->node0.cpu1"), 22e9);
  EXPECT_THAT(topology.notes(), Contains(HasSubstr("PCI device 0x2330 is taken as h100-sxm")));
  EXPECT_THAT(topology.notes(), Contains(HasSubstr("latencies are assumed")));
}

TEST(NcclXml, SeveralNodesAlikeHangOnOneSwitch) {
  const Topology topology = load_topology(kFolder + "nvswitch.xml:3");
  EXPECT_EQ(topology.device_count(), 6u);
  EXPECT_EQ(route_text(topology, 1, 5),
            "node0.gpu1->node0.pcie1 node0.pcie1->node0.nic1 node0.nic1->switch "
            "switch->node2.nic1 node2.nic1->node2.pcie1 node2.pcie1->node2.gpu1");
  EXPECT_EQ(bandwidth(topology, "node0.nic1->switch"), 50e9);
  EXPECT_THAT(topology.notes(), Contains(HasSubstr("on one non-blocking switch")));
}

TEST(NcclXml, ReadsRanksNestingDirectLinksAndC2c) {
  const Topology topology = load_topology(kFolder + "nested.xml");
  // Rank 0 is the second GPU of the file, straight under the first switch.
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.gpu1");
  EXPECT_EQ(bandwidth(topology, "node0.gpu0->node0.gpu1"), 50e9);  // 2 x 25
  EXPECT_EQ(bandwidth(topology, "node0.gpu1->node0.cpu0"), 200e9);
  EXPECT_NEAR(bandwidth(topology, "node0.pcie1->node0.pcie0"), 31.5e9, 0.01e9);
  EXPECT_NEAR(bandwidth(topology, "node0.pcie0->node0.cpu0"), 15.75e9, 0.01e9);  // x8
  EXPECT_EQ(bandwidth(topology, "node0.nic0->node0.cpu0"), 5000e9);
  EXPECT_EQ(topology.cpu_vendor(0), "arm");
  EXPECT_EQ(topology.nic_count(0), 1u);  // A <net> without dev is ignored.
  EXPECT_THAT(topology.notes(), Contains(HasSubstr("0000:05:00.0 has no known link speed")));
}

TEST(NcclXml, MissingNvlinksAreAssumedAloud) {
  std::string text = read_file(kFolder + "nvswitch.xml");
  for (std::size_t at; (at = text.find("<nvlink")) != std::string::npos;)
    text.erase(at, text.find("/>", at) + 2 - at);
  const std::string file = ::testing::TempDir() + "partita-no-nvlink.xml";
  std::ofstream(file) << text;
  const Topology topology = load_topology(file);
  EXPECT_EQ(bandwidth(topology, "node0.gpu1->node0.nvswitch0"), 450e9);
  EXPECT_THAT(topology.notes(),
              Contains(HasSubstr("18 NVLinks of each h100-sxm to one NVSwitch are assumed")));
}

TEST(NcclXml, TheDeviceCanBeNamed) {
  const auto load = loading("nvswitch.xml", "device=\"0x2330\"", "device=\"0xffff\"");
  EXPECT_THAT(load, ThrowsMessage<InputError>(
                        AllOf(HasSubstr("PCI device id '0xffff'"), HasSubstr("?device=h100-sxm"))));
  const Topology topology = load_topology(kFolder + "nvswitch.xml?device=h200-sxm:2");
  EXPECT_EQ(topology.device(DeviceId{std::size_t{3}}).name, "h200-sxm");
}

TEST(NcclXml, BadFilesSayWhatIsWrong) {
  EXPECT_THAT(loading("nvswitch.xml", "</system>", ""),
              ThrowsMessage<InputError>(HasSubstr("this is no XML")));
  EXPECT_THAT(loading("nvswitch.xml", "0000:21:00.0", "0000:11:00.0"),
              ThrowsMessage<InputError>(HasSubstr("two GPUs have the bus id '0000:11:00.0'")));
  EXPECT_THAT(loading("nvswitch.xml", "numaid=\"1\"", "numaid=\"0\""),
              ThrowsMessage<InputError>(HasSubstr("two <cpu> have numaid 0")));
  EXPECT_THAT(loading("nvswitch.xml", "count=\"10\"", "count=\"0\""),
              ThrowsMessage<InputError>(HasSubstr("count '0'; it must be at least 1")));
  EXPECT_THAT(loading("nvswitch.xml", "speed=\"400000\"", "speed=\"1e99\""),
              ThrowsMessage<InputError>(HasSubstr("<net> has speed=\"1e99\"; at most 1e+09")));
  EXPECT_THAT(loading("nested.xml", "target=\"0000:05:00.0\"", "target=\"0000:07:00.0\""),
              ThrowsMessage<InputError>(HasSubstr("leads to '0000:07:00.0', which is no GPU")));
  const std::string file = ::testing::TempDir() + "partita-empty.xml";
  std::ofstream(file) << "<system version=\"1\"><cpu numaid=\"0\"/></system>";
  EXPECT_THAT([&] { load_topology(file); }, ThrowsMessage<InputError>(HasSubstr("no GPU in this")));
  std::ofstream(file) << "<graphs/>";
  EXPECT_THAT([&] { load_topology(file); },
              ThrowsMessage<InputError>(HasSubstr("this file has <graphs>")));
}

TEST(NvidiaSmi, ReadsAnNvswitchMatrixWithEscapesAndNics) {
  const Topology topology = load_topology(kFolder + "nvswitch-matrix.txt?device=h100-sxm");
  EXPECT_EQ(topology.device_count(), 4u);
  EXPECT_EQ(topology.nic_count(0), 2u);
  EXPECT_EQ(route_text(topology, 0, 3), "node0.gpu0->node0.nvswitch0 node0.nvswitch0->node0.gpu3");
  EXPECT_EQ(bandwidth(topology, "node0.gpu3->node0.nvswitch0"), 450e9);
  EXPECT_THAT(topology.notes(), Contains(HasSubstr("cables to one NVSwitch, 25 GB/s each")));
  const Topology two = load_topology(kFolder + "nvswitch-matrix.txt?device=h100-sxm:2");
  // PIX: one PCIe switch between GPU0 and NIC0; GPU1 meets it at the CPU.
  EXPECT_THAT(route_text(two, 0, 4), HasSubstr("gpu0->node0.pcie0 node0.pcie0->node0.nic0"));
  EXPECT_THAT(route_text(two, 1, 4), HasSubstr("gpu1->node0.cpu0 node0.cpu0->node0.pcie0"));
}

TEST(NvidiaSmi, ReadsDistancesDirectLinksAndTheDeviceComment) {
  const Topology topology = load_topology(kFolder + "pcie-matrix.txt");
  EXPECT_EQ(topology.device(DeviceId{std::size_t{0}}).name, "a100-pcie-40gb");
  EXPECT_EQ(route_text(topology, 0, 1), "node0.gpu0->node0.gpu1");
  EXPECT_EQ(bandwidth(topology, "node0.gpu0->node0.gpu1"), 300e9);  // 12 x 25
  EXPECT_EQ(route_text(topology, 0, 2), "node0.gpu0->node0.pcie0 node0.pcie0->node0.gpu2");
  EXPECT_EQ(bandwidth(topology, "node0.gpu0->node0.pcie0"), 31.5e9);
  // SYS: over both CPUs.
  EXPECT_EQ(route_text(topology, 0, 3),
            "node0.gpu0->node0.pcie0 node0.pcie0->node0.cpu0 node0.cpu0->node0.cpu1 "
            "node0.cpu1->node0.gpu3");
}

TEST(NvidiaSmi, BadFilesSayWhatIsWrong) {
  EXPECT_THAT([] { load_topology(kFolder + "nvswitch-matrix.txt"); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("doesn't name the GPU"),
                                              HasSubstr("?device=h100-sxm"),
                                              HasSubstr("# device: h100-sxm"))));
  EXPECT_THAT(loading("pcie-matrix.txt", "GPU3    SYS ", "GPU3    FAR "),
              ThrowsMessage<InputError>(HasSubstr("cell GPU3 to GPU0 is 'FAR'")));
  EXPECT_THAT(loading("pcie-matrix.txt", "GPU3    SYS ", "GPU3    PIX "),
              ThrowsMessage<InputError>(HasSubstr("GPU3 to GPU0 is PIX, but GPU0 to GPU3 is SYS")));
  EXPECT_THAT(loading("pcie-matrix.txt", "GPU2    PXB", "GPU4    PXB"),
              ThrowsMessage<InputError>(HasSubstr(":5: the row of GPU2 with 4 cells is expected")));
  EXPECT_THAT(loading("pcie-matrix.txt", "GPU0    GPU1    GPU2 ", "GPU0    NIC0    GPU2 "),
              ThrowsMessage<InputError>(HasSubstr("column 2 is 'NIC0'; GPUs must come first")));
  EXPECT_THAT(loading("pcie-matrix.txt", "NV12", "NV99999"),
              ThrowsMessage<InputError>(HasSubstr("'NV99999'")));
  const std::string file = ::testing::TempDir() + "partita-nothing.txt";
  std::ofstream(file) << "hello\n";
  EXPECT_THAT([&] { load_topology(file); }, ThrowsMessage<InputError>(HasSubstr("no header row")));
}

}  // namespace
}  // namespace partita
