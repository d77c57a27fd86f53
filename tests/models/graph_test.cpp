#include "models/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "models/models.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TransformerConfig random_config(std::mt19937_64& rng) {
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(high - low + 1));
  };
  TransformerConfig c;
  c.layers = static_cast<int>(pick(1, 4));
  c.kv_heads = pick(1, 3);
  c.heads = c.kv_heads * pick(1, 3);
  c.head_dim = 2 * pick(1, 4);
  c.hidden = pick(4, 30);
  c.ffn = pick(3, 40);
  c.vocabulary = pick(5, 60);
  c.sequence = pick(1, 12);
  c.norm = pick(0, 1) != 0 ? TransformerConfig::Norm::rms : TransformerConfig::Norm::layer;
  c.gated = pick(0, 1) != 0;
  c.qk_norm = pick(0, 1) != 0;
  c.sinks = pick(0, 1) != 0;
  c.qkv_bias = pick(0, 1) != 0;
  c.attention_output_bias = pick(0, 1) != 0;
  c.mlp_bias = pick(0, 1) != 0;
  c.tied = pick(0, 1) != 0;
  c.rotary_dim = pick(0, 1) != 0 ? c.head_dim : 0;
  c.positions = pick(0, 1) != 0 ? c.sequence : 0;
  c.dropout = pick(0, 1) != 0 ? 0.1 : 0;
  c.flash_attention = pick(0, 1) != 0;
  if (pick(0, 2) == 0) {
    c.moe.experts = pick(2, 5);
    c.moe.top_k = pick(1, 2);
    c.moe.ffn = pick(2, 10);
    c.moe.shared_ffn = pick(0, 1) * 6;
    c.moe.first_dense = static_cast<int>(pick(0, 2));
    c.moe.expert_bias = pick(0, 1) != 0;
    c.moe.router_bias = pick(0, 1) != 0;
  }
  if (pick(0, 3) == 0) {
    c.latent = {pick(0, 1) * 5, 6, 4, 2, 3};
    c.qk_norm = c.sinks = false;
    c.kv_heads = c.heads;
    c.rotary_dim = 0;
  }
  return c;
}

/// Parameters of the same configuration, counted by hand.
std::int64_t counted_by_hand(const TransformerConfig& c) {
  const std::int64_t h = c.hidden, norm = c.norm == TransformerConfig::Norm::layer ? 2 : 1;
  const auto b = [](bool wanted, std::int64_t n) { return wanted ? n : 0; };
  std::int64_t n = c.vocabulary * h * (c.tied ? 1 : 2) + c.positions * h + norm * h;
  for (int i = 0; i < c.layers; ++i) {
    n += 2 * norm * h;
    if (c.latent.key_value_rank > 0) {
      const auto& l = c.latent;
      const std::int64_t qk = l.nope_dim + l.rope_dim, r = l.query_rank;
      n += r > 0 ? h * r + b(c.qkv_bias, r) + norm * r + r * c.heads * qk : h * c.heads * qk;
      n += h * (l.key_value_rank + l.rope_dim) + b(c.qkv_bias, l.key_value_rank + l.rope_dim);
      n += norm * l.key_value_rank + l.key_value_rank * c.heads * (l.nope_dim + l.value_dim);
      n += c.heads * l.value_dim * h;
    } else {
      const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
      n += h * (q + 2 * kv) + b(c.qkv_bias, q + 2 * kv) + q * h;
      n += b(c.qk_norm, 2 * c.head_dim) + b(c.sinks, c.heads);
    }
    n += b(c.attention_output_bias, h);
    const std::int64_t ups = c.gated ? 2 : 1;
    const auto mlp = [&](std::int64_t f) { return (ups + 1) * h * f + b(c.mlp_bias, ups * f + h); };
    if (c.moe.experts > 0 && i >= c.moe.first_dense) {
      const std::int64_t e = c.moe.experts, f = c.moe.ffn;
      n += h * e + b(c.moe.router_bias, e) + e * (ups + 1) * h * f +
           b(c.moe.expert_bias, e * (ups * f + h));
      n += c.moe.shared_ffn > 0 ? mlp(c.moe.shared_ffn) : 0;
    } else {
      n += mlp(c.ffn);
    }
  }
  return n;
}

TEST(Graph, ParametersOfRandomTransformersAreThoseCountedByHand) {
  std::mt19937_64 rng{1};
  for (int i = 0; i < 500; ++i) {
    const TransformerConfig c = random_config(rng);
    EXPECT_EQ(parameter_count(build_transformer(c)), counted_by_hand(c)) << "case " << i;
  }
}

TEST(Graph, FreezingEverythingLeavesNoBackward) {
  std::mt19937_64 rng{2};
  for (int i = 0; i < 50; ++i) {
    Graph g = build_transformer(random_config(rng));
    const NetworkFlops before = network_flops(g);
    freeze(g, {"*"});
    const NetworkFlops after = network_flops(g);
    EXPECT_EQ(trainable_parameter_count(g), 0);
    EXPECT_EQ(after.forward, before.forward);
    EXPECT_EQ(after.backward_data.count, 0);
    EXPECT_EQ(after.backward_weight.count, 0);
  }
}

TEST(Graph, FreezingOnlyTheEmbeddingSavesItsOwnWeightGradient) {
  TransformerConfig c;
  c.layers = 2, c.hidden = 24, c.heads = 6, c.ffn = 32, c.vocabulary = 50, c.sequence = 8;
  Graph g = build_transformer(c);
  const NetworkFlops before = network_flops(g);
  freeze(g, {"embedding.*"});
  const NetworkFlops after = network_flops(g);
  EXPECT_EQ(trainable_parameter_count(g), parameter_count(g) - 50 * 24);
  // A row per token is added up: one addition for each of its features.
  EXPECT_EQ(before.backward_weight.count - after.backward_weight.count, 8 * 24);
  // Nothing below the first norm learns, so nothing needs its input's gradient: the norm (8 per
  // element, docs/operators.md) is the lowest with a backward by data, and it stays out.
  EXPECT_EQ(before.backward_data.count - after.backward_data.count, 8 * 8 * 24);
}

TEST(Graph, FreezingMoreNeverCostsMore) {
  std::mt19937_64 rng{3};
  for (int i = 0; i < 60; ++i) {
    Graph g = build_transformer(random_config(rng));
    const std::int64_t total = parameter_count(g);
    NetworkFlops last = network_flops(g);
    std::int64_t trainable = total;
    for (int step = 0; step < 5; ++step) {
      const auto& p = g.parameters[rng() % g.parameters.size()];
      const std::int64_t lost = p.trainable ? elements(p.shape) : 0;
      freeze(g, {p.name});
      const NetworkFlops now = network_flops(g);
      EXPECT_LE(now.backward_data, last.backward_data);
      EXPECT_LE(now.backward_weight, last.backward_weight);
      EXPECT_EQ(now.forward, last.forward);
      trainable -= lost;
      EXPECT_EQ(trainable_parameter_count(g), trainable);
      EXPECT_EQ(parameter_count(g), total);
      last = now;
    }
  }
}

TEST(Graph, BelowTheLowestTrainableOperatorThereIsNoBackward) {
  Graph g = load_model("gpt2", {});
  freeze(g, {"embedding.*", "position_embedding.*", "layers.?.*", "layers.10.*"});
  // The tied table is frozen with the embedding; block 11 and the final norm learn.
  const auto needed = needs_gradient(g);
  for (const auto& op : g.operators) {
    if (op.layer < 11) {
      for (const TensorId t : op.outputs) EXPECT_FALSE(needed[t.index()]) << op.name;
    } else if (op.name != "loss") {
      for (const TensorId t : op.outputs) EXPECT_TRUE(needed[t.index()]) << op.name;
    }
  }
}

TEST(Graph, LoraTrainsRankTimesInputPlusOutput) {
  std::mt19937_64 rng{4};
  for (int i = 0; i < 100; ++i) {
    Graph g = build_transformer(random_config(rng));
    const std::int64_t rank = 1 + static_cast<std::int64_t>(rng() % 5);
    const std::int64_t base = parameter_count(g);
    const NetworkFlops before = network_flops(g);
    std::int64_t expected = 0, tokens = g.sequence;
    double work = 0;
    for (std::size_t k = 0; k < g.operators.size(); ++k) {
      const Operator& op = g.operators[k];
      if (!std::holds_alternative<Linear>(op.operation) || !matches("layers.*", op.name)) continue;
      std::int64_t out = 1;
      for (const auto& d : std::get<Linear>(op.operation).out) out *= d.extent;
      const std::int64_t in = elements(g.parameter(op.parameters[0]).shape) / out;
      expected += rank * (in + out);
      // Both small products, and the addition of y.
      work += static_cast<double>(2 * tokens * rank * (in + out) + tokens * out);
    }
    add_lora(g, {"layers.*"}, rank);
    EXPECT_EQ(trainable_parameter_count(g), expected) << "case " << i;
    EXPECT_EQ(parameter_count(g), base + expected);
    const NetworkFlops after = network_flops(g);
    EXPECT_DOUBLE_EQ(after.forward.count, before.forward.count + work);
  }
}

TEST(Graph, LoraKeepsTheNetworkInTopologicalOrder) {
  Graph g = load_model("gpt2", {});
  add_lora(g, {"*attention.query", "*attention.value"}, 8);
  EXPECT_EQ(trainable_parameter_count(g), 12 * 2 * 8 * (768 + 768));
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    for (const TensorId t : g.operators[i].inputs) {
      if (g.tensor(t).producer.valid()) {
        EXPECT_LT(g.tensor(t).producer.index(), i);
      }
    }
    for (const TensorId t : g.operators[i].outputs) EXPECT_EQ(g.tensor(t).producer, OpId{i});
  }
}

TEST(Graph, PatternsThatMatchNothingAreErrors) {
  Graph g = load_model("gpt2", {});
  EXPECT_THAT(
      [&] { freeze(g, {"layer.*"}); },
      ThrowsMessage<InputError>(HasSubstr("pattern 'layer.*' matches no parameter of gpt2")));
  EXPECT_THAT([&] { add_lora(g, {"*.attention.core"}, 4); },
              ThrowsMessage<InputError>(HasSubstr("matches no linear operator of gpt2")));
  EXPECT_THAT([&] { add_lora(g, {"*"}, 0); }, ThrowsMessage<InputError>(HasSubstr("rank 0")));
}

TEST(Graph, PatternsMatchWholeNames) {
  EXPECT_TRUE(matches("*", ""));
  EXPECT_TRUE(matches("a*c", "abbc"));
  EXPECT_TRUE(matches("a*b*c", "axxbxxbc"));
  EXPECT_TRUE(matches("layers.?.*", "layers.3.mlp.up"));
  EXPECT_FALSE(matches("layers.?.*", "layers.13.mlp.up"));
  EXPECT_FALSE(matches("a", "ab"));
  EXPECT_FALSE(matches("ab", "a"));
  EXPECT_FALSE(matches("", "a"));
}

}  // namespace
}  // namespace partita
