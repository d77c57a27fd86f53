// Plans on ranks whose devices do everything as GPUs do, but for the libraries: the CUDA kernels'
// text, streams, links by NCCL's calls.
#include <gtest/gtest.h>

#include <random>

#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "simulator/cost/nccl.h"
#include "tests/runtime/cpu/equal_reference.h"
#include "tests/runtime/cuda/far_gpu.h"
#include "tests/runtime/cuda/on_device.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita::cuda {
namespace {

constexpr std::uint64_t kSeed = 7;

enum class Linked { no, by_nccls_calls, in_process };
Linked drawn(std::mt19937& rng) {
  constexpr Linked all[] = {Linked::no, Linked::by_nccls_calls, Linked::by_nccls_calls,
                            Linked::in_process, Linked::in_process};
  return all[rng() % std::size(all)];
}

execute::Options options_for(const Graph& graph, Linked linked, std::uint64_t seed,
                             int refuses = -1) {
  execute::Options o;
  o.steps = 3;
  execute::draw(o, graph, kSeed);
  auto hub = linked == Linked::by_nccls_calls ? std::make_shared<FarHub>() : nullptr;
  if (hub) hub->refuses = refuses;
  o.device = [hub, seed, linked](int rank) {
    return std::make_unique<FarGpu>(
        execute::FarOptions{seed + static_cast<std::uint64_t>(rank), 20, false}, hub,
        linked == Linked::in_process);
  };
  return o;
}

bool expect_good(const Graph& graph, const Plan& wanted, Linked linked, std::uint64_t seed) {
  auto plan = complete(graph, wanted);
  if (!plan) return false;
  const auto program = lower(graph, *plan);
  if (!program) return false;
  SCOPED_TRACE(::testing::Message() << graph.name << ", linked " << static_cast<int>(linked) << '\n'
                                    << to_yaml(*plan));
  const auto results = execute::run_threads(*program, options_for(graph, linked, seed));
  EXPECT_EQ(results[0].values.copies_differ, 0);
  const auto exact = reference::options_for(graph, *program, 3, kSeed);
  const auto serial = reference::train_serially(graph, *program, exact, 1);
  expect_equal(reference::compare_in_own_types(graph, *program, results[0].values, serial, exact));
  return true;
}

Plan single_precision(Plan p) {
  set_precision(p, "fp32", "");
  if (p.compression.kind == CompressionKind::top_k) p.compression.kind = CompressionKind::cast;
  if (p.compression.kind == CompressionKind::one_bit)
    p.compression.kind = CompressionKind::power_sgd;
  return p;
}

struct OneFarGpu {
  static execute::Device& device() {
    static FarGpu gpu({2, 0, false}, nullptr);
    return gpu;
  }
};
/// What gpu_test does on a GPU.
TEST(KernelOnDevice, EqualsTheReferences) {
  std::mt19937_64 rng(19);
  for (const reference::Problem& p : reference::problems(rng)) {
    SCOPED_TRACE(p.label);
    cpu::expect_same<KernelOnDevice<OneFarGpu>>(p, reference::whole_part(p), [](const auto&) {});
  }
  cpu::expect_parts_equal<KernelOnDevice<OneFarGpu>>();
}

TEST(CudaExecutor, OneRank) {
  for (const Graph& g : {gpt(), llama(), mixtral(), cnn(false)})
    EXPECT_TRUE(expect_good(g, single_precision(base_plan()), Linked::no, 2));
}

TEST(CudaExecutor, SpatialPiecesPadWhereTheyEnd) {
  Plan p = single_precision(base_plan());
  p.strategy = "spatial";
  p.tp = 2;
  p.micro_batch = 2;
  for (const Linked linked : {Linked::no, Linked::by_nccls_calls, Linked::in_process})
    EXPECT_TRUE(expect_good(cnn(true), p, linked, 0));
  p.dp = 3;
  EXPECT_TRUE(expect_good(cnn(true), p, Linked::by_nccls_calls, 1));
  EXPECT_TRUE(expect_good(cnn(true), p, Linked::in_process, 1));
}

// One rank's refusal is all ranks': what then passes through the host is the same.
TEST(CudaExecutor, WithoutLinksMessagesPassThroughTheHost) {
  const Graph g = gpt();
  Plan p = single_precision({});
  p.tp = 2, p.pp = 2, p.dp = 2, p.global_batch = 4, p.micro_batch = 1;
  const auto program = lower(g, *complete(g, p));
  ASSERT_TRUE(static_cast<bool>(program)) << program.reason();
  const auto with = [&](int refuses) {
    return execute::run_threads(*program, options_for(g, Linked::by_nccls_calls, 11, refuses));
  };
  EXPECT_EQ(with(-1)[0].no_links, "");
  const auto exact = reference::options_for(g, *program, 3, kSeed);
  const auto serial = reference::train_serially(g, *program, exact, 1);
  for (const int rank : {0, 5}) {
    const auto left = with(rank);
    for (const auto& r : left) EXPECT_EQ(r.no_links, "far links refuse this rank");
    EXPECT_EQ(left[0].values.copies_differ, 0);
    expect_equal(reference::compare_in_own_types(g, *program, left[0].values, serial, exact));
  }
}

/// Of rows of experts the transport tells which they are; their values the links move, to experts
/// and back, forward and backward.
TEST(CudaExecutor, RowsOfExpertsPassByTheLinks) {
  const Graph g = mixtral();
  Plan p = single_precision(base_plan());
  p.dp = p.ep = 2;
  p.global_batch = 2;
  const auto program = lower(g, *complete(g, p));
  ASSERT_TRUE(static_cast<bool>(program)) << program.reason();
  const auto traffic = [&](Linked linked) {
    execute::Options o = options_for(g, linked, 3);
    o.collect = false;
    o.balanced_rows = true;
    return execute::run_threads(*program, o)[0].measured.traffic;
  };
  const Traffic by_host = traffic(Linked::no);
  // 2 layers of 8 tokens with 2 of 4 experts: half of 16 rows cross, each way four times, told by
  // 24 bytes each and their number, with 16 features in fp32.
  const std::int64_t told = 2 * 4 * (8 + 8 * 24), values = 2 * 4 * 8 * 16 * 4;
  for (const Linked linked : {Linked::by_nccls_calls, Linked::in_process}) {
    const Traffic t = traffic(linked);
    EXPECT_EQ(t.collectives.at(CollectiveKind::all_to_all).calls, 2 * 4);
    EXPECT_EQ(t.bytes_to.at(1), told);
    EXPECT_GE(by_host.bytes_to.at(1), told + values);
  }
}

TEST(CudaExecutor, RandomPlans) {
  std::mt19937 rng(20261127);
  const std::vector<Graph> graphs{gpt(), llama(), mixtral()};
  int run = 0;
  for (int k = 0; k < 400 && run < 40; ++k) {
    const Plan p = single_precision(random_plan(rng));
    if (p.ranks() > 8) continue;
    const bool network = rng() % 2 == 0;
    const Graph g = network ? random_transformer(rng) : graphs[rng() % graphs.size()];
    run += expect_good(g, p, drawn(rng), rng()) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 25);
}

/// In the types that GPUs train in, statistics and masters in fp32.
TEST(CudaExecutor, RandomPlansInNarrowTypes) {
  std::mt19937 rng(20261128);
  const std::vector<Graph> graphs{gpt(), llama(), mixtral(), cnn(false)};
  int run = 0;
  for (int k = 0; k < 400 && run < 30; ++k) {
    Plan p = single_precision(random_plan(rng));
    if (p.ranks() > 8) continue;
    set_precision(p, rng() % 2 == 0 ? "bf16" : "fp16", "");
    p.optimizer.kind = rng() % 2 == 0 ? OptimizerKind::sgd : p.optimizer.kind;
    run += expect_good(graphs[rng() % graphs.size()], p, drawn(rng), rng()) ? 1 : 0;
    if (HasFailure()) return;
  }
  EXPECT_GE(run, 20);
}

/// No product is the host's, experts' neither.
TEST(CudaExecutor, ProductsInFp8) {
  for (const Fp8Format format : kFp8Formats) {
    Plan p = single_precision(base_plan());
    set_precision(p, "fp8", "");
    p.fp8_format = format;
    for (const Graph& g : {gpt(), llama(), mixtral()}) {
      EXPECT_TRUE(expect_good(g, p, Linked::no, 2));
      Plan two = p;
      two.tp = 2;
      EXPECT_TRUE(expect_good(g, two, Linked::by_nccls_calls, 3));
    }
    const Graph g = mixtral();
    const auto program = lower(g, *complete(g, p));
    const auto results = execute::run_threads(*program, options_for(g, Linked::no, 2));
    for (const auto& [kernel, calls] : results[0].fallbacks) {
      EXPECT_EQ(kernel.find("linear"), std::string::npos) << kernel;
      EXPECT_EQ(kernel.find("product"), std::string::npos) << kernel;
    }
  }
}

/// A collective's values: member m's element k is 100 m + k, sums are exact.
TEST(NcclSteps, DoWhatTheCollectiveSays) {
  std::mt19937 rng(5);
  for (int round = 0; round < 400; ++round) {
    const auto kind = static_cast<CollectiveKind>(rng() % kCollectiveKinds);
    const auto n = static_cast<std::size_t>(1 + rng() % 5);
    const bool equal = rng() % 2 == 0;
    SCOPED_TRACE(::testing::Message() << name(kind) << ", " << n << (equal ? " equal" : ""));
    // sizes[a][b]: what a has for b.
    std::vector<std::vector<std::int64_t>> sizes(n, std::vector<std::int64_t>(n));
    std::vector<std::int64_t> chunks(n);
    const auto size = static_cast<std::int64_t>(rng() % 4);
    for (auto& c : chunks) c = equal ? size : static_cast<std::int64_t>(rng() % 4);
    for (auto& row : sizes) {
      for (auto& s : row) s = static_cast<std::int64_t>(rng() % 4);
    }
    const auto bounds_of = [](const std::vector<std::int64_t>& list) {
      std::vector<std::int64_t> b{0};
      for (const std::int64_t s : list) b.push_back(b.back() + s);
      return b;
    };
    const bool exchange =
        kind == CollectiveKind::all_to_all || kind == CollectiveKind::halo_exchange;
    const bool one = kind == CollectiveKind::all_reduce || kind == CollectiveKind::broadcast ||
                     kind == CollectiveKind::reduce;
    std::vector<int> group(n);
    std::vector<Brought> all(n);
    std::vector<const Brought*> pointers;
    for (std::size_t m = 0; m < n; ++m) {
      group[m] = static_cast<int>(m);
      CollectiveCall& c = all[m].call;
      c.kind = kind;
      c.group = &group;
      c.me = static_cast<int>(m);
      c.offsets = one ? std::vector<std::int64_t>{0, size} : bounds_of(chunks);
      if (exchange) {
        std::vector<std::int64_t> in;
        for (std::size_t k = 0; k < n; ++k) in.push_back(sizes[k][m]);
        c.offsets = bounds_of(in);
        c.send_offsets = bounds_of(sizes[m]);
      } else if (kind == CollectiveKind::shift) {
        std::vector<std::int64_t> in(n, 0), out(n, 0);
        in[m] = chunks[(m + n - 1) % n];
        out[m] = chunks[m];
        c.offsets = bounds_of(in);
        c.send_offsets = bounds_of(out);
      }
      const auto fill = [&](std::vector<std::byte>& to, std::int64_t count, float base) {
        to.resize(static_cast<std::size_t>(count) * 4);
        for (std::int64_t k = 0; k < count; ++k)
          reinterpret_cast<float*>(to.data())[k] = base + static_cast<float>(k);
      };
      fill(all[m].data, c.offsets.back(), 100 * static_cast<float>(m));
      if (!c.send_offsets.empty())
        fill(all[m].send, c.send_offsets.back(), 1000 + 100 * static_cast<float>(m));
    }
    for (const Brought& b : all) pointers.push_back(&b);
    const float sum = 100 * static_cast<float>(n * (n - 1) / 2);
    for (std::size_t me = 0; me < n; ++me) {
      const auto bytes = after_steps(pointers, me);
      const auto* got = reinterpret_cast<const float*>(bytes.data());
      const CollectiveCall& c = all[me].call;
      const auto total = [&](std::int64_t k) {
        return sum + static_cast<float>(n) * static_cast<float>(k);
      };
      const auto of = [](std::size_t m, std::int64_t k) {
        return 100 * static_cast<float>(m) + static_cast<float>(k);
      };
      const auto chunk = [&](std::size_t m, auto value) {
        for (std::int64_t k = c.offsets[m]; k < c.offsets[m + 1]; ++k)
          EXPECT_EQ(got[k], value(k)) << "member " << me << ", chunk " << m;
      };
      switch (kind) {
        case CollectiveKind::all_reduce:
          chunk(0, total);
          break;
        case CollectiveKind::broadcast:
          chunk(0, [&](std::int64_t k) { return of(0, k); });
          break;
        case CollectiveKind::reduce:
          if (me == 0) chunk(0, total);
          break;
        case CollectiveKind::reduce_scatter:
          chunk(me, total);
          break;
        case CollectiveKind::scatter:
          chunk(me, [&](std::int64_t k) { return of(0, k); });
          break;
        case CollectiveKind::all_gather:
        case CollectiveKind::gather:
          for (std::size_t m = 0; m < n && (me == 0 || kind == CollectiveKind::all_gather); ++m)
            chunk(m, [&](std::int64_t k) { return of(m, k); });
          break;
        case CollectiveKind::all_to_all:
        case CollectiveKind::halo_exchange:
          for (std::size_t m = 0; m < n; ++m) {
            if (m == me) continue;
            const std::int64_t first = all[m].call.send_offsets[me];
            chunk(m, [&](std::int64_t k) { return 1000 + of(m, first + k - c.offsets[m]); });
          }
          break;
        case CollectiveKind::shift:
          chunk(me, [&](std::int64_t k) { return 1000 + of((me + n - 1) % n, k); });
          break;
      }
    }
  }
}

/// What NCCL is asked for is what our model of it has, but for algorithms of networks that reduce.
TEST(NcclEstimates, AreAskedForWhereThereIsAPrice) {
  const std::map<CollectiveKind, nccl::Collective> known{
      {CollectiveKind::all_reduce, nccl::Collective::all_reduce},
      {CollectiveKind::all_gather, nccl::Collective::all_gather},
      {CollectiveKind::reduce_scatter, nccl::Collective::reduce_scatter},
      {CollectiveKind::broadcast, nccl::Collective::broadcast},
      {CollectiveKind::reduce, nccl::Collective::reduce}};
  // Of one GPU a node, which PAT asks for, and of several.
  for (const std::vector<std::int64_t>& ranks :
       {std::vector<std::int64_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
        std::vector<std::int64_t>{0, 8}}) {
    const nccl::Communicator c = nccl::communicator(load_topology("dgx-h100:2"), ranks);
    std::set<std::pair<std::string, std::string>> pairs;
    for (const auto& [a, p] : estimated_pairs()) pairs.emplace(a, p);
    for (const CollectiveKind kind : kEstimated) {
      for (std::size_t a = 0; a < nccl::kAlgorithms; ++a) {
        for (std::size_t p = 0; p < nccl::kProtocols; ++p) {
          const auto algorithm = static_cast<nccl::Algorithm>(a);
          const auto protocol = static_cast<nccl::Protocol>(p);
          if (algorithm == nccl::Algorithm::collnet_direct ||
              algorithm == nccl::Algorithm::collnet_chain)
            continue;
          constexpr const char* names[] = {"Tree", "Ring", "", "", "NVLS", "NVLSTree", "PAT"};
          if (!nccl::price(c, known.at(kind), algorithm, protocol)) continue;
          const std::pair pair{std::string(names[a]), std::string(name(protocol))};
          EXPECT_TRUE(pairs.count(pair) == 1 && estimated(kind, pair.first))
              << name(kind) << " " << pair.first << " " << pair.second;
        }
      }
    }
  }
  EXPECT_FALSE(estimated(CollectiveKind::broadcast, "Tree"));
  EXPECT_FALSE(estimated(CollectiveKind::all_gather, "NVLSTree"));
  EXPECT_FALSE(estimated(CollectiveKind::all_reduce, "PAT"));
}

TEST(Channels, AreThoseOfEveryRanksCalls) {
  Plan p = single_precision(base_plan());
  p.tp = 2;
  p.pp = 2;
  p.dp = 2;
  p.global_batch = 8;
  const Program program = lowered(gpt(), p);
  const auto channels = execute::channels_of(program);
  std::set<std::vector<int>> groups;
  for (const auto& c : channels) groups.insert(c.group);
  // Ranks count tensor parallel first, then data parallel, then stages.
  for (const std::vector<int>& g : {std::vector<int>{0, 1}, {2, 3}, {0, 2}, {4, 6}, {0, 4}, {3, 7}})
    EXPECT_EQ(groups.count(g), 1u) << g[0] << " and " << g[1];
  EXPECT_TRUE(std::is_sorted(channels.begin(), channels.end()));
  // Each message has a channel of its own, the same on both sides.
  Instruction message;
  message.kind = Kind::send;
  message.index = 3;
  const auto channel = execute::channel_of(message, 0, 4);
  message.kind = Kind::receive;
  EXPECT_EQ(execute::channel_of(message, 4, 0), channel);
  EXPECT_EQ(channel, (execute::Channel{{0, 4}, 259}));
}

}  // namespace
}  // namespace partita::cuda
