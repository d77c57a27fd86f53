// Each model_type follows the configuration class of that name in Hugging Face transformers, its
// defaults included: https://github.com/huggingface/transformers/tree/main/src/transformers/models
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "base/yaml.h"
#include "models/models.h"
#include "models/overrides.h"

namespace partita {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kLargest = std::int64_t{1} << 40;
constexpr std::int64_t kMostLayers = 100'000;
/// Configurations state how far a model can read, up to millions of tokens; training is rarely that
/// long.
constexpr std::int64_t kLongestDefaultSequence = 8192;

class JsonFile {
 public:
  JsonFile(const std::string& path, const std::vector<YamlEdit>& edits) : path_(path) {
    const std::string body = read_file(path);
    if (body.find_first_not_of(" \t\r\n") == std::string::npos) throw InputError(path, "is empty");
    try {
      root_ = Json::parse(body);
    } catch (const Json::exception& e) {
      throw InputError(path, fmt::format("is not JSON: {}", e.what()));
    }
    if (!root_.is_object()) throw InputError(path, "must be a JSON object, as config.json is");
    for (const YamlEdit& edit : edits) {
      if (!root_.contains(edit.path)) {
        std::vector<std::string> keys;
        for (const auto& [key, value] : root_.items()) keys.push_back(key);
        throw InputError(
            edit.path, fmt::format("is not in {}{}; there: {}", path, did_you_mean(edit.path, keys),
                                   fmt::join(keys, ", ")));
      }
      Json& there = root_[edit.path];
      const std::string text = multiplied(
          there.is_string() ? there.get<std::string>() : there.dump(), edit.value, edit.path);
      Json value = Json::parse(text, nullptr, false);
      there = value.is_discarded() ? Json(text) : value;
    }
  }

  std::int64_t number(const char* key, std::int64_t lowest = 1,
                      std::int64_t highest = kLargest) const {
    const Json* value = find(key);
    if (value == nullptr) missing(key);
    return whole(key, *value, lowest, highest);
  }
  std::int64_t number_or(const char* key, std::int64_t otherwise, std::int64_t lowest = 1) const {
    const Json* value = find(key);
    return value == nullptr ? otherwise : whole(key, *value, lowest, kLargest);
  }
  /// The library tells "not given" (its default) from null (none); so 0 for null.
  std::int64_t optional_number(const char* key, std::int64_t otherwise) const {
    if (root_.contains(key) && root_[key].is_null()) return 0;
    return number_or(key, otherwise, 0);
  }
  double real_or(const char* key, double otherwise) const { return real_in(root_, key, otherwise); }
  bool flag_or(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) wrong(key, *value, "true or false");
    return value->get<bool>();
  }
  std::string word_or(const char* key, const std::string& otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) wrong(key, *value, "a string");
    return value->get<std::string>();
  }
  std::string word(const char* key) const {
    if (find(key) == nullptr) missing(key);
    return word_or(key, "");
  }
  /// A list of whole numbers; empty when absent.
  std::vector<std::int64_t> numbers(const char* key) const {
    std::vector<std::int64_t> all;
    const Json* value = find(key);
    if (value == nullptr) return all;
    if (!value->is_array()) wrong(key, *value, "a list of whole numbers");
    for (const auto& item : *value) all.push_back(whole(key, item, 0, kLargest));
    return all;
  }
  std::vector<std::string> words(const char* key) const {
    std::vector<std::string> all;
    const Json* value = find(key);
    if (value == nullptr) return all;
    if (!value->is_array()) wrong(key, *value, "a list of strings");
    for (const auto& item : *value) {
      if (!item.is_string()) wrong(key, item, "a list of strings");
      all.push_back(item.get<std::string>());
    }
    return all;
  }
  /// One number, or two equal ones: [224, 224].
  std::int64_t side_or(const char* key, std::int64_t otherwise) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_array()) return number_or(key, otherwise);
    if (value->size() != 2 || (*value)[0] != (*value)[1]) {
      wrong(key, *value, "one number, or two equal ones");
    }
    return whole(key, (*value)[0], 1, kLargest);
  }
  /// Entries of an object; `otherwise` when absent.
  std::int64_t count_or(const char* key, std::int64_t otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_object()) wrong(key, *value, "an object");
    return static_cast<std::int64_t>(value->size());
  }
  /// Rotary settings stand at the top level or, since version 5 of the library, in rope_parameters.
  double rope_or(const char* key, double otherwise) const {
    const Json* nested = find("rope_parameters");
    if (nested != nullptr && nested->is_object() && nested->contains(key)) {
      return real_in(*nested, key, otherwise);
    }
    return real_in(root_, key, otherwise);
  }
  bool has(const char* key) const { return find(key) != nullptr; }

  [[noreturn]] void refuse(const char* key, const std::string& message) const {
    throw InputError(fmt::format("{}: {}", path_, key), message);
  }

 private:
  const Json* find(const char* key) const {
    const auto it = root_.find(key);
    return it == root_.end() || it->is_null() ? nullptr : &*it;
  }
  [[noreturn]] void missing(const char* key) const {
    std::vector<std::string> present;
    for (const auto& [name, value] : root_.items()) present.push_back(name);
    throw InputError(path_, fmt::format("needs the key '{}'{}", key, did_you_mean(key, present)));
  }
  [[noreturn]] void wrong(const char* key, const Json& value, const char* wanted) const {
    const std::string shown = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    refuse(key, fmt::format("must be {}, found {}", wanted,
                            shown.size() > 60 ? shown.substr(0, 60) + "..." : shown));
  }
  std::int64_t whole(const char* key, const Json& value, std::int64_t lowest,
                     std::int64_t highest) const {
    if (!value.is_number_integer()) wrong(key, value, "a whole number");
    // Unsigned values above the signed range would wrap.
    const bool huge = value.is_number_unsigned() &&
                      value.get<std::uint64_t>() > static_cast<std::uint64_t>(highest);
    const std::int64_t n = huge ? highest : value.get<std::int64_t>();
    if (huge || n < lowest || n > highest) {
      refuse(key,
             fmt::format("is {}; it must be between {} and {}", value.dump(), lowest, highest));
    }
    return n;
  }
  double real_in(const Json& object, const char* key, double otherwise) const {
    const auto it = object.find(key);
    if (it == object.end() || it->is_null()) return otherwise;
    if (!it->is_number()) wrong(key, *it, "a number");
    return it->get<double>();
  }

  std::string path_;
  Json root_;
};

ActivationKind activation(const JsonFile& f, const char* key, const std::string& otherwise) {
  static constexpr std::array<std::pair<std::string_view, ActivationKind>, 11> kKnown{
      {{"silu", ActivationKind::silu},
       {"swish", ActivationKind::silu},
       {"gelu", ActivationKind::gelu},
       {"gelu_new", ActivationKind::gelu_tanh},
       {"gelu_fast", ActivationKind::gelu_tanh},
       {"gelu_pytorch_tanh", ActivationKind::gelu_tanh},
       {"gelu_accurate", ActivationKind::gelu_tanh},
       {"relu", ActivationKind::relu},
       {"relu2", ActivationKind::squared_relu},
       {"sigmoid", ActivationKind::sigmoid},
       {"tanh", ActivationKind::tanh}}};
  const std::string found = f.word_or(key, otherwise);
  std::vector<std::string> names;
  for (const auto& [name, kind] : kKnown) {
    if (name == found) return kind;
    names.emplace_back(name);
  }
  f.refuse(key, fmt::format("activation '{}' is not supported{}; there are {}", found,
                            did_you_mean(found, names), fmt::join(names, ", ")));
}

constexpr std::string_view kSlides = "sliding_attention";

/// `layer_types` of a file that has them: sliding_attention and full_attention, one a block.
std::vector<std::string> types_of_layers(const JsonFile& f, int layers) {
  std::vector<std::string> types = f.words("layer_types");
  if (!types.empty() && types.size() != static_cast<std::size_t>(layers)) {
    f.refuse("layer_types", fmt::format("names {} layers of {}", types.size(), layers));
  }
  for (const std::string& type : types) {
    if (type != kSlides && type != "full_attention") {
      f.refuse("layer_types", fmt::format("'{}' is not supported; there are sliding_attention, "
                                          "full_attention",
                                          type));
    }
  }
  return types;
}

/// What the decoders that descend from LLaMA have in common.
struct Defaults {
  std::int64_t kv_heads = 0;  ///< 0: as many as heads
  std::int64_t head_dim = 0;  ///< 0: hidden / heads
  std::int64_t reach = 0;     ///< max_position_embeddings
  double epsilon = 1e-6;
  double rotary_base = 10000;
  double rotated = 1;  ///< partial_rotary_factor
  const char* act = "silu";
  const char* epsilon_key = "rms_norm_eps";
  double deviation = 0.02;
  bool slides = false;  ///< some have windows: read_windows() follows
};

TransformerConfig llama_like(const JsonFile& f, const Defaults& d) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("num_hidden_layers", 1, kMostLayers));
  c.hidden = f.number("hidden_size");
  c.heads = f.number("num_attention_heads");
  c.kv_heads = f.number_or("num_key_value_heads", d.kv_heads > 0 ? d.kv_heads : c.heads);
  c.head_dim = f.number_or(
      "head_dim", d.head_dim > 0 ? d.head_dim : std::max<std::int64_t>(c.hidden / c.heads, 1));
  c.ffn = f.number("intermediate_size");
  c.vocabulary = f.number("vocab_size");
  c.sequence = std::min(f.number_or("max_position_embeddings", d.reach), kLongestDefaultSequence);
  c.norm_epsilon = f.real_or(d.epsilon_key, d.epsilon);
  const double share = f.rope_or("partial_rotary_factor", d.rotated);
  if (!(share > 0 && share <= 1)) {
    f.refuse("partial_rotary_factor",
             fmt::format("is {}; it must be above 0 and at most 1", share));
  }
  c.rotary_dim = static_cast<std::int64_t>(std::floor(static_cast<double>(c.head_dim) * share));
  c.rotary_base = f.rope_or("rope_theta", d.rotary_base);
  c.activation = activation(f, "hidden_act", d.act);
  c.tied = f.flag_or("tie_word_embeddings", false);
  c.initial_deviation = f.real_or("initializer_range", d.deviation);
  const auto types = types_of_layers(f, c.layers);
  if (!d.slides && std::find(types.begin(), types.end(), kSlides) != types.end()) {
    f.refuse("layer_types", fmt::format("'{}' is nothing that this model_type has; there is "
                                        "full_attention",
                                        kSlides));
  }
  return c;
}

/// Which blocks slide: `layer_types` where it is given, else by `slides(i)`.
template <class Rule>
void read_windows(const JsonFile& f, TransformerConfig& c, std::int64_t window, Rule slides) {
  const auto types = types_of_layers(f, c.layers);
  bool any = false;
  c.windowed_layers.assign(static_cast<std::size_t>(c.layers), 0);
  for (std::size_t i = 0; i < c.windowed_layers.size(); ++i) {
    const bool slide = types.empty() ? slides(static_cast<std::int64_t>(i)) : types[i] == kSlides;
    c.windowed_layers[i] = slide ? 1 : 0;
    any |= slide;
  }
  c.window = any ? window : 0;
}

TransformerConfig llama(const JsonFile& f) {
  Defaults d;
  d.reach = 2048;
  TransformerConfig c = llama_like(f, d);
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  c.mlp_bias = f.flag_or("mlp_bias", false);
  return c;
}

/// Where layer_types do not say otherwise all blocks slide, if any.
void same_windows(const JsonFile& f, TransformerConfig& c, std::int64_t otherwise) {
  read_windows(f, c, f.optional_number("sliding_window", otherwise),
               [](std::int64_t) { return true; });
}

TransformerConfig mistral(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.kv_heads = 8;
  d.reach = 4096 * 32;
  TransformerConfig c = llama_like(f, d);
  same_windows(f, c, 4096);
  return c;
}

TransformerConfig mixtral(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.kv_heads = 8;
  d.reach = 4096 * 32;
  d.epsilon = 1e-5;
  d.rotary_base = 1e6;
  TransformerConfig c = llama_like(f, d);
  same_windows(f, c, 0);
  c.moe.experts = f.number_or("num_local_experts", 8);
  c.moe.top_k = f.number_or("num_experts_per_tok", 2);
  c.moe.ffn = c.ffn;
  return c;
}

TransformerConfig gpt2(const JsonFile& f) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("n_layer", 1, kMostLayers));
  c.hidden = f.number("n_embd");
  c.heads = f.number("n_head");
  c.ffn = f.number_or("n_inner", 4 * c.hidden);
  c.vocabulary = f.number("vocab_size");
  c.positions = c.sequence = f.number_or("n_positions", 1024);
  c.norm = TransformerConfig::Norm::layer;
  c.norm_epsilon = f.real_or("layer_norm_epsilon", 1e-5);
  c.activation = activation(f, "activation_function", "gelu_new");
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.initial_deviation = f.real_or("initializer_range", 0.02);
  return c;
}

/// Multi-query attention, else as GPT-2.
TransformerConfig gpt_bigcode(const JsonFile& f) {
  TransformerConfig c = gpt2(f);
  if (f.flag_or("multi_query", true)) c.kv_heads = 1;
  if (!f.has("activation_function")) c.activation = ActivationKind::gelu_tanh;
  return c;
}

TransformerConfig gptj(const JsonFile& f) {
  TransformerConfig c = gpt2(f);
  c.sequence = f.number_or("n_positions", 2048);
  c.positions = 0;
  const std::int64_t rotated = f.optional_number("rotary_dim", 64);
  c.rotary_dim = rotated > 0 ? rotated : c.hidden / c.heads;
  c.residual = Residual::parallel_one_norm;
  c.qkv_bias = c.attention_output_bias = false;
  c.head_bias = true;
  c.tied = f.flag_or("tie_word_embeddings", false);
  return c;
}

TransformerConfig opt(const JsonFile& f) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("num_hidden_layers", 1, kMostLayers));
  c.hidden = f.number("hidden_size");
  c.heads = f.number("num_attention_heads");
  c.ffn = f.number("ffn_dim");
  c.vocabulary = f.number("vocab_size");
  c.sequence = f.number_or("max_position_embeddings", 2048);
  c.positions = c.sequence + 2;  // the first two are padding's
  c.norm = TransformerConfig::Norm::layer;
  c.activation = activation(f, "activation_function", "relu");
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = f.flag_or("enable_bias", true);
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.initial_deviation = f.real_or("init_std", 0.02);
  if (!f.flag_or("do_layer_norm_before", true))
    f.refuse("do_layer_norm_before", "norms behind the residual (OPT 350M) are not supported");
  if (const std::int64_t width = f.number_or("word_embed_proj_dim", c.hidden); width != c.hidden)
    f.refuse("word_embed_proj_dim",
             fmt::format("is {}, not hidden_size {}: projected embeddings (OPT 350M) are not "
                         "supported",
                         width, c.hidden));
  if (!f.flag_or("layer_norm_elementwise_affine", true))
    f.refuse("layer_norm_elementwise_affine", "norms without parameters are not supported");
  return c;
}

/// Decoders of llama_like()'s keys whose norms are layer norms.
TransformerConfig layer_normed(const JsonFile& f, Defaults d) {
  d.epsilon = 1e-5;
  d.epsilon_key = "layer_norm_eps";
  TransformerConfig c = llama_like(f, d);
  c.norm = TransformerConfig::Norm::layer;
  for (const char* key : {"qk_layernorm", "use_qk_norm"}) {
    if (f.flag_or(key, false)) f.refuse(key, "layer norms of queries and keys are not supported");
  }
  return c;
}

TransformerConfig gpt_neox(const JsonFile& f) {
  Defaults d;
  d.act = "gelu";
  d.reach = 2048;
  d.rotated = f.real_or("rotary_pct", 0.25);
  if (!(d.rotated > 0 && d.rotated <= 1))
    f.refuse("rotary_pct", fmt::format("is {}; it must be above 0 and at most 1", d.rotated));
  d.rotary_base = f.real_or("rotary_emb_base", 10000);
  TransformerConfig c = layer_normed(f, d);
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", true);
  c.mlp_bias = true;
  if (f.flag_or("use_parallel_residual", true)) c.residual = Residual::parallel;
  return c;
}

TransformerConfig phi(const JsonFile& f) {
  Defaults d;
  d.act = "gelu_new";
  d.reach = 2048;
  d.rotated = 0.5;
  TransformerConfig c = layer_normed(f, d);
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = c.head_bias = true;
  c.residual = Residual::parallel_one_norm;
  return c;
}

TransformerConfig stablelm(const JsonFile& f) {
  Defaults d;
  d.reach = 4096;
  d.rotated = 0.25;
  TransformerConfig c = layer_normed(f, d);
  c.qkv_bias = f.flag_or("use_qkv_bias", false);
  if (f.flag_or("use_parallel_residual", false)) c.residual = Residual::parallel_one_norm;
  return c;
}

TransformerConfig cohere(const JsonFile& f) {
  Defaults d;
  d.reach = 8192;
  TransformerConfig c = layer_normed(f, d);
  c.norm_bias = false;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.residual = Residual::parallel_one_norm;
  return c;
}

TransformerConfig falcon(const JsonFile& f) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("num_hidden_layers", 1, kMostLayers));
  c.hidden = f.number("hidden_size");
  c.heads = f.number("num_attention_heads");
  const bool groups = f.flag_or("new_decoder_architecture", false);
  if (groups) {
    c.kv_heads = f.number_or("num_kv_heads", c.heads);
  } else if (f.flag_or("multi_query", true)) {
    c.kv_heads = 1;
  }
  c.ffn = f.number_or("ffn_hidden_size", 4 * c.hidden);
  c.vocabulary = f.number("vocab_size");
  c.sequence = std::min(f.number_or("max_position_embeddings", 2048), kLongestDefaultSequence);
  c.norm = TransformerConfig::Norm::layer;
  c.norm_epsilon = f.real_or("layer_norm_epsilon", 1e-5);
  if (f.flag_or("alibi", false))
    f.refuse("alibi", "attention with linear biases is not supported; rotary positions are");
  c.rotary_dim = c.hidden / c.heads;
  c.rotary_base = f.rope_or("rope_theta", 10000);
  c.activation = activation(f, "activation", "gelu");
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = f.flag_or("bias", false);
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.initial_deviation = f.real_or("initializer_range", 0.02);
  const std::int64_t norms = f.number_or("num_ln_in_parallel_attn", groups ? 2 : 1);
  if (groups && norms == 2) {
    c.residual = Residual::parallel;
  } else if (groups || f.flag_or("parallel_attn", true)) {
    c.residual = Residual::parallel_one_norm;
  }
  return c;
}

/// Google's files name their activation twice; the library takes hidden_activation.
TransformerConfig gemma_like(const JsonFile& f, Defaults d) {
  d.act = "gelu_pytorch_tanh";
  d.head_dim = 256;
  d.reach = 8192;
  TransformerConfig c = llama_like(f, d);
  c.activation = activation(f, "hidden_activation", "gelu_pytorch_tanh");
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  return c;
}

TransformerConfig gemma(const JsonFile& f) { return gemma_like(f, {}); }

TransformerConfig gemma2(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  TransformerConfig c = gemma_like(f, d);
  c.norm_position = NormPosition::both;
  read_windows(f, c, f.optional_number("sliding_window", 4096),
               [](std::int64_t i) { return i % 2 == 0; });
  return c;
}

TransformerConfig gemma3(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.reach = 131072;
  TransformerConfig c = gemma_like(f, d);
  c.norm_position = NormPosition::both;
  c.qk_norm = true;
  const std::int64_t every = std::max<std::int64_t>(1, f.number_or("sliding_window_pattern", 6));
  read_windows(f, c, f.optional_number("sliding_window", 4096),
               [&](std::int64_t i) { return (i + 1) % every != 0; });
  return c;
}

/// Query, key and value are one product in its file, gate and up another: the same sizes.
TransformerConfig phi3(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.reach = 4096;
  d.epsilon = 1e-5;
  TransformerConfig c = llama_like(f, d);
  same_windows(f, c, 0);
  return c;
}

TransformerConfig starcoder2(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.kv_heads = 2;
  d.reach = 4096;
  d.epsilon = 1e-5;
  d.epsilon_key = "norm_epsilon";
  d.act = "gelu_pytorch_tanh";
  d.deviation = 0.018042;
  TransformerConfig c = llama_like(f, d);
  same_windows(f, c, 0);
  c.norm = TransformerConfig::Norm::layer;
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = f.flag_or("use_bias", true);
  c.tied = f.flag_or("tie_word_embeddings", true);
  return c;
}

/// Qwen slides from block max_window_layers on, where it slides at all.
void qwen_windows(const JsonFile& f, TransformerConfig& c, std::int64_t first) {
  const bool used = f.flag_or("use_sliding_window", false);
  const std::int64_t window = used ? f.optional_number("sliding_window", 4096) : 0;
  read_windows(f, c, window, [&](std::int64_t i) { return window > 0 && i >= first; });
}

TransformerConfig qwen2(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.kv_heads = 32;
  d.reach = 32768;
  TransformerConfig c = llama_like(f, d);
  c.qkv_bias = true;
  qwen_windows(f, c, f.number_or("max_window_layers", 28, 0));
  return c;
}

TransformerConfig qwen3_base(const JsonFile& f, std::int64_t kv_heads, std::int64_t head_dim) {
  Defaults d;
  d.slides = true;
  d.kv_heads = kv_heads;
  d.head_dim = head_dim;
  d.reach = 32768;
  TransformerConfig c = llama_like(f, d);
  c.qk_norm = true;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  return c;
}

TransformerConfig qwen3(const JsonFile& f) {
  TransformerConfig c = qwen3_base(f, 32, 128);
  qwen_windows(f, c, f.number_or("max_window_layers", 28, 0));
  return c;
}

TransformerConfig qwen3_moe(const JsonFile& f) {
  TransformerConfig c = qwen3_base(f, 4, 0);
  qwen_windows(f, c, 0);
  c.moe.experts = f.number_or("num_experts", 128);
  c.moe.top_k = f.number_or("num_experts_per_tok", 8);
  c.moe.ffn = f.number_or("moe_intermediate_size", 768);
  c.moe.normalise = f.flag_or("norm_topk_prob", false);
  c.moe.every = static_cast<int>(std::min(f.number_or("decoder_sparse_step", 1), kMostLayers));
  c.moe.dense_layers = f.numbers("mlp_only_layers");
  return c;
}

TransformerConfig deepseek(const JsonFile& f, bool third) {
  Defaults d;
  d.reach = third ? 4096 : 2048;
  // DeepSeek's own head_dim is the rotated part; the latent dimensions say the rest.
  d.head_dim = 2;
  TransformerConfig c = llama_like(f, d);
  c.kv_heads = c.heads;
  c.head_dim = 0;
  c.rotary_dim = 0;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  c.mlp_bias = !third && f.flag_or("mlp_bias", false);
  c.latent.query_rank = f.optional_number("q_lora_rank", 1536);
  c.latent.key_value_rank = f.number_or("kv_lora_rank", 512);
  c.latent.nope_dim = f.number_or("qk_nope_head_dim", 128);
  c.latent.rope_dim = f.number_or("qk_rope_head_dim", 64);
  c.latent.value_dim = f.number_or("v_head_dim", 128);
  c.moe.experts = f.number_or("n_routed_experts", third ? 256 : 64);
  c.moe.top_k = third ? f.number_or("num_experts_per_tok", 8) : f.number("num_experts_per_tok");
  c.moe.ffn = f.number_or("moe_intermediate_size", third ? 2048 : 1407);
  c.moe.shared_ffn = c.moe.ffn * f.optional_number("n_shared_experts", third ? 1 : 2);
  c.moe.first_dense = static_cast<int>(
      std::min(f.optional_number("first_k_dense_replace", third ? 3 : 0), kMostLayers));
  c.moe.sigmoid = third;
  c.moe.normalise = f.flag_or("norm_topk_prob", third);
  c.moe.scale = f.real_or("routed_scaling_factor", third ? 2.5 : 1.0);
  // By the best expert of each, or by the two best.
  const bool limited = third || f.word_or("topk_method", "greedy") == "group_limited_greedy";
  if (const std::int64_t n = limited ? f.optional_number("n_group", third ? 8 : 1) : 1; n > 1) {
    c.moe.groups = n;
    c.moe.top_groups = f.number_or("topk_group", third ? 4 : 1);
    c.moe.group_best = third ? 2 : 1;
  }
  return c;
}
TransformerConfig deepseek_v2(const JsonFile& f) { return deepseek(f, false); }
TransformerConfig deepseek_v3(const JsonFile& f) { return deepseek(f, true); }

TransformerConfig gpt_oss(const JsonFile& f) {
  Defaults d;
  d.slides = true;
  d.kv_heads = 8;
  d.head_dim = 64;
  d.reach = 131072;
  d.epsilon = 1e-5;
  d.rotary_base = 150000;
  TransformerConfig c = llama_like(f, d);
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", true);
  c.limited_activation = c.sinks = true;
  read_windows(f, c, f.optional_number("sliding_window", 128),
               [](std::int64_t i) { return i % 2 == 0; });
  c.moe.experts = f.number_or("num_local_experts", 128);
  c.moe.top_k = f.number_or("num_experts_per_tok", 4);
  c.moe.ffn = c.ffn;
  c.moe.router_bias = c.moe.expert_bias = true;
  return c;
}

TransformerConfig nemotron(const JsonFile& f) {
  Defaults d;
  d.reach = 4096;
  d.epsilon = 1e-5;
  d.epsilon_key = "norm_eps";
  d.rotated = 0.5;
  d.act = "relu2";
  d.deviation = 0.0134;
  TransformerConfig c = llama_like(f, d);
  c.norm = TransformerConfig::Norm::layer;
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  c.mlp_bias = f.flag_or("mlp_bias", false);
  return c;
}

/// "M-M*E" by what the library calls the blocks, in its versions 4 and 5.
std::string pattern_of(const JsonFile& f, const char* pattern_key, const char* list_key) {
  const std::string given = f.word_or(pattern_key, "");
  if (!given.empty()) return given;
  static constexpr std::array<std::pair<std::string_view, char>, 6> kBlocks{
      {{"mamba", 'M'},
       {"linear_attention", 'M'},
       {"attention", '*'},
       {"full_attention", '*'},
       {"mlp", '-'},
       {"moe", 'E'}}};
  std::string pattern;
  for (const std::string& word : f.words(list_key)) {
    const auto* found = std::find_if(kBlocks.begin(), kBlocks.end(),
                                     [&](const auto& block) { return block.first == word; });
    if (found == kBlocks.end()) {
      f.refuse(list_key, fmt::format("'{}' is not supported; there are linear_attention, "
                                     "full_attention, mlp, moe",
                                     word));
    }
    pattern += found->second;
  }
  return pattern;
}

TransformerConfig nemotron_h(const JsonFile& f) {
  TransformerConfig c;
  c.pattern = pattern_of(f, "hybrid_override_pattern", "layers_block_type");
  if (c.pattern.empty()) {
    f.refuse("hybrid_override_pattern",
             "is missing, and so is layers_block_type; give one of them");
  }
  const auto listed = static_cast<std::int64_t>(c.pattern.size());
  const std::int64_t layers = f.number_or("num_hidden_layers", listed);
  if (layers > listed)
    f.refuse(
        "num_hidden_layers",
        fmt::format("is {}, and the pattern lists {} blocks; add to the pattern", layers, listed));
  c.pattern.resize(static_cast<std::size_t>(layers));
  c.layers = static_cast<int>(layers);
  c.hidden = f.number("hidden_size");
  c.heads = f.number("num_attention_heads");
  c.kv_heads = f.number_or("num_key_value_heads", 8);
  c.head_dim = f.number_or("head_dim", f.number_or("attention_head_dim", 128));
  c.vocabulary = f.number("vocab_size");
  c.sequence = std::min(f.number_or("max_position_embeddings", 4096), kLongestDefaultSequence);
  c.norm_epsilon = f.real_or("layer_norm_epsilon", 1e-5);
  c.activation = activation(f, "mlp_hidden_act", "relu2");
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = f.flag_or("attention_bias", false);
  c.mlp_bias = f.flag_or("mlp_bias", false);
  // The library never ties its tables.
  c.initial_deviation = f.real_or("initializer_range", 0.02);
  const auto has = [&](char mixer) { return c.pattern.find(mixer) != std::string::npos; };
  if (has('-')) c.ffn = f.number("intermediate_size");
  if (has('M')) {
    for (const char* key : {"use_bias", "mamba_proj_bias"}) {
      if (f.flag_or(key, false)) f.refuse(key, "biases of Mamba's products are not supported");
    }
    c.mamba.heads = f.number_or("mamba_num_heads", 128);
    c.mamba.head_dim = f.number_or("mamba_head_dim", 64);
    c.mamba.groups = f.number_or("n_groups", f.number_or("mamba_n_groups", 8));
    c.mamba.state = f.number_or("ssm_state_size", 128);
    c.mamba.kernel = f.number_or("conv_kernel", f.number_or("mamba_d_conv", 4));
    c.mamba.chunk = f.number_or("chunk_size", f.number_or("mamba_chunk_size", 128));
    c.mamba.convolution_bias = f.flag_or("use_conv_bias", f.flag_or("mamba_conv_bias", true));
  }
  if (has('E')) {
    c.moe.experts = f.number_or("n_routed_experts", 8);
    c.moe.top_k = f.number_or("num_experts_per_tok", 2);
    c.moe.ffn = f.number_or("moe_intermediate_size", 7688);
    c.moe.shared_ffn = f.number_or("moe_shared_expert_intermediate_size", 7688);
    c.moe.latent = f.optional_number("moe_latent_size", 0);
    c.moe.sigmoid = true;
    c.moe.normalise = f.flag_or("norm_topk_prob", true);
    c.moe.scale = f.real_or("routed_scaling_factor", 1);
  }
  return c;
}

TransformerConfig mamba2(const JsonFile& f) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("num_hidden_layers", 1, kMostLayers));
  c.pattern.assign(static_cast<std::size_t>(c.layers), 'M');
  c.hidden = f.number("hidden_size");
  c.heads = 1;  // of attention, which no block has
  c.vocabulary = f.number("vocab_size");
  c.sequence = 2048;  // the file names none
  c.norm_epsilon = f.real_or("layer_norm_epsilon", 1e-5);
  if (f.flag_or("use_bias", false))
    f.refuse("use_bias", "biases of Mamba's products are not supported");
  if (!f.flag_or("rms_norm", true))
    f.refuse("rms_norm", "blocks without a gated norm are not supported");
  c.mamba.heads = f.number_or("num_heads", 128);
  c.mamba.head_dim = f.number_or("head_dim", 64);
  if (const std::int64_t expand = f.number_or("expand", 2);
      c.mamba.heads * c.mamba.head_dim != expand * c.hidden)
    f.refuse("num_heads", fmt::format("{} heads of {} are not expand {} times hidden_size {}",
                                      c.mamba.heads, c.mamba.head_dim, expand, c.hidden));
  c.mamba.groups = f.number_or("n_groups", 8);
  c.mamba.state = f.number_or("state_size", 128);
  c.mamba.kernel = f.number_or("conv_kernel", 4);
  c.mamba.chunk = f.number_or("chunk_size", 256);
  c.mamba.convolution_bias = f.flag_or("use_conv_bias", true);
  c.tied = f.flag_or("tie_word_embeddings", false);
  c.initial_deviation = f.real_or("initializer_range", 0.1);
  return c;
}

TransformerConfig encoder(const JsonFile& f) {
  TransformerConfig c;
  c.layers = static_cast<int>(f.number("num_hidden_layers", 1, kMostLayers));
  c.hidden = f.number("hidden_size");
  c.heads = f.number("num_attention_heads");
  c.ffn = f.number("intermediate_size");
  c.norm = TransformerConfig::Norm::layer;
  c.norm_epsilon = f.real_or("layer_norm_eps", 1e-12);
  c.activation = activation(f, "hidden_act", "gelu");
  c.gated = false;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.causal = false;
  c.initial_deviation = f.real_or("initializer_range", 0.02);
  return c;
}

TransformerConfig bert(const JsonFile& f) {
  if (f.flag_or("is_decoder", false)) {
    f.refuse("is_decoder", "BERT as a decoder is not supported");
  }
  if (const auto kind = f.word_or("position_embedding_type", "absolute"); kind != "absolute") {
    f.refuse("position_embedding_type",
             fmt::format("'{}' is not supported; there is absolute", kind));
  }
  TransformerConfig c = encoder(f);
  c.vocabulary = f.number("vocab_size");
  c.positions = c.sequence = f.number_or("max_position_embeddings", 512);
  c.norm_position = NormPosition::after;
  c.token_types = f.number_or("type_vocab_size", 2);
  c.embedding_norm = true;
  c.tied = f.flag_or("tie_word_embeddings", true);
  c.head = TransformerConfig::Head::masked_language_model;
  return c;
}

TransformerConfig vit(const JsonFile& f) {
  TransformerConfig c = encoder(f);
  c.image = f.side_or("image_size", 224);
  c.patch = f.side_or("patch_size", 16);
  c.channels = f.number_or("num_channels", 3);
  if (c.image % c.patch != 0) {
    f.refuse("patch_size",
             fmt::format("patches of {} do not divide an image of {}", c.patch, c.image));
  }
  c.qkv_bias = f.flag_or("qkv_bias", true);
  c.vocabulary = f.count_or("id2label", f.number_or("num_labels", 2));
  c.head = TransformerConfig::Head::classifier;
  return c;
}

struct ModelType {
  std::string_view name;
  TransformerConfig (*read)(const JsonFile& file);
};
constexpr std::array<ModelType, 28> kModelTypes{{{"bert", bert},
                                                 {"cohere", cohere},
                                                 {"deepseek_v2", deepseek_v2},
                                                 {"deepseek_v3", deepseek_v3},
                                                 {"falcon", falcon},
                                                 {"gemma", gemma},
                                                 {"gemma2", gemma2},
                                                 {"gemma3_text", gemma3},
                                                 {"gpt2", gpt2},
                                                 {"gpt_bigcode", gpt_bigcode},
                                                 {"gpt_neox", gpt_neox},
                                                 {"gpt_oss", gpt_oss},
                                                 {"gptj", gptj},
                                                 {"llama", llama},
                                                 {"mamba2", mamba2},
                                                 {"mistral", mistral},
                                                 {"mixtral", mixtral},
                                                 {"nemotron", nemotron},
                                                 {"nemotron_h", nemotron_h},
                                                 {"opt", opt},
                                                 {"phi", phi},
                                                 {"phi3", phi3},
                                                 {"qwen2", qwen2},
                                                 {"qwen3", qwen3},
                                                 {"qwen3_moe", qwen3_moe},
                                                 {"stablelm", stablelm},
                                                 {"starcoder2", starcoder2},
                                                 {"vit", vit}}};

/// "; the catalogue has gpt-neox-20b": networks whose names begin as a model_type does; "" none.
std::string in_catalogue(const std::string& type) {
  const auto plain = [](std::string name) {
    name.erase(
        std::remove_if(name.begin(), name.end(), [](char c) { return c == '-' || c == '_'; }),
        name.end());
    return name;
  };
  std::vector<std::string> alike;
  for (const std::string& name : model_catalogue()) {
    if (plain(name).starts_with(plain(type))) alike.push_back(name);
  }
  return alike.empty() ? "" : fmt::format("; the catalogue has {}", fmt::join(alike, ", "));
}

}  // namespace

Graph import_hugging_face(const std::string& path, const ModelOptions& options) {
  check_options(options);
  const JsonFile file(path, options.edits);
  const std::string type = file.word("model_type");
  std::vector<std::string> known;
  for (const ModelType& candidate : kModelTypes) {
    known.emplace_back(candidate.name);
    if (candidate.name != type) continue;
    if (file.flag_or("add_cross_attention", false)) {
      file.refuse("add_cross_attention", "cross attention is not supported");
    }
    TransformerConfig config = candidate.read(file);
    if (config.moe.top_k > config.moe.experts && config.moe.experts > 0) {
      file.refuse("num_experts_per_tok",
                  fmt::format("is {}, and the file has {} experts; use at most as many",
                              config.moe.top_k, config.moe.experts));
    }
    config.name = path;
    apply_options(config, options);
    Graph graph = build_transformer(config);
    graph.name = type;
    return graph;
  }
  // mllama is no slip of llama, but a type of its own.
  const bool another = type.find(nearest_of(type, known)) != std::string::npos;
  file.refuse("model_type",
              fmt::format("'{}' is not supported{}; there are {}{}; others are described in YAML, "
                          "schema partita.model/1 (docs/models.md)",
                          type, another ? "" : did_you_mean(type, known), fmt::join(known, ", "),
                          in_catalogue(type)));
}

}  // namespace partita
