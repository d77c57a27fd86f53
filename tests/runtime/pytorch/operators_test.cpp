// Forward and both backwards of every operator against PyTorch's: the reference's kernels in
// double, the executor's in fp32. How far each value may be off is derived in operators.py, term by
// term.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <iterator>
#include <map>
#include <set>
#include <sstream>

#include "tests/runtime/cpu/passes.h"
#include "tests/runtime/pytorch/script.h"
#include "tests/runtime/reference/problems.h"

namespace partita {
namespace {

using pytorch::Json;
using reference::Part;
using reference::Piece;
using reference::Problem;
using reference::Rng;

/// What computes the same in PyTorch, by position in the variant of operators.
struct Equal {
  std::string_view kind;
  std::string_view pytorch;
};
constexpr Equal kEquals[] = {
    {"linear", "matmul, add"},
    {"add_bias", "add"},
    {"embedding", "nn.functional.embedding"},
    {"position_embedding", "add of a slice"},
    {"normalize", "layer_norm, batch_norm, local_response_norm; rsqrt and mean for RMS"},
    {"activation", "relu, gelu (both), silu, sigmoid, tanh; relu squared"},
    {"gated_activation", "the activation, mul"},
    {"add", "add"},
    {"multiply", "mul"},
    {"dropout", "mul by our mask: PyTorch's own random numbers are others"},
    {"rotary", "mul, cat (Hugging Face's rotate_half)"},
    {"attention", "scaled_dot_product_attention from 2.0 on; softmax with sinks"},
    {"batched_product", "matmul"},
    {"softmax", "softmax"},
    {"cross_entropy", "cross_entropy"},
    {"mean_squared_error", "mse_loss"},
    {"convolution", "conv2d"},
    {"pool", "max_pool2d, avg_pool2d"},
    {"global_average_pool", "adaptive_avg_pool2d"},
    {"to_sequence", "flatten, transpose"},
    {"prepend_token", "cat"},
    {"select_token", "indexing"},
    {"concat", "cat"},
    {"append_to_heads", "expand, cat"},
    {"router", "softmax or sigmoid, topk (of groups by the sum of topk), scatter"},
    {"dispatch", "indexing of tokens by row"},
    {"grouped_product", "bmm of each row's expert"},
    {"combine", "index_add"},
    {"causal_convolution", "conv1d with as many groups as channels, silu"},
    {"state_space", "softplus, exp, a loop over the tokens"},
    {"gated_norm", "silu, rsqrt and mean"},
    {"scale_features", "mul, broadcast"},
};
// A new operator needs its line here, its cases in problems.h and its formula in operators.py.
static_assert(std::size(kEquals) == std::variant_size_v<Operation>);

/// Of every alternative, which index it has: kEquals follows the variant's order.
template <std::size_t... I>
std::vector<Operation> one_of_each(std::index_sequence<I...>) {
  return {Operation(std::in_place_index<I>)...};
}

void round_to_float(Piece& p) {
  for (double& v : p.values) v = static_cast<double>(static_cast<float>(v));
}

Json json_of(const Piece& p) {
  Json j;
  j["values"] = p.values;
  j["shape"] = Json::array();
  if (p.routed) {
    j["shape"] = {p.rows.size(), p.index[3].size()};
    j["rows"] = Json::array();
    for (const auto& r : p.rows) j["rows"].push_back({r.sample, r.sequence, r.expert});
  } else {
    for (const auto& list : p.index) j["shape"].push_back(list.size());
  }
  return j;
}
Json json_of(const std::vector<Piece>& pieces) {
  Json j = Json::array();
  for (const Piece& p : pieces) j.push_back(json_of(p));
  return j;
}
Json values_of(const std::vector<Piece>& pieces) {
  Json j = Json::array();
  for (const Piece& p : pieces)
    j.push_back(p.index.empty() && p.values.empty() ? Json() : Json(p.values));
  return j;
}
Json values_of(const std::vector<std::vector<float>>& results) {
  Json j = Json::array();
  for (const auto& r : results) j.push_back(r.empty() ? Json() : Json(r));
  return j;
}

/// The problem with both of our results, operands as fp32 has them.
Json case_of(Problem p) {
  for (Piece& x : p.inputs) round_to_float(x);
  for (Piece& w : p.parameters) round_to_float(w);
  round_to_float(p.output_gradient);
  std::vector<Part> one{reference::whole_part(p)};
  reference::run(one);
  const Part& part = one[0];
  Json j;
  j["label"] = p.label;
  j["op"] = pytorch::describe(p.operation);
  j["loss_scale"] = part.context.loss_scale;
  j["inputs"] = json_of(p.inputs);
  j["parameters"] = json_of(p.parameters);
  j["gradient"] = json_of(p.output_gradient);
  if (std::holds_alternative<Dropout>(p.operation)) {
    // What is kept, from what becomes of ones.
    Problem ones = p;
    std::fill(ones.inputs[0].values.begin(), ones.inputs[0].values.end(), 1.0);
    const Part kept = reference::run_whole(ones);
    Json mask = Json::array();
    for (const double v : kept.outputs[0].values) mask.push_back(v != 0);
    j["mask"] = std::move(mask);
  }
  j["reference"] = {{"outputs", values_of(part.outputs)},
                    {"inputs", values_of(part.input_gradients)},
                    {"parameters", values_of(part.parameter_gradients)}};
  cpu::PassesOnCpu passes(p, part);
  j["executor"]["outputs"] = values_of(passes.forward());
  passes.prepare_backward();
  j["executor"]["inputs"] = values_of(passes.backward_data());
  j["executor"]["parameters"] = values_of(passes.backward_weight(false));
  return j;
}

/// Sums of many terms, tiles and blocks that are not full.
std::vector<Problem> large_problems(Rng& rng) {
  std::vector<Problem> list;
  const auto n = [&](std::int64_t low, std::int64_t high) {
    return reference::pick(rng, low, high);
  };
  const auto add = [&](std::string label, Operation op, std::vector<Shape> shapes) {
    list.push_back(
        reference::make_problem("large " + std::move(label), std::move(op), shapes, rng));
  };
  const NamedExtent sample{Dim::sample, 2}, sequence{Dim::sequence, n(65, 90)},
      feature{Dim::feature, n(60, 100)}, ffn{Dim::ffn, n(30, 70)};
  const Shape tokens{sample, sequence, feature};
  add("linear", Linear{1, {ffn}, true}, {tokens});
  Normalize norm;
  add("layer norm", norm, {tokens});
  norm.kind = Normalize::Kind::rms, norm.bias = false;
  add("rms norm", norm, {tokens});
  norm.kind = Normalize::Kind::batch, norm.bias = true;
  add("batch norm", norm,
      {{{Dim::sample, 4}, {Dim::feature, 5}, {Dim::height, 9}, {Dim::width, 8}}});
  for (int variant = 0; variant < 4; ++variant) {
    Attention op;
    op.queries_per_head = variant % 2 + 1;
    op.qk_dim = n(4, 8), op.v_dim = n(4, 8);
    op.causal = variant < 2;
    op.window = variant == 1 ? n(5, 70) : 0;
    op.materialised = variant == 2;
    const NamedExtent head{Dim::head, 2};
    add(fmt::format("attention {}", variant), op,
        {{sample, sequence, head, {Dim::head_feature, op.queries_per_head * op.qk_dim}},
         {sample, sequence, head, {Dim::head_feature, op.qk_dim}},
         {sample, sequence, head, {Dim::head_feature, op.v_dim}}});
  }
  add("cross entropy", CrossEntropy{},
      {{sample, sequence, {Dim::vocabulary, n(50, 90)}}, {sample, sequence}});
  add("softmax", Softmax{}, {tokens});
  const Window three{3, 1, 1, 1, 1}, strided{3, 2, 1, 1, 1};
  const Shape image{sample, {Dim::feature, 8}, {Dim::height, n(9, 14)}, {Dim::width, n(9, 14)}};
  add("convolution 3x3", Convolution{12, three, three, 1, true}, {image});
  add("convolution 3x3, stride 2, 4 groups", Convolution{16, strided, strided, 4, false}, {image});
  add("convolution 1x1", Convolution{16, {}, {}, 1, false}, {image});
  add("max pool", Pool{true, strided, strided, true}, {image});
  add("average pool", Pool{false, strided, strided, true}, {image});
  add("global average pool", GlobalAveragePool{}, {image});
  add("scale features", ScaleFeatures{}, {image, {image[0], image[1]}});
  const NamedExtent experts{Dim::expert, 5};
  const Shape routed{sample, sequence, {Dim::expert, 2}, feature};
  add("router", Router{2, false, true, 1}, {{sample, sequence, experts}});
  add("dispatch", Dispatch{5, 2}, {tokens, {sample, sequence, experts}});
  add("grouped product", GroupedProduct{5, ffn, true}, {routed});
  add("combine", Combine{5}, {routed, {sample, sequence, experts}});
  return list;
}

TEST(PyTorchOperators, TheTableNamesEveryKind) {
  const auto all = one_of_each(std::make_index_sequence<std::variant_size_v<Operation>>());
  for (std::size_t k = 0; k < all.size(); ++k) EXPECT_EQ(kEquals[k].kind, kind_name(all[k])) << k;
}

TEST(PyTorchOperators, EveryKindHasItsForwardAndBothBackwards) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  Rng rng(20261127);
  Json request;
  for (int round = 0; round < 4; ++round) {
    for (Problem& p : reference::problems(rng)) request["cases"].push_back(case_of(std::move(p)));
  }
  for (Problem& p : large_problems(rng)) request["cases"].push_back(case_of(std::move(p)));
  // One line for each result: case, precision, pass, difference, bound there, their quotient.
  std::istringstream said(pytorch::ask("operators.py", request));
  struct Worst {
    double ratio = -1, difference = 0, bound = 0;
    int results = 0;
  };
  std::map<std::array<std::string, 3>, Worst> by_item;
  std::map<std::string, std::set<std::string>> passes_of_kind;
  for (std::string line; std::getline(said, line);) {
    const Json j = Json::parse(line);
    const Json& c = request["cases"][j["case"].get<std::size_t>()];
    const std::string kind = c["op"]["op"], pass = j["pass"], precision = j["precision"];
    const double ratio = j["ratio"].is_number() ? j["ratio"].get<double>() : INFINITY;
    EXPECT_LE(ratio, 1) << c["label"] << ", " << pass << ", " << precision << ": " << line;
    passes_of_kind[kind].insert(pass);
    Worst& w = by_item[{kind, pass, precision}];
    ++w.results;
    if (ratio > w.ratio) w.ratio = ratio, w.difference = j["difference"], w.bound = j["bound"];
  }
  for (const Equal& e : kEquals) {
    std::set<std::string> expected{"forward"};
    for (const Json& c : request["cases"]) {
      if (c["op"]["op"] != e.kind) continue;
      for (const Json& g : c["reference"]["inputs"]) {
        if (!g.is_null()) expected.insert("backward by data");
      }
      if (!c["reference"]["parameters"].empty()) expected.insert("backward by weight");
    }
    EXPECT_EQ(passes_of_kind[std::string(e.kind)], expected) << e.kind;
  }
  for (const auto& [item, w] : by_item) {
    const auto& [kind, pass, precision] = item;
    std::printf("%-20s %-18s %-6s %4d results, worst %.2g of its bound (%.2g of %.2g)\n",
                kind.c_str(), pass.c_str(), precision.c_str(), w.results, w.ratio, w.difference,
                w.bound);
    pytorch::record_operator(kind, pass, precision, w.results, w.difference, w.bound);
  }
}

}  // namespace
}  // namespace partita
