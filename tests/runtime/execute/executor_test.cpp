// Every plan that lowers also runs, on real ranks: threads in this process.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <tuple>

#include "runtime/execute/memory.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "simulator/engine/caching_allocator.h"
#include "simulator/engine/simulate.h"
#include "simulator/lower/startup.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/runtime/execute/far_device.h"
#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita::execute {
namespace {

constexpr std::uint64_t kSeed = 7;
constexpr int kSteps = 3;

Plan single_precision(Plan p = base_plan()) {
  set_precision(p, "fp32", "");
  return p;
}

Options options_for(const Graph& graph, int steps) {
  Options o;
  o.steps = steps;
  draw(o, graph, kSeed);
  return o;
}

/// The allocator's peak in the last step is the simulated one, to the byte and by category.
void expect_memory(const Program& program, const std::vector<RankMeasurement>& ranks) {
  Communication network(load_topology("cpu-host:4"));
  SimulateOptions unfolded;
  unfolded.unfolded = true;
  const Timeline t = simulate(program, network, unfolded);
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_EQ(ranks[r].last_peak, t.memory[r].peak) << "rank " << r;
    EXPECT_EQ(ranks[r].last_at_peak, t.memory[r].at_peak) << "rank " << r;
    EXPECT_EQ(ranks[r].host_peak, t.memory[r].host_peak) << "rank " << r;
  }
}

void expect_trains(const Graph& graph, const Program& program, int groups,
                   const ThreadOptions& threads = {}) {
  const bool routed = std::any_of(program.buffers.begin(), program.buffers.end(),
                                  [](const Buffer& b) { return b.routed; });
  Options options = options_for(graph, kSteps);
  options.routing = routed;
  const auto results = run_on_both(program, options, threads);
  EXPECT_EQ(results[0].values.copies_differ, 0) << "copies of one value differ between ranks";
  // The rows of the last step fed back.
  RoutingSource routing;
  if (routed) routing.recorded = results[0].routing;
  const Program known = with_routing(program, routing);
  // Bytes on every link, counted where they are sent, are those of the expansions.
  if (!threads.algorithm) {
    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> counted;
    for (const RankMeasurement& r : results[0].ranks) {
      for (const auto& [to, bytes] : r.traffic.bytes_to) {
        if (bytes > 0) counted[{r.rank, to}] += bytes;
      }
    }
    EXPECT_EQ(counted, step_traffic(known, kSteps - 1));
  }
  expect_memory(known, results[0].ranks);
  if (!routed) {
    for (const RankMeasurement& r : results[0].ranks) EXPECT_EQ(r.peak, r.last_peak);
  }
  const auto exact = reference::options_for(graph, program, kSteps, kSeed);
  const auto serial = reference::train_serially(graph, program, exact, groups);
  expect_equal(reference::compare_in_own_types(graph, program, results[0].values, serial, exact));
}

/// False if the plan is infeasible.
bool expect_good(const Graph& graph, const Plan& wanted, int groups = 1) {
  auto plan = complete(graph, wanted);
  if (!plan) return false;
  const auto program = lower(graph, *plan);
  if (!program) return false;
  SCOPED_TRACE(graph.name + "\n" + to_yaml(*plan));
  expect_trains(graph, *program, groups);
  return true;
}

TEST(Executor, OneRank) {
  EXPECT_TRUE(expect_good(gpt(), single_precision()));
  EXPECT_TRUE(expect_good(llama(), single_precision()));
  EXPECT_TRUE(expect_good(mixtral(), single_precision()));
  EXPECT_TRUE(expect_good(cnn(false), single_precision()));
}

TEST(Executor, SgdWithoutMomentum) {
  for (const char* precision : {"fp32", "bf16"}) {
    for (const bool offload : {false, true}) {
      Plan p = base_plan();
      set_precision(p, precision, "");
      p.offload_optimizer = offload;
      p.optimizer.kind = OptimizerKind::sgd;
      p.optimizer.momentum = 0;
      EXPECT_TRUE(expect_good(gpt(), p));
    }
  }
}

/// Stored in 16 bits, computed in fp32, with an fp32 copy of the parameters.
TEST(Executor, NarrowTypesOneRank) {
  for (const char* precision : {"bf16", "fp16"}) {
    Plan p = base_plan();
    set_precision(p, precision, "");
    for (const Graph& g : {gpt(), llama(), mixtral(), cnn(false)}) EXPECT_TRUE(expect_good(g, p));
    p.precision.gradients = p.precision.gradient_communication = p.precision.activations;
    p.precision_roles = true;
    EXPECT_TRUE(expect_good(llama(), p));
    p.precision.master_copy = false;
    EXPECT_TRUE(expect_good(gpt(), p));
  }
}

TEST(Executor, NarrowTypesRandomPlans) {
  std::mt19937 rng{20261128};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int run = 0;
  for (int k = 0; k < 400 && run < 30; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() > 8) continue;
    // What chooses, chooses otherwise after another rounding.
    if (p.compression.kind == CompressionKind::top_k ||
        p.compression.kind == CompressionKind::one_bit)
      continue;
    set_precision(p, rng() % 2 == 0 ? "bf16" : "fp16", "");
    run += expect_good(graphs[rng() % graphs.size()], p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 20);
}

/// Products of operands rounded to 8 bits, as the interpreter rounds them.
TEST(Executor, ProductsInFp8) {
  std::mt19937 rng(20261129);
  int run = 0;
  for (int k = 0; k < 400 && run < 24; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() > 4 || p.compression.kind != CompressionKind::none) continue;
    p.optimizer.kind = OptimizerKind::sgd;
    set_precision(p, "fp8", "");
    p.fp8_format = kFp8Formats[rng() % 2];
    run += expect_good(k % 3 == 0 ? gpt() : k % 3 == 1 ? llama() : mixtral(), p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 16);
}

/// The executor's operands are the interpreter's to the bit: what is left is rounding of the stored
/// types, far below that of a gradient in another format.
TEST(Executor, TheFormatOfGradientsIsThePlans) {
  for (const Graph& g : {gpt(), llama(), mixtral()}) {
    SCOPED_TRACE(g.name);
    Plan p = base_plan();
    p.optimizer.kind = OptimizerKind::sgd;
    set_precision(p, "fp8", "");
    // All else in fp32, so that a difference is of the products' operands.
    p.precision.parameters = p.precision.activations = ElementType::fp32;
    p.precision.gradients = p.precision.gradient_communication = ElementType::fp32;
    p.precision.master_copy = false;
    p.precision_roles = true;
    std::map<Fp8Format, std::vector<double>> losses;
    for (const Fp8Format format : kFp8Formats) {
      p.fp8_format = format;
      const Program program = lowered(g, p);
      auto exact = reference::options_for(g, program, 1, kSeed);
      exact.round = true;
      Options o = options_for(g, 1);
      o.steps = 1;
      const auto got = run_threads(program, o)[0].values;
      for (const Fp8Format other : kFp8Formats) {
        Program wanted = program;
        wanted.fp8_format = other;
        const auto c = reference::compare(g, got, reference::interpret(wanted, exact), 1e-4);
        EXPECT_LT(c.loss_error, 1e-5) << "the forward has no gradients";
        if (other == format) {
          EXPECT_LT(c.gradient_error, 2e-3) << name(format) << " " << c.worst_gradient;
        } else {
          EXPECT_GT(c.gradient_error, 1e-2) << name(format);
        }
      }
    }
  }
}

TEST(Executor, ProductsInBlocksOfScaledNumbersAreRefused) {
  Plan p = base_plan();
  set_precision(p, "mxfp8", "");
  const Graph g = gpt();
  EXPECT_THAT([&] { run_threads(lowered(g, p), options_for(g, 1)); },
              ::testing::ThrowsMessage<InputError>(::testing::HasSubstr(
                  "computes in mxfp8, which is predicted, not executed; use --precision fp8")));
}

/// What the allocator keeps is the predicted, to the byte, where nothing is packed; and the
/// categories at the peak are the peak.
TEST(Executor, ReservedMemoryOfARankAloneIsPredicted) {
  std::mt19937 rng(20261204);
  const std::vector<Graph> graphs{gpt(), llama(), cnn(false)};
  int run = 0;
  for (int k = 0; k < 400 && run < 30; ++k) {
    Plan p = random_plan(rng);
    p.tp = p.pp = p.dp = p.cp = p.ep = 1;
    p.etp = 0, p.virtual_stages = 1, p.zero = 0;
    p.strategy = "megatron";
    if (p.servers > 0 || p.message_queue || p.loader || p.average_every > 0 ||
        p.compression.kind != CompressionKind::none)
      continue;
    p.global_batch = p.micro_batch * (1 + static_cast<std::int64_t>(rng() % 4));
    set_framework(p, "partita", "");
    set_precision(p, rng() % 2 == 0 ? "fp32" : "bf16", "");
    const Graph g = graphs[rng() % graphs.size()];
    const auto plan = complete(g, p);
    if (!plan || plan->ranks() != 1) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    SCOPED_TRACE(g.name + "\n" + to_yaml(*plan));
    const RankMeasurement m = run_threads(*program, options_for(g, 2))[0].ranks[0];
    EXPECT_EQ(m.reserved, reserved_by_us(*program, {0, 0, 1}));
    EXPECT_GE(m.reserved, m.peak);
    Bytes sum{0};
    for (const Bytes b : m.at_peak) sum += b;
    EXPECT_EQ(sum, m.peak);
    EXPECT_EQ(m.outside, OutsideMemory{}) << "the host has none";
    ++run;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 15);
}

TEST(Executor, DataParallel) {
  Plan p = single_precision();
  p.dp = 3;
  p.global_batch = 6;
  EXPECT_TRUE(expect_good(gpt(), p));
  p.strategy = "dataparallel";
  EXPECT_TRUE(expect_good(gpt(), p));
  p.strategy = "replicas";
  EXPECT_TRUE(expect_good(gpt(), p));
  p.average_every = 2;  // of three steps
  EXPECT_TRUE(expect_good(gpt(), p));
}

TEST(Executor, StartUpInAllItsFormsGivesTheInitialParameters) {
  std::mt19937 rng{20261202};
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int done = 0;
  while (done < 20) {
    const Graph& g = graphs[rng() % graphs.size()];
    const auto plan = complete(g, single_precision(random_plan(rng)));
    if (!plan || plan->ranks() > 16) continue;
    const auto training = lower(g, *plan);
    if (!training) continue;
    ++done;
    SCOPED_TRACE(g.name + "\n" + to_yaml(*plan));
    for (const Startup form : {Startup::each, Startup::broadcast, Startup::sharded_read}) {
      SCOPED_TRACE(std::string(name(form)));
      const Program p = startup_program(*training, form);
      Options o = options_for(g, 1);
      std::atomic<std::int64_t> read{0};
      o.read = [&](std::size_t replica, std::size_t q, std::int64_t first, std::int64_t count,
                   float* to) {
        read += count;
        for (std::int64_t k = 0; k < count; ++k)
          to[k] = static_cast<float>(
              reference::initial_value(g.parameters[q], kSeed + replica, first + k));
      };
      const auto results = run_on_both(p, o);
      EXPECT_EQ(results[0].values.copies_differ, 0);
      for (std::size_t q = 0; q < g.parameters.size(); ++q) {
        const auto& got = results[0].values.parameters[0][q];
        for (std::size_t k = 0; k < got.size(); ++k) {
          ASSERT_EQ(static_cast<float>(got[k]),
                    static_cast<float>(reference::initial_value(g.parameters[q], kSeed,
                                                                static_cast<std::int64_t>(k))))
              << g.parameters[q].name;
        }
      }
      EXPECT_EQ(read > 0, form == Startup::sharded_read);
      expect_memory(p, results[0].ranks);
      std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> counted;
      for (const RankMeasurement& r : results[0].ranks) {
        for (const auto& [to, bytes] : r.traffic.bytes_to) {
          if (bytes > 0) counted[{r.rank, to}] += bytes;
        }
      }
      EXPECT_EQ(counted, step_traffic(p, 0));
    }
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(Executor, Spatial) {
  Plan p = single_precision();
  p.strategy = "spatial";
  p.tp = 2;
  p.micro_batch = 2;
  EXPECT_TRUE(expect_good(cnn(true), p));
  p.dp = 3;
  EXPECT_TRUE(expect_good(cnn(true), p));
}

/// y = W x with whole-number weights and inputs, target 0, learning rate 2^-6: every sum and
/// product of a step fits in 24 bits, so there is no rounding and all plans give equal bits.
TEST(Executor, WholeNumbersGiveEqualBits) {
  GraphBuilder b("whole");
  const TensorId x = b.input("x", {{Dim::sample, 1}, {Dim::feature, 8}});
  b.set_layer(0);
  b.set_scope("layers.0.");
  Linear up;
  up.out = {{Dim::ffn, 6}};
  TensorId h = b.add("up", up, {x});
  b.set_layer(1);
  b.set_scope("layers.1.");
  Linear down;
  down.out = {{Dim::feature, 4}};
  const TensorId y = b.add("down", down, {h});
  b.set_layer(2);
  b.set_scope("");
  const TensorId target = b.input("target", b.shape(y));
  const Graph g = b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 2, 0);
  std::vector<reference::RunResult> all;
  for (const auto& [tp, pp, dp, zero] : {std::tuple{1, 1, 1, 0},
                                         {1, 1, 4, 0},
                                         {2, 1, 2, 0},
                                         {3, 1, 1, 0},
                                         {1, 2, 2, 0},
                                         {1, 1, 4, 3},
                                         {2, 2, 2, 1}}) {
    Plan p = single_precision();
    p.tp = tp, p.pp = pp, p.dp = dp, p.zero = zero;
    p.global_batch = 8;
    p.micro_batch = 8 / dp / (pp > 1 ? 2 : 1);
    p.optimizer.learning_rate = 0x1p-6;
    p.optimizer.momentum = 0.5;
    const Program program = lowered(g, p);
    Options o;
    o.steps = 2;
    o.input = [](std::size_t input, std::int64_t, std::int64_t sample, std::int64_t index) {
      return input == 1 ? 0.0 : static_cast<double>((sample * 5 + index * 3) % 5 - 2);
    };
    o.initial = [](std::size_t, std::size_t q, std::int64_t linear) {
      return static_cast<double>((linear * 7 + static_cast<std::int64_t>(q)) % 3 - 1);
    };
    all.push_back(run_threads(program, o)[0].values);
    EXPECT_EQ(all.back().losses, all[0].losses) << to_yaml(p);
    EXPECT_EQ(all.back().gradients, all[0].gradients) << to_yaml(p);
    EXPECT_EQ(all.back().parameters, all[0].parameters) << to_yaml(p);
  }
}

/// Top-k and one bit choose: a rounding can change what they choose, so they are compared with
/// their serial algorithm where there is no rounding. Means of 64 and 32 whole numbers are exact
/// too.
TEST(Executor, CompressorsThatChooseDoSoAlike) {
  GraphBuilder b("whole");
  const TensorId x = b.input("x", {{Dim::sample, 1}, {Dim::feature, 8}});
  Linear up;
  up.out = {{Dim::ffn, 8}};
  const TensorId h = b.add("up", up, {x});
  Linear down;
  down.out = {{Dim::feature, 4}};
  const TensorId y = b.add("down", down, {h});
  const TensorId target = b.input("target", b.shape(y));
  const Graph g = b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 0, 0);
  for (const auto kind :
       {CompressionKind::top_k, CompressionKind::one_bit, CompressionKind::cast}) {
    for (const int dp : {2, 4}) {
      for (const auto& [feedback, steps] :
           {std::pair{false, 1}, {true, 1}, {false, 2}, {true, 2}}) {
        SCOPED_TRACE(::testing::Message() << name(kind) << " dp " << dp << " " << feedback);
        Plan p = single_precision();
        p.dp = dp;
        p.global_batch = 8;
        p.micro_batch = 8 / dp;
        p.optimizer.learning_rate = 0x1p-6;
        p.optimizer.momentum = 0.5;
        p.compression = {kind, ElementType::bf16, 0.25, 2, feedback};
        const Program program = lowered(g, p);
        Options o;
        o.steps = steps;
        o.input = [](std::size_t input, std::int64_t, std::int64_t sample, std::int64_t index) {
          return input == 1 ? 0.0 : static_cast<double>((sample * 5 + index * 3) % 5 - 2);
        };
        o.initial = [](std::size_t, std::size_t q, std::int64_t linear) {
          return static_cast<double>((linear * 7 + static_cast<std::int64_t>(q)) % 3 - 1);
        };
        auto exact = reference::options_for(g, program, o.steps, kSeed);
        exact.input = o.input;
        for (std::size_t q = 0; q < g.parameters.size(); ++q) {
          auto& values = exact.parameters[0][q].values;
          for (std::size_t k = 0; k < values.size(); ++k)
            values[k] = o.initial(0, q, static_cast<std::int64_t>(k));
        }
        const auto serial = reference::train_serially(g, program, exact, 1);
        const auto run = run_on_both(program, o)[0].values;
        if (steps == 1) {
          EXPECT_EQ(run.gradients, serial.gradients);
          EXPECT_EQ(run.parameters, serial.parameters);
        } else {
          // 24 bits no longer hold everything, but no choice is that close.
          expect_equal(reference::compare(g, run, serial, 0x1p-20));
        }
      }
    }
  }
}

TEST(Executor, EveryAlgorithmTrainsAlike) {
  Plan p = single_precision();
  p.dp = 3;
  const Program program = lowered(gpt(), p);
  for (const AlgorithmRow& row : kAlgorithms) {
    ThreadOptions threads;
    threads.algorithm = [&](CollectiveKind kind, int) {
      return kind == row.kind ? row.algorithm : default_algorithm(kind);
    };
    SCOPED_TRACE(std::string(name(row.kind)) + " " + std::string(name(row.algorithm)));
    expect_trains(gpt(), program, 1, threads);
  }
}

/// A rank that dies at a random instruction: all others end, and the message names it.
TEST(Executor, ARankThatFailsEndsAllWithItsReason) {
  Plan p = single_precision();
  p.tp = 2;
  p.pp = 2;
  p.global_batch = 4;
  const Graph g = llama();
  const Program program = lowered(g, p);
  std::mt19937 rng(5);
  for (int k = 0; k < 20; ++k) {
    Options o = options_for(g, 3);
    const int victim = static_cast<int>(rng() % 4);
    const auto at = static_cast<std::size_t>(rng() % 200);
    o.before = [&](int rank, std::int64_t step, std::size_t instruction) {
      if (rank == victim && step == 1 && instruction >= at)
        throw std::runtime_error("its memory chips melted");
    };
    try {
      run_threads(program, o);
      ADD_FAILURE() << "rank " << victim << " was to fail at " << at;
    } catch (const std::exception& e) {
      EXPECT_STREQ(e.what(), "its memory chips melted");
    }
  }
}

TEST(Executor, ARankThatHangsIsNamed) {
  Plan p = single_precision();
  p.dp = 3;
  const Graph g = gpt();
  const Program program = lowered(g, p);
  Options o = options_for(g, 2);
  std::atomic<bool> over{false};
  o.before = [&](int rank, std::int64_t step, std::size_t instruction) {
    for (int k = 0; rank == 1 && step == 1 && instruction == 40 && !over && k < 3000; ++k)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  };
  ThreadOptions threads;
  threads.timeout_s = 0.3;
  const auto start = std::chrono::steady_clock::now();
  std::thread watch([&] {
    std::this_thread::sleep_for(std::chrono::seconds(2));
    over = true;
  });
  try {
    run_threads(program, o, threads);
    ADD_FAILURE() << "nobody noticed";
  } catch (const PeerError& e) {
    EXPECT_THAT(e.what(), ::testing::HasSubstr("rank 1"));
    EXPECT_THAT(e.what(), ::testing::HasSubstr("waits in"));
  }
  watch.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

/// Compressors that choose are compared above.
Plan without_choices(Plan p) {
  if (p.compression.kind == CompressionKind::top_k) p.compression.kind = CompressionKind::cast;
  if (p.compression.kind == CompressionKind::one_bit)
    p.compression.kind = CompressionKind::power_sgd;
  return p;
}

TEST(Executor, RandomPlans) {
  std::mt19937 rng(20261124);
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int run = 0;
  for (int k = 0; k < 400 && run < 120; ++k) {
    const Plan p = single_precision(without_choices(random_plan(rng)));
    if (p.ranks() > 24) continue;
    run += expect_good(graphs[rng() % graphs.size()], p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 60);
}

TEST(Executor, RandomNetworks) {
  std::mt19937 rng(20261125);
  int run = 0;
  for (int k = 0; k < 800 && run < 120; ++k) {
    const Graph g = random_transformer(rng);
    const Plan p = single_precision(without_choices(random_plan(rng)));
    if (p.ranks() > 24) continue;
    run += expect_good(g, p) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 60);
}

/// docs/execution.md, "Rounding": the examples by hand; never more than for fp32 throughout.
TEST(Comparisons, SixteenBitsRoundOnceASum) {
  EXPECT_NEAR(reference::rounding_allows(0.01, 504, 0x1p-8), 0.0801, 5e-5);
  EXPECT_NEAR(reference::rounding_allows(0x1p-20, 504, 0), 512 * 0x1p-20, 1e-12);
  EXPECT_EQ(reference::rounding_allows(0, 504, 0), 512 * 0x1p-24);
  for (const double d : {0.0, 1e-6, 1e-3, 0.1}) {
    for (const double longest : {1.0, 20.0, 4096.0}) {
      for (const double half : {0x1p-8, 0x1p-11})
        EXPECT_LE(reference::rounding_allows(d, longest, half),
                  reference::rounding_allows(d, longest, 0));
    }
  }
}

/// Whatever rounding may do to one tensor, who computes nothing, or the opposite, is not equal; and
/// in 16 bits the bound says something (docs/execution.md, "Rounding").
TEST(Comparisons, NothingAtAllIsNotEqual) {
  const Graph g = gpt();
  Plan p = single_precision();
  set_precision(p, "bf16", "");
  const Program program = lowered(g, p);
  const auto exact = reference::options_for(g, program, 3, kSeed);
  const reference::RunResult serial = reference::train_serially(g, program, exact, 1);
  reference::RunResult run = serial;
  EXPECT_TRUE(reference::compare(g, run, serial, 1e9).equal);
  const auto scaled = [&](double gradients, double losses) {
    run = serial;
    for (auto& of_replica : run.gradients) {
      for (auto& list : of_replica) {
        for (double& v : list) v *= gradients;
      }
    }
    for (auto& list : run.losses) {
      for (double& v : list) v *= losses;
    }
    return reference::compare(g, run, serial, 1e9);
  };
  EXPECT_FALSE(scaled(0, 1).equal);
  EXPECT_NEAR(scaled(0, 1).gradient_distance, 1, 1e-12);
  EXPECT_FALSE(scaled(1, 0).equal);
  EXPECT_FALSE(scaled(-1, 1).equal);
  EXPECT_FALSE(scaled(NAN, 1).equal);
  EXPECT_TRUE(scaled(0.2, 0.2).equal) << "a bound of 1e9 allows it";
}

/// Where rounding alone moves all gradients by more than may be, a run has to lie by the
/// interpreter's that rounds alike.
TEST(Comparisons, WhereRoundingIsAllARunLiesByOneThatRounds) {
  Plan p = base_plan();
  p.optimizer.kind = OptimizerKind::sgd;
  p.global_batch = 2;
  set_precision(p, "fp8", "");
  bool met = false;
  for (const Graph& g : {gpt(), llama()}) {
    const Program program = lowered(g, p);
    for (std::uint64_t seed = 1; seed < 200 && !met; ++seed) {
      auto exact = reference::options_for(g, program, 3, seed);
      const auto serial = reference::train_serially(g, program, exact, 1);
      auto rounds = exact;
      rounds.round = true;
      reference::RunResult run = reference::interpret(program, rounds);
      if (reference::compare(g, run, serial, 1e9).gradient_distance <= reference::kMostApart)
        continue;
      met = true;
      EXPECT_TRUE(reference::compare_in_own_types(g, program, run, serial, exact).equal);
      const auto as_run = run.gradients;
      for (const double f : {0.0, -1.0}) {
        run.gradients = as_run;
        for (auto& of_replica : run.gradients) {
          for (auto& list : of_replica) {
            for (double& v : list) v *= f;
          }
        }
        EXPECT_FALSE(reference::compare_in_own_types(g, program, run, serial, exact).equal) << f;
      }
    }
  }
  EXPECT_TRUE(met);
}

/// Blocks for sizes that change: enough, at most an eighth more, eight sizes for each power of two.
TEST(RoomySizes, ServeOneAnother) {
  std::mt19937_64 rng(3);
  for (int round = 0; round < 1000; ++round) {
    const auto n = static_cast<std::int64_t>(rng() >> (20 + rng() % 40));
    const std::int64_t room = Memory::roomy(n);
    EXPECT_GE(room, n);
    EXPECT_LE(room, n + n / 8);
    EXPECT_EQ(Memory::roomy(room), room);
    EXPECT_LE(Memory::roomy(n / 2), room);
  }
  std::set<std::int64_t> sizes;
  for (std::int64_t n = (1 << 16) + 1; n <= 1 << 17; ++n) sizes.insert(Memory::roomy(n));
  EXPECT_EQ(sizes.size(), 8u);
  EXPECT_EQ(*sizes.begin(), (1 << 16) + (1 << 13));
  EXPECT_EQ(Memory::roomy(4096), 4096);
  EXPECT_EQ(Memory::roomy(4097), 4608);
  EXPECT_EQ(Memory::roomy(0), 0);
}

}  // namespace
}  // namespace partita::execute
