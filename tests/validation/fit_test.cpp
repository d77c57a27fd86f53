// A few parameters from a few times: the page's example, laws over synthetic rows.
#include "validation/fit.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>

#include "base/error.h"

namespace partita::validation {
namespace {

FitParameter factor(double believed, const std::string& name = "rate") {
  return {name, "", 1, 0.1, 10, believed, true};
}

/// t = a_i / θ_0 + b_i / θ_1 + ..., rows of different mixes.
struct Synthetic {
  std::vector<std::vector<double>> work;  ///< [row][parameter]
  std::vector<double> truth;
  double time(std::size_t row, const std::vector<double>& values) const {
    double t = 0;
    for (std::size_t k = 0; k < values.size(); ++k) t += work[row][k] / values[k];
    return t;
  }
  FitProblem problem(double believed) const {
    FitProblem p;
    for (std::size_t k = 0; k < truth.size(); ++k) p.parameters.push_back(factor(believed));
    for (std::size_t i = 0; i < work.size(); ++i) {
      p.measured.push_back(time(i, truth));
      p.group.push_back(i);
    }
    p.predict = [this](const std::vector<double>& values, const std::vector<std::size_t>& rows) {
      std::vector<double> all;
      for (const std::size_t i : rows) all.push_back(time(i, values));
      return all;
    };
    return p;
  }
};

Synthetic synthetic(std::mt19937& rng, std::size_t rows, std::vector<double> truth) {
  std::uniform_real_distribution<double> log_work(std::log(0.1), std::log(10));
  Synthetic s;
  s.truth = std::move(truth);
  for (std::size_t i = 0; i < rows; ++i) {
    s.work.emplace_back();
    for (std::size_t k = 0; k < s.truth.size(); ++k) s.work[i].push_back(std::exp(log_work(rng)));
  }
  return s;
}

// docs/fit.md, "By hand".
TEST(Fit, TheExampleOfThePage) {
  Synthetic s;
  s.truth = {1 / 1.1};
  s.work.assign(4, {1});
  FitProblem p = s.problem(0.1);
  p.fixed_noise = 0.05;
  p.group.clear();
  Fit f = fit(p);
  EXPECT_NEAR(std::log(f.parameters[0].value), -std::log(1.1) * 1600 / 1700, 2e-5);
  EXPECT_NEAR(f.parameters[0].value, 0.9142, 1e-4);
  EXPECT_NEAR(f.parameters[0].standard_error, 1 / std::sqrt(1700), 1e-6);
  EXPECT_TRUE(f.parameters[0].determined);
  EXPECT_TRUE(f.held_out.empty());
  EXPECT_NEAR(f.unfitted[0], 1, 1e-12);
  EXPECT_NEAR(f.fitted[0], 1 / f.parameters[0].value, 1e-12);

  s.work.assign(1, {1});
  p = s.problem(0.1);
  p.fixed_noise = 0.05;
  EXPECT_NEAR(fit(p).parameters[0].standard_error, 0.0447, 1e-4);
  EXPECT_TRUE(fit(p).parameters[0].determined);
  p = s.problem(0.05);
  p.fixed_noise = 0.05;
  EXPECT_NEAR(fit(p).parameters[0].standard_error, 0.0354, 1e-4);
  EXPECT_FALSE(fit(p).parameters[0].determined);
}

TEST(Fit, FindsWhatSyntheticRowsWereMadeWith) {
  std::mt19937 rng(1);
  for (int k = 0; k < 40; ++k) {
    std::uniform_real_distribution<double> log_value(std::log(0.5), std::log(2));
    const Synthetic s = synthetic(
        rng, 12, {std::exp(log_value(rng)), std::exp(log_value(rng)), std::exp(log_value(rng))});
    FitProblem p = s.problem(1);
    p.smallest_noise = 1e-4;
    const Fit f = fit(p);
    for (std::size_t x = 0; x < 3; ++x) {
      EXPECT_NEAR(f.parameters[x].value / s.truth[x], 1, 2e-3);
      EXPECT_TRUE(f.parameters[x].determined);
    }
    for (std::size_t i = 0; i < p.measured.size(); ++i) {
      EXPECT_NEAR(f.held_out[i] / p.measured[i], 1, 1e-2);
    }
  }
}

/// Fewer differences, the same minimum.
TEST(Fit, QuicklyFindsTheSame) {
  std::mt19937 rng(6);
  std::normal_distribution<double> noise(0, 0.03);
  for (int k = 0; k < 40; ++k) {
    std::uniform_real_distribution<double> log_value(std::log(0.5), std::log(2));
    const Synthetic s = synthetic(
        rng, 20, {std::exp(log_value(rng)), std::exp(log_value(rng)), std::exp(log_value(rng))});
    FitProblem p = s.problem(0.5);
    for (double& t : p.measured) t *= std::exp(noise(rng));
    // Every other one with groups that may be off.
    p.groups_off_together = k % 2 == 0;
    for (std::size_t i = 0; i < p.group.size(); ++i) p.group[i] = i / 4;
    const Fit slow = fit(p);
    p.quick = true;
    const Fit quick = fit(p);
    EXPECT_LT(quick.predictions, slow.predictions);
    EXPECT_NEAR(quick.noise / slow.noise, 1, 0.02);
    for (std::size_t x = 0; x < 3; ++x) {
      EXPECT_NEAR(std::log(quick.parameters[x].value / slow.parameters[x].value), 0,
                  0.1 * slow.parameters[x].standard_error);
      EXPECT_NEAR(quick.parameters[x].standard_error / slow.parameters[x].standard_error, 1, 0.05);
    }
  }
}

TEST(Fit, SensitivitiesAreThoseOfTheFit) {
  std::mt19937 rng(7);
  const Synthetic s = synthetic(rng, 10, {0.8, 1.3});
  const FitProblem p = s.problem(0.3);
  const Fit f = fit(p);
  const auto j = sensitivities(p, {f.parameters[0].value, f.parameters[1].value}, 10);
  ASSERT_EQ(j.size(), f.sensitivity.size());
  for (std::size_t i = 0; i < j.size(); ++i) EXPECT_NEAR(j[i], f.sensitivity[i], 1e-9);
  EXPECT_EQ(half_width({j[0], j[1]}, f.noise, f.quantile, f.covariance),
            f.half_width({j[0], j[1]}));
  // By hand: √(0.03² + 0.5² 0.01 + 2 · 0.5 (−1) 0.002 + 0.04) = 0.2030 and twice that.
  EXPECT_NEAR(half_width({0.5, -1}, 0.03, 2, {0.01, 0.002, 0.002, 0.04}), 2 * 0.20346, 1e-4);
}

TEST(Fit, WhatNoRowDependsOnKeepsItsPriorAndIsNotDetermined) {
  std::mt19937 rng(2);
  Synthetic s = synthetic(rng, 8, {0.7, 3});
  for (auto& w : s.work) w[1] = 0;
  const Fit f = fit(s.problem(0.5));
  EXPECT_NEAR(f.parameters[1].value, 1, 1e-9);
  EXPECT_NEAR(f.parameters[1].standard_error, 0.5, 1e-9);
  EXPECT_FALSE(f.parameters[1].determined);
  EXPECT_TRUE(f.parameters[0].determined);
}

TEST(Fit, StaysWithinBounds) {
  Synthetic s;
  s.truth = {0.2};
  s.work.assign(6, {1});
  FitProblem p = s.problem(2);
  p.parameters[0].lowest = 0.8;
  const Fit f = fit(p);
  EXPECT_NEAR(f.parameters[0].value, 0.8, 1e-12);
  EXPECT_TRUE(f.parameters[0].at_bound);
  for (const double t : f.held_out) EXPECT_NEAR(t, 1 / 0.8, 1e-9);
}

/// The held-out prediction of a row knows nothing of its measured time.
TEST(Fit, HeldOutRowsAreNotSeen) {
  std::mt19937 rng(3);
  const Synthetic s = synthetic(rng, 10, {0.8, 1.3});
  FitProblem p = s.problem(0.3);
  p.fixed_noise = 0.02;
  const Fit before = fit(p);
  p.measured[4] *= 1.02;
  const Fit after = fit(p);
  // The whole solution, about which rows are linear, has moved a little.
  EXPECT_NEAR(after.held_out[4] / before.held_out[4], 1, 1e-4);
  EXPECT_GT(std::abs(after.held_out[5] / before.held_out[5] - 1), 1e-4);
}

/// Student's t, 95th percentiles of 1, 2 and 3 degrees of freedom: tan(0.45 pi), √(2 · 0.9² / (1 −
/// 0.9²)), and a table's.
const double kT1 = std::tan(0.45 * std::acos(-1.0)), kT2 = std::sqrt(2 * 0.81 / 0.19);
constexpr double kT3 = 2.35336343480182;

// docs/fit.md, "By hand (intervals)": a group's q is of the other groups' rows.
TEST(Fit, IntervalsOfAHeldOutGroupComeFromTheOthers) {
  FitProblem p;
  p.parameters = {{"idle", "", 1, 0.5, 2, 0.2, true}};
  p.measured = {std::exp(0.01), std::exp(0.02), std::exp(-0.03), std::exp(0.1)};
  p.group = {0, 0, 1, 2};
  p.fixed_noise = 0.05;
  p.predict = [](const std::vector<double>&, const std::vector<std::size_t>& rows) {
    return std::vector<double>(rows.size(), 1);
  };
  const Fit f = fit(p);
  ASSERT_EQ(f.held_out_half_width.size(), 4u);
  // Student's t of two witnesses, and of three.
  const double half[] = {0.05 * kT1, 0.05 * kT1, 0.05 * kT2, 0.05 * kT2};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(f.held_out[i], 1, 1e-12);
    EXPECT_NEAR(f.held_out_half_width[i], half[i], 1e-12) << i;
  }
  EXPECT_NEAR(f.quantile, kT3, 1e-9);  // of all four
  // Enough of them say it themselves.
  p.measured.clear(), p.group.clear();
  for (const double off : {0.01, -0.02, 0.03, 0.04, -0.01, 0.02, 0.1, -0.2, 0.3}) {
    p.group.push_back(p.measured.size() / 3);
    p.measured.push_back(std::exp(off));
  }
  for (int k = 0; k < 20; ++k) p.group.push_back(3), p.measured.push_back(std::exp(0.01));
  const Fit enough = fit(p);
  EXPECT_NEAR(enough.held_out_half_width[6], 0.03, 1e-9);
  EXPECT_LT(enough.held_out_half_width[8], std::log(p.measured[8]));
  p.group.clear();
  EXPECT_TRUE(fit(p).held_out_half_width.empty());
}

/// Eight configurations say what eight rows do, however often they were measured; the ninth is
/// enough.
TEST(Fit, RowsOfOneConfigurationAreOneWitness) {
  EXPECT_NEAR(quantile_of_sizes({0.1}, 1), kT1, 1e-12);
  EXPECT_NEAR(quantile_of_sizes(std::vector<double>(8, 0.1), 8), 1.8946, 1e-4);
  EXPECT_NEAR(quantile_of_sizes(std::vector<double>(9, 0.1), 9), 0.1, 1e-12);
  EXPECT_NEAR(quantile_of_sizes({0.1, 7}, 2), 7, 1e-12);
  FitProblem p;
  p.parameters = {{"idle", "", 1, 0.5, 2, 0.2, true}};
  p.measured.assign(12, std::exp(0.01));
  p.fixed_noise = 0.05;
  p.predict = [](const std::vector<double>&, const std::vector<std::size_t>& rows) {
    return std::vector<double>(rows.size(), 1);
  };
  EXPECT_NEAR(fit(p).quantile, 0.2, 1e-9);
  for (std::size_t i = 0; i < 12; ++i) p.witness.push_back(i % 4);
  EXPECT_NEAR(fit(p).quantile, kT3, 1e-9);
}

TEST(Fit, OneErraticRowDoesNotSteer) {
  std::mt19937 rng(4);
  Synthetic s = synthetic(rng, 15, {0.8});
  FitProblem p = s.problem(0.5);
  p.measured[3] *= 3;
  EXPECT_NEAR(fit(p).parameters[0].value, 0.8, 0.02);
}

/// Rows with noise: 90 % intervals hold about that many of rows that were not fitted.
TEST(Fit, IntervalsHoldWhatTheySay) {
  std::mt19937 rng(5);
  std::normal_distribution<double> noise(0, 0.04);
  int inside = 0, all = 0;
  for (int k = 0; k < 60; ++k) {
    const Synthetic s = synthetic(rng, 24, {0.8, 1.3});
    FitProblem p = s.problem(0.3);
    for (double& t : p.measured) t *= std::exp(noise(rng));
    const auto whole = p;
    // The last four are new to the fit.
    p.measured.resize(20), p.group.resize(20);
    const Fit f = fit(p);
    EXPECT_NEAR(f.noise, 0.04, 0.025);
    std::vector<double> values;
    for (const auto& x : f.parameters) values.push_back(x.value);
    for (std::size_t i = 20; i < 24; ++i, ++all) {
      std::vector<double> row;
      for (std::size_t x = 0; x < 2; ++x)
        row.push_back(-s.work[i][x] / values[x] / s.time(i, values));
      const double off = std::abs(std::log(s.time(i, values) / whole.measured[i]));
      inside += off <= f.half_width(row) ? 1 : 0;
    }
  }
  EXPECT_GE(inside, all * 85 / 100);
  EXPECT_LE(inside, all * 97 / 100);
}

// docs/fit.md, "By hand (groups)": rows of a group that are off alike say what one does.
TEST(Fit, RowsThatAreOffTogetherSayLess) {
  FitProblem p;
  p.parameters = {factor(0.2)};
  for (const double off : {0.1, 0.0, -0.1}) {
    for (int k = 0; k < 3; ++k) {
      p.group.push_back(p.measured.size() / 3);
      p.measured.push_back(std::exp(off));
    }
  }
  p.predict = [](const std::vector<double>& values, const std::vector<std::size_t>& rows) {
    return std::vector<double>(rows.size(), 1 / values[0]);
  };
  const Fit apart = fit(p);
  p.groups_off_together = true;
  const Fit together = fit(p);
  EXPECT_NEAR(together.parameters[0].value, 1, 1e-6);
  EXPECT_NEAR(together.noise_within, 0.01, 1e-12);
  const double tau2 = together.noise * together.noise - 1e-4, of_mean = tau2 + 1e-4 / 3;
  EXPECT_NEAR(std::sqrt(tau2), 0.0980, 1e-4);
  EXPECT_NEAR(together.parameters[0].standard_error, 1 / std::sqrt(3 / of_mean + 25), 1e-6);
  EXPECT_NEAR(together.parameters[0].standard_error, 0.0546, 1e-4);
  EXPECT_NEAR(apart.parameters[0].standard_error, 0.0286, 1e-4);
  // Fewer than three rows a group: which is which can't be told.
  p.measured.resize(8), p.group.resize(8);
  EXPECT_EQ(fit(p).noise, fit(p).noise_within);
}

/// Standard errors and intervals are right of rows that are off by group; without, they are not.
TEST(Fit, GroupsThatAreOffWidenStandardErrors) {
  std::mt19937 rng(8);
  std::normal_distribution<double> normal(0, 1);
  std::array<int, 2> right{}, inside{};
  constexpr int kDraws = 150;
  for (int k = 0; k < kDraws; ++k) {
    const Synthetic s = synthetic(rng, 45, {0.8, 1.3});
    FitProblem p = s.problem(1);
    double shared = 0;
    for (std::size_t i = 0; i < 45; ++i) {
      p.group[i] = i / 5;
      if (i % 5 == 0) shared = 0.08 * normal(rng);
      p.measured[i] *= std::exp(shared + 0.01 * normal(rng));
    }
    // The last group is new to the fit.
    const double measured = p.measured.back();
    p.measured.resize(40), p.group.resize(40);
    for (const std::size_t on : {0u, 1u}) {
      p.groups_off_together = on == 1;
      const Fit f = fit(p);
      const FittedParameter& x = f.parameters[0];
      right[on] += std::abs(std::log(x.value / s.truth[0])) < 1.645 * x.standard_error ? 1 : 0;
      const std::vector<double> values{x.value, f.parameters[1].value};
      std::vector<double> row;
      for (std::size_t w = 0; w < 2; ++w)
        row.push_back(-s.work[44][w] / values[w] / s.time(44, values));
      inside[on] += std::abs(std::log(s.time(44, values) / measured)) < f.half_width(row) ? 1 : 0;
    }
  }
  EXPECT_GE(right[1], kDraws * 80 / 100);
  EXPECT_LE(right[1], kDraws * 97 / 100);
  EXPECT_LT(right[0], kDraws * 70 / 100);
  EXPECT_GE(inside[1], kDraws * 82 / 100);
}

TEST(Fit, RowsWithoutATimeAreRefused) {
  FitProblem p;
  p.parameters = {factor(0.1)};
  EXPECT_THROW(fit(p), InputError);
  p.measured = {1, 0};
  EXPECT_THROW(fit(p), InputError);
}

}  // namespace
}  // namespace partita::validation
