// The worked examples of docs/operators.md, one for each operator.
#include "models/operators.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <set>

#include "base/error.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const Shape kX{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::feature, 4}};
const Shape kIds{{Dim::sample, 2}, {Dim::sequence, 3}};
const Shape kImage{{Dim::sample, 2}, {Dim::feature, 4}, {Dim::height, 6}, {Dim::width, 6}};
const Shape kQuery{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::head, 2}, {Dim::head_feature, 8}};
const Shape kKey{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::head, 2}, {Dim::head_feature, 4}};
const Shape kRows{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::expert, 2}, {Dim::feature, 4}};
const Shape kGates{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::expert, 5}};

struct Example {
  Operation operation;
  std::vector<Shape> inputs;
  std::string output;
  double forward, backward_data, backward_weight;
  std::int64_t parameters;
  std::int64_t saved_for_data, saved_for_weight;  ///< elements of inputs and outputs
  std::int64_t extra_bytes = 0;                   ///< of 4-byte activations
};

std::vector<Example> examples() {
  const Window pool{2, 2, 0, 0, 1}, kernel{3, 1, 1, 1, 1};
  Attention attention;
  attention.queries_per_head = 2;
  attention.qk_dim = attention.v_dim = 4;
  Attention materialised = attention;
  materialised.materialised = true;
  Normalize rms;
  rms.kind = Normalize::Kind::rms;
  rms.bias = false;
  Normalize heads = rms;
  heads.group = 4;
  Normalize batch;
  batch.kind = Normalize::Kind::batch;
  Normalize local;
  local.kind = Normalize::Kind::local;
  local.scale = local.bias = false;
  local.window = 5;
  const std::string x = "[sample 2, sequence 3, feature 4]";
  const std::string image = "[sample 2, feature 4, height 6, width 6]";
  return {
      // 2 · 2·3 tokens · 8 outputs · 4 inputs = 384.
      {Linear{1, {{Dim::ffn, 8}}, true},
       {kX},
       "[sample 2, sequence 3, ffn 8]",
       384,
       384,
       384,
       40,
       0,
       24},
      {AddBias{}, {kX}, x, 24, 0, 24, 4, 0, 0},
      {Embedding{10, 4}, {kIds}, x, 0, 0, 24, 40, 0, 6},
      {PositionEmbedding{5}, {kX}, x, 24, 0, 24, 20, 0, 0},
      {Normalize{}, {kX}, x, 120, 192, 72, 8, 24, 24},
      {rms, {kX}, x, 120, 192, 72, 4, 24, 24},
      {heads, {kQuery}, "[sample 2, sequence 3, head 2, head_feature 8]", 480, 768, 288, 4, 96, 96},
      {batch, {kImage}, image, 1440, 2304, 864, 8, 288, 288},
      // (2 · 5 + 4) and (2 · 5 + 8) for each of 288 elements.
      {local, {kImage}, image, 4032, 5184, 0, 0, 288, 0},
      {Activation{ActivationKind::relu}, {kX}, x, 24, 48, 0, 0, 24, 0},
      {Activation{ActivationKind::gelu}, {kX}, x, 192, 312, 0, 0, 24, 0},
      {GatedActivation{}, {kX, kX}, x, 168, 288, 0, 0, 48, 0},
      {Add{}, {kX, kX}, x, 24, 0, 0, 0, 0, 0},
      {Multiply{}, {kX, kX}, x, 24, 48, 0, 0, 48, 0},
      {Dropout{0.1}, {kX}, x, 48, 24, 0, 0, 0, 0, 24},
      {Rotary{4, 4, 10000},
       {kQuery},
       "[sample 2, sequence 3, head 2, head_feature 8]",
       288,
       288,
       0,
       0,
       0,
       0},
      // 2 samples · 3 · 3 pairs · 4 query heads = 72 pairs; 2 · 72 · (4 + 4) = 1152; twice that
      // backward.
      {attention,
       {kQuery, kKey, kKey},
       "[sample 2, sequence 3, head 2, head_feature 8]",
       1152,
       2304,
       0,
       0,
       96 + 48 + 48 + 96,
       0,
       24 * 4},
      {materialised,
       {kQuery, kKey, kKey},
       "[sample 2, sequence 3, head 2, head_feature 8]",
       1152,
       2304,
       0,
       0,
       96 + 48 + 48,
       0,
       72 * 4},
      {BatchedProduct{1},
       {kX, {{Dim::sample, 2}, {Dim::sequence, 4}, {Dim::feature, 5}}},
       "[sample 2, sequence 3, feature 5]",
       240,
       480,
       0,
       0,
       24 + 40,
       0},
      {Softmax{}, {kX}, x, 120, 96, 0, 0, 24, 0},
      {CrossEntropy{},
       {{{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::vocabulary, 10}}, kIds},
       "[]",
       300,
       120,
       0,
       0,
       60 + 6,
       0},
      {MeanSquaredError{}, {kX, kX}, "[]", 72, 48, 0, 0, 48, 0},
      // 2 · (2 · 8 · 36) outputs · 4 channels · 9 = 41472.
      {Convolution{8, kernel, kernel, 1, true},
       {kImage},
       "[sample 2, feature 8, height 6, width 6]",
       41472,
       41472,
       41472,
       296,
       0,
       288},
      {Pool{true, pool, pool, true},
       {kImage},
       "[sample 2, feature 4, height 3, width 3]",
       288,
       288,
       0,
       0,
       288,
       0,
       72 * 8},
      {GlobalAveragePool{}, {kImage}, "[sample 2, feature 4]", 288, 288, 0, 0, 0, 0},
      {ScaleFeatures{},
       {kImage, {{Dim::sample, 2}, {Dim::feature, 4}}},
       image,
       288,
       864,
       0,
       0,
       296,
       0},
      {ToSequence{}, {kImage}, "[sample 2, sequence 36, feature 4]", 0, 0, 0, 0, 0, 0},
      {PrependToken{}, {kX}, "[sample 2, sequence 4, feature 4]", 0, 0, 0, 4, 0, 0},
      {SelectToken{0}, {kX}, "[sample 2, feature 4]", 0, 0, 0, 0, 0, 0},
      {Concat{true}, {kX, kX}, "[sample 2, sequence 3, feature 8]", 0, 0, 0, 0, 0, 0},
      {AppendToHeads{},
       {kKey, {{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::head_feature, 2}}},
       "[sample 2, sequence 3, head 2, head_feature 6]",
       0,
       72,
       0,
       0,
       0,
       0},
      {Router{2}, {kGates}, "[sample 2, sequence 3, expert 5]", 150, 150, 0, 0, 60, 0},
      {Dispatch{5, 2},
       {kX, kGates},
       "[sample 2, sequence 3, expert 2, feature 4]",
       0,
       48,
       0,
       0,
       30,
       0},
      // 2 · 12 rows · 8 outputs · 4 inputs = 768, whatever the number of experts.
      {GroupedProduct{5, {Dim::ffn, 8}, false},
       {kRows},
       "[sample 2, sequence 3, expert 2, ffn 8]",
       768,
       768,
       768,
       160,
       0,
       48},
      {Combine{5}, {kRows, kGates}, x, 96, 192, 0, 0, 48 + 30, 0},
      // 96 elements · (2 · 4 + 8), (4 · 4 + 13), (2 · 4 + 13); 16 channels · (4 weights + a bias).
      {CausalConvolution{4, true},
       {kQuery},
       "[sample 2, sequence 3, head 2, head_feature 8]",
       1536,
       2784,
       2016,
       80,
       96,
       96},
      // 12 tokens of a group, 2 heads of 2 together 4 wide, states of 2, chunks of 2:
      // 12 · (4 · 4 · 2 + 2 · 2 · (2 + 4)) = 672.
      {StateSpace{2, 2, 2, 2},
       {kQuery, {{Dim::sample, 2}, {Dim::sequence, 3}, {Dim::head, 2}, {Dim::head_feature, 2}}},
       "[sample 2, sequence 3, head 2, head_feature 4]",
       672,
       1344,
       0,
       12,
       96 + 24,
       96 + 24},
      {GatedNorm{},
       {kQuery, kQuery},
       "[sample 2, sequence 3, head 2, head_feature 8]",
       1152,
       1920,
       288,
       16,
       192,
       192,
       12 * 4},
  };
}

TEST(Operators, TheDocumentsExamplesHold) {
  std::set<std::size_t> kinds;
  for (const Example& e : examples()) {
    const std::string place(kind_name(e.operation));
    SCOPED_TRACE(place);
    kinds.insert(e.operation.index());
    const Signature s = signature(e.operation, e.inputs, place);
    std::vector<std::int64_t> extents;
    for (const auto& d : s.dims) extents.push_back(d.extent);
    EXPECT_EQ(text(s.outputs.at(0).shape), e.output);
    EXPECT_DOUBLE_EQ(flops(e.operation, s, extents, Pass::forward).count, e.forward);
    EXPECT_DOUBLE_EQ(flops(e.operation, s, extents, Pass::backward_data).count, e.backward_data);
    EXPECT_DOUBLE_EQ(flops(e.operation, s, extents, Pass::backward_weight).count,
                     e.backward_weight);
    std::int64_t parameters = 0, data = 0, weight = 0, extra = 0;
    for (const auto& p : s.parameters) parameters += elements(p.shape);
    for (const auto* side : {&s.inputs, &s.outputs}) {
      for (const auto& o : *side) {
        data += o.saved_for_data ? elements(o.shape) : 0;
        weight += o.saved_for_weight ? elements(o.shape) : 0;
      }
    }
    for (const auto& x : s.extras) {
      extra += elements(x.operand.shape) * (x.element_bytes > 0 ? x.element_bytes : 4);
    }
    EXPECT_EQ(parameters, e.parameters);
    EXPECT_EQ(data, e.saved_for_data);
    EXPECT_EQ(weight, e.saved_for_weight);
    EXPECT_EQ(extra, e.extra_bytes);
  }
  EXPECT_EQ(kinds.size(), std::variant_size_v<Operation>);
}

TEST(Operators, EveryIterationDimensionHasAName) {
  for (const Example& e : examples()) {
    const Signature s = signature(e.operation, e.inputs, "");
    std::set<Dim> labels;
    for (const auto& d : s.dims) EXPECT_TRUE(labels.insert(d.dim).second) << kind_name(e.operation);
    for (const auto* operands : {&s.inputs, &s.parameters, &s.outputs}) {
      for (const auto& o : *operands) {
        ASSERT_EQ(o.dims.size(), o.shape.size());
        for (const int d : o.dims) EXPECT_LT(d, static_cast<int>(s.dims.size()));
      }
    }
  }
}

TEST(Operators, FlopsOfPartsAddUpToThoseOfTheWhole) {
  // Cutting any dimension in two shares the work of a product exactly.
  for (const Example& e : examples()) {
    if (!is_product(e.operation)) continue;
    const Signature s = signature(e.operation, e.inputs, "");
    for (std::size_t cut = 0; cut < s.dims.size(); ++cut) {
      for (const Pass pass : {Pass::forward, Pass::backward_data, Pass::backward_weight}) {
        std::array<double, 3> work{};
        for (std::size_t part = 0; part < 3; ++part) {
          std::vector<std::int64_t> extents;
          for (const auto& d : s.dims) extents.push_back(d.extent);
          if (part == 1) extents[cut] = 1;
          if (part == 2) extents[cut] -= 1;
          work[part] = flops(e.operation, s, extents, pass).count;
        }
        EXPECT_NEAR(work[1] + work[2], work[0], 1e-9 * work[0])
            << kind_name(e.operation) << " cut along " << name(s.dims[cut].dim);
      }
    }
  }
}

TEST(Operators, ShapesThatDoNotSuitAreInputErrors) {
  const auto expect = [](const Operation& op, const std::vector<Shape>& in,
                         const std::string& message) {
    EXPECT_THAT([&] { signature(op, in, "here"); },
                ThrowsMessage<InputError>(HasSubstr("here: " + message)));
  };
  const Shape scalar, vector{{Dim::sample, 2}};
  expect(Linear{3, {{Dim::feature, 2}}, false}, {kX},
         "a linear operator cannot contract 3 dimensions");
  expect(Linear{}, {kX, kX}, "linear takes 1 inputs, got 2");
  expect(AddBias{}, {scalar}, "bias needs at least 1 dimensions");
  expect(Softmax{}, {scalar}, "softmax needs at least 1 dimensions");
  expect(CrossEntropy{}, {scalar, scalar}, "cross entropy needs at least 1 dimensions");
  expect(Concat{false}, {vector, vector}, "concatenation needs at least 2 dimensions");
  expect(Concat{}, {}, "concatenation needs inputs");
  expect(Add{}, {kX, kIds}, "inputs must have one shape");
  expect(PositionEmbedding{2}, {kX}, "3 tokens need as many learned positions, the table has 2");
  expect(Router{6}, {kGates}, "top 6 of 5 experts");
  expect(
      Router{2, false, true, 1, 2, 1, 1}, {kGates},
      "top 2 of 5 experts in 1 of 2 groups by the 1 best of each: at most 64 equal groups, whose "
      "chosen ones have enough");
  expect(Router{2, false, true, 1, 5, 1, 1}, {kGates}, "top 2 of 5 experts in 1 of 5 groups");
  expect(Router{1, false, true, 1, 5, 1, 2}, {kGates},
         "top 1 of 5 experts in 1 of 5 groups by the 2 best of each");
  expect(Dispatch{5, 2}, {kIds, kGates}, "dispatch needs 3 dimensions");
  expect(Convolution{6, {}, {}, 3, false}, {kImage}, "3 groups do not divide 4 input and 6 output");
  expect(Pool{true, {7, 1, 0, 0, 1}, {7, 1, 0, 0, 1}, true}, {kImage},
         "a window of 7 x 7 does not fit");
  expect(SelectToken{3}, {kX}, "token 3 is not among 3");
  Normalize heads;
  heads.group = 3;
  expect(heads, {kQuery}, "cannot normalise");
  expect(CausalConvolution{0, true}, {kQuery}, "a causal convolution over 0 tokens");
  expect(CausalConvolution{}, {kX}, "causal convolution needs 4 dimensions in input 0");
  expect(StateSpace{2, 2, 3, 2}, {kQuery, kKey},
         "2 heads of 2 with states of 3 in chunks of 2 do not fit");
  expect(GatedNorm{}, {kX, kX}, "gated norm needs 4 dimensions in input 0");
  Rotary odd{4, 3, 10000};
  expect(odd, {kQuery}, "cannot rotate 3 of 4 values");
}

TEST(Operators, DimensionsAreReadByName) {
  EXPECT_EQ(parse_dim("key_sequence", ""), Dim::key_sequence);
  EXPECT_THAT(
      [] { parse_dim("vocab", "plan.yaml:3"); },
      ThrowsMessage<InputError>(HasSubstr("plan.yaml:3: 'vocab' is no iteration dimension")));
}

}  // namespace
}  // namespace partita
