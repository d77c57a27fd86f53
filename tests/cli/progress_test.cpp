// tests/cli/progress_test.cpp: lines about something long, by a clock of the test's own.
#include "cli/progress.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

namespace partita::cli {
namespace {

TEST(SetupProgress, SaysNothingOfWhatIsShortAndOneLineInFiveSecondsOfWhatIsLong) {
  double now = 100;
  SetupProgress p("rank 0 draws its parameters", [&] { return now; });
  EXPECT_EQ(p.at(1, 100), "");
  now = 101.9;
  EXPECT_EQ(p.at(99, 100), "") << "two seconds are short";
  now = 104;
  // 40 % in 4 s: 6 s for the rest.
  EXPECT_EQ(p.at(40, 100), "progress: rank 0 draws its parameters: 40 %, about 6 s left\n");
  now = 108.9;
  EXPECT_EQ(p.at(80, 100), "");
  now = 109;
  EXPECT_EQ(p.at(90, 100), "progress: rank 0 draws its parameters: 90 %, about 1 s left\n");
  now = 120;
  EXPECT_EQ(p.at(0, 100), "");
  EXPECT_EQ(p.at(101, 100), "") << "more than there are is another drawing";
  EXPECT_EQ(p.at(1, 0), "");
}

TEST(StillAtIt, SaysNothingOfWhatIsShortAndHowLongIsLong) {
  using std::chrono::milliseconds;
  ::testing::internal::CaptureStderr();
  { const StillAtIt lines("no reason", std::chrono::hours(1)); }
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  // However slow the machine, some lines come, in order.
  ::testing::internal::CaptureStderr();
  {
    const StillAtIt lines("it is a test", milliseconds(1), milliseconds(500));
    std::this_thread::sleep_for(milliseconds(400));
  }
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(said.substr(0, said.find('\n') + 1),
            "progress: still at it after 0.001 s; it is a test\n");
}

TEST(StillAtIt, AsksAnewForEachLine) {
  using std::chrono::milliseconds;
  std::atomic<int> asked{0};
  ::testing::internal::CaptureStderr();
  {
    const StillAtIt lines([&] { return std::to_string(++asked) + " done"; }, milliseconds(1),
                          milliseconds(1));
    while (asked < 2) std::this_thread::sleep_for(milliseconds(1));
  }
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("after 0.001 s; 1 done\n"), std::string::npos) << said;
  EXPECT_NE(said.find("after 0.002 s; 2 done\n"), std::string::npos) << said;
}

}  // namespace
}  // namespace partita::cli
