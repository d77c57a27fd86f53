// The order of streams, and the far device that the executor's tests run on.
#include <gtest/gtest.h>

#include "runtime/reference/serial.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/runtime/execute/far_device.h"
#include "tests/simulator/networks.h"

namespace partita::execute {
namespace {

/// What a device was asked for, in words.
class Told : public FarDevice {
 public:
  Told() : FarDevice({}) {}
  void on(DeviceStream s) override {
    FarDevice::on(s);
    stream_ = s;
  }
  Event record() override {
    const Event e = FarDevice::record();
    said += fmt::format("{}!{} ", stream_, e);
    return e;
  }
  void wait(Event e) override { said += fmt::format("{}?{} ", stream_, e); }
  std::string said;

 private:
  DeviceStream stream_ = 0;
};

/// docs/cuda.md, "Streams".
TEST(Order, TheExampleOfThePage) {
  Told device;
  Order order(device);
  std::byte g, w, x;
  const auto instruction = [&](DeviceStream s, std::vector<const std::byte*> reads,
                               std::vector<const std::byte*> writes, bool after = false) {
    device.said += fmt::format("[{}] ", s);
    order.begin(s, after);
    for (const auto* r : reads) order.read(r);
    for (const auto* r : writes) order.write(r);
    order.end();
  };
  instruction(0, {&x}, {&g});      // backward
  instruction(1, {&g}, {&g});      // all-reduce
  instruction(0, {&x}, {&x});      // the next backward
  instruction(0, {&g}, {&w});      // optimizer
  instruction(2, {&w}, {}, true);  // a send
  instruction(0, {}, {&w});        // overwrites what is being sent
  EXPECT_EQ(device.said,
            "[0] 0!1 [1] 1?1 1?1 1!2 [0] 0!3 [0] 0?2 0!4 [2] 0!5 2?5 2?4 2!6 [0] 0?6 0!7 ");
}

TEST(Order, AnotherBuffersMemoryIsWaitedForToo) {
  Told device;
  Order order(device);
  std::byte block;
  order.begin(1, false);
  order.read(&block);
  order.end();
  device.said.clear();
  // Freed and taken again: the same address.
  order.begin(0, false);
  order.write(&block);
  EXPECT_EQ(device.said, "0?1 ");
  order.end();
  order.forget();
  device.said.clear();
  order.begin(1, false);
  order.write(&block);
  EXPECT_EQ(device.said, "");
}

TEST(Visits, OneBufferStaysOne) {
  FarDevice device({});
  std::byte* a = device.allocate(64);
  device.fill(a, 16, 2.5f);
  Visits visits(device);
  auto* read = reinterpret_cast<float*>(visits.host(a, 64, false));
  auto* written = reinterpret_cast<float*>(visits.host(a, 64, true));
  EXPECT_EQ(read, written);
  EXPECT_EQ(read[15], 2.5f);
  written[0] = 7;
  visits.give_back();
  float back[16];
  device.to_host(back, a, 64);
  EXPECT_EQ(back[0], 7);
  EXPECT_EQ(back[1], 2.5f);
  EXPECT_THROW(
      {
        visits.host(a, 64, true);
        visits.host(a + 32, 32, false);
      },
      InternalError);
}

TEST(FarDevice, RunsLateAndFindsAMissingWait) {
  // Two streams, one of which overwrites what the other reads: without its wait the result is
  // wrong in some order.
  const auto result = [](std::uint64_t seed, bool forgets) {
    FarDevice device({seed, 0, forgets});
    std::byte *a = device.allocate(64), *b = device.allocate(64);
    device.on(0);
    device.fill(a, 1, 1);
    const auto written = device.record();
    device.on(1);
    device.wait(written);
    device.copy(b, a, 4);
    const auto read = device.record();
    device.on(0);
    device.wait(read);
    device.fill(a, 1, 2);
    device.finish();
    float value = 0;
    device.to_host(&value, b, 4);
    return value;
  };
  int wrong = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    EXPECT_EQ(result(seed, false), 1.0f);
    wrong += result(seed, true) == 1.0f ? 0 : 1;
  }
  EXPECT_GT(wrong, 10);
}

/// The executor without its events: the double must notice.
TEST(FarDevice, ProgramsNeedTheirEvents) {
  const Graph g = gpt();
  Plan p = base_plan();
  set_precision(p, "fp32", "");
  p.dp = 2;
  const Program program = lowered(g, p);
  Options o;
  o.steps = 2;
  draw(o, g, 7);
  const auto right = run_threads(program, o)[0].values.parameters;
  int differ = 0;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    EXPECT_TRUE(run_threads(program, on_far_devices(o, {seed, 0, false}))[0].values.parameters ==
                right);
    differ += run_threads(program, on_far_devices(o, {seed, 0, true}))[0].values.parameters == right
                  ? 0
                  : 1;
  }
  EXPECT_GT(differ, 0);
}

TEST(FarDevice, MeasuresItsOwnTime) {
  const Graph g = gpt();
  Plan p = base_plan();
  set_precision(p, "fp32", "");
  const Program program = lowered(g, p);
  Options o;
  o.steps = 2;
  o.record = true;
  draw(o, g, 7);
  const auto ranks = run_threads(program, on_far_devices(o, {2, 0, false}))[0].ranks;
  ASSERT_EQ(ranks[0].samples.size(), 2u);
  for (const auto& step : ranks[0].samples) {
    for (const Sample& s : step) {
      EXPECT_GT(s.start, 0);
      EXPECT_GT(s.end, s.start);
    }
  }
}

}  // namespace
}  // namespace partita::execute
