#include "runtime/reference/kernels.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>

#include "runtime/reference/compare.h"
#include "tests/runtime/reference/differences.h"
#include "tests/runtime/reference/problems.h"

namespace partita::reference {
namespace {

// ---------------------------------------------------------------------------- the piece law

/// The part of a whole operand that a rank touches.
Piece slice(const Context& c, const Operand& operand, const Piece& whole) {
  if (whole.routed) {
    const auto holds = [&](std::size_t d, std::int64_t index) {
      const Indices& local = c.indices[at(operand.dims[d])];
      const std::int64_t extent = c.signature->dims[at(operand.dims[d])].extent;
      // An element-wise operator's expert dimension counts choices, so it holds no expert's number.
      if (static_cast<std::int64_t>(local.size()) == extent) return true;
      return std::binary_search(local.begin(), local.end(), index);
    };
    Piece p;
    p.routed = true;
    p.index = whole.index;
    p.index[3] = touched(c, operand, 3);
    for (std::size_t r = 0; r < whole.rows.size(); ++r) {
      const Row& row = whole.rows[r];
      if (!holds(0, row.sample) || !holds(1, row.sequence) || !holds(2, row.expert)) continue;
      p.rows.push_back(row);
      for (const std::int64_t f : p.index[3]) {
        p.values.push_back(whole.values[r * whole.index[3].size() + static_cast<std::size_t>(f)]);
      }
    }
    return p;
  }
  std::vector<Indices> index;
  for (std::size_t d = 0; d < operand.shape.size(); ++d) index.push_back(touched(c, operand, d));
  Piece p = zeros(std::move(index));
  for (std::size_t i = 0; i < p.values.size(); ++i) {
    std::size_t rest = i, from = 0, stride = 1;
    for (std::size_t d = p.index.size(); d-- > 0;) {
      from += static_cast<std::size_t>(p.index[d][rest % p.index[d].size()]) * stride;
      rest /= p.index[d].size();
      stride *= whole.index[d].size();
    }
    p.values[i] = whole.values[from];
  }
  return p;
}

/// Adds a rank's piece where its indices lie in the whole.
void scatter(const Piece& p, Piece& whole) {
  if (whole.routed) {
    for (std::size_t r = 0; r < p.rows.size(); ++r) {
      const auto found = std::find(whole.rows.begin(), whole.rows.end(), p.rows[r]);
      ASSERT_NE(found, whole.rows.end());
      const auto row = static_cast<std::size_t>(found - whole.rows.begin());
      for (std::size_t f = 0; f < p.index[3].size(); ++f) {
        whole.values[row * whole.index[3].size() + static_cast<std::size_t>(p.index[3][f])] +=
            p.values[r * p.index[3].size() + f];
      }
    }
    return;
  }
  for (std::size_t i = 0; i < p.values.size(); ++i) {
    std::size_t rest = i, to = 0, stride = 1;
    for (std::size_t d = p.index.size(); d-- > 0;) {
      to += static_cast<std::size_t>(p.index[d][rest % p.index[d].size()]) * stride;
      rest /= p.index[d].size();
      stride *= whole.index[d].size();
    }
    whole.values[to] += p.values[i];
  }
}

void expect_close(const Piece& got, const Piece& want, const std::string& what) {
  ASSERT_EQ(got.values.size(), want.values.size()) << what;
  double size = 1;
  for (const double v : want.values) size = std::max(size, std::abs(v));
  for (std::size_t i = 0; i < want.values.size(); ++i) {
    ASSERT_NEAR(got.values[i], want.values[i], 1e-12 * size) << what << ", element " << i;
  }
}

/// Every index to one of `parts` parts at random: uneven, not contiguous, sometimes empty.
std::vector<Indices> random_parts(std::int64_t extent, std::size_t parts, Rng& rng) {
  std::vector<Indices> list(parts);
  for (std::int64_t i = 0; i < extent; ++i) list[rng() % parts].push_back(i);
  return list;
}

bool has_local_batch(const Problem& p) {
  const auto* n = std::get_if<Normalize>(&p.operation);
  return n != nullptr && n->kind == Normalize::Kind::batch && !n->synchronised;
}
/// Dimensions whose cut must change nothing.
std::vector<std::size_t> cuttable(const Problem& p) {
  std::vector<std::size_t> dims;
  for (std::size_t d = 0; d < p.signature.dims.size(); ++d) {
    const IterationDim& dim = p.signature.dims[d];
    if (dim.use == DimUse::whole) continue;
    if (dim.dim == Dim::sample && has_local_batch(p)) continue;  // by design another result
    // Element-wise operators on rows: the dimension counts choices; ranks hold any rows.
    const bool routed = !p.signature.inputs.empty() && p.signature.inputs[0].routed;
    if (dim.dim == Dim::expert && routed && p.signature.parameters.empty() &&
        !std::holds_alternative<Combine>(p.operation)) {
      continue;
    }
    dims.push_back(d);
  }
  return dims;
}

/// The law: pieces by `cuts` (parts of each iteration dimension), run as ranks would run them and
/// put together as the signature says, give the whole.
void expect_piece_law(const Problem& p, const std::vector<std::vector<Indices>>& cuts,
                      const std::string& what) {
  const Part whole = run_whole(p);
  const Signature& s = p.signature;
  std::vector<Part> parts;
  std::size_t total = 1;
  for (const auto& cut : cuts) total *= cut.size();
  for (std::size_t rank = 0; rank < total; ++rank) {
    Part part;
    part.context = whole_context(p);
    std::size_t rest = rank;
    for (std::size_t d = 0; d < cuts.size(); ++d) {
      const std::size_t coordinate = rest % cuts[d].size();
      rest /= cuts[d].size();
      part.coordinates.push_back(coordinate);
      part.context.indices[d] = cuts[d][coordinate];
      if (s.dims[d].use == DimUse::sum && coordinate > 0) part.context.adds_bias = false;
    }
    for (std::size_t i = 0; i < s.inputs.size(); ++i) {
      part.inputs.push_back(slice(part.context, s.inputs[i], p.inputs[i]));
    }
    for (std::size_t i = 0; i < s.parameters.size(); ++i) {
      part.parameters.push_back(slice(part.context, s.parameters[i], p.parameters[i]));
    }
    part.output_gradients.push_back(slice(part.context, s.outputs[0], p.output_gradient));
    parts.push_back(std::move(part));
  }
  run(parts);

  const auto zero_like = [](const Piece& piece) {
    Piece z = piece;
    std::fill(z.values.begin(), z.values.end(), 0.0);
    return z;
  };
  // A statistic is whole on all its ranks: their results are one result, not a sum.
  const auto repeats = [&](const Part& part) {
    for (std::size_t d = 0; d < s.dims.size(); ++d) {
      const auto& dims = s.outputs[0].dims;
      const bool indexes = std::find(dims.begin(), dims.end(), static_cast<int>(d)) != dims.end();
      if (s.dims[d].use == DimUse::statistic && !indexes && part.coordinates[d] > 0) return true;
    }
    return false;
  };
  Piece output = zero_like(whole.outputs[0]);
  for (const Part& part : parts) {
    ASSERT_EQ(part.outputs.size(), 1U);
    if (!repeats(part)) scatter(part.outputs[0], output);
  }
  expect_close(output, whole.outputs[0], what + ": output");

  const auto gather = [&](std::vector<Piece> Part::*list, const std::string& name) {
    for (std::size_t i = 0; i < (whole.*list).size(); ++i) {
      Piece sum = zero_like((whole.*list)[i]);
      for (const Part& part : parts) scatter((part.*list)[i], sum);
      expect_close(sum, (whole.*list)[i], fmt::format("{}: {} {}", what, name, i));
    }
  };
  gather(&Part::input_gradients, "gradient of input");
  gather(&Part::parameter_gradients, "gradient of parameter");
}

TEST(PieceLaw, HoldsForEveryOperatorAndEveryCuttableDimension) {
  for (std::uint64_t round = 0; round < 12; ++round) {
    Rng rng{round};
    for (const Problem& p : problems(rng)) {
      std::vector<std::vector<Indices>> uncut;
      for (const auto& d : p.signature.dims) uncut.push_back({range(d.extent)});
      for (const std::size_t d : cuttable(p)) {
        for (const std::size_t parts : {2U, 3U}) {
          auto cuts = uncut;
          cuts[d] = random_parts(p.signature.dims[d].extent, parts, rng);
          expect_piece_law(p, cuts,
                           fmt::format("round {}, {}, {} in {}", round, p.label,
                                       name(p.signature.dims[d].dim), parts));
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(PieceLaw, HoldsWhenAllDimensionsAreCutAtOnce) {
  for (std::uint64_t round = 0; round < 6; ++round) {
    Rng rng{100 + round};
    for (const Problem& p : problems(rng)) {
      std::vector<std::vector<Indices>> cuts;
      for (const auto& d : p.signature.dims) cuts.push_back({range(d.extent)});
      for (const std::size_t d : cuttable(p)) {
        cuts[d] = random_parts(p.signature.dims[d].extent, 2, rng);
      }
      expect_piece_law(p, cuts, fmt::format("round {}, {}", round, p.label));
      if (HasFailure()) return;
    }
  }
}

TEST(PieceLaw, HoldsForQueriesAndKeysInAnyOrderOfZigzagShares) {
  // Rank 0 of two holds the first and the last quarter of a causal sequence.
  Rng rng{5};
  Attention op;
  op.qk_dim = op.v_dim = 2;
  const Shape x{{Dim::sample, 1}, {Dim::sequence, 8}, {Dim::head, 2}, {Dim::head_feature, 2}};
  const Problem p = make_problem("attention", op, {x, x, x}, rng);
  std::vector<std::vector<Indices>> cuts;
  for (const auto& d : p.signature.dims) cuts.push_back({range(d.extent)});
  cuts[1] = {{0, 1, 6, 7}, {2, 3, 4, 5}};
  expect_piece_law(p, cuts, "zigzag");
}

TEST(LocalBatchNorm, OfCutSamplesIsTheNormOfEachShareAlone) {
  for (std::uint64_t round = 0; round < 10; ++round) {
    Rng rng{round};
    Normalize op;
    op.kind = Normalize::Kind::batch;
    const NamedExtent feature{Dim::feature, pick(rng, 1, 3)};
    const Shape image{{Dim::sample, 5}, feature, {Dim::height, 3}, {Dim::width, pick(rng, 1, 3)}};
    const Problem p = make_problem("batch norm", op, {image}, rng);
    const std::vector<Indices> shares{{0, 2, 3}, {1, 4}};
    std::vector<Part> parts;
    for (std::size_t i = 0; i < 2; ++i) {
      Part part = whole_part(p);
      part.coordinates[0] = i;
      part.context.indices[0] = shares[i];
      part.inputs = {slice(part.context, p.signature.inputs[0], p.inputs[0])};
      part.output_gradients = {slice(part.context, p.signature.outputs[0], p.output_gradient)};
      parts.push_back(std::move(part));
    }
    run(parts);
    for (std::size_t i = 0; i < 2; ++i) {
      Problem alone = p;
      Shape shape = image;
      shape[0].extent = static_cast<std::int64_t>(shares[i].size());
      alone.signature = signature(p.operation, {shape}, "alone");
      alone.inputs = parts[i].inputs;
      alone.output_gradient = parts[i].output_gradients[0];
      alone.inputs[0].index[0] = alone.output_gradient.index[0] = range(shape[0].extent);
      const Part want = run_whole(alone);
      expect_close(parts[i].outputs[0], want.outputs[0], "output");
      expect_close(parts[i].input_gradients[0], want.input_gradients[0], "gradient");
      expect_close(parts[i].parameter_gradients[0], want.parameter_gradients[0], "scale");
      expect_close(parts[i].parameter_gradients[1], want.parameter_gradients[1], "bias");
    }
  }
}

// --------------------------------------------------------------------- finite differences

/// The gradients that backward computes - from saved operands only - are the derivatives of
/// forward.
void expect_gradients(Problem p, Rng& rng) {
  const Part analytic = run_whole(p);
  double magnitude = 0;
  for (std::size_t i = 0; i < p.output_gradient.values.size(); ++i) {
    magnitude += std::abs(p.output_gradient.values[i] * analytic.outputs[0].values[i]);
  }
  Part part = whole_part(p);
  const auto loss = [&] {
    part.statistics.clear();
    for (std::size_t k = 0; k < p.signature.forward_statistics.size(); ++k) {
      part.statistics.push_back(forward_statistic(part.context, k, part.forward_operands()));
    }
    const Piece y = forward(part.context, part.forward_operands())[0];
    double sum = 0;
    for (std::size_t i = 0; i < y.values.size(); ++i) {
      sum += y.values[i] * p.output_gradient.values[i];
    }
    return sum;
  };
  const auto check = [&](Piece& value, const Piece& gradient, const std::string& what) {
    ASSERT_EQ(gradient.values.size(), value.values.size()) << what;
    for (int trial = 0; trial < 12 && !value.values.empty(); ++trial) {
      const std::size_t i = rng() % value.values.size();
      expect_derivative(gradient.values[i], value.values[i], magnitude, loss,
                        fmt::format("{}, element {}", what, i));
    }
  };
  for (std::size_t i = 0; i < part.inputs.size(); ++i) {
    if (!p.signature.inputs[i].differentiable) {
      EXPECT_TRUE(analytic.input_gradients[i].values.empty()) << p.label;
      continue;
    }
    check(part.inputs[i], analytic.input_gradients[i], fmt::format("{}: input {}", p.label, i));
  }
  ASSERT_EQ(analytic.parameter_gradients.size(), part.parameters.size()) << p.label;
  for (std::size_t i = 0; i < part.parameters.size(); ++i) {
    check(part.parameters[i], analytic.parameter_gradients[i],
          fmt::format("{}: parameter {}", p.label, i));
  }
}

TEST(Gradients, OfEveryOperatorAreItsDerivatives) {
  for (std::uint64_t round = 0; round < 8; ++round) {
    Rng rng{1000 + round};
    for (Problem& p : problems(rng)) {
      expect_gradients(std::move(p), rng);
      if (HasFailure()) return;
    }
  }
}

TEST(Gradients, CoverEveryKindOfOperator) {
  Rng rng{1};
  std::vector<char> seen(std::variant_size_v<Operation>, 0);
  for (const Problem& p : problems(rng)) seen[p.operation.index()] = 1;
  EXPECT_THAT(seen, testing::Each(1));
}

// ---------------------------------------------------------------------- hand-derived examples

using testing::DoubleNear;
using testing::ElementsAre;
using testing::ElementsAreArray;
using testing::Pointwise;

/// All passes on given values.
Part example(const Operation& op, const std::vector<Piece>& inputs,
             const std::vector<Shape>& shapes,
             const std::vector<std::vector<double>>& parameters = {},
             const std::vector<double>& output_gradient = {}, double scale = 1) {
  Problem p;
  p.operation = op;
  p.signature = signature(op, shapes, "example");
  p.inputs = inputs;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    p.parameters.push_back(dense(p.signature.parameters[i].shape, parameters[i]));
  }
  p.output_gradient = dense(p.signature.outputs[0].shape);
  if (output_gradient.empty()) {
    std::fill(p.output_gradient.values.begin(), p.output_gradient.values.end(), 1.0);
  } else {
    p.output_gradient.values = output_gradient;
  }
  std::vector<Part> one{whole_part(p)};
  one[0].context.loss_scale = scale;
  run(one);
  one[0].context.operation = nullptr;  // both die with this function
  one[0].context.signature = nullptr;
  return one[0];
}
Part example(const Operation& op, const Shape& shape, const std::vector<double>& x,
             const std::vector<std::vector<double>>& parameters = {},
             const std::vector<double>& output_gradient = {}) {
  return example(op, {dense(shape, x)}, {shape}, parameters, output_gradient);
}

const NamedExtent kOne{Dim::sample, 1};

TEST(Examples, Linear) {
  // y = x Wᵀ + b; dx = dy W; dW = dyᵀ x; db = dy.
  const Part p = example(Linear{1, {{Dim::ffn, 2}}, true}, {kOne, {Dim::feature, 3}}, {1, 2, 3},
                         {{1, 0, -1, 2, 1, 0}, {10, 20}}, {1, 2});
  EXPECT_THAT(p.outputs[0].values, ElementsAre(8, 24));
  EXPECT_THAT(p.input_gradients[0].values, ElementsAre(5, 2, -1));
  EXPECT_THAT(p.parameter_gradients[0].values, ElementsAre(1, 2, 3, 2, 4, 6));
  EXPECT_THAT(p.parameter_gradients[1].values, ElementsAre(1, 2));
}

TEST(Examples, LayerNormOfPlusAndMinusOne) {
  Normalize op;
  op.epsilon = 3;  // variance 1: divides by sqrt(4)
  const Part p = example(op, {kOne, {Dim::feature, 2}}, {-1, 1}, {{1, 2}, {0, 5}}, {1, 1});
  EXPECT_THAT(p.outputs[0].values, ElementsAre(-0.5, 6));
  // g = (1, 2): mean 1.5; g·x̂ = -0.5 + 1: mean 0.25; dx = (g - 1.5 - 0.25 x̂) / 2.
  EXPECT_THAT(p.input_gradients[0].values, ElementsAre((-0.5 + 0.125) / 2, (0.5 - 0.125) / 2));
}

TEST(Examples, CrossEntropyOfEqualLogits) {
  const Shape logits{kOne, {Dim::sequence, 2}, {Dim::vocabulary, 4}},
      labels{kOne, {Dim::sequence, 2}};
  const Part p = example(CrossEntropy{}, {dense(logits), dense(labels, {1, 3})}, {logits, labels},
                         {}, {2}, 0.5);
  EXPECT_NEAR(p.outputs[0].values[0], std::log(4), 1e-15);
  EXPECT_THAT(p.input_gradients[0].values,
              ElementsAre(0.25, -0.75, 0.25, 0.25, 0.25, 0.25, 0.25, -0.75));
}

TEST(Examples, CausalAttentionWithEqualScoresAveragesTheValuesSoFar) {
  Attention op;
  op.qk_dim = 1;
  op.v_dim = 1;
  const Shape x{kOne, {Dim::sequence, 3}, {Dim::head, 1}, {Dim::head_feature, 1}};
  const Piece zero = dense(x), v = dense(x, {3, 5, 10});
  EXPECT_THAT(example(op, {zero, zero, v}, {x, x, x}).outputs[0].values,
              Pointwise(DoubleNear(1e-14), {3.0, 4.0, 6.0}));
  op.window = 2;
  EXPECT_THAT(example(op, {zero, zero, v}, {x, x, x}).outputs[0].values,
              Pointwise(DoubleNear(1e-14), {3.0, 4.0, 7.5}));
  op.sinks = true;  // a sink of the same logit takes its share of the weight
  EXPECT_THAT(example(op, {zero, zero, v}, {x, x, x}, {{0}}).outputs[0].values,
              Pointwise(DoubleNear(1e-14), {1.5, 8.0 / 3, 5.0}));
}

TEST(Examples, RotaryTurnsPairsByTheirPosition) {
  // Head of 3 values, the last 2 turn: at position 2 by 2 · base^0 = 2 radians.
  const Shape x{kOne, {Dim::sequence, 3}, {Dim::head_feature, 3}};
  const Part p = example(Rotary{3, 2, 100}, x, {7, 1, 0, 7, 1, 0, 7, 1, 0});
  EXPECT_THAT(p.outputs[0].values,
              Pointwise(DoubleNear(1e-15), {7.0, 1.0, 0.0, 7.0, std::cos(1), std::sin(1), 7.0,
                                            std::cos(2), std::sin(2)}));
}

TEST(Examples, ConvolutionWithPaddingAndStride) {
  // Kernel (1, 2, 3) over the padded row 0 1 2 3 4 0 in steps of 2: outputs at 0 and 2.
  Convolution op;
  op.out = 1;
  op.width = {3, 2, 1, 1, 1};
  const Shape x{kOne, {Dim::feature, 1}, {Dim::height, 1}, {Dim::width, 4}};
  const Part p = example(op, x, {1, 2, 3, 4}, {{1, 2, 3}}, {1, 10});
  EXPECT_THAT(p.outputs[0].values, ElementsAre(8, 20));
  EXPECT_THAT(p.input_gradients[0].values, ElementsAre(2, 13, 20, 30));
  EXPECT_THAT(p.parameter_gradients[0].values, ElementsAre(20, 31, 42));
}

TEST(Examples, PoolingIgnoresPaddingForMaximaAndCountsItForMeansOnDemand) {
  const Window w{2, 2, 1, 1, 1};
  const Shape x{kOne, {Dim::feature, 1}, {Dim::height, 1}, {Dim::width, 2}};
  EXPECT_THAT(example(Pool{true, {}, w}, x, {-4, -6}).outputs[0].values, ElementsAre(-4, -6));
  EXPECT_THAT(example(Pool{false, {}, w, true}, x, {-4, -6}).outputs[0].values,
              ElementsAre(-2, -3));
  EXPECT_THAT(example(Pool{false, {}, w, false}, x, {-4, -6}).outputs[0].values,
              ElementsAre(-4, -6));
}

TEST(Examples, LocalResponseNormalisationDividesByItsNeighbours) {
  Normalize op;
  op.kind = Normalize::Kind::local;
  op.scale = op.bias = false;
  op.window = 3;
  op.alpha = 3;
  op.beta = 1;
  EXPECT_THAT(example(op, {kOne, {Dim::feature, 3}}, {1, 2, 3}).outputs[0].values,
              ElementsAre(1.0 / 6, 2.0 / 15, 3.0 / 14));
}

TEST(Examples, PoolingTakesTheLargestOfEveryWindow) {
  const Shape x{kOne, {Dim::feature, 1}, {Dim::height, 2}, {Dim::width, 3}};
  const Part p = example(Pool{true, {2, 1, 0, 0, 1}, {2, 1, 0, 0, 1}}, x,
                         {1, 1.5, 1.25, 1.125, 1.375, 1.75}, {}, {1, 10});
  EXPECT_THAT(p.outputs[0].values, ElementsAre(1.5, 1.75));
  EXPECT_THAT(p.input_gradients[0].values, ElementsAre(0, 1, 0, 0, 0, 10));
}

TEST(Examples, GroupsOfARootMeanSquareNormAreNormalisedAlone) {
  Normalize op;
  op.kind = Normalize::Kind::rms;
  op.bias = false;
  op.epsilon = 0;
  op.group = 2;
  const Part p = example(op, {kOne, {Dim::feature, 4}}, {1, 7, -3, 3}, {{1, 10}});
  EXPECT_THAT(p.outputs[0].values, Pointwise(DoubleNear(1e-14), {0.2, 14.0, -1.0, 10.0}));
}

TEST(Examples, BatchNormRunsOverSamplesAndPixels) {
  Normalize op;
  op.kind = Normalize::Kind::batch;
  op.epsilon = 0;
  const Shape x{{Dim::sample, 2}, {Dim::feature, 2}, {Dim::height, 1}, {Dim::width, 2}};
  // Feature 0: 1, 1, 5, 5: mean 3, deviation 2. Feature 1: 0, 2, 2, 0: mean 1, deviation 1.
  EXPECT_THAT(example(op, x, {1, 1, 0, 2, 5, 5, 2, 0}, {{1, 3}, {0, 10}}).outputs[0].values,
              Pointwise(DoubleNear(1e-14), {-1.0, -1.0, 7.0, 13.0, 1.0, 1.0, 13.0, 7.0}));
}

TEST(Examples, GroupedAndDilatedConvolution) {
  Convolution op;
  op.out = 4;
  op.groups = 2;
  op.width = {2, 1, 0, 0, 2};
  op.bias = true;
  const Shape x{kOne, {Dim::feature, 2}, {Dim::height, 1}, {Dim::width, 3}};
  // Each output channel sees its group's channel only: w0 · x[0] + w1 · x[2] + b.
  EXPECT_THAT(example(op, x, {1, 9, 2, 3, 9, 4}, {{1, 1, 1, 0, 1, 1, 0, 1}, {0, 10, 20, 30}})
                  .outputs[0]
                  .values,
              ElementsAre(3, 11, 27, 34));
}

TEST(Examples, QueriesOfAGroupShareAKeyHead) {
  // Two queries of one head lie side by side; a large logit picks one key each.
  Attention op;
  op.queries_per_head = 2;
  op.qk_dim = 1;
  op.v_dim = 2;
  op.causal = false;
  const Shape q{kOne, {Dim::sequence, 1}, {Dim::head, 1}, {Dim::head_feature, 2}};
  const Shape k{kOne, {Dim::sequence, 2}, {Dim::head, 1}, {Dim::head_feature, 1}};
  const Shape v{kOne, {Dim::sequence, 2}, {Dim::head, 1}, {Dim::head_feature, 2}};
  const Part p =
      example(op, {dense(q, {100, -100}), dense(k, {1, -1}), dense(v, {1, 2, 3, 4})}, {q, k, v});
  EXPECT_THAT(p.outputs[0].values, Pointwise(DoubleNear(1e-12), {1.0, 2.0, 3.0, 4.0}));
}

TEST(Examples, ProductsSoftmaxGatesAndSquares) {
  const Shape a{kOne, {Dim::sequence, 2}, {Dim::feature, 2}};
  const Shape b{kOne, {Dim::feature, 2}, {Dim::ffn, 2}};
  EXPECT_THAT(
      example(BatchedProduct{1}, {dense(a, {1, 2, 3, 4}), dense(b, {1, 10, 100, 1000})}, {a, b})
          .outputs[0]
          .values,
      ElementsAre(201, 2010, 403, 4030));
  const Shape x{kOne, {Dim::feature, 2}};
  EXPECT_THAT(example(Softmax{}, x, {0, std::log(3)}).outputs[0].values,
              Pointwise(DoubleNear(1e-15), {0.25, 0.75}));
  EXPECT_THAT(
      example(GatedActivation{ActivationKind::relu}, {dense(x, {-1, 2}), dense(x, {5, 7})}, {x, x})
          .outputs[0]
          .values,
      ElementsAre(0, 14));
  EXPECT_THAT(example(Activation{ActivationKind::silu}, x, {0, std::log(3)}).outputs[0].values,
              Pointwise(DoubleNear(1e-15), {0.0, 0.75 * std::log(3)}));
  const Part p =
      example(MeanSquaredError{}, {dense(x, {1, 5}), dense(x, {2, 2})}, {x, x}, {}, {1}, 0.5);
  EXPECT_THAT(p.outputs[0].values, ElementsAre(5));
  EXPECT_THAT(p.input_gradients[0].values, ElementsAre(-1, 3));
}

TEST(Examples, TablesAndShapes) {
  const Shape ids{kOne, {Dim::sequence, 2}};
  EXPECT_THAT(
      example(Embedding{3, 2}, ids, {2, 0}, {{1, 2, 3, 4, 5, 6}}, {1, 1, 1, 1}).outputs[0].values,
      ElementsAre(5, 6, 1, 2));
  const Shape x{kOne, {Dim::sequence, 2}, {Dim::feature, 2}};
  const std::vector<double> values{1, 2, 3, 4};
  EXPECT_THAT(
      example(PositionEmbedding{3}, x, values, {{10, 20, 30, 40, 50, 60}}).outputs[0].values,
      ElementsAre(11, 22, 33, 44));
  EXPECT_THAT(example(PrependToken{}, x, values, {{8, 9}}).outputs[0].values,
              ElementsAre(8, 9, 1, 2, 3, 4));
  EXPECT_THAT(example(SelectToken{1}, x, values).outputs[0].values, ElementsAre(3, 4));
  const Piece p = dense(x, values), q = dense(x, {5, 6, 7, 8});
  EXPECT_THAT(example(Concat{true}, {p, q}, {x, x}).outputs[0].values,
              ElementsAre(1, 2, 5, 6, 3, 4, 7, 8));
  EXPECT_THAT(example(Concat{false}, {p, q}, {x, x}).outputs[0].values,
              ElementsAre(1, 2, 3, 4, 5, 6, 7, 8));
  const Shape heads{kOne, {Dim::sequence, 2}, {Dim::head, 2}, {Dim::head_feature, 1}};
  const Shape shared{kOne, {Dim::sequence, 2}, {Dim::head_feature, 1}};
  EXPECT_THAT(
      example(AppendToHeads{}, {dense(heads, values), dense(shared, {8, 9})}, {heads, shared})
          .outputs[0]
          .values,
      ElementsAre(1, 8, 2, 8, 3, 9, 4, 9));
  const Shape image{kOne, {Dim::feature, 2}, {Dim::height, 1}, {Dim::width, 2}};
  EXPECT_THAT(example(ToSequence{}, image, values).outputs[0].values, ElementsAre(1, 3, 2, 4));
  EXPECT_THAT(example(GlobalAveragePool{}, image, values).outputs[0].values, ElementsAre(1.5, 3.5));
  const Shape gate{kOne, {Dim::feature, 2}};
  EXPECT_THAT(example(ScaleFeatures{}, {dense(image, values), dense(gate, {2, 10})}, {image, gate})
                  .outputs[0]
                  .values,
              ElementsAre(2, 4, 30, 40));
}

/// docs/execution.md, "Rounding".
TEST(ProductsInFp8, TheExampleOfThePage) {
  EXPECT_EQ(error_of_products(EightBits::e4m3, EightBits::e4m3), 33.0 / 256);
  EXPECT_EQ(error_of_products(EightBits::e5m2, EightBits::e4m3), 25.0 / 128);
  for (const Fp8Format format : kFp8Formats) {
    Context c;
    const Operation op = Linear{};
    c.operation = &op;
    c.compute = ElementType::fp8;
    c.fp8_format = format;
    std::vector<double> dy{1, 0.4}, w{0.4, 1};
    round_operand(c, true, nullptr, 1, dy);
    round_operand(c, false, nullptr, 2, w);
    const double y = dy[0] * w[0] + dy[1] * w[1];
    EXPECT_NEAR(y, format == Fp8Format::hybrid ? 0.82143 : 0.78571, 5e-6);
    EXPECT_LE(std::abs(y - 0.8), error_of_products(of_gradients(format), EightBits::e4m3) * 0.8);
  }
}

/// Each number's rounding stays below u of it; so does a product's sum of the two.
TEST(ProductsInFp8, AreWithinTheirBound) {
  std::mt19937_64 rng(20261203);
  double worst = 0;
  for (const EightBits f : {EightBits::e4m3, EightBits::e5m2}) {
    const double bound = error_of_products(f, EightBits::e4m3);
    for (int k = 0; k < 20000; ++k) {
      // Down to 2^-10 of the largest: normal in both formats.
      std::vector<double> a(1 + rng() % 8), b(a.size());
      for (auto* list : {&a, &b}) {
        for (double& v : *list)
          v = static_cast<double>(static_cast<float>(
              std::ldexp(1 + uniform(3, rng(), 0), -static_cast<int>(rng() % 11)) *
              (rng() % 2 == 0 ? 1 : -1)));
      }
      double exact = 0, sizes = 0, rounded = 0;
      for (std::size_t i = 0; i < a.size(); ++i)
        exact += a[i] * b[i], sizes += std::abs(a[i] * b[i]);
      round_eights(f, a.data(), a.size());
      round_eights(EightBits::e4m3, b.data(), b.size());
      for (std::size_t i = 0; i < a.size(); ++i) rounded += a[i] * b[i];
      // And the scales' roundings in fp32.
      EXPECT_LE(std::abs(rounded - exact), (bound + 0x1p-20) * sizes);
      if (f == EightBits::e5m2) worst = std::max(worst, std::abs(rounded - exact) / sizes);
    }
  }
  EXPECT_GT(worst, error_of_products(EightBits::e4m3, EightBits::e4m3)) << "two digits are fewer";
}

TEST(Examples, ExpertsWorkOnTheirRowsAndCombineWeighsThem) {
  const Shape rows{kOne, {Dim::sequence, 2}, {Dim::expert, 1}, {Dim::feature, 1}};
  const Shape gates{kOne, {Dim::sequence, 2}, {Dim::expert, 2}};
  const Piece g = dense(gates, {0, 0.5, 0.25, 0});  // token 0 to expert 1, token 1 to expert 0
  Problem p;
  p.operation = GroupedProduct{2, {Dim::ffn, 1}, true};
  p.signature = signature(p.operation, {rows}, "grouped");
  p.inputs = {{{{0}, {0, 1}, {0, 1}, {0}}, {3, 5}, true, {{0, 1, 0}, {0, 0, 1}}}};
  p.parameters = {dense(p.signature.parameters[0].shape, {10, 100}),
                  dense(p.signature.parameters[1].shape, {1, 2})};
  Part part = whole_part(p);
  const Piece y = forward(part.context, part.forward_operands())[0];
  EXPECT_THAT(y.values, ElementsAre(31, 502));
  p.operation = Combine{2};
  p.signature = signature(p.operation, {rows, gates}, "combine");
  p.inputs = {y, g};
  p.parameters.clear();
  part = whole_part(p);
  EXPECT_THAT(forward(part.context, part.forward_operands())[0].values, ElementsAre(251, 7.75));
}

TEST(Examples, RouterPrefersTheLowerOfEqualExpertsAndNormalises) {
  const Shape x{kOne, {Dim::sequence, 1}, {Dim::expert, 4}};
  const std::vector<double> logits{0, std::log(2), std::log(2), std::log(3)};
  EXPECT_THAT(example(Router{2, false, true, 1}, x, logits).outputs[0].values,
              Pointwise(DoubleNear(1e-15), {0.0, 0.4, 0.0, 0.6}));
  EXPECT_THAT(example(Router{2, false, false, 4}, x, logits).outputs[0].values,
              Pointwise(DoubleNear(1e-15), {0.0, 1.0, 0.0, 1.5}));
  EXPECT_THAT(example(Router{1, true, false, 1}, x, logits).outputs[0].values,
              Pointwise(DoubleNear(1e-15), {0.0, 0.0, 0.0, 0.75}));
}

/// Of a run that has diverged: what is no number is behind all others, and k are chosen all the
/// same.
TEST(Examples, RouterPutsWhatIsNoNumberLast) {
  const Shape x{kOne, {Dim::sequence, 1}, {Dim::expert, 4}};
  const auto y = example(Router{2, true, true, 1}, x, {0, NAN, std::log(3), NAN}).outputs[0].values;
  EXPECT_THAT(y, Pointwise(DoubleNear(1e-15), {0.4, 0.0, 0.6, 0.0}));
  for (const std::int64_t groups : {1, 2}) {
    const auto none =
        example(Router{2, true, true, 1, groups, 1, groups == 1 ? 1 : 2}, x, {NAN, NAN, NAN, NAN})
            .outputs[0]
            .values;
    EXPECT_TRUE(std::isnan(none[0]) && std::isnan(none[1]));
    EXPECT_EQ(none[2], 0);
    EXPECT_EQ(none[3], 0);
  }
}

TEST(Examples, RouterChoosesOfItsBestGroups) {
  // Scores 1 : 4 : 4 : 1 : 0.2 : 4.5 of three pairs.
  const Shape x{kOne, {Dim::sequence, 1}, {Dim::expert, 6}};
  const std::vector<double> logits{std::log(1), std::log(4),   std::log(4),
                                   std::log(1), std::log(0.2), std::log(4.5)};
  const auto chosen = [&](std::int64_t top_k, std::int64_t groups, std::int64_t best) {
    const auto y =
        example(Router{top_k, false, true, 1, 3, groups, best}, x, logits).outputs[0].values;
    std::vector<int> e;
    for (std::size_t k = 0; k < y.size(); ++k)
      if (y[k] > 0) e.push_back(static_cast<int>(k));
    return e;
  };
  // Sums of two are 5, 5 and 4.7: of equal ones the lower; best ones 4, 4 and 4.5.
  EXPECT_THAT(chosen(2, 1, 2), ElementsAre(0, 1));
  EXPECT_THAT(chosen(2, 2, 2), ElementsAre(1, 2));
  EXPECT_THAT(chosen(2, 2, 1), ElementsAre(1, 5));
  EXPECT_THAT(chosen(3, 2, 1), ElementsAre(0, 1, 5));
  EXPECT_THAT(chosen(2, 3, 2), ElementsAre(1, 5));
}

TEST(Examples, DispatchSortsRowsByExpertSampleAndToken) {
  const Shape x{{Dim::sample, 2}, {Dim::sequence, 1}, {Dim::feature, 1}};
  const Shape g{{Dim::sample, 2}, {Dim::sequence, 1}, {Dim::expert, 3}};
  Problem p;
  p.operation = Dispatch{3, 2};
  p.signature = signature(p.operation, {x, g}, "dispatch");
  p.inputs = {dense(x, {5, 6}), dense(g, {0.5, 0, 0.5, 0, 0.2, 0.8})};
  const Part part = whole_part(p);
  const Piece rows = forward(part.context, part.forward_operands())[0];
  EXPECT_THAT(rows.rows, ElementsAre(Row{0, 0, 0}, Row{1, 0, 1}, Row{0, 0, 2}, Row{1, 0, 2}));
  EXPECT_THAT(rows.values, ElementsAre(5, 6, 5, 6));
}

TEST(Examples, GeluAgreesWithItsDefinition) {
  const Shape x{kOne, {Dim::feature, 2}};
  // 1 · Φ(1) and -2 · Φ(-2), from a table of the normal distribution.
  EXPECT_THAT(example(Activation{ActivationKind::gelu}, x, {1, -2}).outputs[0].values,
              Pointwise(DoubleNear(1e-12), {0.8413447460685429, -2 * 0.02275013194817921}));
}

TEST(Dropout, KeepsItsShareAndScalesItAndDependsOnStepSampleAndSeed) {
  const Shape shape{{Dim::sample, 4}, {Dim::feature, 5000}};
  Problem p;
  p.operation = Dropout{0.25};
  p.signature = signature(p.operation, {shape}, "dropout");
  p.inputs = {dense(shape)};
  std::fill(p.inputs[0].values.begin(), p.inputs[0].values.end(), 3.0);
  p.output_gradient = p.inputs[0];
  const Part part = run_whole(p);
  const auto& y = part.outputs[0].values;
  EXPECT_EQ(y, part.input_gradients[0].values);
  // Binomial(20000, 0.75): standard deviation 61; within 5 of them.
  const auto kept = std::count(y.begin(), y.end(), 4.0);
  EXPECT_NEAR(static_cast<double>(kept), 15000, 306);
  EXPECT_EQ(kept + std::count(y.begin(), y.end(), 0.0), 20000);

  // Neighbours, whose bits are one word's, as independent of one another: a sixteenth of the pairs
  // goes whole, Binomial(19999, 1/16) but for overlaps, standard deviation 34 to 43.
  int both = 0;
  for (std::size_t i = 0; i + 1 < y.size(); ++i) both += y[i] == 0 && y[i + 1] == 0 ? 1 : 0;
  EXPECT_NEAR(both, 1250, 5 * 43);

  const auto forward_with = [&](auto change) {
    Part other = whole_part(p);
    change(other.context);
    return forward(other.context, other.forward_operands())[0].values;
  };
  EXPECT_NE(y, forward_with([](Context& c) { ++c.step; }));
  EXPECT_NE(y, forward_with([](Context& c) { ++c.seed; }));
  // Sample 1 of this micro-batch is sample 0 of one that begins a sample later.
  const auto later = forward_with([](Context& c) { ++c.first_sample; });
  EXPECT_TRUE(std::equal(later.begin(), later.begin() + 15000, y.begin() + 5000));
}

TEST(Dropout, ProbabilitiesAreOfSixteenBits) {
  Context c;
  // Three of 2^16, and somebody is always kept.
  EXPECT_EQ(Dropped(Dropout{3.4 / 65536}, c).below, 3u);
  EXPECT_DOUBLE_EQ(Dropped(Dropout{3.4 / 65536}, c).scale, 65536.0 / 65533);
  EXPECT_EQ(Dropped(Dropout{0.9999999}, c).below, 65535u);
  EXPECT_EQ(Dropped(Dropout{0}, c).scale, 1);
}

TEST(RandomNumbers, HaveTheMomentsOfTheirDistributions) {
  const int n = 100000;
  double sum = 0, square = 0, uniform_sum = 0;
  for (int i = 0; i < n; ++i) {
    const auto word = static_cast<std::uint64_t>(i);
    const double z = normal(1, 2, word), u = uniform(1, word, 2);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += z, square += z * z, uniform_sum += u;
  }
  // Five standard errors.
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(square / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(uniform_sum / n, 0.5, 5 * std::sqrt(1.0 / 12 / n));
}

TEST(Touched, IsWhatTheWindowsReadInsideTheImage) {
  Rng rng{1};
  const Shape x{kOne, {Dim::feature, 1}, {Dim::height, 9}, {Dim::width, 1}};
  Convolution op;
  op.out = 1;
  op.height = {3, 2, 1, 1, 1};  // outputs 0..4 read -1..1, 1..3, 3..5, 5..7, 7..9
  const Problem p = make_problem("convolution", op, {x}, rng);
  Context c = whole_context(p);
  const auto rows = [&](Indices outputs) {
    c.indices[at(p.signature.find(Dim::height))] = std::move(outputs);
    return touched(c, p.signature.inputs[0], 2);
  };
  EXPECT_THAT(rows({0, 1}), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(rows({0, 4}), ElementsAre(0, 1, 7, 8));
  EXPECT_THAT(rows({0, 1, 2, 3, 4}), ElementsAreArray(range(9)));
}

TEST(Kernels, RefuseAPieceThatHoldsOtherIndicesThanTheLocalProblem) {
  Rng rng{1};
  const Problem p =
      make_problem("softmax", Softmax{}, {{{Dim::sample, 2}, {Dim::feature, 2}}}, rng);
  Part part = whole_part(p);
  part.context.indices[0] = {1};
  EXPECT_ANY_THROW(forward(part.context, part.forward_operands()));
}

}  // namespace
}  // namespace partita::reference
