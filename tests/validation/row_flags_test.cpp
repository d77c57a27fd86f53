#include "validation/row_flags.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "validation/row_settings.h"

namespace partita::validation {
namespace {

using Cells = std::map<std::string, std::string>;

Cells cells(const char* text) { return cells_of(command_line(text).flags); }

TEST(Flags, TakeTheirValues) {
  const auto pairs = [](const char* text) {
    std::vector<std::pair<std::string, std::string>> all;
    for (const Flag& f : command_line(text).flags) all.emplace_back(f.name, f.value);
    return all;
  };
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  EXPECT_EQ(pairs("--a 1 --b=2 --c"), (Pairs{{"a", "1"}, {"b", "2"}, {"c", ""}}));
  EXPECT_EQ(pairs("--Group.some_name x"), (Pairs{{"some-name", "x"}}));
  EXPECT_EQ(pairs("--recompute-modules moe act --a"),
            (Pairs{{"recompute-modules", "moe act"}, {"a", ""}}));
  // No flags: a range, a dash, two dashes by themselves.
  EXPECT_TRUE(pairs("4--8 GPUs - a -- b --8 ---").empty());
  EXPECT_TRUE(pairs("").empty());
}

TEST(Flags, LeaveWordsToTheWords) {
  EXPECT_EQ(command_line("TP overlap; 2 - 3").words, "TP overlap; 2 - 3");
  const CommandLine line =
      command_line("--overlap-grad-reduce --tp-comm-overlap, PP comm overlap --swiglu async TP");
  EXPECT_EQ(line.flags.size(), 3u);
  EXPECT_EQ(line.words, " PP comm overlap; async TP");
  const Settings s = settings_of("--overlap-grad-reduce --tp-comm-overlap, PP comm overlap");
  EXPECT_EQ(s.overlap_gradients, true);
  EXPECT_EQ(s.overlap_tensor_parallel, true);
  EXPECT_EQ(s.overlap_messages, true);
  EXPECT_TRUE(s.unread.empty());
}

TEST(Flags, SayWhatColumnsDo) {
  EXPECT_EQ(cells("--tensor-model-parallel-size 4 --pipeline-model-parallel-size=2 --num-layers 32 "
                  "--num-layers-per-virtual-pipeline-stage 4"),
            (Cells{{"tp", "4"}, {"pp", "2"}, {"num_layers", "32"}}));
  EXPECT_EQ(cells("--use-distributed-optimizer --sequence-parallel --bf16"),
            (Cells{{"zero_or_fsdp", "distributed optimizer"},
                   {"sequence_parallel", "yes"},
                   {"precision", "bf16"}}));
  EXPECT_EQ(cells("--bf16 --fp8-format hybrid"), (Cells{{"precision", "fp8"}}));
  EXPECT_EQ(cells("--fp8-format e4m3 --fp8-recipe mxfp8"), (Cells{{"precision", "mxfp8"}}));
  EXPECT_EQ(cells("--zero-stage 3"), (Cells{{"zero_or_fsdp", "ZeRO-3"}}));
  EXPECT_EQ(cells("--parallelism.tensor_parallel_degree 8 --activation_checkpoint.mode selective"),
            (Cells{{"tp", "8"}, {"recompute", "selective"}}));
  const auto again = [](const char* text) { return cells(text)["recompute"]; };
  EXPECT_EQ(again("--recompute-granularity full --recompute-method uniform "
                  "--recompute-num-layers 1"),
            "full (uniform)");
  EXPECT_EQ(again("--recompute-granularity full --recompute-method block "
                  "--recompute-num-layers 4"),
            "full (block, 4 layers)");
  EXPECT_EQ(again("--recompute-granularity selective --recompute-modules moe_act layernorm"),
            "selective (moe_act layernorm)");
  EXPECT_EQ(again("--recompute-activations"), "selective");
  // The last of two is the program's; without a value a flag says nothing.
  EXPECT_EQ(cells("--seq-length 1 --seq-length 2"), (Cells{{"seq_len_tokens", "2"}}));
  EXPECT_TRUE(cells("--seq-length --num-layers=").empty());
}

TEST(Flags, OfMegatronsNetworks) {
  const MegatronFlags f = megatron_flags(
      "--swiglu --untie-embeddings-and-output-weights --attention-backend=unfused "
      "--position-embedding-type rope --overlap-grad-reduce --hidden-dropout 0.0");
  EXPECT_TRUE(f.any && f.gated && f.untied && f.rope && f.overlap_gradients && f.no_dropout);
  EXPECT_FALSE(f.no_bias || f.latent || f.overlap_tensor_parallel || f.local);
  EXPECT_EQ(f.attention, "unfused");
  EXPECT_TRUE(megatron_flags("--transformer-impl local").local);
  EXPECT_TRUE(megatron_flags("--moe-token-dispatcher-type flex").flex_dispatcher);
  // A longer flag that begins alike is another one.
  EXPECT_FALSE(megatron_flags("--overlap-grad-reduce-later").overlap_gradients);
  EXPECT_FALSE(megatron_flags("recipe x").any);
  EXPECT_FALSE(megatron_flags("Flags: --swiglu").any);
}

TEST(Flags, OfSettingsAreReadAsWordsAre) {
  EXPECT_EQ(settings_of("--no-overlap-p2p-communication").overlap_messages, false);
  EXPECT_EQ(settings_of("--overlap-moe-expert-parallel-comm").overlap_experts, true);
  EXPECT_EQ(settings_of("--optimizer-cpu-offload").offload_optimizer, true);
  EXPECT_EQ(settings_of("--cpu-offloading-num-layers 5").offload_blocks, 5);
  EXPECT_EQ(settings_of("--cuda-graph-impl=none").graphs, false);
  EXPECT_EQ(settings_of("--cuda-graph-impl transformer_engine").graphs, true);
  EXPECT_EQ(settings_of("--cp-comm-type a2a").context, "all_to_all");
  // What changes neither time nor memory, and what is a column's, is no matter; the rest is named.
  EXPECT_EQ(
      settings_of("--bf16 --lr 1e-4 --frobnicate 3 --tensorboard-dir x --seq-length 4").unread,
      std::vector<std::string>{"--frobnicate 3"});
}

}  // namespace
}  // namespace partita::validation
