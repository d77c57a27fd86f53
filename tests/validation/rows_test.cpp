// Rows of published tables: how one becomes a network, a cluster and a plan, and what always holds
// of their predictions.
#include "validation/rows.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "base/error.h"
#include "base/yaml.h"
#include "simulator/cost/nccl_time.h"
#include "simulator/search/predict.h"
#include "validation/fit_rows.h"
#include "validation/published.h"
#include "validation/row_case.h"
#include "validation/row_kernels.h"
#include "validation/row_settings.h"
#include "validation/statistics.h"

namespace partita::validation {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using ::testing::ThrowsMessage;

const Catalogue& catalogue() {
  static const Catalogue c = load_catalogue();
  return c;
}

using Cells = std::map<std::string, std::string>;

const std::vector<std::string> kTraining{"id",
                                         "family",
                                         "model",
                                         "params_billion",
                                         "num_layers",
                                         "hidden_size",
                                         "num_heads",
                                         "num_kv_heads",
                                         "ffn_hidden_size",
                                         "vocab_size",
                                         "num_experts",
                                         "moe_topk",
                                         "moe_ffn_hidden_size",
                                         "seq_len_tokens",
                                         "gpu",
                                         "gpu_memory_gb",
                                         "num_gpus",
                                         "gpus_per_node",
                                         "intra_node_interconnect",
                                         "inter_node_interconnect",
                                         "framework",
                                         "tp",
                                         "sequence_parallel",
                                         "pp",
                                         "virtual_stages_per_gpu",
                                         "cp",
                                         "ep",
                                         "etp",
                                         "dp",
                                         "zero_or_fsdp",
                                         "micro_batch_per_dp_rank",
                                         "global_batch_seqs",
                                         "recompute",
                                         "precision",
                                         "attention_kernel",
                                         "overlap_and_other_settings",
                                         "iteration_time_s",
                                         "tokens_per_s_per_gpu",
                                         "samples_per_s_total",
                                         "tflops_per_gpu",
                                         "mfu_pct",
                                         "hfu_pct",
                                         "flop_formula",
                                         "peak_mem_per_gpu_gib",
                                         "peak_mem_definition",
                                         "status",
                                         "from_memory",
                                         "source",
                                         "notes"};

CsvTable table(const std::vector<std::string>& header, const std::vector<Cells>& rows) {
  CsvTable t;
  t.file = "f.csv";
  t.header = header;
  for (const Cells& cells : rows) {
    CsvTable::Record r;
    r.line = static_cast<int>(t.records.size()) + 2;
    for (const auto& column : header) {
      const auto found = cells.find(column);
      r.fields.push_back(found == cells.end() ? "" : found->second);
    }
    t.records.push_back(r);
  }
  return t;
}

/// An invented row, every setting printed.
Cells whole_row() {
  return {{"id", "x"},
          {"family", "invented"},
          {"model", "Llama 3 8B"},
          {"num_layers", "4"},
          {"vocab_size", "128256"},
          {"seq_len_tokens", "4096"},
          {"gpu", "H100"},
          {"gpu_memory_gb", "80"},
          {"num_gpus", "16"},
          {"gpus_per_node", "8"},
          {"inter_node_interconnect", "400 Gb/s per GPU"},
          {"framework", "Megatron-Core"},
          {"tp", "2"},
          {"sequence_parallel", "on"},
          {"pp", "2"},
          {"virtual_stages_per_gpu", "1"},
          {"cp", "1"},
          {"dp", "4"},
          {"zero_or_fsdp", "ZeRO-1"},
          {"micro_batch_per_dp_rank", "1"},
          {"global_batch_seqs", "16"},
          {"recompute", "none"},
          {"precision", "bf16"},
          {"attention_kernel", "flash"},
          {"iteration_time_s", "0.5"},
          {"status", "ok"},
          {"from_memory", "no"}};
}

Cells with(Cells cells, const Cells& changes) {
  for (const auto& [column, value] : changes) cells[column] = value;
  return cells;
}

/// A network by its name alone, on one rank a replica.
Cells only_named(const std::string& model) {
  return {{"model", model},     {"num_layers", ""},
          {"hidden_size", ""},  {"num_heads", ""},
          {"num_kv_heads", ""}, {"ffn_hidden_size", ""},
          {"vocab_size", ""},   {"params_billion", ""},
          {"tp", "1"},          {"dp", ""},
          {"pp", "1"}};
}

RowCase case_with(const Cells& changes) {
  const CsvTable t = table(kTraining, {with(whole_row(), changes)});
  return case_of(RowSchema::training, Configuration(RowSchema::training, Row(t, 0)), catalogue());
}

/// Why a row is uncovered; "" where it is not.
std::string why(const Cells& changes) {
  try {
    case_with(changes);
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

TEST(Rows, ARowsRunIsThatOfItsPrediction) {
  const CsvTable t =
      table(kTraining, {with(whole_row(), {{"id", "a-1"}}),
                        with(whole_row(), {{"id", "a-12"}, {"tp", "4"}, {"dp", "2"}})});
  const auto run = [&](const std::string& id) { return run_of_row({t}, id, catalogue(), {}); };
  // The id itself goes before ids that it is a part of.
  EXPECT_EQ(run("a-1").row_case.plan.tp, 2);
  EXPECT_EQ(run("12").row_case.plan.tp, 4);
  EXPECT_DOUBLE_EQ(run("12").published.count, 0.5);
  EXPECT_EQ(run("12").quantity, "iteration_time_s");
  const auto families = predict_rows({t}, catalogue(), {});
  for (const Figure& f : families.at(0).figures) {
    if (f.kind != Figure::Kind::time) continue;
    EXPECT_EQ(run(f.id).predicted.count, f.predicted);
  }
  EXPECT_EQ(graph_of(run("12").row_case, 2).layers, 2);
  EXPECT_EQ(graph_of(run("12").row_case).layers, 4);
  EXPECT_THAT([&] { run("a-"); }, ThrowsMessage<InputError>(HasSubstr("2 rows: a-1, a-12")));
  EXPECT_THAT([&] { run("b"); }, ThrowsMessage<InputError>(HasSubstr("no row")));
  const CsvTable unknown = table(kTraining, {with(whole_row(), {{"gpu", "Z1"}})});
  EXPECT_THAT([&] { run_of_row({unknown}, "x", catalogue(), {}); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("--row: x: "), HasSubstr("Z1"))));
}

TEST(RowCase, WhatIsPrintedIsTaken) {
  const RowCase c = case_with({});
  EXPECT_EQ(c.model, "llama-3-8b");
  ASSERT_TRUE(c.transformer.has_value());
  EXPECT_EQ(c.transformer->layers, 4);
  EXPECT_EQ(c.transformer->hidden, 4096);  // of the entry, whose architecture the name says
  EXPECT_EQ(c.transformer->kv_heads, 8);
  EXPECT_EQ(c.transformer->sequence, 4096);
  EXPECT_TRUE(c.transformer->flash_attention);
  for (const char* none : {"no flash", "without flash attention", "fused scaled softmax", "eager"})
    EXPECT_FALSE(case_with({{"attention_kernel", none}}).transformer->flash_attention) << none;
  EXPECT_EQ(c.cluster.topology, "dgx-h100:16 gpus");
  EXPECT_EQ(c.plan.tp, 2);
  EXPECT_EQ(c.plan.pp, 2);
  EXPECT_EQ(c.plan.dp, 4);
  EXPECT_EQ(c.plan.zero, 1);
  EXPECT_EQ(c.plan.micro_batches(), 4);
  EXPECT_TRUE(c.plan.sequence_parallel);
  EXPECT_EQ(c.plan.framework, "megatron-core");
  // The one thing that no column has.
  EXPECT_THAT(c.assumed, ::testing::ElementsAre("gradient overlap on"));
}

TEST(RowCase, ASizeInAnEntrysOwnNamesIsItsOwn) {
  const auto of = [](const char* model, const char* billions) {
    return case_with(
        {{"model", model}, {"params_billion", billions}, {"num_layers", ""}, {"vocab_size", ""}});
  };
  // 1.24 billion parameters, so more than 15 % from its name's; 109 billion, of which 17 are
  // active.
  for (const char* model : {"Llama-3.2-1B", "Llama-4-Scout-17B-16E"}) {
    const RowCase c = of(model, "");
    EXPECT_THAT(c.assumed, Not(Contains(HasSubstr("kind of block")))) << model;
  }
  EXPECT_EQ(of("Llama-3.2-1B", "").transformer->hidden, 2048);
  EXPECT_EQ(of("Llama-4-Scout-17B-16E", "").transformer->hidden, 5120);
  EXPECT_THAT(of("Llama-3.2-1B", "2").assumed, Contains(HasSubstr("kind of block")));
  EXPECT_THROW(of("Llama-4-Scout", "30"), InputError);
}

TEST(RowCase, TheNetworkOfTheTextIsPutOnTheClustersCards) {
  const auto node = [](const char* text) {
    const RowCase c = case_with({{"inter_node_interconnect", text}});
    const Topology t = load_topology(c.cluster.topology, c.cluster.edits);
    double sum = 0;
    for (std::size_t v = 0; v < t.link_count(); ++v) {
      const Link l = t.link(LinkId{v});
      if (l.kind == LinkKind::network && t.vertex_kind(l.from) == VertexKind::nic &&
          t.node_of_vertex(l.from) == 0)
        sum += l.bandwidth.count;
    }
    return sum;
  };
  EXPECT_DOUBLE_EQ(node("400 Gb/s per GPU"), 400e9);
  EXPECT_DOUBLE_EQ(node("4x Omni-Path 100 Gb/s per node"), 50e9);
  EXPECT_DOUBLE_EQ(node("8x200 Gb/s HDR"), 200e9);
  EXPECT_DOUBLE_EQ(node("a network of its own"), 400e9);  // the cluster's
}

TEST(RowCase, DevicesByNameMemoryAndSlot) {
  struct Case {
    const char *gpu, *memory, *intra, *device;
  };
  for (const Case& c : {Case{"A100", "80", "", "a100-sxm-80gb"},
                        {"A100", "40", "", "a100-sxm-40gb"},
                        {"A100 (Ampere)", "", "", "a100-sxm-80gb"},
                        {"A100 PCIe 80GB", "", "", "a100-pcie-80gb"},
                        {"A100", "40", "PCIe Gen4", "a100-pcie-40gb"},
                        {"H100 (sm_90)", "", "", "h100-sxm"},
                        {"NVIDIA H100 SXM", "", "", "h100-sxm"},
                        {"H100", "81559", "", "h100-sxm"},
                        {"NVIDIA GB200 SXM", "", "", "gb200"},
                        {"V100", "32", "", "v100-sxm-32gb"},
                        {"V100", "16", "", "v100-sxm-16gb"},
                        {"B200 SXM", "", "", "b200"},
                        {"GB300", "", "", "gb300"},
                        {"H200 (printed; README says B200)", "", "", "h200-sxm"},
                        {"Tesla V100", "32", "", "v100-sxm-32gb"},
                        {"DGX-H100", "", "", "h100-sxm"},
                        {"HGX H100", "80", "", "h100-sxm"},
                        {"8x H100", "", "", "h100-sxm"},
                        {"8 x H100 SXM5 80GB", "", "", "h100-sxm"},
                        {"H100 (96GB HBM2e, 500W)", "", "", "h100-sxm-96gb-hbm2e"},
                        {"H100", "96", "", "h100-sxm-96gb-hbm2e"},
                        {"H100 96GB HBM2e 500W", "", "", "h100-sxm-96gb-hbm2e"},
                        {"NVIDIA H100-96GB-HBM2e", "", "", "h100-sxm-96gb-hbm2e"},
                        {"NVIDIA H100 80GB HBM3", "", "", "h100-sxm"},
                        {"DGX-GB200", "", "", "gb200"},
                        {"GB200 NVL72", "", "", "gb200"},
                        {"H200 141GB", "", "", "h200-sxm"},
                        {"B200 192GB", "", "", "b200"},
                        {"A100 80 GB", "", "", "a100-sxm-80gb"},
                        {"A100-40G", "", "", "a100-sxm-40gb"},
                        {"A100", "40 GB", "", "a100-sxm-40gb"},
                        {"V100-SXM3-32GB", "", "", "v100-sxm-32gb"},
                        {"A100-SXM4-40GB", "", "", "a100-sxm-40gb"},
                        {"A100-PCIE-40GB", "", "", "a100-pcie-40gb"}})
    EXPECT_EQ(device_of(catalogue(), c.gpu, c.memory, c.intra).name, c.device) << c.gpu;
  for (const char* unknown :
       {"TPU v4", "H900", "Intel Gaudi 2", "L40S", "10", "A1", "H100 NVL", "80GB"})
    EXPECT_THROW(device_of(catalogue(), unknown, "", ""), InputError) << unknown;
}

TEST(RowCase, ClustersByDeviceAndNode) {
  const auto name = [](const char* gpu, const char* memory, std::int64_t gpus,
                       std::optional<std::int64_t> per_node) {
    std::vector<std::string> assumed;
    return cluster_of(catalogue(), gpu, memory, gpus, per_node, "", "", assumed).topology;
  };
  EXPECT_EQ(name("A100", "80", 64, 8), "dgx-a100-80gb:64 gpus");
  EXPECT_EQ(name("V100", "32", 16, 16), "dgx2-v100:16 gpus");
  EXPECT_EQ(name("V100", "16", 8, 8), "dgx1-v100:8 gpus");
  EXPECT_EQ(name("V100", "16", 8, 4), "v100-sxm-4:8 gpus");
  EXPECT_EQ(name("GB200", "", 72, 4), "gb200-nvl72:72 gpus");
  EXPECT_EQ(name("GB300", "", 8, std::nullopt), "gb300-nvl72:8 gpus");
  EXPECT_EQ(name("H100", "80", 8, 4), "h100-sxm-4:8 gpus");
  EXPECT_EQ(name("B300", "", 8, 8), "dgx-b300:8 gpus");
  // Some GPUs of each node: the network is between them all the same.
  EXPECT_EQ(name("A100", "40", 2, 1), "dgx-a100-40gb:2 nodes of 1");
  EXPECT_EQ(name("H100", "80", 6, 2), "dgx-h100:3 nodes of 2");
  EXPECT_EQ(name("H100", "80", 2, 2), "dgx-h100:2 gpus");
  EXPECT_EQ(name("GB200", "", 4, 2), "gb200-nvl72:4 gpus");
  EXPECT_EQ(name("A100", "80", 16, 16), "dgx-a100-80gb:16 gpus");
  const auto card = [](std::int64_t gpus, std::int64_t per_node, const char* inter) {
    std::vector<std::string> assumed;
    const auto c = cluster_of(catalogue(), "A100", "40", gpus, per_node, "", inter, assumed);
    const Topology t = load_topology(c.topology, c.edits);
    for (std::size_t l = 0; l < t.link_count(); ++l) {
      const Link x = t.link(LinkId{l});
      if (t.vertex_kind(x.from) == VertexKind::nic && x.kind == LinkKind::network)
        return std::pair(x.bandwidth.count, assumed);
    }
    throw InternalError("no card");
  };
  // A node's rate goes through the cards of the GPUs that run; a named card has it by itself.
  EXPECT_NEAR(card(2, 1, "10 GbE").first, 1.25e9, 1e3);
  EXPECT_NEAR(card(4, 2, "10 GbE").first, 1.25e9 / 2, 1e3);
  EXPECT_NEAR(card(16, 8, "10 GbE").first, 1.25e9 / 8, 1e3);
  EXPECT_NEAR(card(4, 2, "ConnectX-7 400G").first, 50e9, 1e3);
  EXPECT_THAT(card(16, 8, "10 GbE").second, Contains("1.25 GB/s a node"));
  EXPECT_THAT(card(16, 8, "8x 100 GbE").second, Not(Contains(HasSubstr(" a node"))));
  std::vector<std::string> sixteen;
  cluster_of(catalogue(), "A100", "80", 16, 16, "", "", sixteen);
  EXPECT_THAT(sixteen, Contains(HasSubstr("for a100-sxm-80gb of 16 GPUs")));
  // A printed rate is the line's: what transfers reach of it is the cluster's.
  std::vector<std::string> none;
  const auto omni_path = cluster_of(catalogue(), "A100", "80", 32, 8, "NVLink3",
                                    "4x Omni-Path 100 Gb/s per node", none);
  EXPECT_EQ(omni_path.topology, "a100-sxm-8-omni-path:32 gpus");
  const Topology reached = load_topology(omni_path.topology, omni_path.edits);
  double node = 0;
  for (std::size_t l = 0; l < reached.link_count(); ++l) {
    const Link x = reached.link(LinkId{l});
    if (reached.vertex_kind(x.from) == VertexKind::nic && x.kind == LinkKind::network)
      node += x.bandwidth.count;
  }
  EXPECT_NEAR(node / 4, 0.392 * 4 * 12.5e9, 1e6);
  // What these reach is theirs, not another network's.
  const auto line = [&](const char* inter) {
    const auto c = cluster_of(catalogue(), "V100", "32", 8, 4, "", inter, none);
    const Topology t = load_topology(c.topology, c.edits);
    for (std::size_t l = 0; l < t.link_count(); ++l) {
      const Link x = t.link(LinkId{l});
      if (t.vertex_kind(x.from) == VertexKind::nic && x.kind == LinkKind::network)
        return x.bandwidth.count;
    }
    return 0.0;
  };
  EXPECT_NEAR(line(""), 0.237 * 12.5e9, 1e6);
  EXPECT_NEAR(line("4x Omni-Path 100 Gb/s per node"), 0.237 * 12.5e9, 1e6);
  EXPECT_NEAR(line("100 Gb/s InfiniBand EDR per NIC"), 12.5e9, 1e6);
  // Transports in software, and switches that sum.
  const auto edited = [&](const char* gpu, const char* inter) {
    std::map<std::string, std::string> edits;
    const auto c = cluster_of(catalogue(), gpu, "80", 32, 8, "", inter, none);
    load_topology(c.topology, c.edits);
    for (const auto& e : c.edits.cluster) edits[e.path.substr(e.path.rfind('.') + 1)] = e.value;
    return edits;
  };
  EXPECT_EQ(edited("A100", "4x EFA 100 Gb/s per node")["latency"], "15 us");
  EXPECT_EQ(edited("H100", "EFA v4 3200 Gb/s per node")["latency"], "32 us");
  EXPECT_EQ(edited("H100", "GPUDirect-TCPX 4x200 Gb/s")["latency"], "30 us");
  EXPECT_EQ(edited("A100", "800 Gb/s per node (the default)").count("latency"), 0u);
  EXPECT_EQ(edited("H100", "NDR InfiniBand with SHARP")["sharp"], "true");
  EXPECT_EQ(edited("H100", "NDR InfiniBand, no SHARP").count("sharp"), 0u);
  // The card of the text stands in the node, also where the file has another of its kind.
  std::vector<std::string> assumed;
  const auto c = cluster_of(catalogue(), "V100", "16", 8, 8, "", "", assumed);
  EXPECT_EQ(load_topology(c.topology, c.edits).device(DeviceId{0}).name, "v100-sxm-16gb");
}

// docs/published.md, "batch".
TEST(RowCase, APipelineWithoutAPrintedBatchIsFilled) {
  const auto of = [](const char* framework, const char* pp, const char* batch) {
    return case_with(with(only_named("llama-3-8b"), {{"framework", framework},
                                                     {"num_gpus", "16"},
                                                     {"pp", pp},
                                                     {"micro_batch_per_dp_rank", "1"},
                                                     {"global_batch_seqs", batch}}))
        .plan;
  };
  EXPECT_EQ(of("Megatron-Core", "4", "").global_batch, 4 * 4 * 4);  // four a stage, dp 4
  EXPECT_EQ(of("Megatron-Core", "1", "").global_batch, 16);
  EXPECT_EQ(of("Megatron-Core", "4", "8").global_batch, 8);
  // DualPipe wants two a stage, and in pairs.
  EXPECT_EQ(of("HAI-LLM (DualPipe)", "4", "").schedule, Schedule::dualpipe);
  EXPECT_EQ(of("HAI-LLM (DualPipe)", "4", "32").schedule, Schedule::dualpipe);
  EXPECT_EQ(of("HAI-LLM (DualPipe)", "4", "28").schedule, Schedule::one_f_one_b);
  EXPECT_EQ(of("HAI-LLM (DualPipe)", "1", "").schedule, Schedule::one_f_one_b);
  EXPECT_EQ(of("Megatron-Core", "4", "").schedule, Schedule::one_f_one_b);
}

TEST(RowCase, AdaptersOfLatentAttentionAreOnItsProjections) {
  const auto lora = [](const char* model) {
    return case_with(with(only_named(model), {{"overlap_and_other_settings", "LoRA"}})).lora;
  };
  EXPECT_EQ(
      lora("moonlight-16b-a3b"),
      (std::vector<std::string>{"*.attention.query", "*.attention.kv_down", "*.attention.key_up",
                                "*.attention.value_up", "*.attention.output"}));
  EXPECT_EQ(lora("DeepSeek-V3"),
            (std::vector<std::string>{"*.attention.query_down", "*.attention.query_up",
                                      "*.attention.kv_down", "*.attention.key_up",
                                      "*.attention.value_up", "*.attention.output"}));
  EXPECT_EQ(lora("llama-3-8b"),
            (std::vector<std::string>{"*.attention.query", "*.attention.key", "*.attention.value",
                                      "*.attention.output"}));
}

TEST(RowCase, AVersionThatGoesOnIsAnotherNetwork) {
  const auto known = [](const char* text) {
    const KnownModel* m = model_of(catalogue(), text);
    return m != nullptr ? m->name : "";
  };
  EXPECT_EQ(known("DeepSeekV3"), "deepseek-v3");
  EXPECT_EQ(known("DeepSeekV3.2"), "");
  EXPECT_EQ(known("Kimi-K2"), "kimi-k2");
  EXPECT_EQ(known("Kimi-K2.5"), "");
  EXPECT_EQ(known("Grok-1.5"), "");
  EXPECT_EQ(known("Qwen2.5 7B"), "qwen2.5-7b");
}

TEST(RowCase, JobsGetEqualPartsOfDomains) {
  const auto first_of = [](std::int64_t gpus) {
    std::vector<std::string> assumed;
    const auto c = cluster_of(catalogue(), "GB200", "", gpus, 4, "", "", assumed);
    const Topology t = load_topology(c.topology, c.edits);
    std::size_t nodes = 0;
    while (nodes * 4 < t.device_count() && t.domain_of(nodes) == t.domain_of(0)) ++nodes;
    EXPECT_EQ(assumed.size() > 1, nodes != 18 && gpus > 72) << gpus;  // the network's rate is one
    return nodes;
  };
  EXPECT_EQ(first_of(64), 16u);  // one domain
  EXPECT_EQ(first_of(72), 18u);
  EXPECT_EQ(first_of(256), 16u);  // 64 nodes: four times 16
  EXPECT_EQ(first_of(144), 18u);
  EXPECT_EQ(first_of(76), 18u);  // 19 nodes: no equal parts of nine or more
}

TEST(RowCase, ScriptsOfSizedNetworksFillWhatTheRowLeavesEmpty) {
  const Cells row = {{"framework", "Megatron-LM (SC21)"},
                     {"model", "GPT 145B"},
                     {"num_layers", "80"},
                     {"hidden_size", "12288"},
                     {"num_heads", "96"},
                     {"seq_len_tokens", "2048"},
                     {"gpu", "A100"},
                     {"num_gpus", "1536"},
                     {"tp", "8"},
                     {"pp", ""},
                     {"dp", ""},
                     {"virtual_stages_per_gpu", ""},
                     {"micro_batch_per_dp_rank", ""},
                     {"global_batch_seqs", "2304"}};
  const RowCase c = case_with(row);
  EXPECT_EQ(c.plan.pp, 8);
  EXPECT_EQ(c.plan.dp, 24);
  EXPECT_EQ(c.plan.micro_batch, 2);
  EXPECT_EQ(c.plan.virtual_stages, 2);
  EXPECT_THAT(c.assumed, Contains("micro_batch_per_dp_rank 2 (recipe)"));
  // Not what is printed, nor of another size, cut or time.
  EXPECT_EQ(case_with(with(row, {{"micro_batch_per_dp_rank", "1"}})).plan.micro_batch, 1);
  const Cells unfilled = {{"pp", "4"}, {"virtual_stages_per_gpu", ""}};
  EXPECT_EQ(case_with(with(row, unfilled)).plan.virtual_stages, 1);
  EXPECT_EQ(case_with(with(row, {{"num_layers", "64"}})).plan.pp, 1);
  EXPECT_EQ(case_with(with(row, {{"framework", "Megatron-LM (Jan 2021)"}})).plan.pp, 1);
}

TEST(RowCase, TorchtitansSelectionShardingAndMemory) {
  const Cells row = {
      {"framework", "torchtitan"}, {"pp", "1"}, {"dp", "8"}, {"zero_or_fsdp", "FSDP2"}};
  for (const char* own : {"selective", "selective (op)", "selective AC"}) {
    const RowCase c = case_with(with(row, {{"recompute", own}}));
    EXPECT_EQ(c.plan.recompute.kind, Recompute::selective) << own;
    EXPECT_THAT(c.plan.recomputed().patterns, Contains("~*.mlp.up")) << own;
    EXPECT_EQ(c.logs_memory, "reserved");
  }
  for (const char* core : {"selective (attention core)", "selective: core_attn"})
    EXPECT_EQ(case_with(with(row, {{"recompute", core}})).plan.recomputed().kind,
              Recompute::attention);
  EXPECT_EQ(case_with(with(row, {{"zero_or_fsdp", "DDP"}})).plan.zero, 0);
  const RowCase half = case_with(with(row, {{"recompute", "selective (every other layer)"}}));
  EXPECT_EQ(half.plan.recompute.patterns, (std::vector<std::string>{"layers.1.*", "layers.3.*"}));
  EXPECT_EQ(half.plan.zero, 3);
  // A pipeline keeps its parameters gathered and its gradients whole.
  const RowCase staged = case_with(with(row, {{"pp", "2"}, {"dp", "4"}}));
  EXPECT_EQ(staged.plan.zero, 1);
  EXPECT_THAT(staged.assumed,
              Contains("ZeRO 1 under a pipeline: parameters and gradients stay whole between "
                       "micro-batches"));
  // So do those of other frameworks that print a higher stage.
  for (const char* text : {"ZeRO-2", "ZeRO-3", "FSDP (ZeRO-2-like, no reshard after forward)"}) {
    const Plan p = case_with({{"zero_or_fsdp", text}, {"framework", "Megatron-Core"}}).plan;
    EXPECT_EQ(p.zero, 1) << text;
    EXPECT_TRUE(p.reshard_after_forward) << text;
    const Cells flat{
        {"zero_or_fsdp", text}, {"framework", "Megatron-Core"}, {"pp", "1"}, {"dp", "8"}};
    EXPECT_GE(case_with(flat).plan.zero, 2) << text;
  }
  // Of a rank's batch a pipeline makes micro-batches; where it loops, of two stages a rank.
  const Cells batch = with(row, {{"pp", "2"},
                                 {"dp", "4"},
                                 {"virtual_stages_per_gpu", ""},
                                 {"micro_batch_per_dp_rank", "32"},
                                 {"global_batch_seqs", "128"},
                                 {"overlap_and_other_settings", "Interleaved 1F1B"}});
  for (const char* all : {"128", ""}) {
    const RowCase c = case_with(with(batch, {{"global_batch_seqs", all}}));
    EXPECT_EQ(c.plan.micro_batch, 1) << all;
    EXPECT_EQ(c.plan.global_batch, 128) << all;
    EXPECT_EQ(c.plan.virtual_stages, 2);
  }
  EXPECT_EQ(case_with(with(batch, {{"global_batch_seqs", "256"}})).plan.micro_batch, 32);
  EXPECT_EQ(case_with(with(batch, {{"pp", "1"}, {"dp", "8"}, {"global_batch_seqs", "256"}}))
                .plan.micro_batch,
            32);
  const Cells turns = with(row, {{"overlap_and_other_settings", "torch.compile; async TP"}});
  EXPECT_TRUE(case_with(turns).plan.overlap_tensor_parallel);
  EXPECT_FALSE(case_with(row).plan.overlap_tensor_parallel);
  for (const char* off :
       {"async TP off", "AsyncTP: no", "async TP=False", "no async TP", "vanilla TP"})
    EXPECT_FALSE(
        case_with(with(row, {{"overlap_and_other_settings", off}})).plan.overlap_tensor_parallel)
        << off;
  // FLOP/s of no said formula count what is computed again where the framework's log did.
  EXPECT_FALSE(case_with(row).logs_hardware_flops);
  EXPECT_TRUE(case_with(with(row, {{"framework", "Megatron-DeepSpeed"}})).logs_hardware_flops);
}

TEST(RowCase, ReplicasOfUnsaidCutFillNodesFirst) {
  const Cells row = {{"num_gpus", "2240"}, {"dp", "8"},          {"tp", ""},
                     {"pp", ""},           {"num_layers", "35"}, {"global_batch_seqs", "64"}};
  const RowCase c = case_with(row);
  EXPECT_EQ(c.plan.tp, 8);
  EXPECT_EQ(c.plan.pp, 35);
  EXPECT_THAT(c.assumed, Contains("tensor parallel 8, pipeline parallel 35 (280 GPUs a replica)"));
  EXPECT_EQ(case_with(with(row, {{"gpus_per_node", "4"}, {"num_layers", "70"}})).plan.tp, 4);
  // Of a printed one nothing is guessed.
  const Cells all = {{"num_gpus", "16"}, {"dp", "16"}, {"global_batch_seqs", "16"}};
  EXPECT_EQ(case_with(with(row, all)).plan.pp, 1);
}

TEST(RowCase, RanksOfANodeShareAHybridsCopy) {
  const Cells row = {{"framework", "PyTorch FSDP"},
                     {"tp", "1"},
                     {"pp", "1"},
                     {"dp", "32"},
                     {"num_gpus", "32"},
                     {"sequence_parallel", ""},
                     {"zero_or_fsdp", "HSDP"},
                     {"global_batch_seqs", "32"}};
  EXPECT_EQ(case_with(row).plan.zero, 3);
  EXPECT_EQ(case_with(row).plan.zero_group, 8);
  EXPECT_EQ(case_with(with(row, {{"zero_or_fsdp", "HYBRID_SHARD group=16"}})).plan.zero_group, 16);
  // One node has one copy anyway.
  const Cells node = {{"num_gpus", "8"}, {"dp", "8"}};
  EXPECT_EQ(case_with(with(row, node)).plan.zero_group, 0);
}

TEST(RowCase, CellsThatSayNothingAreEmpty) {
  const RowCase c = case_with({{"ep", "0"},
                               {"virtual_stages_per_gpu", "0"},
                               {"etp", "0"},
                               {"sequence_parallel", "enabled"},
                               {"recompute", "-"},
                               {"inter_node_interconnect", "N/A"}});
  EXPECT_EQ(c.plan.ep, 1);
  EXPECT_EQ(c.plan.virtual_stages, 1);
  EXPECT_TRUE(c.plan.sequence_parallel);
  EXPECT_THAT(c.assumed, Contains("recompute none"));
  EXPECT_FALSE(case_with({{"sequence_parallel", "disabled"}}).plan.sequence_parallel);
}

TEST(RowCase, RecipesFillWhatTheRowLeavesEmpty) {
  const Cells row = {
      {"model", "qwen3-30b-a3b (pretrain_weak_scaling)"},
      {"num_layers", "48"},
      {"gpu", "GB300"},
      {"num_gpus", "32"},
      {"gpus_per_node", "4"},
      {"global_batch_seqs", "2048"},
      {"framework", "Megatron-Bridge (NeMo container)"},
      {"tp", ""},
      {"dp", ""},
      {"sequence_parallel", ""},
      {"precision", ""},
      {"micro_batch_per_dp_rank", ""},
      {"overlap_and_other_settings", "recipe qwen3_30b_a3b_pretrain_8gpu_gb300_fp8mx_config"}};
  const RowCase c = case_with(row);
  EXPECT_EQ(c.plan.ep, 8);
  EXPECT_EQ(c.plan.micro_batch, 8);
  EXPECT_EQ(c.plan.precision.compute, ElementType::mxfp8);
  EXPECT_THAT(c.assumed, Contains("ep 8 (recipe)"));
  Cells printed = row;
  printed["micro_batch_per_dp_rank"] = "4";
  printed["overlap_and_other_settings"] += " features={}";
  EXPECT_EQ(case_with(printed).plan.micro_batch, 4);
  printed["overlap_and_other_settings"] = "recipe of nobody";
  EXPECT_THAT([&] { case_with(printed); },
              ThrowsMessage<InputError>(HasSubstr("ep: is not printed, and the recipe 'of'")));
}

TEST(RowCase, WorkloadsSetWhatTheFrameworksOwnConfigurationsDo) {
  const auto of = [](const char* model, const char* gpu, const char* gpus, const char* precision,
                     const char* framework) {
    return case_with({{"model", model},
                      {"framework", framework},
                      {"gpu", gpu},
                      {"num_gpus", gpus},
                      {"gpus_per_node", "8"},
                      {"precision", precision},
                      {"tp", "1"},
                      {"pp", "1"},
                      {"dp", ""},
                      {"ep", "8"}});
  };
  const char *first = "Megatron-Bridge/Megatron-Core, NeMo container 25.09",
             *middle = "Megatron-Bridge/Megatron-Core, NeMo container 26.04",
             *last = "Megatron-Bridge (NeMo container)";
  const RowCase hopper = of("DeepSeekV3", "H100", "64", "FP8", first);
  EXPECT_TRUE(hopper.plan.rows_once);
  EXPECT_THAT(hopper.assumed, Contains("rows once on (workload)"));
  EXPECT_FALSE(of("DeepSeekV3", "B200", "64", "FP8", first).plan.rows_once);
  EXPECT_EQ(of("LLAMA3_70B", "GB300", "8", "FP8", middle).plan.launches.graphs_of, "*.mlp*");
  EXPECT_EQ(of("LLAMA3_70B", "GB300", "64", "FP8", middle).plan.launches.graphs_of, "");
  EXPECT_FALSE(of("Qwen3_235B_a22B", "B200", "64", "MXFP8", middle).plan.rows_once);
  EXPECT_TRUE(of("Qwen3_30B_a3B", "B200", "64", "MXFP8", middle).plan.rows_once);
  EXPECT_TRUE(
      of("Qwen3_30B_a3B", "B200", "64", "MXFP8", middle).plan.launches.graphs_beside_experts);
  EXPECT_FALSE(
      of("Qwen3_30B_a3B", "H100", "64", "FP8", middle).plan.launches.graphs_beside_experts);
  const RowCase eager = of("GPT OSS 120B", "GB300", "64", "MXFP8", middle),
                fused = of("gpt-oss-120b (pretrain_performance)", "GB300", "64", "MXFP8", last);
  EXPECT_FALSE(eager.plan.kernels.fused_experts);
  EXPECT_TRUE(eager.plan.expert_bias_apart);
  EXPECT_TRUE(fused.plan.kernels.fused_experts);
  EXPECT_FALSE(fused.plan.expert_bias_apart);
  EXPECT_TRUE(fused.plan.launches.graphs);
  EXPECT_TRUE(fused.plan.exchanges_beside_blocks());
  EXPECT_FALSE(fused.plan.launches.waits_for_counts);
  EXPECT_TRUE(eager.plan.launches.waits_for_counts);
  EXPECT_NE(eager.key(), fused.key());
  // Precision and number of GPUs count.
  EXPECT_FALSE(of("gpt-oss-120b (pretrain_performance)", "GB300", "64", "BF16", last)
                   .plan.kernels.fused_experts);
  EXPECT_FALSE(of("LLAMA3_70B", "GB300", "8", "FP8", middle).lora.empty());
  EXPECT_TRUE(of("LLAMA3_70B", "GB300", "64", "FP8", middle).lora.empty());
}

TEST(RowCase, WorkloadsSetWhatIsMadeAgainOffloadedAndPacked) {
  Cells row = {{"model", "Llama 3.x 70B"},
               {"framework", "MaxText (JAX)"},
               {"gpu", "H100"},
               {"num_gpus", "128"},
               {"gpus_per_node", "8"},
               {"zero_or_fsdp", "FSDP=128 x DP"},
               {"precision", "BF16"},
               {"tp", "1"},
               {"pp", "1"},
               {"dp", "128"},
               {"global_batch_seqs", "256"},
               {"sequence_parallel", ""},
               {"recompute", ""}};
  const auto again = [&] { return case_with(row).plan.recompute.patterns; };
  EXPECT_THAT(again(), Contains("~*.mlp.gate"));
  EXPECT_THAT(again(), Not(Contains("~*.attention.query")));
  row["recompute"] = "none";
  EXPECT_TRUE(again().empty());
  row["recompute"] = "";
  row["framework"] = "Paxml (JAX)";
  row["model"] = "GPT-3 175B";
  row["zero_or_fsdp"] = "FSDP=? x DP";
  EXPECT_THAT(again(), Not(Contains("~*.attention.output")));
  row["num_gpus"] = row["dp"] = "256";
  EXPECT_EQ(case_with(row).plan.zero_group, 128);
  // Blocks on the host where the state is sharded.
  row["framework"] = "Megatron-Bridge/Megatron-Core, NeMo container 26.04";
  row["model"] = "LLAMA3_70B";
  row["gpu"] = "GB200";
  row["gpus_per_node"] = "4";
  row["precision"] = "FP8";
  row["zero_or_fsdp"] = "FSDP group=64";
  row["num_gpus"] = row["dp"] = "64";
  EXPECT_EQ(case_with(row).plan.offload_blocks, 40);
  EXPECT_TRUE(case_with(row).plan.offload_activations);
  row["zero_or_fsdp"] = "DDP (FSDP=0)";
  EXPECT_FALSE(case_with(row).plan.offload_activations);
  // Samples of SQuAD.
  row["framework"] = "NeMo (Megatron-Core)";
  row["gpu"] = "H100";
  row["model"] = "Llama 3.x 70B SFT fine-tuning";
  EXPECT_EQ(case_with(row).transformer->window, 94);
  row["model"] = "Llama 3.x 70B";
  EXPECT_EQ(case_with(row).transformer->window, 0);
}

TEST(RowCase, MultiTokenPredictionIsTrainedWhereTheFrameworkDoes) {
  const auto of = [](const char* model, const char* framework) {
    return case_with({{"model", model},
                      {"num_layers", "61"},
                      {"framework", framework},
                      {"gpu", "B200"},
                      {"num_gpus", "64"},
                      {"tp", "1"},
                      {"pp", "16"},
                      {"ep", "4"},
                      {"dp", "4"}});
  };
  const char* bridge = "Megatron-Bridge/Megatron-Core, NeMo container 26.04";
  const RowCase c = of("DeepSeekV3", bridge);
  EXPECT_EQ(c.transformer->mtp_layers, 1);
  std::vector<std::int64_t> cuts(16, 4);
  cuts.back() = 1;
  EXPECT_EQ(c.plan.cuts, cuts);
  EXPECT_EQ(of("DeepSeekV3 (w/o MTP)", bridge).transformer->mtp_layers, 0);
  EXPECT_EQ(of("DeepSeekV3 (w/ MTP)", "NeMo").transformer->mtp_layers, 1);
  EXPECT_EQ(of("DeepSeekV3", "NeMo").transformer->mtp_layers, 0);
  EXPECT_TRUE(of("DeepSeekV3", "NeMo").plan.cuts.empty());
}

TEST(RowCase, FrameworksByTheirLongestAlias) {
  const auto name = [](const char* text, const char* model = "BERT", const char* precision = "") {
    const FrameworkProfile* f = framework_of(catalogue(), text, model, precision);
    return f == nullptr ? std::string("none") : f->name;
  };
  EXPECT_EQ(name("Megatron-LM CI (dev container)"), "megatron-ci");
  EXPECT_EQ(name("Megatron-LM"), "megatron-lm-2022");
  EXPECT_EQ(name("Megatron-LM (Sept 2020)"), "megatron-lm-2021");
  EXPECT_EQ(name("Megatron-LM 23e00ed0 + TransformerEngine 2.11"), "megatron-core");
  EXPECT_EQ(name("Megatron-Core r0.8.0"), "megatron-core");
  EXPECT_EQ(name("Megatron-Bridge/Megatron-Core, NeMo container 26.04"), "megatron-bridge");
  EXPECT_EQ(name("Megatron-Bridge/Megatron-Core, NeMo container 25.11"), "megatron-bridge-25");
  EXPECT_EQ(name("Megatron-Bridge/Megatron-Core, NeMo container 25.09"), "megatron-bridge-25.09");
  EXPECT_EQ(name("Megatron-Bridge (NeMo container)"), "megatron-bridge");
  EXPECT_EQ(name("Megatron-Bridge"), "megatron-bridge");
  EXPECT_EQ(name("NeMo (Megatron-Core)"), "nemo");
  EXPECT_EQ(name("Megatron-DeepSpeed"), "megatron-deepspeed");
  EXPECT_EQ(name("Megatron + DeepSpeed"), "megatron-deepspeed");
  EXPECT_EQ(name("DeepSpeed + Megatron-LM"), "megatron-deepspeed");
  EXPECT_EQ(name("DeepSpeed (Megatron-DeepSpeed)"), "megatron-deepspeed");
  EXPECT_EQ(name("DeepSpeed 0.16"), "deepspeed");
  EXPECT_EQ(name("HF Trainer + DeepSpeed"), "deepspeed");
  EXPECT_EQ(name("Hugging Face Transformers + DeepSpeed"), "deepspeed");
  EXPECT_EQ(name("MosaicML Composer / llm-foundry (PyTorch FSDP)"), "llm-foundry");
  EXPECT_EQ(name("fms-fsdp (PyTorch FSDP1 + torch.compile)"), "pytorch-fsdp");
  EXPECT_EQ(name("torchtitan (FSDP2)"), "torchtitan");
  EXPECT_EQ(name("MXNet NVIDIA Release 23.04"), "mlperf");
  EXPECT_EQ(name("PyTorch NVIDIA Release 24.09", "GPT-3 175B"), "mlperf-language");
  EXPECT_EQ(name("NVIDIA NeMo (MLPerf v5.0)", "Llama 3.1 405B"), "mlperf-language");
  EXPECT_EQ(name("NVIDIA NeMo", "Llama 3.1 405B"), "nemo");
  EXPECT_EQ(name("Megatron-LM (SC21)"), "megatron-lm-2021");
  // Of a name that says no version the device says the time.
  const auto on = [](const char* device) {
    return framework_of(catalogue(), "Megatron-LM", "GPT", "", device)->name;
  };
  EXPECT_EQ(on("a100-sxm-80gb"), "megatron-lm-2022");
  EXPECT_EQ(on("h100-sxm"), "megatron-core");
  // Who prints a sharding has a later one.
  EXPECT_EQ(framework_of(catalogue(), "Megatron-LM", "GPT", "", "a100-sxm-80gb", true)->name,
            "megatron-core");
  EXPECT_EQ(case_with({{"framework", "Megatron-LM"}, {"gpu", "A100"}}).plan.framework,
            "megatron-core");
  const auto trains = [](const Cells& cells) {
    return case_with(with({{"framework", "Megatron-LM"},
                           {"gpu", "A100"},
                           {"zero_or_fsdp", ""},
                           {"model", "GPT-3 175B"}},
                          cells))
        .plan.framework;
  };
  EXPECT_EQ(trains({}), "megatron-lm-2022");
  EXPECT_EQ(trains({{"model", "Llama 2 7B"}}), "megatron-core");
  EXPECT_EQ(trains({{"model", "Qwen2.5-7B"}}), "megatron-core");
  EXPECT_EQ(trains({{"num_heads", "96"}, {"num_kv_heads", "8"}}), "megatron-core");
  EXPECT_EQ(trains({{"num_experts", "8"}, {"moe_topk", "2"}}), "megatron-core");
  const Cells unsaid = {{"framework", ""}, {"model", "GPT-3 175B"}, {"num_layers", "96"}};
  EXPECT_EQ(case_with(unsaid).plan.framework, "megatron-core");
  EXPECT_EQ(case_with(with(unsaid, {{"gpu", "A100"}})).plan.framework, "megatron-lm-2021");
  EXPECT_EQ(case_with(with(unsaid, {{"framework", "NVIDIA NeMo (MLPerf v4.1)"}, {"precision", ""}}))
                .plan.precision.compute,
            ElementType::fp8);
  EXPECT_EQ(name("TensorFlow2"), "deeplearningexamples-tensorflow");
  EXPECT_EQ(name("TensorFlow"), "deeplearningexamples-tensorflow1");
  // Their scripts compile under mixed precision alone.
  const char *squad = "LanguageModeling/ELECTRA (Fine-tuning DGX A100)",
             *ner = "LanguageModeling/BERT/biobert (Fine-tuning for NER)";
  const std::string uncompiled = "-uncompiled", tf = "deeplearningexamples-tensorflow", tf1 = tf + "1";
  EXPECT_EQ(name("TensorFlow2", squad, "TF32"), tf + uncompiled);
  EXPECT_EQ(name("TensorFlow2", squad, "FP32"), tf + uncompiled);
  EXPECT_EQ(name("TensorFlow2", squad, "mixed precision (AMP FP16)"), tf);
  EXPECT_EQ(name("TensorFlow2", squad), tf);
  EXPECT_EQ(name("TensorFlow2", "LanguageModeling/ELECTRA (Pre-training)", "FP32"), tf);
  EXPECT_EQ(name("TensorFlow", ner, "FP32"), tf1 + uncompiled);
  EXPECT_EQ(name("TensorFlow", ner, "mixed precision (AMP FP16)"), tf1);
  EXPECT_EQ(name("TensorFlow", "LanguageModeling/BERT", "FP32"), tf1);
  EXPECT_EQ(name("MxNet"), "deeplearningexamples");
  EXPECT_EQ(name("PyTorch"), "deeplearningexamples-pytorch");
  EXPECT_EQ(name("PyTorch DDP"), "pytorch-ddp");
  // Code of one network: with the same alias it comes first, and never for others.
  EXPECT_EQ(name("PyTorch", "LanguageModeling/Transformer-XL (Base model)"),
            "deeplearningexamples-transformer-xl-pytorch");
  EXPECT_EQ(name("TensorFlow", "LanguageModeling/Transformer-XL (Base model)"),
            "deeplearningexamples-transformer-xl-tensorflow");
  EXPECT_EQ(name("PyTorch DDP", "Transformer-XL"), "pytorch-ddp");
  EXPECT_EQ(name("MaxText (JAX)"), "jax");
  EXPECT_EQ(name("HF Trainer"), "pytorch-ddp");
  EXPECT_EQ(name("PyTorch Lightning"), "pytorch-ddp");
  EXPECT_EQ(name("torchtune"), "pytorch-fsdp");
  EXPECT_EQ(name("GPT-NeoX"), "megatron-deepspeed");
  EXPECT_EQ(name("somebody's own"), "none");
  // Of a trainer over PyTorch the sharding says more.
  const auto sharded = [](const char* framework, const char* zero) {
    return case_with({{"framework", framework}, {"zero_or_fsdp", zero}}).plan.framework;
  };
  EXPECT_EQ(sharded("HF Trainer", "FSDP"), "pytorch-fsdp");
  EXPECT_EQ(sharded("HF Trainer", "ZeRO-2"), "deepspeed");
  EXPECT_EQ(sharded("HF Trainer", "DDP"), "pytorch-ddp");
  EXPECT_EQ(sharded("PyTorch DDP", "ZeRO-1"), "pytorch-ddp");
}

TEST(RowCase, ModelsByTheLongestNameThatTheTextBeginsWith) {
  const auto name = [](const char* text) {
    const KnownModel* m = model_of(catalogue(), text);
    return m == nullptr ? std::string("none") : m->name;
  };
  EXPECT_EQ(name("LLAMA3.1_405B"), "llama-3.1-405b");
  EXPECT_EQ(name("llama3_405b truncated to 4 layers"), "llama-3.1-405b");
  EXPECT_EQ(name("Llama 3.x 70B LoRA fine-tuning"), "llama-3-70b");
  EXPECT_EQ(name("Llama2 13b"), "llama-2-13b");
  EXPECT_EQ(name("DeepSeekV3 (w/o MTP)"), "deepseek-v3");
  EXPECT_EQ(name("deepseek_v2 4 layers"), "deepseek-v2");
  EXPECT_EQ(name("Qwen3_30B_a3B (tokendrop)"), "qwen3-30b-a3b");
  EXPECT_EQ(name("GPT OSS 120B"), "gpt-oss-120b");
  EXPECT_EQ(name("Nemotron-4 15B"), "nemotron-4-15b");
  EXPECT_EQ(name("GPT-3 175B"), "gpt3-175b");
  EXPECT_EQ(name("MPT-3b"), "mpt-7b");  // the family's block; sizes are printed
  EXPECT_EQ(name("Classification/ConvNets/resnet50v1.5 (DGX-1 (8x V100))"), "resnet-50");
  EXPECT_EQ(name("ResNet-50 v1.5 (ImageNet 224)"), "resnet-50");
  EXPECT_EQ(name("LanguageModeling/BERT (Pre-training)"), "bert-large");
  EXPECT_EQ(name("LanguageModeling/BERT/biobert (Fine-tuning for NER)"), "bert-base");
  EXPECT_EQ(name("Meta-Llama-3-8B"), "llama-3-8b");
  EXPECT_EQ(name("ViT-B/16"), "vit-b-16");
  EXPECT_EQ(name("LanguageModeling/ELECTRA (Pre-training)"), "electra-base");
  EXPECT_EQ(name("LanguageModeling/Transformer-XL (Large model)"), "transformer-xl-large");
  // Digits that go on are another number.
  EXPECT_EQ(name("Nemotron_3_Nano"), "nemotron-3-nano-30b-a3b");
  EXPECT_EQ(name("nemotron-3-nano-4b (sft)"), "nemotron-3-nano-4b");
  EXPECT_EQ(name("nemotron3_5_lightning_nightly"), "nemotron-3.5-lightning-30b-a3b");
  for (const char* none : {"qwen3.8-27b (sft)", "llama-3-80b", "GPT", "glm5-2", "Nemotron_4_Nano",
                           "3D U-Net (KiTS19)", ""})
    EXPECT_EQ(name(none), "none") << none;
  EXPECT_EQ(name("Classification/ConvNets/se-resnext101-32x4d (A100)"), "se-resnext-101-32x4d");
  EXPECT_EQ(name("SE-ResNeXt-101"), "se-resnext-101-32x4d");
  EXPECT_EQ(name("ResNeXt-101"), "resnext-101-32x4d");
  // Another size is another network, not the one whose name goes before it.
  EXPECT_EQ(name("GPT-2 XL"), "gpt2-xl");
  EXPECT_EQ(name("gpt2-medium (355M)"), "gpt2-medium");
  EXPECT_EQ(name("gpt2"), "gpt2");
  EXPECT_EQ(name("bloom-7b1"), "bloom-7b1");
  EXPECT_EQ(name("ViT-L/16"), "vit-l-16");
  EXPECT_EQ(name("ELECTRA-large"), "electra-large");
  EXPECT_EQ(name("resnet50 large batch"), "resnet-50");
  for (const char* other : {"bert-small", "gpt2-mini", "electra small++", "BERT tiny"})
    EXPECT_EQ(name(other), "none") << other;
}

TEST(RowCase, LayersOfAVirtualStageGiveTheirNumber) {
  const auto stages = [](const Cells& changes) {
    Cells all{{"num_layers", "32"}, {"pp", "4"}, {"dp", ""}, {"virtual_stages_per_gpu", ""}};
    for (const auto& [column, cell] : changes) all[column] = cell;
    return case_with(all).plan.virtual_stages;
  };
  const char* const two = "--num-layers-per-virtual-pipeline-stage 2";
  EXPECT_EQ(stages({{"overlap_and_other_settings", two}}), 4);
  EXPECT_EQ(stages({{"overlap_and_other_settings", two}, {"virtual_stages_per_gpu", "2"}}), 2);
  EXPECT_EQ(stages({{"num_layers", ""},
                    {"pp", ""},
                    {"overlap_and_other_settings",
                     std::string(two) + " --num-layers 32 --pipeline-model-parallel-size 4"}}),
            4);
  EXPECT_EQ(stages({}), 1);
}

TEST(RowCase, UnnamedNetworksFollowFromTheirSizes) {
  const RowCase c = case_with({{"model", "GPT"},
                               {"num_layers", "12"},
                               {"hidden_size", "768"},
                               {"vocab_size", ""},
                               {"framework", "Megatron-LM CI (dev container)"},
                               {"overlap_and_other_settings",
                                "--swiglu --untie-embeddings-and-output-weights "
                                "--position-embedding-type=rope --disable-bias-linear"}});
  const TransformerConfig& t = *c.transformer;
  EXPECT_EQ(t.heads, 6);  // 128 values each
  EXPECT_EQ(t.ffn, 2048);
  EXPECT_EQ(t.vocabulary, 50257);
  EXPECT_TRUE(t.gated && !t.tied && !t.mlp_bias && t.positions == 0 && t.rotary_dim == 128);
  EXPECT_THAT(c.assumed, Contains("feed-forward width 2048"));
  // Flags that are off are off.
  const RowCase plain = case_with({{"model", "GPT"},
                                   {"num_layers", "12"},
                                   {"hidden_size", "768"},
                                   {"overlap_and_other_settings", "--transformer-impl=local"}});
  EXPECT_TRUE(plain.transformer->tied && !plain.transformer->gated);
  EXPECT_EQ(plain.transformer->ffn, 3072);
  EXPECT_FALSE(plain.plan.overlap_gradients);
  // Behind words they count, too; what is not there is not off then.
  const RowCase behind = case_with({{"model", "GPT"},
                                    {"num_layers", "12"},
                                    {"hidden_size", "768"},
                                    {"overlap_and_other_settings", "run 3; --swiglu"}});
  EXPECT_TRUE(behind.transformer->gated);
  EXPECT_EQ(behind.transformer->ffn, 2048);
  // tp cuts heads: of 14,400 as 120 of 120.
  EXPECT_EQ(case_with({{"model", "GPT-like 200B"},
                       {"num_layers", "80"},
                       {"hidden_size", "14400"},
                       {"tp", "8"},
                       {"pp", "1"},
                       {"dp", "2"}})
                .transformer->heads,
            120);
  // Megatron's softmax is fused where samples times a rank's heads are a multiple of 4: 112 of 128
  // values are 14 a rank, 128 of 112 are the nearest that are for one sample, and so for more.
  const auto heads = [](const char* samples) {
    return case_with({{"model", "GPT-like 181B"},
                      {"num_layers", "72"},
                      {"hidden_size", "14336"},
                      {"tp", "8"},
                      {"pp", "1"},
                      {"dp", "2"},
                      {"framework", "Megatron-DeepSpeed"},
                      {"micro_batch_per_dp_rank", samples}})
        .transformer->heads;
  };
  EXPECT_EQ(heads("1"), 128);
  EXPECT_EQ(heads("2"), 128);
  // Nor is a micro-batch that is not printed one sample where two are the fewest: 6 heads a rank.
  const auto samples = [](const char* batch, const char* kernel) {
    return case_with({{"model", "GPT"},
                      {"num_layers", "40"},
                      {"hidden_size", "6144"},
                      {"num_heads", "48"},
                      {"tp", "8"},
                      {"pp", "1"},
                      {"dp", "2"},
                      {"framework", "Megatron-LM (2021)"},
                      {"gpu", "A100"},
                      {"attention_kernel", kernel},
                      {"micro_batch_per_dp_rank", ""},
                      {"global_batch_seqs", batch}})
        .plan.micro_batch;
  };
  EXPECT_EQ(samples("64", "non-flash"), 2);
  EXPECT_EQ(samples("62", "non-flash"), 1);  // which the batch does not allow
  EXPECT_EQ(samples("64", "flash"), 1);
  // From parameters alone: 12 l h² with h = 128 l. A known name's block, not its sizes.
  const RowCase sized =
      case_with({{"model", "GPT-2-like 52B"}, {"num_layers", ""}, {"params_billion", "52"}});
  EXPECT_EQ(sized.transformer->hidden, 8192);
  EXPECT_EQ(sized.transformer->layers, 65);
}

TEST(RowCase, TruncatedNetworksKeepBothKindsOfBlock) {
  EXPECT_EQ(
      case_with({{"model", "deepseek_v3 truncated to 4 layers"}}).transformer->moe.first_dense, 1);
  EXPECT_EQ(case_with({{"model", "DeepSeekV3"}, {"num_layers", "61"}}).transformer->moe.first_dense,
            3);
}

/// A row of Megatron's functional tests.
RowCase test_case(const std::string& name, const std::string& flags, const Cells& changes = {}) {
  return case_with(with({{"model", name},
                         {"num_layers", "16"},
                         {"hidden_size", "1024"},
                         {"num_heads", "32"},
                         {"attention_kernel", ""},
                         {"framework", "Megatron-LM CI (dev container)"},
                         {"overlap_and_other_settings", flags}},
                        changes));
}

TEST(RowCase, MegatronsTestsRunDeterministicallyUnlessTheySayOtherwise) {
  const auto workspace = [](const std::string& name, const std::string& flags,
                            const Cells& changes = {}) {
    return test_case(name, "--transformer-impl=transformer_engine" + flags, changes)
        .plan.allocations.workspace;
  };
  const Bytes deterministic = 68_MiB, usual{21'233'664};
  EXPECT_EQ(workspace("gpt", " --attention-backend=unfused"), deterministic);
  EXPECT_EQ(workspace("gpt", ""), deterministic);
  EXPECT_EQ(workspace("gpt_nondeterministic", " --attention-backend=unfused"), usual);
  EXPECT_EQ(workspace("gpt_15b_release", ""), usual);
  EXPECT_EQ(workspace("gpt", " --cross-entropy-loss-fusion"), usual);
  // Flash attention only where there are experts; nothing said under cp is flash attention too.
  EXPECT_EQ(workspace("gpt", " --attention-backend=flash"), usual);
  EXPECT_EQ(workspace("gpt", "", {{"cp", "2"}, {"dp", "2"}}), usual);
  EXPECT_EQ(workspace("moe", " --attention-backend=flash", {{"num_experts", "4"}}), deterministic);
  EXPECT_EQ(test_case("gpt", "--transformer-impl=local").plan.allocations.workspace, 64_MiB);
  // Routers of experts multiply by Transformer Engine even there.
  EXPECT_EQ(test_case("moe", "--transformer-impl=local", {{"num_experts", "4"}})
                .plan.allocations.workspace,
            deterministic);
}

// docs/cost.md, "Kernels that do not stream": 38 and 14 B a logit, 33 and 23 of the fused loss.
TEST(RowCase, AFusedLossIsPricedWhereTheRowHasOne) {
  const auto loss = [](const RowCase& c) {
    const FrameworkKernels& k = c.plan.kernels;
    return std::vector<double>{k.logit_forward, k.logit_share_forward, k.logit_backward,
                               k.logit_share_backward};
  };
  const std::vector<double> fused = {33, 0, 23, 0}, usual = {38, 0.77, 14, 0.6};
  const auto core = [](const char* settings) {
    return case_with({{"framework", "Megatron-LM 23e00ed0 + TransformerEngine 2.11"},
                      {"overlap_and_other_settings", settings}});
  };
  EXPECT_EQ(loss(core("overlap paths off; CE fusion")), fused);
  EXPECT_EQ(loss(core("overlap paths off")), usual);
  EXPECT_EQ(loss(test_case("gpt", "--cross-entropy-loss-fusion")), fused);
  EXPECT_EQ(loss(test_case("gpt", "")), usual);
}

// What a row says in words is the plan's, whatever the framework's profile and workloads say.
TEST(RowCase, SettingsInWordsAreThePlans) {
  const auto with_settings = [](const std::string& settings, const Cells& more = {}) {
    return case_with(with({{"framework", "NeMo"}, {"overlap_and_other_settings", settings}}, more));
  };
  const Cells experts = with(only_named("Qwen3 30B A3B"), {{"ep", "4"}});
  EXPECT_FALSE(with_settings("overlap_grad_reduce=False").plan.overlap_gradients);
  EXPECT_TRUE(with_settings("").plan.overlap_gradients);
  EXPECT_TRUE(with_settings("TP overlap").plan.overlap_tensor_parallel);
  EXPECT_TRUE(settings_of("Interleaved1F1B").interleaved);
  EXPECT_EQ(settings_of("CP all-gather").context, "all_gather");
  EXPECT_EQ(settings_of("CP alltoall").context, "all_to_all");
  EXPECT_EQ(settings_of("CP ring").context, "ring");
  EXPECT_FALSE(with_settings("tp_comm_overlap=False").plan.overlap_tensor_parallel);
  EXPECT_FALSE(with_settings("tp_comm_overlap=False").plan.tensor_parallel_in_turn);
  EXPECT_TRUE(with_settings("overlap paths off").plan.tensor_parallel_in_turn);
  EXPECT_TRUE(with_settings("EP overlap", experts).plan.exchanges_beside_blocks());
  EXPECT_FALSE(with_settings("", experts).plan.exchanges_beside_blocks());
  EXPECT_TRUE(with_settings("DeepEP", experts).plan.rows_once);
  EXPECT_FALSE(with_settings("alltoall dispatcher", experts).plan.rows_once);
  const Launches beside = with_settings("CUDA graphs (attn, moe_router)", experts).plan.launches;
  EXPECT_TRUE(beside.graphs_beside_experts);
  EXPECT_FALSE(beside.graphs);
  EXPECT_TRUE(beside.waits_for_counts);
  const Launches all = with_settings("CUDA graphs", experts).plan.launches;
  EXPECT_TRUE(all.graphs);
  EXPECT_FALSE(all.waits_for_counts);
  EXPECT_EQ(with_settings("cuda_graph_scope=mlp").plan.launches.graphs_of, "*.mlp*");
  EXPECT_EQ(with_settings("CUDA graphs off").plan.launches.graphs, false);
  EXPECT_EQ(with_settings("CP type a2a").plan.context, Plan::ContextExchange::all_to_all);
  EXPECT_EQ(with_settings("ZB-H1").plan.schedule, Schedule::zero_bubble_h1);
  EXPECT_FALSE(with_settings("1F1B").plan.schedule_given);
  EXPECT_EQ(with_settings("no p2p overlap").plan.send_wait, SendWait::always);
  EXPECT_EQ(with_settings("float8").plan.precision_name, "fp8");
  EXPECT_EQ(with_settings("float8", {{"precision", "fp32"}}).plan.precision_name, "fp32");
  EXPECT_TRUE(with_settings("optimizer offload").plan.offload_optimizer);
  EXPECT_TRUE(with_settings("activation offload").plan.offload_activations);
  EXPECT_FALSE(with_settings("LoRA").lora.empty());
  EXPECT_TRUE(with_settings("tied embeddings").transformer->tied);
  EXPECT_FALSE(with_settings("untied embeddings").transformer->tied);
  EXPECT_EQ(with_settings(R"(recipe x features={"context_parallel_size": 2})",
                          {{"cp", ""}, {"dp", ""}, {"seq_len_tokens", "4096"}})
                .plan.cp,
            2);
  EXPECT_EQ(with_settings("full recompute", {{"recompute", ""}}).plan.recompute.kind,
            Recompute::full);
  EXPECT_EQ(with_settings("full recompute", {{"recompute", "none"}}).plan.recompute.kind,
            Recompute::none);
  EXPECT_EQ(with_settings("no recompute", {{"recompute", ""}}).plan.recompute.kind,
            Recompute::none);
  EXPECT_THAT(with_settings("recompute of something").assumed,
              Contains("not read: recompute of something"));
  EXPECT_THAT(with_settings("torch.compile; DP overlap").assumed,
              AllOf(Contains("not read: torch.compile"), Not(Contains(HasSubstr("DP overlap"))),
                    Not(Contains(HasSubstr("gradient overlap")))));
}

TEST(RowCase, KeyAndValueHeadsThatDoNotDivideTheOthersAreNamed) {
  EXPECT_EQ(case_with({{"num_heads", "32"}, {"num_kv_heads", "8"}}).transformer->kv_heads, 8);
  EXPECT_THAT(
      [] {
        case_with({{"num_heads", "32"}, {"num_kv_heads", "7"}});
      },
      ThrowsMessage<InputError>(HasSubstr("num_kv_heads: 7 do not divide 32 heads")));
}

TEST(RowCase, TestsOfMegatronsOwnLayersAreNamedSo) {
  const auto local = [](const char* name, const Cells& changes = {}) {
    const Allocations a = test_case(name, "", changes).plan.allocations;
    EXPECT_EQ(a.score_buffer, a.workspace == 64_MiB) << name;
    return a.score_buffer;
  };
  EXPECT_TRUE(local("gpt3_mcore_tp1_pp2"));
  EXPECT_FALSE(local("gpt3_mcore_te_tp1_pp2"));
  EXPECT_FALSE(local("gpt3_7b_tp1_pp4_memory_speed"));
  EXPECT_FALSE(local("gpt3_mcore_cp2_pp2", {{"cp", "2"}, {"dp", "2"}}));
  EXPECT_FALSE(test_case("gpt3_mcore_tp1", "--transformer-impl=transformer_engine")
                   .plan.allocations.score_buffer);
}

TEST(RowCase, TestsAreCutAndShardedAsTheirNamesSay) {
  const Cells pipeline{{"pp", "4"}, {"tp", "1"}, {"dp", "4"}, {"num_gpus", "16"}};
  EXPECT_EQ(test_case("gpt_uneven_pipeline", "--bf16", pipeline).plan.cuts,
            (std::vector<std::int64_t>{2, 6, 6, 2}));
  EXPECT_TRUE(test_case("gpt_pipeline", "--bf16", pipeline).plan.cuts.empty());
  const Cells sharded{{"tp", "1"}, {"pp", "1"}, {"dp", "8"}, {"num_gpus", "8"}};
  EXPECT_EQ(test_case("gpt_multi_dist_optimizer_instances", "--bf16", sharded).plan.zero_group, 4);
  EXPECT_EQ(test_case("gpt", "--bf16", sharded).plan.zero_group, 0);
}

TEST(RowCase, TestsOfSpeedWithoutExpertsAreOfMockData) {
  const auto words = [](const char* name, const Cells& changes = {}) {
    return test_case(name, "--bf16", with({{"vocab_size", ""}}, changes)).transformer->vocabulary;
  };
  EXPECT_EQ(words("gpt3_7b_memory_speed"), 131'074);
  EXPECT_EQ(words("gpt3_7b"), 50'257);
  EXPECT_EQ(words("moe_memory_speed", {{"num_experts", "4"}}), 50'257);
  EXPECT_EQ(words("gpt3_7b_memory_speed", {{"vocab_size", "1000"}}), 1'000);
}

TEST(RowCase, BracketedModulesAreWhatIsRecomputed) {
  const auto patterns = [](const char* name, const char* recompute) {
    return test_case(name, "--bf16",
                     {{"recompute", recompute}, {"num_experts", name[0] == 'm' ? "4" : ""}})
        .plan.recompute.patterns;
  };
  EXPECT_EQ(patterns("moe", "selective   [layernorm moe_act]"),
            (std::vector<std::string>{"~*mlp_norm", "~*moe.activation"}));
  // Norms stand alone before experts and latent projections.
  EXPECT_TRUE(patterns("gpt", "selective   [layernorm]").empty());
  // What goes to the host counts as recomputed.
  EXPECT_EQ(patterns("moe_fine_grained_offloading", "selective   [moe_act]"),
            (std::vector<std::string>{"~*moe.activation", "*attention.core", "*moe.dispatch",
                                      "*moe.gate", "*moe.up"}));
  EXPECT_TRUE(patterns("moe", "selective").empty());
}

// Of 8 blocks in 2 stages of 2 chunks each.
TEST(RowCase, SomeBlocksOfEachChunkAreRecomputed) {
  const auto again = [](const std::string& recompute, const Cells& more = {}) {
    const RowCase c = case_with(with(
        {{"num_layers", "8"}, {"virtual_stages_per_gpu", "2"}, {"recompute", recompute}}, more));
    return c.plan.recompute.kind == Recompute::full ? std::vector<std::string>{"full"}
                                                    : c.plan.recompute.patterns;
  };
  using Blocks = std::vector<std::string>;
  const Blocks first{"layers.0.*", "layers.2.*", "layers.4.*", "layers.6.*"};
  EXPECT_EQ(again("full, block, 1 layer"), first);
  EXPECT_EQ(again("full/block/1"), first);
  EXPECT_EQ(again("recompute_method=block recompute_num_layers=1"), first);
  EXPECT_EQ(again("full block 1 layers", {{"virtual_stages_per_gpu", "1"}}),
            (Blocks{"layers.0.*", "layers.4.*"}));
  EXPECT_EQ(again("full block 3 layers"), Blocks{"full"});
  EXPECT_EQ(again("full uniform 1"), Blocks{"full"});
  EXPECT_EQ(again("full (activation checkpointing per block)"), Blocks{"full"});
  EXPECT_EQ(again("every other layer"),
            (Blocks{"layers.1.*", "layers.3.*", "layers.5.*", "layers.7.*"}));
  EXPECT_EQ(again("selective AC, option 4"), (Blocks{"layers.3.*", "layers.7.*"}));
  EXPECT_EQ(again("every 3 layers"), (Blocks{"layers.2.*", "layers.5.*"}));
}

// Modules that a network has none of are no patterns of its plan.
TEST(RowCase, ModulesThatTheNetworkHasNotAreNotRecomputed) {
  const auto plan = [](const char* recompute) {
    return case_with({{"recompute", recompute}}).plan;
  };
  EXPECT_EQ(plan("selective: mlp, shared_experts").recompute.patterns,
            (std::vector<std::string>{"*.mlp.*"}));
  EXPECT_EQ(plan("recompute_modules=[\"moe_act\"]").recompute.kind, Recompute::none);
}

TEST(RowCase, GroupedProductsHaveWorkspacesWhereFlagOrNameSaysSo) {
  const auto grouped = [](const char* name, const char* flags) {
    return test_case(name, flags, {{"num_experts", "4"}}).plan.allocations.workspace_grouped_hopper;
  };
  EXPECT_EQ(grouped("moe_4experts", "--bf16"), 0_B);
  EXPECT_EQ(grouped("moe_4experts", "--moe-grouped-gemm"), 128_MiB);
  EXPECT_EQ(grouped("moe_4experts_groupedGEMM", ""), 128_MiB);
}

TEST(RowCase, LatentAttentionBesideExpertsIsDeepSeekV3s) {
  const Cells experts{
      {"num_experts", "32"}, {"ffn_hidden_size", "4096"}, {"moe_ffn_hidden_size", "512"}};
  const auto network = [&](const char* flags, const Cells& changes) {
    return *test_case("moe", flags, changes).transformer;
  };
  const TransformerConfig both = network("--multi-latent-attention --swiglu", experts);
  EXPECT_EQ(both.latent.query_rank, 1536);
  EXPECT_EQ(both.moe.shared_ffn, 512);
  EXPECT_EQ(both.moe.first_dense, 3);
  EXPECT_EQ(both.mtp_layers, 1);
  EXPECT_EQ(network("--multi-latent-attention", {}).latent.query_rank, 192);
  EXPECT_EQ(network("--multi-latent-attention", {}).mtp_layers, 0);
  EXPECT_EQ(network("--swiglu", experts).moe.shared_ffn, 0);
  EXPECT_EQ(network("--swiglu", experts).moe.first_dense, 0);
  const char* const flags = "--multi-latent-attention --swiglu";
  EXPECT_EQ(test_case("moe_no_mtp", flags, experts).transformer->mtp_layers, 0);
  // Fewer blocks than twice as many; small ones have small ranks; sharded ones predict no further.
  const RowCase small = test_case(
      "moe", flags,
      with(experts, {{"num_layers", "4"}, {"hidden_size", "512"}, {"zero_or_fsdp", "FSDP"}}));
  EXPECT_EQ(small.transformer->moe.first_dense, 2);
  EXPECT_EQ(small.transformer->mtp_layers, 0);
  EXPECT_EQ(small.transformer->latent.query_rank, 256);
  EXPECT_EQ(small.transformer->latent.key_value_rank, 128);
  EXPECT_EQ(small.plan.pad_vocabulary, 64);
  // Chunks of two blocks, the first with the dense ones: Et*3|(tt|)*6tmL.
  const RowCase cut = test_case("moe", flags, with(experts, {{"virtual_stages_per_gpu", ""}}));
  EXPECT_EQ(cut.plan.virtual_stages, 4);
  EXPECT_EQ(cut.plan.cuts, (std::vector<std::int64_t>{3, 2, 2, 2, 2, 2, 2, 1}));
  EXPECT_EQ(cut.plan.pad_vocabulary, 3232);
  EXPECT_TRUE(
      test_case("moe", flags, with(experts, {{"virtual_stages_per_gpu", "4"}})).plan.cuts.empty());
}

TEST(RowCase, WhatIsNotSaidIsFilledAndListed) {
  const RowCase c = case_with({{"dp", ""},
                               {"micro_batch_per_dp_rank", ""},
                               {"precision", ""},
                               {"recompute", ""},
                               {"sequence_parallel", ""},
                               {"zero_or_fsdp", ""},
                               {"attention_kernel", ""},
                               {"vocab_size", ""},
                               {"num_layers", ""},
                               {"inter_node_interconnect", ""},
                               {"virtual_stages_per_gpu", ""}});
  EXPECT_EQ(c.plan.dp, 4);
  for (const char* listed :
       {"32 layers", "vocabulary 128256", "flash attention", "network of dgx-h100", "micro-batch 1",
        "precision bf16", "ZeRO 1", "sequence parallel on", "recompute none", "virtual stages 1"})
    EXPECT_THAT(c.assumed, Contains(StartsWith(listed)));
  EXPECT_THAT(case_with({{"num_gpus", ""}, {"dp", ""}}).assumed, Contains("8 GPUs"));
  EXPECT_THAT(case_with({{"framework", "unheard of"}}).assumed,
              Contains("framework megatron-core"));
}

TEST(RowCase, EmbeddingAndLossCountWhereBlocksComeOutSo) {
  const RowCase c =
      case_with({{"num_layers", "6"}, {"pp", "4"}, {"virtual_stages_per_gpu", "2"}, {"dp", "2"}});
  EXPECT_EQ(c.plan.cuts, (std::vector<std::int64_t>{0, 1, 1, 1, 1, 1, 1, 0}));
}

TEST(RowCase, WhatIsNotUnderstoodNamesItsColumn) {
  EXPECT_EQ(why({{"num_layers", "four"}}), "num_layers: 'four' is no whole number");
  EXPECT_EQ(why({{"tp", "0"}}), "tp: 0 is not in 1 to 100,000");
  EXPECT_THAT(why({{"gpu", "TPU v4"}}),
              AllOf(StartsWith("gpu: 'TPU v4' has no device profile; there are a100-"),
                    HasSubstr(", h100-sxm, ")));
  EXPECT_EQ(why({{"gpu", ""}}), "gpu: is not printed");
  EXPECT_EQ(why({{"model", "Unheard-of"}, {"num_layers", ""}}),
            "num_layers: is not printed, and 'Unheard-of' is in no catalogue");
  const Cells unsized = {{"num_layers", ""}};
  EXPECT_EQ(why(with(unsized, {{"model", "DeepSeek V3 16B"}})),
            "model: 'DeepSeek V3 16B' has 16 billion parameters, which deepseek-v3 has not; print "
            "num_layers and hidden_size");
  EXPECT_EQ(why(with(unsized, {{"model", "DeepSeek-V3 671B"}})), "");
  EXPECT_EQ(why(with(unsized, {{"model", "Kimi K2 1T"}})), "");
  for (const char* mixture : {"Unheard-of 480B A35B", "Unheard-of 17Bx16E", "Unheard-of 8x7B"})
    EXPECT_EQ(why(with(unsized, {{"model", mixture}, {"params_billion", "400"}})),
              fmt::format("model: '{}' is in no catalogue, and the sizes of its experts are not "
                          "printed",
                          mixture));
  EXPECT_EQ(why({{"precision", "int4"}}), "precision: 'int4' is not understood");
  EXPECT_EQ(why({{"recompute", "partial"}}), "recompute: 'partial' is not understood");
  EXPECT_EQ(why({{"sequence_parallel", "partly"}}),
            "sequence_parallel: 'partly' is not understood");
  EXPECT_EQ(why({{"zero_or_fsdp", "2D"}}), "zero_or_fsdp: '2D' is not understood");
  EXPECT_EQ(why({{"tp", "3"}}), "num_gpus: 16 GPUs are no multiple of tp 3 x pp 2 x cp 1");
  EXPECT_EQ(why({{"dp", "3"}}), "dp: 3 x tp 2 x pp 2 x cp 1 is not 16 GPUs");
  EXPECT_EQ(why({{"num_layers", "5000"}}), "num_layers: 5000 is more than any run had (1000)");
}

std::vector<FamilyFigures> predicted(const std::vector<Cells>& rows, std::size_t workers = 1) {
  RowsOptions o;
  o.workers = workers;
  return predict_rows({table(kTraining, rows)}, catalogue(), o);
}

/// Prediction = that of the same network, cluster and plan given by hand.
TEST(Rows, ARowIsPredictedAsItsPlanIs) {
  const auto families = predicted({whole_row()});
  ASSERT_EQ(families.size(), 1u);
  ASSERT_EQ(families[0].figures.size(), 2u);
  EXPECT_DOUBLE_EQ(families[0].figures[0].measured, 0.5);
  ModelOptions m;
  m.layers = 4;
  m.sequence = 4096;
  const Graph graph = load_model("llama-3-8b", m);
  Plan plan;
  plan.tp = 2, plan.pp = 2, plan.dp = 4, plan.zero = 1, plan.sequence_parallel = true;
  plan.global_batch = 16;
  set_framework(plan, "megatron-core", "");
  Communication c(load_topology("dgx-h100:16 gpus"));
  const auto p = predict(graph, plan, c, nullptr, nullptr, false, nullptr, Network::beside);
  ASSERT_TRUE(p) << p.reason();
  EXPECT_DOUBLE_EQ(families[0].figures[0].predicted, p->step_time.count);
}

TEST(Rows, EveryPrintedSpeedIsTheSameTime) {
  // 16 sequences of 4,096 tokens in 0.5 s on 16 devices.
  const auto time = [](const Cells& changes) {
    auto cells = with(whole_row(), {{"iteration_time_s", ""}});
    const auto f = predicted({with(cells, changes)});
    return f.at(0).figures.at(0);
  };
  EXPECT_DOUBLE_EQ(time({{"tokens_per_s_per_gpu", "8192"}}).measured, 0.5);
  EXPECT_DOUBLE_EQ(time({{"samples_per_s_total", "32"}}).measured, 0.5);
  const Figure mfu = time({{"mfu_pct", "40"}});
  EXPECT_DOUBLE_EQ(mfu.measured, mfu.ideal / 0.4);
  const Figure rate = time({{"tflops_per_gpu", "400"}, {"flop_formula", "6N+12LHQT"}});
  EXPECT_NEAR(rate.measured, mfu.ideal * 989.4 / 400, 1e-9);
  ModelOptions four_layers;
  four_layers.layers = 4;
  const auto parameters =
      static_cast<double>(parameter_count(load_model("llama-3-8b", four_layers)));
  const Figure alone = time({{"tflops_per_gpu", "400"}, {"flop_formula", "6ND"}});
  EXPECT_NEAR(alone.measured, 6 * parameters * 16 * 4096 / 400e12 / 16, 1e-12);
  // Megatron's formula with recomputation: 96 B s l h² (1 + s/6h + V/16lh).
  const Figure four = time({{"tflops_per_gpu", "400"}, {"flop_formula", "96*B*s*l*h^2*(...)"}});
  EXPECT_NEAR(
      four.measured,
      96. * 16 * 4096 * 4 * 4096 * 4096 * (1 + 1. / 6 + 128256. / 16 / 4 / 4096) / 400e12 / 16,
      1e-12);
  // What is measured and what is derived: the first of them.
  EXPECT_EQ(time({{"iteration_time_s", "0.7"}, {"tokens_per_s_per_gpu", "1"}}).quantity,
            "iteration_time_s");
}

TEST(Rows, PredictionsSeeTheConfigurationOnly) {
  const auto base = predicted(
      {with(whole_row(), {{"peak_mem_per_gpu_gib", "60"}, {"peak_mem_definition", "nvidia-smi"}})});
  const auto other = predicted({with(whole_row(), {{"id", "y"},
                                                   {"source", "elsewhere"},
                                                   {"notes", "interleaved, 8 virtual stages"},
                                                   {"iteration_time_s", "99"},
                                                   {"tokens_per_s_per_gpu", "1"},
                                                   {"tflops_per_gpu", "3"},
                                                   {"mfu_pct", "2"},
                                                   {"hfu_pct", "77"},
                                                   {"flop_formula", "x"},
                                                   {"peak_mem_per_gpu_gib", "1"},
                                                   {"peak_mem_definition", "nvidia-smi"},
                                                   {"from_memory", "partly"}})});
  ASSERT_EQ(base[0].figures.size(), 3u);
  ASSERT_EQ(other[0].figures.size(), 3u);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(base[0].figures[i].predicted, other[0].figures[i].predicted);
    EXPECT_EQ(base[0].figures[i].assumed, other[0].figures[i].assumed);
  }
}

TEST(Rows, RowsAreCoveredOrNot) {
  const auto f =
      predicted({whole_row(), with(whole_row(), {{"id", "gpu"}, {"gpu", "none such"}}),
                 with(whole_row(), {{"id", "no value"}, {"iteration_time_s", ""}}),
                 with(whole_row(), {{"id", "oom"}, {"iteration_time_s", ""}, {"status", "oom"}})});
  ASSERT_EQ(f.size(), 1u);
  EXPECT_EQ(f[0].rows, 3);
  EXPECT_EQ(f[0].covered, 2);
  ASSERT_EQ(f[0].uncovered.size(), 1u);
  EXPECT_EQ(f[0].uncovered[0].id, "gpu");
  // The out-of-memory fact counts among facts only.
  EXPECT_EQ(f[0].figures.back().id, "oom");
  EXPECT_EQ(f[0].figures.back().kind, Figure::Kind::fits);
  for (const char* said : {"OOM", "out of memory", "CUDA out of memory"}) {
    const auto other = predicted({with(whole_row(), {{"iteration_time_s", ""}, {"status", said}})});
    ASSERT_EQ(other.size(), 1u) << said;
    EXPECT_EQ(other[0].figures.back().kind, Figure::Kind::fits) << said;
  }
}

const std::vector<std::string> kMemory{"id",
                                       "family",
                                       "model",
                                       "num_layers",
                                       "hidden_size",
                                       "num_heads",
                                       "seq_len_tokens",
                                       "gpu",
                                       "num_gpus",
                                       "tp",
                                       "sequence_parallel",
                                       "pp",
                                       "virtual_stages_per_gpu",
                                       "cp",
                                       "ep",
                                       "dp",
                                       "zero_or_fsdp",
                                       "micro_batch_per_dp_rank",
                                       "global_batch_seqs",
                                       "recompute",
                                       "precision",
                                       "quantity",
                                       "value",
                                       "unit",
                                       "from_memory",
                                       "source",
                                       "notes"};

TEST(Rows, AMemoryRowThatRepeatsATrainingRowCountsOnce) {
  const Cells printed{{"peak_mem_per_gpu_gib", "60"}, {"peak_mem_definition", "as printed"}};
  const Cells row =
      with(whole_row(),
           {{"quantity", "max_memory_allocated on rank 15"}, {"value", "60"}, {"unit", "GiB"}});
  const CsvTable training = table(kTraining, {with(whole_row(), printed)});
  const CsvTable same = table(kMemory, {row, with(row, {{"value", "61"}})});
  RowsOptions o;
  o.workers = 1;
  EXPECT_EQ(predict_rows({same}, catalogue(), o).at(0).rows, 2);
  // Also where the memory row stands first.
  for (const auto& both : {std::vector<CsvTable>{training, same}, {same, training}}) {
    const auto f = predict_rows(both, catalogue(), o);
    ASSERT_EQ(f.size(), 1u);  // one family name
    EXPECT_EQ(f[0].rows, 2);
    EXPECT_EQ(f[0].repeats, 1);
  }
}

TEST(RowCase, WhatAClustersScriptsSetIsOfRowsOnItAlone) {
  const auto blocks = [](const char* gpu, const char* between) {
    return case_with({{"framework", "Megatron-DeepSpeed"},
                      {"gpu", gpu},
                      {"inter_node_interconnect", between}})
        .plan.launches.blocking;
  };
  EXPECT_TRUE(blocks("A100", "4x Omni-Path 100 Gb/s per node"));
  EXPECT_FALSE(blocks("A100", "4x InfiniBand 100 Gb/s per node"));
  EXPECT_FALSE(blocks("H100", "4x Omni-Path 100 Gb/s per node"));
  const auto ends_early = [](const char* gpu, const char* memory) {
    return case_with({{"framework", "llm-foundry"},
                      {"gpu", gpu},
                      {"gpu_memory_gb", memory},
                      {"tp", "1"},
                      {"pp", "1"},
                      {"dp", "16"},
                      {"sequence_parallel", "off"}})
        .plan.recompute_stops_early;
  };
  EXPECT_TRUE(ends_early("A100", "80"));
  EXPECT_TRUE(ends_early("H100", "80"));
  EXPECT_FALSE(ends_early("A100", "40"));
}

TEST(Rows, OfANetworkWithMambaOnlyMemoryIsPredicted) {
  RowsOptions o;
  o.workers = 1;
  const Cells hybrid = with(whole_row(), {{"model", "Nemotron-3 Nano"},
                                          {"num_layers", ""},
                                          {"vocab_size", ""},
                                          {"pp", "1"},
                                          {"dp", "8"}});
  const auto timed = predict_rows({table(kTraining, {hybrid})}, catalogue(), o).at(0);
  EXPECT_TRUE(timed.figures.empty());
  EXPECT_THAT(timed.uncovered.at(0).why, ::testing::HasSubstr("measured on no device"));
  const auto both =
      predict_rows({table(kTraining, {with(hybrid, {{"peak_mem_per_gpu_gib", "60"}})})},
                   catalogue(), o)
          .at(0);
  ASSERT_FALSE(both.figures.empty());
  for (const Figure& f : both.figures) EXPECT_NE(f.kind, Figure::Kind::time);
}

TEST(Rows, AMemoryRowOfATrainingRowsConfigurationTakesItsSizesAndSettings) {
  const auto predicted = [&](const Cells& changes, const std::vector<Cells>& runs) {
    const Cells row =
        with(with(whole_row(), changes), {{"quantity", "max_memory_allocated on rank 0"},
                                          {"value", "6"},
                                          {"unit", "GiB"},
                                          {"id", "memory"}});
    RowsOptions o;
    o.workers = 1;
    for (const FamilyFigures& f :
         predict_rows({table(kMemory, {row}), table(kTraining, runs)}, catalogue(), o)) {
      for (const Figure& x : f.figures)
        if (x.id == "memory") return x.predicted;
    }
    throw InternalError("not predicted");
  };
  const Cells few = with(whole_row(), {{"num_kv_heads", "2"}});
  const double printed = predicted({}, {}), shared = predicted({}, {few});
  EXPECT_LT(shared, printed) << "fewer key and value heads";
  EXPECT_EQ(predicted({}, {few, few}), shared);
  EXPECT_EQ(predicted({}, {few, with(whole_row(), {{"num_kv_heads", "4"}})}), printed)
      << "they do not agree";
  EXPECT_EQ(predicted({}, {with(few, {{"global_batch_seqs", "32"}})}), printed) << "another run";
  // Rank 0 has the loss.
  const Cells flat = {{"pp", "1"}, {"dp", "8"}};
  const Cells run = with(whole_row(), flat);
  const Cells fused = with(run, {{"overlap_and_other_settings", "CE fusion"}});
  EXPECT_LT(predicted(flat, {fused}), predicted(flat, {}))
      << "a loss that keeps no softmax in fp32";
  EXPECT_EQ(predicted(flat, {fused, run}), predicted(flat, {})) << "nor here";
}

TEST(RowCase, SelectiveIsTheFrameworksOwnHoweverItIsSaid) {
  const auto patterns = [](const char* text) {
    return case_with({{"framework", "torchtitan"}, {"zero_or_fsdp", "FSDP2"}, {"recompute", text}})
        .plan.recomputed()
        .patterns;
  };
  EXPECT_THAT(patterns("selective"), Contains("~*.mlp.up"));
  EXPECT_EQ(patterns(""), patterns("selective"));
  EXPECT_EQ(patterns("selective (op)"), patterns("selective"));
  EXPECT_TRUE(patterns("none").empty());
}

TEST(Rows, ALayersTimeIsOfThatLayer) {
  const Cells one = with(whole_row(), {{"pp", "1"},
                                       {"tp", "1"},
                                       {"dp", "1"},
                                       {"num_gpus", "1"},
                                       {"global_batch_seqs", "4"},
                                       {"value", "6"},
                                       {"unit", "ms"}});
  RowsOptions o;
  o.workers = 1;
  const auto predicted = [&](const std::string& quantity, const Cells& changes = {}) {
    const auto fs = predict_rows(
        {table(kMemory, {with(with(one, changes), {{"quantity", quantity}})})}, catalogue(), o);
    PARTITA_ASSERT(fs.at(0).figures.size() == 1,
                   fs.at(0).uncovered.empty() ? "no figure" : fs.at(0).uncovered.at(0).why);
    const Figure& f = fs.at(0).figures.at(0);
    EXPECT_EQ(f.kind, Figure::Kind::time);
    EXPECT_DOUBLE_EQ(f.measured, 6e-3);
    return f.predicted;
  };
  const double forward = predicted("forward time per layer"),
               backward = predicted("backward time per layer"),
               both = predicted("combined per layer");
  EXPECT_NEAR(both, forward + backward, 1e-3 * both);
  EXPECT_GT(backward, forward);
  EXPECT_LT(backward, 3 * forward);
  // All made again: a forward more.
  EXPECT_NEAR(predicted("backward time per layer", {{"recompute", "full"}}), backward + forward,
              0.02 * backward);
  EXPECT_NEAR(predicted("forward time per layer", {{"recompute", "full"}}), forward,
              0.01 * forward);
  // Parts of a layer are less than it, and what is neither are norms and sums.
  const double attention = predicted("attention layer forward_ms"),
               mlp = predicted("MLP layer forward_ms");
  EXPECT_LT(attention + mlp, forward);
  EXPECT_GT(attention + mlp, 0.8 * forward);
  // "sequence parallelism" stands among recomputation.
  const auto assumed = [&](const char* text) {
    return predict_rows({table(kMemory, {with(one, {{"quantity", "forward time per layer"},
                                                    {"tp", "8"},
                                                    {"num_gpus", "8"},
                                                    {"sequence_parallel", ""},
                                                    {"recompute", text}})})},
                        catalogue(), o)
        .at(0)
        .figures.at(0)
        .assumed;
  };
  EXPECT_THAT(assumed("selective + sequence parallel"),
              Not(Contains(HasSubstr("sequence parallel o"))));
  EXPECT_THAT(assumed("selective"), Contains(HasSubstr("sequence parallel o")));
  // Alone it runs at the clock of short kernels.
  const double alone = predicted("single MLP layer forward_ms");
  EXPECT_LT(alone, 0.95 * mlp);
  const Cells named = with(one, {{"quantity", "MLP layer forward_ms"}});
  const auto together = predict_rows(
      {table(kMemory, {named, with(named, {{"quantity", "single MLP layer forward_ms"}})})},
      catalogue(), o);
  EXPECT_EQ(together.at(0).figures.at(0).predicted, mlp);
  EXPECT_EQ(together.at(0).figures.at(1).predicted, alone);
  const auto why = [&](const char* quantity, const char* unit) {
    return predict_rows({table(kMemory, {with(one, {{"quantity", quantity}, {"unit", unit}})})},
                        catalogue(), o)
        .at(0)
        .uncovered.at(0)
        .why;
  };
  EXPECT_EQ(why("forward time per layer", "hours"),
            "unit: 'hours' is no unit of time; use s, ms or us");
  EXPECT_EQ(why("MoE layer forward_ms", "ms"),
            "quantity: no layer of this network has such a part");
  EXPECT_EQ(why("loss", "ms"),
            "quantity: 'loss' is neither a step's or layer's time nor a rank's memory");
}

TEST(Rows, AMemoryRowIsOfItsRunsFrameworkAndCard) {
  const Cells run = with(whole_row(), {{"framework", "torchtitan"},
                                       {"gpu_memory_gb", "96"},
                                       {"zero_or_fsdp", "FSDP2"},
                                       {"recompute", "selective"}});
  const Cells memory = with(run, {{"quantity", "peak memory per GPU as printed"},
                                  {"value", "6"},
                                  {"unit", "GiB"},
                                  {"id", "memory"}});
  RowsOptions o;
  o.workers = 1;
  const auto fs = predict_rows({table(kMemory, {memory}), table(kTraining, {run})}, catalogue(), o);
  const auto assumed = fs.at(0).figures.at(0).assumed;
  EXPECT_THAT(assumed, Contains(HasSubstr("~*.mlp.up")));
}

TEST(Rows, WhatALogPrintsIsWhatItsFrameworkLogs) {
  const auto memory = [](const char* framework, const char* definition) {
    const Cells row = with(whole_row(), {{"framework", framework},
                                         {"peak_mem_per_gpu_gib", "6"},
                                         {"peak_mem_definition", definition}});
    const auto families = predicted({row});
    for (const Figure& f : families.at(0).figures)
      if (f.kind == Figure::Kind::memory) return f.predicted;
    throw InternalError("no memory");
  };
  for (const auto& [framework, as] :
       std::map<const char*, const char*>{{"torchtitan", "max_memory_reserved"},
                                          {"Megatron-Bridge (NeMo container)", "max allocated"},
                                          {"Megatron-Core", "nvidia-smi"}})
    EXPECT_EQ(memory(framework, "peak memory, printed"), memory(framework, as)) << framework;
  EXPECT_LT(memory("torchtitan", "printed"), memory("torchtitan", "nvidia-smi"));
  EXPECT_LT(memory("torchtitan", "max allocated"), memory("torchtitan", "printed"));
}

TEST(Rows, RatesCountWhatIsMadeAgainWhereTheFrameworksLogDid) {
  const auto seconds = [](const char* framework, const char* recompute) {
    return predicted({with(whole_row(), {{"framework", framework},
                                         {"gpu", "A100"},
                                         {"model", "GPT-3 175B"},
                                         {"zero_or_fsdp", ""},  // else of a later Megatron
                                         {"recompute", recompute},
                                         {"iteration_time_s", ""},
                                         {"tflops_per_gpu", "100"}})})
        .at(0)
        .figures.at(0)
        .measured;
  };
  for (const char* model : {"Megatron-Bridge (NeMo container)", "NeMo", "torchtitan"})
    EXPECT_NEAR(seconds(model, "full") / seconds(model, "none"), 1, 1e-9) << model;
  for (const char* hardware : {"Megatron-LM", "Megatron-LM (2021)", "Megatron-DeepSpeed"})
    EXPECT_GT(seconds(hardware, "full"), 1.1 * seconds(hardware, "none")) << hardware;
}

// FlashAttention's version, padded capacities, what a framework's name says of sharding.
TEST(RowCase, KernelsCapacitiesAndShardingAreWhatTheRowSays) {
  const Cells hopper = {{"framework", "torchtitan"}, {"zero_or_fsdp", "FSDP2"}, {"gpu", "H100"}};
  const auto version = [&](const char* kernel) {
    return case_with(with(hopper, {{"attention_kernel", kernel}})).plan.kernels.flash;
  };
  EXPECT_EQ(version("flash"), 2) << "torch's own";
  EXPECT_EQ(version("FlashAttention-3"), 0);
  EXPECT_EQ(version("SDPA (cuDNN)"), 0);
  EXPECT_EQ(version("flash-attn 1.0.3"), 1);
  EXPECT_EQ(case_with({{"attention_kernel", "FA2"}}).plan.kernels.flash, 2);
  EXPECT_EQ(
      case_with({{"attention_kernel", "TE fused/flash; MLA for DeepSeek"}}).plan.kernels.flash, 0);

  // Rows that are predicted otherwise are told apart.
  const auto key = [&](const Cells& cells) { return case_with(with(hopper, cells)).key(); };
  EXPECT_NE(key({{"attention_kernel", "FA2"}}), key({{"attention_kernel", "FA3"}}));
  EXPECT_NE(key({{"overlap_and_other_settings", "grad_reduce_in_fp32=True"}}),
            key({{"overlap_and_other_settings", "grad_reduce_in_fp32=False"}}));

  const Cells mixture = with(only_named("Mixtral 8x7B"),
                             {{"framework", "NeMo"}, {"ep", "8"}, {"dp", "16"}, {"etp", "1"}});
  const auto waits = [&](const Cells& cells) {
    return case_with(with(mixture, cells)).plan.launches.waits_for_counts;
  };
  EXPECT_TRUE(waits({}));
  EXPECT_FALSE(waits({{"model", "Mixtral 8x7B (tokendrop)"}}));
  EXPECT_FALSE(waits({{"overlap_and_other_settings", "--moe-pad-expert-input-to-capacity"}}));
  EXPECT_TRUE(waits({{"model", "Mixtral 8x7B (dropless)"}}));

  const auto zero = [&](const char* framework, const char* cell) {
    return case_with(
               with(hopper,
                    {{"framework", framework}, {"zero_or_fsdp", cell}, {"pp", "1"}, {"dp", "8"}}))
        .plan.zero;
  };
  EXPECT_EQ(zero("DeepSpeed ZeRO-3", ""), 3);
  EXPECT_EQ(zero("HF Trainer + DeepSpeed ZeRO-1", ""), 1);
  EXPECT_EQ(zero("DeepSpeed ZeRO-3", "ZeRO-2"), 2);
  EXPECT_EQ(zero("DeepSpeed", "3"), 3);
  EXPECT_EQ(zero("DeepSpeed", "ZeRO++"), 3);
}

// Rows of one key share a prediction: whatever a row says, equal keys are equal plans.
TEST(RowCase, EqualKeysAreEqualPlans) {
  std::mt19937 rng(29);
  const auto pick = [&](const std::vector<const char*>& from) { return from[rng() % from.size()]; };
  std::map<std::string, Plan> seen;
  int alike = 0;
  for (int n = 0; n < 1500; ++n) {
    const char* framework = pick({"torchtitan", "Megatron-Core", "Megatron-LM", "PyTorch FSDP2",
                                  "NVIDIA NeMo", "Megatron-Bridge (NeMo container)"});
    Cells row = {
        {"framework", framework},
        {"pp", "1"},
        {"dp", "8"},
        {"zero_or_fsdp", pick({"", "ZeRO-1", "FSDP2"})},
        {"attention_kernel", pick({"", "flash", "FA2", "FA3", "unfused"})},
        {"precision", pick({"bf16", "fp8", "fp16"})},
        {"recompute", pick({"", "none", "selective", "selective (attention core)", "full"})},
        {"overlap_and_other_settings",
         pick({"", "torch.compile", "eager", "grad_reduce_in_fp32=False", "fused cross entropy",
               "CUDA graphs", "overlap paths off", "no DP overlap", "token dropping"})}};
    RowCase c;
    try {
      c = case_with(row);
    } catch (const InputError&) {
      continue;
    }
    const auto [at, fresh] = seen.emplace(c.key(), c.plan);
    if (fresh) continue;
    ++alike;
    const Plan &a = at->second, &b = c.plan;
    EXPECT_EQ(a.kernels, b.kernels) << c.key();
    EXPECT_EQ(a.launches, b.launches) << c.key();
    EXPECT_EQ(a.allocations, b.allocations) << c.key();
    EXPECT_EQ(a.recomputed(), b.recomputed()) << c.key();
    EXPECT_EQ(a.precision.gradients, b.precision.gradients) << c.key();
    EXPECT_EQ(a.precision.gradient_communication, b.precision.gradient_communication) << c.key();
    EXPECT_EQ(a.overlap_gradients, b.overlap_gradients) << c.key();
    EXPECT_EQ(a.tensor_parallel_in_turn, b.tensor_parallel_in_turn) << c.key();
    EXPECT_EQ(a.send_wait, b.send_wait) << c.key();
    EXPECT_EQ(a.zero, b.zero) << c.key();
    if (HasFailure()) return;
  }
  EXPECT_GT(alike, 100);
}

TEST(RowCase, TorchtitanIsCompiledWhereTheRowSaysSo) {
  const auto framework = [](const Cells& cells) {
    return case_with(with({{"framework", "torchtitan"}, {"zero_or_fsdp", "FSDP2"}}, cells))
        .plan.framework;
  };
  const char* kSettings = "overlap_and_other_settings";
  EXPECT_EQ(framework({}), "torchtitan-eager");
  EXPECT_EQ(framework({{kSettings, "torch.compile"}}), "torchtitan");
  EXPECT_EQ(framework({{kSettings, "FSDP2, compile + async TP"}}), "torchtitan");
  EXPECT_EQ(framework({{kSettings, "no torch.compile"}}), "torchtitan-eager");
  EXPECT_EQ(framework({{kSettings, "compile.enable=false"}}), "torchtitan-eager");
  EXPECT_EQ(framework({{"framework", "torchtitan (FSDP2 + torch.compile)"}}), "torchtitan");
  EXPECT_EQ(framework({{"precision", "fp8"}}), "torchtitan");
  EXPECT_EQ(framework({{kSettings, "float8 rowwise"}}), "torchtitan");
  EXPECT_EQ(framework({{"precision", "fp8"}, {kSettings, "eager"}}), "torchtitan-eager");
  // Others are one profile.
  EXPECT_EQ(framework({{"framework", "Megatron-Core"}, {"zero_or_fsdp", ""}}), "megatron-core");
}

// What a cluster of PCIe cards has, and tables without the columns that nobody measured.
TEST(Rows, ATableNeedsOneMeasuredColumnOnly) {
  CsvTable t = table({"id", "model", "seq_len_tokens", "gpu", "num_gpus", "framework", "tp", "dp",
                      "micro_batch_per_dp_rank", "global_batch_seqs", "iteration_time_s"},
                     {{{"id", "a"},
                       {"model", "gpt2"},
                       {"seq_len_tokens", "1024"},
                       {"gpu", "H100 PCIe"},
                       {"num_gpus", "8"},
                       {"framework", "pytorch-ddp"},
                       {"dp", "8"},
                       {"micro_batch_per_dp_rank", "4"},
                       {"global_batch_seqs", "32"},
                       {"iteration_time_s", "0.2"}}});
  EXPECT_EQ(recognise(t), RowSchema::training);
  RowsOptions o;
  o.workers = 1;
  const auto families = predict_rows({t}, catalogue(), o);
  ASSERT_EQ(families.size(), 1u);
  EXPECT_TRUE(families[0].uncovered.empty()) << families[0].uncovered[0].why;
}

TEST(Rows, MemoryOfAStageAndOfABlock) {
  const auto of = [](const char* quantity, const char* pp) {
    Cells row = with(whole_row(), {{"num_gpus", "8"},
                                   {"pp", pp},
                                   {"tp", "1"},
                                   {"dp", "4"},
                                   {"quantity", quantity},
                                   {"value", "6"},
                                   {"unit", "GiB"}});
    if (std::string(pp) == "1") row["num_gpus"] = "4";
    RowsOptions o;
    o.workers = 1;
    const auto families = predict_rows({table(kMemory, {row})}, catalogue(), o);
    PARTITA_ASSERT(families.at(0).figures.size() == 1, "no figure");
    return families[0].figures[0].predicted;
  };
  EXPECT_EQ(of("peak allocated memory, first stage", "2"),
            of("max_memory_allocated on rank 0", "2"));
  EXPECT_EQ(of("peak allocated memory of the last pipeline stage", "2"),
            of("max_memory_allocated on rank 7", "2"));
  EXPECT_NE(of("peak allocated memory, last stage", "2"),
            of("peak allocated memory, first stage", "2"));
  // Between steps there are no activations.
  EXPECT_LT(of("mem-allocated-bytes", "2"), of("mem-max-allocated-bytes", "2"));
  // Of one of four blocks, one micro-batch, however many are in flight; without the logits'.
  EXPECT_EQ(of("activation memory per layer", "1"), of("activation memory per layer", "2"));
  EXPECT_LT(4 * of("activation memory per layer", "1"), of("activation memory", "1"));
  EXPECT_GT(8 * of("activation memory per layer", "1"), of("activation memory", "1"));
}

TEST(Rows, AQuantitysNameMayTellTheFramework) {
  const auto assumed = [](const char* quantity) {
    RowsOptions o;
    o.workers = 1;
    const Cells row = with(whole_row(), {{"quantity", quantity}, {"value", "6"}, {"unit", "GiB"}});
    return predict_rows({table(kMemory, {row})}, catalogue(), o).at(0).figures.at(0).assumed;
  };
  const char* log = "framework megatron-ci, by its name of the quantity";
  EXPECT_THAT(assumed("mem-max-allocated-bytes (peak, logging rank)"), ::testing::Contains(log));
  EXPECT_THAT(assumed("max_memory_allocated on rank 0"), ::testing::Not(::testing::Contains(log)));
}

TEST(Rows, ThreadsChangeNothing) {
  std::vector<Cells> rows;
  for (int i = 0; i < 12; ++i)
    rows.push_back(with(whole_row(), {{"id", fmt::format("r{}", i)},
                                      {"num_layers", fmt::format("{}", 2 + i % 5)},
                                      {"global_batch_seqs", fmt::format("{}", 8 + 4 * (i % 3))}}));
  const auto one = predicted(rows, 1), four = predicted(rows, 4);
  ASSERT_EQ(one.size(), four.size());
  ASSERT_EQ(one[0].figures.size(), four[0].figures.size());
  for (std::size_t i = 0; i < one[0].figures.size(); ++i) {
    EXPECT_EQ(one[0].figures[i].id, four[0].figures[i].id);
    EXPECT_EQ(one[0].figures[i].predicted, four[0].figures[i].predicted);
  }
}

/// Whatever a cell says, its row is covered or has a reason, and other rows don't mind.
TEST(Rows, AnyTextInAnyCellIsAtWorstNotCovered) {
  std::mt19937_64 random(20260101);
  const std::vector<std::string> texts{"",
                                       "0",
                                       "1",
                                       "2",
                                       "3",
                                       "7",
                                       "8",
                                       "64",
                                       "1e3",
                                       "1e18",
                                       "99999999999999999999",
                                       "-1",
                                       "nan",
                                       "inf",
                                       "0.5",
                                       "on",
                                       "off",
                                       "full",
                                       "none",
                                       "x",
                                       ",",
                                       "\"",
                                       "FSDP=0",
                                       "ZeRO-3",
                                       "zero9",
                                       "A100",
                                       "H100 PCIe",
                                       "V100",
                                       "MXFP8",
                                       "NVFP4",
                                       "tf32",
                                       "DeepSeekV3",
                                       "Mixtral 8x7B",
                                       "resnet50",
                                       "400 Gb/s",
                                       "0 Gb/s per GPU",
                                       "9999999999x1e9 Tb/s",
                                       "per node",
                                       "((((",
                                       "))))",
                                       "on rank 99",
                                       "% of",
                                       "\xff\xfe",
                                       std::string(3000, 'a')};
  std::vector<Cells> rows{whole_row()};
  for (int i = 0; i < 250; ++i) {
    Cells cells = whole_row();
    for (int k = 0; k < 3; ++k) {
      const auto& column = kTraining[2 + random() % (kTraining.size() - 4)];
      if (column == "family" || column == "from_memory") continue;
      cells[column] = texts[random() % texts.size()];
    }
    cells["id"] = fmt::format("r{}", i);
    rows.push_back(cells);
  }
  const auto f = predicted(rows, 2);
  std::int64_t all = 0;
  for (const auto& family : f) {
    all += family.rows;
    EXPECT_EQ(family.rows, family.covered + static_cast<std::int64_t>(family.uncovered.size()));
    for (const auto& u : family.uncovered) {
      EXPECT_NE(u.why, "") << u.id;
      EXPECT_THAT(u.why, ::testing::Not(HasSubstr("bug of Partita"))) << u.id;
    }
  }
  EXPECT_GE(all, 150);
  EXPECT_EQ(f[0].figures.at(0).id, "x");
}

/// A row of the table of images and BERT.
RowCase sample_case(const Cells& changes) {
  const std::vector<std::string> header{"id",
                                        "model",
                                        "framework",
                                        "gpu",
                                        "gpu_memory_gb",
                                        "num_gpus",
                                        "gpus_per_node",
                                        "precision",
                                        "batch_per_gpu",
                                        "accumulation_steps",
                                        "global_batch",
                                        "parallelism",
                                        "images_or_samples_per_s_total"};
  const CsvTable t = table(header, {with({{"id", "x"},
                                          {"model", "BERT (Pre-training)"},
                                          {"framework", "PyTorch"},
                                          {"gpu", "A100"},
                                          {"gpu_memory_gb", "80"},
                                          {"num_gpus", "1"},
                                          {"gpus_per_node", "8"},
                                          {"precision", "TF32"},
                                          {"batch_per_gpu", "32"},
                                          {"parallelism", "data parallel"}},
                                         changes)});
  return case_of(RowSchema::convolution, Configuration(RowSchema::convolution, Row(t, 0)),
                 catalogue());
}

TEST(RowCase, BertsTaskDecidesItsLengthAndItsHead) {
  using Head = TransformerConfig::Head;
  struct Expected {
    Cells cells;
    std::int64_t sequence, predicted;
    Head head;
  };
  const Head masked = Head::masked_language_model, classes = Head::token_classifier;
  for (const auto& [cells, sequence, predicted, head] : std::vector<Expected>{
           // Half a sample a GiB of 80, and one more; padded to bins, without padding, to 512.
           {{{"batch_per_gpu", "40"}, {"precision", "mixed precision (AMP FP16)"}},
            288,
            45,
            masked},
           {{{"batch_per_gpu", "41"}, {"precision", "mixed precision (AMP FP16)"}},
            128,
            20,
            masked},
           // In 32 bits three tenths.
           {{{"batch_per_gpu", "24"}}, 288, 45, masked},
           {{{"batch_per_gpu", "25"}}, 128, 20, masked},
           {{{"batch_per_gpu", "25"}, {"precision", "FP32"}}, 128, 20, masked},
           {{{"framework", "TensorFlow"}, {"batch_per_gpu", "16"}}, 512, 80, masked},
           {{{"framework", "PyTorch NVIDIA Release 22.04"},
             {"model", "BERT-large (MLPerf phase-2, seq 512)"}},
            256,
            40,
            masked},
           {{{"model", "BERT large pre-training seq 128"}}, 128, 20, masked},
           // Accumulated batches; at most 72 samples a GiB are of the second phase.
           {{{"batch_per_gpu", "5760"}}, 288, 45, masked},
           {{{"batch_per_gpu", "5761"}}, 128, 20, masked},
           {{{"batch_per_gpu", "641"}}, 288, 45, masked},
           {{{"batch_per_gpu", "640"}}, 128, 20, masked},
           // 32 GB stand in the name: 2,048 samples are of the second phase.
           {{{"gpu", "V100"},
             {"gpu_memory_gb", ""},
             {"model", "BERT (Pre-training NVIDIA DGX-1 With 32G)"},
             {"batch_per_gpu", "2048"}},
            288,
            45,
            masked},
           {{{"model", "BERT (Fine-tuning)"}}, 384, 0, classes},
           {{{"model", "BERT (Fine-tuning performance for SQuAD v1.1)"}}, 384, 0, classes},
           {{{"model", "BERT/biobert (Fine-tuning performance for NER)"}}, 128, 0, classes},
           // A base model's sample takes 3/8 of the memory: 64 fit in 80 GiB.
           {{{"model", "BERT-base (Pre-training)"}, {"batch_per_gpu", "64"}}, 288, 45, masked},
           {{{"model", "BERT-base (Pre-training)"}, {"batch_per_gpu", "65"}}, 128, 20, masked}}) {
    const RowCase c = sample_case(cells);
    SCOPED_TRACE(::testing::PrintToString(cells));
    EXPECT_EQ(c.transformer->sequence, sequence);
    EXPECT_EQ(c.transformer->predicted, predicted);
    EXPECT_EQ(c.transformer->head, head);
    EXPECT_EQ(c.transformer->tied, head == masked);
    EXPECT_EQ(c.transformer->dropout, 0.1);
  }
}

TEST(RowCase, PassesOfAnUpdateAndKernelsOfFineTuning) {
  const RowCase passes = sample_case({{"num_gpus", "4"}, {"accumulation_steps", "64"}});
  EXPECT_EQ(passes.plan.micro_batch, 32);
  EXPECT_EQ(passes.plan.global_batch, 32 * 4 * 64);
  EXPECT_EQ(sample_case({{"num_gpus", "4"}}).plan.global_batch, 32 * 4);
  for (const char* how : {"data parallel", "DDP", "dp", "data-parallel", "Data Parallelism", ""})
    EXPECT_EQ(sample_case({{"parallelism", how}}).plan.dp, 1) << how;
  for (const char* how : {"spatial", "data parallel (model split over 2)", "DP + PP"})
    EXPECT_THAT(
        [how] {
          sample_case({{"parallelism", how}});
        },
        ThrowsMessage<InputError>(::testing::HasSubstr("is not read; use data parallel")))
        << how;
  const RowCase all = sample_case({{"num_gpus", "4"},
                                   {"accumulation_steps", "64"},
                                   {"batch_per_gpu", ""},
                                   {"global_batch", "512"}});
  EXPECT_EQ(all.plan.micro_batch, 2);
  EXPECT_EQ(all.plan.global_batch, 512);
  EXPECT_THAT(
      [] {
        sample_case({{"num_gpus", "4"},
                     {"accumulation_steps", "64"},
                     {"batch_per_gpu", ""},
                     {"global_batch", "300"}});
      },
      ThrowsMessage<InputError>(::testing::HasSubstr("300 is no multiple of 4 GPUs and 64 passes")));
  // run_squad.py's GELU is not compiled.
  const RowCase squad = sample_case({{"model", "BERT (Fine-tuning)"}}), before = sample_case({});
  EXPECT_EQ(squad.plan.kernels.activation_passes_forward, 13);
  EXPECT_EQ(squad.plan.kernels.activation_passes_backward, 24);
  EXPECT_EQ(before.plan.kernels.activation_passes_forward, 0);
  EXPECT_THAT(squad.assumed, ::testing::Contains("activations of separate kernels (workload)"));
}

/// Its generator is trained with it and left behind.
TEST(RowCase, ElectraHasItsGeneratorInPreTrainingAlone) {
  const RowCase before = sample_case(
      {{"model", "ELECTRA (Pre-training)"}, {"framework", "TensorFlow2"}, {"batch_per_gpu", "12"}});
  EXPECT_EQ(before.transformer->sequence, 512);
  EXPECT_EQ(before.transformer->generator.hidden, 256);
  EXPECT_EQ(before.transformer->generator.predicted, 80);
  EXPECT_EQ(before.transformer->predicted, 0);
  EXPECT_THAT(before.assumed, ::testing::Contains("80 predicted tokens"));
  const RowCase after = sample_case({{"model", "ELECTRA (Fine-tuning)"}});
  EXPECT_EQ(after.transformer->generator.hidden, 0);
  EXPECT_EQ(after.transformer->head, TransformerConfig::Head::token_classifier);
  EXPECT_NE(before.key(), after.key());
}

TEST(Rows, SettingsThatOnlyNotesSayAreOfTheirRowsAlone) {
  const std::string file = fmt::format("/tmp/partita-settings-{}.yaml", ::getpid());
  const auto load = [&](const std::string& entries) {
    std::ofstream(file) << "schema: partita.settings/1\nsettings:\n" << entries;
    return load_settings(file);
  };
  const auto settings = load(R"(
  - rows: [a-1-*, a-2-*]
    precisions: ["mixed*"]
    cells: {batch_per_gpu: 4, global_batch: ""}
    reason: the head of its table
  - rows: [b]
    cells: {batch_per_gpu: 7}
    reason: notes
)");
  const std::vector<std::string> header{"id",          "gpu",
                                        "precision",   "batch_per_gpu",
                                        "parallelism", "images_or_samples_per_s_total",
                                        "global_batch"};
  const auto batch = [&](const char* id, const char* precision) {
    const CsvTable t = table(
        header,
        {{{"id", id}, {"precision", precision}, {"batch_per_gpu", "2"}, {"global_batch", "16"}}});
    Configuration c(RowSchema::convolution, Row(t, 0));
    apply_settings(settings, id, c);
    return std::tuple(c["batch_per_gpu"], c["global_batch"], c.replaced());
  };
  const std::vector<std::string> none, said{"batch_per_gpu 4 (the head of its table)"};
  EXPECT_EQ(batch("a-1-3", "mixed precision"), std::tuple("4", "", said));
  EXPECT_EQ(batch("a-2-3", "mixed precision"), std::tuple("4", "", said));
  EXPECT_EQ(batch("a-2-3", "FP32"), std::tuple("2", "16", none));
  EXPECT_EQ(batch("a-3-3", "mixed precision"), std::tuple("2", "16", none));
  EXPECT_EQ(std::get<0>(batch("b", "FP32")), "7");
  // A prediction lists what was replaced; a measured column is no setting.
  const CsvTable t =
      table({"id", "gpu", "model", "framework", "num_gpus", "gpus_per_node", "precision",
             "batch_per_gpu", "parallelism", "images_or_samples_per_s_total"},
            {{{"id", "b"},
              {"model", "ResNet-50"},
              {"framework", "PyTorch"},
              {"gpu", "A100"},
              {"num_gpus", "8"},
              {"gpus_per_node", "8"},
              {"precision", "TF32"},
              {"batch_per_gpu", "256"},
              {"parallelism", "data parallel"},
              {"images_or_samples_per_s_total", "1000"}}});
  Catalogue with_settings = catalogue();
  with_settings.settings = settings;
  const auto families = predict_rows({t}, with_settings, {});
  const Figure& figure = families.at(0).figures.at(0);
  EXPECT_DOUBLE_EQ(figure.measured, 7 * 8 / 1000.0);
  EXPECT_THAT(figure.assumed, ::testing::Contains("batch_per_gpu 7 (notes)"));
  for (const auto& [entry, message] : std::vector<std::pair<std::string, std::string>>{
           {"  - {rows: [a], cells: {step_time_s: 1}, reason: x}",
            "'step_time_s' is no column of settings"},
           {"  - {rows: [a], cells: {batch_per_gpu: 1}, reason: x, why: y}", "why"},
           {"  - {rows: [a], cells: {batch_per_gpu: 1}}", "reason"}}) {
    try {
      load(entry);
      FAIL() << entry;
    } catch (const InputError& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr(message));
    }
  }
  std::filesystem::remove(file);
}

TEST(Rows, SchemasByTheirColumns) {
  const auto schema = [](std::vector<std::string> header) { return recognise(table(header, {})); };
  EXPECT_EQ(schema(kTraining), RowSchema::training);
  EXPECT_EQ(schema({"id", "gpu", "collective", "size_bytes", "time_us"}), RowSchema::collectives);
  EXPECT_EQ(schema({"id", "gpu", "kernel", "m", "n", "k", "tflops"}), RowSchema::products);
  EXPECT_EQ(schema({"id", "gpu", "batch_per_gpu", "parallelism", "images_or_samples_per_s_total"}),
            RowSchema::convolution);
  EXPECT_EQ(schema({"id", "gpu", "quantity", "value", "unit", "seq_len_tokens"}),
            RowSchema::memory);
  EXPECT_THAT(
      [&] {
        schema({"id", "gpu"});
      },
      ThrowsMessage<InputError>(HasSubstr("the columns are those of no known table")));
  EXPECT_THAT(
      [&] {
        schema({"gpu", "collective", "size_bytes", "time_us"});
      },
      ThrowsMessage<InputError>(HasSubstr("looks like collectives but has no column 'id'")));
}

TEST(Rows, CollectivesAndProductsByHand) {
  const CsvTable c = table({"id", "collective", "gpu", "num_gpus", "gpus_per_node", "size_bytes",
                            "time_us", "busbw_gb_per_s"},
                           {{{"id", "a"},
                             {"collective", "all_reduce"},
                             {"gpu", "H100"},
                             {"num_gpus", "8"},
                             {"gpus_per_node", "8"},
                             {"size_bytes", "1048576"},
                             {"busbw_gb_per_s", "35"}},
                            {{"id", "b"},
                             {"collective", "all_to_all"},
                             {"gpu", "H100"},
                             {"num_gpus", "8"},
                             {"gpus_per_node", "8"},
                             {"size_bytes", "1048576"},
                             {"time_us", "50"}}});
  // 1 MiB x 14/8 at 35 GB/s.
  EXPECT_DOUBLE_EQ(measured_collective(Row(c, 0)), 1048576 * 1.75 / 35e9);
  EXPECT_DOUBLE_EQ(measured_collective(Row(c, 1)), 50e-6);
  const auto f = collective_figure(Configuration(RowSchema::collectives, Row(c, 0)), catalogue());
  for (const char* word : {"AllReduce", "all-reduce"}) {
    CsvTable same = c;
    std::replace(same.records[0].fields.begin(), same.records[0].fields.end(),
                 std::string("all_reduce"), std::string(word));
    EXPECT_EQ(
        collective_figure(Configuration(RowSchema::collectives, Row(same, 0)), catalogue()).seconds,
        f.seconds)
        << word;
  }
  const auto changed = [&](const Cells& changes) {
    Cells cells{{"id", "a"},           {"collective", "all_reduce"}, {"gpu", "H100"},
                {"num_gpus", "16"},    {"gpus_per_node", "8"},       {"num_nodes", "2"},
                {"size_bytes", "1000"}};
    return table({"id", "collective", "gpu", "num_gpus", "num_nodes", "gpus_per_node", "library",
                  "size_bytes", "time_us", "busbw_gb_per_s", "algbw_gb_per_s"},
                 {with(cells, changes)});
  };
  EXPECT_DOUBLE_EQ(measured_collective(Row(changed({{"algbw_gb_per_s", "2"}}), 0)), 5e-7);
  // Everyone to the next: one pair crosses between nodes, over one card of 50 GB/s.
  const auto sent = [&](const Cells& more) {
    const CsvTable t =
        changed(with({{"collective", "sendrecv"}, {"size_bytes", "1000000000"}}, more));
    return 1 /
           collective_figure(Configuration(RowSchema::collectives, Row(t, 0)), catalogue()).seconds;
  };
  EXPECT_GT(sent({}), 40);
  EXPECT_LT(sent({}), 50);
  EXPECT_NEAR(sent({{"num_gpus", "64"}, {"num_nodes", "8"}}), sent({}), 1e-9);
  EXPECT_GT(sent({{"num_gpus", "8"}, {"num_nodes", "1"}}), 200);
  for (const auto& [cells, why] :
       {std::pair<Cells, const char*>{{{"library", "Gloo"}}, "'Gloo' is not NCCL"},
        {{{"num_gpus", "64"}}, "2 nodes of 8 have no 64 GPUs"}}) {
    const CsvTable t = changed(cells);
    EXPECT_THAT(
        [&] { collective_figure(Configuration(RowSchema::collectives, Row(t, 0)), catalogue()); },
        ThrowsMessage<InputError>(HasSubstr(why)));
  }
  // Not the curve of that very node.
  const auto node = nccl::communicator(load_topology("dgx-h100:8 gpus"), {0, 1, 2, 3, 4, 5, 6, 7});
  const auto what = nccl::Collective::all_reduce;
  EXPECT_DOUBLE_EQ(f.seconds,
                   1e-6 * nccl::time_us(node, what, nccl::choose(node, what, 1 << 20), 1 << 20));
  const CsvTable p = table({"id", "kernel", "gpu", "precision", "m", "n", "k", "batch_or_groups",
                            "extra", "tflops", "time_s"},
                           {{{"id", "a"},
                             {"kernel", "matmul"},
                             {"gpu", "H100"},
                             {"precision", "bf16"},
                             {"m", "4096"},
                             {"n", "4096"},
                             {"k", "4096"},
                             {"tflops", "600"}},
                            {{"id", "b"},
                             {"kernel", "fused attention (flash SDPA) backward"},
                             {"gpu", "H100"},
                             {"precision", "bf16"},
                             {"m", "4096"},
                             {"extra",
                              "batch=1, seq_len=4096, head_num=32, kv_head_num=8, "
                              "qk_head_dim=128, v_head_dim=128"},
                             {"tflops", "300"}}});
  EXPECT_DOUBLE_EQ(measured_product(Row(p, 0)), 2. * 4096 * 4096 * 4096 / 600e12);
  EXPECT_DOUBLE_EQ(measured_product(Row(p, 1)), 2.5 * 4. * 32 * 4096 * 4096 * 128 / 300e12);
  CsvTable bwd = p;
  std::replace(bwd.records[1].fields.begin(), bwd.records[1].fields.end(),
               std::string("fused attention (flash SDPA) backward"),
               std::string("flash attention bwd"));
  EXPECT_EQ(measured_product(Row(bwd, 1)), measured_product(Row(p, 1)));
  const auto product = product_figure(Configuration(RowSchema::products, Row(p, 0)), catalogue());
  EXPECT_NEAR(product.ideal, 2. * 4096 * 4096 * 4096 / 989.4e12, 1e-12);
  EXPECT_GT(product.seconds, product.ideal);
}

// One GPU of each of 8 nodes talks over the network, 8 of one node over NVLink; what a run was told
// of NCCL's algorithms is kept to.
TEST(Kernels, CollectivesAreWhereTheirNodesAndLibrarysTextsPutThem) {
  const auto seconds = [](const Cells& changes) {
    Cells row = {{"id", "a"},         {"collective", "all_reduce"},
                 {"gpu", "H100"},     {"num_gpus", "8"},
                 {"num_nodes", "1"},  {"gpus_per_node", "8"},
                 {"library", "NCCL"}, {"size_bytes", "1073741824"},
                 {"time_us", "50"},   {"inter_node_interconnect", "400 Gb/s per GPU"}};
    const CsvTable t =
        table({"id", "collective", "gpu", "num_gpus", "num_nodes", "gpus_per_node", "library",
               "inter_node_interconnect", "size_bytes", "time_us", "busbw_gb_per_s"},
              {with(row, changes)});
    return collective_figure(Configuration(RowSchema::collectives, Row(t, 0)), catalogue()).seconds;
  };
  const double node = seconds({});
  // 7/4 of a GiB at no more than 50 GB/s.
  EXPECT_GT(seconds({{"num_nodes", "8"}, {"gpus_per_node", "1"}}), 1.75 * 1073741824 / 50e9);
  EXPECT_LT(node, 1.75 * 1073741824 / 300e9);
  const double ring = seconds({{"library", "nccl-tests, NCCL_ALGO=Ring"}});
  EXPECT_GT(ring, 1.05 * node);  // which is NVLS's
  EXPECT_EQ(seconds({{"library", "nccl-tests, algo Ring"}}), ring);
  EXPECT_GT(seconds({{"library", "NCCL_NVLS_ENABLE=0"}}), 1.05 * node);
  EXPECT_NE(seconds({{"library", "nccl-tests, algo Tree"}}), ring);
  EXPECT_EQ(seconds({{"library", "algo NVLS"}}), node);
}

TEST(Kernels, ProductsAndAttentionAreReadAsOthersWriteThem) {
  const std::vector<std::string> columns{"id", "kernel", "gpu",   "precision", "m",
                                         "n",  "k",      "extra", "tflops",    "time_s"};
  const Cells product = {{"id", "a"},           {"kernel", "matmul"}, {"gpu", "H100"},
                         {"precision", "bf16"}, {"m", "4096"},        {"n", "1024"},
                         {"k", "4096"},         {"tflops", "600"}};
  const Cells attention = {
      {"id", "a"},       {"kernel", "FA3 forward (flash)"},
      {"gpu", "H100"},   {"precision", "bf16"},
      {"tflops", "300"}, {"extra", "batch=2, seqlen=4096, heads=32, head_dim=128"}};
  const auto figure = [&](const Cells& row) {
    const CsvTable t = table(columns, {row});
    return product_figure(Configuration(RowSchema::products, Row(t, 0)), catalogue());
  };
  EXPECT_EQ(figure(with(product, {{"n", "1,024"}})).seconds, figure(product).seconds);
  const KernelFigure causal = figure(attention),
                     all = figure(
                         with(attention,
                              {{"extra",
                                "batch=2, seqlen=4096, heads=32, head_dim=128, causal=False"}}));
  EXPECT_DOUBLE_EQ(all.ideal, 2 * causal.ideal);
  EXPECT_GT(all.seconds, 1.5 * causal.seconds);
  // A rate of nothing is said to be one.
  RowsOptions o;
  o.workers = 1;
  const auto families =
      predict_rows({table(columns, {with(product, {{"n", ""}})})}, catalogue(), o);
  ASSERT_EQ(families.at(0).uncovered.size(), 1U);
  EXPECT_EQ(families[0].uncovered[0].why, "m: the rate is printed without what it is of");
}

// 256 experts' 4096 x 7168 gradients, read and written: 60.1 GB in fp32, 30.1 in bf16, at 8 TB/s.
TEST(Kernels, GradientsOfExpertsAreReadAndWrittenInTheirType) {
  const auto seconds = [](const std::string& stage, const std::string& type) {
    const CsvTable t = table(
        {"id", "kernel", "gpu", "precision", "m", "n", "k", "batch_or_groups", "extra", "tflops",
         "time_s"},
        {{{"id", "a"},
          {"kernel", "grouped GEMM (TE) " + stage},
          {"gpu", "B200 SXM"},
          {"precision", "bf16"},
          {"m", "128"},
          {"n", "4096"},
          {"k", "7168"},
          {"batch_or_groups", "256"},
          {"extra", "dtype=bf16, out_dtype=bf16, main_grad_dtype=" + type + ", stage=" + stage +
                        ", accumulate=" + (stage == "bwd_grad_w" ? "True" : "False")},
          {"tflops", "300"}}});
    return product_figure(Configuration(RowSchema::products, Row(t, 0)), catalogue()).seconds;
  };
  EXPECT_GT(seconds("bwd_grad_w", "fp32"), 60.1e9 / 8e12);
  EXPECT_GT(seconds("bwd_grad_w", "bf16"), 30.1e9 / 8e12);
  EXPECT_LT(seconds("bwd_grad_w", "bf16"), 0.7 * seconds("bwd_grad_w", "fp32"));
  EXPECT_EQ(seconds("fwd", "fp32"), seconds("fwd", "bf16"));
  EXPECT_LT(seconds("bwd_grad_act", "fp32"), 0.7 * seconds("bwd_grad_w", "fp32"));
}

// ---- the reference ---------------------------------------------------------------------------

std::string reference() {
  const char* chosen = std::getenv("PARTITA_REFERENCE");
  const std::string folder =
      chosen != nullptr && *chosen != '\0' ? chosen : data_folder("../shared/reference");
  return std::filesystem::is_directory(folder) ? folder : "";
}

TEST(Reference, EveryRowIsCoveredOrSaysWhy) {
  const std::string folder = reference();
  if (folder.empty()) GTEST_SKIP() << "no ../shared/reference; set PARTITA_REFERENCE";
  std::vector<CsvTable> tables;
  for (const char* name : {"cnn_training", "collectives", "gemm"}) {
    const std::string file = fmt::format("{}/{}.csv", folder, name);
    tables.push_back(parse_csv(read_file(file), file));
  }
  RowsOptions o;
  const auto f = predict_rows(tables, catalogue(), o);
  ASSERT_EQ(f.size(), 3u);
  for (const auto& family : f) {
    EXPECT_EQ(family.rows, family.covered + static_cast<std::int64_t>(family.uncovered.size()));
    EXPECT_GT(family.covered, 0) << family.family;
    for (const auto& u : family.uncovered)
      EXPECT_THAT(u.why, ::testing::Not(HasSubstr("bug of Partita"))) << u.id;
  }
}

TEST(Reference, AllTrainingRowsAreReadable) {
  const std::string folder = reference();
  if (folder.empty()) GTEST_SKIP() << "no ../shared/reference; set PARTITA_REFERENCE";
  // Reading alone: predicting them all takes half a minute and is `partita validate published`.
  for (const auto& [name, least] : {std::pair{"llm_training", 0.9}, {"memory", 0.9}}) {
    const std::string file = fmt::format("{}/{}.csv", folder, name);
    const CsvTable t = parse_csv(read_file(file), file);
    const RowSchema schema = recognise(t);
    std::size_t read = 0;
    for (std::size_t i = 0; i < t.records.size(); ++i) {
      try {
        case_of(schema, Configuration(schema, Row(t, i)), catalogue());
        ++read;
      } catch (const InputError& e) {
        EXPECT_THAT(std::string(e.what()), HasSubstr(": "));
      }
    }
    EXPECT_GE(static_cast<double>(read), least * static_cast<double>(t.records.size())) << name;
  }
}

// ---- groups of the goal ------------------------------------------------------------------------

TEST(Published, GroupsSelectTheirRows) {
  PublishedGroup g;
  g.name = "g";
  g.families = {"inv*"};
  g.where = {{"precision", {"BF16"}}, {"num_gpus", {"?*"}}};
  g.least = {{"seq_len_tokens", 2048}};
  g.bounds = {{"time.mape", 10, false, false},
              {"coverage", 0.9, true, false},
              {"time.mape", 1, false, true},
              {"memory.mape", 1, false, false}};
  const auto f = predicted({whole_row(), with(whole_row(), {{"id", "fp8"}, {"precision", "fp8"}}),
                            with(whole_row(), {{"id", "short"}, {"seq_len_tokens", "1024"}}),
                            with(whole_row(), {{"id", "gpu"}, {"gpu", "none such"}}),
                            with(whole_row(), {{"id", "other"}, {"family", "else"}})});
  const GroupResult r = result_of(g, f);
  EXPECT_EQ(r.rows, 2);
  EXPECT_EQ(r.covered, 1);
  EXPECT_EQ(r.statistics.time.count, 1);
  const auto verdicts = against_targets(r);
  ASSERT_EQ(verdicts.size(), 4u);
  EXPECT_TRUE(verdicts[0].met);
  EXPECT_FALSE(verdicts[1].met);  // half is covered
  EXPECT_EQ(verdicts[2].note, "not fitted");
  EXPECT_FALSE(verdicts[2].met);
  EXPECT_EQ(verdicts[3].note, "no figures");
  EXPECT_FALSE(verdicts[3].met);
}

TEST(Published, TheRatchetAllowsTwoPercent) {
  PublishedGroup g;
  GroupResult r;
  r.group = &g;
  r.statistics.time.mape = 0.102;
  r.statistics.time.bias = -0.0102;
  r.statistics.time.kendall_tau = 0.5;
  const auto met = [&](const char* statistic, double achieved) {
    g.achieved = {{statistic, achieved}};
    return against_achieved(r).at(0).met;
  };
  EXPECT_TRUE(met("time.mape", 0.1000001));
  EXPECT_FALSE(met("time.mape", 0.0999));
  EXPECT_TRUE(met("time.bias", 0.0100001));
  EXPECT_FALSE(met("time.bias", -0.0099));
  EXPECT_TRUE(met("time.kendall_tau", 0.5099));
  EXPECT_FALSE(met("time.kendall_tau", 0.5101));
  // What a fit achieved is compared where there was one.
  g.achieved = {{"fitted.time.mape", 0.05}, {"intervals.half_width", 2}};
  EXPECT_TRUE(against_achieved(r).empty());
  r.fitted.emplace();
  r.fitted->time.mape = 0.0511;
  r.intervals = IntervalStatistics{10, 0.9, 2.03};
  ASSERT_EQ(against_achieved(r).size(), 2u);
  EXPECT_FALSE(against_achieved(r)[0].met);
  EXPECT_TRUE(against_achieved(r)[1].met);
}

TEST(Published, TheFileIsReadAndEveryStatisticIsOne) {
  const auto groups = load_published(data_folder("validation/published.yaml"));
  EXPECT_EQ(groups.size(), 14u);
  for (const auto& g : groups) {
    EXPECT_FALSE(g.target.empty()) << g.name;
    EXPECT_TRUE(!g.bounds.empty() || g.name == "vtrain-single-node") << g.name;
  }
  const std::string file = ::testing::TempDir() + fmt::format("partita-91-{}.yaml", ::getpid());
  std::ofstream(file)
      << "schema: partita.published/1\ngroups:\n"
         "  - name: g\n    families: [a]\n    target: t\n    bounds:\n"
         "      - {statistic: time.bias, most: 1, fitted: true, rows: 12, draws: 5}";
  EXPECT_THAT(
      [&] { load_published(file); },
      ThrowsMessage<InputError>(HasSubstr(
          ":7: groups[0].bounds[0].rows: is of time.mape with fitted: true; leave it out here")));
  std::filesystem::remove(file);
  EXPECT_THAT([] { statistic({}, "time.mean", "f.yaml:3"); },
              ThrowsMessage<InputError>(HasSubstr("f.yaml:3: 'time.mean' is no statistic")));
}

// docs/published.md: anything that is not understood makes a row uncovered, a measured cell too.
TEST(Rows, MeasuredCellsThatAreNoNumbersAreNamed) {
  for (const char* cell : {"6500 ms", "6,5", "-6.5", "0", "nan", "inf", "N/A"}) {
    const auto f = predicted({with(whole_row(), {{"iteration_time_s", cell}})});
    ASSERT_EQ(f.size(), 1u) << cell;
    ASSERT_EQ(f[0].uncovered.size(), 1u) << cell;
    EXPECT_EQ(f[0].uncovered[0].why,
              fmt::format("iteration_time_s: '{}' is no number above 0", cell));
  }
  // Nothing measured is no row.
  const auto none = predicted({with(whole_row(), {{"iteration_time_s", ""}})});
  EXPECT_TRUE(none.empty() || none[0].uncovered.empty());
}

// docs/fit.md, "Rows": steps made with known factors give them back, and held-out rows their times.
TEST(FitRows, FindTheFactorsThatStepsWereMadeWith) {
  std::vector<Cells> cells;
  int id = 0;
  for (const char* layers : {"2", "4"}) {
    for (const char* batch : {"16", "32"}) {
      for (const char* tp : {"1", "2", "4"})
        cells.push_back(with(whole_row(), {{"id", std::to_string(id++)},
                                           {"num_layers", layers},
                                           {"pp", "1"},
                                           {"tp", tp},
                                           {"dp", ""},
                                           {"num_gpus", "8"},
                                           {"global_batch_seqs", batch}}));
    }
  }
  Adjustment truth;
  truth.product_time = 1.25;
  truth.inside_time = 1.6;
  RowsOptions options;
  options.adjust = [&](const RowKey& key) {
    EXPECT_EQ(key.device, "h100-sxm");
    EXPECT_EQ(key.framework, "megatron-core");
    EXPECT_EQ(key.cluster, "dgx-h100");
    return truth;
  };
  CsvTable t = table(kTraining, cells);
  const auto made = predict_rows({t}, catalogue(), options);
  ASSERT_EQ(made.size(), 1u);
  std::size_t k = 0;
  for (const Figure& f : made[0].figures) {
    if (f.kind == Figure::Kind::time)
      cells[k++]["iteration_time_s"] = fmt::format("{}", f.predicted);
  }
  ASSERT_EQ(k, cells.size());
  t = table(kTraining, cells);
  const auto entries = fit_rows({t}, catalogue(), {}, {});
  ASSERT_EQ(entries.size(), 1u);
  const FittedEntry& e = entries[0];
  EXPECT_EQ(e.rows, cells.size());
  EXPECT_EQ(e.groups, 2u);
  EXPECT_NEAR(e.parameters[0].value, 1.25, 0.1);
  EXPECT_TRUE(e.parameters[0].determined);
  EXPECT_LT(e.fitted.mean, 0.01);
  ASSERT_TRUE(e.held_out.has_value());
  EXPECT_LT(e.held_out->mean, 0.02);
  EXPECT_GT(e.unfitted.mean, 0.1);
  // Unfitted is what rows are predicted without a profile.
  const auto plain = predict_rows({t}, catalogue(), {});
  EXPECT_NEAR(e.unfitted.bias, *statistics_of(plain[0].figures).time.bias, 1e-9);

  // Written and read back, and found by device and framework on another cluster.
  const std::string file = ::testing::TempDir() + fmt::format("partita-{}.fit", ::getpid());
  std::ofstream(file) << to_yaml(entries);
  const FitProfile profile(file);
  const FittedEntry* same = profile.find(e.key);
  ASSERT_NE(same, nullptr);
  EXPECT_NEAR(same->parameters[0].value, e.parameters[0].value, 1e-5);
  EXPECT_EQ(profile.find({"h100-sxm", "megatron-core", "elsewhere"}), same);
  EXPECT_EQ(profile.find({"h100-sxm", "nemo", "dgx-h100"}), nullptr);
  std::filesystem::remove(file);
  EXPECT_THAT([&] { fit_rows({table(kTraining, {cells[0]})}, catalogue(), {}, {}); },
              ThrowsMessage<InputError>(HasSubstr("has 1 step time of h100-sxm with megatron-core "
                                                  "on dgx-h100, and no more of any other; a fit "
                                                  "needs 3 of one device")));
  auto more = cells;
  more.push_back(with(whole_row(), {{"id", "alone"}, {"framework", "NeMo"}}));
  more.push_back(with(whole_row(), {{"id", "unit"}, {"iteration_time_s", "6500 ms"}}));
  NotFitted left;
  fit_rows({table(kTraining, more)}, catalogue(), {.quick = true}, {}, &left);
  EXPECT_EQ(left.few, 1u);
  EXPECT_EQ(left.uncovered, 1u);
}

/// Twelve plans of two networks on eight GPUs, measured at what they are predicted to take with
/// `truth`, times noise.
std::vector<Cells> measured_cells(const std::vector<Cells>& changes, const Adjustment& truth,
                                  double noise, std::mt19937& rng) {
  std::vector<Cells> cells;
  for (const Cells& change : changes) {
    for (const char* layers : {"2", "4"}) {
      for (const char* batch : {"16", "32"}) {
        for (const char* tp : {"1", "2", "4"}) {
          Cells c = with(whole_row(), {{"id", std::to_string(cells.size())},
                                       {"num_layers", layers},
                                       {"pp", "1"},
                                       {"tp", tp},
                                       {"dp", ""},
                                       {"num_gpus", "8"},
                                       {"global_batch_seqs", batch}});
          for (const auto& [column, cell] : change) c[column] = cell;
          cells.push_back(std::move(c));
        }
      }
    }
  }
  RowsOptions options;
  options.adjust = [&](const RowKey&) { return truth; };
  std::map<std::string, double> times;
  for (const FamilyFigures& f : predict_rows({table(kTraining, cells)}, catalogue(), options)) {
    for (const Figure& x : f.figures) {
      if (x.kind == Figure::Kind::time) times[x.id] = x.predicted;
    }
  }
  std::normal_distribution<double> draw(0, 1);
  for (Cells& c : cells)
    c["iteration_time_s"] = fmt::format("{}", times.at(c["id"]) * std::exp(noise * draw(rng)));
  return cells;
}

// docs/fit.md: an evaluation is to the last digit what a prediction from the start gives.
TEST(FitRows, KeptStepsTakeWhatRowsTakePredictedAnew) {
  std::mt19937 rng(8);
  const std::vector<CsvTable> tables{table(kTraining, measured_cells({{}}, {}, 0.1, rng))};
  RowsOptions keep;
  keep.keep_steps = true;
  const auto kept = predict_rows(tables, catalogue(), keep);
  std::uniform_real_distribution<double> factor(0.5, 3), small(0, 0.02);
  for (int k = 0; k < 4; ++k) {
    const Adjustment a{factor(rng), factor(rng), factor(rng),         factor(rng), factor(rng),
                       factor(rng), factor(rng), Seconds{small(rng)}, small(rng)};
    RowsOptions with_a;
    with_a.adjust = [&](const RowKey&) { return a; };
    const auto anew = predict_rows(tables, catalogue(), with_a);
    int times = 0;
    for (std::size_t i = 0; i < anew[0].figures.size(); ++i) {
      const Figure& f = kept[0].figures[i];
      if (f.kind != Figure::Kind::time) continue;
      ++times;
      ASSERT_NE(f.step, nullptr);
      EXPECT_EQ(f.step->time(a).count, anew[0].figures[i].predicted);
    }
    EXPECT_EQ(times, 12);
  }
}

TEST(FitRows, PoolsADevicesRowsAndLeavesFamiliesOut) {
  std::mt19937 rng(9);
  Adjustment truth;
  truth.product_time = 1.3;
  const auto cells = measured_cells(
      {{{"family", "one"}}, {{"family", "two"}, {"framework", "NeMo"}}}, truth, 0.01, rng);
  const std::vector<CsvTable> tables{table(kTraining, cells)};
  EXPECT_EQ(fit_rows(tables, catalogue(), {.quick = true}, {}).size(), 2u);
  FitOptions options;
  options.pool_device = options.quick = true;
  options.by = HeldOut::family;
  const auto pooled = fit_rows(tables, catalogue(), options, {});
  ASSERT_EQ(pooled.size(), 1u);
  EXPECT_EQ(pooled[0].key, (RowKey{"h100-sxm", "*", "*"}));
  EXPECT_EQ(pooled[0].rows, 24u);
  EXPECT_EQ(pooled[0].groups, 2u);
  ASSERT_TRUE(pooled[0].held_out.has_value());
  EXPECT_LT(pooled[0].held_out->mean, 0.03);
  EXPECT_NEAR(pooled[0].parameters[0].value, 1.3, 0.1);

  // Its entry serves what no other of the file does.
  const std::string file = ::testing::TempDir() + fmt::format("partita-pool-{}.fit", ::getpid());
  auto entries = fit_rows(tables, catalogue(), {.quick = true}, {});
  entries.push_back(pooled[0]);
  std::ofstream(file) << to_yaml(entries);
  const FitProfile profile(file);
  std::filesystem::remove(file);
  EXPECT_EQ(profile.find({"h100-sxm", "megatron-core", "x"})->key.framework, "megatron-core");
  EXPECT_EQ(profile.find({"h100-sxm", "pytorch-ddp", "x"})->key.framework, "*");
  EXPECT_EQ(profile.find({"a100-sxm-80gb", "megatron-core", "x"}), nullptr);
  EXPECT_NEAR(profile.find({"h100-sxm", "pytorch-ddp", "x"})->covariance[1],
              pooled[0].covariance[1], 1e-5 * std::abs(pooled[0].covariance[1]));
}

// docs/fit.md, "Rows": where one model is all there is, clusters are left out, else rows.
TEST(FitRows, OfOneModelLeavesClustersOutElseRows) {
  std::mt19937 rng(12);
  Adjustment truth;
  truth.product_time = 1.3;
  const Cells small{{"num_layers", "2"}}, large{{"num_layers", "2"}, {"num_gpus", "16"}};
  auto one = measured_cells({small}, truth, 0.02, rng);
  const std::vector<CsvTable> two{
      table(kTraining, measured_cells({small, large}, truth, 0.02, rng))};
  const auto fitted = [](const std::vector<CsvTable>& tables, bool finer) {
    FitOptions options;
    options.quick = true;
    options.else_finer = finer;
    return fit_rows(tables, catalogue(), options, {})[0];
  };
  const FittedEntry as_asked = fitted(two, false);
  EXPECT_EQ(as_asked.by, HeldOut::model);
  EXPECT_EQ(as_asked.groups, 1u);
  EXPECT_FALSE(as_asked.held_out.has_value());
  const FittedEntry clusters = fitted(two, true);
  EXPECT_EQ(clusters.by, HeldOut::cluster);
  EXPECT_EQ(clusters.groups, 2u);
  EXPECT_TRUE(clusters.held_out.has_value());
  const FittedEntry rows = fitted({table(kTraining, one)}, true);
  EXPECT_EQ(rows.by, HeldOut::row);
  EXPECT_EQ(rows.groups, 6u);  // twelve rows, each configuration measured twice
  ASSERT_TRUE(rows.held_out.has_value());
  EXPECT_LT(rows.held_out->mean, 0.05);
  EXPECT_TRUE(rows.far.empty());

  // A time in milliseconds is named, and does not steer.
  one[4]["iteration_time_s"] = fmt::format("{}", 1000 * std::stod(one[4]["iteration_time_s"]));
  const FittedEntry wrong = fitted({table(kTraining, one)}, true);
  ASSERT_EQ(wrong.far.size(), 1u);
  EXPECT_EQ(wrong.far[0].id, "4");
  EXPECT_NEAR(wrong.far[0].factor, 1000, 200);
  EXPECT_NEAR(wrong.parameters[0].value, rows.parameters[0].value, 0.1);
}

TEST(RowCase, FlagsFillWhatColumnsLeaveEmpty) {
  const RowCase c =
      case_with({{"tp", ""},
                 {"dp", ""},
                 {"sequence_parallel", ""},
                 {"recompute", ""},
                 {"precision", ""},
                 {"zero_or_fsdp", ""},
                 {"overlap_and_other_settings",
                  "--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer "
                  "--fp8-format hybrid --recompute-granularity full --recompute-method uniform "
                  "--recompute-num-layers 1 --no-such-flag"}});
  EXPECT_EQ(c.plan.tp, 4);
  EXPECT_TRUE(c.plan.sequence_parallel);
  EXPECT_EQ(c.plan.zero, 1);
  EXPECT_EQ(c.plan.recompute.kind, Recompute::full);
  EXPECT_EQ(c.plan.precision.compute, ElementType::fp8);
  EXPECT_EQ(std::count(c.assumed.begin(), c.assumed.end(), "not read: --no-such-flag"), 1);
  // A column goes first.
  EXPECT_EQ(
      case_with({{"tp", "2"}, {"overlap_and_other_settings", "--tensor-model-parallel-size 4"}})
          .plan.tp,
      2);
}

TEST(RowCase, SomeLayersOfAllAreRecomputed) {
  const RowCase c = case_with({{"recompute", "full (2 of 4 layers)"}});
  EXPECT_EQ(std::count(c.assumed.begin(), c.assumed.end(), "1 blocks of each chunk recomputed"), 1);
  EXPECT_EQ(to_yaml(c.plan), to_yaml(case_with({{"recompute", "full (block, 1 layers)"}}).plan));
  EXPECT_NE(to_yaml(c.plan), to_yaml(case_with({{"recompute", "full"}}).plan));
}

TEST(RowCase, CellsThatAreNotUnderstoodAreUncovered) {
  EXPECT_EQ(why({{"attention_kernel", "paged"}}),
            "attention_kernel: 'paged' is not understood; say flash or unfused");
  for (const char* flash : {"FA2", "FA3", "xformers", "cuDNN", "memory-efficient", "SDPA", "auto"})
    EXPECT_EQ(why({{"attention_kernel", flash}}), "") << flash;
  EXPECT_EQ(why({{"recompute", "full on stage 0 only"}}),
            "recompute: 'full on stage 0 only' is not understood");
  EXPECT_THAT(why({{"intra_node_interconnect", "no NVLink"}}),
              ::testing::HasSubstr("'no NVLink': nodes of h100-sxm have NVLink"));
}

TEST(Rows, NameTheColumnsThatNothingReads) {
  auto columns = kTraining;
  columns.push_back("Tensor Parallel");
  columns.push_back("zero");
  columns.push_back("recompte");
  columns.push_back("comment");
  columns.erase(std::find(columns.begin(), columns.end(), "recompute"));
  const auto unread = unread_columns(table(columns, {whole_row()}));
  ASSERT_EQ(unread.size(), 4u);
  EXPECT_EQ(unread[0].column, "Tensor Parallel");
  EXPECT_EQ(unread[0].meant, "tp");
  EXPECT_EQ(unread[1].meant, "zero_or_fsdp");
  EXPECT_EQ(unread[2].meant, "recompute");
  EXPECT_EQ(unread[3].meant, "");
  EXPECT_TRUE(unread_columns(table(kTraining, {whole_row()})).empty());
}

/// Rows of one network say how it does elsewhere, and less of another; measured twice they are no
/// further witness.
TEST(FitRows, OfOneNetworkSayLessOfAnother) {
  std::mt19937 rng(14);
  Adjustment truth;
  truth.product_time = 1.2;
  auto one = measured_cells({{{"num_layers", "2"}}}, truth, 0.005, rng);
  FitOptions options;
  options.quick = options.else_finer = true;
  const auto entries = fit_rows({table(kTraining, one)}, catalogue(), options, {});
  const FittedEntry& e = entries[0];
  EXPECT_EQ(e.other_networks, 0.055);
  EXPECT_GT(e.network, 0);
  EXPECT_TRUE(e.of_network(e.network));
  EXPECT_FALSE(e.of_network(e.network + 1));
  EXPECT_NEAR(e.half_width_of_others, std::hypot(e.half_width, 1.645 * 0.055), 1e-12);
  const std::string file = ::testing::TempDir() + fmt::format("partita-one-{}.fit", ::getpid());
  std::ofstream(file) << to_yaml(entries);
  const FitProfile profile(file);
  std::filesystem::remove(file);
  RowsOptions adjusted;
  profile.apply(adjusted);
  auto other = one;
  for (auto& row : other) row["num_layers"] = "3";
  const auto width = [&](const std::vector<Cells>& cells) {
    const auto f = predict_rows({table(kTraining, cells)}, catalogue(), adjusted);
    return std::log(*f[0].figures[0].hi / f[0].figures[0].predicted);
  };
  const double same = width(one);
  EXPECT_LT(same, 0.05);
  EXPECT_NEAR(width(other), std::hypot(same, 1.645 * 0.055), 0.002);

  // The first row six times.
  for (auto& row : one) row = one[0];
  one.resize(6);
  for (std::size_t k = 0; k < one.size(); ++k) one[k]["id"] = std::to_string(k);
  const FittedEntry repeated = fit_rows({table(kTraining, one)}, catalogue(), options, {})[0];
  EXPECT_EQ(repeated.groups, 1u);
  EXPECT_FALSE(repeated.held_out.has_value());
  EXPECT_GT(repeated.half_width, 0.01 * 6.3);

  // Two networks.
  std::mt19937 again(14);
  const auto two =
      measured_cells({{{"num_layers", "2"}}, {{"num_layers", "3"}}}, truth, 0.005, again);
  EXPECT_EQ(fit_rows({table(kTraining, two)}, catalogue(), options, {})[0].other_networks, 0);
}

TEST(FitRows, DrawsTheSameRowsForASeedAndPredictsTheOthers) {
  std::mt19937 rng(10);
  Adjustment truth;
  truth.product_time = 1.3;
  const std::vector<CsvTable> tables{table(kTraining, measured_cells({{}}, truth, 0.02, rng))};
  FitOptions options;
  options.rows = 5;
  options.quick = true;
  options.draws = 4;
  const auto once = fit_rows(tables, catalogue(), options, {});
  RowsOptions alone;
  alone.workers = 1;
  EXPECT_EQ(to_yaml(once), to_yaml(fit_rows(tables, catalogue(), options, alone)));
  EXPECT_EQ(once[0].rows, 5u);
  ASSERT_TRUE(once[0].left_out.has_value());
  EXPECT_EQ(once[0].left_out->rows, 7u);
  EXPECT_LT(once[0].left_out->mean, 0.1);
  ASSERT_EQ(once[0].curve.size(), 2u);  // of 12 rows 3 and 6 are fewer
  EXPECT_EQ(once[0].curve[1].rows, 6u);
  EXPECT_EQ(once[0].curve[1].draws, 4u);
  EXPECT_LE(once[0].curve[1].mean, once[0].curve[1].worst);
  EXPECT_LT(once[0].curve[1].mean, 0.1);
  options.seed = 2;
  options.draws = 0;
  EXPECT_NE(to_yaml(once), to_yaml(fit_rows(tables, catalogue(), options, {})));
  options.rows = 12;
  EXPECT_FALSE(fit_rows(tables, catalogue(), options, {})[0].left_out.has_value());
}

// docs/fit.md, "Intervals": of rows that were not fitted, made with known noise, 90 % lie within.
TEST(FitRows, IntervalsHoldRowsThatWereNotFitted) {
  std::mt19937 rng(11);
  Adjustment truth;
  truth.product_time = 1.2;
  truth.inside_time = 1.4;
  int inside = 0, all = 0;
  for (int k = 0; k < 10; ++k) {
    auto cells = measured_cells({{}, {{"seq_len_tokens", "2048"}}}, truth, 0.03, rng);
    const auto fitted = fit_rows({table(kTraining, {cells.begin(), cells.begin() + 16})},
                                 catalogue(), {.by = HeldOut::cluster, .quick = true}, {});
    const std::string file = ::testing::TempDir() + fmt::format("partita-90-{}.fit", ::getpid());
    std::ofstream(file) << to_yaml(fitted);
    const FitProfile profile(file);
    std::filesystem::remove(file);
    RowsOptions options;
    profile.apply(options);
    const auto rest =
        predict_rows({table(kTraining, {cells.begin() + 16, cells.end()})}, catalogue(), options);
    for (const Figure& f : rest[0].figures) {
      if (f.kind != Figure::Kind::time) continue;
      ASSERT_TRUE(f.lo && f.hi);
      EXPECT_NEAR(*f.lo * *f.hi / (f.predicted * f.predicted), 1, 1e-9);
      ++all;
      inside += *f.lo <= f.measured && f.measured <= *f.hi ? 1 : 0;
    }
  }
  EXPECT_EQ(all, 80);
  EXPECT_GE(inside, all * 85 / 100);
  EXPECT_LE(inside, all * 95 / 100);
}

/// `validate published --fitted`: each model's rows by the others' parameters.
TEST(Published, FittedBoundsAreOfModelsLeftOut) {
  std::mt19937 rng(13);
  Adjustment truth;
  truth.product_time = 1.3;
  truth.memory_time = 1.2;
  auto cells = measured_cells({{}}, truth, 0.01, rng);
  // One of a kind: nobody to learn from.
  cells.push_back(with(whole_row(), {{"id", "alone"}, {"framework", "NeMo"}}));
  const std::vector<CsvTable> tables{table(kTraining, cells)};
  PublishedGroup g;
  g.families = {"inv*"};
  g.bounds = {{"time.mape", 0.05, false, true},
              {"time.mape", 0.05, false, false},
              {"time.mape", 0.05, false, true, 6, 3},
              {"intervals.held", 0.85, true, true},
              {"intervals.half_width", 4, false, true}};
  EXPECT_TRUE(wants_fit(g));
  RowsOptions keep;
  keep.keep_steps = true;
  const auto kept = predict_rows(tables, catalogue(), keep);
  EXPECT_EQ(families_of(g, kept), std::vector<std::string>{"invented"});
  GroupResult r = result_of(g, kept);
  EXPECT_EQ(against_targets(r)[0].note, "not fitted");
  EXPECT_FALSE(against_targets(r)[0].met);
  add_fitted(r, kept, 0);
  EXPECT_EQ(r.fitted_rows, 12);
  ASSERT_TRUE(r.fitted.has_value());
  EXPECT_EQ(r.fitted->time.count, 13);
  const FittedEntry e = fit_entry(rows_to_fit(kept, false)[0], {.quick = true});
  ASSERT_EQ(e.held_out_times.size(), 12u);
  const double alone = std::abs(rows_to_fit(kept, false)[1].figures[0].error());
  EXPECT_NEAR(*r.fitted->time.mape, (12 * e.held_out->mean + alone) / 13, 1e-12);
  EXPECT_LT(e.held_out->mean, 0.05);
  EXPECT_EQ(*against_targets(r)[0].value, *r.fitted->time.mape);
  EXPECT_EQ(*against_targets(r)[1].value, *r.statistics.time.mape);

  // Three draws of six of the twelve rows; the one that is alone has too few beside it.
  std::vector<double> means;
  for (std::uint64_t seed = 1; seed <= 3; ++seed)
    means.push_back(
        fit_entry(rows_to_fit(kept, false)[0], {.quick = true, .rows = 6, .seed = seed}, 1)
            .left_out->mean);
  std::sort(means.begin(), means.end());
  EXPECT_EQ(against_targets(r)[2].statistic, "time.mape (on 6 rows)");
  EXPECT_EQ(*against_targets(r)[2].value, means[1]);

  ASSERT_TRUE(r.intervals.has_value());
  EXPECT_EQ(r.intervals->rows, 12u);
  int held = 0;
  std::vector<double> halves;
  for (std::size_t i = 0; i < 12; ++i) {
    const double measured = rows_to_fit(kept, false)[0].figures[i].measured;
    held += std::abs(std::log(e.held_out_times[i] / measured)) <= e.held_out_half_widths[i];
    halves.push_back(std::expm1(e.held_out_half_widths[i]) / e.held_out->mean);
  }
  std::sort(halves.begin(), halves.end());
  EXPECT_EQ(r.intervals->held, held / 12.0);
  EXPECT_NEAR(r.intervals->half_width, (halves[5] + halves[6]) / 2, 1e-12);
  EXPECT_EQ(r.of_family.at("invented").held, r.intervals->held);
  EXPECT_EQ(*against_targets(r)[3].value, r.intervals->held);
  EXPECT_EQ(*against_targets(r)[4].value, r.intervals->half_width);
  g.bounds.resize(1);
  g.bounds[0].fitted = false;
  EXPECT_FALSE(wants_fit(g));
}

// What `simulate --profile` prints: the entry's adjustment, its interval, and what it rests on.
TEST(FitRows, APredictionRestsOnTheEntryOfItsDeviceAndFramework) {
  std::mt19937 rng(12);
  Adjustment truth;
  truth.product_time = 1.3;
  const auto cells = measured_cells({{}}, truth, 0.02, rng);
  const auto entries = fit_rows({table(kTraining, cells)}, catalogue(), {.quick = true}, {});
  const std::string file = ::testing::TempDir() + fmt::format("partita-rest-{}.fit", ::getpid());
  std::ofstream(file) << to_yaml(entries);
  const FitProfile profile(file);
  std::filesystem::remove(file);

  const RowCase c =
      case_of(RowSchema::training,
              Configuration(RowSchema::training, Row(table(kTraining, cells), 3)), catalogue());
  const Graph g = build_transformer(*c.transformer);
  const Topology t = load_topology(c.cluster.topology, c.cluster.edits);
  const FittedEntry* entry = profile.find(t, c.plan.framework);
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->key.cluster, "dgx-h100");
  Communication communication(t);
  communication.set_adjustment(adjustment_of(*entry));
  auto p = predict(g, c.plan, communication, nullptr, nullptr, false, nullptr, Network::beside);
  ASSERT_TRUE(p);
  EXPECT_EQ(p->fit, "");
  const std::size_t terms = p->rests_on.size();
  rest_on_fit(*p, entry, g, t);
  EXPECT_EQ(p->fit, "times adjusted to 12 steps of h100-sxm with megatron-core on dgx-h100");
  EXPECT_EQ(p->rests_on.size(), terms) << "shares of the terms are the whole step's";
  // The same interval as the row's with the profile.
  RowsOptions options;
  profile.apply(options);
  const auto rows = predict_rows({table(kTraining, cells)}, catalogue(), options);
  const auto row =
      std::find_if(rows[0].figures.begin(), rows[0].figures.end(),
                   [](const Figure& f) { return f.id == "3" && f.kind == Figure::Kind::time; });
  ASSERT_NE(row, rows[0].figures.end());
  EXPECT_EQ(p->step_time.count, row->predicted);
  ASSERT_TRUE(p->interval.has_value());
  EXPECT_EQ(p->interval->first.count, *row->lo);
  EXPECT_EQ(p->interval->second.count, *row->hi);
  EXPECT_LT(p->interval->first, p->step_time);

  EXPECT_EQ(profile.find(t, "pytorch-ddp"), nullptr);
  auto plain = predict(g, c.plan, communication, nullptr, nullptr, false, nullptr, Network::beside);
  rest_on_fit(*plain, nullptr, g, t);
  EXPECT_EQ(plain->fit, "no fit of h100-sxm with megatron-core: prices of the catalogue");
  EXPECT_FALSE(plain->interval.has_value());
}

TEST(FitRows, TheExpectedMaximumOfDraws) {
  EXPECT_EQ(expected_maximum(1), 0);
  EXPECT_NEAR(expected_maximum(2), 0.56419, 1e-5);
  EXPECT_NEAR(expected_maximum(4), 1.02938, 1e-5);
  EXPECT_NEAR(expected_maximum(100), 2.50759, 1e-5);
  EXPECT_GT(expected_maximum(100'000), 4);
}

}  // namespace
}  // namespace partita::validation
