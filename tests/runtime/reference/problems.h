// tests/runtime/reference/problems.h: every operator and option on small random shapes, and how its
// passes are run.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/reference/kernels.h"

namespace partita::reference {

using Indices = std::vector<std::int64_t>;
using Rng = std::mt19937_64;

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }
inline std::int64_t pick(Rng& rng, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(high - low + 1));
}
inline Indices range(std::int64_t n) {
  Indices list(static_cast<std::size_t>(n));
  std::iota(list.begin(), list.end(), 0);
  return list;
}
inline Piece dense(const Shape& shape) {
  std::vector<Indices> index;
  for (const auto& d : shape) index.push_back(range(d.extent));
  return zeros(std::move(index));
}
inline Piece dense(const Shape& shape, std::vector<double> values) {
  Piece p = dense(shape);
  EXPECT_EQ(p.values.size(), values.size());
  p.values = std::move(values);
  return p;
}

/// Distinct values apart by more than a difference step and off zero: maxima, choices and kinks
/// stay where they are when one of them is moved a little.
inline void fill(Piece& p, Rng& rng) {
  std::vector<double> grid(p.values.size());
  for (std::size_t i = 0; i < grid.size(); ++i) {
    grid[i] = -1.5 + 3 * (static_cast<double>(i) + 0.3) / static_cast<double>(grid.size());
  }
  for (std::size_t i = grid.size(); i > 1; --i) std::swap(grid[i - 1], grid[rng() % i]);
  p.values = std::move(grid);
}

/// One operator with whole operands and a gradient of its output.
struct Problem {
  std::string label;
  Operation operation;
  Signature signature;
  std::vector<Piece> inputs, parameters;
  Piece output_gradient;
  std::uint64_t seed = 1;
};

inline std::int64_t experts_of(const Operation& op) {
  if (const auto* d = std::get_if<Dispatch>(&op)) return d->experts;
  if (const auto* g = std::get_if<GroupedProduct>(&op)) return g->experts;
  if (const auto* m = std::get_if<Combine>(&op)) return m->experts;
  return 5;  // of element-wise operators on rows
}

/// Random gates [sample, sequence, expert], `top_k` of them not zero for every token.
inline Piece random_gates(const Shape& tokens, std::int64_t experts, std::int64_t top_k, Rng& rng) {
  Piece gates = dense({tokens[0], tokens[1], {Dim::expert, experts}});
  for (std::size_t t = 0; t < gates.values.size(); t += static_cast<std::size_t>(experts)) {
    Indices order = range(experts);
    std::shuffle(order.begin(), order.end(), rng);
    for (std::int64_t k = 0; k < std::min(top_k, experts); ++k) {
      gates.values[t + static_cast<std::size_t>(order[static_cast<std::size_t>(k)])] =
          0.25 + 0.5 * uniform(7, rng(), 0);
    }
  }
  return gates;
}

/// Rows for the non-zero gates, values at random.
inline Piece random_rows(const Shape& shape, const Piece& gates, Rng& rng) {
  Piece p;
  p.routed = true;
  p.index = {range(shape[0].extent), range(shape[1].extent), gates.index[2],
             range(shape[3].extent)};
  const std::size_t tokens = gates.index[1].size(), experts = gates.index[2].size();
  for (std::size_t i = 0; i < gates.values.size(); ++i) {
    if (gates.values[i] == 0) continue;
    const std::size_t token = i / experts;
    p.rows.push_back({static_cast<std::int64_t>(token / tokens),
                      static_cast<std::int64_t>(token % tokens),
                      static_cast<std::int64_t>(i % experts)});
  }
  std::sort(p.rows.begin(), p.rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.expert, a.sample, a.sequence) < std::tie(b.expert, b.sample, b.sequence);
  });
  p.values.assign(p.rows.size() * p.index[3].size(), 0);
  fill(p, rng);
  return p;
}

inline Context whole_context(const Problem& p) {
  Context c;
  c.operation = &p.operation;
  c.signature = &p.signature;
  for (const auto& d : p.signature.dims) c.indices.push_back(range(d.extent));
  c.loss_scale = 0.125;
  c.seed = p.seed;
  c.step = 3;
  c.first_sample = 2;
  return c;
}

inline std::vector<const Piece*> pointers(const std::vector<Piece>& pieces) {
  std::vector<const Piece*> list;
  for (const Piece& p : pieces) list.push_back(&p);
  return list;
}

/// The inputs that the signature lets a backward pass read, null for the others: the saving
/// contract.
inline std::vector<const Piece*> saved(const std::vector<Piece>& pieces,
                                       const std::vector<Operand>& operands, bool weight) {
  std::vector<const Piece*> list;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool kept = weight ? operands[i].saved_for_weight : operands[i].saved_for_data;
    list.push_back(kept ? &pieces[i] : nullptr);
  }
  return list;
}

/// One rank's share of a problem and what it has computed so far.
struct Part {
  std::vector<std::size_t> coordinates;  ///< of its part, by iteration dimension
  Context context;
  std::vector<Piece> inputs, parameters, output_gradients;
  std::vector<Piece> statistics, backward_statistics;
  std::vector<Piece> outputs, input_gradients, parameter_gradients;

  Operands forward_operands() const {
    Operands o;
    o.inputs = pointers(inputs);
    o.parameters = pointers(parameters);
    o.statistics = pointers(statistics);
    return o;
  }
  Operands backward_operands(bool weight) const {
    const Signature& s = *context.signature;
    Operands o;
    o.inputs = saved(inputs, s.inputs, weight);
    o.outputs = saved(outputs, s.outputs, weight);
    o.parameters = pointers(parameters);
    o.output_gradients = pointers(output_gradients);
    o.statistics = pointers(statistics);
    o.backward_statistics = pointers(backward_statistics);
    return o;
  }
};

/// Reduces one statistic over the ranks that differ only in cut statistic dimensions which do not
/// index it.
inline void reduce(std::vector<Part>& parts, const Statistic& statistic,
                   const std::vector<Piece>& local, std::vector<Piece> Part::*into) {
  const Signature& s = *parts[0].context.signature;
  const auto together = [&](const Part& a, const Part& b) {
    for (std::size_t d = 0; d < s.dims.size(); ++d) {
      const bool indexes = std::find(statistic.dims.begin(), statistic.dims.end(),
                                     static_cast<int>(d)) != statistic.dims.end();
      if (s.dims[d].use == DimUse::statistic && !indexes) continue;
      if (a.coordinates[d] != b.coordinates[d]) return false;
    }
    return true;
  };
  for (Part& p : parts) {
    Piece sum;
    for (std::size_t q = 0; q < parts.size(); ++q) {
      if (!together(p, parts[q])) continue;
      if (sum.values.empty()) {
        sum = local[q];
        continue;
      }
      for (std::size_t i = 0; i < sum.values.size(); ++i) {
        const double v = local[q].values[i];
        sum.values[i] =
            statistic.reduction == Reduction::max ? std::max(sum.values[i], v) : sum.values[i] + v;
      }
    }
    (p.*into).push_back(std::move(sum));
  }
}

/// Runs all passes of all parts.
inline void run(std::vector<Part>& parts) {
  const Signature& s = *parts[0].context.signature;
  for (std::size_t k = 0; k < s.forward_statistics.size(); ++k) {
    std::vector<Piece> local;
    for (Part& p : parts) local.push_back(forward_statistic(p.context, k, p.forward_operands()));
    reduce(parts, s.forward_statistics[k], local, &Part::statistics);
  }
  for (Part& p : parts) p.outputs = forward(p.context, p.forward_operands());
  for (std::size_t k = 0; k < s.backward_statistics.size(); ++k) {
    std::vector<Piece> local;
    for (Part& p : parts) {
      local.push_back(backward_statistic(p.context, k, p.backward_operands(false)));
    }
    reduce(parts, s.backward_statistics[k], local, &Part::backward_statistics);
  }
  for (Part& p : parts) {
    p.input_gradients = backward_data(p.context, p.backward_operands(false));
    p.parameter_gradients = backward_weight(p.context, p.backward_operands(true));
  }
}

inline Part whole_part(const Problem& p) {
  Part part;
  part.coordinates.assign(p.signature.dims.size(), 0);
  part.context = whole_context(p);
  part.inputs = p.inputs;
  part.parameters = p.parameters;
  part.output_gradients = {p.output_gradient};
  return part;
}
inline Part run_whole(const Problem& p) {
  std::vector<Part> one{whole_part(p)};
  run(one);
  return one[0];
}

inline Problem make_problem(std::string label, Operation op, const std::vector<Shape>& shapes,
                            Rng& rng) {
  Problem p;
  p.label = std::move(label);
  p.operation = std::move(op);
  p.signature = signature(p.operation, shapes, p.label);
  p.seed = rng();
  const std::int64_t experts = experts_of(p.operation);
  Piece gates;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const Shape& shape = shapes[i];
    Piece x;
    if (p.signature.inputs[i].routed) {
      if (gates.values.empty()) gates = random_gates(shape, experts, shape[2].extent, rng);
      x = random_rows(shape, gates, rng);
    } else if (std::holds_alternative<Combine>(p.operation) ||
               (std::holds_alternative<Dispatch>(p.operation) && i == 1)) {
      const auto* d = std::get_if<Dispatch>(&p.operation);
      x = d != nullptr ? random_gates(shape, experts, d->top_k, rng) : gates;
    } else {
      x = dense(shape);
      fill(x, rng);
      std::int64_t vocabulary = 0;
      if (const auto* e = std::get_if<Embedding>(&p.operation)) vocabulary = e->vocabulary;
      if (std::holds_alternative<CrossEntropy>(p.operation) && i == 1) {
        vocabulary = shapes[0].back().extent;
      }
      if (vocabulary > 0) {
        for (double& v : x.values) v = static_cast<double>(pick(rng, 0, vocabulary - 1));
      }
    }
    p.inputs.push_back(std::move(x));
  }
  for (const Operand& o : p.signature.parameters) {
    p.parameters.push_back(dense(o.shape));
    fill(p.parameters.back(), rng);
  }
  // The output's rows are known only after the forward pass.
  Part part = whole_part(p);
  for (std::size_t k = 0; k < p.signature.forward_statistics.size(); ++k) {
    part.statistics.push_back(forward_statistic(part.context, k, part.forward_operands()));
  }
  p.output_gradient = forward(part.context, part.forward_operands())[0];
  fill(p.output_gradient, rng);
  return p;
}

/// Every operator and option on small random shapes; extents of 1 and odd ones are common.
inline std::vector<Problem> problems(Rng& rng) {
  std::vector<Problem> list;
  const auto n = [&](std::int64_t low, std::int64_t high) { return pick(rng, low, high); };
  const auto chance = [&] { return rng() % 2 == 0; };
  const auto add = [&](std::string label, Operation op, std::vector<Shape> shapes) {
    list.push_back(make_problem(std::move(label), std::move(op), shapes, rng));
  };
  const NamedExtent sample{Dim::sample, n(1, 3)}, sequence{Dim::sequence, n(1, 5)};
  const NamedExtent head{Dim::head, n(1, 3)}, feature{Dim::feature, n(1, 5)};
  const NamedExtent ffn{Dim::ffn, n(1, 5)}, inner{Dim::head_feature, n(1, 4)};
  const Shape tokens{sample, sequence, feature}, heads{sample, sequence, head, inner};
  const Shape image{sample, feature, {Dim::height, n(3, 7)}, {Dim::width, n(3, 7)}};
  const Shape rows{sample, sequence, {Dim::expert, n(1, 3)}, feature};

  add("linear", Linear{1, {ffn}, chance()}, {tokens});
  add("linear, square", Linear{1, {feature}, true}, {tokens});
  add("linear to heads", Linear{1, {head, inner}, true}, {tokens});
  add("linear from heads", Linear{2, {feature}, true}, {heads});
  add("linear of samples", Linear{1, {{Dim::vocabulary, n(1, 7)}}, true}, {{sample, feature}});
  add("add bias", AddBias{}, {tokens});
  add("embedding", Embedding{n(1, 9), n(1, 4)}, {{sample, sequence}});
  add("position embedding", PositionEmbedding{sequence.extent + n(0, 2)}, {tokens});

  for (const auto kind : {Normalize::Kind::layer, Normalize::Kind::rms, Normalize::Kind::batch}) {
    const bool batch = kind == Normalize::Kind::batch;
    for (const bool synchronised : {false, true}) {
      Normalize op;
      op.kind = kind;
      op.epsilon = 0.01;
      op.scale = chance();
      op.bias = kind != Normalize::Kind::rms && chance();
      op.synchronised = synchronised;
      const std::string label =
          fmt::format("normalise {} {}", static_cast<int>(kind), synchronised);
      add(label, op, {batch ? image : tokens});
      add(label + " small", op, {batch ? Shape{{Dim::sample, 3}, feature} : heads});
      if (batch) continue;
      op.scale = op.bias = true;
      op.group = inner.extent;
      add(label + " in groups", op, {{sample, sequence, head, {Dim::head_feature, 3 * op.group}}});
      add(label + " in groups of features", op, {{sample, sequence, {Dim::feature, 2 * op.group}}});
    }
  }
  Normalize local;
  local.kind = Normalize::Kind::local;
  local.scale = local.bias = false;
  local.window = n(1, 4);
  local.alpha = 0.5;
  add("normalise locally", local, {image});

  for (const auto kind : {ActivationKind::relu, ActivationKind::squared_relu, ActivationKind::gelu,
                          ActivationKind::gelu_tanh, ActivationKind::silu, ActivationKind::sigmoid,
                          ActivationKind::tanh}) {
    const std::string label = fmt::format("activation {}", static_cast<int>(kind));
    add(label, Activation{kind}, {chance() ? tokens : heads});
    add(label + " of rows", Activation{kind}, {rows});
    add("gated " + label, GatedActivation{kind}, {tokens, tokens});
    add("gated " + label + " of rows", GatedActivation{kind}, {rows, rows});
  }
  add("addition", Add{}, {heads, heads});
  add("multiplication", Multiply{}, {tokens, tokens});
  add("dropout", Dropout{0.4}, {tokens});
  add("dropout of heads", Dropout{0.4}, {heads});
  add("dropout of rows", Dropout{0.4}, {rows});
  for (const std::int64_t skipped : {0, 3}) {
    const std::int64_t turned = 2 * n(1, 3);
    const Rotary rotary{turned + skipped, turned, 100};
    add("rotary", rotary, {{sample, sequence, head, {Dim::head_feature, 2 * rotary.head_dim}}});
    add("rotary, one head", rotary, {{sample, sequence, {Dim::head_feature, rotary.head_dim}}});
  }

  for (int variant = 0; variant < 8; ++variant) {
    Attention op;
    op.queries_per_head = n(1, 3);
    op.qk_dim = n(1, 4);
    op.v_dim = n(1, 4);
    op.scale = chance() ? 0 : 0.7;
    op.causal = variant % 2 == 0;
    op.window = variant % 4 >= 2 ? n(1, 3) : 0;
    op.sinks = variant >= 4;
    op.materialised = chance();
    // Without a causal mask, keys may be others than the queries (cross attention).
    const std::int64_t keys = op.causal || op.window > 0 ? sequence.extent : n(1, 6);
    add(fmt::format("attention {}", variant), op,
        {{sample, sequence, head, {Dim::head_feature, op.queries_per_head * op.qk_dim}},
         {sample, {Dim::sequence, keys}, head, {Dim::head_feature, op.qk_dim}},
         {sample, {Dim::sequence, keys}, head, {Dim::head_feature, op.v_dim}}});
  }
  add("scores", BatchedProduct{2},
      {{sample, head, sequence, inner}, {sample, head, inner, sequence}});
  add("batched product", BatchedProduct{1}, {tokens, {sample, feature, ffn}});
  add("softmax", Softmax{}, {tokens});
  const Shape logits{sample, sequence, {Dim::vocabulary, n(1, 6)}};
  add("cross entropy", CrossEntropy{}, {logits, {sample, sequence}});
  add("cross entropy of samples", CrossEntropy{}, {{sample, logits[2]}, {sample}});
  add("mean squared error", MeanSquaredError{}, {tokens, tokens});

  for (int variant = 0; variant < 6; ++variant) {
    const auto window = [&](std::int64_t kernel) {
      return Window{kernel, n(1, 3), n(0, kernel - 1), n(0, kernel - 1), kernel > 1 ? n(1, 2) : 1};
    };
    const Window h = window(n(1, 3)), w = window(n(1, 3));
    Shape x = image;
    x[2].extent += 2, x[3].extent += 2;
    Convolution op{n(1, 3), h, w, 1, chance()};
    if (variant >= 4) {
      op.groups = n(2, 3);
      op.out = op.groups * n(1, 2);
      x[1].extent = op.groups * n(1, 2);
    }
    add(fmt::format("convolution {}", variant), op, {x});
    add(fmt::format("pool {}", variant), Pool{variant % 2 == 0, h, w, variant % 3 == 0}, {x});
  }
  add("global average pool", GlobalAveragePool{}, {image});
  add("scale features", ScaleFeatures{}, {image, {image[0], image[1]}});
  add("to sequence", ToSequence{}, {image});
  add("prepend token", PrependToken{}, {tokens});
  add("select token", SelectToken{n(0, sequence.extent - 1)}, {tokens});
  add("concat last", Concat{true},
      {tokens, {sample, sequence, {Dim::feature, n(1, 3)}}, {sample, sequence, {Dim::feature, 1}}});
  add("concat second", Concat{false}, {tokens, {sample, {Dim::sequence, n(1, 3)}, feature}});
  add("concat heads", Concat{true}, {heads, heads});
  add("append to heads", AppendToHeads{}, {heads, {sample, sequence, {Dim::head_feature, 2}}});

  add("causal convolution", CausalConvolution{n(1, 4), chance()}, {heads});
  const StateSpace scan{n(1, 3), n(1, 3), n(1, 3), n(1, 4)};
  add("state space", scan,
      {{sample,
        sequence,
        head,
        {Dim::head_feature, scan.heads_per_group * scan.head_dim + 2 * scan.state}},
       {sample, sequence, head, {Dim::head_feature, scan.heads_per_group}}});
  add("gated norm", GatedNorm{0.01}, {heads, heads});

  const std::int64_t experts = n(1, 6), top_k = n(1, std::min<std::int64_t>(3, experts));
  for (int variant = 0; variant < 4; ++variant) {
    add(fmt::format("router {}", variant),
        Router{top_k, variant % 2 == 1, variant >= 2, chance() ? 1 : 2.5},
        {{sample, sequence, {Dim::expert, experts}}});
  }
  for (const bool sigmoid : {false, true}) {
    const std::int64_t each = n(1, 3), of = n(2, 4), open = n(1, of);
    add(fmt::format("router of groups, {}", sigmoid ? "sigmoid" : "softmax"),
        Router{n(1, std::min<std::int64_t>(3, each * open)), sigmoid, true, 2.5, of, open,
               n(1, each)},
        {{sample, sequence, {Dim::expert, each * of}}});
  }
  const Shape gates{sample, sequence, {Dim::expert, experts}};
  const Shape routed{sample, sequence, {Dim::expert, top_k}, feature};
  add("dispatch", Dispatch{experts, top_k}, {tokens, gates});
  add("grouped product", GroupedProduct{experts, ffn, chance()}, {routed});
  add("grouped product, square", GroupedProduct{experts, feature, true}, {routed});
  add("combine", Combine{experts}, {routed, gates});
  return list;
}

}  // namespace partita::reference
