// Orders of forward and backward blocks, and the bubbles that their papers promise.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <sstream>

#include "simulator/engine/simulate.h"
#include "tests/simulator/clusters.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

constexpr Schedule kAll[] = {Schedule::naive, Schedule::gpipe, Schedule::one_f_one_b,
                             Schedule::interleaved, Schedule::zero_bubble_h1};

/// "F0 F1 B0": micro-batches of the stage's only chunk; "F2.1": micro-batch 1 of chunk 2.
std::vector<Turn> order(const std::string& text, int stage) {
  std::vector<Turn> all;
  std::istringstream in(text);
  for (std::string word; in >> word;) {
    Turn t;
    t.kind = word[0] == 'F'   ? BlockKind::forward
             : word[0] == 'W' ? BlockKind::backward_weight
                              : BlockKind::backward;
    const auto dot = word.find('.');
    t.chunk = dot == std::string::npos ? stage : std::stoi(word.substr(1));
    t.micro_batch = std::stoi(word.substr(dot == std::string::npos ? 1 : dot + 1));
    all.push_back(t);
  }
  return all;
}

std::string text(const std::vector<Turn>& turns) {
  std::string s;
  for (const Turn& t : turns) {
    const char kind = t.kind == BlockKind::forward    ? 'F'
                      : t.kind == BlockKind::backward ? 'B'
                                                      : 'W';
    s += fmt::format("{}{}.{} ", kind, t.chunk, t.micro_batch);
  }
  return s;
}

void expect_order(Schedule schedule, int v, int m, const std::vector<std::string>& stages,
                  int group = 0) {
  const auto got = turns(schedule, static_cast<int>(stages.size()), v, m, group);
  ASSERT_EQ(got.size(), stages.size());
  for (std::size_t s = 0; s < stages.size(); ++s) {
    EXPECT_EQ(text(got[s]), text(order(stages[s], static_cast<int>(s))))
        << name(schedule) << ", stage " << s << " of " << stages.size();
  }
}

TEST(Schedules, GPipeRunsAllForwardsThenAllBackwardsInReverse) {
  // arXiv 1811.06965, figure 2c.
  expect_order(Schedule::gpipe, 1, 3, {"F0 F1 F2 B2 B1 B0", "F0 F1 F2 B2 B1 B0"});
  expect_order(Schedule::gpipe, 1, 1, {"F0 B0", "F0 B0", "F0 B0", "F0 B0"});
}

TEST(Schedules, NaiveFinishesOneMicroBatchBeforeTheNext) {
  expect_order(Schedule::naive, 1, 2, {"F0 B0 F1 B1", "F0 B0 F1 B1", "F0 B0 F1 B1"});
}

TEST(Schedules, OneForwardOneBackward) {
  // arXiv 2006.09503, figure 3 (PipeDream-Flush): p - s - 1 forwards, then pairs, then backwards.
  expect_order(Schedule::one_f_one_b, 1, 4, {"F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"});
  expect_order(Schedule::one_f_one_b, 1, 4,
               {"F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"});
  // Fewer micro-batches than stages: the first stages only fill and drain.
  expect_order(Schedule::one_f_one_b, 1, 2,
               {"F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"});
}

TEST(Schedules, InterleavedWalksGroupsOfMicroBatchesThroughTheChunks) {
  // arXiv 2104.04473, figure 4. Stage s holds chunks s and s + p; micro-batches go in groups of p;
  // stage s warms up with 2 (p - s - 1) + (v - 1) p forwards: 4 and 2 here.
  expect_order(Schedule::interleaved, 2, 4,
               {"F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3",
                "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"});
  // One group: 4 forwards, here all, and 2.
  expect_order(
      Schedule::interleaved, 2, 2,
      {"F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1", "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"});
}

TEST(Schedules, InterleavedGroupsNeedNotDivideTheMicroBatches) {
  // docs/schedules.md: groups of 3 and 2; stage s warms up with 2 (p - s - 1) + 3.
  expect_order(Schedule::interleaved, 2, 5,
               {"F0.0 F0.1 F0.2 F2.0 F2.1 F2.2 B2.0 F0.3 B2.1 F0.4 B2.2 F2.3 B0.0 F2.4 B0.1 B0.2 "
                "B2.3 B2.4 B0.3 B0.4",
                "F1.0 F1.1 F1.2 F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F1.3 B1.0 F1.4 B1.1 F3.3 B1.2 F3.4 "
                "B3.3 B3.4 B1.3 B1.4"},
               3);
  const Graph g = gpt();
  Plan wanted = base_plan();
  wanted.pp = 2, wanted.virtual_stages = 2, wanted.micro_batch = 1;
  const auto group = [&](std::int64_t m, std::int64_t asked) -> std::int64_t {
    Plan p = wanted;
    p.global_batch = m * p.dp, p.micro_batch_group = asked;
    const auto plan = complete(g, p);
    return plan ? plan->micro_batch_group : -1;
  };
  EXPECT_EQ(group(4, 0), 2);
  EXPECT_EQ(group(5, 0), 3);
  EXPECT_EQ(group(7, 0), 4);
  EXPECT_EQ(group(5, 5), 5);
  EXPECT_EQ(group(8, 4), 4);
  EXPECT_EQ(group(5, 2), -1);  // leaves one
  EXPECT_EQ(group(5, 6), -1);
  EXPECT_EQ(group(5, 1), -1);
  EXPECT_EQ(group(1, 0), -1);
}

TEST(Schedules, ZeroBubbleLetsWeightsOfAsManyMicroBatchesWaitAsTheStagesNumber) {
  // arXiv 2401.10241, section 2.2 (ZB-H1).
  expect_order(Schedule::zero_bubble_h1, 1, 4,
               {"F0 F1 B0 W0 F2 B1 W1 F3 B2 W2 B3 W3", "F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3"});
  expect_order(Schedule::zero_bubble_h1, 1, 1, {"F0 B0 W0", "F0 B0 W0", "F0 B0 W0"});
}

TEST(Schedules, EveryChunkSeesEveryMicroBatchOnceForwardThenBackward) {
  for (const Schedule schedule : kAll) {
    for (int p = 1; p <= 5; ++p) {
      for (int v = 1; v <= (schedule == Schedule::interleaved ? 3 : 1); ++v) {
        for (int m = 1; m <= 10; ++m) {
          for (int group = p; group <= (schedule == Schedule::interleaved ? m : p); ++group) {
            if (schedule == Schedule::interleaved && m % group != 0 && m % group < p) continue;
            SCOPED_TRACE(::testing::Message() << name(schedule) << " p " << p << " v " << v << " m "
                                              << m << " group " << group);
            const auto all = turns(schedule, p, v, m, group);
            ASSERT_EQ(all.size(), static_cast<std::size_t>(p));
            for (int s = 0; s < p; ++s) {
              std::set<std::pair<int, int>> forward, backward, weight;
              for (const Turn& t : all[static_cast<std::size_t>(s)]) {
                EXPECT_EQ(t.chunk % p, s);
                const std::pair at{t.chunk, t.micro_batch};
                if (t.kind == BlockKind::forward) {
                  EXPECT_TRUE(forward.insert(at).second);
                } else if (t.kind == BlockKind::backward_weight) {
                  EXPECT_EQ(backward.count(at), 1u) << "weight before data";
                  EXPECT_TRUE(weight.insert(at).second);
                } else {
                  EXPECT_EQ(forward.count(at), 1u) << "backward before forward";
                  EXPECT_TRUE(backward.insert(at).second);
                }
              }
              EXPECT_EQ(forward.size(), static_cast<std::size_t>(v * m));
              EXPECT_EQ(backward.size(), static_cast<std::size_t>(v * m));
              EXPECT_EQ(weight.size(),
                        splits_backward(schedule) ? static_cast<std::size_t>(v * m) : 0u);
            }
          }
        }
      }
    }
  }
}

TEST(Schedules, DualPipeFeedsThePipelineFromBothEnds) {
  // docs/schedules.md: p = 2, m = 4. Micro-batches 0 and 1 go from stage 0 (chunks 0, 1), 2 and 3
  // from stage 1 (chunks 2, 3, which hold the same layers as 0 and 1).
  expect_order(Schedule::dualpipe, 1, 4,
               {"F0.0 F3.2 F0.1 B3.2 W3.2 F3.3 B0.0 W0.0 B3.3 W3.3 B0.1 W0.1",
                "F2.2 F1.0 F2.3 B1.0 W1.0 F1.1 B2.2 W2.2 B1.1 W1.1 B2.3 W2.3"});
  for (const int p : {2, 4, 6, 8}) {
    for (const int m : {2 * p, 2 * p + 2, 3 * p, 5 * p}) {
      SCOPED_TRACE(::testing::Message() << "p " << p << " m " << m);
      const auto all = turns(Schedule::dualpipe, p, 1, m);
      for (int s = 0; s < p; ++s) {
        std::set<std::pair<int, int>> forward, backward, weight;
        int now = 0, peak = 0;
        for (const Turn& t : all[static_cast<std::size_t>(s)]) {
          EXPECT_EQ(stage_of_chunk(Schedule::dualpipe, t.chunk, p), s);
          EXPECT_EQ(t.chunk / p, t.micro_batch / (m / 2)) << "another copy's micro-batch";
          const std::pair at{t.chunk, t.micro_batch};
          if (t.kind == BlockKind::forward) {
            EXPECT_TRUE(forward.insert(at).second);
            peak = std::max(peak, ++now);
          } else if (t.kind == BlockKind::backward) {
            EXPECT_EQ(forward.count(at), 1u);
            EXPECT_TRUE(backward.insert(at).second);
          } else {
            EXPECT_EQ(backward.count(at), 1u);
            EXPECT_TRUE(weight.insert(at).second);
            --now;
          }
        }
        EXPECT_EQ(weight.size(), static_cast<std::size_t>(m));
        EXPECT_EQ(forward.size(), static_cast<std::size_t>(m));
        // arXiv 2412.19437, table 2: activations of p + 1 micro-batches.
        EXPECT_LE(peak, p + 1);
      }
    }
  }
}

TEST(Schedules, ActivationsInFlight) {
  for (int p = 1; p <= 5; ++p) {
    for (int m = 1; m <= 8; ++m) {
      const auto most = [&](Schedule schedule, int s) {
        int now = 0, peak = 0;
        const auto all = turns(schedule, p, 1, m);
        // What a micro-batch leaves is gone when its last block is done.
        const BlockKind end =
            splits_backward(schedule) ? BlockKind::backward_weight : BlockKind::backward;
        for (const Turn& t : all[static_cast<std::size_t>(s)]) {
          now += t.kind == BlockKind::forward ? 1 : t.kind == end ? -1 : 0;
          peak = std::max(peak, now);
        }
        return peak;
      };
      for (int s = 0; s < p; ++s) {
        EXPECT_EQ(most(Schedule::one_f_one_b, s), std::min(m, p - s));
        EXPECT_EQ(most(Schedule::gpipe, s), m);
        EXPECT_EQ(most(Schedule::naive, s), 1);
        EXPECT_LE(most(Schedule::zero_bubble_h1, s), std::min(m, p))
            << "no more than 1F1B's first stage";
      }
    }
  }
}

/// `layers` equal products and nothing else that takes time on a device where only products do.
/// The bias in front makes the first block's input need a gradient like all others'.
Graph equal_blocks(int layers) {
  const Shape shape{{Dim::sample, 1}, {Dim::feature, 64}};
  GraphBuilder b("equal");
  TensorId x = b.input("x", shape);
  const TensorId target = b.input("target", shape);
  b.set_layer(-1);
  x = b.add("start", AddBias{}, {x});
  for (int i = 0; i < layers; ++i) {
    b.set_layer(i);
    x = b.add(fmt::format("layers.{}", i), Linear{1, {{Dim::feature, 64}}, false}, {x});
  }
  b.set_layer(layers);
  return b.finish(b.add("loss", MeanSquaredError{}, {x, target}), layers, 0);
}

Plan pipeline(Schedule schedule, int p, int v, int m) {
  Plan plan = base_plan();
  plan.schedule = schedule;
  plan.schedule_given = true;
  plan.pp = p;
  plan.virtual_stages = v;
  plan.global_batch = m;
  return plan;
}

/// Only matrix products take time: 2 · 64 · 64 FLOP at 1 GFLOP/s is 8.192 us a layer.
DeviceSpeed only_products() {
  const std::string most = "1000000000000 EFLOP/s";
  return {"1 GFLOP/s", most, "1000000000000000 TB/s", "0 ps"};
}
constexpr std::int64_t kProduct = 8'192'000;  // ps

TEST(Schedules, BubblesOnAFreeNetworkAreThoseOfThePapers) {
  for (const Schedule schedule : kAll) {
    for (const int p : {2, 3, 4}) {
      for (const int v : {1, 2}) {
        if ((v > 1) != (schedule == Schedule::interleaved)) continue;
        for (const int groups : {1, 2, 3}) {
          const int m = p * groups, layers = 2 * p * v;
          SCOPED_TRACE(::testing::Message()
                       << name(schedule) << " p " << p << " v " << v << " m " << m);
          Communication network(free_network(p, only_products()));
          const Program program = lowered(equal_blocks(layers), pipeline(schedule, p, v, m));
          ASSERT_TRUE(verify(program).empty());
          const Timeline t = simulate(program, network);
          // A chunk is 2 layers; backward is two products a layer.
          const std::int64_t chunk = 2 * 3 * kProduct, ideal = m * v * chunk;
          // Bubble over ideal: GPipe and 1F1B (p-1)/m, interleaved (p-1)/(v m), naive: only one of
          // p stages works, p-1.
          // ZB-H1: (p-1)(F + B - W), and F = B = W here.
          const std::int64_t bubble = schedule == Schedule::naive            ? (p - 1) * ideal
                                      : schedule == Schedule::zero_bubble_h1 ? (p - 1) * chunk / 3
                                                                             : (p - 1) * chunk;
          EXPECT_GE(t.step.count, ideal + bubble);
          // What else happens takes at most a picosecond each, and a product's time may round up.
          EXPECT_LE(t.step.count, ideal + bubble + 2 * t.instructions);
        }
      }
    }
  }
}

TEST(Schedules, DualPipesBubbleIsAtMostItsPapers) {
  // arXiv 2412.19437, table 2: (p/2 - 1)(F&B + B - 3 W), B the whole backward. The pair F&B runs
  // here one after the other, so F hands on before B ends: with F = B' = W the bubble is
  // (p/2 - 1) W, the paper's 2 (p/2 - 1) W.
  for (const int p : {2, 4, 6, 8}) {
    for (const int m : {2 * p, 3 * p, 4 * p}) {
      SCOPED_TRACE(::testing::Message() << "p " << p << " m " << m);
      Communication network(free_network(p, only_products()));
      const Program program = lowered(equal_blocks(2 * p), pipeline(Schedule::dualpipe, p, 1, m));
      ASSERT_TRUE(verify(program).empty());
      const Timeline t = simulate(program, network);
      const std::int64_t weight = 2 * kProduct, ideal = 3 * m * weight;
      const std::int64_t bubble = (p / 2 - 1) * weight;
      EXPECT_GE(t.step.count, ideal + bubble);
      EXPECT_LE(t.step.count, ideal + bubble + 2 * t.instructions);
    }
  }
}

TEST(Schedules, NaivePipelinesLetOneStageWorkAtATime) {
  Communication network(free_network(3, only_products()));
  const Program program = lowered(equal_blocks(6), pipeline(Schedule::naive, 3, 1, 2));
  SimulateOptions options;
  options.record = true;
  const Timeline t = simulate(program, network, options);
  std::vector<std::pair<std::int64_t, std::int64_t>> products;
  for (const Entry& e : t.entries) {
    if (e.end.count - e.start.count >= kProduct) products.emplace_back(e.start.count, e.end.count);
  }
  EXPECT_EQ(products.size(), 6u * 3 * 2);
  std::sort(products.begin(), products.end());
  for (std::size_t k = 1; k < products.size(); ++k)
    EXPECT_GE(products[k].first, products[k - 1].second);
}

TEST(Schedules, BubblesOnARealNetworkAreNoSmaller) {
  for (const Schedule schedule : kAll) {
    const int p = 4, m = 8, v = schedule == Schedule::interleaved ? 2 : 1;
    Communication network(load_topology("dgx-h100:1"));
    const Program program = lowered(equal_blocks(2 * p * v), pipeline(schedule, p, v, m));
    SimulateOptions options;
    options.record = true;
    const Timeline t = simulate(program, network, options);
    // Work of the lightest chunk in one micro-batch, forward and backward.
    std::map<int, std::int64_t> work;
    for (const Entry& e : t.entries) {
      const Block& b = program.blocks[static_cast<std::size_t>(e.block)];
      const Instruction& i = b.instructions[static_cast<std::size_t>(e.instruction)];
      if (e.micro_batch == 0 && i.stream == kComputeStream)
        work[b.chunk] += e.end.count - e.start.count;
    }
    ASSERT_EQ(work.size(), static_cast<std::size_t>(p * v));
    std::int64_t least = work[0];
    for (const auto& [chunk, time] : work) least = std::min(least, time);
    // Of ZB-H1's last p - 1 slots only a third is left.
    const std::int64_t slots = schedule == Schedule::naive            ? 3 * m * p
                               : schedule == Schedule::zero_bubble_h1 ? 3 * m * v + p - 1
                                                                      : 3 * (m * v + p - 1);
    EXPECT_GE(3 * t.step.count, slots * least) << name(schedule);
  }
}

TEST(Schedules, AStageThatWaitsForItsSendsComputesLater) {
  // docs/plan.md, "Kernels and messages".
  Communication network(load_topology("dgx-h100:1"));
  const auto step = [&](SendWait wait, Schedule schedule, int v, int* sends) {
    Plan plan = pipeline(schedule, 2, v, 8);
    plan.send_wait = wait;
    const Program program = lowered(equal_blocks(4 * v), plan);
    EXPECT_TRUE(verify(program).empty());
    SimulateOptions options;
    options.record = true;
    const Timeline t = simulate(program, network, options);
    *sends = 0;
    for (const Entry& e : t.entries) {
      const Instruction& i = program.blocks[static_cast<std::size_t>(e.block)]
                                 .instructions[static_cast<std::size_t>(e.instruction)];
      *sends += i.kind == Kind::send && i.stream == kComputeStream;
    }
    return t.step.count;
  };
  int sends = 0;
  const auto never = step(SendWait::never, Schedule::one_f_one_b, 1, &sends);
  EXPECT_EQ(sends, 0);
  const auto always = step(SendWait::always, Schedule::one_f_one_b, 1, &sends);
  EXPECT_EQ(sends, 16);  // 8 activations from one stage, 8 gradients from the other
  EXPECT_GT(always, never);
  EXPECT_EQ(step(SendWait::not_interleaved, Schedule::one_f_one_b, 1, &sends), always);
  const auto beside = step(SendWait::never, Schedule::interleaved, 2, &sends);
  EXPECT_EQ(step(SendWait::not_interleaved, Schedule::interleaved, 2, &sends), beside);
  EXPECT_EQ(sends, 0);
  EXPECT_GT(step(SendWait::always, Schedule::interleaved, 2, &sends), beside);
  EXPECT_EQ(sends, 48);  // three boundaries of chunks, both ways
}

TEST(Schedules, LoweredPipelinesCannotDeadlock) {
  for (const Schedule schedule : kAll) {
    for (const int p : {2, 3, 4}) {
      const int v = schedule == Schedule::interleaved ? 2 : 1;
      for (const int m : {1, 2, 3, 4, 6, 8}) {
        if (v > 1 && m < p) continue;
        const Program program = lowered(equal_blocks(p * v), pipeline(schedule, p, v, m));
        EXPECT_TRUE(verify(program).empty()) << name(schedule) << " p " << p << " m " << m;
      }
    }
  }
}

TEST(Schedules, Llama405BLeavesOneBlockFewerOnTheLastAndTheFirstStage) {
  // arXiv 2407.21783, section 3.3.2: 126 layers on 16 stages.
  std::vector<std::int64_t> expected(16, 8);
  expected.front() = expected.back() = 7;
  EXPECT_EQ(blocks_per_chunk(126, 16), expected);
}

TEST(Schedules, BlocksPerChunkAreAsEvenAsPossibleSmallOnesAtTheEnds) {
  std::mt19937 rng{20261123};
  for (int k = 0; k < 500; ++k) {
    const auto chunks = static_cast<std::int64_t>(1 + rng() % 24);
    const auto layers = static_cast<std::int64_t>(rng() % 200);
    const auto counts = blocks_per_chunk(layers, chunks);
    SCOPED_TRACE(::testing::Message() << layers << " on " << chunks);
    ASSERT_EQ(static_cast<std::int64_t>(counts.size()), chunks);
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}), layers);
    const std::int64_t low = layers / chunks, high = low + (layers % chunks != 0 ? 1 : 0);
    std::int64_t small_first = 0, small_last = 0;
    for (const auto n : counts) EXPECT_TRUE(n == low || n == high);
    if (low == high) continue;
    // Small, then large, then small; the last end has as many small ones as the first, or one more.
    while (counts[static_cast<std::size_t>(small_first)] == low) ++small_first;
    while (counts[static_cast<std::size_t>(chunks - 1 - small_last)] == low) ++small_last;
    EXPECT_EQ(small_first + small_last, chunks - layers % chunks);
    EXPECT_TRUE(small_last == small_first || small_last == small_first + 1);
  }
}

}  // namespace
}  // namespace partita
