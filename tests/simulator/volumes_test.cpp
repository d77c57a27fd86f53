// What a program sends per rank and step equals the closed forms of the literature. Activations are
// 2 bytes (bf16), gradients 4 (fp32); b samples per rank and micro-batch, s tokens, h hidden.
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <random>
#include <string_view>
#include <tuple>

#include "simulator/cost/cost.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

constexpr std::int64_t kActivation = 2, kGradient = 4, kParameter = 2;

struct Traffic {
  std::int64_t calls = 0;
  std::int64_t wire = 0;  ///< bytes that a ring puts on the wire
};
using Filter = std::function<bool(const Block&, const Instruction&)>;

/// All collectives of one rank in one step that satisfy `filter`.
Traffic traffic(const Program& p, std::int64_t rank, const Filter& filter) {
  Traffic t;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
    const Block& block = p.blocks[call.block.index()];
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::collective || !filter(block, i)) continue;
      const auto n = static_cast<std::int64_t>(p.group(i, rank).size());
      ++t.calls;
      t.wire += wire_count(i.collective, n, payload(p, i, rank)).bytes.count;
    }
  }
  return t;
}

/// Collectives of one kind on tensors of the network and their gradients: no statistics, no
/// parameters, no parameters' gradients.
Filter of_tensors(const Program& p, CollectiveKind kind) {
  return [&p, kind](const Block&, const Instruction& i) {
    return i.collective == kind && p.buffer(i.writes[0]).tensor >= 0;
  };
}
/// Collectives of one kind on one category of state.
Filter of_state(const Program& p, Category category, CollectiveKind kind) {
  return [&p, category, kind](const Block&, const Instruction& i) {
    return i.collective == kind && i.tie < 0 && p.buffer(i.writes[0]).category == category;
  };
}
bool any(const Block&, const Instruction&) { return true; }

Graph gpt_of(int layers) {
  TransformerConfig c = small_config();
  c.layers = layers;
  return build_transformer(c);
}

TEST(Volumes, DataParallelReducesEveryGradientOnceAStep) {
  const Graph g = gpt();
  const std::int64_t size = parameter_count(g) * kGradient;
  for (const std::int64_t n : {2, 4}) {
    for (const std::int64_t micro_batches : {1, 3}) {
      for (const bool overlap : {true, false}) {
        Plan plan = base_plan();
        plan.dp = n;
        plan.global_batch = n * micro_batches;
        plan.overlap_gradients = overlap;
        const Program p = lowered(g, plan);
        // 2 (n-1)/n S, however many buckets and micro-batches. Every bucket holds a multiple of n
        // bytes here, so nothing rounds.
        EXPECT_EQ(traffic(p, 0, any).wire, 2 * (n - 1) * size / n);
        EXPECT_GT(traffic(p, 0, any).calls, 4);  // buckets of 256 B
      }
    }
  }
}

TEST(Volumes, UnevenBucketsRoundUpOncePerCall) {
  const Graph g = gpt();
  const std::int64_t size = parameter_count(g) * kGradient, n = 3;
  Plan plan = base_plan();
  plan.dp = n;
  const Program p = lowered(g, plan);
  const Traffic t = traffic(p, 2, any);
  EXPECT_GE(t.wire * n, 2 * (n - 1) * size);
  // Each call sends 2 (n-1) chunks that are less than 1 B too large.
  EXPECT_LT(t.wire * n, 2 * (n - 1) * (size + n * t.calls));
}

TEST(Volumes, TensorParallelIsFourAllReducesPerLayerAndMicroBatch) {
  const std::int64_t b = 2, s = 8, h = 8;
  for (const std::int64_t n : {2, 4}) {
    for (const int layers : {1, 3}) {
      for (const std::int64_t m : {1, 2}) {
        for (const bool full : {false, true}) {
          Plan plan = base_plan();
          plan.tp = n;
          plan.micro_batch = b;
          plan.global_batch = b * m;
          if (full) plan.recompute = parse_recompute("full", "");
          const Program p = lowered(gpt_of(layers), plan);
          const Traffic t = traffic(p, 1, of_tensors(p, CollectiveKind::all_reduce));
          // Forward: outputs of attention and MLP. Backward: inputs of both. Full recompute does
          // the forward's two again. Outside the layers: the embedding's output (vocabulary cut)
          // and the gradient of the head's input.
          EXPECT_EQ(t.calls, m * ((full ? 6 : 4) * layers + 2));
          EXPECT_EQ(t.wire, t.calls * 2 * (n - 1) * (b * s * h * kActivation) / n);
        }
      }
    }
  }
}

/// What attention and feed-forward of one input owe is added before it is repaired: one all-reduce
/// a layer forward for two, one backward behind one norm; behind two norms each owes its own.
TEST(Volumes, ParallelResidualsOweOneSumForBothBranches) {
  const std::int64_t b = 2, s = 8, h = 8, n = 2;
  for (const Residual residual : {Residual::parallel, Residual::parallel_one_norm}) {
    const bool one = residual == Residual::parallel_one_norm;
    TransformerConfig c = small_config();
    c.layers = 3;
    c.residual = residual;
    Plan plan = base_plan();
    plan.tp = n;
    plan.micro_batch = plan.global_batch = b;
    const Program p = lowered(build_transformer(c), plan);
    const Traffic reduced = traffic(p, 1, of_tensors(p, CollectiveKind::all_reduce));
    EXPECT_EQ(reduced.calls, (one ? 2 : 3) * 3 + 2);
    EXPECT_EQ(reduced.wire, reduced.calls * 2 * (n - 1) * (b * s * h * kActivation) / n);
    // A mask stands between a branch and the sum.
    c.dropout = 0.1;
    const Program masked = lowered(build_transformer(c), plan);
    EXPECT_EQ(traffic(masked, 1, of_tensors(masked, CollectiveKind::all_reduce)).calls,
              (one ? 3 : 4) * 3 + 2);
    c.dropout = 0;
    // The same with sequence parallelism: a reduce-scatter forward for both branches, and a gather
    // a norm; backward a gather for both, a scatter a norm and, as inputs are gathered again, a
    // gather a norm. Outside the layers the embedding's and the head's.
    plan.sequence_parallel = true;
    const Program cut = lowered(build_transformer(c), plan);
    const std::int64_t norms = one ? 1 : 2;
    EXPECT_EQ(traffic(cut, 1, of_tensors(cut, CollectiveKind::reduce_scatter)).calls,
              (1 + norms) * 3 + 2);
    EXPECT_EQ(traffic(cut, 1, of_tensors(cut, CollectiveKind::all_gather)).calls,
              (norms + 1 + norms) * 3 + 3);
    EXPECT_EQ(traffic(cut, 1, of_tensors(cut, CollectiveKind::all_reduce)).calls, 0);
  }
}

TEST(Volumes, SelectiveRecomputeSendsNothingAgain) {
  Plan plan = base_plan();
  plan.tp = 2;
  const Program none = lowered(gpt(), plan);
  plan.recompute = parse_recompute("selective", "");
  const Program selective = lowered(gpt(), plan);
  EXPECT_EQ(traffic(selective, 0, any).wire, traffic(none, 0, any).wire);
}

TEST(Volumes, VocabularyParallelLossReducesMaximumSumAndLabel) {
  Plan plan = base_plan();
  plan.tp = 2;
  plan.micro_batch = 2;
  const Program p = lowered(gpt(), plan);
  const Traffic t = traffic(p, 0, [&](const Block&, const Instruction& i) {
    return p.buffer(i.reads[0]).category == Category::workspace;
  });
  // Maximum: 1 value per token; sum of exponentials and the label's logit: 2; fp32, b s = 16
  // tokens: 64 + 128 B, and 2 (n-1)/n = 1.
  EXPECT_EQ(t.calls, 2);
  EXPECT_EQ(t.wire, 192);
}

TEST(Volumes, SequenceParallelSendsTheSameBytesAsPairsAndGathersInputsAgain) {
  const std::int64_t b = 2, s = 8, h = 8, n = 2;
  for (const bool save : {false, true}) {
    for (const int layers : {1, 3}) {
      Plan plan = base_plan();
      plan.tp = n;
      plan.sequence_parallel = true;
      plan.micro_batch = b;
      plan.global_batch = 2 * b;  // two micro-batches
      plan.save_gathered = save;
      const Program p = lowered(gpt_of(layers), plan);
      const Traffic gathers = traffic(p, 0, of_tensors(p, CollectiveKind::all_gather));
      const Traffic scatters = traffic(p, 0, of_tensors(p, CollectiveKind::reduce_scatter));
      // Each all-reduce of tensor parallelism becomes a reduce-scatter and, where the next product
      // begins, an all-gather: forward 2 + 2, backward 2 + 2 (the gather is of the output's
      // gradient). Gathered inputs are not kept: the two weight gradients of a layer (query, key
      // and value share one input; so do gate and up) gather theirs once more.
      // Outside the layers: embedding 1 scatter, its gradient 1 gather; head 1 gather (and again),
      // 1 scatter.
      const std::int64_t again = save ? 0 : 1;
      EXPECT_EQ(scatters.calls, 2 * (4 * layers + 2));
      EXPECT_EQ(gathers.calls, 2 * ((4 + 2 * again) * layers + 2 + again));
      const std::int64_t half = (n - 1) * (b * s * h * kActivation) / n;
      EXPECT_EQ(scatters.wire, scatters.calls * half);
      EXPECT_EQ(gathers.wire, gathers.calls * half);
      EXPECT_EQ(traffic(p, 0, of_tensors(p, CollectiveKind::all_reduce)).calls, 0);
    }
  }
}

TEST(Volumes, MegatronsBackwardGathersWhatARecomputationHasGathered) {
  // The page plan.md, by hand; outside the layers 1 gather of the head, 1 again and 1 of the
  // embedding's gradient.
  const std::int64_t b = 2, s = 8, h = 8, n = 2;
  for (const int layers : {1, 3}) {
    for (const auto& [recomputed, again, save, each] :
         {std::tuple{Recompute::none, false, false, 6},
          {Recompute::none, true, false, 6},
          {Recompute::full, false, false, 6},
          {Recompute::full, true, false, 8},
          {Recompute::full, true, true, 6}}) {
      Plan plan = base_plan();
      plan.tp = n;
      plan.sequence_parallel = true;
      plan.micro_batch = plan.global_batch = b;
      plan.recompute.kind = recomputed;
      plan.regathers_recomputed = again;
      plan.save_gathered = save;
      const Program p = lowered(gpt_of(layers), plan);
      EXPECT_EQ(verify(p), std::vector<std::string>{});
      const Traffic gathers = traffic(p, 0, of_tensors(p, CollectiveKind::all_gather));
      EXPECT_EQ(gathers.calls, each * layers + (save ? 2 : 3))
          << layers << " layers, " << each << " each";
      EXPECT_EQ(gathers.wire, gathers.calls * (n - 1) * (b * s * h * kActivation) / n);
    }
  }
}

/// Gradients of keys and values travel round a ring while the next part's are made: no attention
/// waits for them.
TEST(Volumes, NoAttentionOfARingWaitsForGradientsThatTravel) {
  Plan plan = base_plan();
  plan.cp = 4;
  plan.context = Plan::ContextExchange::ring;
  plan.context_given = true;
  const Program p = lowered(gpt(), plan);
  int parts = 0;
  for (const Block& b : p.blocks) {
    std::set<BufferId> travelled;
    for (const Instruction& i : b.instructions) {
      if (i.kind == Kind::collective && i.collective == CollectiveKind::shift)
        travelled.insert(i.writes.begin(), i.writes.end());
      if (i.kind != Kind::compute || i.part < 0 || i.kernel == Kernel::forward) continue;
      ++parts;
      EXPECT_FALSE(i.accumulate);
      for (const BufferId w : i.writes) EXPECT_EQ(travelled.count(w), 0u);
    }
  }
  EXPECT_GE(parts, 4);
}

/// A framework's ring gives way where attention knows none; one that is asked for does not.
TEST(Volumes, AFrameworksRingIsWhereItMayBe) {
  for (const bool sinks : {false, true}) {
    TransformerConfig c = small_config();
    c.sinks = sinks;
    const Graph g = build_transformer(c);
    Plan plan = base_plan();
    set_framework(plan, "megatron-core", "");
    plan.cp = 2;
    const auto by_default = complete(g, plan);
    ASSERT_TRUE(by_default) << by_default.reason();
    EXPECT_EQ(by_default->context,
              sinks ? Plan::ContextExchange::all_gather : Plan::ContextExchange::ring);
    plan.context_given = true;
    EXPECT_EQ(static_cast<bool>(lower(g, *by_default)), true);
    const auto asked = complete(g, plan);
    EXPECT_EQ(asked && lower(g, *asked), !sinks);
  }
}

/// DDP's buckets: what ranks sum once more, in fp32; nothing where there is one rank.
TEST(Volumes, GradientBucketsAreACopyOfWhatRanksSum) {
  const Graph g = gpt();
  for (const std::int64_t dp : {1, 2}) {
    Plan plan = base_plan();
    plan.dp = dp;
    plan.global_batch = dp;
    const auto resident = [&](bool buckets) {
      plan.allocations.gradient_buckets = buckets;
      return resident_bytes(lowered(g, plan), 0, 0, 90).count;
    };
    EXPECT_EQ(resident(true) - resident(false), dp == 1 ? 0 : 4 * parameter_count(g));
  }
}

TEST(Volumes, FullyShardedUnitsReduceTheirGradientsOnce) {
  // However small a bucket: blocks, what is before them and what is behind; else each parameter.
  for (const int layers : {1, 3}) {
    for (const bool units : {false, true}) {
      for (const int zero : {2, 3}) {
        Plan plan = base_plan();
        plan.dp = 2;
        plan.global_batch = 2;
        plan.zero = zero;
        plan.bucket = Bytes{1};
        plan.reduces_units = units;
        const Graph g = gpt_of(layers);
        const Program p = lowered(g, plan);
        const auto calls =
            traffic(p, 0, [](const Block&, const Instruction& i) {
              return i.kind == Kind::collective && i.collective == CollectiveKind::reduce_scatter;
            }).calls;
        EXPECT_EQ(calls, units && zero == 3 ? layers + 2 : std::ssize(g.parameters));
      }
    }
  }
}

TEST(Volumes, WhatIsGatheredAsOneIsCopiedOut) {
  // docs/simulation.md, "Memory": a block of llama-3-8b.
  const Graph g = load_model("llama-3-8b");
  Plan plan = base_plan();
  plan.dp = 8;
  plan.zero = 3;
  plan.global_batch = 16;
  set_precision(plan, "bf16", "");
  const auto copies = [&](const Program& p, std::string_view block) {
    std::pair<double, std::int64_t> sum{0, 0};  // kernels, bytes
    for (const Block& b : p.blocks) {
      if (b.kind != BlockKind::forward && b.kind != BlockKind::backward) continue;
      for (const Instruction& i : b.instructions) {
        if (i.kind != Kind::slice || p.buffer(i.reads[0]).name.rfind(block, 0) != 0) continue;
        const Work w = work_of(p, i, 0);
        sum.first += w.kernels;
        sum.second += w.bytes.count;
      }
    }
    return sum;
  };
  EXPECT_EQ(copies(lowered(g, plan), "layers.7.").second, 0);
  plan.allocations.copies_gathered = true;
  const Program p = lowered(g, plan);
  // Forward, and backward, whose block is there twice: for the last micro-batch and the others.
  EXPECT_NEAR(copies(p, "layers.7.").first, 3, 1e-9);
  EXPECT_EQ(copies(p, "layers.7.").second, 3 * 872'448'000LL);
}

TEST(Volumes, WhatIsMadeOnceIsStoredNotAddedToZeros) {
  const auto count = [](const Plan& plan, const Graph& g, Kernel kernel) {
    std::int64_t n = 0;
    for (const Block& b : lowered(g, plan).blocks) {
      for (const Instruction& i : b.instructions)
        n += i.kind == Kind::compute && i.kernel == kernel &&
             (kernel == Kernel::zero || i.accumulate);
    }
    return n;
  };
  const auto zeroed = [&](const Plan& p, const Graph& g) { return count(p, g, Kernel::zero); };
  const auto adds = [&](const Plan& p, const Graph& g) {
    return count(p, g, Kernel::backward_weight);
  };
  Plan plan = base_plan();
  plan.dp = 2;
  plan.global_batch = 2;
  const Graph g = llama();
  EXPECT_EQ(adds(plan, g), 0);
  EXPECT_EQ(zeroed(plan, g), 0);
  plan.allocations.clears_gradients = true;
  EXPECT_GT(adds(plan, g), 0);
  EXPECT_EQ(zeroed(plan, g), 1);
  plan.allocations.clears_gradients = false;
  // Two micro-batches add up; under ZeRO-2 and -3 their shards do.
  plan.global_batch = 4;
  EXPECT_GT(adds(plan, g), 0);
  plan.zero = 2;
  EXPECT_EQ(adds(plan, g), 0);
  // Autograd's, too, where what is gathered is FSDP2's.
  plan.allocations.weight_gradients = Allocations::WeightGradients::apart;
  EXPECT_GT(adds(plan, g), 0);
  plan.allocations.copies_gathered = true;
  EXPECT_EQ(adds(plan, g), 0);
  plan.allocations = {};
  // A table that two operators read: the second adds to what the first has made.
  const Graph tied = gpt();
  EXPECT_EQ(adds(plan, tied), 2);  // in the last micro-batch's block, and in the others'
  plan.zero = 0;
  plan.global_batch = 2;
  EXPECT_EQ(adds(plan, tied), 4);  // both add
}

TEST(Volumes, ShardedStateIsScatteredAndGatheredAsOftenAsTheStrategySays) {
  // Networks whose parameters all divide by n, so that no shard rounds.
  const std::int64_t m = 3;
  for (const std::int64_t n : {2, 4}) {
    for (const int zero : {1, 2, 3}) {
      for (const Graph& g : {gpt(), llama()}) {
        SCOPED_TRACE(::testing::Message() << "n " << n << " ZeRO-" << zero << " " << g.name);
        const std::int64_t count = parameter_count(g);
        Plan plan = base_plan();
        plan.dp = n;
        plan.zero = zero;
        plan.global_batch = n * m;
        const Program p = lowered(g, plan);
        const auto wire = [&](Category c, CollectiveKind k) {
          return traffic(p, 1, of_state(p, c, k)).wire;
        };
        // ZeRO-1 scatters the accumulated gradients, ZeRO-2 and -3 each micro-batch's.
        EXPECT_EQ(wire(Category::gradients, CollectiveKind::reduce_scatter),
                  (zero == 1 ? 1 : m) * (n - 1) * count * kGradient / n);
        // ZeRO-1, -2: updated parameters, once a step. ZeRO-3: into buffers, once in the forward
        // and once in the backward of every micro-batch.
        EXPECT_EQ(wire(Category::parameters, CollectiveKind::all_gather),
                  zero == 3 ? 0 : (n - 1) * count * kParameter / n);
        EXPECT_EQ(wire(Category::buffers, CollectiveKind::all_gather),
                  zero == 3 ? 2 * m * (n - 1) * count * kParameter / n : 0);
        EXPECT_EQ(wire(Category::gradients, CollectiveKind::all_reduce), 0);
      }
    }
  }
}

TEST(Volumes, ParametersKeptFromTheForwardAreGatheredOnce) {
  const std::int64_t n = 2, m = 3;
  Plan plan = base_plan();
  plan.dp = n;
  plan.zero = 3;
  plan.reshard_after_forward = false;
  plan.global_batch = n * m;
  const Program p = lowered(llama(), plan);
  EXPECT_EQ(traffic(p, 0, of_state(p, Category::buffers, CollectiveKind::all_gather)).wire,
            m * (n - 1) * parameter_count(llama()) * kParameter / n);
}

TEST(Volumes, WhatStaysGatheredIsNotGatheredAgain) {
  // docs/plan.md, "What stays gathered": an embedding, two blocks and a head, of any sizes.
  TransformerConfig c = small_config();
  c.layers = 2;
  c.tied = false;
  const Graph g = build_transformer(c);
  std::vector<std::int64_t> of_unit(static_cast<std::size_t>(g.layers) + 2);  // embedding first
  for (const Operator& op : g.operators) {
    for (const ParameterId q : op.parameters) {
      std::int64_t elements = 1;
      for (const auto& d : g.parameter(q).shape) elements *= d.extent;
      of_unit.at(static_cast<std::size_t>(op.layer + 1)) += elements;
    }
  }
  ASSERT_EQ(of_unit.size(), 4U);
  const std::int64_t n = 2, m = 3, e = of_unit[0], first = of_unit[1], second = of_unit[2],
                     head = of_unit[3], all = e + first + second + head;
  const auto in_backward = [&](const char* stays, const char* recompute) {
    Plan plan = base_plan();
    plan.dp = n;
    plan.zero = 3;
    plan.global_batch = n * m;
    plan.recompute = parse_recompute(recompute, "");
    plan.stays_gathered = parse_stays_gathered(stays, "");
    const Program p = lowered(g, plan);
    const std::int64_t wire =
        traffic(p, 0, of_state(p, Category::buffers, CollectiveKind::all_gather)).wire;
    return wire * n / ((n - 1) * kParameter * m) - all;
  };
  const auto near = [&](std::int64_t elements, const char* recompute) {
    return in_backward(std::to_string(elements).c_str(), recompute);
  };
  EXPECT_EQ(in_backward("nothing", "none"), all);
  EXPECT_EQ(in_backward("last", "none"), all - head);
  EXPECT_EQ(in_backward("root", "none"), first + second);
  EXPECT_EQ(near(1, "none"), all - head);
  EXPECT_EQ(near(2 * head, "none"), all - head);
  EXPECT_EQ(near(2 * head + 1, "none"), e + first);
  EXPECT_EQ(near(2 * (head + second), "none"), e + first);
  EXPECT_EQ(near(2 * (head + second) + 1, "none"), e);
  EXPECT_EQ(near(2 * (head + second + first), "none"), e);
  EXPECT_EQ(near(2 * (head + second + first) + 1, "none"), 0);
  // Blocks run again before their backward.
  EXPECT_EQ(near(2 * head + 3 * second, "full"), e + first);
  EXPECT_EQ(near(2 * head + 3 * second + 1, "full"), e);
  EXPECT_THROW(parse_stays_gathered("-1", "stays_gathered"), InputError);
  EXPECT_THROW(parse_stays_gathered("1e9", "stays_gathered"), InputError);
  for (const char* word : {"nothing", "last", "root", "1000000000"})
    EXPECT_EQ(name(parse_stays_gathered(word, "")), word);
}

TEST(Volumes, HybridShardingReducesShardsOverTheCopiesOnceAStep) {
  Plan plan = base_plan();
  plan.dp = 4;
  plan.zero = 3;
  plan.zero_group = 2;
  plan.global_batch = 8;  // two micro-batches
  const Program p = lowered(llama(), plan);
  const std::int64_t shard = parameter_count(llama()) * kGradient / 2;
  // Inside the group of 2 as ZeRO-3; then all-reduce of one shard over 2 copies: 2 · 1/2 of it.
  EXPECT_EQ(traffic(p, 0, of_state(p, Category::gradients, CollectiveKind::reduce_scatter)).wire,
            2 * shard);
  EXPECT_EQ(traffic(p, 0, of_state(p, Category::gradients, CollectiveKind::all_reduce)).wire,
            shard);
}

TEST(Volumes, PipelinesSendOneActivationPerBoundaryAndMicroBatchEachWay) {
  const std::int64_t b = 2, s = 8, h = 8, m = 4;
  struct Case {
    std::int64_t pp, v, tp;
    bool sequence_parallel;
  };
  for (const Case& c : {Case{2, 1, 1, false}, Case{4, 1, 1, false}, Case{2, 2, 1, false},
                        Case{2, 1, 2, false}, Case{2, 2, 2, true}}) {
    Plan plan = base_plan();
    plan.pp = c.pp;
    plan.virtual_stages = c.v;
    plan.tp = c.tp;
    plan.sequence_parallel = c.sequence_parallel;
    plan.micro_batch = b;
    plan.global_batch = b * m;
    const Program p = lowered(llama(), plan);
    std::int64_t sent[2] = {0, 0}, calls[2] = {0, 0};
    for (int stage = 0; stage < c.pp; ++stage) {
      const std::int64_t rank = p.rank_on_stage(0, stage);
      for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) {
        const Block& block = p.blocks[call.block.index()];
        for (const Instruction& i : block.instructions) {
          if (i.kind != Kind::send) continue;
          const int way = block.kind == BlockKind::forward ? 0 : 1;
          ++calls[way];
          sent[way] += local_bytes(p, i.reads[0], rank).count;
        }
      }
    }
    // v p chunks have v p - 1 boundaries. With sequence parallelism each rank sends its part.
    const std::int64_t each = m * (c.pp * c.v - 1);
    const std::int64_t size = b * s * h * kActivation / (c.sequence_parallel ? c.tp : 1);
    for (const int way : {0, 1}) {
      EXPECT_EQ(calls[way], each);
      EXPECT_EQ(sent[way], each * size);
    }
  }
}

TEST(Volumes, ExpertsExchangeRoutedTokensTwiceForwardAndTwiceBackward) {
  const std::int64_t b = 2, s = 8, h = 8, top_k = 2, layers = 2, m = 2;
  for (const std::int64_t dp : {2, 4}) {
    for (const std::int64_t ep : {2, 4}) {
      if (ep > dp) continue;
      Plan plan = base_plan();
      plan.dp = dp;
      plan.ep = ep;
      plan.micro_batch = b;
      plan.global_batch = b * dp * m;
      const Program p = lowered(mixtral(), plan);
      const Traffic t = traffic(p, 1, of_tensors(p, CollectiveKind::all_to_all));
      // Dispatch and combine, forward and backward. A rank's b s tokens make top_k rows each;
      // balanced, (ep-1)/ep of them belong to other ranks' experts.
      EXPECT_EQ(t.calls, m * layers * 4);
      EXPECT_EQ(t.wire, t.calls * (ep - 1) * (b * s * top_k * h * kActivation) / ep);
    }
  }
}

TEST(Volumes, RowsThatGoOnceToADomainShareTheirCopies) {
  // The example of docs/cost.md: of the six pairs of 4 experts one misses a given half.
  EXPECT_DOUBLE_EQ(rows_once_fraction(4, 2, 2), 5.0 / 6);
  // In one of two groups both of a token's are one part's; the rest as on the page.
  EXPECT_DOUBLE_EQ(rows_once_fraction(4, 2, 2, 2, 1), 0.5);
  EXPECT_NEAR(rows_once_fraction(256, 8, 4), 0.452, 5e-4);
  EXPECT_NEAR(rows_once_fraction(256, 8, 4, 8, 4), 0.366, 5e-4);
  EXPECT_NEAR(rows_once_fraction(256, 8, 8, 8, 4), 0.454, 5e-4);
  EXPECT_NEAR(rows_once_fraction(256, 8, 64, 8, 4), 0.920, 5e-4);
  EXPECT_NEAR(rows_once_fraction(256, 8, 64), 0.959, 5e-4);
  // By drawing: groups, then experts of them.
  std::mt19937_64 drawn(5);
  for (const auto& [experts, top_k, parts, groups, open] :
       {std::array<std::int64_t, 5>{32, 8, 8, 8, 4},
        {32, 4, 2, 8, 3},
        {24, 3, 12, 4, 2},
        {16, 5, 4, 4, 2},
        {64, 6, 16, 16, 5}}) {
    double reached = 0;
    constexpr int kTokens = 20000;
    for (int t = 0; t < kTokens; ++t) {
      std::vector<std::int64_t> of(static_cast<std::size_t>(groups)), may;
      std::iota(of.begin(), of.end(), 0);
      std::shuffle(of.begin(), of.end(), drawn);
      for (std::int64_t e = 0; e < experts; ++e)
        if (std::find(of.begin(), of.begin() + open, e / (experts / groups)) != of.begin() + open)
          may.push_back(e);
      std::shuffle(may.begin(), may.end(), drawn);
      std::set<std::int64_t> there;
      for (std::int64_t k = 0; k < top_k; ++k)
        there.insert(may[static_cast<std::size_t>(k)] / (experts / parts));
      reached += static_cast<double>(there.size()) / static_cast<double>(top_k);
    }
    EXPECT_NEAR(rows_once_fraction(experts, top_k, parts, groups, open), reached / kTokens, 0.01)
        << experts << " " << top_k << " " << parts << " " << groups << " " << open;
  }
  std::mt19937 rng(11);
  for (int i = 0; i < 500; ++i) {
    const std::int64_t parts = 1 + static_cast<std::int64_t>(rng() % 16),
                       experts = parts * (1 + static_cast<std::int64_t>(rng() % 8)),
                       top_k = 1 + static_cast<std::int64_t>(rng()) % experts;
    const double f = rows_once_fraction(experts, top_k, parts);
    EXPECT_NEAR(rows_once_fraction(experts, 1, parts), 1, 1e-12);
    EXPECT_NEAR(rows_once_fraction(experts, top_k, experts), 1, 1e-12);
    EXPECT_LE(f, 1);
    // At least one copy of each row, at most one a part.
    EXPECT_GE(f * static_cast<double>(top_k), 1 - 1e-12);
    EXPECT_LE(f * static_cast<double>(top_k), static_cast<double>(parts) + 1e-12);
  }
  Plan plan = base_plan();
  plan.dp = plan.ep = 2;
  plan.micro_batch = 3;
  plan.global_batch = 6;
  Program p = lowered(mixtral(), plan);
  const Communication one_node(load_topology("dgx-h100:1")),
      two_nodes(load_topology("h100-sxm-4:2"));
  int exchanges = 0;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::collective) continue;
      const Bytes all = payload(p, i, 0);
      p.rows_once = false;
      EXPECT_EQ(one_node.travelling(p, i, all, {0, 1}), all);
      p.rows_once = true;
      const bool rows = i.collective == CollectiveKind::all_to_all && p.buffer(i.reads[0]).routed;
      exchanges += rows ? 1 : 0;
      const Bytes less = rows ? Bytes{all.count * 5 / 6} : all;
      EXPECT_EQ(one_node.travelling(p, i, all, {0, 1}), less);
      // Two nodes are two parts, whatever the number of ranks; one node of four is four.
      EXPECT_EQ(two_nodes.travelling(p, i, all, {0, 1, 4, 5}), less);
      EXPECT_EQ(two_nodes.travelling(p, i, all, {0, 1, 2, 3}), all);
    }
  }
  // Two layers, two exchanges forward and two backward; a backward is there twice, for the last
  // micro-batch and the others.
  EXPECT_EQ(exchanges, 2 * (2 + 2 * 2));
}

TEST(Volumes, ExpertsBiasesApartAreStreamed) {
  TransformerConfig config = small_config();
  config.layers = 1;
  config.moe = {};
  config.moe.experts = 4;
  config.moe.top_k = 2;
  config.moe.ffn = 8;
  config.moe.expert_bias = true;
  Program p = lowered(build_transformer(config), base_plan());
  const std::int64_t elements = 8 * 2 * 8;  // tokens, experts of each, features
  int seen = 0;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.op < 0 || !std::holds_alternative<GroupedProduct>(
                          p.operators[static_cast<std::size_t>(i.op)].operation))
        continue;
      const std::string& name = p.operators[static_cast<std::size_t>(i.op)].name;
      p.expert_bias_apart = false;
      const Work plain = work_of(p, i, 0);
      p.expert_bias_apart = true;
      const Work apart = work_of(p, i, 0);
      const bool down = name.find("down") != std::string::npos,
                 forward = i.kernel == Kernel::forward, data = i.kernel == Kernel::backward_data;
      const bool adds = down && (forward || data);
      EXPECT_EQ(apart.streamed.count - plain.streamed.count,
                adds ? (forward ? 28 : 40) * elements : 0)
          << name;
      EXPECT_EQ(apart.kernels - plain.kernels, adds ? (forward ? 10 : 22) : 0) << name;
      seen += adds ? 1 : 0;
    }
  }
  EXPECT_EQ(seen, 1 + 2);  // a backward is there twice
}

TEST(Volumes, RowsThatAreOrderedPaddedAndLimitedMoveMore) {
  // The example of docs/cost.md: two experts on each of two ranks.
  TransformerConfig config = small_config();
  config.layers = 1;
  config.gated = config.limited_activation = true;
  config.moe = {};
  config.moe.experts = 4;
  config.moe.top_k = 2;
  config.moe.ffn = 32;
  Plan plan = base_plan();
  plan.dp = plan.ep = 2;
  plan.global_batch = 2 * plan.micro_batch;
  for (const char* precision : {"bf16", "fp8"}) {
    set_precision(plan, precision, "");
    const bool narrow = std::string_view(precision) == "fp8";
    Program p = lowered(build_transformer(config), plan);
    const FrameworkKernels none = p.kernels;
    int downs = 0, activations = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.op < 0 || i.kind != Kind::compute) continue;
        const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
        const bool forward = i.kernel == Kernel::forward, data = i.kernel == Kernel::backward_data;
        const auto with = [&](const auto& set) {
          p.kernels = none;
          const Work plain = work_of(p, i, 0);
          set(p.kernels);
          const Work more = work_of(p, i, 0);
          p.kernels = none;
          return std::pair{more.streamed.count + more.ordered.count + more.bytes.count -
                               plain.streamed.count - plain.ordered.count - plain.bytes.count,
                           more.kernels - plain.kernels};
        };
        const auto sorts = [](FrameworkKernels& k) { k.sorts_rows = true; };
        const auto pads = [](FrameworkKernels& k) { k.pads_rows = true; };
        const auto limits = [](FrameworkKernels& k) {
          k.limit_forward = 16, k.limit_backward = 30;
        };
        const auto small = [](FrameworkKernels& k) {
          k.routing_forward = 25, k.routing_backward = 5, k.rows_forward = 11, k.rows_backward = 7;
        };
        const auto* product = std::get_if<GroupedProduct>(&op.operation);
        const bool down =
            product != nullptr && product->out.dim == Dim::feature && (forward || data);
        const bool limited =
            std::holds_alternative<GatedActivation>(op.operation) && (forward || data);
        const std::pair<std::int64_t, double> nothing{0, 0}, ordered{1024, 2};
        EXPECT_EQ(with(sorts), down ? ordered : nothing) << op.name;
        EXPECT_EQ(with(pads), down && narrow ? ordered : nothing) << op.name;
        p.kernels.sorts_rows = true;
        p.kernels.rows_share = 0.527;
        const bool moves = std::holds_alternative<Dispatch>(op.operation) ||
                           std::holds_alternative<Combine>(op.operation);
        EXPECT_EQ(work_of(p, i, 0).share, down || (moves && (forward || data)) ? 0.527 : 0)
            << op.name;
        p.kernels = none;
        EXPECT_EQ(with(limits).first, limited ? (forward ? 8192 : 15360) : 0) << op.name;
        int kernels = 0;
        if (std::holds_alternative<Router>(op.operation)) kernels = forward ? 25 : data ? 5 : 0;
        if (std::holds_alternative<Dispatch>(op.operation)) kernels = forward ? 11 : data ? 7 : 0;
        EXPECT_EQ(with(small), (std::pair<std::int64_t, double>{0, kernels})) << op.name;
        p.rows_once = true;
        EXPECT_EQ(with(sorts), nothing) << op.name;
        EXPECT_EQ(with(pads), nothing) << op.name;
        p.rows_once = false;
        // The host starts every expert's product and cast.
        if (product != nullptr) {
          const Work w = work_of(p, i, 0);
          EXPECT_EQ(w.groups, 1) << op.name;
          EXPECT_EQ(w.kernels, i.casts ? 3 : 1) << op.name;
        }
        p.kernels.fused_experts = true;
        const Work fused = work_of(p, i, 0);
        p.kernels = none;
        if (limited) {
          EXPECT_EQ(fused.kernels, 0);
          EXPECT_EQ(fused.bytes.count, (forward ? 2 : 4) * 16 * 32);
        }
        if (product != nullptr && i.casts) {
          EXPECT_EQ(fused.kernels, (product->out.dim == Dim::feature) == forward ? 1 : 3)
              << op.name;
        }
        downs += down ? 1 : 0;
        activations += limited ? 1 : 0;
      }
    }
    EXPECT_EQ(downs, 1 + 2);  // a backward is there twice
    EXPECT_EQ(activations, 1 + 2);
  }
}

// docs/simulation.md: 6 B a logit.
TEST(Volumes, TheLossTakesMemoryWhileItRuns) {
  Program p = lowered(gpt(), base_plan());
  p.allocations.loss_forward = Bytes{6};
  p.allocations.loss_backward = Bytes{5};
  int seen = 0;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::compute || i.op < 0 ||
          !std::holds_alternative<CrossEntropy>(
              p.operators[static_cast<std::size_t>(i.op)].operation))
        continue;
      const bool forward = i.kernel == Kernel::forward;
      if (!forward && i.kernel != Kernel::backward_data) continue;
      const BufferId logits = forward ? i.reads[0] : i.writes[0];
      EXPECT_EQ(transient_bytes(p, i, 0).count, (forward ? 6 : 5) * local_elements(p, logits, 0));
      ++seen;
    }
  }
  EXPECT_GE(seen, 2);
}

// docs/derivation.md, HSDP: shards are summed over the copies behind the last scatter, or, by a
// framework's rule, when the backward is over.
TEST(Volumes, CopiesOfAShardedStateAreSummedBesideTheBackward) {
  Plan plan = base_plan();
  plan.dp = 4;
  plan.zero = 3;
  plan.zero_group = 2;
  plan.micro_batch = 1;
  plan.global_batch = 8;
  for (const bool last : {false, true}) {
    plan.sums_copies_last = last;
    const Program p = lowered(llama(), plan);
    int beside = 0, behind = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::collective || i.collective != CollectiveKind::all_reduce) continue;
        beside += block.kind == BlockKind::backward;
        behind += block.kind == BlockKind::step;
      }
    }
    EXPECT_EQ(beside > 0, !last);
    EXPECT_EQ(behind > 0, last);
  }
}

TEST(Volumes, NarrowProductsConvertWhatTheyReadOnce) {
  // The example of docs/cost.md.
  const std::int64_t layers = 4, s = 8, h = 8, ffn = 16;
  Plan plan = base_plan();
  set_precision(plan, "fp8", "");
  const Program p = lowered(llama(), plan);
  std::int64_t casts[2] = {0, 0}, elements[2] = {0, 0};
  for (const Block& block : p.blocks) {
    const bool backward = block.kind == BlockKind::backward;
    if (block.kind != BlockKind::forward && !backward) continue;
    for (const Instruction& i : block.instructions) {
      if (i.op < 0) continue;
      const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
      const bool narrow = std::holds_alternative<Linear>(op.operation) && op.name != "head";
      EXPECT_EQ(op.compute, narrow ? ElementType::fp8 : ElementType::bf16) << op.name;
      if (!i.casts) continue;
      EXPECT_TRUE(narrow) << op.name;
      ++casts[backward];
      const Work w = work_of(p, i, 0);
      EXPECT_EQ(w.kernels, 2);
      EXPECT_EQ(w.streamed.count % 4, 0);  // bf16 read, two copies of a byte written
      elements[backward] += w.streamed.count / 4;
    }
  }
  EXPECT_EQ(casts[0], layers * 2);
  EXPECT_EQ(elements[0], layers * s * (h + ffn));
  // A backward is there twice.
  EXPECT_EQ(casts[1], 2 * layers * 7);
  EXPECT_EQ(elements[1], 2 * layers * s * (h + 2 * h / 2 + h + 2 * ffn + h));
}

TEST(Volumes, ScalesThatAreFoundCostAPassAndThreeKernels) {
  // The example of docs/cost.md.
  const std::int64_t layers = 4, s = 8, h = 8, ffn = 16;
  for (const char* precision : {"fp8", "mxfp8", "nvfp4"}) {
    SCOPED_TRACE(precision);
    Plan plan = base_plan();
    set_precision(plan, precision, "");
    plan.kernels.finds_scales = true;
    Program p = lowered(llama(), plan);
    const bool four = std::string_view(precision) == "nvfp4";
    const bool found = std::string_view(precision) != "mxfp8";
    const std::int64_t more = four ? 4 : 2;  // bytes an element
    std::int64_t streamed = 0, bytes = 0;
    double kernels = 0;
    int norms = 0;
    for (const Block& block : p.blocks) {
      if (block.kind != BlockKind::forward) continue;
      for (const Instruction& i : block.instructions) {
        if (i.op < 0 || !i.casts) continue;
        p.kernels.finds_scales = true;
        const Work with = work_of(p, i, 0);
        p.kernels.finds_scales = false;
        const Work without = work_of(p, i, 0);
        p.kernels.finds_scales = true;
        if (std::holds_alternative<Normalize>(
                p.operators[static_cast<std::size_t>(i.op)].operation)) {
          ++norms;
          EXPECT_EQ(with.kernels, 1 + 4);
          bytes += with.bytes.count;
          Instruction plain = i;
          plain.casts = false;
          bytes -= work_of(p, plain, 0).bytes.count;
          continue;
        }
        streamed += with.streamed.count - without.streamed.count;
        kernels += with.kernels - without.kernels;
      }
    }
    EXPECT_EQ(streamed, found ? layers * s * (h + ffn) * more : 0);
    EXPECT_EQ(kernels, found ? layers * 2 * 3 : 0);
    // Not the last, whose reader is the head. In fp8 4 B read and 2 written, in NVFP4 6 and 1.
    EXPECT_EQ(norms, found ? layers * 2 : 0);
    EXPECT_EQ(bytes, found ? layers * 2 * s * h * (four ? 7 : 6) : 0);
  }
}

TEST(Volumes, GathersForNarrowProductsMoveTheirBits) {
  // The example of docs/cost.md: 8 tokens of 8 features, 128 B.
  const std::int64_t layers = 4;
  for (const bool parts : {false, true}) {
    for (const auto& [precision, forward, gradient] :
         {std::tuple{"bf16", 128, 128}, {"fp8", 64, 64}, {"mxfp8", 64, 128}, {"nvfp4", 32, 64}}) {
      SCOPED_TRACE(::testing::Message() << precision << parts);
      Plan plan = base_plan();
      set_precision(plan, precision, "");
      plan.tp = 2;
      plan.sequence_parallel = true;
      plan.narrow_gathers = true;
      plan.overlap_tensor_parallel = parts;
      const Program p = lowered(llama(), plan);
      const Communication node(load_topology("dgx-h100:1"));
      std::map<std::pair<bool, std::int64_t>, std::int64_t> seen;
      for (const Block& block : p.blocks) {
        for (const Instruction& i : block.instructions) {
          if (i.kind != Kind::collective) continue;
          const Bytes all = payload(p, i, 0), sent = node.travelling(p, i, all, {0, 1});
          if (i.collective == CollectiveKind::reduce_scatter) {
            EXPECT_EQ(sent, all);
          }
          if (i.collective == CollectiveKind::all_gather && all == Bytes{128})
            ++seen[{block.kind == BlockKind::backward, sent.count}];
          if (i.collective == CollectiveKind::shift && i.sent_bits > 0) {
            EXPECT_LT(sent, all);
          }
        }
      }
      if (parts) continue;
      std::map<std::pair<bool, std::int64_t>, std::int64_t> expected;
      // Forward two inputs a block, and the head's, which is bf16. Backward, which is there twice,
      // those again, two gradients a block and the embedding's, which is bf16 too.
      expected[{false, forward}] += 2 * layers;
      expected[{false, 128}] += 1;
      expected[{true, forward}] += 2 * 2 * layers;
      expected[{true, gradient}] += 2 * 2 * layers;
      expected[{true, 128}] += 2 * 2;
      EXPECT_EQ(seen, expected);
    }
  }
}

/// Two stride-1 convolutions of kernel K over `rows` x 6, C = 4 channels, F = 4 filters.
Graph stencil(std::int64_t rows, std::int64_t kernel) {
  GraphBuilder g("stencil");
  TensorId x =
      g.input("image", {{Dim::sample, 1}, {Dim::feature, 4}, {Dim::height, rows}, {Dim::width, 6}});
  const TensorId target = g.input(
      "target", {{Dim::sample, 1}, {Dim::feature, 4}, {Dim::height, rows}, {Dim::width, 6}});
  for (const char* name : {"first", "second"}) {
    Convolution c;
    c.out = 4;
    c.height = c.width = {kernel, 1, kernel / 2, kernel / 2, 1};
    x = g.add(name, c, {x});
  }
  return g.finish(g.add("loss", MeanSquaredError{}, {x, target}), 0, 0);
}

TEST(Volumes, HalosAreFloorOfHalfTheKernelOnEachSide) {
  const std::int64_t b = 2, channels = 4, width = 6, n = 3, rows = 12;
  for (const std::int64_t kernel : {1, 3, 5}) {
    Plan plan = base_plan();
    plan.strategy = "spatial";
    plan.tp = n;
    plan.micro_batch = b;
    const Program p = lowered(stencil(rows, kernel), plan);
    const std::int64_t edge = kernel / 2 * b * channels * width * kActivation;
    // Dryden et al. 2019, section III-A: O = floor(K/2) rows from each neighbour, for x forward and
    // for dL/dy backward. Here, of the two convolutions, the first reads the network's input (every
    // rank loads its rows with their neighbours) and needs no gradient for it. The second exchanges
    // x's rows forward; backward, each rank computes what its own dL/dy gives to its window of x,
    // and the overlapping rows of dL/dx are exchanged and added: O rows of C channels instead of O
    // rows of dL/dy's F filters, equal where C = F.
    const Filter halo = of_tensors(p, CollectiveKind::halo_exchange);
    const std::int64_t calls = kernel == 1 ? 0 : 2;
    EXPECT_EQ(traffic(p, 1, halo).calls, calls);
    EXPECT_EQ(traffic(p, 1, halo).wire, calls * 2 * edge);  // interior: two neighbours
    EXPECT_EQ(traffic(p, 0, halo).wire, calls * edge);      // border: one
    EXPECT_EQ(traffic(p, 2, halo).wire, calls * edge);
  }
}

/// What ResNet-50's operator of that name asks of a kernel, 256 images on one GPU.
Work work_in(const Program& p, const std::string& op, Kernel kernel) {
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind == Kind::compute && i.op >= 0 && i.kernel == kernel &&
          p.operators[static_cast<std::size_t>(i.op)].name == op)
        return work_of(p, i, 0);
    }
  }
  throw InternalError("no " + op);
}

Work work_of_resnet(const std::string& op, Kernel kernel, const Plan& plan) {
  return work_in(lowered(load_model("resnet-50"), plan), op, kernel);
}

Plan images(std::string_view precision) {
  Plan p = base_plan();
  p.micro_batch = p.global_batch = 256;
  set_precision(p, precision, "");
  return p;
}

TEST(Work, OfConvolutionsIsTheExampleOfThePage) {
  // docs/cost.md, "Convolutions": 256 images of 56 x 56 x 64 in fp32 are 205.52 MB.
  constexpr std::int64_t kImages = 256 * 56 * 56 * 64 * 4, kFilter = 64 * 64 * 9 * 4;
  Plan tf32 = images("tf32");
  const Work direct = work_of_resnet("layers.0.convolution_2", Kernel::forward, tf32);
  ASSERT_EQ(direct.products.size(), 1u);
  EXPECT_EQ(direct.products[0].m, 802'816);
  EXPECT_EQ(direct.products[0].n, 64);
  EXPECT_EQ(direct.products[0].k, 576);
  EXPECT_EQ(direct.bytes, Bytes{2 * kImages + kFilter});
  EXPECT_EQ(direct.streamed, Bytes{0});
  tf32.channels_first = true;
  for (const Kernel k : {Kernel::forward, Kernel::backward_data, Kernel::backward_weight}) {
    const Work turned = work_of_resnet("layers.0.convolution_2", k, tf32);
    EXPECT_EQ(turned.streamed, Bytes{4 * kImages});
    EXPECT_EQ(turned.kernels, 3);
  }
  for (const Kernel k : {Kernel::forward, Kernel::backward_data, Kernel::backward_weight}) {
    const Work winograd = work_of_resnet("layers.0.convolution_2", k, images("fp32"));
    EXPECT_EQ(winograd.products[0].count, 16);
    EXPECT_NEAR(winograd.products[0].flops().count, direct.flops.count / 2.25, 1);
    EXPECT_EQ(winograd.flops, direct.flops) << "the mathematics stay";
  }
  // A stride of 2, and a kernel of 1 x 1, are none of Winograd's.
  for (const char* other : {"layers.3.convolution_2", "layers.0.convolution_1"})
    EXPECT_EQ(work_of_resnet(other, Kernel::forward, images("fp32")).products[0].count, 1);
}

TEST(Work, OfAMaterialisedAttentionPassesOverItsScoresAsTheFrameworkDoes) {
  TransformerConfig c = small_config();
  c.flash_attention = false;
  Plan plan = base_plan();
  plan.score_passes_forward = 8, plan.score_passes_backward = 7;
  const Program p = lowered(build_transformer(c), plan);
  const std::int64_t scores = plan.micro_batch * c.heads * c.sequence * c.sequence * kActivation;
  int forward = 0, backward = 0;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::compute || i.op < 0 ||
          !std::holds_alternative<Attention>(p.operators[static_cast<std::size_t>(i.op)].operation))
        continue;
      const bool first = i.kernel == Kernel::forward;
      EXPECT_EQ(work_of(p, i, 0).streamed, Bytes{(first ? 8 : 7) * scores});
      ++(first ? forward : backward);
    }
  }
  EXPECT_GT(forward, 0);
  EXPECT_GT(backward, 0);
}

TEST(Work, OfABatchNormReadsTwiceAndTakesWhatIsFused) {
  constexpr std::int64_t kImages = 256 * 56 * 56 * 64 * 4;
  Plan plan = images("tf32");
  const Work norm = work_of_resnet("layers.0.norm_2", Kernel::forward, plan);
  EXPECT_EQ(norm.again, Bytes{kImages});
  EXPECT_EQ(work_of_resnet("layers.0.norm_2", Kernel::backward_data, plan).again, Bytes{0});
  EXPECT_EQ(work_of_resnet("layers.0.activation_2", Kernel::forward, plan).kernels, 1);
  plan.fuses_normalise = true;
  EXPECT_EQ(work_of_resnet("layers.0.norm_2", Kernel::forward, plan).again, Bytes{kImages});
  for (const Kernel k : {Kernel::forward, Kernel::backward_data}) {
    for (const char* fused :
         {"layers.0.activation_2", "layers.0.activation_3", "stem.activation"}) {
      const Work w = work_of_resnet(fused, k, plan);
      EXPECT_EQ(w.kernels, 0) << fused;
      EXPECT_EQ(w.bytes, Bytes{0}) << fused;
    }
  }
  // The residual has four times the channels.
  EXPECT_EQ(work_of_resnet("layers.0.residual", Kernel::forward, plan).bytes, Bytes{4 * kImages});
  EXPECT_EQ(work_of_resnet("layers.0.residual", Kernel::forward, plan).kernels, 0);
  EXPECT_EQ(work_of_resnet("stem.max_pool", Kernel::forward, plan).kernels, 1);
}

TEST(Work, OfJoinedProjectionsIsThatOfOneProduct) {
  // docs/cost.md, "Joined projections": Llama-3-70B's first block, tp 8, 4,096 tokens.
  Graph llama = load_model("llama-3-70b");
  Plan plan = base_plan();
  set_precision(plan, "bf16", "");
  plan.tp = 8;
  plan.sequence_parallel = true;
  const auto at = [&](const char* op, Kernel k, bool joins) {
    Plan p = plan;
    p.joins_projections = joins;
    static std::map<bool, Program> programs;
    if (programs.count(joins) == 0) programs.emplace(joins, lowered(llama, p));
    return work_in(programs.at(joins), std::string("layers.0.") + op, k);
  };
  const double tokens = static_cast<double>(llama.sequence);
  const Work qkv = at("attention.query", Kernel::forward, true);
  ASSERT_EQ(qkv.products.size(), 1u);
  EXPECT_EQ(qkv.products[0].m, tokens);
  EXPECT_EQ(qkv.products[0].n, 1280);
  EXPECT_EQ(qkv.products[0].k, 8192);
  EXPECT_EQ(qkv.kernels, 1);
  EXPECT_EQ(at("mlp.gate", Kernel::forward, true).products.at(0).n, 7168);
  EXPECT_EQ(at("mlp.gate", Kernel::backward_data, true).products.at(0).k, 7168);
  EXPECT_EQ(at("mlp.gate", Kernel::backward_weight, true).products.at(0).m, 7168);
  for (const Kernel k : {Kernel::forward, Kernel::backward_data, Kernel::backward_weight}) {
    double alone = 0;
    for (const char* op : {"attention.query", "attention.key", "attention.value"})
      alone += at(op, k, false).flops.count;
    EXPECT_NEAR(at("attention.query", k, true).flops.count, alone, 1e-9 * alone);
    for (const char* op : {"attention.key", "attention.value", "mlp.up"}) {
      EXPECT_EQ(at(op, k, true).kernels, 0) << op;
      EXPECT_EQ(at(op, k, true).flops.count, 0) << op;
      EXPECT_EQ(at(op, k, true).bytes, Bytes{0}) << op;
      EXPECT_TRUE(at(op, k, true).products.empty()) << op;
    }
    // What reads another input, or goes elsewhere, stays alone.
    for (const char* op : {"attention.output", "mlp.down"})
      EXPECT_EQ(at(op, k, true).bytes, at(op, k, false).bytes) << op;
  }
  if (llama.sequence == 4096) {
    EXPECT_EQ(qkv.bytes, Bytes{98'566'144});
  }
}

TEST(Work, OfABiassGradientReadsTheOutputsOnceMore) {
  // docs/plan.md: GPT-2's first product after a norm, 1,024 tokens in bf16: 1024 x 3072 x 2 B.
  Graph g = load_model("gpt2");
  Plan plan = base_plan();
  set_precision(plan, "bf16", "");
  const auto at = [&](const char* op, Kernel k, bool sums) {
    plan.kernels.bias_sums = sums;
    return work_in(lowered(g, plan), std::string("layers.0.") + op, k);
  };
  const Work without = at("mlp.up", Kernel::backward_weight, false),
             with = at("mlp.up", Kernel::backward_weight, true);
  EXPECT_EQ(with.streamed.count - without.streamed.count, g.sequence * 3072 * 2);
  EXPECT_EQ(with.kernels, without.kernels + 1);
  for (const Kernel k : {Kernel::forward, Kernel::backward_data})
    EXPECT_EQ(at("mlp.up", k, true).kernels, at("mlp.up", k, false).kernels);
  // Added apart, a bias is an operator of its own.
  EXPECT_EQ(at("mlp.down", Kernel::backward_weight, true).kernels,
            at("mlp.down", Kernel::backward_weight, false).kernels);
}

TEST(Work, OfClippingIsInTheUpdateWhereTheFrameworkSaysSo) {
  // docs/plan.md: the bytes of `optimizer_mixed` have norm and scaling; without them, or of another
  // type, they are those of the kernels: a read, a read and a write of fp32 gradients.
  const auto bytes = [](const std::string& precision, double optimizer, double mixed) {
    Plan plan = base_plan();
    set_precision(plan, precision, "");
    plan.optimizer.kind = OptimizerKind::adam;
    plan.optimizer.clip = 1;
    plan.kernels.optimizer = optimizer, plan.kernels.optimizer_mixed = mixed;
    const Program p = lowered(gpt(), plan);
    double clipping = 0, parameters = 0;
    for (const Instruction& i : p.blocks.back().instructions) {
      if (i.kind != Kind::compute) continue;
      if (i.kernel == Kernel::optimizer)
        parameters += static_cast<double>(local_elements(p, i.writes[0], 0));
      if (i.kernel == Kernel::square_sum || i.kernel == Kernel::clip)
        clipping += static_cast<double>(work_of(p, i, 0).bytes.count);
    }
    return clipping / parameters;
  };
  EXPECT_NEAR(bytes("bf16", 0, 0), 12, 0.01);
  EXPECT_EQ(bytes("bf16", 0, 46), 0);
  EXPECT_NEAR(bytes("bf16", 46, 0), 12, 0.01);
  EXPECT_EQ(bytes("fp32", 40, 0), 0);
  EXPECT_NEAR(bytes("fp32", 0, 40), 12, 0.01);
}

TEST(Work, OfAnUpdateHasTheGradientsPassesBeforeTheyMeet) {
  // docs/plan.md: 12 B for each of a rank's parameters where dp > 1, 4 B without, of fp32
  // gradients.
  const auto per_parameter = [](int dp, int zero) {
    Plan plan = base_plan();
    set_precision(plan, "bf16", "");
    plan.dp = dp, plan.zero = zero;
    plan.global_batch = 2 * dp;
    plan.optimizer.kind = OptimizerKind::adam;
    const auto bytes = [&] {
      const Program p = lowered(gpt(), plan);
      double sum = 0, parameters = 0;
      for (const Instruction& i : p.blocks.back().instructions) {
        if (i.kind == Kind::compute && i.kernel == Kernel::optimizer) {
          sum += static_cast<double>(work_of(p, i, 0).bytes.count);
          parameters += static_cast<double>(local_elements(p, i.writes[0], 0));
        }
      }
      return std::pair{sum, parameters};
    };
    const auto without = bytes();
    plan.kernels.gradient_passes = 1, plan.kernels.met_gradient_passes = 2;
    const auto with = bytes();
    return (with.first - without.first) / without.second;
  };
  EXPECT_DOUBLE_EQ(per_parameter(1, 0), 4);
  EXPECT_DOUBLE_EQ(per_parameter(2, 0), 12);
  EXPECT_DOUBLE_EQ(per_parameter(2, 1), 24) << "over both shards";
  EXPECT_DOUBLE_EQ(per_parameter(2, 3), 48) << "and each of 2 micro-batches";
}

TEST(Volumes, AWindowThatIsNoSupersetOfTheBlockCountsWhatCrosses) {
  // 5 rows in blocks {0 1 2} {3 4}; a 2x2 pool of stride 2 has outputs 0 and 1, which read rows
  // {0 1} and {2 3}: rank 1 receives row 2 and drops row 4, rank 0 receives nothing.
  GraphBuilder g("pooled");
  TensorId x =
      g.input("image", {{Dim::sample, 1}, {Dim::feature, 1}, {Dim::height, 5}, {Dim::width, 2}});
  const TensorId target =
      g.input("target", {{Dim::sample, 1}, {Dim::feature, 1}, {Dim::height, 2}, {Dim::width, 1}});
  Convolution same;
  same.out = 1;
  x = g.add("same", same, {x});
  Pool pool;
  pool.height = pool.width = {2, 2, 0, 0, 1};
  x = g.add("pool", pool, {x});
  const Graph graph = g.finish(g.add("loss", MeanSquaredError{}, {x, target}), 0, 0);
  Plan plan = base_plan();
  plan.strategy = "spatial";
  plan.tp = 2;
  const Program p = lowered(graph, plan);
  const Filter halo = of_tensors(p, CollectiveKind::halo_exchange);
  EXPECT_EQ(traffic(p, 0, halo).wire, 0);
  EXPECT_EQ(traffic(p, 1, halo).wire, 2 * 2 * kActivation);  // a row of 2, forward and backward
}

TEST(Volumes, UlyssesExchangesQueriesKeysValuesAndOutputs) {
  const std::int64_t b = 2, s = 8, layers = 4, n = 2;
  Plan plan = base_plan();
  plan.cp = n;
  plan.context = Plan::ContextExchange::all_to_all;
  plan.micro_batch = b;
  const Program p = lowered(llama(), plan);
  const Traffic t = traffic(p, 0, of_tensors(p, CollectiveKind::all_to_all));
  // Forward q (4 heads of 2), k, v (2 heads of 2), output (4 of 2); backward the same four: per
  // token 2 · (8 + 4 + 4 + 8) values; a rank holds s/n tokens and keeps 1/n of them.
  EXPECT_EQ(t.calls, layers * 8);
  EXPECT_EQ(t.wire, layers * 2 * (8 + 4 + 4 + 8) * b * (s / n) * kActivation * (n - 1) / n);
}

TEST(Volumes, ContextParallelGathersKeysAndValuesAndScattersTheirGradients) {
  const std::int64_t b = 2, s = 8, layers = 4, n = 2, kv = 2 * 2;
  Plan plan = base_plan();
  plan.cp = n;
  plan.micro_batch = b;
  const Program p = lowered(llama(), plan);
  const Traffic gathers = traffic(p, 0, of_tensors(p, CollectiveKind::all_gather));
  const Traffic scatters = traffic(p, 0, of_tensors(p, CollectiveKind::reduce_scatter));
  // Forward k and v; the backward gathers both again (only parts are kept) and scatters the sums of
  // their gradients.
  EXPECT_EQ(gathers.calls, layers * 4);
  EXPECT_EQ(scatters.calls, layers * 2);
  EXPECT_EQ(gathers.wire, gathers.calls * (n - 1) * b * s * kv * kActivation / n);
  EXPECT_EQ(scatters.wire, scatters.calls * (n - 1) * b * s * kv * kActivation / n);
}

TEST(Volumes, RingsPassKeysAndValuesRoundAndTheirGradientsHome) {
  const std::int64_t b = 2, s = 8, layers = 4, kv = 2 * 2;
  for (const std::int64_t n : {2, 4}) {
    Plan plan = base_plan();
    plan.cp = n;
    plan.context = Plan::ContextExchange::ring;
    plan.micro_batch = b;
    const Program p = lowered(llama(), plan);
    const Traffic t = traffic(p, 0, of_tensors(p, CollectiveKind::shift));
    // Keys and values of s/n tokens travel together: n - 1 steps forward, n - 1 again backward.
    // Their gradients travel one place behind and are home after n steps. Liu et al. 2023 (arXiv
    // 2310.01889): 2 b s/n kv values a step.
    EXPECT_EQ(t.calls, layers * ((n - 1) + (n - 1) + n));
    EXPECT_EQ(t.wire, t.calls * 2 * b * (s / n) * kv * kActivation);
  }
}

TEST(Volumes, TiedEmbeddingsOweExactlyOneAllReduceAStep) {
  const std::int64_t vocabulary = 12, h = 8;
  for (const std::int64_t pp : {1, 2, 4}) {
    for (const int zero : {0, 1, 2, 3}) {
      Plan plan = base_plan();
      plan.pp = pp;
      plan.tp = 2;
      plan.dp = 2;
      plan.zero = zero;
      plan.global_batch = 8;
      const Program p = lowered(gpt(), plan);
      for (int stage = 0; stage < pp; ++stage) {
        const Traffic t = traffic(p, p.rank_on_stage(3, stage),
                                  [](const Block&, const Instruction& i) { return i.tie >= 0; });
        // The first stage looks tokens up, the last projects onto the same table: two summands of
        // one gradient, V h / tp values each (sharded state: / dp), summed over 2 ranks whatever
        // the number of micro-batches. With one stage the sum is local.
        const bool reads = pp > 1 && (stage == 0 || stage + 1 == pp);
        EXPECT_EQ(t.calls, reads ? 1 : 0);
        EXPECT_EQ(t.wire, reads ? vocabulary * h / 2 / (zero > 0 ? 2 : 1) * kGradient : 0);
      }
    }
  }
}

TEST(Volumes, OneRanksDataParallelScattersAndGathersEveryStep) {
  const std::int64_t n = 2, b = 2, s = 8, vocabulary = 12, m = 3;
  Plan plan = base_plan();
  plan.strategy = "dataparallel";
  plan.dp = n;
  plan.micro_batch = b;
  plan.global_batch = n * b * m;
  const Program p = lowered(llama(), plan);
  const auto wire = [&](CollectiveKind k) {
    return traffic(p, 0, [k](const Block&, const Instruction& i) { return i.collective == k; })
        .wire;
  };
  // torch.nn.DataParallel, every forward: parameters to all, outputs to the first; every backward:
  // their gradients out, those of the parameters back. n b s rows of logits, of which (n-1)/n move.
  EXPECT_EQ(wire(CollectiveKind::broadcast), m * parameter_count(llama()) * kParameter);
  EXPECT_EQ(wire(CollectiveKind::reduce), m * parameter_count(llama()) * kGradient);
  EXPECT_EQ(wire(CollectiveKind::gather), m * (n - 1) * b * s * vocabulary * kActivation);
  EXPECT_EQ(wire(CollectiveKind::scatter), m * (n - 1) * b * s * vocabulary * kActivation);
}

TEST(Volumes, IndependentReplicasSendNothing) {
  Plan plan = base_plan();
  plan.strategy = "replicas";
  plan.dp = 4;
  const Program p = lowered(gpt(), plan);
  EXPECT_EQ(traffic(p, 0, any).calls, 0);
}

TEST(Volumes, FrozenLayersSendNoGradients) {
  Graph g = llama();
  freeze(g, {"embedding*", "layers.0.*", "layers.1.*"});
  Plan plan = base_plan();
  plan.dp = 2;
  const Program p = lowered(g, plan);
  // 2 (n-1)/n = 1.
  EXPECT_EQ(traffic(p, 0, any).wire, trainable_parameter_count(g) * kGradient);
}

/// A mask's pairs are summed, not counted query by query.
TEST(Work, OfWhatAMaskLeavesIsCountedExactly) {
  std::mt19937 rng(30);
  int cut = 0;
  for (int k = 0; k < 200; ++k) {
    TransformerConfig c = small_config();
    c.sequence = c.positions = 8 * (1 + static_cast<std::int64_t>(rng() % 12));
    c.window = rng() % 2 == 0 ? 0 : 1 + static_cast<std::int64_t>(rng() % 40);
    Plan plan = base_plan();
    plan.cp = std::int64_t{1} << rng() % 3;
    plan.context = Plan::ContextExchange::all_gather;
    const auto p = lower(build_transformer(c), *complete(build_transformer(c), plan));
    ASSERT_TRUE(p);
    for (const ProgramOperator& op : p->operators) {
      const auto* a = std::get_if<Attention>(&op.operation);
      if (a == nullptr) continue;
      const auto at = static_cast<std::size_t>(op.signature.find(Dim::sequence));
      for (std::int64_t rank = 0; rank < p->ranks(); ++rank) {
        const auto mine = local_indices(p->mesh, op.cuts[at], op.signature.dims[at].extent, rank);
        double pairs = 0;
        for (const std::int64_t q : mine)
          pairs += static_cast<double>(a->window > 0 ? std::min(q + 1, a->window) : q + 1);
        EXPECT_DOUBLE_EQ(
            attended_fraction(*p, op, rank),
            pairs / (static_cast<double>(mine.size()) * static_cast<double>(c.sequence)));
        cut += p->ranks() > 1;
      }
      break;
    }
  }
  EXPECT_GT(cut, 100);
}

}  // namespace
}  // namespace partita
