// Framework profiles as data.
#include "simulator/plan/framework.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "models/models.h"
#include "simulator/plan/plan.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::ThrowsMessage;

TEST(Framework, EveryFileReadsAndEverySettingHasASource) {
  EXPECT_THAT(
      frameworks(),
      IsSupersetOf({"megatron-core", "pytorch-ddp", "pytorch-fsdp", "partita", "nemo", "torchtitan",
                    "llm-foundry", "megatron-lm-2021", "megatron-lm-2022", "megatron-deepspeed",
                    "deeplearningexamples", "mlperf", "deeplearningexamples-pytorch",
                    "deeplearningexamples-tensorflow", "deeplearningexamples-tensorflow1",
                    "deeplearningexamples-transformer-xl-pytorch",
                    "deeplearningexamples-transformer-xl-tensorflow"}));
  const auto models = model_catalogue();
  for (const auto& name : frameworks()) {
    const FrameworkProfile f = load_framework(name, "");
    EXPECT_EQ(f.name, name);
    EXPECT_GT(f.bucket.count, 0) << name;
    EXPECT_GE(f.sources.size(), 3u) << name;
    for (const auto& [key, source] : f.sources) EXPECT_FALSE(source.empty()) << name << " " << key;
    EXPECT_TRUE(std::binary_search(models.begin(), models.end(), f.model)) << name;
    EXPECT_GT(f.vocabulary, 0) << name;
    Plan p;
    set_precision(p, f.precision, name);
    p.recompute = parse_recompute(f.recompute, name);
    p.recompute = parse_recompute(f.selective, name);
    set_framework(p, name, "");
    EXPECT_EQ(p.framework, name);
    EXPECT_EQ(p.pad_vocabulary, f.pad_vocabulary);
    EXPECT_EQ(p.overlap_gradients, f.overlap_gradients);
    EXPECT_EQ(p.kernels, f.kernels);
    EXPECT_EQ(p.send_wait, f.send_wait);
    EXPECT_EQ(p.scatter_messages, f.scatter_messages);
    EXPECT_EQ(p.sums_in_turn, f.sums_in_turn);
    EXPECT_EQ(p.sums_copies_last, f.sums_copies_last);
    // What runs is what is priced.
    if (name == "partita") {
      EXPECT_EQ(p.kernels, FrameworkKernels{});
      EXPECT_EQ(p.send_wait, SendWait::never);
      EXPECT_FALSE(p.scatter_messages);
      EXPECT_FALSE(p.sums_in_turn);
    }
    EXPECT_EQ(p.selective, parse_recompute(f.selective, name));
    EXPECT_NE(p.selective.kind, Recompute::selective) << name;
    EXPECT_EQ(p.fp8_format, f.fp8_format);
    // Who calls Transformer Engine, and who saves what it made in 8 bits, has its default.
    if (f.narrow_gathers) {
      EXPECT_EQ(f.fp8_format, Fp8Format::hybrid) << name;
    }
    EXPECT_EQ(p.framework_clip, f.clip);
    EXPECT_EQ(p.fuses_normalise, f.fuses_normalise);
    EXPECT_EQ(p.joins_projections, f.joins_projections);
    EXPECT_EQ(p.recompute_stops_early, f.recompute_stops_early);
    EXPECT_EQ(p.stays_gathered, f.stays_gathered);
    EXPECT_EQ(p.save_gathered, f.save_gathered);
    EXPECT_EQ(p.regathers_recomputed, f.regathers_recomputed);
    EXPECT_EQ(p.reduces_units, f.reduces_units);
    EXPECT_EQ(p.context == Plan::ContextExchange::ring, f.ring_context);
    // Products of Transformer Engine and Megatron's own alike; Megatron of 2021 has no such plans.
    if (name.starts_with("megatron") || name.starts_with("nemo")) {
      EXPECT_EQ(f.regathers_recomputed, name != "megatron-lm-2021") << name;
    }
    EXPECT_EQ(p.score_passes_forward, f.score_passes_forward);
    EXPECT_EQ(p.score_passes_backward, f.score_passes_backward);
    EXPECT_EQ(p.channels_first, f.channels_first && p.precision.activations == ElementType::fp32);
    EXPECT_EQ(p.precision.gradients, f.fp32_gradients ? ElementType::fp32 : p.precision.parameters);
  }
}

/// A plan file's own keys stay, whoever names the framework.
TEST(Framework, WhatAPlanFileSaysStays) {
  const std::string file = ::testing::TempDir() + "says.yaml";
  const auto load = [&](const std::string& text, std::string_view unless_said,
                        std::string_view instead) {
    std::ofstream(file) << "schema: partita.plan/1\n" << text;
    return load_plan(file, unless_said, instead, "--framework");
  };
  const std::string own = "stays_gathered: root\nsave_gathered: true\nbucket: 7 MB\n";
  for (const Plan& p : {load(own, "megatron-core", ""), load(own, "partita", "megatron-core"),
                        load("framework: torchtitan\n" + own, "partita", "megatron-core"),
                        load("framework: megatron-core\n" + own, "partita", "")}) {
    EXPECT_EQ(p.framework, "megatron-core");
    EXPECT_EQ(p.stays_gathered, parse_stays_gathered("root", ""));
    EXPECT_TRUE(p.save_gathered);
    EXPECT_EQ(p.bucket, Bytes{7'000'000});
    EXPECT_TRUE(p.regathers_recomputed);  // the framework's
    EXPECT_EQ(p.context, Plan::ContextExchange::ring);
  }
  EXPECT_EQ(load("context_exchange: all_gather\n", "megatron-core", "").context,
            Plan::ContextExchange::all_gather);
  EXPECT_THAT([&] { load(own, "partita", "nobody"); },
              ThrowsMessage<InputError>(HasSubstr("--framework")));
}

TEST(Framework, ASelectionThatSaysItselfIsRefused) {
  EXPECT_THAT(
      [] {
        parse_framework(
            "schema: partita.framework/1\nname: x\nlike: nemo\nsource: s\n"
            "plan: {bucket: 1 MB}\ndefaults: {selective: selective}\n",
            "f.yaml");
      },
      ThrowsMessage<InputError>(HasSubstr("'selective' says itself")));
}

TEST(Framework, OneLikeAnotherHasItsSettingsNotItsRows) {
  const FrameworkProfile
      nemo = load_framework("nemo", ""),
      x = parse_framework(
          "schema: partita.framework/1\nname: x\nlike: nemo\nsource: s\nplan: {bucket: 1 MB}\n"
          "kernels: {logit_forward: 8 B, optimizer_tensors: 36}\n",
          "f.yaml");
  EXPECT_EQ(x.name, "x");
  EXPECT_EQ(x.bucket, Bytes{1'000'000});
  EXPECT_EQ(x.kernels.logit_forward, 8);
  EXPECT_EQ(x.kernels.logit_backward, nemo.kernels.logit_backward);
  EXPECT_EQ(x.kernels.optimizer_tensors, 36);
  EXPECT_EQ(nemo.kernels.optimizer_tensors, 0) << "copies its bf16 parameters one by one";
  EXPECT_EQ(x.zero, nemo.zero);
  EXPECT_EQ(x.sources.at("zero"), nemo.sources.at("zero"));
  EXPECT_EQ(x.sources.at("bucket"), "s");
  EXPECT_TRUE(x.aliases.empty() && x.workloads.empty());
  EXPECT_FALSE(nemo.aliases.empty() || nemo.workloads.empty());
}

TEST(Framework, MistakesNameTheirPlace) {
  const auto expect = [](const std::string& body, const char* message) {
    EXPECT_THAT([&] { parse_framework("schema: partita.framework/1\n" + body, "f.yaml"); },
                ThrowsMessage<InputError>(HasSubstr(message)))
        << body;
  };
  expect("name: x\nplan: {bucket: 1 MB}\n", "every setting needs a source");
  expect("name: x\nsource: s\nplan: {}\n", "bucket");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB, gradients: fp64}\n",
         "'fp64' is no type of gradients");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB, weight_gradients: away}\n",
         "'away' is no place of weights' gradients; use in_place, apart, placeholders or beside");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\ndefaults: {dropout: 1}\n", "dropout is 1");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB, bukket: 2}\n", "bukket");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB, wait_for_sends: often}\n",
         "use never, not-interleaved or always");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nkernels: {score: 9 B}\n", "score");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nkernels: {table_passes: 0}\n",
         "0 is too small");
  for (const char* key : {"normalize_share_forward", "normalize_share_backward",
                          "logit_share_forward", "logit_share_backward", "rows_share"}) {
    for (const char* share : {"0", "-0.5", "1.01", "nan"})
      expect(fmt::format("name: x\nsource: s\nplan: {{bucket: 1 MB}}\nkernels: {{{}: {}}}\n", key,
                         share),
             std::string_view(share) == "nan" ? "nan" : "above 0 and at most 1");
    EXPECT_NO_THROW(parse_framework(
        fmt::format("schema: partita.framework/1\nname: x\nsource: s\nplan: {{bucket: 1 MB}}\n"
                    "kernels: {{{}: 1}}\n",
                    key),
        "f.yaml"));
  }
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nkernels: {logit_forward_fused: 33 B}\n",
         "logit_forward_fused and logit_backward_fused come together");
  expect("name: x\nplan: {bucket: {value: 1 MB, source: s}}\nkernels: {score_forward: 9 B}\n",
         "every setting needs a source");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\ndefaults: {zero: 4}\n", "4 is too large");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nrecipes: {a: {ep: 8, epp: 2}}\n", "epp");
  expect("name: x\nplan: {bucket: {value: 1 MB, source: s}}\nrecipes: {a: {ep: 8}}\n",
         "every recipe needs a source");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nworkloads: [{network: [a]}]\n", "network");
  expect("name: x\nplan: {bucket: {value: 1 MB, source: s}}\nworkloads: [{gpus: 8}]\n",
         "every workload needs a source");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nworkloads: [{gpus: 0}]\n", "0 is too small");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\nworkloads: [{zero: 4}]\n", "4 is too large");
  for (const char* count : {"packed", "zero_group", "offload_blocks", "activation_passes_forward",
                            "activation_passes_backward"})
    expect(
        fmt::format("name: x\nsource: s\nplan: {{bucket: 1 MB}}\nworkloads: [{{{}: 0}}]\n", count),
        "0 is too small");
  expect("name: x\nsource: s\nplan: {bucket: 1 MB}\ndefaults: {logs_memory: all}\n",
         "'all' is no memory of a log; there are device (nvidia-smi's), reserved and allocated");
  const std::string sized = "name: x\nsource: s\nplan: {bucket: 1 MB}\nrecipes: ";
  expect(sized + "{a: {when: {num_layers: 2}, tp: 2}}\n",
         "says too little; give two sizes of the network at least");
  expect(sized + "{a: {when: {num_layers: 2, heads: 2}, tp: 2}}\n", "heads");
  expect("name: x\nlike: megatron-cor\nsource: s\nplan: {bucket: 1 MB}\n",
         "did you mean 'megatron-core'?");
  expect("name: x\nlike: mlperf-language\nsource: s\nplan: {bucket: 1 MB}\n",
         "'mlperf-language' is itself like nemo; name that");
  EXPECT_THAT([] { load_framework("megatron-cor", "--framework"); },
              ThrowsMessage<InputError>(HasSubstr("did you mean 'megatron-core'?")));
}

}  // namespace
}  // namespace partita
