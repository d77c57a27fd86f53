// Expansions: what they do, by playing them on lists of numbers; what they count; and the page's
// example.
#include "simulator/program/expansion.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "base/error.h"
#include "runtime/transport/transport.h"

namespace partita {
namespace {

using Values = std::vector<double>;

/// Every member's payload after the steps; a message carries what its sender had when the step
/// began, a switch passes on what comes to it in the step.
std::vector<std::vector<Values>> play(const Expansion& e, std::vector<std::vector<Values>> chunks) {
  const auto add = [](Values& to, const Values& from) {
    if (to.empty()) to.assign(from.size(), 0);
    for (std::size_t k = 0; k < to.size(); ++k) to[k] += from[k];
  };
  for (const auto& step : e.steps) {
    const auto before = chunks;
    for (const Message& m : step) {
      if (m.to >= e.members || m.from >= e.members) continue;
      for (std::int32_t k = 0; k < m.chunks(); ++k) {
        const auto c = static_cast<std::size_t>(m.chunk(k));
        auto& to = chunks[static_cast<std::size_t>(m.to)][c];
        const auto& from = before[static_cast<std::size_t>(m.from)][c];
        if (m.reduces)
          add(to, from);
        else
          to = from;
      }
    }
    for (const Meeting& meeting : meetings(step, e.members)) {
      std::map<std::int32_t, Values> sums;
      for (const Message& m : meeting.in) {
        EXPECT_TRUE(m.reduces || meeting.in.size() == 1);
        for (std::int32_t k = 0; k < m.chunks(); ++k)
          add(sums[m.chunk(k)],
              before[static_cast<std::size_t>(m.from)][static_cast<std::size_t>(m.chunk(k))]);
      }
      for (const Message& m : meeting.out) {
        EXPECT_FALSE(m.reduces);
        EXPECT_EQ(m.from, meeting.in[0].to);
        for (std::int32_t k = 0; k < m.chunks(); ++k)
          chunks[static_cast<std::size_t>(m.to)][static_cast<std::size_t>(m.chunk(k))] =
              sums.at(m.chunk(k));
      }
    }
  }
  return chunks;
}

std::size_t at(std::int32_t i) { return static_cast<std::size_t>(i); }

void expect_done(CollectiveKind kind, const Expansion& e) {
  const std::int32_t n = e.members;
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
      switch (kind) {
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
  // Nobody talks to itself, and a step has no two messages of one member to another.
  for (const auto& step : e.steps) {
    std::set<std::pair<std::int32_t, std::int32_t>> links;
    for (const Message& m : step) {
      EXPECT_NE(m.from, m.to);
      if (m.from < n && m.to < n) {
        EXPECT_TRUE(links.insert({m.from, m.to}).second);
      }
      EXPECT_LT(std::max(m.from, m.to), n + e.switches);
    }
  }
  if (n == 1) {
    EXPECT_TRUE(e.steps.empty());
  }
}

TEST(Expansion, EveryAlgorithmDoesWhatItsKindSays) {
  for (const AlgorithmRow& row : kAlgorithms) {
    for (std::int32_t n = 1; n <= 17; ++n) {
      SCOPED_TRACE(::testing::Message()
                   << name(row.kind) << " " << name(row.algorithm) << " " << n);
      const Expansion e = expand(row.kind, row.algorithm, n);
      EXPECT_EQ(e.members, n);
      expect_done(row.kind, e);
    }
  }
}

TEST(Expansion, LevelsDoWhatTheKindSays) {
  const std::vector<std::vector<std::int32_t>> shapes{{4, 2},    {2, 4},      {3, 5},    {8, 3},
                                                      {1, 6},    {6, 1},      {2, 3, 4}, {4, 3, 2},
                                                      {2, 1, 3}, {2, 2, 2, 3}};
  for (const AlgorithmRow& row : kAlgorithms) {
    if (!levelled(row.algorithm)) continue;
    for (const auto& levels : shapes) {
      std::int32_t n = 1;
      for (const std::int32_t l : levels) n *= l;
      SCOPED_TRACE(::testing::Message() << name(row.kind) << " " << name(row.algorithm) << " "
                                        << ::testing::PrintToString(levels));
      const Expansion e = expand(row.kind, row.algorithm, n, levels);
      expect_done(row.kind, e);
      // Without switches the sums are the same.
      const Expansion on = on_members(e);
      EXPECT_EQ(on.switches, 0);
      expect_done(row.kind, on);
    }
  }
}

std::int64_t sent(const Expansion& e, std::int64_t values) {
  const auto bounds = even_chunks(values, e.chunks);
  std::int64_t sum = 0;
  for (const auto& step : e.steps) {
    for (const Message& m : step) {
      for (std::int32_t k = 0; k < m.chunks(); ++k)
        sum += bounds[at(m.chunk(k) + 1)] - bounds[at(m.chunk(k))];
    }
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

/// docs/collectives.md, "Levels".
TEST(Expansion, TheLevelsOfThePage) {
  // Two units of two. What is for places 1 goes to the unit's place 1: chunks 1 and 3.
  const auto scatter =
      expand(CollectiveKind::reduce_scatter, Algorithm::hierarchical, 4, {2, 2}).steps;
  ASSERT_EQ(scatter.size(), 2u);
  EXPECT_EQ(scatter[0][0], (Message{0, 1, 1, 2, true, 2}));
  EXPECT_EQ(scatter[0][3], (Message{3, 2, 0, 2, true, 2}));
  EXPECT_EQ(scatter[1][0], (Message{0, 2, 2, 1, true}));
  EXPECT_EQ(scatter[1][3], (Message{3, 1, 1, 1, true}));
  // Chunk a * 4 + b goes from a to b: 0 gives 1 its own (0, 1) and (0, 3); then 2 what it and 1
  // have for it, (0, 2) and (1, 2).
  const auto exchange =
      expand(CollectiveKind::all_to_all, Algorithm::hierarchical, 4, {2, 2}).steps;
  ASSERT_EQ(exchange.size(), 2u);
  EXPECT_EQ(exchange[0][0], (Message{0, 1, 1, 2, false, 2}));
  EXPECT_EQ(exchange[1][0], (Message{0, 2, 2, 1, false, 1, 2, 4}));
  EXPECT_EQ(exchange[1][0].chunk(1), 1 * 4 + 2);
}

TEST(Expansion, SizesOfMessagesAreTheirChunks) {
  for (const AlgorithmRow& row : kAlgorithms) {
    for (const std::int32_t n : {1, 2, 6, 8, 12}) {
      const Rhythm r = rhythm(row.kind, row.algorithm, n);
      for (const std::int64_t size : {0, 1, 5, 11, 12, 1000, 1023}) {
        SCOPED_TRACE(::testing::Message()
                     << name(row.kind) << " " << name(row.algorithm) << " " << n << " " << size);
        const EvenCut cut(row.kind, r, Bytes{size});
        const bool exchange =
            row.kind == CollectiveKind::all_to_all || row.kind == CollectiveKind::halo_exchange;
        const bool shift = row.kind == CollectiveKind::shift;
        const auto bounds = even_chunks(size, exchange ? n : r.chunks);
        bool equal = true;
        for (std::size_t c = 0; c + 1 < bounds.size(); ++c)
          equal &= bounds[c + 1] - bounds[c] == bounds[1];
        EXPECT_EQ(cut.equal(), shift || equal);
        for (const auto& step : expand(row.kind, row.algorithm, n).steps) {
          for (const Message& m : step) {
            std::int64_t sum = 0;
            for (std::int32_t k = 0; k < m.chunks(); ++k) {
              const auto c = at(exchange ? m.chunk(k) % n : m.chunk(k));
              sum += shift ? size : bounds[c + 1] - bounds[c];
            }
            EXPECT_EQ(cut.of(m).count, sum);
          }
        }
      }
    }
  }
}

TEST(Expansion, APairThatIsNoRowIsABug) {
  EXPECT_THROW(expand(CollectiveKind::shift, Algorithm::ring, 4), InternalError);
}

/// Threads execute every row: values are right, and the bytes on every pair those of its messages.
TEST(ThreadTransport, EveryAlgorithmMovesItsBytes) {
  std::mt19937 rng(3);
  for (const AlgorithmRow& row : kAlgorithms) {
    for (const int size : {2, 3, 4, 6, 8}) {
      SCOPED_TRACE(::testing::Message()
                   << name(row.kind) << " " << name(row.algorithm) << " " << size);
      const auto n = static_cast<std::size_t>(size);
      const Expansion e = on_members(expand(row.kind, row.algorithm, size));
      std::vector<int> group(n);
      std::iota(group.begin(), group.end(), 0);
      const bool exchange =
          row.kind == CollectiveKind::all_to_all || row.kind == CollectiveKind::halo_exchange;
      const bool shift = row.kind == CollectiveKind::shift;
      const bool whole = row.kind == CollectiveKind::all_reduce ||
                         row.kind == CollectiveKind::broadcast ||
                         row.kind == CollectiveKind::reduce;
      // Chunks of 0 to 4 values; of an exchange n to a member.
      std::vector<std::int64_t> sizes(exchange ? n * n : n);
      for (auto& x : sizes) x = static_cast<std::int64_t>(rng() % 5);
      const std::int64_t total = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
      const auto value = [](std::size_t member, std::int64_t k) {
        return static_cast<float>(1000 * member) + static_cast<float>(k);
      };
      auto hub = make_thread_hub(size, 10, [&](CollectiveKind, int) { return row.algorithm; });
      std::vector<std::vector<float>> results(n);
      std::vector<Traffic> traffic(n);
      std::vector<std::thread> all;
      for (std::size_t me = 0; me < n; ++me) {
        all.emplace_back([&, me] {
          const auto t = thread_transport(hub, static_cast<int>(me));
          CollectiveCall c;
          c.kind = row.kind;
          c.group = &group;
          c.me = static_cast<int>(me);
          std::vector<float> data, send;
          const auto offsets = [](auto size_of, std::size_t count) {
            std::vector<std::int64_t> o{0};
            for (std::size_t k = 0; k < count; ++k) o.push_back(o.back() + size_of(k));
            return o;
          };
          if (exchange) {
            c.sizes = sizes;
            c.offsets = offsets([&](std::size_t a) { return sizes[a * n + me]; }, n);
            c.send_offsets = offsets([&](std::size_t b) { return sizes[me * n + b]; }, n);
          } else if (shift) {
            c.offsets = offsets([&](std::size_t) { return sizes[(me + n - 1) % n]; }, 1);
            c.send_offsets = offsets([&](std::size_t) { return sizes[me]; }, 1);
          } else {
            c.offsets = whole ? std::vector<std::int64_t>{0, total}
                              : offsets([&](std::size_t k) { return sizes[k]; }, n);
          }
          data.assign(static_cast<std::size_t>(c.offsets.back()), -1);
          if (exchange || shift) {
            for (std::int64_t k = 0; k < c.send_offsets.back(); ++k) send.push_back(value(me, k));
            c.send = reinterpret_cast<const std::byte*>(send.data());
          } else {
            for (std::int64_t k = 0; k < c.offsets.back(); ++k)
              data[static_cast<std::size_t>(k)] = value(me, k);
          }
          c.data = reinterpret_cast<std::byte*>(data.data());
          t->collective(c);
          results[me] = data;
          traffic[me] = t->traffic();
        });
      }
      for (auto& t : all) t.join();
      const auto bounds = whole ? even_chunks(total, e.chunks) : std::vector<std::int64_t>{};
      std::vector<std::map<int, std::int64_t>> want(n);
      for (const auto& step : e.steps) {
        for (const Message& m : step) {
          std::int64_t values = 0;
          for (std::int32_t k = 0; k < m.chunks(); ++k) {
            const std::size_t c = at(m.chunk(k));
            values += whole ? bounds[c + 1] - bounds[c] : sizes[c];
          }
          if (values > 0) want[at(m.from)][m.to] += 4 * values;
        }
      }
      for (std::size_t me = 0; me < n; ++me) {
        EXPECT_EQ(traffic[me].bytes_to, want[me]);
        std::int64_t before = 0;
        for (std::size_t other = 0; other < n; ++other) {
          // Where this member's values come from `other`, or its chunk is.
          const std::int64_t mine = exchange ? sizes[other * n + me] : sizes[other];
          std::int64_t ahead = 0;  // of other's values for those before me
          for (std::size_t b = 0; exchange && b < me; ++b) ahead += sizes[other * n + b];
          for (std::int64_t k = 0; k < mine; ++k) {
            const std::int64_t place = before + k;
            float expected = 0;
            switch (row.kind) {
              case CollectiveKind::all_reduce:
              case CollectiveKind::reduce:
              case CollectiveKind::reduce_scatter:
                for (std::size_t m = 0; m < n; ++m) expected += value(m, place);
                if (row.kind == CollectiveKind::reduce && me != 0) continue;
                if (row.kind == CollectiveKind::reduce_scatter && other != me) continue;
                break;
              case CollectiveKind::all_gather:
              case CollectiveKind::gather:
                if (row.kind == CollectiveKind::gather && me != 0) continue;
                expected = value(other, place);
                break;
              case CollectiveKind::all_to_all:
              case CollectiveKind::halo_exchange:
                if (other == me) continue;  // what stays is the caller's affair
                expected = value(other, ahead + k);
                break;
              case CollectiveKind::shift:
                if (other != (me + n - 1) % n) continue;
                EXPECT_EQ(results[me][static_cast<std::size_t>(k)], value(other, k));
                continue;
              case CollectiveKind::broadcast:
                expected = value(0, place);
                break;
              case CollectiveKind::scatter:
                if (other != me) continue;
                expected = value(0, place);
                break;
            }
            EXPECT_EQ(results[me][static_cast<std::size_t>(place)], expected);
          }
          before += mine;
        }
      }
    }
  }
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
