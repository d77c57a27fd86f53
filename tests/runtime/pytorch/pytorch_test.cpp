// Our training against PyTorch's: loss, gradients and parameters of whole small networks, serial
// and data-parallel, and both measured steps. PyTorch is for these tests only; without it they are
// skipped and say so (docs/execution.md, "Against PyTorch").
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "tests/runtime/pytorch/script.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

using pytorch::Json;

Graph named(const char* name, Graph g) {
  g.name = name;
  return g;
}
Graph vit() {
  TransformerConfig c = small_config();
  c.name = "vit";
  c.head = TransformerConfig::Head::classifier;
  c.image = 8;
  c.patch = 4;
  c.causal = false;
  c.tied = false;
  c.positions = c.sequence = 5;
  return build_transformer(c);
}
Graph latent_attention() {
  TransformerConfig c = small_config();
  c.name = "latent attention";
  c.kv_heads = 0;
  c.positions = 0;
  c.tied = false;
  c.norm = TransformerConfig::Norm::rms;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = false;
  c.latent = {6, 4, 2, 2, 2};
  c.rotary_dim = 2;
  return build_transformer(c);
}
/// ResNet's stem and bottlenecks (1x1, 3x3, 1x1), as torchvision has them: the first of a stage
/// with a projection on the shortcut and, from the second stage on, a stride on its 3x3.
Graph resnet() {
  GraphBuilder b("resnet");
  TensorId x =
      b.input("image", {{Dim::sample, 1}, {Dim::feature, 3}, {Dim::height, 17}, {Dim::width, 16}});
  const TensorId labels = b.input("labels", {{Dim::sample, 1}});
  const auto convolution = [&](const std::string& name, TensorId from, std::int64_t out, Window w) {
    Convolution c;
    c.out = out;
    c.height = c.width = w;
    const TensorId y = b.add(name, c, {from});
    b.parameter(b.op(b.last()).parameters[0]).initial_deviation = 0.3;
    Normalize n;
    n.kind = Normalize::Kind::batch;
    return b.add(name + ".norm", n, {y});
  };
  const auto relu = [&](const std::string& name, TensorId from) {
    return b.add(name + ".relu", Activation{ActivationKind::relu}, {from});
  };
  x = relu("stem", convolution("stem", x, 4, {7, 2, 3, 3, 1}));
  const Window pool{3, 2, 1, 1, 1};
  x = b.add("stem.pool", Pool{true, pool, pool, true}, {x});
  for (int k = 0; k < 3; ++k) {
    // Two blocks in the first stage, one in the second.
    const std::string name = fmt::format("block{}", k);
    const std::int64_t width = k < 2 ? 3 : 4, stride = k < 2 ? 1 : 2;
    TensorId y = relu(name + ".1", convolution(name + ".1", x, width, {}));
    y = relu(name + ".2", convolution(name + ".2", y, width, {3, stride, 1, 1, 1}));
    y = convolution(name + ".3", y, 4 * width, {});
    const TensorId shortcut =
        k == 1 ? x : convolution(name + ".shortcut", x, 4 * width, {1, stride, 0, 0, 1});
    x = relu(name, b.add(name + ".sum", Add{}, {y, shortcut}));
  }
  x = b.add("average", GlobalAveragePool{}, {x});
  Linear head;
  head.out = {{Dim::vocabulary, 5}};
  head.bias = true;
  x = b.add("head", head, {x});
  return b.finish(b.add("loss", CrossEntropy{}, {x, labels}), 0, 0);
}
enum class Arithmetic { doubles, single };

struct Case {
  std::string what;
  Graph graph;
  Plan plan;
  Arithmetic arithmetic = Arithmetic::single;
  std::string wrapper{};  ///< "": the plain module on one rank; "ddp", "fsdp"
  int steps = 1;
  int timed = 0;
};
struct Outcome {
  reference::Comparison comparison;
  double bound = 0;
  std::vector<double> ours_s, theirs_s;
};
/// Our side of a case and the request for PyTorch's.
struct Ours {
  reference::RunResult serial, run;
  Outcome outcome;
  Json request;
};

/// In doubles ours is the serial reference, in single precision the executor's ranks under the
/// plan.
///
/// The bound: the program interpreted with every stored value rounded to fp32 differs from the
/// serial network by d, and K + 8 roundings a value are at most (K + 8) d (docs/execution.md); in
/// doubles 2^-29 of that; both sides round.
Ours train_ours(const Case& c) {
  const Graph& g = c.graph;
  Plan plan = c.plan;
  set_precision(plan, "fp32", "");
  const Program program = lowered(g, plan);
  const auto exact = reference::options_for(g, program, c.steps, 11);
  Ours ours;
  ours.serial = reference::train_serially(g, program, exact, 1);
  ours.run = ours.serial;
  ours.outcome.bound = 2 * reference::tolerance_of_rounding(g, program, ours.serial, exact);
  if (c.arithmetic == Arithmetic::doubles) {
    ours.outcome.bound *= 0x1p-29;
  } else {
    execute::Options o;
    o.steps = c.steps;
    o.seed = 11;
    o.input = exact.input;
    o.operator_seed = exact.operator_seed;
    o.initial = [&](std::size_t, std::size_t q, std::int64_t linear) {
      return reference::initial_value(g.parameters[q], 11, linear);
    };
    ours.run = execute::run_threads(program, o)[0].values;
    if (c.timed > 0) {
      o.warm_up = c.steps;
      o.steps = c.timed;
      o.collect = false;
      ours.outcome.ours_s = execute::run_threads(program, o)[0].measured.step_s;
    }
  }
  const Optimizer& a = plan.optimizer;
  Json& j = ours.request;
  j = {{"precision", c.arithmetic == Arithmetic::single ? "single" : "double"},
       {"wrapper", c.wrapper},
       {"timed", c.timed},
       {"loss_tensor", g.loss.value},
       {"operators", pytorch::operators_of(g)},
       {"optimizer",
        {{"kind", a.kind == OptimizerKind::sgd ? "sgd" : "adam"},
         {"learning_rate", a.learning_rate},
         {"momentum", a.momentum},
         {"beta1", a.beta1},
         {"beta2", a.beta2},
         {"epsilon", a.epsilon},
         {"weight_decay", a.weight_decay},
         {"clip", a.clip}}}};
  for (std::size_t i = 0; i < g.inputs.size(); ++i) {
    Json in{
        {"tensor", g.inputs[i].value},
        {"shape", pytorch::extents(with_samples(g.tensor(g.inputs[i]).shape, program.samples))}};
    for (int step = 0; step < c.steps; ++step)
      in["steps"].push_back(
          reference::make_inputs(g, program.samples, 11, step).by_tensor[i].values);
    j["inputs"].push_back(std::move(in));
  }
  for (std::size_t q = 0; q < g.parameters.size(); ++q)
    j["parameters"].push_back({{"shape", pytorch::extents(g.parameters[q].shape)},
                               {"values", exact.parameters[0][q].values}});
  return ours;
}

double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

/// Parameters of what feeds a router that normalises over its only expert: the gate is 1 whatever
/// they are, their gradient 0.
std::vector<std::size_t> without_effect(const Graph& g) {
  std::vector<std::size_t> list;
  for (const Operator& op : g.operators) {
    const auto* router = std::get_if<Router>(&op.operation);
    if (router == nullptr || router->top_k != 1 || !router->normalise) continue;
    for (const ParameterId q : g.op(g.tensor(op.inputs[0]).producer).parameters)
      list.push_back(q.index());
  }
  return list;
}

/// Such gradients have no size of their own: what each side has is left of terms that cancel, and
/// these are as large as any.
void compare_zero_gradients(const Case& c, const Ours& ours, reference::RunResult& theirs) {
  double all = 0;
  for (const auto& g : ours.serial.gradients[0]) all = std::max(all, largest_of(g));
  for (const std::size_t q : without_effect(c.graph)) {
    EXPECT_LE(largest_of(theirs.gradients[0][q]), ours.outcome.bound * all)
        << c.what << ", " << c.graph.parameters[q].name;
    EXPECT_LE(largest_of(ours.run.gradients[0][q]), ours.outcome.bound * all)
        << c.what << ", " << c.graph.parameters[q].name;
    theirs.gradients[0][q] = ours.run.gradients[0][q];
  }
}

/// Steps of PyTorch's optimizer and of ours, from the same parameters and data; all cases on as
/// many ranks.
std::vector<Outcome> train_beside(const std::vector<Case>& cases) {
  std::vector<Ours> all;
  Json request{{"world", cases[0].plan.dp}};
  for (const Case& c : cases) {
    all.push_back(train_ours(c));
    request["networks"].push_back(std::move(all.back().request));
  }
  const Json said = Json::parse(pytorch::ask("network.py", request));
  std::vector<Outcome> outcomes;
  for (std::size_t k = 0; k < cases.size(); ++k) {
    Ours& ours = all[k];
    reference::RunResult theirs;
    for (const double l : said[k]["losses"]) theirs.losses.push_back({l});
    theirs.gradients.push_back(said[k]["gradients"].get<std::vector<std::vector<double>>>());
    theirs.parameters.push_back(said[k]["parameters"].get<std::vector<std::vector<double>>>());
    compare_zero_gradients(cases[k], ours, theirs);
    ours.outcome.theirs_s = said[k]["step_s"].get<std::vector<double>>();
    ours.outcome.comparison =
        reference::compare(cases[k].graph, ours.run, theirs, ours.outcome.bound);
    outcomes.push_back(std::move(ours.outcome));
  }
  return outcomes;
}

void expect_same(const std::string& test, const std::vector<Case>& cases) {
  const std::vector<Outcome> outcomes = train_beside(cases);
  for (std::size_t k = 0; k < cases.size(); ++k) {
    const reference::Comparison& c = outcomes[k].comparison;
    const double worst = std::max({c.loss_error, c.gradient_error, c.parameter_error});
    EXPECT_TRUE(c.equal) << cases[k].what << ": loss off by " << c.loss_error << ", gradient of "
                         << c.worst_gradient << " by " << c.gradient_error << ", "
                         << c.worst_parameter << " by " << c.parameter_error << ", allowed "
                         << outcomes[k].bound;
    // A bound that large would say nothing.
    EXPECT_LT(outcomes[k].bound, 0.05) << cases[k].what;
    std::printf("%-64s off by %.2g, allowed %.2g\n", cases[k].what.c_str(), worst,
                outcomes[k].bound);
    pytorch::record_network(test, cases[k].what, worst, outcomes[k].bound);
  }
}
const char* name_of(Arithmetic a) { return a == Arithmetic::single ? "single" : "double"; }

Plan with_samples_of(std::int64_t samples) {
  Plan plan = base_plan();
  plan.micro_batch = samples;
  plan.bucket = 25_MiB;
  plan.optimizer.learning_rate = 0.1;
  return plan;
}

TEST(PyTorch, WholeNetworksHaveTheSameLossAndGradients) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  std::vector<Case> cases;
  for (const Graph& g : {named("gpt", gpt()), named("llama", llama()), named("mixtral", mixtral()),
                         cnn(true), resnet(), vit(), latent_attention()}) {
    for (const Arithmetic a : {Arithmetic::doubles, Arithmetic::single})
      cases.push_back({fmt::format("{}, {}", g.name, name_of(a)), g, with_samples_of(4), a});
  }
  expect_same("loss and gradients", cases);
}

TEST(PyTorch, RandomTransformersHaveTheSameLossAndGradients) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  std::vector<Case> cases;
  std::mt19937 rng(20261124);
  for (int k = 0, run = 0; k < 40 && run < 6; ++k) {
    const Graph g = random_transformer(rng);
    if (std::any_of(g.operators.begin(), g.operators.end(), [](const Operator& op) {
          return std::holds_alternative<Dropout>(op.operation);  // other random numbers
        }))
      continue;
    ++run;
    for (const Arithmetic a : {Arithmetic::doubles, Arithmetic::single})
      cases.push_back({fmt::format("{}, {}", g.name, name_of(a)), g, with_samples_of(2), a});
  }
  expect_same("loss and gradients of random transformers", cases);
}

/// AdamW with an epsilon large enough that where a gradient is only rounding (a key's bias has no
/// effect) the step is too; it also shows where epsilon stands.
Optimizer adam_with(double weight_decay, double clip) {
  Optimizer o;
  o.kind = OptimizerKind::adam;
  o.learning_rate = 0.02;
  o.beta1 = 0.8;
  o.beta2 = 0.97;
  o.epsilon = 1e-3;
  o.weight_decay = weight_decay;
  o.clip = clip;
  return o;
}

TEST(PyTorch, ThreeStepsOfEveryOptimizerGiveTheSameParameters) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  std::vector<Case> cases;
  for (const Graph& g : {named("gpt", gpt()), named("llama", llama()), named("mixtral", mixtral()),
                         resnet(), vit()}) {
    for (const double clip : {0.0, 0.25}) {
      Optimizer sgd = base_plan().optimizer;
      sgd.momentum = 0.8;
      sgd.learning_rate = 0.05;
      sgd.clip = clip;
      for (const auto& [name, optimizer] : {std::pair{"SGD with momentum", sgd},
                                            {"Adam", adam_with(0, clip)},
                                            {"AdamW", adam_with(0.2, clip)}}) {
        Plan plan = with_samples_of(4);
        plan.optimizer = optimizer;
        for (const Arithmetic a : {Arithmetic::doubles, Arithmetic::single}) {
          cases.push_back(
              {fmt::format("{}, {}{}, {}", g.name, name, clip > 0 ? ", clipped" : "", name_of(a)),
               g, plan, a, "", 3});
        }
      }
    }
  }
  expect_same("three steps", cases);
}

/// Three steps of PyTorch's own data parallelism over gloo on two ranks beside our plan's.
void expect_data_parallel(const std::string& test, const std::string& wrapper, int zero) {
  TransformerConfig c = small_config();
  c.name = "gpt h32 s16";
  c.hidden = 32;
  c.ffn = 64;
  c.sequence = 16;
  c.positions = 16;
  std::vector<Case> cases;
  for (const Graph& g : {named("gpt", gpt()), build_transformer(c), named("llama", llama()),
                         named("mixtral", mixtral())}) {
    for (const bool adam : {false, true}) {
      Plan plan = with_samples_of(2);
      plan.dp = 2;
      plan.zero = zero;
      if (adam) plan.optimizer = adam_with(0.2, 0.25);
      cases.push_back({fmt::format("{}, {}, single", g.name, adam ? "AdamW, clipped" : "SGD"), g,
                       plan, Arithmetic::single, wrapper, 3});
    }
  }
  expect_same(test, cases);
}

TEST(PyTorch, DistributedDataParallelTrainsTheSameParameters) {
  if (!pytorch::interpreter()) GTEST_SKIP() << pytorch::interpreter().missing;
  expect_data_parallel("three steps of DistributedDataParallel", "ddp", 0);
}

TEST(PyTorch, FullyShardedDataParallelTrainsTheSameParameters) {
  const auto& python = pytorch::interpreter();
  if (!python) GTEST_SKIP() << python.missing;
  if (!python.at_least(2, 1))
    GTEST_SKIP() << fmt::format(
        "FSDP on CPUs needs torch 2.1, {} has {}.{}; set PARTITA_PYTORCH to a Python with a newer",
        python.python, python.major, python.minor);
  expect_data_parallel("three steps of FullyShardedDataParallel", "fsdp", 3);
}

struct Times {
  double low, median, high;
};
/// Median and the quartiles.
Times times_of(std::vector<double> s) {
  std::sort(s.begin(), s.end());
  return {s[s.size() / 4], s[s.size() / 2], s[s.size() - 1 - s.size() / 4]};
}

/// Our measured step beside PyTorch's in one run, on one rank and on two, one core a rank, turn by
/// turn: whoever disturbs the machine meets both.
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
  constexpr int kTurns = 3, kTimed = 20;
  const auto side_by_side = [](const Graph& g, int ranks) {
    Plan plan = with_samples_of(4);
    plan.dp = ranks;
    std::vector<double> ours, theirs;
    for (int turn = 0; turn < kTurns; ++turn) {
      const Outcome o = train_beside(
          {{g.name, g, plan, Arithmetic::single, ranks > 1 ? "ddp" : "", 3, kTimed}})[0];
      EXPECT_TRUE(o.comparison.equal) << g.name << ": " << o.comparison.parameter_error;
      ours.insert(ours.end(), o.ours_s.begin(), o.ours_s.end());
      theirs.insert(theirs.end(), o.theirs_s.begin(), o.theirs_s.end());
    }
    for (const auto& [who, s] : {std::pair{"ours", ours}, {"PyTorch's", theirs}}) {
      const Times t = times_of(s);
      std::printf("%-20s %d ranks, %-10s %8.3f ms (quartiles %.3f to %.3f, %zu steps)\n",
                  g.name.c_str(), ranks, who, 1e3 * t.median, 1e3 * t.low, 1e3 * t.high, s.size());
      pytorch::record_times(g.name, ranks, who, s.size(), t.median, t.low, t.high);
    }
  };
  for (const Graph& g :
       {build_transformer(c), build_transformer(l), cnn(true), resnet(), build_transformer(v)})
    side_by_side(g, 1);
  side_by_side(build_transformer(c), 2);
}

}  // namespace
}  // namespace partita
