#include "validation/calibrate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <set>
#include <string>
#include <tuple>

#include "simulator/cost/measured.h"
#include "simulator/lower/lower.h"
#include "validation/compare.h"
#include "validation/figures.h"

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

TEST(Calibration, AGpusLaunchAndDispatchAreWritten) {
  Profile p;
  p.provenance = "a test";
  p.gpu = GpuFacts{"a GPU", 80_GiB, 132, 90, Bytes{0}};
  DeviceProfile d = parse_device(device_yaml(p), "device.yaml");
  EXPECT_EQ(d.dispatch, Seconds{0});
  EXPECT_EQ(d.launch, Seconds{0});
  EXPECT_FALSE(d.dispatch_in_graph);
  p.dispatch = Seconds{1.5e-6}, p.in_graph = Seconds{7.5e-7}, p.launch = Seconds{6e-6};
  d = parse_device(device_yaml(p), "device.yaml");
  EXPECT_NEAR(d.dispatch.count, 1.5e-6, 1e-15);
  EXPECT_NEAR(d.dispatch_in_graph->count, 7.5e-7, 1e-15);
  EXPECT_NEAR(d.launch.count, 6e-6, 1e-15);
}

TEST(Calibration, ProfilesReadBackAsTheyWereWritten) {
  Profile p;
  p.provenance = "a test";
  p.cores = 2;
  p.dispatch = Seconds{3.5e-7};
  p.dispatch_measured = true;
  p.kernels["linear forward"] = {{2, 8, 16, 32, 1, 4096, Seconds{1.25e-5}, 0.125}};
  p.kernels["add"] = {{1, 0, 0, 0, 1, 512, Seconds{2e-6}, 0.5}};
  const DeviceProfile d = parse_device(device_yaml(p), "device.yaml");
  EXPECT_FALSE(d.concurrent_streams);
  EXPECT_EQ(d.host_cores, 2);
  EXPECT_NEAR(d.dispatch.count, 3.5e-7, 1e-15);
  // What was not measured is not written as if it had been.
  EXPECT_EQ(d.sources.count("overlap"), 0u);
  const KernelPoint& x = d.kernels.at("linear forward")[0];
  EXPECT_EQ(std::tuple(x.ranks, x.m, x.n, x.k, x.bytes, x.spread),
            std::tuple(2, 8., 16., 32., 4096., 0.125));
  EXPECT_NEAR(x.time.count, 1.25e-5, 1e-12);
  EXPECT_EQ(d.kernels.at("add")[0].m, 0);
}

std::vector<RankMeasurement> steps(double seconds) {
  std::vector<RankMeasurement> ranks(2);
  ranks[0].step_s = {seconds / 2};
  ranks[1].step_s = {seconds};  // the slower one counts
  return ranks;
}

TEST(Overlap, TheExampleOfThePage) {
  EXPECT_NEAR(overlap_of(steps(4e-3), steps(2e-3), steps(3e-3)), 0.5, 1e-12);
  EXPECT_NEAR(overlap_of(steps(5e-3), steps(2e-3), steps(3e-3)), 0, 1e-12);
  EXPECT_NEAR(overlap_of(steps(3e-3), steps(2e-3), steps(3e-3)), 1, 1e-12);
  EXPECT_EQ(overlap_of(steps(6e-3), steps(2e-3), steps(3e-3)), 0);
}

TEST(Collectives, PricesAreOfAsManyRanksAtWork) {
  CollectiveTable t;
  t["all_reduce"] = {{2, Bytes{1024}, Seconds{1e-5}, 0, 2},
                     {2, Bytes{1024}, Seconds{8e-5}, 0, 4},
                     {4, Bytes{1024}, Seconds{9e-5}, 0, 4}};
  const auto time = [&](int ranks, int at_work) {
    return measured_time(t, "all_reduce", ranks, Bytes{1024}, at_work)->count;
  };
  EXPECT_DOUBLE_EQ(time(2, 0), 1e-5);
  EXPECT_DOUBLE_EQ(time(2, 2), 1e-5);
  EXPECT_DOUBLE_EQ(time(2, 4), 8e-5);
  EXPECT_DOUBLE_EQ(time(2, 16), 8e-5);
  EXPECT_DOUBLE_EQ(time(4, 4), 9e-5);
}

TEST(Journal, WhatIsThereIsKeptAndATornLineIsNot) {
  const std::string file = ::testing::TempDir() + fmt::format("journal-{}.jsonl", ::getpid());
  std::remove(file.c_str());
  const JournalHeader header{"here", "threads"};
  Unit u;
  u.round = 1;
  u.ranks = 2;
  u.name = "copies";
  u.seconds = 0.25;
  u.kernels["copy"] = {{2, 0, 0, 0, 1, 8192, Seconds{3.5e-6}, 0.125}};
  u.collectives["send"] = {{2, Bytes{64}, Seconds{2e-6}, 0.5, 4}};
  u.dispatch = {4e-7};
  u.overlap = {0.5};
  u.recording = 0.125;
  u.no_records = "none";
  u.failed = "no memory";
  u.slowdown = {{KernelFamily::attention, "all_gather", 4, 0, Bytes{4096}, 1.25, 1.5, 0.125},
                {KernelFamily::memory, kStandIn, 1, 24, Bytes{64}, 2, 1, 0}};
  {
    Journal j(file, header);
    EXPECT_TRUE(j.units().empty());
    j.add(u);
  }
  {
    std::FILE* f = std::fopen(file.c_str(), "a");
    std::fputs("{\"round\": 2, \"ranks\"", f);
    std::fclose(f);
  }
  for (int k = 0; k < 2; ++k) {
    const Journal j(file, header);
    ASSERT_EQ(j.units().size(), 1u);
    EXPECT_TRUE(j.has(1, 2, "copies"));
    EXPECT_FALSE(j.has(2, 2, "copies"));
    EXPECT_EQ(j.seconds(), 0.25);
    const Unit& read = j.units()[0];
    EXPECT_EQ(read.kernels.at("copy")[0].time, u.kernels.at("copy")[0].time);
    EXPECT_EQ(read.kernels.at("copy")[0].bytes, 8192);
    EXPECT_EQ(read.collectives.at("send")[0].at_work, 4);
    EXPECT_EQ(read.dispatch, u.dispatch);
    EXPECT_EQ(read.overlap, u.overlap);
    EXPECT_EQ(read.recording, u.recording);
    EXPECT_EQ(read.no_records, u.no_records);
    EXPECT_EQ(read.failed, u.failed);
    ASSERT_EQ(read.slowdown.size(), 2u);
    for (std::size_t x = 0; x < 2; ++x) {
      const SlowdownPoint &a = read.slowdown[x], &b = u.slowdown[x];
      EXPECT_EQ(std::tie(a.kernel, a.beside, a.ranks, a.multiprocessors, a.bytes, a.of_kernel,
                         a.of_transfer, a.spread),
                std::tie(b.kernel, b.beside, b.ranks, b.multiprocessors, b.bytes, b.of_kernel,
                         b.of_transfer, b.spread));
    }
  }
  EXPECT_THROW(Journal(file, {"there", "threads"}), InputError);
  EXPECT_THROW(Journal(file, {"here", "mpi"}), InputError);
  std::remove(file.c_str());
}

// docs/cuda.md, "Kernel times", by hand.
TEST(Calibration, ASampleTakesWhatTheDeviceHasRecorded) {
  RankMeasurement m;
  m.samples = {{{0, 0, 0, 0, 5000}}, {{0, 0, 0, 0, 6000}}, {{0, 0, 0, 0, 5000}}};
  bool recorded = true;
  EXPECT_DOUBLE_EQ(time_of_sample(m, 0, &recorded), 5e-6);
  EXPECT_FALSE(recorded);
  m.kernel_ns = {{3400}, {3500}, {9000}};
  EXPECT_DOUBLE_EQ(time_of_sample(m, 0, &recorded), 3.5e-6);
  EXPECT_TRUE(recorded);
  // 1.05 x 5 + 2 us is the most that is believed.
  m.kernel_ns = {{7250}};
  EXPECT_DOUBLE_EQ(time_of_sample(m, 0, &recorded), 7.25e-6);
  m.kernel_ns = {{7260}};
  EXPECT_DOUBLE_EQ(time_of_sample(m, 0, &recorded), 5e-6);
  EXPECT_FALSE(recorded);
  // Not known in one of the steps, as of what the host has computed.
  m.kernel_ns = {{3500}, {0}};
  EXPECT_DOUBLE_EQ(time_of_sample(m, 0), 5e-6);
}

TEST(Compare, KindsAreWhatTheDeviceHasRecorded) {
  Program p;
  p.mesh.atoms = {{"dp", 1}};
  p.blocks.resize(1);
  Instruction zero;
  zero.kernel = Kernel::zero;
  p.blocks[0].instructions = {zero, zero};
  Timeline t;
  t.step = Ticks{9'000'000};
  t.classes = {{0, 0, 1}};
  // Between the two a microsecond passes, which is nobody's kernel.
  t.entries = {{0, 0, 0, -1, Ticks{0}, Ticks{3'000'000}},
               {0, 0, 1, -1, Ticks{4'000'000}, Ticks{7'000'000}}};
  t.memory.resize(1);
  RankMeasurement m;
  m.step_s = {12e-6};
  m.plain_s = {10e-6};
  m.samples = {{{0, 0, -1, 0, 5000}, {0, 1, -1, 6000, 11000}}};
  StepComparison c = compare(p, t, {m});
  EXPECT_DOUBLE_EQ(c.kinds.at(0).measured.count, 11e-6);
  EXPECT_DOUBLE_EQ(c.kinds.at(0).predicted.count, 7e-6);
  m.kernel_ns = {{3000, 3200}, {3200, 3400}};
  c = compare(p, t, {m});
  // 3.1 and 3.3 us (the later of two is the median), and what passes beside them in 10 us.
  EXPECT_DOUBLE_EQ(c.kinds.at(0).measured.count, 10e-6);
  EXPECT_DOUBLE_EQ(c.kinds.at(0).predicted.count, 6e-6);
  EXPECT_DOUBLE_EQ(c.measured.count, 10e-6);
  EXPECT_NEAR(dispatch_of({m})->count, (10e-6 - 6.4e-6) / 2, 1e-12);
  // The example of docs/cuda.md, "Launch and dispatch".
  EXPECT_FALSE(launch_of({m}));
  m.queued_s = {3e-6};
  EXPECT_NEAR(launch_of({m})->count, 1.5e-6, 1e-12);
  EXPECT_NEAR(dispatch_of({m})->count, 1.8e-6, 1e-12);
  m.queued_s = {8e-6};  // 0.8 of the step
  EXPECT_NEAR(launch_of({m})->count, 4e-6, 1e-12);
  m.queued_s = {8.1e-6};
  EXPECT_FALSE(launch_of({m}));
  EXPECT_FALSE(dispatch_of({m}));
  EXPECT_FALSE(dispatch_in_graph_of({m}));
  m.captured_s = {8.4e-6};
  EXPECT_NEAR(dispatch_in_graph_of({m})->count, 1e-6, 1e-12);
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
  // Steps between whose instructions nobody asked for the time say what a step takes.
  ranks[0].plain_s = {3e-6, 2e-6, 1e-6}, ranks[1].plain_s = {1e-6, 2.5e-6, 2e-6};
  EXPECT_DOUBLE_EQ(compare(p, t, ranks).measured.count, 2.5e-6);
  for (auto& r : ranks) r.plain_s.clear();
  // A rank that got a core late began at 4 us: the step ended 5 us after it began.
  ranks[1].samples = {{{0, 0, -1, 4000, 5000}}};
  EXPECT_DOUBLE_EQ(compare(p, t, ranks).measured.count, 5e-6);
}

}  // namespace
}  // namespace partita::validation
