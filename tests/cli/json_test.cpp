// tests/cli/json_test.cpp: what scripts rely on: keys with their types, sums, exit codes, traces.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "models/models.h"
#include "simulator/lower/lower.h"
#include "simulator/plan/plan.h"
#include "tests/cli/run.h"
#include "tests/simulator/networks.h"

namespace partita::test {
namespace {

using Json = nlohmann::json;

/// stdout as one JSON value; anything else there is a failure.
Json parsed(const Ran& r) {
  Json j = Json::parse(r.out, nullptr, false);
  EXPECT_FALSE(j.is_discarded()) << r.out.substr(0, 200) << r.err;
  EXPECT_EQ(without_progress(r.err), "");
  return j;
}

void expect_number(const Json& j, const char* key) {
  ASSERT_TRUE(j.contains(key)) << key;
  EXPECT_TRUE(j[key].is_number() && j[key] >= 0) << key << " = " << j[key];
}

/// Bytes and counts are whole.
void expect_whole(const Json& j, const char* key) {
  ASSERT_TRUE(j.contains(key)) << key;
  EXPECT_TRUE(j[key].is_number_integer() && j[key] >= 0) << key << " = " << j[key];
}

void expect_prediction(const Json& j) {
  for (const char* key : {"step_time_s", "mfu", "hfu", "samples_per_s"}) expect_number(j, key);
  ASSERT_TRUE(j.contains("tokens_per_s_per_device"));
  EXPECT_TRUE(j["tokens_per_s_per_device"].is_number() || j["sequence"].is_null());
  ASSERT_TRUE(j.contains("interval_s"));
  EXPECT_TRUE(j["interval_s"].is_null() || j["interval_s"].size() == 2);
  EXPECT_TRUE(j.at("flop_convention").is_string());
  EXPECT_TRUE(j.at("fits").is_boolean());
  for (const char* key : {"peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes",
                          "peak_memory_bytes", "usable_memory_bytes", "devices"})
    expect_whole(j, key);
  EXPECT_EQ(j.at("peak_memory_bytes"), j.at("peak_allocated_bytes"));
  EXPECT_LE(j.at("peak_allocated_bytes"), j.at("peak_reserved_bytes"));
  EXPECT_LE(j.at("peak_reserved_bytes"), j.at("peak_device_bytes"));
  EXPECT_EQ(j.at("fits").get<bool>(), j.at("peak_device_bytes") <= j.at("usable_memory_bytes"));
  EXPECT_LT(j.at("mfu"), 1);

  ASSERT_TRUE(j.at("memory_bytes_by_stage").is_array());
  EXPECT_EQ(j["memory_bytes_by_stage"].size(), j.at("plan").at("pp"));
  std::int64_t largest = 0, number = 0;
  for (const Json& m : j["memory_bytes_by_stage"]) {
    EXPECT_EQ(m.at("stage"), number++);
    std::int64_t sum = 0;
    for (const char* category :
         {"parameters", "gradients", "optimizer", "activations", "workspace", "buffers"}) {
      expect_whole(m, category);
      sum += m.at(category).get<std::int64_t>();
    }
    EXPECT_EQ(m.at("total"), sum);
    largest = std::max(largest, m.at("total").get<std::int64_t>());
  }
  EXPECT_EQ(j.at("peak_allocated_bytes"), largest);

  const Json& b = j.at("breakdown_s");
  double total = 0;
  for (const char* group : {"compute", "exposed"}) {
    ASSERT_TRUE(b.at(group).is_object());
    for (const auto& [name, t] : b.at(group).items()) {
      EXPECT_TRUE(t.is_number() && t >= 0) << name;
      total += t.get<double>();
    }
  }
  for (const char* key : {"bubble", "optimizer", "other"}) {
    expect_number(b, key);
    total += b.at(key).get<double>();
  }
  const double step = j.at("step_time_s").get<double>();
  // Whole picoseconds sum exactly; what remains is the rounding of some dozen doubles.
  EXPECT_NEAR(total, step, 1e-13 * step);

  double share = 0;
  ASSERT_TRUE(j.at("rests_on").is_array() && !j["rests_on"].empty());
  for (const Json& r : j["rests_on"]) {
    EXPECT_TRUE(r.at("term").is_string() && r.at("kind").is_string());
    share += r.at("share").get<double>();
  }
  EXPECT_NEAR(share, 1, 1e-9);
  ASSERT_TRUE(j.at("assumed").is_array());
  for (const Json& a : j["assumed"]) EXPECT_TRUE(a.is_string());
}

TEST(Json, EveryCommandHasItButTheOneThatWritesFiles) {
  for (const char* command : {"model", "topo", "collective", "simulate", "plan", "whatif",
                              "compare", "reference", "startup", "run", "replay", "validate",
                              "validate rows", "validate published", "fit", "calibrate"}) {
    const std::string help = run(fmt::format("{} --help", command)).out;
    EXPECT_EQ(help.find("--json") == std::string::npos, command == std::string("calibrate"))
        << command;
  }
}

TEST(Json, ModelHasItsKeys) {
  const Json j = parsed(run("model llama-3-8b --json"));
  EXPECT_EQ(j.at("schema"), "partita.model_summary/1");
  EXPECT_EQ(j.at("parameters"), 8'030'261'248);
  for (const char* key : {"trainable_parameters", "layers", "sequence", "operators"})
    expect_whole(j, key);
  for (const char* key : {"forward", "backward_data", "backward_weight"})
    expect_number(j.at("flops_per_sample"), key);
}

TEST(Json, BackgroundThatIsNotCountedIsSaid) {
  const std::string command =
      "simulate gpt2 dgx-h100:2 --tp 4 --dp 4 --layers 2 --global-batch 4 --background "
      "'node0.nic0->rail0=40 GB/s' --json --network ";
  for (const char* network : {"idle", "beside", "flows"}) {
    const Json j = parsed(run(command + network));
    const bool said = j.at("assumed").dump().find("no background") != std::string::npos;
    EXPECT_EQ(said, network != std::string("flows")) << network;
  }
}

TEST(Json, TopologyHasItsKeys) {
  const Json j = parsed(run("topo dgx-h100:2 --json"));
  EXPECT_EQ(j.at("schema"), "partita.topology_summary/1");
  EXPECT_EQ(j.at("devices"), 16);
  EXPECT_EQ(j.at("nodes"), 2);
  for (const char* key : {"memory_bytes", "usable_memory_bytes"})
    expect_whole(j.at("device_profiles").at(0), key);
}

TEST(Json, CollectiveHasItsKeys) {
  const Json j = parsed(run("collective all-reduce dgx-a100-80gb --size 1MiB --json"));
  EXPECT_EQ(j.at("schema"), "partita.collective/1");
  EXPECT_EQ(j.at("collective"), "all_reduce");
  EXPECT_EQ(j.at("ranks").size(), 8u);
  EXPECT_EQ(j.at("payload_bytes"), 1 << 20);
  EXPECT_EQ(j.at("levels").size(), 1u);
  EXPECT_EQ(j.at("algorithms").size(), 5u);
  for (const Json& a : j.at("algorithms")) {
    for (const char* key : {"steps", "sent_bytes"}) expect_whole(a, key);
    for (const char* key : {"time_s", "bus_bandwidth_bytes_per_s", "busy"}) expect_number(a, key);
    EXPECT_TRUE(a.at("algorithm").is_string());
    EXPECT_TRUE(a.at("busiest_link").is_string());
    const Json& form = a.at("closed_form_s");
    ASSERT_EQ(form.size(), 2u);
    EXPECT_LE(form[0].get<double>(), a.at("time_s").get<double>());
    if (!form[1].is_null()) {
      EXPECT_GE(form[1].get<double>(), a.at("time_s").get<double>());
    }
  }
  EXPECT_EQ(j.at("left_out").size(), 2u);  // no switch that adds
  // One rank has nothing to do.
  const Json alone = parsed(run("collective all-reduce dgx-h100:1 --ranks 3 --json"));
  for (const Json& a : alone.at("algorithms")) {
    EXPECT_EQ(a.at("time_s"), 0);
    EXPECT_EQ(a.at("busiest_link"), nullptr);
  }
}

/// Plans that use every flag of a size or policy, on small networks.
const std::vector<std::string> kPlans{
    "gpt2 dgx-h100:1",
    "gpt2 dgx-h100:1 --tp 2 --pp 2 --global-batch 8 --sequence-parallel --zero 1",
    "gpt2 dgx-h100:1 --pp 2 --virtual-stages 3 --global-batch 16 --recompute full",
    "gpt2 dgx-h100:1 --pp 4 --schedule gpipe --global-batch 8 --recompute selective",
    "gpt2 dgx-h100:2 --cp 2 --tp 4 --global-batch 2 --micro-batch 1 --zero 3",
    "gpt2 dgx-h100:1 --zero 2 --framework pytorch-fsdp --precision fp16",
    "gpt2 dgx-h100:1 --lora '*query' --lora-rank 8 --global-batch 8",
    "gpt2 dgx-h100:1 --freeze 'layers.*' --pp 2 --global-batch 8 --cuts 8,4",
    "mixtral-8x7b dgx-h100:1 --layers 2 --ep 8 --zero 1",
    "resnet-50 dgx-h100:1 --global-batch 64",
    "mnist-linear cpu-host",
};

TEST(Json, AFrameworkThatShardsDoesUnlessToldOtherwise) {
  const auto peak = [](const std::string& flags) {
    const Ran r = run("simulate gpt2 dgx-h100:1 --layers 2 --global-batch 8 --json " + flags);
    const Json j = Json::parse(r.out, nullptr, false);
    EXPECT_FALSE(j.is_discarded()) << r.err;
    return j.at("peak_allocated_bytes").get<double>();
  };
  EXPECT_EQ(peak("--framework pytorch-fsdp"), peak("--framework pytorch-fsdp --zero 3"));
  EXPECT_GT(peak("--framework pytorch-fsdp --zero 0"), peak("--framework pytorch-fsdp"));
  EXPECT_EQ(peak(""), peak("--zero 0"));
  const Ran said =
      run("simulate gpt2 dgx-h100:1 --layers 2 --framework torchtitan --global-batch 8 "
          "--recompute selective");
  EXPECT_NE(said.out.find("ZeRO 3 of torchtitan"), std::string::npos) << said.out;
  EXPECT_NE(said.out.find("selective recompute as torchtitan"), std::string::npos) << said.out;
  // However it is said: on the command line, varied, in a plan file.
  const std::string small = "gpt2 dgx-h100:1 --layers 2 --framework torchtitan --global-batch 8 ";
  const auto step = [](const std::string& arguments) {
    const Ran r = run(arguments + " --json");
    return Json::parse(r.out).at("step_time_s").get<double>();
  };
  const double selective = step("simulate " + small + "--recompute selective");
  EXPECT_NE(selective, step("simulate " + small + "--recompute attention"));
  const std::string file = testing::TempDir() + "selective.yaml";
  std::ofstream(file) << "schema: partita.plan/1\nframework: torchtitan\ndp: 8\nzero: 3\n"
                         "global_batch: 8\nrecompute: selective\n";
  EXPECT_EQ(step("simulate gpt2 dgx-h100:1 --layers 2 --plan " + file), selective);
  const Ran varied = run("whatif " + small + "--vary plan.recompute=selective --json");
  EXPECT_NE(varied.out.find(fmt::format("{}", selective)), std::string::npos) << varied.out;
  const Ran none =
      run("simulate resnet-50 dgx-h100:1 --framework torchtitan --recompute selective", "", 2);
  EXPECT_NE(none.err.find("resnet-50 has nothing that torchtitan recomputes where it is selective"),
            std::string::npos)
      << none.err;
}

// docs/plan.md by hand: with the framework's defaults a prediction is that of a row of a table.
TEST(Json, FrameworkDefaultsAreWhatRowsHave) {
  const std::string file = testing::TempDir() + "defaults.csv";
  const auto of_row = [&](const std::string& cells) {
    std::ofstream(file)
        << "id,family,model,seq_len_tokens,gpu,num_gpus,framework,tp,pp,dp,"
           "micro_batch_per_dp_rank,global_batch_seqs,precision,iteration_time_s\n"
        << cells << "\n";
    const Ran r = run("validate rows " + file + " --json");
    return Json::parse(r.out).at("families")[0].at("predictions")[0].at("predicted").get<double>();
  };
  const auto of_command = [](const std::string& arguments) {
    const Ran r = run("simulate " + arguments + " --micro-batch 1 --network beside --json");
    return Json::parse(r.out);
  };
  const std::string fp8 =
      "llama-3-8b dgx-h100:2 --tp 4 --pp 2 --global-batch 16 --seq 8192 --precision fp8 "
      "--framework megatron-bridge";
  const Json defaults = of_command(fp8 + " --framework-defaults");
  EXPECT_EQ(defaults.at("step_time_s").get<double>(),
            of_row("a,f,Llama 3 8B,8192,H100,16,Megatron-Bridge,4,2,2,1,16,fp8,8"));
  EXPECT_NEAR(defaults.at("step_time_s").get<double>(), 0.84, 0.01);
  EXPECT_NEAR(of_command(fp8).at("step_time_s").get<double>(), 1.01, 0.01);
  EXPECT_NE(defaults.at("assumed").dump().find("recompute first:5 (of megatron-bridge)"),
            std::string::npos);
  // A flag says otherwise.
  EXPECT_EQ(of_command(fp8 + " --framework-defaults --recompute none")
                .at("assumed")
                .dump()
                .find("recompute"),
            std::string::npos);
  // So does any other way of saying it.
  const auto assumed = [&](const std::string& arguments) {
    const Ran r = run(arguments + " --framework-defaults --json");
    return r.out;
  };
  EXPECT_EQ(
      assumed("simulate " + fp8 + " --micro-batch 1 --set recompute=none").find("recompute first"),
      std::string::npos);
  EXPECT_EQ(assumed("whatif " + fp8 + " --vary plan.recompute=none,full").find("recompute first"),
            std::string::npos);
  const std::string graphs =
      "simulate llama-3-8b dgx-b200:1 --tp 4 --pp 2 --global-batch 8 "
      "--framework megatron-bridge";
  EXPECT_NE(assumed(graphs).find("graphs on"), std::string::npos);
  EXPECT_EQ(assumed(graphs + " --set launch.graphs=false").find("graphs on"), std::string::npos);
  EXPECT_EQ(of_command("gpt2 dgx-a100-80gb:1 --tp 2 --pp 2 --global-batch 16 --seq 1024 "
                       "--framework megatron-lm-2022 --precision fp16 --framework-defaults")
                .at("step_time_s")
                .get<double>(),
            of_row("b,f,gpt2,1024,A100 80GB,8,Megatron-LM,2,2,2,1,16,fp16,8"));
}

TEST(Json, EveryPredictionHasItsKeysAndSums) {
  for (const auto& plan : kPlans) {
    SCOPED_TRACE(plan);
    const Ran r = run("simulate " + plan + " --json");
    ASSERT_EQ(r.code, 0) << r.err;
    const Json j = parsed(r);
    EXPECT_EQ(j.at("schema"), "partita.prediction/1");
    expect_prediction(j);
  }
}

TEST(Json, WhatWasNotGivenIsListedAsAssumed) {
  const auto assumed = [](const std::string& flags) {
    return parsed(run("simulate gpt2 dgx-h100:1 --json " + flags)).at("assumed");
  };
  EXPECT_EQ(assumed(""),
            Json({"framework megatron-core", "precision bf16", "global batch 8", "sequence 1024"}));
  EXPECT_EQ(assumed("--framework partita --precision fp32"),
            Json({"global batch 8", "sequence 1024"}));
  EXPECT_EQ(
      assumed("--framework megatron-core --precision bf16 --global-batch 8 --sequence-length 64"),
      Json::array());
  // What no framework does beside a pipeline is said; what is asked of our own runtime is run.
  const std::string sharded =
      "--pp 2 --dp 4 --zero 2 --global-batch 16 --micro-batch 1 "
      "--precision bf16 --sequence-length 64 --framework ";
  EXPECT_EQ(
      assumed(sharded + "megatron-core"),
      Json({"ZeRO 2 scatters gradients for each micro-batch (frameworks keep them whole under "
            "a pipeline: --zero 1)"}));
  EXPECT_EQ(assumed(sharded + "partita"), Json::array());
  // A plan file gives too.
  TemporaryFolder folder;
  const std::string file = folder.path() + "/plan.yaml";
  write(file, "schema: partita.plan/1\nglobal_batch: 16\nprecision: fp16\n");
  EXPECT_EQ(assumed("--plan " + file),
            Json({"framework megatron-core", "sequence 1024", "micro-batch 1"}));
  EXPECT_EQ(parsed(run("simulate resnet-50 dgx-h100:1 --json")).at("assumed"),
            Json({"framework megatron-core", "precision bf16", "global batch 8"}));
}

TEST(Json, APlanThatDoesNotFitIsDoneAndSaysSo) {
  const Ran r = run("simulate llama-3.1-405b dgx-h100:1 --tp 8 --json");
  EXPECT_EQ(r.code, 0);
  const Json j = parsed(r);
  EXPECT_EQ(j.at("fits"), false);
  expect_prediction(j);
}

TEST(Json, SearchHasItsKeysAndItsCountsAddUp) {
  const Ran r = run("plan gpt2 dgx-h100:1 --layers 2 --seq 128 --global-batch 8 --top 4 --json");
  EXPECT_EQ(r.code, 0);
  const Json j = parsed(r);
  EXPECT_EQ(j.at("schema"), "partita.search/1");
  expect_number(j, "search_time_s");
  const Json& c = j.at("certificate");
  for (const char* key : {"space", "evaluated", "pruned_memory", "pruned_bound", "illegal"})
    expect_whole(c, key);
  EXPECT_EQ(c.at("space").get<int>(),
            c.at("evaluated").get<int>() + c.at("pruned_memory").get<int>() +
                c.at("pruned_bound").get<int>() + c.at("illegal").get<int>());
  ASSERT_EQ(j.at("plans").size(), 4u);
  EXPECT_FALSE(j.contains("smallest"));
  double before = 0;
  for (const Json& p : j["plans"]) {
    expect_prediction(p);
    EXPECT_EQ(p.at("fits"), true);
    EXPECT_GE(p.at("step_time_s"), before);
    before = p.at("step_time_s");
  }
}

TEST(Json, WhereNothingFitsTheSmallestIsShownAndTheCodeIs1) {
  const Ran r = run("plan llama-3.1-405b dgx-h100:1 --json");
  EXPECT_EQ(r.code, 1);
  const Json j = parsed(r);
  EXPECT_TRUE(j.at("plans").empty());
  ASSERT_TRUE(j.contains("smallest"));
  expect_prediction(j["smallest"]);
  EXPECT_EQ(j["smallest"].at("fits"), false);

  const Ran table = run("plan llama-3.1-405b dgx-h100:1");
  EXPECT_EQ(table.code, 1);
  EXPECT_NE(table.out.find("nothing fits; the smallest needs "), std::string::npos) << table.out;
  EXPECT_EQ(without_progress(table.err), "");
}

TEST(Json, TheSmallestIsOneOfThosePlansThatWereAskedFor) {
  // Whether the search drops all for their state alone, or prices one that does not fit.
  for (const char* asked : {"llama-3.1-405b dgx-h100:1 --tp 2 --pp 2 --zero 1 --recompute none",
                            "llama-3-70b dgx-h100:1 --tp 2 --pp 2 --zero 1 --recompute none"}) {
    const Ran r = run(std::string("plan ") + asked + " --micro-batch 2 --global-batch 16 --json");
    EXPECT_EQ(r.code, 1);
    const Json j = parsed(r);
    ASSERT_TRUE(j.contains("smallest"));
    const Json& p = j["smallest"].at("plan");
    EXPECT_EQ(p.at("tp"), 2);
    EXPECT_EQ(p.at("pp"), 2);
    EXPECT_EQ(p.at("dp"), 2);
    EXPECT_EQ(p.at("zero"), 1);
    EXPECT_EQ(p.at("micro_batch"), 2);
    EXPECT_EQ(p.at("recompute"), "none");
  }
}

TEST(Json, ConvolutionsInFp32SayThatPyTorchsAreNot) {
  const auto says = [](const std::string& job) {
    const Json j = parsed(run("simulate " + job + " --global-batch 64 --json"));
    for (const Json& a : j.at("assumed")) {
      if (a.get<std::string>().find("allow_tf32") != std::string::npos) return true;
    }
    return false;
  };
  EXPECT_TRUE(says("resnet-50 dgx-a100-80gb:1 --framework pytorch-ddp --precision fp32"));
  EXPECT_FALSE(says("resnet-50 dgx-a100-80gb:1 --framework pytorch-ddp --precision tf32"));
  EXPECT_FALSE(says("resnet-50 dgx-a100-80gb:1 --framework partita --precision fp32"));
  EXPECT_FALSE(says("resnet-50 dgx1-v100:1 --framework pytorch-ddp --precision fp32"));
  EXPECT_FALSE(says("gpt2 dgx-a100-80gb:1 --framework pytorch-ddp --precision fp32"));
}

TEST(Json, AttentionIsMaterialisedWhereNoFlashKernelRuns) {
  const auto of = [](const std::string& job) {
    const Json j = parsed(run("simulate gpt2 " + job + " --layers 2 --global-batch 8 --json"));
    std::string said;
    for (const Json& a : j.at("assumed")) {
      const auto text = a.get<std::string>();
      if (text.find("materialised") != std::string::npos) said = text;
    }
    return std::pair(said, j.at("peak_memory_bytes").get<double>());
  };
  const auto a100 = of("dgx-a100-40gb:1 --precision fp16"),
             v100 = of("dgx1-v100:1 --precision fp16"),
             wide = of("dgx-a100-40gb:1 --precision tf32"),
             sdpa = of("dgx1-v100:1 --precision fp16 --framework pytorch-fsdp"),
             ours = of("dgx1-v100:1 --precision fp16 --framework partita");
  EXPECT_EQ(a100.first, "");
  EXPECT_EQ(v100.first,
            "materialised attention: megatron-core's flash kernels need compute capability 80, not "
            "70");
  EXPECT_EQ(wide.first, "materialised attention: megatron-core has flash kernels of 16 bits");
  EXPECT_EQ(sdpa.first, "");
  EXPECT_EQ(ours.first, "");
  // Two layers' probabilities of a sample, 12 x 1024 x 1024 in 16 bits, at least, instead of
  // log-sum-exps.
  EXPECT_GE(v100.second - a100.second, 2 * 12 * 1024 * (1024 * 2 - 4));
}

TEST(Json, WhatAPatternOfAdaptersLeavesOutIsSaid) {
  const auto says = [](const std::string& pattern) {
    const Json j =
        parsed(run("simulate mixtral-8x7b dgx-h100:1 --layers 2 --ep 8 --global-batch 8 "
                   "--seq 256 --lora '" +
                   pattern + "' --json"));
    for (const Json& a : j.at("assumed")) {
      if (a.get<std::string>().find("no adapters of experts' products") == 0) return true;
    }
    return false;
  };
  EXPECT_TRUE(says("*.moe.*"));
  EXPECT_FALSE(says("*.attention.*"));
}

TEST(Json, WhereNoPlanIsLegalOneReasonIsShownAndTheCodeIs1) {
  const Ran r = run("plan mnist-linear dgx-h100:1 --global-batch 6 --json");
  EXPECT_EQ(r.code, 1);
  const Json j = parsed(r);
  EXPECT_TRUE(j.at("plans").empty());
  EXPECT_EQ(j.at("certificate").at("illegal"), j.at("certificate").at("space"));
  EXPECT_NE(j.at("example_illegal").get<std::string>().find("global batch 6"), std::string::npos);
}

TEST(Json, PlanSearchesOnlyWhatFlagsAndFileLeaveOpen) {
  const Ran r =
      run("plan gpt2 dgx-h100:1 --layers 2 --global-batch 8 --tp 2 --zero 1 --top 99 --json");
  const Json j = parsed(r);
  ASSERT_FALSE(j.at("plans").empty());
  for (const auto& p : j.at("plans")) {
    EXPECT_EQ(p.at("plan").at("tp"), 2);
    EXPECT_EQ(p.at("plan").at("zero"), 1);
  }
  const auto& c = j.at("certificate");
  EXPECT_EQ(c.at("space"), c.at("evaluated").get<int>() + c.at("pruned_memory").get<int>() +
                               c.at("pruned_bound").get<int>() + c.at("illegal").get<int>());
}

TEST(Json, ImportedClustersAndKeysInsideKeysVary) {
  const std::string matrix = std::string(PARTITA_TEST_DATA) + "/topologies/nvswitch-matrix.txt";
  std::vector<double> steps;
  for (const char* vary :
       {"device.memory_bandwidth=x1", "device.memory_bandwidth=x2",
        "'topology.nodes[*].links[kind=nvlink].bandwidth=x0.5'", "plan.optimizer.kind=sgd"}) {
    const Ran r = run("whatif gpt2 '" + matrix +
                      "?device=h100-sxm' --set launch.graphs=true --vary " + vary + " --json");
    EXPECT_EQ(r.code, 0) << r.err;
    steps.push_back(Json::parse(r.out).at("step_time_s").get<double>());
  }
  EXPECT_LT(steps[1], steps[0]);
  EXPECT_GT(steps[2], steps[0]);
  EXPECT_LT(steps[3], steps[0]);
}

TEST(Json, WhatifPrintsOneObjectALineAndCsvOneLineACombination) {
  const std::string vary = "whatif gpt2 dgx-h100:1 --vary plan.tp=1,2,8 --vary plan.zero=0,1";
  const Ran r = run(vary + " --json");
  EXPECT_EQ(r.code, 0);
  int lines = 0, impossible = 0;
  for (std::size_t at = 0, end; at < r.out.size(); at = end + 1, ++lines) {
    end = r.out.find('\n', at);
    const Json j = Json::parse(r.out.substr(at, end - at), nullptr, false);
    ASSERT_FALSE(j.is_discarded());
    EXPECT_TRUE(j.at("vary").at("plan.tp").is_string());
    if (j.contains("infeasible"))
      EXPECT_TRUE(++impossible && j["infeasible"].is_string());
    else
      expect_prediction(j);
  }
  EXPECT_EQ(lines, 6);
  EXPECT_EQ(impossible, 2);

  const Ran csv = run(vary + " --csv");
  EXPECT_EQ(std::count(csv.out.begin(), csv.out.end(), '\n'), 7);
  EXPECT_EQ(csv.out.substr(0, csv.out.find('\n')),
            "plan.tp,plan.zero,step_time_s,tokens_per_s_per_device,samples_per_s,mfu,"
            "peak_device_bytes,fits,note");
}

/// One column of whatif's CSV.
std::vector<std::string> column(const Ran& r, const std::string& name) {
  EXPECT_EQ(r.code, 0) << r.err;
  std::istringstream lines(r.out);
  const auto cells = [](const std::string& line) {
    std::vector<std::string> all;
    std::istringstream in(line);
    for (std::string cell; std::getline(in, cell, ',');) all.push_back(cell);
    return all;
  };
  std::string line;
  std::getline(lines, line);
  const auto head = cells(line);
  const auto at =
      static_cast<std::size_t>(std::find(head.begin(), head.end(), name) - head.begin());
  std::vector<std::string> found;
  while (std::getline(lines, line)) {
    const auto row = cells(line);
    found.push_back(at < row.size() ? row[at] : "");
  }
  return found;
}

TEST(Json, AVariedFrameworkIsThePlansWhereverItStands) {
  const std::string job = "llama-3-8b dgx-h100:1 --global-batch 8 ";
  const Json asked = parsed(run("simulate " + job + "--framework pytorch-fsdp --json"));
  const Json ddp = parsed(run("simulate " + job + "--framework pytorch-ddp --json"));
  const auto near = [](const std::string& cell, const Json& j) {
    EXPECT_NEAR(std::stod(cell) / j["step_time_s"].get<double>(), 1, 1e-4);
  };
  const auto steps = [&](const std::string& what) {
    return column(run("whatif " + job + what + " --csv"), "step_time_s");
  };
  const auto varied = steps("--vary plan.framework=pytorch-fsdp,pytorch-ddp");
  ASSERT_EQ(varied.size(), 2u);
  near(varied[0], asked);
  near(varied[1], ddp);
  // What a framework sets does not undo what stands before it.
  const auto first = steps("--vary 'plan.bucket=1 MiB' --vary plan.framework=pytorch-ddp"),
             last = steps("--vary plan.framework=pytorch-ddp --vary 'plan.bucket=1 MiB'");
  EXPECT_EQ(first, last);
  EXPECT_NE(first[0], varied[1]);
  const Json set =
      parsed(run("simulate " + job + "--set zero=1 --set framework=pytorch-fsdp --json"));
  EXPECT_EQ(set["plan"]["zero"], 1);
}

TEST(Json, VariedClustersKeepTheirNodesShape) {
  const auto steps = [](const std::string& what) {
    return column(run("whatif gpt2 " + what + " --global-batch 64 --csv"), "step_time_s");
  };
  EXPECT_EQ(steps("'dgx-h100:4 nodes of 2' --vary topology.nodes=4,x2"),
            (std::vector{steps("'dgx-h100:4 nodes of 2' --vary plan.tp=1")[0],
                         steps("'dgx-h100:8 nodes of 2' --vary plan.tp=1")[0]}));
  EXPECT_EQ(steps("dgx-h100:1 --vary topology.nodes=1,4 --vary topology=dgx-a100-80gb:2"),
            steps("dgx-h100:1 --vary topology=dgx-a100-80gb:2 --vary topology.nodes=1,4"));
  const Ran gpus = run("whatif gpt2 'dgx-h100:12 gpus' --vary topology.nodes=2");
  EXPECT_EQ(gpus.code, 2);
  EXPECT_NE(gpus.err.find("counts devices"), std::string::npos) << gpus.err;
  // A combination that is impossible costs its own row.
  const auto notes = column(run("whatif gpt2 dgx-h100:1 --global-batch 8 --csv --vary "
                                "topology=dgx-h100:1,cpu-host:2 --vary "
                                "'topology.nodes[0].links[kind=nvlink].bandwidth=25 GB/s'"),
                            "note");
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_EQ(notes[0], "");
  EXPECT_NE(notes[1], "");
}

TEST(Json, VariedMemoryIsUsableAndWhatNothingReadsIsSaid) {
  EXPECT_EQ(column(run("whatif llama-3-8b dgx-h100:2 --tp 2 --global-batch 64 --csv --vary "
                       "device.memory=x1,x2"),
                   "fits"),
            (std::vector<std::string>{"false", "true"}));
  EXPECT_EQ(
      run("whatif gpt2 dgx-h100:1 --vary device.memory=x2 --vary device.usable_memory=x2").code, 0);
  EXPECT_EQ(run("whatif gpt2 dgx-h100:1 --vary device.no_such_key=1,2").code, 2);
  const Ran latency =
      run("whatif gpt2 dgx-h100:1 --global-batch 8 --vary plan.tp=1,2 --vary "
          "'topology.nodes[0].links[kind=nvlink].latency=x1,1 ms'");
  EXPECT_NE(latency.out.find("latency changes neither time nor memory here"), std::string::npos);
  EXPECT_EQ(latency.out.find("plan.tp changes"), std::string::npos);
  const Ran twice = run("whatif gpt2 dgx-h100:1 --vary plan.tp=2,4 --vary plan.tp=8");
  EXPECT_EQ(twice.code, 2);
  EXPECT_NE(twice.err.find("given twice"), std::string::npos);
}

TEST(Json, WhatSetGivesIsFixedAndNotAssumed) {
  const Json j =
      parsed(run("plan gpt2 dgx-h100:1 --global-batch 64 --set tp=4 --set "
                 "micro_batch=2 --set recompute=full --set precision=fp16 --json"));
  ASSERT_FALSE(j["plans"].empty());
  for (const Json& p : j["plans"]) {
    EXPECT_EQ(p["plan"]["tp"], 4);
    EXPECT_EQ(p["plan"]["micro_batch"], 2);
    EXPECT_EQ(p["plan"]["recompute"], "full");
    for (const Json& a : p["assumed"])
      EXPECT_EQ(a.get<std::string>().find("precision"), std::string::npos) << a;
  }
  EXPECT_NE(run("reference mnist-linear --dp 4 --set micro_batch=8 --steps 1")
                .out.find("micro-batch 8 x 1"),
            std::string::npos);
}

TEST(Json, StartUpSaysWhatFitsAndNeedsNoStorageForWhatReadsNone) {
  const Json large = parsed(run("startup llama-3.1-405b dgx-h100:1 --json"));
  for (const Json& row : large["rows"]) EXPECT_EQ(row["fits"], false);
  const Json small = parsed(run("startup gpt2 dgx-h100:1 --json"));
  for (const Json& row : small["rows"]) EXPECT_EQ(row["fits"], true);
  const Json imported =
      parsed(run("startup gpt2 " PARTITA_TEST_DATA "/topologies/nvswitch.xml --dp 2 --json"));
  ASSERT_EQ(imported["rows"].size(), 2u);
  EXPECT_EQ(imported["rows"][1]["form"], "broadcast");
  ASSERT_EQ(imported["left_out"].size(), 1u);
}

TEST(Json, ReferenceHasItsKeys) {
  // What --set says of an optimizer counts as a plan file's word and a flag do.
  const auto by = [](const std::string& how) {
    return run("reference mnist-linear --dp 2 --steps 3 --json " + how).out;
  };
  EXPECT_EQ(by("--set optimizer.kind=adam"), by("--optimizer adam"));
  EXPECT_NE(by("--set optimizer.kind=adam"), by(""));
  const Ran r = run("reference mnist-linear --dp 4 --steps 2 --json");
  EXPECT_EQ(r.code, 0);
  const Json j = parsed(r);
  EXPECT_EQ(j.at("equal_to_reference"), true);
  EXPECT_EQ(j.at("ranks"), 4);
  EXPECT_EQ(j.at("loss").size(), 2u);
  EXPECT_EQ(j.at("serial_loss").size(), 2u);
  for (const char* key : {"gradient_error", "parameter_error", "tolerance"}) expect_number(j, key);
}

/// Microseconds with six digits: whole picoseconds.
std::int64_t picoseconds(const Json& microseconds) {
  return std::llround(microseconds.get<double>() * 1e6);
}

TEST(Trace, EventsOfAThreadDoNotOverlapAndLieWithinTheStep) {
  for (const auto& plan : kPlans) {
    SCOPED_TRACE(plan);
    TemporaryFolder folder;
    const std::string file = folder.path() + "/trace.json";
    const Ran r = run("simulate " + plan + " --json --trace " + file);
    ASSERT_EQ(r.code, 0) << r.err;
    const double step = parsed(r).at("step_time_s").get<double>();
    const Json j = Json::parse(read(file), nullptr, false);
    ASSERT_FALSE(j.is_discarded());
    std::map<std::pair<int, int>, std::vector<std::pair<std::int64_t, std::int64_t>>> threads;
    std::int64_t last = 0;
    for (const Json& e : j.at("traceEvents")) {
      ASSERT_TRUE(e.at("ph") == "X" || e.at("ph") == "M");
      if (e["ph"] == "M") continue;
      const std::int64_t start = picoseconds(e.at("ts")), end = start + picoseconds(e.at("dur"));
      EXPECT_GE(start, 0);
      threads[{e.at("pid"), e.at("tid")}].emplace_back(start, end);
      last = std::max(last, end);
      EXPECT_TRUE(e.at("name").is_string());
      EXPECT_TRUE(e.at("args").at("block").is_string());
      if (e.at("cat") == "contention") {
        // No more than the instruction took.
        EXPECT_GT(e.at("args").at("lost_us").get<double>(), 0);
        EXPECT_LE(e.at("args").at("lost_us").get<double>(), e.at("dur").get<double>() + 1e-6);
      }
    }
    EXPECT_EQ(last, std::llround(step * 1e12));
    int overlaps = 0;
    for (auto& [thread, events] : threads) {
      std::sort(events.begin(), events.end());
      for (std::size_t k = 1; k < events.size(); ++k)
        overlaps += events[k].first < events[k - 1].second;
    }
    EXPECT_EQ(overlaps, 0);
    EXPECT_FALSE(threads.empty());
  }
}

TEST(Trace, OfTheBestPlanIsWrittenByTheSearchAndItsPlanSaved) {
  TemporaryFolder folder;
  const std::string trace = folder.path() + "/trace.json", plan = folder.path() + "/plan.yaml";
  const Ran r = run("plan gpt2 dgx-h100:1 --layers 2 --seq 128 --global-batch 8 --json --trace " +
                    trace + " --save " + plan);
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_FALSE(Json::parse(read(trace), nullptr, false).is_discarded());
  // The saved plan predicts what the search said of it.
  const Json best = parsed(r).at("plans").at(0);
  const Json again =
      parsed(run("simulate gpt2 dgx-h100:1 --layers 2 --seq 128 --json --plan " + plan));
  EXPECT_EQ(again.at("step_time_s"), best.at("step_time_s"));
  EXPECT_EQ(again.at("peak_device_bytes"), best.at("peak_device_bytes"));
  EXPECT_EQ(again.at("plan"), best.at("plan"));
}

TEST(Json, APredictionsPlanIsAPlanFile) {
  TemporaryFolder folder;
  const std::string file = folder.path() + "/plan.yaml";
  for (const std::string given :
       {"--tp 2 --sequence-parallel --set overlap_tensor_parallel=true",
        "--dp 8 --zero 3 --set zero_group=4 --set reshard_after_forward=false",
        "--dp 8 --set offload.optimizer=true --set optimizer.clip=0 --set 'bucket=500 MiB'",
        "--tp 2 --pp 2 --framework megatron-core --recompute first:1",
        "--dp 8 --set 'precision={base: bf16, gradients: bf16}'", "--tp 2 --dp 4 --placement dp,tp",
        // What a framework does unless it is told otherwise.
        "--pp 2 --framework megatron-core --set launch.waits_for_messages=false",
        "--dp 8 --zero 3 --framework torchtitan --set stays_gathered=nothing",
        "--dp 8 --framework megatron-core --set joins_projections=false --set narrow_gathers=false",
        "--dp 8 --framework torchtitan --recompute full --set recompute_stops_early=false",
        "--dp 8 --framework megatron-core --set 'launch={kernel: 0 s, transfer: 0 s}'"}) {
    const std::string command = "simulate gpt2 dgx-h100:1 --layers 2 --seq 128 --json ";
    const Json said = parsed(run(command + given + " --global-batch 16"));
    Json plan = said.at("plan");
    plan.erase("micro_batches");
    Json text{{"schema", "partita.plan/1"}};
    text.update(plan);
    std::ofstream(file) << text.dump();
    const Json again = parsed(run(command + "--plan " + file));
    EXPECT_EQ(again.at("plan"), said.at("plan")) << given;
    EXPECT_EQ(again.at("step_time_s"), said.at("step_time_s")) << given;
    EXPECT_EQ(again.at("peak_device_bytes"), said.at("peak_device_bytes")) << given;
  }
}

/// Some machines that build without MPI have threads only.
std::vector<std::string> transports() {
  const Ran r = run("run mnist-linear --ranks 1 --transport mpi --steps 1");
  if (r.err.find("this build has no MPI") != std::string::npos) return {"threads", "tcp"};
  return {"threads", "tcp", "mpi"};
}

/// What validate and calibrate know.
std::vector<std::string> suite_transports() {
  auto all = transports();
  all.erase(std::find(all.begin(), all.end(), "tcp"));
  return all;
}

TEST(Run, TrainsTheFoundingExampleLikeTheSerialNetwork) {
  for (const std::string& transport : transports()) {
    const Ran r =
        run("run mnist-linear --dp 4 --ranks 4 --backend cpu --json --transport " + transport);
    EXPECT_EQ(r.code, 0) << r.err;
    const Json j = parsed(r);
    EXPECT_EQ(j.at("schema"), "partita.run/1");
    EXPECT_EQ(j.at("ranks"), 4);
    EXPECT_EQ(j.at("transport"), transport);
    ASSERT_EQ(j.at("loss").size(), 50u);
    EXPECT_TRUE(j.at("equal_to_serial").get<bool>());
    EXPECT_LT(j.at("loss").back().get<double>(), j.at("loss").front().get<double>() / 4)
        << "it learns";
    for (std::size_t k = 0; k < 50; ++k) {
      EXPECT_NEAR(j.at("loss")[k].get<double>(), j.at("serial_loss")[k].get<double>(),
                  j.at("tolerance").get<double>());
    }
    EXPECT_GT(j.at("measured_s").get<double>(), 0);
    EXPECT_GT(j.at("predicted_s").get<double>(), 0);
    for (const auto& [category, bytes] : j.at("memory_bytes").items())
      EXPECT_EQ(bytes.at("measured"), bytes.at("predicted")) << category;
  }
}

/// One rank of a large plan: its memory to the byte, its kernels in the whole step.
TEST(Replay, OneRankSpeaksForTheCluster) {
  const std::string small =
      "replay gpt2 dgx-h100:2 --seq 16 --vocabulary 64 --tp 2 --pp 2 --dp 4 "
      "--micro-batch 1 --global-batch 16 --precision bf16 --steps 2 --json";
  for (const auto& [rank, layers] : {std::pair{0, 2}, {15, 2}, {15, 4}}) {
    const Ran r = run(fmt::format("{} --rank {} --layers {}", small, rank, layers));
    EXPECT_EQ(r.code, 0) << r.err;
    const Json j = parsed(r);
    EXPECT_EQ(j.at("schema"), "partita.replay/1");
    EXPECT_EQ(j.at("rank"), rank);
    EXPECT_EQ(j.at("ranks"), 16);
    EXPECT_EQ(j.at("ranks_alike"), 8);
    EXPECT_EQ(j.at("layers"), layers);
    EXPECT_EQ(j.at("layers_of_model"), 12);
    for (const auto& [category, bytes] : j.at("memory_bytes").items()) {
      if (category == "reserved") continue;
      EXPECT_EQ(bytes.at("measured"), bytes.at("predicted")) << category;
    }
    EXPECT_GT(j.at("memory_bytes").at("total").at("measured").get<std::int64_t>(), 0);
    double sum = 0;
    std::int64_t forward = 0;
    for (const Json& k : j.at("kinds")) {
      sum += k.at("measured_s").get<double>();
      EXPECT_GT(k.at("predicted_s").get<double>(), 0) << k;
      if (k.at("kind") == "linear forward") forward = k.at("count").get<std::int64_t>();
    }
    const double compute = j.at("compute_s").at("measured").get<double>();
    EXPECT_NEAR(sum, compute, 1e-9 + 1e-6 * compute);
    // Query, key, value, output, two of the MLP; the head on the last stage. 4 micro-batches.
    EXPECT_EQ(forward, 4 * (6 * layers / 2 + (rank == 15 ? 1 : 0)));
    // The whole network has more layers than were run, on kernels that are slower here.
    EXPECT_GE(j.at("step_time_s").at("replayed").get<double>(), 0.9 * compute);
    EXPECT_GT(j.at("step_time_s").at("replayed").get<double>(), 0);
    EXPECT_GT(j.at("step_time_s").at("predicted").get<double>(), 0);
  }
}

/// What other ranks would send to its experts is given: as many rows as a balanced network has.
TEST(Replay, ARankWithExperts) {
  const std::string small =
      "replay ../tiny-moe.yaml dgx-h100:1 --dp 8 --ep 4 --micro-batch 1 --global-batch 16 --zero 1 "
      "--precision bf16 --steps 2 ";
  const Ran r = run(small + "--rank 5 --json");
  EXPECT_EQ(r.code, 0) << r.err;
  const Json j = parsed(r);
  EXPECT_EQ(j.at("routing"), "balanced");
  EXPECT_EQ(j.at("ranks_alike"), 8);
  for (const auto& [category, bytes] : j.at("memory_bytes").items()) {
    if (category == "reserved") continue;
    EXPECT_EQ(bytes.at("measured"), bytes.at("predicted")) << category;
  }
  bool products = false;
  for (const Json& k : j.at("kinds")) products |= k.at("kind") == "grouped_product weight";
  EXPECT_TRUE(products);
  EXPECT_NE(run(small).out.find("experts get the same number of rows each"), std::string::npos);
}

/// A row's network, cluster and plan are those of its prediction, and its step stands beside.
TEST(Replay, ARankOfAPublishedRun) {
  const Json rows = parsed(run("validate rows ../replayed-rows.csv --json"));
  const Json& row = rows.at("families")[0].at("predictions")[0];
  double whole = 0;
  for (const char* part : {"", " --micro-batches 2", " --micro-batches 4 --layers 2"}) {
    const Ran r = run(std::string("replay --row small-1 --data ../replayed-rows.csv --rank 7 "
                                  "--steps 2 --network beside --json") +
                      part);
    EXPECT_EQ(r.code, 0) << r.err;
    const Json j = parsed(r);
    EXPECT_EQ(j.at("model"), "small-1");
    EXPECT_EQ(j.at("ranks"), 8);
    const Json& p = j.at("published");
    EXPECT_EQ(p.at("framework"), "Megatron-LM");
    // Whoever replays it elsewhere should know.
    EXPECT_EQ(p.at("device"), "a100-sxm-80gb");
    EXPECT_EQ(p.at("step_s"), 0.05);
    EXPECT_EQ(p.at("predicted_s"), row.at("predicted"));
    EXPECT_EQ(p.at("assumed"), row.at("assumed"));
    EXPECT_EQ(j.at("micro_batches_of_plan"), 8);
    EXPECT_EQ(j.at("layers_of_model"), 4);
    // A part's kernels have the whole's shapes: what is predicted is the whole's.
    const double predicted = j.at("step_time_s").at("predicted");
    if (whole == 0) whole = predicted;
    EXPECT_EQ(predicted, whole);
    std::int64_t forward = 0;
    for (const Json& k : j.at("kinds")) {
      if (k.at("kind") == "linear forward") forward = k.at("count").get<std::int64_t>();
    }
    // Six of each layer, twice as all is recomputed, and the head.
    const auto n = j.at("micro_batches").get<std::int64_t>(),
               layers = j.at("layers").get<std::int64_t>();
    EXPECT_EQ(forward, n * (2 * 6 * layers / 2 + 1)) << part;
  }
}

/// A dozen plans over processes: what threads prove for hundreds, MPI and sockets carry out alike.
/// Whatever a framework keeps and fuses, what runs is our own.
TEST(Run, UnderAFrameworkItPredictsWhatItDoes) {
  for (const char* framework : {"megatron-core", "nemo", "torchtitan"}) {
    const Ran r = run(fmt::format(
        "run ../tiny.yaml --dp 2 --global-batch 4 --steps 1 --no-check --transport threads "
        "--framework {} --json",
        framework));
    ASSERT_EQ(r.code, 0) << r.err;
    const Json total = Json::parse(r.out).at("memory_bytes").at("total");
    EXPECT_EQ(total.at("measured"), total.at("predicted")) << framework;
  }
}

TEST(Run, GraphsThatAreNotCapturedAreSaid) {
  for (const auto& [set, why] :
       {std::pair{"graphs=true", "CUDA graphs are of --backend cuda"},
        {"graphs_beside_experts=true", "CUDA graphs of parts of a step are not captured"},
        {"graphs_of=\"*\"", "CUDA graphs of parts of a step are not captured"}}) {
    const Ran r = run(fmt::format("run mnist-linear --steps 1 --set 'launch.{}'", set));
    EXPECT_EQ(r.code, 0) << r.err;
    EXPECT_NE(r.out.find(why), std::string::npos) << r.out;
  }
  EXPECT_EQ(run("run mnist-linear --steps 1").out.find("CUDA graphs"), std::string::npos);
}

TEST(Run, PlansOverProcessesTrainLikeTheSerialNetwork) {
  const std::vector<std::string> plans{
      "tiny.yaml --dp 2 --zero 1",
      "tiny.yaml --dp 2 --zero 2 --global-batch 4",
      "tiny.yaml --dp 3 --zero 3",
      "tiny.yaml --tp 2 --sequence-parallel",
      "tiny.yaml --pp 2 --global-batch 4",
      "tiny.yaml --pp 2 --global-batch 4 --schedule zb-h1",
      "tiny.yaml --pp 2 --global-batch 4 --schedule dualpipe",
      "tiny.yaml --pp 2 --virtual-stages 2 --global-batch 4",
      "tiny.yaml --dp 3 --set compression=cast --global-batch 6",
      "tiny.yaml --dp 2 --set compression.kind=top_k --set compression.ratio=0.1",
      "tiny.yaml --dp 2 --set compression=power_sgd --set loss_scale=1024",
      "tiny.yaml --dp 2 --set compression=one_bit",
      "tiny.yaml --dp 2 --set servers=1 --set staleness=1",
      "tiny.yaml --pp 2 --set message_queue=true --global-batch 4",
      "tiny.yaml --dp 2 --set offload.optimizer=true --set offload.activations=true",
      "tiny.yaml --tp 2 --sequence-parallel --set overlap_tensor_parallel=true",
      "tiny.yaml --dp 2 --loader --set sharded_storage=true",
      "tiny.yaml --cp 2 --context-exchange ring",
      "tiny.yaml --cp 2 --context-exchange all_to_all",
      "tiny.yaml --dp 2 --tp 2 --loader --recompute full",
      "tiny.yaml --dp 2 --strategy dataparallel",
      "tiny-moe.yaml --dp 2 --ep 2",
      "tiny-moe.yaml --tp 2 --dp 2 --ep 4 --etp 1 --sequence-parallel"};
  for (const std::string& transport : transports()) {
    if (transport == "threads") continue;
    for (const std::string& plan : plans) {
      const Ran r = run("run ../" + plan + " --steps 2 --json --transport " + transport);
      EXPECT_EQ(r.code, 0) << plan << ": " << r.err;
      const Json j = Json::parse(r.out, nullptr, false);
      ASSERT_FALSE(j.is_discarded()) << plan << ": " << r.err;
      EXPECT_TRUE(j.at("equal_to_serial").get<bool>()) << plan;
      EXPECT_EQ(j.at("transport"), transport);
    }
  }
}

/// Random plans too: a dozen over MPI, three steps each.
TEST(Run, RandomPlansOverProcessesTrainLikeTheSerialNetwork) {
  TemporaryFolder folder;
  const std::string file = folder.path() + "/plan.yaml";
  const auto graph_of = [](const std::string& model) {
    return load_model(std::string(PARTITA_TEST_DATA) + "/cli/" + model);
  };
  const std::vector<std::string> models{"tiny.yaml", "tiny-moe.yaml"};
  const std::vector<Graph> graphs{graph_of(models[0]), graph_of(models[1])};
  std::mt19937 rng(20261127);
  for (const std::string& transport : transports()) {
    if (transport == "threads") continue;
    int runs = 0;
    for (int k = 0; k < 400 && runs < 12; ++k) {
      Plan p = random_plan(rng);
      set_precision(p, "fp32", "");
      // Choices that rounding may turn are the serial network's only in exact arithmetic.
      if (p.compression.kind == CompressionKind::top_k ||
          p.compression.kind == CompressionKind::one_bit)
        p.compression.kind = CompressionKind::cast;
      const std::size_t m = rng() % models.size();
      const auto complete_plan = complete(graphs[m], p);
      if (p.ranks() < 2 || p.ranks() > 6 || !complete_plan || !lower(graphs[m], *complete_plan))
        continue;
      const std::string text = to_yaml(*complete_plan);
      std::ofstream(file) << text;
      const Ran r = run("run ../" + models[m] + " --plan " + file +
                        " --steps 3 --json --transport " + transport);
      EXPECT_EQ(r.code, 0) << text << r.err;
      const Json j = Json::parse(r.out, nullptr, false);
      ASSERT_FALSE(j.is_discarded()) << text << r.err;
      EXPECT_TRUE(j.at("equal_to_serial").get<bool>()) << text;
      EXPECT_EQ(j.at("loss").size(), 3u);
      ++runs;
    }
    EXPECT_EQ(runs, 12) << transport;
  }
}

TEST(Run, WhatMpirunItselfCannotDoIsSaidAndIsNoWrongLoss) {
  if (transports().size() < 3) GTEST_SKIP() << "this build has no MPI";
  const Ran r = run("run ../tiny.yaml --dp 2 --steps 1 --transport mpi",
                    "env OMPI_MCA_plm=nonsense timeout 60");
  EXPECT_EQ(r.code, 3);
  EXPECT_EQ(r.out, "");
  EXPECT_EQ(r.err.rfind("partita: mpirun: ", 0), 0u) << r.err;
}

TEST(Run, StartUpOfDataAndModelParallelismSideBySide) {
  const Ran r = run("startup ../tiny.yaml 'cpu-host:2 devices' --measure --repeats 2 --json");
  EXPECT_EQ(r.code, 0) << r.err;
  const Json j = parsed(r);
  EXPECT_EQ(j.at("schema"), "partita.startup/1");
  EXPECT_EQ(j.at("rows").size(), 12u) << "four plans in three forms";
  for (const Json& row : j.at("rows")) {
    EXPECT_TRUE(row.at("equal").get<bool>()) << row.at("plan");
    EXPECT_GT(row.at("measured_s").get<double>(), 0);
    EXPECT_GT(row.at("predicted_s").get<double>(), 0);
    if (row.at("form") == "each") {
      EXPECT_EQ(row.at("sent_bytes"), 0);
    }
  }
}

TEST(Run, PipelinesTensorsAndShardsRunToo) {
  const std::string small = "--layers 2 --seq 16 --vocabulary 64 --steps 1 --json ";
  for (const std::string& transport : transports()) {
    for (const char* plan : {"--tp 2 --pp 2 --global-batch 4", "--cp 2 --zero 3 --tp 2"}) {
      const Ran r = run("run gpt2 " + small + plan + " --no-check --transport " + transport);
      EXPECT_EQ(r.code, 0) << plan << ": " << r.err;
      EXPECT_EQ(parsed(r).at("ranks"), 4) << plan;
    }
  }
}

TEST(Validate, AProfileThatIsThereStaysUntilTheNewOneIsComplete) {
  const TemporaryFolder folder;
  write(folder.path() + "/device.yaml", "precious");
  // Ended in the middle of its measurements.
  const Ran r =
      run("calibrate --backend cpu --rounds 1000 --out '" + folder.path() + "'", "timeout 1");
  EXPECT_EQ(r.code, 124);
  EXPECT_EQ(read(folder.path() + "/device.yaml"), "precious");
}

/// Units of a journal: its lines but the first, times left out.
std::vector<std::string> units_of(const std::string& file) {
  std::vector<std::string> all;
  std::istringstream lines(read(file));
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line)) {
    const Json j = Json::parse(line);
    std::string points;
    const Json kernels = j.value("kernels", Json::object());
    for (const auto& [kernel, list] : kernels.items())
      points += kernel + ":" + std::to_string(list.size()) + " ";
    const Json collectives = j.value("collectives", Json::object());
    for (const auto& [kind, list] : collectives.items())
      points += kind + ":" + std::to_string(list.size()) + " ";
    all.push_back(j.at("round").dump() + j.at("ranks").dump() + j.at("unit").dump() + points);
  }
  std::sort(all.begin(), all.end());
  return all;
}

/// Killed at random times and started again, calibration ends with the points of an uninterrupted
/// one, each measured once a round.
TEST(Validate, CalibrationGoesOnWhereItWasKilled) {
  std::mt19937 rng(20261124);
  for (const std::string& transport : suite_transports()) {
    const TemporaryFolder whole, pieces;
    const std::string command =
        "calibrate --backend cpu --ranks 2 --rounds 2 --steps 1 --only gpt --transport " +
        transport;
    const Ran once = run(command + " --out '" + whole.path() + "'", "", 6);
    ASSERT_EQ(once.code, 0) << once.err;
    int kills = 0;
    Ran r;
    for (int k = 0; k < 30; ++k) {
      // At once, then later and later, so that it is killed and ends on any machine.
      const double seconds = 0.05 + 0.02 * k * k + k * static_cast<double>(rng() % 1000) / 20000;
      r = run(command + " --out '" + pieces.path() + "'",
              fmt::format("timeout -s KILL {:.2f}", seconds));
      // The ranks of a killed launcher end a moment later, and may just have finished.
      const std::string journal = pieces.path() + "/journal.jsonl";
      [[maybe_unused]] const int waited =
          std::system(fmt::format("test ! -e '{0}' || flock -w 20 '{0}' true", journal).c_str());
      if (r.code == 0 || std::filesystem::exists(pieces.path() + "/measured.jsonl")) break;
      ++kills;
      EXPECT_FALSE(std::filesystem::exists(pieces.path() + "/cluster.yaml"));
    }
    EXPECT_TRUE(r.code == 0 || r.code == 137) << r.code << r.err;
    EXPECT_GT(kills, 0);
    EXPECT_EQ(units_of(pieces.path() + "/measured.jsonl"),
              units_of(whole.path() + "/measured.jsonl"));
    EXPECT_FALSE(std::filesystem::exists(pieces.path() + "/journal.jsonl"));
    expect_nobody_left(pieces.path());
    const Ran uses = run("simulate gpt2 '" + pieces.path() +
                         "/cluster.yaml' --layers 2 --seq 16 --framework partita --precision fp32");
    EXPECT_EQ(uses.code, 0) << uses.err;
  }
}

/// Kernels beside transfers on two ranks: figures of every pair, in a profile that predictions use.
TEST(Validate, CalibrationMeasuresKernelsBesideTransfers) {
  for (const std::string& transport : suite_transports()) {
    const TemporaryFolder folder;
    const Ran r =
        run("calibrate --backend cpu --ranks 2 --rounds 1 --steps 2 --only 'kernels beside' "
            "--transport " +
                transport + " --out '" + folder.path() + "'",
            "", 6);
    ASSERT_EQ(r.code, 0) << r.err;
    EXPECT_NE(r.out.find("all_reduce of 256 KiB, 2 ranks"), std::string::npos) << r.out;
    std::string device = read(folder.path() + "/device.yaml");
    const std::regex point(
        "kernel: (product|attention|memory), beside: ([a-z_]+), ranks: 2, bytes: 262144 B, "
        "of_kernel: ([0-9.]+), of_transfer: ([0-9.]+), ");
    std::set<std::string> pairs;
    for (std::sregex_iterator it(device.begin(), device.end(), point), end; it != end; ++it) {
      pairs.insert((*it)[1].str() + " " + (*it)[2].str());
      EXPECT_GE(std::stod((*it)[3]), 1);
      EXPECT_GE(std::stod((*it)[4]), 1);
    }
    EXPECT_EQ(pairs.size(), 12u) << device;
    // A host's ranks do one thing after the other: nothing is beside anything.
    const auto step = [&](const std::string& text, const std::string& network) {
      write(folder.path() + "/device.yaml", text);
      const Ran s = run("simulate gpt2 '" + folder.path() +
                        "/cluster.yaml' --layers 2 --seq 64 --dp 2 --framework partita --precision "
                        "fp32 --global-batch 4 --json --network " +
                        network);
      EXPECT_EQ(s.code, 0) << s.err;
      return parsed(s).at("step_time_s").get<double>();
    };
    const auto all = [&](const std::string& of_kernel, const std::string& of_transfer) {
      return std::regex_replace(device, std::regex("of_kernel: [0-9.]+, of_transfer: [0-9.]+"),
                                "of_kernel: " + of_kernel + ", of_transfer: " + of_transfer);
    };
    EXPECT_EQ(step(all("3", "3"), "flows"), step(device, "idle"));
    // On a device that does, they count.
    device =
        std::regex_replace(device, std::regex("concurrent_streams: false\nhost_cores: .*\n"), "");
    for (const char* network : {"beside", "flows"}) {
      const double alone = step(all("1", "1"), network);
      EXPECT_DOUBLE_EQ(alone, step(device, "idle")) << network;
      EXPECT_LT(alone, step(all("3", "1"), network)) << network;
      EXPECT_LT(alone, step(all("1", "3"), network)) << network;
      EXPECT_GE(step(device, network), alone) << network;
    }
  }
}

TEST(Validate, AnotherCalibrationsJournalIsRefused) {
  const TemporaryFolder folder;
  const std::string file = folder.path() + "/journal.jsonl";
  const std::string command =
      "calibrate --backend cpu --ranks 1 --rounds 1 --steps 1 --out '" + folder.path() + "'";
  const Ran first = run(command, "timeout -s KILL 0.5");
  ASSERT_TRUE(std::filesystem::exists(file)) << first.err;
  const Ran steps =
      run("calibrate --backend cpu --ranks 1 --steps 2 --out '" + folder.path() + "'");
  EXPECT_EQ(steps.code, 2);
  EXPECT_TRUE(std::regex_search(
      steps.err, std::regex("was measured with partita 0.1.0 \\(build [0-9a-f]{8}\\), ranks 1 as "
                            "threads, 1 steps, now it is")))
      << steps.err;
  EXPECT_NE(steps.err.find("remove " + file + " to begin anew"), std::string::npos) << steps.err;
  std::string text = read(file);
  text.replace(text.find("\"host\":\"") + 8, 0, "elsewhere-");
  write(file, text);
  const Ran host = run(command);
  EXPECT_EQ(host.code, 2);
  EXPECT_NE(host.err.find("was measured on elsewhere-"), std::string::npos) << host.err;
  write(file, "not ours\n");
  const Ran broken = run(command);
  EXPECT_EQ(broken.code, 2);
  EXPECT_NE(broken.err.find("journal.jsonl:1 is damaged; remove"), std::string::npos) << broken.err;
  EXPECT_EQ(read(file), "not ours\n");
}

TEST(Validate, RowsThatCrossAreCountedAlikeOnEveryTransport) {
  for (const std::string& transport : suite_transports()) {
    const Ran r =
        run("validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only spatial --calibrate-only "
            "images --json --transport " +
                transport,
            "", 6);
    const Json j = Json::parse(r.out, nullptr, false);
    ASSERT_FALSE(j.is_discarded()) << r.err;
    ASSERT_EQ(j.at("suite").at("cases").size(), 1u);
    const Json& only = j.at("suite").at("cases")[0];
    ASSERT_TRUE(only.contains("same_program")) << transport << only.dump() << r.err;
    EXPECT_EQ(only.at("same_program").at("traffic"), true) << transport;
  }
}

TEST(Validate, RunsItsSuiteBesideItsPredictions) {
  for (const std::string& transport : suite_transports()) {
    // Times are this machine's affair: only mathematics, memory and schema are asserted.
    const Ran r =
        run("validate --backend cpu --ranks 1,2 --rounds 1 --steps 1 --only 'ep 2' --json "
            "--transport " +
                transport,
            "", 15);
    EXPECT_TRUE(r.code == 0 || r.code == 1) << r.code << r.err;
    const Json j = Json::parse(r.out, nullptr, false);
    ASSERT_FALSE(j.is_discarded()) << r.err;
    EXPECT_EQ(j.at("schema"), "partita.validation/1");
    EXPECT_EQ(j.at("transport"), transport);
    const auto& cases = j.at("suite").at("cases");
    ASSERT_EQ(cases.size(), 1u);
    for (const auto& c : cases) {
      EXPECT_TRUE(c.at("equal_to_reference").get<bool>());
      EXPECT_GT(c.at("predicted_s").get<double>(), 0);
      EXPECT_GT(c.at("measured_s").get<double>(), 0);
      EXPECT_GE(c.at("noise").get<double>(), 0);
      EXPECT_EQ(c.at("memory_error").get<double>(), 0);
      for (const char* held : {"parameters", "gradients", "optimizer", "activations"}) {
        const Json& m = c.at("memory_at_peak_bytes").at(held);
        EXPECT_GT(m.at("measured"), 0) << held;
        EXPECT_EQ(m.at("measured"), m.at("predicted")) << held;
      }
      // Rows of experts are fed back: all counts are known, and equal.
      for (const char* what : {"instructions", "traffic", "memory"})
        EXPECT_EQ(c.at("same_program").at(what), true) << what << ", " << transport;
    }
    EXPECT_TRUE(j.at("suite").at("kendall_tau").is_null()) << "of one case";
    EXPECT_TRUE(j.at("suite").at("orders").empty());
    ASSERT_EQ(j.at("suite").at("groups").size(), 1u);
    EXPECT_EQ(j.at("suite").at("groups")[0].at("name"), "1 and 2 ranks");
    EXPECT_GE(j.at("suite").at("groups")[0].at("baseline").get<double>(), 0);
  }
}

/// Whose times a profile is for is said: rows without an entry have the catalogue's prices.
TEST(Validate, RowsSayWhichOfThemTookTheProfile) {
  const TemporaryFolder folder;
  const std::string csv = folder.path() + "/mine.csv", fit = folder.path() + "/mine.fit";
  std::string text =
      "id,model,gpu,gpu_memory_gb,num_gpus,framework,dp,micro_batch_per_dp_rank,global_batch_seqs,"
      "seq_len_tokens,precision,iteration_time_s,tokens_per_s_per_gpu,status\n";
  const auto add = [&](const char* id, const char* gpu, int micro, double s) {
    text +=
        fmt::format("{},gpt2,{},80,8,Megatron-Core,8,{},64,1024,bf16,{},,ok\n", id, gpu, micro, s);
  };
  add("a", "H100", 1, 0.2), add("b", "H100", 2, 0.15), add("c", "H100", 4, 0.14);
  add("d", "A100", 1, 0.3);
  write(csv, text);
  const Ran fitted = run("fit '" + csv + "' --out '" + fit + "'");
  ASSERT_EQ(fitted.code, 0) << fitted.err;
  EXPECT_NE(fitted.out.find("not fitted: 1 row of a device"), std::string::npos) << fitted.out;
  const Ran table = run("validate rows '" + csv + "' --profile '" + fit + "'");
  EXPECT_NE(table.out.find(fit + ": 3 of 4 times by its entries; none for a100-sxm-80gb with "
                                 "megatron-core, there prices are the catalogue's\n"),
            std::string::npos)
      << table.out;
  const auto j = parsed(run("validate rows '" + csv + "' --profile '" + fit + "' --json"));
  EXPECT_EQ(j.at("profile"), (Json{{"file", fit}, {"fitted", 3}, {"not_fitted", 1}}));
  EXPECT_FALSE(parsed(run("validate rows '" + csv + "' --json")).contains("profile"));
}

/// The prediction's terms are of the trace's rank: the first stage looks words up, the last has the
/// loss; a stage that ends early waits in the bubble, and all sum to the step.
TEST(Compare, TermsAreOfTheTracesRank) {
  const auto terms = [](const std::string& rank) {
    const Json j =
        parsed(run("compare gpt2 dgx-h100:1 --layers 4 --pp 2 --dp 4 --global-batch 8 "
                   "--measured '" PARTITA_TEST_DATA "/cli/trace.json' --json --rank " +
                   rank));
    EXPECT_EQ(std::to_string(j.at("rank").get<int>()), rank);
    double sum = 0;
    std::set<std::string> kinds;
    for (const Json& g : j.at("groups"))
      if (!g.at("predicted_s").is_null()) sum += g.at("predicted_s").get<double>();
    for (const Json& t : j.at("terms"))
      if (!t.at("predicted_s").is_null()) kinds.insert(t.at("kind").get<std::string>());
    EXPECT_NEAR(sum, j.at("predicted_s").get<double>(), 1e-9);
    return kinds;
  };
  const auto first = terms("0"), last = terms("7");
  EXPECT_TRUE(first.contains("embedding"));
  EXPECT_FALSE(first.contains("cross_entropy"));
  EXPECT_TRUE(last.contains("cross_entropy"));
  EXPECT_FALSE(last.contains("embedding"));
}

/// Given rows are not those that ran: nothing is compared with them, and nothing is called equal.
TEST(Validate, AnUncalibratedTermCostsThePredictionNotTheMathematics) {
  const Ran r = run(
      "validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only 'sharded storage' "
      "--calibrate-only collectives --json",
      "", 6);
  const Json j = Json::parse(r.out, nullptr, false);
  ASSERT_FALSE(j.is_discarded()) << r.err;
  const Json& c = j.at("suite").at("cases").at(0);
  EXPECT_EQ(c.at("equal_to_reference"), true);
  EXPECT_TRUE(c.at("predicted_s").is_null()) << c.dump();
  EXPECT_NE(r.err.find("has no prediction: storage: "), std::string::npos) << r.err;
}

TEST(Validate, WhatIsNotComparedIsNotCalledEqual) {
  const Ran r =
      run("validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only 'ep 2' --calibrate-only "
          "mixtral "
          "--routing zipf:1 --json",
          "", 6);
  const Json j = Json::parse(r.out, nullptr, false);
  ASSERT_FALSE(j.is_discarded()) << r.err;
  const Json& c = j.at("suite").at("cases").at(0);
  EXPECT_TRUE(c.at("same_program").is_null());
  EXPECT_EQ(c.at("equal_to_reference"), true);
  // Memory of other rows differs, and is no reason to fail: only a bound is.
  EXPECT_NE(c.at("memory_error"), 0);
  const Json& held = c.at("memory_at_peak_bytes");
  EXPECT_EQ(held.at("parameters").at("measured"), held.at("parameters").at("predicted"));
  EXPECT_NE(held.at("activations").at("measured"), held.at("activations").at("predicted"));
  const Ran table =
      run("validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only 'ep 2' --calibrate-only "
          "mixtral --routing zipf:1",
          "", 6);
  EXPECT_NE(table.out.find(": at its peak activations "), std::string::npos) << table.out;
  EXPECT_NE(table.out.find(" measured, "), std::string::npos);
  const Json& g = j.at("suite").at("groups").at(0);
  EXPECT_EQ(r.code, g.at("mean_error") > g.at("bound") ? 1 : 0);
}

}  // namespace
}  // namespace partita::test
