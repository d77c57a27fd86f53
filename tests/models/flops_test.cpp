// FLOPs against the closed forms of the literature. Those count products only, a
// multiply-accumulate as 2 (torchvision's tables as 1), and attention as the whole square.
#include <gtest/gtest.h>

#include <cstdint>

#include "models/models.h"

namespace partita {
namespace {

struct Products {
  double forward = 0, backward_data = 0, backward_weight = 0;
};

/// Sums over the operators whose layer `counts`, of one sample; everything trainable.
template <class Counts>
Products products(const Graph& g, Counts counts) {
  Products sum;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Operator& op = g.operators[i];
    if (!is_product(op.operation) || !counts(op.layer)) continue;
    const Signature s = signature(g, OpId{i}, 1);
    std::vector<std::int64_t> extents;
    for (const auto& d : s.dims) extents.push_back(d.extent);
    sum.forward += flops(op.operation, s, extents, Pass::forward).count;
    sum.backward_data += flops(op.operation, s, extents, Pass::backward_data).count;
    sum.backward_weight += flops(op.operation, s, extents, Pass::backward_weight).count;
  }
  return sum;
}
Products products(const Graph& g) {
  return products(g, [](int) { return true; });
}

TEST(NetworkFlops, OfGptAreThoseOfNarayananEquation3) {
  // SC'21, equation (3): F = 96 B s l h² (1 + s/(6h) + V/(16 l h)) per iteration, with full
  // recompute: blocks run forward twice and backward once, the head forward once and backward once.
  for (const char* name :
       {"gpt3-175b", "megatron-1.7b", "megatron-22b", "megatron-530b", "megatron-1t"}) {
    const Graph g = load_model(name, {});
    const Products blocks = products(g, [&](int layer) { return layer < g.layers; });
    const Products head = products(g, [&](int layer) { return layer == g.layers; });
    const double ours = 2 * blocks.forward + blocks.backward_data + blocks.backward_weight +
                        head.forward + head.backward_data + head.backward_weight;
    const auto l = static_cast<double>(g.layers), s = static_cast<double>(g.sequence);
    const auto h = static_cast<double>(g.tensor(g.operators[0].outputs[0]).shape[2].extent);
    const auto v = static_cast<double>(g.parameter(g.operators[0].parameters[0]).shape[0].extent);
    const double printed = 96 * s * l * h * h * (1 + s / (6 * h) + v / (16 * l * h));
    // Every term is a whole number below 2^63 rounded to 53 bits a few hundred times.
    EXPECT_NEAR(ours / printed, 1, 1e-12) << name;
  }
}

TEST(NetworkFlops, OfLlamaAreSixTimesItsMatricesPlusAttention) {
  // 6N per token (arXiv 2001.08361, section 2.1) with what it leaves out: N counts matrices only,
  // so neither the table that is looked up nor the norms; attention's own products add 12 l s h.
  const Graph g = load_model("llama-3-8b", {});
  const Products p = products(g);
  const double s = 8192, l = 32, h = 4096, v = 128256;
  const double matrices = static_cast<double>(parameter_count(g)) - v * h - (2 * l + 1) * h;
  EXPECT_DOUBLE_EQ(p.forward + p.backward_data + p.backward_weight,
                   s * (6 * matrices + 12 * l * s * h));
  // The approximation itself: 6N is 17 % low at 8,192 tokens, where attention is no longer small.
  const double approximate = 6 * static_cast<double>(parameter_count(g)) * s;
  EXPECT_NEAR(approximate / (p.forward + p.backward_data + p.backward_weight), 0.832, 0.001);
}

TEST(NetworkFlops, OfMixtralCountTheChosenExpertsOnly) {
  ModelOptions o;
  o.sequence = 256;
  const Graph g = load_model("mixtral-8x7b", o);
  const double s = 256, l = 32, h = 4096, f = 14336, v = 32000, kv = 1024;
  const double per_token =
      l * (2 * h * (2 * h + 2 * kv) + 2 * h * 8 + 2 * 2 * 3 * h * f + 4 * s * h) + 2 * h * v;
  EXPECT_DOUBLE_EQ(products(g).forward, s * per_token);
}

TEST(NetworkFlops, OfDeepSeekV3AreThoseOfItsLowRanks) {
  ModelOptions o;
  o.sequence = 128;
  const Graph g = load_model("deepseek-v3", o);
  const double s = 128, h = 7168, a = 128, q = 1536, c = 512, n = 128, r = 64, d = 128;
  const double attention =
      2 * (h * q + q * a * (n + r) + h * (c + r) + c * a * (n + d) + a * d * h) +
      2 * s * a * (n + r + d);
  const double dense = 2 * 3 * h * 18432;
  const double experts = 2 * h * 256 + 2 * 9 * 3 * h * 2048;  // 8 chosen and 1 shared
  EXPECT_DOUBLE_EQ(products(g).forward,
                   s * (61 * attention + 3 * dense + 58 * experts + 2 * h * 129280));
}

struct Table {
  const char* name;
  double gmac;      ///< torchvision's table of weights, "GFLOPS"
  double accuracy;  ///< half of the last printed digit
};

TEST(NetworkFlops, OfImageNetworksAreThoseOfTorchvisionsTable) {
  // torchvision counts multiply-accumulates of convolutions, linear layers and, in ViT, of both
  // products of attention: https://pytorch.org/vision/stable/models.html
  for (const Table& row : {Table{"resnet-50", 4.09, 0.005}, Table{"vgg-16", 15.47, 0.005},
                           Table{"alexnet", 0.71, 0.005}, Table{"vit-b-16", 17.56, 0.005}}) {
    EXPECT_NEAR(products(load_model(row.name, {})).forward / 2e9, row.gmac, row.accuracy)
        << row.name;
  }
  EXPECT_DOUBLE_EQ(products(load_model("resnet-50", {})).forward / 2, 4089184256.0);
  // By hand: 12 blocks of 197 (12 h² + 2 · 197 h), the patches, the classifier.
  EXPECT_DOUBLE_EQ(
      products(load_model("vit-b-16", {})).forward / 2,
      12.0 * 197 * (12.0 * 768 * 768 + 2.0 * 197 * 768) + 196.0 * 768 * 768 + 768.0 * 1000);
}

TEST(NetworkFlops, BackwardIsTwiceForwardForProducts) {
  for (const auto& name : model_catalogue()) {
    const Products p = products(load_model(name, {}));
    EXPECT_NEAR((p.backward_data + p.backward_weight) / p.forward, 2, 1e-12) << name;
  }
}

TEST(NetworkFlops, TheNetworksFirstProductHasNoBackwardByData) {
  const Graph g = load_model("mnist-linear", {});
  // 784 inputs, 10 outputs, 10 squared errors at 3 forward and 2 backward.
  const NetworkFlops f = network_flops(g);
  EXPECT_DOUBLE_EQ(f.forward.count, 2 * 7840 + 3 * 10);
  EXPECT_DOUBLE_EQ(f.backward_data.count, 2 * 10);
  EXPECT_DOUBLE_EQ(f.backward_weight.count, 2 * 7840);
}

TEST(NetworkFlops, ScaleWithTheSamples) {
  const Graph g = load_model("gpt2", {});
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const auto work = [&](std::int64_t samples, Pass pass) {
      const Signature s = signature(g, OpId{i}, samples);
      std::vector<std::int64_t> extents;
      for (const auto& d : s.dims) extents.push_back(d.extent);
      return flops(g.operators[i].operation, s, extents, pass).count;
    };
    for (const Pass pass : {Pass::forward, Pass::backward_data, Pass::backward_weight}) {
      EXPECT_DOUBLE_EQ(work(3, pass), 3 * work(1, pass)) << g.operators[i].name;
    }
  }
}

}  // namespace
}  // namespace partita
