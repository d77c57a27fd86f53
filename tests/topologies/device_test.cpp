#include "topologies/device.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "base/error.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(Device, EveryCatalogueDeviceLoadsAndEveryFigureHasASource) {
  const auto names = device_catalogue();
  EXPECT_GE(names.size(), 14u);
  std::set<std::string> aliases;
  for (const auto& name : names) {
    SCOPED_TRACE(name);
    const DeviceProfile device = load_device(name);
    EXPECT_EQ(device.name, name);
    for (const char* figure :
         {"memory", "usable_memory", "memory_bandwidth", "vector_rate", "matrix_efficiency",
          "memory_efficiency", "kernel_latency", "multiprocessors"})
      EXPECT_FALSE(device.sources.at(figure).empty()) << figure;
    for (const auto& [type, rate] : device.matrix_rates) {
      EXPECT_FALSE(rate.source.empty());
      EXPECT_GE(rate.peak, device.matrix_rates.begin()->second.peak) << "fp32 is the slowest";
    }
    for (const auto& alias : device.aliases) {
      EXPECT_TRUE(aliases.insert(alias).second) << "alias of two devices: " << alias;
      EXPECT_EQ(load_device(alias).name, name);
    }
  }
}

TEST(Device, PublishedFiguresOfTheBestKnownGpus) {
  const DeviceProfile a100 = load_device("a100");
  EXPECT_EQ(a100.matrix_rate(ElementType::bf16), 312.0_TFLOPps);
  EXPECT_EQ(a100.memory, 80_GiB);
  EXPECT_EQ(a100.memory_bandwidth, 2039.0_GBps);
  const DeviceProfile h100 = load_device("h100-sxm");
  EXPECT_EQ(h100.matrix_rate(ElementType::bf16), 989.4_TFLOPps);
  EXPECT_EQ(h100.memory_bandwidth, 3350.0_GBps);
  EXPECT_EQ(h100.multiprocessors, 132);
  EXPECT_EQ(h100.compute_capability, 90);
  EXPECT_EQ(load_device("b200").matrix_rate(ElementType::bf16), 2250.0_TFLOPps);
}

TEST(Device, AMissingRateListsTheTypesThereAre) {
  EXPECT_THAT(
      [] { load_device("a100").matrix_rate(ElementType::fp8); },
      ThrowsMessage<InputError>(AllOf(HasSubstr("device a100-sxm-80gb: no matrix rate for "
                                                "fp8; it has fp32, tf32, bf16, fp16, int8"))));
}

TEST(Device, AnUnknownNameGetsTheKnownOnes) {
  EXPECT_THAT([] { load_device("h100-sx"); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("unknown device 'h100-sx'"),
                                              HasSubstr("did you mean 'h100-sxm'?"))));
}

constexpr const char* kGood = R"(schema: partita.device/1
name: mine
source: my datasheet
memory: 8 GiB
usable_memory: {value: 7 GiB, source: measured}
memory_bandwidth: 100 GB/s
matrix_rates: {bf16: 10 TFLOP/s}
vector_rate: 1 TFLOP/s
matrix_efficiency: 0.8
memory_efficiency: 0.9
kernel_latency: 3 us
multiprocessors: 4
)";

std::string with(std::string from, const std::string& to) {
  std::string text = kGood;
  const auto at = text.find(from);
  return text.replace(at, from.size(), to);
}

auto parsing(const std::string& text) {
  return [text] { parse_device(text, "mine.yaml"); };
}

TEST(Device, AFigureTakesItsOwnSourceElseTheFiles) {
  const DeviceProfile device = parse_device(kGood, "mine.yaml");
  EXPECT_EQ(device.sources.at("memory"), "my datasheet");
  EXPECT_EQ(device.sources.at("usable_memory"), "measured");
  EXPECT_EQ(device.matrix_rates.at(ElementType::bf16).source, "my datasheet");
}

TEST(Device, BadFilesSayWhatIsWrong) {
  EXPECT_THAT(parsing(with("source: my datasheet\n", "")),
              ThrowsMessage<InputError>(HasSubstr("memory: every hardware figure needs a source")));
  EXPECT_THAT(parsing(with("memory: 8 GiB", "memory: 8")),
              ThrowsMessage<InputError>(HasSubstr("mine.yaml:4: memory")));
  EXPECT_THAT(parsing(with("value: 7 GiB", "value: 9 GiB")),
              ThrowsMessage<InputError>(HasSubstr("usable memory must be above 0 and at most")));
  EXPECT_THAT(parsing(with("efficiency: 0.8", "efficiency: 80")),
              ThrowsMessage<InputError>(HasSubstr("an efficiency is a fraction of the peak")));
  EXPECT_THAT(parsing(with("bf16: 10 TFLOP/s", "fp8: {value: 10 TFLOP/s, fast_efficiency: 1.2}")),
              ThrowsMessage<InputError>(HasSubstr("an efficiency is a fraction of the peak")));
  EXPECT_THAT(parsing(with("bf16: 10", "bf17: 10")),
              ThrowsMessage<InputError>(HasSubstr("unknown element type 'bf17'")));
  EXPECT_THAT(parsing(with("{bf16: 10 TFLOP/s}", "{}")),
              ThrowsMessage<InputError>(HasSubstr("at least one matrix rate")));
  EXPECT_THAT(parsing(with("multiprocessors: 4", "multiprocessors: 0")),
              ThrowsMessage<InputError>(HasSubstr("multiprocessors")));
  EXPECT_THAT(parsing(std::string(kGood) + "colour: green\n"),
              ThrowsMessage<InputError>(HasSubstr("colour")));
}

TEST(Device, PointsAreRowsUnderAHeader) {
  const std::string points = R"(products:
  - type: bf16
    out: fp32
    layout: NT
    accumulate: true
    spread: 0.05
    source: mine
    points: |
      m n k count time[ms]
      64 128 256 1 0.5
      1 2 3 4 1e3
attention:
  - {type: fp16, backward: true, causal: true, source: mine, points: "batch queries keys heads qk v time[us]\n1 2 3 4 5 6 7"}
)";
  const DeviceProfile d = parse_device(kGood + points, "d.yaml");
  ASSERT_EQ(d.products.size(), 1u);
  const ProductTable& t = d.products[0];
  EXPECT_EQ(t.out, ElementType::fp32);
  EXPECT_EQ(t.layout, ProductLayout::nt);
  EXPECT_TRUE(t.accumulate && !t.grouped);
  EXPECT_EQ(t.spread, 0.05);
  ASSERT_EQ(t.points.size(), 2u);
  EXPECT_EQ(t.points[0].k, 256);
  EXPECT_NEAR(t.points[0].time.count, 0.5e-3, 1e-15);
  EXPECT_EQ(t.points[1].count, 4);
  EXPECT_NEAR(t.points[1].time.count, 1, 1e-12);
  ASSERT_EQ(d.attention.size(), 1u);
  EXPECT_TRUE(d.attention[0].backward && d.attention[0].causal);
  EXPECT_EQ(d.attention[0].points[0].v, 6);
  const auto refused = [&](const std::string& from, const std::string& to, const std::string& why) {
    std::string text = kGood + points;
    text.replace(text.find(from), from.size(), to);
    EXPECT_THAT([&] { parse_device(text, "d.yaml"); }, ThrowsMessage<InputError>(HasSubstr(why)));
  };
  refused("count time[ms]", "count time",
          "'m n k count time[us]' (or ms, s); it is 'm n k count time'");
  refused("m n k", "m k n", "names their columns");
  refused("256 1 0.5", "256 1", "line 2 of points is '64 128 256 1'; it needs 5 numbers above 0");
  refused("256 1 0.5", "256 1 0.5 9", "needs 5 numbers");
  refused("256 1 0.5", "256 0 0.5", "above 0");
  refused("256 1 0.5", "256 1 us", "needs 5 numbers");
  refused("NT", "TT", "a layout is NN, NT or TN; 'TT' is given");
  refused("0.05", "1", "a spread is a fraction from 0 to below 1");
  refused("spread", "sprd", "unknown key");
}

TEST(Device, MemoryOutsideItsAllocatorIsReadAndChecked) {
  EXPECT_FALSE(parse_device(kGood, "d.yaml").outside.has_value());
  const std::string outside = R"(outside_memory:
  context: {value: 498 MiB, source: NVML}
  kernels: {value: 96 MiB, source: mine}
  libraries: {value: 0 B, source: mine}
  workspace: {value: 32 MiB, source: mine}
  communicators:
    - {ranks: 2, value: 100 MiB, source: mine}
    - {ranks: 8, value: 400 MiB, source: mine}
)";
  const DeviceProfile d = parse_device(kGood + outside, "d.yaml");
  OutsideMemory want;
  want.context = 498_MiB, want.kernels = 96_MiB, want.workspace = 32_MiB;
  want.by_ranks = {{2, 100_MiB}, {8, 400_MiB}};
  ASSERT_TRUE(d.outside.has_value());
  EXPECT_EQ(*d.outside, want);
  EXPECT_EQ(want.total(), 626_MiB) << "communicators are of a plan";
  EXPECT_EQ(d.sources.at("outside_memory.context"), "NVML");
  EXPECT_EQ(d.sources.at("outside_memory.communicators of 8"), "mine");
  const auto refused = [&](const std::string& from, const std::string& to, const std::string& why) {
    std::string text = kGood + outside;
    text.replace(text.find(from), from.size(), to);
    EXPECT_THAT([&] { parse_device(text, "d.yaml"); }, ThrowsMessage<InputError>(HasSubstr(why)));
  };
  refused("kernels: {value: 96 MiB, source: mine}", "", "kernels");
  refused(", source: NVML", "", "source");
  refused("498 MiB", "498", "outside_memory.context.value");
  refused("498 MiB", "-1 MiB", "outside_memory.context.value");
  refused("498 MiB", "500 GiB", "is more than the device's memory");
  refused("ranks: 2", "ranks: 1", "outside_memory.communicators[0].ranks");
  refused("ranks: 2", "ranks: 8", "communicators of 8 ranks are given twice");
  refused("workspace:", "workspce:", "workspace");
  refused("communicators:", "comunicators:", "unknown key");
}

TEST(Device, IsLikeAnotherOrHasItsOwnPoints) {
  EXPECT_EQ(parse_device(kGood + std::string("like: h100-sxm\n"), "d.yaml").like->name, "h100-sxm");
  EXPECT_THAT(
      [] { parse_device(kGood + std::string("like: h200-sxm\n"), "d.yaml"); },
      ThrowsMessage<InputError>(HasSubstr("has no points of its own but those of h100-sxm")));
  // Besides those of the one that it is like.
  const DeviceProfile both = parse_device(
      kGood + std::string("like: h100-sxm\nproducts:\n  - {source: mine, clock: 0.83, points: "
                          "\"m n k count time[us]\\n8192 8192 8192 1 1782\"}\n"),
      "d.yaml");
  EXPECT_EQ(both.products.size(), 1u);
  EXPECT_EQ(both.products[0].clock, 0.83);
  EXPECT_NE(both.like, nullptr);
  EXPECT_THAT(
      [] {
        parse_device(kGood + std::string("products:\n  - {source: mine, clock: 0.83, "
                                         "mixed_clocks: true, points: \"m n k count time[us]\\n"
                                         "8192 8192 8192 1 1782\"}\n"),
                     "d.yaml");
      },
      ThrowsMessage<InputError>(HasSubstr("all points ran at one clock, or at several")));
}

TEST(Device, ATypeMayHaveAnEfficiencyOfItsOwn) {
  const DeviceProfile h100 = load_device("h100-sxm");
  EXPECT_NEAR(h100.sustained_rate(ElementType::fp8).count, 0.709 * 1978.9e12, 1e6);
  EXPECT_NEAR(h100.sustained_rate(ElementType::bf16).count, 0.803 * 989.4e12, 1e6);
}

TEST(Device, EditedItMissesItsModelAsBefore) {
  const DeviceProfile fast = load_device("h100-sxm", {{"matrix_rates.bf16", "x2"}});
  ASSERT_NE(fast.like, nullptr);
  EXPECT_TRUE(fast.products.empty());
  EXPECT_EQ(fast.like->matrix_rate(ElementType::bf16), 989.4_TFLOPps);
  EXPECT_FALSE(fast.like->products.empty());
}

TEST(Device, SlowdownsAreReadWithTheirSource) {
  const DeviceProfile d = parse_device(
      std::string(kGood) +
          "slowdown:\n"
          "  - {kernel: product, beside: all_reduce, ranks: 8, bytes: 128 MiB, of_kernel: 1.3, "
          "of_transfer: 1, spread: 0.01}\n"
          "  - {kernel: memory, beside: stand_in, multiprocessors: 3, bytes: 90 MB, of_kernel: 20, "
          "of_transfer: 1.2}\n",
      "mine.yaml");
  ASSERT_EQ(d.slowdown.size(), 2u);
  EXPECT_EQ(d.sources.at("slowdown"), "my datasheet");
  const SlowdownPoint &a = d.slowdown[0], &b = d.slowdown[1];
  EXPECT_EQ(a.kernel, KernelFamily::product);
  EXPECT_EQ(a.beside, "all_reduce");
  EXPECT_EQ(a.ranks, 8);
  EXPECT_EQ(a.multiprocessors, 0);
  EXPECT_EQ(a.bytes, 128_MiB);
  EXPECT_EQ(a.of_kernel, 1.3);
  EXPECT_EQ(a.of_transfer, 1);
  EXPECT_EQ(a.spread, 0.01);
  EXPECT_EQ(b.kernel, KernelFamily::memory);
  EXPECT_EQ(b.beside, kStandIn);
  EXPECT_EQ(b.multiprocessors, 3);
  EXPECT_EQ(b.of_kernel, 20);
  EXPECT_EQ(b.spread, 0);
}

TEST(Device, BadSlowdownsSayWhatIsWrong) {
  const auto point = [](const std::string& from, const std::string& to) {
    std::string text =
        "{kernel: product, beside: all_reduce, ranks: 8, bytes: 1 MiB, of_kernel: 1.3, "
        "of_transfer: 1.1}";
    text.replace(text.find(from), from.size(), to);
    return parsing(std::string(kGood) + "slowdown:\n  - " + text + "\n");
  };
  const auto says = [](const std::string& what) {
    return ThrowsMessage<InputError>(AllOf(HasSubstr("mine.yaml:1"), HasSubstr(what)));
  };
  for (const char* bad : {"0.99", "-1", "20.01", ".nan", ".inf"})
    EXPECT_THAT(point("of_kernel: 1.3", fmt::format("of_kernel: {}", bad)),
                ThrowsMessage<InputError>(HasSubstr("of_kernel")))
        << bad;
  EXPECT_THAT(point("of_kernel: 1.3", "of_kernel: 0.99"),
              says("of_kernel is a time beside the other over the time alone, 1 to 20; 0.99 is "
                   "given"));
  EXPECT_THAT(point("of_transfer: 1.1", "of_transfer: 25"),
              says("of_transfer is a time beside the other over the time alone, 1 to 20; 25 is "
                   "given"));
  EXPECT_THAT(point("kernel: product", "kernel: gemm"),
              says("'gemm' is no family of kernels; use product, attention or memory"));
  EXPECT_THAT(point("all_reduce", "allreduce"),
              says("'allreduce' is no transfer; use one of all_reduce, all_gather, "));
  EXPECT_THAT(point("all_reduce", "stand_in"),
              says("a stand-in has no ranks but multiprocessors that it holds"));
  EXPECT_THAT(point("ranks: 8", "multiprocessors: 8"), says("a transfer by its ranks"));
  EXPECT_THAT(point("ranks: 8", "ranks: 1"), says("ranks"));
  EXPECT_THAT(point("1 MiB", "0 B"), says("a transfer of 0 B takes no time"));
  EXPECT_THAT(point("of_transfer: 1.1", "of_transfer: 1.1, spread: -1"),
              says("a spread is a fraction, at least 0; -1 is given"));
  EXPECT_THAT(point("of_transfer: 1.1", "of_transfer: 1.1, bandwidth: 2"), says("bandwidth"));
  EXPECT_THAT(point(", of_transfer: 1.1", ""), says("of_transfer"));
}

}  // namespace
}  // namespace partita
