// Messages on networks: hand-made examples, closed forms, folded against unfolded, cuts.
#include "simulator/engine/flows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "base/error.h"
#include "tests/simulator/random_collective.h"
#include "tests/simulator/traffic.h"

namespace partita {
namespace {

constexpr std::int64_t kMicro = 1'000'000;  // picoseconds

// docs/sharing.md, "Messages".
TEST(Flows, ThePagesExample) {
  // One link of 10 GB/s, 1 us. 20 kB alone take 2 us; the second starts its bytes at 1.5 us + 1 us.
  const std::vector<NetworkRoute> routes{{{0}, Ticks{kMicro}}};
  const auto ends =
      ends_of({10e9}, routes, {{Ticks{0}, 0, Bytes{20'000}}, {Ticks{1'500'000}, 0, Bytes{20'000}}});
  EXPECT_EQ(ends[0].count, 3'500'000);
  EXPECT_EQ(ends[1].count, 5'000'000);
}

TEST(Flows, AFailedLinkIsSaid) {
  const std::vector<NetworkRoute> routes{{{0}, Ticks{0}}};
  try {
    ends_of({0}, routes, {{Ticks{0}, 0, Bytes{1}}});
    ADD_FAILURE();
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("1 messages need a failed link"), std::string::npos)
        << e.what();
  }
}

TEST(Flows, ARingTakesItsClosedForm) {
  for (const std::int32_t n : {2, 3, 8, 31}) {
    const Bytes chunk{1'000'001};
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::ring, n);
    const NetworkTraffic t =
        on_ring(r, EvenCut(CollectiveKind::all_reduce, r, n * chunk), 25e9, Ticks{700'000});
    const std::int64_t step = 700'000 + to_ticks(chunk / BytesPerSecond{25e9}).count;
    for (const bool folded : {false, true}) {
      const Played p = play(t, {folded});
      EXPECT_EQ(p.end.count, 2 * (n - 1) * step);
      EXPECT_EQ(p.classes, folded ? 1 : n);
      EXPECT_EQ(p.messages, 2 * (n - 1) * (folded ? 1 : n));
    }
  }
}

TEST(Flows, HalvingSharesTheRingsLinks) {
  // Distance 4, then 2, then 1 of 8 members on a ring: 4, 2, 1 messages on each link of each
  // direction that they cross; half, a quarter, an eighth of the payload. By hand: to distance 4
  // all go clockwise and each link has 4; to 2 and 1 half go each way.
  const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::halving, 8);
  const NetworkTraffic t =
      on_ring(r, EvenCut(CollectiveKind::all_reduce, r, Bytes{8'000'000}), 1e9, Ticks{0});
  // Distance 4: 4 MB each, 4 share a link: 16 ms. Distance 2: 2 MB, 2 share: 4 ms. Distance 1: 1
  // ms.
  EXPECT_EQ(play(t, {false}).end.count, 2 * (16 + 4 + 1) * 1'000'000'000ll);
}

constexpr double kGiBps = 1073741824;  // ASTRA-sim's GB is 2^30

// docs/sharing.md, "Beside ASTRA-sim": simulated times of ASTRA-sim 2.0 for an all-reduce of 1 GiB
// in four chunks, one after the other.
TEST(Flows, RingsTakeAstraSimsTime) {
  const std::vector<std::pair<std::int32_t, double>> rows{
      {8, 36.790},   {64, 41.614},   {128, 42.202}, {256, 42.888},
      {512, 44.009}, {1024, 46.129}, {2048, 50.315}};
  for (const auto& [n, theirs] : rows) {
    SCOPED_TRACE(n);
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::ring, n);
    NetworkTraffic t = on_ring(r, EvenCut(CollectiveKind::all_reduce, r, Bytes{1 << 28}),
                               50 * kGiBps, Ticks{500'000});
    const double links = 4e-9 * static_cast<double>(play(t).end.count);
    // A reducing receiver reads two operands and writes one: 10 ns + bytes / (1600 GB/s), thrice.
    t.reduce_latency = 30e-9;
    t.reduce_per_byte = 3 / 1600e9;
    const double with_memory = 4e-9 * static_cast<double>(play(t).end.count);
    EXPECT_NEAR(with_memory, theirs, 0.0025 * theirs);
    EXPECT_LT(links, theirs);
    EXPECT_GT(links, 0.94 * theirs);
  }
}

TEST(Flows, HalvingOnASwitchTakesAstraSimsTime) {
  const std::vector<std::pair<std::int32_t, double>> rows{
      {64, 40.399}, {512, 40.997}, {1024, 41.046}, {4096, 41.093}};
  for (const auto& [n, theirs] : rows) {
    SCOPED_TRACE(n);
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::halving, n);
    NetworkTraffic t = on_switches(r, EvenCut(CollectiveKind::all_reduce, r, Bytes{1 << 28}), {n},
                                   {50 * kGiBps}, {Ticks{500'000}});
    EXPECT_NEAR(4e-9 * static_cast<double>(play(t).end.count), theirs, 0.025 * theirs);
    // Half the memory passes of a ring make up the difference.
    t.reduce_per_byte = 1.5 / 1600e9;
    EXPECT_NEAR(4e-9 * static_cast<double>(play(t).end.count), theirs, 0.0005 * theirs);
  }
}

/// When the last of equal chunks is through its phases (level, time): a level runs one chunk at a
/// time, the youngest that is there first (LIFO); the next chunk enters when one has left its first
/// phase. The first made enters first, the others youngest first: ASTRA-sim's Sys::SchedulerUnit
/// with active-chunks-per-dim 1.
double pipelined(const std::vector<std::pair<std::size_t, double>>& phases, std::size_t chunks) {
  struct Level {
    std::vector<std::size_t> queue;
    double free_at = 0;
    bool busy = false;
  };
  std::vector<Level> levels(phases.size());
  std::vector<std::size_t> done(chunks, 0), outside;
  for (std::size_t c = 1; c < chunks; ++c) outside.push_back(c);
  std::vector<std::pair<double, std::size_t>> running;  // end, chunk
  double now = 0;
  const auto start = [&](std::size_t level) {
    Level& l = levels[level];
    if (l.busy || l.queue.empty()) return;
    const auto youngest = std::max_element(l.queue.begin(), l.queue.end());
    running.emplace_back(now + phases[done[*youngest]].second, *youngest);
    l.queue.erase(youngest);
    l.busy = true;
  };
  levels[phases[0].first].queue = {0};
  start(phases[0].first);
  while (!running.empty()) {
    const auto next = std::min_element(running.begin(), running.end());
    const std::size_t chunk = next->second, left = phases[done[chunk]].first;
    now = next->first;
    running.erase(next);
    levels[left].busy = false;
    if (done[chunk]++ == 0 && !outside.empty()) {
      levels[left].queue.push_back(outside.back());
      outside.pop_back();
    }
    if (done[chunk] < phases.size()) levels[phases[done[chunk]].first].queue.push_back(chunk);
    start(left);
    if (done[chunk] < phases.size()) start(phases[done[chunk]].first);
  }
  return now;
}

struct AstraRun {
  std::int32_t n;
  double theirs;              ///< ms
  double links, with_memory;  ///< ours, ms, as docs/sharing.md prints them
};

/// ASTRA-sim's hierarchical all-reduce of 1 GiB in four chunks that overlap between switch levels.
void expect_astra_sims_times(const std::vector<std::int32_t>& inner,
                             const std::vector<double>& rate, const std::vector<Ticks>& hop,
                             const std::vector<AstraRun>& runs) {
  for (const AstraRun& run : runs) {
    SCOPED_TRACE(run.n);
    std::vector<std::int32_t> levels = inner;
    std::int32_t rest = run.n;
    for (const std::int32_t l : inner) rest /= l;
    levels.push_back(rest);
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::hierarchical, run.n, levels);
    NetworkTraffic t =
        on_switches(r, EvenCut(CollectiveKind::all_reduce, r, Bytes{1 << 28}), levels, rate, hop);
    // Down the levels and up again; the outermost reduces and gathers in one phase.
    ASSERT_EQ(t.beats.size(), 2 * levels.size());
    const auto ours = [&] {
      std::vector<std::pair<std::size_t, double>> phases;
      double serial = 0;
      for (std::size_t b = 0; b < t.beats.size(); ++b) {
        NetworkTraffic one = t;
        one.beats = {t.beats[b]};
        const double time = 1e-9 * static_cast<double>(play(one).end.count);
        serial += time;
        if (b == levels.size())
          phases.back().second += time;
        else
          phases.emplace_back(std::min(b, t.beats.size() - 1 - b), time);
      }
      EXPECT_NEAR(serial, 1e-9 * static_cast<double>(play(t).end.count), 1e-9);
      return pipelined(phases, 4);
    };
    const double links = ours();
    t.reduce_latency = 30e-9;
    t.reduce_per_byte = 3 / 1600e9;
    const double with_memory = ours();
    EXPECT_NEAR(with_memory, run.theirs, 0.0015 * run.theirs);
    EXPECT_LT(links, run.theirs);
    EXPECT_NEAR(links, run.links, 0.0006);
    EXPECT_NEAR(with_memory, run.with_memory, 0.0006);
  }
}

TEST(Flows, TwoLevelsTakeAstraSimsTime) {
  expect_astra_sims_times({8}, {300 * kGiBps, 25 * kGiBps}, {Ticks{500'000}, Ticks{2'000'000}},
                          {{64, 11.108, 10.446, 11.108},
                           {128, 12.005, 11.327, 12.006},
                           {512, 14.025, 13.332, 14.028},
                           {1024, 16.157, 15.458, 16.164},
                           {2048, 20.300, 19.593, 20.315},
                           {4096, 28.530, 27.805, 28.558}});
}

TEST(Flows, ThreeLevelsTakeAstraSimsTime) {
  expect_astra_sims_times({8, 8}, {300 * kGiBps, 50 * kGiBps, 25 * kGiBps},
                          {Ticks{500'000}, Ticks{1'000'000}, Ticks{2'000'000}},
                          {{128, 7.652, 6.288, 7.652},
                           {512, 7.652, 6.310, 7.652},
                           {1024, 7.652, 6.310, 7.652},
                           {2048, 7.740, 6.310, 7.741},
                           {4096, 7.652, 6.461, 7.652}});
}

NetworkTraffic random_traffic(std::mt19937_64& rng, bool symmetric) {
  const auto pick = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };
  NetworkTraffic t = random_collective(rng, symmetric).traffic();
  if (pick(0, 2) == 0 && !t.capacity.empty()) {
    // A few slow links.
    for (int k = pick(1, 3); k > 0; --k) t.capacity[rng() % t.capacity.size()] *= 0.25 * pick(1, 3);
  }
  if (pick(0, 3) == 0) t.reduce_latency = 1e-6, t.reduce_per_byte = 1e-12;
  return t;
}

TEST(Flows, FoldedIsUnfoldedToThePicosecond) {
  std::mt19937_64 rng{11};
  int folds = 0;
  for (int k = 0; k < 300; ++k) {
    SCOPED_TRACE(k);
    const NetworkTraffic t = random_traffic(rng, k % 3 != 0);
    const Played one = play(t, {true}), all = play(t, {false});
    EXPECT_EQ(one.end, all.end);
    EXPECT_EQ(one.member_end, all.member_end);
    folds += 2 * one.classes <= t.members;
  }
  EXPECT_GT(folds, 60);
}

TEST(Flows, NoCutIsBeatenAndNothingIdlesLonger) {
  std::mt19937_64 rng{12};
  for (int k = 0; k < 200; ++k) {
    SCOPED_TRACE(k);
    const NetworkTraffic t = random_traffic(rng, k % 2 == 0);
    const Played p = play(t);
    for (std::size_t l = 0; l < t.capacity.size(); ++l)
      EXPECT_GE(static_cast<double>(p.end.count) * 1e-12 * (1 + 1e-9),
                p.link_bytes[l] / t.capacity[l]);
    // Not slower than one message after the other.
    double serial = 0;
    for (const TrafficBeat& b : t.beats) {
      for (const TrafficMessage& m : b.messages) {
        const NetworkRoute& r = t.routes[static_cast<std::size_t>(m.route)];
        double slowest = Sharing::kUnbound;
        for (const std::int32_t l : r.links)
          slowest = std::min(slowest, t.capacity[static_cast<std::size_t>(l)]);
        serial += static_cast<double>(b.repeat) *
                  (static_cast<double>(r.latency.count + 2) * 1e-12 + t.reduce_latency +
                   static_cast<double>(m.bytes.count) * (1 / slowest + t.reduce_per_byte));
      }
      for (const TrafficMeeting& m : b.meetings) {
        double slowest = Sharing::kUnbound;
        for (const std::int32_t l : m.links)
          slowest = std::min(slowest, t.capacity[static_cast<std::size_t>(l)]);
        serial += static_cast<double>(m.latency.count + 2) * 1e-12 +
                  static_cast<double>(m.bytes.count) / slowest;
      }
    }
    EXPECT_LE(static_cast<double>(p.end.count) * 1e-12, serial * (1 + 1e-9));
  }
}

TEST(Flows, RenamingMembersAndLinksChangesNothing) {
  std::mt19937_64 rng{13};
  for (int k = 0; k < 100; ++k) {
    SCOPED_TRACE(k);
    const NetworkTraffic t = random_traffic(rng, k % 2 == 0);
    std::vector<std::int32_t> m(static_cast<std::size_t>(t.members)), l(t.capacity.size());
    std::iota(m.begin(), m.end(), 0);
    std::iota(l.begin(), l.end(), 0);
    std::shuffle(m.begin(), m.end(), rng);
    std::shuffle(l.begin(), l.end(), rng);
    NetworkTraffic other = t;
    for (std::size_t i = 0; i < l.size(); ++i)
      other.capacity[static_cast<std::size_t>(l[i])] = t.capacity[i];
    for (NetworkRoute& r : other.routes) {
      for (std::int32_t& x : r.links) x = l[static_cast<std::size_t>(x)];
    }
    for (TrafficBeat& b : other.beats) {
      for (TrafficMessage& x : b.messages) {
        x.from = m[static_cast<std::size_t>(x.from)];
        x.to = m[static_cast<std::size_t>(x.to)];
      }
      std::shuffle(b.messages.begin(), b.messages.end(), rng);
      for (TrafficMeeting& x : b.meetings) {
        for (auto* ends : {&x.from, &x.to}) {
          for (std::int32_t& r : *ends) r = m[static_cast<std::size_t>(r)];
          std::shuffle(ends->begin(), ends->end(), rng);
        }
        for (std::int32_t& x_link : x.links) x_link = l[static_cast<std::size_t>(x_link)];
        std::shuffle(x.links.begin(), x.links.end(), rng);
      }
      std::shuffle(b.meetings.begin(), b.meetings.end(), rng);
    }
    for (const bool folded : {true, false}) {
      const Played a = play(t, {folded}), b = play(other, {folded});
      EXPECT_EQ(a.end, b.end);
      for (std::size_t i = 0; i < m.size(); ++i)
        EXPECT_EQ(a.member_end[i], b.member_end[static_cast<std::size_t>(m[i])]);
    }
  }
}

}  // namespace
}  // namespace partita
