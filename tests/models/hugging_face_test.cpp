#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"
#include "models/models.h"
#include "tests/models/temporary_file.h"

namespace partita {
namespace {

using Json = nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

Json llama() {
  return {{"model_type", "llama"},    {"vocab_size", 96},       {"hidden_size", 48},
          {"intermediate_size", 112}, {"num_hidden_layers", 3}, {"num_attention_heads", 6},
          {"num_key_value_heads", 2}};
}

Graph load(const std::string& body, const ModelOptions& options = {}) {
  const TemporaryFile file("config.json", body);
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
std::string error_with(const char* key, const Json& value, const char* type = "llama") {
  Json config = llama();
  config["model_type"] = type;
  config[key] = value;
  return error(config.dump());
}

/// The attention operators, block by block.
std::vector<Attention> attentions(const Graph& g) {
  std::vector<Attention> all;
  for (const auto& op : g.operators) {
    if (const auto* a = std::get_if<Attention>(&op.operation)) all.push_back(*a);
  }
  return all;
}
std::vector<Rotary> rotaries(const Graph& g) {
  std::vector<Rotary> all;
  for (const auto& op : g.operators) {
    if (const auto* r = std::get_if<Rotary>(&op.operation)) all.push_back(*r);
  }
  return all;
}

TEST(HuggingFace, TakesTheFolderOfAConfigurationToo) {
  const TemporaryFile file("config.json", llama().dump());
  EXPECT_EQ(parameter_count(load_model(file.folder(), {})),
            parameter_count(load_model(file.path(), {})));
}

TEST(HuggingFace, DefaultsAreTheLibrarys) {
  const Graph g = load(llama().dump());
  EXPECT_EQ(g.sequence, 2048);  // max_position_embeddings of LlamaConfig
  EXPECT_EQ(g.name, "llama");
  EXPECT_EQ(attentions(g)[0].window, 0);
  EXPECT_EQ(rotaries(g)[0].rotated, 8);
  EXPECT_DOUBLE_EQ(rotaries(g)[0].base, 10000);
}

TEST(HuggingFace, LongReachesAreCutToWhatTrainingUses) {
  Json c = llama();
  c["max_position_embeddings"] = 131072;
  EXPECT_EQ(load(c.dump()).sequence, 8192);
  ModelOptions o;
  o.sequence = 131072;
  EXPECT_EQ(load(c.dump(), o).sequence, 131072);
}

TEST(HuggingFace, ReadsRotarySettingsOfBothVersions) {
  Json c = llama();
  c["rope_theta"] = 500000.0;
  EXPECT_DOUBLE_EQ(rotaries(load(c.dump()))[0].base, 500000);
  c.erase("rope_theta");
  c["rope_parameters"] = {{"rope_theta", 7000.0}, {"rope_type", "default"}};
  EXPECT_DOUBLE_EQ(rotaries(load(c.dump()))[0].base, 7000);
  c["model_type"] = "nemotron";
  EXPECT_EQ(rotaries(load(c.dump()))[0].rotated, 4);  // half of a head of 8
  c["partial_rotary_factor"] = 0.25;
  EXPECT_EQ(rotaries(load(c.dump()))[0].rotated, 2);
}

TEST(HuggingFace, SlidingWindowsFollowTheirModels) {
  const auto windows = [](const Json& c) {
    std::vector<std::int64_t> all;
    for (const auto& a : attentions(load(c.dump()))) all.push_back(a.window);
    return all;
  };
  using List = std::vector<std::int64_t>;
  Json c = llama();
  c["model_type"] = "mistral";
  EXPECT_EQ(windows(c), (List{4096, 4096, 4096}));
  c["sliding_window"] = nullptr;
  EXPECT_EQ(windows(c), (List{0, 0, 0}));
  c["model_type"] = "qwen2";
  c["sliding_window"] = 64;
  EXPECT_EQ(windows(c), (List{0, 0, 0}));
  c["use_sliding_window"] = true;
  c["max_window_layers"] = 2;
  EXPECT_EQ(windows(c), (List{0, 0, 64}));
  c["layer_types"] = {"sliding_attention", "full_attention", "full_attention"};
  EXPECT_EQ(windows(c), (List{64, 0, 0}));
  c.erase("layer_types");
  c["model_type"] = "gpt_oss";
  EXPECT_EQ(windows(c), (List{64, 0, 64}));
  for (const auto& a : attentions(load(c.dump()))) EXPECT_TRUE(a.sinks);
}

TEST(HuggingFace, RoutersFollowTheirModels) {
  const auto router = [](const Json& c) {
    for (const auto& op : load(c.dump()).operators) {
      if (const auto* r = std::get_if<Router>(&op.operation)) return *r;
    }
    return Router{0};
  };
  Json c = llama();
  c["model_type"] = "deepseek_v3";
  c["first_k_dense_replace"] = 1;
  c["n_routed_experts"] = 16;
  EXPECT_EQ(router(c), (Router{8, true, true, 2.5, 8, 4, 2}));
  c["n_group"] = 1;
  c["topk_group"] = 1;
  EXPECT_EQ(router(c), (Router{8, true, true, 2.5}));
  c["model_type"] = "deepseek_v2";
  c["num_experts_per_tok"] = 6;
  c["n_group"] = 4;
  c["topk_group"] = 2;
  EXPECT_EQ(router(c), (Router{6, false, false, 1})) << "topk_method is greedy";
  c["topk_method"] = "group_limited_greedy";
  EXPECT_EQ(router(c), (Router{6, false, false, 1, 4, 2, 1}));
  c["n_group"] = nullptr;
  EXPECT_EQ(router(c), (Router{6, false, false, 1}));
  c["model_type"] = "mixtral";
  c["num_experts_per_tok"] = 3;
  EXPECT_EQ(router(c), (Router{3, false, true, 1}));
}

TEST(HuggingFace, AHybridsBlocksAreReadByTheirNamesInAllVersions) {
  Json c = llama();
  c["model_type"] = "nemotron_h";
  c["hybrid_override_pattern"] = "M*-ME";
  EXPECT_EQ(load(c.dump()).layers, 3);  // as num_hidden_layers says
  c["num_hidden_layers"] = 6;
  EXPECT_THAT(error(c.dump()),
              HasSubstr("num_hidden_layers: is 6, and the pattern lists 5 blocks"));
  c.erase("num_hidden_layers");
  const Graph pattern = load(c.dump());
  EXPECT_EQ(pattern.layers, 5);
  EXPECT_TRUE(rotaries(pattern).empty());
  c.erase("hybrid_override_pattern");
  EXPECT_THAT(error(c.dump()), HasSubstr("hybrid_override_pattern: is missing"));
  c["layers_block_type"] = {"linear_attention", "full_attention", "mlp", "mamba", "moe"};
  EXPECT_EQ(parameter_count(load(c.dump())), parameter_count(pattern));
  c["layers_block_type"] = {"mamba", "mlp", "conv"};
  EXPECT_THAT(error(c.dump()), HasSubstr("layers_block_type: 'conv' is not supported"));
  c["hybrid_override_pattern"] = "M";
  c["mamba_proj_bias"] = true;
  EXPECT_THAT(error(c.dump()), HasSubstr("mamba_proj_bias: biases of Mamba's products"));
}

/// What the library counts of the published files.
TEST(HuggingFace, ParametersAreThoseOfPublishedFiles) {
  const auto count = [](const char* text) { return parameter_count(load(text)); };
  EXPECT_EQ(count(R"({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
      "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 18,
      "hidden_act": "gelu", "vocab_size": 256000})"),
            2'506'172'416);
  EXPECT_EQ(count(R"({"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336,
      "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "num_hidden_layers": 42,
      "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "vocab_size": 256000})"),
            9'241'705'984);
  EXPECT_EQ(count(R"({"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
      "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 26,
      "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144})"),
            999'885'952);
  EXPECT_EQ(count(R"({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
      "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
      "sliding_window": 2047, "vocab_size": 32064, "tie_word_embeddings": false})"),
            3'821'079'552);
  EXPECT_EQ(count(R"({"model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288,
      "num_attention_heads": 24, "num_key_value_heads": 2, "num_hidden_layers": 30,
      "sliding_window": 4096, "vocab_size": 49152})"),
            3'030'371'328);
  // Pythia 6.9B, GPT-J 6B, Falcon 7B and 40B, Phi-2, Command R, StableLM 3B, OPT 6.7B, StarCoder,
  // Mamba-2 2.7B.
  EXPECT_EQ(count(R"({"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384,
      "num_attention_heads": 32, "num_hidden_layers": 32, "rotary_pct": 0.25, "vocab_size": 50432,
      "tie_word_embeddings": false, "use_parallel_residual": true})"),
            6'857'302'016);
  EXPECT_EQ(count(R"({"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_layer": 28,
      "n_inner": null, "rotary_dim": 64, "n_positions": 2048, "vocab_size": 50400,
      "tie_word_embeddings": false})"),
            6'050'882'784);
  EXPECT_EQ(count(R"({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71,
      "num_hidden_layers": 32, "vocab_size": 65024, "multi_query": true, "parallel_attn": true,
      "new_decoder_architecture": false, "bias": false, "alibi": false})"),
            6'921'720'704);
  EXPECT_EQ(count(R"({"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128,
      "num_kv_heads": 8, "num_hidden_layers": 60, "vocab_size": 65024,
      "new_decoder_architecture": true})"),
            41'303'293'952);
  EXPECT_EQ(count(R"({"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
      "num_attention_heads": 32, "num_hidden_layers": 32, "partial_rotary_factor": 0.4,
      "vocab_size": 51200})"),
            2'779'683'840);
  EXPECT_EQ(count(R"({"model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528,
      "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 40,
      "logit_scale": 0.0625, "vocab_size": 256000})"),
            34'980'831'232);
  EXPECT_EQ(count(R"({"model_type": "stablelm", "hidden_size": 2560, "intermediate_size": 6912,
      "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
      "partial_rotary_factor": 0.25, "vocab_size": 50304, "use_qkv_bias": false})"),
            2'795'443'200);
  EXPECT_EQ(count(R"({"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384,
      "num_attention_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 2048,
      "vocab_size": 50272, "word_embed_proj_dim": 4096})"),
            6'658'473'984);
  EXPECT_EQ(count(R"({"model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_layer": 40,
      "n_inner": 24576, "n_positions": 8192, "vocab_size": 49152, "multi_query": true})"),
            15'517'456'384);
  EXPECT_EQ(count(R"({"model_type": "mamba2", "hidden_size": 2560, "num_hidden_layers": 64,
      "num_heads": 80, "head_dim": 64, "n_groups": 1, "state_size": 128, "vocab_size": 50288,
      "tie_word_embeddings": true})"),
            2'702'599'680);
}

/// What the keys decide in a block: its norms, whether feed-forward reads what attention made, how
/// many values are rotated.
TEST(HuggingFace, ResidualsOfTheFilesAreSequentialOrParallel) {
  const auto block = [](const std::string& text) {
    const Graph g = load(text);
    int norms = 0, sums = 0;
    std::int64_t rotated = 0;
    for (const Operator& op : g.operators) {
      if (op.layer != 0) continue;
      norms += std::holds_alternative<Normalize>(op.operation) ? 1 : 0;
      sums += op.name == "layers.0.branches" ? 1 : 0;
      if (const auto* r = std::get_if<Rotary>(&op.operation)) rotated = r->rotated;
    }
    return fmt::format("{} norms, {} sums, {} rotated", norms, sums, rotated);
  };
  const std::string sizes = R"("hidden_size": 64, "intermediate_size": 96, "vocab_size": 96,
      "num_attention_heads": 4, "num_hidden_layers": 2)";
  const auto of = [&](const std::string& more) { return block("{" + sizes + ", " + more + "}"); };
  EXPECT_EQ(of(R"("model_type": "gpt_neox")"), "2 norms, 1 sums, 4 rotated");
  EXPECT_EQ(of(R"("model_type": "gpt_neox", "use_parallel_residual": false, "rotary_pct": 0.5)"),
            "2 norms, 0 sums, 8 rotated");
  EXPECT_EQ(of(R"("model_type": "phi")"), "1 norms, 1 sums, 8 rotated");
  EXPECT_EQ(of(R"("model_type": "cohere")"), "1 norms, 1 sums, 16 rotated");
  EXPECT_EQ(of(R"("model_type": "stablelm")"), "2 norms, 0 sums, 4 rotated");
  EXPECT_EQ(of(R"("model_type": "stablelm", "use_parallel_residual": true)"),
            "1 norms, 1 sums, 4 rotated");
  EXPECT_EQ(of(R"("model_type": "falcon")"), "1 norms, 1 sums, 16 rotated");
  EXPECT_EQ(of(R"("model_type": "falcon", "parallel_attn": false)"), "2 norms, 0 sums, 16 rotated");
  EXPECT_EQ(of(R"("model_type": "falcon", "new_decoder_architecture": true, "num_kv_heads": 2)"),
            "2 norms, 1 sums, 16 rotated");
  EXPECT_EQ(of(R"("model_type": "falcon", "new_decoder_architecture": true,
                  "num_ln_in_parallel_attn": 1)"),
            "1 norms, 1 sums, 16 rotated");
  EXPECT_EQ(block(R"({"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2,
                      "rotary_dim": null, "vocab_size": 96})"),
            "1 norms, 1 sums, 16 rotated");
  const auto refused = [&](const std::string& more) {
    return error("{" + sizes + ", " + more + "}");
  };
  EXPECT_THAT(refused(R"("model_type": "falcon", "alibi": true)"),
              HasSubstr("alibi: attention with linear biases is not supported"));
  EXPECT_THAT(refused(R"("model_type": "phi", "qk_layernorm": true)"),
              HasSubstr("qk_layernorm: layer norms of queries and keys are not supported"));
  EXPECT_THAT(refused(R"("model_type": "cohere", "use_qk_norm": true)"),
              HasSubstr("use_qk_norm: layer norms of queries and keys"));
  EXPECT_THAT(refused(R"("model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32)"),
              HasSubstr("word_embed_proj_dim: is 32, not hidden_size 64"));
  EXPECT_THAT(refused(R"("model_type": "opt", "ffn_dim": 96, "do_layer_norm_before": false)"),
              HasSubstr("do_layer_norm_before: norms behind the residual"));
  EXPECT_THAT(refused(R"("model_type": "mamba2", "use_bias": true)"),
              HasSubstr("use_bias: biases of Mamba's products are not supported"));
  EXPECT_THAT(refused(R"("model_type": "mamba2", "num_heads": 4)"),
              HasSubstr("num_heads: 4 heads of 64 are not expand 2 times hidden_size 64"));
  EXPECT_THAT(refused(R"("model_type": "gpt_neox", "rotary_pct": 0)"),
              HasSubstr("rotary_pct: is 0; it must be above 0"));
}

TEST(HuggingFace, GemmasWindowsAlternate) {
  const auto windows = [](const std::string& more) {
    const Graph g = load(R"({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 7, "vocab_size": 96,
        "sliding_window": 16, )" +
                         more + "}");
    std::string all;
    for (const Operator& op : g.operators)
      if (const auto* a = std::get_if<Attention>(&op.operation)) all += a->window > 0 ? 'w' : '-';
    return all;
  };
  EXPECT_EQ(windows(R"("model_type": "gemma2")"), "w-w-w-w");
  EXPECT_EQ(windows(R"("model_type": "gemma3_text")"), "wwwww-w");
  EXPECT_EQ(windows(R"("model_type": "gemma3_text", "sliding_window_pattern": 2)"), "w-w-w-w");
}

TEST(HuggingFace, BadFilesSayWhatIsWrongAndWhere) {
  EXPECT_THAT(error(""), HasSubstr("config.json: is empty"));
  EXPECT_THAT(error(" \n"), HasSubstr("config.json: is empty"));
  const std::string whole = llama().dump();
  EXPECT_THAT(error(whole.substr(0, whole.size() / 2)), HasSubstr("config.json: is not JSON: "));
  EXPECT_THAT(error("[1, 2]"), HasSubstr("must be a JSON object"));
  EXPECT_THAT(error("{}"), HasSubstr("config.json: needs the key 'model_type'"));
  EXPECT_THAT(
      error_with("model_type", "llame"),
      AllOf(HasSubstr("config.json: model_type: 'llame' is not supported; did you mean 'llama'?"),
            HasSubstr("there are bert, cohere, deepseek_v2, deepseek_v3, falcon, gemma, gemma2, "
                      "gemma3_text, gpt2, gpt_bigcode, gpt_neox, gpt_oss, gptj, llama, mamba2, "
                      "mistral, mixtral, nemotron, nemotron_h, opt, phi, phi3, qwen2, qwen3, "
                      "qwen3_moe, stablelm, starcoder2, vit")));
  EXPECT_THAT(error_with("model_type", 3), HasSubstr("model_type: must be a string, found 3"));
  Json c = llama();
  c.erase("hidden_size");
  c["hiden_size"] = 48;
  EXPECT_THAT(error(c.dump()),
              HasSubstr("needs the key 'hidden_size'; did you mean 'hiden_size'?"));
  EXPECT_THAT(error_with("hidden_size", "48"),
              HasSubstr("config.json: hidden_size: must be a whole number, found \"48\""));
  EXPECT_THAT(error_with("hidden_size", 48.5),
              HasSubstr("hidden_size: must be a whole number, found 48.5"));
  EXPECT_THAT(error_with("num_hidden_layers", -2),
              HasSubstr("num_hidden_layers: is -2; it must be between 1 and 100000"));
  EXPECT_THAT(error_with("vocab_size", 18446744073709551615ULL),
              HasSubstr("vocab_size: is 184467440737"));
  EXPECT_THAT(error_with("tie_word_embeddings", 1),
              HasSubstr("tie_word_embeddings: must be true or false, found 1"));
  EXPECT_THAT(error_with("num_key_value_heads", 4),
              HasSubstr("4 key/value heads do not divide 6 attention heads"));
  EXPECT_THAT(error_with("hidden_act", "silo"),
              HasSubstr("hidden_act: activation 'silo' is not supported; did you mean 'silu'?"));
  EXPECT_THAT(error_with("partial_rotary_factor", 2), HasSubstr("partial_rotary_factor: is 2"));
  EXPECT_THAT(error_with("layer_types", {"full_attention"}, "qwen3"),
              HasSubstr("layer_types: names 1 layers of 3"));
  EXPECT_THAT(
      error_with("layer_types", {"full_attention", "linear_attention", "full_attention"}, "qwen3"),
      HasSubstr("layer_types: 'linear_attention' is not supported"));
  // What is not read can be described, or is in the catalogue.
  EXPECT_THAT(
      error_with("hidden_act", "gelu", "electra"),
      AllOf(HasSubstr("'electra' is not supported"),
            HasSubstr(
                "; the catalogue has electra-base, electra-large; others are described in YAML, "
                "schema partita.model/1 (docs/models.md)")));
  EXPECT_THAT(error_with("hidden_act", "silu", "mllama"),
              ::testing::Not(HasSubstr("did you mean")));
  EXPECT_THAT(error_with("hidden_act", "gelu", "bamba"),
              AllOf(HasSubstr("others are described in YAML"),
                    ::testing::Not(HasSubstr("the catalogue has"))));
  Json experts = llama();
  experts["model_type"] = "mixtral";
  experts["num_local_experts"] = 8;
  experts["num_experts_per_tok"] = 16;
  EXPECT_THAT(error(experts.dump()),
              HasSubstr("num_experts_per_tok: is 16, and the file has 8 experts; use at most"));
  // What a type does not read it refuses all the same.
  for (const char* type : {"llama", "mistral", "mixtral", "nemotron"}) {
    SCOPED_TRACE(type);
    EXPECT_THAT(error_with("layer_types", {"full_attention"}, type),
                HasSubstr("layer_types: names 1 layers of 3"));
    EXPECT_THAT(error_with("add_cross_attention", true, type),
                HasSubstr("add_cross_attention: cross attention is not supported"));
  }
  EXPECT_THAT(
      error_with("layer_types", {"full_attention", "sliding_attention", "full_attention"}, "llama"),
      HasSubstr("layer_types: 'sliding_attention' is nothing that this model_type has"));
  EXPECT_THAT(error_with("is_decoder", true, "bert"),
              HasSubstr("BERT as a decoder is not supported"));
  EXPECT_THAT(error_with("patch_size", 13, "vit"),
              HasSubstr("patches of 13 do not divide an image of 224"));
  EXPECT_THAT(error_with("image_size", {224, 112}, "vit"),
              HasSubstr("image_size: must be one number, or two equal ones"));
}

TEST(HuggingFace, ASequenceBeyondLearnedPositionsIsRefused) {
  const Json gpt{{"model_type", "gpt2"}, {"vocab_size", 97}, {"n_positions", 40},
                 {"n_embd", 24},         {"n_layer", 2},     {"n_head", 3}};
  ModelOptions o;
  o.sequence = 41;
  EXPECT_THAT(
      error(gpt.dump(), o),
      HasSubstr("a sequence of 41 tokens is longer than the 40 learned positions; use at most 40"));
}

TEST(HuggingFace, DamagedConfigurationsNeverCrash) {
  std::mt19937_64 rng{7};
  const std::string whole = llama().dump();
  for (int i = 0; i < 2000; ++i) {
    std::string body = whole;
    for (std::uint64_t k = 0; k <= rng() % 3; ++k) {
      // Keep digits' number small: a longer configuration is a larger network, not a damaged one.
      const std::size_t at = rng() % body.size();
      if (rng() % 2 == 0) {
        body.erase(at, 1 + rng() % 3);
      } else if (std::isdigit(static_cast<unsigned char>(body[at])) == 0) {
        body[at] = static_cast<char>(rng());
      }
      if (body.empty()) break;
    }
    error(body);
  }
}

}  // namespace
}  // namespace partita
