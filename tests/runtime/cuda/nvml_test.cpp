#include "runtime/cuda/nvml.h"

#include <gtest/gtest.h>

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
  EXPECT_EQ(s.used_bytes, 1 << 30);
  EXPECT_EQ(s.temperature_c, 0) << "it does not say";
  EXPECT_EQ(s.throttled, "power cap, heat");
  EXPECT_EQ(all->state("00000000:FF:00.0").clock_mhz, 0) << "no such GPU";
}

TEST(NvmlLibrary, IsNoneWhereThereIsNone) {
  EXPECT_EQ(nvml("libno-such-library.so"), nullptr);
  // A library without its functions.
  EXPECT_EQ(nvml("libm.so.6"), nullptr);
}

}  // namespace
}  // namespace partita::cuda
