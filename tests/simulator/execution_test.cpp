// Every row of the design's table of partitionings: small networks run under the reference
// interpreter and give the serial network's loss, gradients and parameters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "models/models.h"
#include "tests/simulator/reference_check.h"

namespace partita {
namespace {

Plan base_plan() {
  Plan p;
  set_framework(p, "partita", "");
  p.optimizer.kind = OptimizerKind::sgd;
  p.bucket = Bytes{256};  // small enough that there are several
  return p;
}

TransformerConfig small_config() {
  TransformerConfig c;
  c.name = "small";
  c.layers = 4;
  c.hidden = 8;
  c.heads = 4;
  c.kv_heads = 4;
  c.ffn = 16;
  c.vocabulary = 12;
  c.sequence = 8;
  c.norm = TransformerConfig::Norm::layer;
  c.positions = 8;
  c.activation = ActivationKind::gelu;
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.tied = true;
  c.initial_deviation = 0.3;
  return c;
}
Graph gpt() { return build_transformer(small_config()); }
Graph llama() {
  TransformerConfig c = small_config();
  c.kv_heads = 2;
  c.norm = TransformerConfig::Norm::rms;
  c.positions = 0;
  c.rotary_dim = 2;
  c.activation = ActivationKind::silu;
  c.gated = true;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = false;
  c.tied = false;
  return build_transformer(c);
}
Graph mixtral() {
  TransformerConfig c = small_config();
  c.layers = 2;
  c.kv_heads = 2;
  c.norm = TransformerConfig::Norm::rms;
  c.positions = 0;
  c.rotary_dim = 2;
  c.gated = true;
  c.activation = ActivationKind::silu;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = false;
  c.tied = false;
  c.moe.experts = 4;
  c.moe.top_k = 2;
  c.moe.ffn = 8;
  return build_transformer(c);
}
Graph cnn(bool synchronised) {
  GraphBuilder b("cnn");
  TensorId x =
      b.input("image", {{Dim::sample, 1}, {Dim::feature, 3}, {Dim::height, 9}, {Dim::width, 8}});
  const TensorId labels = b.input("labels", {{Dim::sample, 1}});
  const auto conv = [&](const char* name, std::int64_t out, Window w) {
    Convolution c;
    c.out = out;
    c.height = c.width = w;
    return b.add(name, c, {x});
  };
  x = conv("conv1", 4, {3, 1, 1, 1, 1});
  Normalize n;
  n.kind = Normalize::Kind::batch;
  n.synchronised = synchronised;
  x = b.add("norm1", n, {x});
  x = b.add("relu1", Activation{ActivationKind::relu}, {x});
  const TensorId skip = x;
  x = conv("conv2", 4, {3, 1, 1, 1, 1});
  x = b.add("residual", Add{}, {x, skip});
  x = conv("conv3", 6, {3, 2, 1, 1, 1});
  Pool p;
  p.maximum = true;
  p.height = p.width = {2, 2, 0, 0, 1};
  x = b.add("pool", p, {x});
  x = b.add("average", GlobalAveragePool{}, {x});
  Linear head;
  head.out = {{Dim::vocabulary, 5}};
  x = b.add("head", head, {x});
  x = b.add("loss", CrossEntropy{}, {x, labels});
  return b.finish(x, 0, 0);
}

void expect_good(const Graph& g, const Plan& p, int groups = 1) {
  const auto r = expect_equals_reference(g, p, groups);
  EXPECT_TRUE(r.feasible) << r.reason;
}

TEST(Execution, OneRank) {
  expect_good(gpt(), base_plan());
  expect_good(llama(), base_plan());
  expect_good(mixtral(), base_plan());
  expect_good(cnn(false), base_plan());
}

TEST(Execution, GradientAccumulation) {
  Plan p = base_plan();
  p.global_batch = 6;
  p.micro_batch = 2;
  expect_good(gpt(), p);
}

TEST(Execution, DataParallelBuckets) {
  Plan p = base_plan();
  p.dp = 3;
  p.global_batch = 6;
  expect_good(gpt(), p);
  p.overlap_gradients = false;
  expect_good(llama(), p);
}

TEST(Execution, DataParallelLocalAndSynchronisedBatchNorm) {
  Plan p = base_plan();
  p.dp = 2;
  p.micro_batch = 2;
  expect_good(cnn(false), p, 2);
  expect_good(cnn(true), p, 1);
}

TEST(Execution, TensorParallel) {
  Plan p = base_plan();
  p.tp = 2;
  expect_good(gpt(), p);
  expect_good(llama(), p);
  p.tp = 4;
  expect_good(gpt(), p);
}

TEST(Execution, SequenceParallel) {
  Plan p = base_plan();
  p.tp = 2;
  p.dp = 2;
  p.sequence_parallel = true;
  expect_good(gpt(), p);
  expect_good(llama(), p);
  p.save_gathered = true;
  expect_good(llama(), p);
}

TEST(Execution, ContextParallel) {
  Plan p = base_plan();
  p.cp = 2;
  expect_good(gpt(), p);
  expect_good(llama(), p);
  p.tp = 2;
  p.sequence_parallel = true;
  expect_good(llama(), p);
  p.tp = 1;
  p.context = Plan::ContextExchange::all_to_all;
  expect_good(llama(), p);
  expect_good(gpt(), p);
}

TEST(Execution, ExpertParallel) {
  Plan p = base_plan();
  p.dp = 4;
  p.ep = 2;
  expect_good(mixtral(), p);
  p.ep = 4;
  expect_good(mixtral(), p);
  p.dp = 2;
  p.tp = 2;
  p.ep = 2;
  expect_good(mixtral(), p);
  p.sequence_parallel = true;
  expect_good(mixtral(), p);
  p.etp = 1;
  p.ep = 4;
  expect_good(mixtral(), p);
  p.zero = 1;
  expect_good(mixtral(), p);
  p.zero = 3;
  expect_good(mixtral(), p);
}

TEST(Execution, ShardedState) {
  for (const int zero : {1, 2, 3}) {
    SCOPED_TRACE(zero);
    Plan p = base_plan();
    p.zero = zero;
    p.dp = 3;
    p.global_batch = 6;
    expect_good(gpt(), p);
    p.dp = 2;
    p.tp = 2;
    p.global_batch = 4;
    p.sequence_parallel = true;
    expect_good(llama(), p);
    p.dp = 4;
    p.tp = 1;
    p.zero_group = 2;
    expect_good(llama(), p);
    p.zero_group = 0;
    p.pp = 2;
    p.dp = 2;
    p.global_batch = 8;
    expect_good(gpt(), p);
  }
}

TEST(Execution, Pipelines) {
  for (const Schedule s : {Schedule::naive, Schedule::gpipe, Schedule::one_f_one_b}) {
    SCOPED_TRACE(std::string(name(s)));
    Plan p = base_plan();
    p.schedule = s;
    p.pp = 2;
    p.global_batch = 4;
    expect_good(gpt(), p);
    p.pp = 4;
    expect_good(llama(), p);
    p.cuts = {2, 1, 1, 0};
    expect_good(gpt(), p);
  }
}

TEST(Execution, InterleavedPipeline) {
  Plan p = base_plan();
  p.pp = 2;
  p.virtual_stages = 2;
  p.global_batch = 4;
  expect_good(gpt(), p);
  p.tp = 2;
  p.dp = 2;
  p.global_batch = 8;
  p.sequence_parallel = true;
  expect_good(llama(), p);
}

TEST(Execution, TiedEmbeddingsAcrossStages) {
  Plan p = base_plan();
  p.pp = 2;
  p.tp = 2;
  p.dp = 2;
  p.global_batch = 4;
  for (const int zero : {0, 1, 2, 3}) {
    p.zero = zero;
    expect_good(gpt(), p);
  }
}

TEST(Execution, Recomputation) {
  for (const char* set : {"full", "selective", "first:1", "*.mlp.activation,*.attention_norm"}) {
    SCOPED_TRACE(set);
    Plan p = base_plan();
    set_recompute(p, set, "");
    expect_good(gpt(), p);
    p.tp = 2;
    p.pp = 2;
    p.global_batch = 2;
    p.sequence_parallel = true;
    expect_good(llama(), p);
    p.zero = 3;
    p.dp = 2;
    p.global_batch = 4;
    expect_good(llama(), p);
  }
}

TEST(Execution, SpatialWithHalos) {
  Plan p = base_plan();
  p.strategy = "spatial";
  p.tp = 2;
  p.micro_batch = 2;
  expect_good(cnn(false), p);
  p.dp = 2;
  expect_good(cnn(true), p);
  p.tp = 3;
  EXPECT_THAT(expect_equals_reference(cnn(true), p).reason,
              ::testing::HasSubstr("2 height of pool; use 1 or 2"));
}

TEST(Execution, ChannelsOfAConvolution) {
  Plan p = base_plan();
  ShardingRule filter{"conv1", Dim::feature, "tp", false, false};
  ShardingRule channel{"conv2", Dim::reduction, "tp", false, false};
  p.user_rules = {filter, channel};
  p.tp = 2;
  expect_good(cnn(true), p);
}

TEST(Execution, PerOperatorSharding) {
  Plan p = base_plan();
  p.tp = 2;
  p.user_rules = {{"layers.0.mlp.up", Dim::sequence, "tp", false, false},
                  {"layers.1.attention.core", Dim::sequence, "tp", false, false},
                  {"layers.2.mlp.down", Dim::feature, "tp", false, false},
                  {"layers.3.*", Dim::sample, "tp", false, false}};
  p.micro_batch = 2;
  expect_good(gpt(), p);
}

TEST(Execution, IndependentReplicas) {
  Plan p = base_plan();
  p.strategy = "replicas";
  p.dp = 3;
  expect_good(gpt(), p);
}

TEST(Execution, FrozenLayersAndAdapters) {
  Plan p = base_plan();
  p.tp = 2;
  p.dp = 2;
  Graph g = llama();
  freeze(g, {"embedding*", "layers.0.*", "layers.1.*"});
  expect_good(g, p);
  Graph l = llama();
  add_lora(l, {"*attention.query", "*mlp.down"}, 2);
  expect_good(l, p);
  p.zero = 3;
  expect_good(l, p);
}

TEST(Execution, Dropout) {
  TransformerConfig c = small_config();
  c.dropout = 0.3;
  const Graph g = build_transformer(c);
  Plan p = base_plan();
  p.tp = 2;
  p.dp = 2;
  p.pp = 2;
  p.global_batch = 4;
  p.sequence_parallel = true;
  set_recompute(p, "full", "");
  expect_good(g, p);
}

TEST(Execution, Adam) {
  Plan p = base_plan();
  p.optimizer.kind = OptimizerKind::adam;
  p.optimizer.learning_rate = 1e-3;
  p.optimizer.weight_decay = 0.1;
  p.zero = 1;
  p.dp = 2;
  expect_good(llama(), p);
}

TEST(Execution, MixedPrecisionChangesTypesNotMathematics) {
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.dp = 2;
  expect_good(llama(), p);
}

/// Random plans over random axes: whatever is feasible equals the reference.
TEST(Execution, RandomPlans) {
  std::mt19937 rng{20261123};
  const auto pick = [&](std::vector<int> from) { return from[rng() % from.size()]; };
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int feasible = 0;
  for (int i = 0; i < 120; ++i) {
    const std::size_t which = rng() % graphs.size();
    Plan p = base_plan();
    p.tp = pick({1, 1, 2, 4});
    p.pp = pick({1, 1, 2, 4});
    p.cp = pick({1, 1, 2});
    p.dp = pick({1, 2, 3});
    p.ep = pick({1, 1, 2, 4});
    p.etp = pick({0, 1});
    p.virtual_stages = pick({1, 1, 2});
    p.micro_batch = pick({1, 2});
    p.global_batch = p.micro_batch * p.dp * pick({1, 2, 4});
    p.sequence_parallel = pick({0, 1}) == 1;
    p.save_gathered = pick({0, 1}) == 1;
    p.overlap_gradients = pick({0, 1}) == 1;
    p.zero = pick({0, 1, 2, 3});
    p.context =
        pick({0, 1}) == 1 ? Plan::ContextExchange::all_to_all : Plan::ContextExchange::all_gather;
    p.schedule = static_cast<Schedule>(pick({0, 1, 2}));
    p.schedule_given = p.virtual_stages == 1;
    const std::vector<const char*> sets{"none", "none", "full", "selective", "first:1", "*.mlp.*"};
    set_recompute(p, sets[rng() % sets.size()], "");
    if (p.ranks() > 24) continue;
    SCOPED_TRACE(::testing::Message()
                 << "case " << i << ": " << graphs[which].name << " " << which << "\n"
                 << to_yaml(p) << "etp: " << p.etp);
    feasible += expect_equals_reference(graphs[which], p).feasible ? 1 : 0;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 25);
}

}  // namespace
}  // namespace partita
