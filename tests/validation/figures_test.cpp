// What validate says of a suite, by hand; and that a run of another program is found out.
#include "validation/figures.h"

#include <gtest/gtest.h>

#include <cmath>

#include "simulator/lower/lower.h"
#include "validation/calibrate.h"
#include "validation/program_check.h"
#include "validation/traffic.h"

namespace partita::validation {
namespace {

CaseFigures one(const std::string& network, std::int64_t ranks, double predicted, double measured,
                double noise, double flops = 1) {
  CaseFigures c;
  c.name = network;
  c.network = network;
  c.ranks = ranks;
  c.predicted = predicted, c.measured = measured, c.noise = noise, c.flops = flops;
  return c;
}

TEST(Figures, GroupsOfThePage) {
  std::vector<CaseFigures> cases{one("a", 1, 1.1, 1, 0.02, 1), one("a", 2, 3, 4, 0.1, 1),
                                 one("b", 4, 1, 2, 0.1, 8)};
  cases[0].compute_predicted = 0.9, cases[0].compute_measured = 1, cases[0].compute_noise = 0.01;
  const auto groups = groups_of(cases);
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups[0].name, "compute alone");
  EXPECT_EQ(groups[0].cases, 1);
  EXPECT_NEAR(groups[0].mean_error, 0.1, 1e-12);
  EXPECT_NEAR(groups[0].bias, -0.1, 1e-12);
  EXPECT_NEAR(groups[0].bound, 0.07, 1e-12);
  EXPECT_TRUE(groups[0].missed());
  EXPECT_NEAR(groups[0].baseline, 0, 1e-12) << "one rate fits one case";
  // +10 % and -25 %; the noise of 6 % asks for 12 %.
  EXPECT_NEAR(groups[1].mean_error, 0.175, 1e-12);
  EXPECT_NEAR(groups[1].bias, -0.075, 1e-12);
  EXPECT_NEAR(groups[1].noise, 0.06, 1e-12);
  EXPECT_NEAR(groups[1].bound, 0.12, 1e-12);
  // 1 FLOP in 1 s and in 4 s: at 1/2 FLOP/s 2 s each, off by 100 % and 50 %.
  EXPECT_NEAR(groups[1].baseline, 0.75, 1e-12);
  EXPECT_NEAR(groups[2].bound, 0.3, 1e-12);
  EXPECT_TRUE(groups[2].missed());
  EXPECT_TRUE(groups_of({}).empty());
  // Of GPUs one that works alone is asked for more, whatever its noise, and its bias is looked at.
  const auto gpu = groups_of(cases, true);
  ASSERT_EQ(gpu.size(), 3u);
  EXPECT_EQ(gpu[0].bound, 0.03);
  EXPECT_EQ(gpu[0].bias_bound, 0.01);
  EXPECT_EQ(gpu[1].name, "1 GPU");
  EXPECT_EQ(gpu[1].cases, 1);
  EXPECT_EQ(gpu[1].bound, 0.03);
  EXPECT_EQ(gpu[1].bias_bound, 0.01);
  EXPECT_EQ(gpu[2].cases, 2);
  EXPECT_EQ(gpu[2].bias_bound, 0);
  EXPECT_EQ(groups[0].bias_bound, 0);
}

TEST(Figures, ABiasIsMissedOnEitherSide) {
  // Errors of +4 and -1 %: a mean of 2.5 %, a bias of 1.5 %.
  std::vector<CaseFigures> cases{one("a", 1, 1.04, 1, 0, 1), one("b", 1, 0.99, 1, 0, 1)};
  EXPECT_TRUE(groups_of(cases, true)[0].missed());
  EXPECT_FALSE(groups_of(cases)[0].missed());
  cases[0].predicted = 1.02;  // bias 0.5 %
  EXPECT_FALSE(groups_of(cases, true)[0].missed());
  cases[0].predicted = 1.01, cases[1].predicted = 0.96;  // bias -1.5 %
  EXPECT_TRUE(groups_of(cases, true)[0].missed());
  cases[0].predicted = 1.03125, cases[1].predicted = 0.96875;  // 3.125 %, bias 0
  EXPECT_TRUE(groups_of(cases, true)[0].missed());
}

TEST(Figures, OrdersByNetworkAndTogether) {
  const std::vector<CaseFigures> cases{one("a", 1, 1, 1, 0.1), one("a", 1, 3, 2, 0.1),
                                       one("a", 1, 2, 3, 0.1), one("b", 1, 9, 2.5, 0.1)};
  const auto orders = orders_of(cases);
  ASSERT_EQ(orders.size(), 2u) << "one case has no order";
  EXPECT_EQ(orders[0].network, "a");
  EXPECT_EQ(orders[0].pairs, 3);
  EXPECT_NEAR(orders[0].tau, 1.0 / 3, 1e-12);
  EXPECT_EQ(orders[1].network, "");
  EXPECT_EQ(orders[1].cases, 4);
  EXPECT_EQ(orders[1].pairs, 6);
  // Wrong: 2 and 3 s of a, 2.5 and 3 s of both.
  EXPECT_NEAR(orders[1].tau, (4 - 2) / 6.0, 1e-12);
  const std::vector<std::pair<std::size_t, std::size_t>> wrong{{1, 2}, {3, 2}};
  EXPECT_EQ(discordant(cases), wrong);
}

TEST(Figures, WhatLiesNoFurtherApartThanNoiseHasNoOrder) {
  // 4 and 2 s, noise 0.5 of the slower: exactly as far apart. Equal times have no order at all.
  EXPECT_EQ(orders_of({one("a", 1, 1, 4, 0.5), one("a", 1, 2, 2, 0)}).back().pairs, 0);
  EXPECT_EQ(orders_of({one("a", 1, 1, 4, 0.4), one("a", 1, 2, 2, 0)}).back().pairs, 1);
  EXPECT_EQ(orders_of({one("a", 1, 1, 2, 0), one("a", 1, 2, 2, 0)}).back().pairs, 0);
}

TEST(Figures, NoiseIsThatOfAllRounds) {
  // The last round's own noise is 0.5; the median's 0.02. Rounds 2, 3, 4 lie 2 apart: half of it is
  // a third.
  const auto [middle, noise] = over_rounds({3, 2, 4}, {0.02, 0.01, 0.5});
  EXPECT_DOUBLE_EQ(middle, 3);
  EXPECT_DOUBLE_EQ(noise, 1.0 / 3);
  EXPECT_DOUBLE_EQ(over_rounds({3, 3, 3}, {0.02, 0.01, 0.5}).second, 0.02);
}

TEST(ProgramCheck, AnotherProgramIsFoundOut) {
  for (const SuiteCase& c : suite()) {
    if (c.name != "gpt pp 2 dp 2") continue;
    const auto plan = complete(c.graph, c.plan);
    const auto program = lower(c.graph, *plan);
    Communication communication(load_topology("cpu-host:4"));
    SimulateOptions options;
    options.record = options.unfolded = true;
    const Timeline t = simulate(*program, communication, options);
    const auto traffic = predicted_traffic(*program, 0, true);
    ASSERT_TRUE(traffic.has_value());
    std::vector<RankMeasurement> ranks(4);
    for (std::size_t r = 0; r < 4; ++r) {
      ranks[r].rank = static_cast<int>(r);
      ranks[r].samples.resize(1);
      ranks[r].at_peak = t.memory[r].at_peak;
      ranks[r].host_peak = t.memory[r].host_peak;
      ranks[r].traffic = (*traffic)[r];
    }
    for (const Entry& e : t.entries)
      ranks[static_cast<std::size_t>(e.rank_class)].samples[0].push_back(
          {e.block, e.instruction, e.micro_batch, 0, 1});
    const auto check = [&] { return check_program(*program, t, ranks, 0, true); };
    EXPECT_TRUE(check().equal()) << check().difference;
    EXPECT_EQ(check().traffic, true);

    auto& bytes = ranks[2].traffic.bytes_to.begin()->second;
    const int to = ranks[2].traffic.bytes_to.begin()->first;
    bytes += 4;
    EXPECT_EQ(check().traffic, false);
    EXPECT_EQ(check().difference, "rank 2 sent " + std::to_string(bytes) + " bytes to rank " +
                                      std::to_string(to) + ", simulated " +
                                      std::to_string(bytes - 4));
    bytes -= 4;
    ranks[3].at_peak[0] += Bytes{1};
    EXPECT_FALSE(check().memory);
    EXPECT_EQ(check().difference.find("rank 3 held at its peak "), 0u) << check().difference;
    ranks[3].at_peak[0] = t.memory[3].at_peak[0];
    ranks[0].samples[0].pop_back();
    EXPECT_FALSE(check().instructions);
    EXPECT_EQ(check().difference.find("rank 0 executed "), 0u) << check().difference;
    return;
  }
  FAIL() << "the suite has another case of that name";
}

}  // namespace
}  // namespace partita::validation
