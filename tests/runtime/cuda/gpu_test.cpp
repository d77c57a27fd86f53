// On a GPU: kernels against the reference's, plans against their reference semantics. Without one
// every test is skipped and says why.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cuda/device.h"
#include "runtime/cuda/fused_attention.h"
#include "runtime/cuda/product_choice.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "tests/runtime/cpu/equal_reference.h"
#include "tests/runtime/cuda/flash_problems.h"
#include "tests/runtime/cuda/narrowed.h"
#include "tests/runtime/cuda/octet_problems.h"
#include "tests/runtime/cuda/on_device.h"
#include "tests/runtime/cuda/own_statistics.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/runtime/execute/far_device.h"
#include "tests/simulator/networks.h"
#include "tests/simulator/reference_check.h"

namespace partita::cuda {
namespace {

#define NEEDS_GPU()                        \
  do {                                     \
    const std::string why = absent();      \
    if (!why.empty()) GTEST_SKIP() << why; \
  } while (false)

struct OneGpu {
  static execute::Device& device() {
    // Never ended: its libraries may be gone before objects of this program are.
    static execute::Device& gpu = *cuda_device({}).release();
    return gpu;
  }
};
using GpuKernel = KernelOnDevice<OneGpu>;

TEST(Gpu, WithoutOneTheReasonIsSaid) {
  if (absent().empty()) GTEST_SKIP() << "there is one";
  EXPECT_NE(absent().find("--backend cpu"), std::string::npos) << absent();
  EXPECT_EQ(device_count(), 0);
  EXPECT_THROW(cuda_device({}), MachineError);
  // Versions are known all the same.
  EXPECT_NE(facts(-1).runtime, "");
}

TEST(Gpu, KernelsEqualTheReferences) {
  NEEDS_GPU();
  std::mt19937_64 rng(19);
  for (int round = 0; round < 4; ++round) {
    for (const reference::Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      try {
        cpu::expect_same<GpuKernel>(p, reference::whole_part(p), [](const GpuKernel&) {});
      } catch (const std::exception& e) {
        ADD_FAILURE() << e.what();
        return;  // a GPU that has failed computes nothing more
      }
    }
  }
  for (const auto& [kernel, calls] : OneGpu::device().fallbacks())
    std::printf("of the host: %s, %ld calls\n", kernel.c_str(), static_cast<long>(calls));
}

template <ElementType kType>
void expect_narrow_kernels() {
  std::mt19937_64 rng(20);
  for (int round = 0; round < 2; ++round) {
    for (const reference::Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      try {
        expect_same_narrow<GpuKernel, kType>(p, [](const auto&) {});
      } catch (const std::exception& e) {
        ADD_FAILURE() << e.what();
        return;
      }
    }
  }
  for (const auto& [kernel, calls] : OneGpu::device().fallbacks())
    std::printf("of the host: %s, %ld calls\n", kernel.c_str(), static_cast<long>(calls));
}
TEST(Gpu, KernelsEqualTheReferencesInBf16) {
  NEEDS_GPU();
  expect_narrow_kernels<ElementType::bf16>();
}
TEST(Gpu, KernelsEqualTheReferencesInFp16) {
  NEEDS_GPU();
  expect_narrow_kernels<ElementType::fp16>();
}

TEST(Gpu, KernelsEqualTheReferencesInRowsOfOctets) {
  NEEDS_GPU();
  std::mt19937_64 rng(23);
  for (const reference::Problem& p : octet_problems(rng)) {
    SCOPED_TRACE(p.label);
    try {
      cpu::expect_same<GpuKernel>(p, reference::whole_part(p), [](const auto&) {});
      expect_same_narrow<GpuKernel, ElementType::bf16>(p, [](const auto&) {});
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
      return;
    }
  }
}

TEST(Gpu, RowsOfAnyLengthEqualTheReferences) {
  NEEDS_GPU();
  std::mt19937_64 rng(24);
  for (const reference::Problem& p : row_problems(rng)) {
    SCOPED_TRACE(::testing::Message() << p.label << " of " << p.inputs[0].index.back().size());
    try {
      const auto any = [](const auto&) {};
      cpu::expect_same<GpuKernel>(p, reference::whole_part(p), any);
      cpu::expect_same<OwnStatistics<GpuKernel>>(p, reference::whole_part(p), any);
      expect_same_narrow<OwnStatistics<GpuKernel>, ElementType::bf16>(p, any);
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
      return;
    }
  }
}

/// Whoever asks for cuDNN's attention has tested it.
void expect_whose_attention() {
  const char* wanted = std::getenv("PARTITA_CUDA_FLASH");
  if (wanted != nullptr && std::string_view(wanted) == "cudnn") {
    EXPECT_GT(fused_attention_calls(), 0) << "all of it was our own kernels'";
  }
}

TEST(Gpu, FlashAttentionEqualsTheReferencesInBf16) {
  NEEDS_GPU();
  expect_flash<GpuKernel, ElementType::bf16>([](const auto&) {});
  expect_whose_attention();
}
TEST(Gpu, FlashAttentionEqualsTheReferencesInFp16) {
  NEEDS_GPU();
  expect_flash<GpuKernel, ElementType::fp16>([](const auto&) {});
  expect_whose_attention();
}

TEST(Gpu, NarrowNumbersRoundAsOnTheHost) {
  NEEDS_GPU();
  execute::Device& gpu = OneGpu::device();
  const auto host = execute::host_device();
  // Sums of pairs, rounded: every bit pattern meets another.
  for (const ElementType type : {ElementType::bf16, ElementType::fp16}) {
    constexpr std::int64_t n = 1 << 16;
    std::vector<std::uint16_t> a(n), b(n), sums(n), from_gpu(n);
    for (std::int64_t i = 0; i < n; ++i) {
      a[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(i);
      b[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(40503 * i);
    }
    const execute::RunList all(std::vector<execute::Run>{{0, n}});
    sums = a;
    const auto bytes = [](std::vector<std::uint16_t>& v) {
      return reinterpret_cast<std::byte*>(v.data());
    };
    host->unpack_add(all, type, bytes(b), bytes(sums));
    std::byte *to = gpu.allocate(2 * n), *from = gpu.allocate(2 * n);
    gpu.to_device(to, a.data(), 2 * n);
    gpu.to_device(from, b.data(), 2 * n);
    gpu.unpack_add(all, type, from, to);
    gpu.to_host(from_gpu.data(), to, 2 * n);
    int differ = 0;
    for (std::size_t i = 0; i < n; ++i) {
      float want = 0, got = 0;
      widen(type, reinterpret_cast<const std::byte*>(&sums[i]), &want, 1);
      widen(type, reinterpret_cast<const std::byte*>(&from_gpu[i]), &got, 1);
      if (std::isnan(want) ? !std::isnan(got) : want != got) ++differ;
    }
    EXPECT_EQ(differ, 0) << name(type);
    gpu.finish();
    gpu.release(to);
    gpu.release(from);
  }
}

TEST(Gpu, DrawsNormalNumbers) {
  NEEDS_GPU();
  execute::Device& gpu = OneGpu::device();
  constexpr std::int64_t n = 20000;
  std::byte* at = gpu.allocate(4 * n);
  gpu.draw(at, ElementType::fp32, n, 0.5f, 2, 3);
  std::vector<float> v(n);
  gpu.to_host(v.data(), at, 4 * n);
  for (std::int64_t i = 0; i < n; ++i)
    ASSERT_NEAR(v[static_cast<std::size_t>(i)],
                0.5 + 2 * reference::normal(3, 0, static_cast<std::uint64_t>(i)), 1e-5);
  gpu.finish();
  gpu.release(at);
}

TEST(Gpu, PartsOfARingEqualTheReferences) {
  NEEDS_GPU();
  cpu::expect_parts_equal<GpuKernel>();
}

// docs/calibration.md, "Slowdown": by its own clock no faster than its pace.
TEST(Gpu, MovesByAStandIn) {
  NEEDS_GPU();
  execute::Device& gpu = OneGpu::device();
  std::mt19937 rng(12);
  for (const int held : {1, 4, 24}) {
    const std::int64_t bytes = held * (3 << 20) + 16;
    std::vector<std::byte> from(static_cast<std::size_t>(bytes)), to(from.size());
    for (auto& b : from) b = static_cast<std::byte>(rng());
    std::byte *a = gpu.allocate(bytes), *b = gpu.allocate(bytes);
    gpu.to_device(a, from.data(), bytes);
    gpu.begin_marks();
    const std::int64_t start = gpu.mark();
    gpu.stand_in(b, a, bytes, held);
    const std::int64_t end = gpu.mark();
    gpu.to_host(to.data(), b, bytes);
    gpu.finish();
    EXPECT_EQ(from, to);
    const double took = static_cast<double>(gpu.nanoseconds(end) - gpu.nanoseconds(start)) * 1e-9;
    EXPECT_GE(took, 0.99 * static_cast<double>(bytes) / (held * kStandInRate));
    gpu.release(a), gpu.release(b);
  }
}

TEST(Gpu, MovesRuns) {
  NEEDS_GPU();
  execute::Device& gpu = OneGpu::device();
  const auto host = execute::host_device();
  std::mt19937 rng(6);
  for (int round = 0; round < 80; ++round) {
    const std::int64_t word = round % 2 == 0 ? 2 : 4;
    // Of any length, all of one, of whole pieces of 16 bytes; kept, and of one call.
    const std::int64_t unit = round % 4 < 2 ? 1 : 16 / word;
    const auto even = static_cast<std::int64_t>(rng() % 5);
    std::vector<execute::Run> runs;
    std::int64_t end = 0, words = 0;
    for (auto k = rng() % 5; k > 0; --k) {
      runs.push_back({end + unit * static_cast<std::int64_t>(rng() % 7),
                      unit * (even > 0 ? even : 1 + static_cast<std::int64_t>(rng() % 9))});
      end = runs.back().offset + runs.back().count;
      words += runs.back().count;
    }
    std::vector<execute::Run> mixed = runs;
    std::shuffle(mixed.begin(), mixed.end(), rng);
    execute::RunList list(mixed);
    list.passing = round % 3 == 0;
    std::vector<std::byte> whole(static_cast<std::size_t>(end * word) + 8),
        packed(static_cast<std::size_t>(words * word) + 8), from_gpu(packed.size());
    for (auto& b : whole) b = static_cast<std::byte>(rng());
    host->pack(list, word, whole.data(), packed.data());
    std::byte *a = gpu.allocate(std::ssize(whole)), *b = gpu.allocate(std::ssize(packed));
    gpu.to_device(a, whole.data(), std::ssize(whole));
    gpu.pack(list, word, a, b);
    gpu.to_host(from_gpu.data(), b, words * word);
    EXPECT_TRUE(std::equal(packed.begin(), packed.begin() + words * word, from_gpu.begin()));
    // And back, into zeros.
    std::vector<std::byte> back(whole.size(), std::byte{0}), want(back);
    gpu.to_device(a, back.data(), std::ssize(back));
    gpu.unpack(list, word, b, a);
    gpu.to_host(back.data(), a, std::ssize(back));
    host->unpack(list, word, packed.data(), want.data());
    EXPECT_EQ(back, want);
    gpu.finish();
    gpu.release(a);
    gpu.release(b);
  }
}

using Linked = DeviceOptions::Linked;

/// Plans on one rank, and on several ranks of this process that share a GPU.
void expect_trains(const Graph& graph, const Plan& wanted, Linked linked = Linked::not_at_all,
                   int candidates = 1) {
  auto plan = complete(graph, wanted);
  if (!plan) return;
  const auto program = lower(graph, *plan);
  if (!program) return;
  SCOPED_TRACE(graph.name + "\n" + to_yaml(*plan));
  execute::Options o;
  o.steps = 3;
  execute::draw(o, graph, 7);
  o.device = [&](int) {
    DeviceOptions d;
    d.tf32 = plan->precision.compute == ElementType::tf32;
    d.linked = linked;
    d.candidates = candidates;
    return cuda_device(d);
  };
  try {
    execute::ThreadOptions threads;
    threads.timeout_s = 60;
    const auto results = execute::run_threads(*program, o, threads);
    // What a gradient is added to is the same after its algorithms were timed.
    bool adds = false;
    for (const auto& product : results[0].products) {
      if (candidates > 1 && product.adds) {
        EXPECT_EQ(product.seconds > 0, product.candidates > 1);
      }
      adds |= product.adds && product.candidates > 1;
    }
    EXPECT_EQ(adds, candidates > 1);
    // Whatever they measured, all ranks make one product by one algorithm.
    std::map<std::string, int> taken;
    for (const auto& result : results) {
      for (const auto& p : result.products) {
        const auto [it, first] =
            taken.emplace(fmt::format("{} {} {} {} {} {} {} {}", p.m, p.n, p.k, p.batch,
                                      p.transposed, name(p.type), name(p.out), p.adds),
                          p.taken);
        if (!first) {
          EXPECT_EQ(it->second, p.taken) << it->first;
        }
      }
    }
    const auto exact = reference::options_for(graph, *program, 3, 7);
    const auto serial = reference::train_serially(graph, *program, exact, 1);
    expect_equal(
        reference::compare_in_own_types(graph, *program, results[0].values, serial, exact));
  } catch (const std::exception& e) {
    ADD_FAILURE() << e.what();
  }
}

TEST(Gpu, TrainsOnOneRank) {
  NEEDS_GPU();
  Plan p = base_plan();
  set_precision(p, "fp32", "");
  for (const Graph& g : {gpt(), llama(), mixtral(), cnn(false)}) expect_trains(g, p);
}

TEST(Gpu, TrainsWithAlgorithmsThatItTimes) {
  NEEDS_GPU();
  Plan p = base_plan();
  for (const char* precision : {"fp32", "bf16"}) {
    set_precision(p, precision, "");
    expect_trains(gpt(), p, Linked::not_at_all, 3);
  }
}

TEST(Gpu, RanksAgreeOnAlgorithmsThatTheyTime) {
  NEEDS_GPU();
  Plan data = base_plan(), tensor = base_plan(), pipeline = base_plan();
  data.dp = 2;
  tensor.tp = 2;
  pipeline.pp = 2, pipeline.dp = 2;
  for (Plan p : {data, tensor, pipeline}) {
    set_precision(p, "bf16", "");
    for (const Linked linked : {Linked::not_at_all, Linked::in_process})
      expect_trains(gpt(), p, linked, 4);
    if (HasFailure()) return;
  }
}

TEST(Gpu, TimesAProductOnceInAProcess) {
  NEEDS_GPU();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  const Graph graph = llama();
  const Program program = lowered(graph, p);
  const auto products = [&] {
    execute::Options o;
    o.steps = 2;
    execute::draw(o, graph, 7);
    o.device = [](int) {
      DeviceOptions d;
      d.candidates = 5;
      return cuda_device(d);
    };
    return execute::run_threads(program, o, {})[0].products;
  };
  const auto first = products(), second = products();
  ASSERT_EQ(first.size(), second.size());
  for (std::size_t k = 0; k < first.size(); ++k) {
    EXPECT_EQ(first[k].seconds > 0, first[k].candidates > 1);
    EXPECT_GE(first[k].seconds_of_usual, first[k].seconds);
    EXPECT_EQ(second[k].seconds, first[k].seconds);
    EXPECT_EQ(second[k].taken, first[k].taken);
  }
}

/// Of a product of 8 x 4 x 2 whose operands are aligned so, the choice `taken` of so many.
ProductChoices choice(int alignment, int taken, int candidates) {
  ProductKey key;
  key.m = 8, key.n = 4, key.k = 2;
  key.a_alignment = key.b_alignment = key.c_alignment = key.bias_alignment = alignment;
  ProductChoice c{};
  c.taken = taken, c.candidates = candidates;
  return {{key, c}};
}

TEST(ProductChoices, RanksTakeTheFirstThatAllOfThemCan) {
  const auto agreed = [](const std::vector<std::string>& of_ranks) {
    const AgreedChoices all = agreed_choices(common(of_ranks));
    return all.empty() ? -1 : all.begin()->second.choice.taken;
  };
  const auto of = [](int alignment, int taken, int candidates = 4) {
    return told("one", choice(alignment, taken, candidates));
  };
  EXPECT_EQ(agreed({of(16, 3), of(16, 2)}), 3);
  // For operands that are aligned to 256 bytes a faster one may be there, but not for all ranks.
  EXPECT_EQ(agreed({of(256, 3), of(16, 2)}), 2);
  EXPECT_EQ(agreed({of(16, 2), of(256, 3)}), 2);
  // Each operand is as little aligned as on any rank: what was timed for less of one and more of
  // another is not what all can take.
  const auto unequal = [](int ProductKey::*operand, int taken) {
    ProductChoices one = choice(256, taken, 4);
    ProductKey key = one.begin()->first;
    key.*operand = 16;
    return told("one", {{key, one.begin()->second}});
  };
  for (const auto operand : {&ProductKey::a_alignment, &ProductKey::b_alignment,
                             &ProductKey::c_alignment, &ProductKey::bias_alignment}) {
    EXPECT_EQ(agreed({of(256, 3), unequal(operand, 2)}), 2);
    EXPECT_EQ(agreed({unequal(operand, 2), of(16, 1)}), 1);
    const AgreedChoices all = agreed_choices(unequal(operand, 2));
    ProductKey key = all.begin()->second.least;
    EXPECT_TRUE(as_aligned(key, all.begin()->second.least));
    key.*operand = 8;
    EXPECT_FALSE(as_aligned(key, all.begin()->second.least));
  }
  EXPECT_EQ(agreed({unequal(&ProductKey::a_alignment, 2), unequal(&ProductKey::b_alignment, 3)}),
            -1);
  // Without room to time it in, a rank has only the heuristic's first.
  EXPECT_EQ(agreed({of(16, 0, 0), of(16, 1)}), 1);
  EXPECT_EQ(agreed({of(16, 0, 0), of(256, 1)}), -1);
  // Ranks of a stage without products; of another GPU.
  EXPECT_EQ(agreed({"", of(16, 1)}), 1);
  EXPECT_EQ(agreed({told("one", {}), of(16, 1)}), 1);
  EXPECT_EQ(agreed({of(16, 1), told("another", choice(16, 2, 4))}), -1);
  EXPECT_EQ(agreed({"", ""}), -1);
  // Operands as aligned as was timed, or better, take it.
  const ProductChoices timed = choice(16, 2, 4);
  const AgreedChoices all = agreed_choices(common({told("one", timed)}));
  const ProductKey &least = all.begin()->second.least, worse = choice(8, 0, 4).begin()->first,
                   better = choice(32, 0, 4).begin()->first;
  EXPECT_EQ(all.count(ProductKind(worse)), 1U);
  EXPECT_TRUE(as_aligned(better, least));
  EXPECT_TRUE(as_aligned(timed.begin()->first, least));
  EXPECT_FALSE(as_aligned(worse, least));
}

TEST(Gpu, TrainsOnOneRankInNarrowTypes) {
  NEEDS_GPU();
  for (const char* precision : {"bf16", "fp16", "tf32", "fp8"}) {
    SCOPED_TRACE(precision);
    Plan p = base_plan();
    set_precision(p, precision, "");
    for (const Graph& g : {gpt(), llama(), mixtral(), cnn(false)}) expect_trains(g, p);
  }
}

TEST(Gpu, ARankAloneHasThePredictedMemory) {
  NEEDS_GPU();
  Plan p = base_plan();
  set_precision(p, "bf16", "");
  p.tp = p.dp = 2;
  p.global_batch = 4;
  const Graph g = gpt();
  const Program program = lowered(g, p);
  execute::Options o;
  o.steps = 2;
  o.record = true;
  execute::draw(o, g, 7);
  const auto host = execute::run_alone(program, 1, o);
  o.device = [](int) {
    DeviceOptions d;
    d.candidates = 3;
    return cuda_device(d);
  };
  const auto gpu = execute::run_alone(program, 1, o);
  // It chooses its products' algorithms without the others, whatever its number.
  ASSERT_FALSE(gpu.products.empty());
  for (const auto& product : gpu.products)
    EXPECT_EQ(product.seconds > 0, product.candidates > 1);  // the only one needs no time
  EXPECT_EQ(gpu.measured.last_peak, host.measured.last_peak);
  EXPECT_EQ(gpu.measured.last_at_peak, host.measured.last_at_peak);
  ASSERT_EQ(gpu.measured.samples.size(), 2u);
  for (const Sample& s : gpu.measured.samples[1]) EXPECT_LE(s.start, s.end);
}

TEST(Gpu, TrainsOnSeveralRanksThroughTheHost) {
  NEEDS_GPU();
  std::mt19937 rng(8);
  for (int k = 0; k < 40; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() > 4 || p.compression.kind != CompressionKind::none) continue;
    set_precision(p, "fp32", "");
    expect_trains(k % 2 == 0 ? gpt() : llama(), p);
    if (HasFailure()) return;
  }
}

TEST(Gpu, TrainsOnSeveralRanksInItsMemory) {
  NEEDS_GPU();
  std::mt19937 rng(9);
  for (int k = 0; k < 40; ++k) {
    Plan p = random_plan(rng);
    if (p.ranks() == 1 || p.ranks() > 4 || p.compression.kind != CompressionKind::none) continue;
    set_precision(p, k % 3 == 0 ? "bf16" : "fp32", "");
    expect_trains(k % 2 == 0 ? gpt() : llama(), p, Linked::in_process);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace partita::cuda
