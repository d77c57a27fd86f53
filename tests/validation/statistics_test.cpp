// Statistics of predictions: by hand, and laws.
#include "validation/statistics.h"

#include <gtest/gtest.h>

#include <cmath>

namespace partita::validation {
namespace {

Figure time_of(double predicted, double measured, const std::string& group = "g",
               const std::string& model = "m") {
  Figure f;
  f.predicted = predicted, f.measured = measured, f.group = group, f.model = model;
  return f;
}

/// docs/published.md, "Statistics".
TEST(RowStatistics, TheExampleOfThePage) {
  const auto s =
      statistics_of({time_of(0.9, 1), time_of(1.5, 2), time_of(3.3, 3), time_of(4, 4, "alone")})
          .time;
  EXPECT_EQ(s.count, 4);
  EXPECT_NEAR(*s.mape, (0.1 + 0.25 + 0.1 + 0) / 4, 1e-12);
  EXPECT_NEAR(*s.bias, (-0.1 - 0.25 + 0.1 + 0) / 4, 1e-12);
  EXPECT_NEAR(*s.max, 0.25, 1e-12);
  EXPECT_NEAR(*s.median, 0.1, 1e-12);
  EXPECT_DOUBLE_EQ(*s.kendall_tau, 1);
  EXPECT_DOUBLE_EQ(*s.regret, 0);
  EXPECT_FALSE(s.baseline_mape.has_value());
}

TEST(RowStatistics, OrderAndRegret) {
  // The pair (1, 2) is predicted the other way round; of (2, 2.05) less than 5 % apart one is tied.
  const auto s = statistics_of({time_of(3, 1), time_of(2, 2), time_of(2, 2.05)}).time;
  // Pairs: (1,2) -, (1,2.05) -, (2,2.05) tied in prediction.
  EXPECT_DOUBLE_EQ(*s.kendall_tau, -2.0 / 3);
  EXPECT_DOUBLE_EQ(*s.kendall_tau_apart, -1);
  // The second is predicted fastest and takes twice the fastest's time.
  EXPECT_DOUBLE_EQ(*s.regret, 1);
}

TEST(RowStatistics, TimesArePerSample) {
  Figure a = time_of(2, 2), b = time_of(3, 3);
  a.samples = 1, b.samples = 2;
  const auto s = statistics_of({a, b}).time;
  EXPECT_DOUBLE_EQ(*s.kendall_tau, 1);
  // Swapping the figures of both keeps it; swapping one side's turns it.
  b.predicted = 5;
  EXPECT_DOUBLE_EQ(*statistics_of({a, b}).time.kendall_tau, -1);
}

TEST(RowStatistics, WhatIsRecalledCountsNowhere) {
  Figure recalled = time_of(9, 1);
  recalled.from_memory = true;
  const auto s = statistics_of({time_of(1.1, 1), recalled}).time;
  EXPECT_EQ(s.count, 1);
  EXPECT_NEAR(*s.mape, 0.1, 1e-12);
  EXPECT_FALSE(s.kendall_tau.has_value());
}

TEST(RowStatistics, TheBaselineIsFittedOnOtherModels) {
  Figure a = time_of(1, 2, "g", "a"), b = time_of(1, 8, "g", "b");
  a.ideal = b.ideal = 1;
  // a from b's slowdown 8: (8 - 2) / 2; b from a's 2: (8 - 2) / 8.
  EXPECT_NEAR(*statistics_of({a, b}).time.baseline_mape, (3 + 0.75) / 2, 1e-12);
}

TEST(RowStatistics, FactsOfFitting) {
  const auto fact = [](double predicted, double measured) {
    Figure f = time_of(predicted, measured);
    f.kind = Figure::Kind::fits;
    return f;
  };
  const auto s = statistics_of({fact(1, 1), fact(1, 1), fact(0, 1), fact(1, 0), fact(0, 0)});
  EXPECT_EQ(s.fits.true_fits, 2);
  EXPECT_EQ(s.fits.false_oom, 1);
  EXPECT_EQ(s.fits.false_fits, 1);
  EXPECT_EQ(s.fits.true_oom, 1);
  EXPECT_EQ(s.time.count, 0);
  EXPECT_FALSE(s.time.mape.has_value());
}

TEST(RowStatistics, ATermThatIsTooCheapGoesWithTheError) {
  std::vector<Figure> all;
  for (const double share : {0.1, 0.2, 0.3}) {
    Figure f = time_of(1 - share / 2, 1);
    f.shares = {{"linear", 1 - share}, {"attention", share}};
    all.push_back(f);
  }
  const auto r = statistics_of(all).residual;
  ASSERT_EQ(r.size(), 2u);
  EXPECT_EQ(r[0].term, "linear");
  EXPECT_NEAR(r[0].share, 0.8, 1e-12);
  EXPECT_NEAR(r[0].correlation, 1, 1e-9);
  EXPECT_NEAR(r[1].correlation, -1, 1e-9);
}

}  // namespace
}  // namespace partita::validation
