// What prices of products and attention are off by where a device has no points: by hand, and on
// the catalogue's points. Prints the tables of docs/cost.md, "Left out":
//
//     build/dev/tests/validation/validation_test --gtest_filter='LeftOut.*'
#include "validation/left_out.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "simulator/cost/kernels.h"

namespace partita::validation {
namespace {

/// An H100 with these points, (n, n, n) and its time.
DeviceProfile with_points(const std::vector<std::pair<double, double>>& cubes) {
  DeviceProfile d = load_device("h100-sxm");
  ProductTable t;
  t.layout = ProductLayout::tn;
  for (const auto& [n, time] : cubes) t.points.push_back({n, n, n, 1, Seconds{time}});
  d.products = {t};
  t.layout = ProductLayout::nn;
  d.products.push_back(t);
  d.attention.clear();
  return d;
}

TEST(LeftOut, BaselinesByHand) {
  // 2 · 1024³ = 2.147 GFLOP and 2 · 4096³ = 137.4 GFLOP in 10 us and 200 us. Each is left out in
  // turn and takes the other's rate: 640 us for 10, 3.125 us for 200 ... off by 63 and by 0.984.
  const auto all = left_out(with_points({{1024, 10e-6}, {4096, 640e-6}}), LeftOut::depth);
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].kernel, "bf16 TN");
  EXPECT_EQ(all[1].kernel, "bf16 NN");
  EXPECT_EQ(all[2].kernel, "all products");
  EXPECT_EQ(all[0].points, 2u);
  EXPECT_EQ(all[2].points, 4u);
  EXPECT_NEAR(all[0].one_rate.p95, 0, 1e-9) << "640 us is 64 times 10 us: one rate";
  // Calculon: 0.6 and 0.95 of 989.4 TFLOP/s; 6.3 MB at 0.6 and 100.7 MB at 0.9 of 3.35 TB/s.
  const double small = 2.147483648e9 / (0.6 * 989.4e12) + 6291456 / (0.6 * 3.35e12);
  const double large = 137.438953472e9 / (0.95 * 989.4e12) + 100663296 / (0.9 * 3.35e12);
  const double first = std::abs(small / 10e-6 - 1), second = std::abs(large / 640e-6 - 1);
  EXPECT_NEAR(all[0].steps.mean, (first + second) / 2, 1e-9);
  EXPECT_NEAR(all[0].steps.median, std::max(first, second), 1e-9);
}

TEST(LeftOut, AProblemIsLeftOutInEveryLayoutAtOnce) {
  // Four times slower than the model is what nobody would expect: with a twin on the other side the
  // price would know.
  DeviceProfile d = with_points({{2048, 1}, {4096, 1}});
  for (ProductTable& t : d.products) {
    for (ProductTable::Point& x : t.points) {
      Product p{x.m, x.n, x.k, 1, t.type, t.out, t.layout, false, false, {}};
      p.bytes = p.operand_bytes();
      const double model = 3e-6 + product_model(p, d, d.multiprocessors).work.count;
      x.time = Seconds{model * (x.m > 3000 ? 4 : 1)};
    }
  }
  for (const LeftOut rule : kLeftOuts) {
    const auto all = left_out(d, rule);
    EXPECT_GT(all.back().price.median, 0.5) << name(rule);
  }
}

TEST(LeftOut, ADeviceWithoutPointsHasNothingToLeaveOut) {
  for (const LeftOut rule : kLeftOuts) {
    EXPECT_TRUE(left_out(load_device("v100-sxm-16gb"), rule).empty());
    EXPECT_TRUE(left_out(with_points({{4096, 1e-3}}), rule).empty()) << "nothing would be left";
  }
}

/// Medians and 95th percentiles that were reached; only ever tightened. The targets are 4 % and 15
/// %; what misses them is explained on the page.
struct Bound {
  const char* device;
  const char* kernel;
  double median, p95;
};
constexpr Bound kBounds[] = {{"h100-sxm", "all products", 0.04, 0.21},
                             {"a100-pcie-80gb", "all products", 0.04, 0.21},
                             {"a100-pcie-80gb", "all attention", 0.05, 0.09},
                             {"b200", "all products", 0.06, 0.40},
                             {"b200", "all attention", 0.10, 0.28}};

TEST(LeftOut, TheCataloguesPointsArePredictedFromEachOther) {
  for (const char* device : {"h100-sxm", "a100-pcie-80gb", "b200"}) {
    const DeviceProfile d = load_device(device);
    for (const LeftOut rule : kLeftOuts) {
      fmt::print("{}, {} left out: median, mean, 95th percentile in %\n", device, name(rule));
      fmt::print("  {:<24}{:>6}{:>20}{:>20}{:>20}{:>20}\n", "", "points", "price", "model",
                 "Calculon's steps", "one rate");
      for (const LeftOutFigures& f : left_out(d, rule)) {
        fmt::print("  {:<24}{:>6}", f.kernel, f.points);
        for (const ShapeErrors& e : {f.price, f.model, f.steps, f.one_rate})
          fmt::print("  {:>5.1f} {:>5.1f} {:>5.1f}", 100 * e.median, 100 * e.mean, 100 * e.p95);
        fmt::print("\n");
        for (const Bound& b : kBounds) {
          if (b.device != d.name || b.kernel != f.kernel) continue;
          EXPECT_LE(f.price.median, b.median) << device << ", " << name(rule) << ", " << f.kernel;
          EXPECT_LE(f.price.p95, b.p95) << device << ", " << name(rule) << ", " << f.kernel;
          EXPECT_LT(f.price.mean, f.one_rate.mean) << device << ", " << name(rule);
          EXPECT_LT(f.price.mean, f.steps.mean) << device << ", " << name(rule);
        }
      }
    }
  }
}

}  // namespace
}  // namespace partita::validation
