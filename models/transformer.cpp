#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "models/models.h"

namespace partita {
namespace {

using Config = TransformerConfig;

void require(const Config& c, bool holds, const std::string& message) {
  if (!holds) throw InputError(c.name, message);
}

constexpr std::string_view kMixers = "M*-E";

void check_pattern(const Config& c) {
  const auto check = [&](const std::string& pattern, const char* what) {
    const auto at = pattern.find_first_not_of(kMixers);
    require(c, at == std::string::npos,
            fmt::format("{} has '{}' at {}; there are M (Mamba-2), * (attention), - (feed-forward) "
                        "and E (experts)",
                        what, at == std::string::npos ? ' ' : pattern[at], at));
    require(c, pattern.find('E') == std::string::npos || c.moe.experts > 0,
            fmt::format("{} has E, blocks of experts; give moe", what));
    require(c, pattern.find('M') == std::string::npos || c.mamba.heads > 0,
            fmt::format("{} has M, Mamba-2 blocks; give mamba", what));
  };
  check(c.pattern, "pattern");
  check(c.mtp_pattern, "mtp_pattern");
  if (c.pattern.empty()) {
    require(c, c.mtp_pattern.empty() && c.mamba.heads == 0,
            "mamba and mtp_pattern are for hybrids; give a pattern");
    return;
  }
  require(c, static_cast<std::size_t>(c.layers) <= c.pattern.size(),
          fmt::format("{} layers are more than the pattern's {}", c.layers, c.pattern.size()));
  require(c, c.norm_position == NormPosition::before && c.image == 0 && c.memory == 0,
          "a pattern goes with norm_position before alone, and with neither image nor memory");
  require(c, c.residual == Residual::sequential,
          "a pattern's blocks have one branch each; leave "
          "residual sequential");
  require(c, c.mtp_layers == 0 || !c.mtp_pattern.empty(),
          "multi-token prediction of a hybrid needs mtp_pattern");
  for (const char mixer : kMixers) {
    require(c, std::count(c.mtp_pattern.begin(), c.mtp_pattern.end(), mixer) <= 1,
            fmt::format("mtp_pattern {} has a kind twice", c.mtp_pattern));
  }
  const MambaBlock& m = c.mamba;
  if (m.heads == 0) return;
  require(c, m.groups >= 1 && m.heads % m.groups == 0,
          fmt::format("{} groups do not divide {} heads of mamba", m.groups, m.heads));
  require(c, m.head_dim >= 1 && m.state >= 1 && m.kernel >= 1 && m.chunk >= 1,
          "mamba.head_dim, state, kernel and chunk must be at least 1");
}

/// Fills in what follows from other fields and checks the rest.
Config completed(Config c) {
  const auto positive = [&](std::int64_t value, const char* what) {
    require(c, value > 0, fmt::format("{} is {}; it must be at least 1", what, value));
  };
  positive(c.layers, "layers");
  positive(c.hidden, "hidden");
  positive(c.heads, "heads");
  positive(c.vocabulary, "vocabulary");
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  positive(c.kv_heads, "kv_heads");
  require(c, c.heads % c.kv_heads == 0,
          fmt::format("{} key/value heads do not divide {} attention heads", c.kv_heads, c.heads));
  if (c.latent.key_value_rank != 0) {
    positive(c.latent.key_value_rank, "latent.key_value_rank");
    positive(c.latent.nope_dim, "latent.nope_dim");
    positive(c.latent.rope_dim, "latent.rope_dim");
    positive(c.latent.value_dim, "latent.value_dim");
    require(c, c.latent.query_rank >= 0,
            fmt::format("latent.query_rank is {}; 0 means no low rank", c.latent.query_rank));
    require(c, c.latent.rope_dim % 2 == 0,
            fmt::format("latent.rope_dim is {}; rotation needs an even number", c.latent.rope_dim));
    require(c, !c.sinks && !c.qk_norm, "latent attention goes with neither sinks nor qk_norm");
  } else if (c.head_dim == 0) {
    require(c, c.hidden % c.heads == 0,
            fmt::format("{} heads do not divide hidden size {}; give head_dim", c.heads, c.hidden));
    c.head_dim = c.hidden / c.heads;
  }
  require(c, c.head_dim >= 0, fmt::format("head_dim is {}; it must be at least 1", c.head_dim));
  require(c,
          c.rotary_dim >= 0 && c.rotary_dim % 2 == 0 &&
              (c.latent.key_value_rank > 0 || c.rotary_dim <= c.head_dim),
          fmt::format("{} rotated values per head of {}: it must be even and no more than the head",
                      c.rotary_dim, c.head_dim));
  if (c.image > 0) {
    positive(c.patch, "patch");
    positive(c.channels, "channels");
    require(c, c.image % c.patch == 0,
            fmt::format("patches of {} do not divide an image of {}", c.patch, c.image));
    c.sequence = (c.image / c.patch) * (c.image / c.patch) + 1;
    c.positions = c.sequence;
  }
  positive(c.sequence, "sequence");
  require(c, c.positions >= 0, fmt::format("positions is {}; 0 means none", c.positions));
  require(
      c, c.positions == 0 || c.sequence <= c.positions,
      fmt::format("a sequence of {} tokens is longer than the {} learned positions; use at most {}",
                  c.sequence, c.positions, c.positions));
  require(c, c.window >= 0, fmt::format("window is {}; 0 means none", c.window));
  require(c, c.dropout >= 0 && c.dropout < 1,
          fmt::format("dropout is {}; it must be at least 0 and below 1", c.dropout));
  if (c.moe.experts != 0) {
    positive(c.moe.experts, "moe.experts");
    positive(c.moe.ffn, "moe.ffn");
    positive(c.moe.every, "moe.every");
    require(c, c.moe.top_k >= 1 && c.moe.top_k <= c.moe.experts,
            fmt::format("moe.top_k is {} of {} experts", c.moe.top_k, c.moe.experts));
    require(c, c.moe.shared_ffn >= 0 && c.moe.first_dense >= 0,
            "moe.shared_ffn and moe.first_dense must be at least 0");
  }
  require(c, c.predicted >= 0 && c.predicted <= c.sequence,
          fmt::format("predicted is {} of {} tokens; 0 means all", c.predicted, c.sequence));
  require(c, c.predicted == 0 || c.head == Config::Head::masked_language_model,
          "predicted needs the head masked_language_model");
  require(c, c.classes >= 1, fmt::format("classes is {}; it must be at least 1", c.classes));
  require(c, c.embedding_rows == 0 || c.embedding_rows >= c.vocabulary,
          fmt::format("embedding_rows {} are fewer than the vocabulary of {}; 0 means as many",
                      c.embedding_rows, c.vocabulary));
  require(c, c.embedding_rows == 0 || (!c.tied && c.mtp_layers == 0),
          "embedding_rows needs tied: false, and goes without mtp_layers");
  require(c, c.memory >= 0, fmt::format("memory is {}; 0 means none", c.memory));
  require(c, c.memory == 0 || (!c.causal && c.rotary_dim == 0 && c.latent.key_value_rank == 0),
          "memory needs causal: false (its mask is not modelled), and neither rotary nor latent "
          "attention");
  require(c, (c.generator.hidden > 0) == (c.head == Config::Head::replaced_tokens),
          "a generator and the head replaced_tokens need each other");
  if (c.generator.hidden > 0) {
    positive(c.generator.heads, "generator.heads");
    positive(c.generator.ffn, "generator.ffn");
    require(c, c.generator.hidden % c.generator.heads == 0,
            fmt::format("generator.hidden {} is no multiple of its {} heads", c.generator.hidden,
                        c.generator.heads));
    require(c, c.generator.predicted >= 0 && c.generator.predicted <= c.sequence,
            fmt::format("generator.predicted is {} of {} tokens; 0 means all",
                        c.generator.predicted, c.sequence));
    require(c,
            c.image == 0 && c.pattern.empty() && c.moe.experts == 0 &&
                c.latent.key_value_rank == 0 && c.embedding_rows == 0 && c.memory == 0,
            "a generator goes with blocks of attention and dense feed-forward only");
  }
  if (c.moe.latent != 0) positive(c.moe.latent, "moe.latent");
  check_pattern(c);
  require(c, c.residual == Residual::sequential || c.norm_position == NormPosition::before,
          "parallel residuals go with norm_position before alone");
  require(c, !c.head_bias || c.head == Config::Head::language_model,
          "head_bias is of a language model's head; the other heads have theirs");
  require(c, !c.head_bias || c.mtp_layers == 0,
          "head_bias goes without mtp_layers, whose heads share the weight alone");
  require(c, c.mtp_layers >= 0, fmt::format("mtp_layers is {}; 0 means none", c.mtp_layers));
  require(c, c.mtp_layers == 0 || (c.head == Config::Head::language_model && c.image == 0),
          "multi-token prediction needs a language-model head");
  return c;
}

bool has_experts(const Config& c, int layer) {
  const auto& m = c.moe;
  return m.experts > 0 && layer >= m.first_dense && (layer + 1) % m.every == 0 &&
         std::find(m.dense_layers.begin(), m.dense_layers.end(), layer) == m.dense_layers.end();
}

class Transformer {
 public:
  explicit Transformer(const Config& config) : c_(completed(config)), b_(c_.name) {}

  Graph build() {
    const std::int64_t s = c_.sequence;
    TensorId labels;
    record_ = &embeddings_;
    TensorId x = c_.image > 0 ? patches() : tokens("");
    record_ = nullptr;
    if (c_.head == Config::Head::classifier) {
      labels = b_.input("labels", {{Dim::sample, 1}});
    } else {
      labels = b_.input("labels", {{Dim::sample, 1},
                                   c_.predicted > 0 ? NamedExtent{Dim::key_sequence, c_.predicted}
                                                    : NamedExtent{Dim::sequence, s}});
    }
    for (int i = 0; i < c_.layers; ++i) {
      b_.set_layer(i);
      b_.set_scope(fmt::format("layers.{}.", i));
      x = block(x, i);
    }
    b_.set_layer(c_.layers);
    b_.set_scope("");
    TensorId loss = head(x, labels);
    TensorId h = x;
    for (int i = 0; i < c_.mtp_layers; ++i) loss = predict_further(h, loss, i);
    if (c_.generator.hidden > 0) loss = generate(loss);
    return b_.finish(loss, c_.layers, c_.image > 0 ? 0 : s);
  }

 private:
  TensorId add(const std::string& name, Operation op, std::vector<TensorId> in,
               std::vector<ParameterId> shared = {}) {
    if (reuse_ != nullptr && shared.empty()) shared = (*reuse_)[name];
    const TensorId y = b_.add(name, std::move(op), std::move(in), shared);
    if (record_ != nullptr) (*record_)[name] = b_.op(b_.last()).parameters;
    if (shared.empty()) {
      for (const ParameterId p : b_.op(b_.last()).parameters) {
        auto& deviation = b_.parameter(p).initial_deviation;
        if (deviation > 0) deviation = c_.initial_deviation;
      }
    }
    return y;
  }
  TensorId linear(const std::string& name, TensorId x, Shape out, bool bias = false,
                  int contracted = 1) {
    return add(name, Linear{contracted, std::move(out), bias}, {x});
  }
  TensorId normed(const std::string& name, TensorId x) {
    const bool layer = c_.norm == Config::Norm::layer;
    Normalize n;
    n.kind = layer ? Normalize::Kind::layer : Normalize::Kind::rms;
    n.epsilon = c_.norm_epsilon;
    n.bias = layer && c_.norm_bias;
    return add(name, n, {x});
  }
  TensorId biased(const std::string& name, TensorId x, bool wanted) {
    return wanted ? add(name, AddBias{}, {x}) : x;
  }
  TensorId dropped(const std::string& name, TensorId x) {
    return c_.dropout > 0 ? add(name, Dropout{c_.dropout}, {x}) : x;
  }

  /// Embeddings of the inputs `scope` + "tokens" and the like.
  TensorId tokens(const std::string& scope) {
    const Shape ids{{Dim::sample, 1}, {Dim::sequence, c_.sequence}};
    const TensorId token_ids = b_.input(scope + "tokens", ids);
    const std::int64_t rows = c_.embedding_rows > 0 ? c_.embedding_rows : c_.vocabulary;
    TensorId x = add("embedding", Embedding{rows, c_.hidden}, {token_ids});
    table_ = b_.op(b_.last()).parameters[0];
    if (c_.token_types > 0) {
      const TensorId types = b_.input(scope + "token_types", ids);
      const TensorId y =
          add("token_type_embedding", Embedding{c_.token_types, c_.hidden, Dim::classes}, {types});
      x = add("token_type_sum", Add{}, {x, y});
    }
    if (c_.positions > 0) x = add("position_embedding", PositionEmbedding{c_.positions}, {x});
    if (c_.embedding_norm) x = normed("embedding_norm", x);
    return dropped("embedding_dropout", x);
  }

  TensorId patches() {
    const TensorId image = b_.input("image", {{Dim::sample, 1},
                                              {Dim::feature, c_.channels},
                                              {Dim::height, c_.image},
                                              {Dim::width, c_.image}});
    Convolution cut;
    cut.out = c_.hidden;
    cut.height.kernel = cut.height.stride = c_.patch;
    cut.width = cut.height;
    cut.bias = true;
    TensorId x = add("patch_embedding", cut, {image});
    x = add("to_sequence", ToSequence{}, {x});
    x = add("class_token", PrependToken{}, {x});
    x = add("position_embedding", PositionEmbedding{c_.positions}, {x});
    return dropped("embedding_dropout", x);
  }

  /// A hybrid's block: one mixer behind a norm.
  TensorId mixed(TensorId x, char mixer, int layer) {
    switch (mixer) {
      case 'M':
        return add("mamba.residual", Add{}, {mamba(normed("mamba_norm", x)), x});
      case '*':
        return add("attention.residual", Add{}, {attention(normed("attention_norm", x), layer), x});
      default: {
        const TensorId y = normed("mlp_norm", x);
        return add("mlp.residual", Add{}, {mixer == 'E' ? experts(y) : mlp(y), x});
      }
    }
  }

  TensorId mamba(TensorId x) {
    const MambaBlock& m = c_.mamba;
    const std::int64_t heads = m.heads / m.groups, width = heads * m.head_dim;
    const auto grouped = [&](const char* name, std::int64_t each) {
      return linear(name, x, {{Dim::head, m.groups}, {Dim::head_feature, each}});
    };
    const TensorId gate = grouped("mamba.gate", width);
    TensorId y = grouped("mamba.input", width + 2 * m.state);
    const TensorId step = grouped("mamba.step", heads);
    y = add("mamba.convolution", CausalConvolution{m.kernel, m.convolution_bias}, {y});
    y = add("mamba.scan", StateSpace{heads, m.head_dim, m.state, m.chunk}, {y, step});
    y = add("mamba.norm", GatedNorm{c_.norm_epsilon}, {y, gate});
    y = linear("mamba.output", y, {{Dim::feature, c_.hidden}}, false, 2);
    return dropped("mamba.dropout", y);
  }

  TensorId block(TensorId x, int layer) {
    if (!c_.pattern.empty()) return mixed(x, c_.pattern[static_cast<std::size_t>(layer)], layer);
    if (c_.residual != Residual::sequential) return side_by_side(x, layer);
    const auto forwarded = [&](TensorId y) { return has_experts(c_, layer) ? experts(y) : mlp(y); };
    if (c_.norm_position == NormPosition::after) {
      x = add("attention.residual", Add{}, {attention(x, layer), x});
      x = normed("attention_norm", x);
      x = add("mlp.residual", Add{}, {forwarded(x), x});
      return normed("mlp_norm", x);
    }
    const bool first = c_.norm_position != NormPosition::output,
               behind = c_.norm_position != NormPosition::before;
    TensorId y = attention(first ? normed("attention_norm", x) : x, layer);
    if (behind) y = normed("attention.output_norm", y);
    x = add("attention.residual", Add{}, {y, x});
    y = forwarded(first ? normed("mlp_norm", x) : x);
    if (behind) y = normed("mlp.output_norm", y);
    return add("mlp.residual", Add{}, {y, x});
  }

  /// Attention and feed-forward of one input. Their products are added before the biases, so that
  /// over cut dimensions one sum is owed for both; masks of a dropout come between, and so does
  /// what experts make of their rows.
  TensorId side_by_side(TensorId x, int layer) {
    const bool routed = has_experts(c_, layer), apart = c_.dropout > 0 || routed;
    TensorId z = normed("attention_norm", x);
    TensorId y = apart ? attention(z, layer) : attention_product(z, layer);
    if (c_.residual == Residual::parallel) z = normed("mlp_norm", x);
    z = routed ? experts(z) : apart ? mlp(z) : dense_product("mlp.", z, dense_width());
    y = add("branches", Add{}, {y, z});
    if (!apart) {
      y = biased("attention.output_bias", y, c_.attention_output_bias);
      y = biased("mlp.down_bias", y, c_.mlp_bias);
    }
    return add("mlp.residual", Add{}, {y, x});
  }

  TensorId rotated(const std::string& name, TensorId x, std::int64_t head_dim, std::int64_t count) {
    if (count == 0) return x;
    return add(name, Rotary{head_dim, count, c_.rotary_base}, {x});
  }
  TensorId head_normed(const std::string& name, TensorId x) {
    if (!c_.qk_norm) return x;
    Normalize n;
    n.kind = Normalize::Kind::rms;
    n.epsilon = c_.norm_epsilon;
    n.bias = false;
    n.group = c_.head_dim;
    return add(name, n, {x});
  }

  TensorId attention(TensorId x, int layer) {
    const TensorId out =
        biased("attention.output_bias", attention_product(x, layer), c_.attention_output_bias);
    return dropped("attention.dropout", out);
  }

  TensorId attention_product(TensorId x, int layer) {
    Attention core;
    core.causal = c_.causal;
    core.sinks = c_.sinks;
    core.materialised = !c_.flash_attention;
    // More layers than are listed go on as they began.
    const auto at = static_cast<std::size_t>(layer);
    if (c_.windowed_layers.empty() || c_.windowed_layers[at % c_.windowed_layers.size()] != 0)
      core.window = c_.window;
    const TensorId y =
        c_.latent.key_value_rank > 0 ? latent(x, core) : grouped_query(x, core, layer);
    return linear("attention.output", y, {{Dim::feature, c_.hidden}}, false, 2);
  }

  TensorId grouped_query(TensorId x, Attention core, int layer) {
    const std::int64_t group = c_.heads / c_.kv_heads, d = c_.head_dim;
    const auto heads = [&](std::int64_t per_head) {
      return Shape{{Dim::head, c_.kv_heads}, {Dim::head_feature, per_head}};
    };
    TensorId q = linear("attention.query", x, heads(group * d), c_.qkv_bias);
    TensorId seen = x;
    if (c_.memory > 0) {
      const TensorId before =
          b_.input(fmt::format("layers.{}.memory", layer),
                   {{Dim::sample, 1}, {Dim::sequence, c_.memory}, {Dim::feature, c_.hidden}});
      seen = add("attention.seen", Concat{false}, {before, x});
    }
    TensorId k = linear("attention.key", seen, heads(d), c_.qkv_bias);
    const TensorId v = linear("attention.value", seen, heads(d), c_.qkv_bias);
    q = head_normed("attention.query_norm", q);
    k = head_normed("attention.key_norm", k);
    q = rotated("attention.query_rotary", q, d, c_.rotary_dim);
    k = rotated("attention.key_rotary", k, d, c_.rotary_dim);
    core.queries_per_head = group;
    core.qk_dim = core.v_dim = d;
    return add("attention.core", core, {q, k, v});
  }

  TensorId latent(TensorId x, Attention core) {
    const LatentAttention& l = c_.latent;
    const std::int64_t qk = l.nope_dim + l.rope_dim;
    const auto heads = [&](std::int64_t per_head) {
      return Shape{{Dim::head, c_.heads}, {Dim::head_feature, per_head}};
    };
    TensorId q;
    if (l.query_rank > 0) {
      q = linear("attention.query_down", x, {{Dim::feature, l.query_rank}}, c_.qkv_bias);
      q = normed("attention.query_norm", q);
      q = linear("attention.query_up", q, heads(qk));
    } else {
      q = linear("attention.query", x, heads(qk));
    }
    q = rotated("attention.query_rotary", q, qk, l.rope_dim);
    TensorId kv = linear("attention.kv_down", x, {{Dim::feature, l.key_value_rank}}, c_.qkv_bias);
    kv = normed("attention.kv_norm", kv);
    TensorId shared =
        linear("attention.key_rope", x, {{Dim::head_feature, l.rope_dim}}, c_.qkv_bias);
    shared = rotated("attention.key_rotary", shared, l.rope_dim, l.rope_dim);
    const TensorId up = linear("attention.key_up", kv, heads(l.nope_dim));
    const TensorId v = linear("attention.value_up", kv, heads(l.value_dim));
    const TensorId k = add("attention.key_join", AppendToHeads{}, {up, shared});
    core.qk_dim = qk;
    core.v_dim = l.value_dim;
    return add("attention.core", core, {q, k, v});
  }

  TensorId activated(const std::string& scope, TensorId gate, TensorId up) {
    if (c_.gated)
      return add(scope + "activation", GatedActivation{c_.activation, c_.limited_activation},
                 {gate, up});
    return add(scope + "activation", Activation{c_.activation}, {up});
  }

  TensorId dense(const std::string& scope, TensorId x, std::int64_t width) {
    return biased(scope + "down_bias", dense_product(scope, x, width), c_.mlp_bias);
  }

  TensorId dense_product(const std::string& scope, TensorId x, std::int64_t width) {
    TensorId gate;
    if (c_.gated) gate = linear(scope + "gate", x, {{Dim::ffn, width}}, c_.mlp_bias);
    const TensorId up = linear(scope + "up", x, {{Dim::ffn, width}}, c_.mlp_bias);
    return linear(scope + "down", activated(scope, gate, up), {{Dim::feature, c_.hidden}});
  }

  std::int64_t dense_width() const {
    require(c_, c_.ffn > 0, fmt::format("ffn is {}; a dense block needs at least 1", c_.ffn));
    return c_.ffn;
  }
  TensorId mlp(TensorId x) { return dropped("mlp.dropout", dense("mlp.", x, dense_width())); }

  TensorId experts(TensorId x) {
    const MixtureOfExperts& m = c_.moe;
    const TensorId logits = linear("moe.router", x, {{Dim::expert, m.experts}}, m.router_bias);
    const TensorId gates =
        add("moe.gates",
            Router{m.top_k, m.sigmoid, m.normalise, m.scale, m.groups, m.top_groups, m.group_best},
            {logits});
    TensorId narrow = x;
    if (m.latent > 0)
      narrow = linear("moe.latent_down", x, {{Dim::feature, m.latent}}, c_.mlp_bias);
    const TensorId rows = add("moe.dispatch", Dispatch{m.experts, m.top_k}, {narrow, gates});
    const auto product = [&](const char* name, TensorId in, Dim dim, std::int64_t width) {
      return add(name, GroupedProduct{m.experts, {dim, width}, m.expert_bias}, {in});
    };
    TensorId gate;
    if (c_.gated) gate = product("moe.gate", rows, Dim::ffn, m.ffn);
    const TensorId up = product("moe.up", rows, Dim::ffn, m.ffn);
    const TensorId inner = activated("moe.", gate, up);
    const TensorId down =
        product("moe.down", inner, Dim::feature, m.latent > 0 ? m.latent : c_.hidden);
    TensorId y = add("moe.combine", Combine{m.experts}, {down, gates});
    if (m.latent > 0) y = linear("moe.latent_up", y, {{Dim::feature, c_.hidden}}, c_.mlp_bias);
    if (m.shared_ffn > 0)
      y = add("moe.shared.sum", Add{}, {y, dense("moe.shared.", x, m.shared_ffn)});
    return dropped("mlp.dropout", y);
  }

  TensorId projected(const std::string& name, TensorId x, bool bias) {
    const Linear op{1, {{Dim::vocabulary, c_.vocabulary}}, bias};
    if (c_.tied) return add(name, op, {x}, {table_});
    const TensorId y = add(name, op, {x});
    head_ = b_.op(b_.last()).parameters[0];
    return y;
  }

  TensorId head(TensorId x, TensorId labels) {
    switch (c_.head) {
      case Config::Head::language_model:
        if (c_.norm_position != NormPosition::after) x = normed("final_norm", x);
        x = projected("head", x, c_.head_bias);
        break;
      case Config::Head::masked_language_model:
        if (c_.predicted > 0) {
          // Rows of ones pick the masked positions, so that where they are is data.
          const TensorId picks = b_.input(
              "masked_positions",
              {{Dim::sample, 1}, {Dim::key_sequence, c_.predicted}, {Dim::sequence, c_.sequence}});
          x = add("head_positions", BatchedProduct{1}, {picks, x});
        }
        x = linear("head_transform", x, {{Dim::feature, c_.hidden}}, true);
        x = add("head_activation", Activation{c_.activation}, {x});
        x = normed("head_norm", x);
        x = projected("head", x, true);
        break;
      case Config::Head::classifier:
        x = normed("final_norm", x);
        x = add("select_token", SelectToken{0}, {x});
        x = linear("head", x, {{Dim::vocabulary, c_.vocabulary}}, true);
        break;
      case Config::Head::token_classifier:
        if (c_.norm_position != NormPosition::after) x = normed("final_norm", x);
        x = linear("head", x, {{Dim::classes, c_.classes}}, true);
        break;
      case Config::Head::replaced_tokens:
        if (c_.norm_position != NormPosition::after) x = normed("final_norm", x);
        x = linear("head_transform", x, {{Dim::feature, c_.hidden}}, true);
        x = add("head_activation", Activation{c_.activation}, {x});
        x = linear("head", x, {{Dim::classes, c_.classes}}, true);
        break;
    }
    return add("loss", CrossEntropy{}, {x, labels});
  }

  /// One more token ahead: norms of the hidden state and of the next token's embedding, joined and
  /// projected, one block, and the shared head. Changes `hidden` to its own output.
  TensorId predict_further(TensorId& hidden, TensorId loss, int i) {
    const Shape ids{{Dim::sample, 1}, {Dim::sequence, c_.sequence}};
    const std::string scope = fmt::format("mtp.{}.", i);
    const TensorId next = b_.input(scope + "tokens", ids);
    const TensorId labels = b_.input(scope + "labels", ids);
    b_.set_scope(scope);
    if (c_.mtp_shared) (i == 0 ? record_ : reuse_) = &first_depth_;
    TensorId e = add("embedding", Embedding{c_.vocabulary, c_.hidden}, {next}, {table_});
    e = normed("embedding_norm", e);
    const TensorId h = normed("hidden_norm", hidden);
    TensorId x = add("join", Concat{true}, {e, h});
    x = linear("projection", x, {{Dim::feature, c_.hidden}});
    if (c_.pattern.empty()) {
      hidden = block(x, c_.layers + i);
    } else {
      for (const char mixer : c_.mtp_pattern) x = mixed(x, mixer, c_.layers + i);
      hidden = x;
    }
    x = normed("final_norm", hidden);
    x = add("head", Linear{1, {{Dim::vocabulary, c_.vocabulary}}, false}, {x},
            {c_.tied ? table_ : head_});
    x = add("loss", CrossEntropy{}, {x, labels});
    x = add("loss_sum", Add{}, {loss, x});
    b_.set_scope("");
    record_ = reuse_ = nullptr;
    return x;
  }

  /// ELECTRA's generator, after the discriminator and its `loss`: returns the sum of both.
  TensorId generate(TensorId loss) {
    const auto& g = c_.generator;
    const std::string scope = "generator.";
    const bool all = g.predicted == 0;
    const NamedExtent count =
        all ? NamedExtent{Dim::sequence, c_.sequence} : NamedExtent{Dim::key_sequence, g.predicted};
    b_.set_scope(scope);
    reuse_ = &embeddings_;
    TensorId x = tokens(scope);
    reuse_ = nullptr;
    x = linear("projection", x, {{Dim::feature, g.hidden}}, true);
    const Config discriminator = c_;
    c_.hidden = g.hidden;
    c_.heads = c_.kv_heads = g.heads;
    c_.head_dim = g.hidden / g.heads;
    c_.ffn = g.ffn;
    for (int i = 0; i < c_.layers; ++i) {
      b_.set_scope(fmt::format("{}layers.{}.", scope, i));
      x = block(x, i);
    }
    c_ = discriminator;
    b_.set_scope(scope);
    if (c_.norm_position != NormPosition::after) x = normed("final_norm", x);
    x = linear("head_transform", x, {{Dim::feature, c_.hidden}}, true);
    x = add("head_activation", Activation{c_.activation}, {x});
    x = normed("head_norm", x);
    x = add("head", Linear{1, {{Dim::vocabulary, c_.vocabulary}}, true}, {x}, {table_});
    if (!all) {
      const TensorId picks = b_.input(scope + "masked_positions",
                                      {{Dim::sample, 1}, count, {Dim::sequence, c_.sequence}});
      x = add("head_positions", BatchedProduct{1}, {picks, x});
    }
    const TensorId labels = b_.input(scope + "labels", {{Dim::sample, 1}, count});
    x = add("loss", CrossEntropy{}, {x, labels});
    x = add("loss_sum", Add{}, {loss, x});
    b_.set_scope("");
    return x;
  }

  Config c_;
  GraphBuilder b_;
  ParameterId table_;
  ParameterId head_;
  using Parameters = std::map<std::string, std::vector<ParameterId>>;  ///< by operator's name
  Parameters embeddings_, first_depth_;
  Parameters *record_ = nullptr, *reuse_ = nullptr;  ///< operators' that are added
};

}  // namespace

Graph build_transformer(const TransformerConfig& config) { return Transformer(config).build(); }

}  // namespace partita
