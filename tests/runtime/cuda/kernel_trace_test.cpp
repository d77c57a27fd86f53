// Records of a GPU's kernels as text.
#include "runtime/cuda/kernel_trace.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace partita::cuda {
namespace {

TEST(KernelTrace, NamesAreThoseOfTheirFunctions) {
  EXPECT_EQ(short_name("_ZN7partita4cuda11each_kernelINS0_6MapOneIZNS0_11copy_valuesINS0_11CudaMach"
                       "ineEEEvRT_NS0_7NumbersES7_lEUlfE_EEEEvlS5_"),
            "each_kernel");
  EXPECT_EQ(short_name("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
      << "what is not mangled stays";
  EXPECT_EQ(short_name("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"),
            "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT");
  // void a::(anonymous namespace)::b<int>(int)
  EXPECT_EQ(short_name("_ZN1a12_GLOBAL__N_11bIiEEvi"), "b");
}

/// By hand: two kernels of one operator and a copy of nobody, 2 + 3 and 1 us.
TEST(KernelTrace, TimesAddUpByCaller) {
  const std::vector<KernelRecord> records{{"k", "forward of linear", 7, 1000, 3000},
                                          {"_ZN1a12_GLOBAL__N_11bIiEEvi", "", 8, 2000, 3000},
                                          {"k", "forward of linear", 7, 4000, 7000}};
  const auto all = by_caller(records);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all.at("forward of linear").count, 2);
  EXPECT_EQ(all.at("forward of linear").nanoseconds, 5000);
  EXPECT_EQ(all.at("b").nanoseconds, 1000);
}

TEST(KernelTrace, IsJsonForABrowser) {
  const auto j = nlohmann::json::parse(chrome_trace(
      {{"a \"quoted\" \\ name\n", "x", 7, 5000, 6500}, {"second", "", 8, 4000, 4001}}));
  const auto& events = j.at("traceEvents");
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].at("name"), "a \"quoted\" \\ name ");
  EXPECT_EQ(events[0].at("ts"), 1.0);
  EXPECT_EQ(events[0].at("dur"), 1.5);
  EXPECT_EQ(events[0].at("tid"), 7);
  EXPECT_EQ(events[0].at("args").at("called for"), "x");
  EXPECT_EQ(events[1].at("ts"), 0.0);
  EXPECT_EQ(nlohmann::json::parse(chrome_trace({})).at("traceEvents").size(), 0u);
}

}  // namespace
}  // namespace partita::cuda
