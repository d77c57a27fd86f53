// Settings in words: what tables of several sources write, and what they must not be taken for.
#include "validation/row_settings.h"

#include <gtest/gtest.h>

namespace partita::validation {
namespace {

TEST(Settings, AreReadClauseByClause) {
  // SimuMax's, vTrain's, llm-foundry's and nanotron's tables.
  Settings s = settings_of(
      "overlap paths off (no TP comm overlap, no p2p overlap); CE fusion; CP type a2a (cp cases)");
  EXPECT_EQ(s.overlap_gradients, false);
  EXPECT_EQ(s.overlap_tensor_parallel, false);
  EXPECT_EQ(s.overlap_messages, false);
  EXPECT_TRUE(s.nothing_overlaps);
  EXPECT_EQ(s.fused_loss, true);
  EXPECT_EQ(s.context, "all_to_all");
  EXPECT_TRUE(s.unread.empty());
  s = settings_of("1F1B; gradient bucketing off in the repository's validation configs");
  EXPECT_EQ(s.overlap_gradients, false);
  EXPECT_FALSE(s.nothing_overlaps);
  EXPECT_TRUE(s.unread.empty());
  s = settings_of("FSDP mixed_precision=PURE; activation CPU offload=False; grad accumulation=4");
  EXPECT_EQ(s.fp32_gradients, false);
  EXPECT_EQ(s.offload_activations, false);
  EXPECT_TRUE(s.unread.empty());
  EXPECT_EQ(settings_of("FSDP mixed_precision=DEFAULT").fp32_gradients, std::nullopt);
  EXPECT_EQ(settings_of("grad_reduce_in_fp32=False").fp32_gradients, false);
  EXPECT_EQ(settings_of("--accumulate-allreduce-grads-in-fp32").fp32_gradients, true);
  EXPECT_EQ(settings_of("tokendrop").padded_capacity, true);
  EXPECT_EQ(settings_of("--moe-pad-expert-input-to-capacity").padded_capacity, true);
  EXPECT_EQ(settings_of("no token dropping; DeepEP").padded_capacity, false);
  EXPECT_EQ(settings_of("dropless").padded_capacity, false);
  EXPECT_EQ(settings_of("pp_engine 1f1b; tied embeddings").tied, true);
  EXPECT_EQ(settings_of("untied embeddings").tied, false);
}

TEST(Settings, OfConfigurationsInBraces) {
  const Settings s = settings_of(
      R"(recipe glm52_config features={"sequence_packing": "offline", "context_parallel_size": 32, )"
      R"("moe_dispatcher": "hybridep", "megatron_fsdp": "optim_grads_params"})");
  EXPECT_EQ(s.context_parallel, "32");
  EXPECT_EQ(s.rows_once, true);
  EXPECT_EQ(s.sharding, "ZeRO-3");
  EXPECT_EQ(s.unread, std::vector<std::string>{R"(sequence_packing": "offline)"});
  EXPECT_EQ(settings_of(R"(features={"megatron_fsdp": "optim"})").sharding, "ZeRO-1");
}

TEST(Settings, OfOverlap) {
  for (const char* on :
       {"async tp", "torch.compile; async tp", "async tp: on", "async-tp=true", "TP overlap",
        "tp_comm_overlap=True", "Userbuffers overlap", "overlap of tensor parallel transfers"})
    EXPECT_EQ(settings_of(on).overlap_tensor_parallel, true) << on;
  for (const char* off :
       {"no async tp", "without async tp", "async tp off", "async tp: no", "async tp=false",
        "async tp disabled", "tp_comm_overlap: False", "no TP comm overlap"}) {
    EXPECT_EQ(settings_of(off).overlap_tensor_parallel, false) << off;
    EXPECT_FALSE(settings_of(off).nothing_overlaps) << off;
  }
  for (const char* unsaid : {"", "vanilla tp", "TP=4", "overlap"})
    EXPECT_FALSE(settings_of(unsaid).overlap_tensor_parallel) << unsaid;
  for (const char* on : {"moe_a2a_overlap=True", "overlap_moe_expert_parallel_comm", "EP overlap",
                         "A2A overlap on", "expert-parallel overlap", "1F1B A2A overlap"})
    EXPECT_EQ(settings_of(on).overlap_experts, true) << on;
  EXPECT_EQ(settings_of("moe_a2a_overlap: false").overlap_experts, false);
  EXPECT_EQ(settings_of("overlap_grad_reduce=True").overlap_gradients, true);
  EXPECT_EQ(settings_of("DP overlap: off").overlap_gradients, false);
  EXPECT_EQ(settings_of("overlap_comm=True").overlap_gradients, true);
  EXPECT_EQ(settings_of("overlap_p2p_comm=true").overlap_messages, true);
  EXPECT_TRUE(settings_of("no overlap").nothing_overlaps);
}

TEST(Settings, ThatAreJoinedInOneClause) {
  Settings s = settings_of("TP comm overlap + DP overlap + CUDA graphs");
  EXPECT_EQ(s.overlap_tensor_parallel, true);
  EXPECT_EQ(s.overlap_gradients, true);
  EXPECT_EQ(s.graphs, true);
  s = settings_of("DP overlap without TP overlap");
  EXPECT_EQ(s.overlap_gradients, true);
  EXPECT_EQ(s.overlap_tensor_parallel, false);
  s = settings_of("CUDA graphs and fused cross entropy and activation offloading");
  EXPECT_EQ(s.graphs, true);
  EXPECT_EQ(s.fused_loss, true);
  EXPECT_EQ(s.offload_activations, true);
  EXPECT_EQ(settings_of("distributed Adam (no TP overlap)").overlap_tensor_parallel, false);
  for (const char* off : {"TP overlap (off)", "tp_comm_overlap: N", "TP overlap not enabled"})
    EXPECT_EQ(settings_of(off).overlap_tensor_parallel, false) << off;
}

TEST(Settings, OfDispatchersGraphsAndSchedules) {
  for (const char* once : {"DeepEP", "dispatcher: flex", "moe_token_dispatcher_type=flex",
                           "HybridEP dispatcher", "moe_flex_dispatcher_backend=deepep"})
    EXPECT_EQ(settings_of(once).rows_once, true) << once;
  for (const char* each :
       {"alltoall dispatcher", "moe_token_dispatcher_type=alltoall", "no DeepEP"})
    EXPECT_EQ(settings_of(each).rows_once, false) << each;
  EXPECT_EQ(settings_of("CUDA graphs").graphs, true);
  EXPECT_EQ(settings_of("CUDA graphs").graphs_of, "");
  EXPECT_EQ(settings_of("CUDA graphs (attn, moe_router, moe_preprocess)").graphs_of,
            "beside experts");
  EXPECT_EQ(settings_of("cuda_graph_scope=[attn]").graphs_of, "attention");
  EXPECT_EQ(settings_of("CUDA graphs with scope attn").graphs_of, "attention");
  EXPECT_EQ(settings_of("cuda_graph_scope: mlp").graphs_of, "mlp");
  for (const char* off : {"cuda_graphs=0", "no CUDA graphs", "cuda_graph_impl: none"})
    EXPECT_EQ(settings_of(off).graphs, false) << off;
  EXPECT_EQ(settings_of("ZB-H1").schedule, "zb-h1");
  EXPECT_EQ(settings_of("DualPipe").schedule, "dualpipe");
  EXPECT_EQ(settings_of("AFAB").schedule, "gpipe");
  EXPECT_EQ(settings_of("1F1B").schedule, "");
  EXPECT_TRUE(settings_of("Interleaved 1F1B").unread.empty());
  for (const char* loops : {"interleaved", "Interleaved 1F1B", "1F1B (interleaved)"})
    EXPECT_TRUE(settings_of(loops).interleaved) << loops;
  EXPECT_EQ(settings_of("cp_comm_type=p2p").context, "ring");
  EXPECT_EQ(settings_of("Ulysses").context, "all_to_all");
}

TEST(Settings, OfStatesAndTypes) {
  EXPECT_EQ(settings_of("LoRA").lora, true);
  EXPECT_EQ(settings_of("no LoRA").lora, false);
  EXPECT_EQ(settings_of("full fine-tuning (no LoRA)").lora, false);
  EXPECT_EQ(settings_of("activation offloading not used").offload_activations, false);
  EXPECT_EQ(settings_of("optimizer offload not enabled").offload_optimizer, false);
  EXPECT_EQ(settings_of("optimizer CPU offload").offload_optimizer, true);
  EXPECT_EQ(settings_of("activation offloading").offload_activations, true);
  EXPECT_EQ(settings_of("activation offloading").offload_blocks, 0);
  EXPECT_EQ(settings_of("activation offloading (4 layers)").offload_blocks, 4);
  EXPECT_EQ(settings_of("DualPipe; recompute RMSNorm and MLA up-projection").recompute,
            "recompute rmsnorm and mla up projection");
  for (const char* narrow : {"float8", "torch.compile, float8 tensorwise", "FP8 delayed scaling"})
    EXPECT_EQ(settings_of(narrow).precision, "fp8") << narrow;
  for (const char* wide : {"no float8", "float8 all-gather", "float8: off", "fp8_param_gather"})
    EXPECT_EQ(settings_of(wide).precision, "") << wide;
}

TEST(Settings, WhatIsNotReadIsNamedAsItStands) {
  EXPECT_EQ(settings_of("torch.compile; CUDA graphs, Sequence packing (offline)").unread,
            (std::vector<std::string>{"Sequence packing (offline)"}));
  // Damaged ones: nothing but a name.
  for (const char* odd : {"((((", "}{][", ";;,,", "a(b", "\"", "overlap=", "=none", "(no)", "no "})
    settings_of(odd);
  EXPECT_EQ(settings_of("x (y").unread, std::vector<std::string>{"x (y"});
  EXPECT_TRUE(settings_of("--swiglu --overlap-grad-reduce").unread.empty());
}

}  // namespace
}  // namespace partita::validation
