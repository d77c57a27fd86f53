// Our mathematics against PyTorch's: loss and every gradient of whole small networks. PyTorch
// (Debian: python3-torch) is for this test only; without it the test is skipped and says so.
// PARTITA_PYTORCH names another interpreter.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "tests/runtime/pytorch/script.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

using pytorch::Json;

/// What the script says of a network; its first word is a number.
double ask(const Json& j, std::string& said) {
  said = pytorch::ask("network.py", j);
  return std::strtod(said.c_str(), nullptr);
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
         {"shape", pytorch::extents(with_samples(g.tensor(g.inputs[i]).shape, program.samples))},
         {"values", inputs.by_tensor[i].values}});
  for (std::size_t q = 0; q < g.parameters.size(); ++q)
    j["parameters"].push_back({{"name", g.parameters[q].name},
                               {"shape", pytorch::extents(g.parameters[q].shape)},
                               {"values", options.parameters[0][q].values},
                               {"gradient", ours.gradients[0][q]}});
  j["operators"] = pytorch::operators_of(g);
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
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
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
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
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
    Json in{
        {"tensor", g.inputs[i].value},
        {"shape", pytorch::extents(with_samples(g.tensor(g.inputs[i]).shape, program.samples))}};
    for (int step = 0; step < kSteps; ++step)
      in["steps"].push_back(
          reference::make_inputs(g, program.samples, 11, step).by_tensor[i].values);
    j["inputs"].push_back(std::move(in));
  }
  for (std::size_t q = 0; q < g.parameters.size(); ++q)
    j["parameters"].push_back({{"name", g.parameters[q].name},
                               {"shape", pytorch::extents(g.parameters[q].shape)},
                               {"values", exact.parameters[0][q].values},
                               {"after", ours[0].values.parameters[0][q]}});
  j["operators"] = pytorch::operators_of(g);
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
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  TransformerConfig c = small_config();
  c.hidden = 32;
  c.ffn = 64;
  c.sequence = 16;
  c.positions = 16;
  for (const Graph& g : {gpt(), llama(), build_transformer(c)}) expect_trains_alike(g, 2, 2, 5);
}

/// Our measured step beside PyTorch's in one run, on one rank and on two.
TEST(PyTorch, StepsStandSideBySide) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
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
