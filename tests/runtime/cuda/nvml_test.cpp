#include "runtime/cuda/nvml.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace partita::cuda {
namespace {

TEST(NvmlLibrary, SaysWhatItKnows) {
  const auto all = nvml(PARTITA_FAKE_NVML);
  ASSERT_NE(all, nullptr);
  EXPECT_EQ(all->driver(), "580.95.05");
  const GpuState s = all->state("00000000:0F:00.0");
  EXPECT_EQ(s.clock_mhz, 1755);
  EXPECT_EQ(s.memory_clock_mhz, 2619);
  EXPECT_DOUBLE_EQ(s.power_w, 698.123);
  ::setenv("PARTITA_FAKE_NVML_MEAN", "1", 1);
  EXPECT_EQ(all->state("00000000:0F:00.0").power_w, 350);
  ::unsetenv("PARTITA_FAKE_NVML_MEAN");
  EXPECT_EQ(s.used_bytes, 1 << 30);
  EXPECT_EQ(s.temperature_c, 0) << "it does not say";
  EXPECT_EQ(s.throttled, "power cap, heat");
  EXPECT_EQ(all->state("00000000:FF:00.0").clock_mhz, 0) << "no such GPU";
}

TEST(Nvml, AtWorkIsWherePowerIs) {
  const auto state = [](double clock, double power, const char* held = "") {
    GpuState s;
    s.clock_mhz = clock;
    s.power_w = power;
    s.throttled = held;
    return s;
  };
  // Idle at its best clock, then 700 W at the clock that these leave, then idle again.
  const GpuState at = at_work({state(1980, 120), state(1980, 130), state(1500, 690, "power cap"),
                               state(1485, 700, "power cap"), state(1515, 695), state(1980, 125)});
  EXPECT_EQ(at.clock_mhz, 1500);
  EXPECT_EQ(at.power_w, 695);
  EXPECT_EQ(at.throttled, "power cap");
  // Of a driver that says no power all count; of none, nothing.
  EXPECT_EQ(at_work({state(1980, 0), state(1500, 0), state(1470, 0)}).clock_mhz, 1500);
  EXPECT_EQ(at_work({}).clock_mhz, 0);
  EXPECT_EQ(at_work({state(1410, 300)}).clock_mhz, 1410);
}

TEST(NvmlLibrary, IsNoneWhereThereIsNone) {
  EXPECT_EQ(nvml("libno-such-library.so"), nullptr);
  // A library without its functions.
  EXPECT_EQ(nvml("libm.so.6"), nullptr);
}

}  // namespace
}  // namespace partita::cuda
