// One clock for all ranks: readings, the line between them, and runs whose clocks are skewed.
#include "runtime/execute/clocks.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <random>
#include <thread>
#include <tuple>

#include "runtime/execute/threads.h"
#include "runtime/reference/serial.h"
#include "runtime/transport/tcp.h"
#include "tests/runtime/execute/drawn.h"
#include "tests/simulator/networks.h"

namespace partita::execute {
namespace {

constexpr std::uint64_t kSeed = 11;

TEST(Clocks, TheExampleOfThePage) {
  const ClockReading one = reading_of(1000, 51'300, 1400);
  EXPECT_EQ(one.at, 1200);
  EXPECT_EQ(one.offset, 50'100);
  EXPECT_EQ(one.uncertainty, 200);
  const ClockReading two = reading_of(1'000'001'000, 1'000'071'400, 1'000'001'600);
  EXPECT_EQ(two.offset, 70'100);
  EXPECT_EQ(two.uncertainty, 300);
  const ClockLine line{one, two};
  EXPECT_EQ(line.to_rank_0(500'001'250), 500'061'350);
  EXPECT_EQ(line.uncertainty(), 300);
}

/// Whatever the two ways take, the error is at most the uncertainty.
TEST(Clocks, TheLineIsWithinItsUncertaintyOnRandomClocks) {
  std::mt19937_64 rng(20261124);
  const auto uniform = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
  };
  for (int k = 0; k < 5000; ++k) {
    // Rank 0's clock is the true one; ours began anywhere and is up to 0.1 % fast or slow.
    const std::int64_t zero = uniform(0, 1'000'000'000'000'000), began = uniform(-zero, zero);
    const double speed = 1 + 1e-6 * static_cast<double>(uniform(-1000, 1000));
    const auto own = [&](std::int64_t t) {
      return began + std::llround(speed * static_cast<double>(t - zero));
    };
    const auto read = [&](std::int64_t t) {
      ClockReading best;
      for (int q = 0; q < 4; ++q) {
        const std::int64_t there = t + uniform(100, 1'000'000),
                           back = there + uniform(100, 1'000'000);
        const ClockReading r = reading_of(own(t), there, own(back));
        if (q == 0 || r.uncertainty < best.uncertainty) best = r;
        t = back + uniform(0, 1000);
      }
      return best;
    };
    const std::int64_t first = zero + uniform(0, 1'000'000'000);
    const std::int64_t last = first + 10'000'000 + uniform(0, 10'000'000'000);
    const ClockLine line{read(first), read(last)};
    for (int i = 0; i < 8; ++i) {
      const std::int64_t t = uniform(first + 10'000'000, last);
      // 3 ns: times are whole nanoseconds, rounded three times.
      ASSERT_LE(static_cast<double>(std::abs(line.to_rank_0(own(t)) - t)),
                1.002 * static_cast<double>(line.uncertainty()) + 3);
    }
  }
}

std::int64_t true_time() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

/// Runs `program` on ranks with sockets between them, as separate processes would.
RankResult run_over_sockets(const Program& program, const Options& options) {
  const auto n = static_cast<int>(program.ranks());
  const Listening l = listen_on_loopback(n);
  RankResult first;
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r) {
    threads.emplace_back([&, r] {
      TcpOptions o;
      o.rank = r;
      o.size = n;
      o.port = l.port;
      if (r == 0) o.listener = l.socket;
      o.key = "clocks";
      const auto t = tcp_transport(o);
      RankResult result = run_rank(program, *t, options);
      t->leave();
      if (r == 0) first = std::move(result);
    });
  }
  for (auto& t : threads) t.join();
  return first;
}

/// Before each instruction of each timed step, by rank: the true time, with which nobody runs.
using Watched = std::vector<std::vector<std::vector<std::int64_t>>>;

Options skewed(const Graph& graph, int steps, int ranks, Watched& watched,
               std::function<std::int64_t(int, std::int64_t)> clock) {
  Options o;
  o.steps = steps;
  o.warm_up = 1;
  o.record = true;
  draw(o, graph, kSeed);
  watched.assign(static_cast<std::size_t>(ranks), {});
  for (auto& w : watched) w.resize(static_cast<std::size_t>(steps));
  o.before = [&watched](int rank, std::int64_t step, std::size_t) {
    if (step >= 1)
      watched[static_cast<std::size_t>(rank)][static_cast<std::size_t>(step - 1)].push_back(
          true_time());
  };
  if (clock) o.clock = [clock](int rank) { return clock(rank, true_time()); };
  return o;
}

/// The instructions of a rank's step that are timed, by their number in program order.
std::vector<std::size_t> timed(const Program& p, int rank) {
  std::vector<std::size_t> list;
  std::size_t k = 0;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind != Kind::allocate && i.kind != Kind::free) list.push_back(k);
      ++k;
    }
  }
  return list;
}

/// Each sample lies between the true times before its instruction and before the next one, on rank
/// 0's clock (which is the true one), within its rank's uncertainty.
void expect_true(const Program& p, const RankResult& result, const Watched& watched) {
  for (std::size_t s = 0; s < watched[0].size(); ++s) {
    // Rank 0's start of the step, which samples count from: enclosed by what it did.
    std::int64_t low = INT64_MIN, high = INT64_MAX;
    for (std::size_t r = 0; r < watched.size(); ++r) {
      const auto list = timed(p, static_cast<int>(r));
      const auto& samples = result.ranks[r].samples[s];
      ASSERT_EQ(samples.size(), list.size());
      const auto u =
          static_cast<std::int64_t>(result.ranks[r].clock_uncertainty_s * 1e9 * 1.002) + 3;
      for (std::size_t k = 0; k < list.size(); ++k) {
        const auto& w = watched[r][s];
        if (r == 0) {
          low = std::max(low, w[list[k]] - samples[k].start);
          if (list[k] + 1 < w.size()) high = std::min(high, w[list[k] + 1] - samples[k].end);
          continue;
        }
        ASSERT_LE(low, high);
        ASSERT_GE(samples[k].start + high + u, w[list[k]])
            << "rank " << r << " step " << s << " sample " << k;
        if (list[k] + 1 < w.size()) {
          ASSERT_LE(samples[k].end + low - u, w[list[k] + 1])
              << "rank " << r << " step " << s << " sample " << k;
        }
      }
    }
  }
}

/// No message arrives before it was sent.
void expect_causal(const Program& p, const RankResult& result) {
  int messages = 0;
  for (std::size_t s = 0; s < result.ranks[0].samples.size(); ++s) {
    // By sender, receiver, message and micro-batch.
    std::map<std::tuple<int, int, std::int32_t, std::int32_t>, std::int64_t> begun;
    for (const bool sends : {true, false}) {
      for (const RankMeasurement& m : result.ranks) {
        for (const Sample& x : m.samples[s]) {
          const Instruction& i = p.blocks[static_cast<std::size_t>(x.block)]
                                     .instructions[static_cast<std::size_t>(x.instruction)];
          if (i.kind != (sends ? Kind::send : Kind::receive)) continue;
          const auto peer = static_cast<int>(p.rank_on_stage(m.rank, i.stage));
          if (sends) {
            begun[{m.rank, peer, i.index, x.micro_batch}] = x.start;
            continue;
          }
          const auto sent = begun.find({peer, m.rank, i.index, x.micro_batch});
          ASSERT_NE(sent, begun.end());
          const double u = m.clock_uncertainty_s +
                           result.ranks[static_cast<std::size_t>(peer)].clock_uncertainty_s;
          EXPECT_GE(static_cast<double>(x.end - sent->second), -1.002e9 * u - 6);
          ++messages;
        }
      }
    }
  }
  EXPECT_GT(messages, 0);
}

Plan plan_of(int pp, int tp, int dp) {
  Plan p = base_plan();
  set_precision(p, "fp32", "");
  p.pp = pp;
  p.tp = tp;
  p.dp = dp;
  p.global_batch = 4 * dp;
  return p;
}

TEST(Clocks, SkewedRanksAreBroughtBackToOneClock) {
  const Graph g = gpt();
  for (const auto& [pp, tp, dp] : {std::tuple{2, 1, 1}, {2, 2, 1}, {2, 1, 2}}) {
    const Program program = lowered(g, plan_of(pp, tp, dp));
    const std::int64_t zero = true_time();
    Watched watched;
    // Seconds apart, and up to 0.03 % fast or slow. Rank 0 has the true clock.
    const Options o = skewed(g, 3, pp * tp * dp, watched, [zero](int rank, std::int64_t t) {
      const double drift = (rank % 2 == 0 ? 1e-4 : -1e-4) * rank;
      return t + rank * 5'000'000'000 * (rank == 2 ? -1 : 1) +
             std::llround(drift * static_cast<double>(t - zero));
    });
    const RankResult result = run_over_sockets(program, o);
    EXPECT_EQ(result.ranks[0].clock_uncertainty_s, 0);
    for (std::size_t r = 1; r < result.ranks.size(); ++r) {
      EXPECT_GT(result.ranks[r].clock_uncertainty_s, 0);
      EXPECT_LT(result.ranks[r].clock_uncertainty_s, 1) << "the best of sixteen answers";
    }
    expect_true(program, result, watched);
    expect_causal(program, result);
  }
}

TEST(Clocks, ThreadsShareTheirs) {
  const Graph g = gpt();
  const Program program = lowered(g, plan_of(2, 1, 2));
  Watched watched;
  const Options o = skewed(g, 2, 4, watched, nullptr);
  const RankResult result = run_threads(program, o)[0];
  for (const auto& r : result.ranks) EXPECT_EQ(r.clock_uncertainty_s, 0);
  expect_true(program, result, watched);
  expect_causal(program, result);
}

}  // namespace
}  // namespace partita::execute
