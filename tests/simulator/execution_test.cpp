// Every row of the design's table of partitionings: small networks run under the reference
// interpreter and give the serial network's loss, gradients and parameters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita {
namespace {

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

TEST(Execution, RingAttention) {
  Plan p = base_plan();
  p.context = Plan::ContextExchange::ring;
  for (const int cp : {2, 4}) {
    p.cp = cp;
    expect_good(gpt(), p);
    expect_good(llama(), p);
  }
  p.cp = 2;
  p.tp = 2;
  p.sequence_parallel = true;
  expect_good(llama(), p);
  set_recompute(p, "full", "");
  p.dp = 2;
  p.zero = 3;
  expect_good(llama(), p);
  TransformerConfig c = small_config();
  c.causal = false;
  p = base_plan();
  p.context = Plan::ContextExchange::ring;
  p.cp = 2;
  expect_good(build_transformer(c), p);
  c.causal = true;
  c.window = 3;
  expect_good(build_transformer(c), p);
}

TEST(Execution, OtherArchitectures) {
  TransformerConfig latent = small_config();
  latent.kv_heads = 0;
  latent.positions = 0;
  latent.tied = false;
  latent.norm = TransformerConfig::Norm::rms;
  latent.qkv_bias = latent.attention_output_bias = latent.mlp_bias = false;
  latent.latent = {6, 4, 2, 2, 2};
  latent.rotary_dim = 2;
  TransformerConfig query_norm = latent;
  query_norm.latent = {};
  query_norm.kv_heads = 2;
  query_norm.qk_norm = true;
  TransformerConfig bert = small_config();
  bert.head = TransformerConfig::Head::masked_language_model;
  bert.norm_after = true;
  bert.causal = false;
  bert.token_types = 2;
  bert.embedding_norm = true;
  TransformerConfig experts = query_norm;
  experts.qk_norm = false;
  experts.layers = 2;
  experts.moe.experts = 4;
  experts.moe.ffn = 8;
  experts.moe.shared_ffn = 8;
  experts.moe.first_dense = 1;
  experts.moe.sigmoid = true;
  for (const TransformerConfig& c : {latent, query_norm, bert, experts}) {
    SCOPED_TRACE(::testing::Message()
                 << c.latent.key_value_rank << c.qk_norm << c.norm_after << c.moe.experts);
    const Graph g = build_transformer(c);
    Plan p = base_plan();
    p.tp = 2;
    p.dp = 2;
    expect_good(g, p);
    p.sequence_parallel = true;
    p.pp = 2;
    p.global_batch = 4;
    p.zero = 1;
    expect_good(g, p);
    p.tp = 1;
    p.sequence_parallel = false;
    p.cp = 2;
    p.zero = 3;
    set_recompute(p, "full", "");
    expect_good(g, p);
  }
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

TEST(Execution, DataParallelFromOneRank) {
  Plan p = base_plan();
  p.strategy = "dataparallel";
  p.dp = 3;
  expect_good(gpt(), p);
  p.dp = 2;
  p.global_batch = 8;
  p.micro_batch = 2;
  expect_good(llama(), p);
  expect_good(cnn(false), p, 2);
}

TEST(Execution, ParametersKeptFromForwardToBackward) {
  Plan p = base_plan();
  p.zero = 3;
  p.dp = 2;
  p.global_batch = 4;
  p.reshard_after_forward = false;
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
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int feasible = 0;
  for (int i = 0; i < 120; ++i) {
    const std::size_t which = rng() % graphs.size();
    const Plan p = random_plan(rng);
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
