// What a search's space leaves out, tried on one plan (docs/plan.md, "Beyond the space"): against
// trying everything by hand.
#include "simulator/search/refine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/simulator/networks.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

Plan megatron() {
  Plan p = base_plan();
  set_framework(p, "megatron-core", "");
  set_precision(p, "bf16", "");
  return p;
}

Prediction predicted(const Graph& g, const Topology& t, const Plan& p) {
  Communication c(t);
  auto r = predict(g, p, c, nullptr, nullptr, false, nullptr, Network::flows);
  if (!r) throw InternalError(r.reason());
  return *r;
}

/// Eight layers at 64 Ki tokens on eight GPUs with so much memory.
struct Long {
  Graph g;
  Topology t;
  Plan p = megatron();
  explicit Long(const char* memory)
      : g([] {
          ModelOptions o;
          o.layers = 8;
          o.sequence = 65536;
          return load_model("llama-3-8b", o);
        }()),
        t([&] {
          TopologyEdits edits;
          edits.device.push_back({"usable_memory.value", memory});
          return load_topology("dgx-h100:1", edits);
        }()) {
    p.cp = 8, p.zero = 3, p.global_batch = p.micro_batch = 1;
    p.recompute = parse_recompute("full", "");
  }
};

TEST(Refine, RecomputesAsLittleAsMemoryAsksFor) {
  for (const char* memory : {"14 GiB", "16 GiB", "18 GiB"}) {
    const Long x(memory);
    const Prediction full = predicted(x.g, x.t, x.p);
    ASSERT_TRUE(full.fits);
    Plan none = x.p;
    none.recompute = {};
    ASSERT_FALSE(predicted(x.g, x.t, none).fits);
    const Refined r = refine(x.g, x.t, full, Network::flows);
    ASSERT_FALSE(r.taken.empty());
    // By hand: whole blocks, or parts of them, of the first n.
    Seconds best = full.step_time;
    for (const char* what : {"*", "mlp.*", "attention.*", "mlp.activation"}) {
      Plan p = x.p;
      p.recompute = {Recompute::patterns, 0, {}};
      for (int n = 0; n < 8; ++n) {
        p.recompute.patterns.push_back(fmt::format("layers.{}.{}", n, what));
        const Prediction by_hand = predicted(x.g, x.t, p);
        if (by_hand.fits) best = std::min(best, by_hand.step_time);
      }
    }
    EXPECT_LT(best, full.step_time);
    EXPECT_LE(r.taken.back().prediction.step_time.count, best.count * 1.002) << memory;
  }
}

TEST(Refine, EveryChangeIsFasterFitsAndIsWhatItsPlanSays) {
  const Long x("14 GiB");
  const Prediction full = predicted(x.g, x.t, x.p);
  const Refined r = refine(x.g, x.t, full, Network::flows, {}, {}, {}, 1);
  const Refined two = refine(x.g, x.t, full, Network::flows, {}, {}, {}, 2);
  ASSERT_EQ(r.taken.size(), two.taken.size());
  ASSERT_EQ(r.switches.size(), two.switches.size());
  EXPECT_EQ(r.simulated, two.simulated);
  EXPECT_EQ(r.given, full.step_time);
  Seconds before = full.step_time;
  for (std::size_t k = 0; k < r.taken.size(); ++k) {
    const Prediction& p = r.taken[k].prediction;
    EXPECT_EQ(to_yaml(p.plan), to_yaml(two.taken[k].prediction.plan));
    EXPECT_LT(p.step_time, before) << r.taken[k].what;
    EXPECT_TRUE(p.fits);
    EXPECT_EQ(predicted(x.g, x.t, p.plan).step_time, p.step_time);
    before = p.step_time;
  }
  ASSERT_FALSE(r.switches.empty());
  Seconds last{0};
  for (const auto* list : {&r.switches, &r.together}) {
    for (const Refinement& s : *list) {
      EXPECT_LT(s.prediction.step_time, before) << s.what;
      EXPECT_TRUE(s.prediction.fits) << s.what;
      EXPECT_EQ(predicted(x.g, x.t, s.prediction.plan).step_time, s.prediction.step_time);
      EXPECT_THAT(s.what, HasSubstr("--"));
      if (list == &r.switches) {
        EXPECT_LE(last, s.prediction.step_time);
        last = s.prediction.step_time;
      }
    }
  }
  for (const Refinement& s : r.together)
    EXPECT_LT(s.prediction.step_time, r.switches.front().prediction.step_time);
}

/// The fastest plan of the space may recompute nothing and still be slower than one that would have
/// to recompute a little: against every plan of the space with some blocks recomputed.
TEST(Refine, AnotherPlanMayGainMore) {
  ModelOptions o;
  o.layers = 4;
  o.sequence = 16384;
  const Graph g = load_model("llama-3-8b", o);
  for (const char* memory : {"22 GiB", "30 GiB"}) {
    SCOPED_TRACE(memory);
    TopologyEdits edits;
    edits.device.push_back({"usable_memory.value", memory});
    const Topology t = load_topology("dgx-h100:4 gpus", edits);
    Plan base = megatron();
    base.global_batch = 8;
    SearchSpace s = full_space(g, t, 4, base);
    s.zero = {1, 3}, s.virtual_stages = {1}, s.schedules = {Schedule::one_f_one_b};
    const SearchResult r = search(g, t, 4, base, s, 1, 1, Network::flows);
    ASSERT_FALSE(r.plans.empty());
    const Refined alone = refine(g, t, r.plans[0], Network::flows),
                  with = refine(g, t, r.plans[0], Network::flows, {}, {}, r.to_refine);
    const auto result = [&](const Refined& x) {
      return x.taken.empty() ? x.given : x.taken.back().prediction.step_time;
    };
    EXPECT_LE(result(with), result(alone));
    s.recompute = {{Recompute::full}};
    Seconds best = r.plans[0].step_time;
    for (const Prediction& full : search(g, t, 4, base, s, 1000, 1, Network::idle).plans) {
      for (const char* what : {"*", "mlp.*"}) {
        Plan p = full.plan;
        p.recompute = {Recompute::patterns, 0, {}};
        for (int n = 0; n < 4; ++n) {
          p.recompute.patterns.push_back(fmt::format("layers.{}.{}", n, what));
          const Prediction by_hand = predicted(g, t, p);
          if (by_hand.fits) best = std::min(best, by_hand.step_time);
        }
      }
    }
    EXPECT_LE(result(with).count, best.count * 1.01) << "of " << best.count;
  }
  // One that recomputes nothing, and one whose recomputation can go down to less than it gains.
  const Long x("22 GiB");
  Plan none = x.p;
  none.recompute = {};
  none.cp = 1, none.tp = 8, none.sequence_parallel = true, none.zero = 0;
  const Prediction slow = predicted(x.g, x.t, none), full = predicted(x.g, x.t, x.p);
  ASSERT_TRUE(slow.fits && full.fits);
  const Refined r = refine(x.g, x.t, slow, Network::flows, {}, {}, {full});
  ASSERT_FALSE(r.taken.empty());
  EXPECT_THAT(r.taken[0].what, HasSubstr("another plan, with "));
  EXPECT_EQ(r.taken.back().prediction.plan.cp, 8);
  EXPECT_LT(r.taken.back().prediction.step_time, slow.step_time);
  EXPECT_EQ(r.given, slow.step_time);
  // Nor does another that gains less stand in the way of what is given.
  Plan wide = x.p;
  wide.cp = 4, wide.tp = 2, wide.sequence_parallel = true;
  const Prediction behind = predicted(x.g, x.t, wide);
  ASSERT_TRUE(behind.fits);
  const Refined ours = refine(x.g, x.t, full, Network::flows),
                both = refine(x.g, x.t, full, Network::flows, {}, {}, {behind}),
                theirs = refine(x.g, x.t, behind, Network::flows);
  EXPECT_LE(
      both.taken.back().prediction.step_time,
      std::min(ours.taken.back().prediction.step_time, theirs.taken.back().prediction.step_time));
}

/// The example of docs/plan.md: tp 4, pp 4 alone does not fit by little, and counts in the space as
/// if it recomputed all.
TEST(Refine, TheSearchNamesPlansThatWouldRecomputeALittle) {
  const Graph g = load_model("llama-3-70b");
  const Topology t = load_topology("dgx-h100:8");
  Plan base = megatron();
  base.global_batch = 512;
  SearchSpace s = full_space(g, t, 64, base);
  s.tp = s.pp = {4}, s.cp = {1, 2}, s.ep = s.micro_batch = s.virtual_stages = {1};
  s.zero = {1}, s.recompute = {{Recompute::none}, {Recompute::full}};
  s.schedules = {Schedule::one_f_one_b}, s.sequence_parallel = {1};
  const SearchResult r = search(g, t, 64, base, s, 1, 1, Network::idle);
  ASSERT_FALSE(r.plans.empty());
  EXPECT_EQ(r.plans[0].plan.cp, 2);
  EXPECT_EQ(r.plans[0].plan.recompute.kind, Recompute::none);
  ASSERT_EQ(r.to_refine.size(), 1u);
  EXPECT_EQ(r.to_refine[0].plan.cp, 1);
  EXPECT_EQ(r.to_refine[0].plan.recompute.kind, Recompute::full);
  EXPECT_GT(r.to_refine[0].step_time.count, 1.1 * r.plans[0].step_time.count);
}

/// What the user has said stays.
TEST(Refine, ChangesOnlyWhatItMay) {
  const Long x("14 GiB");
  RefineLimits limits;
  limits.recompute = limits.cuts = false;
  EXPECT_THAT(refine(x.g, x.t, predicted(x.g, x.t, x.p), Network::flows, {}, limits).taken,
              IsEmpty());
  limits.recompute = true;
  limits.rounds = 1;
  EXPECT_EQ(refine(x.g, x.t, predicted(x.g, x.t, x.p), Network::flows, {}, limits).taken.size(),
            1u);
}

/// A vocabulary that takes as long as blocks: the last stage has fewer of them.
TEST(Refine, BlocksLeaveTheStageWithTheHead) {
  ModelOptions o;
  o.layers = 12;
  const Graph g = load_model("llama-3.2-1b", o);
  const Topology t = load_topology("dgx-h100:4 gpus");
  Plan p = megatron();
  p.pp = 4, p.global_batch = 8;
  const Prediction even = predicted(g, t, p);
  const Refined r = refine(g, t, even, Network::flows);
  ASSERT_FALSE(r.taken.empty());
  Seconds best = even.step_time;
  for (std::int64_t a = 1; a <= 9; ++a) {
    for (std::int64_t b = 1; a + b <= 10; ++b) {
      for (std::int64_t c = 1; a + b + c <= 12; ++c) {
        p.cuts = {a, b, c, 12 - a - b - c};
        best = std::min(best, predicted(g, t, p).step_time);
      }
    }
  }
  EXPECT_LE(r.taken.back().prediction.step_time.count, best.count * 1.005);
  EXPECT_LT(r.taken.back().prediction.plan.cuts.back(), 3);
  EXPECT_THAT(r.taken.back().what, HasSubstr("--cuts "));
}

/// Switches that the user has spoken of, or that have no place, are not tried.
TEST(Refine, SwitchesHaveTheirPlaces) {
  const Graph g = load_model("mixtral-8x7b", [] {
    ModelOptions o;
    o.layers = 4;
    return o;
  }());
  const Topology t = load_topology("dgx-h100:1");
  Plan p = megatron();
  p.ep = p.dp = 8, p.global_batch = 16, p.zero = 1;
  const auto tried = [&](const RefineLimits& limits) {
    std::string all;
    const Refined r = refine(g, t, predicted(g, t, p), Network::flows, {}, limits);
    for (const Refinement& s : r.switches) all += s.what + "\n";
    return all;
  };
  EXPECT_THAT(tried({}), HasSubstr("overlap_experts"));
  EXPECT_THAT(tried({}), HasSubstr("launch.graphs"));
  RefineLimits limits;
  limits.given = {"overlap_experts", "launch"};
  EXPECT_THAT(tried(limits), Not(HasSubstr("overlap_experts")));
  EXPECT_THAT(tried(limits), Not(HasSubstr("launch.graphs")));
  // Not beside blocks that run again, be it some.
  p.recompute = parse_recompute("layers.0.*", "");
  limits = {};
  limits.recompute = false;
  EXPECT_THAT(tried(limits), Not(HasSubstr("overlap_experts")));
  EXPECT_THAT(tried(limits), Not(HasSubstr("--recompute")));
  // Nor on a host.
  const Topology host = load_topology("cpu-host");
  Plan small = megatron();
  small.dp = 8, small.global_batch = 8;
  ModelOptions two;
  two.layers = 2;
  const Graph gpt2 = load_model("gpt2", two);
  const Prediction on_host = predicted(gpt2, host, small);
  EXPECT_THAT(refine(gpt2, host, on_host, Network::flows).switches, IsEmpty());
  EXPECT_THAT(fitting(gpt2, host, on_host, Network::flows), IsEmpty());
}

TEST(Refine, WhatDoesNotFitMayFitWithTheHostsMemory) {
  const Graph g = load_model("llama-3-70b");
  const Topology t = load_topology("dgx-h100:1");
  Plan p = megatron();
  p.tp = 8, p.global_batch = 2, p.sequence_parallel = true;
  p.recompute = parse_recompute("full", "");
  const Prediction small = predicted(g, t, p);
  ASSERT_FALSE(small.fits);
  const auto found = fitting(g, t, small, Network::flows);
  ASSERT_FALSE(found.empty());
  bool optimizer_alone = false;
  for (const Refinement& f : found) {
    EXPECT_TRUE(f.prediction.fits);
    EXPECT_TRUE(f.prediction.plan.offload_optimizer);
    optimizer_alone |= f.what == "--set offload.optimizer=true";
  }
  EXPECT_TRUE(optimizer_alone);
}

TEST(Refine, SetsOfBlocksAreCounted) {
  const auto words = [](const char* text) { return in_words(parse_recompute(text, "")); };
  EXPECT_EQ(words("layers.0.*"), "1 block");
  EXPECT_EQ(words("layers.0.*,layers.11.*"), "2 blocks");
  EXPECT_EQ(words("layers.0.mlp.*,layers.11.mlp.*"), "mlp.* in 2 blocks");
  for (const char* other : {"layers.0.*,layers.1.mlp.*", "*.mlp.*", "layers.*.mlp.up", "full"})
    EXPECT_EQ(words(other), other);
}

}  // namespace
}  // namespace partita
