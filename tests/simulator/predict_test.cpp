#include "simulator/search/predict.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/yaml.h"
#include "simulator/cost/axes.h"
#include "simulator/search/placement.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

Prediction predicted(const Graph& g, const Plan& p) {
  Communication communication(load_topology("dgx-h100:1"));
  auto r = predict(g, p, communication);
  EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
  return *r;
}

/// Matrix work of one sample's forward, of all operators or of the repeated blocks only.
double forward_products(const Graph& g, bool blocks_only) {
  double total = 0;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Operator& op = g.operators[i];
    if (!is_product(op.operation) || (blocks_only && (op.layer < 0 || op.layer >= g.layers)))
      continue;
    const Signature s = signature(g, OpId{i}, 1);
    std::vector<std::int64_t> extents;
    for (const auto& d : s.dims) extents.push_back(d.extent);
    total += flops(op.operation, s, extents, Pass::forward).count;
  }
  return total;
}

/// docs/simulation.md, "Memory": a device that was measured.
// docs/plan.md: the norm is one of all gradients. The last stage's table makes its update the
// longer one, and it waits for the first stage's backward, which ends last.
TEST(Predict, NoStageUpdatesBeforeTheNormOfAllGradients) {
  const Graph g = llama();
  const Topology t = load_topology("dgx-h100:4 gpus");
  const auto with = [&](std::optional<double> clip, const char* strategy, std::int64_t pp) {
    Plan p = base_plan();
    set_framework(p, "megatron-core", "");
    p.launches = {};
    p.strategy = strategy;
    p.pp = pp, p.dp = 4 / pp;
    p.global_batch = 4 * p.dp;
    p.cuts = pp > 1 ? std::vector<std::int64_t>{g.layers - 1, 1} : std::vector<std::int64_t>{};
    if (clip) p.optimizer.clip = *clip, p.clip_given = true;
    Communication c(t);
    auto r = predict(g, p, c);
    EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
    return *r;
  };
  EXPECT_EQ(with({}, "megatron", 2).plan.optimizer.clip, 1);
  EXPECT_EQ(with({}, "megatron", 2).step_time, with(1.0, "megatron", 2).step_time);
  EXPECT_GT(with({}, "megatron", 2).step_time, with(0.0, "megatron", 2).step_time);
  // A stage that waits for the others' gradients waits for the pipeline.
  EXPECT_EQ(with({}, "megatron", 2).breakdown.exposed.count("tied"), 0u);
  EXPECT_GT(with({}, "megatron", 2).breakdown.bubble.count, 0);
  // A plan's own word stays in its file, none too.
  Plan none = with(0.0, "megatron", 2).plan;
  EXPECT_THAT(to_yaml(none), ::testing::HasSubstr("clip: 0"));
  // What hands gradients on as they are does not clip.
  EXPECT_EQ(with({}, "dataparallel", 1).plan.optimizer.clip, 0);
}

TEST(Predict, MeasuredMemoryOutsideTheAllocatorReplacesWhatIsAssumed) {
  const auto text_of = [](const std::string& file) {
    std::ifstream in(data_folder("topologies") + file);
    return std::string{std::istreambuf_iterator<char>(in), {}};
  };
  const std::string folder = ::testing::TempDir() + "partita_outside";
  std::filesystem::create_directories(folder);
  std::string cluster = text_of("/catalogue/dgx-h100.yaml");
  const std::string named = "device: h100-sxm";
  ASSERT_NE(cluster.find(named), std::string::npos);
  cluster.replace(cluster.find(named), named.size(), "device: device.yaml");
  std::ofstream(folder + "/cluster.yaml") << cluster;
  std::ofstream(folder + "/device.yaml") << text_of("/devices/h100-sxm.yaml") << R"(
outside_memory:
  context: {value: 400 MiB, source: test}
  kernels: {value: 60 MiB, source: test}
  libraries: {value: 20 MiB, source: test}
  workspace: {value: 32 MiB, source: test}
  communicators: [{ranks: 2, value: 100 MiB, source: test}, {ranks: 8, value: 300 MiB, source: test}]
)";
  const Graph g = llama();
  const auto with = [&](const std::string& framework, std::int64_t tp, std::int64_t dp) {
    Plan p = base_plan();
    set_framework(p, framework, "");
    p.tp = tp, p.dp = dp;
    p.global_batch = 4;
    Communication measured(load_topology(folder + "/cluster.yaml"));
    auto r = predict(g, p, measured);
    EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
    return *r;
  };
  // Ours: the workspace is outside, and 4 is as far from 2 as from 8: the larger.
  Prediction p = with("partita", 1, 4);
  EXPECT_EQ(p.outside.context, 400_MiB);
  EXPECT_EQ(p.outside.kernels, 60_MiB);
  EXPECT_EQ(p.outside.libraries, 20_MiB);
  EXPECT_EQ(p.outside.workspace, 32_MiB);
  EXPECT_EQ(p.outside.communicators, 300_MiB);
  EXPECT_EQ(p.outside.total(), 812_MiB);
  EXPECT_EQ(p.peak_device, p.peak_reserved + 812_MiB);
  EXPECT_EQ(p.usable, load_device("h100-sxm").usable_memory + 400_MiB);
  // Two groups of two.
  EXPECT_EQ(with("partita", 2, 2).outside.communicators, 200_MiB);
  EXPECT_EQ(with("partita", 1, 1).outside.communicators, 0_MiB);
  // PyTorch's workspaces are blocks of its allocator.
  EXPECT_EQ(with("pytorch-ddp", 1, 4).outside.workspace, 0_MiB);
  // Not measured: the framework's context, NCCL's buffers.
  Plan plan = base_plan();
  plan.dp = 4, plan.global_batch = 4;
  const Prediction assumed = predicted(g, plan);
  EXPECT_EQ(assumed.outside.context, 512_MiB);
  EXPECT_EQ(assumed.outside.kernels + assumed.outside.libraries + assumed.outside.workspace, 0_MiB);
  EXPECT_GT(assumed.outside.communicators, 0_MiB);
  EXPECT_EQ(assumed.peak_device, assumed.peak_reserved + assumed.outside.total());
  std::filesystem::remove_all(folder);
}

TEST(Predict, UtilisationIsModelFlopsOverTimeAndPeak) {
  // Forward once, backward twice: 3 x the forward's products, of all samples, over 8 x 989.4
  // TFLOP/s.
  const Graph g = llama();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.dp = 8;
  p.global_batch = 32;
  const Prediction r = predicted(g, p);
  const double expected = 3 * forward_products(g, false) * 32 / r.step_time.count / (8 * 989.4e12);
  EXPECT_NEAR(r.mfu, expected, 1e-12 * expected);
}

/// Every query sees every key, and the backward reads the probabilities: executed = model FLOPs.
Graph whole_square() {
  TransformerConfig c = small_config();
  c.causal = false;
  c.flash_attention = false;
  return build_transformer(c);
}

TEST(Predict, ExecutedFlopsAreTheModelsWhereNothingIsMaskedOrDoneTwice) {
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.dp = 8;
  const Prediction r = predicted(whole_square(), p);
  EXPECT_NEAR(r.hfu, r.mfu, 1e-12 * r.mfu);
}

TEST(Predict, CausalFlashAttentionExecutesHalfTheSquareAndOneProductTwice) {
  // 8 tokens: (8 + 1) / 16 of the pairs. Backward: 5 products of equal size instead of 4.
  const Graph g = gpt();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  const Prediction r = predicted(g, p);
  double attention = 0;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    if (!std::holds_alternative<Attention>(g.operators[i].operation)) continue;
    const Signature s = signature(g, OpId{i}, 1);
    std::vector<std::int64_t> extents;
    for (const auto& d : s.dims) extents.push_back(d.extent);
    attention += flops(g.operators[i].operation, s, extents, Pass::forward).count;
  }
  const double all = 3 * forward_products(g, false);
  const double executed = all - 3 * attention + attention * 9.0 / 16 * (1 + 2 * 5.0 / 4);
  EXPECT_NEAR(r.hfu / r.mfu, executed / all, 1e-12);
}

TEST(Predict, NoPlanExecutesFasterThanItsDeviceSustains) {
  std::mt19937 rng(11);
  const DeviceProfile h100 = load_device("h100-sxm");
  for (int k = 0; k < 60; ++k) {
    const Graph g = random_transformer(rng);
    Communication communication(load_topology("dgx-h100:13"));
    const auto r = predict(g, random_plan(rng), communication);
    if (!r) continue;
    EXPECT_LE(r->hfu, h100.matrix_efficiency);
    EXPECT_GT(r->hfu, 0);
  }
}

TEST(Predict, FullRecomputationAddsTheBlocksForward) {
  const Graph g = whole_square();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.tp = 2;
  p.dp = 4;
  p.global_batch = 8;
  p.recompute = parse_recompute("full", "");
  const Prediction r = predicted(g, p);
  const double ratio = 1 + forward_products(g, true) / (3 * forward_products(g, false));
  EXPECT_NEAR(r.hfu / r.mfu, ratio, 1e-12);
}

/// The best of all plans that fit, each simulated by itself.
Seconds best_by_hand(const Graph& g, const Topology& t, const Plan& base) {
  Communication communication(t);
  const auto ranks = static_cast<std::int64_t>(t.used_devices());
  Seconds best{1e300};
  for (std::int64_t tp = 1; tp <= ranks; ++tp) {
    for (std::int64_t pp = 1; pp * tp <= ranks; ++pp) {
      if (ranks % (tp * pp) != 0) continue;
      for (std::int64_t mb = 1; mb <= base.global_batch; ++mb) {
        for (int zero = 0; zero <= 3; ++zero) {
          for (const auto recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
            for (const Schedule schedule :
                 {Schedule::naive, Schedule::gpipe, Schedule::one_f_one_b, Schedule::interleaved}) {
              for (std::int64_t v = 1; v <= (schedule == Schedule::interleaved ? 4 : 1); ++v) {
                Plan p = base;
                p.tp = tp, p.pp = pp, p.dp = ranks / (tp * pp), p.micro_batch = mb;
                p.zero = zero, p.recompute.kind = recompute, p.virtual_stages = v;
                p.schedule = schedule, p.schedule_given = true;
                p.sequence_parallel = tp > 1;
                const auto r = predict(g, p, communication);
                if (r && r->fits) best = std::min(best, r->step_time);
              }
            }
          }
        }
      }
    }
  }
  return best;
}

TEST(Search, FindsWhatTryingEverythingByHandFinds) {
  // Batches with factors other than two; schedules that the space leaves out are never better.
  TransformerConfig c = small_config();
  c.hidden = 256;
  c.ffn = 1024;
  c.heads = c.kv_heads = 4;
  c.sequence = 64;
  c.positions = 64;
  for (const std::int64_t batch : {12, 16}) {
    const Graph g = build_transformer(c);
    const Topology t = load_topology("dgx-h100:4 gpus");
    Plan base = base_plan();
    set_precision(base, "bf16", "");
    base.global_batch = batch;
    const SearchResult r = search(g, t, 4, base, full_space(g, t, 4, base), 1, 1);
    ASSERT_FALSE(r.plans.empty());
    EXPECT_EQ(r.plans[0].step_time, best_by_hand(g, t, base)) << to_yaml(r.plans[0].plan);
  }
}

/// The ranking is by times without contention; the fastest with it may be far behind.
TEST(Search, TheFirstPlanIsTheSameHoweverManyAreShown) {
  TransformerConfig c = small_config();
  c.hidden = 512;
  c.ffn = 2048;
  c.heads = c.kv_heads = 8;
  c.sequence = c.positions = 512;
  c.layers = 4;
  const Graph g = build_transformer(c);
  for (const char* where : {"a100-pcie-8:2", "h100-pcie-8:1"}) {
    const Topology t = load_topology(where);
    const auto ranks = static_cast<std::int64_t>(t.used_ranks());
    Plan base = base_plan();
    set_precision(base, "bf16", "");
    base.global_batch = 32;
    SearchSpace s = full_space(g, t, ranks, base);
    s.tp = {1, 2}, s.cp = {1}, s.recompute = {{Recompute::none}};
    const SearchResult all = search(g, t, ranks, base, s, 100000, 2, Network::flows);
    ASSERT_GT(all.plans.size(), 60u);
    for (const std::size_t keep : {1u, 3u, 20u}) {
      const SearchResult some = search(g, t, ranks, base, s, keep, 2, Network::flows);
      ASSERT_EQ(some.plans.size(), keep);
      for (std::size_t k = 0; k < keep; ++k)
        EXPECT_EQ(some.plans[k].step_time, all.plans[k].step_time) << where << ", " << k;
      EXPECT_EQ(some.space, some.evaluated + some.pruned_memory + some.pruned_bound + some.illegal);
    }
  }
}

/// Plans without sequence parallelism are simulated only where they can be among the fastest; that
/// none is missed shows a search of each kind alone.
TEST(Search, TriesNotToCutSequencesWhereThatCanBeFaster) {
  int uncut = 0, pruned = 0;
  for (const std::int64_t sequence : {63, 64, 512, 4096}) {
    for (const char* where : {"dgx-h100:1", "a100-pcie-8:1"}) {
      ModelOptions o;
      o.sequence = sequence;
      o.layers = 4;
      const Graph g = load_model("llama-2-7b", o);
      const Topology t = load_topology(where);
      Plan base = base_plan();
      set_framework(base, "megatron-core", "");
      set_precision(base, "bf16", "");
      base.global_batch = 8;
      SearchSpace s = full_space(g, t, 8, base);
      s.cp = {1}, s.recompute = {{Recompute::none}}, s.virtual_stages = {1};
      const SearchResult both = search(g, t, 8, base, s, 3, 2, Network::flows);
      EXPECT_EQ(both.space, both.evaluated + both.pruned_memory + both.pruned_bound + both.illegal);
      pruned += both.pruned_bound > 0;
      std::vector<double> alone;
      for (const char cut : {char{0}, char{1}}) {
        s.sequence_parallel = {cut};
        for (const Prediction& p : search(g, t, 8, base, s, 1000, 2, Network::flows).plans) {
          // Where tp is 1 it is one plan in both.
          if (cut == 0 || p.plan.tp > 1) alone.push_back(p.step_time.count);
        }
      }
      std::sort(alone.begin(), alone.end());
      ASSERT_EQ(both.plans.size(), 3u);
      for (std::size_t k = 0; k < 3; ++k)
        EXPECT_EQ(both.plans[k].step_time.count, alone[k])
            << where << ", " << sequence << ", " << k;
      uncut += both.plans[0].plan.tp > 1 && !both.plans[0].plan.sequence_parallel;
    }
  }
  EXPECT_GT(uncut, 0);
  EXPECT_GT(pruned, 0);
}

/// Waits for joint axes, short pipelines and dp beside them: the bound holds there too.
TEST(Search, TheBoundOfPlansThatDoNotCutSequencesHolds) {
  struct Job {
    const char *model, *where;
    std::int64_t layers, sequence, batch, cp, ep, tp;
    const char* framework;
  };
  for (const Job& job :
       {Job{"mixtral-8x7b", "h100-pcie-8:1", 2, 4096, 8, 4, 4, 0, "megatron-core"},
        Job{"llama-2-7b", "dgx-a100-40gb:8", 0, 64, 4, 1, 1, 2, "megatron-lm-2022"}}) {
    ModelOptions o;
    o.sequence = job.sequence;
    o.layers = static_cast<int>(job.layers);
    const Graph g = load_model(job.model, o);
    const Topology t = load_topology(job.where);
    const auto ranks = static_cast<std::int64_t>(t.used_ranks());
    Plan base = base_plan();
    set_framework(base, job.framework, "");
    set_precision(base, "bf16", "");
    base.global_batch = job.batch;
    SearchSpace s = full_space(g, t, ranks, base);
    s.cp = {job.cp}, s.ep = {job.ep}, s.recompute = {{Recompute::none}}, s.virtual_stages = {1};
    if (job.layers > 0) s.pp = {1};
    if (job.tp > 0) s.tp = {job.tp};
    const SearchResult both = search(g, t, ranks, base, s, 1, 2);
    s.sequence_parallel = {char{0}};
    const SearchResult uncut = search(g, t, ranks, base, s, 1, 2);
    ASSERT_FALSE(both.plans.empty());
    ASSERT_FALSE(uncut.plans.empty());
    EXPECT_LE(both.plans[0].step_time, uncut.plans[0].step_time) << job.model;
  }
}

/// ZeRO-2 keeps shards of gradients where ZeRO-1 has them whole; one micro-batch may need less than
/// two, which add up.
TEST(Search, LeavesOutNothingThatAloneFits) {
  ModelOptions o;
  o.sequence = 2048;
  const Graph g = load_model("llama-3-8b", o);
  const Topology t = load_topology("dgx-h100:1");
  Plan base = base_plan();
  set_framework(base, "partita", "");
  set_precision(base, "bf16", "");
  base.global_batch = 8;
  SearchSpace s = full_space(g, t, 8, base);
  s.tp = s.pp = s.cp = {1}, s.zero = {2}, s.recompute = {{Recompute::none}};
  const SearchResult r = search(g, t, 8, base, s, 1, 1);
  ASSERT_EQ(r.plans.size(), 1u);
  EXPECT_EQ(r.plans[0].plan.micro_batch, 1);
  // docs/cost.md, "Gradients apart": of the parameters' type the only one is the sum.
  Plan apart = base_plan();
  set_framework(apart, "colossal-ai", "");
  set_precision(apart, "fp16", "");
  apart.global_batch = 2, apart.dp = 1;
  o.sequence = 64;
  TopologyEdits edits;
  const Graph short_one = load_model("llama-3.2-1b", o);
  Communication c(load_topology("dgx-h100:1 gpus"));
  apart.micro_batch = 1;
  const Bytes two = predict(short_one, apart, c)->peak_device;
  apart.micro_batch = 2;
  const Bytes one = predict(short_one, apart, c)->peak_device;
  ASSERT_LT(one, two);
  // Room for one micro-batch of two samples, not for two of one.
  const auto room = (one.count + two.count) / 2 - (Bytes{512_MiB}).count;
  edits.device.push_back({"usable_memory.value", fmt::format("{} B", room)});
  const Topology tight = load_topology("dgx-h100:1 gpus", edits);
  SearchSpace two_sizes = full_space(short_one, tight, 1, apart);
  two_sizes.recompute = {{Recompute::none}}, two_sizes.micro_batch = {1, 2};
  const SearchResult found = search(short_one, tight, 1, apart, two_sizes, 1, 1);
  ASSERT_EQ(found.plans.size(), 1u);
  EXPECT_EQ(found.plans[0].plan.micro_batch, 2);
}

/// Each rank's memory is held against its own device.
TEST(Search, DevicesThatDifferAreEachHeldAgainstTheirOwn) {
  const std::string file = data_folder("topologies/catalogue/dgx-a100-40gb.yaml");
  std::string text = read_file(file);
  const std::size_t at = text.find("  - count: 1"), end = text.find("\nfabric:");
  ASSERT_NE(at, std::string::npos);
  ASSERT_NE(end, std::string::npos);
  const std::string small = text.substr(at, end - at);
  std::string large = small;
  const std::string name = "a100-sxm-40gb";
  for (std::size_t k = 0; (k = large.find(name, k)) != std::string::npos; ++k)
    large.replace(k, name.size(), "a100-sxm-80gb");
  const Topology mixed =
      parse_topology(text.substr(0, at) + large + "\n" + small + text.substr(end), file);
  const Graph g = load_model("llama-3-8b");
  Plan p = base_plan();
  set_framework(p, "megatron-core", "");
  set_precision(p, "bf16", "");
  p.tp = 8, p.pp = 2, p.micro_batch = 4, p.global_batch = 64;
  p.cuts = {24, 8};
  Communication c(mixed);
  const auto r = predict(g, p, c);
  ASSERT_TRUE(r);
  ASSERT_EQ(r->memory_by_stage.size(), 2u);
  EXPECT_GT(r->memory_by_stage[0].total, 40_GiB);
  EXPECT_LT(r->memory_by_stage[1].total, 39_GiB);
  EXPECT_TRUE(r->fits);
  EXPECT_LE(r->peak_device, r->usable);
  p.cuts = {8, 24};
  const auto other = predict(g, p, c);
  EXPECT_EQ(other->fits, other->memory_by_stage[1].total < 39_GiB);
}

/// State that lies elsewhere, or that the optimizer has not, does not rule a plan out.
TEST(Search, StateThatIsNotOnTheDeviceRulesNothingOut) {
  const Graph g = load_model("llama-3-8b");
  const Topology t = load_topology("dgx-h100:1");
  Plan base = base_plan();
  set_precision(base, "bf16", "");
  base.global_batch = 8;
  SearchSpace s = full_space(g, t, 8, base);
  s.tp = s.pp = s.cp = s.ep = {1}, s.zero = {0}, s.micro_batch = {1}, s.virtual_stages = {1};
  s.recompute = {{Recompute::full}};
  EXPECT_TRUE(search(g, t, 8, base, s, 1, 1).plans.empty());
  base.offload_optimizer = true;
  const SearchResult r = search(g, t, 8, base, s, 1, 1);
  ASSERT_EQ(r.plans.size(), 1u);
  EXPECT_TRUE(r.plans[0].fits);
  EXPECT_EQ(r.plans[0].peak_host_node.count, 8 * r.plans[0].peak_host.count);
  EXPECT_EQ(r.plans[0].host_memory, Bytes{2'000'000'000'000});
  EXPECT_TRUE(r.plans[0].host_fits);
}

/// Loaders, brokers and servers are ranks that the mesh leaves devices for.
TEST(Search, LeavesDevicesForRolesBesideTheMesh) {
  const Graph g = gpt();
  const Topology t = load_topology("dgx-h100:1");
  for (const int what : {0, 1}) {
    Plan base = base_plan();
    base.global_batch = 56;
    base.loader = what == 0;
    base.servers = what;
    SearchSpace s = full_space(g, t, 8, base);
    s.zero = {0};
    const SearchResult r = search(g, t, 8, base, s, 1000, 1);
    ASSERT_FALSE(r.plans.empty()) << what;
    for (const Prediction& p : r.plans) EXPECT_LE(p.plan.ranks(), 8);
  }
}

/// What is offloaded has to fit beside all that a node's other ranks offload.
TEST(Fits, OnTheHostsToo) {
  const Graph g = load_model("gpt3-175b");
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.tp = 8;
  p.sequence_parallel = true;
  p.global_batch = 1;
  p.offload_optimizer = true;
  p.recompute = parse_recompute("full", "");
  Communication network(load_topology("dgx-h200:1"));
  const auto r = predict(g, p, network);
  ASSERT_TRUE(r) << r.reason();
  // Master copy and two moments, 12 B for each of 175e9 parameters at least: above 2 TB.
  EXPECT_GT(r->peak_host_node.count, std::int64_t{2'000'000'000'000});
  EXPECT_LE(r->peak_device, r->usable);
  EXPECT_FALSE(r->host_fits);
  EXPECT_FALSE(r->fits);
}

TEST(Search, TensorParallelismReachesAcrossNodesOfOneNvlinkDomain) {
  const Graph g = llama();
  const Topology t = load_topology("gb200-nvl72:2");
  const SearchSpace s = full_space(g, t, 8, base_plan());
  EXPECT_EQ(s.tp.back(), 8) << "trays of four GPUs share one NVLink network";
}

TEST(Search, ALargerMicroBatchNeverNeedsLess) {
  // Why the search stops at the first micro-batch that does not fit.
  std::mt19937 rng(3);
  Communication communication(load_topology("dgx-h100:13"));
  int compared = 0;
  for (int k = 0; k < 400; ++k) {
    const Graph g = random_transformer(rng);
    Plan p = random_plan(rng);
    if (p.schedule == Schedule::gpipe) continue;  // the search tries all of them there
    p.global_batch = 12 * p.dp;
    Bytes before{0};
    for (const std::int64_t mb : {1, 2, 3, 4, 6, 12}) {
      p.micro_batch = mb;
      const auto r = predict(g, p, communication);
      if (!r) continue;
      EXPECT_GE(static_cast<double>(r->peak_allocated.count) * 1.01,
                static_cast<double>(before.count))
          << to_yaml(p);
      before = r->peak_allocated;
      ++compared;
    }
  }
  EXPECT_GT(compared, 100);
}

TEST(Search, TheBestPlanIsTheFastestOfTheSpace) {
  const Graph g = llama();
  const Topology t = load_topology("dgx-h100:1");
  Plan base = base_plan();
  set_precision(base, "bf16", "");
  base.global_batch = 16;
  SearchProgress progress;
  const SearchResult all =
      search(g, t, 8, base, full_space(g, t, 8, base), 100000, 1, Network::idle, {}, &progress);
  ASSERT_FALSE(all.plans.empty());
  EXPECT_EQ(progress.space, all.space);
  EXPECT_EQ(progress.done, all.space);
  EXPECT_EQ(progress.fastest, all.plans[0].step_time.count);
  EXPECT_EQ(progress.again, static_cast<std::int64_t>(all.plans.size()));
  EXPECT_EQ(all.space, all.evaluated + all.pruned_memory + all.pruned_bound + all.illegal);
  EXPECT_EQ(static_cast<std::int64_t>(all.plans.size()), all.evaluated) << "all fit";
  for (std::size_t k = 1; k < all.plans.size(); ++k) {
    EXPECT_LE(all.plans[k - 1].step_time, all.plans[k].step_time);
  }
}

// Winograd's tiles multiply 16 times where the convolution has 36 products.
TEST(Predict, HardwareFlopsAreThoseOfTheKernels) {
  const Graph g = load_model("vgg-16");
  Plan p = base_plan();
  set_framework(p, "pytorch-ddp", "");
  p.global_batch = p.micro_batch = 64;
  const auto ratio = [&](const char* precision) {
    set_precision(p, precision, "");
    Communication c(load_topology("v100-sxm-4:1 gpus"));
    const auto r = predict(g, p, c);
    EXPECT_LE(r->hfu, 1);
    return r->hfu / r->mfu;
  };
  EXPECT_NEAR(ratio("fp16"), 1, 0.01);
  EXPECT_NEAR(ratio("fp32"), 16.0 / 36, 0.02);
}

// What an allocator keeps between blocks can be too much for a plan that was ranked first.
TEST(Search, ShowsNoPlanThatDoesNotFit) {
  const Graph g = load_model("llama-3-8b");
  Plan base = base_plan();
  set_framework(base, "megatron-core", "");
  set_precision(base, "bf16", "");
  base.global_batch = 16;
  int shown = 0, none = 0, over = 0;
  for (const char* memory : {"8 GiB", "30 GiB", "34 GiB"}) {
    TopologyEdits edits;
    edits.device.push_back({"usable_memory.value", memory});
    const Topology t = load_topology("dgx-h100:1", edits);
    SearchSpace s = full_space(g, t, 8, base);
    s.zero = {1}, s.pp = {1, 2}, s.cp = {1}, s.schedules = {Schedule::one_f_one_b};
    s.virtual_stages = {1}, s.micro_batch = {1, 2};
    const SearchResult all = search(g, t, 8, base, s, 1000, 1);
    EXPECT_EQ(all.space, all.evaluated + all.pruned_memory + all.illegal);
    for (const Prediction& p : all.plans) {
      EXPECT_TRUE(p.fits) << memory << "\n" << to_yaml(p.plan);
      ++shown;
    }
    if (all.plans.empty()) {
      ++none;
      EXPECT_FALSE(all.smallest && all.smallest->fits);
    }
    // As many as asked for, where so many fit.
    for (const std::size_t keep : {1u, 3u}) {
      const SearchResult few = search(g, t, 8, base, s, keep, 1);
      EXPECT_EQ(few.plans.size(), std::min(keep, all.plans.size()));
      over += few.pruned_memory > 0;
    }
  }
  EXPECT_GT(shown, 0);
  EXPECT_GT(none, 0);
  EXPECT_GT(over, 0);
}

TEST(Search, TriesWhatTheFrameworkHasAndChunksThatAreNearlyEven) {
  const Topology t = load_topology("dgx-h100:4");
  Plan base = base_plan();
  set_framework(base, "megatron-core", "");
  base.global_batch = 64;
  Graph g = load_model("deepseek-v3");
  SearchSpace s = full_space(g, t, 32, base);
  EXPECT_EQ(s.zero, (std::vector<int>{0, 1, 2, 3}));
  EXPECT_EQ(s.zero_pipelined, 1);
  EXPECT_EQ(s.etp, (std::vector<std::int64_t>{0, 1}));
  EXPECT_EQ(s.cp, (std::vector<std::int64_t>{1}));  // 4,096 tokens
  EXPECT_EQ(full_space(load_model("llama-3-8b"), t, 32, base).cp,
            (std::vector<std::int64_t>{1, 2}));  // 8,192
  set_framework(base, "pytorch-ddp", "");
  EXPECT_EQ(full_space(g, t, 32, base).zero, (std::vector<int>{0}));
  const SearchSpace images = full_space(load_model("resnet-50"), t, 32, base);
  EXPECT_EQ(images.recompute, (std::vector<RecomputeSet>{{Recompute::none}, {Recompute::full}}));
}

// docs/topologies.md, "What an axis crosses".
TEST(Placement, AxesOfTwoDgxH100) {
  const Topology t = load_topology("dgx-h100:2");
  const auto inner = axis_crossings(Mesh{{{"dp", 2}, {"tp", 8}}}, Communication(t));
  ASSERT_EQ(inner.size(), 2u);
  EXPECT_EQ(inner[0].name, "tp");
  EXPECT_EQ(inner[0].nodes, 1u);
  EXPECT_EQ(inner[0].alone.count, 450e9);
  EXPECT_EQ(inner[0].together.count, 450e9);
  EXPECT_EQ(inner[1].nodes, 2u);
  EXPECT_EQ(inner[1].alone.count, 50e9);
  EXPECT_EQ(inner[1].together.count, 50e9);  // each pair has a rail of its own
  // Two cards for eight GPUs: the groups of dp share them, four to a card.
  const auto shared =
      axis_crossings(Mesh{{{"dp", 2}, {"tp", 8}}}, Communication(load_topology("a100-pcie-8:2")));
  EXPECT_EQ(shared[1].alone.count, 25e9);
  EXPECT_EQ(shared[1].together.count, 25e9 / 4);
  EXPECT_THROW(axis_crossings(Mesh{{{"dp", 32}}}, Communication(t)), InputError);
}

TEST(Placement, NestsAxesAsNamed) {
  const Mesh mesh{{{"pp", 2}, {"dp", 3}, {"tp", 4}}};
  EXPECT_EQ(axis_order(mesh), (std::vector<std::string>{"tp", "dp", "pp"}));
  const auto same = placement(mesh, {"tp", "dp", "pp"}, "--placement");
  for (std::size_t r = 0; r < same.size(); ++r) EXPECT_EQ(same[r], static_cast<std::int32_t>(r));
  // dp innermost: rank (pp, dp, tp) lies at dp + 3 (tp + 4 pp).
  const auto other = placement(mesh, {"dp", "tp", "pp"}, "--placement");
  for (std::int32_t r = 0; r < 24; ++r)
    EXPECT_EQ(other[static_cast<std::size_t>(r)], r / 4 % 3 + 3 * (r % 4 + 4 * (r / 12)));
  EXPECT_THROW(placement(mesh, {"tp", "dp"}, "--placement"), InputError);
}

TEST(Placement, TheSearchPutsTensorParallelInsideNodes) {
  const Graph g = gpt();
  const Topology t = load_topology("dgx-h100:2");
  Plan wanted = base_plan();
  wanted.tp = 4, wanted.dp = 4;
  const auto all = place(g, wanted, t);
  ASSERT_TRUE(all);
  ASSERT_GE(all->tried.size(), 2u);
  EXPECT_EQ(all->best().plan.placement.front(), "tp");
  EXPECT_LT(all->best().step_time, all->tried.back().step_time);
  // The first is what predict() says of ranks in order.
  Communication communication(t);
  const auto plain =
      predict(g, wanted, communication, nullptr, nullptr, false, nullptr, Network::flows);
  ASSERT_TRUE(plain);
  EXPECT_EQ(plain->step_time, all->best().step_time);
  // A plan file that says it is read back, and simulated so.
  wanted.placement = {"dp", "tp"};
  Plan read = base_plan();
  set(read, "placement", "dp,tp", "");
  EXPECT_EQ(read.placement, wanted.placement);
  set(read, "placement", "[tp, dp]", "");
  EXPECT_EQ(read.placement.front(), "tp");
  EXPECT_THAT(to_yaml(wanted), ::testing::HasSubstr("placement: [dp, tp]"));
  const auto other =
      predict(g, wanted, communication, nullptr, nullptr, false, nullptr, Network::flows);
  ASSERT_TRUE(other);
  EXPECT_EQ(other->step_time, all->tried.back().step_time);
  wanted.placement = {"dp", "pp"};
  EXPECT_THAT(complete(g, wanted).reason(), ::testing::HasSubstr("tp,dp in the order you want"));
  wanted.placement = {"dp", "tp"};
  wanted.loader = true;
  EXPECT_THAT(complete(g, wanted).reason(), ::testing::HasSubstr("leave out the loader"));
}

/// Two blocks of gpt2 on an H100: docs/simulation.md, "Memory".
Graph two_blocks() {
  ModelOptions options;
  options.layers = 2;
  return load_model("gpt2", options);
}
Plan under(const char* framework) {
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  set_framework(p, framework, "");
  return p;
}

TEST(Predict, AFrameworkHoldsWorkspacesAndPlaceholders) {
  Plan p = under("megatron-core");
  EXPECT_EQ(predicted(two_blocks(), p).memory_by_stage[0].resident.count, 114'819'072);
  p.tp = 2;
  EXPECT_EQ(predicted(two_blocks(), p).memory_by_stage[0].resident.count,
            100'663'296 + 14'155'776 / 2);
  EXPECT_EQ(predicted(two_blocks(), under("pytorch-ddp")).memory_by_stage[0].resident, 64_MiB);
  EXPECT_EQ(predicted(two_blocks(), under("partita")).memory_by_stage[0].resident, 0_B);
}

/// Of a plan of one stage: categories, and what is alive, are the whole peak.
void expect_parts_sum_to_the_peak(const Prediction& r) {
  Bytes parts{0}, alive{0};
  for (const Bytes b : r.memory_by_stage[0].by_category) parts += b;
  for (const Alive& a : r.alive) alive += a.bytes;
  EXPECT_EQ(parts, r.peak_allocated);
  EXPECT_EQ(alive, r.peak_allocated);
}

TEST(Predict, WhatAFrameworkHoldsIsInThePeakAndInItsParts) {
  const Prediction r = predicted(two_blocks(), under("megatron-core"));
  expect_parts_sum_to_the_peak(r);
}

TEST(Predict, ReservedMemoryIsPlayedAndAWeighedOneIsRounded) {
  Topology t = load_topology("dgx-h100:1");
  Communication communication(t);
  Plan p = under("megatron-core");
  p.micro_batch = 2, p.global_batch = 16;
  const auto played = predict(two_blocks(), p, communication);
  const auto weighed = predict(two_blocks(), p, communication, nullptr, nullptr, true);
  ASSERT_TRUE(played && weighed);
  EXPECT_EQ(weighed->peak_allocated, played->peak_allocated);
  EXPECT_EQ(weighed->peak_reserved.count, ceil_div(played->peak_allocated.count, 2 << 20) << 21);
  EXPECT_GE(played->peak_reserved, played->peak_allocated);
  EXPECT_EQ(played->memory_by_stage[0].reserved, played->peak_reserved);
  // Repeating more micro-batches changes nothing.
  p.global_batch = 64;
  EXPECT_EQ(predict(two_blocks(), p, communication)->peak_reserved, played->peak_reserved);
}

TEST(Predict, AFrameworkKeepsGradientsBesideAndCopiesOfMessages) {
  Plan p = under("megatron-deepspeed");
  p.precision.gradients = p.precision.gradient_communication = ElementType::fp32;
  p.pp = 2, p.global_batch = 4;
  const auto plan = complete(two_blocks(), p);
  const auto program = lower(two_blocks(), *plan);
  ASSERT_TRUE(program);
  // Two stages: the first sends 1,024 tokens of 768 bf16, the last receives them and keeps logits.
  const std::int64_t logits = 1024 * 50257 * 2;
  for (const int stage : {0, 1}) {
    std::int64_t sum = 0, most = 0;
    const auto copies = stage_copies(*program, stage, stage);
    for (const BlockCall& call : program->stages[static_cast<std::size_t>(stage)]) {
      sum += copies[call.block.index()];
      most = std::max(most, copies[call.block.index()]);
    }
    EXPECT_EQ(most, 1024 * 768 * 2 + stage * logits);
    EXPECT_EQ(sum, 0);
  }
  // All parameters' gradients in bf16 beside those in fp32, and the workspace.
  const Bytes beside = resident_bytes(*program, 0, 0, 80);
  p.allocations.weight_gradients = Allocations::WeightGradients::apart;
  const auto without = lower(two_blocks(), *complete(two_blocks(), p));
  // Table, positions and a block of 12 h^2 weights and 13 h of biases and norms.
  EXPECT_EQ(beside - resident_bytes(*without, 0, 0, 80),
            Bytes{2 * ((50257 + 1024) * 768 + 12 * 768 * 768 + 13 * 768)});
  // Those of the micro-batch before are there too, on the last stage.
  p.allocations.stage_copies = false;
  const auto forgets = lower(two_blocks(), *complete(two_blocks(), p));
  EXPECT_EQ(resident_bytes(*without, 1, 1, 80) - resident_bytes(*forgets, 1, 1, 80), Bytes{logits});
  EXPECT_EQ(resident_bytes(*without, 0, 0, 80), resident_bytes(*forgets, 0, 0, 80));
  // Gradients in fp32 are reduced in a bf16 copy and have no flat copies; bf16 ones in one buffer.
  EXPECT_EQ(step_bytes(*program, 0, 0),
            std::vector<Bytes>{Bytes{2 * ((50257 + 1024) * 768 + 12 * 768 * 768 + 13 * 768)}});
  Plan narrow = under("megatron-deepspeed");
  narrow.precision.gradients = narrow.precision.gradient_communication = ElementType::bf16;
  EXPECT_EQ(step_bytes(*lower(two_blocks(), *complete(two_blocks(), narrow)), 0, 0).at(0), 1_GB);
}

TEST(Predict, AChunkKeepsWhatItLastReceived) {
  // 1,024 tokens of 768 bf16 and their gradient, of every chunk but the first.
  Plan p = under("megatron-core");
  p.pp = 2, p.global_batch = 8;
  const auto kept = [&](int stage) {
    return predicted(two_blocks(), p).memory_by_stage[static_cast<std::size_t>(stage)].kept_inputs;
  };
  EXPECT_EQ(kept(0), 0_B);
  EXPECT_EQ(kept(1), Bytes{2 * 1024 * 768 * 2});
  p.allocations.keeps_inputs = false;
  EXPECT_EQ(kept(1), 0_B);
}

TEST(Predict, ShardsOfFsdpAreTheFp32Parameters) {
  // docs/simulation.md, "Memory": 16 B for each of llama-3-8b's parameters on 8 ranks.
  const auto state = [](const char* framework, int zero) {
    Plan p = under(framework);
    p.dp = p.global_batch = 8, p.zero = zero;
    p.optimizer.kind = OptimizerKind::adam;
    const StageMemory m = predicted(load_model("llama-3-8b", {}), p).memory_by_stage[0];
    const auto of = [&](Category c) { return m.by_category[static_cast<std::size_t>(c)].count; };
    return std::array{of(Category::parameters), of(Category::gradients), of(Category::optimizer)};
  };
  constexpr std::int64_t kParameters = 8'030'261'248;
  EXPECT_EQ(state("torchtitan", 3), (std::array{kParameters / 2, kParameters / 2, kParameters}));
  for (const char* framework : {"llm-foundry", "pytorch-fsdp"}) {
    EXPECT_EQ(state(framework, 3).at(0), kParameters / 2) << framework;
    EXPECT_EQ(state(framework, 3).at(2), kParameters) << framework;
    // 4 B of a gradient's shard, also where ranks sum it in bf16; one that is apart comes besides.
    EXPECT_GE(state(framework, 3).at(1), kParameters / 2) << framework;
  }
  // Whole parameters are narrow ones, beside a master copy; so are Megatron's shards.
  EXPECT_EQ(state("torchtitan", 1).at(0), 2 * kParameters);
  EXPECT_EQ(state("torchtitan", 1).at(2), 12 * kParameters / 8);
  EXPECT_EQ(state("megatron-core", 3),
            (std::array{2 * kParameters / 8, 4 * kParameters / 8, 12 * kParameters / 8}));
}

/// Bytes that a rank of the first stage keeps for its backward passes.
std::int64_t saved(const TransformerConfig& c, const Plan& p) {
  return predicted(build_transformer(c), p).memory_by_stage[0].saved.count;
}

TEST(Predict, ExpertsKeepWhatIsWeighted) {
  TransformerConfig c = mixtral_config();
  // 8 tokens of 8 features, two experts each of width 8: 16 rows of 16 B.
  constexpr std::int64_t kRows = 2 * 8;
  for (const bool gated : {true, false}) {
    c.gated = gated;
    Plan combined = under("megatron-core");
    combined.allocations.weighted_activations = false;
    const std::int64_t more = saved(c, under("megatron-core")) - saved(c, combined);
    // Of each block no outputs; without a gate a second activation, here as wide.
    EXPECT_EQ(more, gated ? -2 * kRows * 16 : 0) << gated;
    c.moe.ffn = 32;
    const std::int64_t wider = saved(c, under("megatron-core")) - saved(c, combined);
    EXPECT_EQ(wider, 2 * kRows * ((gated ? 0 : 64) - 16)) << gated;
    c.moe.ffn = 8;
  }
}

TEST(Predict, ASquaredRelusKernelWeightsItsRows) {
  TransformerConfig c = mixtral_config();
  c.gated = false;
  c.activation = ActivationKind::squared_relu;
  c.moe.ffn = 32;
  Plan combined = under("megatron-core");
  combined.allocations.weighted_activations = false;
  EXPECT_EQ(saved(c, under("megatron-core")) - saved(c, combined), -2 * 16 * 16);
}

TEST(Predict, AMambaBlockKeepsWhatItsPageSays) {
  // docs/simulation.md: 8 tokens of 8 features, 4 heads of 2 in 2 groups, states of 3.
  TransformerConfig c = hybrid_config();
  c.mamba.head_dim = 2;
  const auto kept = [&](const char* pattern, bool mamba_ssm, bool gates_in_scan) {
    c.pattern = pattern;
    c.layers = static_cast<int>(c.pattern.size());
    Plan p = under("megatron-core");
    set_precision(p, "bf16", "");
    p.kernels.mamba_ssm = mamba_ssm;
    p.kernels.mamba_gates_in_scan = gates_in_scan;
    return saved(c, p);
  };
  EXPECT_EQ(kept("MMM", true, true) - kept("MM", true, true), 8 * 156);
  EXPECT_EQ(kept("MM", false, true) - kept("MM", true, true), 2 * 8 * 20 * 2);
  EXPECT_EQ(kept("MM", true, true) - kept("MM", true, false), 2 * 8 * 8 * 2);
}

TEST(Predict, APrecisionAfterAFrameworkTakesItsGradientsAlong) {
  Plan p = under("megatron-deepspeed");  // of bf16, whose gradients are bf16
  set_precision(p, "fp16", "");
  EXPECT_EQ(p.precision.gradients, ElementType::fp16);
  EXPECT_EQ(p.precision.gradient_communication, ElementType::fp16);
  set_precision(p, "fp32", "");
  EXPECT_EQ(p.precision.gradients, ElementType::fp32);
  set_precision(p, "bf16", "");
  EXPECT_EQ(p.precision.gradients, ElementType::fp32);
  Plan wide = under("megatron-core");  // gradients in fp32
  set_precision(wide, "fp16", "");
  EXPECT_EQ(wide.precision.gradients, ElementType::fp32);
}

TEST(Predict, NarrowProductsKeepNarrowInputs) {
  // docs/simulation.md: four blocks of 8 tokens of 8 features and 16 in between, without gates.
  const auto kept = [](bool narrow, const char* precision) {
    Plan p = under("megatron-core");
    set_precision(p, precision, "");
    p.allocations.narrow_inputs = narrow;
    return saved(small_config(), p);
  };
  EXPECT_EQ(kept(true, "bf16"), kept(false, "bf16"));
  // Half of what norms and the activation give, of attention's output half more: of 4 blocks.
  EXPECT_EQ(kept(true, "fp8") - kept(false, "fp8"), 4 * 8 * (-8 - 8 - 16 + 8));
}

TEST(Predict, NarrowProductsKeepTheirWeightsByRowsAndColumns) {
  // docs/simulation.md, "Memory": a rank of Llama-3-70B.
  const Graph g = load_model("llama-3-70b");
  const auto resident = [&](bool narrow, const char* precision, int zero = 1) {
    Plan p = under("megatron-core");
    set_precision(p, precision, "");
    p.tp = p.pp = 4;
    p.global_batch = 4;
    p.dp = zero == 3 ? 2 : 1, p.zero = zero;
    p.allocations.narrow_weights = narrow;
    return resident_bytes(*lower(g, *complete(g, p)), 1, p.tp * p.dp, 90).count;
  };
  EXPECT_EQ(resident(true, "fp8") - resident(false, "fp8"), 8'556'380'160);
  EXPECT_EQ(resident(true, "nvfp4") - resident(false, "nvfp4"), 8'556'380'160 / 2);
  EXPECT_EQ(resident(true, "bf16"), resident(false, "bf16"));
  EXPECT_EQ(resident(true, "fp8", 3), resident(false, "fp8", 3));
}

TEST(Predict, ForgottenResultsAreNotKept) {
  // docs/plan.md: four blocks of 8 tokens of 8 features and 16 in between, without gates.
  const auto kept = [](const char* recompute) {
    Plan p = under("partita");
    set_precision(p, "bf16", "");
    p.recompute = parse_recompute(recompute, "");
    return saved(small_config(), p);
  };
  EXPECT_EQ(kept("*.mlp.activation") - kept("~*.mlp.activation"), 4 * 8 * 16 * 2);
  // A norm's result is read by products of weights' gradients, too.
  EXPECT_EQ(kept("*.mlp_norm") - kept("~*.mlp_norm"), 4 * 8 * 8 * 2);
  EXPECT_LE(kept("~*.mlp_norm"), kept("none"));
}

TEST(Predict, WhatFusedKernelsWouldNotMakeIsKept) {
  // docs/simulation.md: four blocks of 8 tokens of 8 features and 16 in between.
  const auto kept = [](bool gated, bool gate, bool attention) {
    TransformerConfig c = small_config();
    c.gated = gated;
    Plan p = under("megatron-core");
    set_precision(p, "bf16", "");
    p.allocations.gate_apart = gate;
    p.allocations.attention_copied = attention;
    return saved(c, p);
  };
  EXPECT_EQ(kept(true, true, false) - kept(true, false, false), 4 * 8 * 16 * 2);
  EXPECT_EQ(kept(false, true, false), kept(false, false, false));
  EXPECT_EQ(kept(true, false, true) - kept(true, false, false), 4 * 8 * 8 * 2);
}

TEST(Predict, RowsThatExpertsGatherAreKept) {
  Plan kept = under("megatron-core");
  kept.tp = 2;
  kept.sequence_parallel = true;
  Plan again = kept;
  again.allocations.gathered_rows = false;
  // Two blocks, 16 rows of 16 B, of which a rank's own tokens have half.
  EXPECT_EQ(saved(mixtral_config(), kept) - saved(mixtral_config(), again), 2 * 16 * 16 / 2);
}

TEST(Predict, ExpertsOfAPartOfTensorParallelism) {
  // docs/plan.md: 8 experts of 3 * 4,096 * 14,336, in bf16, on 4 ranks.
  const auto parameters = [](std::int64_t ep, std::int64_t etp) {
    ModelOptions options;
    options.layers = 2;
    Plan p = under("megatron-core");
    p.tp = 4, p.ep = ep, p.etp = etp;
    p.sequence_parallel = true;
    return predicted(load_model("mixtral-8x7b", options), p)
        .memory_by_stage[0]
        .by_category[static_cast<std::size_t>(Category::parameters)];
  };
  // Two blocks; all else is the same.
  EXPECT_EQ(parameters(2, 1) - parameters(2, 2), Bytes{2 * (1'344 - 672) * (1LL << 20)});
  EXPECT_EQ(parameters(4, 1), parameters(2, 2));
  EXPECT_EQ(parameters(1, 4), parameters(2, 2));
  EXPECT_EQ(parameters(1, 2), parameters(2, 1));
}

TEST(Predict, AnOptimizersFlatCopiesAreInTheStep) {
  Plan p = under("megatron-deepspeed");  // gradients of the parameters' type
  const auto program = lower(two_blocks(), *complete(two_blocks(), p));
  const auto step = step_bytes(*program, 0, 0);
  const std::int64_t n = parameter_count(two_blocks());
  EXPECT_EQ(step, (std::vector<Bytes>{1_GB, Bytes{2 * n}, Bytes{4 * n}}));
  // They are the peak: nothing else of this network takes so much.
  const Prediction r = predicted(two_blocks(), p);
  expect_parts_sum_to_the_peak(r);
}

TEST(Predict, AGradientApartTakesTheParametersType) {
  const auto of = [](const char* framework, const char* op, std::int64_t micro_batches) {
    Plan p = under(framework);
    p.global_batch = micro_batches;
    const auto plan = complete(two_blocks(), p);
    const auto program = lower(two_blocks(), *plan);
    Bytes most{0};
    for (const Block& b : program->blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind == Kind::compute && i.kernel == Kernel::backward_weight &&
            program->operators[static_cast<std::size_t>(i.op)].name == op)
          most = std::max(most, transient_bytes(*program, i, 0));
      }
    }
    return most.count;
  };
  constexpr std::int64_t kTable = 50257 * 768 * 2,
                         kProduct = 4 * 768 * (768 + 1) * 2;  // and its bias
  EXPECT_EQ(kTable, 77'194'752);
  EXPECT_EQ(of("megatron-core", "embedding", 1), kTable);
  EXPECT_EQ(of("megatron-core", "layers.0.mlp.up", 1), 0);
  EXPECT_EQ(of("megatron-lm-2021", "layers.0.mlp.up", 1), kProduct);
  // In the parameters' type the first one stays where it is.
  EXPECT_EQ(of("pytorch-fsdp", "layers.0.mlp.up", 1), 0);
  EXPECT_EQ(of("pytorch-fsdp", "layers.0.mlp.up", 2), kProduct);
  EXPECT_EQ(of("partita", "embedding", 2), 0);
}

TEST(Predict, RanksOfADeviceMustFitTogether) {
  const Topology t = load_topology("dgx-h100:1");
  Plan p = under("megatron-core");
  p.dp = 2, p.pp = 2;
  p.global_batch = 8;
  const auto on = [&](int ranks) {
    ClusterState state;
    state.ranks_per_device = ranks;
    Communication communication(t.in_state(state));
    const auto r = predict(two_blocks(), p, communication, nullptr, nullptr, true);
    EXPECT_TRUE(static_cast<bool>(r)) << r.reason();
    return *r;
  };
  const Prediction two = on(2), four = on(4);
  EXPECT_EQ(two.devices, 2);
  EXPECT_EQ(four.devices, 1);
  std::int64_t stages = 0;
  for (const StageMemory& s : four.memory_by_stage) stages += s.reserved.count;
  // Without NCCL no communicators. Ranks 0 and 1 are stage 0's: two of a device, or all four.
  constexpr std::int64_t kContext = 512LL << 20;
  EXPECT_EQ(four.peak_device.count, 2 * stages + 4 * kContext);
  EXPECT_EQ(two.peak_device.count, 2 * two.peak_reserved.count + 2 * kContext);
  EXPECT_GT(two.mfu, 0);
  EXPECT_LE(four.mfu, 1);
}

// docs/cost.md, "Gradients apart".
TEST(Predict, AGradientApartIsAddedByAKernelMore) {
  const auto of = [](const char* framework, std::int64_t micro_batches) {
    Plan p = under(framework);
    p.global_batch = micro_batches;
    p.kernels.bias_sums = false;
    const auto program = lower(two_blocks(), *complete(two_blocks(), p));
    for (const Block& b : program->blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.op >= 0 && i.kernel == Kernel::backward_weight &&
            program->operators[static_cast<std::size_t>(i.op)].name == "layers.0.mlp.up")
          return work_of(*program, i, 0);
      }
    }
    return Work{};
  };
  const Work apart = of("megatron-lm-2021", 1), in_place = of("megatron-lm-2022", 1);
  EXPECT_EQ(apart.streamed, Bytes{23'623'680});
  EXPECT_EQ(apart.kernels, in_place.kernels + 2);
  EXPECT_EQ(in_place.streamed, Bytes{0});
  // It writes 2 bytes each instead of reading and writing 4.
  EXPECT_EQ(in_place.products[0].bytes - apart.products[0].bytes, Bytes{2'362'368 * (8 - 2)});
  EXPECT_TRUE(in_place.products[0].accumulate);
  EXPECT_FALSE(apart.products[0].accumulate);
  EXPECT_EQ(apart.products[0].out, ElementType::bf16);
  EXPECT_EQ(of("pytorch-fsdp", 1).streamed, Bytes{0});
  EXPECT_EQ(of("pytorch-fsdp", 2).streamed, Bytes{7'087'104});
  EXPECT_EQ(of("megatron-core", 2).streamed, Bytes{0});
}

TEST(Predict, SumsInTurnWaitForTheWeightsGradient) {
  Plan p = under("megatron-deepspeed");
  p.tp = 2;
  const auto exposed = [&] { return predicted(two_blocks(), p).breakdown.exposed.at("tp").count; };
  set_framework(p, "megatron-deepspeed", "");
  EXPECT_TRUE(p.sums_in_turn);
  const std::int64_t in_turn = exposed();
  p.sums_in_turn = false;
  EXPECT_LT(exposed(), in_turn);
}

TEST(Predict, CommunicatorsAreDeviceMemory) {
  constexpr std::int64_t kConnection = 4'194'304 + 4'915'200 + 524'288;
  Plan p = under("megatron-core");
  const auto beside = [&] {
    const Prediction r = predicted(two_blocks(), p);
    return r.peak_device.count - r.peak_reserved.count - (512LL << 20);
  };
  EXPECT_EQ(beside(), 0);  // one rank
  p.dp = 8;
  const std::int64_t one = beside();
  EXPECT_GT(one, 0);
  EXPECT_EQ(one % kConnection, 0);
}

TEST(Predict, ResNet50KeepsWhatPyTorchKeeps) {
  // tests/simulator/saved_by_pytorch.py, PyTorch 1.13.0.
  constexpr double kAnImage = 86'125'994, kImages = 64;
  Plan p = under("pytorch-ddp");
  set_precision(p, "fp32", "");
  p.micro_batch = p.global_batch = 64;
  const Prediction r = predicted(load_model("resnet-50"), p);
  const auto kept = static_cast<double>(
      r.memory_by_stage[0].by_category[static_cast<std::size_t>(Category::activations)].count);
  EXPECT_NEAR(kept / (kImages * kAnImage), 1, 0.01);
}

TEST(Predict, ALayerOf2021KeepsWhatKorthikantiCounts) {
  // arXiv 2205.05198, equation 2: s b h (10 + 24 / t + 5 a s / (h t)) bytes a layer, dropout's
  // masks and copies among them. s 2048, b 4, h 6144, a 64, t 8: 26 1/3 s b h.
  const auto activations = [](const char* framework, int layers) {
    ModelOptions options;
    options.layers = layers;
    options.flash_attention = false;
    options.dropout = 0.1;
    Plan p = under(framework);
    p.tp = 8;
    p.micro_batch = 4;
    const Prediction r = predicted(load_model("megatron-22b", options), p);
    return static_cast<double>(
        r.memory_by_stage[0].by_category[static_cast<std::size_t>(Category::activations)].count);
  };
  const double layer = 2048.0 * 4 * 6144 * (10 + 3 + 40.0 / 3);
  EXPECT_DOUBLE_EQ(layer, 1'325'400'064);
  // Megatron-Core without flash attention keeps the same.
  for (const char* framework : {"megatron-lm-2021", "megatron-core"})
    EXPECT_NEAR(activations(framework, 3) - activations(framework, 2), layer, 0.01 * layer)
        << framework;
}

/// The same network, two layers: bytes a layer for each value of its input, all of what layers'
/// backward passes read; table 2 of the paper.
TEST(Predict, LayersBackwardPassesReadWhatKorthikantiCounts) {
  const auto layer = [](const char* recompute, bool sequence_parallel) {
    ModelOptions options;
    options.layers = 2;
    options.flash_attention = false;
    options.dropout = 0.1;
    Plan p = under("megatron-lm-2021");
    p.tp = 8;
    p.micro_batch = 4;
    p.sequence_parallel = sequence_parallel;
    p.recompute = parse_recompute(recompute, "");
    const Prediction r = predicted(load_model("megatron-22b", options), p);
    EXPECT_GT(r.memory_by_stage[0].saved, r.memory_by_stage[0].saved_by_layers) << recompute;
    return static_cast<double>(r.memory_by_stage[0].saved_by_layers.count) /
           (2.0 * 2048 * 4 * 6144);
  };
  const double none = 10 + 3 + 40.0 / 3;
  EXPECT_NEAR(layer("none", false), none, 0.01 * none);
  EXPECT_NEAR(layer("none", true), 34.0 / 8 + 40.0 / 3, 0.01 * none);
  EXPECT_NEAR(layer("selective", false), 13, 0.13);
  EXPECT_NEAR(layer("selective", true), 34.0 / 8, 0.0425);
  EXPECT_EQ(layer("full", false), 2);
}

}  // namespace
}  // namespace partita
