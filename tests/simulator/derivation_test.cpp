// The example of docs/derivation.md: a two-layer perceptron with tensor parallel 2 and data
// parallel 2, every number by hand.
#include <gtest/gtest.h>

#include <numeric>

#include "runtime/reference/interpreter.h"
#include "simulator/cost/cost.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

/// y = W2 relu(W1 x), x of 4 features, 8 hidden; mean squared error against 0.
Graph perceptron() {
  GraphBuilder b("perceptron");
  const Shape plain{{Dim::sample, 1}, {Dim::feature, 4}};
  const TensorId x = b.input("x", plain);
  const TensorId target = b.input("target", plain);
  TensorId h = b.add("up", Linear{1, {{Dim::ffn, 8}}, false}, {x});
  h = b.add("relu", Activation{ActivationKind::relu}, {h});
  const TensorId y = b.add("down", Linear{1, {{Dim::feature, 4}}, false}, {h});
  return b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 0, 0);
}

/// Mesh: dp 2 (outer) x tp 2 (inner), 2 samples a rank.
Plan two_by_two() {
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.tp = 2;
  plan.dp = 2;
  plan.micro_batch = 2;
  plan.bucket = 40_MiB;
  return plan;
}

TEST(Derivation, LayoutsOfThePerceptron) {
  const Graph g = perceptron();
  const auto plan = complete(g, two_by_two());
  ASSERT_TRUE(plan) << plan.reason();
  const auto at = [&](std::size_t op) {
    auto l = derive(g, *plan, OpId{op}, 4, {});
    if (!l) throw InternalError(l.reason());
    return *l;
  };
  const auto say = [&](const Layout& l, const Shape& s) { return text(plan->mesh, l, s); };
  const OperatorLayouts up = at(0), down = at(2);
  const Signature &u = up.signature, &d = down.signature;
  EXPECT_EQ(say(up.inputs[0], u.inputs[0].shape), "[sample/dp, feature]");
  EXPECT_EQ(say(up.parameters[0], u.parameters[0].shape), "[ffn/tp, feature]");
  EXPECT_EQ(say(up.outputs[0], u.outputs[0].shape), "[sample/dp, ffn/tp]");
  EXPECT_EQ(say(up.input_gradients[0], u.inputs[0].shape), "[sample/dp, feature] partial tp");
  EXPECT_EQ(say(up.parameter_gradients[0], u.parameters[0].shape), "[ffn/tp, feature] partial dp");
  EXPECT_EQ(say(down.inputs[0], d.inputs[0].shape), "[sample/dp, ffn/tp]");
  EXPECT_EQ(say(down.outputs[0], d.outputs[0].shape), "[sample/dp, feature] partial tp");
  EXPECT_EQ(say(down.output_gradients[0], d.outputs[0].shape), "[sample/dp, feature]");
  EXPECT_EQ(say(down.input_gradients[0], d.inputs[0].shape), "[sample/dp, ffn/tp]");
  EXPECT_EQ(say(down.parameter_gradients[0], d.parameters[0].shape),
            "[feature, ffn/tp] partial dp");
}

TEST(Derivation, CollectivesOfThePerceptron) {
  const Program p = lowered(perceptron(), two_by_two());
  std::vector<std::string> seen;
  for (const BlockCall& call : p.stages[0]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind != Kind::collective) continue;
      const Bytes bytes = payload(p, i, 0);
      seen.push_back(fmt::format("{} of {} B, {} B on the wire", name(i.collective), bytes.count,
                                 wire_count(i.collective, 2, bytes).bytes.count));
    }
  }
  // Forward: y, 2 samples of 4 values of 4 B, over tp. Backward: nothing by data (x needs none);
  // the gradients of W1 and W2, 4 x 4 values each, over dp. 2 (n-1)/n = 1 of each.
  EXPECT_EQ(seen, (std::vector<std::string>{"all_reduce of 32 B, 32 B on the wire",
                                            "all_reduce of 128 B, 128 B on the wire"}));
}

reference::Piece whole(const Shape& shape, const std::function<double(std::int64_t)>& value) {
  std::vector<std::vector<std::int64_t>> index;
  for (const auto& d : shape) {
    index.emplace_back(static_cast<std::size_t>(d.extent));
    std::iota(index.back().begin(), index.back().end(), 0);
  }
  reference::Piece piece = reference::zeros(index);
  for (std::size_t k = 0; k < piece.values.size(); ++k)
    piece.values[k] = value(static_cast<std::int64_t>(k));
  return piece;
}

TEST(Derivation, NumbersOfThePerceptron) {
  const Graph g = perceptron();
  const Program p = lowered(g, two_by_two());
  reference::RunOptions options;
  // Sample i = 1..4 is (i, 0, 0, 0); W1's first column and all of W2 are 1.
  options.input = [](std::size_t input, std::int64_t, std::int64_t sample, std::int64_t index) {
    return input == 0 && index == 0 ? static_cast<double>(sample + 1) : 0.0;
  };
  options.parameters = {
      {whole(g.parameters[0].shape, [](std::int64_t k) { return k % 4 == 0 ? 1.0 : 0.0; }),
       whole(g.parameters[1].shape, [](std::int64_t) { return 1.0; })}};
  const reference::RunResult run = interpret(p, options);
  // h = i eight times; each tp rank adds four of them: 4 i + 4 i = y = 8 i. Loss: 4 values of 64
  // i^2 per sample, mean of 16: 4 · 64 · (1 + 4 + 9 + 16) / 16 = 480.
  EXPECT_DOUBLE_EQ(run.losses[0][0], 480);
  // dy = 2 y / 16 = i. dW2 = sum of i · i: samples 1, 2 give 5, samples 3, 4 give 25.
  for (const double v : run.gradients[0][1]) EXPECT_DOUBLE_EQ(v, 30);
  // dh = 4 dy = 4 i. First column of dW1 = sum of 4 i · i: 20 + 100.
  for (std::size_t k = 0; k < 32; ++k)
    EXPECT_DOUBLE_EQ(run.gradients[0][0][k], k % 4 == 0 ? 120 : 0);
}

}  // namespace
}  // namespace partita
