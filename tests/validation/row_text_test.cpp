// Each rule over texts as tables print them.
#include "validation/row_text.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "validation/layer_time.h"

namespace partita::validation {
namespace {

constexpr double kGb = 1e9 / 8;

TEST(RowText, NetworkRates) {
  struct Case {
    const char* text;
    double rate;
    bool per_gpu;
  };
  for (const Case& c : {
           Case{"NDR InfiniBand 400 Gb/s per GPU (DGX H100 reference architecture)", 400 * kGb,
                true},
           {"4x Omni-Path 100 Gb/s per node (from memory of a README; not in this file)", 400 * kGb,
            false},
           {"1600 Gbps node-node RoCE", 1600 * kGb, false},
           {"800 Gb/s per node (the repository's default setting)", 800 * kGb, false},
           {"8x200 Gb/s RoCE per node", 1600 * kGb, false},
           {"8x200Gb/s HDR InfiniBand (Selene; from memory)", 1600 * kGb, false},
           {"EFA 3200 Gb/s per node (AWS p5; from memory)", 3200 * kGb, false},
           {"EFA 32x100 Gb/s = 3200 Gb/s per node", 3200 * kGb, false},
           {"8x EFA v4 50 GB/s per node", 400e9, false},
           {"400 Gbps", 400 * kGb, false},
           {"RoCE 25 Gbit/s between 128 servers", 25 * kGb, false},
           {"2 x 100 Gb/s", 200 * kGb, false},
           {"intra: NVLINK Gen4 900 GB/s + NVSWITCH Gen3; inter: Storage: 2x ConnectX-7 IB NDR "
            "400Gb/s, Compute: 8x ConnectX-7 IB NDR 400Gb/s, Management: 100Gb/s Ethernet NIC",
            3200 * kGb, false},
           {"intra: PCIe Gen4; inter: BF3 200Gbps for NS and 2xBF3 400Gbps for EW", 200 * kGb,
            false},
           {"25 Gb/s/GPU", 25 * kGb, true},
           {"InfiniBand 400Gb/s (per GPU)", 400 * kGb, true},
           {"8\u00d7400 Gb/s NDR", 3200 * kGb, false},
           {"8 NICs x 400 Gb/s", 3200 * kGb, false},
           {"400Gb/s x 8", 3200 * kGb, false},
           {"200 Gb/s x 4 rails per node", 800 * kGb, false},
           {"100GbE", 100 * kGb, false},
           {"200 Gb/s HDR InfiniBand (8 per node)", 1600 * kGb, false},
           {"200 Gb/s HDR InfiniBand (8 HCAs per node)", 1600 * kGb, false},
           {"8 NICs of 200 Gb/s per node", 1600 * kGb, false},
           {"200 Gb/s HDR InfiniBand, 8 NICs per node", 1600 * kGb, false},
           {"400 Gb/s per GPU, 8 per node", 400 * kGb, true},
       }) {
    const auto r = network_rate(c.text);
    ASSERT_TRUE(r.has_value()) << c.text;
    EXPECT_DOUBLE_EQ(r->rate.count, c.rate) << c.text;
    EXPECT_EQ(r->per_gpu, c.per_gpu) << c.text;
  }
  for (const char* card :
       {"400 Gb/s per NIC", "NDR 400 Gb/s (per NIC, 8 of them)", "400 Gb/s/NIC", "400 Gb/s per HCA",
        "400 Gb/s per port", "InfiniBand NDR", "NDR400", "ConnectX-7 400G", "ConnectX-7 400 Gb/s",
        "NVSwitch 900 GB/s + ConnectX-7 400 Gb/s"}) {
    const auto r = network_rate(card);
    ASSERT_TRUE(r.has_value()) << card;
    EXPECT_DOUBLE_EQ(r->rate.count, 400 * kGb) << card;
    EXPECT_TRUE(r->per_card && !r->per_gpu) << card;
  }
  // Inside a node is no network; and what a bare rate is of is not said.
  EXPECT_DOUBLE_EQ(network_rate("NVSwitch 600 GB/s + 10 GbE")->rate.count, 10 * kGb);
  EXPECT_FALSE(network_rate("NVLink 900 GB/s"));
  for (const char* bare : {"400 Gbps", "10 GbE", "RoCE 25 Gbit/s between 128 servers"})
    EXPECT_TRUE(network_rate(bare)->bare) << bare;
  for (const char* said :
       {"8x200 Gb/s", "100 Gb/s per node", "400 Gb/s/GPU", "NDR", "ConnectX-7 400G", "400Gb/s x 8"})
    EXPECT_FALSE(network_rate(said)->bare) << said;
  EXPECT_DOUBLE_EQ(network_rate("HDR InfiniBand")->rate.count, 200 * kGb);
  EXPECT_DOUBLE_EQ(network_rate("IB NDR200")->rate.count, 200 * kGb);
  EXPECT_DOUBLE_EQ(network_rate("Storage: HDR; compute: NDR")->rate.count, 400 * kGb);
  EXPECT_DOUBLE_EQ(network_rate("IB HDR100")->rate.count, 100 * kGb);
  for (const char* nothing : {"", "none", "InfiniBand (2 racks)", "Andromeda",
                              "intra: ; inter: ", "NVLink3/NVSwitch (8x A100 SXM4 80GB node)",
                              "ConnectX-7", "(400 Gb/s, said elsewhere)", "Storage: 400 Gb/s"})
    EXPECT_FALSE(network_rate(nothing).has_value()) << nothing;
}

TEST(RowText, Precisions) {
  struct Case {
    const char *text, *name;
    bool fp32_gradients = false;
  };
  for (const Case& c :
       {Case{"bf16", "bf16"},
        {"BF16", "bf16"},
        {"fp16 mixed", "fp16"},
        {"amp_bf16", "bf16"},
        {"amp_fp8", "fp8"},
        {"FP8-CS", "fp8"},
        {"FP8-MX", "mxfp8"},
        {"fp8_mx", "mxfp8"},
        {"MXFP8", "mxfp8"},
        {"NVFP4", "nvfp4"},
        {"FP8 (hybrid)", "fp8"},
        {"FP8 (E4M3, fine-grained)", "fp8"},
        {"bf16 + FP8 hybrid tensorwise", "fp8"},
        {"FP8 current scaling", "fp8"},
        {"bf16 (fp32 grad accumulation)", "bf16", true},
        {"bf16 (BF16 optimizer, fp32 grad accumulation)", "bf16", true},
        {"mixed precision (AMP FP16)", "fp16"},
        {"mixed precision", "fp16"},
        {"FP32", "fp32"},
        {"TF32", "tf32"},
        {"mixed FP16 (MLPerf NVIDIA submission; FP8 for BERT on H100 where config says)", "fp16"},
        {"F32xF32->F32 (F32 runs as TF32 tensor-core)", "tf32"},
        {"BF16xBF16->BF16", "bf16"},
        {"bf16 + Float8 (tensorwise)", "fp8"},
        {"F8E4M3FNxF8E4M3FN->BF16", "fp8"},
        {"float16", "fp16"},
        {"F16xF16->F16", "fp16"},
        {"bf16, no float8", "bf16"},
        {"bf16 without fp8", "bf16"},
        {"FP8 e5m2", "fp8"},
        {"fp8 e4m3", "fp8"}})
    EXPECT_EQ(precision_of(c.text), (PrecisionText{c.name, c.fp32_gradients})) << c.text;
  EXPECT_EQ(precision_of("fp32 + FP8 e4m3 tensorwise"), (PrecisionText{"fp8", false, true}));
  for (const char* nothing : {"", "int4", "mixed"}) EXPECT_FALSE(precision_of(nothing)) << nothing;
}

TEST(RowText, Recomputation) {
  struct Case {
    const char *text, *plan;
  };
  for (const Case& c :
       {Case{"none", "none"},
        {"none set in recipe", "none"},
        {"none (no recompute suffix in case name)", "none"},
        {"baseline no recompute", "none"},
        {"sequence parallelism", "none"},
        {"full", "full"},
        {"full uniform 1 ", "full"},
        {"full (activation checkpointing per block)", "full"},
        {"baseline with (full) recompute", "full"},
        {"selective", "selective"},
        {"selective (attention core)", "attention"},
        {"selective: core_attn", "attention"},
        {"selective activation checkpointing", "selective"},
        {"op-level selective AC", "selective"},
        {"SAC", "selective"},
        {"activation checkpointing: selective op", "selective"},
        {"recompute off", "none"},
        {"activation checkpointing: no", "none"},
        {"activation checkpointing disabled", "none"},
        {"activation checkpointing=False", "none"},
        {"w/o activation checkpointing", "none"},
        {"Recompute none", "none"},
        {"AC: none", "none"},
        {"not full", "none"},
        {"activation checkpointing=0", "none"},
        {"activation checkpointing", "full"},
        {"gradient checkpointing", "full"},
        {"activation checkpointing off", "none"},
        {"without activation checkpointing", "none"},
        {"True", "full"},
        {"False", "none"},
        {"selective + sequence parallel", "selective"},
        {"selective: mlp", "*.mlp.*"},
        {"recompute_modules=[\"shared_experts\"]",
         "*.moe.shared.gate,*.moe.shared.up,*.moe.shared.activation"},
        {"selective: mlp+core_attn", "*.mlp.*,*attention.core"},
        {"recompute_granularity=\"selective\" recompute_modules=[\"layernorm\", \"moe_act\"]",
         "~*attention_norm,~*mlp_norm,~*moe.activation"},
        {"recompute_modules=[\"mla_up_proj\"]",
         "~*attention.query_up,~*attention.key_up,~*attention.value_up"},
        {"RMSNorm + MLA up-projection",
         "~*attention_norm,~*mlp_norm,~*attention.query_up,~*attention.key_up,~*attention.value_"
         "up"}})
    EXPECT_EQ(recompute_of(c.text), std::optional<std::string>(c.plan)) << c.text;
  EXPECT_EQ(recomputed_blocks("selective_ac_option=2"), (RecomputedBlocks{2, 0}));
  EXPECT_EQ(recomputed_blocks("full (block, 21 layers)"), (RecomputedBlocks{1, 21}));
  for (const char* all : {"", "none", "full", "every layer", "full uniform 2",
                          "selective (option 1)", "full, all blocks", "every 1000000 layers"})
    EXPECT_FALSE(recomputed_blocks(all)) << all;
  EXPECT_EQ(recomputed_blocks("full (4 of 32 layers)"), (RecomputedBlocks{1, 0, 4}));
  EXPECT_EQ(recomputed_blocks("full, first 10 layers"), (RecomputedBlocks{1, 0, 10}));
  EXPECT_FALSE(recomputed_blocks("selective + full for first 2 layers"));
  for (const char* nothing : {"", "partial (rematerialisation)", "some", "full on stage 0 only",
                              "full on stage 0", "selective + full for first 2 layers"})
    EXPECT_FALSE(recompute_of(nothing)) << nothing;
}

TEST(RowText, Sharding) {
  const auto zero = [](int stage) { return ShardingText{stage}; };
  struct Case {
    const char* text;
    ShardingText is;
  };
  for (const Case& c : {Case{"ZeRO-1", zero(1)},
                        {"ZeRO-0", zero(0)},
                        {"zero2", zero(2)},
                        {"distributed optimizer (ZeRO-1)", zero(1)},
                        {"FSDP FULL_SHARD", zero(3)},
                        {"FSDP", zero(3)},
                        {"Megatron-FSDP optim_grads_params", zero(3)},
                        {"FSDP SHARD_GRAD_OP", {3, 0, false}},
                        {"FSDP (ZeRO-2-like, no reshard after forward)", {3, 0, false}},
                        {"FSDP=128 x DP", {3, 128}},
                        {"FSDP=? x DP", zero(3)},
                        {"FSDP group=64", {3, 64}},
                        {"DDP (FSDP=0)", {std::nullopt}},
                        {"ZeRO-3 opt offload", {3, 0, true, true}},
                        {"ZeRO-3 full offload", {3, 0, true, true, true}},
                        {"ZeRO (stage per slurm script, old branch)", {std::nullopt}},
                        {"zero_stage=3", zero(3)},
                        {"ZeRO Stage-2", zero(2)},
                        {"use_distributed_optimizer", zero(1)},
                        {"fully_shard (FSDP2)", zero(3)},
                        {"NO_SHARD", zero(0)},
                        {"FSDP HYBRID_SHARD", {3, 0, true, false, false, true}},
                        {"FSDP2 reshard_after_forward=False", {3, 0, false}},
                        {"HSDP (dp_shard=32, dp_replicate=4)", {3, 32, true, false, false, true}},
                        {"HSDP", {3, 0, true, false, false, true}},
                        {"_HYBRID_SHARD_ZERO2", {3, 0, false, false, false, true}},
                        {"none", zero(0)},
                        {"no ZeRO", zero(0)},
                        {"no", zero(0)},
                        {"ZeRO: off", zero(0)},
                        {"without distributed optimizer", zero(0)},
                        {"w/o ZeRO", zero(0)},
                        {"not sharded", zero(0)},
                        {"Stage 1+2", zero(2)},
                        {"ZeRO-1/2", zero(2)},
                        {"ZeRO-3 + CPU offload", {3, 0, true, true}},
                        {"ZeRO-3 offload", {3, 0, true, true}},
                        {"ZeRO-3, no offload", zero(3)},
                        {"ZeRO-Offload", {2, 0, true, true}},
                        {"ZeRO-Infinity", {3, 0, true, true, true}},
                        {"FSDP CPU offload", {3, 0, true, true, true}}})
    EXPECT_EQ(sharding_of(c.text), c.is) << c.text;
  for (const char* nothing : {"", "2D finalized: 12-way model", "sharded"})
    EXPECT_FALSE(sharding_of(nothing)) << nothing;
}

TEST(RowText, MemoryOfSomeOfTheState) {
  const auto parts = [](const char* text) {
    const auto q = memory_quantity(text);
    EXPECT_TRUE(q && q->what == MemoryQuantity::What::state) << text;
    std::string s;
    if (q && q->parameters) s += "p";
    if (q && q->gradients) s += "g";
    if (q && q->optimizer) s += "o";
    return s;
  };
  EXPECT_EQ(parts("parameters+gradients+optimizer state per GPU"), "pgo");
  EXPECT_EQ(parts("model states"), "pgo");
  EXPECT_EQ(parts("optimizer states"), "o");
  EXPECT_EQ(parts("Adam moments per GPU"), "o");
  EXPECT_EQ(parts("gradient memory"), "g");
  EXPECT_EQ(parts("weights per GPU"), "p");
  EXPECT_EQ(parts("parameters and gradients"), "pg");
  EXPECT_EQ(memory_quantity("mem-allocated-bytes (weights+grads+optimizer)")->what,
            MemoryQuantity::What::after_step);
}

TEST(RowText, MemoryQuantities) {
  using Q = MemoryQuantity;
  struct Case {
    const char* text;
    Q is;
  };
  for (const Case& c :
       {Case{"mem-allocated-bytes (weights+grads+optimizer resident after step, logging rank)",
             {Q::What::after_step, Q::Who::logging}},
        {"mem-max-allocated-bytes (peak, logging rank)", {Q::What::allocated, Q::Who::logging}},
        {"max_memory_allocated on rank 7", {Q::What::allocated, Q::Who::rank, 7}},
        {"peak memory per GPU as reported with the throughput row", {Q::What::printed}},
        {"torch max_memory_reserved", {Q::What::reserved}},
        {"max_memory_reserved (GiB), memory of the step's line", {Q::What::reserved}},
        {"memory allocated (nvidia-smi)", {Q::What::device}},
        {"peak cached memory", {Q::What::reserved}},
        {"weights memory per GPU", {Q::What::state, Q::Who::most, 0, true, false, false}},
        {"model states", {Q::What::state}},
        {"VRAM", {Q::What::printed}},
        {"peak_mem", {Q::What::printed}},
        {"peak allocated memory as printed", {Q::What::allocated}},
        {"torch max_memory_allocated of the logging rank, bytes/2^30; steady allocated 0.4 GiB",
         {Q::What::allocated, Q::Who::logging}},
        {"torch max_memory_allocated, max over ranks (GiB); max reserved 62.4 GiB",
         {Q::What::allocated}},
        {"max reserved memory", {Q::What::reserved}},
        {"nvidia-smi max of first/last (embedding) nodes, printed as \"47GB\"", {Q::What::device}},
        {"printed GB, per-GPU usage", {Q::What::printed}},
        {"GPU memory rounded up, GB", {Q::What::printed}},
        {"parameters+gradients+optimizer state per GPU", {Q::What::state}},
        {"activations per GPU (tensor parallel only)", {Q::What::activations}},
        {"activation memory as % of tensor-parallel baseline", {Q::What::activations_ratio}},
        {"OOM (does not fit in 80 GB)", {Q::What::fits}}})
    EXPECT_EQ(memory_quantity(c.text), c.is) << c.text;
  for (const char* nothing : {"forward time per layer", "single MoE layer forward_ms", "loss"})
    EXPECT_FALSE(memory_quantity(nothing)) << nothing;
}

TEST(RowText, LayersTimes) {
  using Part = LayerQuantity::Part;
  using Pass = LayerQuantity::Pass;
  struct Case {
    const char* text;
    LayerQuantity is;
  };
  for (const Case& c : {Case{"forward time per layer", {Part::all, Pass::forward}},
                        {"backward time per layer", {Part::all, Pass::backward}},
                        {"combined per layer", {Part::all, Pass::both}},
                        {"fwd+bwd ms of one transformer layer", {Part::all, Pass::both}},
                        {"single MoE layer forward_ms", {Part::experts, Pass::forward, true}},
                        {"attention layer bwd", {Part::attention, Pass::backward}},
                        {"MLP layer forward_ms", {Part::mlp, Pass::forward}}})
    EXPECT_EQ(layer_quantity(c.text), c.is) << c.text;
  for (const char* nothing : {"max_allocated_bytes of MoE layer fwd+bwd", "layers", "forward time",
                              "activations of a layer's forward", ""})
    EXPECT_FALSE(layer_quantity(nothing)) << nothing;
}

TEST(RowText, Gigabytes) {
  const std::map<std::string, double> all{{"H100 96GB HBM2e 500W", 96},
                                          {"A100 80 GB", 80},
                                          {"A100-40G", 40},
                                          {"40 GiB", 40},
                                          {"DGX-1 (8x V100 16G)", 16}};
  for (const auto& [text, n] : all) EXPECT_EQ(gigabytes(text), n) << text;
  for (const char* none : {"", "H100", "8 GPUs", "HBM2 gb", "gpt2"})
    EXPECT_FALSE(gigabytes(none)) << none;
}

TEST(RowText, SizesInNames) {
  EXPECT_EQ(billions_of("GPT-2 1.5B"), 1.5);
  EXPECT_EQ(billions_of("DeepSeek V3 16B"), 16);
  EXPECT_EQ(billions_of("Qwen3 30B A3B"), 30);
  EXPECT_EQ(billions_of("MPT-125m"), 0.125);
  EXPECT_EQ(billions_of("GPT 1.3B (350M words)"), 1.3);
  EXPECT_DOUBLE_EQ(*billions_of("BLOOM-7B1"), 7.1);
  EXPECT_DOUBLE_EQ(*billions_of("bloom-1b7 fp16"), 1.7);
  for (const char* none : {"GPT", "tr3m", "Mixtral 8x7B", "A3B", "DeepSeek V3", "7b12", "v7b1"})
    EXPECT_FALSE(billions_of(none)) << none;
  for (const char* mixture : {"8x7B", "17Bx16E", "17B-16E", "480B A35B", "30b-a3b"})
    EXPECT_TRUE(names_experts(mixture)) << mixture;
  for (const char* dense : {"Llama 3 8B", "GPT-3 175B", "alpha3b", "resnext101-32x4d", "v1.5"})
    EXPECT_FALSE(names_experts(dense)) << dense;
}

TEST(RowText, SmallOnes) {
  EXPECT_EQ(squeezed("LLAMA3.1_405B (tokendrop)"), "llama3.1405b");
  EXPECT_EQ(squeezed("Llama 3.x 70B"), "llama3.x70b");
  EXPECT_EQ(squeezed("v1. 5"), "v15");
  EXPECT_EQ(plain_text("  A100\t(Ampere [x])  b "), "a100 b");
  EXPECT_EQ(number("8.5"), std::optional<double>(8.5));
  for (const char* no : {"", "8 ", "~8", "-1", "nan", "inf", "1e400", "0x8"})
    EXPECT_FALSE(number(no)) << no;
  EXPECT_EQ(switch_of("on (tp_mode REDUCE_SCATTER)"), std::optional<bool>(true));
  EXPECT_EQ(switch_of("off"), std::optional<bool>(false));
  EXPECT_FALSE(switch_of("partly"));
  EXPECT_EQ(accumulation_of("FSDP x; grad accumulation=21"), std::optional<std::int64_t>(21));
  EXPECT_FALSE(accumulation_of("grad accumulation=0"));
  for (const char* eight : {"gradient accumulation steps=8", "gradient accumulation steps: 8",
                            "gradient accumulation 8", "gradient_accumulation_steps=8"})
    EXPECT_EQ(accumulation_of(eight), std::optional<std::int64_t>(8)) << eight;
  EXPECT_EQ(flop_formula("96*B*s*l*h^2*(1+s/(6h)+V/(16lh))"), FlopFormula::hardware_4x);
  EXPECT_EQ(flop_formula("72Blsh^2(1+s/6h+V/12hl)"), FlopFormula::model_3x);
  EXPECT_EQ(flop_formula("MFU=(6N+12LHQT) tokens/s / peak"), FlopFormula::six_n);
  EXPECT_EQ(flop_formula("6ND"), FlopFormula::six_n_alone);
  EXPECT_EQ(flop_formula("6 * N * tokens"), FlopFormula::six_n_alone);
  EXPECT_EQ(flop_formula("estimated 8*N*tokens (under-reports ~3%)"), FlopFormula::eight_n);
  EXPECT_EQ(flop_formula("model_size_B*4*2*seq*GBS/(t*GPUs*1e3)"), FlopFormula::eight_n);
  EXPECT_FALSE(flop_formula("as printed"));
}

}  // namespace
}  // namespace partita::validation
