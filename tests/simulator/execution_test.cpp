// Every row of the design's table of partitionings: small networks run under the reference
// interpreter and give the serial network's loss, gradients and parameters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "runtime/reference/serial.h"
#include "simulator/lower/startup.h"
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
  p.recompute = parse_recompute("full", "");
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
  bert.norm_position = NormPosition::after;
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
  TransformerConfig masked = bert;
  masked.predicted = 3;
  // Its head has no sequence that context parallel ranks could share.
  for (const int zero : {0, 3}) {
    Plan p = base_plan();
    p.tp = p.dp = p.pp = 2;
    p.zero = zero;
    expect_good(build_transformer(masked), p);
  }
  Plan shared = base_plan();
  shared.cp = shared.dp = 2;
  masked.tied = false;
  expect_good(build_transformer(masked), shared);
  shared.zero = 1;
  EXPECT_NE(complete(build_transformer(masked), shared).reason().find("use cp 1 or zero 0"),
            std::string::npos);
  TransformerConfig classes = bert;
  classes.head = TransformerConfig::Head::token_classifier;
  classes.tied = false;
  TransformerConfig generated = bert, drawn = bert;
  generated.head = drawn.head = TransformerConfig::Head::replaced_tokens;
  generated.generator = {8, 2, 12, 0};
  drawn.generator = {8, 2, 12, 3};
  for (const int zero : {0, 3}) {
    Plan p = base_plan();
    p.tp = p.dp = p.pp = 2;
    p.zero = zero;
    expect_good(build_transformer(drawn), p);
  }
  TransformerConfig recurrent = small_config();
  recurrent.causal = recurrent.tied = false;
  recurrent.embedding_rows = recurrent.vocabulary + 5;
  recurrent.memory = 4;
  TransformerConfig beside = small_config(), one_norm = query_norm, masks = small_config();
  beside.residual = masks.residual = Residual::parallel;
  beside.head_bias = true;
  beside.norm_bias = false;
  one_norm.residual = Residual::parallel_one_norm;
  masks.dropout = 0.25;
  TransformerConfig beside_experts = experts;
  beside_experts.residual = Residual::parallel_one_norm;
  for (const TransformerConfig& c : {latent, query_norm, bert, experts, classes, generated,
                                     recurrent, beside, one_norm, masks, beside_experts}) {
    SCOPED_TRACE(::testing::Message()
                 << c.latent.key_value_rank << c.qk_norm << static_cast<int>(c.norm_position)
                 << c.moe.experts << static_cast<int>(c.residual) << c.dropout);
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
    p.recompute = parse_recompute("full", "");
    expect_good(g, p);
  }
}

TEST(Execution, PeriodicAveraging) {
  // Two steps: averaged after each, after the second, never.
  for (const int every : {1, 2, 3}) {
    Plan p = base_plan();
    p.strategy = "replicas";
    p.average_every = every;
    p.dp = 3;
    expect_good(gpt(), p);
    p.pp = 2;
    p.global_batch = 6;
    p.optimizer.momentum = 0.5;
    expect_good(llama(), p);
  }
  Plan p = base_plan();
  p.average_every = 2;
  p.dp = 2;
  EXPECT_THAT(expect_equals_reference(gpt(), p).reason,
              ::testing::HasSubstr("is for strategy replicas"));
}

TEST(Execution, ClippedGradients) {
  for (const double norm : {1e-3, 1e6}) {  // always and never
    Plan p = base_plan();
    p.optimizer.clip = norm;
    expect_good(gpt(), p);
    p.tp = 2;
    p.dp = 2;
    expect_good(llama(), p);
    p.zero = 1;
    p.pp = 2;  // gpt's tied embedding counts once
    p.global_batch = 4;
    expect_good(gpt(), p);
    p.zero = 3;
    p.sequence_parallel = true;
    expect_good(gpt(), p);
    Plan q = base_plan();
    q.optimizer.clip = norm;
    q.ep = 2;
    q.dp = 4;
    q.zero = 2;
    expect_good(mixtral(), q);
  }
}

TEST(Execution, BatchesFromALoadersRole) {
  Plan p = base_plan();
  p.loader = true;
  expect_good(gpt(), p);
  p.dp = 2;
  p.tp = 2;
  p.global_batch = 4;
  expect_good(llama(), p);
  p.cp = 2;
  p.pp = 2;
  p.sequence_parallel = true;
  expect_good(llama(), p);
  p.zero = 3;
  p.recompute = parse_recompute("full", "");
  expect_good(gpt(), p);
  Plan q = base_plan();
  q.loader = true;
  q.strategy = "replicas";
  q.dp = 3;
  expect_good(gpt(), q);
  q.strategy = "dataparallel";
  expect_good(gpt(), q);
  q.strategy = "spatial";
  q.dp = 2;
  q.tp = 2;
  expect_good(cnn(true), q);
  // One loader for each data-parallel rank, after the mesh's ranks; it feeds the first and the last
  // stage's first rank.
  const Program program = lowered(gpt(), p);
  ASSERT_EQ(program.roles.size(), 1u);
  EXPECT_EQ(program.mesh.ranks(), 16);
  EXPECT_EQ(program.ranks(), 18);
  EXPECT_EQ(program.stage_of(17), 2);
  EXPECT_EQ(program.place_of(17), 4) << "dp 1, all else 0";
  EXPECT_EQ(program.rank_on_stage(17, 1), 12) << "pp 1, dp 1";
  EXPECT_EQ(program.rank_on_stage(7, 2), 17);
}

TEST(Execution, FurtherTokensAndSinks) {
  TransformerConfig further = small_config();
  further.mtp_layers = 2;
  TransformerConfig sinks = small_config();
  sinks.sinks = true;
  for (const TransformerConfig& c : {further, sinks}) {
    const Graph g = build_transformer(c);
    expect_good(g, base_plan());
    Plan p = base_plan();
    p.tp = 2;
    p.cp = 2;
    p.sequence_parallel = true;
    expect_good(g, p);
    p.recompute = parse_recompute("full", "");
    p.cp = 1;
    p.pp = 2;
    p.global_batch = 4;
    p.dp = 2;
    p.zero = 3;
    expect_good(g, p);
  }
}

TEST(Execution, HybridsOfMambaAttentionAndExperts) {
  expect_good(hybrid(), base_plan());
  Plan p = base_plan();
  p.tp = 2;
  expect_good(hybrid(), p);
  p.sequence_parallel = true;
  p.dp = 2;
  p.ep = 2;
  expect_good(hybrid(), p);
  p = base_plan();
  p.cp = 2;  // groups over cp in the scan, tokens outside
  expect_good(hybrid(), p);
  p.context = Plan::ContextExchange::ring;
  p.zero = 3;
  p.recompute = parse_recompute("full", "");
  expect_good(hybrid(), p);
  p = base_plan();
  p.pp = 2;
  p.dp = 2;
  p.micro_batch = 2;
  p.global_batch = 8;
  p.zero = 1;
  expect_good(hybrid(), p);
  // What the convolution makes is made again.
  set_framework(p, "megatron-core", "");
  p.optimizer.kind = OptimizerKind::sgd;
  p = executable(p);
  EXPECT_TRUE(p.kernels.mamba_ssm);
  expect_good(hybrid(), p);
  // One group cannot be cut; nor can a scan's sequence.
  TransformerConfig one = hybrid_config();
  one.mamba.groups = 1;
  p = base_plan();
  p.cp = 2;
  const auto r = expect_equals_reference(build_transformer(one), p, 1);
  EXPECT_THAT(r.reason, testing::HasSubstr("layers.0.mamba"));
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

/// Experts cut over a part of tp: the rest of it holds other experts or copies, of which each has
/// tokens of its own.
TEST(Execution, ExpertTensorParallel) {
  for (const int dp : {1, 2}) {
    for (const int ep : {1, 2, 4}) {
      for (const int zero : {0, 1, 3}) {
        Plan p = base_plan();
        p.tp = 4;
        p.etp = 2;
        p.ep = ep;
        p.dp = dp;
        p.zero = zero;
        p.sequence_parallel = true;
        if (ep > dp * 2) continue;
        SCOPED_TRACE(to_yaml(p));
        expect_good(mixtral(4), p);
        p.sequence_parallel = false;
        EXPECT_FALSE(complete(mixtral(4), p));
      }
    }
  }
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
  for (const Schedule s :
       {Schedule::naive, Schedule::gpipe, Schedule::one_f_one_b, Schedule::zero_bubble_h1}) {
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

TEST(Execution, CompressedGradients) {
  for (const CompressionKind kind : {CompressionKind::cast, CompressionKind::top_k,
                                     CompressionKind::one_bit, CompressionKind::power_sgd}) {
    for (const bool feedback : {true, false}) {
      SCOPED_TRACE(std::string(name(kind)) + (feedback ? "" : " without feedback"));
      Plan p = base_plan();
      p.compression.kind = kind;
      p.compression.error_feedback = feedback;
      p.compression.ratio = 0.1;
      p.dp = 2;
      p.global_batch = 4;
      expect_good(gpt(), p);
      p.dp = 3;
      p.global_batch = 6;
      p.overlap_gradients = false;
      p.optimizer.clip = 0.125;
      expect_good(llama(), p);
      p.dp = 2;
      p.tp = 2;
      p.sequence_parallel = true;
      p.cp = 2;
      p.global_batch = 4;
      expect_good(llama(), p);
      p.cp = 1;
      p.pp = 2;
      p.optimizer.kind = OptimizerKind::adam;
      expect_good(llama(), p);
      p.pp = p.tp = 1;
      p.dp = 4;
      p.ep = 2;
      p.optimizer.kind = OptimizerKind::sgd;
      expect_good(mixtral(), p);
      p.ep = 1;
      p.dp = 2;
      expect_good(cnn(false), p, 2);
    }
  }
}

/// Long enough for a queue to have gone round.
void expect_good_after_six_steps(const Graph& g, const Plan& p) {
  const auto r = expect_equals_reference(g, p, 1, nullptr, 6);
  EXPECT_TRUE(r.feasible) << r.reason;
}

TEST(Execution, ParameterServers) {
  for (const int staleness : {0, 1, 3}) {
    for (const int servers : {1, 2}) {
      SCOPED_TRACE(::testing::Message() << servers << " servers, staleness " << staleness);
      Plan p = base_plan();
      p.dp = 2;
      p.servers = servers;
      p.staleness = staleness;
      p.global_batch = 4;
      expect_good_after_six_steps(gpt(), p);
      p.tp = 2;
      p.sequence_parallel = true;
      p.overlap_gradients = false;
      expect_good_after_six_steps(llama(), p);
      p.pp = 2;
      p.loader = true;
      expect_good_after_six_steps(gpt(),
                                  p);  // its tied embedding is on two stages: the server sums them
      p.optimizer.kind = OptimizerKind::adam;
      p.dp = 3;
      p.tp = 1;
      p.global_batch = 12;
      p.schedule = Schedule::dualpipe;
      p.schedule_given = true;
      expect_good_after_six_steps(llama(), p);
    }
  }
}

TEST(Execution, SgdWithoutMomentumHasNoState) {
  for (const bool offload : {false, true}) {
    for (const int zero : {0, 1, 3}) {
      Plan p = base_plan();
      p.dp = 2;
      p.global_batch = 4;
      p.zero = zero;
      p.offload_optimizer = offload;
      p.optimizer.kind = OptimizerKind::sgd;
      p.optimizer.momentum = 0;
      expect_good(gpt(), p);
      for (const char* precision : {"fp32", "bf16"}) {
        set_precision(p, precision, "");
        for (const Buffer& b : lowered(gpt(), p).buffers) {
          EXPECT_EQ(b.name.find(".state"), std::string::npos) << b.name;
        }
      }
    }
  }
}

TEST(Execution, OffloadedStateAndActivations) {
  for (const auto& [optimizer, activations] :
       {std::pair{true, false}, {false, true}, {true, true}}) {
    SCOPED_TRACE(::testing::Message()
                 << "optimizer " << optimizer << " activations " << activations);
    Plan p = base_plan();
    p.offload_optimizer = optimizer;
    p.offload_activations = activations;
    expect_good(gpt(), p);
    expect_good(mixtral(), p);
    expect_good(cnn(false), p);
    p.offload_blocks = 2;
    expect_good(gpt(), p);
    p.offload_blocks = 0;
    p.dp = 2;
    p.global_batch = 8;
    for (const int zero : {0, 1, 2, 3}) {
      SCOPED_TRACE(zero);
      p.zero = zero;
      p.optimizer.kind = zero % 2 == 0 ? OptimizerKind::sgd : OptimizerKind::adam;
      expect_good(llama(), p);
    }
    p.zero = 0;
    p.tp = 2;
    p.sequence_parallel = true;
    p.optimizer.kind = OptimizerKind::sgd;
    p.recompute = parse_recompute("selective", "");
    expect_good(gpt(), p);
    p.recompute = parse_recompute("none", "");
    p.pp = 2;
    for (const Schedule s :
         {Schedule::gpipe, Schedule::one_f_one_b, Schedule::zero_bubble_h1, Schedule::dualpipe}) {
      SCOPED_TRACE(std::string(name(s)));
      p.schedule = s;
      p.schedule_given = true;
      expect_good(gpt(), p);
    }
    p.schedule = Schedule::interleaved;
    p.virtual_stages = 2;
    expect_good(llama(), p);
    p = base_plan();
    p.offload_optimizer = optimizer;
    p.offload_activations = activations;
    p.cp = 2;
    p.context = Plan::ContextExchange::ring;
    expect_good(llama(), p);
  }
}

TEST(Execution, StagesThatMeetThroughAMessageQueue) {
  for (const Schedule s : {Schedule::naive, Schedule::gpipe, Schedule::one_f_one_b,
                           Schedule::zero_bubble_h1, Schedule::dualpipe}) {
    SCOPED_TRACE(std::string(name(s)));
    Plan p = base_plan();
    p.message_queue = true;
    p.schedule = s;
    p.schedule_given = true;
    p.pp = 2;
    p.global_batch = 8;
    expect_good(gpt(), p);
    p.pp = 4;
    expect_good(llama(), p);
    p.pp = 2;
    p.dp = p.tp = 2;
    p.loader = true;
    p.global_batch = 16;
    expect_good(llama(), p);
    p.loader = false;
    p.servers = 1;
    expect_good(gpt(), p);
  }
  Plan p = base_plan();
  p.message_queue = true;
  p.pp = 2;
  p.virtual_stages = 2;
  p.global_batch = 4;
  expect_good(llama(), p);
}

TEST(Execution, OverlappedTensorParallel) {
  for (const int tp : {2, 4}) {
    Plan p = base_plan();
    p.tp = tp;
    p.sequence_parallel = true;
    p.overlap_tensor_parallel = true;
    Program program;
    const auto r = expect_equals_reference(gpt(), p, 1, &program);
    EXPECT_TRUE(r.feasible) << r.reason;
    // Of every block's four products: two gathered inputs and two scattered outputs forward, and
    // the same backward; only what others read too is gathered whole.
    std::map<CollectiveKind, int> calls;
    for (const Block& b : program.blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind == Kind::collective && i.atoms != 0) ++calls[i.collective];
      }
    }
    EXPECT_GT(calls[CollectiveKind::shift], calls[CollectiveKind::all_gather]);
    p.micro_batch = 2;
    const Graph other = tp == 2 ? llama() : gpt();
    expect_good(other, p);
    p.save_gathered = true;
    expect_good(other, p);
    p.save_gathered = false;
    p.dp = 2;
    p.pp = 2;
    p.global_batch = 8;
    for (const Schedule s : {Schedule::one_f_one_b, Schedule::zero_bubble_h1}) {
      p.schedule = s;
      p.schedule_given = true;
      expect_good(other, p);
    }
    p.pp = 1;
    p.zero = 3;
    p.recompute = parse_recompute("full", "");
    expect_good(gpt(), p);
    p.recompute = parse_recompute("none", "");
    p.zero = 0;
    p.cp = 2;  // the sequence is cut by cp too: gathers stay whole
    if (tp == 2) expect_good(llama(), p);
  }
}

TEST(Execution, StartUpFillsEveryParameterInAllItsForms) {
  std::mt19937 rng{20261201};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int done = 0;
  while (done < 60) {
    const Graph& g = graphs[rng() % graphs.size()];
    Plan wanted = random_plan(rng);
    if (done % 6 == 0) wanted = base_plan(), wanted.dp = 3, wanted.strategy = "dataparallel";
    if (done % 6 == 1) wanted = base_plan(), wanted.dp = 2, wanted.strategy = "replicas";
    const auto plan = complete(g, wanted);
    if (!plan || plan->ranks() > 24) continue;
    const auto training = lower(g, *plan);
    if (!training) continue;
    ++done;
    SCOPED_TRACE(g.name + "\n" + to_yaml(*plan));
    for (const Startup form : {Startup::each, Startup::broadcast, Startup::sharded_read}) {
      SCOPED_TRACE(std::string(name(form)));
      const Program p = startup_program(*training, form);
      for (const auto& error : verify(p)) ADD_FAILURE() << error;
      const auto options = reference::options_for(g, p, 1, 7);
      const auto run = reference::interpret(p, options);
      EXPECT_EQ(run.copies_differ, 0);
      for (std::size_t r = 0; r < run.parameters.size(); ++r) {
        for (std::size_t q = 0; q < g.parameters.size(); ++q)
          EXPECT_EQ(run.parameters[r][q], options.parameters[r][q].values) << g.parameters[q].name;
      }
    }
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Execution, LossScaling) {
  Plan p = base_plan();
  p.loss_scale = {1024, false, 2000};
  p.dp = 2;
  p.global_batch = 4;
  expect_good(gpt(), p);
  p.loss_scale = {65536, true, 1};  // doubles after every step
  for (const int zero : {0, 1, 2, 3}) {
    SCOPED_TRACE(zero);
    p.zero = zero;
    p.optimizer.kind = zero % 2 == 0 ? OptimizerKind::adam : OptimizerKind::sgd;
    p.optimizer.clip = 0.125;
    expect_good(llama(), p);
  }
  p.zero = 0;
  p.pp = 2;
  p.tp = 2;
  p.sequence_parallel = true;
  expect_good(gpt(), p);
  expect_good(llama(), p);
}

TEST(Execution, ADynamicLossScaleSkipsStepsWhoseGradientsOverflow) {
  // Gradients of activations in fp16 overflow beyond 65504. A scale of 2^30 is too much; it halves
  // from step to step until the gradients are finite, and until then nothing changes.
  const Graph g = llama();
  Plan p = base_plan();
  set_precision(p, "fp16", "");
  p.dp = 2;
  p.optimizer.kind = OptimizerKind::adam;
  p.loss_scale = {0x1p30, true, 2000};
  const Program program = lowered(g, p);
  int skipped = 0;
  std::vector<std::vector<double>> before;
  for (int steps = 0; steps <= 24; ++steps) {
    auto options = reference::options_for(g, program, steps, 7);
    options.round = true;
    const auto run = reference::interpret(program, options);
    if (steps > 0 && run.parameters[0] == before) ++skipped;
    if (steps > 0 && run.parameters[0] != before) {
      for (const auto& values : run.parameters[0]) {
        for (const double v : values) ASSERT_TRUE(std::isfinite(v));
      }
      break;
    }
    before = run.parameters[0];
  }
  EXPECT_GE(skipped, 3);
  EXPECT_LT(skipped, 24);
  // Without the flag the first step ruins the parameters.
  p.loss_scale.dynamic = false;
  const Program fixed = lowered(g, p);
  auto options = reference::options_for(g, fixed, 1, 7);
  options.round = true;
  const auto ruined = reference::interpret(fixed, options);
  bool finite = true;
  for (const auto& values : ruined.parameters[0]) {
    for (const double v : values) finite &= std::isfinite(v);
  }
  EXPECT_FALSE(finite);
}

TEST(Execution, DualPipe) {
  Plan p = base_plan();
  p.schedule = Schedule::dualpipe;
  p.schedule_given = true;
  p.pp = 2;
  p.global_batch = 4;
  expect_good(llama(), p);
  expect_good(gpt(), p);  // its tied embedding is read by both chunks of either stage
  p.pp = 4;
  p.global_batch = 8;
  expect_good(gpt(), p);
  p.pp = 2;
  p.dp = 2;
  p.tp = 2;
  p.sequence_parallel = true;
  p.optimizer.clip = 0.125;
  for (const int zero : {0, 1, 2, 3}) {
    SCOPED_TRACE(zero);
    p.zero = zero;
    expect_good(gpt(), p);
  }
  p.zero = 2;
  p.zero_group = 2;
  p.dp = 4;
  p.global_batch = 16;
  expect_good(gpt(), p);
  p = base_plan();
  p.schedule = Schedule::dualpipe;
  p.schedule_given = true;
  p.pp = 2;
  p.dp = p.ep = 2;
  p.global_batch = 8;
  p.loader = true;
  expect_good(mixtral(), p);
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
  for (const char* set : {"full", "selective", "first:1", "*.mlp.activation,*.attention_norm",
                          "~*.mlp.activation,~*.attention_norm,*.attention.core",
                          "~*.attention.core,~*.attention.output,~*_norm,~*.mlp.activation",
                          // What a later segment reads of an earlier one; torchtitan's selection.
                          "~*.attention.key,~*_rotary",
                          "~*_norm,~*.attention.key,~*_rotary,~*.attention.output,"
                          "~*.attention.residual,~*.mlp.up,~*.mlp.activation"}) {
    SCOPED_TRACE(set);
    Plan p = base_plan();
    p.recompute = parse_recompute(set, "");
    expect_good(gpt(), p);
    p.recompute_stops_early = true;  // but not before what is forgotten
    expect_good(llama(), p);
    p.recompute_stops_early = false;
    p.tp = 2;
    p.pp = 2;
    p.global_batch = 2;
    p.sequence_parallel = true;
    expect_good(llama(), p);
    p.zero = 3;
    p.dp = 2;
    p.global_batch = 4;
    expect_good(llama(), p);
    p.recompute_stops_early = true;
    expect_good(llama(), p);
    expect_good(mixtral(), p);
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
  EXPECT_THAT(
      expect_equals_reference(cnn(true), p).reason,
      ::testing::HasSubstr("cuts the height 2 of pool into more parts than it has; use at most 2"));
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
  p.recompute = parse_recompute("full", "");
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

/// Worst error of a plan's run in its own types, against the serial network in doubles.
double error_in_types(const Graph& g, const Plan& wanted, const std::string& precision) {
  Plan p = wanted;
  set_precision(p, precision, "");
  const Program program = lowered(g, p);
  auto options = reference::options_for(g, program, 2, 7);
  options.round = true;
  const auto c = reference::compare(g, reference::interpret(program, options),
                                    reference::train_serially(g, program, options, 1), 0);
  return std::max({c.loss_error, c.gradient_error, c.parameter_error});
}

TEST(Execution, MixedPrecisionIsExactInDoubles) {
  Plan p = base_plan();
  for (const char* precision : {"fp32", "bf16", "fp8", "nvfp4"}) {
    set_precision(p, precision, "");
    p.dp = 2;
    expect_good(llama(), p);
  }
}

TEST(Execution, MixedPrecisionRoundsAsItsTypesDo) {
  // Each stored value is off by at most half a spacing; over the 60 operators of this path, forward
  // and backward, with three roundings each (two operands and the result).
  for (const int ranks : {1, 2}) {
    Plan p = base_plan();
    p.tp = p.dp = ranks;
    std::map<std::string, double> error;
    for (const char* precision : {"fp32", "tf32", "bf16", "fp16", "fp8", "mxfp8"}) {
      const double e = error[precision] = error_in_types(llama(), p, precision);
      EXPECT_GT(e, 0) << precision;
      EXPECT_LT(e, 60 * 3 * spacing(parse_element_type(precision, "")) / 2) << precision;
    }
    // Three bits fewer make errors about eight times as large; a type that was ignored would not.
    EXPECT_GT(error["bf16"], 3 * error["fp16"]);
    EXPECT_GT(error["fp16"], 100 * error["fp32"]);
    EXPECT_GT(error["fp8"], error["bf16"]);
    EXPECT_LT(error["tf32"], error["bf16"]) << "only products' operands are rounded";
  }
}

TEST(Execution, AMasterCopyKeepsUpdatesTooSmallForTheParameter) {
  // Updates of a 1000th of a bf16 spacing: without the fp32 copy nothing would ever change.
  Plan p = base_plan();
  p.optimizer.learning_rate = 1e-6;
  const Graph g = llama();
  const auto moved = [&](bool master) {
    Plan q = p;
    set_precision(q, "bf16", "");
    q.precision.master_copy = master;
    const Program program = lowered(g, q);
    auto options = reference::options_for(g, program, 1, 7);
    options.round = true;
    const auto before = reference::interpret(program, options).parameters[0];
    options.steps = 400;
    options.input = [&](std::size_t input, std::int64_t, std::int64_t sample, std::int64_t index) {
      return reference::input_value(g, input, 7, 0, sample, index);
    };
    const auto after = reference::interpret(program, options).parameters[0];
    std::int64_t changed = 0;
    for (std::size_t k = 0; k < before.size(); ++k) {
      for (std::size_t x = 0; x < before[k].size(); ++x) changed += before[k][x] != after[k][x];
    }
    return changed;
  };
  EXPECT_GT(moved(true), moved(false) + 10);
}

/// Random networks under random plans.
TEST(Execution, RandomNetworks) {
  std::mt19937 rng{20261124};
  int feasible = 0;
  for (int i = 0; i < 320; ++i) {
    const Graph g = random_transformer(rng);
    const Plan p = random_plan(rng);
    if (p.ranks() > 24) continue;
    SCOPED_TRACE(::testing::Message() << "case " << i << ": " << g.name << "\n" << to_yaml(p));
    feasible += expect_equals_reference(g, p).feasible ? 1 : 0;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(feasible, 40);
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
