// The CUDA kernels' text, run on the host, against the reference's kernels.
#include <fmt/format.h>

#include <random>
#include <set>

#include "runtime/reference/interpreter.h"
#include "runtime/transport/narrow.h"
#include "tests/runtime/cpu/equal_reference.h"
#include "tests/runtime/cuda/host_machine.h"
#include "tests/runtime/cuda/narrowed.h"

namespace partita::cuda {
namespace {

/// Rows of experts, and what Mamba-2 adds.
const std::set<std::string> kOfTheHost{"causal_convolution", "combine",         "dispatch",
                                       "gated_norm",         "grouped_product", "state_space"};

TEST(CudaKernels, EqualTheReferencesOnWholeProblems) {
  std::mt19937_64 rng(18);
  std::set<std::string> own, others;
  for (int round = 0; round < 12; ++round) {
    for (const reference::Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      cpu::expect_same<KernelOnHostMachine>(
          p, reference::whole_part(p), [&](const KernelOnHostMachine& k) {
            (k.others == 0 ? own : others).insert(std::string(kind_name(p.operation)));
          });
      if (HasFatalFailure()) return;
    }
  }
  // Local response normalisation among the norms is the host's too.
  std::set<std::string> never;
  for (const std::string& kind : others) {
    if (own.count(kind) == 0) never.insert(kind);
  }
  EXPECT_EQ(never, kOfTheHost);
}

/// Kernels of narrow operands are the same ones: none is the host's for its type alone.
template <ElementType kType>
void expect_narrow_kernels() {
  std::mt19937_64 rng(20);
  std::set<std::string> own, others;
  for (int round = 0; round < 6; ++round) {
    for (const reference::Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      expect_same_narrow<KernelOnHostMachine, kType>(p, [&](const auto& k) {
        (k.kernel().others == 0 ? own : others).insert(std::string(kind_name(p.operation)));
      });
      if (::testing::Test::HasFailure()) return;
    }
  }
  std::set<std::string> never;
  for (const std::string& kind : others) {
    if (own.count(kind) == 0) never.insert(kind);
  }
  EXPECT_EQ(never, kOfTheHost);
}
TEST(CudaKernels, EqualTheReferencesInBf16) { expect_narrow_kernels<ElementType::bf16>(); }
TEST(CudaKernels, EqualTheReferencesInFp16) { expect_narrow_kernels<ElementType::fp16>(); }

TEST(CudaKernels, PartsOfARingEqualTheReferences) {
  cpu::expect_parts_equal<KernelOnHostMachine>();
}

TEST(CudaNumbers, RandomBitsAreTheReferences) {
  std::mt19937_64 rng(3);
  for (int k = 0; k < 1000; ++k) {
    const std::uint64_t s = rng(), a = rng(), b = rng();
    EXPECT_EQ(random_bits(s, a, b), reference::random_bits(s, a, b));
    EXPECT_EQ(uniform(s, a, b), reference::uniform(s, a, b));
    EXPECT_NEAR(normal(s, a, b), reference::normal(s, a, b), 1e-14);
  }
}

TEST(CudaNumbers, SixteenBitsRoundAsOnTheHost) {
  std::mt19937 rng(4);
  std::vector<float> values{0.0f,     -0.0f,      INFINITY,    -INFINITY,  65504.0f,
                            65519.9f, 65520.0f,   1e30f,       0x1p-14f,   0x1p-24f,
                            0x1p-25f, 0x1.8p-25f, 1 + 0x1p-8f, 1 + 0x3p-8f};
  for (int k = 0; k < 200000; ++k) values.push_back(float_of(static_cast<std::uint32_t>(rng())));
  for (const float v : values) {
    std::uint16_t bf16 = 0, fp16 = 0;
    narrow(ElementType::bf16, &v, reinterpret_cast<std::byte*>(&bf16), 1);
    narrow(ElementType::fp16, &v, reinterpret_cast<std::byte*>(&fp16), 1);
    if (std::isnan(v)) {
      EXPECT_TRUE(std::isnan(from_bf16(to_bf16(v))));
      EXPECT_TRUE(std::isnan(from_fp16(to_fp16(v))));
      continue;
    }
    ASSERT_EQ(to_bf16(v), bf16) << v;
    ASSERT_EQ(to_fp16(v), fp16) << v;
    float wide = 0;
    widen(ElementType::fp16, reinterpret_cast<const std::byte*>(&fp16), &wide, 1);
    ASSERT_EQ(from_fp16(fp16), wide) << v;
    widen(ElementType::bf16, reinterpret_cast<const std::byte*>(&bf16), &wide, 1);
    ASSERT_EQ(from_bf16(bf16), wide) << v;
  }
}

TEST(CudaNumbers, OctetsAreTheirElementsWhereverTheyLie) {
  std::mt19937 rng(8);
  for (const ElementType type : {ElementType::fp32, ElementType::bf16, ElementType::fp16}) {
    const std::int64_t width = storage(type, 1).count;
    for (std::int64_t n = 0; n < 40; ++n) {
      const auto offset = static_cast<std::int64_t>(rng() % 10);
      alignas(64) std::byte from[256], to[256], want[256];
      for (std::size_t k = 0; k < 256; ++k)
        from[k] = static_cast<std::byte>(rng() % 60), to[k] = want[k] = std::byte{7};
      const Numbers x{from + width * static_cast<std::int64_t>(rng() % 10), type},
          y{to + width * offset, type}, w{want + width * offset, type};
      for (std::int64_t i = 0; i < n; ++i) w[i] = 2 * x[i];
      HostMachine m;
      map_one(m, n, x, y, [](float v) { return 2 * v; });
      EXPECT_TRUE(std::equal(to, to + 256, want)) << name(type) << ", " << n << " at " << offset;
      map_two(m, n, y, x, y, [](float a, float b) { return a - b; });
      for (std::int64_t i = 0; i < n; ++i)
        EXPECT_EQ(static_cast<float>(y[i]), static_cast<float>(x[i]));
    }
  }
}

TEST(CudaNumbers, PositionsAreFoundInBothFormsOfAList) {
  const std::vector<std::int64_t> dense{3, 4, 5}, gaps{3, 5, 9};
  for (const IndexList list : {IndexList{nullptr, 3, 3}, IndexList{dense.data(), 0, 3}}) {
    for (const auto& [global, below, find] :
         {std::tuple{2, 0, -1}, {3, 0, 0}, {5, 2, 2}, {6, 3, -1}}) {
      EXPECT_EQ(list.below(global), below);
      EXPECT_EQ(list.find(global), find);
    }
  }
  const IndexList list{gaps.data(), 0, 3};
  EXPECT_EQ(list.find(5), 1);
  EXPECT_EQ(list.find(4), -1);
  EXPECT_EQ(list.below(9), 2);
  EXPECT_EQ(list.at(2), 9);
}

}  // namespace
}  // namespace partita::cuda
