// What policies are for, by hand on tiny programs (docs/policies.md): transfers that staleness
// hides, parts of a product that travel while others are multiplied, activations that come back in
// time, gradients that fp16 would lose.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "runtime/reference/interpreter.h"
#include "runtime/reference/serial.h"
#include "simulator/engine/simulate.h"
#include "tests/simulator/clusters.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

/// GPUs older than NCCL that multiply at 1 GFLOP/s, do everything else at once and meet over links
/// of `bandwidth` and no latency; so fast is the link to the host too.
Topology linked(int devices, const std::string& bandwidth) {
  const std::string most = "1000000000000 EFLOP/s", memory = "1000000000000000 TB/s";
  return cluster(fmt::format(R"(schema: partita.topology/1
name: linked
source: made up
nodes:
  - host_memory_bandwidth: {2}
    host_source: made up
    vertices:
      gpu[0-{0}]: {{kind: device, device: here.yaml}}
      switch0: {{kind: nvswitch}}
      cpu0: {{kind: cpu}}
    links:
      - {{from: "gpu[0-{0}]", to: switch0, kind: nvlink, bandwidth: {1}, latency: 0 ps}}
      - {{from: "gpu[0-{0}]", to: cpu0, kind: pcie, bandwidth: {1}, latency: 0 ps}}
)",
                             devices - 1, bandwidth, memory),
                 {"1 GFLOP/s", most, memory, "0 ps", 10});
}
struct Rate {
  std::string text;
  double bytes_per_ps;
};
const std::vector<Rate> kRates{{"100 GB/s", 0.1}, {"1 GB/s", 1e-3}, {"100 MB/s", 1e-4}};

/// `layers` products of 4 tokens by 8 x 8: 2 · 4 · 8 · 8 FLOP, 512 ns each. The first needs no
/// gradient of its input.
constexpr std::int64_t kProduct = 512'000;  // ps
Graph chain(int layers) {
  GraphBuilder b("chain");
  TensorId x = b.input("x", {{Dim::sample, 1}, {Dim::sequence, 4}, {Dim::feature, 8}});
  const TensorId target = b.input("target", b.shape(x));
  for (int l = 0; l < layers; ++l) {
    b.set_layer(l);
    x = b.add(fmt::format("line{}", l), Linear{1, {{Dim::feature, 8}}, false}, {x});
  }
  b.set_layer(layers);
  return b.finish(b.add("loss", MeanSquaredError{}, {x, target}), layers, 4);
}
Plan single_precision() {
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.bucket = 25_MiB;
  return plan;
}
/// What else happens takes at most a picosecond an instruction, and times round up.
void expect_ticks(std::int64_t got, std::int64_t by_hand, const Timeline& t) {
  EXPECT_GE(got, by_hand - t.instructions);
  EXPECT_LE(got, by_hand + 2 * t.instructions);
}

TEST(Policies, StalenessHidesWhatAServerHandsOut) {
  // One product forward, one for the weight's gradient: C = 2 · 512 ns. 256 B of weight take T on
  // the server's link, n workers push in turn: C + nT. With staleness 0 the server then hands out
  // as much, C + 2nT; with 1 it has done so while the workers multiplied, as long as they take
  // longer, nT <= C.
  for (const std::int64_t workers : {2, 3}) {
    for (const Rate& rate : kRates) {
      SCOPED_TRACE(::testing::Message() << workers << " workers, " << rate.text);
      std::map<int, std::int64_t> steps;
      const auto transfer = static_cast<std::int64_t>(256 / rate.bytes_per_ps);
      for (const int staleness : {0, 1}) {
        Plan plan = single_precision();
        plan.dp = workers;
        plan.servers = 1;
        plan.staleness = staleness;
        Communication network(linked(static_cast<int>(workers) + 1, rate.text));
        const Timeline t = simulate(lowered(chain(1), plan), network);
        steps[staleness] = t.step.count;
        const std::int64_t work = 2 * kProduct;
        if (staleness == 0) {
          expect_ticks(t.step.count, work + 2 * workers * transfer, t);
        } else if (workers * transfer <= work) {
          expect_ticks(t.step.count, work + workers * transfer, t);
        }
      }
      EXPECT_LT(steps[1], steps[0]);
    }
  }
}

/// Entries of `name`'s forward parts on the first class, in order; the next operator's start.
struct Parts {
  std::vector<Entry> compute;
  std::int64_t next = 0;
};
Parts parts_of(const Program& p, const Timeline& t, const std::string& name,
               const std::string& next) {
  Parts parts;
  for (const Entry& e : t.entries) {
    const Block& b = p.blocks[static_cast<std::size_t>(e.block)];
    const Instruction& i = b.instructions[static_cast<std::size_t>(e.instruction)];
    if (e.rank_class != 0 || b.kind != BlockKind::forward || i.kind != Kind::compute || i.op < 0)
      continue;
    const std::string& op = p.operators[static_cast<std::size_t>(i.op)].name;
    if (op == name) parts.compute.push_back(e);
    if (op == next) parts.next = e.start.count;
  }
  std::sort(parts.compute.begin(), parts.compute.end(),
            [](const Entry& a, const Entry& b) { return a.start.count < b.start.count; });
  return parts;
}

/// Every rank's entries of a plan over as many devices as it has ranks of tp.
Timeline recorded(const Program& p, std::int64_t devices, const std::string& rate) {
  Communication network(linked(static_cast<int>(devices), rate));
  SimulateOptions options;
  options.record = true;
  return simulate(p, network, options);
}

TEST(Policies, PartsOfAProductTravelWhileOthersAreMultiplied) {
  // n parts of P each, n - 1 transfers of T between them: the first or the last product stands
  // alone, beside each of the others a transfer goes on, P + (n - 1) max(P, T). One after the other
  // gather and product take (n - 1) T + n P.
  TransformerConfig c = small_config();
  c.layers = 1;
  const Graph g = build_transformer(c);
  for (const std::int64_t n : {2, 4}) {
    for (const Rate& rate : kRates) {
      SCOPED_TRACE(::testing::Message() << n << " parts, " << rate.text);
      // 8 / n tokens by 8 x 16 / n; the tokens' 8 values in fp32.
      const std::int64_t product = 2 * (8 / n) * 8 * (16 / n) * 1000,
                         transfer = static_cast<std::int64_t>(8.0 / static_cast<double>(n) * 8 * 4 /
                                                              rate.bytes_per_ps);
      std::map<bool, std::int64_t> up, down;
      for (const bool overlapped : {false, true}) {
        Plan plan = single_precision();
        plan.tp = n;
        plan.sequence_parallel = true;
        plan.overlap_tensor_parallel = overlapped;
        const Program p = lowered(g, plan);
        const Timeline t = recorded(p, n, rate.text);
        // The gathered product, from the norm before it to the activation after it; the scattered
        // one, to its bias.
        const Parts norm = parts_of(p, t, "layers.0.mlp_norm", "");
        const Parts first = parts_of(p, t, "layers.0.mlp.up", "layers.0.mlp.activation");
        const Parts second = parts_of(p, t, "layers.0.mlp.down", "layers.0.mlp.down_bias");
        ASSERT_EQ(first.compute.size(), static_cast<std::size_t>(overlapped ? n : 1));
        ASSERT_EQ(second.compute.size(), static_cast<std::size_t>(overlapped ? n : 1));
        up[overlapped] = first.next - norm.compute.back().end.count;
        down[overlapped] = second.next - second.compute.front().start.count;
        const std::int64_t by_hand = overlapped ? product + (n - 1) * std::max(product, transfer)
                                                : (n - 1) * transfer + n * product;
        expect_ticks(up[overlapped], by_hand, t);
        expect_ticks(down[overlapped], by_hand, t);
      }
      EXPECT_LT(up[true], up[false]);
      EXPECT_LT(down[true], down[false]);
    }
  }
}

TEST(Policies, InTurnNoTransferOverTpRunsBesideAKernel) {
  // docs/policies.md: backward of a column-cut product takes 2 P + 2 T instead of twice the longer.
  TransformerConfig c = small_config();
  c.layers = 1;
  const Graph g = build_transformer(c);
  for (const Rate& rate : kRates) {
    SCOPED_TRACE(rate.text);
    const std::int64_t n = 2, product = 2 * (8 * 8 * 16 / n) * 1000,
                       transfer = static_cast<std::int64_t>(4.0 * 8 * 4 / rate.bytes_per_ps);
    std::map<bool, std::int64_t> beside, backward;
    for (const bool in_turn : {false, true}) {
      Plan plan = single_precision();
      plan.tp = n;
      plan.sequence_parallel = true;
      plan.tensor_parallel_in_turn = in_turn;
      const Program p = lowered(g, plan);
      const Timeline t = recorded(p, n, rate.text);
      std::vector<Entry> kernels, transfers;
      std::int64_t from = 0, to = 0;
      for (const Entry& e : t.entries) {
        const Block& b = p.blocks[static_cast<std::size_t>(e.block)];
        const Instruction& i = b.instructions[static_cast<std::size_t>(e.instruction)];
        if (e.rank_class != 0 || b.kind != BlockKind::backward) continue;
        if (i.kind == Kind::collective) transfers.push_back(e);
        if (i.kind != Kind::compute) continue;
        kernels.push_back(e);
        const auto of = [&](const char* name) {
          return i.op >= 0 && p.operators[static_cast<std::size_t>(i.op)].name == name &&
                 i.kernel == Kernel::backward_data;
        };
        if (of("layers.0.mlp.up")) from = e.start.count;
        if (of("layers.0.mlp_norm")) to = e.start.count;
      }
      ASSERT_FALSE(transfers.empty());
      for (const Entry& x : transfers) {
        for (const Entry& k : kernels)
          beside[in_turn] += std::max<std::int64_t>(
              0, std::min(x.end.count, k.end.count) - std::max(x.start.count, k.start.count));
      }
      backward[in_turn] = to - from;
      if (in_turn) {
        EXPECT_LE(beside[true], t.instructions);
        expect_ticks(backward[true], 2 * product + 2 * transfer, t);
      }
    }
    EXPECT_GT(beside[false], std::min(product, transfer));
    EXPECT_LE(backward[false], backward[true] - std::min(product, transfer) + 100);
  }
}

TEST(Policies, OffloadedActivationsComeBackInTimeOnAFastLinkAndStallOnASlowOne) {
  // Three products of P forward, five backward; what each leaves is 128 B, T on the link, which has
  // one direction out and one back. Out go x, line0, line1, line2, target, back come line2, target,
  // line1, line0, x, each after it is out.
  //
  // T <= P: at the end of the forward, 3P, line1, line2 and target are still to go, line2 is back
  // at 3P + 3T, target at 3P + 4T. From then on each layer's come back while the one behind it
  // multiplies: 8P + 4T. T > P: the first out starts at P, the fourth ends at P + 4T, and five come
  // back one after the other; the last product waits for the last of them: 2P + 9T.
  for (const Rate& rate : {kRates[0], kRates[1], kRates[2], Rate{"50 MB/s", 5e-5}}) {
    SCOPED_TRACE(rate.text);
    Plan plan = single_precision();
    Communication network(linked(1, rate.text));
    const Timeline stays = simulate(lowered(chain(3), plan), network);
    expect_ticks(stays.step.count, 8 * kProduct, stays);
    plan.offload_activations = true;
    const Timeline t = simulate(lowered(chain(3), plan), network);
    const auto transfer = static_cast<std::int64_t>(128 / rate.bytes_per_ps);
    expect_ticks(t.step.count,
                 transfer <= kProduct ? 8 * kProduct + 4 * transfer : 2 * kProduct + 9 * transfer,
                 t);
  }
}

TEST(Policies, DevicesBehindOneSwitchShareItsLinkToTheHost) {
  // As above with T > P, 2 P + 9 T, on two devices that copy alike; each has a link of its own to a
  // switch, that one to the processor: as wide as theirs T doubles, twice as wide it does not.
  for (const auto& [uplink, slower] : {std::pair{"100 MB/s", 2}, {"200 MB/s", 1}}) {
    Plan plan = single_precision();
    plan.strategy = "replicas";
    plan.dp = 2;
    plan.offload_activations = true;
    const std::string most = "1000000000000 EFLOP/s", memory = "1000000000000000 TB/s";
    Communication network(cluster(fmt::format(R"(schema: partita.topology/1
name: linked
source: made up
nodes:
  - host_memory_bandwidth: {1}
    host_source: made up
    vertices:
      gpu[0-1]: {{kind: device, device: here.yaml}}
      switch0: {{kind: nvswitch}}
      pcie0: {{kind: pcie switch}}
      cpu0: {{kind: cpu}}
    links:
      - {{from: "gpu[0-1]", to: switch0, kind: nvlink, bandwidth: {1}, latency: 0 ps}}
      - {{from: "gpu[0-1]", to: pcie0, kind: pcie, bandwidth: 100 MB/s, latency: 0 ps}}
      - {{from: pcie0, to: cpu0, kind: pcie, bandwidth: {0}, latency: 0 ps}}
)",
                                              uplink, memory),
                                  {"1 GFLOP/s", most, memory, "0 ps", 10}));
    SimulateOptions sharing;
    sharing.network = Network::flows;
    const Timeline t = simulate(lowered(chain(3), plan), network, sharing);
    const std::int64_t transfer = 128 * 10'000 * slower;
    ASSERT_GT(transfer, kProduct);
    expect_ticks(t.step.count, 2 * kProduct + 9 * transfer, t);
  }
}

TEST(Policies, ActivationsOfTheFirstBlocksAloneAreOffloaded) {
  const auto on_host = [](std::int64_t blocks) {
    Plan plan = base_plan();
    plan.offload_activations = true;
    plan.offload_blocks = blocks;
    std::set<std::string> owners;
    const Program p = lowered(llama(), plan);
    for (const Buffer& b : p.buffers) {
      if (!b.host || b.name.rfind("layers.", 0) != 0) continue;
      owners.insert(b.name.substr(0, b.name.find('.', 7)));
    }
    return owners;
  };
  EXPECT_EQ(on_host(0).size(), 4u);
  EXPECT_EQ(on_host(4), on_host(0));
  EXPECT_EQ(on_host(1), (std::set<std::string>{"layers.0"}));
  EXPECT_EQ(on_host(3), (std::set<std::string>{"layers.0", "layers.1", "layers.2"}));
}

TEST(Policies, AFixedLossScaleKeepsGradientsThatFp16WouldLose) {
  // h = w1 x = 2^10, y = w2 h = 2^-4, target y - 2^-14: dy = 2 · 2^-14 = 2^-13 and dh = w2 dy =
  // 2^-27, less than half of fp16's smallest number, 2^-24. Scaled by 2^10 it is 2^-17. With
  // dw1 = dh x = 2^-17 and a learning rate of 2^10, w1 goes from 1 to 1 - 2^-7; without a scale it
  // stays. Every number is a power of two: equal to the last bit.
  GraphBuilder b("two weights");
  const TensorId x = b.input("x", {{Dim::sample, 1}, {Dim::feature, 1}});
  const Linear line{1, {{Dim::feature, 1}}, false};
  const TensorId y = b.add("second", line, {b.add("first", line, {x})});
  const TensorId target = b.input("target", b.shape(y));
  const Graph g = b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 0, 0);
  std::map<double, double> first, gradient;
  for (const double scale : {0.0, 0x1p10}) {
    Plan plan = base_plan();
    set_precision(plan, "fp16", "");
    plan.optimizer.learning_rate = 0x1p10;
    plan.optimizer.momentum = 0;
    plan.loss_scale = {scale, false, 2000};
    const Program p = lowered(g, plan);
    reference::RunOptions o;
    o.round = true;
    o.input = [](std::size_t input, std::int64_t, std::int64_t, std::int64_t) {
      return input == 0 ? 0x1p10 : 0x1p-4 - 0x1p-14;
    };
    reference::Piece w = reference::zeros({{0}, {0}});
    w.values = {1};
    o.parameters = {{w, w}};
    o.parameters[0][1].values = {0x1p-14};
    const auto run = reference::interpret(p, o);
    first[scale] = run.parameters[0][0][0];
    gradient[scale] = run.gradients[0][0][0];
    // The second weight's gradient, dy h = 2^-3, is large enough either way.
    EXPECT_EQ(run.gradients[0][1][0], 0x1p-3);
  }
  EXPECT_EQ(gradient[0], 0);
  EXPECT_EQ(first[0], 1);
  EXPECT_EQ(gradient[0x1p10], 0x1p-17);
  EXPECT_EQ(first[0x1p10], 1 - 0x1p-7);
}

/// Streams of collectives by what they carry: gradients and parameters, or not.
std::map<bool, std::set<std::string>> streams_of(const Program& p) {
  std::map<bool, std::set<std::string>> all;
  for (const Block& b : p.blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kind != Kind::collective || p.group(i, 0).size() < 2) continue;
      const Buffer& carried = p.buffer(i.reads[0]);
      const bool state =
          carried.category == Category::gradients || carried.category == Category::parameters;
      all[state].insert(p.streams[i.stream]);
    }
  }
  return all;
}

// Groups of the same ranks are communicators of their own for each purpose (Megatron-Core,
// parallel_state.py): a bucket of gradients must not wait for, or hold up, keys and values.
TEST(Policies, GradientsAndActivationsDoNotWaitForEachOther) {
  Plan p = base_plan();
  p.global_batch = 4;
  p.cp = 2;
  for (const std::int64_t dp : {1, 2}) {
    p.dp = dp;
    const auto streams = streams_of(lowered(llama(), p));
    ASSERT_FALSE(streams.at(false).empty());
    for (const std::string& s : streams.at(true)) EXPECT_EQ(streams.at(false).count(s), 0U) << s;
  }
  // Experts over all ranks of data parallelism.
  p.cp = 1;
  p.ep = 2;
  const auto experts = streams_of(lowered(mixtral(), p));
  for (const std::string& s : experts.at(true)) EXPECT_EQ(experts.at(false).count(s), 0U) << s;
  // Norms' gradients are summed by tensor parallelism's own communicator.
  p.ep = p.dp = 1;
  p.tp = 2;
  p.sequence_parallel = true;
  const auto tensor = streams_of(lowered(llama(), p));
  EXPECT_EQ(tensor.at(true), tensor.at(false));
}

TEST(Plans, WhatWouldBeDoneSeveralTimesIsRefused) {
  Plan p = base_plan();
  p.strategy = "spatial";
  p.tp = 2;
  EXPECT_EQ(
      complete(gpt(), p).reason(),
      "strategy spatial cuts images over tp; small has none; use tp 1 or another strategy, like "
      "megatron");
  p.tp = 1;
  EXPECT_TRUE(complete(gpt(), p));
  Plan q = base_plan();
  q.pp = q.dp = 2, q.zero = 3, q.reshard_after_forward = false;
  q.micro_batch = 1, q.global_batch = 4;
  EXPECT_EQ(
      complete(gpt(), q).reason(),
      "beside a pipeline what ZeRO-3 leaves gathered would be there once for each micro-batch "
      "in flight; use zero 1, which has parameters whole once, or reshard_after_forward true");
  q.global_batch = 2;
  EXPECT_TRUE(complete(gpt(), q));
}

TEST(Plans, NoRingThatNobodyAskedForPassesKeysOfAWindow) {
  TransformerConfig c = small_config();
  c.window = 4;
  const Graph g = build_transformer(c);
  Plan p = base_plan();
  p.cp = 2;
  p.context = Plan::ContextExchange::ring;
  EXPECT_EQ(complete(g, p)->context, Plan::ContextExchange::all_gather);
  p.context_given = true;
  EXPECT_EQ(complete(g, p)->context, Plan::ContextExchange::ring);
  p.context_given = false;
  EXPECT_EQ(complete(build_transformer(small_config()), p)->context, Plan::ContextExchange::ring);
}

}  // namespace
}  // namespace partita
