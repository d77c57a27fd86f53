#include "validation/sampling.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "simulator/lower/lower.h"
#include "topologies/device.h"
#include "validation/calibrate.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

KernelPoint of_bytes(double bytes, double time) {
  KernelPoint p;
  p.bytes = bytes;
  p.time = Seconds{time};
  return p;
}
KernelShape bytes(const std::string& kernel, double n) { return {kernel, 0, 0, 0, 1, n}; }

TEST(Doubt, IsLargestWhereInterpolationIs) {
  // A line, and a cliff before the last point.
  KernelTable t;
  for (const double mib : {1.0, 2.0, 4.0, 8.0})
    t["add"].push_back(of_bytes(mib * 0x1p20, mib * 1e-6));
  t["add"].push_back(of_bytes(16 * 0x1p20, 160e-6));
  EXPECT_EQ(doubt(t, bytes("add", 0x1p21), 132), 0) << "it was measured";
  EXPECT_EQ(doubt(t, bytes("scale", 0x1p21), 132), 1) << "nothing of it was";
  const double flat = doubt(t, bytes("add", 1.5 * 0x1p20), 132),
               cliff = doubt(t, bytes("add", 12 * 0x1p20), 132);
  EXPECT_LT(flat, 0.05);
  // By hand: the line is b x, of which the last is 10 times as far off as those before; 12 MiB lie
  // log2(1.5) of the way there. Without it they take 12 us.
  EXPECT_NEAR(cliff, std::log2(10) * std::log2(1.5) + std::log2(16.0 / 12) / 20, 1e-9);
  // By hand: on a line only the distance counts, half a factor of two over 20.
  KernelTable line{{"add", {t["add"].begin(), t["add"].end() - 1}}};
  EXPECT_NEAR(doubt(line, bytes("add", std::sqrt(2.0) * 0x1p21), 132), 0.5 / 20, 1e-9);
  EXPECT_EQ(next_candidate(t, {{bytes("add", 1.5 * 0x1p20)}, {bytes("add", 12 * 0x1p20)}, {}}, 132),
            1u);
  EXPECT_EQ(next_candidate(t, {{bytes("add", 0x1p20)}, {bytes("scale", 1)}}, 132), 1u);
  EXPECT_EQ(next_candidate(t, {{}, {}}, 132), 0u);
}

TEST(HoldOut, TakesHalfOfAllShapesWhateverTheirTimes) {
  std::mt19937 rng(4);
  KernelTable t;
  for (int k = 0; k < 2001; ++k) {
    KernelPoint p;
    p.m = static_cast<double>(1 + rng() % 5000);
    p.n = static_cast<double>(1 + rng() % 5000);
    p.k = 64;
    p.bytes = static_cast<double>(rng());
    p.time = Seconds{1e-6};
    const std::string kernel = k % 2 == 0 ? "linear forward bf16" : "softmax data";
    t[kernel].push_back(p);
    if (k % 10 == 0) t["copy"].push_back(p);
  }
  KernelTable rest = t;
  const KernelTable taken = take_held_out(rest);
  EXPECT_EQ(taken.at("linear forward bf16").size(), 500u) << "of 1001";
  EXPECT_EQ(taken.at("softmax data").size(), 500u);
  EXPECT_EQ(rest.at("linear forward bf16").size(), 501u);
  EXPECT_EQ(rest.at("copy").size(), t.at("copy").size());
  EXPECT_FALSE(taken.contains("copy"));
  // Other times and spreads: the same shapes.
  KernelTable slow = t;
  for (auto& [kernel, points] : slow) {
    for (KernelPoint& p : points) p.time = Seconds{1 + 1 / p.m}, p.spread = 0.3;
  }
  const KernelTable again = take_held_out(slow);
  for (const auto& [kernel, points] : taken) {
    ASSERT_EQ(again.at(kernel).size(), points.size());
    for (std::size_t k = 0; k < points.size(); ++k) {
      EXPECT_EQ(again.at(kernel)[k].m, points[k].m);
      EXPECT_EQ(again.at(kernel)[k].bytes, points[k].bytes);
    }
  }
}

TEST(HoldOut, IsNeverTheLargestAndAlwaysAWholeShape) {
  const auto held_of = [](std::vector<double> sizes) {
    KernelTable t;
    for (const double n : sizes) t["add"].push_back(of_bytes(n, n * 1e-12));
    std::vector<double> held;
    for (const auto& [kernel, points] : take_held_out(t)) {
      for (const KernelPoint& p : points) held.push_back(p.bytes);
    }
    return held;
  };
  using List = std::vector<double>;
  EXPECT_EQ(held_of({8}), List{});
  EXPECT_EQ(held_of({8, 2}), List{2});
  EXPECT_EQ(held_of({8, 2, 4}), List{4});
  EXPECT_EQ(held_of({8, 2, 4, 16}), (List{8, 4}));
  EXPECT_EQ(held_of({1, 2, 3, 4, 5, 6}), (List{2, 4, 5}));
  EXPECT_EQ(held_of({1, 2, 3, 4, 5}), (List{2, 4}));
  EXPECT_EQ(held_of({4, 2, 4, 8, 8}), (List{4, 4})) << "measured twice: one shape";
  // Of products FLOPs count, not their rows or bytes.
  KernelTable t;
  for (const auto& [m, k] : {std::pair{64.0, 8192.0}, {512.0, 512.0}, {4096.0, 96.0}}) {
    KernelPoint p = of_bytes(1 / m, 1e-6);
    p.m = m, p.n = 512, p.k = k;
    t["linear"].push_back(p);
  }
  const KernelTable held = take_held_out(t);
  ASSERT_EQ(held.at("linear").size(), 1u);
  EXPECT_EQ(held.at("linear")[0].m, 4096);
}

TEST(HoldOut, IsJudgedByKernelAndAltogether) {
  KernelTable t, held;
  for (const double mib : {1.0, 4.0}) t["add"].push_back(of_bytes(mib * 0x1p20, mib * 1e-6));
  // On the line 2 MiB take 2 us: 25 % more than 1.6, 20 % less than 2.5.
  held["add"] = {of_bytes(0x1p21, 1.6e-6), of_bytes(0x1p21, 2.5e-6)};
  held["scale"] = {of_bytes(0x1p21, 1e-6)};  // of which nothing else is known
  const auto all = judge(t, held, 132);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].kernel, "add");
  EXPECT_EQ(all[0].points, 2u);
  EXPECT_NEAR(all[0].mean, (0.25 + 0.2) / 2, 1e-9);
  EXPECT_NEAR(all[0].bias, (0.25 - 0.2) / 2, 1e-9);
  EXPECT_NEAR(all[0].most, 0.25, 1e-9);
  EXPECT_EQ(all[1].kernel, "all");
  EXPECT_EQ(all[1].points, 2u);
  EXPECT_TRUE(missed(all));
  // The bound is that of all together, and is none where nothing is held out.
  EXPECT_FALSE(missed({}));
  Judged of_one{"add", 4, 0.2, 0, 0.2}, whole{"all", 8, 0.05, 0.05, 0.2};
  EXPECT_FALSE(missed({of_one, whole}));
  whole.mean = 0.0501;
  EXPECT_TRUE(missed({of_one, whole}));
}

TEST(Clock, RunsThatStrayAreLeftOut) {
  std::vector<Unit> units(5);
  const double clocks[] = {1755, 1740, 1755, 1700, 0};
  for (std::size_t k = 0; k < 5; ++k) {
    units[k].conditions.clock_mhz = clocks[k];
    units[k].kernels["add"] = {of_bytes(static_cast<double>(k + 1), 1e-6)};
  }
  // 1740 is 0.85 % off 1755, 1700 more than 1 %; one says nothing.
  EXPECT_EQ(off_clock(units), (std::vector<std::size_t>{3}));
  // Of two that are far apart the faster is left.
  EXPECT_EQ(off_clock({units[2], units[3]}), (std::vector<std::size_t>{1}));
  // What another run does costs other power: it has a clock of its own, up to the cap.
  units[3].name = "large";
  units[3].conditions.throttled = "power cap";
  EXPECT_EQ(off_clock(units), (std::vector<std::size_t>{}));
  units[3].conditions.throttled = "power cap, heat";
  EXPECT_EQ(off_clock(units), (std::vector<std::size_t>{3}));
  const Profile p = joined(units);
  EXPECT_EQ(p.strayed, 1u);
  EXPECT_EQ(p.kernels.at("add").size(), 4u);
  // A network's run strays as well, but is no part of a profile.
  units[3].record = "{}";
  EXPECT_EQ(off_clock(units), (std::vector<std::size_t>{3}));
  EXPECT_EQ(joined(units).strayed, 0u);
  units[2].record = "{}";
  EXPECT_EQ(joined(units).kernels.at("add").size(), 3u);
}

/// A GPU that obeys a law: launches, FLOPs that small problems reach less of, bytes.
double law(const KernelShape& s) {
  double t = 4e-6 + s.bytes / 4e12;
  if (s.product()) {
    const double rate = s.kernel.find("16") != std::string::npos ? 600e12 : 40e12;
    const double fill = s.m * s.n * s.count / (s.m * s.n * s.count + 1e6);
    t += 2 * s.m * s.n * s.k * s.count / (rate * fill);
  }
  return t;
}
RankMeasurement measured_by_law(const Program& p, double (*time)(const KernelShape&)) {
  RankMeasurement m;
  m.samples.resize(3);
  for (auto& step : m.samples) {
    std::int64_t now = 0;
    for (const BlockCall& call : p.stages[0]) {
      const Block& b = p.blocks[call.block.index()];
      for (std::size_t k = 0; k < b.instructions.size(); ++k) {
        const Instruction& i = b.instructions[k];
        if (i.kind == Kind::allocate || i.kind == Kind::free) continue;
        std::int64_t ns = 0;
        if (i.kind == Kind::compute || i.kind == Kind::slice || i.kind == Kind::copy) {
          const KernelShape s = shape_of(p, i, 0);
          if (!s.kernel.empty()) ns = std::llround(1e9 * time(s));
        }
        step.push_back(
            {call.block.value, static_cast<std::int32_t>(k), call.micro_batch, now, now + ns});
        now += ns;
      }
    }
  }
  return m;
}
Program lowered(const CalibrationRun& r) {
  const auto plan = complete(r.graph, r.plan);
  EXPECT_TRUE(static_cast<bool>(plan)) << r.name << ": " << plan.reason();
  auto program = lower(r.graph, *plan);
  EXPECT_TRUE(static_cast<bool>(program)) << r.name << ": " << program.reason();
  return std::move(*program);
}

TEST(GpuCalibration, RecoversALawOfItsShapes) {
  std::vector<Unit> units;
  Unit u;
  const Program copies = copy_program(1, 1 << 30);
  harvest_copies(copies, {measured_by_law(copies, law)}, u.kernels);
  units.push_back(u);
  std::vector<Program> programs;
  std::vector<std::vector<KernelShape>> shapes;
  for (const CalibrationRun& r : gpu_calibration_runs()) {
    programs.push_back(lowered(r));
    shapes.push_back(shapes_of(programs.back()));
    EXPECT_FALSE(shapes.back().empty());
  }
  // In the order in which they are least known.
  std::vector<std::size_t> left(programs.size());
  for (std::size_t k = 0; k < left.size(); ++k) left[k] = k;
  std::size_t first = 99;
  while (!left.empty()) {
    std::vector<std::vector<KernelShape>> candidates;
    for (const std::size_t k : left) candidates.push_back(shapes[k]);
    const std::size_t next = next_candidate(joined(units).kernels, candidates, 132);
    if (first == 99) first = left[next];
    Unit one;
    harvest(programs[left[next]], {measured_by_law(programs[left[next]], law)}, one.kernels);
    units.push_back(one);
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(next));
  }
  EXPECT_EQ(first, 0u) << "nothing is known: the first";
  Profile p = joined(units);
  p.provenance = "a law";
  p.gpu = GpuFacts{"a GPU", 80_GiB, 132, 90, {}};
  OutsideMemory outside;
  outside.context = 498_MiB, outside.kernels = 140_MiB, outside.libraries = 26_MiB;
  outside.workspace = 32_MiB, outside.by_ranks = {{2, 100_MiB}, {8, 400_MiB}};
  p.outside = outside;
  KernelTable held = take_held_out(p.kernels);
  const auto all = judge(p.kernels, held, 132);
  EXPECT_GT(all.back().points, 100u);
  // Of bytes two points say all, up to their rounding to nanoseconds; products are fitted through
  // neighbours.
  double products = 0;
  int kinds = 0;
  for (const Judged& h : all) {
    const auto known = p.kernels.find(h.kernel);
    if (known == p.kernels.end()) continue;
    if (known->second[0].m > 0) {
      products += h.mean;
      ++kinds;
    } else if (known->second.size() > 1) {
      EXPECT_LT(h.mean, 0.01) << h.kernel << " of " << h.points;
    }
  }
  EXPECT_GT(kinds, 10);
  EXPECT_LT(products / kinds, 0.15);
  // The device file: rates of the law, within what launches and small problems cost.
  const DeviceProfile d = parse_device(device_yaml(p), "device.yaml");
  EXPECT_NEAR(d.memory_bandwidth.count / 4e12, 1, 0.02);
  EXPECT_NEAR(d.matrix_rate(ElementType::bf16).count / 600e12, 1, 0.1);
  EXPECT_NEAR(d.matrix_rate(ElementType::fp32).count / 40e12, 1, 0.1);
  EXPECT_NEAR(d.kernel_latency.count, 4e-6, 0.2e-6);
  EXPECT_EQ(d.multiprocessors, 132);
  ASSERT_TRUE(d.outside.has_value());
  EXPECT_EQ(*d.outside, outside);
  EXPECT_EQ(d.sources.at("outside_memory.context"),
            "a law: NVML, after the context less before it");
  p.outside.context = Bytes{0};
  EXPECT_FALSE(parse_device(device_yaml(p), "device.yaml").outside.has_value())
      << "without the context the parts are no whole";
  EXPECT_EQ(d.compute_capability, 90);
  EXPECT_TRUE(d.concurrent_streams);
  EXPECT_EQ(d.kernels.size(), p.kernels.size());
}

/// docs/calibration.md, "GPUs", the table's last column.
TEST(GpuCalibration, JoinsItsRunsMemory) {
  EXPECT_EQ(joined(std::vector<OutsideMemory>{}), OutsideMemory{});
  std::vector<OutsideMemory> runs(4);
  for (std::size_t k = 0; k < 3; ++k) {
    const auto n = static_cast<std::int64_t>(k);
    runs[k].context = 498_MiB;
    runs[k].kernels = Bytes{100 + 20 * n};
    runs[k].workspace = Bytes{n == 0 ? 900 : 32 + n};
    runs[k].communicators = Bytes{77};
    runs[k].by_ranks[8] = Bytes{400 + n};
  }
  runs[1].by_ranks[2] = Bytes{50};
  const OutsideMemory m = joined(runs);  // the last run says nothing
  EXPECT_EQ(m.context, 498_MiB);
  EXPECT_EQ(m.kernels, 140_B);
  EXPECT_EQ(m.workspace, 34_B);
  EXPECT_EQ(m.libraries, 0_B);
  EXPECT_EQ(m.communicators, 0_B) << "of a plan, not of a device";
  EXPECT_EQ(m.by_ranks, (std::map<int, Bytes>{{2, 50_B}, {8, 401_B}}));
}

TEST(GpuCalibration, KnowsEveryKernelOfItsSuiteAndNoneOfItsProducts) {
  std::set<std::string> kernels, products;
  const auto add = [&](const Program& p, auto f) {
    for (const KernelShape& s : shapes_of(p)) f(s);
  };
  const auto name = [](const KernelShape& s) {
    return fmt::format("{} {} {} {} {}", s.kernel, s.m, s.n, s.k, s.count);
  };
  for (const CalibrationRun& r : gpu_calibration_runs())
    add(lowered(r), [&](const KernelShape& s) {
      kernels.insert(s.kernel);
      if (s.product()) products.insert(name(s));
    });
  // Those for time that is left have no other kernels, and products of their own.
  const std::size_t before = products.size();
  std::set<std::string> names;
  for (const CalibrationRun& r : more_gpu_calibration_runs(64)) {
    EXPECT_TRUE(names.insert(r.name).second) << r.name;
    add(lowered(r), [&](const KernelShape& s) {
      EXPECT_EQ(kernels.count(s.kernel), 1u) << r.name << ": " << s.kernel;
      if (s.product()) products.insert(name(s));
    });
  }
  EXPECT_GT(products.size(), before + 300);
  EXPECT_EQ(more_gpu_calibration_runs(64).back().name, more_gpu_calibration_runs(65)[63].name);
  // In 8 bits, casts and all, and nothing of it where the GPU has none.
  for (const char* kernel : {"linear forward fp8", "linear data fp8", "linear weight fp8",
                             "state_space data bf16", "causal_convolution weight bf16"})
    EXPECT_EQ(kernels.count(kernel), 1u) << kernel;
  for (const CalibrationRun& r : gpu_calibration_runs(false))
    EXPECT_EQ(r.name.find("fp8"), std::string::npos) << r.name;
  std::set<std::string> lacks;
  for (const SuiteCase& c : gpu_suite()) {
    CalibrationRun r;
    r.name = c.name;
    r.graph = c.graph;
    r.plan = c.plan;
    add(lowered(r), [&](const KernelShape& s) {
      if (kernels.count(s.kernel) == 0) lacks.insert(s.kernel);
      if (s.product()) {
        EXPECT_EQ(products.count(name(s)), 0u) << c.name << ": " << name(s);
      }
    });
  }
  EXPECT_EQ(lacks, (std::set<std::string>{}));
}

}  // namespace
}  // namespace partita::validation
