// models/models.h: networks by name or file, and the builders behind them. See docs/models.md.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/yaml.h"
#include "models/graph.h"

namespace partita {

/// What a caller may change about a model. Values of the wrong sign throw InputError; so does a
/// value that the model has no use for (a sequence for a convolutional network).
struct ModelOptions {
  std::int64_t sequence = 0;    ///< tokens per sample; 0: the model's default
  int layers = 0;               ///< > 0: the first that many blocks
  std::int64_t vocabulary = 0;  ///< > 0: tokens, or classes of an image network
  bool flash_attention = true;  ///< false: sequence x sequence probabilities go through memory
  double dropout = -1;          ///< < 0: the model's default, which is 0
  /// What-if changes to the file behind the model: paths of its YAML ("transformer.hidden"),
  /// top-level keys of a config.json ("hidden_size"). Other models take none.
  std::vector<YamlEdit> edits;
};

/// A catalogue name, or the path of a Hugging Face config.json (or the folder it is in), of a YAML
/// file (schema partita.model/1) or of an ONNX file. Throws InputError.
Graph load_model(const std::string& text, const ModelOptions& options = {});

/// The names that load_model knows, sorted.
std::vector<std::string> model_catalogue();

/// Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1): queries, keys and
/// values pass through low ranks; part of each query and one key shared by all heads carry the
/// position.
struct LatentAttention {
  std::int64_t query_rank = 0;      ///< 0: queries are projected directly
  std::int64_t key_value_rank = 0;  ///< 0: no latent attention
  std::int64_t nope_dim = 0;        ///< per head, without position
  std::int64_t rope_dim = 0;        ///< per head, rotated
  std::int64_t value_dim = 0;
};

/// Mamba-2 blocks (https://arxiv.org/abs/2405.21060, section 7): one product gives gate, x, B, C
/// and steps; x, B and C pass a causal convolution.
struct MambaBlock {
  std::int64_t heads = 0;  ///< 0: no such blocks
  std::int64_t head_dim = 64;
  std::int64_t groups = 1;  ///< of heads that share B and C; they are what can be cut
  std::int64_t state = 128;
  std::int64_t kernel = 4;   ///< tokens of the convolution
  std::int64_t chunk = 128;  ///< tokens at once
  bool convolution_bias = true;
};

struct MixtureOfExperts {
  std::int64_t experts = 0;  ///< 0: all blocks are dense
  std::int64_t top_k = 2;
  std::int64_t ffn = 0;         ///< width of one expert
  std::int64_t shared_ffn = 0;  ///< total width of the experts that see every token; 0: none
  std::int64_t latent = 0;      ///< > 0: routed experts work at that width, between two products
  int first_dense = 0;          ///< blocks before the first one with experts
  int every = 1;                ///< then each block i with (i + 1) % every == 0
  std::vector<std::int64_t> dense_layers;  ///< exceptions: these stay dense
  bool sigmoid = false;                    ///< scores by sigmoid instead of softmax
  bool normalise = true;                   ///< the chosen gates sum to 1
  double scale = 1;
  std::int64_t groups = 1, top_groups = 1, group_best = 1;  ///< Router's
  bool router_bias = false;
  bool expert_bias = false;
};

/// Where a block's norms are: before attention and feed-forward (GPT-2, Llama), after the residual
/// sums (BERT), before them and on what they give (Gemma 2 and 3), on what they give alone (OLMo
/// 2).
enum class NormPosition { before, after, both, output };

/// Whether feed-forward reads what attention has made of the residual, or both read the block's
/// input and are added to it together: each behind its own norm (GPT-NeoX, Falcon 40B), or behind
/// one (GPT-J, Falcon 7B; https://arxiv.org/abs/2204.02311, section 2).
enum class Residual { sequential, parallel, parallel_one_norm };

/// A stack of equal transformer blocks with what stands before and after it: decoders with a
/// language model head, BERT with its masked-language-model head, ViT with its classifier.
struct TransformerConfig {
  enum class Norm : std::uint8_t { layer, rms };
  enum class Head : std::uint8_t {
    language_model,         ///< final norm, projection to the vocabulary
    masked_language_model,  ///< BERT: dense, activation, norm, projection with bias
    classifier,             ///< ViT: final norm, first token, projection with bias
    token_classifier,       ///< every token's projection to `classes`, with bias
    /// ELECTRA (https://arxiv.org/abs/2003.10555): the same after a dense layer and activation
    replaced_tokens,
  };

  std::string name = "transformer";
  int layers = 0;
  std::int64_t hidden = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;  ///< 0: as many as heads
  std::int64_t head_dim = 0;  ///< 0: hidden / heads
  std::int64_t ffn = 0;
  std::int64_t vocabulary = 0;  ///< or classes
  std::int64_t sequence = 0;

  Norm norm = Norm::rms;
  double norm_epsilon = 1e-5;
  bool norm_bias = true;  ///< of layer norms
  NormPosition norm_position = NormPosition::before;
  Residual residual = Residual::sequential;
  bool qk_norm = false;  ///< RMS norm over each head's query and key

  std::int64_t positions = 0;   ///< > 0: a learned table of that many
  std::int64_t rotary_dim = 0;  ///< > 0: values per head that are rotated
  double rotary_base = 10000;

  ActivationKind activation = ActivationKind::silu;
  bool gated = true;
  bool limited_activation = false;  ///< GatedActivation::limited
  bool qkv_bias = false;
  bool attention_output_bias = false;
  bool mlp_bias = false;
  bool head_bias = false;  ///< of a language model's

  bool causal = true;
  std::int64_t window = 0;            ///< > 0: sliding window of that many keys
  std::vector<char> windowed_layers;  ///< which blocks slide; empty: all
  bool sinks = false;

  bool tied = false;  ///< head and embedding share their table
  Head head = Head::language_model;
  std::int64_t classes = 2;    ///< of a token_classifier
  std::int64_t predicted = 0;  ///< masked positions that the head of BERT sees; 0: all
  /// > 0: rows of the embedding, of which the head, not tied then, has the `vocabulary` (an
  /// adaptive softmax's most frequent words: https://arxiv.org/abs/1609.04309).
  std::int64_t embedding_rows = 0;
  /// States of so many earlier tokens stand before each block's keys and values, without gradient
  /// (https://arxiv.org/abs/1901.02860, section 3.2).
  std::int64_t memory = 0;

  /// ELECTRA's generator: a narrower encoder of as many blocks and the same embeddings, whose
  /// masked-language-model loss is added. It is part of the head, as its words are drawn without a
  /// gradient: what the discriminator reads are inputs. Logits are made of all positions and the
  /// masked ones picked then (NVIDIA/DeepLearningExamples, TensorFlow2/LanguageModeling/ELECTRA,
  /// modeling.py). hidden 0: none.
  struct Generator {
    std::int64_t hidden = 0, heads = 0, ffn = 0;
    std::int64_t predicted = 0;  ///< masked positions; 0: all
  } generator;

  LatentAttention latent;
  MixtureOfExperts moe;
  MambaBlock mamba;
  /// A hybrid's blocks, one mixer each, as Megatron writes them: M Mamba-2, * attention, - dense
  /// feed-forward, E experts; at least `layers` of them, of which the first count. Empty: blocks of
  /// attention and feed-forward.
  std::string pattern;
  /// Multi-token prediction (https://arxiv.org/abs/2412.19437, section 2.2): further blocks after
  /// the last, each with its own loss; they count as part of the head.
  int mtp_layers = 0;
  std::string mtp_pattern;  ///< of a hybrid: the mixers of each, no kind twice
  bool mtp_shared = false;  ///< all have the first one's parameters

  std::int64_t token_types = 0;  ///< BERT's segment table
  bool embedding_norm = false;
  std::int64_t image =
      0;  ///< > 0: the input is an image of that height and width, cut into patches
  std::int64_t patch = 0;
  std::int64_t channels = 3;

  double initial_deviation = 0.02;
  double dropout = 0;  ///< after embeddings, attention's and MLP's output
  bool flash_attention = true;
};

/// Throws InputError{config.name, ...} when the numbers don't fit together.
Graph build_transformer(const TransformerConfig& config);

/// Convolutional networks of the literature, as torchvision builds them; `classes` <= 0: the
/// default.
Graph build_mnist_linear(std::int64_t classes = 0);
/// Residual networks; by default ResNet-50.
struct ResnetConfig {
  std::string name = "resnet-50";
  std::array<int, 4> blocks{3, 4, 6, 3};
  std::int64_t groups = 1, group_width = 64;  ///< of the middle convolution, at the first stage
  std::int64_t squeeze = 0;  ///< > 0: blocks end in squeeze and excitation, features over this
  bool bottleneck = true;    ///< blocks of 1 x 1, 3 x 3, 1 x 1; else of two 3 x 3
};
Graph build_resnet(const ResnetConfig& config = {}, std::int64_t classes = 0);
/// https://arxiv.org/abs/1905.11946: factors of channels and of blocks, and the image's side.
struct EfficientNetConfig {
  std::string name = "efficientnet-b0";
  double width = 1, depth = 1;
  std::int64_t image = 224;
};
Graph build_efficientnet(const EfficientNetConfig& config = {}, std::int64_t classes = 0,
                         double dropout = 0);
Graph build_vgg16(std::int64_t classes = 0, double dropout = 0);
Graph build_alexnet(std::int64_t classes = 0, double dropout = 0);

/// An entry of the catalogue as tables of measurements meet it.
struct KnownModel {
  std::string name;
  std::vector<std::string> aliases;  ///< what else it is called
  /// Networks that it is near enough to, and what they have besides.
  std::map<std::string, std::string> stands_in_for;
  bool counts_tokens = false;  ///< tables print tokens a second for it, not samples
  std::string framework;       ///< that it was published with; "": not said
  int mtp_trained = 0;         ///< multi-token prediction modules that it was trained with
  std::optional<TransformerConfig> transformer;  ///< of a stack of blocks: open to other sizes
};
/// All of the catalogue, by name.
std::vector<KnownModel> known_models();
/// Of one YAML file.
KnownModel known_model(const std::string& path);

/// The importers that load_model chooses by a file's name.
Graph import_hugging_face(const std::string& path, const ModelOptions& options = {});
Graph import_onnx(const std::string& path, const ModelOptions& options = {});
Graph load_model_file(const std::string& path, const ModelOptions& options = {});  ///< YAML

}  // namespace partita
