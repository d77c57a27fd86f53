// tests/cli/progress_test.cpp: lines about something long, by a clock of the test's own.
#include "cli/progress.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace partita::cli
