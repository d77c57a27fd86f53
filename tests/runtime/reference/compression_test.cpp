// What gradient compression does to numbers (docs/compression.md).
#include "runtime/reference/compression.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace partita::reference {
namespace {

using ::testing::ElementsAre;
using Vector = std::vector<double>;

TEST(Compression, TheExampleOfThePage) {
  const std::vector<Vector> g{{4, -1, 2, 0}, {1, 3, 2, -2}};
  Compression c;
  c.kind = CompressionKind::top_k;
  c.ratio = 0.25;
  Exchange state;
  EXPECT_THAT(exchange(c, {}, 0, g, state), ElementsAre(4, 3, 0, 0));
  EXPECT_THAT(state.kept[0], ElementsAre(0, -1, 2, 0));
  EXPECT_THAT(state.kept[1], ElementsAre(1, 0, 2, -2));
  EXPECT_THAT(exchange(c, {}, 0, g, state), ElementsAre(4, 0, 4, 0));
  EXPECT_THAT(state.kept[0], ElementsAre(0, -2, 4, 0));
  EXPECT_THAT(state.kept[1], ElementsAre(2, 3, 0, -4));
  c.kind = CompressionKind::one_bit;
  Exchange fresh;
  EXPECT_THAT(exchange(c, {}, 0, g, fresh), ElementsAre(3.75, 0.25, 3.75, -0.25));
}

TEST(Compression, OfAllValuesTopKKeepsEachOnce) {
  EXPECT_EQ(kept_values({CompressionKind::top_k, ElementType::bf16, 0.01, 2, true}, 1), 1);
  EXPECT_EQ(kept_values({CompressionKind::top_k, ElementType::bf16, 0.01, 2, true}, 101), 2);
  EXPECT_EQ(kept_values({CompressionKind::top_k, ElementType::bf16, 1, 2, true}, 7), 7);
  const Vector v{1, -3, 3, 0};
  EXPECT_THAT(top_positions(v.data(), 4, 1), ElementsAre(1u));
  EXPECT_THAT(top_positions(v.data(), 4, 2), ElementsAre(1u, 2u));
  EXPECT_THAT(top_positions(v.data(), 4, 4), ElementsAre(0u, 1u, 2u, 3u));
  EXPECT_TRUE(top_positions(v.data(), 0, 0).empty());
}

TEST(Compression, SignsArePackedThirtyTwoToAWord) {
  Vector v(40, 1.0);
  v[0] = v[31] = v[33] = -1;
  EXPECT_EQ(sign_word(v.data(), 40, 0), 0x80000001u);
  EXPECT_EQ(sign_word(v.data(), 40, 1), 2u);
}

/// What is not sent is not lost: the sum that everybody gets and the sum of what was kept are
/// together what went in.
TEST(Compression, NothingIsLostWithErrorFeedback) {
  std::mt19937_64 rng(5);
  std::normal_distribution<double> normal;
  for (const auto kind : {CompressionKind::cast, CompressionKind::top_k, CompressionKind::one_bit,
                          CompressionKind::power_sgd}) {
    for (const std::size_t replicas : {1u, 2u, 3u}) {
      for (const auto& [rows, cols] : {std::pair{1, 1}, {6, 5}, {3, 40}}) {
        SCOPED_TRACE(::testing::Message()
                     << name(kind) << " " << replicas << " " << rows << "x" << cols);
        Compression c;
        c.kind = kind;
        c.ratio = 0.3;
        Exchange state;
        const auto n = static_cast<std::size_t>(rows * cols);
        Vector in(n, 0.0), out(n, 0.0);
        for (int step = 0; step < 4; ++step) {
          std::vector<Vector> g(replicas, Vector(n));
          for (auto& of_replica : g) {
            for (std::size_t k = 0; k < n; ++k) in[k] += of_replica[k] = normal(rng);
          }
          const Vector sum = exchange(c, {rows, cols, 2}, 3, g, state);
          for (std::size_t k = 0; k < n; ++k) out[k] += sum[k];
        }
        for (std::size_t k = 0; k < n; ++k) {
          double left = 0;
          for (const auto& kept : state.kept) left += kept[k];
          EXPECT_NEAR(in[k], out[k] + left, 1e-12);
        }
      }
    }
  }
}

TEST(Compression, PowerSgdOfAMatrixOfItsRankIsExactFromTheSecondStepOn) {
  std::mt19937_64 rng(6);
  std::normal_distribution<double> normal;
  const PowerShape s{7, 5, 2};
  Vector left(14), right(10), m(35);
  for (auto* v : {&left, &right}) {
    for (double& x : *v) x = normal(rng);
  }
  power_product(s, left.data(), right.data(), m.data());
  Compression c;
  c.kind = CompressionKind::power_sgd;
  Exchange state;
  const Vector sum = exchange(c, s, 0, {m}, state);
  for (std::size_t k = 0; k < m.size(); ++k) EXPECT_NEAR(sum[k], m[k], 1e-12);
  // A matrix of rank 1 leaves the second column nothing but rounding, which must not come back.
  for (std::size_t k = 0; k < m.size(); ++k) m[k] = left[2 * (k / 5)] * right[2 * (k % 5)];
  Exchange fresh;
  const Vector one = exchange(c, s, 0, {m}, fresh);
  for (std::size_t k = 0; k < m.size(); ++k) EXPECT_NEAR(one[k], m[k], 1e-12);
}

TEST(Compression, GramSchmidtGivesABasis) {
  std::mt19937_64 rng(7);
  std::normal_distribution<double> normal;
  const PowerShape s{9, 1, 3};
  Vector p(27);
  for (double& x : p) x = normal(rng);
  for (std::size_t i = 0; i < 9; ++i) p[3 * i + 2] = 2 * p[3 * i];  // the third repeats the first
  orthonormalise(s, p.data());
  for (std::size_t a = 0; a < 3; ++a) {
    for (std::size_t b = 0; b < 3; ++b) {
      double dot = 0;
      for (std::size_t i = 0; i < 9; ++i) dot += p[3 * i + a] * p[3 * i + b];
      EXPECT_NEAR(dot, a == b && a < 2 ? 1 : 0, 1e-14);
    }
  }
}

}  // namespace
}  // namespace partita::reference
