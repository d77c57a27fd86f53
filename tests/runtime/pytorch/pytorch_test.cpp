// Our mathematics against PyTorch's: loss and every gradient of whole small networks. PyTorch
// (Debian: python3-torch) is for this test only; without it the test is skipped and says so.
// PARTITA_PYTHON names another interpreter.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

using Json = nlohmann::json;

std::string python() {
  const char* wish = std::getenv("PARTITA_PYTHON");
  return wish != nullptr ? wish : "/usr/bin/python3";
}
std::string output_of(const std::string& command, int& code) {
  std::FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
  std::string all;
  char piece[4096];
  while (const std::size_t n = std::fread(piece, 1, sizeof piece, pipe)) all.append(piece, n);
  code = ::pclose(pipe);
  return all;
}
bool has_torch() {
  int code = 0;
  output_of(python() + " -c 'import torch'", code);
  return code == 0;
}

Json window(const Window& w) {
  return {{"kernel", w.kernel},
          {"stride", w.stride},
          {"before", w.pad_before},
          {"after", w.pad_after},
          {"dilation", w.dilation}};
}
const char* name_of(ActivationKind k) {
  constexpr const char* names[] = {"relu", "squared_relu", "gelu", "gelu_tanh",
                                   "silu", "sigmoid",      "tanh"};
  return names[static_cast<std::size_t>(k)];
}

/// An operator's options, as network.py reads them.
struct Describe {
  Json operator()(const Linear& o) { return {{"contracted", o.contracted}, {"bias", o.bias}}; }
  Json operator()(const Normalize& o) {
    constexpr const char* kinds[] = {"layer", "rms", "batch", "local"};
    return {{"kind", kinds[static_cast<std::size_t>(o.kind)]},
            {"epsilon", o.epsilon},
            {"scale", o.scale},
            {"bias", o.bias},
            {"group", o.group},
            {"window", o.window},
            {"alpha", o.alpha},
            {"beta", o.beta},
            {"offset", o.offset}};
  }
  Json operator()(const Activation& o) { return {{"kind", name_of(o.kind)}}; }
  Json operator()(const GatedActivation& o) { return {{"kind", name_of(o.kind)}}; }
  Json operator()(const Rotary& o) {
    return {{"head_dim", o.head_dim}, {"rotated", o.rotated}, {"base", o.base}};
  }
  Json operator()(const Attention& o) {
    return {{"queries_per_head", o.queries_per_head},
            {"qk_dim", o.qk_dim},
            {"v_dim", o.v_dim},
            {"scale", o.scale},
            {"causal", o.causal},
            {"window", o.window},
            {"sinks", o.sinks}};
  }
  Json operator()(const Convolution& o) {
    return {{"height", window(o.height)},
            {"width", window(o.width)},
            {"groups", o.groups},
            {"bias", o.bias}};
  }
  Json operator()(const Pool& o) {
    return {{"maximum", o.maximum},
            {"height", window(o.height)},
            {"width", window(o.width)},
            {"count_padding", o.count_padding}};
  }
  Json operator()(const SelectToken& o) { return {{"index", o.index}}; }
  Json operator()(const Concat& o) { return {{"last", o.last}}; }
  Json operator()(const Router& o) {
    return {
        {"top_k", o.top_k}, {"sigmoid", o.sigmoid}, {"normalise", o.normalise}, {"scale", o.scale}};
  }
  Json operator()(const Dispatch& o) { return {{"experts", o.experts}}; }
  Json operator()(const GroupedProduct& o) { return {{"bias", o.bias}}; }
  template <class Other>
  Json operator()(const Other&) {
    return Json::object();
  }
};

std::vector<std::int64_t> extents(const Shape& shape) {
  std::vector<std::int64_t> all;
  for (const auto& d : shape) all.push_back(d.extent);
  return all;
}

Json operators_of(const Graph& g) {
  Json list = Json::array();
  for (const Operator& op : g.operators) {
    Json o = std::visit(Describe{}, op.operation);
    o["op"] = kind_name(op.operation);
    o["inputs"] = Json::array();
    o["parameters"] = Json::array();
    for (const TensorId t : op.inputs) o["inputs"].push_back(t.value);
    for (const ParameterId q : op.parameters) o["parameters"].push_back(q.value);
    o["output"] = op.outputs[0].value;
    list.push_back(std::move(o));
  }
  return list;
}

/// What the script says of a network; its first word is a number.
double ask(const Json& j, std::string& said) {
  const auto file =
      std::filesystem::temp_directory_path() / fmt::format("partita-network-{}.json", ::getpid());
  std::ofstream(file) << j.dump();
  int code = 0;
  said =
      output_of(fmt::format("{} {}/network.py {}", python(), PARTITA_PYTORCH, file.string()), code);
  std::filesystem::remove(file);
  return code == 0 ? std::strtod(said.c_str(), nullptr) : INFINITY;
}

/// Largest relative difference between our loss and gradients and PyTorch's.
double difference(const Graph& g, std::string& said) {
  Plan plan = base_plan();
  plan.micro_batch = 2;
  const Program program = lowered(g, plan);
  const auto options = reference::options_for(g, program, 1, 11);
  const auto ours = reference::train_serially(g, program, options, 1);
  const auto inputs = reference::make_inputs(g, program.samples, 11, 0);
  Json j;
  j["loss"] = ours.losses[0][0];
  j["loss_tensor"] = g.loss.value;
  for (std::size_t i = 0; i < g.inputs.size(); ++i)
    j["inputs"].push_back(
        {{"tensor", g.inputs[i].value},
         {"shape", extents(with_samples(g.tensor(g.inputs[i]).shape, program.samples))},
         {"values", inputs.by_tensor[i].values}});
  for (std::size_t q = 0; q < g.parameters.size(); ++q)
    j["parameters"].push_back({{"name", g.parameters[q].name},
                               {"shape", extents(g.parameters[q].shape)},
                               {"values", options.parameters[0][q].values},
                               {"gradient", ours.gradients[0][q]}});
  j["operators"] = operators_of(g);
  return ask(j, said);
}

void expect_same(const std::string& name, const Graph& g) {
  std::string said;
  // Both in double: sums in another order, a few thousand roundings.
  const double d = difference(g, said);
  EXPECT_LT(d, 1e-9) << name << ": " << said;
  std::printf("%s: %s", name.c_str(), said.c_str());
}

TEST(PyTorch, WholeNetworksHaveTheSameLossAndGradients) {
  if (!has_torch())
    GTEST_SKIP() << python() << " has no torch; install python3-torch or set PARTITA_PYTHON";
  expect_same("gpt", gpt());
  expect_same("llama", llama());
  expect_same("mixtral", mixtral());
  expect_same("cnn", cnn(true));
  TransformerConfig vit = small_config();
  vit.head = TransformerConfig::Head::classifier;
  vit.image = 8;
  vit.patch = 4;
  vit.causal = false;
  vit.tied = false;
  vit.positions = 5;
  vit.sequence = 5;
  expect_same("vit", build_transformer(vit));
  TransformerConfig latent = small_config();
  latent.kv_heads = 0;
  latent.positions = 0;
  latent.tied = false;
  latent.norm = TransformerConfig::Norm::rms;
  latent.qkv_bias = latent.attention_output_bias = latent.mlp_bias = false;
  latent.latent = {6, 4, 2, 2, 2};
  latent.rotary_dim = 2;
  expect_same("latent attention", build_transformer(latent));
}

TEST(PyTorch, RandomTransformersHaveTheSameLossAndGradients) {
  if (!has_torch())
    GTEST_SKIP() << python() << " has no torch; install python3-torch or set PARTITA_PYTHON";
  std::mt19937 rng(20261124);
  for (int k = 0, run = 0; k < 40 && run < 6; ++k) {
    const Graph g = random_transformer(rng);
    if (std::any_of(g.operators.begin(), g.operators.end(), [](const Operator& op) {
          return std::holds_alternative<Dropout>(op.operation);  // other random numbers
        }))
      continue;
    ++run;
    expect_same(g.name, g);
  }
}

/// Three steps of PyTorch's SGD (over gloo with DistributedDataParallel on several ranks) give the
/// parameters that our data-parallel ranks have, and its step stands beside ours: both on one core
/// a rank, medians of `timed` steps.
void expect_trains_alike(const Graph& g, int ranks, std::int64_t micro_batch, int timed) {
  constexpr int kSteps = 3;
  Plan plan = base_plan();
  set_precision(plan, "fp32", "");
  plan.dp = ranks;
  plan.micro_batch = micro_batch;
  plan.bucket = 25_MiB;
  plan.optimizer.learning_rate = 0.1;
  const Program program = lowered(g, plan);
  const auto exact = reference::options_for(g, program, kSteps, 11);
  execute::Options o;
  o.steps = kSteps;
  o.seed = 11;
  o.input = exact.input;
  o.operator_seed = exact.operator_seed;
  o.initial = [&](std::size_t, std::size_t q, std::int64_t linear) {
    return reference::initial_value(g.parameters[q], 11, linear);
  };
  const auto ours = execute::run_threads(program, o);
  Json j;
  j["world"] = ranks;
  j["timed"] = timed;
  j["learning_rate"] = plan.optimizer.learning_rate;
  j["momentum"] = plan.optimizer.momentum;
  j["loss_tensor"] = g.loss.value;
  for (const auto& l : ours[0].values.losses) j["losses"].push_back(l[0]);
  for (std::size_t i = 0; i < g.inputs.size(); ++i) {
    Json in{{"tensor", g.inputs[i].value},
            {"shape", extents(with_samples(g.tensor(g.inputs[i]).shape, program.samples))}};
    for (int step = 0; step < kSteps; ++step)
      in["steps"].push_back(
          reference::make_inputs(g, program.samples, 11, step).by_tensor[i].values);
    j["inputs"].push_back(std::move(in));
  }
  for (std::size_t q = 0; q < g.parameters.size(); ++q)
    j["parameters"].push_back({{"name", g.parameters[q].name},
                               {"shape", extents(g.parameters[q].shape)},
                               {"values", exact.parameters[0][q].values},
                               {"after", ours[0].values.parameters[0][q]}});
  j["operators"] = operators_of(g);
  std::string said;
  const double d = ask(j, said);
  // Both in fp32: within the measured effect of rounding, on either side.
  const auto serial = reference::train_serially(g, program, exact, 1);
  EXPECT_LT(d, 2 * reference::tolerance_of_rounding(g, program, serial, exact)) << said;
  o.warm_up = kSteps;
  o.steps = timed;
  o.collect = false;
  std::vector<double> steps = execute::run_threads(program, o)[0].measured.step_s;
  std::sort(steps.begin(), steps.end());
  std::printf("%-24s ours %8.3f ms; %s", g.name.c_str(), 1e3 * steps[steps.size() / 2],
              said.c_str());
  std::fflush(stdout);
}

TEST(PyTorch, DistributedDataParallelTrainsTheSameParameters) {
  if (!has_torch())
    GTEST_SKIP() << python() << " has no torch; install python3-torch or set PARTITA_PYTHON";
  TransformerConfig c = small_config();
  c.hidden = 32;
  c.ffn = 64;
  c.sequence = 16;
  c.positions = 16;
  for (const Graph& g : {gpt(), llama(), build_transformer(c)}) expect_trains_alike(g, 2, 2, 5);
}

/// Our measured step beside PyTorch's in one run, on one rank and on two.
TEST(PyTorch, StepsStandSideBySide) {
  if (!has_torch())
    GTEST_SKIP() << python() << " has no torch; install python3-torch or set PARTITA_PYTHON";
  TransformerConfig c = small_config();
  c.name = "gpt h64 s32";
  c.initial_deviation = 0.02;
  c.hidden = 64;
  c.ffn = 256;
  c.sequence = c.positions = 32;
  c.vocabulary = 160;
  TransformerConfig l = c;
  l.name = "llama h64 s32";
  l.kv_heads = 2;
  l.norm = TransformerConfig::Norm::rms;
  l.positions = 0;
  l.rotary_dim = 16;
  l.activation = ActivationKind::silu;
  l.gated = true;
  l.qkv_bias = l.attention_output_bias = l.mlp_bias = false;
  l.tied = false;
  TransformerConfig v = c;
  v.name = "vit h64 16 patches";
  v.head = TransformerConfig::Head::classifier;
  v.image = 16;
  v.patch = 4;
  v.causal = false;
  v.tied = false;
  v.positions = v.sequence = 17;
  Graph images = cnn(true);
  images.name = "cnn 9 x 8";
  for (const Graph& g : {build_transformer(c), build_transformer(l), images, build_transformer(v)})
    expect_trains_alike(g, 1, 4, 20);
  expect_trains_alike(build_transformer(c), 2, 4, 20);
}

}  // namespace
}  // namespace partita
