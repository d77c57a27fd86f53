#include "runtime/reference/serial.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "tests/runtime/reference/differences.h"

namespace partita::reference {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;
using testing::Pointwise;

constexpr NamedExtent kSample{Dim::sample, 1};

/// Tied embeddings, learned positions, grouped queries with sinks, dropout, two blocks.
Graph small_gpt() {
  GraphBuilder b("small-gpt");
  const std::int64_t sequence = 4, hidden = 6, heads = 2, head = 3, vocabulary = 7;
  const TensorId ids = b.input("ids", {kSample, {Dim::sequence, sequence}});
  const TensorId labels = b.input("labels", {kSample, {Dim::sequence, sequence}});
  TensorId x = b.add("embedding", Embedding{vocabulary, hidden}, {ids});
  const ParameterId table = b.op(b.last()).parameters[0];
  x = b.add("positions", PositionEmbedding{sequence + 1}, {x});
  for (int layer = 0; layer < 2; ++layer) {
    b.set_layer(layer);
    b.set_scope("layers." + std::to_string(layer) + ".");
    const TensorId y = b.add("norm", Normalize{}, {x});
    const auto project = [&](const char* label, std::int64_t width) {
      return b.add(label, Linear{1, {{Dim::head, heads}, {Dim::head_feature, width}}, true}, {y});
    };
    TensorId q = project("query", 2 * head), k = project("key", head);
    const TensorId v = project("value", head);
    if (layer == 1) {  // positions once more, rotated into queries and keys
      q = b.add("rotate.query", Rotary{head, 2, 100}, {q});
      k = b.add("rotate.key", Rotary{head, 2, 100}, {k});
    }
    Attention attention;
    attention.queries_per_head = 2;
    attention.qk_dim = attention.v_dim = head;
    attention.sinks = layer == 1;
    TensorId a = b.add("attention", attention, {q, k, v});
    a = b.add("out", Linear{2, {{Dim::feature, hidden}}, false}, {a});
    a = b.add("dropout", Dropout{0.2}, {a});
    x = b.add("add", Add{}, {x, a});
    Normalize rms;
    rms.kind = Normalize::Kind::rms;
    rms.bias = false;
    const TensorId z = b.add("norm2", rms, {x});
    const TensorId gate = b.add("gate", Linear{1, {{Dim::ffn, 5}}, false}, {z});
    const TensorId up = b.add("up", Linear{1, {{Dim::ffn, 5}}, false}, {z});
    TensorId f = b.add("swiglu", GatedActivation{}, {gate, up});
    f = b.add("down", Linear{1, {{Dim::feature, hidden}}, true}, {f});
    x = b.add("add2", Add{}, {x, f});
  }
  b.set_layer(2);
  b.set_scope("");
  const TensorId logits =
      b.add("head", Linear{1, {{Dim::vocabulary, vocabulary}}, false}, {x}, {table});
  return b.finish(b.add("loss", CrossEntropy{}, {logits, labels}), 2, sequence);
}

Graph small_mixture() {
  GraphBuilder b("small-mixture");
  const TensorId x0 = b.input("x", {kSample, {Dim::sequence, 3}, {Dim::feature, 4}});
  const TensorId target = b.input("target", {kSample, {Dim::sequence, 3}, {Dim::feature, 4}});
  const TensorId x = b.add("in", Linear{1, {{Dim::feature, 4}}, true}, {x0});
  const TensorId logits = b.add("router", Linear{1, {{Dim::expert, 4}}, false}, {x});
  const TensorId gates = b.add("gates", Router{2, false, true, 1.5}, {logits});
  const TensorId rows = b.add("dispatch", Dispatch{4, 2}, {x, gates});
  TensorId y = b.add("up", GroupedProduct{4, {Dim::ffn, 5}, true}, {rows});
  y = b.add("activation", Activation{ActivationKind::silu}, {y});
  y = b.add("down", GroupedProduct{4, {Dim::feature, 4}, true}, {y});
  y = b.add("combine", Combine{4}, {y, gates});
  y = b.add("add", Add{}, {y, x});
  return b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 1, 3);
}

Graph small_convolutional() {
  GraphBuilder b("small-convolutional");
  const TensorId image =
      b.input("image", {kSample, {Dim::feature, 2}, {Dim::height, 6}, {Dim::width, 5}});
  const TensorId label = b.input("label", {kSample});
  const Window three{3, 1, 1, 1, 1}, two{2, 2, 0, 0, 1}, stride{1, 2, 0, 0, 1};
  Normalize norm;
  norm.kind = Normalize::Kind::batch;
  TensorId x = b.add("conv1", Convolution{4, three, three, 1, false}, {image});
  x = b.add("norm1", norm, {x});
  x = b.add("gelu", Activation{ActivationKind::gelu}, {x});
  x = b.add("pool", Pool{true, two, {1, 1, 0, 0, 1}}, {x});
  const TensorId down = b.add("shortcut", Convolution{4, stride, stride, 1, true}, {x});
  x = b.add("conv2", Convolution{4, {3, 2, 1, 1, 1}, {3, 2, 1, 1, 1}, 2, true}, {x});
  x = b.add("norm2", norm, {x});
  x = b.add("add", Add{}, {x, down});
  x = b.add("mean", GlobalAveragePool{}, {x});
  x = b.add("head", Linear{1, {{Dim::vocabulary, 3}}, true}, {x});
  return b.finish(b.add("loss", CrossEntropy{}, {x, label}), 0, 0);
}

/// Parameters far enough from zero for every path to count.
std::vector<Piece> lively_parameters(Graph& graph, std::uint64_t seed) {
  for (Parameter& p : graph.parameters) p.initial_deviation = 0.5;
  return initial_parameters(graph, seed);
}

void expect_gradients(Graph graph, int batch_norm_groups = 1) {
  auto parameters = lively_parameters(graph, 5);
  const int micro_batches = 2, samples = 3;
  const Inputs inputs = make_inputs(graph, micro_batches * samples, 6, 7);
  const auto step = [&] {
    return serial_step(graph, parameters, inputs, micro_batches, samples, 8, 7, batch_norm_groups);
  };
  const SerialResult result = step();
  std::mt19937_64 rng{9};
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    if (!graph.parameters[p].trainable) continue;
    for (int trial = 0; trial < 20; ++trial) {
      const std::size_t i = rng() % parameters[p].values.size();
      expect_derivative(
          result.parameter_gradients[p].values[i], parameters[p].values[i], result.loss,
          [&] { return step().loss; }, graph.parameters[p].name + " " + std::to_string(i));
    }
    if (testing::Test::HasFailure()) return;
  }
}

TEST(SerialStep, OfATwoLayerPerceptronByHand) {
  // x = (1, 2); h = relu(A x) = relu(3, -1) = (3, 0); y = B h = 6; target 4: loss 4, dy = 4;
  // dB = dy h = (12, 0); dh = dy B = (8, 4), masked (8, 0); dA = dh xᵀ.
  GraphBuilder b("perceptron");
  const TensorId x = b.input("x", {kSample, {Dim::feature, 2}});
  const TensorId target = b.input("target", {kSample, {Dim::ffn, 1}});
  TensorId y = b.add("a", Linear{1, {{Dim::feature, 2}}, false}, {x});
  y = b.add("relu", Activation{ActivationKind::relu}, {y});
  y = b.add("b", Linear{1, {{Dim::ffn, 1}}, false}, {y});
  const Graph graph = b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 0, 0);

  auto parameters = initial_parameters(graph, 1);
  parameters[0].values = {1, 1, 1, -1};
  parameters[1].values = {2, 1};
  Inputs inputs = make_inputs(graph, 1, 1, 0);
  inputs.by_tensor[0].values = {1, 2};
  inputs.by_tensor[1].values = {4};
  SerialResult r = serial_step(graph, parameters, inputs, 1, 1, 1, 0);
  EXPECT_DOUBLE_EQ(r.loss, 4);
  EXPECT_THAT(r.parameter_gradients[0].values, ElementsAre(8, 16, 0, 0));
  EXPECT_THAT(r.parameter_gradients[1].values, ElementsAre(12, 0));

  // The same sample twice, in one micro-batch or two: a mean stays what it is.
  Inputs twice = make_inputs(graph, 2, 1, 0);
  twice.by_tensor[0].values = {1, 2, 1, 2};
  twice.by_tensor[1].values = {4, 4};
  for (const int micro_batches : {1, 2}) {
    r = serial_step(graph, parameters, twice, micro_batches, 2 / micro_batches, 1, 0);
    EXPECT_DOUBLE_EQ(r.loss, 4);
    EXPECT_THAT(r.parameter_gradients[0].values, ElementsAre(8, 16, 0, 0));
  }
}

TEST(SerialStep, GradientsOfATransformerAreDerivatives) { expect_gradients(small_gpt()); }
TEST(SerialStep, GradientsOfAMixtureOfExpertsAreDerivatives) { expect_gradients(small_mixture()); }
TEST(SerialStep, GradientsOfAConvolutionalNetworkAreDerivatives) {
  expect_gradients(small_convolutional());
}
TEST(SerialStep, GradientsWithLocalBatchNormAreDerivatives) {
  expect_gradients(small_convolutional(), 2);
}

TEST(SerialStep, DoesNotDependOnTheMicroBatches) {
  for (Graph graph : {small_gpt(), small_mixture()}) {
    const auto parameters = lively_parameters(graph, 1);
    const Inputs inputs = make_inputs(graph, 6, 2, 3);
    const SerialResult one = serial_step(graph, parameters, inputs, 1, 6, 4, 3);
    for (const int micro_batches : {2, 3, 6}) {
      const SerialResult many =
          serial_step(graph, parameters, inputs, micro_batches, 6 / micro_batches, 4, 3);
      EXPECT_NEAR(one.loss, many.loss, 1e-13 * one.loss);
      for (std::size_t p = 0; p < parameters.size(); ++p) {
        EXPECT_THAT(many.parameter_gradients[p].values,
                    Pointwise(DoubleNear(1e-13), one.parameter_gradients[p].values));
      }
    }
  }
}

TEST(SerialStep, LocalBatchNormOfGroupsIsThatOfAsManyMicroBatches) {
  Graph graph = small_convolutional();
  const auto parameters = lively_parameters(graph, 1);
  const Inputs inputs = make_inputs(graph, 6, 2, 3);
  const SerialResult groups = serial_step(graph, parameters, inputs, 1, 6, 4, 3, 3);
  const SerialResult batches = serial_step(graph, parameters, inputs, 3, 2, 4, 3);
  EXPECT_NEAR(groups.loss, batches.loss, 1e-13);
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    EXPECT_THAT(groups.parameter_gradients[p].values,
                Pointwise(DoubleNear(1e-12), batches.parameter_gradients[p].values));
  }
  // Synchronised, the groups see the samples of all of them.
  for (auto& op : graph.operators) {
    if (auto* n = std::get_if<Normalize>(&op.operation)) n->synchronised = true;
  }
  const double together = serial_step(graph, parameters, inputs, 1, 6, 4, 3).loss;
  EXPECT_DOUBLE_EQ(serial_step(graph, parameters, inputs, 1, 6, 4, 3, 3).loss, together);
  EXPECT_GT(std::abs(together - groups.loss), 1e-6);
}

TEST(SerialStep, LeavesFrozenParametersWithoutAGradientAndTheOthersUnchanged) {
  Graph graph = small_gpt();
  const auto parameters = lively_parameters(graph, 1);
  const Inputs inputs = make_inputs(graph, 2, 2, 0);
  const SerialResult all = serial_step(graph, parameters, inputs, 1, 2, 3, 0);
  freeze(graph, {"embedding.weight", "layers.0.*"});
  const SerialResult some = serial_step(graph, parameters, inputs, 1, 2, 3, 0);
  for (std::size_t p = 0; p < parameters.size(); ++p) {
    const auto& gradient = some.parameter_gradients[p].values;
    if (graph.parameters[p].trainable) {
      EXPECT_EQ(gradient, all.parameter_gradients[p].values);
    } else {
      EXPECT_TRUE(gradient.empty());
    }
  }
}

TEST(SerialStep, RunsLowRankAdapters) {
  Graph graph = small_gpt();
  add_lora(graph, {"layers.*.query", "layers.*.down"}, 2);
  expect_gradients(graph);
}

TEST(Inputs, AreTokensOfTheirReadersVocabulary) {
  const Graph graph = small_gpt();
  const Inputs inputs = make_inputs(graph, 50, 1, 2);
  for (const Piece& p : inputs.by_tensor) {
    EXPECT_EQ(std::set<double>(p.values.begin(), p.values.end()),
              (std::set<double>{0, 1, 2, 3, 4, 5, 6}));
  }
  EXPECT_NE(inputs.by_tensor[0].values, inputs.by_tensor[1].values);
  EXPECT_NE(inputs.by_tensor[0].values, make_inputs(graph, 50, 1, 3).by_tensor[0].values);
  const Piece slice = input_slice(inputs.by_tensor[1], 3, 10);
  EXPECT_EQ(slice.index[0].front(), 0);
  EXPECT_EQ(slice.values[5], input_value(graph, 1, 1, 2, 31, 1));
}

TEST(InitialParameters, AreAFunctionOfTheirNameAndIndex) {
  const Graph graph = small_gpt();
  const auto a = initial_parameters(graph, 1), b = initial_parameters(graph, 2);
  for (std::size_t p = 0; p < a.size(); ++p) {
    const Parameter& parameter = graph.parameters[p];
    EXPECT_EQ(a[p].values.back(), initial_value(parameter, 1, a[p].size() - 1));
    EXPECT_EQ(a[p].values == b[p].values, parameter.initial_deviation == 0) << parameter.name;
  }
}

}  // namespace
}  // namespace partita::reference
