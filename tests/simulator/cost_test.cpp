// tests/simulator/cost_test.cpp: prices that docs/cost.md works out by hand, on dgx-h100.

#include "simulator/cost/cost.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "topologies/topology.h"

namespace partita {
namespace {

std::vector<std::int64_t> first(std::int64_t n) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

const DeviceProfile& h100() {
  static const Topology t = load_topology("dgx-h100:1");
  return t.device(DeviceId{0});
}

/// The page prints six digits.
void expect_us(Seconds t, double microseconds) {
  EXPECT_NEAR(t.count * 1e6, microseconds, 5e-6 * microseconds);
}

TEST(Cost, OfAProductIsItsFlopsOverTheSustainedRate) {
  Work w;
  w.matrix = true;
  w.type = ElementType::bf16;
  w.flops = Flops{2.0 * 8192 * 8192 * 8192};
  w.bytes = Bytes{std::int64_t{3} * 8192 * 8192 * 2};
  expect_us(kernel_time(w, h100()), 1386.92);
}

TEST(Cost, OfAMemoryBoundKernelIsItsBytesOverTheSustainedBandwidth) {
  Work w;
  w.bytes = 128_MiB;
  w.flops = Flops{33'554'432};
  expect_us(kernel_time(w, h100()), 47.5167);
}

TEST(Cost, OfAnAllReduceInANodeIsARingOverTheSwitch) {
  const Topology t = load_topology("dgx-h100:1");
  Communication c(t);
  const WireCount w = wire_count(CollectiveKind::all_reduce, 8, 1_GiB);
  EXPECT_EQ(w.steps, 14);
  EXPECT_EQ(w.bytes, Bytes{1'879'048'192});
  EXPECT_NEAR(c.ring(first(8)).bandwidth.count, 450e9, 1);
  expect_us(c.collective(CollectiveKind::all_reduce, 1_GiB, first(8)), 4192.66);
  // A short one: three hops there and three back beat fourteen.
  expect_us(c.collective(CollectiveKind::all_reduce, 64_KiB, first(8)), 9.29127);
}

TEST(Cost, OfAnAllReduceAcrossNodesUsesAllNetworkCards) {
  const Topology t = load_topology("dgx-h100:2");
  Communication c(t);
  EXPECT_NEAR(c.ring(first(16)).bandwidth.count, 400e9, 1);
  expect_us(c.collective(CollectiveKind::all_reduce, 1_GiB, first(16)), 5120.16);
}

TEST(Cost, OfAPointToPointIsItsRoute) {
  Communication c(load_topology("dgx-h100:2"));
  expect_us(c.point_to_point(64_MiB, 0, 1), 153.131);
  expect_us(c.point_to_point(64_MiB, 0, 8), 1347.38);
}

TEST(Cost, OfAnAllToAllIsItsBusiestLink) {
  Communication c(load_topology("dgx-h100:2"));
  expect_us(c.collective(CollectiveKind::all_to_all, 64_MiB, first(8)), 134.489);
  expect_us(c.collective(CollectiveKind::all_to_all, 64_MiB, first(16)), 676.889);
}

TEST(Cost, GrowsWithThePayloadAndNeverBeatsItsBytes) {
  Communication c(load_topology("dgx-h100:2"));
  for (const auto kind : {CollectiveKind::all_reduce, CollectiveKind::all_gather,
                          CollectiveKind::reduce_scatter, CollectiveKind::all_to_all}) {
    for (const std::int64_t n : {2, 3, 8, 16}) {
      Seconds before{0};
      for (std::int64_t bytes = 1; bytes < std::int64_t{1} << 33; bytes *= 7) {
        const Seconds t = c.collective(kind, Bytes{bytes}, first(n));
        EXPECT_GE(t, before) << n << " ranks, " << bytes << " B";
        // A GPU's NVLink and network card together.
        const auto wire = static_cast<double>(wire_count(kind, n, Bytes{bytes}).bytes.count);
        EXPECT_GE(t.count, wire / 500e9);
        before = t;
      }
      EXPECT_EQ(c.collective(kind, Bytes{0}, first(n)), Seconds{0});
    }
    EXPECT_EQ(c.collective(kind, 1_GiB, first(1)), Seconds{0});
  }
}

}  // namespace
}  // namespace partita
