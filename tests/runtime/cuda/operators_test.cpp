// The CUDA kernels' text, run on the host, against the reference's kernels.
#include <fmt/format.h>

#include <map>
#include <random>
#include <set>

#include "runtime/reference/interpreter.h"
#include "runtime/transport/narrow.h"
#include "tests/runtime/cpu/equal_reference.h"
#include "tests/runtime/cuda/flash_problems.h"
#include "tests/runtime/cuda/host_machine.h"
#include "tests/runtime/cuda/narrowed.h"
#include "tests/runtime/cuda/octet_problems.h"
#include "tests/runtime/cuda/on_device.h"
#include "tests/runtime/cuda/own_statistics.h"

namespace partita::cuda {
namespace {

TEST(CudaKernels, RowsOfOctetsEqualTheReferences) {
  std::mt19937_64 rng(23);
  for (const reference::Problem& p : octet_problems(rng)) {
    SCOPED_TRACE(p.label);
    cpu::expect_same<KernelOnHostMachine>(
        p, reference::whole_part(p), [&](const KernelOnHostMachine& k) { EXPECT_EQ(k.others, 0); });
    expect_same_narrow<KernelOnHostMachine, ElementType::bf16>(p, [](const auto&) {});
  }
}

/// Of a run that has diverged, as the reference does: k experts, those whose logits are numbers
/// first.
TEST(CudaKernels, RoutersPutWhatIsNoNumberLast) {
  const auto choose = [](std::vector<float> logits, std::int64_t groups, std::int64_t best) {
    const auto n = std::ssize(logits);
    const Choosing by{n, 2, n / groups, groups, 1, best, true};
    const Numbers at(logits.data());
    const std::uint64_t open = open_groups(at, by, 0, 1);
    std::vector<int> all;
    for (int e = 0; e < n; ++e) {
      if (chosen(at, by, open, e)) all.push_back(e);
    }
    return all;
  };
  EXPECT_EQ(choose({0, NAN, 1, NAN}, 1, 1), (std::vector<int>{0, 2}));
  EXPECT_EQ(choose({NAN, NAN, NAN, NAN}, 1, 1), (std::vector<int>{0, 1}));
  EXPECT_EQ(choose({NAN, NAN, NAN, NAN}, 2, 2), (std::vector<int>{0, 1}));
  EXPECT_EQ(choose({0, NAN, 1, 1}, 2, 2), (std::vector<int>{2, 3}));
}

TEST(CudaKernels, RowsOfAnyLengthEqualTheReferences) {
  std::mt19937_64 rng(24);
  using Own = OwnStatistics<KernelOnHostMachine>;
  for (const reference::Problem& p : row_problems(rng)) {
    SCOPED_TRACE(::testing::Message() << p.label << " of " << p.inputs[0].index.back().size());
    const auto any = [](const auto&) {};
    cpu::expect_same<KernelOnHostMachine>(p, reference::whole_part(p), any);
    cpu::expect_same<Own>(p, reference::whole_part(p), any);
    expect_same_narrow<KernelOnHostMachine, ElementType::bf16>(p, any);
    expect_same_narrow<Own, ElementType::bf16>(p, any);
    expect_same_narrow<Own, ElementType::fp16>(p, any);
    if (HasFailure()) return;
  }
}

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
      cpu::expect_same<OwnStatistics<KernelOnHostMachine>>(p, reference::whole_part(p),
                                                           [](const auto&) {});
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_EQ(others, std::set<std::string>{}) << "none is the host's";
  EXPECT_EQ(own.size(), std::variant_size_v<Operation>);
}

/// docs/cuda.md, "State space models".
TEST(CudaKernels, TheScanOfThePage) {
  std::mt19937_64 rng(1);
  reference::Problem p = reference::make_problem(
      "scan", StateSpace{1, 1, 1, 2},
      {{{Dim::sample, 1}, {Dim::sequence, 3}, {Dim::head, 1}, {Dim::head_feature, 3}},
       {{Dim::sample, 1}, {Dim::sequence, 3}, {Dim::head, 1}, {Dim::head_feature, 1}}},
      rng);
  p.inputs[0].values.assign(9, 1);
  p.inputs[1].values.assign(3, 0);
  for (auto& w : p.parameters) w.values.assign(1, 0);
  p.output_gradient.values = {0, 0, 1};
  std::vector<reference::Part> one{reference::whole_part(p)};
  reference::run(one);
  cpu::PassesBy<KernelOnHostMachine> passes(p, one[0]);
  const float d = std::log(2.0f);
  const auto y = passes.forward()[0];
  for (const auto& [t, units] : {std::pair{0, 1.0f}, {1, 1.5f}, {2, 1.75f}})
    EXPECT_NEAR(y[static_cast<std::size_t>(t)], units * d, 1e-6) << t;
  passes.prepare_backward();
  const auto dx = passes.backward_data()[0];
  for (const auto& [t, units] : {std::pair{0, 0.25f}, {1, 0.5f}, {2, 1.0f}})
    EXPECT_NEAR(dx[static_cast<std::size_t>(3 * t)], units * d, 1e-6) << t;
  EXPECT_EQ(passes.kernel().others, 0);
}

/// Chunks of many tokens, heads and states in octets and not, more tokens than chunks hold.
TEST(CudaKernels, ScansOfManyChunksEqualTheReferences) {
  std::mt19937_64 rng(29);
  for (int round = 0; round < 6; ++round) {
    const auto n = [&](std::int64_t low, std::int64_t high) {
      return reference::pick(rng, low, high);
    };
    const StateSpace scan{n(1, 3), round % 2 == 0 ? 16 : n(5, 20), round < 3 ? 16 : n(5, 20),
                          n(8, 40)};
    const NamedExtent sample{Dim::sample, n(1, 2)}, sequence{Dim::sequence, n(30, 90)},
        head{Dim::head, n(1, 2)};
    const reference::Problem p = reference::make_problem(
        "scan", scan,
        {{sample,
          sequence,
          head,
          {Dim::head_feature, scan.heads_per_group * scan.head_dim + 2 * scan.state}},
         {sample, sequence, head, {Dim::head_feature, scan.heads_per_group}}},
        rng);
    SCOPED_TRACE(round);
    cpu::expect_same<KernelOnHostMachine>(
        p, reference::whole_part(p), [&](const KernelOnHostMachine& k) { EXPECT_EQ(k.others, 0); });
    expect_same_narrow<KernelOnHostMachine, ElementType::bf16>(p, [](const auto&) {});
  }
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
  EXPECT_EQ(others, std::set<std::string>{}) << "none is the host's";
  EXPECT_EQ(own.size(), std::variant_size_v<Operation>);
}
TEST(CudaKernels, EqualTheReferencesInBf16) { expect_narrow_kernels<ElementType::bf16>(); }
TEST(CudaKernels, EqualTheReferencesInFp16) { expect_narrow_kernels<ElementType::fp16>(); }

const auto kByFlash = [](const auto& k) { EXPECT_EQ(k.kernel().flashes(), 3) << "passes"; };
TEST(CudaFlash, EqualsTheReferencesInBf16) {
  expect_flash<KernelOnHostMachine, ElementType::bf16>(kByFlash);
}
TEST(CudaFlash, EqualsTheReferencesInFp16) {
  expect_flash<KernelOnHostMachine, ElementType::fp16>(kByFlash);
}

/// docs/cuda.md: a first tile in which two keys count, and a second with one.
TEST(CudaFlash, TheExampleOfThePage) {
  constexpr std::int64_t kKeys = 65, kWidth = 8;
  std::vector<std::uint16_t> q(kWidth, 0), k(kKeys * kWidth, 0), v(kKeys * kWidth, 0), y(kWidth);
  q[0] = to_fp16(1);
  const auto key = [&](std::size_t n, float score, float value) {
    k[n * kWidth] = to_fp16(score);
    v[n * kWidth] = to_fp16(value);
  };
  for (std::size_t n = 2; n < 64; ++n) key(n, -1000, 100);
  key(0, 0, 1), key(1, std::log(3.0f), 2), key(64, std::log(4.0f), 3);
  float lse = 0;
  FlashCall c;
  c.type = ElementType::fp16;
  c.h = {1,
         1,
         kKeys,
         1,
         1,
         kWidth,
         kWidth,
         kWidth,
         kWidth,
         kWidth,
         kWidth,
         1,
         false,
         0,
         0,
         {nullptr, 0, 1},
         {nullptr, 0, kKeys}};
  c.q = q.data(), c.k = k.data(), c.v = v.data(), c.y = y.data(), c.lse = &lse;
  HostMachine m;
  ASSERT_TRUE(m.flash(c, FlashPass::forward));
  EXPECT_NEAR(from_fp16(y[0]), 19.0 / 8, 2e-3);
  EXPECT_NEAR(lse, std::log(8.0), 1e-3);
}

/// Keys met in two parts, which lie apart or by turns, are as if met at once: outputs,
/// log-sum-exps and gradients.
TEST(CudaFlash, PartsOfKeysAreTheWhole) {
  std::mt19937_64 rng(22);
  constexpr ElementType kType = ElementType::fp16;
  for (int round = 0; round < 8; ++round) {
    SCOPED_TRACE(round);
    const std::int64_t width = round % 2 == 0 ? 128 : 40, all = 150 + 10 * round, group = 2;
    const auto drawn = [&](std::int64_t n) {
      std::vector<std::uint16_t> v(static_cast<std::size_t>(n));
      for (auto& x : v)
        x = to_fp16(static_cast<float>(reference::normal(3, rng(), 0)) * (round < 2 ? 2 : 1));
      return v;
    };
    std::vector<std::int64_t> at(static_cast<std::size_t>(all)), mine, parts[2];
    for (std::int64_t i = 0; i < all; ++i) {
      at[static_cast<std::size_t>(i)] = i;
      parts[round % 4 < 2 ? i * 2 / all : i % 2].push_back(i);
      // Queries of which some see nothing of a part.
      if (i % 3 != 1) mine.push_back(i);
    }
    const auto queries = std::ssize(mine);
    auto q = drawn(queries * group * width), k = drawn(all * width), v = drawn(all * width),
         dy = drawn(queries * group * width);
    HostMachine m;
    const auto call_of = [&](const std::vector<std::int64_t>& keys) {
      FlashCall c;
      c.type = kType;
      c.h = {1,
             queries,
             std::ssize(keys),
             1,
             group,
             width,
             width,
             group * width,
             width,
             width,
             group * width,
             0.0625f,
             round % 2 == 0,
             round == 5 ? 70 : 0,
             0,
             {mine.data(), 0, queries},
             {keys.data(), 0, std::ssize(keys)}};
      c.q = q.data();
      c.dy = dy.data();
      return c;
    };
    const auto rows_of = [&](const std::vector<std::uint16_t>& from,
                             const std::vector<std::int64_t>& keys) {
      std::vector<std::uint16_t> to;
      for (const std::int64_t i : keys)
        to.insert(to.end(), from.begin() + i * width, from.begin() + (i + 1) * width);
      return to;
    };
    struct Results {
      std::vector<std::uint16_t> y, dq, dk, dv;
      std::vector<float> lse;
    };
    const auto lines = static_cast<std::size_t>(queries * group);
    const auto run = [&](const std::vector<std::vector<std::int64_t>>& lists, bool part) {
      Results r;
      r.y.assign(q.size(), part ? std::uint16_t{0} : std::uint16_t{0x7e00});
      r.dq = r.y;
      r.dk.assign(k.size(), 0), r.dv = r.dk;
      r.lse.assign(lines, part ? -INFINITY : NAN);
      for (const bool backward : {false, true}) {
        std::vector<float> along(lines);
        for (std::size_t i = 0; i < lines; ++i) {
          for (std::int64_t f = 0; f < width; ++f) {
            // [query, query head, feature]; lines are [query head, query].
            const auto e =
                static_cast<std::size_t>(((static_cast<std::int64_t>(i) % queries) * group +
                                          static_cast<std::int64_t>(i) / queries) *
                                             width +
                                         f);
            along[i] += from_fp16(r.y[e]) * from_fp16(dy[e]);
          }
        }
        for (const auto& keys : lists) {
          auto ks = rows_of(k, keys), vs = rows_of(v, keys);
          std::vector<std::uint16_t> dk(ks.size(), 0), dv(vs.size(), 0);
          FlashCall c = call_of(keys);
          c.part = part;
          c.k = ks.data(), c.v = vs.data(), c.y = r.y.data(), c.lse = r.lse.data();
          c.along = along.data();
          c.dq = r.dq.data(), c.dk = dk.data(), c.dv = dv.data();
          EXPECT_TRUE(has_flash(c));
          if (!backward) {
            m.flash(c, FlashPass::forward);
            continue;
          }
          m.flash(c, FlashPass::queries);
          m.flash(c, FlashPass::keys);
          for (std::size_t i = 0; i < keys.size(); ++i) {
            const auto from = static_cast<std::ptrdiff_t>(i) * width, to = keys[i] * width;
            std::copy_n(dk.begin() + from, width, r.dk.begin() + to);
            std::copy_n(dv.begin() + from, width, r.dv.begin() + to);
          }
        }
      }
      return r;
    };
    const Results whole = run({at}, false), both = run({parts[0], parts[1]}, true);
    for (std::size_t i = 0; i < lines; ++i) {
      if (std::isinf(whole.lse[i])) {
        EXPECT_EQ(both.lse[i], -INFINITY);
      } else {
        EXPECT_NEAR(both.lse[i], whole.lse[i], 2e-5);
      }
    }
    const auto close = [&](const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b,
                           const char* what) {
      float size = 0;
      for (const std::uint16_t x : b) size = std::max(size, std::abs(from_fp16(x)));
      for (std::size_t i = 0; i < a.size(); ++i)
        ASSERT_NEAR(from_fp16(a[i]), from_fp16(b[i]),
                    4 * spacing(kType) * static_cast<double>(size))
            << what << " " << i;
    };
    close(both.y, whole.y, "y");
    close(both.dq, whole.dq, "dq");
    close(both.dk, whole.dk, "dk");
    close(both.dv, whole.dv, "dv");
  }
}

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

/// As the reference rounds beside the format's largest, whose scale is 1; every code both ways.
TEST(CudaNumbers, EightBitsRoundAsTheReference) {
  std::mt19937 rng(9);
  std::vector<float> values{0.0f,     -0.0f,    448,      447.9f,    -448,      464,      1e30f,
                            0x1p-6f,  17,       18,       19,        0x1p-9f,   57344,    57343,
                            0x1p-10f, 0x3p-10f, 0x7p-10f, 0x1.ep-7f, 0x1.fp-7f, 0x1p-17f, 0x3p-17f,
                            0x1p-14f, 0x7p-17f, 61440,    INFINITY};
  for (int k = 0; k < 100000; ++k) {
    const float v = float_of(static_cast<std::uint32_t>(rng()));
    if (std::isfinite(v)) values.push_back(std::fmod(v, rng() % 2 == 0 ? 448.0f : 57344.0f));
    values.push_back(static_cast<float>(
        std::ldexp(1 + static_cast<double>(rng() % 64) / 64, static_cast<int>(rng() % 34) - 19)));
  }
  for (const EightBits f : {EightBits::e4m3, EightBits::e5m2}) {
    const auto most = static_cast<double>(largest(f));
    for (const float v : values) {
      double want[2] = {std::clamp(static_cast<double>(v), -most, most), most};
      round_eights(f, want, 2);
      ASSERT_EQ(static_cast<double>(from_eight(f, to_eight(f, v))), want[0]) << v;
      ASSERT_EQ(std::signbit(from_eight(f, to_eight(f, v))), std::signbit(v)) << v;
    }
    EXPECT_TRUE(std::isnan(from_eight(f, to_eight(f, NAN))));
    int numbers = 0;
    for (int b = 0; b < 256; ++b) {
      const float v = from_eight(f, static_cast<std::uint8_t>(b));
      if (!std::isfinite(v)) continue;
      ++numbers;
      EXPECT_EQ(to_eight(f, v), b);
    }
    // E4M3 has a NaN of either sign, E5M2 three and an infinity.
    EXPECT_EQ(numbers, f == EightBits::e4m3 ? 254 : 248);
  }
  EXPECT_TRUE(std::isinf(from_eight(EightBits::e5m2, 0x7c)));
  EXPECT_EQ(from_eight(EightBits::e5m2, 0x7b), 57344);
  EXPECT_EQ(from_eight(EightBits::e4m3, 0x7e), 448);
}

/// The reference's passes of operands that are rounded here; a bias is not, and neither are the
/// gradients that its own is the sum of.
reference::Part of_rounded_operands(const reference::Part& exact, Fp8Format format) {
  const bool grouped = std::holds_alternative<GroupedProduct>(*exact.context.operation);
  const auto round = [&](EightBits f, reference::Piece& p) {
    std::map<std::int64_t, std::vector<std::size_t>> tensors;  // elements, by expert
    for (std::size_t i = 0; i < p.values.size(); ++i) {
      const std::size_t unit = p.values.size() / (p.routed ? p.rows.size() : p.index[0].size());
      const std::int64_t expert = p.routed ? p.rows[i / unit].expert : p.index[0][i / unit];
      tensors[grouped ? expert : 0].push_back(i);
    }
    for (const auto& [expert, elements] : tensors) {
      std::vector<double> v;
      for (const std::size_t i : elements) v.push_back(p.values[i]);
      round_eights(f, v.data(), v.size());
      for (std::size_t k = 0; k < v.size(); ++k) p.values[elements[k]] = v[k];
    }
  };
  std::vector<reference::Part> one{exact};
  round(EightBits::e4m3, one[0].inputs[0]);
  round(EightBits::e4m3, one[0].parameters[0]);
  round(of_gradients(format), one[0].output_gradients[0]);
  reference::run(one);
  if (one[0].parameter_gradients.size() > 1)
    one[0].parameter_gradients[1] = exact.parameter_gradients[1];
  return one[0];
}

/// Rows of whole pieces of 16, and others; experts with no rows and one.
std::vector<reference::Problem> problems_of_eights(std::mt19937_64& rng) {
  std::vector<reference::Problem> all;
  std::int64_t most = 40;
  const auto extent = [&] {
    const std::int64_t n = reference::pick(rng, 1, most);
    return rng() % 2 == 0 ? (n + 15) / 16 * 16 : n;
  };
  for (int round = 0; round < 16; ++round) {
    // The last of several warps' squares.
    most = round < 12 ? 40 : 200;
    Linear op;
    op.out = {{Dim::feature, extent()}};
    op.bias = round % 2 == 0;
    all.push_back(reference::make_problem(
        "linear", op,
        {{{Dim::sample, 2}, {Dim::sequence, reference::pick(rng, 1, 9)}, {Dim::feature, extent()}}},
        rng));
    const std::int64_t experts = reference::pick(rng, 2, 6);
    all.push_back(reference::make_problem(
        "grouped product", GroupedProduct{experts, {Dim::ffn, extent()}, round % 2 == 0},
        {{{Dim::sample, 2},
          {Dim::sequence, reference::pick(rng, 1, 9)},
          {Dim::expert, reference::pick(rng, 1, 2)},
          {Dim::feature, extent()}}},
        rng));
  }
  // Of very different sizes, as experts' rows and weights are.
  for (reference::Problem& p : all) {
    for (auto* list : {&p.inputs, &p.parameters}) {
      for (double& v : (*list)[0].values)
        v = static_cast<double>(
            static_cast<float>(std::ldexp(v, static_cast<int>(rng() % 12) - 6)));
    }
    for (double& v : p.output_gradient.values)
      v = static_cast<double>(static_cast<float>(std::ldexp(v, static_cast<int>(rng() % 24) - 20)));
  }
  return all;
}

template <class K>
void expect_products_of_rounded_operands() {
  std::mt19937_64 rng(10);
  for (const Fp8Format format : kFp8Formats) {
    for (const reference::Problem& p : problems_of_eights(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", " << name(format));
      std::vector<reference::Part> one{reference::whole_part(p)};
      reference::run(one);
      const reference::Part want = of_rounded_operands(one[0], format);
      one[0].context.compute = ElementType::fp8;
      one[0].context.fp8_format = format;
      cpu::PassesBy<K> passes(p, one[0]);
      // Sums of up to 43 terms in fp32, each off by less than 2^-24 for every term and operand: far
      // below what one operand rounded otherwise would make, 2^-4 of it.
      const double bound = 1e-5;
      cpu::expect_close(passes.forward()[0], want.outputs[0], 0, "forward", bound);
      passes.prepare_backward();
      cpu::expect_close(passes.backward_data()[0], want.input_gradients[0], 0, "data", bound);
      for (const bool adds : {false, true}) {
        const auto got = passes.backward_weight(adds);
        for (std::size_t k = 0; k < got.size(); ++k)
          cpu::expect_close(got[k], want.parameter_gradients[k], adds ? 0.5 : 0, "weight", bound);
      }
      if constexpr (requires { passes.kernel().others; }) {
        EXPECT_EQ(passes.kernel().others, 0);
      }
    }
  }
}
/// docs/cuda.md, "Types".
TEST(CudaKernels, ProductsInEightBitsAreTheReferencesOfRoundedOperands) {
  expect_products_of_rounded_operands<KernelOnHostMachine>();
}
struct Host {
  static execute::Device& device() {
    static const auto host = execute::host_device();
    return *host;
  }
};
TEST(HostKernels, ProductsInEightBitsAreTheReferencesOfRoundedOperands) {
  expect_products_of_rounded_operands<KernelOnDevice<Host>>();
}

TEST(CudaKernels, TokensComeInTheOrderOfTheirRows) {
  std::mt19937 rng(31);
  const std::vector<std::int64_t> rows{2, 3, 5, 9, 10, 12};
  for (const std::int64_t tokens : {0, 1, 63, 64, 65, 511, 512, 513, 4097, 9000}) {
    std::vector<std::int64_t> id;
    for (std::int64_t i = 0; i < tokens; ++i) id.push_back(static_cast<std::int64_t>(rng() % 14));
    HostMachine m;
    const IndexList held = m.upload(rows);
    const TokensByRow got = sorted_by_row(m, id.data(), tokens, held);
    std::vector<std::pair<std::int64_t, std::int64_t>> want, pairs;
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t row = held.find(id[static_cast<std::size_t>(i)]);
      want.emplace_back(row < 0 ? held.size : row, i);
      pairs.emplace_back(got.row[i], got.token[i]);
    }
    std::sort(want.begin(), want.end());
    EXPECT_EQ(pairs, want) << tokens;
  }
}

/// Whole numbers, so that sums are exact: many tokens of few rows, few of many, rows that are not
/// held, octets and not.
TEST(CudaKernels, GradientsOfEmbeddingsAreSumsOfTheirTokens) {
  std::mt19937 rng(32);
  for (int round = 0; round < 120; ++round) {
    constexpr std::int64_t kWidths[] = {1, 7, 8, 9, 24}, kTokens[] = {0, 1, 31, 32, 33, 100, 600};
    const std::int64_t n = kWidths[rng() % 5], tokens = kTokens[rng() % 7];
    const auto rows = static_cast<std::int64_t>(5 + rng() % (round % 2 == 0 ? 3 : 60));
    std::vector<cpu::Indices> index(2), places{reference::range(tokens)};
    for (std::int64_t r = 0; r < rows; ++r) index[0].push_back(3 + 2 * r);
    index[1] = reference::range(n);
    std::vector<std::int64_t> ids;
    ids.reserve(1);  // memory, of no tokens too
    for (std::int64_t i = 0; i < tokens; ++i)
      ids.push_back(
          round % 3 == 0 && rng() % 4 > 0
              ? 7
              : static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(2 * rows + 6)));
    const bool accumulate = round % 4 < 2;
    const auto words = [](std::int64_t size) { return static_cast<std::size_t>(size); };
    std::vector<float> dy(words(tokens * n)), w(words(rows * n), accumulate ? 3.0f : NAN),
        want(w.size(), accumulate ? 3.0f : 0.0f);
    for (float& v : dy) v = static_cast<float>(static_cast<int>(rng() % 9) - 4);
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t row = (ids[words(i)] - 3) / 2;
      if (ids[words(i)] < 3 || ids[words(i)] % 2 == 0 || row >= rows) continue;
      for (std::int64_t f = 0; f < n; ++f) want[words(row * n + f)] += dy[words(i * n + f)];
    }
    Arguments a;
    Tensor by, above, to;
    by.index = &places, by.ids = ids.data();
    above.index = &index, above.values = dy.data();
    to.index = &index, to.values = w.data();
    a.inputs = {by}, a.output_gradients = {above}, a.results = {to}, a.accumulate = accumulate;
    HostMachine m;
    ASSERT_TRUE(weight(m, Embedding{2 * rows + 6, n}, Context{}, a));
    EXPECT_EQ(w, want) << tokens << " tokens, " << rows << " rows of " << n;
  }
}

/// Wherever the row begins; of numbers that grow, fall, are far apart or -infinity for a while.
TEST(CudaKernels, PowersOfARowAreSummedInOneLook) {
  std::mt19937 rng(34);
  for (int round = 0; round < 300; ++round) {
    alignas(16) float memory[64];
    const auto begin = static_cast<std::int64_t>(rng() % 8),
               n = static_cast<std::int64_t>(1 + rng() % 50);
    double top = -INFINITY, sum = 0;
    for (std::int64_t i = begin; i < begin + n; ++i) {
      float v = static_cast<float>(rng() % 1000) / 100;
      if (round % 3 == 0) v = static_cast<float>(i) * (round % 2 == 0 ? 40.0f : -40.0f);
      if (round % 3 == 1 && i < begin + n - 1) v = -INFINITY;
      memory[i] = v;
      top = std::max(top, static_cast<double>(v));
    }
    for (std::int64_t i = begin; i < begin + n; ++i)
      sum += std::exp(static_cast<double>(memory[i]) - top);
    SumOfPowers powers;
    std::int64_t seen = 0;
    const auto add = [&](std::int64_t first, std::int64_t count, const Octet& o) {
      EXPECT_EQ(first, seen);
      seen += std::min<std::int64_t>(count, Octet::kSize);
      powers.add(count, o);
    };
    each_octet(memory + begin, n, Lanes{}, add);
    powers.join(Lanes{});
    EXPECT_EQ(seen, n);
    EXPECT_EQ(static_cast<double>(powers.top), top);
    EXPECT_NEAR(powers.sum, sum, 1e-5 * sum);
  }
  SumOfPowers none;
  none.add(2, Octet{{-INFINITY, NAN}});
  none.join(Lanes{});
  EXPECT_TRUE(std::isnan(none.sum)) << "what is no number is not lost";
}

TEST(CudaKernels, TablesOfTurnsAreToldApart) {
  std::set<std::vector<std::int64_t>> keys;
  for (const double base : {100.0, 10000.0}) {
    for (const std::int64_t turned : {2, 4}) {
      for (const cpu::Indices& at :
           {cpu::Indices{}, {0, 1, 2}, {0, 1}, {1, 2, 3}, {0, 2, 3}, {0, 1, 3}})
        keys.insert(key_of_turns(Rotary{4, turned, base}, at));
    }
  }
  EXPECT_EQ(keys.size(), 24u);
  const std::vector<float> turns = turns_of(Rotary{4, 4, 100}, {0, 3});
  ASSERT_EQ(turns.size(), 8u);
  // Of position 3 the angles are 3 and 3 / 10.
  EXPECT_FLOAT_EQ(turns[4], std::cos(3.0f));
  EXPECT_FLOAT_EQ(turns[5], std::cos(0.3f));
  EXPECT_FLOAT_EQ(turns[6], std::sin(3.0f));
  EXPECT_FLOAT_EQ(turns[7], std::sin(0.3f));
}

/// Whole numbers, so that sums are exact, of one stage, two and more.
TEST(CudaKernels, ColumnsOfAnyNumberOfRowsAreSummed) {
  std::mt19937 rng(33);
  for (const std::int64_t rows : {0, 1, 15, 16, 17, 513, 600, 20000}) {
    for (const std::int64_t columns : {1, 7, 8, 9, 24}) {
      for (const bool accumulate : {false, true}) {
        std::vector<float> y(static_cast<std::size_t>(rows * columns)),
            to(static_cast<std::size_t>(columns), 3.0f), want(to.size(), accumulate ? 3.0f : 0.0f);
        for (float& v : y) v = static_cast<float>(static_cast<int>(rng() % 9) - 4);
        for (std::size_t i = 0; i < y.size(); ++i) want[i % want.size()] += y[i];
        HostMachine m;
        sum_columns(m, y.data(), rows, columns, to.data(), accumulate);
        EXPECT_EQ(to, want) << rows << " rows of " << columns;
      }
    }
  }
}

TEST(CudaNumbers, OctetsAreTheirElementsWhereverTheyLie) {
  std::mt19937 rng(8);
  // Of fp32 a thread takes four and four, 128 apart.
  std::vector<std::int64_t> sizes{127, 128, 129, 131, 132, 133, 255, 256, 257, 384, 388, 512, 700};
  for (std::int64_t n = 0; n < 40; ++n) sizes.push_back(n);
  for (const ElementType type : {ElementType::fp32, ElementType::bf16, ElementType::fp16}) {
    const std::int64_t width = storage(type, 1).count;
    for (std::int64_t n : sizes) {
      const auto offset = static_cast<std::int64_t>(rng() % 10);
      constexpr std::size_t kBytes = 4096;
      alignas(64) std::byte from[kBytes], to[kBytes], want[kBytes];
      for (std::size_t k = 0; k < kBytes; ++k)
        from[k] = static_cast<std::byte>(rng() % 60), to[k] = want[k] = std::byte{7};
      const Numbers x{from + width * static_cast<std::int64_t>(rng() % 10), type},
          y{to + width * offset, type}, w{want + width * offset, type};
      for (std::int64_t i = 0; i < n; ++i) w[i] = 2 * x[i];
      HostMachine m;
      map_one(m, n, x, y, [](float v) { return 2 * v; });
      EXPECT_TRUE(std::equal(to, to + kBytes, want)) << name(type) << ", " << n << " at " << offset;
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

// docs/cuda.md, "Kernels": short forms are off by less than a fifth of half a spacing of fp16.
TEST(CudaKernels, ShortFormsAreOffByLessThanTheirTypesRound) {
  const double kPart = std::ldexp(1.0, -11) / 5;
  const auto expect = [&](Curve quick, double value, double slope, double x) {
    EXPECT_NEAR(quick.value, value, kPart * std::abs(value) + 1e-12) << x;
    EXPECT_NEAR(quick.slope, slope, kPart * std::max(std::abs(slope), 0.1 * std::abs(x)) + 1e-9)
        << x;
  };
  for (int k = -4000; k <= 4000; ++k) {
    const double x = static_cast<float>(k) / 400.0f;
    const auto at = static_cast<float>(x);
    const double below = 0.5 * std::erfc(-x / std::sqrt(2.0)),
                 density = std::exp(-0.5 * x * x) / std::sqrt(2 * 3.14159265358979324);
    expect(curve<ActivationKind::gelu, true>(at), x * below, below + x * density, x);
    const double s = 1 / (1 + std::exp(-x));
    expect(curve<ActivationKind::silu, true>(at), x * s, s * (1 + x * (1 - s)), x);
    expect(curve<ActivationKind::sigmoid, true>(at), s, s * (1 - s), x);
    const double c = std::sqrt(2 / 3.14159265358979324), u = c * (x + 0.044715 * x * x * x),
                 t = 1 / (1 + std::exp(-2 * u));
    expect(curve<ActivationKind::gelu_tanh, true>(at), x * t,
           t + 2 * x * t * (1 - t) * c * (1 + 3 * 0.044715 * x * x), x);
    EXPECT_NEAR(quick_power(at), std::exp(x), 2e-6 * std::exp(x));
  }
  // Nothing is made of what is none, and what is far out stays there.
  EXPECT_TRUE(std::isnan(curve<ActivationKind::gelu, true>(NAN).value));
  EXPECT_EQ((curve<ActivationKind::gelu, true>(1e4f).value), 1e4f);
  EXPECT_EQ((curve<ActivationKind::gelu, true>(-1e4f).value), 0);
  EXPECT_EQ((curve<ActivationKind::silu, true>(-1e4f).value), 0);
  EXPECT_EQ(quick_power(-INFINITY), 0);
}

}  // namespace
}  // namespace partita::cuda
