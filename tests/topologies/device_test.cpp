#include "topologies/device.h"

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
  EXPECT_THAT(parsing(with("bf16: 10", "bf17: 10")),
              ThrowsMessage<InputError>(HasSubstr("unknown element type 'bf17'")));
  EXPECT_THAT(parsing(with("{bf16: 10 TFLOP/s}", "{}")),
              ThrowsMessage<InputError>(HasSubstr("at least one matrix rate")));
  EXPECT_THAT(parsing(with("multiprocessors: 4", "multiprocessors: 0")),
              ThrowsMessage<InputError>(HasSubstr("multiprocessors")));
  EXPECT_THAT(parsing(std::string(kGood) + "colour: green\n"),
              ThrowsMessage<InputError>(HasSubstr("colour")));
}

}  // namespace
}  // namespace partita
