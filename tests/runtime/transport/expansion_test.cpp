// Expansions: what they do, by playing them on lists of numbers; what they count; and the page's
// example.
#include "simulator/program/expansion.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "base/error.h"
#include "runtime/transport/transport.h"

namespace partita {
namespace {

using Values = std::vector<double>;

/// Every member's payload after the steps; a message carries what its sender had when the step
/// began.
std::vector<std::vector<Values>> play(const Expansion& e, std::vector<std::vector<Values>> chunks) {
  for (const auto& step : e.steps) {
    const auto before = chunks;
    for (const Message& m : step) {
      for (std::int32_t c = m.first; c < m.first + m.count; ++c) {
        auto& to = chunks[static_cast<std::size_t>(m.to)][static_cast<std::size_t>(c)];
        const auto& from = before[static_cast<std::size_t>(m.from)][static_cast<std::size_t>(c)];
        if (!m.reduces) {
          to = from;
        } else {
          for (std::size_t k = 0; k < to.size(); ++k) to[k] += from[k];
        }
      }
    }
  }
  return chunks;
}

std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

TEST(Expansion, EveryAlgorithmDoesWhatItsKindSays) {
  for (const AlgorithmRow& row : kAlgorithms) {
    for (std::int32_t n = 1; n <= 17; ++n) {
      SCOPED_TRACE(::testing::Message()
                   << name(row.kind) << " " << name(row.algorithm) << " " << n);
      const Expansion e = expand(row.kind, row.algorithm, n);
      // Chunk c of member r is {1000 r + c}.
      std::vector<std::vector<Values>> start(at(n), std::vector<Values>(at(e.chunks)));
      for (std::int32_t r = 0; r < n; ++r) {
        for (std::int32_t c = 0; c < e.chunks; ++c) start[at(r)][at(c)] = {1000.0 * r + c};
      }
      const auto end = play(e, start);
      for (std::int32_t r = 0; r < n; ++r) {
        for (std::int32_t c = 0; c < e.chunks; ++c) {
          double sum = 0;
          for (std::int32_t m = 0; m < n; ++m) sum += start[at(m)][at(c)][0];
          const double got = end[at(r)][at(c)][0];
          switch (row.kind) {
            case CollectiveKind::all_reduce:
              EXPECT_EQ(got, sum);
              break;
            case CollectiveKind::reduce_scatter:
              if (c == r) {
                EXPECT_EQ(got, sum);
              }
              break;
            case CollectiveKind::all_gather:
              EXPECT_EQ(got, start[at(c)][at(c)][0]);
              break;
            case CollectiveKind::all_to_all:
            case CollectiveKind::halo_exchange:
              if (c % n == r) {
                EXPECT_EQ(got, start[at(c / n)][at(c)][0]);
              }
              break;
            case CollectiveKind::shift:
              if (n > 1 && c == (r + n - 1) % n) {
                EXPECT_EQ(got, start[at(c)][at(c)][0]);
              }
              break;
            case CollectiveKind::broadcast:
              EXPECT_EQ(got, start[0][at(c)][0]);
              break;
            case CollectiveKind::reduce:
              if (r == 0) {
                EXPECT_EQ(got, sum);
              }
              break;
            case CollectiveKind::scatter:
              if (c == r) {
                EXPECT_EQ(got, start[0][at(c)][0]);
              }
              break;
            case CollectiveKind::gather:
              if (r == 0) {
                EXPECT_EQ(got, start[at(c)][at(c)][0]);
              }
              break;
          }
        }
      }
      // Nobody talks to itself, and a step has no two messages over one link in one direction.
      for (const auto& step : e.steps) {
        std::set<std::pair<std::int32_t, std::int32_t>> links;
        for (const Message& m : step) {
          EXPECT_NE(m.from, m.to);
          EXPECT_TRUE(links.insert({m.from, m.to}).second);
        }
      }
      if (n == 1) {
        EXPECT_TRUE(e.steps.empty());
      }
    }
  }
}

std::int64_t sent(const Expansion& e, std::int64_t values) {
  const auto bounds = even_chunks(values, e.chunks);
  std::int64_t sum = 0;
  for (const auto& step : e.steps) {
    for (const Message& m : step) sum += bounds[at(m.first + m.count)] - bounds[at(m.first)];
  }
  return sum;
}

TEST(Expansion, StepsAndValuesAreThoseOfThePage) {
  for (std::int32_t n = 2; n <= 16; ++n) {
    const auto ring = expand(CollectiveKind::all_reduce, Algorithm::ring, n);
    EXPECT_EQ(ring.steps.size(), at(2 * (n - 1)));
    EXPECT_EQ(sent(ring, 1003), 2 * (n - 1) * 1003);
    const auto tree = expand(CollectiveKind::all_reduce, Algorithm::tree, n);
    EXPECT_EQ(tree.steps.size(), at(2 * static_cast<std::int32_t>(std::ceil(std::log2(n)))));
    EXPECT_EQ(sent(tree, 1003), 2 * (n - 1) * 1003);
    const auto halving = expand(CollectiveKind::all_reduce, Algorithm::halving, n);
    const auto twin = expand(CollectiveKind::all_reduce, Algorithm::double_tree, n);
    EXPECT_LE(twin.steps.size(), at(2 * static_cast<std::int32_t>(std::ceil(std::log2(n))) + 2));
    EXPECT_EQ(sent(twin, 1004), 2 * (n - 1) * 1004);
    const bool power = (n & (n - 1)) == 0;
    EXPECT_EQ(halving.steps.size(),
              at(2 * static_cast<std::int32_t>(std::log2(n)) + (power ? 0 : 2)));
    if (power) {
      EXPECT_EQ(sent(halving, 1024), 2 * (n - 1) * 1024);
    }
  }
}

TEST(Expansion, HierarchiesSumOverAnyLevels) {
  const std::vector<std::vector<std::int32_t>> shapes{{4, 2}, {2, 4},    {3, 5},    {8, 3},
                                                      {1, 6}, {2, 3, 4}, {4, 3, 2}, {2, 2, 2, 3}};
  for (const auto& levels : shapes) {
    std::int32_t n = 1, steps = 0;
    for (const std::int32_t l : levels) n *= l, steps += 2 * (l - 1);
    const auto e = expand(CollectiveKind::all_reduce, Algorithm::hierarchical, n, levels);
    EXPECT_EQ(e.steps.size(), at(steps));
    std::vector<std::vector<Values>> start(at(n), std::vector<Values>(at(e.chunks)));
    for (std::int32_t r = 0; r < n; ++r) {
      for (std::int32_t c = 0; c < e.chunks; ++c) start[at(r)][at(c)] = {1000.0 * r + c};
    }
    for (const auto& member : play(e, start)) {
      for (std::int32_t c = 0; c < e.chunks; ++c)
        EXPECT_EQ(member[at(c)][0], 1000.0 * n * (n - 1) / 2 + n * c);
    }
    // The page's count; and what leaves the units of the first level is 1 / n_1 of it.
    const std::int64_t payload = 24 * n;
    std::int64_t want = 0, left = payload;
    for (const std::int32_t l : levels) {
      want += 2 * (l - 1) * (n / l) * left;
      left /= l;
    }
    EXPECT_EQ(sent(e, payload), want);
  }
}

TEST(Expansion, ARhythmIsItsExpansionInShort) {
  for (const AlgorithmRow& row : kAlgorithms) {
    for (const std::int32_t n : {2, 6, 8, 13}) {
      const Rhythm r = rhythm(row.kind, row.algorithm, n);
      EXPECT_EQ(r.steps(),
                static_cast<std::int64_t>(expand(row.kind, row.algorithm, n).steps.size()));
    }
  }
  EXPECT_EQ(rhythm(CollectiveKind::all_reduce, Algorithm::ring, 1024).beats.size(), 2u);
}

TEST(Expansion, TheRingOfThePage) {
  // n = 3, 7 values in chunks of 3, 2, 2.
  EXPECT_EQ(even_chunks(7, 3), (std::vector<std::int64_t>{0, 3, 5, 7}));
  const auto e = expand(CollectiveKind::all_reduce, Algorithm::ring, 3);
  ASSERT_EQ(e.steps.size(), 4u);
  const std::vector<std::vector<std::int32_t>> chunks{{2, 0, 1}, {1, 2, 0}, {0, 1, 2}, {2, 0, 1}};
  std::vector<std::int64_t> by_rank(3, 0);
  const std::vector<std::int64_t> sizes{3, 2, 2};
  for (std::size_t s = 0; s < 4; ++s) {
    for (std::int32_t r = 0; r < 3; ++r) {
      EXPECT_EQ(e.steps[s][at(r)], (Message{r, (r + 1) % 3, chunks[s][at(r)], 1, s < 2}));
      by_rank[at(r)] += sizes[at(chunks[s][at(r)])];
    }
  }
  EXPECT_EQ(by_rank, (std::vector<std::int64_t>{9, 10, 9}));
}

TEST(Expansion, APairThatIsNoRowIsABug) {
  EXPECT_THROW(expand(CollectiveKind::shift, Algorithm::ring, 4), InternalError);
}

TEST(ThreadTransport, BytesForAPeerThatNeverComesEndInItsName) {
  auto hub = make_thread_hub(2, 0.05);
  const auto t = thread_transport(hub, 0);
  t->doing("the test");
  float x;
  try {
    t->receive(1, 7, &x, sizeof x);
    ADD_FAILURE();
  } catch (const PeerError& e) {
    EXPECT_STREQ(e.what(),
                 "rank 0 waits in the test for rank 1, which has been in starting for 0 s");
  }
}

}  // namespace
}  // namespace partita
