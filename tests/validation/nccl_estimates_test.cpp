// NCCL's own estimates beside our model of it.
#include "validation/nccl_estimates.h"

#include <gtest/gtest.h>

#include <numeric>

namespace partita::validation {
namespace {

nccl::Communicator eight() {
  std::vector<std::int64_t> ranks(8);
  std::iota(ranks.begin(), ranks.end(), 0);
  return nccl::communicator(load_topology("dgx-h100"), ranks);
}

TEST(NcclEstimates, WhatIsOursIsEqualPairByPair) {
  const nccl::Communicator c = eight();
  std::vector<LinkEstimate> theirs;
  for (std::int64_t bytes = 1 << 10; bytes <= 1 << 30; bytes *= 4) {
    const auto b = static_cast<double>(bytes);
    const auto us = [&](nccl::Algorithm a, nccl::Protocol p) {
      // NCCL's are floats.
      return static_cast<double>(
          static_cast<float>(nccl::estimate_us(c, nccl::Collective::all_reduce, a, p, b)));
    };
    theirs.push_back({CollectiveKind::all_reduce, "Ring", "Simple", bytes,
                      us(nccl::Algorithm::ring, nccl::Protocol::simple)});
    theirs.push_back({CollectiveKind::all_reduce, "Tree", "LL128", bytes,
                      us(nccl::Algorithm::tree, nccl::Protocol::ll128)});
    theirs.push_back({CollectiveKind::all_reduce, "", "", bytes,
                      nccl::choose(c, nccl::Collective::all_reduce, b).time_us});
  }
  const EstimateComparison same = compare_estimates(c, theirs);
  EXPECT_EQ(same.rows.size(), 33u);
  EXPECT_EQ(same.equal, 33u);
  EXPECT_LT(same.most, 1e-6);
  EXPECT_TRUE(same.unpriced.empty());
  EXPECT_EQ(same.rows[0].algorithm, "Ring");
  EXPECT_EQ(same.rows[0].ours, "");
  EXPECT_NE(same.rows[2].ours, "") << "a choice says what ours is";
}

/// By hand: one that is 25 % more than ours is -20 % off, of two rows 10 % in the mean.
TEST(NcclEstimates, DifferencesAreRelativeToNccls) {
  const nccl::Communicator c = eight();
  const double ours = nccl::estimate_us(c, nccl::Collective::all_gather, nccl::Algorithm::ring,
                                        nccl::Protocol::ll, 4096);
  const EstimateComparison two =
      compare_estimates(c, {{CollectiveKind::all_gather, "Ring", "LL", 4096, 1.25 * ours},
                            {CollectiveKind::all_gather, "Ring", "LL", 4096, ours}});
  ASSERT_EQ(two.rows.size(), 2u);
  EXPECT_NEAR(two.rows[0].error(), -0.2, 1e-12);
  EXPECT_NEAR(two.mean, 0.1, 1e-12);
  EXPECT_NEAR(two.most, 0.2, 1e-12);
  EXPECT_EQ(two.equal, 1u);
}

TEST(NcclEstimates, PairsWithoutAPriceOfOursAreNamedOnce) {
  const EstimateComparison none =
      compare_estimates(eight(), {{CollectiveKind::all_gather, "Tree", "LL", 1024, 10},
                                  {CollectiveKind::all_gather, "Tree", "LL", 4096, 11},
                                  {CollectiveKind::all_reduce, "Moon", "Simple", 4096, 11},
                                  {CollectiveKind::all_to_all, "Ring", "Simple", 4096, 11}});
  EXPECT_TRUE(none.rows.empty());
  EXPECT_EQ(none.mean, 0);
  EXPECT_EQ(none.unpriced, (std::vector<std::string>{"all_gather Tree LL", "all_reduce Moon Simple",
                                                     "all_to_all Ring Simple"}));
}

}  // namespace
}  // namespace partita::validation
