#include "validation/replay.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <tuple>

#include "models/models.h"
#include "simulator/lower/lower.h"
#include "tests/simulator/networks.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

/// What a rank would measure whose every kernel takes `factor` times its prediction, beside
/// nothing.
RankMeasurement as_predicted(const Program& p, const Topology& topology, int rank, double factor) {
  Communication communication(topology);
  SimulateOptions options;
  options.record = true;
  options.unfolded = true;
  const Timeline t = simulate(p, communication, options);

  std::map<std::tuple<int, int, int>, Ticks> took;
  for (const Entry& e : t.entries) {
    if (t.classes[static_cast<std::size_t>(e.rank_class)].representative == rank)
      took[{e.block, e.instruction, e.micro_batch}] = e.end - e.start;
  }
  RankMeasurement m;
  m.rank = rank;
  m.samples.resize(1);
  std::int64_t now = 0;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
    const Block& b = p.blocks[call.block.index()];
    for (std::size_t k = 0; k < b.instructions.size(); ++k) {
      const Kind kind = b.instructions[k].kind;
      if (kind == Kind::allocate || kind == Kind::free) continue;
      const auto at = took.find({call.block.value, static_cast<int>(k), call.micro_batch});
      const double s = at == took.end() ? 0 : to_seconds(at->second).count;
      const auto ns = static_cast<std::int64_t>(std::llround(1e9 * factor * s));
      m.samples[0].push_back(
          {call.block.value, static_cast<std::int32_t>(k), call.micro_batch, now, now + ns});
      now += ns;
    }
  }
  return m;
}

Graph decoder(int layers) {
  ModelOptions o;
  o.layers = layers;
  o.sequence = 512;
  o.vocabulary = 4096;
  return load_model("gpt2", o);
}
Program program_of(const Graph& g, Plan p) {
  set_framework(p, "partita", "");
  set_precision(p, "bf16", "");
  return lowered(g, p);
}

TEST(Replay, APredictionReplayedIsThePrediction) {
  const Topology t = load_topology("dgx-h100:1");
  const Graph g = decoder(4);
  for (const auto& [tp, pp, dp] :
       {std::tuple{1, 1, 1}, {1, 1, 8}, {2, 1, 4}, {2, 2, 2}, {4, 2, 1}}) {
    Plan p;
    p.tp = tp, p.pp = pp, p.dp = dp;
    p.micro_batch = 2;
    p.global_batch = 8 * dp;
    const Program program = program_of(g, p);
    for (const int rank : {0, tp * pp * dp - 1}) {
      SCOPED_TRACE(::testing::Message()
                   << "tp " << tp << " pp " << pp << " dp " << dp << ", rank " << rank);
      SimulateOptions idle;
      const Replayed same = replayed(program, program, t, as_predicted(program, t, rank, 1), idle);
      // Times are rounded to nanoseconds, products fitted through their neighbours.
      EXPECT_NEAR(same.step_replayed / same.step_predicted, 1, 0.01);
      EXPECT_NEAR(same.compute_measured / same.compute_predicted, 1, 0.01);
      std::int64_t kernels = 0;
      for (const ReplayKind& k : same.kinds) {
        EXPECT_NEAR(k.measured / k.predicted, 1, 0.02) << k.kind;
        kernels += k.count;
      }
      EXPECT_GT(kernels, 20);
      EXPECT_TRUE(std::is_sorted(
          same.kinds.begin(), same.kinds.end(),
          [](const ReplayKind& a, const ReplayKind& b) { return a.measured > b.measured; }));
      // Kernels that take twice as long: the step by as much as one rank's, where all are alike.
      const Replayed twice = replayed(program, program, t, as_predicted(program, t, rank, 2), idle);
      EXPECT_NEAR(twice.compute_measured / same.compute_measured, 2, 1e-3);
      EXPECT_GT(twice.step_replayed, same.step_replayed);
      // The device's own records go before what was between two marks.
      RankMeasurement halves = as_predicted(program, t, rank, 2);
      for (const Sample& x : halves.samples[0])
        halves.kernel_ns.resize(1), halves.kernel_ns[0].push_back((x.end - x.start) / 2);
      const Replayed half = replayed(program, program, t, halves, idle);
      EXPECT_NEAR(half.compute_measured / same.compute_measured, 1, 1e-3);
      EXPECT_NEAR(half.step_replayed / same.step_replayed, 1, 1e-3);
      EXPECT_EQ(half.recorded, half.kernels);
      EXPECT_EQ(half.kernels, kernels);
      EXPECT_EQ(same.recorded, 0);
      // What a plain step has beside them is shared out: it is all kernels, then.
      double whole = 0;
      for (std::size_t k = 0; k < halves.samples[0].size(); ++k) whole += time_of_sample(halves, k);
      halves.plain_s = {1.25 * whole};
      const Replayed spread = replayed(program, program, t, halves, idle);
      EXPECT_NEAR(spread.between.count, 0.25 * whole / static_cast<double>(kernels), 1e-9);
      EXPECT_NEAR(spread.compute_measured.count, half.compute_measured.count + 0.25 * whole,
                  1e-6 * whole);
      EXPECT_GT(spread.step_replayed, half.step_replayed);
      halves.plain_s = {0.9 * whole};
      EXPECT_EQ(replayed(program, program, t, halves, idle).between.count, 0);
      const double more = (twice.step_replayed - same.step_replayed) / same.compute_measured;
      if (pp == 1) {
        EXPECT_LE(more, 1.02);
      }
      if (tp * pp * dp == 1) {
        EXPECT_NEAR(more, 1, 0.02);
      }
    }
  }
}

TEST(Replay, FewerLayersPriceTheWholeNetwork) {
  const Topology t = load_topology("dgx-h100:1");
  Plan p;
  p.tp = 4;
  p.dp = 2;
  p.micro_batch = 2;
  p.global_batch = 8;
  const Program whole = program_of(decoder(12), p), part = program_of(decoder(3), p);
  const Replayed r = replayed(whole, part, t, as_predicted(part, t, 0, 1.5), {});
  const Replayed all = replayed(whole, whole, t, as_predicted(whole, t, 0, 1.5), {});
  EXPECT_NEAR(r.step_replayed / all.step_replayed, 1, 0.01);
  EXPECT_EQ(r.step_predicted, all.step_predicted);
  EXPECT_LT(r.compute_measured / all.compute_measured, 0.5);
  EXPECT_EQ(r.ranks_alike, 8);
  EXPECT_LT(r.peak_predicted, all.peak_predicted);
  EXPECT_EQ(r.peak_predicted, memory_of_rank(part, t, 0).peak);
}

}  // namespace
}  // namespace partita::validation
