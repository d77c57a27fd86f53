// tests/simulator/networks.h: networks small enough to run under the reference interpreter, and
// random plans for them.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "models/models.h"
#include "simulator/lower/lower.h"
#include "simulator/plan/plan.h"

namespace partita {

inline Plan base_plan() {
  Plan p;
  set_framework(p, "partita", "");
  p.optimizer.kind = OptimizerKind::sgd;
  p.bucket = Bytes{256};  // small enough that there are several
  return p;
}

inline TransformerConfig small_config() {
  TransformerConfig c;
  c.name = "small";
  c.layers = 4;
  c.hidden = 8;
  c.heads = 4;
  c.kv_heads = 4;
  c.ffn = 16;
  c.vocabulary = 12;
  c.sequence = 8;
  c.norm = TransformerConfig::Norm::layer;
  c.positions = 8;
  c.activation = ActivationKind::gelu;
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.tied = true;
  c.initial_deviation = 0.3;
  return c;
}
inline Graph gpt() { return build_transformer(small_config()); }
inline Graph llama() {
  TransformerConfig c = small_config();
  c.kv_heads = 2;
  c.norm = TransformerConfig::Norm::rms;
  c.positions = 0;
  c.rotary_dim = 2;
  c.activation = ActivationKind::silu;
  c.gated = true;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = false;
  c.tied = false;
  return build_transformer(c);
}
inline TransformerConfig mixtral_config(int kv_heads = 2) {
  TransformerConfig c = small_config();
  c.layers = 2;
  c.kv_heads = kv_heads;
  c.norm = TransformerConfig::Norm::rms;
  c.positions = 0;
  c.rotary_dim = 2;
  c.gated = true;
  c.activation = ActivationKind::silu;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = false;
  c.tied = false;
  c.moe.experts = 4;
  c.moe.top_k = 2;
  c.moe.ffn = 8;
  return c;
}
inline Graph mixtral(int kv_heads = 2) { return build_transformer(mixtral_config(kv_heads)); }
inline TransformerConfig hybrid_config() {
  TransformerConfig c = mixtral_config();
  c.layers = 4;
  c.pattern = "M*-E";
  c.rotary_dim = 0;
  c.gated = false;
  c.activation = ActivationKind::squared_relu;
  c.mamba.heads = 4;
  c.mamba.head_dim = 3;
  c.mamba.groups = 2;
  c.mamba.state = 3;
  c.mamba.chunk = 4;
  c.mamba.kernel = 3;
  return c;
}
inline Graph hybrid() { return build_transformer(hybrid_config()); }
inline Graph cnn(bool synchronised) {
  GraphBuilder b("cnn");
  TensorId x =
      b.input("image", {{Dim::sample, 1}, {Dim::feature, 3}, {Dim::height, 9}, {Dim::width, 8}});
  const TensorId labels = b.input("labels", {{Dim::sample, 1}});
  const auto conv = [&](const char* name, std::int64_t out, Window w) {
    Convolution c;
    c.out = out;
    c.height = c.width = w;
    return b.add(name, c, {x});
  };
  x = conv("conv1", 4, {3, 1, 1, 1, 1});
  Normalize n;
  n.kind = Normalize::Kind::batch;
  n.synchronised = synchronised;
  x = b.add("norm1", n, {x});
  x = b.add("relu1", Activation{ActivationKind::relu}, {x});
  const TensorId skip = x;
  x = conv("conv2", 4, {3, 1, 1, 1, 1});
  Linear excite;
  excite.bias = true;
  excite.out = {{Dim::ffn, 2}};
  TensorId gate = b.add("squeeze", GlobalAveragePool{}, {x});
  gate = b.add("excite1", excite, {gate});
  gate = b.add("relu2", Activation{ActivationKind::relu}, {gate});
  excite.out = {{Dim::feature, 4}};
  gate = b.add("excite2", excite, {gate});
  gate = b.add("sigmoid", Activation{ActivationKind::sigmoid}, {gate});
  x = b.add("excite", ScaleFeatures{}, {x, gate});
  x = b.add("residual", Add{}, {x, skip});
  x = conv("conv3", 6, {3, 2, 1, 1, 1});
  Pool p;
  p.maximum = true;
  p.height = p.width = {2, 2, 0, 0, 1};
  x = b.add("pool", p, {x});
  x = b.add("average", GlobalAveragePool{}, {x});
  Linear head;
  head.out = {{Dim::vocabulary, 5}};
  x = b.add("head", head, {x});
  x = b.add("loss", CrossEntropy{}, {x, labels});
  return b.finish(x, 0, 0);
}

/// A transformer drawn from every option: few of them are like any published one.
inline Graph random_transformer(std::mt19937& rng) {
  const auto pick = [&](std::vector<int> from) { return from[rng() % from.size()]; };
  const auto chance = [&] { return rng() % 2 == 0; };
  TransformerConfig c = small_config();
  c.layers = pick({2, 3, 4});
  c.kv_heads = pick({1, 2, 4});
  c.norm = chance() ? TransformerConfig::Norm::rms : TransformerConfig::Norm::layer;
  c.gated = chance();
  c.activation = c.gated ? ActivationKind::silu : ActivationKind::gelu_tanh;
  c.positions = chance() ? c.sequence : 0;
  c.rotary_dim = c.positions > 0 ? 0 : 2;
  c.qkv_bias = chance(), c.attention_output_bias = chance(), c.mlp_bias = chance();
  c.tied = chance();
  c.qk_norm = pick({0, 0, 1}) == 1;
  c.sinks = pick({0, 0, 1}) == 1;
  c.window = pick({0, 0, 3});
  c.mtp_layers = pick({0, 0, 1});
  c.flash_attention = pick({0, 1, 1}) == 1;
  c.dropout = pick({0, 0, 1}) == 1 ? 0.25 : 0;
  c.norm_bias = chance();
  c.residual = static_cast<Residual>(pick({0, 0, 1, 2}));
  c.head_bias = c.mtp_layers == 0 && chance();
  if (pick({0, 0, 1}) == 1) {
    c.moe.experts = 4;
    c.moe.top_k = pick({1, 2});
    c.moe.ffn = 8;
    c.moe.shared_ffn = pick({0, 8});
    c.moe.first_dense = pick({0, 1});
    c.moe.sigmoid = chance();
    c.moe.latent = pick({0, 0, 4});
  }
  if (pick({0, 0, 0, 1}) == 1) {
    c.residual = Residual::sequential;
    c.head_bias = false;
    for (int i = 0; i < c.layers; ++i) c.pattern += "MMM*-E"[rng() % (c.moe.experts > 0 ? 6 : 5)];
    c.mamba.heads = 4;
    c.mamba.groups = pick({1, 2, 4});
    c.mamba.head_dim = pick({2, 3});  // a norm of one value would be its sign
    c.mamba.state = pick({1, 3});
    c.mamba.chunk = pick({1, 3, 8, 16});
    c.mamba.kernel = pick({1, 4});
    c.mamba.convolution_bias = chance();
    c.mtp_pattern = "M-";
    c.mtp_layers = pick({0, 0, 2});
    c.mtp_shared = chance();
  }
  Graph g = build_transformer(c);
  g.name = fmt::format(
      "layers {} kv {} norm {} gated {} positions {} biases {}{}{} tied {} qk_norm {} sinks {} "
      "window "
      "{} mtp {} flash {} dropout {} experts {} top {} shared {} dense {} sigmoid {} latent {} "
      "pattern '{}' groups {} mtp_shared {} norm_bias {} residual {} head_bias {}",
      c.layers, c.kv_heads, static_cast<int>(c.norm), c.gated, c.positions, c.qkv_bias,
      c.attention_output_bias, c.mlp_bias, c.tied, c.qk_norm, c.sinks, c.window, c.mtp_layers,
      c.flash_attention, c.dropout, c.moe.experts, c.moe.top_k, c.moe.shared_ffn, c.moe.first_dense,
      c.moe.sigmoid, c.moe.latent, c.pattern, c.mamba.groups, c.mtp_shared, c.norm_bias,
      static_cast<int>(c.residual), c.head_bias);
  return g;
}

/// A plan drawn from every axis and policy; often infeasible.
inline Plan random_plan(std::mt19937& rng) {
  const auto pick = [&](std::vector<int> from) { return from[rng() % from.size()]; };
  Plan p = base_plan();
  p.tp = pick({1, 1, 2, 4});
  p.pp = pick({1, 1, 2, 4});
  p.cp = pick({1, 1, 2});
  p.dp = pick({1, 2, 3});
  p.ep = pick({1, 1, 2, 4});
  p.etp = std::min(pick({0, 1, 2}), static_cast<int>(p.tp));
  p.virtual_stages = pick({1, 1, 2});
  p.micro_batch = pick({1, 2});
  p.global_batch = p.micro_batch * p.dp * pick({1, 2, 4});
  p.sequence_parallel = pick({0, 1}) == 1;
  p.save_gathered = pick({0, 1}) == 1;
  p.regathers_recomputed = pick({0, 1}) == 1;
  p.reduces_units = pick({0, 1}) == 1;
  p.overlap_gradients = pick({0, 1}) == 1;
  p.zero = pick({0, 1, 2, 3});
  p.context = static_cast<Plan::ContextExchange>(pick({0, 1, 2}));
  p.schedule = static_cast<Schedule>(pick({0, 1, 2, 4, 0, 1, 2, 4, 5}));
  p.schedule_given = p.virtual_stages == 1;
  p.loader = pick({0, 0, 1}) == 1;
  p.optimizer.clip = pick({0, 0, 1}) == 1 ? 0.125 : 0;
  if (pick({0, 0, 1}) == 1) {
    p.compression.kind = static_cast<CompressionKind>(pick({1, 2, 3, 4}));
    p.compression.ratio = 0.1;
    p.compression.error_feedback = pick({0, 1}) == 1;
    p.zero = 0;
  }
  if (pick({0, 0, 1}) == 1)
    p.loss_scale = {256, p.compression.kind == CompressionKind::none && pick({0, 1}) == 1, 1};
  if (pick({0, 0, 0, 0, 0, 1}) == 1) {
    p.servers = pick({1, 2});
    p.staleness = pick({0, 1, 2});
    p.zero = 0;
    p.cp = p.ep = 1;
    p.optimizer.clip = 0;
    p.loss_scale = {};
    p.compression = {};
  }
  p.offload_optimizer = pick({0, 0, 0, 0, 1}) == 1 && p.servers == 0;
  p.offload_activations = pick({0, 0, 0, 0, 1}) == 1;
  p.overlap_tensor_parallel = pick({0, 1}) == 1 && p.sequence_parallel && p.tp > 1;
  p.tensor_parallel_in_turn = pick({0, 0, 1}) == 1 && !p.overlap_tensor_parallel && p.tp > 1;
  p.sharded_storage = pick({0, 0, 1}) == 1;
  p.message_queue = pick({0, 0, 0, 0, 1}) == 1 && p.pp > 1;
  const std::vector<const char*> sets{"none", "none", "full", "selective", "first:1", "*.mlp.*"};
  p.recompute = parse_recompute(sets[rng() % sets.size()], "");
  p.recompute_stops_early = pick({0, 1}) == 1;
  p.joins_projections = pick({0, 1}) == 1;
  p.sums_copies_last = p.joins_projections && p.recompute_stops_early;
  p.allocations.copies_gathered = p.reduces_units && p.save_gathered;
  p.allocations.clears_gradients = p.save_gathered;
  p.stays_gathered =
      p.joins_projections
          ? StaysGathered{p.recompute_stops_early ? StaysGathered::last : StaysGathered::root, 0}
          : StaysGathered{StaysGathered::near, p.recompute_stops_early ? 600 : 0};
  return p;
}

/// Of a third of all plans a host that takes its time.
inline Plan with_launches(Plan p, std::mt19937& rng) {
  const auto pick = [&](std::vector<double> from) { return from[rng() % from.size()]; };
  if (rng() % 3 > 0) return p;
  p.launches.kernel = Seconds{pick({1e-6, 5e-6, 20e-6})};
  p.launches.transfer = Seconds{pick({0, 3e-6, 30e-6})};
  // Drawn with the others, so that what follows in a test is drawn as before.
  if (p.launches.kernel.count > 3e-6)
    p.launches.product = 3 * p.launches.kernel, p.launches.loop = 0.5 * p.launches.kernel;
  p.launches.graphs = rng() % 3 == 0;
  p.launches.waits_for_counts = rng() % 2 == 0;
  p.launches.blocking = rng() % 4 == 0;
  p.launches.waits_for_messages = !p.launches.graphs;
  p.send_wait = p.launches.waits_for_counts ? SendWait::always : SendWait::never;
  return p;
}

/// The program of a plan that must be feasible.
inline Program lowered(const Graph& graph, const Plan& wanted) {
  auto plan = complete(graph, wanted);
  if (!plan) throw InternalError(plan.reason());
  auto program = lower(graph, *plan);
  if (!program) throw InternalError(program.reason());
  return std::move(*program);
}

}  // namespace partita
