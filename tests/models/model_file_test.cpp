#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "models/models.h"
#include "tests/models/temporary_file.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Graph load(const std::string& body, const ModelOptions& options = {}) {
  const TemporaryFile file("mine.yaml", "schema: partita.model/1\n" + body);
  return load_model(file.path(), options);
}
std::string error(const std::string& body, const ModelOptions& options = {}) {
  try {
    load(body, options);
  } catch (const InputError& e) {
    return e.what();
  }
  return "no error";
}
std::vector<std::string> names(const Graph& g) {
  std::vector<std::string> all;
  for (const auto& op : g.operators) all.push_back(op.name);
  return all;
}

constexpr const char* kSmallCnn = R"(network:
  input: {channels: 3, height: 32, width: 32}
  layers:
    - convolution: {out: 8, kernel: 3, padding: 1, bias: false}
    - batch_norm
    - relu
    - max_pool: {kernel: 2}
    - residual:
        layers:
          - convolution: {out: 16, kernel: 3, stride: 2, padding: 1}
          - relu
          - convolution: {out: 16, kernel: [3, 1], padding: [1, 0]}
        shortcut:
          - convolution: {out: 16, kernel: 1, stride: 2}
    - global_average_pool
    - linear: {out: 10}
)";

TEST(ModelFile, ASmallConvolutionalNetwork) {
  const Graph g = load(kSmallCnn);
  EXPECT_EQ(g.name, "mine");
  EXPECT_THAT(names(g),
              ElementsAre("layers.0.convolution", "layers.0.batch_norm", "layers.0.relu",
                          "layers.0.max_pool", "layers.1.convolution", "layers.1.relu",
                          "layers.1.convolution_2", "layers.1.convolution_3", "layers.1.residual",
                          "layers.1.global_average_pool", "layers.2.linear", "loss"));
  EXPECT_EQ(g.layers, 3);
  EXPECT_EQ(parameter_count(g),
            8 * 27 + 16 + (16 * 8 * 9 + 16) + (16 * 16 * 3 + 16) + (16 * 8 + 16) + 170);
}

TEST(ModelFile, AMultilayerPerceptronWithLabelsToShardBy) {
  const Graph g = load(R"(name: mlp
network:
  input: {features: 784}
  layers:
    - repeat: 3
      layers:
        - linear: {out: 64, label: ffn}
        - gelu
        - linear: {out: 784, bias: false}
        - layer_norm
    - linear: {out: 10}
  loss: mean_squared_error
)");
  EXPECT_EQ(g.name, "mlp");
  EXPECT_EQ(g.layers, 7);
  EXPECT_EQ(parameter_count(g), 3 * (784 * 64 + 64 + 784 * 64 + 2 * 784) + 7850);
  EXPECT_EQ(g.tensor(g.operators[0].outputs[0]).shape[1].dim, Dim::ffn);
  EXPECT_EQ(kind_name(g.operators.back().operation), "mean_squared_error");
}

TEST(ModelFile, ANetworkOfTokens) {
  const char* body = R"(network:
  input: {tokens: 16, vocabulary: 100}
  layers:
    - embedding: {out: 8}
    - linear: {out: 32}
    - silu
    - dropout: 0.1
    - linear: {out: 100}
)";
  ModelOptions o;
  o.sequence = 32;
  o.dropout = 0;
  const Graph g = load(body, o);
  EXPECT_EQ(g.sequence, 32);
  EXPECT_EQ(g.operators.size(), 5u);  // no dropout
  EXPECT_EQ(parameter_count(g), 800 + 8 * 32 + 32 + 3200 + 100);
  EXPECT_EQ(load(body).operators.size(), 6u);
}

TEST(ModelFile, TheCataloguesMnistCanBeWrittenAsAFile) {
  const Graph g = load(R"(network:
  input: {channels: 1, height: 28, width: 28}
  layers: [linear: {out: 10}]
  loss: mean_squared_error
)");
  const Graph mnist = load_model("mnist-linear", {});
  EXPECT_EQ(parameter_count(g), parameter_count(mnist));
  EXPECT_EQ(network_flops(g).forward, network_flops(mnist).forward);
  EXPECT_EQ(g.layers, mnist.layers);
}

constexpr const char* kDecoder = R"(transformer:
  layers: 2
  hidden: 32
  heads: 4
  ffn: 64
  vocabulary: 100
  sequence: 16
)";

TEST(ModelFile, ATransformerNeedsOnlyItsSizes) {
  const Graph g = load(kDecoder);
  EXPECT_EQ(parameter_count(g), 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 2 * 100 * 32 + 32);
}

TEST(ModelFile, MistakesNameFileLineAndRemedy) {
  EXPECT_THAT(error("transformer: {layers: 2}\n"), HasSubstr("needs the key 'hidden'"));
  EXPECT_THAT(
      error(std::string(kDecoder) + "  hiden: 3\n"),
      AllOf(HasSubstr("mine.yaml:9: transformer.hiden"), HasSubstr("did you mean 'hidden'?")));
  EXPECT_THAT(
      error(std::string(kDecoder) + "  norm: rmsnorm\n"),
      HasSubstr("mine.yaml:9: transformer.norm: 'rmsnorm' is unknown; there are layer, rms"));
  EXPECT_THAT(error(std::string(kDecoder) + "  moe: {experts: 4, top_k: 5, ffn: 8}\n"),
              HasSubstr("moe.top_k is 5 of 4 experts"));
  EXPECT_THAT(error(std::string(kDecoder) + "  positions: 8\n"),
              HasSubstr("a sequence of 16 tokens is longer than the 8 learned positions"));
  EXPECT_THAT(error("transformer: {layers: -2, hidden: 4, heads: 1, vocabulary: 5, sequence: 4}\n"),
              HasSubstr("transformer.layers: -2 is too small; at least 1"));
  EXPECT_THAT(error("name: x\n"), HasSubstr("needs either 'transformer' or 'network'"));
  const std::string image = "network:\n  input: {channels: 3, height: 8, width: 8}\n  layers:\n";
  EXPECT_THAT(error(image + "    - convolutoin: {out: 3, kernel: 3}\n"),
              HasSubstr("'convolutoin' is no layer; did you mean 'convolution'?"));
  EXPECT_THAT(error(image + "    - convolution\n"), HasSubstr("'convolution' needs options"));
  EXPECT_THAT(error(image + "    - convolution: {kernel: 3}\n"), HasSubstr("needs the key 'out'"));
  EXPECT_THAT(error(image + "    - convolution: {out: 4, kernel: 9}\n"),
              HasSubstr("does not fit into"));
  EXPECT_THAT(error(image + "    - convolution: {out: 4, kernel: 3}\n"),
              HasSubstr("end with global_average_pool or linear"));
  EXPECT_THAT(error(image + "    - dropout: 1.5\n"), HasSubstr("dropout 1.5 must be"));
  EXPECT_THAT(error(image + "    - embedding: {out: 4}\n"), HasSubstr("an embedding reads tokens"));
  EXPECT_THAT(error(image + "    - linear: {out: 4}\n  loss: hinge\n"),
              HasSubstr("'hinge' is no loss"));
  ModelOptions o;
  o.layers = 2;
  EXPECT_THAT(error(kSmallCnn, o), HasSubstr("lists its layers"));
  o = {};
  o.sequence = 2;
  EXPECT_THAT(error(kSmallCnn, o), HasSubstr("does not read tokens"));
}

}  // namespace
}  // namespace partita
