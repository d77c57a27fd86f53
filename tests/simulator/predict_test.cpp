#include "simulator/search/predict.h"

#include <gtest/gtest.h>

#include "tests/simulator/networks.h"

namespace partita {
namespace {

Prediction predicted(const Graph& g, const Plan& p) {
  Communication communication(load_topology("dgx-h100:1"));
  auto r = predict(g, p, communication);
  EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
  return *r;
}

/// Matrix work of one sample's forward, of all operators or of the repeated blocks only.
double forward_products(const Graph& g, bool blocks_only) {
  double total = 0;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Operator& op = g.operators[i];
    if (!is_product(op.operation) || (blocks_only && (op.layer < 0 || op.layer >= g.layers)))
      continue;
    const Signature s = signature(g, OpId{i}, 1);
    std::vector<std::int64_t> extents;
    for (const auto& d : s.dims) extents.push_back(d.extent);
    total += flops(op.operation, s, extents, Pass::forward).count;
  }
  return total;
}

TEST(Predict, UtilisationIsModelFlopsOverTimeAndPeak) {
  // Forward once, backward twice: 3 x the forward's products, of all samples, over 8 x 989.4
  // TFLOP/s.
  const Graph g = llama();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.dp = 8;
  p.global_batch = 32;
  const Prediction r = predicted(g, p);
  const double expected = 3 * forward_products(g, false) * 32 / r.step_time.count / (8 * 989.4e12);
  EXPECT_NEAR(r.mfu, expected, 1e-12 * expected);
  EXPECT_NEAR(r.hfu, r.mfu, 1e-12 * r.mfu) << "nothing is recomputed";
}

TEST(Predict, FullRecomputationAddsTheBlocksForward) {
  const Graph g = llama();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.tp = 2;
  p.pp = 2;
  p.dp = 2;
  p.global_batch = 4;
  set_recompute(p, "full", "");
  const Prediction r = predicted(g, p);
  const double ratio = 1 + forward_products(g, true) / (3 * forward_products(g, false));
  EXPECT_NEAR(r.hfu / r.mfu, ratio, 1e-12);
}

TEST(Search, TheBestPlanIsTheFastestOfTheSpace) {
  const Graph g = llama();
  const Topology t = load_topology("dgx-h100:1");
  Plan base = base_plan();
  set_precision(base, "bf16", "");
  base.global_batch = 16;
  const SearchResult all = search(g, t, 8, base, full_space(g, t, 8, base), 100000, 1);
  ASSERT_FALSE(all.plans.empty());
  EXPECT_EQ(all.space, all.evaluated + all.pruned_memory + all.pruned_bound + all.illegal);
  EXPECT_EQ(static_cast<std::int64_t>(all.plans.size()), all.evaluated) << "all fit";
  for (std::size_t k = 1; k < all.plans.size(); ++k) {
    EXPECT_LE(all.plans[k - 1].step_time, all.plans[k].step_time);
  }
}

}  // namespace
}  // namespace partita
