// The verifier accepts what the lowering emits, and says what is wrong with programs broken by
// hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>

#include "tests/simulator/networks.h"

namespace partita {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

/// Two stages with a tied table, two ranks of tensor and of data parallelism, sharded state.
Program good() {
  Plan plan = base_plan();
  plan.tp = 2;
  plan.pp = 2;
  plan.dp = 2;
  plan.zero = 1;
  plan.sequence_parallel = true;
  plan.global_batch = 4;
  return lowered(gpt(), plan);
}

struct Place {
  std::size_t block = 0, at = 0;
};
using Test = std::function<bool(const Instruction&)>;

Block& block_of(Program& p, BlockKind kind, int chunk) {
  for (Block& b : p.blocks) {
    if (b.kind == kind && (b.chunk == chunk || b.chunk < 0) && (b.chunk >= 0 || b.stage == chunk))
      return b;
  }
  throw InternalError("no such block");
}
/// First instruction of the block that satisfies `test`.
std::size_t find(const Block& b, const Test& test) {
  const auto it = std::find_if(b.instructions.begin(), b.instructions.end(), test);
  if (it == b.instructions.end()) throw InternalError("no such instruction in " + b.name);
  return static_cast<std::size_t>(it - b.instructions.begin());
}
Test kind_is(Kind k) {
  return [k](const Instruction& i) { return i.kind == k; };
}
Test collective_is(CollectiveKind k) {
  return [k](const Instruction& i) { return i.kind == Kind::collective && i.collective == k; };
}
void drop(Block& b, std::size_t at) {
  b.instructions.erase(b.instructions.begin() + static_cast<std::ptrdiff_t>(at));
}

void expect_rejected(const Program& p, const std::string& why) {
  EXPECT_THAT(verify(p), Contains(HasSubstr(why)));
}

TEST(Verifier, AcceptsWhatTheLoweringEmits) {
  std::mt19937 rng{20261125};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int feasible = 0;
  while (feasible < 120) {
    const Graph& g = graphs[rng() % graphs.size()];
    const auto plan = complete(g, random_plan(rng));
    if (!plan) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    ++feasible;
    ASSERT_THAT(verify(*program), IsEmpty()) << to_yaml(*plan);
  }
  Plan spatial = base_plan();
  spatial.strategy = "spatial";
  spatial.tp = spatial.dp = 2;
  EXPECT_THAT(verify(lowered(cnn(true), spatial)), IsEmpty());
  EXPECT_THAT(verify(good()), IsEmpty());
}

TEST(Verifier, AReceiveIsMissing) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 1);
  const std::size_t at = find(b, kind_is(Kind::receive));
  const std::string what = p.buffer(b.instructions[at].writes[0]).name;
  drop(b, at);
  expect_rejected(p, what + " is sent from stage 0 and never received");
  expect_rejected(p, "reads " + what + " before it is written");
}

TEST(Verifier, ASendIsMissing) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  drop(b, find(b, kind_is(Kind::send)));
  expect_rejected(p, "stage 1 waits forever for a receive of layers.1.mlp.residual");
}

TEST(Verifier, AMessageGoesToTheWrongStage) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  b.instructions[find(b, kind_is(Kind::send))].stage = 0;
  expect_rejected(p, "waits forever for a receive");
}

TEST(Verifier, AStageDoesNotExist) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  b.instructions[find(b, kind_is(Kind::send))].stage = 2;
  expect_rejected(p, "stage 2 does not exist");
}

TEST(Verifier, WhatIsReceivedHasAnotherLayout) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 1);
  const BufferId id = b.instructions[find(b, kind_is(Kind::receive))].writes[0];
  p.buffers[id.index()].layout.root = bit(2);  // held by the first rank of its group only
  expect_rejected(p, "receives layers.1.mlp.residual as another layout than it was sent");
}

TEST(Verifier, StagesWaitForEachOther) {
  Program p = good();
  // Stage 0 wants micro-batch 0's gradient before it sends micro-batch 1; stage 1 wants both first.
  auto& first = p.stages[0];
  auto& second = p.stages[1];
  ASSERT_EQ(first.size(), 6u);          // start F0 F1 B0 B1 step
  ASSERT_EQ(second[2].micro_batch, 0);  // start F0 B0 F1 B1 step
  std::swap(first[2], first[3]);
  std::swap(second[2], second[3]);
  expect_rejected(p, "stage 0 waits forever for a receive of layers.1.mlp.residual.grad");
  expect_rejected(p, "stage 1 waits forever for a receive of layers.1.mlp.residual");
}

TEST(Verifier, ABackwardComesBeforeItsForward) {
  Program p = good();
  std::swap(p.stages[1][1], p.stages[1][2]);
  expect_rejected(p, "before it is written");
}

TEST(Verifier, ABlockRunsOnAnotherStage) {
  Program p = good();
  std::swap(p.stages[0][1], p.stages[1][1]);
  expect_rejected(p, "is called on stage 0");
  expect_rejected(p, "before it is written");
}

TEST(Verifier, ACallNamesNoBlockOrMicroBatch) {
  Program p = good();
  p.stages[0][1].block = BlockId{p.blocks.size()};
  expect_rejected(p, fmt::format("stage 0 calls block {} for micro-batch 0", p.blocks.size()));
  p = good();
  p.stages[0][1].micro_batch = 2;
  expect_rejected(p, "for micro-batch 2");
}

TEST(Verifier, ABufferIsReadAfterItIsFreed) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, kind_is(Kind::free));
  const std::string what = p.buffer(b.instructions[at].reads[0]).name;
  std::swap(b.instructions[at], b.instructions[at - 1]);
  expect_rejected(p, "reads " + what + " which is not there");
}

TEST(Verifier, ABufferIsFreedTwice) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const Instruction i = b.instructions[find(b, kind_is(Kind::free))];
  b.instructions.push_back(i);
  expect_rejected(p, "frees " + p.buffer(i.reads[0]).name + " which is not there");
}

TEST(Verifier, ABufferIsNeverFreed) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, kind_is(Kind::free));
  const std::string what = p.buffer(b.instructions[at].reads[0]).name;
  drop(b, at);
  expect_rejected(p, "stage 0: " + what + " is never freed");
}

TEST(Verifier, ABufferIsAllocatedTwice) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, kind_is(Kind::allocate));
  const Instruction i = b.instructions[at];
  b.instructions.insert(b.instructions.begin(), i);
  expect_rejected(p, "allocates " + p.buffer(i.writes[0]).name + " twice");
}

TEST(Verifier, ABufferIsWrittenBeforeItIsAllocated) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, kind_is(Kind::allocate));
  const std::string what = p.buffer(b.instructions[at].writes[0]).name;
  std::swap(b.instructions[at], b.instructions[at + 1]);
  expect_rejected(p, "writes " + what + " which is not there");
}

TEST(Verifier, ASumIsNeverPaid) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, collective_is(CollectiveKind::reduce_scatter));
  const std::string what = p.buffer(b.instructions[at].writes[0]).name;
  drop(b, at);
  expect_rejected(p, "reads " + what + " before it is written");
}

TEST(Verifier, AKernelReadsTheSummandInsteadOfTheSum) {
  Plan plan = base_plan();
  plan.tp = 2;
  Program p = lowered(gpt(), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, collective_is(CollectiveKind::all_reduce));
  const BufferId owed = b.instructions[at].reads[0], paid = b.instructions[at].writes[0];
  drop(b, at);
  for (Instruction& i : b.instructions) std::replace(i.reads.begin(), i.reads.end(), paid, owed);
  expect_rejected(p, "reads embedding, a sum that is still owed");
}

/// Each rank would add the whole, and the sum of them have it as often as there are ranks.
TEST(Verifier, ASumOfSumsHasASummandThatOwesNothing) {
  Plan plan = base_plan();
  plan.tp = 2;
  TransformerConfig c = small_config();
  c.residual = Residual::parallel;
  Program p = lowered(build_transformer(c), plan);
  ASSERT_THAT(verify(p), IsEmpty());
  Block& b = block_of(p, BlockKind::forward, 0);
  Instruction& sum = b.instructions[find(b, [&](const Instruction& i) {
    return i.op >= 0 && p.operators[static_cast<std::size_t>(i.op)].name == "layers.0.branches";
  })];
  const std::size_t whole = find(b, collective_is(CollectiveKind::all_reduce));
  Program other = p;
  sum.reads[0] = b.instructions[whole].writes[0];
  expect_rejected(p, "adds embedding, which does not owe what the sum owes");
  other.buffers[sum.writes[0].index()].layout.partial = 0;
  expect_rejected(other, "reads layers.0.attention.output, a sum that is still owed");
}

TEST(Verifier, ASummandIsReadAfterItsSumTookItsPlace) {
  Plan plan = base_plan();
  plan.tp = 2;
  Program p = lowered(gpt(), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, collective_is(CollectiveKind::all_reduce));
  const BufferId summand = b.instructions[at].reads[0];
  Instruction again;
  again.kind = Kind::compute;
  again.kernel = Kernel::add;
  again.reads = {summand};
  again.writes = {b.instructions[at].writes[0]};
  b.instructions.insert(b.instructions.begin() + static_cast<std::ptrdiff_t>(at) + 1, again);
  expect_rejected(p, "reads " + p.buffer(summand).name + ", which " + p.buffer(summand).name +
                         " has overwritten in place");
}

TEST(Verifier, TheOptimizerReadsAGradientThatIsStillOwed) {
  Plan plan = base_plan();
  plan.dp = 2;
  Program p = lowered(gpt(), plan);
  Block& b = block_of(p, BlockKind::step, 0);
  for (Instruction& i : b.instructions) {
    if (i.kind == Kind::compute && i.kernel == Kernel::optimizer)
      i.reads[0] = p.memory_of(i.reads[0]);  // the gradient as computed
  }
  expect_rejected(p,
                  "updates embedding.weight from embedding.weight.grad, a sum that is still owed");
}

TEST(Verifier, AnOperandIsCutAlongAnotherDimension) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  const std::size_t at = find(b, [&](const Instruction& i) {
    return i.kind == Kind::compute && i.op >= 0 && !i.parameters.empty() &&
           p.operators[static_cast<std::size_t>(i.op)].name == "layers.0.mlp.up";
  });
  auto& dims = p.buffers[b.instructions[at].parameters[0].index()].layout.dims;
  std::swap(dims[0], dims[1]);
  expect_rejected(p, "which is not how layers.0.mlp.up is cut");
}

TEST(Verifier, AnAllGatherRunsOverTheWrongRanks) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::all_gather))];
  i.atoms = mask_of(p.pipeline) == bit(0) ? bit(1) : bit(0);  // data instead of tensor parallel
  expect_rejected(p, "must undo exactly the cuts of its group");
}

TEST(Verifier, AReductionRunsOverTheWrongRanks) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::reduce_scatter))];
  i.atoms = bit(1);
  expect_rejected(p, "must pay exactly what is owed");
}

TEST(Verifier, AnAllReduceAlsoMovesCuts) {
  Plan plan = base_plan();
  plan.tp = 2;
  Program p = lowered(gpt(), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::all_reduce))];
  p.buffers[i.writes[0].index()].layout.dims[1].atoms = {0};
  expect_rejected(p, "must keep the cuts");
}

TEST(Verifier, AnAllToAllLeavesTheCutsWhereTheyWere) {
  Plan plan = base_plan();
  plan.dp = plan.ep = 2;
  Program p = lowered(mixtral(), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::all_to_all))];
  p.buffers[i.writes[0].index()].layout.dims[2].atoms.clear();
  expect_rejected(p, "must move cuts");
}

TEST(Verifier, AHaloExchangeChangesTheCuts) {
  Plan plan = base_plan();
  plan.strategy = "spatial";
  plan.tp = 2;
  Program p = lowered(cnn(true), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::halo_exchange))];
  p.buffers[i.writes[0].index()].layout.dims[2] = {};
  expect_rejected(p, "must keep the cuts");
}

TEST(Verifier, ARingSkipsARank) {
  Plan plan = base_plan();
  plan.cp = 4;
  plan.context = Plan::ContextExchange::ring;
  Program p = lowered(llama(), plan);
  Block& b = block_of(p, BlockKind::forward, 0);
  const Instruction& i = b.instructions[find(b, collective_is(CollectiveKind::shift))];
  p.buffers[i.writes[0].index()].layout.dims[1].shift += 1;
  expect_rejected(p, "must pass every part to the next rank");
}

TEST(Verifier, ACollectiveWithARootForgetsIt) {
  Plan plan = base_plan();
  plan.strategy = "dataparallel";
  plan.dp = 2;
  EXPECT_THAT(verify(lowered(llama(), plan)), IsEmpty());
  const std::pair<CollectiveKind, const char*> cases[] = {
      {CollectiveKind::broadcast, "must give all what the first has"},
      {CollectiveKind::reduce, "must pay to the first what is owed"},
      {CollectiveKind::scatter, "must give each its cut of what the first has"},
      {CollectiveKind::gather, "must bring all cuts to the first"}};
  for (const auto& [kind, why] : cases) {
    Program p = lowered(llama(), plan);
    for (const Block& b : p.blocks) {
      for (const Instruction& i : b.instructions) {
        if (!collective_is(kind)(i)) continue;
        p.buffers[i.reads[0].index()].layout.root = 0;
        p.buffers[i.writes[0].index()].layout.root = 0;
      }
    }
    expect_rejected(p, why);
  }
}

TEST(Verifier, ACollectiveHasOneRank) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  b.instructions[find(b, kind_is(Kind::collective))].atoms = 0;
  expect_rejected(p, "a collective over one rank");
}

TEST(Verifier, ACollectiveSpansStages) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  Instruction& i = b.instructions[find(b, kind_is(Kind::collective))];
  i.atoms = static_cast<AtomMask>(i.atoms | mask_of(p.pipeline));
  expect_rejected(p, "a collective across stages");
}

TEST(Verifier, ACollectiveHasMoreResultsThanSources) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  Instruction& i = b.instructions[find(b, kind_is(Kind::collective))];
  i.writes.push_back(i.writes[0]);
  expect_rejected(p, "a collective needs as many sources as results");
}

TEST(Verifier, ATieMissesAStage) {
  Program p = good();
  ASSERT_EQ(p.ties.size(), 1u);
  p.ties[0] = {0};
  expect_rejected(p, "stage 1 reduces a tied parameter of other stages");
}

TEST(Verifier, AStageDoesNotComeToItsTie) {
  Program p = good();
  Block& b = block_of(p, BlockKind::step, 1);
  const std::size_t at = find(b, [](const Instruction& i) { return i.tie >= 0; });
  const BufferId paid = b.instructions[at].writes[0], owed = b.instructions[at].reads[0];
  drop(b, at);
  for (Instruction& i : b.instructions) std::replace(i.reads.begin(), i.reads.end(), paid, owed);
  expect_rejected(p, "stage 0 waits forever for a collective of embedding.weight");
}

TEST(Verifier, ATieChangesTheLayout) {
  Program p = good();
  Block& b = block_of(p, BlockKind::step, 1);
  const Instruction& i = b.instructions[find(b, [](const Instruction& x) { return x.tie >= 0; })];
  p.buffers[i.writes[0].index()].layout.flat.clear();
  expect_rejected(p, "over tied stages must keep the layout");
}

TEST(Verifier, ASliceGathers) {
  Plan plan = base_plan();
  plan.tp = 2;
  plan.dp = 2;
  plan.zero = 1;
  Program p = lowered(gpt(), plan);
  Block& b = block_of(p, BlockKind::step, 0);
  Instruction& i = b.instructions[find(b, kind_is(Kind::slice))];
  std::swap(i.reads, i.writes);
  expect_rejected(p, "a slice can only cut");
}

TEST(Verifier, IdsAreOutOfRange) {
  const auto broken = [](const std::function<void(Program&, Instruction&)>& change) {
    Program p = good();
    Block& b = block_of(p, BlockKind::forward, 0);
    change(p, b.instructions[find(b, kind_is(Kind::compute))]);
    return p;
  };
  const char* why = "an id is out of range";
  expect_rejected(
      broken([](Program& p, Instruction& i) { i.reads[0] = BufferId{p.buffers.size()}; }), why);
  expect_rejected(broken([](Program& p, Instruction& i) {
                    i.op = static_cast<std::int32_t>(p.operators.size());
                  }),
                  why);
  expect_rejected(broken([](Program&, Instruction& i) { i.op = -1; }), why);
  expect_rejected(
      broken([](Program& p, Instruction& i) { i.stream = static_cast<Stream>(p.streams.size()); }),
      why);
  expect_rejected(broken([](Program&, Instruction& i) { i.tie = 7; }), why);
}

TEST(Verifier, AKernelLacksAParameter) {
  Program p = good();
  Block& b = block_of(p, BlockKind::forward, 0);
  for (Instruction& i : b.instructions) {
    if (i.kind == Kind::compute && !i.parameters.empty()) i.parameters.pop_back();
  }
  expect_rejected(p, "lacks parameter 0");
}

TEST(Verifier, ABufferHasNotOneCutPerDimensionOrLivesNowhere) {
  Program p = good();
  p.buffers[0].layout.dims.pop_back();
  expect_rejected(p, "1 cuts for 2 dimensions");
  p = good();
  p.buffers[0].alias = static_cast<std::int32_t>(p.buffers.size());
  expect_rejected(p, "lives nowhere");
}

}  // namespace
}  // namespace partita
