// Kernels and transfers at once: what their samples say, and the programs that are measured.
#include "validation/slowdown.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "simulator/cost/cost.h"
#include "topologies/device.h"
#include "validation/calibrate.h"

namespace partita::validation {
namespace {

constexpr auto kProduct = KernelFamily::product;

/// Steps of one rank each of which has these intervals, in hundredths of microseconds.
RankMeasurement rank(int number, int steps,
                     const std::vector<std::pair<std::int64_t, std::int64_t>>& intervals) {
  RankMeasurement r;
  r.rank = number;
  for (int s = 0; s < steps; ++s) {
    auto& samples = r.samples.emplace_back();
    for (const auto& [start, end] : intervals)
      samples.push_back({0, static_cast<std::int32_t>(samples.size()), -1, start * 10, end * 10});
  }
  return r;
}

SlowdownTable harvested(const std::vector<RankMeasurement>& both,
                        const std::vector<RankMeasurement>& kernels,
                        const std::vector<RankMeasurement>& alone, bool serial = false) {
  SlowdownTable t;
  harvest_slowdown(kProduct, {kStandIn, 1, 24, Bytes{1 << 20}}, both, kernels, alone, serial, t);
  return t;
}

// docs/calibration.md, "Slowdown".
TEST(Slowdown, TheExampleOfThePage) {
  const auto kernels = rank(0, 3, {{0, 10000}, {10000, 20000}, {20000, 30000}});
  const auto alone = rank(0, 3, {{0, 25000}});
  const auto both = rank(0, 3, {{0, 27500}, {0, 13000}, {13000, 26000}, {26000, 36346}});
  const SlowdownTable t = harvested({both}, {kernels}, {alone});
  ASSERT_EQ(t.size(), 1u);
  EXPECT_NEAR(t[0].of_kernel, 1.3, 1e-5);
  EXPECT_NEAR(t[0].of_transfer, 1.1, 1e-12);
  EXPECT_EQ(t[0].kernel, kProduct);
  EXPECT_EQ(t[0].beside, kStandIn);
  EXPECT_EQ(t[0].multiprocessors, 24);
  EXPECT_EQ(t[0].bytes, 1_MiB);
  EXPECT_EQ(t[0].spread, 0);
}

TEST(Slowdown, WhatIsNotSharedIsAsFastAsAlone) {
  const auto kernels = rank(0, 1, {{0, 100}, {100, 200}});
  // The transfer goes on for 200 after the kernels: 250 in all, as alone.
  const auto alone = rank(0, 1, {{0, 350}});
  auto t = harvested({rank(0, 1, {{0, 500}, {0, 150}, {150, 300}})}, {kernels}, {alone});
  ASSERT_EQ(t.size(), 1u);
  EXPECT_DOUBLE_EQ(t[0].of_kernel, 1.5);
  EXPECT_DOUBLE_EQ(t[0].of_transfer, 2);  // 300 / (350 - 200)
  // Faster together is noise.
  t = harvested({rank(0, 1, {{0, 340}, {0, 90}, {90, 180}})}, {kernels}, {alone});
  ASSERT_EQ(t.size(), 1u);
  EXPECT_EQ(t[0].of_kernel, 1);
  EXPECT_EQ(t[0].of_transfer, 1);
}

TEST(Slowdown, TooLittleSharedSaysNothing) {
  const auto kernels = rank(0, 1, {{0, 100}});
  const auto alone = rank(0, 1, {{0, 1000}});
  EXPECT_EQ(harvested({rank(0, 1, {{0, 1000}, {0, 99}})}, {kernels}, {alone}).size(), 0u);
  EXPECT_EQ(harvested({rank(0, 1, {{0, 1000}, {0, 100}})}, {kernels}, {alone}).size(), 1u);
  // Not at once at all: of a GPU nothing, of a host's ranks plain ratios.
  const auto after = rank(0, 1, {{0, 1500}, {1500, 1620}});
  EXPECT_EQ(harvested({after}, {kernels}, {alone}).size(), 0u);
  const auto t = harvested({after}, {kernels}, {alone}, true);
  ASSERT_EQ(t.size(), 1u);
  EXPECT_DOUBLE_EQ(t[0].of_kernel, 1.2);
  EXPECT_DOUBLE_EQ(t[0].of_transfer, 1.5);
}

TEST(Slowdown, OfATransferTheRankThatCameLastCounts) {
  const auto kernels = rank(0, 1, {{0, 100}});
  // Rank 0 waits 600 for rank 1.
  const std::vector<RankMeasurement> alone{rank(0, 1, {{0, 800}}), rank(1, 1, {{600, 800}})};
  const std::vector<RankMeasurement> both{rank(0, 1, {{0, 900}, {0, 100}}),
                                          rank(1, 1, {{600, 900}, {600, 800}})};
  const auto t = harvested(both, {kernels, kernels}, alone);
  ASSERT_EQ(t.size(), 1u);
  EXPECT_NEAR(t[0].of_transfer, 2, 1e-12);  // 200 / (200 - 100)
  EXPECT_NEAR(t[0].of_kernel, 1.5, 1e-12);  // (100 + 200) / (100 + 100)
}

/// What can be said of a program before it is run: a family's kernels one after the other on the
/// compute stream, and the transfer on its own, of what it is named for.
TEST(Slowdown, ProgramsHaveTheirKernelsAndTheirTransfer) {
  for (const bool gpu : {false, true}) {
    for (const int ranks : {1, 2, 4}) {
      const auto transfers = transfers_to_measure(ranks, gpu);
      EXPECT_EQ(transfers.empty(), !gpu && ranks != 2);
      std::set<std::string> names;
      for (const TransferBeside& t : transfers) {
        EXPECT_TRUE(names.insert(t.name()).second) << t.name();
        for (const auto family :
             {KernelFamily::product, KernelFamily::attention, KernelFamily::memory}) {
          const Program both = at_once_program(family, t, AtOnce::both, gpu),
                        alone = at_once_program(family, t, AtOnce::transfer, gpu),
                        kernels = at_once_program(family, t, AtOnce::kernels, gpu);
          SCOPED_TRACE(both.blocks[0].name);
          EXPECT_EQ(both.ranks(), ranks);
          const auto& list = both.blocks[0].instructions;
          ASSERT_EQ(alone.blocks[0].instructions.size(), 1u);
          EXPECT_EQ(list.size(), 1 + kernels.blocks[0].instructions.size());
          EXPECT_EQ(list[0].stream, 1);
          if (ranks == 1) {
            EXPECT_EQ(list[0].kind, Kind::copy);
            EXPECT_EQ(list[0].multiprocessors, t.multiprocessors);
            EXPECT_EQ(local_bytes(both, list[0].reads[0], 0), t.bytes);
            EXPECT_EQ(t.bytes.count % 16, 0);
          } else {
            EXPECT_EQ(list[0].kind, Kind::collective);
            EXPECT_EQ(name(list[0].collective), t.kind);
            EXPECT_EQ(payload(both, list[0], 0), t.bytes);
          }
          for (std::size_t k = 1; k < list.size(); ++k) {
            EXPECT_EQ(list[k].stream, kComputeStream);
            const Work w = work_of(both, list[k], 0);
            EXPECT_EQ(w.attention.has_value(), family == KernelFamily::attention);
            EXPECT_EQ(w.matrix, family != KernelFamily::memory);
            EXPECT_EQ(w.products.empty(), family == KernelFamily::memory || w.attention);
          }
        }
      }
    }
  }
}

TEST(Slowdown, RoundsAreJoinedAndReadBackAsTheyWereWritten) {
  std::vector<Unit> units(3);
  for (std::size_t k = 0; k < units.size(); ++k) {
    SlowdownPoint p;
    p.kernel = KernelFamily::attention;
    p.beside = "all_gather";
    p.ranks = 4;
    p.bytes = 8_MiB;
    p.of_kernel = 1.2 + 0.1 * static_cast<double>(k);
    p.of_transfer = 1.5 - 0.1 * static_cast<double>(k);
    units[k].slowdown = {p};
  }
  units[0].slowdown.push_back({KernelFamily::memory, kStandIn, 1, 24, 720_MiB, 1.5, 1.25, 0.5});
  Profile p = joined(units);
  p.provenance = "a test";
  for (const bool gpu : {false, true}) {
    if (gpu) p.gpu = GpuFacts{"GPU", Bytes{std::int64_t{80} << 30}, 132, 90, Bytes{0}};
    const DeviceProfile d = parse_device(device_yaml(p), "device.yaml");
    ASSERT_EQ(d.slowdown.size(), 2u);
    const SlowdownPoint &a = d.slowdown[0], &b = d.slowdown[1];
    EXPECT_EQ(d.sources.at("slowdown"), "a test");
    EXPECT_EQ(a.kernel, KernelFamily::attention);
    EXPECT_EQ(a.beside, "all_gather");
    EXPECT_EQ(a.ranks, 4);
    EXPECT_EQ(a.bytes, 8_MiB);
    EXPECT_NEAR(a.of_kernel, 1.3, 1e-9);
    EXPECT_NEAR(a.of_transfer, 1.4, 1e-9);
    EXPECT_NEAR(a.spread, 0.1 / 1.3, 1e-3);
    EXPECT_EQ(b.kernel, KernelFamily::memory);
    EXPECT_EQ(b.beside, kStandIn);
    EXPECT_EQ(b.multiprocessors, 24);
    EXPECT_EQ(b.of_kernel, 1.5);
    EXPECT_EQ(b.of_transfer, 1.25);
    EXPECT_EQ(b.spread, 0.5);
  }
}

}  // namespace
}  // namespace partita::validation
