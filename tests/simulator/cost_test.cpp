// tests/simulator/cost_test.cpp: prices that docs/cost.md works out by hand, on dgx-h100.

#include "simulator/cost/cost.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "simulator/cost/measured.h"
#include "tests/simulator/clusters.h"
#include "tests/simulator/networks.h"
#include "topologies/topology.h"

namespace partita {
namespace {

std::vector<std::int64_t> first(std::int64_t n) {
  std::vector<std::int64_t> ranks(static_cast<std::size_t>(n));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

const DeviceProfile& h100() {
  static const Topology t = load_topology("dgx-h100:1");
  return t.device(DeviceId{0});
}

/// The page prints six digits.
void expect_us(Seconds t, double microseconds) {
  EXPECT_NEAR(t.count * 1e6, microseconds, 5e-6 * microseconds);
}

TEST(Cost, OfAMemoryBoundKernelIsItsBytesOverTheSustainedBandwidth) {
  Work w;
  w.bytes = 128_MiB;
  w.flops = Flops{33'554'432};
  ShapePrices prices(h100());
  expect_us(kernel_time(w, h100(), prices), 47.5167);
}

TEST(Cost, AShardIsAViewWhereTheFrameworkHasOne) {
  for (const int zero : {1, 2}) {
    Plan plan = base_plan();
    plan.dp = 2;
    plan.zero = zero;
    plan.global_batch = 2 * plan.micro_batch;
    Program p = lowered(build_transformer(small_config()), plan);
    int shards = 0, others = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::slice) continue;
        const Buffer& to = p.buffer(i.writes[0]);
        const bool shard = to.category == Category::parameters;
        (shard ? shards : others) += 1;
        p.kernels.shard_views = false;
        const Work copied = work_of(p, i, 1);
        EXPECT_EQ(copied.kernels, 1);
        EXPECT_GT(copied.bytes.count, 0);
        p.kernels.shard_views = true;
        const Work view = work_of(p, i, 1);
        EXPECT_EQ(view.kernels, shard ? 0 : 1);
        EXPECT_EQ(view.bytes, shard ? Bytes{} : copied.bytes);
      }
    }
    EXPECT_GT(shards, 0) << zero << ", others " << others;
  }
}

TEST(Cost, OneKernelOfAnUpdateTakesManyTensors) {
  // docs/plan.md, "Kernels and messages", `optimizer_tensors`.
  Plan plan = base_plan();
  plan.optimizer.kind = OptimizerKind::adam;
  Program p = lowered(load_model("gpt2"), plan);
  const auto launches = [&p](int tensors) {
    p.kernels.optimizer_tensors = tensors;
    double all = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions)
        if (i.kernel == Kernel::optimizer) all += work_of(p, i, 0).kernels;
    }
    return all;
  };
  EXPECT_EQ(launches(0), 196);
  EXPECT_NEAR(launches(36), 5.444, 5e-4);
  p.optimizer.kind = OptimizerKind::sgd;
  EXPECT_EQ(launches(36), 196);
}

TEST(Cost, RowsAreOrderedAtTheirShareOfTheBandwidth) {
  // docs/cost.md, "Expert by expert", beside a product and alone.
  const DeviceProfile d = load_device("b200");
  ShapePrices prices(d);
  Work alone;
  alone.bytes = Bytes{134'217'728};
  expect_us(kernel_parts(alone, d, prices).work, 19.4383);
  alone.share = 0.527;
  expect_us(kernel_parts(alone, d, prices).work, 33.1964);
  Work beside;
  Product p{4096,  4096,  4096, 1,    ElementType::bf16, ElementType::bf16, ProductLayout::tn,
            false, false, {},   false};
  p.bytes = p.operand_bytes();
  beside.products = {p};
  const KernelParts before = kernel_parts(beside, d, prices);
  beside.ordered = Bytes{134'217'728};
  beside.share = 0.527;
  const KernelParts after = kernel_parts(beside, d, prices);
  expect_us(after.work - before.work, 33.1964);
  expect_us(after.memory - before.memory, 19.4383);
  beside.share = 0;
  expect_us(kernel_parts(beside, d, prices).work - before.work, 19.4383);
  // A processor has one price for all of an instruction: its bytes keep the bandwidth.
  const DeviceProfile cpu = load_device("cpu");
  ShapePrices host(cpu);
  beside.bytes = p.bytes;
  const KernelParts streamed = kernel_parts(beside, cpu, host);
  beside.share = 1e-6;
  EXPECT_EQ(kernel_parts(beside, cpu, host).work, streamed.work);
}

TEST(Cost, OfAKernelThatDoesNotStreamIsItsShareOfTheBandwidth) {
  // docs/cost.md, "Kernels that do not stream".
  static const Topology a100s = load_topology("dgx-a100-80gb:1");
  const DeviceProfile& a100 = a100s.device(DeviceId{0});
  ShapePrices prices(a100);
  Work w;
  w.bytes = Bytes{134'217'728};
  w.share = 0.466;
  expect_us(kernel_parts(w, a100, prices).work, 141.256);
  expect_us(kernel_parts(w, a100, prices).memory, 73.1392);
  w.bytes = Bytes{201'326'592};
  w.share = 0.241;
  expect_us(kernel_parts(w, a100, prices).work, 409.701);
  w.share = 0.95;  // no faster than what streams
  expect_us(kernel_parts(w, a100, prices).work, 109.709);
  ShapePrices others(h100());
  w.bytes = Bytes{38 * 1'073'741'824LL};
  w.share = 0.77;
  expect_us(kernel_parts(w, h100(), others).work, 15817.87);
}

TEST(Cost, OfANormsOrALosssMeasuredKernelsIsOfItsTensorsOnceAndAllItsGradients) {
  TransformerConfig c = small_config();
  Plan plan = base_plan();
  plan.micro_batch = plan.global_batch = 2;
  const auto norms = [&](TransformerConfig::Norm kind) {
    c.norm = kind;
    const Program p = lowered(build_transformer(c), plan);
    std::map<std::string, Work> seen;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::compute || i.op < 0) continue;
        const Operation& op = p.operators[static_cast<std::size_t>(i.op)].operation;
        const char* kernel = i.kernel == Kernel::forward         ? "forward"
                             : i.kernel == Kernel::backward_data ? "data"
                                                                 : "weight";
        if (std::holds_alternative<Normalize>(op))
          seen[fmt::format("norm {}", kernel)] = work_of(p, i, 0);
        if (std::holds_alternative<CrossEntropy>(op) && i.kernel != Kernel::forward_statistic)
          seen[fmt::format("loss {}", kernel)] = work_of(p, i, 0);
      }
    }
    return seen;
  };
  for (const TransformerConfig::Norm kind :
       {TransformerConfig::Norm::layer, TransformerConfig::Norm::rms}) {
    plan.kernels = {};
    const auto usual = norms(kind);
    plan.kernels.normalize_share_forward = 0.466;
    plan.kernels.normalize_share_backward = 0.241;
    plan.kernels.logit_forward = 38, plan.kernels.logit_backward = 14;
    plan.kernels.logit_share_forward = 0.77, plan.kernels.logit_share_backward = 0.6;
    const auto measured = norms(kind);
    EXPECT_EQ(measured.at("norm forward").share, 0.466);
    EXPECT_EQ(measured.at("norm forward").bytes, usual.at("norm forward").bytes);
    EXPECT_EQ(measured.at("norm data").share, 0.241);
    EXPECT_EQ(measured.at("norm data").bytes, usual.at("norm data").bytes);
    EXPECT_GT(usual.at("norm weight").bytes.count, 0);
    EXPECT_EQ(measured.at("norm weight").bytes.count, 0);
    EXPECT_EQ(measured.at("loss forward").share, 0.77);
    EXPECT_EQ(measured.at("loss data").share, 0.6);
    // What counts every operation counts those of scale and bias too; of a layer norm alone.
    plan.kernels = {};
    plan.kernels.normalize_forward = 60, plan.kernels.normalize_backward = 164;
    const auto counted = norms(kind).at("norm weight").bytes;
    EXPECT_EQ(counted,
              kind == TransformerConfig::Norm::layer ? Bytes{} : usual.at("norm weight").bytes);
  }
}

TEST(Cost, OperationsThatAreKernelsOfTheirOwnMoveWhatEachDoes) {
  // docs/plan.md by hand: 36 and 92 B an element of an RMS norm, 10 and 18 of a gated activation,
  // 20 of what is rotated. One rank, a sample of 8 tokens.
  TransformerConfig c = small_config();
  c.norm = TransformerConfig::Norm::rms;
  c.gated = true;
  c.rotary_dim = 2;
  Plan plan = base_plan();
  set_framework(plan, "torchtitan-eager", "");
  const Program p = lowered(build_transformer(c), plan);
  std::map<std::string, int> seen;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      const bool forward = i.kernel == Kernel::forward;
      if (i.kind != Kind::compute || i.op < 0 || (!forward && i.kernel != Kernel::backward_data))
        continue;
      const Operation& op = p.operators[static_cast<std::size_t>(i.op)].operation;
      const auto moves = [&](const char* what, std::int64_t ahead, std::int64_t back) {
        const std::int64_t n = local_elements(p, forward ? i.writes[0] : i.gradients[0], 0);
        EXPECT_EQ(work_of(p, i, 0).bytes.count, (forward ? ahead : back) * n) << what;
        ++seen[what];
      };
      if (std::holds_alternative<Normalize>(op)) moves("norm", 36, 92);
      if (std::holds_alternative<GatedActivation>(op)) moves("gate", 10, 18);
      if (std::holds_alternative<Rotary>(op)) moves("rotary", 20, 20);
    }
  }
  EXPECT_EQ(seen.size(), 3u);
}

TEST(Cost, OfAFrameworksSoftmaxAndCrossEntropyIsWhatItsKernelsMove) {
  // docs/plan.md, "Kernels and messages": 9 and 11 B a score; 38 and 14 B a logit. Per rank 2
  // samples of 8 tokens, 2 of 4 heads, 6 of 12 logits.
  TransformerConfig c = small_config();
  c.flash_attention = false;
  Plan plan = base_plan();
  plan.tp = 2;
  plan.micro_batch = plan.global_batch = 2;
  plan.kernels.score_forward = 9, plan.kernels.score_backward = 11;
  plan.kernels.logit_forward = 38, plan.kernels.logit_backward = 14;
  const Program p = lowered(build_transformer(c), plan);
  constexpr std::int64_t kScores = 2 * 2 * 8 * 8, kLogits = 2 * 8 * 6;
  int cores = 0, losses = 0;
  for (const Block& block : p.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::compute || i.op < 0) continue;
      const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
      const Work w = work_of(p, i, 0);
      if (std::holds_alternative<Attention>(op.operation)) {
        EXPECT_EQ(w.streamed.count, (i.kernel == Kernel::forward ? 9 : 11) * kScores);
        ++cores;
      } else if (std::holds_alternative<CrossEntropy>(op.operation)) {
        EXPECT_EQ(w.bytes.count, i.kernel == Kernel::forward         ? 38 * kLogits
                                 : i.kernel == Kernel::backward_data ? 14 * kLogits
                                                                     : 0);
        ++losses;
      }
    }
  }
  EXPECT_GE(cores, 2 * c.layers);
  EXPECT_GE(losses, 4);  // maximum and sum, loss, gradient

  // 2 samples of 2 heads each: the fused softmax takes fours of them, of at most 8 keys.
  plan.kernels.score_forward_unfused = 41, plan.kernels.score_backward_unfused = 53;
  const auto scores_move = [&](int batches, int keys, std::int64_t ahead, std::int64_t back) {
    SCOPED_TRACE(fmt::format("{} batches, {} keys", batches, keys));
    plan.kernels.fused_batches = batches, plan.kernels.fused_keys = keys;
    const Program unfused = lowered(build_transformer(c), plan);
    int attentions = 0;
    for (const Block& block : unfused.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::compute || i.op < 0) continue;
        const auto& op = unfused.operators[static_cast<std::size_t>(i.op)];
        if (!std::holds_alternative<Attention>(op.operation)) continue;
        EXPECT_EQ(work_of(unfused, i, 0).streamed.count,
                  (i.kernel == Kernel::forward ? ahead : back) * kScores);
        ++attentions;
      }
    }
    EXPECT_GE(attentions, 2 * c.layers);
  };
  scores_move(4, 8, 9, 11);
  scores_move(2, 0, 9, 11);
  scores_move(8, 8, 41, 53);
  scores_move(4, 7, 41, 53);

  // Padding around a flash attention: 18 and 34 B an element of 2 x 8 x 2 x 2 of queries.
  c.flash_attention = true;
  plan.kernels.padding_forward = 18, plan.kernels.padding_backward = 34;
  const Program flash = lowered(build_transformer(c), plan);
  int seen = 0;
  for (const Block& block : flash.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kind != Kind::compute || i.op < 0) continue;
      const auto& op = flash.operators[static_cast<std::size_t>(i.op)];
      if (!std::holds_alternative<Attention>(op.operation)) continue;
      EXPECT_EQ(work_of(flash, i, 0).streamed.count,
                (i.kernel == Kernel::forward ? 18 : 34) * 2 * 8 * 2 * (c.hidden / c.heads));
      ++seen;
    }
  }
  EXPECT_GE(seen, 2 * c.layers);
}

TEST(Cost, OfUnfusedKernelsAndRelativePositionsIsWhatTheyMoveAndMultiply) {
  // docs/plan.md, "Kernels and messages". 2 samples of 8 tokens after 8 of memory, 4 heads of 2.
  TransformerConfig c = small_config();
  c.flash_attention = c.causal = c.tied = false;
  c.memory = 8;
  c.dropout = 0.1;
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.micro_batch = plan.global_batch = 2;
  plan.optimizer.kind = OptimizerKind::adam;
  plan.launches.kernel = Seconds{10e-6};
  FrameworkKernels& k = plan.kernels;
  k.score_forward = 70, k.score_backward = 60;
  k.score_fp32_forward = 12, k.score_fp32_backward = 16;
  k.head_passes_forward = 14, k.head_passes_backward = 28;
  k.position_product = true;
  k.normalize_forward = 60, k.normalize_backward = 164;
  k.dropout_forward = 50, k.dropout_backward = 20;
  k.activation_passes_forward = 11, k.activation_passes_backward = 24;
  k.optimizer = 60, k.optimizer_mixed = 72, k.optimizer_kernels = 20;
  k.table_passes = 19;
  const Program p = lowered(build_transformer(c), plan);
  constexpr std::int64_t kScores = 2 * 4 * 8 * 16, kQueries = 2 * 8 * 8;
  std::map<std::string, int> seen;
  const auto each = [&](const auto& check) {
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind == Kind::compute) check(i, work_of(p, i, 0));
      }
    }
  };
  const auto positions = [](const Work& w, std::size_t from) {
    double flops = 0;
    for (std::size_t n = from; n < w.products.size(); ++n) flops += w.products[n].flops().count;
    return flops;
  };
  each([&](const Instruction& i, const Work& w) {
    if (i.kernel == Kernel::optimizer) {
      EXPECT_EQ(w.bytes.count, 60 * local_elements(p, i.writes[0], 0));
      EXPECT_EQ(w.kernels, 20);
      ShapePrices prices(h100());
      EXPECT_GE(kernel_time(w, h100(), prices).count, 200e-6);
      ++seen["optimizer"];
    }
    if (i.op < 0) return;
    const Operation& op = p.operators[static_cast<std::size_t>(i.op)].operation;
    const bool forward = i.kernel == Kernel::forward, data = i.kernel == Kernel::backward_data;
    if (std::holds_alternative<Attention>(op) && forward) {
      EXPECT_EQ(w.streamed.count, 82 * kScores + 14 * 4 * kQueries);
      ASSERT_EQ(w.products.size(), 5U);
      // Queries with positions, 16 rows of 2 numbers by 16 keys, for 4 heads; the positions' keys;
      // queries of the memory.
      EXPECT_EQ(positions(w, 2), 2.0 * (16 * 16 * 2 * 4 + 16 * 8 * 8 + 16 * 8 * 8));
      ++seen["forward"];
    } else if (std::holds_alternative<Attention>(op) && data) {
      EXPECT_EQ(w.streamed.count, 76 * kScores + 28 * 4 * kQueries);
      ASSERT_EQ(w.products.size(), 9U);
      // Twice the forward's, but what the positions are made of has no gradient.
      EXPECT_EQ(positions(w, 4), 2.0 * (2 * 16 * 16 * 2 * 4 + 16 * 8 * 8 + 2 * 16 * 8 * 8));
      ++seen["backward"];
    } else if (std::holds_alternative<Normalize>(op) && (forward || data)) {
      EXPECT_EQ(w.bytes.count, (forward ? 60 : 164) * kQueries);
      ++seen["normalize"];
    } else if (std::holds_alternative<Dropout>(op) && (forward || data)) {
      EXPECT_EQ(w.bytes.count, (forward ? 50 : 20) * kQueries);
      ++seen["dropout"];
    } else if (std::holds_alternative<Activation>(op) && (forward || data)) {
      EXPECT_EQ(w.bytes.count,
                (forward ? 44 : 96) * local_elements(p, forward ? i.writes[0] : i.gradients[0], 0));
      ++seen["activation"];
    } else if (std::holds_alternative<Embedding>(op) && i.kernel == Kernel::backward_weight) {
      EXPECT_EQ(w.bytes.count, 2 * 4 * kQueries + 19 * 4 * 12 * 8);
      ++seen["embedding"];
    }
  });
  EXPECT_GE(seen["forward"], c.layers);
  EXPECT_GE(seen["backward"], c.layers);
  EXPECT_GE(seen["normalize"], 4 * c.layers);
  EXPECT_GE(seen["dropout"], 4 * c.layers);
  EXPECT_GE(seen["activation"], 2 * c.layers);
  EXPECT_GE(seen["embedding"], 1);
  EXPECT_GT(seen["optimizer"], 0);

  set_precision(plan, "bf16", "");
  const Program narrow = lowered(build_transformer(c), plan);
  int mixed = 0;
  for (const Block& block : narrow.blocks) {
    for (const Instruction& i : block.instructions) {
      if (i.kernel != Kernel::optimizer) continue;
      EXPECT_EQ(work_of(narrow, i, 0).bytes.count, 72 * local_elements(narrow, i.writes[0], 0));
      ++mixed;
    }
  }
  EXPECT_EQ(mixed, seen["optimizer"]);
}

// docs/plan.md, "Frameworks": of 4 micro-batches' gradients three are added to the first, 12 B each in
// fp32; where a pass's are cast, clipped and the like, so many bytes of all four.
TEST(Cost, OfAccumulatedGradientsIsWhatEachPassMoves) {
  TransformerConfig c;
  c.layers = 2, c.hidden = 16, c.heads = 4, c.ffn = 32, c.vocabulary = 40, c.sequence = 8;
  std::int64_t elements = 0;
  const auto moved = [&](const char* precision, double wide, double mixed, std::int64_t passes) {
    Plan plan = base_plan();
    set_precision(plan, precision, "");
    plan.micro_batch = 2;
    plan.global_batch = 2 * passes;
    plan.allocations.weight_gradients = Allocations::WeightGradients::apart;
    plan.kernels.accumulation = wide;
    plan.kernels.accumulation_mixed = mixed;
    const Program p = lowered(build_transformer(c), plan);
    std::int64_t bytes = 0;
    elements = 0;
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::compute || i.kernel != Kernel::backward_weight) continue;
        const Work w = work_of(p, i, 0);
        bytes += w.bytes.count + w.streamed.count;
        // A table's rows are added where they are.
        const auto& op = p.operators[static_cast<std::size_t>(i.op)].operation;
        if (std::holds_alternative<Embedding>(op)) continue;
        for (const BufferId g : i.writes) elements += local_elements(p, g, 0);
      }
    }
    return bytes;
  };
  const std::int64_t wide = moved("fp32", 24, 48, 4) - moved("fp32", 0, 0, 4);
  EXPECT_EQ(wide, (24 - 12 * 3 / 4) * elements);
  // Gradients in bf16 beside sums in fp32: all of them are added, 2 + 8 B.
  const std::int64_t mixed = moved("bf16", 24, 48, 4) - moved("bf16", 0, 0, 4);
  EXPECT_EQ(mixed, (48 - 10) * elements);
  // An update's only gradients have the update's own passes.
  EXPECT_EQ(moved("fp32", 24, 48, 1), moved("fp32", 0, 0, 1));
}

TEST(Cost, OfAPartOfTheSequenceIsItsShareOfTheWholeProduct) {
  // docs/policies.md, "Overlapped tensor parallel": parts run on streams beside each other.
  for (const std::int64_t cp : {1, 2}) {
    Plan plan = base_plan();
    plan.tp = 2;
    plan.cp = cp;
    plan.sequence_parallel = true;
    // What stores is another kernel than what adds, as all parts but the first do.
    plan.allocations.clears_gradients = true;
    ShapePrices prices(h100());
    std::map<std::string, double> work[2];
    int parts = 0;
    for (const bool overlapped : {false, true}) {
      plan.overlap_tensor_parallel = overlapped;
      const Program p = lowered(llama(), plan);
      for (const Block& block : p.blocks) {
        for (const Instruction& i : block.instructions) {
          if (i.kind != Kind::compute || i.op < 0) continue;
          const auto& op = p.operators[static_cast<std::size_t>(i.op)];
          if (!std::holds_alternative<Linear>(op.operation)) continue;
          const Work w = work_of(p, i, 0);
          EXPECT_EQ(w.parts, i.part >= 0 ? 2 : 1);
          EXPECT_EQ(part_size(p, i, 0), static_cast<std::int64_t>(part_positions(p, i, 0).size()));
          parts += i.part >= 0 ? 1 : 0;
          work[overlapped][op.name + std::to_string(static_cast<int>(i.kernel))] +=
              kernel_parts(w, h100(), prices).units.count;
        }
      }
    }
    // Queries, keys, values, output, gate, up and down of every layer, forward at least.
    EXPECT_GE(parts, 2 * 7 * 4) << cp;
    ASSERT_EQ(work[0].size(), work[1].size());
    for (const auto& [name, units] : work[0])
      EXPECT_NEAR(work[1].at(name) / units, 1, 1e-9) << name << cp;
  }
}

TEST(Cost, OfAGradientMadeInPartsIsOneThatIsAddedOnce) {
  // docs/policies.md, "Overlapped tensor parallel".
  Plan plan = base_plan();
  plan.tp = 2;
  plan.sequence_parallel = true;
  plan.micro_batch = 1;
  plan.global_batch = 4;
  plan.allocations.weight_gradients = Allocations::WeightGradients::apart;
  std::int64_t added[2] = {0, 0};
  for (const bool overlapped : {false, true}) {
    plan.overlap_tensor_parallel = overlapped;
    const Program p = lowered(llama(), plan);
    for (const Block& block : p.blocks)
      for (const Instruction& i : block.instructions)
        if (i.kind == Kind::compute && i.kernel == Kernel::backward_weight)
          added[overlapped] += work_of(p, i, 0).streamed.count;
  }
  EXPECT_GT(added[0], 0);
  EXPECT_EQ(added[0], added[1]);
}

TEST(Cost, OfWhatComesRoundInPartsIsCastOnce) {
  // docs/policies.md, "Overlapped tensor parallel": gradients that a row-cut product gathers.
  Plan plan = base_plan();
  plan.tp = 2;
  plan.sequence_parallel = true;
  set_precision(plan, "fp8", "");
  std::map<std::string, std::int64_t> cast[2];
  int turned = 0;
  for (const bool overlapped : {false, true}) {
    plan.overlap_tensor_parallel = overlapped;
    const Program p = lowered(llama(), plan);
    for (const Block& block : p.blocks) {
      if (block.kind != BlockKind::backward) continue;
      for (const Instruction& i : block.instructions) {
        if (i.kind != Kind::compute || i.op < 0 || i.kernel != Kernel::backward_data || !i.casts)
          continue;
        const auto& op = p.operators[static_cast<std::size_t>(i.op)];
        const Work w = work_of(p, i, 0);
        EXPECT_EQ(w.kernels, i.part > 0 ? 1 : 2) << op.name;
        turned += i.part > 0 ? 1 : 0;
        cast[overlapped][op.name] += w.streamed.count;
      }
    }
  }
  EXPECT_GT(turned, 0);
  ASSERT_EQ(cast[0].size(), cast[1].size());
  // Of two parts one is read in bf16 and written twice, one read and written in fp8: 3 B for 4.
  const std::string down = "layers.0.mlp.down", up = "layers.0.mlp.up";
  EXPECT_EQ(4 * cast[1].at(down), 3 * cast[0].at(down));
  EXPECT_EQ(cast[1].at(up), cast[0].at(up));
}

TEST(Cost, OfAnAllReduceInANodeIsARingOverTheSwitch) {
  const Topology t = load_topology("dgx-h100:1", without_nccl());
  Communication c(t);
  const WireCount w = wire_count(CollectiveKind::all_reduce, 8, 1_GiB);
  EXPECT_EQ(w.steps, 14);
  EXPECT_EQ(w.bytes, Bytes{1'879'048'192});
  EXPECT_NEAR(c.ring(first(8)).bandwidth.count, 450e9, 1);
  expect_us(c.collective(CollectiveKind::all_reduce, 1_GiB, first(8)), 4192.66);
  // A short one: three hops there and three back beat fourteen.
  expect_us(c.collective(CollectiveKind::all_reduce, 64_KiB, first(8)), 9.29127);
}

TEST(Cost, OfPartsFromPeersIsOneSumOfThem) {
  // docs/policies.md: n + 1 passes over a part, not 3 (n - 1): of four 5 for 9.
  Plan plan = base_plan();
  plan.tp = 4;
  plan.sequence_parallel = plan.overlap_tensor_parallel = true;
  std::int64_t bytes[2] = {0, 0};
  for (const int copies : {0, 1}) {
    plan.overlap_multiprocessors = copies;
    const Program p = lowered(gpt(), plan);
    for (const Block& block : p.blocks) {
      for (const Instruction& i : block.instructions)
        if (i.kind == Kind::compute && i.kernel == Kernel::add && i.part > 0)
          bytes[copies] += work_of(p, i, 0).bytes.count;
    }
  }
  EXPECT_GT(bytes[0], 0);
  EXPECT_NEAR(static_cast<double>(bytes[1]) / static_cast<double>(bytes[0]), 5.0 / 9, 0.01);
}

TEST(Cost, OfACopyToAPeerIsAHopAndTwoKernelsBesideTheLink) {
  // docs/nccl.md: 2 x 3 + 3.4 + 8388608 B / (450 GB/s x .925 x .824) us.
  const Topology t = load_topology("dgx-h100:2");
  Communication c(t);
  expect_us(c.peer_copy(8_MiB, first(8)), 33.8573);
  EXPECT_LT(c.peer_copy(8_MiB, first(8)), c.collective(CollectiveKind::shift, 8_MiB, first(8)));
  // What sharing stretches is within it.
  const auto moving = c.moving(CollectiveKind::shift, 8_MiB, first(8), true);
  expect_us(moving.time, 24.4573);
  // Between nodes parts are NCCL's messages.
  EXPECT_EQ(c.peer_copy(8_MiB, first(16)), c.collective(CollectiveKind::shift, 8_MiB, first(16)));
}

TEST(Cost, OfAnAllReduceAcrossNodesUsesAllNetworkCards) {
  const Topology t = load_topology("dgx-h100:2", without_nccl());
  Communication c(t);
  EXPECT_NEAR(c.ring(first(16)).bandwidth.count, 400e9, 1);
  expect_us(c.collective(CollectiveKind::all_reduce, 1_GiB, first(16)), 5132.16);
}

TEST(Cost, OfAPointToPointIsItsRoute) {
  Communication c(load_topology("dgx-h100:2", without_nccl()));
  expect_us(c.point_to_point(64_MiB, 0, 1), 153.131);
  expect_us(c.point_to_point(64_MiB, 0, 8), 1347.38);
}

TEST(Cost, OfAnAllToAllIsItsBusiestLink) {
  Communication c(load_topology("dgx-h100:2", without_nccl()));
  expect_us(c.collective(CollectiveKind::all_to_all, 64_MiB, first(8)), 134.489);
  expect_us(c.collective(CollectiveKind::all_to_all, 64_MiB, first(16)), 677.289);
}

TEST(Cost, GrowsWithThePayloadAndNeverBeatsItsBytes) {
  for (const bool nccl : {false, true}) {
    Communication c(load_topology("dgx-h100:2", nccl ? TopologyEdits{} : without_nccl()));
    for (const auto kind : {CollectiveKind::all_reduce, CollectiveKind::all_gather,
                            CollectiveKind::reduce_scatter, CollectiveKind::all_to_all}) {
      for (const std::int64_t n : {2, 3, 8, 16}) {
        Seconds before{0};
        for (std::int64_t bytes = 1; bytes < std::int64_t{1} << 33; bytes *= 7) {
          const Seconds t = c.collective(kind, Bytes{bytes}, first(n));
          EXPECT_GE(t, before) << n << " ranks, " << bytes << " B";
          // A GPU's NVLink and network card together.
          const auto wire = static_cast<double>(wire_count(kind, n, Bytes{bytes}).bytes.count);
          EXPECT_GE(t.count, wire / 500e9);
          before = t;
        }
        EXPECT_EQ(c.collective(kind, Bytes{0}, first(n)), Seconds{0});
      }
      EXPECT_EQ(c.collective(kind, 1_GiB, first(1)), Seconds{0});
    }
  }
}

TEST(MeasuredTime, TheExamplesOfThePage) {
  const auto us = [](double t) { return Seconds{t * 1e-6}; };
  KernelTable table;
  table["normalize forward layer"] = {{1, 0, 0, 0, 1, 4096, us(2), 0},
                                      {1, 0, 0, 0, 1, 16384, us(6), 0}};
  const auto normalize = [&](double bytes) {
    return measured_time(table, {"normalize forward layer", 0, 0, 0, 1, bytes}, 1)->count * 1e6;
  };
  EXPECT_NEAR(normalize(8192), 3.4641, 1e-4);
  EXPECT_NEAR(normalize(1024), 2, 1e-12);
  EXPECT_NEAR(normalize(65536), 24, 1e-9);
  table["linear forward"] = {{1, 64, 64, 64, 1, 0, us(10), 0},
                             {1, 256, 256, 256, 1, 0, us(420), 0}};
  const auto linear = [&](double n) {
    return measured_time(table, {"linear forward", n, n, n, 1, 0}, 1)->count * 1e6;
  };
  EXPECT_NEAR(linear(128), 64.8074, 1e-3);
  EXPECT_NEAR(linear(64), 10, 1e-4) << "a measured point is its own price";
  // docs/cost.md: of a GPU one point's line starts at the shortest kernel of all.
  KernelTable few;
  few["rotary forward"] = {{1, 0, 0, 0, 1, 8 << 20, Seconds{6e-6}, 0}};
  const auto rotary = [&](double bytes) {
    return measured_time(few, {"rotary forward", 0, 0, 0, 1, bytes}, 1, 132)->count * 1e6;
  };
  EXPECT_NEAR(rotary(16 << 20), 12, 1e-9) << "alone it is a rate";
  EXPECT_NEAR(rotary(4 << 20), 6, 1e-9);
  few["add"] = {{1, 0, 0, 0, 1, 64, Seconds{2e-6}, 0}};
  EXPECT_NEAR(rotary(4 << 20), 4, 1e-9);
  EXPECT_NEAR(rotary(16 << 20), 10, 1e-9);
  EXPECT_FALSE(measured_time(table, {"rotary forward", 0, 0, 0, 1, 100}, 1));
  few["scale"] = {{1, 0, 0, 0, 1, 8 << 20, Seconds{6e-6}, 0},
                  {1, 0, 0, 0, 1, 16 << 20, Seconds{10e-6}, 0}};
  const auto scale = [&](double bytes) {
    return measured_time(few, {"scale", 0, 0, 0, 1, bytes}, 1, 132)->count * 1e6;
  };
  for (const auto& [mib, time] : {std::pair{4, 4.0}, {12, 8.0}, {16, 10.0}, {32, 18.0}})
    EXPECT_NEAR(scale(mib << 20), time, 1e-9);
  // Two that lie side by side say nothing of what is far: 2 % there are 3 % here.
  few["scale"].push_back({1, 0, 0, 0, 1, (16 << 20) + 64, Seconds{10.2e-6}, 0});
  EXPECT_NEAR(scale(32 << 20), 18 * 1.0266, 0.01);
}

// docs/cost.md, "Measured": products of a GPU have a trend.
TEST(MeasuredTime, ProductsOfAGpuHaveATrend) {
  const auto law = [](double m, double n, double k) {
    return 4e-6 + 2 * m * n * k / 500e12 + 2 * (m * k + k * n + m * n) / 4e12;
  };
  KernelTable table;
  for (const auto& [m, n, k] : {std::array{512, 512, 512},
                                {1024, 1024, 1024},
                                {4096, 4096, 4096},
                                {8192, 1024, 1024},
                                {2048, 8192, 2048},
                                {2048, 2048, 8192},
                                {512, 4096, 1024},
                                {16384, 2048, 512}}) {
    const double a = m, b = n, c = k;
    table["linear forward bf16"].push_back({1, a, b, c, 1, 0, Seconds{law(a, b, c)}, 0});
  }
  const auto price = [&](const std::string& kernel, double m, double n, double k) {
    return measured_time(table, {kernel, m, n, k, 1, 0}, 1, 132)->count;
  };
  // By hand: 4 + 67.1 + 9.8 us. By FLOPs alone 2 % more, and of small ones half.
  EXPECT_NEAR(price("linear forward bf16", 2560, 2560, 2560) * 1e6, 80.94, 0.4);
  EXPECT_NEAR(price("linear forward bf16", 256, 256, 256) / law(256, 256, 256), 1, 0.03);
  EXPECT_NEAR(price("linear forward bf16", 32768, 8192, 8192) / law(32768, 8192, 8192), 1, 0.02);
  // With a bias, or of odd rows, where nothing of such was measured.
  for (const char* words : {"with bias ", "unaligned ", "with bias unaligned "})
    EXPECT_EQ(price(std::string("linear forward ") + words + "bf16", 2560, 2560, 2560),
              price("linear forward bf16", 2560, 2560, 2560));
  // Experts' kernel has two points, of twice the time of a layer's: its trend is the layer's.
  for (const double m : {512.0, 4096.0})
    table["grouped_product forward of rows bf16"].push_back(
        {1, m, 4096, 4096, 1, 0, Seconds{2 * law(m, 4096, 4096)}, 0});
  EXPECT_NEAR(
      price("grouped_product forward of rows bf16", 1500, 4096, 4096) / (2 * law(1500, 4096, 4096)),
      1, 0.02);
}

// docs/cost.md, "Measured": experts' products are launched one by one, with rows of a fair draw.
TEST(MeasuredTime, ExpertsRowsVary) {
  // Of 8 experts, drawn often: waves of tiles of 128 x 128 on 132 multiprocessors.
  std::mt19937 rng(5);
  const auto waves = [&](double rows, double columns) {
    std::poisson_distribution<int> draw(rows);
    double sum = 0;
    constexpr int kDraws = 4000;
    for (int i = 0; i < kDraws; ++i)
      sum += std::ceil(std::ceil(draw(rng) / 128.0) * std::ceil(columns / 128) / 132);
    return sum / kDraws;
  };
  const auto law = [&](double m, double n, double k) {
    return 8 * (2e-6 + waves(m, n) * k * 10e-9);
  };
  KernelTable table;
  for (const auto& [m, n, k] : {std::array{512, 8192, 3072},
                                {512, 3072, 8192},
                                {768, 12288, 5120},
                                {256, 2048, 1024},
                                {1536, 6144, 4096},
                                {640, 16384, 2048},
                                {900, 10240, 4096},
                                {2048, 4096, 2048}}) {
    const double a = m, b = n, c = k;
    table["grouped_product forward of rows bf16"].push_back(
        {1, a, b, c, 8, 0, Seconds{law(a, b, c)}, 0});
  }
  const auto price = [&](double m, double n, double k) {
    return measured_time(table, {"grouped_product forward of rows bf16", m, n, k, 8, 0}, 1, 132)
        ->count;
  };
  // By hand: 7.5 waves, of 1000 rows 7.28; were all experts' rows the same, 7.
  EXPECT_NEAR(waves(1024, 14336), 7.5, 0.02);
  EXPECT_NEAR(waves(1000, 14336), 7.28, 0.1);
  EXPECT_NEAR(price(1024, 14336, 4096) / (8 * (2e-6 + 7.5 * 4096 * 10e-9)), 1, 0.015);
  EXPECT_NEAR(price(1000, 14336, 4096) / (8 * (2e-6 + 7.28 * 4096 * 10e-9)), 1, 0.02);
}

TEST(MeasuredTime, TheNearestNumberOfRanksCounts) {
  KernelTable table;
  table["add"] = {{1, 0, 0, 0, 1, 100, Seconds{1}, 0}, {2, 0, 0, 0, 1, 100, Seconds{3}, 0}};
  EXPECT_EQ(measured_time(table, {"add", 0, 0, 0, 1, 100}, 1)->count, 1);
  EXPECT_EQ(measured_time(table, {"add", 0, 0, 0, 1, 100}, 2)->count, 3);
  EXPECT_EQ(measured_time(table, {"add", 0, 0, 0, 1, 100}, 8)->count, 3);
  CollectiveTable links;
  links["all_reduce"] = {{2, Bytes{64}, Seconds{1e-6}, 0}, {2, Bytes{1024}, Seconds{4e-6}, 0}};
  EXPECT_NEAR(measured_time(links, "all_reduce", 4, Bytes{256})->count, 2e-6, 1e-12);
}

// Measured times are of the links that they were measured on: slower ones take longer, faster ones
// do not, and what is not changed takes what was measured.
TEST(Cost, MeasuredCollectivesFollowTheirLinks) {
  for (const char* cluster : {"dgx-h100:1", "dgx-b200:1", "p5-48xlarge:2", "gcp-a3-mega:2"}) {
    const Topology built = load_topology(cluster);
    const auto ranks = first(static_cast<std::int64_t>(built.used_ranks()));
    for (const char* link :
         {"nodes[*].links[kind=nvlink].bandwidth", "nodes[*].vertices.nic[0-7].bandwidth"}) {
      if (ranks.size() == 8 && std::string(link).find("nic") != std::string::npos) continue;
      std::map<std::int64_t, double> before;
      for (const char* factor : {"x0.1", "x0.25", "x0.5", "x1", "x2"}) {
        Communication network(load_topology(cluster, {{{link, factor}}, {}}));
        Communication as_built(built);
        for (const std::int64_t bytes : {1LL << 12, 1LL << 20, 1LL << 25, 1LL << 30}) {
          SCOPED_TRACE(fmt::format("{} {} {} {}", cluster, link, factor, bytes));
          const auto time = [&](Communication& c) {
            return c.collective(CollectiveKind::all_reduce, Bytes{bytes}, ranks).count;
          };
          const double t = time(network);
          if (std::string(factor) == "x1") {
            EXPECT_NEAR(t, time(as_built), 1e-9 * t);
          }
          const auto [it, fresh] = before.emplace(bytes, t);
          if (!fresh) {
            EXPECT_LE(t, it->second * (1 + 1e-9));
          }
          it->second = t;
        }
      }
    }
  }
  // Where ranks are placed otherwise, it is their own group that was measured: every second one of
  // 16 lies on two nodes, as eight neighbours would on one.
  ClusterState placed;
  for (std::int32_t r = 0; r < 32; ++r) placed.placement.push_back(r % 2 * 16 + r / 2);
  const std::vector<std::int64_t> group{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const char* nic = "nodes[*].vertices.nic[0-7].bandwidth";
  Communication before(load_topology("gcp-a3-mega:4").in_state(placed));
  Communication same(load_topology("gcp-a3-mega:4", {{{nic, "x1"}}, {}}).in_state(placed));
  const auto time = [&](Communication& c) {
    return c.collective(CollectiveKind::all_reduce, 64_MiB, group).count;
  };
  EXPECT_NEAR(time(same), time(before), 1e-9 * time(before));
  // 32 MiB over NVLink of 45 GB/s are not there before 746 us.
  Communication slow(
      load_topology("dgx-h100:1", {{{"nodes[*].links[kind=nvlink].bandwidth", "x0.1"}}, {}}));
  EXPECT_GT(slow.collective(CollectiveKind::all_reduce, 32_MiB, first(8)).count, 746e-6);
}

// docs/cost.md, "Convolutions".
TEST(Kernels, ChannelsByThemselvesRunWithoutMatrixUnits) {
  const DeviceProfile a100 = load_topology("dgx-a100-80gb").profile(0);
  Product p;
  p.m = 128.0 * 112 * 112, p.n = 1, p.k = 9, p.count = 32;
  p.type = p.out = ElementType::bf16;
  p.bytes = Bytes{2 * 2 * 128 * 32 * 112 * 112};
  EXPECT_NEAR(p.flops().count, 0.925e9, 1e6);
  const KernelParts tiles = product_model(p, a100, a100.multiprocessors, 1);
  p.convolution = true;
  const KernelParts direct = product_model(p, a100, a100.multiprocessors, 1);
  EXPECT_NEAR(direct.units.count, 94.9e-6, 1e-7);
  EXPECT_EQ(direct.work, direct.memory);
  EXPECT_GT(tiles.work.count, 50 * direct.work.count);
  // Beside a transfer on fewer of them.
  EXPECT_NEAR(product_model(p, a100, a100.multiprocessors / 2, 1).units / direct.units, 2, 1e-9);
  // Groups of more channels are products, whose rows' starts are no cuBLAS batch's.
  p.n = 4, p.k = 36, p.count = 32;
  const KernelParts wide = product_model(p, a100, a100.multiprocessors, 1);
  p.convolution = false;
  EXPECT_LT(wide.units, product_model(p, a100, a100.multiprocessors, 1).units);
  p.n = 256, p.k = 2304, p.count = 2;
  const Seconds plain = product_model(p, a100, a100.multiprocessors, 1).units;
  p.convolution = true;
  EXPECT_EQ(plain, product_model(p, a100, a100.multiprocessors, 1).units);
}

}  // namespace
}  // namespace partita
