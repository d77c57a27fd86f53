// The worked examples of docs/plan.md, docs/policies.md, docs/reference.md and docs/simulation.md.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <map>

#include "runtime/reference/interpreter.h"
#include "runtime/reference/ring_attention.h"
#include "simulator/cost/cost.h"
#include "simulator/lower/startup.h"
#include "simulator/program/expansion.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

TEST(PlanPage, RankThirteenOfTheMeshExample) {
  Plan p = base_plan();
  p.tp = 2;
  p.pp = 2;
  p.dp = 4;
  p.ep = 2;
  p.global_batch = 4;
  const auto plan = complete(mixtral(), p);
  ASSERT_TRUE(static_cast<bool>(plan)) << plan.reason();
  ASSERT_EQ(plan->mesh.ranks(), 16);
  EXPECT_EQ(plan->mesh.coordinate(13, plan->axes.at("pp")), 1);
  EXPECT_EQ(plan->mesh.coordinate(13, plan->axes.at("dp")), 2);
  EXPECT_EQ(plan->mesh.coordinate(13, plan->axes.at("tp")), 1);
  EXPECT_EQ(plan->mesh.group(13, mask_of(plan->axes.at("ep"))),
            (std::vector<std::int64_t>{13, 15}));
}

TEST(ReferencePage, TwoPartsOfARingAreTheSoftmaxOverBoth) {
  using reference::Piece;
  Attention a;
  a.qk_dim = a.v_dim = 1;
  a.scale = 1;
  a.causal = false;
  const auto piece = [](std::vector<std::vector<std::int64_t>> index, double value) {
    Piece p = reference::zeros(std::move(index));
    p.values = {value};
    return p;
  };
  const Piece q = piece({{0}, {0}, {0}, {0}}, 1);
  Piece y = piece({{0}, {0}, {0}, {0}}, 0);
  Piece lse = piece({{0}, {0}, {0}, {0}}, -std::numeric_limits<double>::infinity());
  reference::attend_part(a, q, piece({{0}, {0}, {0}, {0}}, 0), piece({{0}, {0}, {0}, {0}}, 4), y,
                         lse);
  EXPECT_DOUBLE_EQ(y.values[0], 4);
  EXPECT_DOUBLE_EQ(lse.values[0], 0);
  reference::attend_part(a, q, piece({{0}, {1}, {0}, {0}}, std::log(3)),
                         piece({{0}, {1}, {0}, {0}}, 8), y, lse);
  EXPECT_NEAR(y.values[0], 7, 1e-14);
  EXPECT_NEAR(lse.values[0], std::log(4), 1e-15);
}

TEST(ReferencePage, OptimizersAreThoseOfPyTorch) {
  // SGD, lr 0.1, momentum 0.9, gradient 2 twice: v = 2, then 3.8; p = 1 - 0.2 = 0.8, then 0.8 -
  // 0.38.
  Optimizer sgd;
  sgd.kind = OptimizerKind::sgd;
  sgd.learning_rate = 0.1;
  std::vector<double> p{1}, v{0};
  reference::optimizer_update(sgd, 0, p, {2}, {&v});
  EXPECT_DOUBLE_EQ(p[0], 0.8);
  reference::optimizer_update(sgd, 1, p, {2}, {&v});
  EXPECT_DOUBLE_EQ(p[0], 0.42);
  // AdamW's first step moves by lr whatever the gradient's size (to epsilon), after decay 1 - 0.1 ·
  // 0.5.
  Optimizer adam;
  adam.learning_rate = 0.1;
  adam.weight_decay = 0.5;
  adam.epsilon = 0;
  std::vector<double> w{1}, m{0}, s{0};
  reference::optimizer_update(adam, 0, w, {7}, {&m, &s});
  EXPECT_DOUBLE_EQ(w[0], 0.95 - 0.1);
}

TEST(PlanFile, WhatIsSavedIsReadBack) {
  std::mt19937 rng{20261127};
  const std::string file = ::testing::TempDir() + "partita_plan.yaml";
  for (int i = 0; i < 200; ++i) {
    Plan p = random_plan(rng);
    if (i % 3 == 0) p.freeze = {"embedding*", "layers.0.*"};
    if (i % 5 == 0) p.lora = {"*query"}, p.lora_rank = 4;
    if (i % 7 == 0) p.user_rules = {{"layers.1.*", Dim::sample, "tp", false, false}};
    if (i % 2 == 0) p.optimizer.kind = OptimizerKind::adam;
    const std::string text = to_yaml(p);
    std::ofstream(file) << text;
    EXPECT_EQ(to_yaml(load_plan(file)), text);
  }
}

TEST(PlanFile, OneKeyIsSetAsAFileSetsIt) {
  Plan p = base_plan();
  const auto say = [&](const char* key, const char* value) { set(p, key, value, "--set"); };
  p.tp = 2;
  say("tp", "x2");
  EXPECT_EQ(p.tp, 4);
  say("bucket", "25 MiB");
  say("bucket", "x2");
  EXPECT_EQ(p.bucket, 50_MiB);
  // Patterns need no quotes, here or in a list; a comma outside of brackets is the value's.
  say("freeze", "*");
  EXPECT_EQ(p.freeze, std::vector<std::string>{"*"});
  say("freeze", "[embedding*, *.query, '*.key']");
  EXPECT_EQ(p.freeze, (std::vector<std::string>{"embedding*", "*.query", "*.key"}));
  say("freeze", "none");
  EXPECT_EQ(p.freeze, std::vector<std::string>{});
  say("recompute", "*.core,*.activation");
  EXPECT_EQ(p.recompute.patterns, (std::vector<std::string>{"*.core", "*.activation"}));
  // Of adapters one of the two may change.
  say("lora", "{patterns: [*.query], rank: 4}");
  say("lora.rank", "8");
  EXPECT_EQ(p.lora, std::vector<std::string>{"*.query"});
  EXPECT_EQ(p.lora_rank, 8);
  say("lora.patterns", "*.key");
  EXPECT_EQ(p.lora, std::vector<std::string>{"*.key"});
  EXPECT_EQ(p.lora_rank, 8);
  say("lora", "none");
  EXPECT_TRUE(p.lora.empty());
  for (const auto& [key, why] :
       {std::pair{"zero_group", "x2 multiplies what is there, and the plan says no zero_group"},
        {"tq", "unknown key"},
        {"framework", "cannot be multiplied by 2"}}) {
    try {
      say(key, "x2");
      ADD_FAILURE() << key;
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  }
}

TEST(PlanFile, FormatsOfFp8ProductsAreTheFrameworksUnlessSaid) {
  const std::string file = ::testing::TempDir() + "partita_fp8_plan.yaml";
  const auto load = [&](const std::string& text) {
    std::ofstream(file) << text;
    return load_plan(file);
  };
  const auto read = [&](const std::string& body) {
    return load("schema: partita.plan/1\n" + body + "\ndp: 1\n");
  };
  EXPECT_EQ(read("framework: megatron-core").fp8_format, Fp8Format::hybrid);
  EXPECT_EQ(read("framework: pytorch-ddp").fp8_format, Fp8Format::e4m3);
  for (const char* framework : {"megatron-core", "pytorch-ddp"}) {
    for (const Fp8Format f : kFp8Formats) {
      const Plan p = read(std::string("framework: ") + framework +
                          "\nprecision: fp8\nfp8_format: " + std::string(name(f)));
      EXPECT_EQ(p.fp8_format, f);
      EXPECT_EQ(load(to_yaml(p)).fp8_format, f);
    }
  }
  try {
    read("fp8_format: e5m2");
    ADD_FAILURE();
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("plan.yaml:2: fp8_format: 'e5m2' is no format"),
              std::string::npos)
        << e.what();
  }
}

TEST(PlanPage, UnevenBlocks) {
  const auto counts = blocks_per_chunk(126, 16);
  EXPECT_EQ(counts.front(), 7);
  EXPECT_EQ(counts.back(), 7);
  for (std::size_t i = 1; i + 1 < counts.size(); ++i) EXPECT_EQ(counts[i], 8);
}

TEST(PlanPage, IllegalPlansNameOperatorAndChoices) {
  Plan p = base_plan();
  p.tp = 3;
  const auto plan = complete(gpt(), p);
  ASSERT_TRUE(static_cast<bool>(plan));
  const auto program = lower(gpt(), *plan);
  ASSERT_FALSE(static_cast<bool>(program));
  EXPECT_EQ(program.reason(),
            "tensor parallel 3 does not divide 4 heads of layers.0.attention.query; use 1, 2 or 4");
}

TEST(PlanPage, TheRolesExample) {
  Plan plan = base_plan();
  plan.tp = plan.pp = plan.dp = 2;
  plan.loader = true;
  const Program p = lowered(gpt(), plan);
  EXPECT_EQ(p.ranks(), 10);
  EXPECT_EQ(p.place_of(9), 2);
  EXPECT_EQ(p.rank_on_stage(9, 1), 6);
  // Tokens and positions to the first stage, labels to the last, each to one rank, who broadcasts.
  std::map<int, int> sends;
  for (const BlockCall& call : p.stages[2]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind == Kind::send) ++sends[i.stage];
    }
  }
  EXPECT_EQ(sends, (std::map<int, int>{{0, 1}, {1, 1}}));
  for (const BlockCall& call : p.stages[0]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind != Kind::receive || i.stage != 2) continue;
      EXPECT_TRUE(p.holds(i.writes[0], 2));
      EXPECT_FALSE(p.holds(i.writes[0], 3));
    }
  }
}

TEST(PoliciesPage, AServerUpdatesWithTheGradientOfTheStepBefore) {
  GraphBuilder b("one weight");
  const TensorId x = b.input("x", {{Dim::sample, 1}, {Dim::feature, 1}});
  Linear line;
  line.out = {{Dim::ffn, 1}};
  line.bias = false;
  const TensorId y = b.add("line", line, {x});
  const TensorId target = b.input("target", b.shape(y));
  const Graph g = b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 0, 0);
  Plan plan = base_plan();
  plan.dp = 2;
  plan.servers = 1;
  plan.staleness = 1;
  plan.optimizer.learning_rate = 0.25;
  plan.optimizer.momentum = 0;
  const Program p = lowered(g, plan);
  std::vector<double> weights;
  for (int steps = 1; steps <= 4; ++steps) {
    reference::RunOptions o;
    o.steps = steps;
    o.input = [](std::size_t input, std::int64_t, std::int64_t, std::int64_t) {
      return input == 0 ? 1.0 : 0.0;
    };
    reference::Piece one = reference::zeros({{0}, {0}});
    one.values = {1};
    o.parameters = {{one}};
    weights.push_back(reference::interpret(p, o).parameters[0][0][0]);
  }
  EXPECT_EQ(weights, (std::vector<double>{1, 0.5, 0, -0.25}));
}

std::int64_t traffic_of(const Program& p) {
  std::int64_t all = 0;
  for (const auto& [pair, bytes] : step_traffic(p, 0)) all += bytes;
  return all;
}

TEST(PoliciesPage, BytesOfServersAndStartUp) {
  const Graph g = load_model("mnist-linear");
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.dp = 3;
  EXPECT_EQ(traffic_of(lowered(g, plan)), 125'600);
  plan.servers = 1;
  EXPECT_EQ(traffic_of(lowered(g, plan)), 188'400);
  plan.servers = 2;
  EXPECT_EQ(traffic_of(lowered(g, plan)), 188'400);
  plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.dp = 4;
  const auto startup = [&](Startup form) {
    return traffic_of(startup_program(lowered(g, plan), form));
  };
  EXPECT_EQ(startup(Startup::each), 0);
  EXPECT_EQ(startup(Startup::broadcast), 94'200);
  EXPECT_EQ(startup(Startup::sharded_read), 94'200);
  plan.zero = 3;
  EXPECT_EQ(startup(Startup::broadcast), 94'200);
  EXPECT_EQ(startup(Startup::sharded_read), 0);
  plan.zero = 0;
  plan.dp = 1;
  plan.tp = 2;
  EXPECT_EQ(startup(Startup::broadcast), 31'400);
  EXPECT_EQ(startup(Startup::sharded_read), 0);
}

TEST(PoliciesPage, AnUpdateOnTheHost) {
  Communication network(load_topology("dgx-h100:1"));
  const Graph g = load_model("mnist-linear");
  Plan plan = base_plan();
  set_precision(plan, "bf16", "");
  plan.optimizer.kind = OptimizerKind::adam;
  plan.offload_optimizer = true;
  plan.optimizer.clip = 1;
  // A framework's own passes are its kernels' on the device, which the host has not; the norm and
  // the clipping in them are the device's all the same.
  for (const double passes : {0.0, 46.0}) {
    plan.kernels.optimizer_mixed = passes;
    const Program p = lowered(g, plan);
    int updates = 0;
    for (const Block& b : p.blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind != Kind::compute) continue;
        if (i.kernel == Kernel::square_sum || i.kernel == Kernel::clip) {
          EXPECT_GT(work_of(p, i, 0).bytes.count, 0) << name(i.kernel);
        }
        if (i.kernel != Kernel::optimizer) continue;
        ++updates;
        const auto n = static_cast<double>(local_elements(p, i.writes[0], 0));
        EXPECT_DOUBLE_EQ(network.host_time(p, i, 0).count, 30 * n / (614.4e9 / 8));
      }
    }
    EXPECT_EQ(updates, 2);
  }
}

// Norms and copies of whole gradients are the device's before they leave it: host memory of eight
// ranks would take tens of times as long.
TEST(PoliciesPage, PassesOverGradientsAreTheDevicesWhereTheHostUpdates) {
  const Topology t = load_topology("dgx-h100:2 gpus");
  const Graph g = load_model("mnist-linear");
  Plan plan = base_plan();
  set_precision(plan, "bf16", "");
  plan.optimizer.kind = OptimizerKind::adam;
  plan.dp = 2;
  plan.zero = 1;
  plan.kernels.gradient_passes = 1;
  plan.kernels.met_gradient_passes = 2;
  for (const bool host : {false, true}) {
    plan.offload_optimizer = host;
    const Program p = lowered(g, plan);
    for (const Block& b : p.blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind != Kind::compute || i.kernel != Kernel::optimizer) {
          EXPECT_EQ(gradient_passes(p, i, 0).count, 0);
          continue;
        }
        // Three passes over all of it, two ranks' shards.
        const auto n = local_elements(p, i.writes[0], 0);
        const Bytes passes = gradient_passes(p, i, 0);
        EXPECT_EQ(passes.count, 3 * 2 * n * bits(p.buffer(i.reads[0]).type) / 8);
        Program none = p;
        none.kernels.gradient_passes = none.kernels.met_gradient_passes = 0;
        EXPECT_EQ((work_of(p, i, 0).bytes - work_of(none, i, 0).bytes).count,
                  host ? 0 : passes.count);
      }
    }
  }
}

TEST(PoliciesPage, CopiesToTheHostAndReadsFromStorage) {
  const Topology t = load_topology("dgx-h100:1");
  Communication network(t);
  const Graph g = load_model("mnist-linear");
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.offload_optimizer = true;
  const Program p = lowered(g, plan);
  int copies = 0;
  for (const Block& b : p.blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kind != Kind::copy) continue;
      ++copies;
      // PCIe 5.0 x16, 0.25 us to the first switch, 0.5 us from there.
      const auto bytes = static_cast<double>(local_bytes(p, i.reads[0], 0).count);
      EXPECT_DOUBLE_EQ(network.host_time(p, i, 0).count,
                       t.device(DeviceId{0}).kernel_latency.count + 0.75e-6 + bytes / 63e9);
    }
  }
  EXPECT_EQ(copies, 4) << "two gradients out, two parameters back";
  // 8 GB/s a node, a GPU's share 1 GB/s.
  const Program read = startup_program(p, Startup::sharded_read);
  int reads = 0;
  for (const Block& b : read.blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kernel != Kernel::read || i.kind != Kind::compute) continue;
      ++reads;
      const auto bytes = static_cast<double>(local_bytes(read, i.writes[0], 0).count);
      EXPECT_DOUBLE_EQ(network.storage_time(read, i, 0).count, bytes / 1e9);
    }
  }
  EXPECT_EQ(reads, 4) << "weight and bias, and the host's copies";
}

TEST(PoliciesPage, WhatStagesSendCrossesTheNetworkTwiceThroughAQueue) {
  Plan plan = base_plan();
  plan.pp = 2;
  plan.global_batch = 4;
  const std::int64_t direct = traffic_of(lowered(llama(), plan));
  EXPECT_GT(direct, 0);
  plan.message_queue = true;
  EXPECT_EQ(traffic_of(lowered(llama(), plan)), 2 * direct);
}

TEST(PoliciesPage, PartsOfAProductInTurn) {
  Plan plan = base_plan();
  plan.tp = 2;
  plan.sequence_parallel = plan.overlap_tensor_parallel = true;
  const Program p = lowered(llama(), plan);
  // Eight tokens on two ranks: 0 to 3 and 4 to 7. Rank 0 multiplies its own part first, and makes
  // its own part of a sum last.
  std::map<std::string, std::vector<std::int64_t>> first_token;
  for (const Block& b : p.blocks) {
    if (b.kind != BlockKind::forward) continue;
    for (const Instruction& i : b.instructions) {
      if (i.part < 0 || i.op < 0) continue;
      first_token[p.operators[static_cast<std::size_t>(i.op)].name].push_back(
          part_positions(p, i, 0).front());
    }
  }
  EXPECT_EQ(first_token.at("layers.0.mlp.up"), (std::vector<std::int64_t>{0, 4}));
  EXPECT_EQ(first_token.at("layers.0.mlp.down"), (std::vector<std::int64_t>{4, 0}));
}

}  // namespace
}  // namespace partita
