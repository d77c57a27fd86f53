// tests/simulator/kernels_test.cpp: prices of products and attention by shape: docs/cost.md by
// hand, and laws over random shapes.

#include "simulator/cost/kernels.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/error.h"
#include "simulator/cost/cost.h"
#include "simulator/cost/state_space.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

Product square_of(double n, ElementType type = ElementType::bf16) {
  Product p;
  p.m = p.n = p.k = n;
  p.type = p.out = type;
  p.bytes = p.operand_bytes();
  return p;
}

const DeviceProfile& h100() {
  static const DeviceProfile d = load_device("h100-sxm");
  return d;
}
DeviceProfile without_points(const char* name) {
  DeviceProfile d = load_device(name);
  d.products.clear();
  d.attention.clear();
  d.like = nullptr;
  return d;
}

double model_us(const Product& p, const DeviceProfile& d) {
  return product_model(p, d, d.multiprocessors).work.count * 1e6;
}

TEST(ProductModel, TheExampleOfThePage) {
  EXPECT_NEAR(model_us(square_of(8192), h100()), 1452.37, 0.01);
  // A transfer holds 24 of 132 multiprocessors: 19 waves instead of 16.
  EXPECT_NEAR(product_model(square_of(8192), h100(), 108).work.count * 1e6, 1724.47, 0.01);
}

TEST(ProductModel, SumsInTheMatrixUnitsAloneAreFasterWhereTheDeviceSaysSo) {
  Product p = square_of(8192);
  p.type = ElementType::fp8;
  EXPECT_NEAR(model_us(p, h100()), 833.35, 0.01);
  p.fast_sums = true;
  EXPECT_NEAR(model_us(p, h100()), 738.75, 0.01);
  // Blackwell has no such mode.
  const DeviceProfile b200 = without_points("b200");
  const double fast = model_us(p, b200);
  p.fast_sums = false;
  EXPECT_EQ(model_us(p, b200), fast);
}

double flops_of(const ScanKernels& k) {
  double sum = 0;
  for (const Product& p : k.products) sum += p.flops().count;
  return sum;
}

TEST(ScanKernels, TheExampleOfThePage) {
  const StateSpace op{2, 64, 128, 128};
  const ScanProblem s{256, 2, 1, 128, ElementType::bf16};
  const ScanKernels forward = scan_kernels(op, s, false);
  EXPECT_EQ(forward.kernels, 5);
  EXPECT_EQ(forward.streamed, Bytes{5'120 + 196'608});
  ASSERT_EQ(forward.products.size(), 3u);
  EXPECT_EQ(forward.products[0].bytes, Bytes{266'240});
  EXPECT_EQ(forward.products[1].bytes, Bytes{262'144});
  EXPECT_EQ(forward.products[2].bytes, Bytes{397'312});
  EXPECT_DOUBLE_EQ(flops_of(forward), 31'457'280);
  const ScanKernels backward = scan_kernels(op, s, true);
  EXPECT_EQ(backward.kernels, 25);
  EXPECT_EQ(backward.products.size(), 10u);
}

TEST(ScanKernels, ComputeTheirOperatorsWorkAndBackwardWhatTheyMakeAgain) {
  // Of chunks no longer than a block all of the square is computed.
  for (const std::int64_t chunk : {16, 64}) {
    const StateSpace op{3, 32, 48, chunk};
    const NamedExtent sample{Dim::sample, 2}, tokens{Dim::sequence, 4 * chunk}, head{Dim::head, 5};
    const Signature s = signature(op,
                                  {{sample, tokens, head, {Dim::head_feature, 3 * 32 + 2 * 48}},
                                   {sample, tokens, head, {Dim::head_feature, 3}}},
                                  "");
    const std::vector<std::int64_t> extents{2, 4 * chunk, 5};
    const auto c = static_cast<double>(chunk);
    const ScanProblem problem{8 * c, 8, 5, c, ElementType::bf16};
    const double each = flops(op, s, extents, Pass::forward).count;
    EXPECT_DOUBLE_EQ(flops_of(scan_kernels(op, problem, false)), each);
    // States of chunks, B · C twice (for its own gradient's sake, and the decays').
    const double again = 8 * c * 5 * 2 * (96.0 * 48 + c * 48 + c * 96);
    EXPECT_DOUBLE_EQ(flops_of(scan_kernels(op, problem, true)),
                     flops(op, s, extents, Pass::backward_data).count + again);
  }
}

TEST(ProductModel, TheExampleOfThePageForLongWork) {
  EXPECT_EQ(h100().sustained_clock, 0.758);
  EXPECT_NEAR(product_model(square_of(8192), h100(), 132, h100().sustained_clock).work.count * 1e6,
              1908.01, 0.01);
}

/// Points of a device whose products ran now at one clock, now at the other.
TEST(ShapePrices, TellPointsOfTheTwoClocksApart) {
  DeviceProfile d = without_points("b200");
  const double level = 1.15;
  ProductTable table;
  table.mixed_clocks = true;
  std::mt19937_64 random(7);
  for (int i = 0; i < 60; ++i) {
    Product p = square_of(512.0 * static_cast<double>(2 + random() % 14));
    p.n = 1024.0 * static_cast<double>(1 + random() % 16);
    p.bytes = p.operand_bytes();
    const double clock = random() % 2 == 0 ? 1 : d.sustained_clock;
    const Seconds work = product_model(p, d, d.multiprocessors, clock).work;
    table.points.push_back({p.m, p.n, p.k, 1, Seconds{level * (d.kernel_latency + work).count}});
  }
  d.products = {table};
  const double launch = d.kernel_latency.count;
  for (const double n : {2048.0, 4096.0, 6144.0}) {
    const Product p = square_of(n);
    const double step = launch + ShapePrices(d).of(p).work.count;
    const double model = launch + product_model(p, d, 148, d.sustained_clock).work.count;
    EXPECT_NEAR(step / model, level, 0.01) << n;
    // Of one kernel nothing is known but that it lies between.
    const double one = launch + ShapePrices(d, Clock::brief).of(p).work.count;
    EXPECT_LT(one, step);
    EXPECT_GT(one, step * d.sustained_clock);
    // Points that are all of short kernels say the same of one kernel and of a step.
    d.products[0].mixed_clocks = false;
    EXPECT_EQ(ShapePrices(d, Clock::brief).of(p).work.count + launch, one);
    d.products[0].mixed_clocks = true;
  }
}

TEST(AttentionModel, TheExampleOfThePage) {
  FlashAttention a{1, 4096, 4096, 32, 128, 128, 4097.0 / 8192, false, ElementType::bf16, {}};
  EXPECT_NEAR(a.flops().count, 137'472'507'904, 1);
  EXPECT_NEAR(attention_model(a, h100(), 132).work.count * 1e6, 286.56, 0.01);
}

TEST(AttentionModel, TheExampleOfThePageForLongWork) {
  FlashAttention a{1, 4096, 4096, 32, 128, 128, 4097.0 / 8192, false, ElementType::bf16, {}};
  EXPECT_NEAR(attention_model(a, h100(), 132, 0.85).work.count * 1e6, 337.13, 0.01);
  const DeviceProfile b200 = load_device("b200");
  EXPECT_EQ(b200.attention_clock, 0.85);
  for (const AttentionTable& t : b200.attention) EXPECT_TRUE(t.mixed_clocks);
  EXPECT_EQ(b200.attention.size(), 2u);
  EXPECT_EQ(h100().attention_clock, 1);
  // Points are of the clock of short kernels: a step's are slower, one alone is not.
  DeviceProfile d = h100();
  d.attention_clock = 0.85;
  const double launch = d.kernel_latency.count;
  for (const bool measured : {false, true}) {
    if (measured) {
      AttentionTable t;
      t.causal = true;
      t.points.push_back({1, 4096, 4096, 32, 128, 128, Seconds{launch + 286.56e-6}});
      d.attention = {t};
    }
    EXPECT_NEAR(ShapePrices(d, Clock::brief).of(a).work.count * 1e6, 286.56, 0.5);
    EXPECT_NEAR(ShapePrices(d).of(a).work.count * 1e6, 337.13, 0.5);
  }
  // A long one among them, of the slower clock: the short one's price in a step stays.
  const double at = ShapePrices(d).of(a).work.count;
  FlashAttention longer = a;
  longer.queries = longer.keys = 131072;
  longer.attended = 131073.0 / 262144;
  const double slow = attention_model(longer, d, 132, 0.85).work.count;
  d.attention[0].points.push_back({1, 131072, 131072, 32, 128, 128, Seconds{launch + slow}});
  EXPECT_GT(ShapePrices(d).of(longer).work.count, 1.1 * slow);  // slowed twice
  d.attention[0].mixed_clocks = true;
  EXPECT_NEAR(ShapePrices(d).of(longer).work.count / slow, 1, 0.02);
  EXPECT_NEAR(ShapePrices(d).of(a).work.count / at, 1, 0.02);
}

TEST(AttentionModel, OfFlashAttention2OnANewerDevice) {
  FlashAttention a{1, 4096, 4096, 32, 128, 128, 4097.0 / 8192, false, ElementType::bf16, {}};
  a.flash = 2;
  DeviceProfile d = h100();
  d.flash2_forward_efficiency = 0.37;
  EXPECT_NEAR(attention_model(a, d, 132).work.count * 1e6, 464.69, 0.01);
  a.flash = 1;
  EXPECT_NEAR(attention_model(a, d, 132).work.count * 1e6, 929.38, 0.02);
  a.flash = 2;
  a.backward = true;  // no figure of its own: the device's
  FlashAttention best = a;
  best.flash = 0;
  d.flash2_backward_efficiency = 0;
  EXPECT_EQ(attention_model(a, d, 132).work, attention_model(best, d, 132).work);
}

TEST(AttentionModel, OfNarrowHeads) {
  // docs/cost.md, "Attention": 0.6 and 0.5 become 0.42857 and 0.33333.
  FlashAttention a{1, 4096, 4096, 32, 64, 64, 4097.0 / 8192, false, ElementType::bf16, {}};
  EXPECT_NEAR(attention_model(a, h100(), 132).work.count * 1e6, 200.59, 0.01);
  const auto of_half = [](FlashAttention x, int flash) {
    x.flash = flash;
    FlashAttention half = x;
    half.qk /= 2, half.v /= 2;
    return attention_model(half, h100(), 132).work.count /
           attention_model(x, h100(), 132).work.count;
  };
  a.qk = a.v = 128;
  EXPECT_NEAR(of_half(a, 0), 0.5 * 0.6 / 0.42857, 1e-5);
  EXPECT_NEAR(of_half(a, 1), 0.5, 1e-9);
  a.backward = true;
  EXPECT_NEAR(of_half(a, 0), 0.5 * 0.5 / 0.33333, 1e-4);
  a.qk = a.v = 256;  // no faster than heads of 128
  EXPECT_NEAR(of_half(a, 0), 0.5, 1e-9);
}

/// Log-uniform; now and then a multiple of a tile, one less and one more.
double size(std::mt19937_64& random, double from, double to) {
  const double x =
      std::floor(std::exp(std::uniform_real_distribution{std::log(from), std::log(to)}(random)));
  switch (random() % 4) {
    case 0:
      return std::ceil(x / 128) * 128;
    case 1:
      return std::ceil(x / 128) * 128 + 1;
    case 2:
      return std::max(1.0, std::ceil(x / 128) * 128 - 1);
    default:
      return x;
  }
}

Product random_product(std::mt19937_64& random) {
  constexpr ProductLayout kLayouts[] = {ProductLayout::any, ProductLayout::nn, ProductLayout::nt,
                                        ProductLayout::tn};
  Product p;
  p.m = size(random, 1, 1e5), p.n = size(random, 1, 1e5), p.k = size(random, 1, 1e5);
  p.count = random() % 3 == 0 ? size(random, 1, 300) : 1;
  p.type = ElementType::bf16;
  p.out = random() % 2 == 0 ? ElementType::bf16 : ElementType::fp32;
  p.layout = kLayouts[random() % 4];
  p.accumulate = random() % 2 == 0;
  p.grouped = random() % 4 == 0;
  p.bytes = p.operand_bytes();
  return p;
}

TEST(ProductModel, NeverBeatsPeakOrMemoryAndGrowsWithEveryDimension) {
  std::mt19937_64 random(20261127);
  for (const char* name : {"h100-sxm", "a100-sxm-80gb", "b200", "v100-sxm-16gb"}) {
    const DeviceProfile d = without_points(name);
    for (int i = 0; i < 2000; ++i) {
      Product p = random_product(random);
      if (d.matrix_rates.count(p.type) == 0) p.type = ElementType::fp16;
      SCOPED_TRACE(::testing::Message()
                   << name << ": " << p.count << " x " << p.m << " x " << p.n << " x " << p.k);
      const double t = product_model(p, d, d.multiprocessors).work.count;
      EXPECT_GE(t, p.flops().count / d.matrix_rate(p.type).count);
      EXPECT_GE(t, static_cast<double>(p.bytes.count) / d.memory_bandwidth.count);
      EXPECT_LE(t, product_model(p, d, d.multiprocessors / 2).work.count);
      // Whole vectors more, so that alignment stays as it is.
      for (double Product::*dim : {&Product::m, &Product::n, &Product::k, &Product::count}) {
        Product larger = p;
        larger.*dim += dim == &Product::count ? 1 : 128;
        larger.bytes = larger.operand_bytes();
        EXPECT_GE(product_model(larger, d, d.multiprocessors).work.count, t);
      }
    }
  }
}

TEST(ShapePrices, NeverBeatPeakNorTheirParts) {
  std::mt19937_64 random(7);
  for (const char* name : {"h100-sxm", "a100-pcie-80gb", "b200", "h200-sxm"}) {
    const DeviceProfile d = load_device(name);
    ShapePrices prices(d);
    for (int i = 0; i < 300; ++i) {
      Product p = random_product(random);
      SCOPED_TRACE(::testing::Message()
                   << name << ": " << p.count << " x " << p.m << " x " << p.n << " x " << p.k);
      const KernelParts t = prices.of(p);
      EXPECT_GE(t.work.count, p.flops().count / d.matrix_rate(p.type).count);
      EXPECT_GE(t.work, t.memory);
      EXPECT_GE(t.work, t.units);
      EXPECT_GE(t.beside_transfers, 1);
    }
  }
}

TEST(AttentionModel, GrowsWithWhatIsSeenAndNeverBeatsPeak) {
  std::mt19937_64 random(3);
  for (const char* name : {"h100-sxm", "a100-sxm-80gb", "b200"}) {
    const DeviceProfile d = without_points(name);
    for (int i = 0; i < 1000; ++i) {
      FlashAttention a;
      a.batch = size(random, 1, 16), a.heads = size(random, 1, 128);
      a.queries = a.keys = size(random, 128, 1e5);
      a.qk = a.v = random() % 2 == 0 ? 64 : 128;
      a.backward = random() % 2 == 0;
      a.attended = random() % 2 == 0 ? 1 : (a.queries + 1) / (2 * a.keys);
      const double t = attention_model(a, d, d.multiprocessors).work.count;
      EXPECT_GE(t, a.flops().count / d.matrix_rate(a.type).count);
      EXPECT_LE(t, attention_model(a, d, d.multiprocessors - 20).work.count);
      FlashAttention whole = a;
      whole.attended = 1;
      EXPECT_GE(attention_model(whole, d, d.multiprocessors).work.count, t);
      FlashAttention more = a;
      more.heads += 1;
      EXPECT_GE(attention_model(more, d, d.multiprocessors).work.count, t * (1 - 1e-12));
    }
  }
}

TEST(ProductModel, AWaveTooManyCostsAWave) {
  const DeviceProfile d = without_points("h100-sxm");
  // 132 tiles of 128 x 256 with a deep sum fill the device once; a 133rd block needs a second wave
  // or smaller tiles.
  Product p = square_of(16384);
  p.m = 128 * 12, p.n = 256 * 11;
  p.bytes = Bytes{0};
  const double full = model_us(p, d);
  p.n += 256;
  EXPECT_GT(model_us(p, d), 1.2 * full);
  p.n -= 512;
  EXPECT_GE(model_us(p, d), 0.95 * full) << "the wave is not full";
}

TEST(ProductModel, RowsOffTheirVectorsAreSlow) {
  const DeviceProfile d = without_points("a100-sxm-80gb");
  Product p = square_of(4096);
  p.layout = ProductLayout::nn;
  p.k = 50304;
  const double padded = model_us(p, d);
  p.k = 50257;
  EXPECT_GT(model_us(p, d), 1.9 * padded);
  p.layout = ProductLayout::nt;  // k is not a row of anything
  EXPECT_LE(model_us(p, d), padded);
}

// PyTorch, issue 83272, on an A100: 53.89 TFLOP/s of 384 products by 140 columns in fp16, 12.21 in
// bf16; 132.5 of 512 by 128 in either.
TEST(ProductModel, BatchesOffTheirVectorsLeaveAmperesMatrixUnitsInBf16) {
  const auto tflops = [](const char* device, double count, double n, ElementType type) {
    Product p;
    p.m = p.k = 1024, p.n = n, p.count = count, p.type = p.out = type;
    p.layout = ProductLayout::nn;
    p.bytes = p.operand_bytes();
    return p.flops().count / model_us(p, without_points(device)) / 1e6;
  };
  const char* a100 = "a100-sxm-40gb";
  for (const ElementType type : {ElementType::fp16, ElementType::bf16})
    EXPECT_NEAR(tflops(a100, 512, 128, type) / 132.5, 1, 0.15);
  EXPECT_NEAR(tflops(a100, 384, 140, ElementType::fp16), 53.89, 0.5);
  EXPECT_NEAR(tflops(a100, 384, 140, ElementType::bf16), 12.21, 0.1);
  // Neither one product nor another architecture is known to.
  EXPECT_EQ(tflops(a100, 1, 140, ElementType::bf16), tflops(a100, 1, 140, ElementType::fp16));
  EXPECT_EQ(tflops("h100-sxm", 384, 140, ElementType::bf16),
            tflops("h100-sxm", 384, 140, ElementType::fp16));
}

TEST(ProductModel, ATypeTheDeviceLacksIsNamed) {
  EXPECT_THAT([] { model_us(square_of(4096, ElementType::nvfp4), h100()); },
              ThrowsMessage<InputError>(HasSubstr("no matrix rate for nvfp4; it has")));
}

TEST(ProductModel, AProcessorWithoutMultiprocessorsTakesItsFlops) {
  const DeviceProfile cpu = load_device("cpu");
  const Product p = square_of(512, ElementType::fp32);
  EXPECT_NEAR(product_model(p, cpu, cpu.multiprocessors).work.count,
              p.flops().count / cpu.sustained_rate(ElementType::fp32).count, 1e-12);
}

TEST(ShapePrices, AreThePointsWhereTheyLieAndTheModelFarFromThem) {
  DeviceProfile d = without_points("h100-sxm");
  ProductTable t;
  t.source = "test";
  const Product at = square_of(4096);
  const double launch = d.kernel_latency.count;
  const double model = launch + product_model(at, d, 132).work.count;
  for (int i = 0; i < 30; ++i) t.points.push_back({4096, 4096, 4096, 1, Seconds{1.5 * model}});
  d.products = {t};
  ShapePrices prices(d, Clock::brief);
  EXPECT_NEAR(launch + prices.of(at).work.count, 1.5 * model, 0.01 * model);
  // Far away only the device's own level is left: a part 0.3² / (0.3² + 0.1² + 0.06²) of it.
  Product far = square_of(128);
  far.k = 16384 * 128;
  far.bytes = far.operand_bytes();
  const double ratio =
      (launch + prices.of(far).work.count) / (launch + product_model(far, d, 132).work.count);
  EXPECT_NEAR(std::log(ratio) / std::log(1.5), 0.09 / (0.09 + 0.01 + 0.0036), 0.01);
}

TEST(ShapePrices, OfADeviceThatIsLikeAnotherFollowItsOwnModel) {
  const DeviceProfile h200 = load_device("h200-sxm");
  ASSERT_NE(h200.like, nullptr);
  ShapePrices mine(h200), theirs(h100());
  const Product p = square_of(4096);
  // The same chip: units alike, so prices of what they bound.
  EXPECT_NEAR(mine.of(p).work / theirs.of(p).work, 1, 0.01);
}

TEST(ShapePrices, OfAnEditedDeviceMoveWithTheEdit) {
  const DeviceProfile twice = load_device("h100-sxm", {{"matrix_rates.bf16", "x2"}});
  ShapePrices before(h100()), after(twice);
  EXPECT_NEAR(before.of(square_of(8192)).work / after.of(square_of(8192)).work, 2, 0.1);
}

}  // namespace
}  // namespace partita
