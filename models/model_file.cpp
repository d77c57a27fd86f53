#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/yaml.h"
#include "models/models.h"
#include "models/overrides.h"

namespace partita {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 40;

template <class Value, std::size_t N>
using Words = std::array<std::pair<std::string_view, Value>, N>;

template <class Value, std::size_t N>
Value one_of(const YamlNode& node, const Words<Value, N>& words) {
  const std::string found = node.as_string();
  std::vector<std::string> known;
  for (const auto& [word, value] : words) {
    if (word == found) return value;
    known.emplace_back(word);
  }
  throw InputError(node.place(), fmt::format("'{}' is unknown{}; there are {}", found,
                                             did_you_mean(found, known), fmt::join(known, ", ")));
}

constexpr Words<ActivationKind, 7> kActivations{{{"relu", ActivationKind::relu},
                                                 {"squared_relu", ActivationKind::squared_relu},
                                                 {"gelu", ActivationKind::gelu},
                                                 {"gelu_tanh", ActivationKind::gelu_tanh},
                                                 {"silu", ActivationKind::silu},
                                                 {"sigmoid", ActivationKind::sigmoid},
                                                 {"tanh", ActivationKind::tanh}}};

/// Reads the keys that are there into fields that already hold their defaults.
class Fields {
 public:
  explicit Fields(const YamlNode& node) : node_(node) {}
  void read(std::string_view key, std::int64_t& value, std::int64_t lowest = 0) const {
    if (const auto n = node_.find(key)) value = n->as_int(lowest, kLargest);
  }
  void read(std::string_view key, int& value, int lowest = 0) const {
    if (const auto n = node_.find(key)) value = static_cast<int>(n->as_int(lowest, 1'000'000));
  }
  void read(std::string_view key, bool& value) const {
    if (const auto n = node_.find(key)) value = n->as_bool();
  }
  void read(std::string_view key, double& value) const {
    if (const auto n = node_.find(key)) value = n->as_double();
  }
  template <class Value, std::size_t N>
  void read(std::string_view key, Value& value, const Words<Value, N>& words) const {
    if (const auto n = node_.find(key)) value = one_of(*n, words);
  }
  template <class Value>
  void need(std::string_view key, Value& value) const {
    node_.get(key);
    read(key, value, 1);
  }

 private:
  const YamlNode& node_;
};

void read_latent(const YamlNode& node, LatentAttention& l) {
  const Fields f(node);
  f.read("query_rank", l.query_rank);
  f.need("key_value_rank", l.key_value_rank);
  f.need("nope_dim", l.nope_dim);
  f.need("rope_dim", l.rope_dim);
  f.need("value_dim", l.value_dim);
  node.reject_unknown_keys();
}

void read_moe(const YamlNode& node, MixtureOfExperts& m) {
  const Fields f(node);
  f.need("experts", m.experts);
  f.need("top_k", m.top_k);
  f.need("ffn", m.ffn);
  f.read("shared_ffn", m.shared_ffn);
  f.read("latent", m.latent);
  f.read("first_dense", m.first_dense);
  f.read("every", m.every, 1);
  if (const auto n = node.find("dense_layers")) m.dense_layers = n->as_ints();
  f.read("score", m.sigmoid, Words<bool, 2>{{{"softmax", false}, {"sigmoid", true}}});
  f.read("normalise", m.normalise);
  f.read("scale", m.scale);
  f.read("groups", m.groups, 1);
  f.read("top_groups", m.top_groups, 1);
  f.read("group_best", m.group_best, 1);
  f.read("router_bias", m.router_bias);
  f.read("expert_bias", m.expert_bias);
  node.reject_unknown_keys();
}

void read_mamba(const YamlNode& node, MambaBlock& m) {
  const Fields f(node);
  f.need("heads", m.heads);
  f.read("head_dim", m.head_dim, 1);
  f.read("groups", m.groups, 1);
  f.read("state", m.state, 1);
  f.read("kernel", m.kernel, 1);
  f.read("chunk", m.chunk, 1);
  f.read("convolution_bias", m.convolution_bias);
  node.reject_unknown_keys();
}

TransformerConfig read_transformer(const YamlNode& node) {
  TransformerConfig c;
  const Fields f(node);
  if (const auto pattern = node.find("pattern")) {
    c.pattern = pattern->as_string();
    c.layers = static_cast<int>(c.pattern.size());
    f.read("layers", c.layers, 1);
  } else {
    f.need("layers", c.layers);
  }
  f.need("hidden", c.hidden);
  f.need("heads", c.heads);
  f.read("kv_heads", c.kv_heads, 1);
  f.read("head_dim", c.head_dim, 1);
  f.read("ffn", c.ffn, 1);
  f.need("vocabulary", c.vocabulary);
  if (const auto image = node.find("image")) {
    const Fields size(*image);
    size.need("size", c.image);
    size.need("patch", c.patch);
    size.read("channels", c.channels, 1);
    image->reject_unknown_keys();
    if (c.image % c.patch != 0) {
      throw InputError(image->place(),
                       fmt::format("patches of {} do not divide an image of {}", c.patch, c.image));
    }
  } else {
    f.need("sequence", c.sequence);
    f.read("positions", c.positions, 1);
  }
  f.read("norm", c.norm,
         Words<TransformerConfig::Norm, 2>{
             {{"layer", TransformerConfig::Norm::layer}, {"rms", TransformerConfig::Norm::rms}}});
  f.read("norm_epsilon", c.norm_epsilon);
  f.read("norm_position", c.norm_position,
         Words<NormPosition, 4>{{{"before", NormPosition::before},
                                 {"after", NormPosition::after},
                                 {"both", NormPosition::both},
                                 {"output", NormPosition::output}}});
  f.read("norm_bias", c.norm_bias);
  f.read("residual", c.residual,
         Words<Residual, 3>{{{"sequential", Residual::sequential},
                             {"parallel", Residual::parallel},
                             {"parallel_one_norm", Residual::parallel_one_norm}}});
  f.read("qk_norm", c.qk_norm);
  if (const auto rotary = node.find("rotary")) {
    const Fields r(*rotary);
    r.read("dim", c.rotary_dim);
    r.read("base", c.rotary_base);
    rotary->reject_unknown_keys();
  }
  f.read("activation", c.activation, kActivations);
  f.read("gated", c.gated);
  f.read("limited_activation", c.limited_activation);
  if (const auto all = node.find("bias")) {
    c.qkv_bias = c.attention_output_bias = c.mlp_bias = all->as_bool();
  }
  f.read("qkv_bias", c.qkv_bias);
  f.read("attention_output_bias", c.attention_output_bias);
  f.read("mlp_bias", c.mlp_bias);
  f.read("head_bias", c.head_bias);
  f.read("causal", c.causal);
  f.read("window", c.window);
  if (const auto layers = node.find("windowed_layers")) {
    c.windowed_layers.assign(static_cast<std::size_t>(c.layers), 0);
    for (const auto& item : layers->items()) {
      c.windowed_layers[static_cast<std::size_t>(item.as_int(0, c.layers - 1))] = 1;
    }
  }
  f.read("sinks", c.sinks);
  f.read("tied", c.tied);
  f.read("head", c.head,
         Words<TransformerConfig::Head, 5>{
             {{"language_model", TransformerConfig::Head::language_model},
              {"masked_language_model", TransformerConfig::Head::masked_language_model},
              {"classifier", TransformerConfig::Head::classifier},
              {"token_classifier", TransformerConfig::Head::token_classifier},
              {"replaced_tokens", TransformerConfig::Head::replaced_tokens}}});
  if (const auto g = node.find("generator")) {
    c.generator.hidden = g->get("hidden").as_int(1);
    c.generator.heads = g->get("heads").as_int(1);
    c.generator.ffn = g->get("ffn").as_int(1);
    if (const auto n = g->find("predicted")) c.generator.predicted = n->as_int(1);
    g->reject_unknown_keys();
  }
  f.read("classes", c.classes, 1);
  f.read("predicted", c.predicted, 1);
  f.read("embedding_rows", c.embedding_rows, 1);
  f.read("memory", c.memory, 1);
  if (const auto latent = node.find("latent")) read_latent(*latent, c.latent);
  if (const auto moe = node.find("moe")) read_moe(*moe, c.moe);
  if (const auto mamba = node.find("mamba")) read_mamba(*mamba, c.mamba);
  f.read("mtp_layers", c.mtp_layers);
  if (const auto n = node.find("mtp_pattern")) c.mtp_pattern = n->as_string();
  f.read("mtp_shared", c.mtp_shared);
  f.read("token_types", c.token_types);
  f.read("embedding_norm", c.embedding_norm);
  f.read("initial_deviation", c.initial_deviation);
  f.read("dropout", c.dropout);
  node.reject_unknown_keys();
  return c;
}

/// A network written as a list of layers. Every top-level item that holds parameters begins a
/// block; items without join the block before them.
class LayerList {
 public:
  LayerList(const std::string& name, const YamlNode& node, const ModelOptions& options)
      : node_(node), options_(options), b_(name) {}

  Graph build() {
    TensorId x = input(node_.get("input"));
    flatten_items(node_.get("layers"));
    if (items_.empty()) throw InputError(node_.get("layers").place(), "needs at least one layer");
    b_.set_layer(-1);
    // Behind the classes' layer a softmax may stand.
    std::size_t last = items_.size() - 1;
    while (last > 0 && parts(items_[last]).first == "softmax") --last;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      if (weighted(items_[i])) {
        ++block_;
        seen_.clear();
      }
      b_.set_layer(block_);
      prefix_ = block_ < 0 ? "stem." : fmt::format("layers.{}.", block_);
      last_ = i == last;
      x = item(items_[i], x);
    }
    const std::string loss = node_.find("loss") ? node_.get("loss").as_string() : "cross_entropy";
    b_.set_layer(block_ + 1);
    b_.set_scope("");
    const TensorId l = loss_of(loss, x);
    node_.reject_unknown_keys();
    return b_.finish(l, block_ + 1, sequence_);
  }

 private:
  TensorId input(const YamlNode& node) {
    const Fields f(node);
    Shape shape{{Dim::sample, 1}};
    std::int64_t n = 0;
    if (node.has("tokens")) {
      f.need("tokens", sequence_);
      if (options_.sequence > 0) sequence_ = options_.sequence;
      f.need("vocabulary", vocabulary_);
      if (options_.vocabulary > 0) vocabulary_ = options_.vocabulary;
      node.reject_unknown_keys();
      shape.push_back({Dim::sequence, sequence_});
      return b_.input("tokens", shape);
    }
    if (options_.sequence > 0) {
      throw InputError("sequence", fmt::format("{} does not read tokens", node_.file()));
    }
    if (node.has("features")) {
      f.need("features", n);
      node.reject_unknown_keys();
      shape.push_back({Dim::feature, n});
      return b_.input("input", shape);
    }
    for (const auto& [key, dim] :
         {std::pair{"channels", Dim::feature}, std::pair{"height", Dim::height},
          std::pair{"width", Dim::width}}) {
      f.need(key, n);
      shape.push_back({dim, n});
    }
    node.reject_unknown_keys();
    return b_.input("image", shape);
  }

  /// Expands repeats: `repeat: 4` with `layers: [...]`.
  void flatten_items(const YamlNode& list) {
    for (const auto& entry : list.items()) {
      if (entry.is_map() && entry.has("repeat")) {
        const std::int64_t times = entry.get("repeat").as_int(1, 10000);
        const YamlNode inner = entry.get("layers");
        entry.reject_unknown_keys();
        for (std::int64_t i = 0; i < times; ++i) flatten_items(inner);
      } else {
        items_.push_back(entry);
      }
    }
  }

  /// "relu" or "linear: {...}": the layer's kind, and its options if any.
  static std::pair<std::string, std::optional<YamlNode>> parts(const YamlNode& entry) {
    if (entry.is_scalar()) return {entry.as_string(), std::nullopt};
    const auto members = entry.members();
    if (members.size() != 1) {
      throw InputError(
          entry.place(),
          fmt::format("a layer is one 'kind: options' pair, this has {} keys", members.size()));
    }
    return {members[0].first, members[0].second};
  }

  static bool weighted(const YamlNode& entry) {
    const std::string kind = parts(entry).first;
    return kind == "linear" || kind == "convolution" || kind == "embedding" || kind == "residual";
  }

  TensorId add(const std::string& kind, Operation op, std::vector<TensorId> in) {
    const int count = ++seen_[kind];
    b_.set_scope(prefix_);
    return b_.add(count == 1 ? kind : fmt::format("{}_{}", kind, count), std::move(op),
                  std::move(in));
  }

  static void read_windows(const YamlNode& node, Window& height, Window& width) {
    const auto pair = [&](std::string_view key, std::int64_t lowest, std::int64_t& h,
                          std::int64_t& w) {
      const auto n = node.find(key);
      if (!n) return;
      if (n->is_scalar()) {
        h = w = n->as_int(lowest, 100000);
        return;
      }
      const auto two = n->items();
      if (two.size() != 2) throw InputError(n->place(), "must be one number or [height, width]");
      h = two[0].as_int(lowest, 100000);
      w = two[1].as_int(lowest, 100000);
    };
    node.get("kernel");
    pair("kernel", 1, height.kernel, width.kernel);
    pair("stride", 1, height.stride, width.stride);
    pair("dilation", 1, height.dilation, width.dilation);
    pair("padding", 0, height.pad_before, width.pad_before);
    height.pad_after = height.pad_before;
    width.pad_after = width.pad_before;
  }

  TensorId item(const YamlNode& entry, TensorId x) {
    const auto [kind, node] = parts(entry);
    for (const auto& [word, value] : kActivations) {
      if (kind == word) return plain(entry, kind, node, Activation{value}, x);
    }
    if (kind == "global_average_pool") return plain(entry, kind, node, GlobalAveragePool{}, x);
    if (kind == "softmax") return plain(entry, kind, node, Softmax{}, x);
    if (kind == "batch_norm" || kind == "layer_norm" || kind == "rms_norm") {
      Normalize n;
      n.kind = kind == "batch_norm"   ? Normalize::Kind::batch
               : kind == "layer_norm" ? Normalize::Kind::layer
                                      : Normalize::Kind::rms;
      n.bias = kind != "rms_norm";
      if (node && node->is_map()) {
        const Fields f(*node);
        f.read("epsilon", n.epsilon);
        f.read("scale", n.scale);
        f.read("bias", n.bias);
        if (kind == "batch_norm") f.read("synchronised", n.synchronised);
        node->reject_unknown_keys();
      }
      return add(kind, n, {x});
    }
    if (kind == "dropout") {
      Dropout d;
      if (node) d.probability = node->as_double();
      if (options_.dropout >= 0) d.probability = options_.dropout;
      if (!(d.probability >= 0 && d.probability < 1)) {
        throw InputError(entry.place(),
                         fmt::format("dropout {} must be at least 0 and below 1", d.probability));
      }
      return d.probability > 0 ? add(kind, d, {x}) : x;
    }
    if (!is_known_with_options(kind)) unknown(entry, kind);
    if (!node) throw InputError(entry.place(), fmt::format("'{}' needs options", kind));
    if (kind == "linear") return linear(*node, x);
    if (kind == "convolution") {
      Convolution c;
      const Fields f(*node);
      f.need("out", c.out);
      f.read("groups", c.groups, 1);
      c.bias = true;
      f.read("bias", c.bias);
      read_windows(*node, c.height, c.width);
      node->reject_unknown_keys();
      return add(kind, c, {x});
    }
    if (kind == "max_pool" || kind == "average_pool") {
      Pool p;
      p.maximum = kind == "max_pool";
      read_windows(*node, p.height, p.width);
      // As PyTorch: a pool's stride is its kernel unless it is given.
      if (!node->has("stride")) {
        p.height.stride = p.height.kernel;
        p.width.stride = p.width.kernel;
      }
      Fields(*node).read("count_padding", p.count_padding);
      node->reject_unknown_keys();
      return add(kind, p, {x});
    }
    if (kind == "embedding") {
      if (sequence_ == 0 || b_.shape(x).size() != 2) {
        throw InputError(entry.place(), "an embedding reads tokens; it must come first");
      }
      Embedding e;
      e.vocabulary = vocabulary_;
      Fields(*node).need("out", e.feature);
      node->reject_unknown_keys();
      return add(kind, e, {x});
    }
    return residual(*node, x);
  }

  static constexpr std::array<std::string_view, 6> kWithOptions{
      "linear", "convolution", "max_pool", "average_pool", "embedding", "residual"};
  static bool is_known_with_options(const std::string& kind) {
    return std::find(kWithOptions.begin(), kWithOptions.end(), kind) != kWithOptions.end();
  }

  [[noreturn]] static void unknown(const YamlNode& entry, const std::string& kind) {
    std::vector<std::string> known{"batch_norm",          "layer_norm", "rms_norm", "dropout",
                                   "global_average_pool", "softmax",    "repeat"};
    for (const auto word : kWithOptions) known.emplace_back(word);
    for (const auto& [word, value] : kActivations) known.emplace_back(word);
    throw InputError(entry.place(), fmt::format("'{}' is no layer{}; there are {}", kind,
                                                did_you_mean(kind, known), fmt::join(known, ", ")));
  }

  TensorId plain(const YamlNode& entry, const std::string& kind,
                 const std::optional<YamlNode>& node, Operation op, TensorId x) {
    if (node && node->is_map()) node->reject_unknown_keys();
    if (node && !node->is_map()) {
      throw InputError(entry.place(), fmt::format("'{}' takes no options", kind));
    }
    return add(kind, std::move(op), {x});
  }

  TensorId linear(const YamlNode& node, TensorId x) {
    const Shape& from = b_.shape(x);
    Linear l;
    l.bias = true;
    l.contracted = from.size() == 4 ? 3 : 1;  // an image is flattened
    std::int64_t out = 0;
    const Fields f(node);
    f.need("out", out);
    f.read("bias", l.bias);
    Dim label = last_ ? Dim::vocabulary : Dim::feature;
    if (last_ && options_.vocabulary > 0) out = options_.vocabulary;
    if (const auto n = node.find("label")) {
      f.read("label", label,
             Words<Dim, 3>{
                 {{"feature", Dim::feature}, {"ffn", Dim::ffn}, {"vocabulary", Dim::vocabulary}}});
    }
    l.out = {{label, out}};
    node.reject_unknown_keys();
    return add("linear", l, {x});
  }

  TensorId residual(const YamlNode& node, TensorId x) {
    const bool last = std::exchange(last_, false);
    TensorId shortcut = x, y = x;
    for (const auto& entry : node.get("layers").items()) y = item(entry, y);
    if (const auto list = node.find("shortcut")) {
      for (const auto& entry : list->items()) shortcut = item(entry, shortcut);
    }
    node.reject_unknown_keys();
    last_ = last;
    return add("residual", Add{}, {y, shortcut});
  }

  TensorId loss_of(const std::string& kind, TensorId x) {
    Shape target = b_.shape(x);
    if (kind == "mean_squared_error") {
      return b_.add("loss", MeanSquaredError{}, {x, b_.input("target", target)});
    }
    if (kind != "cross_entropy") {
      throw InputError(
          node_.get("loss").place(),
          fmt::format("'{}' is no loss; there are cross_entropy, mean_squared_error", kind));
    }
    if (target.size() == 4) {
      throw InputError(
          node_.get("layers").place(),
          fmt::format("the last layer leaves an image {}; end with global_average_pool or "
                      "linear",
                      text(target)));
    }
    target.pop_back();
    return b_.add("loss", CrossEntropy{}, {x, b_.input("labels", target)});
  }

  const YamlNode node_;
  const ModelOptions options_;
  GraphBuilder b_;
  std::vector<YamlNode> items_;
  std::map<std::string, int> seen_;
  std::string prefix_;
  int block_ = -1;
  bool last_ = false;
  std::int64_t sequence_ = 0;
  std::int64_t vocabulary_ = 0;
};

}  // namespace

Graph load_model_file(const std::string& path, const ModelOptions& options) {
  check_options(options);
  const YamlNode root =
      YamlNode::load_text(yaml_with(read_file(path), options.edits, path), path, "partita.model/1");
  root.reject_empty_keys();
  std::string name = std::filesystem::path(path).stem().string();
  if (const auto n = root.find("name")) name = n->as_string();
  root.find("source");
  for (const char* of_tables : {"aliases", "stands_in_for", "counts", "framework", "mtp_trained"})
    root.find(of_tables);
  const auto transformer = root.find("transformer");
  const auto network = root.find("network");
  root.reject_unknown_keys();
  if (transformer.has_value() == network.has_value()) {
    throw InputError(root.file(), "needs either 'transformer' or 'network', and not both");
  }
  if (transformer) {
    TransformerConfig config = read_transformer(*transformer);
    config.name = name;
    apply_options(config, options);
    return build_transformer(config);
  }
  if (options.layers > 0) {
    throw InputError("layers", fmt::format("{} lists its layers; edit the list instead", path));
  }
  return LayerList(name, *network, options).build();
}

KnownModel known_model(const std::string& path) {
  const YamlNode root = YamlNode::load_file(path, "partita.model/1");
  KnownModel m;
  m.name = std::filesystem::path(path).stem().string();
  if (const auto n = root.find("aliases")) m.aliases = n->as_strings();
  if (const auto n = root.find("stands_in_for")) {
    for (const auto& [name, besides] : n->members()) m.stands_in_for[name] = besides.as_string();
  }
  if (const auto n = root.find("counts"))
    m.counts_tokens = one_of(*n, Words<bool, 2>{{{"samples", false}, {"tokens", true}}});
  if (const auto n = root.find("framework")) m.framework = n->as_string();
  if (const auto n = root.find("mtp_trained")) m.mtp_trained = static_cast<int>(n->as_int(0, 16));
  if (const auto n = root.find("transformer")) {
    m.transformer = read_transformer(*n);
    m.transformer->name = m.name;
  }
  return m;
}

}  // namespace partita
