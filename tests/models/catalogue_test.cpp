#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include "base/error.h"
#include "models/models.h"
#include "tests/models/temporary_file.h"

namespace partita {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;
using ::testing::ThrowsMessage;

/// What every graph promises to those who lower it.
void expect_well_formed(const Graph& g) {
  ASSERT_TRUE(g.loss.valid());
  EXPECT_TRUE(g.tensor(g.loss).shape.empty());
  std::set<std::string> names;
  std::vector<char> known(g.tensors.size(), 0);
  for (const TensorId t : g.inputs) known[t.index()] = 1;
  int layer = -1;
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Operator& op = g.operators[i];
    EXPECT_TRUE(names.insert(op.name).second) << op.name << " occurs twice";
    EXPECT_GE(op.layer, layer) << op.name;
    layer = op.layer;
    for (const TensorId t : op.inputs)
      EXPECT_TRUE(known[t.index()]) << op.name << " comes too early";
    for (const TensorId t : op.outputs) {
      known[t.index()] = 1;
      EXPECT_EQ(g.tensor(t).producer, OpId{i}) << op.name;
    }
    const Signature s = signature(g, OpId{i}, 1);
    ASSERT_EQ(s.parameters.size(), op.parameters.size()) << op.name;
    for (std::size_t p = 0; p < s.parameters.size(); ++p) {
      EXPECT_EQ(elements(s.parameters[p].shape), elements(g.parameter(op.parameters[p]).shape));
    }
  }
  EXPECT_EQ(layer, g.layers);
  std::set<std::string> parameters;
  for (const auto& p : g.parameters) EXPECT_TRUE(parameters.insert(p.name).second) << p.name;
}

TEST(Catalogue, EveryNetworkIsWellFormed) {
  for (const auto& name : model_catalogue()) {
    SCOPED_TRACE(name);
    const Graph g = load_model(name, {});
    EXPECT_EQ(g.name, name);
    EXPECT_GE(g.layers, 1);
    expect_well_formed(g);
  }
}

TEST(Catalogue, HasTheNetworksOfTheDesign) {
  EXPECT_THAT(model_catalogue(),
              IsSupersetOf({"gpt2",           "gpt3-175b",     "megatron-1.7b", "megatron-3.6b",
                            "megatron-7.5b",  "megatron-18b",  "megatron-22b",  "megatron-39b",
                            "megatron-76b",   "megatron-145b", "megatron-310b", "megatron-530b",
                            "megatron-1t",    "llama-2-7b",    "llama-3-8b",    "llama-3-70b",
                            "llama-3.1-405b", "mixtral-8x7b",  "deepseek-v2",   "deepseek-v3",
                            "bert-large",     "vit-b-16",      "resnet-50",     "vgg-16",
                            "alexnet",        "mnist-linear"}));
}

TEST(Catalogue, OptionsChangeTransformers) {
  ModelOptions o;
  o.sequence = 128;
  o.layers = 2;
  o.vocabulary = 1000;
  o.dropout = 0.1;
  o.flash_attention = false;
  const Graph g = load_model("llama-3-8b", o);
  expect_well_formed(g);
  EXPECT_EQ(g.layers, 2);
  EXPECT_EQ(g.sequence, 128);
  int dropouts = 0;
  for (const auto& op : g.operators) {
    if (const auto* a = std::get_if<Attention>(&op.operation)) {
      EXPECT_TRUE(a->materialised);
    }
    dropouts += std::holds_alternative<Dropout>(op.operation) ? 1 : 0;
  }
  EXPECT_EQ(dropouts, 1 + 2 * 2);  // after the embedding, and twice in each block
  EXPECT_EQ(g.parameter(g.operators[0].parameters[0]).shape[0].extent, 1000);
}

TEST(Catalogue, DropoutGoesWhereTorchvisionPutsIt) {
  ModelOptions o;
  o.dropout = 0.5;
  for (const char* name : {"alexnet", "vgg-16"}) {
    int dropouts = 0;
    for (const auto& op : load_model(name, o).operators) {
      dropouts += std::holds_alternative<Dropout>(op.operation) ? 1 : 0;
    }
    EXPECT_EQ(dropouts, 2) << name;
  }
}

std::vector<std::string> names_of_layer(const Graph& g, int layer) {
  std::vector<std::string> names;
  const std::string scope = "layers." + std::to_string(layer) + ".";
  for (const auto& op : g.operators) {
    if (op.layer != layer) continue;
    names.push_back(op.name.rfind(scope, 0) == 0 ? op.name.substr(scope.size()) : "!" + op.name);
  }
  return names;
}

TEST(Catalogue, GptBlocksUseTheNamesThatPlansShardBy) {
  const Graph g = load_model("gpt2", {});
  EXPECT_THAT(names_of_layer(g, 3),
              ElementsAre("attention_norm", "attention.query", "attention.key", "attention.value",
                          "attention.core", "attention.output", "attention.output_bias",
                          "attention.residual", "mlp_norm", "mlp.up", "mlp.activation", "mlp.down",
                          "mlp.down_bias", "mlp.residual"));
  EXPECT_EQ(g.operators[0].name, "embedding");
  EXPECT_EQ(g.operators[1].name, "position_embedding");
  EXPECT_EQ(g.operators[0].layer, -1);
  const auto& head = g.operators[g.operators.size() - 2];
  EXPECT_EQ(head.name, "head");
  EXPECT_EQ(head.layer, 12);
  EXPECT_EQ(head.parameters[0], g.operators[0].parameters[0]) << "tied";
}

TEST(Catalogue, LlamaBlocksUseTheNamesThatPlansShardBy) {
  const Graph g = load_model("llama-3-8b", {});
  EXPECT_THAT(names_of_layer(g, 31),
              ElementsAre("attention_norm", "attention.query", "attention.key", "attention.value",
                          "attention.query_rotary", "attention.key_rotary", "attention.core",
                          "attention.output", "attention.residual", "mlp_norm", "mlp.gate",
                          "mlp.up", "mlp.activation", "mlp.down", "mlp.residual"));
  for (const auto& op : g.operators) {
    if (op.name != "layers.0.attention.query") continue;
    const Shape expected{{Dim::head, 8}, {Dim::head_feature, 4 * 128}};
    EXPECT_EQ(std::get<Linear>(op.operation).out, expected);
  }
}

TEST(Catalogue, ExpertBlocksUseTheNamesThatPlansShardBy) {
  EXPECT_THAT(names_of_layer(load_model("mixtral-8x7b", {}), 0),
              IsSupersetOf({"moe.router", "moe.gates", "moe.dispatch", "moe.gate", "moe.up",
                            "moe.activation", "moe.down", "moe.combine", "mlp.residual"}));
  const Graph g = load_model("deepseek-v3", {});
  EXPECT_THAT(names_of_layer(g, 2), IsSupersetOf({"mlp.gate", "mlp.up", "mlp.down"}));
  EXPECT_THAT(
      names_of_layer(g, 3),
      ElementsAre("attention_norm", "attention.query_down", "attention.query_norm",
                  "attention.query_up", "attention.query_rotary", "attention.kv_down",
                  "attention.kv_norm", "attention.key_rope", "attention.key_rotary",
                  "attention.key_up", "attention.value_up", "attention.key_join", "attention.core",
                  "attention.output", "attention.residual", "mlp_norm", "moe.router", "moe.gates",
                  "moe.dispatch", "moe.gate", "moe.up", "moe.activation", "moe.down", "moe.combine",
                  "moe.shared.gate", "moe.shared.up", "moe.shared.activation", "moe.shared.down",
                  "moe.shared.sum", "mlp.residual"));
}

TEST(Catalogue, HybridBlocksUseTheNamesThatPlansShardBy) {
  const Graph g = load_model("nemotron-3-super-120b-a12b", {});
  EXPECT_EQ(g.layers, 88);
  EXPECT_THAT(names_of_layer(g, 0), ElementsAre("mamba_norm", "mamba.gate", "mamba.input",
                                                "mamba.step", "mamba.convolution", "mamba.scan",
                                                "mamba.norm", "mamba.output", "mamba.residual"));
  EXPECT_THAT(names_of_layer(g, 1),
              ElementsAre("mlp_norm", "moe.router", "moe.gates", "moe.latent_down", "moe.dispatch",
                          "moe.up", "moe.activation", "moe.down", "moe.combine", "moe.latent_up",
                          "moe.shared.up", "moe.shared.activation", "moe.shared.down",
                          "moe.shared.sum", "mlp.residual"));
  EXPECT_THAT(names_of_layer(g, 7),
              ElementsAre("attention_norm", "attention.query", "attention.key", "attention.value",
                          "attention.core", "attention.output", "attention.residual"));
  EXPECT_THAT(names_of_layer(load_model("nemotron-h-8b", {}), 1),
              ElementsAre("mlp_norm", "mlp.up", "mlp.activation", "mlp.down", "mlp.residual"));
  for (const auto& op : g.operators) {
    if (op.name != "layers.0.mamba.input") continue;
    // 8 groups of 16 heads of 64, with B and C of 128 each.
    const Shape expected{{Dim::head, 8}, {Dim::head_feature, 16 * 64 + 2 * 128}};
    EXPECT_EQ(std::get<Linear>(op.operation).out, expected);
  }
}

TEST(Catalogue, LabelsAreThoseThatTensorParallelismCuts) {
  const Graph g = load_model("gpt2", {});
  for (std::size_t i = 0; i < g.operators.size(); ++i) {
    const Signature s = signature(g, OpId{i}, 1);
    const std::string& name = g.operators[i].name;
    const auto use = [&](Dim d) { return s.dims[static_cast<std::size_t>(s.find(d))].use; };
    if (name == "layers.0.mlp.up") {
      EXPECT_EQ(use(Dim::ffn), DimUse::parallel);
    }
    if (name == "layers.0.mlp.down") {
      EXPECT_EQ(use(Dim::ffn), DimUse::sum);
    }
    if (name == "layers.0.attention.query") {
      EXPECT_EQ(use(Dim::head), DimUse::parallel);
    }
    if (name == "layers.0.attention.output") {
      EXPECT_EQ(use(Dim::head), DimUse::sum);
    }
    if (name == "head") {
      EXPECT_EQ(use(Dim::vocabulary), DimUse::parallel);
    }
    if (name == "loss") {
      EXPECT_EQ(use(Dim::vocabulary), DimUse::statistic);
    }
  }
}

TEST(Catalogue, BadNamesAndOptionsSaySo) {
  const auto expect = [](const std::string& model, ModelOptions o, const std::string& message) {
    EXPECT_THAT([&] { load_model(model, o); }, ThrowsMessage<InputError>(HasSubstr(message)));
  };
  expect("lama-3-8b", {}, "did you mean 'llama-3-8b'?");
  expect("", {}, "the catalogue has alexnet");
  expect("nowhere/model.onnx", {}, "nowhere/model.onnx: cannot be read");
  expect("nowhere/config.json", {}, "nowhere/config.json: cannot be read");
  ModelOptions o;
  o.layers = -1;
  expect("gpt2", o, "layers: is -1; it must be at least 1 block");
  o = {};
  o.sequence = -5;
  expect("gpt2", o, "sequence: is -5");
  o.sequence = 2048;
  expect("gpt2", o,
         "a sequence of 2048 tokens is longer than the 1024 learned positions; use at most 1024");
  expect("resnet-50", o, "sequence: resnet-50 has no token sequence");
  expect("vit-b-16", o, "its 197 tokens follow from their size");
  o = {};
  o.layers = 3;
  expect("vgg-16", o, "layers: vgg-16 has no repeated blocks to count");
  o = {};
  o.vocabulary = -2;
  expect("gpt2", o, "vocabulary: is -2");
  o = {};
  o.dropout = 1;
  expect("gpt2", o, "dropout: is 1; it must be below 1");
}

TEST(Catalogue, TheBuilderRefusesNumbersThatDoNotFit) {
  const auto with = [](auto change) {
    TransformerConfig c;
    c.name = "mine";
    c.layers = 2, c.hidden = 24, c.heads = 6, c.ffn = 32, c.vocabulary = 50, c.sequence = 8;
    change(c);
    return [c] { build_transformer(c); };
  };
  const auto throws = [](const std::string& m) { return ThrowsMessage<InputError>(HasSubstr(m)); };
  EXPECT_THAT(with([](auto& c) { c.layers = -3; }),
              throws("mine: layers is -3; it must be at least 1"));
  EXPECT_THAT(with([](auto& c) { c.heads = 5; }), throws("5 heads do not divide hidden size 24"));
  EXPECT_THAT(with([](auto& c) { c.kv_heads = 4; }),
              throws("4 key/value heads do not divide 6 attention heads"));
  EXPECT_THAT(with([](auto& c) { c.rotary_dim = 3; }), throws("3 rotated values per head of 4"));
  EXPECT_THAT(with([](auto& c) { c.ffn = 0; }), throws("ffn is 0"));
  EXPECT_THAT(with([](auto& c) {
                c.moe.experts = 4;
                c.moe.ffn = 8;
                c.moe.top_k = 5;
              }),
              throws("moe.top_k is 5 of 4 experts"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*x"; }), throws("pattern has 'x' at 1"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*E"; }), throws("pattern has E"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "M-"; }), throws("pattern has M"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*"; }),
              throws("2 layers are more than the pattern's 1"));
  EXPECT_THAT(with([](auto& c) { c.mamba.heads = 4; }), throws("give a pattern"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*-", c.mtp_layers = 1; }),
              throws("needs mtp_pattern"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*-", c.mtp_pattern = "--"; }),
              throws("mtp_pattern -- has a kind twice"));
  EXPECT_THAT(with([](auto& c) {
                c.pattern = "MM";
                c.mamba.heads = 4, c.mamba.groups = 3;
              }),
              throws("3 groups do not divide 4 heads of mamba"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*-", c.norm_position = NormPosition::after; }),
              throws("a pattern goes with norm_position before alone"));
  EXPECT_THAT(with([](auto& c) { c.pattern = "*-", c.residual = Residual::parallel; }),
              throws("a pattern's blocks have one branch each"));
  EXPECT_THAT(with([](auto& c) {
                c.residual = Residual::parallel;
                c.norm_position = NormPosition::both;
              }),
              throws("parallel residuals go with norm_position before alone"));
  EXPECT_THAT(with([](auto& c) { c.head_bias = true, c.mtp_layers = 1; }),
              throws("head_bias goes without mtp_layers"));
  EXPECT_THAT(with([](auto& c) {
                c.head_bias = true;
                c.head = TransformerConfig::Head::masked_language_model;
              }),
              throws("head_bias is of a language model's head"));
  EXPECT_THAT(with([](auto& c) {
                c.image = 30;
                c.patch = 16;
              }),
              throws("patches of 16 do not divide an image of 30"));
  EXPECT_THAT(with([](auto& c) {
                c.head = TransformerConfig::Head::masked_language_model;
                c.predicted = 9;
              }),
              throws("predicted is 9 of 8 tokens"));
  EXPECT_THAT(with([](auto& c) { c.predicted = 3; }), throws("predicted needs the head masked"));
  EXPECT_THAT(with([](auto& c) { c.classes = 0; }), throws("classes is 0"));
  EXPECT_THAT(with([](auto& c) { c.embedding_rows = 49; }),
              throws("embedding_rows 49 are fewer than the vocabulary of 50"));
  EXPECT_THAT(with([](auto& c) {
                c.embedding_rows = 51;
                c.tied = true;
              }),
              throws("embedding_rows needs tied: false"));
  EXPECT_THAT(with([](auto& c) { c.memory = 4; }), throws("memory needs causal: false"));
  const auto generator = [&](auto change) {
    return with([change](auto& c) {
      c.head = TransformerConfig::Head::replaced_tokens;
      c.generator = {8, 2, 12, 3};
      change(c);
    });
  };
  EXPECT_NO_THROW(generator([](auto&) {})());
  EXPECT_THAT(generator([](auto& c) { c.generator = {}; }), throws("need each other"));
  EXPECT_THAT(with([](auto& c) { c.generator = {8, 2, 12, 0}; }), throws("need each other"));
  EXPECT_THAT(generator([](auto& c) { c.generator.heads = 3; }), throws("no multiple of its 3"));
  EXPECT_THAT(generator([](auto& c) { c.generator.ffn = 0; }), throws("generator.ffn"));
  EXPECT_NO_THROW(generator([](auto& c) { c.generator.predicted = 8; })());
  EXPECT_THAT(generator([](auto& c) { c.generator.predicted = 9; }),
              throws("generator.predicted is 9 of 8 tokens"));
  EXPECT_THAT(generator([](auto& c) {
                c.memory = 4;
                c.causal = false;
              }),
              throws("a generator goes with blocks of attention"));
  EXPECT_NO_THROW(with([](auto& c) {
    c.embedding_rows = 50;
    c.memory = 4;
    c.causal = false;
  })());
  EXPECT_NO_THROW(with([](auto&) {})());
}

TEST(Catalogue, AMultiTokenPredictionHeadIsWellFormed) {
  TransformerConfig c;
  c.layers = 2, c.hidden = 24, c.heads = 6, c.ffn = 32, c.vocabulary = 50, c.sequence = 8;
  c.mtp_layers = 2;
  for (const bool tied : {false, true}) {
    c.tied = tied;
    expect_well_formed(build_transformer(c));
  }
}

/// Generator and discriminator have one table of words, of positions and of segments.
TEST(Catalogue, AGeneratorSharesItsEmbeddings) {
  TransformerConfig c;
  c.layers = 2, c.hidden = 24, c.heads = 6, c.ffn = 32, c.vocabulary = 50, c.sequence = 8;
  c.norm = TransformerConfig::Norm::layer, c.norm_position = NormPosition::after, c.causal = false,
  c.gated = false;
  c.positions = 8, c.token_types = 2, c.embedding_norm = true;
  c.head = TransformerConfig::Head::replaced_tokens;
  for (const std::int64_t predicted : {0, 3}) {
    c.generator = {12, 3, 20, predicted};
    const Graph g = build_transformer(c);
    expect_well_formed(g);
    std::set<std::size_t> embeddings;
    int uses = 0;
    for (const Operator& op : g.operators) {
      if (op.name.find("embedding") == std::string::npos) continue;
      for (const ParameterId p : op.parameters) {
        ++uses;
        embeddings.insert(p.index());
      }
    }
    EXPECT_EQ(uses, 2 * 5);
    EXPECT_EQ(embeddings.size(), 5u);
  }
}

/// Two further tokens by one module have one module's parameters; by two, twice as many.
/// Blocks: of h = 64, two norms more of 64 each where they stand on both sides.
TEST(Transformer, NormsStandWhereTheFileSays) {
  TransformerConfig c;
  c.name = "norms", c.layers = 3, c.hidden = 64, c.heads = 4, c.ffn = 128, c.vocabulary = 50;
  c.sequence = 8;
  const auto count = [&](NormPosition at) {
    c.norm_position = at;
    return parameter_count(build_transformer(c));
  };
  const std::int64_t before = count(NormPosition::before);
  EXPECT_EQ(count(NormPosition::both), before + 3 * 2 * 64);
  EXPECT_EQ(count(NormPosition::output), before);
  EXPECT_EQ(count(NormPosition::after), before - 64);  // no norm behind the last
  // Experts wherever the norms are.
  c.moe = {};
  c.moe.experts = 4, c.moe.top_k = 2, c.moe.ffn = 32;
  const std::int64_t experts = count(NormPosition::before);
  EXPECT_EQ(count(NormPosition::after), experts - 64);
}

/// Token types and classes of tokens are neither cut over tp nor padded, as frameworks do.
TEST(Transformer, TokenTypesAreNoVocabulary) {
  const Graph bert = load_model("bert-large", {});
  bool found = false;
  for (const Operator& op : bert.operators) {
    const auto* e = std::get_if<Embedding>(&op.operation);
    if (e == nullptr || e->vocabulary != 2) continue;
    found = true;
    EXPECT_EQ(bert.parameter(op.parameters[0]).shape[0].dim, Dim::classes);
  }
  EXPECT_TRUE(found);
  const Graph padded = with_padded_vocabulary(bert, 1024);
  for (std::size_t i = 0; i < bert.operators.size(); ++i) {
    const auto* e = std::get_if<Embedding>(&padded.operators[i].operation);
    if (e != nullptr) {
      EXPECT_EQ(e->vocabulary, e->rows == Dim::classes ? 2 : 30720);
    }
  }
}

TEST(Catalogue, AHybridsPredictionModulesMayShareTheirParameters) {
  TransformerConfig c;
  c.layers = 3, c.hidden = 24, c.heads = 6, c.ffn = 32, c.vocabulary = 50, c.sequence = 8;
  c.pattern = "M*-", c.mtp_pattern = "*-";
  c.mamba.heads = 4, c.mamba.head_dim = 2, c.mamba.groups = 2, c.mamba.state = 3;
  const auto parameters = [&](int modules, bool shared) {
    c.mtp_layers = modules, c.mtp_shared = shared;
    const Graph g = build_transformer(c);
    expect_well_formed(g);
    return parameter_count(g);
  };
  const std::int64_t none = parameters(0, false), one = parameters(1, false);
  EXPECT_GT(one, none);
  EXPECT_EQ(parameters(1, true), one);
  EXPECT_EQ(parameters(2, true), one);
  EXPECT_EQ(parameters(2, false), 2 * one - none);
}

/// By hand: of a Mamba block its norm, a product to gate, x, B, C and steps (2 · 8 + 2 · 2 · 3 + 4
/// wide), 4 weights and a bias for each of 8 + 12 channels, three numbers a head, a norm of 8, the
/// product back.
TEST(Catalogue, AMambaBlockHasTheParametersOfItsPage) {
  TransformerConfig c;
  c.layers = 1, c.hidden = 10, c.heads = 2, c.vocabulary = 50, c.sequence = 8;
  c.pattern = "M";
  c.mamba.heads = 4, c.mamba.head_dim = 2, c.mamba.groups = 2, c.mamba.state = 3;
  EXPECT_EQ(parameter_count(build_transformer(c)),
            2 * 50 * 10 + 10 + 10 + 10 * (2 * 8 + 12 + 4) + 5 * 20 + 3 * 4 + 8 + 8 * 10);
}

TEST(Models, WhatIfChangesReachTheFile) {
  // Twice the feed-forward width: 3 matrices of 4096 x 14336 more in each of 32 blocks.
  ModelOptions options;
  options.edits = {{"transformer.ffn", "x2"}};
  EXPECT_EQ(parameter_count(load_model("llama-3-8b", options)),
            8'030'261'248 + 32LL * 3 * 4096 * 14336);
}

/// Counted by Hugging Face from the checkpoints' tensors, and by timm for the convolutional ones.
TEST(Catalogue, SizesAreThoseOfThePublishedCheckpoints) {
  const std::pair<const char*, std::int64_t> published[] = {
      // By hand: embeddings 23,841,792, 12 blocks of 7,087,872, the discriminator's head 592,130;
      // the
      // generator's projections 196,864 and 197,376, 12 blocks of 789,760, norm 1,536, bias 30,528.
      {"electra-base", 119'391'810},
      {"bert-base", 109'514'298},
      {"gpt2-medium", 354'823'168},
      {"gpt2-large", 774'030'080},
      {"gpt2-xl", 1'557'611'200},
      {"bloom-7b1", 7'069'016'064},
      {"vit-l-16", 304'326'632},
      {"bloom-176b", 176'247'271'424},
      {"deepseek-v2-lite", 15'706'484'224},
      {"gpt-neox-20b", 20'554'567'680},
      {"gpt-oss-120b", 116'829'156'672},
      {"gpt-oss-20b", 20'914'757'184},
      {"llama-13b", 13'015'864'320},
      {"llama-2-13b", 13'015'864'320},
      {"llama-2-70b", 68'976'648'192},
      {"llama-3.2-1b", 1'235'814'400},
      {"llama-3.2-3b", 3'212'749'824},
      {"llama-33b", 32'528'943'616},
      {"llama-65b", 65'285'660'672},
      {"llama-7b", 6'738'415'616},
      {"mistral-7b", 7'241'732'096},
      {"mixtral-8x22b", 140'630'071'296},
      {"qwen2.5-14b", 14'770'033'664},
      {"qwen2.5-32b", 32'763'876'352},
      {"qwen2.5-72b", 72'706'203'648},
      {"qwen2.5-7b", 7'615'616'512},
      {"qwen3-14b", 14'768'307'200},
      {"qwen3-235b-a22b", 235'093'634'560},
      {"qwen3-30b-a3b", 30'532'122'624},
      {"qwen3-32b", 32'762'123'264},
      {"qwen3-4b", 4'022'468'096},
      {"qwen3-8b", 8'190'735'360},
      {"resnet-101", 44'549'160},
      {"resnext-101-32x4d", 44'177'704},
      {"se-resnext-101-32x4d", 48'955'416}};
  for (const auto& [name, parameters] : published)
    EXPECT_EQ(parameter_count(load_model(name)), parameters) << name;
}

/// By hand from their config.json: tables, attention and two norms a block, one expert more that
/// sees every token, a router; of maverick's blocks every second is dense, twice as wide.
TEST(Catalogue, Llama4HasExpertsInEveryOrEverySecondBlock) {
  const std::int64_t h = 5120, vocabulary = 202'048, expert = 3 * h * 8192,
                     block = 2 * h * (40 + 8) * 128 + 2 * h,
                     rest = 2 * vocabulary * h + h + 48 * block;
  EXPECT_EQ(parameter_count(load_model("llama-4-maverick")),
            rest + 24 * (129 * expert + 128 * h) + 24 * 2 * expert);
  // Its queries and keys are normalised: two gains of 128 a block.
  EXPECT_EQ(parameter_count(load_model("llama-4-scout")),
            rest + 48 * (17 * expert + 16 * h + 2 * 128));
}

TEST(Catalogue, KnownModelsAreAllOfItWithTheirOtherNames) {
  std::set<std::string> names, aliases;
  for (const KnownModel& m : known_models()) {
    names.insert(m.name);
    for (const auto& alias : m.aliases) EXPECT_TRUE(aliases.insert(alias).second) << alias;
    if (m.transformer) {
      EXPECT_EQ(parameter_count(build_transformer(*m.transformer)),
                parameter_count(load_model(m.name)))
          << m.name;
    }
  }
  const auto all = model_catalogue();
  EXPECT_EQ(names, std::set<std::string>(all.begin(), all.end()));
  for (const auto& alias : aliases) EXPECT_EQ(names.count(alias), 0u) << alias;
}

}  // namespace
}  // namespace partita
