#include "validation/calibrate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>

#include "simulator/cost/measured.h"
#include "simulator/lower/lower.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

TEST(KendallTau, TheExampleOfThePage) {
  EXPECT_NEAR(kendall_tau({1, 3, 2}, {1, 2, 3}, {0.1, 0.1, 0.1}), 1.0 / 3, 1e-12);
  EXPECT_EQ(kendall_tau({1, 3, 2}, {1, 2, 3}, {0.1, 0.4, 0.4}), 1);
  EXPECT_EQ(kendall_tau({}, {}, {}), 1);
}

/// Shapes of the kernels that a program runs.
std::set<std::string> shapes(const Graph& g, const Plan& plan, bool products_only) {
  const auto complete_plan = complete(g, plan);
  EXPECT_TRUE(static_cast<bool>(complete_plan)) << complete_plan.reason();
  const auto program = lower(g, *complete_plan);
  EXPECT_TRUE(static_cast<bool>(program)) << program.reason();
  std::set<std::string> all;
  for (const Block& b : program->blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kind != Kind::compute) continue;
      const KernelShape s = shape_of(*program, i, 0);
      if (products_only ? s.product() : !s.kernel.empty())
        all.insert(products_only ? fmt::format("{} {} {} {}", s.kernel, s.m, s.n, s.k) : s.kernel);
    }
  }
  return all;
}

TEST(Calibration, KnowsEveryKernelOfTheSuiteAndNoneOfItsProducts) {
  std::set<std::string> kernels, products;
  for (const int ranks : {1, 2, 4}) {
    for (const CalibrationRun& r : calibration_runs(ranks)) {
      kernels.merge(shapes(r.graph, r.plan, false));
      products.merge(shapes(r.graph, r.plan, true));
    }
  }
  std::set<std::string> lacks;
  for (const SuiteCase& c : suite()) {
    for (const auto& k : shapes(c.graph, c.plan, false)) {
      if (kernels.count(k) == 0) lacks.insert(k);
    }
    // The founding example has one layer: only its batch can differ.
    for (const auto& p : shapes(c.graph, c.plan, true))
      EXPECT_EQ(products.count(p), 0u) << c.name << ": " << p;
  }
  EXPECT_EQ(lacks, std::set<std::string>{});
}

TEST(Calibration, ProfilesReadBackAsTheyWereWritten) {
  Profile p;
  p.provenance = "a test";
  p.cores = 2;
  p.dispatch = Seconds{3.5e-7};
  p.kernels["linear forward"] = {{2, 8, 16, 32, 1, 4096, Seconds{1.25e-5}, 0.125}};
  p.kernels["add"] = {{1, 0, 0, 0, 1, 512, Seconds{2e-6}, 0.5}};
  const DeviceProfile d = parse_device(device_yaml(p), "device.yaml");
  EXPECT_FALSE(d.concurrent_streams);
  EXPECT_EQ(d.host_cores, 2);
  EXPECT_NEAR(d.dispatch.count, 3.5e-7, 1e-15);
  const KernelPoint& x = d.kernels.at("linear forward")[0];
  EXPECT_EQ(std::tuple(x.ranks, x.m, x.n, x.k, x.bytes, x.spread),
            std::tuple(2, 8., 16., 32., 4096., 0.125));
  EXPECT_NEAR(x.time.count, 1.25e-5, 1e-12);
  EXPECT_EQ(d.kernels.at("add")[0].m, 0);
}

TEST(Compare, MeasuredStandsBesidePredictedByKind) {
  // Two ranks, one step each: the slower one's time counts.
  Program p;
  p.mesh.atoms = {{"dp", 2}};
  p.blocks.resize(1);
  Instruction zero;
  zero.kernel = Kernel::zero;
  p.blocks[0].instructions = {zero};
  Timeline t;
  t.step = Ticks{2'000'000};
  t.classes = {{0, 0, 2}};
  t.entries = {{0, 0, 0, -1, Ticks{0}, Ticks{1'000'000}}};
  t.memory.resize(1);
  std::vector<RankMeasurement> ranks(2);
  ranks[0].step_s = {1e-6};
  ranks[1].step_s = {4e-6};
  ranks[0].samples = {{{0, 0, -1, 0, 600}}};
  ranks[1].samples = {{{0, 0, -1, 0, 1000}}};
  const StepComparison c = compare(p, t, ranks);
  EXPECT_DOUBLE_EQ(c.measured.count, 4e-6);
  EXPECT_DOUBLE_EQ(c.predicted.count, 2e-6);
  EXPECT_DOUBLE_EQ(c.error(), -0.5);
  ASSERT_EQ(c.kinds.size(), 1u);
  EXPECT_EQ(c.kinds[0].kind, "zero");
  EXPECT_DOUBLE_EQ(c.kinds[0].measured.count, 0.8e-6);
  EXPECT_DOUBLE_EQ(c.kinds[0].predicted.count, 1e-6);
}

}  // namespace
}  // namespace partita::validation
